"""A result depends on its configuration, the user's code, the data, and the versions. Changes are detected."""

import csv
import importlib
import io
import json
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from processes import dfl_train
from report_helpers import dfl_report

from dfl_experiments.configuration.components import import_object
from dfl_experiments.running.provenance import component_code
from dfl_experiments.running.result import read_result, write_result

SMALL = ("model.widths=[16,16]", "epochs=1", "limit=64", "tracking=disabled", "alignment.every=0")
RULE = """
from dfl_experiments.methods import Direct

class Mine(Direct):
    def source(self, error, target):
        return error
"""
# a rule that interrupts its process in each step as long as a file named stop exists
STOPPING = """
import signal
from pathlib import Path

from dfl_experiments.methods import Direct

class Mine(Direct):
    def source(self, error, target):
        if Path("stop").exists():
            signal.raise_signal(signal.SIGINT)
        return error
"""
YAML = """
name: mine
_target_: my_rules.Mine
init: ${protocol.dfa_init}
top: ${protocol.dfa_top}
"""


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Return `dfl-train` for a folder whose modules can be imported, with the user's rule method=mine."""
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path, {"conf/method/mine.yaml": YAML})
    return partial(dfl_train, tmp_path, "--config-dir", "conf", "plugins=[my_rules]")


def report_rows(folder):
    """Return (method, n) of each row of the report."""
    printed = dfl_report(folder, "outputs", "--format", "csv").stdout
    return [(row["method"], row["n"]) for row in csv.DictReader(io.StringIO(printed))]


@pytest.mark.parametrize("folder", ["here", "a run, lr=1"])
def test_interrupted_plugin_run_prints_its_resume_command(folder, own, tmp_path):
    write(tmp_path, {"my_rules.py": STOPPING, "stop": ""})
    stopped = own("method=mine", *SMALL, f"hydra.run.dir='{folder}'")
    assert stopped.returncode == 130
    _, _, command = stopped.stdout.splitlines()[-1].partition("continue with: ")
    program, *arguments = shlex.split(command)
    again = own("method=mine", *SMALL, f"hydra.run.dir='{folder}'")
    assert f"(interrupted); {shlex.join(arguments)} continues it, " in again.stderr
    (tmp_path / "stop").unlink()
    done = dfl_train(tmp_path, *arguments)
    assert (program, done.returncode, done.stderr) == ("dfl-train", 0, "")
    assert "continuing after epoch 0, batch 1" in done.stdout


def test_interrupted_sweep_counts_points_not_started(own, tmp_path):
    write(tmp_path, {"my_rules.py": STOPPING, "stop": ""})
    sweep = ("--multirun", "method=mine", "sweep=grid", "seed=0,1,2,3", *SMALL)
    stopped = own(*sweep)
    assert stopped.returncode == 130
    _, _, summary = stopped.stdout.partition("sweep grid: 4 points, 3 not started, 1 interrupted\n")
    interrupted, others, _ = summary.splitlines()
    assert interrupted.endswith("  interrupted  SIGINT")
    assert others == "  3 not started: the same command with sweep=grid continues"
    (tmp_path / "stop").unlink()
    assert "4 points, 4 finished" in own(*sweep).stdout


def test_changed_code_separates_report_rows_and_refuses_resume(own, tmp_path):
    write(tmp_path, {"my_rules.py": RULE})
    sweep = ("--multirun", "method=mine", "sweep=grid", *SMALL)
    refusal = "other data or code: method my_rules "
    assert own(*sweep, "seed=0").returncode == 0
    assert own("method=mine", *SMALL, "hydra.run.dir=here").returncode == 0
    (tmp_path / "here" / "result.json").unlink()  # as if the run had been killed
    write(tmp_path, {"my_rules.py": RULE + "# another rule\n"})

    dry = own(*sweep, "seed=0,1", "--dry-run").stdout
    assert [line.split()[0] for line in dry.splitlines()[1:3]] == ["refused", "new"]
    assert (
        "\n1 of 2 to train\n1 will be refused; the first: outputs/grid/mine-fc-digits-none-" in dry
    )
    assert f": has a run with {refusal}" in dry
    assert "\n0 of 1 to train\n1 will be refused; " in own("resume=here", "--dry-run").stdout

    again = own(*sweep, "seed=0,1")
    assert again.returncode == 1
    (line,) = (line for line in again.stdout.splitlines() if "failed: " in line)
    assert refusal in line
    resumed = own("resume=here")
    assert resumed.returncode == 2
    assert refusal in resumed.stderr
    assert len(resumed.stderr.splitlines()) == 1

    first, second = report_rows(tmp_path)  # a row for each version of the code
    for method, n in (first, second):
        assert method.startswith("mine, code=my_rules")
        assert n == "1"

    assert "\n2 of 2 to train\n" in own(*sweep, "seed=0,1", "force=true", "--dry-run").stdout
    assert own(*sweep, "seed=0,1", "force=true").returncode == 0
    write(tmp_path, {"my_rules.py": RULE})  # with the first code the run can be resumed
    assert own("resume=here").returncode == 0
    assert report_rows(tmp_path) == [("mine", "2")]


