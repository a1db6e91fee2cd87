"""The shape of the code that keeps methods and models orthogonal, and what the README promises."""

import ast
import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dfl_experiments"
GROUND = {"console", "errors", "measured", "ranges", "optimizers", "schedules", "seal"}
# what each room may import beside the ground and itself
ALLOWED = {
    "engine": set(),
    "methods": {"engine"},
    "models": {"engine"},
    "data": set(),
    "configuration": set(),
    "running": {"configuration", "data", "engine"},
    "report": {"configuration", "running"},
}


def rooms_imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom | ast.Import):
            names = (
                [node.module]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
            )
            yield from (
                name.split(".")[1] for name in names if name and name.startswith("dfl_experiments.")
            )


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room):
    files = list((PACKAGE / room).glob("*.py"))
    assert files
    for path in files:
        allowed = ALLOWED[room] | GROUND | {room}
        assert set(rooms_imported(path)) <= allowed, path


def test_the_ground_knows_nothing_but_itself():
    for name in GROUND:
        assert set(rooms_imported(PACKAGE / f"{name}.py")) <= GROUND


def test_the_engine_needs_no_hydra_and_no_other_room():
    others = [f"dfl_experiments.{room}" for room in ALLOWED if room != "engine"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({['hydra', 'omegaconf', *others]}))\n"
        "from dfl_experiments.engine import alignment, blocknet, cuda_graph, learner, losses, method, trace"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_no_private_part_of_hydra_is_used():
    assert not [path for path in PACKAGE.rglob("*.py") if "hydra._internal" in path.read_text()]


def test_no_two_modules_have_one_name():
    names = [path.stem for path in PACKAGE.rglob("*.py") if path.stem != "__init__"]
    assert len(names) == len(set(names))


def test_the_top_level_is_what_it_is_said_to_be():
    command = ["git", "-C", str(ROOT), "ls-files"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in listed if not name.startswith(".")}
    files = {"pyproject.toml", "README.md", "LICENSE", "CITATION.cff"}
    assert top == files | {"conf", "dfl_experiments", "scripts", "tests", "outputs"}


def prose():
    """The README and the user guide."""
    return (ROOT / "README.md").read_text() + (ROOT / ".github" / "GUIDE.md").read_text()


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The files that the README and the guide show, in a folder of their own, on the path; and how it calls them."""
    text = prose()
    blocks = re.findall(r"```(?:python|yaml)\n# (my_\S+)\n(.*?)```", text, re.S)
    assert sorted(Path(name).name for name, _ in blocks) == [
        "clipped.yaml",
        "gru.yaml",
        "inverse_root.yaml",
        "my_data.py",
        "my_nets.py",
        "my_rules.py",
        "my_schedules.py",
        "noise.yaml",
        "small.yaml",
    ]
    for name, content in blocks:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    return tmp_path


def test_the_readme_s_new_method_obeys_the_laws(own):
    laws = [
        sys.executable,
        "-m",
        "pytest",
        "-vv",
        "-p",
        "no:cacheprovider",
        "-k",
        "clipped-",
        "tests/engine/test_laws.py",
    ]
    environment = {**os.environ, "DFL_CONFIG_DIR": str(own / "my_conf"), "DFL_PLUGINS": "my_rules"}
    done = subprocess.run(
        laws, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 20
    assert "clipped-small" in done.stdout


def dfl_train(folder, *arguments):
    command = [sys.executable, "-m", "dfl_experiments.train", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)


def asked(kind):
    """Return the arguments of the first command of the guide that chooses an option of one's own, such as dataset=."""
    pattern = rf"dfl-train (--config-dir my_conf .*{kind}=.*)"
    return re.search(pattern, prose())[1].replace('"', "").split()


def test_the_guide_s_source_gives_what_it_says(own):
    quick = ("epochs=3", "optimizer.lr=1e-3", "tracking=disabled", "hydra.run.dir=here")
    done = dfl_train(own, *asked("dataset"), *quick)
    assert done.returncode == 0, done.stderr
    assert "finished: las, fc on noise" in done.stdout
    result = json.loads((own / "here" / "result.json").read_text())
    assert (result["test_images"], result["num_classes"], result["accuracy"]) == (300, 2, 1.0)


def test_the_guide_s_schedule_gives_the_rates_of_its_formula(own):
    quick = ("epochs=3", "optimizer.lr=1e-3", "tracking=disabled", "hydra.run.dir=here")
    done = dfl_train(own, *asked("schedule"), *quick)
    assert done.returncode == 0, done.stderr
    with (own / "here" / "epochs.csv").open() as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    assert rates == pytest.approx([1e-3, 1e-3 / 3**0.5, 1e-3 / 5**0.5])


def test_the_guide_s_lines_turn_a_csv_file_into_a_data_set(tmp_path):
    rows = [f"{i},{i % 3},{('low', 'mid', 'high')[i % 3]}" for i in range(90)]
    (tmp_path / "table.csv").write_text("\n".join(["number,rest,label", *rows]))
    (code,) = re.findall(r"```python\n(import numpy as np\nimport pandas.*?)```", prose(), re.S)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    quick = ("epochs=1", "tracking=disabled", "hydra.run.dir=here")
    done = dfl_train(tmp_path, "dataset=arrays", "dataset.source.path=data.npz", *quick)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "here" / "result.json").read_text())
    assert (result["samples"], result["input_shape"]) == ("features", [2])
    assert (result["test_images"], result["num_classes"]) == (45, 3)


def test_the_readme_s_new_method_trains_and_its_run_is_repeated_only_where_its_package_is_named(
    own,
):
    quick = ("epochs=2", "tracking=disabled", "hydra.run.dir=here")
    done = dfl_train(own, *asked("method"), *quick)
    assert done.returncode == 0, done.stderr
    assert "finished: clipped, small on digits" in done.stdout
    refused = dfl_train(own, "repeat=here")
    assert refused.returncode == 2
    assert (
        "method._target_=my_rules.ClippedFeedback: must be a subclass of Method" in refused.stderr
    )
    again = dfl_train(own, "repeat=here", "plugins=[my_rules]", "hydra.run.dir=there")
    assert again.returncode == 0
    assert (own / "there" / "iterations.csv").read_bytes() == (
        own / "here" / "iterations.csv"
    ).read_bytes()


def test_the_guide_s_net_trains_on_arrays_as_the_readme_calls_it(own):
    samples, labels = np.zeros((90, 6, 4), np.float32), np.arange(90) % 3
    samples += labels[:, None, None]
    np.savez(
        own / "data.npz",
        X_train=samples,
        y_train=labels,
        X_test=samples,
        y_test=labels,
    )
    command = re.search(r"dfl-train (model=module .*?)#", prose(), re.S)[1]
    arguments = command.replace("\\\n", " ").replace('"', "").split()
    quick = ("epochs=1", "tracking=disabled")
    done = dfl_train(own, *arguments, *quick, "hydra.run.dir=here")
    assert done.returncode == 0, done.stderr
    assert "layers: 1 first, 2 second" in done.stdout


def test_the_readme_s_python_gives_what_it_says(tmp_path):
    (code,) = re.findall(
        r"```python\n(import dfl_experiments as dfl\n\nconfiguration.*?)```", prose(), re.S
    )
    check = """
assert result["status"] == "finished" and result["epochs"] == 3
assert len(table["loss"]) == 63 and 0.5 < table["cosine_sample/1"].mean() < 1
assert len(runs) == 1 and figure.axes
assert len(curves) == 3 and set(curves.method) == {"ltas"}
import torch
assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
"""
    done = subprocess.run(
        [sys.executable, "-c", code + check],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
