"""Everything that is said of the kept runs, written anew from them: tables, figures, and the findings in the README.

    python scripts/reference.py [--runs outputs/reference] [--readme README.md]

A line of the README such as `<!-- findings -->` opens a block that this writes, up to `<!-- end -->`.
"""

import argparse
import math
import re
import shutil
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tabulate import tabulate

from dfl_experiments.report import tables
from dfl_experiments.report.cells import Entry, Section, by_row, sections
from dfl_experiments.report.correlation import correlation_groups, cosine_of, rule_means
from dfl_experiments.report.dfl_report import main as dfl_report
from dfl_experiments.report.findings import COLLAPSED, TOO_FEW, Finding, accuracy_lead, by_claim, findings, interval
from dfl_experiments.report.intervals import spearman
from dfl_experiments.report.looks import FAMILIES, look_of
from dfl_experiments.report.paper import METHODS
from dfl_experiments.report.runs import read_runs
from dfl_experiments.report.setting import Setting, options_told, rule_of

MNIST = (Setting(False, "fair", ("epochs=20",)), "mnist", "none", "fc")
CONV3_BN = (Setting(False, "fair", ("epochs=5", "precision=bfloat16")), "cifar10", "flip", "conv3_bn")
MIXER = (Setting(False, "fair", ("epochs=1", "precision=bfloat16")), "cifar10", "flip", "mixer")
SHORTEST = 5  # epochs of a setting that the README's claims are judged in
SAME_EPOCHS = 2  # before the learning rate of a run of 3 is lowered
EPOCHS = (1, 12)  # of the controls
FIGURE = {"optimizer.milestones=[]", "optimizer=sgd"}
CONTROLS = {"held=2": "hidden layers' W held", "protocol.dfa_init=default": "B drawn anew"}
EVERYWHERE = re.compile("flip, |; bfloat16|; constant learning rate")  # what the README says of all CIFAR and SGD runs
ORDER = ("supported", "undecided", "contradicted", COLLAPSED, TOO_FEW)
BLOCK = re.compile(r"(<!-- (\w+)[^>]*-->\n).*?(<!-- end -->)", re.DOTALL)


def table(rows: Iterable[Sequence[str]], head: Sequence[str]) -> str:
    """Rows as a table in Markdown."""
    return tabulate(rows, head, "github", disable_numparse=True)


def findings_block(found: Sequence[Section]) -> str:
    """Every claim with how often which verdict was given, and what each rests on.

    Fewer than three seeds are left out, short runs, and controls, which are no setting that the claims are about.
    """
    shown = [
        section
        for section in found
        if not CONTROLS.keys() & {*section.setting.differences}
        and min((run.planned for entry in section.chosen for run in entry.runs), default=0) >= SHORTEST
    ]
    lines = []
    for claim, (counts, those) in by_claim(one for one in findings(shown) if one.verdict != TOO_FEW).items():
        verdicts = ", ".join(f"{counts[verdict]} **{verdict}**" for verdict in ORDER if counts[verdict])
        told = [f"{marked(one)}: {EVERYWHERE.sub('', one.where)}" for one in those]
        n = ", ".join(str(n) for n in sorted({one.n for one in those}))
        lines.append([claim, verdicts, n, "<br>".join(told)])
    return table(lines, ["claim", "verdicts", "n", "found, 95 % interval"])


def marked(one: Finding) -> str:
    """What was found, in bold where the interval leaves out zero."""
    value, _, rest = one.found.partition(" ")
    return f"**{value}** {rest}" if one.estimate and one.estimate.sign else one.found


def mean(values: Iterable[float]) -> str:
    """Mean ± sample standard deviation, and how many they are."""
    values = [*values]
    if not values:
        return tables.MISSING
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread} ({len(values)})"


def cells_of(found: Sequence[Section], place: tuple[Setting, str, str, str]) -> dict[str, Entry]:
    """The entries of a row in a setting, by method."""
    rows = (by_row(section.chosen) for section in found if section.setting == place[0])
    return next((cells[place[1:]] for cells in rows if place[1:] in cells), {})


