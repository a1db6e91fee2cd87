"""The README and the reference page agree with the kept runs."""

import itertools
import math
import re
from pathlib import Path

import depth_ladder
import numpy as np
import pandas as pd
import pytest
from claims import MARKS, TOO_FEW, claims, contrast, judged, main, picture, welch
from families import FAMILY_OF
from findings import (
    CLAIMS,
    DECIDED,
    against_dfa,
    claims_table,
    depth_table,
    span_text,
    stability,
    this_paper,
)
from processes import dfl_train
from reference import (
    at_epochs,
    page,
    readme,
    runs_of_figure,
    significant_after_holm,
    without_first_epochs,
    without_published,
)
from scipy import stats
from stability_map import COLUMN, best_rates, figure

from dfl_experiments.configuration.composition import group_options
from dfl_experiments.report.document import csv_of
from dfl_experiments.report.frame import runs
from dfl_experiments.report.tables import sections

ROOT = Path(__file__).resolve().parents[2]
KEPT = Path("outputs/reference")


@pytest.fixture(scope="module")
def kept():
    return runs(ROOT / KEPT)


@pytest.fixture(scope="module")
def verdicts(kept):
    return claims(without_first_epochs(kept))


def test_readme_and_reference_page_agree_with_the_kept_runs(verdicts, monkeypatch):
    monkeypatch.chdir(ROOT)
    frame = runs(KEPT)
    parts = sections(without_published(frame))
    text = Path("README.md").read_text()
    assert readme(text, frame, verdicts) == text
    assert (KEPT / "tables.csv").read_text() == csv_of(parts)
    kept_page = (KEPT / "README.md").read_text()
    images = re.compile(r"!\[[^]]*\]\(([^)]*)\)\n\n")
    assert images.sub("", page(frame, parts, verdicts, [])) == images.sub("", kept_page)
    links = [*images.findall(kept_page), *re.findall(r"\]\((outputs/[^)#]*)\)", text)]
    assert len(links) > 10
    assert all((KEPT / link).exists() or (ROOT / link).exists() for link in links)


def test_picture_shows_every_verdict_once(verdicts):
    axes = picture(verdicts).axes[0]
    drawn = [text.get_text() for text in axes.texts]
    for verdict, mark in MARKS.items():
        if verdict != TOO_FEW:
            assert drawn.count(mark) == (verdicts.verdict == verdict).sum()


def test_failing_and_unrankable_settings_have_their_own_verdicts(
    verdicts,
):
    verdict = verdicts.set_index(["claim", "setting"]).verdict
    las_dfa, dfa_shallow = "LAS is more accurate than DFA", "DFA is more accurate than Shallow"
    conv3 = "CIFAR-100, Conv3, 10 epochs, bfloat16, 1 rate"
    mnist = "MNIST, fully connected net, 100 epochs, 2 rates"
    cifar100 = "CIFAR-100, fully connected net, 10 epochs, bfloat16, 1 rate"
    assert verdict[las_dfa, conv3] == "fails at this rate"
    assert verdict[las_dfa, mnist] == "cannot rank"
    assert verdict[dfa_shallow, cifar100] == "contradicted"


def test_welch_s_interval_is_scipy_s_and_a_contrast_of_two_is_welch_s():
    random = np.random.default_rng(0)
    first, second = random.normal(0, 1, 5), random.normal(1, 3, 4)
    test = stats.ttest_ind(first, second, equal_var=False)
    interval = test.confidence_interval(0.95)
    found = welch(first, second)
    assert found[1:] == pytest.approx((interval.low, interval.high, test.pvalue))
    assert contrast([first, second, second, second], [1, -1, 1, -1]).value == pytest.approx(
        found.value
    )
    assert math.isnan(welch(first[:1], second).low)
    equal = np.array([0.97, 0.97, 0.97])  # their variance is 1.8e-32 by rounding, not 0
    assert math.isnan(welch(equal, equal - 0.01).low)


def test_holm_s_method_stops_at_the_first_p_value_above_its_limit():
    assert significant_after_holm(pd.Series([0.04, 0.001, 0.03, 0.016])) == 2
    assert significant_after_holm(pd.Series([0.06, 0.06])) == 0


def test_a_run_that_an_error_or_a_signal_ended_changes_no_verdict(kept):
    is_setting = (kept.dataset == "mnist") & (kept.epochs == 20) & kept.rule.isin(["dfa", "las"])
    setting = kept[is_setting]
    ended = setting[(setting.rule == "las") & (setting.seed == 0)]
    others = []
    for status in ("failed", "interrupted"):
        changed = {"seed": 77, "status": status, "accuracy": math.nan, "has_ended": False}
        others.append(ended.assign(**changed))
    before, after = claims(setting), claims(pd.concat([setting, *others]))
    assert len(before) > 0
    pd.testing.assert_frame_equal(after, before)


