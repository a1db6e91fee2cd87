"""`dfl-report` on small real runs: formats, figures, the paper's values, cards."""

import csv
import re

import pytest
from matplotlib.collections import LineCollection
from report_helpers import altered, csv_rows, dfl_report, finished

from dfl_experiments.configuration.composition import compose, group_options, plain
from dfl_experiments.report.choose import choose
from dfl_experiments.report.figures import at_common_rate, rates
from dfl_experiments.report.frame import runs
from dfl_experiments.report.lines import draw
from dfl_experiments.report.paper import published
from dfl_experiments.report.style import LOOKS, look_of

A_FILE = "data/mnist/classes.json"


def test_every_format_holds_the_same_numbers(reported, tmp_path):
    numbers = [
        f"{100 * float(row['accuracy']):.2f}" for row in csv_rows(reported) if row["n"] != "0"
    ]
    assert len(numbers) == 4
    for kind in ("terminal", "markdown", "latex", "html"):
        done = dfl_report(reported, "outputs", "--format", kind, "--out", tmp_path / kind)
        assert done.returncode == 0, done.stderr
        text = (tmp_path / kind).read_text()
        assert all(number in text for number in numbers), kind
    assert r"\begin{tabular}" in (tmp_path / "latex").read_text()
    assert r"\toprule" in (tmp_path / "latex").read_text()
    assert not re.search(r"[ \[]-\d", (tmp_path / "latex").read_text())  # a hyphen is no minus sign


def test_csv_and_latex_have_the_rates_that_were_not_chosen(reported):
    chosen = [row for row in csv_rows(reported) if row["method"] == "dfa" and row["n"] == "2"]
    others = [row for row in csv_rows(reported, chosen="False") if row["method"] == "dfa"]
    assert {float(row["lr"]) for row in chosen + others} == {1e-2, 1e-3}
    (other,) = others
    frame = runs(reported / "outputs").query("method == 'dfa' and not smoke and not fails")
    accuracies = frame.accuracy[frame.lr == float(other["lr"])]
    assert int(other["n"]) == len(accuracies) > 0
    assert other["accuracy"] == f"{accuracies.mean():.9g}"
    assert other["difference_bp"] == ""
    text = dfl_report(reported, "outputs", "--format", "latex").stdout
    assert "lr 0.001 & lr 0.01" in " ".join(text.split())
    assert f"{100 * accuracies.mean():.2f} (" in text


def test_best_method_is_marked(reported):
    rows = [
        row
        for row in csv_rows(reported)
        if row["smoke"] == "False" and row["n"] != "0" and row["failing"] == "0"
    ]
    best = max(rows, key=lambda row: float(row["accuracy"]))["method"]
    text = dfl_report(reported, "outputs").stdout.partition("smoke test")[0]
    assert f"{best.upper()} *" in text
    assert f"**{best.upper()}**" in dfl_report(reported, "outputs", "--format", "markdown").stdout


def test_figures_are_reproducible_and_linked_from_the_markdown_page(reported, tmp_path):
    for name in ("a", "b"):
        folder = tmp_path / name
        options = (
            "--format",
            "markdown",
            "--out",
            folder / "page.md",
            "--figures",
            folder / "all figures",
        )
        done = dfl_report(reported, "outputs", *options)
        assert done.returncode == 0, done.stderr
    first, second = (sorted((tmp_path / name / "all figures").iterdir()) for name in ("a", "b"))
    assert [path.name for path in first] == [path.name for path in second]
    for path, other in zip(first, second, strict=True):
        assert path.read_bytes() == other.read_bytes()
    kinds = {path.stem.rpartition("epochs-")[2] for path in first}
    assert {"alignment", "learning", "rates"} <= kinds
    shown = re.findall(
        r"!\[[^]]+\]\(all%20figures/(\S+)\)", (tmp_path / "a" / "page.md").read_text()
    )
    assert sorted(shown) == sorted(path.name for path in first if path.suffix == ".png")


def test_paper_is_shown_on_request_and_only_beside_runs_of_its_configuration(
    reported, finished_point, tmp_path
):
    assert "paper" not in dfl_report(reported, "outputs").stdout
    text = dfl_report(reported, "outputs", "--paper").stdout
    assert "minus paper" not in text  # the runs have 3 epochs, the paper's 100
    assert "Conv3 on CIFAR-10 with flips (300 epochs): not begun" in text
    whole = {"epochs": 100, "model.widths": [1024, 1024]}
    altered(finished_point, tmp_path / "a", **finished(0.98, 1e-3, 0, **whole))
    text = dfl_report(tmp_path, "a", "--paper").stdout
    expected = published().query("dataset == 'mnist' and method == 'bp'").published.item()
    assert re.search(rf"98\.00 +{100 * expected:.2f} +{98 - 100 * expected:+.2f}", text)
    assert "(100 epochs): missing Shallow, DFA, LAS, LTAS" in text
    # a net with other widths is not compared with the paper, alone or beside the paper's net
    other = {"epochs": 100, "model.widths": [64, 64]}
    altered(finished_point, tmp_path / "b", **finished(0.5, 1e-3, 0, **other))
    assert "minus paper" not in dfl_report(tmp_path, "b", "--paper").stdout
    both = dfl_report(tmp_path, "a", "b", "--paper").stdout
    assert re.search(rf"98\.00 +{100 * expected:.2f} +{98 - 100 * expected:+.2f}", both)
    assert both.count(f"{100 * expected:.2f}") == 1


