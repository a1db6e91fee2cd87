"""Published values of other papers, compared with the runs of the experiments that reproduce them."""

import numpy as np
import pandas as pd
import pytest
from claims import (
    AGREES,
    DIFFERS,
    NOT_REPRODUCIBLE,
    OTHER_LENGTH,
    PUBLISHED,
    TOO_FEW,
    compared,
    published,
)
from experiment_grids import grid_of
from processes import dfl_train
from report_helpers import write_packs

from dfl_experiments.configuration.composition import compose
from dfl_experiments.configuration.schema import check
from dfl_experiments.engine.losses import LOSSES
from dfl_experiments.report.frame import runs

EXPERIMENTS = sorted(path.stem for path in PUBLISHED.parent.glob("*.yaml"))
QUICK = ("tracking=disabled", "threads=1")


def values():
    return pd.read_csv(PUBLISHED, keep_default_na=False)


def test_every_published_value_has_an_experiment_with_its_rules():
    assert set(values().experiment) <= set(EXPERIMENTS)
    for experiment, part in values().query("not_reproducible == ''").groupby("experiment"):
        assert list(part.rule) == grid_of(f"published/{experiment}").axes["method"]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """Return the comparison of small runs on digits, under the names of MNIST and CIFAR-10.

    FA has three complete runs, BP on MNIST a run that is too short, and the others smoke runs.
    """
    folder = tmp_path_factory.mktemp("published")
    quick = (*QUICK, f"data_dir={write_packs(folder / 'data', mnist=1, cifar10=3)}")
    for arguments in (
        ("experiment=published/akrout_mnist", "method=fa", "seed=0,1,2", "alignment.every=0"),
        ("experiment=published/akrout_mnist", "method=bp", "epochs=2"),
        ("experiment=published/akrout_mnist_kp", "epochs=1", "smoke=64"),
        ("experiment=published/nokland_mnist", "epochs=1", "smoke=64"),
        ("experiment=published/dkp_cifar10", "epochs=1", "smoke=64"),
        ("experiment=published/dkp_cifar10_dfa", "epochs=1", "smoke=64"),
        ("experiment=published/dkp_cifar10_dkp", "epochs=1", "smoke=64"),
    ):
        done = dfl_train(folder, "--multirun", *arguments, *quick)
        assert done.returncode == 0, done.stderr
    return published(runs(folder / "outputs" / "published"))


def test_options_of_dkp_reach_its_optimizers(comparison):
    assert list(comparison.method[comparison.source.str.startswith("Webster")]) == [
        "BP",
        "DFA",
        "DKP",
    ]
    for rule in ("dfa", "dkp"):
        configuration = check(compose([f"experiment=published/dkp_cifar10_{rule}"]))
        parts = {"input_shape": (3, 32, 32), "num_classes": 10}
        net = configuration.components["model"].build(**parts)
        method = configuration.components["method"].build(
            net=net, num_classes=10, loss=LOSSES["cross_entropy"]
        )
        shapes = [tuple(module.weight.shape) for module in method.local_modules.values()]
        assert shapes == [(10, 32 * 30 * 30), (10, 32 * 28 * 28), (10, 128)]
    optimizer = configuration.components["optimizer.feedback"].build()
    assert type(optimizer).__name__ == "Adam"
    assert optimizer.lr == 1e-4
    assert optimizer.weight_decay == 1e-6
    for key, factor in (("schedule", 1.0), ("schedule.feedback", 0.8**2)):
        assert configuration.components[key].build().factors(3, 50, 1) == [factor]


def test_verdict_needs_complete_runs_of_the_same_configuration(comparison):
    akrout = comparison.set_index(["source", "method"]).loc["Akrout et al. 2019"]
    assert list(akrout.index) == ["BP", "FA", "KP", "WM"]
    assert akrout.verdict["FA"] == DIFFERS
    assert akrout.n["FA"] == 3
    assert akrout.verdict["BP"] == OTHER_LENGTH
    assert akrout.found["BP"] == "2 epochs in place of 400"
    assert akrout.verdict["KP"] == TOO_FEW
    assert akrout.verdict["WM"] == NOT_REPRODUCIBLE


@pytest.mark.parametrize(
    ("rates", "value", "verdict"),
    [
        ([0.984, 0.986, 0.985], 0.985, AGREES),
        # no spread, but within the noise of one accuracy, 0.0012
        ([0.9850, 0.9850], 0.986, AGREES),
        ([0.98, 0.99], 0.97, AGREES),  # a wide interval
        ([0.984, 0.985, 0.984], 0.98, DIFFERS),
    ],
)
def test_value_agrees_within_the_interval_over_seeds_or_the_noise_floor(rates, value, verdict):
    assert compared(np.array(rates), value, 1, 10_000)["verdict"] == verdict


def test_difference_is_printed_with_its_interval():
    comparison = compared(np.array([0.984, 0.986]), 0.98, 1, 10_000)
    assert comparison["found"] == "98.50: +0.50 [-1.70, +2.70] points"
