"""The commands print no traceback from their first import on, and the library leaves its surroundings unchanged."""

import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from processes import dfl_train

import dfl_experiments as dfl
from dfl_experiments.configuration.composition import CONF_DIR

QUICK = ("epochs=2", "limit=64", "tracking=disabled", "threads=1", "model.widths=[8]")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# a program that gets SIGINT when it imports a module
INTERRUPTED_PROGRAM = """\
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
def press_ctrl_c(event, arguments):
    if event == "import" and arguments[0] == {module!r}:
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(press_ctrl_c)
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
def test_ctrl_c_during_an_import_prints_one_line(program, module, arguments, tmp_path):
    code = INTERRUPTED_PROGRAM.format(module=module, program=program)
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (130, f"dfl-{program}: interrupted (SIGINT)\n")
    assert not list(tmp_path.iterdir())


def with_closed_stdout(folder, *arguments):
    """Run a command whose stdout is closed. Return its exit code and what it wrote to stderr."""
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


def test_closed_stdout_causes_no_message_and_training_continues(tmp_path):
    broken_pipe = (128 + signal.SIGPIPE, "")
    assert with_closed_stdout(tmp_path, "dfl_experiments", "--help") == broken_pipe
    assert with_closed_stdout(tmp_path, "dfl_experiments.dfl_data", "list") == broken_pipe
    training = ("dfl_experiments", "hydra.run.dir=here", *QUICK)
    assert with_closed_stdout(tmp_path, *training) == (0, "")
    assert (tmp_path / "here" / "result.json").exists()


def test_windows_is_refused():
    code = "import sys; sys.platform = 'win32'; import dfl_experiments"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_refused_run_leaves_no_directory_and_keeps_existing_files(tmp_path):
    invalid = ("method=adfa", "model=conv3", *QUICK[:4])  # ADFA needs fully connected layers
    for run_dir in ([], ["hydra.run.dir=a/b"]):
        done = dfl_train(tmp_path, *invalid, *run_dir)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    assert dfl_train(tmp_path, *invalid, "hydra.run.dir=mine").returncode == 2
    assert (tmp_path / "mine" / "notes").read_text() == "mine"


def test_library_is_independent_of_hydra_grad_mode_and_default_dtype(tmp_path):
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


def test_library_is_independent_of_the_default_device(tmp_path):
    options = ["method=las", *QUICK]
    images = np.zeros((2, 1, 8, 8), np.uint8)
    expected = dfl.run(dfl.compose(options), tmp_path / "alone")
    logits = dfl.load_run(tmp_path / "alone").predict(images)
    with torch.device("meta"):  # tensors that are made there have no values
        result = dfl.run(dfl.compose(options), tmp_path / "meta")
        run = dfl.load_run(tmp_path / "meta")
        assert result["accuracy"] == expected["accuracy"] == run.evaluate()["accuracy"]
        assert torch.equal(run.predict(images), logits)
    tables = [tmp_path / name / "iterations.csv" for name in ("alone", "meta")]
    assert tables[0].read_text() == tables[1].read_text()


def test_run_and_evaluate_restore_random_states_and_settings(tmp_path):
    def state():
        return (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
            torch.get_num_threads(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.backends.cudnn.benchmark,
            torch.are_deterministic_algorithms_enabled(),
        )

    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        before = state()
        dfl.run(dfl.compose(["deterministic=true", *QUICK]), tmp_path / "run")
        assert state() == before
        dfl.load_run(tmp_path / "run").evaluate()
        assert state() == before
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
