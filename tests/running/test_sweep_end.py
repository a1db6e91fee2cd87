"""A sweep prints its points before it starts, its progress, a table at its end, and the command that plots it."""

import csv
import json
import re
from statistics import mean, stdev

import pytest
from processes import dfl_train

from dfl_experiments.running.outcome import Ending
from dfl_experiments.running.point_counter import PointCounter, duration, progress_text
from dfl_experiments.running.run_directory import plot_line
from dfl_experiments.running.summary import print_settings, summary_rows, values_by_key

SMALL = ("model.widths=[16]", "epochs=1", "limit=64", "tracking=disabled")
SWEEP = (
    "--multirun",
    "sweep=s",
    "method=bp,dfa",
    "dataset=digits,mnist",
    "seed=0,1",
    "data_dir=nowhere",
    *SMALL,
    "batch_size=8",
    "optimizer.lr=1e-2",
)


@pytest.fixture(scope="module")
def ended_sweep(tmp_path_factory):
    """A sweep's folder and its output; the points on mnist have failed."""
    folder = tmp_path_factory.mktemp("sweep")
    return folder / "outputs" / "s", dfl_train(folder, *SWEEP)


def table_of(folder):
    with (folder / "summary.csv").open() as file:
        return list(csv.DictReader(file))


def test_summary_csv_has_a_column_for_each_swept_key_and_each_result(ended_sweep):
    folder, done = ended_sweep
    assert done.returncode == 1
    rows = table_of(folder)
    results = [
        "status",
        "reason",
        "accuracy",
        "validation_accuracy",
        "cosine/1",
        "dead/1",
        "seconds",
        "folder",
    ]
    assert list(rows[0]) == ["method", "dataset", "seed", *results]
    assert len(rows) == 8
    for row in rows:
        result = json.loads((folder / row["folder"] / "result.json").read_text())
        assert (row["method"], row["dataset"], row["seed"]) == (
            result["method"],
            result["dataset"],
            str(result["seed"]),
        )
        assert (
            row["status"]
            == result["status"]
            == ("finished" if row["dataset"] == "digits" else "failed")
        )
        for column in ("accuracy", "validation_accuracy", "seconds"):
            assert row[column] == (str(result[column]) if row["status"] == "finished" else "")
        if row["status"] == "finished":
            assert row["cosine/1"] == str(result["cosine"]["1"])
            assert row["dead/1"] == str(result["dead"]["1"])


def test_the_end_table_has_a_row_for_each_setting_with_the_best_first_and_marked(ended_sweep):
    folder, done = ended_sweep
    head, *lines, legend = done.stdout.partition("sweep s: 8 points, ")[2].splitlines()[1:7]
    accuracies = ["test accuracy (mean ± sd)", "validation accuracy (mean ± sd)"]
    names = ["method", "dataset", "n", *accuracies, "cosine of layer 1"]
    assert re.split("  +", head.strip()) == names
    assert legend == "  * highest validation accuracy"
    held_out = {}
    for row in table_of(folder):
        if row["status"] == "finished":
            held_out.setdefault(row["method"], []).append(float(row["validation_accuracy"]))
    best, second = sorted(held_out, key=lambda method: -mean(held_out[method]))
    marked, other, *failed = (line.split() for line in lines)
    assert marked[:4] == ["*", best, "digits", "2"]
    assert other[:3] == [second, "digits", "2"]
    shown = f"{mean(held_out[best]):.4f} ± {stdev(held_out[best]):.4f}"
    assert shown in lines[0]
    assert [row[1:] for row in failed] == [["mnist", "0", "of", "2", "-", "-", "-"]] * 2
    assert "tracking" not in head + lines[0]


def test_points_that_have_no_result_stand_by_themselves_with_their_reason(ended_sweep):
    folder, done = ended_sweep
    for row in table_of(folder):
        lines = [
            line for line in done.stdout.splitlines() if line.startswith(f"  {row['folder']} ")
        ]
        assert len(lines) == (row["status"] == "failed")
        assert all(row["reason"] and line.endswith(row["reason"]) for line in lines)


