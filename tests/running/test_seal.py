"""A file that is not what its run left changes no number: the run is refused or left out, in a line that names it."""

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


def without_a_seal(run):
    content = json.loads((run / "result.json").read_text())
    del content["seal"]
    (run / "result.json").write_text(json.dumps(content))


def left_out(folder, name):
    done = dfl_report(folder, "run", "--format", "csv")
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
    line, _ = done.stderr.splitlines()
    return line.startswith("dfl-report: left out: run (") and name in line


def is_same_json(text, other):
    """Return whether two texts are JSON with the same values. A number that begins with 0 is not valid JSON."""
    try:
        return json.loads(text) == json.loads(other)
    except json.JSONDecodeError:
        return False


@pytest.mark.parametrize("name", FILES)
def test_an_altered_digit_in_a_sealed_file_is_refused_by_every_reader(name, run):
    place = random.Random(name)
    whole = (run / name).read_text()
    digits = [index for index, character in enumerate(whole) if character.isdigit()]
    for index in place.sample(digits, 30):
        other = (int(whole[index]) + place.randint(1, 9)) % 10
        text = f"{whole[:index]}{other}{whole[index + 1 :]}"
        if name == "result.json" and is_same_json(text, whole):
            continue  # a digit behind those that a number keeps
        (run / name).write_text(text)
        with pytest.raises(UserError, match=rf"run/{name}: "):
            read_result(run)
    (run / name).write_text(whole.replace("0.0", "0.7", 1))
    assert left_out(run.parent, name)
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


def test_runs_are_not_kept_in_place_of_themselves(run):
    before = (run / "epochs.csv").read_bytes(), (run / "result.json").read_bytes()
    command = [sys.executable, str(SCRIPTS / "keep_results.py"), run.parent, f"{run}/.."]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is the source; choose another folder for the copies" in done.stderr
    assert before == ((run / "epochs.csv").read_bytes(), (run / "result.json").read_bytes())


def test_a_file_that_was_not_kept_is_no_damage(run):
    before = dfl_report(run.parent, "run", "--format", "csv").stdout
    for name in ("iterations.csv", "epochs.csv", "config.yaml"):
        (run / name).unlink()
        assert dfl_report(run.parent, "run", "--format", "csv").stdout == before


def test_a_byte_order_mark_does_not_make_a_finished_run_another(run):
    (run / "result.json").write_bytes(b"\xef\xbb\xbf" + (run / "result.json").read_bytes())
    assert read_result(run)["status"] == "finished"


WRONG_TABLES = {
    "a cosine that is no number": lambda text: text.replace(
        text.splitlines()[1].split(",")[9], "high"
    ),
    "a cell too many": lambda text: text.replace("\n2,", ",1\n2,"),
    "a row too few": lambda text: "".join(text.splitlines(keepends=True)[:-1]),
    "a row twice": lambda text: text + text.splitlines(keepends=True)[-1],
    "half a row": lambda text: text[:-9],
}


@pytest.mark.parametrize("what", WRONG_TABLES)
def test_a_table_that_no_run_writes_is_left_out_without_a_seal_too(what, run):
    without_a_seal(run)
    assert dfl_report(run.parent, "run").returncode == 0
    table = run / "epochs.csv"
    table.write_text(WRONG_TABLES[what](table.read_text()))
    assert left_out(run.parent, "epochs.csv")


WRONG_RESULTS = {
    "a cosine of -7": {"cosine": {"1": -7.0}},
    "a best accuracy below the last": {
        "test_accuracy": {"last": 0.9, "best": 0.1, "best_epoch": 1}
    },
    "a best epoch that is none": {"test_accuracy": {"last": 0.9, "best": 0.9, "best_epoch": 4}},
    "an accuracy of its own": {"accuracy": 0.123},
    "epochs that are missing": {"epochs": 2},
}


@pytest.mark.parametrize("what", WRONG_RESULTS)
def test_a_result_that_contradicts_itself_is_left_out_without_a_seal_too(what, run):
    without_a_seal(run)
    content = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(content | WRONG_RESULTS[what]))
    assert left_out(run.parent, "result.json")


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
@pytest.mark.parametrize("name", [*FILES, ".running"])
def test_what_is_no_file_is_left_out_and_never_waited_at(name, kind, run):
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
    assert left_out(run.parent, name)


def test_every_column_that_a_run_writes_is_read(tmp_path):
    columns = epoch_columns(3, [*EXTRA_QUANTITIES])
    table = Table(tmp_path / "epochs.csv", columns)
    table.extend(
        dict.fromkeys(columns, 0.5) | {"epoch": epoch, "test_loss": float("inf")}
        for epoch in (1, 2)
    )
    found = read_epochs(tmp_path, {"status": "diverged", "epochs": 2})
    assert [*found] == columns
    assert found["test_loss"] == [None, None]


def test_a_flipped_bit_of_a_checkpoint_is_never_trained_on(run):
    whole = (run / "last.pt").read_bytes()
    place = random.Random(0)
    for _ in range(100):
        content = bytearray(whole)
        content[place.randrange(len(content))] ^= 1 << place.randrange(8)
        (run / "last.pt").write_bytes(content)
        with pytest.raises(UserError, match=r"last\.pt: is damaged"):
            checkpoint.read_checkpoint(run / "last.pt")


def test_a_table_that_is_not_as_the_checkpoint_left_it_is_not_gone_on_with(run):
    (run / "result.json").unlink()
    table = run / "iterations.csv"
    table.write_bytes(table.read_bytes().replace(b"0.0", b"0.7", 1))
    done = dfl_train(run.parent, "resume=run")
    assert done.returncode == 2
    assert "iterations.csv: missing, or changed since the checkpoint" in done.stderr
    assert (
        not (run / "result.json").exists()
        or json.loads((run / "result.json").read_text())["status"] == "failed"
    )


def test_what_a_kill_leaves_is_removed_by_the_next_start(tmp_path):
    options = (*SMALL, "checkpoint.keep=false", "resume=auto", "hydra.run.dir=run")
    assert dfl_train(tmp_path, *options).returncode == 0
    run = tmp_path / "run"
    for name in (".result.json.77.new", ".last.pt.new", "last.pt"):
        (run / name).write_bytes(b"half")
    assert dfl_train(tmp_path, *options).returncode == 0
    assert not [path.name for path in run.iterdir() if path.suffix in (".new", ".pt")]
