"""Data sets: what is packed is what was there, once and whole."""

import json
import os
import shutil
import struct
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from PIL import Image
from torchvision.datasets import MNIST

from dfl_experiments.config import UserError, build, compose
from dfl_experiments.data import command, datasets
from dfl_experiments.data.batches import Normalise
from dfl_experiments.data.datasets import PARTS, is_packed, load
from dfl_experiments.data.sources import Arrays, Cifar, Digits, Mnist, Source
from dfl_experiments.data.sources_folders import Folder, TinyImageNet

CPU = torch.device("cpu")


def equal(first: Arrays, second: Arrays) -> bool:
    """Whether two data sets hold the same."""
    same = all(np.array_equal(getattr(first, part), getattr(second, part)) for part in PARTS)
    return same and first.classes == second.classes


@pytest.fixture
def offline(monkeypatch):
    """No network, without waiting for one."""

    def refuse(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def write_image(path: Path, seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB", **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes, three training images and one test image each, one of them deeper down."""
    root = tmp_path / "mine"
    for label, name in enumerate(("cats", "dogs")):
        for index in range(3):
            inner = "deeper" if index == 2 else ""
            write_image(root / "train" / name / inner / f"{index}.png", 10 * label + index)
        write_image(root / "test" / name / "a.png", 10 * label + 9)
    (root / "train" / "cats" / "notes.txt").write_text("no image")
    return root


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A data_dir with TinyImageNet's layout: two classes of 64x64, some files grey."""
    data_dir = tmp_path / "data"
    root = data_dir / TinyImageNet.NAME
    rows = []
    for label, wnid in enumerate(("n02", "n01")):
        for index in range(4):
            path = root / "train" / wnid / "images" / f"{wnid}_{index}.JPEG"
            write_image(path, 10 * label + index, (64, 64), "L" if index == 1 else "RGB", format="JPEG")
        for index in range(2):
            name = f"val_{2 * label + index}.JPEG"
            write_image(root / "val" / "images" / name, 10 * label + 5 + index, (64, 64), format="JPEG")
            rows.append(f"{name}\t{wnid}\t0\t0\t63\t63")
    (root / "val" / "val_annotations.txt").write_text("\n".join(reversed(rows)) + "\n")
    (root / "wnids.txt").write_text("n02\nn01\n")
    (root / "words.txt").write_text("n01\tcat, feline\nn02\tdog\nn03\tnothing\n")
    return data_dir


def write_mnist(data_dir: Path, train: int = 12, test: int = 5) -> None:
    """Idx files of MNIST's form, small."""
    random = np.random.default_rng(0)
    raw = data_dir / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", train), ("t10k", test)):
        images = random.integers(0, 256, (count, 28, 28), np.uint8)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, count, 28, 28) + images.tobytes())
        labels = random.integers(0, 10, count).astype(np.uint8)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + labels.tobytes())


# Sources


