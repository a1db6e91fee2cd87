"""Everything that is said of the kept runs, written anew from them: tables, figures, and the findings in the README.

    python scripts/reference.py [--runs outputs/reference] [--readme README.md]

A line of the README that begins `<!-- findings` or `<!-- rules` opens a block that this writes, up to `<!-- end -->`.
"""

import argparse
import re
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from dfl_experiments.report import tables
from dfl_experiments.report.cells import Entry, Section, by_row, sections
from dfl_experiments.report.dfl_report import main as dfl_report
from dfl_experiments.report.findings import Finding, cosine_of, differences, findings, interval
from dfl_experiments.report.looks import FAMILIES, look_of
from dfl_experiments.report.runs import read_runs

BLOCK = re.compile(r"(<!-- (\w+)[^>]*-->\n).*?(<!-- end -->)", re.DOTALL)


def findings_block(found: Sequence[Section]) -> str:
    """The claims with their verdicts, and of what one seed says of each how often it speaks for it."""
    lines = []
    by_claim: dict[str, list[Finding]] = {}
    for one in findings(found):
        by_claim.setdefault(one.claim, []).append(one)
    for claim, those in by_claim.items():
        single = [one for one in those if one.estimate.low is None]
        lines += [
            [claim, f"**{one.verdict}**", f"{interval(one.estimate)} {one.unit}", one.estimate.n, one.where]
            for one in those
            if one not in single
        ]
        if single:
            speak = sum(one.estimate.value > 0 for one in single)
            values = f"{', '.join(f'{one.estimate.value:+.2f}' for one in single)} {single[0].unit}"
            told = f"{speak} of {len(single)} settings for it"
            lines.append([claim, "one seed each", values, 1, told])
    return tabulate(lines, ["claim", "verdict", "found, 95 % interval", "n", "where"], "github", disable_numparse=True)


def rules_row(method: str, entry: Entry, against: dict[str, str]) -> list[str]:
    """A rule's accuracy, its distance from BP, and its alignment."""
    family = next((name for name, (_, members) in FAMILIES.items() if method in members), "your own")
    if (activation := entry.shown[0].config.model.activation) != "relu":
        family += f", on {activation}"
    cosines = [value for run in entry.shown if (value := cosine_of(run)) is not None]
    cosine = f"{statistics.fmean(cosines):.2f}" if cosines and method != "shallow" else "–"
    number = tables.row(entry)
    spread = f" ± {number['±']}" if number["±"] != tables.MISSING else ""
    accuracy, n, lr = number["ours"] + spread, number["n"], number["lr"]
    return [look_of(method).name, family, accuracy, n, against.get("bp", "–"), cosine, lr]


def rules_block(found: Sequence[Section]) -> str:
    """All rules beside each other on MNIST, the most accurate first."""
    for section in found:
        for (dataset, _, _), cells in by_row(section.chosen).items():
            if dataset == "mnist" and section.setting == (False, "fair", ("epochs=20",)):
                order = sorted(cells.items(), key=lambda item: -statistics.fmean(run.accuracy for run in item[1].shown))
                told = {
                    method: {name: interval(estimate) for name, estimate in pairs.items()}
                    for method, pairs in differences(cells).items()
                }
                rows = [rules_row(method, entry, told.get(method, {})) for method, entry in order]
                head = ["rule", "signals", "test accuracy, %", "n", "minus BP, points", "layer-1 cosine", "lr"]
                return tabulate(rows, head, "github", disable_numparse=True)
    return "No runs yet."


def readme(text: str, found: Sequence[Section]) -> str:
    """The README with its blocks written anew."""
    blocks = {"findings": findings_block, "rules": rules_block}
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
