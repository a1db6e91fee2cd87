"""A mistake in a folder of images is refused in one line, which names the mistake. Nothing is written."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from data_helpers import contents, refused, write_image
from PIL import Image

from dfl_experiments import train
from dfl_experiments.data.packs import load_pack
from dfl_experiments.data.sources_folders import Folder, TinyImageNet


def all_of(*changes):
    return lambda root: [change(root) for change in changes]


def remove(name: str):
    return lambda root: (
        shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()
    )


def rename(name: str, target: str):
    return lambda root: (root / name).rename(root / target)


def write(name: str, content: bytes = b""):
    return lambda root: (root / name).write_bytes(content)


def shorten(name: str, count: int):
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:-count])


def make(*names: str):
    return lambda root: [(root / name).mkdir(parents=True) for name in names]


def link(name: str, target: str):
    return lambda root: (root / name).symlink_to(target)


def forbid(name: str):
    return lambda root: (root / name).chmod(0)


def image(name: str, *size: int, **options):
    return lambda root: write_image(root / name, 1, size, **options)


def half(name: str, **options):
    """Write an image file without its second half."""

    def change(root: Path) -> None:
        write_image(root / name, 1, (64, 64), **options)
        (root / name).write_bytes((root / name).read_bytes()[: (root / name).stat().st_size // 2])

    return change


def deep(name: str, dtype: type):
    """Write an image file with more than 8 bits per channel."""
    return lambda root: Image.fromarray(np.full((8, 8), 200, dtype)).save(root / name)


FOLDERS = {
    "no folder": (shutil.rmtree, r"dataset\.source\.path=\S*mine: no such folder"),
    "a file": (all_of(shutil.rmtree, lambda root: root.write_text("x")), "mine: no such folder"),
    "no train": (remove("train"), r"mine: needs train/ and test/ \(or val/\)"),
    "no test": (remove("test"), "needs train/ and test/"),
    "test is a file": (all_of(remove("test"), write("test")), "needs train/ and test/"),
    "nothing": (
        all_of(remove("train"), remove("test"), make("train", "test")),
        r"train: needs folders of at least two classes, has \[\]",
    ),
    "images without classes": (write("train/x.png"), r"train/x\.png: is outside the class folders"),
    "class in train only": (remove("test/dogs"), r"test/dogs/: no images of this class"),
    "class in test only": (make("test/birds"), r"train/birds/: no images of this class"),
    "one class": (
        all_of(remove("train/dogs"), remove("test/dogs")),
        r"at least two classes, has \['cats'\]",
    ),
    "empty class": (
        make("train/birds", "test/birds"),
        r"train/birds/: no images of this class \(\.bmp .* \.webp\)",
    ),
    "class without test images": (remove("test/dogs/a.png"), r"test/dogs/: no images"),
    "zero bytes": (
        write("train/dogs/1.png"),
        r"dogs/1\.png: cannot be read as an image \(cannot identify",
    ),
    "a huge image": (
        write("test/dogs/x.ppm", b"P6 65535 65535 255\n"),
        r"x\.ppm: cannot be read as .*exceeds limit",
    ),
    "truncated png": (half("train/dogs/1.png"), r"train/dogs/1\.png: cannot be read as an image"),
    "truncated jpeg": (
        half("train/dogs/x.jpg"),
        r"x\.jpg: cannot be read as an image \(.*truncated",
    ),
    "16 bits": (
        deep("train/dogs/1.png", np.uint16),
        r"dogs/1\.png: has more than 8 bits per channel; convert it",
    ),
    "floats": (
        deep("train/dogs/x.tif", np.float32),
        r"dogs/x\.tif: has more than 8 bits per channel",
    ),
    "a link to nowhere": (
        link("train/dogs/x.png", "nowhere"),
        r"train/dogs/x\.png: is neither a file nor a folder",
    ),
    "a loop of links": (
        all_of(link("train/dogs/there", "../cats"), link("train/cats/back", "../dogs")),
        r"train/cats/back/there: is a link to a folder that contains the link; delete the link",
    ),
    "mixed sizes": (
        image("test/dogs/x.png", 8, 4),
        r"train/cats/0\.png and test/dogs/x\.png differ in size",
    ),
    "a file not to be read": (
        forbid("train/dogs/1.png"),
        r"dogs/1\.png: cannot be read .*Permission denied",
    ),
    "a folder not to be read": (
        forbid("train/dogs/deeper"),
        r"dogs/deeper: cannot be read \(Permission denied",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_bad_folder_is_refused_and_not_changed(folder, tmp_path, case):
    change, message = FOLDERS[case]
    change(folder)
    if "not to be read" in case and all(os.access(path, os.R_OK) for path in folder.rglob("*")):
        pytest.skip("the superuser may read everything")
    before = contents(folder)
    line = refused("folder", Folder(str(folder)), tmp_path / "data", message)
    assert str(folder) in line
    assert contents(folder) == before


@pytest.mark.parametrize("case", ["class in test only", "images without classes"])
def test_packed_folder_that_became_bad_is_refused(folder, tmp_path, case):
    load_pack("folder", Folder(str(folder)), tmp_path / "data")
    FOLDERS[case][0](folder)
    refused("folder", Folder(str(folder)), tmp_path / "data", FOLDERS[case][1])


LABELS, IMAGE = "val/val_annotations.txt", "train/n01/images/n01_2.JPEG"
TINY = {
    "no labels": (remove(LABELS), f"{LABELS}: cannot be read as text .*No such file"),
    "labels without an end": (
        shorten(LABELS, 35),
        f"{LABELS}: damaged, it must have one line for each",
    ),
    "labels cut in a class": (shorten(LABELS, 12), "have different classes"),
    "no text": (write(LABELS, b"\xff\xfe\x00"), f"{LABELS}: cannot be read as text"),
    "no validation image": (
        remove("val/images/val_3.JPEG"),
        "incomplete, val/images/val_3.JPEG is missing",
    ),
    "an image too many": (
        image("val/images/x.JPEG", 64, 64),
        f"{LABELS}: damaged, it must have one line",
    ),
    "no training images": (
        remove("train"),
        "have different classes",
    ),
    "a training image fewer": (remove(IMAGE), f"incomplete, {IMAGE} is missing"),
    "a class without training images": (remove("train/n01"), "have different classes"),
    "a class too few": (write("wnids.txt", b"n02\n"), "wnids.txt have different classes"),
    "a truncated image": (half(IMAGE, format="JPEG"), f"{IMAGE}: cannot be read as an image"),
    "another size": (image(IMAGE, 32, 64), f"{IMAGE} differ in size"),
    "one class": (
        all_of(
            remove("train/n01"),
            write("wnids.txt", b"n02"),
            write(LABELS, b"val_0.JPEG\tn02\nval_1.JPEG\tn02\n"),
            remove("val/images/val_2.JPEG"),
            remove("val/images/val_3.JPEG"),
        ),
        "must name at least two classes",
    ),
}


@pytest.mark.parametrize("case", TINY)
def test_bad_tinyimagenet_is_refused(tiny, case):
    change, message = TINY[case]
    change(tiny / TinyImageNet.NAME)
    assert str(tiny) in refused("tinyimagenet", TinyImageNet(), tiny, message, download=False)


@pytest.mark.usefixtures("clean_logging")
@pytest.mark.parametrize("case", ["class in test only", "mixed sizes"])
def test_bad_folder_ends_the_command_before_training(folder, tmp_path, monkeypatch, capsys, case):
    FOLDERS[case][0](folder)
    before = contents(folder)
    monkeypatch.chdir(tmp_path)
    options = (
        "dataset=folder",
        f"dataset.source.path={folder}",
        f"data_dir={tmp_path / 'data'}",
        "tracking=disabled",
    )
    monkeypatch.setattr(sys, "argv", ["dfl-train", *options])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert line.startswith(f"dfl-train: error: {folder}")
    assert contents(folder) == before
    assert not list(tmp_path.rglob("last.pt"))
    # no file for each refused version of the folder
    assert {path.name for path in tmp_path.rglob(".folder*")} <= {".folder.lock"}
