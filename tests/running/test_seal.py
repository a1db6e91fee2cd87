"""A run whose files were changed is refused, or left out of the report, in one line that names the file."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import dfl_train
from report_helpers import dfl_report

from dfl_experiments import api
from dfl_experiments.errors import UserError
from dfl_experiments.measured import EXTRA_QUANTITIES
from dfl_experiments.running import checkpoint
from dfl_experiments.running.result import read_epochs, read_result
from dfl_experiments.running.run_directory import Table, epoch_columns

FILES = ("result.json", "config.yaml", "epochs.csv", "iterations.csv")
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SMALL = ("epochs=3", "limit=300", "tracking=disabled", "threads=1", "model.widths=[16,16]")


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sealed") / "run"
    done = dfl_train(folder.parent, *SMALL, "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "run")


def remove_the_seal(run):
    content = json.loads((run / "result.json").read_text())
    del content["seal"]
    (run / "result.json").write_text(json.dumps(content))


def assert_left_out(folder, name):
    """Assert that the report leaves out the only run and names the file."""
    done = dfl_report(folder, "run", "--format", "csv")
    assert done.returncode == 2
    line, _ = done.stderr.splitlines()  # the second line says that no run remains
    assert line.startswith("dfl-report: left out: run (")
    assert name in line


def is_same_json(text, other):
    """Return whether two texts are valid JSON with the same values. Numbers such as 05 are not valid."""
    try:
        return json.loads(text) == json.loads(other)
    except json.JSONDecodeError:
        return False


@pytest.mark.parametrize("name", FILES)
def test_altered_digit_in_a_sealed_file_is_refused_by_every_reader(name, run):
    generator = random.Random(name)
    original = (run / name).read_text()
    digits = [index for index, character in enumerate(original) if character.isdigit()]
    for index in generator.sample(digits, 30):
        digit = (int(original[index]) + generator.randint(1, 9)) % 10
        text = f"{original[:index]}{digit}{original[index + 1 :]}"
        if name == "result.json" and is_same_json(text, original):
            continue  # a digit beyond the precision of a float
        (run / name).write_text(text)
        with pytest.raises(UserError, match=rf"run/{name}: "):
            read_result(run)
    (run / name).write_text(original.replace("0.0", "0.7", 1))
    assert_left_out(run.parent, name)
    for key in ("resume", "repeat"):
        done = dfl_train(run.parent, f"{key}=run")
        assert done.returncode == 2
        assert f"run/{name}" in done.stderr.splitlines()[-1]
    for read in (api.read_rows, api.load_net):
        with pytest.raises(UserError, match=name):
            read(run)
    command = [sys.executable, str(SCRIPTS / "keep_results.py"), run.parent, run.parent / "kept"]
    kept = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "0 runs kept" in kept.stdout
    assert name in kept.stderr


def test_keep_results_refuses_its_source_as_the_destination(run):
    before = (run / "epochs.csv").read_bytes(), (run / "result.json").read_bytes()
    command = [sys.executable, str(SCRIPTS / "keep_results.py"), run.parent, f"{run}/.."]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is the source; choose another folder for the copies" in done.stderr
    assert before == ((run / "epochs.csv").read_bytes(), (run / "result.json").read_bytes())


def test_missing_tables_and_configuration_do_not_change_the_report(run):
    before = dfl_report(run.parent, "run", "--format", "csv").stdout
    for name in ("iterations.csv", "epochs.csv", "config.yaml"):
        (run / name).unlink()
        assert dfl_report(run.parent, "run", "--format", "csv").stdout == before


def test_byte_order_mark_in_result_json_is_accepted(run):
    (run / "result.json").write_bytes(b"\xef\xbb\xbf" + (run / "result.json").read_bytes())
    assert read_result(run)["status"] == "finished"


WRONG_TABLES = {
    "a word for a cosine": lambda text: text.replace(text.splitlines()[1].split(",")[9], "high"),
    "a cell too many": lambda text: text.replace("\n2,", ",1\n2,"),
    "a row too few": lambda text: "".join(text.splitlines(keepends=True)[:-1]),
    "a row twice": lambda text: text + text.splitlines(keepends=True)[-1],
    "half a row": lambda text: text[:-9],
}


@pytest.mark.parametrize("fault", WRONG_TABLES)
def test_invalid_table_without_a_seal_is_left_out(fault, run):
    remove_the_seal(run)
    assert dfl_report(run.parent, "run").returncode == 0
    table = run / "epochs.csv"
    table.write_text(WRONG_TABLES[fault](table.read_text()))
    assert_left_out(run.parent, "epochs.csv")


def test_impossible_cosine_without_a_seal_is_left_out(run):
    remove_the_seal(run)
    content = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(content | {"cosine": {"1": -7.0}}))
    assert_left_out(run.parent, "result.json")


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
@pytest.mark.parametrize("name", [*FILES, ".running"])
def test_pipe_link_or_folder_in_place_of_a_file_is_left_out(name, kind, run):
    """Reading a pipe would block the report."""
    if name == ".running":
        (run / "result.json").unlink()
    (run / name).unlink(missing_ok=True)
    (run.parent / "elsewhere").write_text("{}")
    make = {
        "pipe": os.mkfifo,
        "link": lambda path: path.symlink_to(run.parent / "elsewhere"),
        "folder": os.mkdir,
    }
    make[kind](run / name)
    assert_left_out(run.parent, name)


def test_every_column_that_a_run_writes_is_read(tmp_path):
    columns = epoch_columns(3, [*EXTRA_QUANTITIES])
    table = Table(tmp_path / "epochs.csv", columns)
    table.extend(
        dict.fromkeys(columns, 0.5) | {"epoch": epoch, "test_loss": float("inf")}
        for epoch in (1, 2)
    )
    values = read_epochs(tmp_path, {"status": "diverged", "epochs": 2})
    assert list(values) == columns
    assert values["test_loss"] == [None, None]


def test_checkpoint_with_a_flipped_bit_is_refused(run):
    original = (run / "last.pt").read_bytes()
    generator = random.Random(0)
    for _ in range(100):
        content = bytearray(original)
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        (run / "last.pt").write_bytes(content)
        with pytest.raises(UserError, match=r"last\.pt: is damaged"):
            checkpoint.read_checkpoint(run / "last.pt")


CHANGES = {
    "another digit": lambda content: content.replace(b"0.0", b"0.7", 1),
    "no rows": lambda content: content.partition(b"\n")[0] + b"\n",
}


@pytest.mark.parametrize("change", CHANGES)
def test_resume_refuses_a_table_changed_since_the_checkpoint(change, run):
    (run / "result.json").unlink()
    table = run / "iterations.csv"
    table.write_bytes(CHANGES[change](table.read_bytes()))
    done = dfl_train(run.parent, "resume=run")
    assert done.returncode == 2
    assert "iterations.csv: missing, or changed since the checkpoint" in done.stderr
    result = run / "result.json"
    assert not result.exists() or json.loads(result.read_text())["status"] == "failed"


def test_next_start_removes_temporary_files_of_a_killed_run(tmp_path):
    options = (*SMALL, "checkpoint.keep=false", "resume=auto", "hydra.run.dir=run")
    assert dfl_train(tmp_path, *options).returncode == 0
    run = tmp_path / "run"
    for name in (".result.json.77.new", ".last.pt.new", "last.pt"):
        (run / name).write_bytes(b"half")
    assert dfl_train(tmp_path, *options).returncode == 0
    assert not [path.name for path in run.iterdir() if path.suffix in (".new", ".pt")]