def told_of(method: str, cells: Mapping[str, Entry], lr: float) -> list[str]:
    """Of a rule at one rate: accuracy and layer-1 cosine without runs that collapsed, and accuracy minus BP's."""
    entry, bp = (cells[name].at((lr, 0.0)) if name in cells else None for name in (method, "bp"))
    if entry is None:
        return [tables.MISSING] * 3
    cosines = [value for run in entry.alive if (value := cosine_of(run)) is not None and method != "shallow"]
    told = [mean(100 * run.accuracy for run in entry.alive)] if entry.alive else []
    told += [entry.lost] if entry.lost else []
    lead = accuracy_lead(entry, bp) if bp and method != "bp" and not entry.lost and not bp.lost else None
    cosine = f"{statistics.fmean(cosines):.2f}" if cosines else tables.MISSING
    return [", ".join(told), cosine, interval(lead) if lead else tables.MISSING]


def family_of(method: str) -> str:
    """Which way a rule's signals go."""
    return next((name for name, (_, members) in FAMILIES.items() if rule_of(method) in members), "your own")


def rules_block(found: Sequence[Section]) -> str:
    """All rules beside each other on MNIST, at two learning rates, the most accurate at its better one first."""
    cells, rates = cells_of(found, MNIST), {"1e-3": 1e-3, "1e-4": 1e-4}
    accuracy = {
        method: max(
            statistics.fmean(run.accuracy for run in point.finished) for point in entry.points if point.finished
        )
        for method, entry in cells.items()
    }
    lines = []
    for method in sorted(cells, key=lambda method: -accuracy[method]):
        activation = cells[method].shown[0].config.model.activation
        family = family_of(method) + ("" if activation == "relu" else f", on {activation}")
        told = [text for lr in rates.values() for text in told_of(method, cells, lr)]
        lines.append([look_of(method).name, family, *told])
    return table(lines, ["rule", "signals", *heads(rates)])


def heads(names: Iterable[str]) -> Iterator[str]:
    """The columns that `told_of` fills, for each of several places."""
    for name in names:
        yield from (f"{name}, %", "cosine", "minus BP")


def cifar_block(found: Sequence[Section]) -> str:
    """All rules beside each other on CIFAR-10, on the nets that there are runs of."""
    nets = {"Conv3+BN": CONV3_BN, "Mixer": MIXER}
    there = {name: cells for name, place in nets.items() if (cells := cells_of(found, place))}
    rules = [rule for _, members in FAMILIES.values() for rule in members]
    methods = {method for cells in there.values() for method in cells if rule_of(method) in rules}
    lines = [
        [look_of(method).name, *(text for cells in there.values() for text in told_of(method, cells, 1e-3))]
        for method in sorted(methods, key=lambda method: rules.index(rule_of(method)))
    ]
    return table(lines, ["rule", *heads(there)])


def families_block(found: Sequence[Section]) -> str:
    """Spearman's ρ between layer 1's cosine and accuracy, over all rules and within families."""
    kinds = {"all rules": "", "direct": "direct", "through every layer": "through"}
    lines = []
    for name, place in (("MNIST, fc", MNIST), ("CIFAR-10, conv3_bn", CONV3_BN), ("CIFAR-10, mixer", MIXER)):
        for lr, groups in correlation_groups(cells_of(found, place), "layer 1").items():
            means = rule_means(groups)
            told = []
            for start in kinds.values():
                points = [point for method, point in means.items() if family_of(method).startswith(start)]
                value = spearman(points)
                told.append(tables.MISSING if value is None else f"{value:+.2f} ({len(points)})")
            lines.append([name, f"{lr:g}", *told])
    return table(lines, ["", "lr", *kinds])


