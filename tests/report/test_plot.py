"""Curves of runs: lines, their labels, panels and axes; and the command `dfl-plot`."""

import shutil
import subprocess
import sys
from argparse import ArgumentTypeError

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from processes import dfl_train
from report_helpers import altered

from dfl_experiments.errors import UserError
from dfl_experiments.report import dfl_plot
from dfl_experiments.report.figures import LONGEST_NAME, unused_name
from dfl_experiments.report.frame import curves, runs, with_key, with_value
from dfl_experiments.report.line_labels import lines_of, with_lines
from dfl_experiments.report.lines import RELATIVE, draw, evenly, set_scale
from dfl_experiments.report.series import WHAT, over_seeds, smoothed
from dfl_experiments.report.style import DASHES, LOOKS, look_of, looks_of, title_of, words

# quantities measured in each of the 4 iterations of an epoch; the others are measured once per epoch
ITERATIONS = [("iteration", what) for what in ("loss", "alignment", "norm")]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Return a folder with a sweep of two methods, two rates and two seeds, and a run of another length."""
    folder = tmp_path_factory.mktemp("plot")
    small = ("model.widths=[8,8]", "tracking=disabled", "threads=1", "limit=200")
    grid = (
        "--multirun",
        "method=bp,dfa",
        "optimizer.lr=1e-3,1e-2",
        "seed=0,1",
        "epochs=2",
        "hydra.sweep.dir=grid",
    )
    alone = ("method=las", "optimizer.lr=1e-3", "epochs=3", "hydra.run.dir=alone")
    for arguments in (grid, alone):
        done = dfl_train(folder, *arguments, *small)
        assert done.returncode == 0, done.stderr
    return folder


def texts(figure):
    """Return every text of a figure that is not empty."""
    artists = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    return [artist.get_text() for artist in artists if artist.get_text()]


def labelled_lines(axes):
    """Return the lines of a panel that have a label."""
    return [line for line in axes.lines if not line.get_label().startswith("_")]


def labels(frame, color=None, facet=None):
    """Return the labels of a frame's lines."""
    notes = []
    keys = [key for key in (color, facet) if key]
    return sorted(lines_of(with_lines(frame, keys, notes), color, facet, notes).label)


def test_running_mean_is_the_mean_of_neighbouring_values():
    values = pd.DataFrame(
        {"folder": "a", "what": "loss", "column": "loss", "value": [0.0, 3.0, 6.0, 0.0]}
    )
    notes = []
    assert smoothed(values, 1, notes) is values
    assert smoothed(values, 3, notes).value.tolist() == [1.5, 3.0, 2.0 + 1.0, 3.0]
    assert notes == ["Running mean of 3 measured values."]


def test_line_is_the_mean_over_seeds_with_their_range():
    # run b is longer than run a
    rows = [("a", 1, 2.0), ("a", 2, 4.0), ("b", 1, 6.0), ("b", 2, 5.0), ("b", 3, 9.0)]
    table = pd.DataFrame(rows, columns=["folder", "x", "value"])
    table = table.assign(what="loss", layer=0)
    values = over_seeds(table, pd.DataFrame({"folder": ["a", "b"], "line": [0, 0]}))
    points = values[["x", "mean", "low", "high"]].values.tolist()
    assert points == [[1, 4.0, 2.0, 6.0], [2, 4.5, 4.0, 5.0]]


def test_value_missing_in_one_seed_removes_only_its_own_point():
    x = np.arange(20)
    parts = [pd.DataFrame({"folder": name, "x": x, "value": 1.0}) for name in "ab"]
    table = pd.concat([parts[0], parts[1].drop([0, 7, 8])])
    table = table.assign(what="loss", layer=0)
    values = over_seeds(table, pd.DataFrame({"folder": ["a", "b"], "line": [0, 0]}))
    assert set(x) - set(values.x) == {0, 7, 8}


