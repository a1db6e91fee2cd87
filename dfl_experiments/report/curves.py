"""What the figures of a report show over the epochs, before anything is drawn: alignment, and learning curves."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from dfl_experiments.measured import EXTRA_QUANTITIES
from dfl_experiments.report.cells import Entry
from dfl_experiments.report.looks import look_of
from dfl_experiments.report.panels import Curves, Figure, Series
from dfl_experiments.report.tables import seeds_behind

MOST_NAMES = 4  # that a panel's title has room for
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def curves(entries: Iterable[Entry], column: str, scale: float = 1.0) -> list[Series]:
    """A column of epochs.csv as a curve for every cell that has it: mean and range over the chosen point's seeds.

    Of runs that did not collapse, or of all where all did. Epochs that not all of these seeds have are left out.
    """
    found = []
    for entry in entries:
        runs = entry.counted
        rows = [*zip(*(run.epochs.get(column, []) for run in runs), strict=False)]
        present = [None if None in row else [scale * value for value in row if value is not None] for row in rows]
        if any(present):
            y, low, high = ([of(row) if row else None for row in present] for of in (statistics.fmean, min, max))
            span = (low, high) if len(runs) > 1 else ((), ())
            found.append(Series(look_of(entry.cell.method), range(1, len(present) + 1), y, *span))
    return found


def seeds_note(entries: Sequence[Entry]) -> str:
    """How many seeds a curve stands for, in sentences."""
    seeds = seeds_behind(entries)
    told = "One seed." if seeds == "1" else f"Mean over {seeds} seeds, their range shaded."
    partly = any(one.lost and one.alive for one in entries)
    return f"{told} Without runs that collapsed, where not all of a method's did." if partly else told


def layers_of(entries: Iterable[Entry], quantity: str) -> list[int]:
    """The layers for which epochs.csv has this quantity, in any of the runs."""
    columns = {name for entry in entries for run in entry.shown for name in run.epochs}
    return sorted(int(name.partition("/")[2]) for name in columns if name.startswith(f"{quantity}/"))


def alignment_panel(layer: int, entries: list[Entry], place: str) -> Curves | None:
    """The cosines of a layer, and BP's own line, at a grid point.

    None where nothing was measured, or all are 1 by construction.
    """
    drawn = [(entry, one) for entry in entries for one in curves([entry], f"cosine/{layer}")]
    series = [one for _, one in drawn]
    exact = [one for one, _ in drawn if str(layer) in one.shown[0].result.get("cosine_by_construction", [])]
    if len(exact) == len(series):
        return None
    names = ", ".join(look_of(entry.cell.method).name for entry in exact)
    if len(exact) > MOST_NAMES:
        names = f"{len(exact)} of {len(series)} methods"
    x = max((one.x for one in series), key=len)
    bp = Series(look_of("bp"), x, [1.0] * len(x))
    title = f"layer {layer}{place}" + (f": 1 by construction for {names}" if names else "")
    least = min(value for one in series for value in (*one.y, *one.low) if value is not None)
    y_range = (min(0.5, math.floor(10 * least - 0.5) / 10), 1.05)
    return Curves(title, f"mean cosine of δ{str(layer).translate(SUBSCRIPTS)} with BP's", [bp, *series], y_range)


def at_chosen(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """The entries at each grid point that one of them has chosen, those of the most first: {", lr 0.001": [...], …}.

    The learning rate moves the cosine as much as the rule does, so that only those of equal rates can be compared.
    Where all have chosen the same point its name is empty.
    """
    places = Counter(entry.best.place for entry in entries if entry.best)
    found = {}
    for lr, decay in sorted(places, key=lambda place: (-places[place], place)):
        name = f", lr {lr:g}" + f", weight decay {decay:g}" * bool(decay)
        found[name if len(places) > 1 else ""] = [one for entry in entries if (one := entry.at((lr, decay)))]
    return found


def alignment(entries: list[Entry]) -> Iterable[Figure]:
    """The paper's alignment figure, of layer 1; and one of all layers, at the grid point that the most have chosen."""
    what = "Cosine of the applied error signal with BP's, same weights, same batch: mean over samples and iterations."
    found = []  # panels by layer, and a note, of every grid point
    for place, those in at_chosen([entry for entry in entries if entry.cell.method != "bp"]).items():
        alive = [entry for entry in those if entry.alive]
        panels = {n: panel for n in layers_of(alive, "cosine") if (panel := alignment_panel(n, alive, place))}
        dead = ", ".join(look_of(entry.cell.method).name for entry in those if not entry.alive)
        without = f" Without {dead}, all of whose runs collapsed." if dead else ""
        found.append((panels, f"{place.removeprefix(', ')}{': ' * bool(place)}{seeds_note(alive)}{without}"))
    if first := [(panels[1], note) for panels, note in found if 1 in panels]:
        notes = " ".join(note for _, note in first)
        yield Figure("alignment", "Alignment with BP, layer 1", f"{what} {notes}", [panel for panel, _ in first])
    for panels, note in found[:1]:
        if set(panels) - {1}:
            title = "Alignment with BP, every layer"
            yield Figure("alignment-all-layers", title, f"{what} {note}", [*panels.values()])


def quantities(entries: list[Entry]) -> Iterable[Figure]:
    """A figure, with a panel for each layer, of everything else that was measured."""
    for name, what in EXTRA_QUANTITIES.items():
        found = {layer: curves(entries, f"{name}_mean/{layer}") for layer in layers_of(entries, f"{name}_mean")}
        panels = [Curves(f"layer {layer}", name.replace("_", " "), series) for layer, series in found.items() if series]
        if panels:
            note = f"The {what}: mean over iterations. {seeds_note(entries)}"
            yield Figure(name.replace("_", "-"), name.replace("_", " ").capitalize(), note, panels)


def learning(entries: list[Entry]) -> Iterable[Figure]:
    """Accuracy and loss over the epochs."""
    losses = curves(entries, "train_loss")
    log = all(value > 0 for one in losses for value in (*one.y, *one.low) if value is not None)
    panels = [
        Curves("test accuracy", "test accuracy, %", curves(entries, "test_accuracy", 100.0)),
        Curves("training loss", "training loss, mean of the epoch", losses, log=log),
    ]
    if panels := [panel for panel in panels if panel.series]:
        note = f"Of each method's chosen grid point. {seeds_note(entries)}"
        yield Figure("learning", "Learning curves", note, panels)
