"""Whatever goes wrong around a command is one line, from its first moment on, and no traceback."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from processes import dfl_train

import dfl_experiments as dfl
from dfl_experiments.configuration.composition import CONF_DIR
from dfl_experiments.running.locks import HOLDER, Busy, Holder, lock_run

QUICK = ("epochs=2", "limit=64", "tracking=disabled", "threads=1", "model.widths=[8]")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
PRESSED = """\
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
def press(event, said):
    if event == "import" and said[0] == {module!r}:
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(press)
from dfl_experiments.console import {program}
{program}()
"""


@pytest.mark.parametrize(
    ("program", "module", "arguments"),
    [
        ("train", "hydra", QUICK),
        ("train", "numpy", QUICK),
        ("train", "torch._C", QUICK),
        ("train", "torch._C", ("--multirun", "seed=0,1", *QUICK)),
        ("report", "omegaconf", ["."]),
        ("data", "yaml", ["list"]),
    ],
)
def test_ctrl_c_during_an_import_is_one_line(program, module, arguments, tmp_path):
    code = PRESSED.format(module=module, program=program)
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (130, f"dfl-{program}: interrupted (SIGINT)\n")
    assert not list(tmp_path.iterdir())


def unread(folder, *arguments):
    """The exit code and the errors of a command whose output nobody reads."""
    command = [sys.executable, "-m", *arguments]
    with subprocess.Popen(
        command,
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.close()
        errors = process.stderr.read()
        return process.wait(timeout=120), errors


def test_output_that_nobody_reads_ends_in_silence_and_training_goes_on(tmp_path):
    assert unread(tmp_path, "dfl_experiments", "--help") == (128 + signal.SIGPIPE, "")
    assert unread(tmp_path, "dfl_experiments.dfl_data", "list") == (128 + signal.SIGPIPE, "")
    assert unread(tmp_path, "dfl_experiments", "hydra.run.dir=here", *QUICK) == (0, "")
    assert (tmp_path / "here" / "result.json").exists()


def test_output_to_a_full_disk_is_one_line(tmp_path):
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "dfl_experiments", "--version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == "dfl-train: error: [Errno 28] No space left on device\n"


def test_windows_is_refused():
    code = "import sys; sys.platform = 'win32'; import dfl_experiments"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_a_refused_run_leaves_no_directory(tmp_path):
    misfit = ("method=adfa", "model=conv3", *QUICK[:4])
    for place in ((), ("hydra.run.dir=a/b",)):
        done = dfl_train(tmp_path, *misfit, *place)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    assert dfl_train(tmp_path, *misfit, "hydra.run.dir=mine").returncode == 2
    assert (tmp_path / "mine" / "notes").read_text() == "mine"


def test_the_library_does_in_any_surroundings_what_it_does_alone(tmp_path):
    options = ["method=las", *QUICK]

    def rows(name):
        dfl.run(dfl.compose(options), tmp_path / name)
        return (tmp_path / name / "iterations.csv").read_text()

    alone = rows("alone")
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
        outer = GlobalHydra.instance().hydra
        dfl.compose(options)
        assert GlobalHydra.instance().hydra is outer
    with torch.no_grad():
        assert rows("without gradients") == alone
    torch.set_default_dtype(torch.float64)
    try:
        assert rows("float64") == alone
        assert {p.dtype for p in dfl.load_net(tmp_path / "float64").parameters()} == {torch.float32}
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_lock_that_a_process_elsewhere_has_left_is_named(monkeypatch, tmp_path):
    def no_locks(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    lock = FileLock(tmp_path / ".lock")
    with pytest.warns(UserWarning, match="flock"):
        lock.acquire()
    pid, _, *rest = (tmp_path / ".lock").read_text().split("\n")
    lock.release()
    (tmp_path / ".lock").write_text("\n".join([pid, "elsewhere", *rest]))
    (tmp_path / HOLDER).write_text(f'{{"host": "elsewhere", "pid": {pid}, "command": null}}')
    with pytest.warns(UserWarning, match="flock"), pytest.raises(Busy) as busy, lock_run(tmp_path):
        pass
    said = str(busy.value)
    assert str(Holder("elsewhere", int(pid), None)) in said
    assert f"remove {tmp_path / '.lock'}" in said
    assert "\n" not in said