def test_labels_name_only_what_differs(outputs):
    frame = runs(outputs / "grid")
    assert labels(frame) == ["BP, lr 0.001", "BP, lr 0.01", "DFA, lr 0.001", "DFA, lr 0.01"]
    assert labels(frame, facet="lr") == ["BP", "BP", "DFA", "DFA"]
    assert labels(frame[frame.lr == 0.01]) == ["BP", "DFA"]
    assert labels(frame[frame.rule == "bp"]) == ["lr 0.001", "lr 0.01"]
    one_point = frame[(frame.rule == "bp") & (frame.lr == 0.01)]
    assert labels(one_point) == [""]  # one line for all seeds
    with_las = runs(outputs / "alone", outputs / "grid").query("lr == 0.001")
    assert labels(with_las)[-1] == "LAS, 3 epochs"


def test_legend_of_many_lines_is_shortened_only_if_it_gets_shorter(outputs):
    (run,) = runs(outputs / "alone").index
    frame = runs(outputs / "alone").loc[[run] * 7]
    frame["method"] = [f"rule{number}" for number in range(7)]
    frame["lr"] = [1e-3, *[1e-2] * 6]
    notes = []
    lines = lines_of(with_lines(frame, [], notes), None, None, notes)
    assert lines.legend.nunique() == 7
    assert "rule0, lr 0.001" in set(lines.legend)
    assert not any("same colour" in note for note in notes)


def test_equal_runs_are_drawn_once_or_by_folder(outputs, tmp_path):
    shutil.copytree(outputs / "alone", tmp_path / "again")
    frame = runs(outputs / "alone", tmp_path / "again")
    assert labels(frame) == [""]
    assert labels(frame, color="folder") == sorted(f"folder {folder}" for folder in frame.folder)


def test_key_that_does_not_differ_is_read_from_the_configuration(outputs):
    frame = with_key(runs(outputs / "grid"), "batch_size")
    assert set(frame.batch_size) == {64}
    assert set(with_key(frame, "model.widths")["model.widths"]) == {"[8,8]"}


@pytest.mark.parametrize(
    ("key", "value", "count"),
    [
        ("lr", "1e-3", 5),
        ("method", "las", 1),
        ("method", "LAS", 1),
        ("seed", "1.0", 4),
        ("model.widths", "[8, 8]", 9),
        ("smoke", "false", 9),
        ("optimizer._target_", "dfl_experiments.optimizers.Adam", 9),
    ],
)
def test_runs_with_a_value_are_chosen_by_number_or_text(key, value, count, outputs):
    frame = runs(outputs / "grid", outputs / "alone")
    assert len(with_value(frame, key, value)) == count


def test_key_that_differs_only_between_nets_has_a_value_in_every_run(finished_point, tmp_path):
    altered(finished_point, tmp_path / "a", {"batch_size": 32})
    altered(finished_point, tmp_path / "b", {"batch_size": 64})
    altered(finished_point, tmp_path / "c", {"batch_size": 64, "model.name": "own"})
    frame = runs(tmp_path)
    assert frame.batch_size.tolist() == ["32", "64", ""]
    assert with_key(frame, "batch_size").batch_size.tolist() == [32, 64, 64]
    assert len(with_value(frame, "batch_size", "64")) == 2
    assert with_key(frame, "setting").setting.equals(frame.setting)


def test_every_run_has_a_line_if_a_value_is_null_or_missing(finished_point, tmp_path):
    altered(finished_point, tmp_path / "a", {"optimizer.clip_norm": None})
    altered(finished_point, tmp_path / "b", {"optimizer.clip_norm": 0.5})
    altered(finished_point, tmp_path / "c", {"optimizer.clip_norm": 1, "seed": 9}, cosine={})
    frame = runs(tmp_path)
    key = "optimizer.clip_norm"
    by_key = with_lines(with_key(frame, key), [key], [])
    assert sorted(by_key[key]) == ["0.5", "1", "null"]
    assert by_key.line.nunique() == 3
    assert with_value(frame, key, "null").folder.tolist() == [str(tmp_path / "a")]
    measured = with_key(frame, "cosine/1")["cosine/1"].tolist()
    assert measured[2] == ""
    assert len(with_lines(with_key(frame, "cosine/1"), ["cosine/1"], [])) == 3


