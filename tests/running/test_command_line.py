"""The real command line on the bundled digits: sweeps, interruptions, help and completion, the wheel."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import METHODS
from processes import dfl_train
from run_files import records, summary, table

from dfl_experiments.configuration.composition import CONF_DIR, compose, group_options, point_name
from dfl_experiments.configuration.schema import check
from dfl_experiments.running import checkpoint
from dfl_experiments.running.progress import Progress
from dfl_experiments.train import overrides_first

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("epochs=2", "tracking=disabled")


def test_sweep_point_equals_the_single_run(tmp_path):
    done = dfl_train(
        tmp_path, "--multirun", "method=bp,shallow,dfa,ltas", "seed=0,1", "sweep=grid", *QUICK
    )
    assert done.returncode == 0, done.stderr
    points = sorted((tmp_path / "outputs" / "grid").glob("*/result.json"))
    assert len(points) == 8
    alone = dfl_train(tmp_path, "method=ltas", "seed=1", *QUICK)
    assert alone.returncode == 0, alone.stderr
    (single,) = (tmp_path / "outputs").glob("*/*-ltas-fc-digits")
    (swept,) = (tmp_path / "outputs" / "grid").glob("ltas-fc-digits-none-seed1-*")
    assert (swept / "iterations.csv").read_text() == (single / "iterations.csv").read_text()
    weights, expected = (checkpoint.load_checkpoint(path)["net"] for path in (swept, single))
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("typed", "reordered"),
    [
        ("epochs=1 --cfg job limit=2", "epochs=1 limit=2 --cfg job"),
        ("--config-dir a=b ~augmentation --info", "~augmentation --config-dir a=b --info"),
        ("--shell-completion install=bash", "install=bash --shell-completion"),
    ],
)
def test_flags_are_accepted_at_any_position(typed, reordered):
    assert overrides_first(typed.split()) == reordered.split()


def test_failing_point_does_not_affect_other_points(tmp_path):
    sweep = (
        "--multirun",
        "dataset=mnist,digits",
        "data_dir=nowhere",
        "sweep=mixed",
        "method=bp",
        *QUICK,
    )
    done = dfl_train(tmp_path, *sweep)
    assert done.returncode == 1
    assert "sweep mixed: 2 points, 1 failed, 1 finished" in done.stdout
    assert "dfl-data prepare dataset=mnist" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    statuses = {}
    for path in (tmp_path / "outputs" / "mixed").glob("*/result.json"):
        result = json.loads(path.read_text())
        statuses[result["dataset"]] = result["status"]
    assert statuses == {"mnist": "failed", "digits": "finished"}


def test_diverging_run_stops_and_records_the_reason(tmp_path):
    done = dfl_train(
        tmp_path, "optimizer=sgd", "optimizer.lr=1e30", "epochs=3", "tracking=disabled", "method=bp"
    )
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "outputs").glob("*/*/result.json")
    result = json.loads(path.read_text())
    assert result["status"] == "diverged"
    assert "iteration" in result["reason"]
    assert len(table(path.parent / "epochs.csv")) == 1


def choices():
    """Return every file of every group under conf/ as group=name."""
    groups = [path.name for path in sorted(CONF_DIR.iterdir()) if path.is_dir()]
    groups.remove("hydra")
    return [f"{group}={name}" for group in groups for name in group_options(group)]


@pytest.mark.parametrize("choice", choices())
def test_every_file_of_every_group_composes(choice):
    required = {
        "dataset=folder": ["dataset.source.path=here"],
        "dataset=arrays": ["dataset.source.path=here.npz"],
        "optimizer=torch": ["optimizer._target_=torch.optim.NAdam"],
        "model=module": ["model._target_=dfl_experiments.models.fc", "~model.boundaries", "+model.widths=[8]",
                         "+model.activation=relu"],
    }  # fmt: skip
    assert check(compose([choice, *required.get(choice, [])]))


def test_point_name_changes_only_with_options_that_change_results():
    base = point_name(compose([]))
    assert base.startswith("las-fc-digits-none-seed0-")
    without_effect = (
        "device=cpu",
        "tracking=disabled",
        "tracking.name=x",
        "data_dir=elsewhere",
        "sweep=name",
    )
    for option in without_effect:
        assert point_name(compose([option])) == base
    for option in ("optimizer.lr=1e-3", "seed=1", "method.init=kaiming", "epochs=7", "limit=9"):
        assert point_name(compose([option])) != base


def test_help_lists_groups_and_examples(tmp_path):
    printed = dfl_train(tmp_path, "--help", environment={}).stdout
    for words in (
        f"method: {', '.join(METHODS)}",
        "protocol: authors, fair, paper",
        "--multirun",
        "--cfg job",
    ):
        assert words in printed


def test_shell_completion_offers_the_options_of_a_group(tmp_path):
    line = "dfl-train method=l"
    environment = {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    done = dfl_train(tmp_path, "--shell-completion", "query=bash", environment=environment)
    assert done.stdout.split() == ["method=las", "method=ltas"]


def test_wandb_is_not_imported_when_tracking_is_off(tmp_path):
    code = (
        "import sys; from dfl_experiments.train import main\n"
        "try: main()\n"
        "finally: print('wandb' in sys.modules, file=sys.stderr)"
    )
    arguments = [sys.executable, "-c", code, "method=bp", *QUICK]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.split() == ["False"]


def test_installed_wheel_works_from_any_directory(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels, site, elsewhere = tmp_path / "wheels", tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    build = [
        *pip,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(wheels),
        str(ROOT),
    ]
    subprocess.run(build, check=True, timeout=200)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, timeout=200
    )
    done = dfl_train(elsewhere, "method=dfa", *QUICK, environment={"PYTHONPATH": str(site)})
    assert done.returncode == 0, done.stderr
    assert list((elsewhere / "outputs").glob("*/*/result.json"))
    code = "import dfl_experiments; print(dfl_experiments.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    imported = subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert imported.stdout.startswith(str(site))
    report = [
        sys.executable,
        "-m",
        "dfl_experiments.report.dfl_report",
        "outputs",
        "--format",
        "html",
    ]
    subprocess.run(report, cwd=elsewhere, env=environment, check=True, timeout=100)
    assert "Fully connected net on digits" in (elsewhere / "report.html").read_text()


def test_interrupted_run_keeps_its_results_and_ends_its_wandb_run(tmp_path):
    command = [sys.executable, "-m", "dfl_experiments.train", "epochs=100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    for _ in range(600):
        tables = list((tmp_path / "outputs").glob("*/*/epochs.csv"))
        if tables and len(table(tables[0])) >= 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    run_dir = tables[0].parent
    result = json.loads((run_dir / "result.json").read_text())
    assert result["status"] == "interrupted"
    rows = table(run_dir / "epochs.csv")
    assert result["epochs"] == len(rows)
    assert result["test_accuracy"]["last"] == pytest.approx(float(rows[-1]["test_accuracy"]))
    assert records(run_dir)["exit"][0]["exit_code"] != 0
    assert summary(run_dir)["status"] == "interrupted"


def test_existing_run_is_replaced_only_by_a_valid_forced_run(tmp_path):
    assert dfl_train(tmp_path, "hydra.run.dir=here", "method=bp", *QUICK).returncode == 0
    files = [path for path in (tmp_path / "here").rglob("*.*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    las = ("hydra.run.dir=here", "method=las", *QUICK)
    without_force = dfl_train(tmp_path, *las)
    assert without_force.returncode == 2
    assert without_force.stderr.splitlines()[-1].endswith(
        "has a run already (finished); force=true replaces it, another hydra.run.dir= keeps both"
    )
    assert {path: path.read_bytes() for path in files} == before
    missing_data = ("dataset=mnist", "data_dir=nowhere")
    assert dfl_train(tmp_path, *las, *missing_data, "force=true").returncode == 2
    for path in files:
        if path.suffix in (".csv", ".json", ".pt"):
            assert path.read_bytes() == before[path], path
    assert dfl_train(tmp_path, *las, "force=true").returncode == 0
    assert json.loads((tmp_path / "here" / "result.json").read_text())["method"] == "las"


def test_python_m_runs_the_command_and_prints_the_version(tmp_path):
    for module in ("dfl_experiments", "dfl_experiments.train"):
        done = subprocess.run(
            [sys.executable, "-m", module, "--version"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=True,
        )
        assert done.stdout == f"dfl-experiments {version('dfl-experiments')}\n"
    command = [sys.executable, "-m", "dfl_experiments", "--cfg"]
    wrong = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("usage: dfl-train ")


def test_single_run_of_an_experiment_says_that_its_grid_needs_multirun(tmp_path):
    options = ("experiment=depth_digits", "epochs=1", "--dry-run")
    note = "this is one run; the experiment's grid over "
    keys = "seed, model.widths, optimizer.lr, method"
    assert f"{note}{keys} needs --multirun\n" in dfl_train(tmp_path, *options).stdout
    point = ("seed=0", "model.widths=[8]", "optimizer.lr=1e-3")
    assert f"{note}method needs" in dfl_train(tmp_path, *options, *point).stdout
    assert note not in dfl_train(tmp_path, *options, *point, "method=dfa").stdout
    assert note not in dfl_train(tmp_path, "--multirun", *options, *point, "method=dfa").stdout


def test_unicode_paths_can_be_printed_on_an_ascii_terminal(tmp_path):
    options = ("hydra.run.dir='d/日本'", "epochs=1", "limit=64", "tracking=disabled")
    done = dfl_train(tmp_path, *options, environment={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert "Error" not in done.stderr
    command = [sys.executable, "-m", "dfl_experiments.report.dfl_report", "d"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    report = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (report.returncode, report.stderr) == (0, "")


def test_progress_lines_show_metrics_speed_and_time_left(caplog):
    caplog.set_level(logging.INFO)
    progress = Progress(100, 60000, 32, ["loss", "correct", "cosine_sample/1"], peek=True)
    progress.begin(99, 1e-4)
    progress._last_line = -1e9
    progress.step(torch.tensor([[2.0, 16.0, 0.12345]]))
    progress.step(torch.tensor([[2.0, 16.0, 0.12345], [3.0, 8.0, 0.12345]]))
    row = {
        "train_loss": 2.3,
        "train_accuracy": 0.5,
        "test_accuracy": 0.98765,
        "cosine/1": -0.12345,
        "seconds": 0.5,
    }
    progress._last_end = -1e9
    progress.end(row)
    within, end = (record.message for record in caplog.records)
    assert within.startswith("epoch 99/100 batch 1/1875  loss 2.0000  accuracy 0.5000  ")
    assert re.search(r"\d images/s  \S.* left  lr 0.0001$", within)
    assert end.startswith(
        "epoch 99/100  loss 2.3000  accuracy 0.5000  test accuracy 0.9877  cosine/1 -0.123  "
    )
    assert re.search(r"  120000 images/s  \S.* left  lr 0.0001$", end)


def test_the_last_batch_has_no_line_besides_its_epochs(caplog):
    caplog.set_level(logging.INFO)
    progress = Progress(9, 32, 32, ["loss", "correct"], peek=True)
    progress.begin(5, 1e-4)
    progress._last_line = progress._last_end = -1e9
    progress.step(torch.tensor([[2.0, 16.0]]))
    progress.end({"train_loss": 2.3, "train_accuracy": 0.5, "test_accuracy": 0.5, "seconds": 0.5})
    (line,) = (record.message for record in caplog.records)
    assert line.startswith("epoch 5/9  loss 2.3000  ")


def test_quiet_run_prints_no_line_in_its_first_seconds(caplog):
    caplog.set_level(logging.INFO)
    progress = Progress(1, 64, 32, ["loss", "correct"], peek=True, is_quiet=True)
    progress.begin(1, 1e-4)
    progress.step(torch.tensor([[2.0, 16.0]]))
    progress.end({"train_loss": 2.3, "train_accuracy": 0.5, "test_accuracy": 0.5, "seconds": 0.5})
    assert not caplog.records
