"""What a reader of a report gets to see: the same numbers in every format, figures, and a page in a browser."""

import csv
import itertools
import re
import time
from urllib.parse import unquote

import matplotlib
import pytest
from PIL import Image
from report_helpers import altered, browser, dfl_report, entries, finished, told

from dfl_experiments.configuration.composition import compose, group_options, plain
from dfl_experiments.report.cells import sections
from dfl_experiments.report.figures import canvas_of, spread
from dfl_experiments.report.looks import FAMILIES, look_of
from dfl_experiments.report.outcomes import figures
from dfl_experiments.report.panels import Curves, Figure, Series
from dfl_experiments.report.runs import read_runs


def test_every_format_holds_the_same_numbers(reported, reported_page):
    rows = [row for row in entries(reported) if row["n"] != "0"]
    numbers = [row["ours"] for row in rows]
    assert len(numbers) == 4
    for kind in ("terminal", "markdown", "latex"):
        text = told(reported, kind)
        assert all(number in text for number in numbers), kind
    text = reported_page.read_text()
    assert len(text) < 3e6
    assert all(f">{number}</a>" in text for number in numbers)
    assert not re.search(r'(src|href)="(?!#|data:)', text.split("<script>")[0])


@pytest.fixture(scope="module")
def markdown_page(reported, tmp_path_factory):
    """A page in Markdown with its figures, and their folder."""
    place = tmp_path_factory.mktemp("markdown")
    page, folder = place / "pages" / "README.md", place / "all figures"
    done = dfl_report(reported, "outputs", "--format", "markdown", "--out", page, "--figures", folder)
    assert done.returncode == 0, done.stderr
    return page, folder


def test_every_figure_is_written_the_same_each_time(reported, markdown_page, tmp_path, monkeypatch):
    _, first = markdown_page
    monkeypatch.setenv("MPLBACKEND", "none that there is")
    with matplotlib.rc_context({"font.size": 30, "savefig.bbox": "tight"}):  # as somebody's matplotlibrc may say
        done = dfl_report(reported, "outputs", "--figures", tmp_path)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in first.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == names
    kinds = ("mnist-fc-alignment", "mnist-fc-learning", "mnist-fc-grid", "throughput")
    for kind in kinds:
        mine = [path for path in names if path.startswith(f"{kind}-3-epochs-model.widths-16-16")]
        assert {path.rpartition(".")[2] for path in mine} == {"png", "pdf", "csv"}
    assert [path for path in names if "-smoke-" in path]
    for name in names:
        assert (first / name).read_bytes() == (tmp_path / name).read_bytes()
        if name.endswith("png"):
            with Image.open(first / name) as image:
                assert len(image.convert("RGB").getcolors(2**24)) > 20
                assert min(image.size) > 400
    with (first / "mnist-fc-learning-3-epochs-model.widths-16-16.csv").open() as file:
        shown = [row for row in csv.DictReader(file) if row["series"] == "BP" and row["panel"] == "test accuracy"]
    (row,) = (row for row in entries(reported) if row["method"] == "bp" and not row["smoke"])
    assert [row["x"] for row in shown] == ["1", "2", "3"]
    assert float(shown[-1]["y"]) == pytest.approx(float(row["ours"]), abs=0.005)


@pytest.mark.parametrize("places", [[0.5, 0.51, 0.1, 0.52, 0.9], [0.0, 0.01, 0.02], [0.9, 0.97, 0.98, 1.0]])
def test_labels_keep_their_order_and_a_gap_within_the_axis(places):
    moved = spread(places, 0.05, 0.0, 1.0)
    order = sorted(range(len(places)), key=places.__getitem__)
    gaps = [moved[b] - moved[a] for a, b in itertools.pairwise(order)]
    assert min(gaps) >= 0.05 - 1e-12
    assert 0.0 <= min(moved) <= max(moved) <= 1.0 + 1e-12
    alone = [i for i in order if all(abs(places[i] - places[j]) > 0.1 for j in order if j != i)]
    assert [moved[i] for i in alone] == pytest.approx([places[i] for i in alone])


def test_every_method_looks_unlike_every_other():
    methods = [method for _, members in FAMILIES.values() for method in members]
    assert set(methods) == {*group_options("method")}
    assert len({look_of(method)[1:3] for method in methods}) == len(methods)
    assert len({(look.colour, look.marker) for look in map(look_of, methods)}) == len(methods)


