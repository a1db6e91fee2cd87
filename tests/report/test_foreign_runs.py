"""Foreign run directories: invalid ones are named and left out, and their texts are escaped."""

import re
import subprocess

import pytest
from report_helpers import altered, dfl_report, finished

from dfl_experiments.report.frame import runs

HARMLESS = {
    "an incomplete last row": lambda table: table.write_text(table.read_text() + "4,9.1e-"),
    "no table": lambda table: table.unlink(),
}
FOREIGN = {
    "a number for a group": ({"dataset": 3}, {}),
    "an interpolation": ({"dataset.name": "${foo.bar}"}, {}),
    "a script for a name": ({"method.name": "<!--<script>"}, {}),
    "a list for a status": ({}, {"status": ["finished"]}),
    "an accuracy of 98 %": ({}, {"accuracy": 98.0}),
    "a number for cosines": ({}, {"cosine": 1}),
    "no learning rate": ({"optimizer": {"name": "adam"}}, {}),
    "no epochs": ({"epochs": None}, {}),
    "a word for a seed": ({"seed": "one"}, {}),
}


@pytest.mark.parametrize("change", HARMLESS)
def test_partial_last_row_and_missing_table_are_accepted(change, finished_point, tmp_path):
    altered(finished_point, tmp_path / "runs" / "good", **finished(0.9, 1e-3, 0))
    changed = altered(finished_point, tmp_path / "runs" / "changed", **finished(0.9, 1e-3, 1))
    HARMLESS[change](changed / "epochs.csv")
    done = dfl_report(tmp_path, "runs", "--format", "html")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("what", FOREIGN)
def test_invalid_run_directory_is_named_and_left_out(what, finished_point, tmp_path):
    altered(finished_point, tmp_path / "runs" / "good", **finished(0.9, 1e-3, 0))
    config, result = FOREIGN[what]
    altered(finished_point, tmp_path / "runs" / "bad", {"seed": 1, **config}, **result)
    done = dfl_report(tmp_path, "runs", "--format", "html")
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("dfl-report: left out: runs/bad (")


def test_weight_decay_none_is_zero(finished_point, tmp_path):
    altered(finished_point, tmp_path / "a", {"optimizer.weight_decay": None})
    assert list(runs(tmp_path).weight_decay) == [0.0]


FORMULA = "=HYPERLINK(1)"
HOSTILE = {
    "loss": "x\ntouch here\n#",
    "precision": "<script>alert(1)</script>",
    "escapes": "\x1b]0;title\x07\x1b[2J\x9b31m\u202e",
    "formula": FORMULA,
    "method": {"name": "las", "=1+1": "+1+1", "@x": "-1+1"},
    "html": "<img src=x onerror=alert(1)>",
    "markdown": "![x](http://example.org) | `a` | **b** | [c][d] _e_",
    "mathematics": "$\\frac{$ $x_{$",
    "hydra/callbacks": {"mine": {"_target_": "os.system", "command": "touch here"}},
    "mine\ntouch here\n": 1,
    "alignment": {"every": 1, "x\ntouch here": 1},
    "substitution": "$(touch here)`touch here`'; touch here; '",
}


@pytest.fixture
def hostile(finished_point, tmp_path):
    """Return a folder with a run whose files contain these texts."""
    result = {"device": FORMULA + "\n\x1b[2J", "data": "<b>x</b>\n", "git_commit": "\x1b[2J"}
    altered(finished_point, tmp_path / "foreign" / "run", HOSTILE, **result)
    return tmp_path


def printed(folder, *arguments):
    done = dfl_report(folder, "foreign", *arguments)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).replace("\n", "").isprintable()
    return done.stdout


def test_foreign_text_is_escaped_for_shell_and_terminal(hostile):
    assert "here" not in [line.split(" ")[0] for line in printed(hostile).splitlines()]
    commands = printed(hostile, "--format", "commands")
    assert all(line.startswith("dfl-train repeat=") for line in commands.splitlines())
    script = f"dfl_train() {{ :; }}\n{commands.replace('dfl-train', 'dfl_train')}"
    subprocess.run(["sh", "-c", script], cwd=hostile, check=True)
    assert [path.name for path in hostile.iterdir()] == ["foreign"]


def test_foreign_text_is_escaped_in_markdown_and_html(hostile, finished_point):
    altered(
        finished_point, hostile / "foreign" / "usual"
    )  # the report shows what differs between the two
    printed(hostile, "--figures", "figures")
    text = printed(hostile, "--format", "markdown").partition("## How the numbers")[0]
    for syntax in ("<", "`", "**b", "](", "][", " _e"):
        assert not re.search(rf"(?<!\\){re.escape(syntax)}", text)
    page = dfl_report(hostile, "foreign", "--format", "html")
    assert page.returncode == 0
    text = (hostile / "report.html").read_text()
    assert not re.search(r"<img src=x|<script>alert|<b>x", text)
