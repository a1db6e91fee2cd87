"""A data set is packed once, by one process at a time, and an interruption leaves no partial pack."""

import os
import resource
import subprocess
import sys
import time
import zlib

import pytest
from data_helpers import Made, equal, killed, refused

from dfl_experiments.data import checksums, packs
from dfl_experiments.data.packs import FILES, is_packed, load_pack, pack
from dfl_experiments.data.sources import Cifar, Mnist
from dfl_experiments.data.sources_folders import Folder, TinyImageNet
from dfl_experiments.errors import UserError


def test_missing_data_is_refused_in_one_line(offline, tmp_path, capsys):
    for name, source in (
        ("mnist", Mnist()),
        ("cifar100", Cifar(100)),
        ("tinyimagenet", TinyImageNet()),
    ):
        for download in (True, False):
            with pytest.raises(UserError) as caught:
                load_pack(name, source, tmp_path, download)
            message = str(caught.value)
            assert "\n" not in message
            assert name in message
            assert str(source.locations(tmp_path)[0]) in message
            assert f"dfl-data prepare dataset={name}" in message
            assert "DFL_DATA_DIR" in message
    assert capsys.readouterr() == ("", "")


def test_packing_killed_before_any_file_operation_is_repeated(folder, tmp_path):
    source = Folder(str(folder))
    expected = source.read(tmp_path, False)
    moment, unfinished, is_killed = 0, 0, True
    while is_killed:
        moment += 1
        data_dir = tmp_path / f"{moment}"
        packed = data_dir / source.cache_name("folder")
        data_dir.mkdir()
        pack(Made().arrays, packed)
        (packed / FILES[0]).unlink()  # only a part of a pack
        is_killed = killed(lambda data_dir=data_dir: load_pack("folder", source, data_dir), moment)
        unfinished += not is_packed(packed)
        assert equal(load_pack("folder", source, data_dir), expected)
        assert sorted(path.name for path in packed.iterdir()) == sorted([*FILES, checksums.RECORD])
        assert not list(data_dir.glob("*.partial/*"))
    assert unfinished > 20


# a program that loads a folder of images and prints a checksum of the training images
LOAD_FOLDER = """\
import logging, sys, zlib
from pathlib import Path
from dfl_experiments.data.packs import load_pack
from dfl_experiments.data.sources_folders import Folder

logging.basicConfig(level=logging.INFO)
source = Folder(sys.argv[1])
print("ready", flush=True)
arrays = load_pack("folder", source, Path(sys.argv[2]))
print(zlib.crc32(arrays.train_images.tobytes()))
"""


def test_two_processes_pack_a_data_set_once(folder, tmp_path):
    data_dir = tmp_path / "data"
    arguments = [sys.executable, "-c", LOAD_FOLDER, str(folder), str(data_dir)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    with packs.lock_pack(data_dir, "folder"):
        processes = [subprocess.Popen(arguments, **pipes) for _ in range(2)]
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)  # both find no pack and wait for the lock
    results = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    arrays = load_pack("folder", Folder(str(folder)), data_dir)
    for printed, _ in results:
        assert printed == f"{zlib.crc32(arrays.train_images.tobytes())}\n"
    logs = "".join(log for _, log in results)
    assert logs.count("preparing folder") == 1
    assert not list(data_dir.glob("*.partial"))


def test_unwritable_data_dir_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"^data_dir=.*file.*: the packed data set mnist cannot be written there"
    ):
        load_pack("mnist", Mnist(), tmp_path / "file" / "inside")


def test_full_disk_is_refused_and_packing_succeeds_later(folder, tmp_path):
    data_dir = tmp_path / "data"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        refused("folder", Folder(str(folder)), data_dir, r"data/folder-\w+: cannot be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(load_pack("folder", Folder(str(folder)), data_dir).train_labels) == 6
