"""A sweep lists its points on a dry run, prints its progress, and ends with a table and the command that plots it."""

import json
import re
from statistics import mean, stdev

import pytest
from processes import dfl_train
from run_files import table

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
    """Return a sweep's folder and its output. The points on mnist have failed, because the data are missing."""
    folder = tmp_path_factory.mktemp("sweep")
    return folder / "outputs" / "s", dfl_train(folder, *SWEEP)


def test_summary_csv_has_a_column_for_each_swept_key_and_each_result(ended_sweep):
    folder, done = ended_sweep
    assert done.returncode == 1
    rows = table(folder / "summary.csv")
    keys = "method dataset seed"
    results = "status reason accuracy validation_accuracy cosine/1 dead/1 seconds folder"
    assert list(rows[0]) == [*keys.split(), *results.split()]
    assert len(rows) == 8
    for row in rows:
        result = json.loads((folder / row["folder"] / "result.json").read_text())
        for column in ("method", "dataset", "seed", "status"):
            assert row[column] == str(result[column])
        if row["dataset"] == "digits":
            assert row["status"] == "finished"
            for column in ("accuracy", "validation_accuracy", "seconds"):
                assert row[column] == str(result[column])
            assert row["cosine/1"] == str(result["cosine"]["1"])
            assert row["dead/1"] == str(result["dead"]["1"])
        else:
            assert row["status"] == "failed"
            for column in ("accuracy", "validation_accuracy", "seconds"):
                assert row[column] == ""


def test_end_table_has_a_row_per_setting_with_the_best_first_and_marked(ended_sweep):
    folder, done = ended_sweep
    printed = done.stdout.partition("sweep s: 8 points, ")[2].splitlines()
    head, first, second, *failed, legend = printed[1:7]
    columns = ["method", "dataset", "n"]
    columns += ["test accuracy (mean ± sd)", "validation accuracy (mean ± sd)", "cosine of layer 1"]
    assert re.split("  +", head.strip()) == columns
    assert legend == "  * highest validation accuracy"
    accuracies = {"bp": [], "dfa": []}
    for row in table(folder / "summary.csv"):
        if row["status"] == "finished":
            accuracies[row["method"]].append(float(row["validation_accuracy"]))
    best, other = sorted(accuracies, key=lambda method: -mean(accuracies[method]))
    assert first.split()[:4] == ["*", best, "digits", "2"]
    assert second.split()[:3] == [other, "digits", "2"]
    assert f"{mean(accuracies[best]):.4f} ± {stdev(accuracies[best]):.4f}" in first
    for line in failed:
        assert line.split()[1:] == ["mnist", "0", "of", "2", "-", "-", "-"]


def test_failed_points_are_listed_with_their_reason(ended_sweep):
    folder, done = ended_sweep
    for row in table(folder / "summary.csv"):
        start = f"  {row['folder']} "
        lines = [line for line in done.stdout.splitlines() if line.startswith(start)]
        if row["status"] == "failed":
            (line,) = lines
            assert row["reason"]
            assert line.endswith(row["reason"])
        else:
            assert not lines


def test_each_finished_run_prints_one_progress_line(ended_sweep):
    _, done = ended_sweep
    lines = [line for line in done.stdout.splitlines() if " of 8 finished" in line]
    assert [line.split()[0] for line in lines] == ["1", "2", "3", "4"]
    assert all("accuracy 0." in line for line in lines)
    assert "test accuracy   " not in done.stdout
    assert "epoch 1/1" not in done.stdout


def test_run_and_sweep_end_with_the_command_that_plots_them(ended_sweep, tmp_path):
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


def test_plot_command_has_the_full_path_of_a_folder_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plot_line(tmp_path.parent / "a b").endswith(f"dfl-plot '{tmp_path.parent / 'a b'}'")


GRID = ("--multirun", "hydra.sweep.dir=grid", *SMALL)


