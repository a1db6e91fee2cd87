"""Downloads from a server of our own on this machine, which breaks off, sends rubbish, or falls silent."""

import gzip
import itertools
import os
import random
import shutil
import signal
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from data_helpers import equal, forked, killed, md5, write_cifar, write_mnist, write_tiny
from torchvision.datasets import CIFAR100, MNIST, FashionMNIST

from dfl_experiments.data import sources
from dfl_experiments.data.packs import load_pack
from dfl_experiments.data.sources import Cifar, FashionMnist, Mnist, Source
from dfl_experiments.data.sources_folders import TinyImageNet
from dfl_experiments.errors import UserError


class Server(ThreadingHTTPServer):
    """Serves `files` as its `mode` says."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.mode = "whole"
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        mode, content = self.server.mode, self.server.files[self.path.strip("/")]
        if mode == "silent":
            time.sleep(3)
        elif mode == "missing":
            self.send_error(404)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            altered = bytes([content[0] ^ 1]) + content[1:]
            half = content[: len(content) // 2]
            self.wfile.write(
                {"half": half, "half and silence": half, "altered": altered}.get(mode, content)
            )
            if mode == "half and silence":
                self.wfile.flush()
                time.sleep(3)

    def log_message(self, format: str, *arguments) -> None:
        """Keep quiet."""


@pytest.fixture
def server(monkeypatch):
    """The server, running; a silent one is given up soon."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(sources, "SILENCE", 0.3)
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


def publish_mnist(server: Server, monkeypatch, place: Path) -> Source:
    files = write_mnist(place, 200)
    publish_compressed(server, monkeypatch, place, MNIST)
    monkeypatch.setattr(Mnist, "FILES", files)
    return Mnist()


def publish_fashion_mnist(server: Server, monkeypatch, place: Path) -> Source:
    write_mnist(place, 200)
    publish_compressed(server, monkeypatch, place, FashionMNIST)
    return FashionMnist()


def publish_compressed(server: Server, monkeypatch, place: Path, published: type[MNIST]) -> None:
    for name, _ in published.resources:
        packed = place / name
        packed.write_bytes(gzip.compress((place / "MNIST" / "raw" / packed.stem).read_bytes()))
        server.files[packed.name] = packed.read_bytes()
    monkeypatch.setattr(published, "mirrors", [f"{server.url}/"])
    monkeypatch.setattr(
        published, "resources", [(name, md5(place / name)) for name in server.files]
    )


def publish_cifar100(server: Server, monkeypatch, place: Path) -> Source:
    write_cifar(place, CIFAR100, monkeypatch)
    archive = place / CIFAR100.filename
    with tarfile.open(archive, "w:gz") as opened:
        opened.add(place / CIFAR100.base_folder, CIFAR100.base_folder)
    server.files[archive.name] = archive.read_bytes()
    monkeypatch.setattr(CIFAR100, "url", f"{server.url}/{archive.name}")
    monkeypatch.setattr(CIFAR100, "tgz_md5", md5(archive))
    return Cifar(100)


def publish_tinyimagenet(server: Server, monkeypatch, place: Path) -> Source:
    write_tiny(place)
    unlabelled = place / TinyImageNet.NAME / "test" / "images" / "test_0.JPEG"
    unlabelled.parent.mkdir(parents=True)
    unlabelled.write_bytes(random.Random(0).randbytes(100_000))
    archive = Path(
        shutil.make_archive(str(place / TinyImageNet.NAME), "zip", place, TinyImageNet.NAME)
    )
    server.files[archive.name] = archive.read_bytes()
    monkeypatch.setattr(TinyImageNet, "URL", f"{server.url}/{archive.name}")
    monkeypatch.setattr(TinyImageNet, "MD5", md5(archive))
    return TinyImageNet()


PUBLISH = {
    "mnist": publish_mnist,
    "fashion_mnist": publish_fashion_mnist,
    "cifar100": publish_cifar100,
    "tinyimagenet": publish_tinyimagenet,
}
FAULTS = ("half", "half and silence", "silent", "altered", "missing")


@pytest.fixture(params=PUBLISH)
def published(request, server, monkeypatch, tmp_path) -> tuple[str, Source]:
    """A data set that the server has, and its source."""
    (tmp_path / "published").mkdir()
    return request.param, PUBLISH[request.param](server, monkeypatch, tmp_path / "published")


def fails(name: str, source: Source, data_dir: Path, download: bool = True) -> None:
    """Check that there is no data set to load, which is one line."""
    with pytest.raises(UserError) as caught:
        load_pack(name, source, data_dir, download)
    line = str(caught.value)
    assert "\n" not in line
    assert (
        f"dataset {name}: neither packed in {data_dir / name} nor readable from {data_dir}" in line
    )
    assert not (data_dir / name).exists()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_download_that_fails_is_done_anew(server, published, tmp_path, fault):
    (name, source), data_dir = published, tmp_path / "data"
    server.mode = fault
    fails(name, source, data_dir)
    fails(name, source, data_dir, download=False)  # what was left is not taken for whole
    server.mode = "whole"
    expected = load_pack(name, source, tmp_path / "elsewhere")
    assert len(expected.train_labels) > 6
    assert equal(load_pack(name, source, data_dir), expected)


def test_a_process_killed_in_a_download(server, published, tmp_path):
    (name, source), data_dir = published, tmp_path / "data"
    expected = load_pack(name, source, tmp_path / "elsewhere")
    server.mode = "half and silence"
    child = forked(lambda: load_pack(name, source, data_dir))
    until = time.monotonic() + 2
    while (
        not any(path.stat().st_size for path in data_dir.rglob("*") if path.is_file())
        and time.monotonic() < until
    ):
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert any(path.stat().st_size for path in data_dir.rglob("*") if path.is_file())
    fails(name, source, data_dir, download=False)
    server.mode = "whole"
    assert equal(load_pack(name, source, data_dir), expected)


def test_a_process_killed_at_any_moment_of_downloading_and_packing(server, published, tmp_path):
    name, source = published
    expected = load_pack(name, source, tmp_path / "elsewhere")
    for moment in itertools.count(1):
        data_dir = tmp_path / f"{moment}"
        ended = not killed(lambda data_dir=data_dir: load_pack(name, source, data_dir), moment)
        assert equal(load_pack(name, source, data_dir), expected)
        if ended:
            break
    assert moment > 20
