"""Comparisons: intervals from known numbers, depth utility, and the cosines that are shown."""

import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dfl_experiments.report import compare
from dfl_experiments.report.compare import (
    critical_value,
    dunnett,
    fieller,
)
from dfl_experiments.report.frame import ROW, runs
from dfl_experiments.report.style import method_name
from dfl_experiments.report.tables import answer, details, sections

ROOT = Path(__file__).resolve().parents[2]
RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def kept():
    return runs(ROOT / "outputs" / "reference")


@pytest.mark.parametrize(
    ("method", "difference", "low", "high"),
    [
        ("sdfa", -0.50, -0.72, -0.28), ("fa", -0.41, -0.63, -0.19), ("shallow", -0.31, -0.53, -0.09),
        ("dfa", -0.28, -0.50, -0.06), ("las", -0.07, -0.29, 0.15), ("ltas", 0.02, -0.20, 0.24),
    ],
)  # fmt: skip
def test_dunnett_intervals_on_mnist_equal_the_published_ones(kept, method, difference, low, high):
    at_rate = kept[(kept.dataset == "mnist") & (kept.epochs == 20) & (kept.lr == 1e-3)]
    row = compare.against(at_rate, "bp").set_index("method").loc[method]
    assert 100 * row.difference == pytest.approx(difference, abs=0.006)
    assert (100 * row.low, 100 * row.high) == pytest.approx((low, high), abs=0.012)
    assert row.test == "Dunnett"


def test_caption_names_the_methods_that_differ_significantly(kept):
    two_rates = kept[(kept.dataset == "mnist") & (kept.epochs == 20) & (kept.lr != 3e-4)]
    (section,) = sections(two_rates)
    rows = compare.against(section.chosen, "dfa").set_index("method")
    differing = rows.index[(rows.low > 0) | (rows.high < 0)]
    names = re.search(r"Significantly different from DFA: (.*?)\.", answer(section).caption)[1]
    assert set(names.split(", ")) == {method_name(method) for method in differing}
    assert {"las", "ltas"} <= set(differing)
    assert "Significantly" not in answer(section).only("dfa").caption  # a card shows one rule


def test_grid_points_of_a_long_search_are_rows_of_the_table_of_rates(kept):
    run = kept[(kept.rule == "las") & (kept.dataset == "mnist") & (kept.epochs == 20)].iloc[:1]
    rates = [10**-k for k in range(9)]
    searched = pd.concat([run.assign(lr=lr, accuracy=0.9, seed=7) for lr in rates])
    (section,) = sections(searched.reset_index(drop=True))
    (table, *_) = details(section)
    assert table.title == "Rates"
    assert list(table.frame.columns) == ["method", "lr", "accuracy, %"]
    assert list(table.frame.lr) == [f"{lr:g}" for lr in sorted(rates)]
    assert set(table.frame["accuracy, %"]) == {"90.00 (1)"}


def test_dunnett_interval_equals_scipy():
    bp, dfa, las = (RANDOM.normal(shift, 1, 4) for shift in (0, 1, 2))
    result = stats.dunnett(dfa, las, control=bp, rng=np.random.default_rng(1))
    expected = result.confidence_interval(0.95)
    comparison = dunnett({"bp": bp, "dfa": dfa, "las": las}, "bp")
    for index, name in enumerate(("dfa", "las")):
        estimate, _ = comparison[name]
        assert estimate.low == pytest.approx(expected.low[index], abs=0.01)
        assert estimate.high == pytest.approx(expected.high[index], abs=0.01)


def test_critical_value_for_one_rule_is_that_of_student_t():
    assert critical_value((5,), 5) == pytest.approx(stats.t.ppf(0.975, 8), abs=2e-3)


def test_rules_with_another_variance_or_too_few_seeds_are_not_in_dunnetts_test():
    few = {"bp": np.array([0.9, 0.91]), "dfa": np.array([0.8, 0.82]), "las": np.array([0.85])}
    # 2 degrees of freedom are too few for an interval
    assert all(math.isnan(estimate.low) for estimate, _ in dunnett(few, "bp").values())
    steady = {name: np.array([0.9, 0.901, 0.902]) for name in ("bp", "dfa", "las", "ltas")}
    found = dunnett(steady | {"fa": np.array([0.5, 0.7, 0.9]), "kp": np.array([0.9])}, "bp")
    assert {method: test for method, (_, test) in found.items()} == {
        "dfa": "Dunnett", "las": "Dunnett", "ltas": "Dunnett", "fa": "Welch", "kp": "",
    }  # fmt: skip
    interval = stats.ttest_ind([0.5, 0.7, 0.9], steady["bp"], equal_var=False).confidence_interval()
    assert (found["fa"][0].low, found["fa"][0].high) == pytest.approx(tuple(interval))
    spread = dunnett(steady | {"fa": np.array([0.5, 0.7, 0.9])}, "fa")
    assert {test for _, test in spread.values()} == {
        "Welch"
    }  # the control itself has another variance
    equal = {name: np.array([0.97, 0.97, 0.97]) for name in ("bp", "dfa", "las", "ltas")}
    assert all(math.isnan(estimate.low) for estimate, _ in dunnett(equal, "bp").values())


