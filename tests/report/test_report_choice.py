"""A report shows the right grid point of every cell and every gap, and mixes nothing with smoke."""

import csv
import io
import os
import shutil
import statistics
from dataclasses import replace

import pytest
from processes import dfl_train
from report_helpers import GRID, altered, dfl_report, entries, finished, only_entry, results, told

from dfl_experiments.report.cells import sections
from dfl_experiments.report.commands import command
from dfl_experiments.report.paper import PAPER
from dfl_experiments.report.runs import read_runs
from dfl_experiments.report.setting import setting_of, words_of
from dfl_experiments.report.tables import ours_and_paper


@pytest.mark.parametrize("method", ["bp", "dfa", "las"])
def test_a_cell_shows_the_point_that_is_best_on_the_validation_split(reported, method):
    (row,) = (row for row in entries(reported) if row["method"] == method and not row["smoke"])
    points = {lr: results(reported, method, lr) for lr in (1e-2, 1e-3)}
    best = max(points, key=lambda lr: statistics.fmean(run["validation_accuracy"] for run in points[lr]))
    accuracies = [100 * run["test_accuracy"]["last"] for run in points[best]]
    assert float(row["lr"]) == best
    assert row["n"] == "2"
    assert float(row["ours"]) == pytest.approx(statistics.fmean(accuracies), abs=0.005)
    assert float(row["±"]) == pytest.approx(statistics.stdev(accuracies), abs=0.005)
    paper = 100 * PAPER["fc"]["mnist", "none", "fc", method]
    assert float(row["paper"]) == pytest.approx(paper)
    assert float(row["difference"]) == pytest.approx(statistics.fmean(accuracies) - paper, abs=0.011)


def test_what_is_missing_killed_or_diverged_is_shown_as_such(reported):
    states = {row["method"]: row["runs"] for row in entries(reported) if not row["smoke"]}
    assert states == {
        "bp": "4 finished",
        "shallow": "missing",
        "dfa": "4 finished",
        "las": "4 finished, 1 diverged",
        "ltas": "1 interrupted",
    }


def test_a_second_seed_under_way_does_not_decide_for_its_point(finished_point, tmp_path):
    altered(finished_point, tmp_path / "a", **finished(0.98, 1e-3, 0))
    altered(finished_point, tmp_path / "b", **finished(0.5, 1e-2, 0))
    altered(finished_point, tmp_path / "c", **finished(0.5, 1e-2, 1))
    assert only_entry(tmp_path).best.lr == 1e-3


def test_a_poor_point_with_one_seed_changes_no_choice(finished_point, tmp_path):
    for seed, (good, other) in enumerate([(0.970, 0.972), (0.99, 0.95), (0.99, 0.95)]):
        altered(finished_point, tmp_path / f"a{seed}", **finished(good, 1e-3, seed))
        altered(finished_point, tmp_path / f"b{seed}", **finished(other, 3e-4, seed))
    assert only_entry(tmp_path).best.lr == 1e-3
    altered(finished_point, tmp_path / "c", **finished(0.5, 2e-3, 0))
    assert only_entry(tmp_path).best.lr == 1e-3


def test_another_option_of_the_protocol_takes_no_run_out_of_its_table(finished_point, tmp_path):
    kept = altered(finished_point, tmp_path / "a", **finished(0.9, 1e-3, 0))
    altered(finished_point, tmp_path / "b", **finished(0.9, 1e-3, 0, **{"protocol.dfa_init": "kaiming"}))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "linked").symlink_to(kept)
    shown = {section.setting.differences[-1]: section.chosen for section in sections(read_runs([tmp_path]))}
    assert {words: [[run.accuracy for run in entry.shown] for entry in shown[words]] for words in shown} == {
        "model.widths=[16, 16]": [[0.9]],
        "protocol.dfa_init=kaiming": [[0.9]],
    }
    assert sections(read_runs([tmp_path / "more"]))


def test_a_run_that_measured_alignment_stands_before_one_that_did_not(finished_point, tmp_path):
    altered(finished_point, tmp_path / "a", **finished(0.9, 1e-3, 0))
    altered(finished_point, tmp_path / "b", **finished(0.9, 1e-3, 0, **{"alignment.every": 0}))
    assert only_entry(tmp_path).best.finished[0].config.alignment.every == 10