def test_card_shows_one_rule(reported):
    text = dfl_report(reported, "outputs", "--card", "las").stdout
    assert "LAS" in text
    assert "dead, worst layer" in text
    assert "unstable runs" in text
    assert not re.search(r"^DFA|^BP", text, re.M)
    done = dfl_report(reported, "outputs", "--card", "kp")
    assert done.returncode == 2
    assert done.stderr.endswith(
        "--card kp: no run of this rule; there are runs of bp, dfa, las, ltas\n"
    )


def test_card_names_no_failed_run_of_another_rule(finished_point, tmp_path):
    altered(finished_point, tmp_path / "runs" / "bp", **finished(0.9, 1e-3, 0))
    for rule in ("dfa", "fa"):
        values = finished(None, 1e-3, 0, **{"method.name": rule}) | {"status": "failed"}
        altered(finished_point, tmp_path / "runs" / rule, **values)
    text = dfl_report(tmp_path, "runs", "--card", "fa").stdout
    (note,) = re.findall(r"^\d+ failed: .*", text, re.M)
    assert note.startswith("1 failed: FA")


def test_card_has_no_column_of_dashes(reported):
    for rule, absent in (("dfa", "minus DFA"), ("bp", "minus BP")):
        text = dfl_report(reported, "outputs", "--card", rule, "--where", "smoke=false").stdout
        assert absent not in text.partition("How the numbers are computed")[0]
        assert "Minus BP, minus DFA: differences" in text


def test_tables_in_a_terminal_name_their_section_and_figures_their_file(reported, tmp_path):
    folder = tmp_path / "figures"
    text = dfl_report(reported, "outputs", "--figures", folder).stdout
    for section in (
        "Fully connected net on MNIST",
        "Fully connected net on MNIST (smoke test, no result)",
    ):
        for table in ("Alignment", "Stability"):
            assert f"\n{table}: {section}\n\n" in text
    assert "![" not in text
    shown = re.findall(r"^Figure: (.*)$", text, re.M)
    assert sorted(shown) == sorted(map(str, folder.glob("*.png")))


def test_commands_repeat_the_shown_runs(reported):
    lines = dfl_report(reported, "outputs", "--format", "commands").stdout.splitlines()
    assert all(line.startswith(f"dfl-train repeat={reported}/outputs/grid/") for line in lines)
    assert sum("# las, seed" in line for line in lines) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["outputs", "--format", "pdf"], "invalid choice: 'pdf'"),
        (["outputs", "--out", "data"], "--out data: is a folder; name a file"),
        (["outputs", "--figures", A_FILE], f"--figures {A_FILE}: is a file; name a folder"),
        (["outputs", "--out", f"{A_FILE}/report.md"], f"{A_FILE}: File exists"),
        (["outputs", "--figures", f"{A_FILE}/figures"], f"{A_FILE}/figures: Not a directory"),
        (["outputs", "--card", "las", "--format", "csv"], "--card: the format csv has no cards"),
    ],
)
def test_mistake_is_refused_in_one_line(reported, arguments, words):
    done = dfl_report(reported, *arguments)
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_every_method_looks_unlike_every_other():
    assert set(LOOKS) == {*group_options("method")}
    assert len({look_of(method) for method in LOOKS}) == len(LOOKS)
    paper = [look_of(method) for method in ("bp", "shallow", "dfa", "las", "ltas")]
    assert len({look.colour for look in paper}) == len({look.dash for look in paper}) == 5


def test_alignment_is_drawn_at_one_learning_rate(finished_point, tmp_path):
    for method, lr, accuracy in (
        ("dfa", 1e-3, 0.8),
        ("dfa", 1e-4, 0.9),
        ("las", 1e-3, 0.9),
        ("las", 1e-4, 0.8),
    ):
        options = plain(compose([f"method={method}"]))["method"]
        result = finished(accuracy, lr, 0, method=options)
        altered(finished_point, tmp_path / f"{method}{lr}", **result, cosine_by_construction=["2"])
    frame = runs(tmp_path)
    shown = at_common_rate(frame, choose(frame))
    assert shown.lr.nunique() == 1
    assert set(shown.method) == {"dfa", "las"}


