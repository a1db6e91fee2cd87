"""Every mistake on the command line is one line naming it and the choices, before anything runs or is written."""

import shlex
import sys

import pytest
from processes import dfl_train
from refused_values import GROUPS, VALUES
from refused_words import HYDRA, SYNTAX, TARGETS

from dfl_experiments.train import main

REFUSED = VALUES | GROUPS | SYNTAX | TARGETS | HYDRA


def refusal(arguments, monkeypatch, capsys):
    """The one line that `dfl-train` ends with, given these arguments."""
    monkeypatch.setattr(sys, "argv", ["dfl-train", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("dfl-train: error: ")
    return line


def test_the_table_is_long_and_no_two_of_its_lines_are_alike():
    assert len({" ".join(shlex.split(arguments)) for arguments in REFUSED}) >= 200


@pytest.mark.parametrize("arguments", REFUSED)
def test_bad_input_is_one_line_that_names_it_and_nothing_is_written(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = refusal(shlex.split(arguments), monkeypatch, capsys)
    assert [part for part in REFUSED[arguments] if part not in line] == []
    assert len(line) < 2000
    assert not list(tmp_path.iterdir())


def test_a_refusal_from_the_shell_has_an_exit_code_and_no_traceback(tmp_path):
    done = dfl_train(tmp_path, "optimizer.lr=abc")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "dfl-train: error: optimizer.lr='abc': input should be a valid number\n"
    full = dfl_train(tmp_path, "optimizer.lr=abc", environment={"HYDRA_FULL_ERROR": "1"})
    assert full.returncode != 0
    assert "Traceback" in full.stderr
