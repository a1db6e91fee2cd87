"""The shape of the code that keeps methods and models orthogonal, and the README's promise of how one adds to it."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dfl_experiments"


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield f"{node.module}."
        elif isinstance(node, ast.Import):
            yield from (f"{alias.name}." for alias in node.names)


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("methods", ("models", "data", "learning", "experiment", "run", "train", "tracking")),
        ("models", ("methods", "data", "learning", "alignment", "experiment", "run", "train", "tracking")),
        ("data", ("methods", "models", "learning", "alignment", "experiment", "run", "train", "tracking")),
    ],
)
def test_imports_point_one_way(folder, forbidden):
    found = {name for path in (PACKAGE / folder).glob("*.py") for name in imports(path)}
    assert found
    assert not [name for name in found if name.startswith(tuple(f"dfl_experiments.{part}." for part in forbidden))]


def test_the_top_level_is_what_it_is_said_to_be():
    command = ["git", "-C", str(ROOT), "ls-files"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in listed if not name.startswith(".")}
    files = {"pyproject.toml", "README.md", "LICENSE", "CITATION.cff"}
    assert top == files | {"conf", "dfl_experiments", "scripts", "tests", "outputs"}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_the_readme_s_new_method_is_complete_and_obeys_the_laws(tmp_path):
    """Write the files that the README shows into a copy of the project, then run the laws and a training of it."""
    blocks = re.findall(
        r"```(?:python|yaml)\n# ((?:dfl_experiments|conf)/\S+)\n(.*?)```", (ROOT / "README.md").read_text(), re.S
    )
    assert {Path(name).suffix for name, _ in blocks} == {".py", ".yaml"}
    assert sum(text.count("\n") + 1 for _, text in blocks) < 60
    for folder in ("conf", "dfl_experiments", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in blocks:
        assert not (tmp_path / name).exists()
        (tmp_path / name).write_text(text)
    (method,) = (Path(name).stem for name, _ in blocks if name.startswith("conf/method"))
    laws = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "tests/test_laws.py", "-k", f"{method}-"]
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(laws, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 20
    (model,) = (Path(name).stem for name, _ in blocks if name.startswith("conf/model"))
    assert f"{method}-{model}" in done.stdout
    choice = (f"method={method}", f"model={model}", "epochs=2", "tracking=disabled")
    run = [sys.executable, "-m", "dfl_experiments.train", *choice]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert f"finished: {method}, {model} on digits" in done.stdout
