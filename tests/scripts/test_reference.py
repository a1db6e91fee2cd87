"""What the README and the reference page say is what the kept runs say."""

import re
from pathlib import Path

import pytest
from claims import MARKS, TOO_FEW, claims, counts, picture
from reference import page, readme

from dfl_experiments.report.dfl_report import csv_of
from dfl_experiments.report.frame import runs

ROOT = Path(__file__).resolve().parents[2]
KEPT = Path("outputs/reference")


@pytest.fixture(scope="module")
def kept():
    return runs(ROOT / KEPT)


@pytest.fixture(scope="module")
def verdicts(kept):
    return claims(kept)


def test_the_readme_and_the_reference_page_are_made_of_the_kept_runs(verdicts, monkeypatch):
    monkeypatch.chdir(ROOT)
    frame = runs(KEPT)
    text = Path("README.md").read_text()
    assert readme(text, verdicts) == text
    assert (KEPT / "tables.csv").read_text() == csv_of(frame)
    kept_page = (KEPT / "README.md").read_text()
    images = re.compile(r"!\[[^]]*\]\(([^)]*)\)\n\n")
    assert images.sub("", page(frame, verdicts, KEPT, [])) == images.sub("", kept_page)
    links = [*images.findall(kept_page), *re.findall(r"\]\((outputs/[^)#]*)\)", text)]
    assert len(links) > 10
    assert all((KEPT / link).exists() or (ROOT / link).exists() for link in links)


def test_the_picture_shows_every_verdict_once_and_no_other(verdicts):
    axes = picture(verdicts).axes[0]
    drawn = [text.get_text() for text in axes.texts]
    totals = counts(verdicts).sum()
    for verdict, mark in MARKS.items():
        if verdict != TOO_FEW:
            assert drawn.count(mark) == (verdicts.verdict == verdict).sum() == totals.get(verdict, 0)


def test_a_claim_with_a_failing_side_has_that_verdict_and_one_that_nothing_can_rank_another(verdicts):
    conv3 = "CIFAR-100, Conv3, 10 epochs, bfloat16, model.channels=[96,128,256], model.widths=[2048,2048]"
    by_place = verdicts.set_index(["claim", "setting"]).verdict
    assert by_place["LAS is more accurate than DFA", conv3] == "fails at this rate"
    assert by_place["LAS is more accurate than DFA", "MNIST, fully connected net, 100 epochs"] == "cannot rank"
    assert (
        by_place["DFA is more accurate than Shallow", "CIFAR-100, fully connected net, 10 epochs, bfloat16"]
        == "contradicted"
    )
