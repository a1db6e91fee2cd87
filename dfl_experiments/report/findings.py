"""What the runs say: every method's distance from BP and DFA seed by seed, and verdicts on the paper's claims."""

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


def at_chance(run: Run) -> bool:
    """Whether a finished run has learned nothing, or has lost it: 1/K, within half of it and 2 points."""
    classes = float(run.result.get("num_classes") or 0)
    return classes > 0 and run.accuracy < min(1.5 / classes, 1 / classes + 0.02)


def caveat(cells: Cells, *methods: str) -> str:
    """What a comparison of these methods' chosen points has to say of runs at chance."""
    told = ""
    for method in methods:
        shown = cells[method].shown
        if count := sum(map(at_chance, shown)):
            told += f"; {method.upper()} at chance in {count} of {len(shown)}"
    return told


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
    """The layer-1 cosine of every finished run, by learning rate, weight decay and seed."""
    runs = [run for point in entry.points for run in point.finished]
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
    runs at chance, whose cosine says nothing of how they came there.
    """
    measure = cosine_of if of == "layer 1" else mean_cosine
    net = next((run.config.model for run in cells["dfa"].runs), None) if "dfa" in cells else None
    found: dict[float, dict[str, list[tuple[float, float]]]] = {}
    for method, entry in cells.items():
        for point in entry.points if method not in ("bp", "shallow") else ():
            for run in point.finished:
                if (x := measure(run)) is not None and net in (None, run.config.model) and not at_chance(run):
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
    for method in SUPPORTED:
        if dfa and method in cells and (estimate := paired(accuracies(cells[method]), accuracies(dfa))):
            place = where + caveat(cells, method, "dfa")
            yield Finding(1, f"{method.upper()} is more accurate than DFA", place, estimate, "points")
    for method in ("dfa", *SUPPORTED):
        both = "bp" in cells and method in cells
        if both and (estimate := paired(accuracies(cells["bp"]), accuracies(cells[method]))):
            place = where + caveat(cells, "bp", method)
            yield Finding(3, f"BP is more accurate than {method.upper()}", place, estimate, "points")
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
            if method in cells and method in few:
                lead = [
                    {seed: ours[seed] - dfa[seed] for seed in ours.keys() & dfa.keys()}
                    for ours, dfa in ((accuracies(c[method]), accuracies(c["dfa"])) for c in (cells, few))
                ]
                if estimate := paired(*lead):
                    claim = f"{method.upper()}'s lead over DFA is larger with 100 classes than with 10"
                    told = {caveat(c, method, "dfa"): None for c in (few, cells)}
                    yield Finding(2, claim, f"CIFAR, {in_place(rest)}{setting}{''.join(told)}", estimate, "points")


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


def judged(estimate: Estimate | None) -> str:
    """A difference of accuracies with what may be said of it."""
    if estimate is None:
        return "–"
    said = {1: "better", -1: "worse", 0: "undecided", None: TOO_FEW}[estimate.sign]
    return f"{interval(estimate)}, n {estimate.n}: {said}"