def test_option_where_draws_only_runs_with_a_value(outputs, tmp_path):
    path = tmp_path / "plot.svg"
    conditions = ["--where", "optimizer.lr=1e-3", "--where", "method=dfa"]
    dfl_plot.main([str(outputs / "grid"), *conditions, "--out", str(path)])
    whole = path.read_text()
    dfl_plot.main([str(outputs / "grid"), "--out", str(path)])
    assert "DFA · lr 0.001" in whole
    assert "DFA · lr 0.001" not in path.read_text()


@pytest.mark.parametrize(("last", "scale"), [(1e6, "log"), (3.0, "linear")])
def test_outlier_makes_the_axis_logarithmic(last, scale):
    axes = Figure().subplots()
    for end in (0.1, 0.2, 0.3, last):
        axes.plot(np.linspace(2.3, end, 50))
    set_scale(axes, False)
    assert axes.get_yscale() == scale


def test_thinning_keeps_both_ends():
    assert evenly(10, 4) == [0, 3, 6, 9]
    assert evenly(3, 4) == [0, 1, 2]


def test_settings_with_one_long_title_have_different_file_names():
    title = "CIFAR-10, Conv3, " + ", ".join(f"model.option_{number}=1" for number in range(20))
    first = unused_name(title, [])
    assert len(first) <= LONGEST_NAME
    assert unused_name(title, [first]) == f"{first}-2"


def test_names_are_written_as_words():
    row = {"model": "conv3_bn", "dataset": "cifar10", "augmentation": "none", "smoke": False}
    assert title_of(row) == "Conv3+BN on CIFAR-10"
    assert title_of(row | {"model": "own_net", "dataset": "own_data"}) == "own_net on own_data"
    assert words("model.widths", "[32,32]") == "widths [32,32]"
    assert words("method", "brsf, feedback=full") == "brSF, feedback=full"
    assert words("method", "my_rule, c=2") == "my_rule, c=2"


def test_look_of_a_variant_depends_on_its_name_only():
    assert look_of("las, fixed_blocks=2") == ("#91c2de", "--")
    for options in ("init=default", "feedback=conv", "init=product"):
        variants = [look_of(f"{method}, {options}") for method in LOOKS]
        assert len(set(variants)) == len(LOOKS)
        assert not set(variants) & set(LOOKS.values())


def test_variants_of_a_rule_have_different_dashes_in_a_figure():
    inits = ["default", "kaiming", "kaiming_in", "zeros"]
    methods = ["bp", "las", *(f"las, init={init}" for init in inits)]
    looks = looks_of(methods)
    assert len({looks[method].dash for method in methods[1:]}) == len(DASHES)
    assert all(looks[method] == LOOKS[method] for method in ("bp", "las"))
    assert looks["las, init=default"] == look_of("las, init=default")


def test_single_line_has_the_look_of_its_method(outputs):
    axes, *_ = draw(runs(outputs / "alone"), what=["loss"]).axes
    (line,) = axes.lines
    assert line.get_color() == LOOKS["las"].colour


def test_caption_says_how_lines_are_computed(outputs):
    grid = texts(draw(runs(outputs / "grid"), smooth=2))
    assert any("Mean over 2 seeds" in text and "Running mean of 2" in text for text in grid)
    assert {"Training loss", "Test accuracy", "Alignment, layer 1", "iteration"} <= set(grid)


@pytest.mark.parametrize("by", ["iteration", "epoch"])
@pytest.mark.parametrize("what", WHAT)
def test_each_quantity_can_be_drawn_alone(what, by, outputs):
    figure = draw(runs(outputs / "grid"), what=[what], by=by)
    lines = []
    for axes in figure.axes:
        lines += labelled_lines(axes)
    # one line per method and rate; one panel per layer for quantities of layers
    assert len(lines) in ((2,) if what in RELATIVE else (4, 8))
    points = 8 if (by, what) in ITERATIONS else 2
    for line in lines:
        assert len(line.get_xdata()) == points


