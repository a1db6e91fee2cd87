"""Summarise a sweep: write `summary.csv` with a row per point, and print a row per setting with means over seeds."""

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from dfl_experiments.configuration.composition import NOT_IN_DIGEST
from dfl_experiments.errors import printable
from dfl_experiments.running.outcome import (
    Ending,
    Sweep,
    ending,
    objective,
    other_endings,
    overrides_of,
)
from dfl_experiments.running.result import DONE, has_failed_to_learn
from dfl_experiments.running.run_directory import as_argument, csv_text, plot_line, write_atomically
from dfl_experiments.running.workers import QUEUE

ROWS_SHOWN = 50  # largest number of unfinished points that are printed
NOT_STARTED = "not started"
# options in NOT_IN_DIGEST whose values a sweep may compare
COMPARED = ("protocol", "stop_collapsed")


@dataclass
class Setting:
    """The points of a sweep that differ only in the seed."""

    values: list[str]
    """Values of the keys that differ between settings."""
    endings: list[Ending]
    """Endings of the points of the setting."""

    def results(self, name: str) -> list[Any]:
        """Return one entry of result.json of the runs that learned. If no run learned, use all finished runs.

        Runs that lack the entry are left out.
        """
        finished = [end.result for end in self.endings if end.is_finished]
        learned = [result for result in finished if not has_failed_to_learn(result)]
        values = [result.get(name) for result in learned or finished]
        return [value for value in values if value is not None]

    @property
    def not_learned(self) -> int:
        """Number of finished runs that did not learn."""
        return sum(end.is_finished and has_failed_to_learn(end.result) for end in self.endings)

    @property
    def is_failing(self) -> bool:
        """True if a run ended early or did not learn."""
        ended_early = any(end.status in DONE and not end.is_finished for end in self.endings)
        return ended_early or self.not_learned > 0

    def rank(self) -> tuple[bool, bool, float]:
        """Return the sort key.

        The highest accuracy comes first. Settings with a failing run come later, settings without a result last.
        """
        accuracies = self.results("validation_accuracy") or self.results("accuracy")
        return not accuracies, self.is_failing, -mean(accuracies or [0.0])

    def row(self) -> list[str]:
        """Return the cells that follow the swept values in the table: n, accuracies, and the cosine of layer 1."""
        finished = sum(end.is_finished for end in self.endings)
        count = str(finished)
        if finished < len(self.endings):
            count += f" of {len(self.endings)}"
        if self.not_learned:
            count += f" ({self.not_learned} did not learn)"
        accuracy = with_deviation(self.results("accuracy"))
        validation = with_deviation(self.results("validation_accuracy"))
        cosines = [cosine["1"] for cosine in self.results("cosine") if cosine.get("1") is not None]
        return [count, accuracy, validation, f"{mean(cosines):.3f}" if cosines else "-"]


def with_deviation(values: Sequence[float]) -> str:
    """Return mean ± standard deviation, such as `0.9611 ± 0.0012`. A single value has no ±. No value gives a dash."""
    if not values:
        return "-"
    text = f"{mean(values):.4f}"
    return f"{text} ± {stdev(values):.4f}" if len(values) > 1 else text


def four_digits(accuracy: float | None) -> str:
    """Return an accuracy with four decimals; a dash if it is None."""
    return "-" if accuracy is None else f"{accuracy:.4f}"


def values_by_key(overrides: Iterable[str]) -> dict[str, str]:
    """Return the values of the overrides by key, without keys that do not change results, such as `device`."""
    values = {}
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        group = key.partition(".")[0]
        if group in COMPARED or group not in NOT_IN_DIGEST:
            values[key] = value
    return values


