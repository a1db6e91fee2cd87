"""Count the points of a sweep that have ended, and estimate the time left, across a launcher's processes."""

import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path


def duration(seconds: float) -> str:
    """Return a duration in the unit that fits: `45 s`, `12 min`, `3 h 20 min` or `2 days`."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{max(seconds, 1):.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes / 60 / 24:.0f} days"


class PointCounter:
    """Count the points of one command's sweep that have ended, in a file of the sweep's folder.

    The file's first line is the number of points, 0 if unknown. Each further line is one point: its kind, and when it
    started and ended. Without the file nothing is counted.
    """

    def __init__(self, folder: Path, command: str) -> None:
        """Use the file of this command in the sweep's folder."""
        self.path = folder / f".{command}.count"

    def start(self, points: int) -> None:
        """Begin to count a sweep of so many points, 0 if their number is unknown."""
        self.path.write_text(f"{points}\n")

    def remove(self) -> None:
        """Remove the file, at the end of the sweep."""
        self.path.unlink(missing_ok=True)

    def add(self, kind: str, start: float) -> str:
        """Add a point that ends now, and return how far the sweep has come: `7 of 16 finished, about 2 min left`.

        kind: `ran` now, `found` done already, `failed`, or `elsewhere` if another process works on it.
        start: time.time() of its start.
        """
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        except OSError:  # the command has ended, and its jobs go on in a queue
            return ""
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{kind} {start} {time.time()}\n")
        first, *lines = self.path.read_text().splitlines()
        return progress_text(int(first), [line.split() for line in lines])


def progress_text(points: int, ended: Sequence[list[str]]) -> str:
    """Return how far a sweep has come. Points found done count, but do not enter the estimate.

    points: all of the sweep, 0 if unknown.
    ended: kind, start and end of every point that has ended.
    """
    counts = Counter(kind for kind, _, _ in ended)
    finished = counts["ran"] + counts["found"]
    text = f"{finished} of {points} finished" if points else f"{finished} finished"
    if counts["failed"]:
        text += f", {counts['failed']} failed"
    remaining = points - counts.total()
    if counts["ran"] and remaining > 0:
        first = min(float(start) for kind, start, _ in ended if kind == "ran")
        last = max(float(end) for kind, _, end in ended if kind == "ran")
        # the time that has passed, by the points that ran: this holds for several jobs at once as well
        seconds_per_point = (last - first) / counts["ran"]
        text += f", about {duration(seconds_per_point * remaining)} left"
    return text
