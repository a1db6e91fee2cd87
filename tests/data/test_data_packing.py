"""Packing: once and whole, whatever interrupts it, and by one process at a time."""

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


def test_missing_data_is_one_line(offline, tmp_path, capsys):
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


@pytest.mark.parametrize("before", ["nothing", "a part of a pack"])
def test_packing_killed_at_any_moment_is_done_anew(folder, tmp_path, before):
    source, expected = Folder(str(folder)), Folder(str(folder)).read(tmp_path, False)
    moment, ended, unfinished = 0, False, 0
    while not ended:
        moment += 1
        data_dir = tmp_path / f"{moment}"
        packed = data_dir / source.cache_name("folder")
        if before != "nothing":
            data_dir.mkdir()
            pack(Made().arrays, packed)
            (packed / FILES[0]).unlink()
        ended = not killed(lambda data_dir=data_dir: load_pack("folder", source, data_dir), moment)
        unfinished += not is_packed(packed)
        assert equal(load_pack("folder", source, data_dir), expected)
        assert sorted(path.name for path in packed.iterdir()) == sorted([*FILES, checksums.RECORD])
        assert not list(data_dir.glob("*.partial/*"))
    assert unfinished > 20


def test_two_processes_at_once(folder, tmp_path):
    code = (
        "import sys, logging, zlib; from pathlib import Path; logging.basicConfig(level=logging.INFO)\n"
        "from dfl_experiments.data.packs import load_pack\n"
        "from dfl_experiments.data.sources_folders import Folder\n"
        "source = Folder(sys.argv[1]); print('ready', flush=True)\n"
        "arrays = load_pack('folder', source, Path(sys.argv[2]))\n"
        "*parts, classes = vars(arrays).values(); print(*(zlib.crc32(part.tobytes()) for part in parts), classes)"
    )
    data_dir = tmp_path / "data"
    arguments = [sys.executable, "-c", code, str(folder), str(data_dir)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    with packs.lock_pack(data_dir, Folder(str(folder)).cache_name("folder")):
        processes = [subprocess.Popen(arguments, **pipes) for _ in range(2)]
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)  # both have found nothing packed, and wait
    results = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    *parts, classes = vars(load_pack("folder", Folder(str(folder)), data_dir)).values()
    expected = [zlib.crc32(part.tobytes()) for part in parts]
    assert [out for out, _ in results] == [f"{' '.join(map(str, expected))} {classes}\n"] * 2
    assert sum(err.count("preparing folder") for _, err in results) == 1
    assert not list(data_dir.glob("*.partial"))


def test_data_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"^data_dir=.*file.*: the packed data set mnist cannot be written there"
    ):
        load_pack("mnist", Mnist(), tmp_path / "file" / "inside")


def test_a_disk_without_room(folder, tmp_path):
    data_dir = tmp_path / "data"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        refused("folder", Folder(str(folder)), data_dir, r"data/folder-\w+: cannot be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(load_pack("folder", Folder(str(folder)), data_dir).train_labels) == 6
