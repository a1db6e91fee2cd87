"""The scripts that reproduce the paper: the cells, the time estimate, the budget, the report, the dashboard."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import reproduce as reproduce_script
from report_helpers import SMALL, write_packs

from dfl_experiments.configuration.composition import PLACES
from dfl_experiments.report.paper import published

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def reproduce(folder, *arguments, timeout=250):
    """Run the script as a user would."""
    command = [sys.executable, str(SCRIPTS / "reproduce.py"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def planned(tmp_path, monkeypatch, capsys):
    """Return a function that makes a dry run in this process, which avoids new imports."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["reproduce", *arguments, "--dry-run"])
        code = 0
        try:
            reproduce_script.main()
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        if isinstance(code, str):  # sys.exit(message)
            err = code
        return subprocess.CompletedProcess(arguments, code, out, err)

    return run


@pytest.mark.parametrize("installed", ["here", "elsewhere"])
def test_scripts_use_the_active_environment_if_this_folder_is_installed_there(installed, tmp_path):
    for name in ("here", "elsewhere"):
        shutil.copytree(SCRIPTS, tmp_path / name / "scripts")
        (tmp_path / name / "dfl_experiments").mkdir()
        (tmp_path / name / "dfl_experiments" / "__init__.py").touch()
    interpreter = tmp_path / "mine" / "bin" / "python"
    interpreter.parent.mkdir(parents=True)
    path = tmp_path / installed
    interpreter.write_text(f'#!/bin/sh\nPYTHONPATH={path} exec {sys.executable} "$@"\n')
    interpreter.chmod(0o755)
    script = tmp_path / "here" / "scripts" / "environment.sh"
    environment = os.environ | {"VIRTUAL_ENV": str(tmp_path / "mine")}
    command = ["bash", "-c", f"source {script}; own_python"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == (f"{interpreter}\n" if installed == "here" else "")


@pytest.mark.parametrize("table", ["fc", "cnn"])
def test_experiments_have_exactly_the_cells_of_the_paper_table(table):
    cells = []
    for _, grid in reproduce_script.chosen(f"{table}_table", []):
        for cell in reproduce_script.cells_of(grid):
            point = next(cell.points())
            cells.append(tuple(point[group] for group in PLACES))
    assert len(cells) == len(set(cells))
    paper = published().query("table == @table")
    assert set(cells) == set(paper[list(PLACES)].itertuples(index=False, name=None))


def test_option_only_selects_runs_and_their_time_is_estimated(planned):
    done = planned("all", "--only", "mnist,las", "--seeds", "2", "--epochs", "3")
    assert done.returncode == 0, done.stderr
    calls = [line for line in done.stdout.splitlines() if line.startswith("dfl-train")]
    experiments = [re.search(r"experiment=(\S+)", line)[1] for line in calls]
    seeds = [re.search(r"seed=(\S+)", line)[1] for line in calls]
    assert experiments == ["alignment_figure", "fc_mnist"] * 2
    assert seeds == ["0", "0", "1", "1"]
    for line in calls:
        assert "epochs=3" in line
        assert "method=las" in line
    assert "10 runs of 4 cells" in done.stdout
    for hours, _, _ in cells_with_hours(done.stdout):
        assert hours > 0


def test_estimate_takes_overrides_into_account(planned):
    options = ("fc_table", "--only", "mnist,las")
    hours = []
    for overrides in ((), ("epochs=1", "limit=1000,2000", "batch_size=256", "alignment.every=0")):
        done = planned(*options, *overrides)
        assert done.returncode == 0, done.stderr
        hours.append(sum(hours for hours, _, _ in cells_with_hours(done.stdout)))
    assert "8 runs of 1 cells" in done.stdout
    assert hours[1] < hours[0] / 10


def cells_with_hours(printed):
    """Return the cells that a dry run lists, as (hours, seed, name)."""
    rows = re.findall(r"^ +(\S+) h  (\w+: .*), seed (\d+), runs: \d+$", printed, re.M)
    return [(float(hours), int(seed), name) for hours, name, seed in rows]


def test_budget_takes_cheap_cells_first_and_one_seed_of_all_cells_before_the_next(
    planned, tmp_path
):
    options = ("all", "--only", "mnist", "--seeds", "2", "--epochs", "1", "threads=1")
    everything = planned(*options, "--budget", "99h")
    assert everything.returncode == 0, everything.stderr
    cells = cells_with_hours(everything.stdout)
    hours, seeds, names = zip(*cells, strict=True)
    assert seeds == (0,) * 8 + (1,) * 8
    assert set(names[:8]) == set(names[8:])
    assert list(hours[:8]) == sorted(hours[:8])
    assert list(hours[8:]) == sorted(hours[8:])
    assert "46 runs of 16 cells" in everything.stdout
    assert "0 unfinished cells do not fit" in everything.stdout
    part = planned(*options, "--budget", f"{sum(hours) / 3:.6f}h")
    chosen = cells_with_hours(part.stdout)
    assert 0 < len(chosen) < len(cells)
    assert sum(hours for hours, _, _ in chosen) <= sum(hours) / 3 * 1.01
    assert not list(tmp_path.iterdir())


def test_too_small_budget_is_refused_with_the_time_of_the_cheapest_cell(planned):
    done = planned("fc_table", "--only", "mnist,bp", "--budget", "0.001h")
    assert done.returncode == 2
    assert re.search(
        r"--budget: too small; the cheapest cell takes about [\d.e-]+ hours here$", done.stderr
    )


def test_finished_runs_do_not_count_towards_a_budget(tmp_path, planned):
    data = f"data_dir={write_packs(tmp_path / 'data', mnist=1)}"
    options = ("--epochs", "1", "--budget", "9h", data, *SMALL[:-1])
    done = reproduce(tmp_path, "fc_table", "--only", "mnist,bp", *options)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("outputs/fc_table/*/result.json"))) == 4
    rest = planned("fc_table", "--only", "mnist", *options)
    for _, _, name in cells_with_hours(rest.stdout):
        assert not name.endswith(" bp")
    assert "16 runs of 4 cells" in rest.stdout
    # the finished runs have the first value of an override with two values
    swept = "optimizer.weight_decay=0,0.01"
    both = planned("fc_table", "--only", "mnist,bp", *options, swept)
    assert "4 runs of 1 cells" in both.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "svhn"], "--only svhn: choose from bp, cifar10"),
        (["--only", "mnist,flip"], "no run combines these words"),
        (["--seeds", "0"], "'0': must be a whole number above zero"),
        (["--launcher", "cloud"], "invalid choice: 'cloud'"),
        (["--launcher", "basic", "--jobs", "3"], "choose --launcher joblib"),
        (["--budget", "12"], "'12': must be a time above zero, such as 12h or 90m"),
        (["--budget", "0h"], "'0h': must be a time above zero"),
        (["--budget", "12h", "--jobs", "2"], "--budget: assumes whole runs, one after another"),
        (["--budget", "12h", "--smoke"], "--budget: assumes whole runs, one after another"),
        (["--job", "2"], "unrecognized arguments: --job"),
        (["sweep=mine"], "sweep=mine: the script sets sweep itself"),
        (["+optimizer.lr=1e-5"], "+optimizer.lr=1e-5: the script sets optimizer.lr itself"),
        (
            ["hydra.sweep.dir=elsewhere"],
            "hydra.sweep.dir=elsewhere: the script sets hydra.sweep.dir itself",
        ),
        (["batchsize=3"], "batchsize: no such option"),
    ],
)
def test_mistake_is_refused_in_one_line(planned, arguments, words):
    done = planned("fc_table", *arguments)
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]