def test_a_rule_that_diverges_at_every_rate_fails_its_claims(kept):
    setting = kept[(kept.dataset == "mnist") & (kept.epochs == 20) & kept.rule.isin(["dfa", "las"])]
    is_las = setting.rule == "las"
    lost = {"status": "diverged", "accuracy": math.nan, "score": math.nan, "fails": True}
    diverged = pd.concat([setting[~is_las], setting[is_las].assign(**lost)])
    before, after = claims(setting), claims(diverged)
    assert set(before.claim) == set(after.claim) > set()
    assert (after.verdict == "fails at this rate").all()


def test_methods_of_the_paper_s_protocol_are_compared_although_only_dfa_has_an_option(verdicts):
    paper = verdicts[verdicts.setting.str.contains("protocol paper")]
    assert {"LAS is more accurate than DFA", "LTAS aligns better with BP than DFA"} <= set(
        paper.claim
    )
    assert (paper.verdict == "supported").all()


@pytest.mark.parametrize(
    ("lead", "spread", "n", "verdict"),
    [
        (0.2, 0.01, 3, "supported"),
        (-0.2, 0.01, 3, "contradicted"),
        (0.01, 0.1, 3, "undecided"),
        (0.2, 0.01, 2, "too few seeds"),
        (0.2, 0.0, 3, "undecided"),  # equal values have no interval
    ],
)
def test_a_verdict_is_whether_the_interval_excludes_zero(lead, spread, n, verdict):
    second = np.linspace(-spread, spread, n)
    claim = judged("claim", "setting", [second + lead, second], "points", "")
    assert (claim["verdict"], claim["n"]) == (verdict, n)


def test_every_rule_has_a_family():
    assert set(FAMILY_OF) == {*group_options("method")}


def test_the_stability_map_marks_each_rate_at_which_a_run_fails(kept):
    frame = kept[kept.folder.str.contains("stability_map")]
    columns = frame.groupby(COLUMN).ngroups
    crosses = 0
    for axes in figure(frame).axes[:columns]:  # the first row of panels shows accuracies
        crosses += sum(len(line.get_xdata()) for line in axes.lines if line.get_marker() == "x")
    failing = frame[frame.fails].groupby([*COLUMN, "rule", "lr"]).ngroups
    assert crosses == failing > 0


def test_collected_sweep_replaces_runs_of_the_same_settings_and_adds_others(tmp_path):
    done = dfl_train(
        tmp_path, "--multirun", "experiment=depth_digits", "method=bp", "seed=0,77", "epochs=1", "model.init=kaiming",
        "model.widths=[32,32]", "optimizer.lr=1e-3", "sweep=he", "tracking=disabled", "threads=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = pd.read_csv(ROOT / KEPT / "depth_digits" / "summary.csv")
    merged = depth_ladder.with_collected(summary, [tmp_path / "outputs" / "he"])
    assert len(merged) == len(summary) + 1
    cell = "init == 'kaiming' and depth == 2 and rule == 'bp' and lr == 1e-3 and seed in (0, 77)"
    assert len(summary.query(cell)) == 1
    assert len(merged.query(cell)) == 2
    assert not set(summary.query(cell).accuracy) & set(merged.query(cell).accuracy)


def test_a_folder_that_is_not_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["depth_ladder.py", "--collect", "nowhere"])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        depth_ladder.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == "depth_ladder.py: error: nowhere: no such folder\n"


def test_table_of_claims_counts_settings_that_a_verdict_decides():
    claim = "DFA is more accurate than Shallow"
    found = ["supported", "supported", "undecided", "fails at this rate", "cannot rank"]
    rows = [{"claim": claim, "verdict": verdict} for verdict in [*found, "contradicted"]]
    table = claims_table(pd.DataFrame(rows)).set_index("the method …")
    assert table.DFA["is more accurate than Shallow"] == "2 of 4"
    assert set(table.LAS) == {""}


def test_depth_table_has_no_difference_where_a_run_fails():
    digits = {"depth": 12, "lr": 1e-3, "validation_accuracy": 0.5, "fails": False}
    rows = []
    for rule in ("bp", "shallow", "dfa", "las", "ltas", "fdfa", "fa"):
        for seed, init in itertools.product(range(3), ("default", "kaiming")):
            accuracy = 0.5 + 0.1 * (init == "kaiming") + 0.01 * seed
            of_run = {"rule": rule, "seed": seed, "init": init, "accuracy": accuracy}
            rows.append(digits | of_run)
    rows[-1]["fails"] = True
    table = depth_table(pd.DataFrame(rows)).set_index("method")
    assert table["He − PyTorch, points"]["BP"] == "+10.00 [+7.73, +12.27]"  # 2.776 · 0.01 · √(2/3)
    assert table["He − PyTorch, points"]["FA"] == "–"