def test_column_of_epochs_csv_is_another_name_of_its_quantity(outputs):
    frame = runs(outputs / "alone")
    columns = draw(frame, what=["cosine", "norm_ratio", "activation_rms", "test_accuracy", "rms"])
    names = draw(frame, what=["alignment", "norm", "rms", "accuracy"])
    assert texts(columns) == texts(names)


@pytest.mark.parametrize(
    ("column", "by", "scale"),
    [
        ("validation_loss", "epoch", 1),
        ("train_accuracy", "epoch", 100),
        ("seconds", "epoch", 1),
        ("lr", "epoch", 1),
        ("cosine_batch", "iteration", 1),
    ],
)
def test_any_column_can_be_drawn(column, by, scale, outputs):
    frame = runs(outputs / "alone")
    table = "epochs" if by == "epoch" else "iterations"
    (name, *_) = [name for name in curves(frame, table) if name.split("/")[0] == column]
    values = scale * curves(frame, table)[name]
    axes, *_ = draw(frame, what=column, layers=[1] if "/" in name else None, smooth=1).axes
    (line,) = axes.lines
    assert axes.get_xlabel() == by
    assert line.get_ydata() == pytest.approx(values.to_numpy())


def test_column_of_iterations_csv_is_drawn_as_a_mean_over_seeds(outputs):
    frame = runs(outputs / "grid")
    figure = draw(frame, what=["cosine_batch"], layers=[1])
    assert figure.axes[0].lines
    assert any("Mean over 2 seeds" in text for text in texts(figure))


def test_figure_with_a_size_has_neither_title_nor_caption(outputs, tmp_path):
    path = tmp_path / "figure.png"
    options = ["--what", "loss,accuracy", "--size", "3.4x2.4", "--dpi", "100", "--out", str(path)]
    dfl_plot.main([str(outputs / "grid"), *options])
    assert plt.imread(path).shape[:2] == (240, 340)
    figure = draw(runs(outputs / "grid"), what=["loss"], size=(3.4, 2.4))
    assert not any("lr 0.001 ·" in text or "Mean over" in text for text in texts(figure))
    figure.draw_without_rendering()
    assert all(axes.get_window_extent().width > 60 for axes in figure.axes)


def test_a_row_of_a_figure_with_a_size_has_whole_facets(outputs):
    frame = runs(outputs / "grid")
    what = ["loss", "accuracy", "train_accuracy"]
    figure = draw(frame, what=what, by="epoch", facet="optimizer.lr", size=(7, 4))
    columns = [axes.get_subplotspec().colspan.start for axes in figure.axes]
    assert columns == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("what", ["test_accuracy", "validation_accuracy"])
def test_only_the_accuracy_that_was_asked_for_is_drawn(what, outputs):
    frame = runs(outputs / "alone")
    (axes,) = draw(frame, what=[what], by="epoch").axes
    (line,) = axes.lines
    assert line.get_ydata() == pytest.approx(100 * curves(frame)[what].to_numpy())


def test_bp_is_not_drawn_where_it_is_1_by_definition(outputs):
    frame = runs(outputs / "grid").query("lr == 0.01")
    figure = draw(frame, what=["alignment", "norm", "accuracy"], by="epoch")
    alignment, norm, accuracy = figure.axes
    for axes in (alignment, norm):
        assert [line.get_label() for line in labelled_lines(axes)] == ["DFA"]
    assert [line.get_label() for line in labelled_lines(accuracy)] == ["BP", "DFA"]
    shown = texts(figure)
    assert any("signals that equal BP's by construction" in text for text in shown)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["BP", "DFA"]
    with pytest.raises(UserError, match="what=alignment: not measured by epoch, or equal"):
        draw(frame.query("rule == 'bp'"), what=["alignment"], by="epoch")


