"""Every mistake on the command line is refused by name, with the choices, before anything runs or is written."""

import shlex
import sys

import pytest
from processes import dfl_train
from refused import REFUSED

from dfl_experiments.configuration.refusals import EXTRAS
from dfl_experiments.errors import clipped
from dfl_experiments.train import main

pytestmark = pytest.mark.usefixtures("clean_logging")


def refusal(arguments, monkeypatch, capsys):
    """Return what `dfl-train` prints on stderr when it refuses these arguments."""
    monkeypatch.setattr(sys, "argv", ["dfl-train", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert "points" not in out  # no summary of a sweep that has not started
    return err


@pytest.mark.parametrize("arguments", REFUSED)
def test_bad_input_is_refused_by_name_and_nothing_is_written(
    arguments, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    error = refusal(shlex.split(arguments), monkeypatch, capsys)
    for words in REFUSED[arguments]:
        assert words in error
    assert error.count("\n") == 1
    assert len(error) < 3000
    assert not list(tmp_path.iterdir())


def test_hints_name_only_valid_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    error = refusal(["optimizer=sgd", "optimizer.betas=[0.9,0.99]"], monkeypatch, capsys)
    assert error.startswith("dfl-train: error: optimizer.betas: no such option; there are lr, ")
    assert "constructor" not in error  # SGD's constructor has no betas either
    error = refusal(["schedule.lr=0.1"], monkeypatch, capsys)
    assert "did you mean optimizer.lr?" in error  # the option exists in another group


def test_option_of_a_swept_group_need_not_exist_in_the_default_option(
    tmp_path, monkeypatch, capsys
):
    """The default method, LAS, has no option `top`."""
    monkeypatch.chdir(tmp_path)
    grid = ["--multirun", "--dry-run", "method=dfa,sdfa", "method.top=direct", "epochs=1"]
    monkeypatch.setattr(sys, "argv", ["dfl-train", *grid])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert "2 of 2 to train" in capsys.readouterr().out


def test_unknown_option_of_a_swept_group_is_refused_with_its_job(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    error = refusal(["--multirun", "method=dfa,fa", "method.top=direct"], monkeypatch, capsys)
    assert "method.top: no such option; there are init (in the job method=fa " in error


def test_suggestion_replaces_a_long_list_of_keys(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    error = refusal(["methd=dfa"], monkeypatch, capsys)
    assert error == "dfl-train: error: methd: no such option; did you mean method?\n"


def test_missing_launcher_is_named_with_its_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(EXTRAS, "absent", "slurm")
    error = refusal(["--multirun", "hydra/launcher=absent"], monkeypatch, capsys)
    assert error.endswith(
        "hydra/launcher=absent: not installed; in the project's folder run pip install -e '.[slurm]'\n"
    )


def test_refusal_from_the_shell_is_one_line_with_exit_code_2(tmp_path):
    done = dfl_train(tmp_path, "optimizer.lr=abc", environment={})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "dfl-train: error: optimizer.lr='abc': input should be a valid number\n"


def test_long_message_keeps_whole_words_and_its_end():
    words = [f"word{number}" for number in range(100)]
    start, end = clipped(" ".join(words), 100).split(" … ")
    assert set(start.split() + end.split()) <= set(words)
    assert (start.split()[0], end.split()[-1]) == ("word0", "word99")
    assert len(start) + len(end) <= 100
