"""The tables of a report, as text in several formats."""

import math
import re
import statistics
from collections.abc import Iterable, Sequence

from tabulate import LATEX_ESCAPE_RULES, tabulate

from dfl_experiments.configuration.composition import FULLY_CONNECTED
from dfl_experiments.report.cells import Entry, Section, by_row, mean, methods_of
from dfl_experiments.report.findings import REFERENCES, Finding, findings, judged
from dfl_experiments.report.paper import PAPER, TITLES
from dfl_experiments.report.runs import Cell
from dfl_experiments.running.run_directory import csv_text

FORMATS = {
    "ours": ".2%", "±": ".2%", "n": "d", "paper": ".2%", "difference": "+.2%", "at best val.": ".2%",
    "angle": ".0f", "lr": "g", "weight decay": "g", "hours": ".2f",
}  # fmt: skip
COLUMNS = (*Cell._fields, *FORMATS, "grid", "runs", "device")
MISSING = "–"
SHAPES = (
    " On images and tokens B has the shape of a convolution in DFA, LAS and LTAS, and is dense in other direct rules, "
    "unless a method's name says otherwise."
)
PAIRED = "Differences in accuracy, in points, seed by seed, with 95 % intervals (Student's t, n seeds)."


def degrees(cosine: float | None) -> float | None:
    """The angle that has this cosine."""
    return None if cosine is None else math.degrees(math.acos(min(1.0, max(-1.0, cosine))))


def numbers(entry: Entry) -> dict[str, float | None]:
    """What stands under the columns in `FORMATS`, accuracies as fractions; None where there is nothing to say."""
    runs, best = entry.counted, entry.best
    accuracies = [run.accuracy for run in runs]
    ours = mean(accuracies)
    return {
        "ours": ours,
        "±": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "n": len(runs),
        "paper": entry.paper,
        "difference": None if ours is None or entry.paper is None else ours - entry.paper,
        "at best val.": mean([(run.result.get("test_accuracy") or {}).get("at_best_validation") for run in runs]),
        "angle": degrees(mean([(run.result.get("cosine") or {}).get("1") for run in runs])),
        "lr": best.lr if best else None,
        "weight decay": best.weight_decay if best else None,
        "hours": mean([float(run.result["seconds"]) / 3600 for run in runs]),
    }


def row(entry: Entry, missing: str = MISSING) -> dict[str, str]:
    """What stands under `COLUMNS`, accuracies in percent."""
    shown = [
        missing if value is None else f"{value:{FORMATS[name]}}".rstrip("%") for name, value in numbers(entry).items()
    ]
    devices = ", ".join(sorted({str(run.result.get("device")) for run in entry.shown})) or missing
    state = ", ".join(filter(None, [entry.state, entry.lost, "mixed" * bool(entry.mixed)]))
    return dict(zip(COLUMNS, [*entry.cell, *shown, entry.grid, state, devices], strict=True))


def ours_and_paper(entry: Entry) -> str:
    """Our mean and deviation in percent, or else in a word why there are none; the paper's number in brackets.

    Runs that collapsed are counted beside it.
    """
    text = row(entry, missing="")
    statuses = {run.status for run in entry.runs}
    why = next((s for s in ("running", "interrupted", "failed", "diverged", "stopped") if s in statuses), "missing")
    spread = f" ± {text['±']}" if text["±"] else ""
    paper = f" ({text['paper']})" if text["paper"] else ""
    lost = f", {entry.lost}" if entry.lost else ""
    return f"{text['ours'] or why}{spread}{paper}{lost}"


def seeds_behind(entries: Sequence[Entry]) -> str:
    """How many seeds the numbers are of: "2", or "1 to 3"."""
    counts = [len(entry.counted) for entry in entries if entry.best] or [0]
    return " to ".join(map(str, sorted({min(counts), max(counts)})))


