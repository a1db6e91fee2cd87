"""Run directories in any state: what is damaged spoils no report, what is none of ours is named and left out."""

import shutil

import pytest
from report_helpers import altered, dfl_report, finished, only_entry

from dfl_experiments.report.runs import read_runs

HARMLESS = {
    "a line too many that breaks off": lambda table: table.write_text(table.read_text() + "4,9.1e-"),
    "no table": lambda table: table.unlink(),
}
FOREIGN = {
    "a number for a group": ({"dataset": 3}, {}),
    "an interpolation": ({"dataset.name": "${foo.bar}"}, {}),
    "a script for a name": ({"method.name": "<!--<script>"}, {}),
    "a list for a status": ({}, {"status": ["finished"]}),
    "a text for an accuracy": ({}, {"accuracy": "0.9"}),
    "an accuracy of 98 %": ({}, {"accuracy": 98.0}),
    "a number for accuracies": ({}, {"test_accuracy": 0.9}),
    "a number for cosines": ({}, {"cosine": 1}),
    "a number for layers": ({}, {"cosine_by_construction": 2}),
    "a number for a commit": ({}, {"git_commit": 1234}),
    "a list for a reason": ({}, {"reason": []}),
    "a text for seconds": ({}, {"seconds": "fast"}),
    "a number for versions": ({}, {"versions": 3}),
    "no learning rate": ({"optimizer": {"name": "adam"}}, {}),
    "no epochs": ({"epochs": None}, {}),
    "an unknown headline": ({"protocol.accuracy": "best"}, {}),
    "no throughput": ({}, {"samples_per_second": None}),
    "no accuracy": ({}, {"accuracy": None}),
    "a word for a seed": ({"seed": "one"}, {}),
}


@pytest.mark.parametrize("change", HARMLESS)
def test_a_table_that_lacks_nothing_is_read(change, finished_point, tmp_path):
    altered(finished_point, tmp_path / "runs" / "good", **finished(0.9, 1e-3, 0))
    HARMLESS[change](altered(finished_point, tmp_path / "runs" / "changed", **finished(0.9, 1e-3, 1)) / "epochs.csv")
    done = dfl_report(tmp_path, "runs", "--format", "html")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("what", FOREIGN)
def test_a_directory_that_is_none_of_ours_is_named_and_left_out(what, finished_point, tmp_path):
    altered(finished_point, tmp_path / "runs" / "good", **finished(0.9, 1e-3, 0))
    config, result = FOREIGN[what]
    altered(finished_point, tmp_path / "runs" / "bad", {"seed": 1, **config}, **result)
    done = dfl_report(tmp_path, "runs", "--format", "html")
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("dfl-report: left out: runs/bad (")


def test_a_weight_decay_of_none_is_zero(finished_point, tmp_path):
    altered(finished_point, tmp_path / "a", {"optimizer.weight_decay": None})
    assert only_entry(tmp_path).best.weight_decay == 0.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["data"], "data: no run directory there"),
        (["outputs", "--format", "pdf"], "invalid choice: 'pdf'"),
        (["outputs", "--out", "data"], "data: Is a directory"),
    ],
)
def test_a_mistake_is_one_line(reported, arguments, words):
    done = dfl_report(reported, *arguments)
    assert done.returncode != 0
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_run_that_grows_can_be_read(finished_point, tmp_path):
    shutil.copytree(finished_point, tmp_path / "runs" / "point")
    (tmp_path / "runs" / "other").mkdir()
    (tmp_path / "runs" / "other" / "config.yaml").write_text("of: something else")
    half = (tmp_path / "runs" / "point" / "epochs.csv").read_text()[:-9]
    (tmp_path / "runs" / "point" / "epochs.csv").write_text(half)
    (tmp_path / "runs" / "point" / "result.json").unlink()
    (run,) = read_runs([tmp_path / "runs"])
    assert run.status == "interrupted"
    assert len(run.epochs["test_accuracy"]) == 2
