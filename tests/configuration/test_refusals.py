"""Every mistake on the command line is refused by name, with the choices, before anything runs or is written."""

import shlex
import sys

import pytest
from processes import dfl_train
from refused import REFUSED

from dfl_experiments.train import main

pytestmark = pytest.mark.usefixtures("clean_logging")


def refusal(arguments, monkeypatch, capsys):
    """Return what `dfl-train` prints on stderr when it refuses these arguments."""
    monkeypatch.setattr(sys, "argv", ["dfl-train", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    printed, said = capsys.readouterr()
    assert "Traceback" not in said
    assert "points" not in printed  # no summary of what never began
    return said


@pytest.mark.parametrize("arguments", REFUSED)
def test_bad_input_is_refused_by_name_and_nothing_is_written(
    arguments, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    said = refusal(shlex.split(arguments), monkeypatch, capsys)
    assert [part for part in REFUSED[arguments] if part not in said] == []
    assert (len(said) < 3000, said.count("\n")) == (True, 1)
    assert not list(tmp_path.iterdir())


def test_no_hint_leads_to_the_next_refusal(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = refusal(["optimizer=sgd", "optimizer.betas=[0.9,0.99]"], monkeypatch, capsys)
    assert said.startswith("dfl-train: error: optimizer.betas: no such option; there are lr, ")
    # an option with this name in another group is what was meant
    said = refusal(["schedule.lr=0.1"], monkeypatch, capsys)
    assert "did you mean optimizer.lr?" in said


def test_a_refusal_from_the_shell_is_one_line_and_an_exit_code(tmp_path):
    done = dfl_train(tmp_path, "optimizer.lr=abc", environment={})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "dfl-train: error: optimizer.lr='abc': input should be a valid number\n"