def test_settings_with_long_names_have_files_of_their_own(finished_point, tmp_path):
    for end in ("one", "two"):
        widths = {"model.widths": [16] * 40 + [len(end), 1 if end == "one" else 2]}
        altered(finished_point, tmp_path / end, **finished(0.9, 1e-3, 0, **widths))
    words = words_of([section.setting for section in sections(read_runs([tmp_path]))])
    assert len(set(words)) == 2
    assert max(map(len, words)) < 110


def test_a_point_of_which_a_seed_diverged_comes_last(finished_point, tmp_path):
    altered(finished_point, tmp_path / "a", **finished(0.97, 1e-2, 0))
    altered(finished_point, tmp_path / "b", **finished(0.97, 1e-2, 1), status="diverged")
    assert only_entry(tmp_path).best.lr == 1e-2
    altered(finished_point, tmp_path / "c", **finished(0.9, 1e-3, 0))
    entry = only_entry(tmp_path)
    assert (entry.best.lr, entry.state, entry.grid) == (1e-3, "2 finished, 1 diverged", "2 of 4")


def test_a_run_that_collapsed_is_counted_as_such_and_its_point_comes_last(finished_point, tmp_path):
    for seed, status in enumerate(("finished", "collapsed", "finished")):
        said = finished(0.8 + 0.1 * (seed == 2), 1e-2, seed, stop_collapsed=seed < 2)
        altered(finished_point, tmp_path / str(seed), **said, status=status)
    entry = only_entry(tmp_path)
    assert [run.collapsed for run in entry.shown] == [False, True, False]
    assert ours_and_paper(entry).startswith("85.00 ± 7.07")
    assert entry.lost == "1 of 3 collapsed"
    assert ["stop_collapsed=false" in command(run) for run in entry.shown] == [False, False, True]
    altered(finished_point, tmp_path / "other", **finished(0.5, 1e-3, 0))
    assert only_entry(tmp_path).best.lr == 1e-3


def test_a_cell_whose_runs_all_collapsed_is_not_missing(finished_point, tmp_path):
    altered(finished_point, tmp_path / "a", **finished(0.12, 1e-2, 0), status="collapsed")
    entry = only_entry(tmp_path)
    assert "1 of 1 collapsed" in ours_and_paper(entry)
    assert (entry.alive, entry.state) == ([], "1 collapsed")


def test_a_seed_counts_once_however_often_its_alignment_was_measured(finished_point, tmp_path):
    altered(finished_point, tmp_path / "a", **finished(0.9, 1e-3, 0))
    altered(finished_point, tmp_path / "b", **finished(0.9, 1e-3, 0, **{"alignment.every": 10}))
    assert [run.accuracy for run in only_entry(tmp_path).shown] == [0.9]


def test_a_method_that_is_not_known_here_keeps_its_differences(finished_point, tmp_path):
    for name, epochs in (("a", 3), ("b", 100)):
        altered(finished_point, tmp_path / name, **finished(0.5, 1e-3, 0, epochs=epochs, **{"method.name": "mine"}))
    found = sections(read_runs([tmp_path]))
    assert [section.setting.differences for section in found] == [
        ("model.widths=[16, 16]",),
        ("epochs=3", "model.widths=[16, 16]"),
    ]


def test_smoke_runs_have_a_section_of_their_own(reported):
    (row,) = (row for row in entries(reported) if row["smoke"] and row["n"] != "0")
    assert row["method"] == "dfa"
    assert float(row["ours"]) == pytest.approx(100 * results(reported, "dfa", 1e-2, 32)[0]["accuracy"], abs=0.005)
    real, smoke = told(reported).split("SMOKE (a trial of the pipeline, no results)")
    assert "protocol fair, 3 epochs, model.widths=[16, 16]" in real.splitlines()[0]
    assert "4 finished" not in smoke


def test_the_paper_s_whole_table_is_shown_for_runs_like_the_paper_s(reported):
    runs = read_runs([reported / "outputs" / "grid"])
    for run in runs:  # as if they had been of the paper's size
        run.config.epochs, run.config.model.widths, run.config.smoke = 100, [1024, 1024], None
    (section,) = sections([replace(run, setting=setting_of(run.config)) for run in runs])
    assert section.setting == (False, "fair", ())
    shown = [entry.cell for entry in section.tables["fc"]]
    assert set(shown) == set(PAPER["fc"])
    assert [cell.method for cell in shown] == ["bp", "shallow", "dfa", "las", "ltas"] * 3
    assert [cell.dataset for cell in shown[::5]] == ["mnist", "cifar10", "cifar100"]
    assert sum(entry.state == "missing" for entry in section.tables["fc"]) == 11
    assert section.tables["cnn"] == section.tables["other"] == []
    assert sum(map(len, PAPER.values())) == 69


