"""What the README and the reference page say is what the kept runs say."""

import re
from pathlib import Path

from reference import beside, readme

from dfl_experiments.report import tables
from dfl_experiments.report.cells import sections
from dfl_experiments.report.runs import read_runs

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "outputs" / "reference"
IMAGE = re.compile(r"\n!\[[^]]*\]\(([^)]*)\)\n")


def test_the_readme_and_the_reference_page_are_made_of_the_kept_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = sections(read_runs([Path("outputs/reference")]))
    text = (ROOT / "README.md").read_text()
    assert readme(text, found) == text
    assert (KEPT / "tables.csv").read_text() == tables.as_csv(found)
    page = (KEPT / "README.md").read_text()
    for words in (tables.answers(found, "github"), tables.as_text(found, "github")):
        assert words.strip() in IMAGE.sub("", page)
    assert page.endswith(beside(found))
    shown = [*IMAGE.findall(page), *re.findall(r"\]\((outputs/[^)]*)\)", text)]
    assert len(shown) > 10
    assert all((KEPT / link).exists() or (ROOT / link).exists() for link in shown)
