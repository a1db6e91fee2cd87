"""What the runs say: every method's distance from BP and DFA seed by seed, and verdicts on the paper's claims."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from dfl_experiments.report.cells import Entry, Section, by_row
from dfl_experiments.report.intervals import Estimate, paired, rank_correlation
from dfl_experiments.report.runs import Run

REFERENCES = ("bp", "dfa")
SUPPORTED = ("las", "ltas")  # the paper's own methods
FEWEST_METHODS = 8  # that a correlation over methods is told of: of fewer a bootstrap is too sure
TOO_FEW = "too few seeds"
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
        """A claim is supported or contradicted where the interval leaves out zero."""
        return {1: "supported", -1: "contradicted", 0: "undecided", None: TOO_FEW}[self.estimate.sign]


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


def collapsed(run: Run) -> bool:
    """Whether a finished run ends a fifth under its best test accuracy, or at chance: 1/K, within half and 2 points."""
    classes = float(run.result.get("num_classes") or math.inf)
    best = (run.result.get("test_accuracy") or {}).get("best") or 0.0
    return run.accuracy < max(0.8 * best, min(1.5 / classes, 1 / classes + 0.02))


def caveat(cells: Cells, methods: Sequence[str], among: str = "") -> str:
    """What a comparison of these methods' chosen points has to say of runs that collapsed. among: whose they are."""
    counts = {method: (sum(map(collapsed, cells[method].shown)), len(cells[method].shown)) for method in methods}
    return "".join(f"; {method.upper()} collapsed in {k} of {n}{among}" for method, (k, n) in counts.items() if k)


def alive(entry: Entry) -> bool:
    """Whether one of the chosen point's runs did not collapse."""
    return not all(map(collapsed, entry.shown))


def cosine_lead(first: Entry, second: Entry) -> Estimate | None:
    """How much more the first's layer-1 signals align, at equal learning rate and weight decay, paired by seed.

    The rate moves the cosine as much as the rule does, so the points chosen by accuracy would not do.
    """
    theirs = grid_cosines(second)
    leads: dict[int, list[float]] = {}
    for (lr, decay, seed), value in grid_cosines(first).items():
        if (lr, decay, seed) in theirs:
            leads.setdefault(seed, []).append(value - theirs[lr, decay, seed])
    return paired({seed: sum(values) / len(values) for seed, values in leads.items()}, dict.fromkeys(leads, 0.0))


def grid_cosines(entry: Entry) -> dict[tuple[float, float, int], float]:
    """The layer-1 cosine of every run that finished and did not collapse, by learning rate, weight decay and seed."""
    runs = [run for point in entry.points for run in point.finished if not collapsed(run)]
    return {(run.lr, run.weight_decay, run.seed): value for run in runs if (value := cosine_of(run)) is not None}


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


def correlation_groups(cells: Cells, of: str) -> dict[float, dict[str, list[tuple[float, float]]]]:
    """(cosine, accuracy in percent) of a row's finished runs, by learning rate and method. of: "layer 1", "all layers".

    Left out are BP and Shallow, whose signals are BP's, rules on another net than DFA's, such as DRTP's with tanh, and
    runs that collapsed, whose cosine says nothing of how they came there.
    """
    measure = cosine_of if of == "layer 1" else mean_cosine
    net = next((run.config.model for run in cells["dfa"].runs), None) if "dfa" in cells else None
    found: dict[float, dict[str, list[tuple[float, float]]]] = {}
    for method, entry in cells.items():
        for point in entry.points if method not in ("bp", "shallow") else ():
            for run in point.finished:
                if (x := measure(run)) is not None and net in (None, run.config.model) and not collapsed(run):
                    found.setdefault(point.lr, {}).setdefault(method, []).append((x, 100 * run.accuracy))
    return {lr: groups for lr, groups in found.items() if len(groups) >= FEWEST_METHODS}


def of_row(cells: Cells, where: str) -> Iterator[Finding]:
    """The findings within a row of a table."""
    dfa = cells.get("dfa")
    for method in SUPPORTED:
        if dfa and method in cells:
            name = method.upper()
            if estimate := cosine_lead(cells[method], dfa):
                yield Finding(0, f"{name} aligns better with BP than DFA, layer 1", where, estimate, "cosine")
    pairs = [
        *((1, method, "dfa", f"{method.upper()} is more accurate than DFA") for method in SUPPORTED),
        *((3, "bp", method, f"BP is more accurate than {method.upper()}") for method in ("dfa", *SUPPORTED)),
    ]
    for order, first, second, claim in pairs:
        if not {first, second} <= cells.keys() or not (alive(cells[first]) or alive(cells[second])):
            continue
        if estimate := paired(accuracies(cells[first]), accuracies(cells[second])):
            yield Finding(order, claim, where + caveat(cells, (first, second)), estimate, "points")
    for lr, groups in correlation_groups(cells, "layer 1").items():
        if estimate := rank_correlation([*groups.values()]):
            place = f"{where}, lr {lr:g}"
            yield Finding(4, "Over all rules, alignment goes with accuracy", place, estimate, "Spearman's ρ")


def across_classes(rows: Mapping[tuple[str, ...], Cells], setting: str) -> Iterator[Finding]:
    """Whether a lead over DFA is larger on CIFAR-100 than on CIFAR-10, with the same net and epochs."""
    for (dataset, *rest), cells in rows.items():
        few = rows.get(("cifar10", *rest))
        if dataset != "cifar100" or few is None or "dfa" not in cells or "dfa" not in few:
            continue
        for method in SUPPORTED:
            both = (cells, few) if method in cells and method in few else ()
            if not both or not all(alive(c[method]) or alive(c["dfa"]) for c in both):
                continue
            lead = [
                {seed: ours[seed] - dfa[seed] for seed in ours.keys() & dfa.keys()}
                for ours, dfa in ((accuracies(c[method]), accuracies(c["dfa"])) for c in both)
            ]
            if estimate := paired(*lead):
                claim = f"{method.upper()}'s lead over DFA is larger with 100 classes than with 10"
                told = caveat(cells, (method, "dfa"), " of cifar100") + caveat(few, (method, "dfa"), " of cifar10")
                yield Finding(2, claim, f"CIFAR, {in_place(rest)}{setting}{told}", estimate, "points")


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
    """An estimate in text: "+0.12 [-0.10, +0.34]"; of too few values, whose interval says nothing, without it."""
    value = f"{estimate.value:+.{digits}f}"
    if estimate.sign is None:
        return value
    return f"{value} [{estimate.low:+.{digits}f}, {estimate.high:+.{digits}f}]"


def judged(estimate: Estimate | None) -> str:
    """A difference of accuracies with what may be said of it."""
    if estimate is None:
        return "–"
    said = {1: "better", -1: "worse", 0: "undecided", None: TOO_FEW}[estimate.sign]
    return f"{interval(estimate)}, n {estimate.n}: {said}"
