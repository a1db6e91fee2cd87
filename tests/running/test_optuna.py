"""Optuna's sweeper maximises the validation accuracy. Most tests need its plugin and are skipped without it."""

import json
import re
import shlex
import shutil

import pytest
from processes import dfl_train
from report_helpers import altered
from run_files import table

from dfl_experiments.configuration.composition import CONF_DIR
from dfl_experiments.report.frame import runs
from dfl_experiments.running.outcome import objective
from dfl_experiments.running.run_directory import EPOCH_COLUMNS, csv_text

RUN = (
    "epochs=2",
    "limit=200",
    "model.widths=[16]",
    "tracking=disabled",
    "alignment.every=0",
    "threads=1",
)
OPTUNA = (
    "--multirun",
    "hydra/sweeper=optuna",
    "hydra.sweeper.n_trials=3",
    "optimizer.lr=interval(1e-4,1e-1)",
    *RUN,
)


def validation_accuracies(run_dir):
    return [float(row["validation_accuracy"]) for row in table(run_dir / "epochs.csv")]


def test_best_point_has_the_highest_validation_accuracy_and_its_command_repeats_it(
    tmp_path,
):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    (tmp_path / "my conf" / "method").mkdir(parents=True)
    shutil.copyfile(CONF_DIR / "method" / "dfa.yaml", tmp_path / "my conf" / "method" / "own.yaml")
    done = dfl_train(tmp_path, *OPTUNA, "sweep=s", "--config-dir", "my conf", "method=own")
    assert done.returncode == 0, done.stderr
    points = [path.parent for path in (tmp_path / "outputs" / "s").glob("*/result.json")]
    assert len(points) == 3
    best = max(validation_accuracies(point)[-1] for point in points)
    assert f"Best value: {best}" in done.stdout
    (line,) = re.findall(r"^  best validation accuracy.*", done.stdout, re.M)
    text, _, command = line.partition(": ")
    assert text.endswith(f"{best:.4f}")
    program, *arguments = shlex.split(command)
    assert program == "dfl-train"
    assert dfl_train(tmp_path, *arguments, "hydra.run.dir=again").returncode == 0
    assert validation_accuracies(tmp_path / "again")[-1] == pytest.approx(best)


def test_optuna_is_refused_without_a_validation_split(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    done = dfl_train(tmp_path, *OPTUNA, "sweep=s", "validation_fraction=0")
    assert done.returncode == 2
    assert done.stderr.startswith("dfl-train: error: validation_fraction=0: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("seeds", "code"),
    [("0,1", 2), ("range(0,2)", 2), ("interval(0,9)", 2), ("choice(3)", 0), ("3", 0)],
)
def test_optuna_is_refused_if_it_would_choose_the_seed(seeds, code, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    done = dfl_train(tmp_path, *OPTUNA, "seed=8,9", f"seed={seeds}", "--dry-run")
    assert done.returncode == code
    if code == 0:
        assert done.stderr == ""
    else:
        (line,) = done.stderr.splitlines()
        refusal = "hydra/sweeper=optuna would choose a lucky seed; "
        assert line.startswith(f"dfl-train: error: seed={seeds}: {refusal}")


def test_dry_run_with_optuna_prints_the_time_of_one_run(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    dry = dfl_train(tmp_path, *OPTUNA, "--dry-run")
    assert (dry.returncode, dry.stderr) == (0, "")
    _, runs, *_, time = dry.stdout.splitlines()
    assert runs == "the sweeper chooses the points during the sweep, up to 3 runs; one run takes"
    assert re.match(r"about \d+ s on this machine", time)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "swept", ["optimizer.lr=interval(1e-5,1e-2)", "optimizer.lr=tag(log,interval(1e-5,1e-2))"]
)
def test_continuous_range_without_optuna_is_refused_in_one_line(swept, tmp_path):
    done = dfl_train(tmp_path, "--multirun", swept, "seed=0,1")
    assert done.returncode == 2
    assert (
        done.stderr == f"dfl-train: error: {swept}: a continuous range needs hydra/sweeper=optuna\n"
    )
    assert not list(tmp_path.iterdir())


ACCURACIES = (0.5, 0.7, 0.4)  # on the validation images, of three epochs


@pytest.mark.parametrize(
    ("protocol", "expected"), [("last", 0.4), ("best_validation", 0.7), ("best_test", 0.5)]
)
def test_objective_is_the_validation_accuracy_of_the_reported_epoch(
    protocol, expected, finished_point, tmp_path
):
    run_dir = tmp_path / "run"
    test_accuracy = {"last": 0.5, "at_best_validation": 0.5, "best": 0.5, "best_epoch": 1}
    config = {"epochs": 3, "protocol.accuracy": protocol}
    result = {"accuracy": 0.5, "validation_accuracy": ACCURACIES[-1], "cosine": {}}
    altered(finished_point, run_dir, config, test_accuracy=test_accuracy, **result)
    rows = []
    for epoch, accuracy in enumerate(ACCURACIES, start=1):
        row = dict.fromkeys(EPOCH_COLUMNS, 0.5) | {"epoch": epoch, "validation_accuracy": accuracy}
        rows.append(row.values())
    (run_dir / "epochs.csv").write_text(csv_text([EPOCH_COLUMNS, *rows]))
    assert objective(run_dir) == expected
    assert runs(tmp_path).score.item() == expected  # by which reports choose a rate
    result = json.loads((run_dir / "result.json").read_text())
    (run_dir / "result.json").write_text(json.dumps(result | {"status": "diverged"}))
    assert objective(run_dir) == 0
