"""Check which packages import which, and that the examples of the README and the guide work."""

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
# modules that every package may import
GROUND = {"console", "errors", "measured", "ranges", "optimizers", "schedules", "seal"}
# packages that each package may import, beside itself and the modules in GROUND
ALLOWED = {
    "engine": set(),
    "methods": {"engine"},
    "models": {"engine"},
    "data": set(),
    "configuration": set(),
    "running": {"configuration", "data", "engine"},
    "report": {"configuration", "running"},
}


def imported_packages(path):
    """Return the parts of `dfl_experiments` that a file imports."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("dfl_experiments.")}


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_only_allowed_packages(package):
    files = list((PACKAGE / package).glob("*.py"))
    assert files
    for path in files:
        assert imported_packages(path) <= ALLOWED[package] | GROUND | {package}, path


def test_modules_for_all_packages_import_only_each_other():
    for name in GROUND:
        assert imported_packages(PACKAGE / f"{name}.py") <= GROUND


def test_the_engine_needs_neither_hydra_nor_other_packages():
    others = [f"dfl_experiments.{package}" for package in ALLOWED if package != "engine"]
    blocked = ["hydra", "omegaconf", *others]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n"
        "from dfl_experiments.engine import alignment, blocknet, cuda_graph, learner, losses, method, trace"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_no_file_uses_private_parts_of_hydra():
    assert not [path for path in PACKAGE.rglob("*.py") if "hydra._internal" in path.read_text()]


def test_module_names_are_unique():
    names = [path.stem for path in PACKAGE.rglob("*.py") if path.stem != "__init__"]
    assert len(names) == len(set(names))


def test_the_repository_has_only_the_expected_top_level_entries():
    command = ["git", "-C", str(ROOT), "ls-files"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in listed if not name.startswith(".")}
    files = {"pyproject.toml", "README.md", "LICENSE", "CITATION.cff"}
    assert top == files | {"conf", "dfl_experiments", "scripts", "tests", "outputs"}


def prose():
    """Return the text of the README and of the guide."""
    return (ROOT / "README.md").read_text() + (ROOT / ".github" / "GUIDE.md").read_text()


@pytest.fixture
def example_files(tmp_path, monkeypatch):
    """Write the example files of the README and the guide to a folder, put it on the path, and return it."""
    blocks = re.findall(r"```(?:python|yaml)\n# (my_\S+)\n(.*?)```", prose(), re.S)
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


def test_the_readme_s_new_method_obeys_the_laws(example_files):
    options = ["-vv", "-p", "no:cacheprovider", "-k", "clipped"]  # as in the guide's command
    laws = [sys.executable, "-m", "pytest", *options, "tests/engine"]
    conf = str(example_files / "my_conf")
    environment = {**os.environ, "DFL_CONFIG_DIR": conf, "DFL_PLUGINS": "my_rules"}
    done = subprocess.run(
        laws, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 20
    assert "clipped-small" in done.stdout


def dfl_train(folder, *arguments):
    command = [sys.executable, "-m", "dfl_experiments.train", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)


def arguments_in_prose(kind):
    """Return the arguments of the first command in the prose that uses `my_conf` for this group, such as dataset."""
    pattern = rf"dfl-train (--config-dir my_conf .*{kind}=.*)"
    return re.search(pattern, prose())[1].replace('"', "").split()


def test_the_guide_s_data_source_is_learned_to_100_percent(example_files):
    quick = ("epochs=3", "optimizer.lr=1e-3", "tracking=disabled", "hydra.run.dir=here")
    done = dfl_train(example_files, *arguments_in_prose("dataset"), *quick)
    assert done.returncode == 0, done.stderr
    assert "finished: las, fc on noise" in done.stdout
    result = json.loads((example_files / "here" / "result.json").read_text())
    assert (result["test_images"], result["num_classes"], result["accuracy"]) == (300, 2, 1.0)


def test_the_guide_s_schedule_gives_the_rates_of_its_formula(example_files):
    quick = ("epochs=3", "optimizer.lr=1e-3", "tracking=disabled", "hydra.run.dir=here")
    done = dfl_train(example_files, *arguments_in_prose("schedule"), *quick)
    assert done.returncode == 0, done.stderr
    with (example_files / "here" / "epochs.csv").open() as file:
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


def test_a_run_of_the_readme_s_new_method_is_repeated_only_with_its_plugin(example_files):
    quick = ("epochs=2", "tracking=disabled", "hydra.run.dir=here")
    done = dfl_train(example_files, *arguments_in_prose("method"), *quick)
    assert done.returncode == 0, done.stderr
    assert "finished: clipped, small on digits" in done.stdout
    refused = dfl_train(example_files, "repeat=here")
    assert refused.returncode == 2
    assert "method._target_=my_rules.ClippedFeedback: must be a subclass of dfl_" in refused.stderr
    repeated = dfl_train(example_files, "repeat=here", "plugins=[my_rules]", "hydra.run.dir=there")
    assert repeated.returncode == 0
    original = (example_files / "here" / "iterations.csv").read_bytes()
    assert (example_files / "there" / "iterations.csv").read_bytes() == original


def test_the_guide_s_net_trains_on_arrays_with_the_readme_s_command(example_files):
    samples, labels = np.zeros((90, 6, 4), np.float32), np.arange(90) % 3
    samples += labels[:, None, None]
    arrays = {"X_train": samples, "y_train": labels, "X_test": samples, "y_test": labels}
    np.savez(example_files / "data.npz", **arrays)
    command = re.search(r"dfl-train (model=module .*?)#", prose(), re.S)[1]
    arguments = command.replace("\\\n", " ").replace('"', "").split()
    quick = ("epochs=1", "tracking=disabled")
    done = dfl_train(example_files, *arguments, *quick, "hydra.run.dir=here")
    assert done.returncode == 0, done.stderr
    assert "layers: 1 first, 2 second" in done.stdout


def test_the_readme_s_python_example_works(tmp_path):
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
