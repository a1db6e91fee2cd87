"""Source for an .npz file with the user's own arrays."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from dfl_experiments.data.sources import Arrays, Source, absolute
from dfl_experiments.errors import UserError, reason


class ArrayFile(Source):
    """An .npz file with X_train, y_train, X_test and y_test, as `numpy.savez` writes it. It is not packed.

    X_train, X_test: samples, see `Arrays`. Images of shape (N, H, W) get an axis for their single channel.
    y_train, y_test: class labels. The classes are 0 to the largest label in y_train.
    """

    PARTS = ("X_train", "y_train", "X_test", "y_test", "y_train")

    def __init__(self, path: str) -> None:
        self.path = absolute(path)

    def locations(self, data_dir: Path) -> list[Path]:
        """Return the path of the file."""
        return [self.path]

    def read(self, data_dir: Path, download: bool) -> Arrays:
        """Return the arrays. Raises `UserError` if an array is absent, or if the labels are not class numbers."""
        names = self.PARTS[:4]
        if not self.path.exists():
            raise UserError(f"dataset.source.path={self.path}: no such file")
        try:
            with zipfile.ZipFile(self.path), np.load(self.path) as file:
                parts = [file[name] for name in names]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            problem = (
                f"must be an .npz file with arrays of numbers {', '.join(names)} ({reason(error)})"
            )
            raise UserError(f"dataset.source.path={self.path}: {problem}") from error
        train, train_labels, test, test_labels = parts
        largest = 1  # if the labels are no integers, `check_arrays` refuses them
        if train_labels.dtype.kind in "iu":
            largest = int(train_labels.max(initial=0))
        if largest > len(train):
            problem = f"has the label {largest}"
            rule = "labels must be class numbers from 0, without large gaps"
            raise UserError(f"{self.path}: y_train: {problem}; {rule}")
        classes = [str(label) for label in range(largest + 1)]
        train, test = with_channel_axis(train), with_channel_axis(test)
        return Arrays(train, train_labels, test, test_labels, classes)


def with_channel_axis(samples: np.ndarray) -> np.ndarray:
    """Return images (N, H, W) as (N, 1, H, W); return other samples unchanged."""
    is_grey = samples.dtype == np.uint8 and samples.ndim == 3
    return samples[:, None] if is_grey else samples
