"""The tables of a report, as text in several formats."""

import csv
import io
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from tabulate import tabulate

from dfl_experiments.report.cells import Entry, Section, place
from dfl_experiments.report.paper import TITLES
from dfl_experiments.report.runs import HEADLINES

COLUMNS = (
    "dataset", "augmentation", "model", "method", "ours", "±", "n", "paper", "difference", "at best val.", "lr",
    "weight decay", "hours", "grid", "runs",
)  # fmt: skip
SETTING_COLUMNS = ("table", "smoke", "protocol", "differences")
MISSING = "–"


def percent(fraction: float | None, digits: int = 2, sign: str = "") -> str:
    """A fraction as a percentage; a dash where there is none."""
    return MISSING if fraction is None else f"{100 * fraction:{sign}.{digits}f}"


def difference(entry: Entry) -> float | None:
    """Ours minus the paper's; None unless there are both."""
    return None if entry.mean is None or entry.paper is None else entry.mean - entry.paper


def hours_of(entry: Entry) -> float | None:
    """The mean time that the chosen point's runs trained for, in hours; None if none has finished."""
    seconds = [float(run.result["seconds"]) for run in entry.best.finished] if entry.best else []
    return statistics.fmean(seconds) / 3600 if seconds else None


def number(entry: Entry) -> str:
    """The mean accuracy in percent, or else in a word why there is none."""
    if entry.best:
        return percent(entry.mean)
    statuses = [run.status for run in entry.runs]
    order = ("running", "interrupted", "failed", "diverged", "stopped")
    return next((status for status in order if status in statuses), "missing")


def row(entry: Entry) -> list[str]:
    """An entry under `COLUMNS`, accuracies in percent."""
    best = entry.best
    return [
        *entry.cell,
        percent(entry.mean),
        percent(entry.deviation),
        str(len(best.finished)) if best else "0",
        percent(entry.paper),
        percent(difference(entry), sign="+"),
        percent(entry.at_best_validation),
        f"{best.lr:g}" if best else MISSING,
        f"{best.weight_decay:g}" if best else MISSING,
        MISSING if (hours := hours_of(entry)) is None else f"{hours:.2g}",
        entry.grid,
        entry.state,
    ]


def rule(section: Section) -> str:
    """How the numbers of a section were come by."""
    entries = section.chosen
    if not entries:
        return "No run has finished yet."
    headline = {str(run.config.protocol.accuracy) for entry in entries for run in entry.runs}
    chosen = (
        "on the validation split"
        if all(entry.on_validation for entry in entries)
        else "on the test set itself, as these runs hold no validation split out, which flatters it"
    )
    return (
        f"Test accuracy in percent {' or '.join(HEADLINES[key] for key in sorted(headline))}: mean over n seeds, "
        f"± sample standard deviation. Of a cell's grid points the best one is shown, chosen {chosen}: any two are "
        "compared by their means over the seeds that both have finished; a point of which a run diverged, failed or "
        "was stopped comes last. At best val.: test accuracy at each run's epoch with the best validation accuracy. "
        "Grid: how many of the points in conf/experiment/ have finished. Hours: of training, mean of the point's runs."
    )


def still_missing(section: Section, name: str) -> str:
    """The rows of the paper's table that have not been begun, in a line; empty if there are none."""
    rows = section.not_begun(name)
    return f"Not begun: {'; '.join(' '.join(row) for row in rows)}." if rows else ""


def wide(section: Section, name: str, show: Callable[[Entry], str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table as the paper has it: a row for data and model, a column for every method."""
    entries = section.table(name)
    methods = sorted({entry.cell.method for entry in entries}, key=place)
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for entry in entries:
        rows.setdefault(entry.cell[:3], {})[entry.cell.method] = show(entry)
    header = ["dataset", "augmentation", "model", *methods]
    return header, [[*key, *(cells.get(method, "") for method in methods)] for key, cells in rows.items()]


def ours_and_paper(entry: Entry) -> str:
    """Both numbers of a cell, the paper's in brackets."""
    paper = "" if entry.paper is None else f" ({percent(entry.paper)})"
    return f"{number(entry)}{paper}"


def as_text(sections: Sequence[Section], style: str, pictures: Sequence[str] = ()) -> str:
    """All tables for a person, style being one of tabulate's: "simple" for a terminal, "github" for Markdown.

    pictures: what stands at the end of each section.
    """
    heading = "# {}\n" if style == "github" else "{}\n" + "=" * 72 + "\n"
    subheading = "## {}\n" if style == "github" else "{}\n"
    parts = []
    for number, section in enumerate(sections):
        parts += [heading.format(section.setting.title), rule(section) + "\n"]
        for name, title in TITLES.items():
            entries = section.table(name)
            missing = still_missing(section, name)
            if entries or missing:
                parts.append(subheading.format(title))
            if entries:
                body = tabulate([row(entry) for entry in entries], COLUMNS, tablefmt=style, disable_numparse=True)
                parts.append(body + "\n")
            if missing:
                parts.append(missing + "\n")
        parts += [f"{text}\n" for text in pictures[number : number + 1]]
    return "\n".join(parts)


def as_csv(sections: Sequence[Section]) -> str:
    """Every entry of every table as one row; accuracies in percent, empty where there is none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*SETTING_COLUMNS, *COLUMNS])
    for section in sections:
        smoke, protocol, differences = section.setting
        for name in TITLES:
            for entry in section.table(name):
                values = ["" if value == MISSING else value for value in row(entry)]
                writer.writerow([name, "smoke" if smoke else "", protocol, "; ".join(differences), *values])
    return text.getvalue()


def as_latex(sections: Sequence[Section]) -> str:
    """Tables in the paper's layout, the paper's numbers in brackets beside ours; needs the package booktabs."""

    def escape(text: Any) -> str:
        words = {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
        words |= {character: "\\" + character for character in "_%&#${}"}
        replaced = "".join(words.get(character, character) for character in str(text))
        return replaced.replace(MISSING, "--").replace("±", r"$\pm$")

    def both(entry: Entry) -> str:
        spread = "" if entry.deviation is None else f" ± {percent(entry.deviation)}"
        paper = "" if entry.paper is None else f" ({percent(entry.paper)})"
        return f"{number(entry)}{spread}{paper}"

    parts = []
    for section in sections:
        for name, title in TITLES.items():
            header, rows = wide(section, name, both)
            if not rows:
                continue
            cells = [[escape(value) for value in line] for line in rows]
            body = tabulate(cells, [escape(word) for word in header], tablefmt="latex_raw", disable_numparse=True)
            body = body.replace(r"\hline", r"\toprule", 1).replace(r"\hline", r"\midrule", 1)
            body = body.replace(r"\hline", r"\bottomrule", 1)
            seeds = [len(entry.best.finished) for entry in section.table(name) if entry.best]
            n = f"n = {min(seeds)}" + (f" to {max(seeds)}" if max(seeds) > min(seeds) else "") if seeds else "n = 0"
            caption = f"{title}; {section.setting.title}. {rule(section)} Here {n}. In brackets: the paper."
            parts.append(f"\\begin{{table}}\n\\centering\n\\caption{{{escape(caption)}}}\n{body}\n\\end{{table}}\n")
    return "\n".join(parts)
