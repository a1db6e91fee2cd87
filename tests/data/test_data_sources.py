"""Raw data sets: they are read completely and unchanged, and damaged files are named."""

import random
import shutil
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from data_helpers import equal, flip, refused, write_cifar
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10, CIFAR100, MNIST

from dfl_experiments.configuration.composition import compose, group_options
from dfl_experiments.configuration.schema import check
from dfl_experiments.data.batches import Normalise
from dfl_experiments.data.packs import load_pack
from dfl_experiments.data.sources import Cifar, Digits, Mnist, Source
from dfl_experiments.data.sources_folders import TinyImageNet
from dfl_experiments.errors import UserError


def test_digits_need_no_files_and_write_none(tmp_path):
    arrays = load_pack("digits", Digits(), tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    assert arrays.shape == (1, 8, 8)
    assert arrays.num_classes == 10
    assert (len(arrays.train_labels), len(arrays.test_labels)) == (1437, 360)
    assert arrays.train_images.dtype == np.uint8
    assert arrays.train_images.max() == 255
    assert np.bincount(arrays.test_labels).min() >= 34
    assert equal(arrays, load_pack("digits", Digits(), tmp_path))


class Changed(Digits):
    def __init__(self, change):
        self.change = change

    def read(self, data_dir, download):
        return self.change(super().read(data_dir, download))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: None, "dataset own: `read` must return `Arrays`, but returns a NoneType"),
        (lambda arrays: tuple(vars(arrays)), "must return `Arrays`, but returns a tuple"),
        (
            lambda arrays: replace(arrays, test_labels=arrays.test_labels.tolist()),
            "dataset own: test_labels must be a NumPy array, but is a list",
        ),
        (
            lambda arrays: replace(arrays, train_images=torch.tensor(arrays.train_images)),
            "dataset own: train_images must be a NumPy array, but is a Tensor",
        ),
        (
            lambda arrays: replace(arrays, test_images=arrays.test_images[:0]),
            r"dataset own: test_images: holds no values, its shape is \(0, 1, 8, 8\)",
        ),
    ],
)
def test_refuses_wrong_return_values_of_an_own_source(change, message, tmp_path):
    refused("own", Changed(change), tmp_path, message)


def test_digits_equal_those_of_scikit_learn(tmp_path):
    arrays = load_pack("digits", Digits(), tmp_path)
    images = np.concatenate([arrays.train_images, arrays.test_images]).reshape(-1, 64)
    labels = np.concatenate([arrays.train_labels, arrays.test_labels])
    digits = load_digits()
    expected = np.rint(digits.data * (255 / 16)).astype(int)
    samples = sorted(zip(images.tolist(), labels.tolist(), strict=True))
    assert samples == sorted(zip(expected.tolist(), digits.target.tolist(), strict=True))


def test_packed_mnist_equals_torchvision(data_dir, tmp_path):
    (tmp_path / "MNIST").symlink_to(data_dir / "MNIST")
    arrays = load_pack("mnist", Mnist(), tmp_path, download=False)
    assert isinstance(arrays.train_images, np.memmap)
    for train, images, labels in (
        (True, arrays.train_images, arrays.train_labels),
        (False, arrays.test_images, arrays.test_labels),
    ):
        reference = MNIST(data_dir, train=train)
        assert np.array_equal(images[:, 0], reference.data)
        assert np.array_equal(labels, reference.targets)


def test_packed_cifar_is_loaded(data_dir):
    arrays = load_pack("cifar10", Cifar(10), data_dir, download=False)
    assert arrays.shape == (3, 32, 32)
    assert np.bincount(arrays.train_labels).tolist() == [5000] * 10


def test_present_mnist_needs_no_network(offline, mnist):
    arrays = load_pack("mnist", Mnist(), mnist)
    assert len(arrays.train_labels) == 12
    assert arrays.classes == [str(digit) for digit in range(10)]


@pytest.mark.parametrize("name", Mnist.FILES)
@pytest.mark.parametrize("fault", ["truncated", "altered", "empty"])
def test_damaged_mnist_is_refused(mnist, name, fault):
    file = mnist / "MNIST" / "raw" / name
    if fault == "altered":
        flip(file, -3)
    elif fault == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.write_bytes(b"")
    message = rf"{name}: damaged or altered, .*; delete it, then it is downloaded again"
    refused("mnist", Mnist(), mnist, message)