def test_dry_run_needs_no_launcher():
    command = [
        sys.executable,
        str(SCRIPTS / "reproduce_arguments.py"),
        "all",
        "--launcher",
        "slurm",
    ]
    for flags, extras in (([], "slurm"), (["--dry-run"], "")):
        done = subprocess.run([*command, *flags], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == extras


def test_smoke_run_writes_a_report_whose_runs_can_be_kept(tmp_path):
    data = f"data_dir={write_packs(tmp_path / 'data', mnist=1)}"
    done = reproduce(tmp_path, "fc_table", "--smoke", "--only", "mnist", data, *SMALL[:-1])
    assert done.returncode == 0, done.stderr
    assert "5 points, 5 finished" in done.stdout
    report = tmp_path / "outputs" / "fc_table-smoke-report"
    rows = list(csv.DictReader((report / "tables.csv").open()))
    assert [row["method"] for row in rows] == ["bp", "shallow", "dfa", "las", "ltas"]
    assert all(row["smoke"] == "True" and float(row["accuracy"]) for row in rows)
    for name in ("tables.md", "tables.tex", "report.html"):
        assert "smoke test, no result" in (report / name).read_text()
    assert list((report / "figures").glob("*.pdf"))
    assert not list(tmp_path.glob("outputs/*/*/last.pt"))
    command = [sys.executable, str(SCRIPTS / "keep_results.py"), "outputs/fc_table-smoke", "kept"]
    kept = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "5 runs kept" in kept.stdout
    names = {path.name for path in (tmp_path / "kept").rglob("*.*") if path.is_file()}
    assert names == {"result.json", "epochs.csv", "config.yaml"}
    command = [sys.executable, "-m", "dfl_experiments.report.dfl_report", "kept", "--format", "csv"]
    same = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert same.stdout == (report / "tables.csv").read_text()


@pytest.mark.parametrize(("signum", "to_all"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_signal_ends_the_script_with_a_checkpoint_and_a_report(signum, to_all, tmp_path):
    data = f"data_dir={write_packs(tmp_path / 'data', mnist=1)}"
    command = [
        sys.executable,
        str(SCRIPTS / "reproduce.py"),
        "fc_table",
        "--only",
        "mnist,las",
        "--epochs",
        "20000",
    ]
    with (tmp_path / "output.txt").open("w") as output:
        script = subprocess.Popen(
            [*command, data, *SMALL[:-1]], cwd=tmp_path, stdout=output, start_new_session=True
        )
    folder = tmp_path / "outputs" / "fc_table"
    while not list(folder.glob("*/epochs.csv")):
        time.sleep(0.05)
    time.sleep(1)
    # Ctrl-C in a terminal reaches the whole process group
    (os.killpg if to_all else os.kill)(script.pid, signum)
    assert script.wait(timeout=60) == 128 + signum
    (run,) = folder.glob("*/result.json")
    assert json.loads(run.read_text())["status"] == "interrupted"
    assert (run.parent / "last.pt").exists()
    text = (tmp_path / "output.txt").read_text()
    assert re.search(r"LAS .* 1 interrupted", text)


def test_dashboard_is_written_to_a_file_without_a_login(tmp_path):
    command = [sys.executable, str(SCRIPTS / "wandb_dashboard.py"), "--layers", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "not saved to W&B (no --entity)" in done.stdout
    text = (tmp_path / "dashboard.json").read_text()
    for words in (
        "Accuracy by method",
        "cosine_sample/1",
        "cosine/2",
        "dead/2",
        "activation_rms/1",
        "norm_ratio/1",
        "samples_per_second",
    ):
        assert words in text
    assert "cosine/3" not in text
