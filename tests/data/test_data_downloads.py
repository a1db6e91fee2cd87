"""Downloads from a local server that breaks off, sends altered bytes, or stops sending."""

import gzip
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
    """Serve `files`, with the fault that `mode` names, or whole."""

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
    """Yield a running server. The client waits only 0.3 s for a silent one."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(sources, "SILENCE", 0.3)
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


def publish_mnist(server: Server, monkeypatch, folder: Path) -> Source:
    files = write_mnist(folder, 200)
    publish_compressed(server, monkeypatch, folder, MNIST)
    monkeypatch.setattr(Mnist, "FILES", files)
    return Mnist()


def publish_fashion_mnist(server: Server, monkeypatch, folder: Path) -> Source:
    write_mnist(folder, 200)
    publish_compressed(server, monkeypatch, folder, FashionMNIST)
    return FashionMnist()


def publish_compressed(server: Server, monkeypatch, folder: Path, published: type[MNIST]) -> None:
    for name, _ in published.resources:
        packed = folder / name
        packed.write_bytes(gzip.compress((folder / "MNIST" / "raw" / packed.stem).read_bytes()))
        server.files[packed.name] = packed.read_bytes()
    monkeypatch.setattr(published, "mirrors", [f"{server.url}/"])
    monkeypatch.setattr(
        published, "resources", [(name, md5(folder / name)) for name in server.files]
    )


def publish_cifar100(server: Server, monkeypatch, folder: Path) -> Source:
    write_cifar(folder, CIFAR100, monkeypatch)
    archive = folder / CIFAR100.filename
    with tarfile.open(archive, "w:gz") as opened:
        opened.add(folder / CIFAR100.base_folder, CIFAR100.base_folder)
    server.files[archive.name] = archive.read_bytes()
    monkeypatch.setattr(CIFAR100, "url", f"{server.url}/{archive.name}")
    monkeypatch.setattr(CIFAR100, "tgz_md5", md5(archive))
    return Cifar(100)


def publish_tinyimagenet(server: Server, monkeypatch, folder: Path) -> Source:
    write_tiny(folder)
    unlabelled = folder / TinyImageNet.NAME / "test" / "images" / "test_0.JPEG"
    unlabelled.parent.mkdir(parents=True)
    unlabelled.write_bytes(random.Random(0).randbytes(100_000))
    archive = Path(
        shutil.make_archive(str(folder / TinyImageNet.NAME), "zip", folder, TinyImageNet.NAME)
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
    """Return the name and the source of a data set on the server."""
    (tmp_path / "published").mkdir()
    return request.param, PUBLISH[request.param](server, monkeypatch, tmp_path / "published")


def fails(name: str, source: Source, data_dir: Path, download: bool = True) -> None:
    """Assert that loading is refused in one line and leaves no pack."""
    with pytest.raises(UserError) as caught:
        load_pack(name, source, data_dir, download)
    line = str(caught.value)
    assert "\n" not in line
    assert (
        f"dataset {name}: neither packed in {data_dir / name} nor readable from {data_dir}" in line
    )
    assert not (data_dir / name).exists()


@pytest.mark.parametrize("fault", FAULTS)
def test_failed_download_is_repeated(server, published, tmp_path, fault):
    (name, source), data_dir = published, tmp_path / "data"
    server.mode = fault
    fails(name, source, data_dir)
    fails(name, source, data_dir, download=False)  # a partial download is not used
    server.mode = "whole"
    expected = load_pack(name, source, tmp_path / "elsewhere")
    assert len(expected.train_labels) > 6
    assert equal(load_pack(name, source, data_dir), expected)


def test_download_of_a_killed_process_is_repeated(server, published, tmp_path):
    (name, source), data_dir = published, tmp_path / "data"
    expected = load_pack(name, source, tmp_path / "elsewhere")
    server.mode = "half and silence"

    def has_partial_file():
        return any(path.stat().st_size for path in data_dir.rglob("*") if path.is_file())

    child = forked(lambda: load_pack(name, source, data_dir))
    deadline = time.monotonic() + 2
    while not has_partial_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert has_partial_file()
    fails(name, source, data_dir, download=False)
    server.mode = "whole"
    assert equal(load_pack(name, source, data_dir), expected)


# one data set that torchvision downloads, and one that this program downloads
@pytest.mark.parametrize("published", ["cifar100", "tinyimagenet"], indirect=True)
def test_process_killed_before_any_file_operation_leaves_a_recoverable_state(
    server, published, tmp_path
):
    name, source = published
    expected = load_pack(name, source, tmp_path / "elsewhere")
    moment, is_killed = 0, True
    while is_killed:
        moment += 1
        data_dir = tmp_path / f"{moment}"
        is_killed = killed(lambda data_dir=data_dir: load_pack(name, source, data_dir), moment)
        assert equal(load_pack(name, source, data_dir), expected)
    assert moment > 20
