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
from run_files import records, table

from dfl_experiments.configuration.composition import CONF_DIR, compose, group_options, point_name
from dfl_experiments.configuration.schema import check
from dfl_experiments.running import checkpoint
from dfl_experiments.running.progress import Progress
from dfl_experiments.train import overrides_first

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("epochs=2", "tracking=disabled")


def test_a_sweep_s_jobs_give_what_each_gives_alone(tmp_path):
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
    weights, others = (
        checkpoint.load_checkpoint(swept)["net"],
        checkpoint.load_checkpoint(single)["net"],
    )
    assert all(torch.equal(value, others[key]) for key, value in weights.items())


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("epochs=1 --cfg job limit=2", "epochs=1 limit=2 --cfg job"),
        ("--config-dir a=b ~augmentation --info", "~augmentation --config-dir a=b --info"),
        ("--shell-completion install=bash", "install=bash --shell-completion"),
    ],
)
def test_flags_may_stand_anywhere(given, read):
    assert overrides_first(given.split()) == read.split()


def test_one_failing_job_of_a_sweep_leaves_the_others_their_results(tmp_path):
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
    results = [
        json.loads(path.read_text())
        for path in (tmp_path / "outputs" / "mixed").glob("*/result.json")
    ]
    assert {result["dataset"]: result["status"] for result in results} == {
        "mnist": "failed",
        "digits": "finished",
    }


def test_a_diverging_run_says_so_and_stops(tmp_path):
    done = dfl_train(
        tmp_path, "optimizer=sgd", "optimizer.lr=1e30", "epochs=3", "tracking=disabled", "method=bp"
    )
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "outputs").glob("*/*/result.json")
    result = json.loads(path.read_text())
    assert result["status"] == "diverged"
    assert "iteration" in result["reason"]
    assert len(table(path.parent / "epochs.csv")) == 1


@pytest.mark.parametrize(
    "choice",
    [f"{group.name}={name}" for group in sorted(CONF_DIR.iterdir()) if group.is_dir() and group.name != "hydra"
     for name in group_options(group.name)],
)  # fmt: skip
def test_every_file_of_every_group_composes(choice):
    """Those that leave something to the user get it."""
    needed = {
        "dataset=folder": ["dataset.source.path=here"],
        "dataset=arrays": ["dataset.source.path=here.npz"],
        "optimizer=torch": ["optimizer._target_=torch.optim.NAdam"],
        "model=module": ["model._target_=dfl_experiments.models.fc", "~model.boundaries", "+model.widths=[8]",
                         "+model.activation=relu"],
    }  # fmt: skip
    assert check(compose([choice, *needed.get(choice, [])]))


def test_a_point_s_name_follows_its_config_digest_alone():
    base = point_name(compose([]))
    assert base.startswith("las-fc-digits-none-seed0-")
    for same in (
        ["device=cpu"],
        ["tracking=disabled"],
        ["tracking.name=x"],
        ["data_dir=elsewhere"],
        ["sweep=name"],
    ):
        assert point_name(compose(same)) == base
    for other in (
        ["optimizer.lr=1e-3"],
        ["seed=1"],
        ["method.init=kaiming"],
        ["epochs=7"],
        ["limit=9"],
    ):
        assert point_name(compose(other)) != base


def test_help_lists_the_groups_and_an_example_of_each_use(tmp_path):
    printed = dfl_train(tmp_path, "--help", environment={}).stdout
    for words in (
        f"method: {', '.join(METHODS)}",
        "protocol: authors, fair, paper",
        "--multirun",
        "--cfg job",
    ):
        assert words in printed


def test_completion_offers_a_group_s_options(tmp_path):
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


def test_the_wheel_works_from_any_directory(tmp_path):
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
    where = [sys.executable, "-c", "import dfl_experiments; print(dfl_experiments.__file__)"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    printed = subprocess.run(
        where, cwd=elsewhere, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert printed.startswith(str(site))
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


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_an_interrupted_run_keeps_what_it_knew(stop, code, tmp_path):
    command = [sys.executable, "-m", "dfl_experiments.train", "epochs=100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    for _ in range(600):
        found = list((tmp_path / "outputs").glob("*/*/epochs.csv"))
        if found and len(table(found[0])) >= 3:
            break
        time.sleep(0.1)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    run_dir = found[0].parent
    result = json.loads((run_dir / "result.json").read_text())
    assert result["status"] == "interrupted"
    rows = table(run_dir / "epochs.csv")
    assert result["epochs"] == len(rows)
    assert result["test_accuracy"]["last"] == pytest.approx(float(rows[-1]["test_accuracy"]))
    found = records(run_dir)
    assert found["exit"][0]["exit_code"] != 0
    assert "interrupted" in [update.get("update", {}).get("status") for update in found["summary"]]


def test_a_run_that_starts_anew_claims_nothing_of_the_one_before(tmp_path):
    assert dfl_train(tmp_path, "hydra.run.dir=here", "method=bp", *QUICK).returncode == 0
    before = {
        path: path.read_bytes() for path in (tmp_path / "here").rglob("*.*") if path.is_file()
    }
    again = dfl_train(tmp_path, "hydra.run.dir=here", "method=las", *QUICK)
    assert again.returncode == 2
    assert "has a run already (finished)" in again.stderr
    assert {path: path.read_bytes() for path in before} == before
    missing = ("dataset=mnist", "data_dir=nowhere", "force=true")
    assert dfl_train(tmp_path, "hydra.run.dir=here", "method=las", *missing, *QUICK).returncode == 2
    assert all(
        path.read_bytes() == before[path]
        for path in before
        if path.suffix in (".csv", ".json", ".pt")
    )
    assert (
        dfl_train(tmp_path, "hydra.run.dir=here", "method=las", "force=true", *QUICK).returncode
        == 0
    )
    assert json.loads((tmp_path / "here" / "result.json").read_text())["method"] == "las"


def test_the_package_is_the_command_too_and_tells_its_version(tmp_path):
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


def test_any_text_can_be_printed_on_any_terminal(tmp_path):
    options = ("hydra.run.dir='d/日本'", "epochs=1", "limit=64", "tracking=disabled")
    done = dfl_train(tmp_path, *options, environment={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert "Error" not in done.stderr
    command = [sys.executable, "-m", "dfl_experiments.report.dfl_report", "d"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    told = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (told.returncode, told.stderr) == (0, "")


def test_lines_within_an_epoch_and_at_its_end_say_how_far_the_run_is(caplog):
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


def test_a_quiet_run_prints_no_line_in_its_first_seconds(caplog):
    caplog.set_level(logging.INFO)
    progress = Progress(1, 64, 32, ["loss", "correct"], peek=True, is_quiet=True)
    progress.begin(1, 1e-4)
    progress.step(torch.tensor([[2.0, 16.0]]))
    progress.end({"train_loss": 2.3, "train_accuracy": 0.5, "test_accuracy": 0.5, "seconds": 0.5})
    assert not caplog.records
