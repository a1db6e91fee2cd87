"""What a figure is made of, whoever draws it: panels of curves, points, fields and bars, with the numbers they show."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import ClassVar

from dfl_experiments.report.looks import Look

Values = Sequence[float | None]


@dataclass(frozen=True)
class Series:
    """A curve: x, y, and the range over seeds where there are several."""

    look: Look
    x: Sequence[float]
    y: Values
    low: Values = ()
    high: Values = ()


@dataclass(frozen=True)
class Curves:
    """A panel of curves over the epochs.

    y_range: of the axis, where the values alone would not choose it well; log: whether it is logarithmic.
    """

    title: str
    y: str
    series: Sequence[Series]
    y_range: tuple[float, float] | None = None
    log: bool = False
    x: ClassVar = "epoch"

    def rows(self) -> Iterator[tuple[str | float | None, ...]]:
        """Name, x, y, and the range over seeds."""
        for one in self.series:
            for values in zip_longest(one.x, one.y, one.low, one.high):
                yield one.look.name, *values


@dataclass(frozen=True)
class Points:
    """A panel of runs as points, those of a method in one series."""

    title: str
    x: str
    y: str
    series: Sequence[Series]

    def rows(self) -> Iterator[tuple[str | float | None, ...]]:
        """Name, x, y."""
        for one in self.series:
            for x, y in zip(one.x, one.y, strict=True):
                yield one.look.name, x, y


@dataclass(frozen=True)
class HeatMap:
    """A panel of numbers over two axes, down and across, each with its name and what stands along it.

    values[i][j] belongs to down[1][i] and across[1][j]; chosen: such pairs (i, j) to frame; labels: what stands in each
    field; scale: the values that the colours begin and end with.
    """

    title: str
    down: tuple[str, list[str]]
    across: tuple[str, list[str]]
    values: list[Values]
    labels: list[list[str]]
    chosen: Sequence[tuple[int, int]]
    scale: tuple[float, float]

    def rows(self) -> Iterator[tuple[str | float | None, ...]]:
        """The field, and its number."""
        (y, names), (x, columns) = self.down, self.across
        for name, values in zip(names, self.values, strict=True):
            for column, value in zip(columns, values, strict=True):
                yield f"{y} {name}".strip(), f"{x} {column}", value


@dataclass(frozen=True)
class Bars:
    """A panel of training speeds, by name."""

    title: str
    names: list[str]
    colours: list[str]
    values: list[float]
    x: ClassVar = "training samples per second"

    def rows(self) -> Iterator[tuple[str | float | None, ...]]:
        """Name, and number."""
        for name, value in zip(self.names, self.values, strict=True):
            yield name, "", value


Panel = Curves | Points | HeatMap | Bars


@dataclass(frozen=True)
class Figure:
    """Panels that belong together. name: of a file."""

    name: str
    title: str
    note: str
    panels: Sequence[Panel]
