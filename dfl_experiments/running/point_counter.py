"""Count the points of a sweep that have ended in all of its processes, and estimate the time left."""

import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path


def duration(seconds: float) -> str:
    """Format a duration in a suitable unit: `45 s`, `12 min`, `3 h 20 min` or `2 days`."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{max(seconds, 1):.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes / 60 / 24:.0f} days"


class PointCounter:
    """Count the points of a command that have ended. The count is in a file in the sweep's folder.

    The first line of the file is the number of points in the sweep; 0 if it is unknown. Each further line has the
    kind, the start and the end of one point. If the file does not exist, nothing is counted.
    """

    def __init__(self, folder: Path, command: str) -> None:
        """Use the file of this command in the sweep's folder."""
        self.path = folder / f".{command}.count"

    def start(self, points: int) -> None:
        """Begin to count. points: number of points of the sweep, 0 if unknown."""
        self.path.write_text(f"{points}\n")

    def remove(self) -> None:
        """Remove the file, at the end of the sweep."""
        self.path.unlink(missing_ok=True)

    def add(self, kind: str, start: float) -> str:
        """Add a point that ends now, and return the progress, such as `7 of 16 finished, about 2 min left`.

        kind: `ran` if the point was trained now, `found` if it was already done, `failed` if it failed, `elsewhere` if
            another process works on it.
        start: time.time() at the start of the point.
        """
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        # the command has ended and removed the file, but its jobs in a queue continue
        except OSError:
            return ""
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{kind} {start} {time.time()}\n")
        first, *lines = self.path.read_text().splitlines()
        return progress_text(int(first), [line.split() for line in lines])


def progress_text(points: int, ended: Sequence[list[str]]) -> str:
    """Return the progress of a sweep. The time left is estimated from the points that were trained now.

    points: number of points of the sweep, 0 if unknown.
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
        # Divide the whole time by the number of trained points. This is also right if several jobs run at once.
        seconds_per_point = (last - first) / counts["ran"]
        text += f", about {duration(seconds_per_point * remaining)} left"
    return text
