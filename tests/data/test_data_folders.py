"""dataset=folder: every image of the user's folder is read once, with its class."""

import contextlib
import os
import shutil
import unicodedata

import numpy as np
import pytest
from data_helpers import equal, write_image
from PIL import Image

from dfl_experiments.data.packs import load_pack
from dfl_experiments.data.sources_folders import Folder
from dfl_experiments.errors import UserError


def test_folder_is_read_with_its_classes(folder, tmp_path, caplog):
    arrays = load_pack("folder", Folder(str(folder)), tmp_path / "data")
    assert arrays.classes == ["cats", "dogs"]
    assert arrays.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert arrays.test_labels.tolist() == [0, 1]
    with Image.open(folder / "train" / "dogs" / "deeper" / "2.png") as image:
        assert np.array_equal(arrays.train_images[5], np.asarray(image).transpose(2, 0, 1))
    grey = load_pack("folder", Folder(str(folder), channels=1), tmp_path / "data")
    assert grey.shape == (1, 8, 8)
    assert f"{folder}: ignored files: 1, such as train/cats/notes.txt" in caplog.text


def test_mixed_sizes_need_the_size_option(folder, tmp_path):
    write_image(folder / "train" / "cats" / "wide.png", 1, (30, 12))
    assert Folder(str(folder), size=6).read(tmp_path, False).train_images.shape == (7, 3, 6, 6)
    with pytest.raises(
        UserError, match=r"0\.png and .*wide\.png differ in size; .*dataset\.source\.size=64"
    ):
        Folder(str(folder)).read(tmp_path, False)


def test_val_is_used_if_there_is_no_test(folder, tmp_path):
    (folder / "test").rename(folder / "val")
    assert Folder(str(folder)).read(tmp_path, False).test_labels.tolist() == [0, 1]


def test_val_beside_test_is_ignored_with_a_warning(folder, tmp_path, caplog):
    shutil.copytree(folder / "test", folder / "val")
    load_pack("folder", Folder(str(folder)), tmp_path / "data")
    assert "val/ is not used" in caplog.text


def test_changed_folder_is_packed_again(folder):
    source, data_dir = Folder(str(folder)), folder
    first = source.cache_name("folder")
    load_pack("folder", source, data_dir)
    assert (
        source.cache_name("folder") == first
    )  # the pack lies inside the folder, but is not part of the data
    write_image(folder / "train" / "cats" / "new.png", 1)
    assert source.cache_name("folder") != first
    assert len(load_pack("folder", source, data_dir).train_labels) == 7
    assert Folder(str(folder), channels=1).cache_name("folder") != source.cache_name("folder")


def test_hidden_files_and_unused_splits_are_ignored(folder, tmp_path):
    before = Folder(str(folder)).read(tmp_path, False)
    unused_files = (
        ".DS_Store",
        "train/.DS_Store",
        "train/cats/._0.png",
        "test/.hidden/x.png",
        "train/cats/Thumbs.db",
        "train/cats/@eaDir/x.png",
        "train/@eaDir/x.png",
        "__MACOSX/x.png",
    )
    for name in unused_files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no image")
    (folder / "val" / "birds").mkdir(parents=True)  # val/ is unused, as there is test/
    assert equal(Folder(str(folder)).read(tmp_path, False), before)


def test_all_image_modes_unusual_names_and_links_are_read(folder, tmp_path):
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK"):
        suffix = "tif" if mode == "CMYK" else "png"
        write_image(folder / "train" / "cats" / f"mode-{mode}.{suffix}", 1, mode=mode)
    (folder / "train" / "cats" / "Ünïcode ☃\n.PNG").write_bytes(
        (folder / "test/cats/a.png").read_bytes()
    )
    with contextlib.suppress(OSError):  # some file systems refuse names that are not valid UTF-8
        os.rename(folder / "test/cats/a.png", os.fsencode(folder) + b"/test/cats/\xff.png")
    os.symlink(folder / "train" / "dogs" / "deeper", folder / "train" / "cats" / "linked")
    arrays = load_pack("folder", Folder(str(folder)), tmp_path / "data")
    assert arrays.train_labels.tolist() == [0] * 11 + [1] * 3
    grey = load_pack("folder", Folder(str(folder), channels=1), tmp_path / "data")
    assert grey.shape == (1, 8, 8)


def test_images_of_one_pixel_are_accepted(tmp_path):
    for split in ("train", "test"):
        for label in ("a", "b"):
            write_image(tmp_path / split / label / "x.png", 1, (1, 1))
    assert load_pack("folder", Folder(str(tmp_path)), tmp_path / "data").shape == (3, 1, 1)


def test_exif_rotation_is_applied_and_transparent_pixels_become_white(folder, tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[0] = 255  # a white line at the top
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotated by 90°, so the line is at the right
    Image.fromarray(pixels).save(folder / "train" / "cats" / "0.png", exif=exif)
    transparent = np.full((8, 8, 4), 90, np.uint8)
    transparent[..., 3] = 0
    Image.fromarray(transparent).save(folder / "train" / "cats" / "1.png")
    images = Folder(str(folder)).read(tmp_path, False).train_images
    assert np.array_equal(images[0, 0], np.eye(8, dtype=np.uint8)[[7] * 8] * 255)
    assert (images[1] == 255).all()


def test_class_names_are_equal_in_any_unicode_form_and_jfif_is_an_image(folder, tmp_path):
    for split, form in (("train", "NFC"), ("test", "NFD")):
        class_folder = folder / split / unicodedata.normalize(form, "größe")
        class_folder.mkdir()
        (class_folder / "x.jfif").write_bytes((folder / "test/cats/a.png").read_bytes())
    arrays = Folder(str(folder)).read(tmp_path, False)
    assert arrays.classes == ["cats", "dogs", "größe"]