@pytest.mark.parametrize(
    ("target", "files", "changed"),
    [
        ("rules_a.Mine", {"rules_a.py": RULE}, "rules_a.py"),
        (
            "rules_b.Mine",
            {"rules_b/__init__.py": RULE, "rules_b/more/helper.py": ""},
            "rules_b/more/helper.py",
        ),
        (
            "rules_c.deep.Mine",
            {"rules_c/deep.py": RULE, "rules_c/helper.py": ""},
            "rules_c/helper.py",
        ),
        ("rules_d.Mine", {"rules_d.py": "from base_d import Mine", "base_d.py": RULE}, "base_d.py"),
    ],
)
def test_code_digest_covers_all_files_of_the_package_and_nothing_else(
    target, files, changed, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path, files)

    def digest():
        for name in list(sys.modules):
            if name.startswith((target.partition(".")[0], "base_d")):
                del sys.modules[name]
        importlib.invalidate_caches()
        return component_code(target, import_object(target))

    first = digest()
    write(tmp_path, {"notes.py": "", "rules_b/notes.txt": "", "rules_c/.#helper.py": ""})
    assert digest() == first
    write(tmp_path, {changed: files[changed] + "# another rule\n"})
    assert digest() != first


def test_only_used_code_counts_and_runs_without_recorded_code_are_accepted(own, tmp_path):
    write(tmp_path, {"my_rules.py": RULE})
    sweep = ("--multirun", "sweep=grid", "method=dfa,mine", *SMALL)
    assert own(*sweep).returncode == 0
    (dfa,) = tmp_path.glob("outputs/grid/dfa-*")
    (mine,) = tmp_path.glob("outputs/grid/mine-*")
    assert read_result(dfa)["code"] == {}
    result = read_result(mine)
    assert list(result["code"]) == ["method"]
    del result["code"]  # early versions recorded no code
    write_result(mine, result)
    write(tmp_path, {"my_rules.py": RULE + "# another rule\n"})
    again = own(*sweep)
    assert again.returncode == 0, again.stdout
    assert again.stdout.count("finished already") == 2


def test_failed_point_is_retried_after_its_code_was_fixed(own, tmp_path):
    write(tmp_path, {"my_rules.py": RULE.replace("return error", "return slip")})
    sweep = ("--multirun", "sweep=grid", "method=mine", *SMALL)
    assert own(*sweep).returncode == 1
    write(tmp_path, {"my_rules.py": RULE})
    assert own(*sweep).returncode == 0


@pytest.mark.parametrize("editable", [False, True])
def test_installed_plugin_is_identified_by_version_and_editable_one_by_code(
    editable, own, tmp_path
):
    record = "" if editable else "my_rules.py,,\n"
    metadata = {
        "METADATA": "Name: my-rules\nVersion: 1.2\n",
        "RECORD": f"{record}x.pth,,\n",
        "top_level.txt": "my_rules",
    }
    info = {f"my_rules-1.2.dist-info/{name}": text for name, text in metadata.items()}
    write(tmp_path, {"my_rules.py": RULE, **info})
    assert own("method=mine", *SMALL, "hydra.run.dir=here").returncode == 0
    code = read_result(tmp_path / "here")["code"]["method"]
    assert (code == "my-rules 1.2") != editable


def test_code_without_a_file_is_warned_about_once(tmp_path):
    text = f"""{RULE}
import dfl_experiments as dfl
node = "{{name: mine, _target_: __main__.Mine, init: kaiming, top: direct}}"
for seed in 0, 1:
    cfg = dfl.compose(["plugins=[__main__]", f"~method", f"+method={{node}}", f"seed={{seed}}", *{SMALL}])
    print(dfl.run(cfg, f"run{{seed}}")["code"])
"""
    done = subprocess.run(
        [sys.executable, "-"], input=text, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines().count("{}") == 2
    assert done.stderr.count("__main__: has no file") == 1


def test_test_images_among_the_training_images_are_counted(tmp_path):
    pack = tmp_path / "data" / "mnist"
    pack.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), np.uint8)
    parts = {"train": images[:30], "test": np.concatenate([images[28:], images[28:29]])}
    for split, part in parts.items():
        np.save(pack / f"{split}_images.npy", part)
        np.save(pack / f"{split}_labels.npy", np.arange(len(part)) % 2)
    (pack / "classes.json").write_text(json.dumps(["a", "b"]))
    done = dfl_train(tmp_path, "dataset=mnist", "data_dir=data", *SMALL, "hydra.run.dir=here")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 of 13 test samples are also training samples") == 1
    assert read_result(tmp_path / "here")["test_images_in_training"] == 3