def test_an_option_of_the_protocol_is_one_difference_for_every_method(reported, tmp_path):
    data = f"data_dir={reported / 'data'}"
    point = (*GRID, data, "optimizer.lr=1e-2", "protocol=paper", "protocol.dfa_init=product", "method=dfa,las")
    assert dfl_train(tmp_path, *point, "optimizer=sgd").returncode == 0
    (section,) = sections(read_runs([tmp_path / "outputs"]))
    own = ("epochs=3", "model.widths=[16, 16]", "optimizer=sgd", "protocol.dfa_init=product")
    assert section.setting == (False, "paper", own)
    assert section.tables["fc"] == []  # the paper's table is of Adam
    assert [(entry.cell.method, entry.paper) for entry in section.tables["other"]] == [("dfa", None), ("las", None)]
    assert "on the test set itself" in dfl_report(tmp_path, "outputs").stdout


def test_runs_on_other_images_of_one_name_share_no_table(finished_point, tmp_path):
    for number, data in enumerate(("aa", "aa", "bb", None)):
        altered(finished_point, tmp_path / str(number), **finished(0.9, 1e-3, number), data=data)
    found = {section.setting.differences: section for section in sections(read_runs([tmp_path]))}
    sizes = {
        words[-1] if words and words[-1].startswith("data=") else "": sum(len(e.runs) for e in section.tables["fc"])
        for words, section in found.items()
    }
    assert sizes == {"data=aa": 2, "data=bb": 1, "": 1}


def test_of_two_runs_of_one_seed_the_one_that_finished_last_is_shown_whatever_the_files_say(finished_point, tmp_path):
    ends = {"a": "2026-01-02T00:00:00.000+00:00", "b": "2026-01-01T00:00:00.000+00:00", "c": None}
    for number, (name, end) in enumerate(ends.items()):
        altered(finished_point, tmp_path / "runs" / name, **finished(0.7 + number / 10, 1e-3, 0), finished_at=end)
    for newest in ends:
        for name in ends:
            os.utime(tmp_path / "runs" / name / "result.json", (0, name == newest))
            os.utime(tmp_path / "runs" / name / "config.yaml", (0, name == newest))
        done = dfl_report(tmp_path, "runs", "--format", "csv")
        (row,) = (row for row in csv.DictReader(io.StringIO(done.stdout)) if row["n"] != "0")
        assert (row["ours"], row["n"]) == ("70.00", "1")
        told = [line for line in done.stderr.splitlines() if "runs/a is shown, not runs/" in line]
        assert len(told) == len(done.stderr.splitlines()) == 2
    shutil.rmtree(tmp_path / "runs" / "c")
    altered(tmp_path / "runs" / "a", tmp_path / "runs" / "d")  # a copy says nothing new
    shutil.rmtree(tmp_path / "runs" / "b")
    assert dfl_report(tmp_path, "runs").stderr == ""


def test_runs_of_one_cell_that_were_made_otherwise_have_a_footnote(finished_point, tmp_path):
    made = [("a" * 40, "2.11.0", "cuda (NVIDIA H200)"), ("a" * 40, "2.14.1", "cpu (x86_64, 1 threads)")]
    for seed, (commit, torch, device) in enumerate([*made, made[0]]):
        where = {"git_commit": commit, "versions": {"torch": torch}, "device": device}
        altered(finished_point, tmp_path / "one" / str(seed), **finished(0.9, 1e-3, seed), **where)
        altered(finished_point, tmp_path / "two" / str(seed), **finished(0.9, 1e-3, seed), **where | {"device": "cpu"})
    note = "Mixed: the runs of such a cell differ in version or device "
    for kind in ("terminal", "markdown"):
        (line,) = (line for line in dfl_report(tmp_path, "one", "--format", kind).stdout.splitlines() if note in line)
        devices = ", ".join(sorted(f"device {one[2]}" for one in made))
        assert line == f"{note}({devices}, torch 2.11.0, torch 2.14.1)."
    assert "3 finished, mixed" in dfl_report(tmp_path, "one", "--format", "csv").stdout
    assert f"{note}(torch 2.11.0, torch 2.14.1)." in dfl_report(tmp_path, "two").stdout
    shutil.rmtree(tmp_path / "one" / "1")
    assert "ixed" not in dfl_report(tmp_path, "one").stdout