def test_each_finished_run_is_one_line_that_says_how_far_the_sweep_is(ended_sweep):
    _, done = ended_sweep
    lines = [line for line in done.stdout.splitlines() if " of 8 finished" in line]
    assert [line.split()[0] for line in lines] == ["1", "2", "3", "4"]
    assert all("accuracy 0." in line for line in lines)
    assert "test accuracy   " not in done.stdout
    assert "epoch 1/1" not in done.stdout


def test_a_run_and_a_sweep_end_with_the_command_that_plots_them(ended_sweep, tmp_path):
    _, done = ended_sweep
    assert done.stdout.splitlines()[-2:] == [
        "  plot it: dfl-plot outputs/s",
        "  compare: dfl-report outputs/s",
    ]
    assert "the folder holds" not in done.stdout
    run = dfl_train(tmp_path, *SMALL, "hydra.run.dir='my run'")
    assert run.stdout.splitlines()[-1] == "  plot it: dfl-plot 'my run'"
    assert "at best" not in run.stdout
    assert "images/s" in run.stdout
    assert "samples/s" not in run.stdout


def test_the_plot_line_names_a_folder_elsewhere_by_its_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plot_line(tmp_path.parent / "a b").endswith(f"dfl-plot '{tmp_path.parent / 'a b'}'")


def test_a_dry_run_lists_the_points_and_their_time_and_leaves_nothing(tmp_path):
    swept = ("--multirun", "hydra.sweep.dir=grid", *SMALL)
    for options in (
        ("--dry-run", *SMALL),
        (*swept, "seed=0,1", "--dry-run", "hydra/launcher=joblib"),
    ):
        dry = dfl_train(tmp_path, *options)
        assert (dry.returncode, dry.stderr) == (0, "")
        assert re.search(r"^about \d+ \w+ on this machine.*; 2 s of each run are", dry.stdout, re.M)
        assert not list(tmp_path.iterdir())
    assert dfl_train(tmp_path, *swept, "seed=0").returncode == 0
    (point,) = (tmp_path / "grid").glob("*/result.json")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    dry = dfl_train(tmp_path, *swept, "seed=0,1", "--dry-run")
    lines = [line.split() for line in dry.stdout.splitlines()]
    assert ["done", point.parent.name, "seed=0"] in lines
    assert [(line[0], line[-1]) for line in lines if "seed=1" in line] == [("new", "seed=1")]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    point.unlink()
    assert "  interrupted  " in dfl_train(tmp_path, *swept, "seed=0", "--dry-run").stdout


def test_a_dry_run_refuses_mistakes_and_downloads_nothing(tmp_path):
    refused = dfl_train(tmp_path, "--multirun", "--dry-run", "method=nobody", "seed=0,1")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    missing = dfl_train(tmp_path, "--dry-run", "dataset=mnist", "data_dir=nowhere")
    assert missing.returncode == 0
    assert "time unknown: dataset mnist is not in nowhere/mnist" in missing.stdout
    assert not list(tmp_path.iterdir())


def test_the_time_left_is_that_of_the_points_that_ran():
    ran, found, failed = ["ran", "100", "110"], ["found", "90", "99"], ["failed", "100", "101"]
    assert progress_text(5, [found]) == "1 of 5 finished"
    assert progress_text(5, [found, ran]) == "2 of 5 finished, about 30 s left"
    assert progress_text(5, [found, ran, ran]) == "3 of 5 finished, about 10 s left"  # two at once
    assert progress_text(5, [found, ran, failed]) == "2 of 5 finished, 1 failed, about 20 s left"
    assert progress_text(0, [ran]) == "1 finished"
    assert progress_text(1, [ran]) == "1 of 1 finished"
    seconds = (0, 98, 120, 5400, 300000)
    assert [*map(duration, seconds)] == ["1 s", "98 s", "2 min", "1 h 30 min", "3 days"]


