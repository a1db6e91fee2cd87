"""Everything that is said of the kept runs, written anew from them: tables, figures, and the findings in the README.

    python scripts/reference.py [--runs outputs/reference] [--readme README.md]

A line of the README that begins `<!-- findings`, `<!-- rules` or `<!-- controls` opens a block that this writes, up to
`<!-- end -->`.
"""

import argparse
import re
import shutil
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from tabulate import tabulate

from dfl_experiments.report import tables
from dfl_experiments.report.cells import Entry, Section, by_row, sections
from dfl_experiments.report.dfl_report import main as dfl_report
from dfl_experiments.report.findings import Finding, cosine_of, differences, findings, interval
from dfl_experiments.report.looks import FAMILIES, look_of
from dfl_experiments.report.runs import read_runs
from dfl_experiments.report.setting import Setting

ON_MNIST = (Setting(False, "fair", ("epochs=20",)), "mnist", "none", "fc")
ON_CIFAR = (Setting(False, "fair", ("epochs=5", "precision=bfloat16")), "cifar10", "flip", "conv3_bn")
EPOCH = 12  # of the controls
CONTROLS = {"method.held=2": "hidden layers' W held", "protocol.dfa_init=default": "B drawn anew"}
BLOCK = re.compile(r"(<!-- (\w+)[^>]*-->\n).*?(<!-- end -->)", re.DOTALL)


def findings_block(found: Sequence[Section]) -> str:
    """The claims with their verdicts, settings of the same verdict together; those of a single seed are left out."""
    judged: dict[tuple[str, str], list[Finding]] = {}
    for one in findings(found):
        if one.estimate.low is not None:
            judged.setdefault((one.claim, one.verdict), []).append(one)
    lines = [
        [
            claim,
            f"**{verdict}**",
            "<br>".join(f"{interval(one.estimate)} {one.unit}" for one in those),
            "<br>".join(str(one.estimate.n) for one in those),
            "<br>".join(one.where for one in those),
        ]
        for (claim, verdict), those in judged.items()
    ]
    return tabulate(lines, ["claim", "verdict", "found, 95 % interval", "n", "where"], "github", disable_numparse=True)


def mean(values: Iterable[float], digits: int = 2) -> str:
    """Mean ± sample standard deviation, and how many they are."""
    values = [*values]
    if not values:
        return tables.MISSING
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread} ({len(values)})"


def accuracy_and_cosine(entry: Entry | None) -> list[str]:
    """Of the chosen point's runs; the cosine where the signals are not BP's."""
    if entry is None:
        return [tables.MISSING, tables.MISSING]
    cosines = [value for run in entry.shown if (value := cosine_of(run)) is not None]
    return [mean(100 * run.accuracy for run in entry.shown), mean(cosines if entry.cell.method != "shallow" else ())]


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
        words = set(section.setting.differences)
        if "optimizer=sgd" not in words:
            continue
        told = next((name for mark, name in CONTROLS.items() if mark in words), "as in the figure")
        for entry in section.chosen:
            cosines, accuracies = (
                [value for run in entry.shown if (value := run.epochs[name][EPOCH - 1]) is not None]
                for name in ("cosine/1", "test_accuracy")
            )
            lines.append([look_of(entry.cell.method).name, told, mean(cosines), mean(100 * one for one in accuracies)])
    head = ["rule", "", f"layer-1 cosine, epoch {EPOCH}", "test accuracy, %"]
    return tabulate(lines, head, "github", disable_numparse=True)


def readme(text: str, found: Sequence[Section]) -> str:
    """The README with its blocks written anew."""
    blocks = {"findings": findings_block, "rules": rules_block, "controls": controls_block}
    return BLOCK.sub(lambda match: f"{match[1]}{blocks[match[2]](found)}\n{match[3]}", text)


def main() -> None:
    """Read the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("outputs/reference"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    asked = parser.parse_args()
    found, figures = sections(read_runs([asked.runs])), asked.runs / "figures"
    shutil.rmtree(figures, ignore_errors=True)  # of an earlier report nothing stays beside this one
    page = ("--format", "markdown", "--out", str(asked.runs / "README.md"), "--figures", str(figures))
    dfl_report([str(asked.runs), *page])
    dfl_report([str(asked.runs), "--format", "csv", "--out", str(asked.runs / "tables.csv")])
    asked.readme.write_text(readme(asked.readme.read_text(), found))
    print(asked.readme)


if __name__ == "__main__":
    main()