def test_digits_need_nothing_and_write_nothing(tmp_path):
    arrays = load("digits", Digits(), tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    assert arrays.shape == (1, 8, 8)
    assert arrays.num_classes == 10
    assert (len(arrays.train_labels), len(arrays.test_labels)) == (1437, 360)
    assert arrays.train_images.dtype == np.uint8
    assert arrays.train_images.max() == 255
    assert np.bincount(arrays.test_labels).min() >= 34
    assert equal(arrays, load("digits", Digits(), tmp_path))


def test_packed_mnist_equals_torchvision(data_dir, tmp_path):
    (tmp_path / "MNIST").symlink_to(data_dir / "MNIST")
    arrays = load("mnist", Mnist(), tmp_path, download=False)
    assert isinstance(arrays.train_images, np.memmap)
    for train, images, labels in (
        (True, arrays.train_images, arrays.train_labels),
        (False, arrays.test_images, arrays.test_labels),
    ):
        reference = MNIST(data_dir, train=train)
        assert np.array_equal(images[:, 0], reference.data)
        assert np.array_equal(labels, reference.targets)


def test_packed_cifar_is_used_as_it_is(data_dir):
    arrays = load("cifar10", Cifar(10), data_dir, download=False)
    assert arrays.shape == (3, 32, 32)
    assert np.bincount(arrays.train_labels).tolist() == [5000] * 10


def test_present_mnist_needs_no_network(offline, tmp_path):
    write_mnist(tmp_path)
    arrays = load("mnist", Mnist(), tmp_path)
    assert len(arrays.train_labels) == 12
    assert arrays.classes == [str(digit) for digit in range(10)]


def test_tinyimagenet(tiny):
    arrays = TinyImageNet().read(tiny, download=False)
    assert arrays.classes == ["n02 dog", "n01 cat"]
    assert arrays.train_images.shape == (8, 3, 64, 64)
    assert arrays.train_labels.tolist() == [1] * 4 + [0] * 4  # files in alphabetical order
    assert arrays.test_labels.tolist() == [0, 0, 1, 1]
    grey = arrays.train_images[1]
    assert np.array_equal(grey[0], grey[1])
    assert np.array_equal(grey[0], grey[2])
    with Image.open(tiny / TinyImageNet.NAME / "train" / "n01" / "images" / "n01_2.JPEG") as image:
        assert np.array_equal(arrays.train_images[2], np.asarray(image).transpose(2, 0, 1))


def test_tinyimagenet_archive_equals_folder(tiny):
    unpacked = TinyImageNet().read(tiny, download=False)
    shutil.make_archive(str(tiny / TinyImageNet.NAME), "zip", tiny, TinyImageNet.NAME)
    shutil.rmtree(tiny / TinyImageNet.NAME)
    assert equal(load("tinyimagenet", TinyImageNet(), tiny, download=False), unpacked)


def test_archive_members_outside_are_never_extracted(tiny):
    archive = tiny / f"{TinyImageNet.NAME}.zip"
    shutil.make_archive(str(archive.with_suffix("")), "zip", tiny, TinyImageNet.NAME)
    shutil.rmtree(tiny / TinyImageNet.NAME)
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr("../outside.txt", "x")
        opened.writestr(f"{TinyImageNet.NAME}/../../outside.txt", "x")
    before = set(tiny.parent.rglob("*"))
    assert len(TinyImageNet().read(tiny, download=False).train_labels) == 8
    assert set(tiny.parent.rglob("*")) == before


@pytest.mark.parametrize("file", ["val/val_annotations.txt", "val/images/val_3.JPEG"])
def test_tinyimagenet_incomplete(tiny, file):
    (tiny / TinyImageNet.NAME / file).unlink()
    with pytest.raises(UserError, match=file):
        TinyImageNet().read(tiny, download=False)


def test_tinyimagenet_without_lists_of_classes(tiny):
    for file in ("wnids.txt", "words.txt"):
        (tiny / TinyImageNet.NAME / file).unlink()
    assert TinyImageNet().read(tiny, download=False).classes == ["n01", "n02"]


def test_damaged_archive(tiny):
    shutil.rmtree(tiny / TinyImageNet.NAME)
    (tiny / f"{TinyImageNet.NAME}.zip").write_bytes(b"PK nothing")
    with pytest.raises(UserError, match=r"tiny-imagenet-200\.zip: damaged"):
        load("tinyimagenet", TinyImageNet(), tiny)


def test_real_tinyimagenet(data_dir, tmp_path):
    (tmp_path / TinyImageNet.NAME).symlink_to(data_dir / TinyImageNet.NAME)
    arrays = load("tinyimagenet", TinyImageNet(), tmp_path, download=False)
    assert arrays.num_classes == 200
    assert arrays.shape == (3, 64, 64)
    assert len(np.unique(np.bincount(arrays.train_labels))) == 1


# A user's own folder


def test_folder(folder, tmp_path):
    arrays = load("folder", Folder(str(folder)), tmp_path / "data")
    assert arrays.classes == ["cats", "dogs"]
    assert arrays.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert arrays.test_labels.tolist() == [0, 1]
    with Image.open(folder / "train" / "dogs" / "deeper" / "2.png") as image:
        assert np.array_equal(arrays.train_images[5], np.asarray(image).transpose(2, 0, 1))
    assert load("folder", Folder(str(folder), channels=1), tmp_path / "data").shape == (1, 8, 8)


def test_folder_scales_to_one_size(folder, tmp_path):
    write_image(folder / "train" / "cats" / "wide.png", 1, (30, 12))
    assert Folder(str(folder), size=6).read(tmp_path, False).train_images.shape == (7, 3, 6, 6)
    with pytest.raises(UserError, match=r"0\.png is 8x8, .*wide\.png is 30x12; dataset\.source\.size=64"):
        Folder(str(folder)).read(tmp_path, False)


def test_val_serves_where_there_is_no_test(folder, tmp_path):
    (folder / "test").rename(folder / "val")
    assert Folder(str(folder)).read(tmp_path, False).test_labels.tolist() == [0, 1]


def test_altered_folder_is_packed_anew(folder, tmp_path):
    source, data_dir = Folder(str(folder)), folder
    first = source.cache_name("folder")
    load("folder", source, data_dir)
    assert source.cache_name("folder") == first  # although the pack lies inside the folder
    write_image(folder / "train" / "cats" / "new.png", 1)
    assert source.cache_name("folder") != first
    assert len(load("folder", source, data_dir).train_labels) == 7
    assert Folder(str(folder), channels=1).cache_name("folder") != source.cache_name("folder")


def remove_test(root: Path) -> None:
    shutil.rmtree(root / "test")


def add_class(root: Path) -> None:
    (root / "test" / "birds").mkdir()


def empty_class(root: Path) -> None:
    (root / "test" / "dogs" / "a.png").unlink()


def no_classes(root: Path) -> None:
    for name in ("train", "test"):
        shutil.rmtree(root / name)
        (root / name).mkdir()


def break_image(root: Path) -> None:
    (root / "train" / "dogs" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")


def deep_image(root: Path) -> None:
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(root / "train" / "dogs" / "1.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "no such folder"),
        (remove_test, r"needs train/ and test/"),
        (add_class, "class birds is not in both train/ and test/"),
        (empty_class, r"test/dogs/: no images"),
        (no_classes, "no class folders"),
        (break_image, r"train/dogs/1\.png: cannot be read as an image"),
        (deep_image, r"train/dogs/1\.png: more than 8 bits"),
    ],
)
def test_folder_mistakes(folder, tmp_path, change, message):
    change(folder)
    with pytest.raises(UserError, match=message) as caught:
        load("folder", Folder(str(folder)), tmp_path / "data")
    assert "\n" not in str(caught.value)


# Packing


def test_missing_data_is_one_line(offline, tmp_path, capsys):
    for name, source in (("mnist", Mnist()), ("cifar100", Cifar(100)), ("tinyimagenet", TinyImageNet())):
        for download in (True, False):
            with pytest.raises(UserError) as caught:
                load(name, source, tmp_path, download)
            message = str(caught.value)
            assert "\n" not in message
            assert name in message
            assert str(source.locations(tmp_path)[0]) in message
            assert f"dfl-data prepare dataset={name}" in message
            assert "DFL_DATA_DIR" in message
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("left", [(), ("classes.json",), ("train_images.npy",), (*(f"{part}.npy" for part in PARTS),)])
def test_unfinished_pack_is_not_used(tmp_path, left):
    write_mnist(tmp_path)
    folder = tmp_path / "mnist"
    folder.mkdir()
    for name in left:
        (folder / name).write_text("rubbish")
    (tmp_path / ".mnist.partial").mkdir()
    assert not is_packed(folder)
    arrays = load("mnist", Mnist(), tmp_path)
    assert equal(arrays, Mnist().read(tmp_path, False))
    assert not (tmp_path / ".mnist.partial").exists()


def test_interrupted_pack_leaves_nothing_to_be_used(tmp_path, monkeypatch):
    write_mnist(tmp_path)

    def interrupt(path, array):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(datasets.np, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load("mnist", Mnist(), tmp_path)
    assert not is_packed(tmp_path / "mnist")
    assert len(load("mnist", Mnist(), tmp_path).train_labels) == 12


def test_interrupted_renames_leave_nothing_to_be_used(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    folder = tmp_path / "mnist"
    folder.mkdir()
    for name in ("classes.json", *(f"{part}.npy" for part in PARTS[1:])):
        (folder / name).write_text("an older pack's")
    rename = Path.replace

    def interrupt(path, target):
        if path.stem != PARTS[0]:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load("mnist", Mnist(), tmp_path)
    assert (folder / "train_images.npy").exists()
    assert not is_packed(folder)


def test_two_processes_at_once(folder, tmp_path):
    code = (
        "import sys, logging; from pathlib import Path; logging.basicConfig(level=logging.INFO)\n"
        "from dfl_experiments.data.datasets import load; from dfl_experiments.data.sources_folders import Folder\n"
        "source = Folder(sys.argv[1]); print('ready', flush=True)\n"
        "print(load('folder', source, Path(sys.argv[2])).train_images.sum())"
    )
    data_dir = tmp_path / "data"
    arguments = [sys.executable, "-c", code, str(folder), str(data_dir)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    with datasets.locked(data_dir, Folder(str(folder)).cache_name("folder")):
        processes = [subprocess.Popen(arguments, **pipes) for _ in range(2)]
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)  # both have found nothing packed, and wait
    results = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert results[0][0] == results[1][0]
    assert sum(err.count("preparing folder") for _, err in results) == 1
    assert not list(data_dir.glob("*.partial"))


def test_lock_ends_with_its_context(tmp_path):
    held = datasets.locked(tmp_path, "made")
    with held, pytest.raises(Timeout):
        FileLock(tmp_path / ".made.lock").acquire(timeout=0)
    FileLock(tmp_path / ".made.lock").acquire(timeout=0).lock.release()


def test_data_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^data_dir=.*file.*: mnist cannot be packed there"):
        load("mnist", Mnist(), tmp_path / "file" / "inside")


class Made(Source):
    """Arrays as given."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays

    def read(self, data_dir, download):
        return self.arrays

    def locations(self, data_dir):
        return []


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("train_images", np.zeros((4, 1, 2, 2)), "train_images.npy: must be uint8"),
        ("test_images", np.zeros((0, 1, 2, 2), np.uint8), "test_images.npy: must be uint8"),
        ("test_images", np.zeros((2, 1, 3, 2), np.uint8), "test_images.npy: of another shape"),
        ("train_labels", np.zeros(3, np.int64), "train_labels.npy: must be 4 integers"),
        ("test_labels", np.array([0, 2]), "test_labels.npy: labels must be 0 to 1"),
        ("train_labels", np.array([0, 1, -1, 0]), "train_labels.npy: labels must be 0 to 1"),
        ("classes", [], "classes.json: must be a list"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, part, value, message):
    good = {
        "train_images": np.zeros((4, 1, 2, 2), np.uint8),
        "train_labels": np.array([0, 1, 0, 1]),
        "test_images": np.zeros((2, 1, 2, 2), np.uint8),
        "test_labels": np.array([0, 1]),
        "classes": ["a", "b"],
    }
    assert load("made", Made(Arrays(**good)), tmp_path / "good").shape == (1, 2, 2)
    with pytest.raises(UserError, match=message):
        load("made", Made(Arrays(**good | {part: value})), tmp_path / "bad")
    assert not is_packed(tmp_path / "bad" / "made")
    name = "classes.json" if part == "classes" else f"{part}.npy"
    packed = tmp_path / "good" / "made" / name
    packed.write_text(json.dumps(value)) if part == "classes" else np.save(packed, value)
    with pytest.raises(UserError, match=message):
        load("made", Made(Arrays(**good)), tmp_path / "good")
    packed.write_bytes(packed.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{name}: damaged"):
        load("made", Made(Arrays(**good)), tmp_path / "good")


# The command


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["dfl-data", *arguments])
    command.main()


@pytest.mark.usefixtures("clean_logging")
def test_list_and_prepare(monkeypatch, capsys, tmp_path):
    write_mnist(tmp_path)
    here = f"data_dir={tmp_path}"

    def states() -> dict[str, str]:
        run(monkeypatch, "list", here)
        return dict(line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:])

    assert states() == {
        "cifar10": "absent",
        "cifar100": "absent",
        "digits": "bundled",
        "folder": "unset",
        "mnist": "raw",
        "tinyimagenet": "absent",
    }
    run(monkeypatch, "prepare", "dataset=mnist", here)
    assert "12 training and 5 test images of 1x28x28 in 10 classes" in capsys.readouterr().out
    assert states()["mnist"] == "packed"


@pytest.mark.usefixtures("clean_logging")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare"], "name a data set"),
        (["prepare", "dataset=mnits"], "mnits"),
        (["prepare", "dataset=digits", "data_dri=x"], "data_dri"),
        (["prepare", "dataset=folder"], "dataset.source.path"),
        (["prepare", "dataset=cifar10", "dataset.source.classes=11"], "dataset.source.classes=11"),
    ],
)
def test_mistakes_end_the_command_with_one_line(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", command.names())
def test_configured_data_sets(name, tmp_path):
    cfg = compose([f"dataset={name}", *([f"dataset.source.path={tmp_path}"] if name == "folder" else [])])
    assert isinstance(build(cfg.dataset.source, "dataset.source"), Source)
    assert cfg.dataset.name == name
    x = Normalise(list(cfg.dataset.mean), list(cfg.dataset.std))(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))
    assert x[0, 0].item() == pytest.approx(-cfg.dataset.mean[0] / cfg.dataset.std[0])