def test_points_are_counted_in_whatever_process_they_run_until_the_command_has_ended(tmp_path):
    PointCounter(tmp_path, "c1").start(3)
    assert PointCounter(tmp_path, "c1").add("found", 0) == "1 of 3 finished"
    assert PointCounter(tmp_path, "c1").add("elsewhere", 0) == "1 of 3 finished"
    PointCounter(tmp_path, "c1").remove()
    assert PointCounter(tmp_path, "c1").add("ran", 0) == ""
    assert not list(tmp_path.iterdir())


def ending(name, lr, accuracy, status="finished", **result):
    content = {"accuracy": accuracy, "validation_accuracy": accuracy, "cosine": {"1": 0.5}} | result
    return Ending(name, status, "", [f"optimizer.lr={lr}", f"seed={name}", "limit=9"], content)


def test_a_setting_that_partly_collapsed_ranks_below_those_that_did_not(capsys):
    print_settings(
        [
            ending("0", 1, 0.9),
            ending("1", 1, 0.1, "collapsed"),
            ending("0", 2, 0.6),
            ending("1", 2, 0.8),
        ]
    )
    head, best, other, legend = capsys.readouterr().out.splitlines()
    assert legend == "  * highest validation accuracy of the settings without failing runs"
    assert best.split() == [
        "*",
        "2",
        "2",
        "0.7000",
        "±",
        "0.1414",
        "0.7000",
        "±",
        "0.1414",
        "0.500",
    ]
    assert other.split()[:5] == ["1", "1", "of", "2", "0.9000"]
    print_settings(
        [
            ending("0", 1, 0.2, validation_accuracy=None),
            ending("0", 2, 0.3, validation_accuracy=None),
        ]
    )
    head, best, _, legend = capsys.readouterr().out.splitlines()
    assert "validation" not in head
    assert "sd" not in head  # one seed
    assert legend == "  * highest test accuracy"
    assert best.split() == ["*", "2", "1", "0.3000", "0.500"]


def ended_point(method, lr, accuracy, classes=10, **result):
    """A finished point of one seed."""
    told = {"num_classes": classes, "test_accuracy": {"last": accuracy, "best": accuracy}} | result
    point = ending("0", lr, accuracy, **told)
    return point._replace(overrides=[f"method={method}", *point.overrides])


def test_the_settings_of_one_method_are_together_and_those_that_did_not_learn_are_marked(capsys):
    points = [
        ended_point("bp", 1, 0.5),
        ended_point("las", 1, 0.8),
        ended_point("bp", 2, 0.9, test_accuracy={"last": 0.7, "best": 0.9}),
        ended_point("las", 2, 0.1111),
        ended_point("bp", 3, 0.1111, config={"smoke": 64}),
    ]
    print_settings(points)
    _, *rows, legend, explanation = capsys.readouterr().out.splitlines()
    assert rows[0].split()[:4] == ["*", "las", "1", "1"]
    assert [row.replace("*", "").split()[:2] for row in rows] == [
        ["las", "1"],
        ["las", "2"],
        ["bp", "1"],
        ["bp", "3"],
        ["bp", "2"],
    ]
    assert ["1 (1 did not learn)" in row for row in rows] == [False, True, False, False, True]
    assert "without failing runs" in legend
    assert explanation.startswith("  did not learn: ")
    print_settings([ended_point("bp", 1, 0.1111), ended_point("bp", 2, 0.1)])
    assert "*" not in capsys.readouterr().out


def test_columns_are_what_differs_and_what_decides_a_result():
    assert values_by_key(["+a.b=1", "~c", "sweep=x", "device=cpu", "protocol=fair", "a.b=2"]) == {
        "a.b": "2",
        "c": "",
        "protocol": "fair",
    }
    head, *rows = summary_rows([ending("0", "@x", None, "failed"), ending("1", 2, 0.5)])
    assert head[:3] == ["optimizer.lr", "seed", "status"]
    assert [row[:3] for row in rows] == [["@x", "0", "failed"], ["2", "1", "finished"]]