def rule(section: Section) -> str:
    """How the numbers of a section were come by."""
    entries = section.chosen
    if not entries:
        return "No run has finished."
    reported = " or ".join(sorted({run.reported for entry in entries for run in entry.runs}))
    chosen = "on the test set itself, as these runs hold no validation split out, which flatters it"
    if all(entry.on_validation for entry in entries):
        chosen = "on the validation split"
    return (
        f"Test accuracy in percent {reported}: mean over n seeds, ± sample standard deviation. Runs that collapsed "
        "(end at chance, or a fifth under their best test accuracy) are counted apart. Of a cell's grid points "
        f"the best one is shown, chosen {chosen}: any two are compared by their means over the seeds that both have "
        "finished; a point of which a run diverged, failed or was stopped comes last; of tied ones, marked so, the "
        "one with the lower validation loss is shown where it was recorded. At best val.: test accuracy at each run's "
        "epoch with the best validation accuracy. Grid: how many of the points in conf/experiment/ have finished. "
        "Angle: of layer 1's error signal with BP's, in degrees, from the mean cosine of the last epoch. "
        "Hours: of training, mean of the point's runs."
        + SHAPES
        * any(entry.cell.model not in FULLY_CONNECTED for entry in entries)
    )


def mixed_note(entries: Sequence[Entry]) -> str:
    """What the runs of one cell differ in, over a table; empty if in nothing."""
    found = sorted(set[str]().union(*(entry.mixed for entry in entries)))
    return f"Mixed: the runs of such a cell differ in version or device ({', '.join(found)})." if found else ""


def not_begun(section: Section, name: str) -> str:
    """The rows of a table of the paper that have no run, in a line; empty if there are none, or no table is begun."""
    if not (section.tables["fc"] or section.tables["cnn"]):
        return ""
    begun = by_row(section.tables[name])
    rows = dict.fromkeys(" ".join(cell[:3]) for cell in PAPER.get(name, {}) if cell[:3] not in begun)
    return f"Not begun: {'; '.join(rows)}." if rows else ""


def wide(entries: Sequence[Entry]) -> list[list[str]]:
    """A table in the paper's layout, its heading first: ours, with the paper's number in brackets."""
    methods = methods_of(entries)
    lines = [["dataset", "augmentation", "model", *methods]]
    for key, cells in by_row(entries).items():
        lines.append([*key, *(ours_and_paper(cells[method]) if method in cells else "" for method in methods)])
    return lines