def test_fieller_s_limits_are_where_the_ratio_is_just_not_rejected():
    groups = [RANDOM.normal(mean, 0.4, 4) for mean in (95.0, 97.0, 92.0)]
    values, bp, shallow = groups
    pool = compare.pooled({"las": values, "bp": bp, "shallow": shallow})
    found = fieller(values, bp, shallow, pool)
    variance, degrees = pool.variance, pool.degrees
    t = stats.t.ppf(0.975, degrees)
    for limit in (found.low, found.high):
        difference = values.mean() - shallow.mean() - limit * (bp.mean() - shallow.mean())
        error = math.sqrt(variance * (1 / 4 + limit**2 / 4 + (1 - limit) ** 2 / 4))
        assert abs(difference) / error == pytest.approx(t)
    assert found.low < found.value < found.high


def test_depth_utility_is_1_for_bp_and_0_for_shallow_and_none_where_nothing_can_be_ranked(kept):
    frame = compare.depth_utility(kept[(kept.epochs == 10) & (kept.lr == 1e-4)])
    cifar100 = (
        frame[(frame.dataset == "cifar100") & (frame.model == "fc")].set_index("method").utility
    )
    assert cifar100["las"] == pytest.approx((31.15 - 24.98) / (31.96 - 24.98), abs=2e-3)
    assert cifar100["dfa"] < 0 < cifar100["ltas"] < cifar100["las"] < 1
    on_conv3 = frame[(frame.dataset == "cifar100") & (frame.model == "conv3")]
    assert set(on_conv3.method) == {"las"}  # DFA and LTAS fail there
    mnist = compare.depth_utility(
        kept[(kept.dataset == "mnist") & (kept.epochs == 100) & (kept.lr == 1e-3)]
    )
    assert not mnist.ranks.any()
    assert mnist.utility.isna().all()


def test_method_with_a_large_spread_does_not_change_the_utility_of_the_others():
    """DFA's standard deviation is over 3 × that of the others, so the pooled variance leaves it out."""
    accuracies = {
        "bp": [0.950, 0.951, 0.952],
        "shallow": [0.900, 0.901, 0.902],
        "las": [0.930, 0.931, 0.932],
        "dfa": [0.70, 0.95, 0.82],
    }
    rows = []
    for method, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            columns = {"method": method, "rule": method, "seed": seed, "accuracy": accuracy}
            rows.append(point(**columns, test_images=10_000.0))
    frame = pd.concat(rows, ignore_index=True)
    with_dfa = compare.depth_utility(frame).set_index("method")
    alone = compare.depth_utility(frame[frame.method != "dfa"]).set_index("method")
    assert with_dfa.ranks.all()
    assert with_dfa.utility["las"] == pytest.approx(0.6)
    assert list(with_dfa.loc["las"]) == pytest.approx(list(alone.loc["las"]))
    assert math.isnan(with_dfa.low["dfa"])


def test_single_runs_must_differ_by_three_noise_floors_to_rank():
    floor = compare.noise_floor(0.9, 10_000)
    assert floor == pytest.approx(0.003)
    for lead, ranks in ((2.9 * floor, False), (3.1 * floor, True)):
        samples = {"bp": np.array([0.9]), "shallow": np.array([0.9 - lead])}
        assert compare.can_rank(samples, 10_000) is ranks


def point(**columns):
    """Return a frame with one run of DFA."""
    row = dict.fromkeys(ROW, "") | {
        "smoke": False,
        "epochs": 2,
        "method": "dfa",
        "rule": "dfa",
        "lr": 1e-3,
        "weight_decay": 0.0,
        "seed": 0,
        "status": "finished",
        "fails": False,
        "exact_layers": ("2",),
        "done_epochs": 2,
        "images_per_second": 100.0,
        "seconds": 4.0,
        "measured_every": 2,
        "images_per_batch": 10,
        "cosine/1": 0.3,
        "cosine/2": 1.0,
    }
    return pd.DataFrame([row | columns])


@pytest.mark.parametrize(
    ("zeros", "every", "cosine"), [(49.0, 2, 0.3), (51.0, 2, None), (4.0, 30, 0.3), (6.0, 30, None)]
)
def test_cosine_is_hidden_if_most_samples_have_no_signal(zeros, every, cosine):
    """An epoch has 20 batches of 10 images. In the second epoch 10 batches or 1 batch are measured."""
    frame = point(**{"zeros/1": zeros, "measured_every": every})
    (row,) = compare.alignment(frame).to_dict("records")
    if cosine is None:
        assert row["no_signal"] == "1"
        assert math.isnan(row["cosine/1"])
    else:
        assert row["no_signal"] == ""
        assert row["cosine/1"] == cosine
    assert math.isnan(row["cosine/2"])  # this layer's signal equals BP's by construction


def test_n_of_a_cosine_counts_only_runs_that_measured_it():
    unmeasured = point(**{"seed": 1, "folder": "b", "measured_every": 0, "cosine/1": math.nan})
    runs = pd.concat([point(seed=0, folder="a"), unmeasured], ignore_index=True)
    assert compare.alignment(runs).n.tolist() == [1]


@pytest.mark.parametrize("change", [{"rule": "bp"}, {"rule": "shallow"}, {"fails": True}])
def test_alignment_leaves_out_bp_shallow_and_failing_runs(change):
    assert compare.alignment(point(**change)).empty