@pytest.mark.parametrize(
    ("what", "facet", "shape"),
    [
        (["loss"], None, (1, 1)),
        (["accuracy", "loss"], None, (2, 1)),
        (["rms", "loss"], None, (3, 1)),
        (["rms", "dead"], None, (2, 2)),
        (["loss"], "lr", (2, 1)),
        (["rms", "accuracy"], "lr", (2, 3)),
    ],
)
def test_few_panels_stand_in_one_column_and_every_facet_in_one_row(what, facet, shape, outputs):
    figure = draw(runs(outputs / "grid"), what=what, by="epoch", facet=facet)
    for axes in figure.axes:
        cell = axes.get_subplotspec()
        assert cell.get_geometry()[:2] == shape
        if facet:
            rate = "lr 0.001" if cell.rowspan.start == 0 else "lr 0.01"
            assert axes.get_title().startswith(f"{rate} · ")


def test_epochs_are_drawn_if_a_run_has_no_iterations(outputs, tmp_path):
    for name in ("grid", "alone"):
        shutil.copytree(outputs / name, tmp_path / name)
    (tmp_path / "alone" / "iterations.csv").unlink()
    assert "epoch" in texts(draw(runs(tmp_path)))


def test_run_whose_net_could_not_be_built_changes_nothing_but_the_caption(outputs, tmp_path):
    shutil.copytree(outputs / "grid", tmp_path / "grid")
    before = draw(runs(tmp_path))
    values = {"status": "failed", "parameters": None, "config": {"method.name": "fa"}}
    failed = altered(outputs / "alone", tmp_path / "failed", **values)
    for name in ("epochs.csv", "iterations.csv"):
        (failed / name).unlink()
    added = set(texts(draw(runs(tmp_path)))) - set(texts(before))
    (caption,) = added
    assert caption.startswith("Not finished: 1 failed.")


def test_run_without_epochs_csv_is_refused(outputs, tmp_path):
    shutil.copytree(outputs / "alone", tmp_path / "alone")
    (tmp_path / "alone" / "epochs.csv").unlink()
    with pytest.raises(UserError, match=r"no run has rows in epochs\.csv"):
        draw(runs(tmp_path))