def controls_block(found: Sequence[Section]) -> str:
    """The figure's runs beside those that hold the hidden layers' W, or begin with another B, after as many epochs.

    Its learning rate is constant, so that a long run's first epochs are a short one's.
    """
    lines = []
    for section in found:
        words = {*section.setting.differences}
        for entry in section.chosen if words >= FIGURE else ():
            name, options = options_told(entry.cell.method)
            told = [text for mark, text in CONTROLS.items() if mark in {*words, *options}]
            cosines = [mean(after(entry, "cosine/1", epoch)) for epoch in EPOCHS]
            accuracy = mean(100 * value for value in after(entry, "test_accuracy", EPOCHS[-1]))
            lines.append([look_of(name).name, ", ".join(told) or "as in the figure", *cosines, accuracy])
    cosines = [f"layer-1 cosine, epoch {epoch}" for epoch in EPOCHS]
    return table(lines, ["rule", "", *cosines, f"test accuracy, epoch {EPOCHS[-1]}, %"])


def after(entry: Entry, column: str, epoch: int) -> Iterator[float]:
    """What a column of epochs.csv has for an epoch, of every run."""
    for run in entry.shown:
        yield from (value for value in run.epochs.get(column, [])[epoch - 1 : epoch] if value is not None)


def precision_block(found: Sequence[Section]) -> str:
    """CIFAR-10's first epochs in both precisions, as far as the learning rates are the same; one seed."""
    by_setting = {section.setting.differences: by_row(section.chosen) for section in found}
    low, high = (by_setting.get(key, {}) for key in (("epochs=10", "precision=bfloat16"), ("epochs=3",)))
    lines = []
    for row in [row for row in high if row in low]:
        told = []
        for method in METHODS:
            runs = [
                run
                for cells in (low[row], high[row])
                if method in cells
                for run in cells[method].shown
                if run.seed == 0
            ]
            values = [run.epochs["test_accuracy"][SAME_EPOCHS - 1] or math.nan for run in runs]
            told.append(" / ".join(f"{100 * value:.1f}" for value in values) if len(values) == 2 else tables.MISSING)
        lines.append([row[2], *told])
    return table(lines, [f"after {SAME_EPOCHS} epochs, %", *(look_of(method).name for method in METHODS)])


def beside(found: Sequence[Section]) -> str:
    """What the reference page has beside the report."""
    return f"""
# Controls of the figure: what turns

Layer 1's cosine with SGD at 1e-4, mean ± standard deviation (seeds). Where the hidden layers' W is held, B and the head
learn; where B is drawn anew, it starts as a layer's default in place of the product of the W above it.

{controls_block(found)}

# Alignment and accuracy, family by family

Spearman's ρ between the rules' mean layer-1 cosine in the last epoch and their mean test accuracy, over (how many)
rules.

{families_block(found)}

# What bfloat16 changes

Test accuracy on CIFAR-10, bfloat16 on a GPU / float32 on a CPU with an earlier version, seed 0 in both. It says nothing
of runs that collapse later.

{precision_block(found)}
"""


def readme(text: str, found: Sequence[Section]) -> str:
    """The README with its blocks written anew."""
    blocks = {"findings": findings_block, "rules": rules_block, "cifar": cifar_block}
    return BLOCK.sub(lambda match: f"{match[1]}{blocks[match[2]](found)}\n{match[3]}", text)


def main() -> None:
    """Read the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("outputs/reference"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    asked = parser.parse_args()
    found, figures = sections(read_runs([asked.runs])), asked.runs / "figures"
    end = beside(found)
    shutil.rmtree(figures, ignore_errors=True)  # of an earlier report nothing stays beside this one
    page = ("--format", "markdown", "--out", str(asked.runs / "README.md"), "--figures", str(figures))
    dfl_report([str(asked.runs), *page])
    with (asked.runs / "README.md").open("a") as text:
        text.write(end)
    dfl_report([str(asked.runs), "--format", "csv", "--out", str(asked.runs / "tables.csv")])
    asked.readme.write_text(readme(asked.readme.read_text(), found))
    print(asked.readme)


if __name__ == "__main__":
    main()
