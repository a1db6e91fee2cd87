"""Packed arrays, and arrays that the user has put there: damaged or inconsistent files are refused by name."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from data_helpers import Made, equal, flip, refused

from dfl_experiments.data import checksums
from dfl_experiments.data.packs import CLASSES, FILES, is_packed, load_pack
from dfl_experiments.errors import UserError


@pytest.fixture
def packed(tmp_path) -> Path:
    """Return a data_dir with a pack that `load_pack` has written."""
    load_pack("made", Made(), tmp_path)
    return tmp_path


@pytest.fixture
def brought(packed) -> Path:
    """Return a data_dir with the same arrays without checksums, as a user would write them."""
    (packed / "made" / checksums.RECORD).unlink()
    return packed


def test_pack_has_checksums_and_is_not_packed_again(packed):
    record = json.loads((packed / "made" / checksums.RECORD).read_text())
    contents = {name: (packed / "made" / name).read_bytes() for name in FILES}
    expected = {
        name: {"bytes": len(content), "crc32": zlib.crc32(content)}
        for name, content in contents.items()
    }
    assert record == {"format": 1, "files": expected}
    assert equal(load_pack("made", Made(classes=["other", "names"]), packed), Made().arrays)


def test_arrays_of_the_user_need_no_checksums_and_are_not_changed(brought):
    assert equal(load_pack("made", Made(classes=["other", "names"]), brought), Made().arrays)
    assert sorted(path.name for path in (brought / "made").iterdir()) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("offset", [0, -1])
def test_altered_byte_is_refused(packed, name, offset):
    flip(packed / "made" / name, offset)
    message = refused(
        "made", Made(), packed, rf"made/{name}: unreadable or damaged \(its CRC-32 differs "
    )
    assert f"delete {packed / 'made'} so that it is packed again" in message
    for file in FILES:
        (packed / "made" / file).unlink()
    assert equal(load_pack("made", Made(), packed), Made().arrays)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("length", [0, 1, -1])
def test_truncated_file_is_refused(packed, name, length):
    file = packed / "made" / name
    file.write_bytes(file.read_bytes()[:length])
    damaged = rf"made/{name}: unreadable or damaged"
    refused("made", Made(), packed, rf"{damaged} \(its CRC-32 differs .*\); delete ")
    (packed / "made" / checksums.RECORD).unlink()
    refused("made", Made(), packed, rf"{damaged} \(.*\); .*put an undamaged copy there")


@pytest.mark.parametrize("name", FILES)
def test_incomplete_arrays_of_the_user_are_not_overwritten(brought, name):
    (brought / "made" / name).unlink()
    refused("made", Made(), brought, rf"made: incomplete, without {name}; add the missing files")


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', '{"format": 1, "files": {}}'])
def test_damaged_checksum_file_is_refused(packed, text):
    (packed / "made" / checksums.RECORD).write_text(text)
    refused(
        "made",
        Made(),
        packed,
        r"made/(checksums.json|train_images.npy): unreadable or damaged \(.+\); delete ",
    )


def test_broken_links_are_not_overwritten(tmp_path):
    (tmp_path / "made").mkdir()
    for name in (*FILES, checksums.RECORD):
        (tmp_path / "made" / name).symlink_to(tmp_path / "a disk that is away" / name)
    refused("made", Made(), tmp_path, "made: incomplete, without train_images.npy")


IMAGES, LABELS = np.zeros((4, 1, 2, 2), np.uint8), np.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        (
            "test_images",
            IMAGES.astype(float),
            r"has features of shape \(1, 2, 2\), but train_images.npy has images of",
        ),
        (
            "train_images",
            IMAGES.astype(np.int8),
            r"must be uint8 images \(N, C, H, W\), .*, is int8 \(4, 1, 2, 2\)",
        ),
        (
            "train_images",
            IMAGES[:, 0],
            r"must be uint8 images \(N, C, H, W\), .*, is uint8 \(4, 2, 2\)",
        ),
        ("test_images", IMAGES[:0], "holds no values"),
        (
            "train_images",
            np.zeros((4, 8, 8, 3), np.uint8),
            r"\(4, 8, 8, 3\) is \(N, H, W, C\), .* save images",
        ),
        (
            "test_images",
            np.zeros((2, 1, 3, 2), np.uint8),
            r"has images of shape \(1, 3, 2\), but train_images.npy has images of shape \(1, 2, 2\)",
        ),
        ("test_images", IMAGES[:1], "test_labels.npy: must be 1 integers"),
        ("train_labels", LABELS[:3], r"must be 4 integers, is int64 \(3,\)"),
        ("train_labels", LABELS[:, None], "must be 4 integers"),
        ("train_labels", LABELS.astype(float), "must be 4 integers, is float64"),
        (
            "test_labels",
            np.array([0, 2]),
            "labels must be 0 to 1, one for each class; they range from 0 to 2",
        ),
        (
            "train_labels",
            np.array([0, 1, -1, 0]),
            "labels must be 0 to 1, .*; they range from -1 to 1",
        ),
        ("classes", ["a"], "must name at least two classes"),
        ("classes", ["a", "b", "a"], "must name at least two classes, and none of them twice"),
        ("classes", {"a": 0, "b": 1}, r'must be a list of class names, such as \["cats", "dogs"\]'),
    ],
)
def test_inconsistent_arrays_are_refused(brought, tmp_path, part, value, message):
    assert load_pack("made", Made(), brought).shape == (1, 2, 2)
    file = CLASSES if part == "classes" else f"{part}.npy"
    message = message if ".npy: " in message else f"{file}: {message}"
    refused("made", Made(**{part: value}), tmp_path / "bad", message)
    assert not is_packed(tmp_path / "bad" / "made")
    path = brought / "made" / file
    path.write_text(json.dumps(value)) if part == "classes" else np.save(path, value)
    refused("made", Made(), brought, message)
    path.write_bytes(path.read_bytes()[:-1])
    refused("made", Made(), brought, rf"{file}: (unreadable|must)")


def test_file_in_place_of_the_pack_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "made").write_text("mine")
    refused("made", Made(), tmp_path, r"made: cannot be written \(.*File exists")
    assert (tmp_path / "made").read_text() == "mine"


def test_images_of_one_pixel_and_two_classes_are_accepted(tmp_path):
    arrays = load_pack(
        "made", Made(train_images=IMAGES[..., :1, :1], test_images=IMAGES[:2, :, :1, :1]), tmp_path
    )
    assert (arrays.shape, arrays.num_classes) == ((1, 1, 1), 2)
    assert is_packed(tmp_path / "made")


def test_class_list_of_the_user_may_have_a_byte_order_mark(brought):
    classes = brought / "made" / CLASSES
    classes.write_bytes(b"\xef\xbb\xbf" + classes.read_bytes())
    assert load_pack("made", Made(), brought).num_classes == 2


def test_damaged_class_list_of_the_user_is_refused_without_advice_to_delete_it(brought):
    (brought / "made" / CLASSES).write_text("[")
    with pytest.raises(UserError, match=r"classes\.json: unreadable or damaged") as caught:
        load_pack("made", Made(), brought)
    assert "delete" not in str(caught.value)
