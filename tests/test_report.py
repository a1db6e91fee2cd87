"""A report says what its run directories hold: the right grid point, every gap, and nothing mixed with smoke."""

import csv
import io
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time

import pytest
from conftest import dfl_train, ended, forked
from PIL import Image
from report_helpers import SMALL, altered, browser, write_packs

from dfl_experiments.report.cells import sections
from dfl_experiments.report.curves import Curves, Figure, figures
from dfl_experiments.report.figures import canvas_of, spread
from dfl_experiments.report.paper import PAPER
from dfl_experiments.report.runs import read_runs

GRID = ("--multirun", "experiment=fc_mnist", "epochs=3", *SMALL)


def dfl_report(folder, *arguments):
    command = [sys.executable, "-m", "dfl_experiments.report.command", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def entries(folder):
    done = dfl_report(folder, "outputs", "--format", "csv")
    assert done.returncode == 0, done.stderr
    return list(csv.DictReader(io.StringIO(done.stdout)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A grid with seeds, a point that diverged, one that was killed, and a smoke run of one of its cells."""
    place = tmp_path_factory.mktemp("report")
    data = f"data_dir={write_packs(place / 'data', mnist=1)}"
    grid = dfl_train(place, *GRID, data, "method=bp,dfa,las", "optimizer.lr=1e-2,1e-3", "seed=0,1")
    assert grid.returncode == 0, grid.stderr
    assert dfl_train(place, *GRID, data, "method=las", "optimizer.lr=1e30").returncode == 0
    smoke = dfl_train(place, *GRID, data, "method=dfa", "optimizer.lr=1e-2", "smoke=32")
    assert smoke.returncode == 0, smoke.stderr
    before = set((place / "outputs" / "grid").glob("*/epochs.csv"))
    endless = (*GRID, data, "method=ltas", "optimizer.lr=1e-2", "epochs=3", "checkpoint.every_seconds=0")
    stuck = forked(place, *endless, before=slow_steps)
    while not set((place / "outputs" / "grid").glob("*/epochs.csv")) - before:
        time.sleep(0.02)
    os.kill(stuck, signal.SIGKILL)
    assert ended(stuck) == -signal.SIGKILL
    return place


def slow_steps():
    """In the process to be killed: every training step takes a while."""
    from dfl_experiments.learning import Learner

    row = Learner.row
    Learner.row = lambda *arguments: (time.sleep(1), row(*arguments))[1]


@pytest.fixture(scope="module")
def point(folder):
    """A finished run of BP."""
    return next(path.parent for path in sorted((folder / "outputs" / "grid").glob("bp-*seed0*/result.json")))


@pytest.fixture(scope="module")
def page(folder):
    done = dfl_report(folder, "outputs", "--format", "html", "--out", "report.html")
    assert done.returncode == 0, done.stderr
    return folder / "report.html"


def results(folder, method, lr, smoke=None):
    found = [json.loads(path.read_text()) for path in (folder / "outputs" / "grid").glob("*/result.json")]
    return [
        result
        for result in found
        if (result["method"], result["config"]["optimizer"]["lr"], result["config"]["smoke"]) == (method, lr, smoke)
    ]


@pytest.mark.parametrize("method", ["bp", "dfa", "las"])
def test_a_cell_shows_the_point_that_is_best_on_the_validation_split(folder, method):
    (row,) = (row for row in entries(folder) if row["method"] == method and not row["smoke"])
    points = {lr: results(folder, method, lr) for lr in (1e-2, 1e-3)}
    best = max(points, key=lambda lr: statistics.fmean(run["validation_accuracy"] for run in points[lr]))
    accuracies = [100 * run["test_accuracy"]["last"] for run in points[best]]
    assert float(row["lr"]) == best
    assert row["n"] == "2"
    assert float(row["ours"]) == pytest.approx(statistics.fmean(accuracies), abs=0.005)
    assert float(row["±"]) == pytest.approx(statistics.stdev(accuracies), abs=0.005)
    paper = 100 * PAPER["fc"]["mnist", "none", "fc", method]
    assert float(row["paper"]) == pytest.approx(paper)
    assert float(row["difference"]) == pytest.approx(statistics.fmean(accuracies) - paper, abs=0.011)


def test_what_is_missing_killed_or_diverged_is_shown_as_such(folder):
    states = {row["method"]: row["runs"] for row in entries(folder) if not row["smoke"]}
    assert states == {
        "bp": "4 finished",
        "shallow": "missing",
        "dfa": "4 finished",
        "las": "4 finished, 1 diverged",
        "ltas": "1 interrupted",
    }


def finished(accuracy, lr, seed, **config):
    """What `altered` is to say of a run."""
    made = {"config": {"optimizer.lr": lr, "seed": seed, **config}, "accuracy": accuracy}
    return made | {"validation_accuracy": accuracy}


def only_entry(folder):
    (section,) = sections(read_runs([folder]))
    return next(entry for entry in section.table("fc") if entry.runs)


def test_a_second_seed_under_way_does_not_decide_for_its_point(point, tmp_path):
    altered(point, tmp_path / "a", **finished(0.98, 1e-3, 0))
    altered(point, tmp_path / "b", **finished(0.5, 1e-2, 0))
    altered(point, tmp_path / "c", **finished(0.5, 1e-2, 1))
    assert only_entry(tmp_path).best.lr == 1e-3


def test_a_point_of_which_a_seed_diverged_comes_last(point, tmp_path):
    altered(point, tmp_path / "a", **finished(0.97, 1e-2, 0))
    altered(point, tmp_path / "b", **finished(0.97, 1e-2, 1), status="diverged")
    assert only_entry(tmp_path).best.lr == 1e-2
    altered(point, tmp_path / "c", **finished(0.9, 1e-3, 0))
    entry = only_entry(tmp_path)
    assert (entry.best.lr, entry.state, entry.grid) == (1e-3, "2 finished, 1 diverged", "2 of 4")


def test_a_seed_counts_once_however_often_its_alignment_was_measured(point, tmp_path):
    altered(point, tmp_path / "a", **finished(0.9, 1e-3, 0))
    altered(point, tmp_path / "b", **finished(0.9, 1e-3, 0, **{"alignment.every": 10}))
    assert only_entry(tmp_path).best.accuracies == [0.9]


def test_a_method_that_is_not_known_here_keeps_its_differences(point, tmp_path):
    for name, epochs in (("a", 3), ("b", 100)):
        altered(point, tmp_path / name, **finished(0.5, 1e-3, 0, epochs=epochs, **{"method.name": "mine"}))
    found = sections(read_runs([tmp_path]))
    assert [section.setting.differences for section in found] == [
        ("model.widths=[16, 16]",),
        ("epochs=3", "model.widths=[16, 16]"),
    ]


def test_rows_of_the_paper_without_a_run_are_named(folder):
    text = dfl_report(folder, "outputs").stdout
    assert "Not begun: cifar10 flip fc; cifar100 flip fc." in text
    assert "Not begun: cifar10 flip conv3; cifar10 flip conv3_bn;" in text


def test_how_a_cell_failed_is_said_in_the_tables_of_the_paper_s_layout(folder, point, tmp_path):
    altered(point, tmp_path / "a", **finished(0.1, 1e-3, 0), status="diverged")
    for kind in ("latex", "html"):
        done = dfl_report(tmp_path, "a", "--format", kind, "--out", "report")
        assert done.returncode == 0, done.stderr
        text = (tmp_path / "report").read_text()
        assert "diverged (98.62)" in text
        assert "missing (98.71)" in text


DAMAGES = {
    "a broken number": lambda run: (run / "epochs.csv").write_text((run / "epochs.csv").read_text() + "4,9.1e-"),
    "zero bytes": lambda run: (run / "epochs.csv").write_bytes(b"epoch,test_accuracy\n1,\0\0\0"),
    "no table": lambda run: (run / "epochs.csv").unlink(),
}
FOREIGN = {
    "a number for a group": ({"dataset": 3}, {}),
    "an interpolation": ({"dataset.name": "${foo.bar}"}, {}),
    "no learning rate": ({"optimizer": {"name": "adam"}}, {}),
    "no epochs": ({"epochs": None}, {}),
    "an unknown headline": ({"protocol.accuracy": "best"}, {}),
    "no throughput": ({}, {"samples_per_second": None}),
    "a word for a seed": ({"seed": "one"}, {}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_table_spoils_no_report(damage, point, tmp_path):
    altered(point, tmp_path / "runs" / "good", **finished(0.9, 1e-3, 0))
    DAMAGES[damage](altered(point, tmp_path / "runs" / "bad", **finished(0.9, 1e-3, 1)))
    done = dfl_report(tmp_path, "runs", "--format", "html", "--figures", "figures")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("what", FOREIGN)
def test_a_directory_that_is_none_of_ours_is_named_and_left_out(what, point, tmp_path):
    altered(point, tmp_path / "runs" / "good", **finished(0.9, 1e-3, 0))
    config, result = FOREIGN[what]
    altered(point, tmp_path / "runs" / "bad", {"seed": 1, **config}, **result)
    done = dfl_report(tmp_path, "runs", "--format", "html", "--figures", "figures")
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("dfl-report: left out: runs/bad (")


def test_a_weight_decay_of_none_is_zero(point, tmp_path):
    altered(point, tmp_path / "a", {"optimizer.weight_decay": None})
    assert only_entry(tmp_path).best.weight_decay == 0.0


def test_no_other_layer_passes_for_layer_1(folder, point, tmp_path):
    altered(point, tmp_path / "a", {"method.name": "shallow"}, method="shallow")
    lines = (tmp_path / "a" / "epochs.csv").read_text().splitlines()
    header = lines[0].split(",")
    place = header.index("cosine/1")
    emptied = [",".join("" if i == place else cell for i, cell in enumerate(line.split(","))) for line in lines[1:]]
    (tmp_path / "a" / "epochs.csv").write_text("\n".join([lines[0], *emptied]) + "\n")
    (section,) = sections(read_runs([tmp_path]))
    found = {figure.name: figure for figure in figures(section) if figure.name.startswith("alignment")}
    (figure,) = found.values()
    assert figure.name == "alignment-all-layers-mnist-none-fc"
    assert [panel.title.partition(":")[0] for panel in figure.panels] == ["layer 2"]


def test_a_long_heading_stays_within_the_figure():
    figure = Figure("name", "A title", "note", [Curves("panel", "x", "y", [])])
    canvas = canvas_of(figure, "SMOKE (a trial of the pipeline, no results), " + "option.of.some.length=value, " * 9)
    box = canvas._suptitle.get_window_extent()
    assert canvas.bbox.x0 <= box.x0 < box.x1 <= canvas.bbox.x1
    assert "SMOKE" in canvas._suptitle.get_text()


def test_smoke_runs_have_a_section_of_their_own(folder):
    (row,) = (row for row in entries(folder) if row["smoke"] and row["n"] != "0")
    assert row["method"] == "dfa"
    assert float(row["ours"]) == pytest.approx(100 * results(folder, "dfa", 1e-2, 32)[0]["accuracy"], abs=0.005)
    text = dfl_report(folder, "outputs").stdout
    real, smoke = text.split("SMOKE (a trial of the pipeline, no results)")
    assert "protocol fair, epochs=3, model.widths=[16, 16]" in real.splitlines()[0]
    assert "4 finished" not in smoke


def test_the_paper_s_whole_table_is_shown_for_runs_like_the_paper_s(folder):
    runs = read_runs([folder / "outputs" / "grid"])
    for run in runs:  # as if they had been of the paper's size
        run.config.epochs, run.config.model.widths, run.config.smoke = 100, [1024, 1024], None
    (section,) = sections(runs)
    assert section.setting == (False, "fair", ())
    shown = [entry.cell for entry in section.table("fc")]
    assert set(shown) == set(PAPER["fc"])
    assert [cell.method for cell in shown] == ["bp", "shallow", "dfa", "las", "ltas"] * 3
    assert [cell.dataset for cell in shown[::5]] == ["mnist", "cifar10", "cifar100"]
    assert sum(entry.state == "missing" for entry in section.table("fc")) == 11
    assert section.table("cnn") == section.table("other") == []
    assert sum(map(len, PAPER.values())) == 69


def test_an_option_of_the_protocol_is_one_difference_for_every_method(folder, tmp_path):
    data = f"data_dir={folder / 'data'}"
    point = (*GRID, data, "optimizer.lr=1e-2", "protocol=paper", "protocol.dfa_init=product", "method=dfa,las")
    assert dfl_train(tmp_path, *point, "optimizer=sgd").returncode == 0
    (section,) = sections(read_runs([tmp_path / "outputs"]))
    own = ("epochs=3", "model.widths=[16, 16]", "optimizer=sgd", 'protocol.dfa_init="product"')
    assert section.setting == (False, "paper", own)
    assert section.table("fc") == []  # the paper's table is of Adam
    assert [(entry.cell.method, entry.paper) for entry in section.table("other")] == [("dfa", None), ("las", None)]
    assert "on the test set itself" in dfl_report(tmp_path, "outputs").stdout


def test_every_format_holds_the_same_numbers(folder, page):
    rows = [row for row in entries(folder) if row["n"] != "0"]
    numbers = [row["ours"] for row in rows]
    assert len(numbers) == 4
    for kind in ("terminal", "markdown", "latex"):
        text = dfl_report(folder, "outputs", "--format", kind).stdout
        assert all(number in text for number in numbers), kind
    text = page.read_text()
    assert all(f">{number}</a>" in text for number in numbers)
    assert not re.search(r'(src|href)="(?!#|data:)', text.split("<script>")[0])


def test_every_figure_is_written_the_same_each_time(folder, tmp_path):
    names = set()
    for place in ("first", "second"):
        done = dfl_report(folder, "outputs", "--figures", tmp_path / place)
        assert done.returncode == 0, done.stderr
        names = {path.name for path in (tmp_path / place).iterdir()}
    kinds = ("alignment-mnist", "alignment-all-layers-mnist", "learning-mnist", "grid-mnist", "throughput")
    for kind in kinds:
        mine = [path for path in names if path.startswith("fair-") and f"-{kind}" in path]
        assert {path.rpartition(".")[2] for path in mine} == {"png", "pdf", "csv"}
    assert [path for path in names if path.startswith("smoke-fair-")]
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
        if name.endswith("png"):
            with Image.open(tmp_path / "first" / name) as image:
                assert len(image.convert("RGB").getcolors(2**24)) > 20
                assert min(image.size) > 400
    with (tmp_path / "first" / "fair-epochs-3-model.widths--16--16-learning-mnist-none-fc.csv").open() as file:
        shown = [row for row in csv.DictReader(file) if row["series"] == "BP" and row["panel"] == "test accuracy"]
    (row,) = (row for row in entries(folder) if row["method"] == "bp" and not row["smoke"])
    assert [row["x"] for row in shown] == ["1", "2", "3"]
    assert float(shown[-1]["y"]) == pytest.approx(float(row["ours"]), abs=0.005)


def test_labels_keep_their_order_and_a_gap():
    places = [0.5, 0.51, 0.1, 0.52, 0.9]
    moved = spread(places, 0.05)
    order = sorted(range(5), key=places.__getitem__)
    gaps = [moved[b] - moved[a] for a, b in itertools.pairwise(order)]
    assert min(gaps) >= 0.05 - 1e-12
    assert moved[2] == 0.1
    assert moved[4] == 0.9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["data"], "data: no run directory there"),
        (["outputs", "--format", "pdf"], "invalid choice: 'pdf'"),
        (["outputs", "--out", "data"], "data: Is a directory"),
    ],
)
def test_a_mistake_is_one_line(folder, arguments, words):
    done = dfl_report(folder, *arguments)
    assert done.returncode != 0
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_run_that_grows_and_files_that_break_off_can_be_read(point, tmp_path):
    shutil.copytree(point, tmp_path / "runs" / "point")
    (tmp_path / "runs" / "other").mkdir()
    (tmp_path / "runs" / "other" / "config.yaml").write_text("of: something else")
    half = (tmp_path / "runs" / "point" / "epochs.csv").read_text()[:-9]
    (tmp_path / "runs" / "point" / "epochs.csv").write_text(half)
    (tmp_path / "runs" / "point" / "result.json").write_text('{"status": "fini')
    (run,) = read_runs([tmp_path / "runs"])
    assert run.status == "interrupted"
    assert len(run.epochs["test_accuracy"]) in (2, 3)


def test_the_page_in_a_browser(folder, page):
    rows = [row for row in entries(folder) if not row["smoke"]]
    with browser() as window:
        window.get(page.as_uri())
        table = window.find_element("css selector", "table.sortable")

        def column(name):
            heads = [head.text.rstrip(" ▲▼") for head in table.find_elements("css selector", "th")]
            place = heads.index(name) + 1
            return [cell.text for cell in table.find_elements("css selector", f"tbody td:nth-child({place})")]

        assert column("method") == [row["method"] for row in rows]
        assert column("ours") == [row["ours"] or "–" for row in rows]
        button = next(one for one in table.find_elements("css selector", "th button") if one.text == "ours")
        present = sorted((row["ours"] for row in rows if row["ours"]), key=float)
        button.click()
        assert column("ours") == [*present, "–", "–"]
        button.click()
        assert column("ours") == [*present[::-1], "–", "–"]
        for plot in window.find_elements("css selector", ".plot"):
            window.execute_script("arguments[0].scrollIntoView()", plot)
        deadline = time.monotonic() + 20
        while window.find_elements("css selector", ".plot:not([data-drawn])") and time.monotonic() < deadline:
            time.sleep(0.05)
        first = window.find_element("css selector", ".plot")
        curves = first.find_elements("css selector", "path.js-line")
        assert len(curves) >= 3
        assert {one.text for one in first.find_elements("css selector", ".legendtext")} == {"BP", "DFA", "LAS"}
        link = next(one for one in table.find_elements("css selector", "td a") if one.text == rows[0]["ours"])
        window.execute_script("arguments[0].click()", link)
        opened = window.find_element("css selector", "details.cell[open]")
        assert len(opened.find_elements("css selector", "pre")) == 4
        assert "batch_size: 64" in opened.find_element("css selector", "pre").get_attribute("textContent")
        resources = window.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
        assert not [name for name in resources if name.startswith("http")]
        assert window.get_log("browser") == []
    with browser(width=390, dark=True) as window:
        window.get(page.as_uri())
        assert window.execute_script("return document.documentElement.scrollWidth") <= 390
        background = window.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert max(map(int, re.findall(r"\d+", background)[:3])) < 60
        assert window.get_log("browser") == []
