"""What the runs say: every method's distance from BP and DFA seed by seed, and verdicts on the paper's claims."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from dfl_experiments.report.cells import Entry, Section, by_row
from dfl_experiments.report.intervals import Estimate, paired, rank_correlation
from dfl_experiments.report.runs import Run

REFERENCES = ("bp", "dfa")
SUPPORTED = ("las", "ltas")  # the paper's own methods
FEWEST_METHODS = 5  # that a correlation over methods is told of
Cells = Mapping[str, Entry]


class Finding(NamedTuple):
    """A claim and what speaks for it. order: among claims; where: net, data and setting; unit: of the estimate."""

    order: int
    claim: str
    where: str
    estimate: Estimate
    unit: str

    @property
    def verdict(self) -> str:
        """The only place where a report says that something is better."""
        return {1: "supported", -1: "contradicted", 0: "undecided", None: "one seed"}[self.estimate.sign]


def accuracies(entry: Entry) -> dict[int, float]:
    """The chosen point's accuracies, in percent, by seed."""
    return {run.seed: 100 * run.accuracy for run in entry.shown}


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


def cosines(entry: Entry) -> dict[int, float]:
    """The chosen point's layer-1 cosines by seed."""
    return {run.seed: value for run in entry.shown if (value := cosine_of(run)) is not None}


def differences(cells: Cells) -> dict[str, dict[str, Estimate]]:
    """Of every method of a row: its accuracy minus that of each of `REFERENCES`, in points, paired by seed."""
    found: dict[str, dict[str, Estimate]] = {}
    for method, entry in cells.items():
        for reference in REFERENCES:
            if method != reference and reference in cells:
                estimate = paired(accuracies(entry), accuracies(cells[reference]))
                if estimate:
                    found.setdefault(method, {})[reference] = estimate
    return found


def correlation_groups(cells: Cells, of: str) -> dict[str, list[tuple[float, float]]]:
    """(cosine, accuracy in percent) of every finished run of a row's grids, by method. of: "layer 1", "all layers"."""
    measure = cosine_of if of == "layer 1" else mean_cosine
    found: dict[str, list[tuple[float, float]]] = {}
    for method, entry in cells.items():
        runs = [run for point in entry.points for run in point.finished]
        points = [(x, 100 * run.accuracy) for run in runs if (x := measure(run)) is not None]
        if points and method not in ("bp", "shallow"):
            found[method] = points
    return found


def of_row(cells: Cells, where: str) -> Iterator[Finding]:
    """The findings within a row of a table."""
    dfa = cells.get("dfa")
    for method in SUPPORTED:
        if dfa and method in cells:
            name = method.upper()
            if estimate := paired(cosines(cells[method]), cosines(dfa)):
                yield Finding(0, f"{name} aligns better with BP than DFA, layer 1", where, estimate, "cosine")
    for method in SUPPORTED:
        if dfa and method in cells and (estimate := paired(accuracies(cells[method]), accuracies(dfa))):
            yield Finding(1, f"{method.upper()} is more accurate than DFA", where, estimate, "points")
    for method in ("dfa", *SUPPORTED):
        both = "bp" in cells and method in cells
        if both and (estimate := paired(accuracies(cells["bp"]), accuracies(cells[method]))):
            yield Finding(3, f"BP is more accurate than {method.upper()}", where, estimate, "points")
    groups = correlation_groups(cells, "layer 1")
    if len(groups) >= FEWEST_METHODS and (estimate := rank_correlation([*groups.values()])):
        yield Finding(4, "Over all rules, alignment goes with accuracy", where, estimate, "Spearman's ρ")


def across_classes(rows: Mapping[tuple[str, ...], Cells], setting: str) -> Iterator[Finding]:
    """Whether a lead over DFA is larger on CIFAR-100 than on CIFAR-10, with the same net and epochs."""
    for (dataset, *rest), cells in rows.items():
        few = rows.get(("cifar10", *rest))
        if dataset != "cifar100" or few is None or not {"dfa"} <= cells.keys() & few.keys():
            continue
        for method in SUPPORTED:
            if method in cells and method in few:
                lead = [
                    {seed: ours[seed] - dfa[seed] for seed in ours.keys() & dfa.keys()}
                    for ours, dfa in ((accuracies(c[method]), accuracies(c["dfa"])) for c in (cells, few))
                ]
                if estimate := paired(*lead):
                    claim = f"{method.upper()}'s lead over DFA is larger with 100 classes than with 10"
                    yield Finding(2, claim, f"CIFAR, {in_place(rest)}{setting}", estimate, "points")


def in_place(names: Iterable[str]) -> str:
    """Names of a table's row, without an augmentation that there is not."""
    return ", ".join(name for name in names if name != "none")


def findings(sections: Sequence[Section]) -> list[Finding]:
    """All of them, of runs that are no smoke, claim by claim, those that rest on the most first."""
    found: list[Finding] = []
    for section in sections:
        if section.setting.smoke:
            continue
        setting = "".join(f"; {words}" for words in section.setting.told)
        rows = by_row(section.chosen)
        for row, cells in rows.items():
            found += of_row(cells, f"{in_place(row)}{setting}")
        found += across_classes(rows, setting)
    return sorted(found, key=lambda one: (one.order, one.claim, -one.estimate.n))


def interval(estimate: Estimate, digits: int = 2) -> str:
    """An estimate in text: "+0.12 [-0.10, +0.34]"."""
    value = f"{estimate.value:+.{digits}f}"
    if estimate.low is None:
        return value
    return f"{value} [{estimate.low:+.{digits}f}, {estimate.high:+.{digits}f}]"


def compared(estimate: Estimate | None) -> str:
    """A difference of accuracies with what may be said of it."""
    if estimate is None:
        return "–"
    said = {1: "better", -1: "worse", 0: "undecided", None: "one seed"}[estimate.sign]
    return f"{interval(estimate)}, {said}"
