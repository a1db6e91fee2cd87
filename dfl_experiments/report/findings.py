"""What the runs say: every method's distance from BP and DFA seed by seed, and verdicts on the paper's claims."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from dfl_experiments.report.cells import Entry, Section, by_row
from dfl_experiments.report.correlation import correlation_groups, cosine_of, rule_means
from dfl_experiments.report.intervals import FEWEST, Estimate, paired, rank_correlation
from dfl_experiments.report.looks import look_of
from dfl_experiments.report.setting import Setting, in_words

REFERENCES = ("bp", "dfa")
SUPPORTED = ("las", "ltas")  # the paper's own methods
TOO_FEW, COLLAPSED = "too few seeds", "collapsed"
Cells = Mapping[str, Entry]
Lead = Callable[[Entry, Entry], Estimate | None]


class Finding(NamedTuple):
    """A claim and what speaks for it.

    order: among claims; where: net, data and setting; unit: of the estimate, which is over n seeds or methods; lost:
    whose runs collapsed, which leaves nothing to estimate: a difference would tell how often they do.
    """

    order: int
    claim: str
    where: str
    unit: str
    n: int
    estimate: Estimate | None
    lost: str = ""

    @property
    def verdict(self) -> str:
        """A claim is supported or contradicted where the interval leaves out zero."""
        if self.n < FEWEST:
            return TOO_FEW
        if self.estimate is None:
            return COLLAPSED
        return {1: "supported", -1: "contradicted", 0: "undecided", None: TOO_FEW}[self.estimate.sign]

    @property
    def found(self) -> str:
        """What stands beside the claim: "+0.12 [-0.10, +0.34] points"."""
        return self.lost if self.estimate is None else f"{interval(self.estimate)} {self.unit}"


def accuracies(entry: Entry) -> dict[int, float]:
    """The chosen point's accuracies, in percent, by seed."""
    return {run.seed: 100 * run.accuracy for run in entry.shown}


def accuracy_lead(first: Entry, second: Entry) -> Estimate | None:
    """How much more accurate the first's chosen point is than the second's, in points, paired by seed."""
    return paired(accuracies(first), accuracies(second))


def lost(entries: Iterable[Entry], among: str = "") -> list[str]:
    """Whose runs collapsed at the chosen points: ["DFA 2 of 3 collapsed"]. among: where."""
    return [f"{look_of(entry.cell.method).name} {entry.lost}{among}" for entry in entries if entry.lost]


def cosine_lead(first: Entry, second: Entry) -> Estimate | None:
    """How much more the first's layer-1 signals align, at equal learning rate and weight decay, paired by seed.

    The rate moves the cosine as much as the rule does, so the points chosen by accuracy would not do. It is the mean
    over the grid points at which the most seeds can be compared.
    """
    ours, theirs = grid_cosines(first), grid_cosines(second)
    leads = [
        {seed: value - theirs[point][seed] for seed, value in ours[point].items() if seed in theirs[point]}
        for point in ours.keys() & theirs.keys()
    ]
    seeds = max((lead.keys() for lead in leads), key=lambda those: (len(those), sorted(those)), default={}.keys())
    same = [lead for lead in leads if lead.keys() == seeds]
    return paired({seed: statistics.fmean(lead[seed] for lead in same) for seed in seeds}, dict.fromkeys(seeds, 0.0))


def grid_cosines(entry: Entry) -> dict[tuple[float, float], dict[int, float]]:
    """The layer-1 cosine by seed, of every grid point's runs that finished and did not collapse."""
    return {
        point.place: {
            run.seed: value
            for run in point.finished
            if not run.collapsed and (value := cosine_of(run)) is not None
        }
        for point in entry.points
    }  # fmt: skip


def unequal(first: Entry, second: Entry) -> str:
    """What the two chosen points differ in: "; lr 0.001 (LAS) and 0.0001 (DFA)"."""
    told = ""
    if first.best and second.best:
        names = [look_of(entry.cell.method).name for entry in (first, second)]
        for key, one, other in zip(("lr", "weight decay"), first.best.place, second.best.place, strict=True):
            told += f"; {key} {one:g} ({names[0]}) and {other:g} ({names[1]})" if one != other else ""
    return told


