"""Packed arrays, and arrays that somebody brought: what is damaged or does not fit is one line naming the file."""

import json
from pathlib import Path

import numpy as np
import pytest
from data_helpers import Made, equal, flip, refused

from dfl_experiments.data import checksums, packs
from dfl_experiments.data.packs import CLASSES, FILES, PARTS, is_packed, load, pack


@pytest.fixture
def packed(tmp_path) -> Path:
    """A data_dir with a pack of our own."""
    load("made", Made(), tmp_path)
    return tmp_path


@pytest.fixture
def brought(packed) -> Path:
    """A data_dir with the same arrays as somebody else would write them."""
    (packed / "made" / checksums.RECORD).unlink()
    return packed


def test_a_pack_has_a_record_and_is_not_packed_again(packed):
    record = json.loads((packed / "made" / checksums.RECORD).read_text())
    assert record["format"] == checksums.FORMAT
    assert list(record["files"]) == list(FILES)
    for name, line in record["files"].items():
        path = packed / "made" / name
        assert line == {"bytes": path.stat().st_size, "crc32": checksums.crc32(path)}
    assert equal(load("made", Made(classes=["other", "names"]), packed), Made().arrays)


def test_brought_arrays_need_no_record_and_are_left_alone(brought):
    assert equal(load("made", Made(classes=["other", "names"]), brought), Made().arrays)
    assert sorted(path.name for path in (brought / "made").iterdir()) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, -1])
def test_an_altered_byte_is_found(packed, name, place):
    flip(packed / "made" / name, place)
    message = refused("made", Made(), packed, rf"made/{name}: damaged \(crc32: ")
    assert f"delete {packed / 'made'} to have it packed anew" in message
    for file in FILES:
        (packed / "made" / file).unlink()
    assert equal(load("made", Made(), packed), Made().arrays)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("length", [0, 1, -1])
def test_a_truncated_file_is_found(packed, name, length):
    file = packed / "made" / name
    file.write_bytes(file.read_bytes()[:length])
    refused("made", Made(), packed, rf"made/{name}: damaged \(bytes: \d+, was \d+ when packed\); delete ")
    (packed / "made" / checksums.RECORD).unlink()
    refused("made", Made(), packed, rf"made/{name}: damaged \(.*\); delete .* or put a whole copy there")


@pytest.mark.parametrize("name", FILES)
def test_a_part_of_somebody_s_arrays_is_not_written_over(brought, name):
    (brought / "made" / name).unlink()
    refused("made", Made(), brought, rf"made: \w+\.\w+ is there without {name}; add what is missing")


@pytest.mark.parametrize("text", ["", "[]", "{", "7", '{"format": "x"}', '{"format": 1}', '{"format": 1, "files": {}}'])
def test_a_damaged_record(packed, text):
    (packed / "made" / checksums.RECORD).write_text(text)
    refused("made", Made(), packed, rf"made/{checksums.RECORD}: damaged \(.+\); delete ")


@pytest.mark.parametrize("version", [0, 2])
def test_a_pack_of_another_version(tmp_path, monkeypatch, version):
    with monkeypatch.context() as patch:
        patch.setattr(checksums, "FORMAT", version)
        pack(Made(classes=["of", "another"]).arrays, tmp_path / "made")
    assert not is_packed(tmp_path / "made")
    line = refused("made", Made(), tmp_path, rf"made: packed in format {version}, this version has format 1, .*")
    assert str(tmp_path / "raw") in line
    (tmp_path / "raw").touch()
    assert equal(load("made", Made(), tmp_path), Made().arrays)
    assert is_packed(tmp_path / "made")


