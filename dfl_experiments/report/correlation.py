"""Whether rules whose signals align better with BP's are more accurate: their cosines and accuracies side by side."""

import statistics
from collections.abc import Mapping, Sequence

from dfl_experiments.report.cells import Entry
from dfl_experiments.report.runs import Run
from dfl_experiments.report.setting import options_told, rule_of

FEWEST_METHODS = 8  # that a correlation over methods is told of: of fewer a bootstrap is too sure
Groups = Mapping[str, Sequence[tuple[float, float]]]


def cosine_of(run: Run, layer: str = "1") -> float | None:
    """The mean cosine of a layer over the last epoch; None where it was not measured, or is 1 by construction."""
    if layer in run.result.get("cosine_by_construction", []):
        return None
    value = (run.result.get("cosine") or {}).get(layer)
    return None if value is None else float(value)


def mean_cosine(run: Run) -> float | None:
    """The mean over the layers that it says something about."""
    found = [value for layer in run.result.get("cosine") or {} if (value := cosine_of(run, layer)) is not None]
    return sum(found) / len(found) if found else None


def correlation_groups(cells: Mapping[str, Entry], of: str) -> dict[float, dict[str, list[tuple[float, float]]]]:
    """(cosine, accuracy in percent) of a row's finished runs, by learning rate and method. of: "layer 1", "all layers".

    Left out are BP and Shallow, whose signals are BP's, rules with options of their own, rules on another net than
    DFA's, such as DRTP's with tanh, and runs that collapsed, whose cosine says nothing of how they came there.
    """
    measure = cosine_of if of == "layer 1" else mean_cosine
    net = next((run.config.model for run in cells["dfa"].runs), None) if "dfa" in cells else None
    found: dict[float, dict[str, list[tuple[float, float]]]] = {}
    for method, entry in cells.items():
        for point in entry.points if method not in ("bp", "shallow") and not options_told(rule_of(method))[1] else ():
            for run in point.finished:
                if (x := measure(run)) is not None and net in (None, run.config.model) and not run.collapsed:
                    found.setdefault(point.lr, {}).setdefault(method, []).append((x, 100 * run.accuracy))
    return {lr: groups for lr, groups in found.items() if len(groups) >= FEWEST_METHODS}


def rule_means(groups: Groups) -> dict[str, tuple[float, float]]:
    """The mean cosine and accuracy of every method, however many seeds it has."""
    return {
        method: (statistics.fmean(x for x, _ in points), statistics.fmean(y for _, y in points))
        for method, points in groups.items()
    }
