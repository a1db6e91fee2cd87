"""Texts from somebody else's files are shown as texts: nothing that reads a report obeys them."""

import csv
import io
import re
import subprocess

import pytest
from report_helpers import altered, dfl_report

from dfl_experiments.running.run_directory import csv_text

FORMULA = "=HYPERLINK(1)"
HOSTILE = {
    "a line break": {"loss": "x\ntouch here\n#"},
    "a terminal's escapes": {"loss": "\x1b]0;title\x07\x1b[2J\x9b31m\u202e"},
    "a formula": {"loss": FORMULA, "method": {"name": "las", "=1+1": "+1+1", "@x": "-1+1"}},
    "HTML": {"loss": "<img src=x onerror=alert(1)>", "precision": "<script>alert(1)</script>"},
    "Markdown": {"loss": "![x](http://example.org) | `a` | **b** | [c][d] _e_"},
    "mathematics": {"loss": "$\\frac{$ $x_{$"},
    "a key of Hydra's": {"hydra/callbacks": {"mine": {"_target_": "os.system", "command": "touch here"}}},
    "a key with a line break": {"mine\ntouch here\n": 1, "alignment": {"every": 1, "x\ntouch here": 1}},
    "a substitution": {"loss": "$(touch here)`touch here`'; touch here; '"},
}
NUMBER = re.compile(r"[+-]\d+(\.\d+)?")


@pytest.fixture(params=HOSTILE)
def hostile(request, finished_point, tmp_path):
    """A folder with a run whose files hold such texts."""
    said = {"device": FORMULA + "\n\x1b[2J", "data": "<b>x</b>\n", "git_commit": "\x1b[2J"}
    altered(finished_point, tmp_path / "foreign", HOSTILE[request.param], **said)
    return tmp_path


def printed(folder, *arguments):
    done = dfl_report(folder, "foreign", *arguments)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).replace("\n", "").isprintable()
    return done.stdout


def test_no_shell_and_no_terminal_obeys_a_foreign_text(hostile):
    assert "here" not in [line.split(" ")[0] for line in printed(hostile).splitlines()]
    commands = printed(hostile, "--format", "commands")
    assert all(line.startswith(("# ", "dfl-train ")) for line in commands.splitlines() if line)
    assert "hydra" not in "".join(line for line in commands.splitlines() if not line.startswith("#"))
    script = f"dfl_train() {{ :; }}\n{commands.replace('dfl-train', 'dfl_train')}"
    subprocess.run(["sh", "-c", script], cwd=hostile, check=True)
    assert [path.name for path in hostile.iterdir()] == ["foreign"]


def test_no_spreadsheet_obeys_a_foreign_text(hostile):
    printed(hostile, "--figures", "figures")
    texts = [printed(hostile, "--format", "csv"), printed(hostile, "--across", "loss", "--format", "csv")]
    texts += [path.read_text() for path in (hostile / "figures").glob("*.csv")]
    assert len(texts) > 3
    for text in texts:
        for row in csv.reader(io.StringIO(text)):
            assert [cell for cell in row if cell[:1] in set("=+-@") and not NUMBER.fullmatch(cell)] == []


def test_a_number_is_no_formula():
    cells = ["-0.3", "+1e-5", -0.3, "=1", "-x", "+1+1", "@a", "a=b"]
    assert csv_text([cells]) == "-0.3,+1e-5,-0.3,'=1,'-x,'+1+1,'@a,a=b\n"


def test_no_page_obeys_a_foreign_text(hostile):
    for arguments in (("--format", "markdown"), ("--across", "loss", "--format", "markdown")):
        text = printed(hostile, *arguments)
        for syntax in ("<", "`", "**b", "](", "][", " _e"):
            assert not re.search(rf"(?<!\\){re.escape(syntax)}", text)
        tables = [line for line in text.splitlines() if line.startswith("|")]
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in tables}
        assert len(columns) <= 3  # of each table's lines the same number
    page = dfl_report(hostile, "foreign", "--format", "html")
    assert page.returncode == 0
    text = (hostile / "report.html").read_text()
    assert not re.search(r"<img src=x|<script>alert|<b>x", text)