def test_no_other_layer_passes_for_layer_1(reported, finished_point, tmp_path):
    altered(finished_point, tmp_path / "a", {"method.name": "shallow"}, cosine_by_construction=[])
    lines = (tmp_path / "a" / "epochs.csv").read_text().splitlines()
    header = lines[0].split(",")
    place = header.index("cosine/1")
    emptied = [",".join("" if i == place else cell for i, cell in enumerate(line.split(","))) for line in lines[1:]]
    (tmp_path / "a" / "epochs.csv").write_text("\n".join([lines[0], *emptied]) + "\n")
    (section,) = sections(read_runs([tmp_path]))
    found = {figure.name: figure for figure in figures(section) if "alignment" in figure.name}
    (figure,) = found.values()
    assert figure.name == "mnist-fc-alignment-all-layers"
    assert [panel.title.partition(":")[0] for panel in figure.panels] == ["layer 2"]


def test_alignment_is_drawn_at_equal_learning_rates(finished_point, tmp_path):
    for method, lr, accuracy in (("dfa", 1e-3, 0.8), ("dfa", 1e-4, 0.9), ("las", 1e-3, 0.9), ("las", 1e-4, 0.8)):
        said = finished(accuracy, lr, 0, method=plain(compose([f"method={method}"]))["method"])
        altered(finished_point, tmp_path / f"{method}{lr}", **said, cosine_by_construction=["2"])
    (section,) = sections(read_runs([tmp_path]))
    (figure,) = (figure for figure in figures(section) if figure.name == "mnist-fc-alignment")
    shown = {panel.title: [one.look.name for one in panel.series] for panel in figure.panels}
    assert shown == {f"layer 1, lr {lr}": ["BP", "DFA", "LAS"] for lr in ("0.0001", "0.001")}


def test_a_long_heading_stays_within_the_figure():
    figure = Figure("name", "A title", "note", [Curves("panel", "y", [Series(look_of("las"), [1.0], [0.5])])])
    canvas = canvas_of(figure, "SMOKE (a trial of the pipeline, no results), " + "option.of.some.length=value, " * 9)
    box = canvas._suptitle.get_window_extent()
    assert canvas.bbox.x0 <= box.x0 < box.x1 <= canvas.bbox.x1
    assert "SMOKE" in canvas._suptitle.get_text()


def test_the_page_in_a_browser(reported, reported_page):
    rows = [row for row in entries(reported) if not row["smoke"]]
    with browser() as window:
        window.get(reported_page.as_uri())
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
        assert len(opened.find_elements("css selector", "pre")) == 8
        shown = [one.get_attribute("textContent") for one in opened.find_elements("css selector", "pre")]
        assert shown[0].startswith("dfl-train dataset=mnist augmentation=none model=fc method=bp")
        assert "batch_size: 64" in shown[1]
        resources = window.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
        assert not [name for name in resources if name.startswith("http")]
        assert window.get_log("browser") == []
    with browser(width=390, dark=True) as window:
        window.get(reported_page.as_uri())
        assert window.execute_script("return document.documentElement.scrollWidth") <= 390
        background = window.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert max(map(int, re.findall(r"\d+", background)[:3])) < 60
        assert window.get_log("browser") == []


def test_how_a_cell_failed_is_said_in_the_tables_of_the_paper_s_layout(reported, finished_point, tmp_path):
    altered(finished_point, tmp_path / "a", **finished(0.1, 1e-3, 0), status="diverged")
    for kind in ("latex", "html"):
        done = dfl_report(tmp_path, "a", "--format", kind, "--out", "report")
        assert done.returncode == 0, done.stderr
        text = (tmp_path / "report").read_text()
        assert "diverged (98.62)" in text
        assert "missing (98.71)" in text


def test_rows_of_the_paper_without_a_run_are_named(reported):
    text = told(reported)
    assert "Not begun: cifar10 flip fc; cifar100 flip fc." in text
    assert "Not begun: cifar10 flip conv3; cifar10 flip conv3_bn;" in text


def test_a_markdown_page_shows_its_figures(markdown_page):
    page, folder = markdown_page
    shown = [page.parent / unquote(link) for link in re.findall(r"!\[[^]]+\]\((\S+)\)", page.read_text())]
    assert shown
    assert {path.resolve() for path in shown} == set(folder.glob("*.png"))
