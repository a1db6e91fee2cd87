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
    """A panel of curves over the epochs. y_range: of the axis, where the values alone would not choose it well."""

    title: str
    y: str
    series: Sequence[Series]
    y_range: tuple[float, float] | None = None
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
    """A panel of numbers over a grid; values[i][j] belongs to rates[i] and decays[j], chosen is such a pair (i, j).

    labels: what stands in each field; scale: least and greatest value of the whole figure.
    """

    title: str
    rates: list[str]
    decays: list[str]
    values: list[Values]
    labels: list[list[str]]
    chosen: tuple[int, int]
    scale: tuple[float, float]
    x: ClassVar = "weight decay"
    y: ClassVar = "learning rate"

    def rows(self) -> Iterator[tuple[str | float | None, ...]]:
        """The grid point, and its number."""
        for rate, values in zip(self.rates, self.values, strict=True):
            for decay, value in zip(self.decays, values, strict=True):
                yield f"{self.y} {rate}", f"{self.x} {decay}", value


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