@pytest.mark.parametrize(
    "options",
    [SMALL, (*GRID, "seed=0,1", "hydra/launcher=joblib")],
    ids=["run", "sweep"],
)
def test_dry_run_prints_the_time_and_writes_nothing(options, tmp_path):
    dry = dfl_train(tmp_path, *options, "--dry-run")
    assert (dry.returncode, dry.stderr) == (0, "")
    assert re.search(r"^about \d+ \w+ on this machine.*; 2 s of each run are", dry.stdout, re.M)
    assert not list(tmp_path.iterdir())


def test_dry_run_lists_the_state_of_each_point_and_writes_nothing(tmp_path):
    def times():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    assert dfl_train(tmp_path, *GRID, "seed=0").returncode == 0
    (result,) = (tmp_path / "grid").glob("*/result.json")
    before = times()
    dry = dfl_train(tmp_path, *GRID, "seed=0,1", "--dry-run")
    assert times() == before
    lines = [line.split() for line in dry.stdout.splitlines()]
    assert ["done", result.parent.name, "seed=0"] in lines
    (line,) = (line for line in lines if "seed=1" in line)
    assert line[0] == "new"
    result.unlink()  # as if the run had been killed
    assert "  interrupted  " in dfl_train(tmp_path, *GRID, "seed=0", "--dry-run").stdout


def test_dry_run_names_the_points_that_an_error_ended(ended_sweep):
    folder, _ = ended_sweep
    dry = dfl_train(folder.parent.parent, *SWEEP, "--dry-run")
    states = [line.split()[0] for line in dry.stdout.splitlines() if "seed=" in line]
    assert sorted(states) == ["done"] * 4 + ["failed"] * 4


def test_dry_run_estimates_the_runs_whose_parts_fit_together(tmp_path):
    data = ("dataset=digits,mnist", "data_dir=nowhere", "seed=0,1")
    dry = dfl_train(tmp_path, *GRID, *data, "--dry-run")
    problem = (
        r"time unknown for 2 of them, such as las-fc-mnist-\S+: dataset mnist is not in nowhere"
    )
    assert len(re.findall(problem, dry.stdout)) == 1
    assert re.search(r"^about \d+ \w+ for the others on this machine", dry.stdout, re.M)


def test_dry_run_refuses_mistakes_and_downloads_nothing(tmp_path):
    refused = dfl_train(tmp_path, "--multirun", "--dry-run", "method=nobody", "seed=0,1")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    missing = dfl_train(tmp_path, "--dry-run", "dataset=mnist", "data_dir=nowhere")
    assert missing.returncode == 0
    assert "time unknown: dataset mnist is not in nowhere/mnist" in missing.stdout
    assert not list(tmp_path.iterdir())


def test_time_left_is_estimated_from_points_that_were_trained():
    trained, earlier, failed = (
        ["ran", "100", "110"],
        ["found", "90", "99"],
        ["failed", "100", "101"],
    )
    assert progress_text(5, [earlier]) == "1 of 5 finished"
    assert progress_text(5, [earlier, trained]) == "2 of 5 finished, about 30 s left"
    two_at_once = [earlier, trained, trained]
    assert progress_text(5, two_at_once) == "3 of 5 finished, about 10 s left"
    with_failure = [earlier, trained, failed]
    assert progress_text(5, with_failure) == "2 of 5 finished, 1 failed, about 20 s left"
    assert progress_text(0, [trained]) == "1 finished"
    assert progress_text(1, [trained]) == "1 of 1 finished"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "1 s"), (98, "98 s"), (120, "2 min"), (5400, "1 h 30 min"), (300000, "3 days")],
)
def test_duration_is_printed_in_a_suitable_unit(seconds, text):
    assert duration(seconds) == text


def test_points_are_counted_across_processes_until_the_command_ends(tmp_path):
    PointCounter(tmp_path, "c1").start(3)
    assert PointCounter(tmp_path, "c1").add("found", 0) == "1 of 3 finished"
    assert PointCounter(tmp_path, "c1").add("elsewhere", 0) == "1 of 3 finished"
    PointCounter(tmp_path, "c1").remove()
    assert PointCounter(tmp_path, "c1").add("ran", 0) == ""
    assert not list(tmp_path.iterdir())