def test_alignment_figure_leaves_out_layers_without_a_signal(finished_point, tmp_path):
    options = plain(compose(["method=dfa"]))["method"]
    for name, zeros in (("signal", {}), ("silent", {"1": 1e6})):
        values = finished(0.8, 1e-3, 0, method=options)
        changes = {"cosine_by_construction": [], "cosine": {"1": 0.3, "2": 0.4}, "zeros": zeros}
        altered(finished_point, tmp_path / name, **values, **changes)
        frame = runs(tmp_path / name)
        figure = draw(at_common_rate(frame, choose(frame)), what=["alignment"], by="epoch")
        titles = [axes.get_title() for axes in figure.axes]
        assert ("Alignment, layer 1" in titles) == (name == "signal")
        assert "Alignment, layer 2" in titles


def test_rates_figure_shows_the_range_over_seeds(finished_point, tmp_path):
    accuracies = {"bp": (0.80, 0.86), "dfa": (0.70, 0.72)}
    for method, pair in accuracies.items():
        options = plain(compose([f"method={method}"]))["method"]
        for seed, accuracy in enumerate(pair):
            for lr in (1e-3, 1e-2):
                values = finished(accuracy, lr, seed, method=options)
                altered(finished_point, tmp_path / f"{method}{seed}{lr}", **values)
    (axes,) = rates(runs(tmp_path), "title").axes
    heights = []
    for bars in axes.findobj(LineCollection):
        heights += [tuple(bar[:, 1].round(6)) for bar in bars.get_segments()]
    heights.sort()
    assert heights == [(70, 72), (70, 72), (80, 86), (80, 86)]  # two rates of each method


def test_setting_whose_runs_all_diverged_has_no_rates_figure(finished_point, tmp_path):
    for lr in (1e-3, 1e-2):
        values = finished(None, lr, 0) | {"status": "diverged"}
        altered(finished_point, tmp_path / "runs" / str(lr), **values)
    done = dfl_report(tmp_path, "runs", "--figures", "figures")
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "figures").glob("*-rates.png"))


def test_method_whose_runs_all_diverged_does_not_stop_the_figures_of_the_others(
    finished_point, tmp_path
):
    dfa = plain(compose(["method=dfa"]))["method"]
    for lr in (1e-3, 1e-2):
        altered(finished_point, tmp_path / "runs" / f"bp{lr}", **finished(0.8, lr, 0))
        values = finished(None, lr, 0, method=dfa) | {"status": "diverged"}
        altered(finished_point, tmp_path / "runs" / f"dfa{lr}", **values)
    done = dfl_report(tmp_path, "runs", "--figures", "figures")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "figures").glob("*-rates.png"))) == 1


@pytest.mark.parametrize("kind", ["no table", "no loss"])
def test_setting_without_curves_does_not_stop_the_figures_of_the_others(
    kind, finished_point, tmp_path
):
    """A run that diverges in its first epoch has a test accuracy, but no loss."""
    altered(finished_point, tmp_path / "runs" / "good", **finished(0.8, 1e-3, 0))
    values = finished(None, 1e-3, 0, batch_size=7) | {"status": "diverged", "epochs": 1}
    table = altered(finished_point, tmp_path / "runs" / "bad", **values) / "epochs.csv"
    head, first, *_ = csv.reader(table.read_text().splitlines())
    first[head.index("train_loss")] = ""
    table.write_text(f"{','.join(head)}\n{','.join(first)}\n")
    if kind == "no table":
        table.unlink()
    done = dfl_report(tmp_path, "runs", "--figures", "figures")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "figures").glob("*-learning.png"))) == (
        1 if kind == "no table" else 2
    )


def test_html_page_holds_its_figures_and_loads_no_other_file(reported, tmp_path):
    page = tmp_path / "report.html"
    assert dfl_report(reported, "outputs", "--format", "html", "--out", page).returncode == 0
    text = page.read_text()
    assert text.count("<figure><svg") >= 3
    assert not re.search(r'(src|href)="(?!#|data:)', text)


def test_html_page_shows_settings_as_text(finished_point, tmp_path):
    for seed, text in enumerate(["<i>a", "<i>b"]):
        values = finished(0.9, 1e-3, seed, **{"model.note": text, "model.activation": "<i>c"})
        altered(finished_point, tmp_path / "runs" / str(seed), **values)
    done = dfl_report(tmp_path, "runs", "--format", "html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.html").read_text()
    assert "<i>" not in page
    assert all(f"&lt;i&gt;{letter}" in page for letter in "abc")


def test_report_can_be_limited_to_some_runs(reported):
    text = dfl_report(reported, "outputs", "--where", "method=las,bp").stdout
    assert "LAS" in text
    assert "DFA" not in text.partition("Accuracy:")[0].replace("minus DFA", "")
