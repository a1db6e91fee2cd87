"""Runs recorded by older versions can be repeated: epochs are equal up to rounding, and names in a sweep are equal."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import roundoff
from omegaconf import OmegaConf
from processes import ended, forked

import dfl_experiments as dfl
from dfl_experiments.configuration.composition import (
    as_values,
    compose,
    config_digest,
    plain,
    point_name,
)
from dfl_experiments.configuration.history import with_current_names
from dfl_experiments.configuration.recorded import with_recorded
from dfl_experiments.configuration.schema import check
from dfl_experiments.errors import UserError

# a run on the digits: its configuration as an older version wrote it, its epochs since e is formed as it is
(RECORDED,) = Path(__file__).with_name("recorded").iterdir()
REFERENCE = Path(__file__).resolve().parents[2] / "outputs" / "reference"
# of the recorded run: how often an error adds to those before, and how long its sums are
STEPS, WIDTH = 3 * 21, 256
IMAGES = {"train_accuracy": 1293, "validation_accuracy": 144, "test_accuracy": 360}


def epochs(run_dir):
    with (run_dir / "epochs.csv").open() as file:
        return [
            {key: value for key, value in row.items() if key != "seconds"}
            for row in csv.DictReader(file)
        ]


def test_a_recorded_run_is_repeated_to_rounding(tmp_path):
    """Another processor sums in another order: its own bits are those of `test_a_repeated_run_has_the_same_bits`."""
    assert (
        ended(forked(tmp_path, f"repeat={RECORDED}", "hydra.run.dir=again", f"data_dir={tmp_path}"))
        == 0
    )
    found, expected = epochs(tmp_path / "again"), epochs(RECORDED)
    assert len(found) == len(expected) == 3
    error = STEPS * roundoff(WIDTH, torch.float32)
    for row, other in zip(found, expected, strict=True):
        for name, text in other.items():  # there are more by now
            # which an error may have put into another class
            one_image = 1.01 / IMAGES[name] if name in IMAGES else 0.0
            assert float(row[name]) == pytest.approx(float(text), rel=error, abs=one_image), name


def sweeps():
    """The folders of kept runs that were made together."""
    return sorted({path.parent.parent for path in REFERENCE.glob("**/result.json")})


@pytest.fixture(scope="module")
def composed():
    """Return what Hydra composes for `repeat=…`, before the recorded configuration is inserted."""
    return compose(["repeat=here"])


@pytest.mark.parametrize("sweep", sweeps(), ids=lambda path: path.relative_to(REFERENCE).as_posix())
def test_the_configurations_of_the_reference_runs_are_still_accepted_and_have_their_names(
    sweep, composed
):
    for run_dir in sorted(path.parent for path in sweep.glob("*/result.json")):
        composed.repeat = str(run_dir)
        values = with_recorded(composed, [f"repeat={run_dir}"])
        assert point_name(as_values(values)) == run_dir.name
        recorded = json.loads((run_dir / "result.json").read_text())["config"]
        assert point_name(recorded) == run_dir.name  # what a sweep that is started again compares
        # older runs had no such end
        assert values["stop_collapsed"] == recorded.get("stop_collapsed", False)
        check(values)


def test_a_renamed_option_keeps_the_digest_and_the_old_name_is_refused():
    values = plain(compose(["method=las", "++method.fixed_blocks=2"]))
    recorded = values | {"method": values["method"] | {"held": 2}}
    del recorded["method"]["fixed_blocks"]
    assert point_name(recorded) == point_name(values) != point_name(plain(compose(["method=las"])))
    assert with_current_names(recorded) == values
    with pytest.raises(
        UserError, match=r"method\.held: no such option.*did you mean method\.fixed_blocks\?"
    ):
        check(recorded)


def test_recorded_milestones_are_those_of_the_step_schedule():
    """The alignment figure's runs had no milestones: today's experiment has their names, and the same rates."""
    folders = sorted((REFERENCE / "alignment_figure").glob("*seed0*"))
    assert folders
    for run_dir in folders:
        method = run_dir.name.partition("-")[0]
        assert (
            point_name(compose(["experiment=alignment_figure", f"method={method}"])) == run_dir.name
        )
    older = OmegaConf.to_container(OmegaConf.load(RECORDED / "config.yaml"))
    assert older["optimizer"]["milestones"]
    schedule = check(
        with_recorded(compose([f"repeat={RECORDED}"]), [f"repeat={RECORDED}"])
    ).components["schedule"]
    assert schedule.options["milestones"] == older["optimizer"]["milestones"]
    assert config_digest(older) == config_digest(with_current_names(older))
    default = compose([])
    assert config_digest(default) != config_digest(compose(["schedule.warmup=2"]))
    names = {
        config_digest(compose([f"schedule={name}"]))
        for name in ("step", "cosine", "exponential", "constant")
    }
    assert len(names) == 4
    for same in ("optimizer.feedback.lr=null", "optimizer.clip_norm=null", "schedule.name=mine"):
        assert config_digest(compose([same])) == config_digest(default)
    for other in ("optimizer.feedback.lr=1e-3", "optimizer.clip_norm=1", "schedule.per=iteration"):
        assert config_digest(compose([other])) != config_digest(default)


def test_an_end_at_collapse_changes_no_name_and_is_on_in_fair_alone():
    found = {}
    for protocol in ("fair", "paper", "authors"):
        values = check(compose([f"protocol={protocol}"])).values
        found[protocol] = values["stop_collapsed"]
        assert point_name(values) == point_name(
            values | {"stop_collapsed": not values["stop_collapsed"]}
        )
    assert found == {"fair": True, "paper": False, "authors": False}


@pytest.mark.parametrize("key", ["repeat", "resume"])
def test_no_recorded_text_says_where_w_and_b_sends_a_run(key, tmp_path):
    """The folder may be somebody else's. That nothing is kept for W&B is obeyed, and what the command says."""

    def tracking(*overrides, **recorded):
        theirs = plain(compose([])) | {"tracking": recorded}
        (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(theirs))
        given = [f"{key}={tmp_path}", *overrides]
        return with_recorded(compose(given), given)["tracking"]

    foreign = {
        "mode": "online",
        "project": "theirs",
        "entity": "them",
        "tags": ["theirs"],
        "every": None,
    }
    usual = plain(compose([]))["tracking"]
    assert tracking(**foreign) == usual
    assert tracking("tracking=online", **foreign) == plain(compose(["tracking=online"]))["tracking"]
    assert tracking("tracking.entity=us", **foreign) == usual | {"entity": "us"}
    for local in ("disabled", "tensorboard"):
        assert tracking(**foreign | {"mode": local}) == usual | {"mode": local}
    assert tracking("tracking=offline", **foreign | {"mode": "disabled"}) == usual


def test_repeating_a_run_on_other_data_is_said(tmp_path, monkeypatch, caplog):
    samples, labels = np.random.default_rng(0).random((2, 80, 4)), np.arange(80) % 2

    def write(part):
        data = {"X_train": samples[part], "y_train": labels, "X_test": samples[0], "y_test": labels}
        np.savez("data.npz", **data)

    monkeypatch.chdir(tmp_path)
    write(0)
    options = ["dataset=arrays", "dataset.source.path=data.npz", "epochs=1", "tracking=disabled"]
    dfl.run(dfl.compose(options), "first")
    dfl.run(dfl.compose(["repeat=first"]), "again")
    assert "the data differ" not in caplog.text
    write(1)
    dfl.run(dfl.compose(["repeat=first"]), "other")
    assert "the data differ from those of first" in caplog.text