def test_conclusions_in_words_follow_from_the_kept_runs(kept, verdicts):
    judged = verdicts[verdicts.verdict.isin(DECIDED)]
    share = (judged.verdict == "supported").groupby(judged.claim).mean()
    for claim, method in itertools.product(list(CLAIMS.values())[:4], ("LAS", "LTAS")):
        assert share[claim.format(method)] > 0.5
    best = depth_ladder.at_best_rate(pd.read_csv(ROOT / depth_ladder.SUMMARY))
    for rule in ("las", "ltas"):
        accuracy = against_dfa(best, rule, "accuracy")
        assert accuracy.judged > 2 * accuracy.higher
    figure_runs = runs_of_figure(kept)
    fair = at_epochs(figure_runs[figure_runs.protocol == "fair"], ["1"])
    cosine = fair["cosine/1"].mean().unstack("epoch")
    rise = cosine[100].fillna(cosine[12]) - cosine[1]
    product = ["las", "ltas", "dfa", "las, fixed_blocks=2", "ltas, fixed_blocks=2"]
    assert list(rise[product] > 0) == [True, True, False, False, False]
    assert (rise[["dfa, init=default", "las, init=default", "ltas, init=default"]] > 0).all()


def test_span_of_equal_numbers_is_one_number():
    assert span_text(pd.Series([1, 3, 2])) == "1 to 3"
    assert span_text(pd.Series([3, 3])) == "3"


def test_comparison_with_dfa_counts_nets_in_which_both_rules_train():
    rows = []
    for depth, lead in enumerate([0.2, -0.2, 0.0, 0.2]):
        for rule, seed in itertools.product(("las", "dfa", "bp"), range(3)):
            accuracy = 0.5 + lead * (rule == "las") + 0.01 * seed
            rows.append({"init": "default", "depth": depth, "rule": rule, "accuracy": accuracy})
    net = pd.DataFrame(rows).assign(fails=False)
    net.loc[(net.depth == 3) & (net.rule == "dfa"), "fails"] = True
    assert against_dfa(net, "las", "accuracy").to_dict() == {"higher": 1, "lower": 1, "judged": 3}


def test_rates_at_which_a_run_fails_are_named_and_a_rule_that_always_fails_has_no_accuracy(kept):
    of_map = kept[kept.folder.str.contains("stability_map")]
    cifar100 = "CIFAR-100, Conv3: DFA (4e-4, 8e-4), LAS (8e-4), LTAS (2.2e-4, 4e-4, 8e-4)"
    assert cifar100 in stability(of_map)
    assert stability(of_map.assign(fails=False)).endswith(": none.")
    is_las = (of_map.rule == "las") & (of_map.model == "conv3")
    table = best_rates(of_map.assign(fails=of_map.fails | is_las))
    las = table.loc["las"]
    assert las["CIFAR-10, Conv3"] == las["CIFAR-100, Conv3"] == "fails"
    assert las["CIFAR-10, Conv3+BN"] == "70.5 ± 0.3 (8e-4)"


def test_our_accuracies_in_the_paper_s_tables_are_of_one_protocol_and_of_rules_that_train(kept):
    of_table = kept[kept.folder.str.contains("fc_table") & (kept.epochs == 100)]
    of_paper = of_table.assign(protocol="paper", accuracy=0.0, score=0.0)
    text = this_paper(of_table)
    assert "BP 98.48 (98.62)" in text
    assert this_paper(pd.concat([of_table, of_paper], ignore_index=True)) == text
    failing = of_table.assign(fails=of_table.fails | (of_table.rule == "bp"))
    assert "BP fails (98.62), Shallow 98.48 (98.62)" in this_paper(failing)
    two_seeds = this_paper(of_table[of_table.seed < 2])
    assert two_seeds.startswith("0 of the paper's 69 accuracies")
    assert two_seeds.endswith("brackets.")


def test_runs_without_a_claim_give_empty_tables(kept, monkeypatch, capsys):
    run = kept.folder[kept.rule == "fa"].iloc[0]
    monkeypatch.setattr("sys.argv", ["claims.py", run])
    main()
    assert "| claim   | setting   | n   | found   | verdict   |" in capsys.readouterr().out