def ending(name, lr, accuracy, status="finished", **result):
    content = {"accuracy": accuracy, "validation_accuracy": accuracy, "cosine": {"1": 0.5}} | result
    return Ending(name, status, "", [f"optimizer.lr={lr}", f"seed={name}", "limit=9"], content)


def test_partly_collapsed_setting_ranks_below_the_others(capsys):
    collapsed = [ending("0", 1, 0.9), ending("1", 1, 0.1, "collapsed")]
    healthy = [ending("0", 2, 0.6), ending("1", 2, 0.8)]
    print_settings([*collapsed, *healthy])
    _, best, other, legend = capsys.readouterr().out.splitlines()
    assert legend == "  * highest validation accuracy of the settings without failing runs"
    accuracy = "0.7000 ± 0.1414"
    assert best.split() == f"* 2 2 {accuracy} {accuracy} 0.500".split()
    assert other.split()[:5] == ["1", "1", "of", "2", "0.9000"]


def test_without_validation_the_test_accuracy_ranks_and_one_seed_has_no_deviation(capsys):
    points = [
        ending("0", 1, 0.2, validation_accuracy=None),
        ending("0", 2, 0.3, validation_accuracy=None),
    ]
    print_settings(points)
    head, best, _, legend = capsys.readouterr().out.splitlines()
    assert "validation" not in head
    assert "sd" not in head
    assert legend == "  * highest test accuracy"
    assert best.split() == ["*", "2", "1", "0.3000", "0.500"]


def ended_point(method, lr, accuracy, classes=10, **result):
    """Return a finished point of one seed."""
    test_accuracy = {"last": accuracy, "best": accuracy}
    content = {"num_classes": classes, "test_accuracy": test_accuracy} | result
    point = ending("0", lr, accuracy, **content)
    return point._replace(overrides=[f"method={method}", *point.overrides])


def test_settings_are_grouped_by_method_and_failed_learning_is_marked(capsys):
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
    order = [row.replace("*", "").split()[:2] for row in rows]
    assert order == [["las", "1"], ["las", "2"], ["bp", "1"], ["bp", "3"], ["bp", "2"]]
    # LAS at rate 2 ends at chance; BP at rate 2 ends a fifth under its best; BP at rate 3 is a smoke run
    assert ["1 (1 did not learn)" in row for row in rows] == [False, True, False, False, True]
    assert "without failing runs" in legend
    assert explanation.startswith("  did not learn: ")
    print_settings([ended_point("bp", 1, 0.1111), ended_point("bp", 2, 0.1)])
    assert "*" not in capsys.readouterr().out


def test_a_run_that_did_not_learn_is_averaged_only_if_no_other_run_of_the_row_learned(capsys):
    learned = ended_point("las", 1, 0.8)
    not_learned = ended_point("las", 1, 0.1)._replace(overrides=[*learned.overrides, "seed=1"])
    alone = ended_point("las", 2, 0.1)
    print_settings([learned, not_learned, alone])
    _, first, second, _ = capsys.readouterr().out.splitlines()
    assert first.split() == ["1", "2", "(1", "did", "not", "learn)", "0.8000", "0.8000", "0.500"]
    assert second.split()[5:] == ["learn)", "0.1000", "0.1000", "0.500"]


def test_summary_columns_are_the_overrides_that_change_results():
    assert values_by_key(["+a.b=1", "~c", "sweep=x", "device=cpu", "protocol=fair", "a.b=2"]) == {
        "a.b": "2",
        "c": "",
        "protocol": "fair",
    }
    head, *rows = summary_rows([ending("0", "@x", None, "failed"), ending("1", 2, 0.5)])
    assert head[:3] == ["optimizer.lr", "seed", "status"]
    assert [row[:3] for row in rows] == [["@x", "0", "failed"], ["2", "1", "finished"]]