def of_row(cells: Cells, where: str) -> Iterator[Finding]:
    """The findings within a row of a table."""
    claims: list[tuple[int, str, str, str, Lead]] = [
        *((0, f"{one.upper()} aligns better with BP than DFA, layer 1", one, "dfa", cosine_lead) for one in SUPPORTED),
        *((1, f"{one.upper()} is more accurate than DFA", one, "dfa", accuracy_lead) for one in SUPPORTED),
        *((3, f"BP is more accurate than {one.upper()}", "bp", one, accuracy_lead) for one in ("dfa", *SUPPORTED)),
    ]
    for order, claim, one, other, lead in claims:
        if {one, other} <= cells.keys():
            both = cells[one], cells[other]
            place, unit = (where, "cosine") if lead is cosine_lead else (where + unequal(*both), "points")
            n, told = len(accuracies(both[0]).keys() & accuracies(both[1]).keys()), ", ".join(lost(both))
            estimate = None if told else lead(*both)
            measured = lead is not cosine_lead or all(run.config.alignment.every for one in both for run in one.shown)
            if n and measured and (told or estimate):
                yield Finding(order, claim, place, unit, estimate.n if estimate else n, estimate, told)
    for lr, groups in correlation_groups(cells, "layer 1").items():
        if estimate := rank_correlation([*rule_means(groups).values()]):
            claim, unit = "Over all rules, alignment goes with accuracy", "Spearman's ρ"
            yield Finding(4, claim, f"{where}, lr {lr:g}", unit, estimate.n, estimate)


def across_classes(rows: Mapping[tuple[str, ...], Cells], setting: Setting) -> Iterator[Finding]:
    """Whether a lead over DFA is larger on CIFAR-100 than on CIFAR-10, with the same net and epochs."""
    for (dataset, *rest), many in rows.items():
        few = rows.get(("cifar10", *rest), {})
        for method in SUPPORTED if dataset == "cifar100" else ():
            if not {method, "dfa"} <= many.keys() & few.keys():
                continue
            told = [
                one
                for cells, name in ((many, " on cifar100"), (few, " on cifar10"))
                for one in lost((cells[method], cells["dfa"]), name)
            ]
            leads = [
                {seed: ours[seed] - dfa[seed] for seed in ours.keys() & dfa.keys()}
                for ours, dfa in ((accuracies(cells[method]), accuracies(cells["dfa"])) for cells in (many, few))
            ]
            if estimate := paired(*leads):
                claim = f"{method.upper()}'s lead over DFA is larger with 100 classes than with 10"
                where = f"CIFAR, {in_place(rest)}{in_setting(setting, many)}"
                kept = None if told else estimate
                yield Finding(2, claim, where, "points", estimate.n, kept, ", ".join(told))


def in_place(names: Iterable[str]) -> str:
    """Names of a table's row, without an augmentation that there is not."""
    return ", ".join(name for name in names if name != "none")


def findings(sections: Sequence[Section]) -> list[Finding]:
    """All of them, of runs that are no smoke, claim by claim, those that rest on the most first."""
    found: list[Finding] = []
    for section in sections:
        if not section.setting.smoke:
            rows = by_row(section.chosen)
            for row, cells in rows.items():
                found += of_row(cells, in_place(row) + in_setting(section.setting, cells))
            found += across_classes(rows, section.setting)
    return sorted(found, key=lambda one: (one.order, one.claim, -one.n))


def in_setting(setting: Setting, cells: Cells) -> str:
    """How long a row's runs are, and what tells their setting from the usual one."""
    epochs = next(in_words(f"epochs={run.planned}") for entry in cells.values() for run in entry.runs)
    return "".join(f"; {words}" for words in dict.fromkeys([epochs, *setting.told]))


def by_claim(found: Iterable[Finding]) -> dict[str, tuple[Counter[str], list[Finding]]]:
    """The findings of every claim, and how often each verdict was given on it."""
    claims: dict[str, list[Finding]] = {}
    for one in found:
        claims.setdefault(one.claim, []).append(one)
    return {claim: (Counter(one.verdict for one in those), those) for claim, those in claims.items()}


def interval(estimate: Estimate, digits: int = 2) -> str:
    """An estimate in text: "+0.12 [-0.10, +0.34]"; of too few values, whose interval says nothing, without it."""
    value = f"{estimate.value:+.{digits}f}"
    if estimate.sign is None:
        return value
    return f"{value} [{estimate.low:+.{digits}f}, {estimate.high:+.{digits}f}]"


def judged(first: Entry, second: Entry) -> str:
    """The difference of their accuracies with what may be said of it."""
    estimate = accuracy_lead(first, second)
    if estimate is None or first.lost or second.lost:
        return ", ".join(lost((first, second))) or "–"
    said = {1: "better", -1: "worse", 0: "undecided", None: TOO_FEW}[estimate.sign]
    return f"{interval(estimate)}, n {estimate.n}: {said}"