def paired_table(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """Every method's accuracy minus BP's and DFA's, in points, seed by seed; empty where nothing can be compared."""
    rows = []
    for key, cells in by_row(entries).items():
        for method, entry in cells.items():
            others = [name for name in REFERENCES if name in cells and name != method]
            told = {name: judged(entry, cells[name]) for name in others}
            if any(text != MISSING for text in told.values()):
                shown = {f"minus {name}": told.get(name, MISSING) for name in REFERENCES}
                rows.append({**dict(zip(Cell._fields, [*key, method], strict=True)), **shown})
    return rows


def found_table(found: Sequence[Finding]) -> list[dict[str, str]]:
    """The claims with their verdicts."""
    return [
        {
            "claim": one.claim,
            "where": one.where,
            "found": one.found,
            "n": str(one.n),
            "verdict": one.verdict,
        }
        for one in found
    ]


FOUND = (
    "Mean difference over n seeds, paired by seed, and its 95 % interval (Student's t): supported or contradicted "
    "where that leaves out zero and n is at least 3. Accuracies are compared at each method's chosen grid point, with "
    "the rates where they differ; alignment, of the last epoch, at equal learning rates. For a rank correlation n is "
    "the number of rules, each with its mean over the seeds, and the interval a bootstrap over them. Where a run "
    "of a chosen point collapsed (ends at chance, or a fifth under its best test accuracy), no difference is judged. "
    "Nothing is corrected for how many claims there are."
)


# what Markdown obeys within a line; a link's text needs no more than its end changed, and a word may hold a _
OBEYED = re.compile(r"[\\`*<&|~]|(?<!\w)_|_(?!\w)|\](?=[(\[])")


def markdown(text: str) -> str:
    """Escape what Markdown would obey in a text."""
    return OBEYED.sub(r"\\\g<0>", text)


def table(lines: Sequence[Iterable[str]], style: str) -> str:
    """Lay out lines, the heading first, in one of tabulate's styles."""
    clean = markdown if style == "github" else str
    texts = [[clean(text) for text in line] for line in lines]
    return tabulate(texts, "firstrow", tablefmt=style, disable_numparse=True) + "\n"


def lines_of(rows: Sequence[dict[str, str]]) -> list[Iterable[str]]:
    """The keys of equal rows as a heading, then their texts."""
    return [rows[0], *(row.values() for row in rows)]


def without_empty_columns(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Rows of a text without the columns that have nothing to say in any of them."""
    empty = {name for name in rows[0] if all(row[name] == MISSING for row in rows)}
    return [{name: text for name, text in row.items() if name not in empty} for row in rows]


def as_text(sections: Sequence[Section], style: str = "simple", figures: Sequence[str] = ()) -> str:
    """All tables for a person, style being one of tabulate's: "simple" for a terminal, "github" for Markdown.

    figures: what stands at the end of each section.
    """
    heading, subheading = ("# {}\n", "## {}\n") if style == "github" else ("{}\n" + "=" * 72 + "\n", "{}\n")
    clean = markdown if style == "github" else str
    parts = []
    said: set[str] = set()

    def once(note: str) -> list[str]:
        new = note not in said
        said.add(note)
        return [f"{note}\n"] * new

    for index, section in enumerate(sections):
        parts.append(heading.format(clean(section.setting.title)))
        parts += once(rule(section)) if section.chosen else [f"{rule(section)}\n"]
        for name, title in TITLES.items():
            entries, missing = section.tables[name], not_begun(section, name)
            if entries or missing:
                parts.append(subheading.format(title))
            if entries:
                parts.append(table(wide(entries), style))
                parts.append(table(lines_of(without_empty_columns([row(entry) for entry in entries])), style))
            if note := mixed_note(entries):
                parts.append(f"{note}\n")
            if rows := paired_table([entry for entry in entries if entry.best]):
                parts += [*once(PAIRED), table(lines_of(rows), style)]
            if missing:
                parts.append(f"{missing}\n")
        parts += figures[index : index + 1]
    return "\n".join(parts)


def answers(sections: Sequence[Section], style: str = "simple") -> str:
    """The findings for a person; empty where there is nothing to compare."""
    rows = found_table(findings(sections))
    return f"{table(lines_of(rows), style)}\n{FOUND}\n" if rows else ""


def as_csv(sections: Sequence[Section]) -> str:
    """Every entry of every table as one row; accuracies in percent, empty where there is none."""
    rows: list[Iterable[str]] = [["table", "smoke", "protocol", "differences", *COLUMNS]]
    for section in sections:
        smoke, protocol, differences = section.setting
        for name, entries in section.tables.items():
            setting = (name, "smoke" if smoke else "", protocol, "; ".join(differences))
            rows += [[*setting, *row(entry, missing="").values()] for entry in entries]
    return csv_text(rows)


def as_latex(sections: Sequence[Section]) -> str:
    """Tables in the paper's layout, the paper's numbers in brackets beside ours; needs the package booktabs."""
    escapes = str.maketrans(LATEX_ESCAPE_RULES | {"±": r"$\pm$"})
    parts = []
    for section in sections:
        for name, title in TITLES.items():
            entries = section.tables[name]
            if not entries:
                continue
            escaped = [[text.translate(escapes) for text in line] for line in wide(entries)]
            body = tabulate(escaped, "firstrow", tablefmt="latex_raw", disable_numparse=True)
            for line in ("toprule", "midrule", "bottomrule"):
                body = body.replace(r"\hline", rf"\{line}", 1)
            n = seeds_behind(entries)
            caption = f"{title}; {section.setting.title}. {rule(section)} Here n = {n}. In brackets: the paper."
            caption = caption.translate(escapes)
            parts.append(f"\\begin{{table}}\n\\centering\n\\caption{{{caption}}}\n{body}\n\\end{{table}}\n")
    return "\n".join(parts)
