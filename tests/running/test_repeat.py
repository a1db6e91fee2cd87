"""Runs recorded by older versions can be repeated: epochs are equal to rounding, and point names are equal."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import roundoff
from omegaconf import OmegaConf
from processes import ended, forked
from run_files import table

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

# a run on digits: its configuration is as an older version wrote it, its epochs are of today's computation of e
(RECORDED,) = Path(__file__).with_name("recorded").iterdir()
REFERENCE = Path(__file__).resolve().parents[2] / "outputs" / "reference"
# rounding errors of the recorded run: they add up over STEPS, and a sum has WIDTH terms
STEPS, WIDTH = 3 * 21, 256
IMAGES = {"train_accuracy": 1293, "validation_accuracy": 144, "test_accuracy": 360}


def epochs(run_dir):
    """Return the rows of epochs.csv without their seconds."""
    rows = table(run_dir / "epochs.csv")
    for row in rows:
        del row["seconds"]
    return rows


def test_recorded_run_is_repeated_to_rounding(tmp_path):
    """Not bitwise: another processor sums in another order. `test_repeated_run_is_bitwise_equal` compares bits."""
    options = (f"repeat={RECORDED}", "hydra.run.dir=again", f"data_dir={tmp_path}")
    assert ended(forked(tmp_path, *options)) == 0
    repeated, recorded = epochs(tmp_path / "again"), epochs(RECORDED)
    assert len(repeated) == len(recorded) == 3
    error = STEPS * roundoff(WIDTH, torch.float32)
    for row, expected in zip(repeated, recorded, strict=True):
        for name, text in expected.items():  # newer versions have more columns
            # rounding may change the predicted class of one image
            one_image = 1.01 / IMAGES[name] if name in IMAGES else 0.0
            assert float(row[name]) == pytest.approx(float(text), rel=error, abs=one_image), name


def sweeps():
    """Return the folders of kept runs that were made together."""
    return sorted({path.parent.parent for path in REFERENCE.glob("**/result.json")})


@pytest.fixture(scope="module")
def composed():
    """Return what Hydra composes for `repeat=…`, before the recorded configuration is inserted."""
    return compose(["repeat=here"])


@pytest.mark.parametrize("sweep", sweeps(), ids=lambda path: path.relative_to(REFERENCE).as_posix())
def test_reference_configurations_are_accepted_and_keep_their_names(sweep, composed):
    for run_dir in sorted(path.parent for path in sweep.glob("*/result.json")):
        composed.repeat = str(run_dir)
        values = with_recorded(composed, [f"repeat={run_dir}"])
        assert point_name(as_values(values)) == run_dir.name
        recorded = json.loads((run_dir / "result.json").read_text())["config"]
        assert point_name(recorded) == run_dir.name  # a restarted sweep compares these names
        # older runs did not end at a collapse
        assert values["stop_collapsed"] == recorded.get("stop_collapsed", False)
        check(values)


def test_renamed_option_keeps_the_digest_and_the_old_name_is_refused():
    values = plain(compose(["method=las", "++method.fixed_blocks=2"]))
    recorded = values | {"method": values["method"] | {"held": 2}}
    del recorded["method"]["fixed_blocks"]
    assert point_name(recorded) == point_name(values) != point_name(plain(compose(["method=las"])))
    assert with_current_names(recorded) == values
    with pytest.raises(
        UserError, match=r"method\.held: no such option.*did you mean method\.fixed_blocks\?"
    ):
        check(recorded)


def test_recorded_milestones_become_the_step_schedule():
    """The runs of the alignment figure recorded no milestones. Today's experiment has the same names and rates."""
    folders = sorted((REFERENCE / "alignment_figure").glob("*seed0*"))
    assert folders
    for run_dir in folders:
        method = run_dir.name.partition("-")[0]
        today = compose(["experiment=alignment_figure", f"method={method}"])
        assert point_name(today) == run_dir.name
    older = OmegaConf.to_container(OmegaConf.load(RECORDED / "config.yaml"))
    assert older["optimizer"]["milestones"]
    repeat = [f"repeat={RECORDED}"]
    schedule = check(with_recorded(compose(repeat), repeat)).components["schedule"]
    assert schedule.options["milestones"] == older["optimizer"]["milestones"]
    assert config_digest(older) == config_digest(with_current_names(older))


def test_options_of_schedule_and_optimizer_change_the_digest_only_if_they_change_results():
    def digest(*overrides):
        return config_digest(compose([*overrides]))

    schedules = ("step", "cosine", "exponential", "constant")
    assert len({digest(f"schedule={name}") for name in schedules}) == 4
    for same in ("optimizer.feedback.lr=null", "optimizer.clip_norm=null", "schedule.name=mine"):
        assert digest(same) == digest()
    for other in (
        "schedule.warmup=2",
        "schedule.per=iteration",
        "optimizer.feedback.lr=1e-3",
        "optimizer.clip_norm=1",
    ):
        assert digest(other) != digest()


def test_place_of_the_data_changes_the_name_of_a_sweep_point_but_not_the_digest():
    here, there = (compose(["dataset=arrays", f"dataset.source.path={path}"]) for path in "ab")
    assert config_digest(here) == config_digest(there)
    assert point_name(here) != point_name(there)


def test_stop_collapsed_changes_no_name_and_is_on_only_in_fair():
    for protocol, stops in (("fair", True), ("paper", False), ("authors", False)):
        values = check(compose([f"protocol={protocol}"])).values
        assert values["stop_collapsed"] is stops
        assert point_name(values) == point_name(values | {"stop_collapsed": not stops})


@pytest.mark.parametrize("key", ["repeat", "resume"])
def test_recorded_wandb_destination_is_ignored(key, tmp_path):
    """The run may be somebody else's: only a recorded mode without W&B is kept, and the command line overrides it."""

    def tracking(*overrides, **recorded):
        values = plain(compose([])) | {"tracking": recorded}
        (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(values))
        command_line = [f"{key}={tmp_path}", *overrides]
        return with_recorded(compose(command_line), command_line)["tracking"]

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


def test_repeating_a_run_on_changed_data_is_warned_about(tmp_path, monkeypatch, caplog):
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
