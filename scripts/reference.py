"""Everything that is said of the kept runs, written anew from them: tables, figures, and the findings in the README.

    python scripts/reference.py [--runs outputs/reference] [--readme README.md]

A line of the README such as `<!-- findings -->` opens a block that this writes, up to `<!-- end -->`.
"""

import argparse
import math
import re
import shutil
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tabulate import tabulate

from dfl_experiments.report import tables
from dfl_experiments.report.cells import Entry, Section, by_row, sections
from dfl_experiments.report.dfl_report import main as dfl_report
from dfl_experiments.report.findings import TOO_FEW, Finding, collapsed, cosine_of, differences, findings, interval
from dfl_experiments.report.looks import FAMILIES, look_of
from dfl_experiments.report.paper import METHODS
from dfl_experiments.report.runs import read_runs
from dfl_experiments.report.setting import Setting

ON_MNIST = (Setting(False, "fair", ("epochs=20",)), "mnist", "none", "fc")
ON_CIFAR = (Setting(False, "fair", ("epochs=5", "precision=bfloat16")), "cifar10", "flip", "conv3_bn")
SAME_EPOCHS = 2  # before the learning rate of a run of 3 is lowered
EPOCH = 12  # of the controls
FIGURE = {"optimizer.milestones=[]", "optimizer=sgd"}
CONTROLS = {"method.held=2": "hidden layers' W held", 'protocol.dfa_init="default"': "B drawn anew"}
EVERYWHERE = re.compile("flip, |; bfloat16|; constant learning rate")  # what the README says of all CIFAR and SGD runs
ORDER = ("supported", "undecided", "contradicted", TOO_FEW)
BLOCK = re.compile(r"(<!-- (\w+)[^>]*-->\n).*?(<!-- end -->)", re.DOTALL)


def findings_block(found: Sequence[Section]) -> str:
    """Every claim with how often which verdict was given, and what each rests on.

    Single seeds are left out, and controls, which are no setting that the claims are about.
    """
    claims: dict[str, list[Finding]] = {}
    for one in findings([section for section in found if not CONTROLS.keys() & {*section.setting.differences}]):
        if one.estimate.low is not None:
            claims.setdefault(one.claim, []).append(one)
    lines = []
    for claim, those in claims.items():
        counts = Counter(one.verdict for one in those)
        verdicts = ", ".join(
            f"{count} **{verdict}**" for verdict, count in sorted(counts.items(), key=lambda item: ORDER.index(item[0]))
        )
        told = [f"{marked(one)} {one.unit}: {EVERYWHERE.sub('', one.where)}" for one in those]
        n = ", ".join(str(n) for n in sorted({one.estimate.n for one in those}))
        lines.append([claim, verdicts, n, "<br>".join(told)])
    return tabulate(lines, ["claim", "verdicts", "n", "found, 95 % interval"], "github", disable_numparse=True)


def marked(one: Finding) -> str:
    """An estimate, in bold where its interval leaves out zero."""
    value, _, rest = interval(one.estimate).partition(" ")
    return f"**{value}** {rest}" if one.estimate.sign else f"{value} {rest}"


def mean(values: Iterable[float]) -> str:
    """Mean ± sample standard deviation, and how many they are."""
    values = [*values]
    if not values:
        return tables.MISSING
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread} ({len(values)})"


def accuracy_and_cosine(entry: Entry | None) -> list[str]:
    """Of the chosen point's runs, those that collapsed apart; the cosine where the signals are not BP's."""
    if entry is None:
        return [tables.MISSING, tables.MISSING]
    runs = [run for run in entry.shown if not collapsed(run)]
    cosines = [value for run in runs if (value := cosine_of(run)) is not None and entry.cell.method != "shallow"]
    told = [mean(100 * run.accuracy for run in runs)] if runs else []
    if lost := len(entry.shown) - len(runs):
        told.append(f"{lost} collapsed")
    return [", ".join(told), f"{statistics.fmean(cosines):.2f}" if cosines else tables.MISSING]


def rules_block(found: Sequence[Section]) -> str:
    """All rules beside each other, the most accurate on MNIST first."""
    rows = {(section.setting, *row): cells for section in found for row, cells in by_row(section.chosen).items()}
    small, large = (rows.get(key, {}) for key in (ON_MNIST, ON_CIFAR))
    order = sorted(small, key=lambda method: -statistics.fmean(run.accuracy for run in small[method].shown))
    lines = []
    for method in order:
        entry = small[method]
        family = next((name for name, (_, members) in FAMILIES.items() if method in members), "your own")
        if (activation := entry.shown[0].config.model.activation) != "relu":
            family += f", on {activation}"
        against = differences(small).get(method, {}).get("bp")
        lines.append([
            look_of(method).name, family, *accuracy_and_cosine(entry), tables.row(entry)["lr"],
            interval(against) if against else tables.MISSING, *accuracy_and_cosine(large.get(method)),
        ])  # fmt: skip
    head = ["rule", "signals", "MNIST, %", "cosine", "lr", "minus BP, points", "CIFAR-10, %", "cosine"]
    return tabulate(lines, head, "github", disable_numparse=True)


def controls_block(found: Sequence[Section]) -> str:
    """The figure's runs beside those that hold the hidden layers' W, or begin with another B, after as many epochs.

    Its learning rate is constant, so that a long run's first epochs are a short one's.
    """
    lines = []
    for section in found:
        words = {*section.setting.differences}
        told = (
            "as in the figure" if words == FIGURE else next((CONTROLS[mark] for mark in CONTROLS if mark in words), "")
        )
        for entry in section.chosen if told and words >= FIGURE else ():
            cosines, accuracies = (
                [
                    value
                    for run in entry.shown
                    for value in run.epochs.get(name, [])[EPOCH - 1 : EPOCH]
                    if value is not None
                ]
                for name in ("cosine/1", "test_accuracy")
            )
            lines.append([look_of(entry.cell.method).name, told, mean(cosines), mean(100 * one for one in accuracies)])
    head = ["rule", "", f"layer-1 cosine, epoch {EPOCH}", "test accuracy, %"]
    return tabulate(lines, head, "github", disable_numparse=True)


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
    head = [f"after {SAME_EPOCHS} epochs, %", *(look_of(method).name for method in METHODS)]
    return tabulate(lines, head, "github", disable_numparse=True)


def beside(found: Sequence[Section]) -> str:
    """What the reference page has beside the report."""
    return f"""
# Controls of the figure: what turns

Layer 1's cosine with SGD at 1e-4, mean ± standard deviation (seeds). Where the hidden layers' W is held, B and the head
learn; where B is drawn anew, it starts as a layer's default in place of the product of the W above it.

{controls_block(found)}

# What bfloat16 changes

Test accuracy on CIFAR-10, bfloat16 on a GPU / float32 on a CPU with an earlier version, seed 0 in both. It says nothing
of runs that collapse later.

{precision_block(found)}
"""


def readme(text: str, found: Sequence[Section]) -> str:
    """The README with its blocks written anew."""
    blocks = {
        "findings": findings_block,
        "rules": rules_block,
        "controls": controls_block,
        "precision": precision_block,
    }
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