IMAGES, LABELS = np.zeros((4, 1, 2, 2), np.uint8), np.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("train_images", IMAGES.astype(float), r"must be uint8 \(N, C, H, W\), is float64 \(4, 1, 2, 2\)"),
        ("train_images", IMAGES.astype(np.int64), "must be uint8"),
        ("train_images", IMAGES[:, 0], r"must be uint8 \(N, C, H, W\), is uint8 \(4, 2, 2\)"),
        ("test_images", IMAGES[:0], "must be uint8"),
        ("test_images", IMAGES[..., :0], r"must be uint8 .*, is uint8 \(4, 1, 2, 0\)"),
        ("train_images", np.uint8(3), r"must be uint8 \(N, C, H, W\), is uint8 \(\)"),
        ("train_images", np.zeros((4, 8, 8, 3), np.uint8), r"\(4, 8, 8, 3\) is \(N, H, W, C\); make it \(N, C, H, W\)"),
        ("test_images", np.zeros((2, 1, 3, 2), np.uint8), r"of another shape than train_images.npy, \(1, 3, 2\) and"),
        ("test_images", np.zeros((2, 3, 2, 2), np.uint8), "of another shape"),
        ("test_images", IMAGES[:1], "test_labels.npy: must be 1 integers"),
        ("train_labels", LABELS[:3], r"must be 4 integers, is int64 \(3,\)"),
        ("train_labels", LABELS[:, None], "must be 4 integers"),
        ("train_labels", LABELS.astype(float), "must be 4 integers, is float64"),
        ("train_labels", LABELS.astype(bool), "must be 4 integers, is bool"),
        ("train_labels", np.array(["cat"] * 4), "must be 4 integers"),
        ("test_labels", np.array([0, 2]), "labels must be 0 to 1, as classes.json has 2 names; 2 is there"),
        ("train_labels", np.array([0, 1, -1, 0]), "labels must be 0 to 1, .*; -1 is there"),
        ("classes", [], "must name two classes at least, there are 0"),
        ("classes", ["a"], "must name two classes at least, there are 1"),
        ("classes", ["a", "b", "a"], "names must differ, 'a' is there twice"),
        ("classes", {"a": 0, "b": 1}, r'must be a list of class names, as \["cats", "dogs"\]'),
        ("classes", [0, 1], "must be a list of class names"),
        ("classes", "ab", "must be a list of class names"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(brought, tmp_path, part, value, message):
    assert load("made", Made(), brought).shape == (1, 2, 2)
    file = CLASSES if part == "classes" else f"{part}.npy"
    message = message if ".npy: " in message else f"{file}: {message}"
    refused("made", Made(**{part: value}), tmp_path / "bad", message)
    assert not is_packed(tmp_path / "bad" / "made")
    path = brought / "made" / file
    path.write_text(json.dumps(value)) if part == "classes" else np.save(path, value)
    refused("made", Made(), brought, message)
    path.write_bytes(path.read_bytes()[:-1])
    refused("made", Made(), brought, rf"{file}: (damaged|must)")


def test_files_that_are_no_arrays(brought):
    folder = brought / "made"
    for number, part in enumerate(PARTS):
        file = folder / f"{part}.npy"
        whole = file.read_bytes()
        if number == 0:
            np.save(file, np.array([{"pickled": 1}]), allow_pickle=True)
        elif number == 1:
            with file.open("wb") as opened:
                np.savez(opened, np.zeros(3))
        else:
            file.write_text("words")
        refused("made", Made(), brought, rf"{part}\.npy: damaged \(.+\); delete")
        file.write_bytes(whole)
    for text in (b"[", b"\xff\xfe", b""):
        (folder / CLASSES).write_bytes(text)
        refused("made", Made(), brought, r"classes\.json: damaged \(.+\); delete")
    (folder / CLASSES).unlink()
    (folder / CLASSES).mkdir()
    refused("made", Made(), brought, "is there without|damaged")


def test_a_file_where_the_folder_would_be(tmp_path):
    (tmp_path / "made").write_text("mine")
    refused("made", Made(), tmp_path, r"made: cannot be written \(.*File exists")
    assert (tmp_path / "made").read_text() == "mine"


def test_one_pixel_and_two_classes_are_enough(tmp_path):
    arrays = load("made", Made(train_images=IMAGES[..., :1, :1], test_images=IMAGES[:2, :, :1, :1]), tmp_path)
    assert (arrays.shape, arrays.num_classes) == ((1, 1, 1), 2)
    assert packs.is_packed(tmp_path / "made")