def test_unfinished_run_is_drawn(outputs, tmp_path):
    shutil.copytree(outputs / "alone", tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    for name in ("epochs.csv", "iterations.csv"):
        content = (tmp_path / "run" / name).read_text()
        (tmp_path / "run" / name).write_text(content[:-5])  # an incomplete last line
    figure = draw(runs(tmp_path), by="epoch", what=["loss"])
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [2]
    assert any("Not finished: 1 interrupted" in text for text in texts(figure))


def test_command_writes_equal_files_and_does_not_import_torch(outputs, tmp_path):
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    program = "import sys; from dfl_experiments.console import plot; plot(); assert 'torch' not in sys.modules"
    command = [
        sys.executable,
        "-c",
        program,
        "grid",
        "alone",
        "--facet",
        "optimizer.lr",
        "--out",
        first,
    ]
    done = subprocess.run(command, cwd=outputs, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{first}\n", "")
    dfl_plot.main(
        [str(outputs / "grid"), str(outputs / "alone"), "--facet", "lr", "--out", str(second)]
    )
    assert first.read_bytes() == second.read_bytes()


def test_plot_of_a_single_folder_is_written_into_it(outputs, capsys):
    dfl_plot.main(
        [str(outputs / "alone"), "--what", "alignment,norm,rms,dead", "--log", "--dpi", "50"]
    )
    path = outputs / "alone" / "plot.png"
    assert capsys.readouterr().out == f"{path}\n"
    assert path.read_bytes().startswith(b"\x89PNG")


REFUSED = {
    "nowhere": "nowhere: no such folder",
    "empty": "empty: no run directory there",
    "grid --what lossy": "what=lossy: no such quantity; there are loss, accuracy",
    "grid --what rms --layer 1,7": "layer=7: not measured; there are 1, 2",
    "grid --facet optimizr.lr": "optimizr.lr: no run has this key; did you mean lr?",
    "grid --color config": "config: no run has this key",
    "grid --color lrr": "lrr: no run has this key; did you mean lr?",
    "grid --where optimizr.lr=1": "optimizr.lr: no run has this key; did you mean lr?",
    "grid --where optimizer.lr=1": "optimizer.lr=1: no run has this value; there are 0.001, 0.01",
    "grid --where lr=0.01 --where rule=las": "rule=las: no run has this value; there are bp, dfa",
    "grid --what cosine_batch --by epoch": "nothing to draw: no run has such values by epoch",
    "grid --out plot.jpg": "plot.jpg: a figure's file ends in .png, .pdf or .svg",
    "grid --out folder.png": "folder.png: Is a directory",
    "grid --out alone/run.log/plot.png": "alone/run.log: File exists",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_mistake_is_refused_in_one_line(arguments, outputs, monkeypatch, capsys):
    for name in ("empty", "folder.png"):
        (outputs / name).mkdir(exist_ok=True)
    monkeypatch.chdir(outputs)
    with pytest.raises(SystemExit) as end:
        dfl_plot.main(arguments.split())
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.startswith(f"dfl-plot: error: {REFUSED[arguments]}")
    assert error.count("\n") == 1


def test_size_too_small_for_the_panels_is_refused(outputs):
    frame = runs(outputs / "grid")
    with pytest.raises(UserError, match=r"size: 3 panels in 2 rows need 1\.6x3 inches or more"):
        draw(frame, what=["loss", "accuracy", "train_accuracy"], size=(3.4, 2.4))


@pytest.mark.parametrize("size", ["3.4", "3.4x", "0x2", "nanx2", "axb"])
def test_size_needs_two_numbers(size):
    with pytest.raises(ArgumentTypeError, match="is not a size from 1x1 to 100x100 inches"):
        dfl_plot.inches(size)


@pytest.mark.parametrize("dpi", ["1", "19", "1000000", "-5", "nan"])
def test_dots_per_inch_have_a_range(dpi, outputs, capsys):
    with pytest.raises(SystemExit) as end:
        dfl_plot.main([str(outputs / "alone"), f"--dpi={dpi}"])
    assert end.value.code == 2
    assert f"argument --dpi: '{dpi}' is not a number from 20 to 1200" in capsys.readouterr().err


def test_variants_of_own_rules_are_not_nearly_black():
    variants = [f"ours, c={number}" for number in range(30)]
    assert min(max(to_rgb(look_of(name).colour)) for name in variants) > 0.4


def test_own_rules_differ_from_the_other_rules_and_from_each_other():
    names = [f"rule_{number}" for number in range(100)]
    colours = np.array([to_rgb(look_of(name).colour) for name in names])
    others = np.array([to_rgb(look.colour) for look in LOOKS.values()])
    distances = np.linalg.norm(colours[:, None] - others, axis=2)
    assert distances.min() > 0.2  # blue and the first "mixed" rule: 0.1
    for first in range(0, 100, len(DASHES)):
        together = looks_of(["las", *names[first : first + len(DASHES)]])
        del together["las"]
        assert len({look.dash for look in together.values()}) == len(DASHES)


@pytest.mark.parametrize("highest", [10.0, 1e19])
def test_logarithmic_axis_has_at_least_two_ticks(highest):
    axes = Figure().subplots()
    axes.plot([0, 1], [0.2, highest])
    set_scale(axes, True)
    axes.figure.draw_without_rendering()
    lower, upper = axes.get_ylim()
    assert sum(lower <= tick <= upper for tick in axes.get_yticks()) > 1


def test_with_value_accepts_a_list_of_values(outputs):
    frame = runs(outputs)
    assert set(with_value(frame, "method", "las,dfa").rule) == {"las", "dfa"}
    with pytest.raises(UserError, match="method=las,dfaa: no run has this value"):
        with_value(frame, "method", "las,dfaa")


def test_run_in_a_folder_of_runs_does_not_hide_them(outputs, tmp_path):
    shutil.copytree(outputs / "grid", tmp_path / "grid")
    shutil.copytree(outputs / "alone", tmp_path / "grid", dirs_exist_ok=True)
    assert len(runs(tmp_path / "grid")) == len(runs(outputs / "grid")) + 1