def swept_keys(points: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the keys whose values differ between points, in the order of the command line."""
    keys = dict.fromkeys(key for values in points for key in values)
    return [key for key in keys if len({values.get(key) for values in points}) > 1]


def summary_rows(endings: Sequence[Ending]) -> list[list[Any]]:
    """Return the rows of summary.csv, the header first: swept keys, status, results, and the folder."""
    points = [values_by_key(end.overrides) for end in endings]
    results = [end.result for end in endings]
    depth = max((len(result.get("cosine", {})) for result in results), default=0)
    columns: dict[str, list[Any]] = {}
    for key in swept_keys(points):
        columns[key] = [values.get(key, "") for values in points]
    columns["status"] = [end.status for end in endings]
    columns["reason"] = [end.reason for end in endings]
    for name in ("accuracy", "validation_accuracy"):
        columns[name] = [result.get(name) for result in results]
    for name in ("cosine", "dead"):
        for layer in range(1, depth + 1):
            column = [result.get(name, {}).get(str(layer)) for result in results]
            columns[f"{name}/{layer}"] = column
    columns["seconds"] = [result.get("seconds") for result in results]
    columns["folder"] = [end.folder for end in endings]
    return [[*columns], *map(list, zip(*columns.values(), strict=True))]


def settings_of(endings: Sequence[Ending]) -> tuple[list[str], list[Setting]]:
    """Return the keys whose values differ between settings, and the settings themselves.

    The best setting comes first. Settings that differ only in options of the optimizer are together.
    """
    points = [values_by_key(end.overrides) for end in endings]
    keys = [key for key in swept_keys(points) if key != "seed"]
    settings: dict[tuple[str, ...], Setting] = {}
    for end, values in zip(endings, points, strict=True):
        cells = [values.get(key, "") for key in keys]
        setting = settings.setdefault(tuple(cells), Setting(cells, []))
        setting.endings.append(end)
    groups: dict[tuple[str, ...], list[Setting]] = {}
    for setting in sorted(settings.values(), key=Setting.rank):
        pairs = zip(keys, setting.values, strict=True)
        group = tuple(value for key, value in pairs if not key.startswith("optimizer"))
        groups.setdefault(group, []).append(setting)
    return keys, [setting for group in groups.values() for setting in group]


def print_settings(endings: Sequence[Ending]) -> None:
    """Print a table with one row per setting, the best first, and what its marks mean.

    A row has the means over the setting's seeds. If no point has finished, nothing is printed.
    """
    from tabulate import tabulate

    if not any(end.is_finished for end in endings):
        return
    keys, settings = settings_of(endings)
    best = None if len(settings) == 1 or settings[0].is_failing else settings[0]
    has_seeds = any(len(setting.results("accuracy")) > 1 for setting in settings)
    accuracy = "accuracy (mean ± sd)" if has_seeds else "accuracy"
    head = ["", *keys, "n", f"test {accuracy}", f"validation {accuracy}", "cosine of layer 1"]
    body = [["*" if one is best else "", *one.values, *one.row()] for one in settings]
    # leave out the columns without a value
    columns = [column for column in zip(head, *body, strict=True) if set(column[1:]) != {"-"}]
    header, *rows = zip(*columns, strict=True)
    print(tabulate(rows, header, tablefmt="plain", disable_numparse=True))
    is_any_failing = any(setting.is_failing for setting in settings)
    if best is not None:
        kind = "validation" if best.results("validation_accuracy") else "test"
        others = " of the settings without failing runs" if is_any_failing else ""
        print(f"  * highest {kind} accuracy{others}")
    if any(setting.not_learned for setting in settings):
        print(
            "  did not learn: the last test accuracy is below 0.8 × the run's best, or at chance; "
            "these runs are averaged only if no run of a row learned"
        )


def print_unfinished(sweep: Sweep, endings: Sequence[Ending]) -> None:
    """Print every point that has started but not finished, with its reason, and the number of the others."""
    unfinished = [end for end in endings if not end.is_finished and end.status != NOT_STARTED]
    width = max((len(end.folder) for end in unfinished), default=0)
    for end in unfinished[:ROWS_SHOWN]:
        description = end.reason or " ".join(end.overrides)
        print(f"  {end.folder:{width}}  {end.status:11}  {description}")
    if len(unfinished) > ROWS_SHOWN:
        print(f"  … and {len(unfinished) - ROWS_SHOWN} more")
    reasons = Counter(end.reason for end in endings if end.status == NOT_STARTED)
    advice = ""
    # jobs in a queue start without the command; with force=true the same command would repeat all points
    if not sweep.force and sweep.launcher != QUEUE:
        advice = f"the same command with sweep={shlex.quote(sweep.name)} continues"
    for reason, count in reasons.items():
        description = reason or advice
        text = f"{count} {NOT_STARTED}: {description}" if description else f"{count} {NOT_STARTED}"
        print(printable(f"  {text}"))


def print_best(sweep: Sweep, endings: Sequence[Ending]) -> None:
    """Print the command line of the finished point with the highest validation accuracy."""
    folder = sweep.folder
    accuracies = {end.folder: objective(folder / end.folder) for end in endings if end.is_finished}
    if not accuracies:
        return
    best = max(accuracies, key=accuracies.__getitem__)
    overrides = [text for text in overrides_of(folder / best) if not text.startswith("sweep=")]
    command = printable(shlex.join(["dfl-train", *sweep.config_flags, *overrides]))
    print(f"  best validation accuracy {four_digits(accuracies[best])}: {command}")


def print_summary(sweep: Sweep) -> int:
    """Write `summary.csv` with every point of the folder, and print how the points of this command ended.

    Returns the exit code: 1 if a printed point failed, was interrupted, has not started or is damaged, else 0.
    """
    named = [ending(sweep, name) for name in sweep.points]
    rest = list(other_endings(sweep))
    path, problem = sweep.folder / "summary.csv", None
    try:
        if sweep.folder.is_dir():
            write_atomically(path, csv_text(summary_rows([*named, *rest])))
    except OSError as error:
        problem = error.strerror
    shown = named or rest
    counts = Counter(end.status for end in shown)
    statuses = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    print(f"\nsweep {sweep.folder.name}: {len(shown)} points, {statuses}")
    print_settings(shown)
    print_unfinished(sweep, shown)
    report = printable(f"dfl-report {as_argument(sweep.folder)}")
    has_more = bool(named and rest)
    if has_more:
        text = f"the folder holds {len(rest)} more, and {report} shows all"
        print(f"  only the points of this command; {text}")
    if not named:
        print_best(sweep, rest)
    print(f"  {path}" if problem is None else f"dfl-train: {path}: {problem}")
    if any(end.result.get("epochs") for end in shown):
        print(f"  {plot_line(sweep.folder)}")
        if not has_more:
            print(f"  compare: {report}")
    return 1 if counts.keys() & {"failed", "interrupted", NOT_STARTED, "damaged"} else 0