@pytest.mark.parametrize(("classes", "published"), [(10, CIFAR10), (100, CIFAR100)])
def test_cifar_equals_torchvision(offline, tmp_path, monkeypatch, classes, published):
    write_cifar(tmp_path, published, monkeypatch)
    arrays = load_pack("cifar", Cifar(classes), tmp_path)
    for train, images, labels in (
        (True, arrays.train_images, arrays.train_labels),
        (False, arrays.test_images, arrays.test_labels),
    ):
        reference = published(tmp_path, train=train)
        assert np.array_equal(images.transpose(0, 2, 3, 1), reference.data)
        assert labels.tolist() == reference.targets
        assert arrays.classes == reference.classes


@pytest.mark.parametrize("name", ["train", "test", "meta"])
@pytest.mark.parametrize("fault", ["truncated", "altered", "empty", "absent"])
def test_damaged_cifar_is_refused(offline, tmp_path, monkeypatch, name, fault):
    file = write_cifar(tmp_path, CIFAR100, monkeypatch) / name
    if fault == "absent":
        file.unlink()
    elif fault == "altered":
        flip(file)
    else:
        file.write_bytes(file.read_bytes()[: 50 if fault == "truncated" else 0])
    for download in (True, False):
        message = "no network|not found or corrupted"
        refused("cifar100", Cifar(100), tmp_path, message, download=download)


def test_tinyimagenet_is_read_with_classes_and_grey_images(tiny):
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


@pytest.fixture
def archive(tiny):
    """Replace the unpacked small TinyImageNet by its zip archive, and return the archive's path."""
    path = tiny / f"{TinyImageNet.NAME}.zip"
    shutil.make_archive(str(path.with_suffix("")), "zip", tiny, TinyImageNet.NAME)
    shutil.rmtree(tiny / TinyImageNet.NAME)
    return path


def test_tinyimagenet_archive_equals_folder(archive, tmp_path):
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path)
    unpacked = TinyImageNet().read(tmp_path, download=False)
    assert equal(
        load_pack("tinyimagenet", TinyImageNet(), archive.parent, download=False), unpacked
    )


@pytest.mark.parametrize("content", [b"", b"PK nothing"])
def test_damaged_archive_is_refused(archive, content):
    archive.write_bytes(content)
    refused(
        "tinyimagenet",
        TinyImageNet(),
        archive.parent,
        r"tiny-imagenet-200\.zip: damaged .*; delete it",
    )


def test_damage_anywhere_in_an_archive_is_refused_or_harmless(archive):
    expected = TinyImageNet().read(archive.parent, download=False)
    content = archive.read_bytes()
    generator = random.Random(0)
    refusals = 0
    for trial in range(150):
        kind = ("truncated", "flipped anywhere", "flipped in the directory")[trial % 3]
        if kind == "truncated":
            archive.write_bytes(content[: generator.randrange(len(content))])
        elif kind == "flipped anywhere":
            archive.write_bytes(content)
            flip(archive, generator.randrange(len(content)))
        else:  # the directory of an archive is at its end
            archive.write_bytes(content)
            flip(archive, -generator.randrange(1, 1500))
        try:
            # some bytes, such as dates, are covered by no checksum, and do not matter
            assert equal(TinyImageNet().read(archive.parent, download=False), expected)
        except UserError:
            refusals += 1
    assert refusals > 75


def test_tinyimagenet_without_class_lists_uses_folder_names(tiny):
    for file in ("wnids.txt", "words.txt"):
        (tiny / TinyImageNet.NAME / file).unlink()
    assert TinyImageNet().read(tiny, download=False).classes == ["n01", "n02"]


def test_real_tinyimagenet_is_packed(data_dir, tmp_path):
    (tmp_path / TinyImageNet.NAME).symlink_to(data_dir / TinyImageNet.NAME)
    arrays = load_pack("tinyimagenet", TinyImageNet(), tmp_path, download=False)
    assert arrays.num_classes == 200
    assert arrays.shape == (3, 64, 64)
    assert len(np.unique(np.bincount(arrays.train_labels))) == 1


@pytest.mark.parametrize("name", group_options("dataset"))
def test_every_configured_data_set_builds_and_normalises(name, tmp_path):
    path = [f"dataset.source.path={tmp_path}"] if name in ("arrays", "folder") else []
    cfg = compose([f"dataset={name}", *path])
    assert isinstance(check(cfg).components["dataset.source"].build(), Source)
    assert cfg.dataset.name == name
    x = Normalise(list(cfg.dataset.mean), list(cfg.dataset.std))(
        torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
    )
    assert x[0, 0].item() == pytest.approx(-cfg.dataset.mean[0] / cfg.dataset.std[0])
