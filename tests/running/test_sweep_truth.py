"""A sweep's summary shows only results that its command computed or accepted as finished."""

import json
import os
import shutil

import pytest
from data_helpers import write_folder
from experiment_grids import grid_of
from omegaconf import OmegaConf
from processes import dfl_train
from run_files import table

from dfl_experiments.configuration.composition import compose, group_options, point_name
from dfl_experiments.errors import UserError
from dfl_experiments.running import checkpoint, run, sweep
from dfl_experiments.running.outcome import read_outcome
from dfl_experiments.running.result import write_result

SMALL = ("model.widths=[16]", "epochs=1", "limit=64", "tracking=disabled", "alignment.every=0")
SWEEP = ("--multirun", "hydra.sweep.dir=grid", *SMALL)


def rows(folder):
    """Return the rows of a sweep's summary by the point's folder."""
    return {row["folder"]: row for row in table(folder / "grid" / "summary.csv")}


def test_run_of_another_configuration_makes_its_point_fail(tmp_path):
    by_number = (*SWEEP, "hydra.sweep.subdir=${hydra.job.num}")
    assert dfl_train(tmp_path, *by_number, "seed=0,1").returncode == 0
    before = rows(tmp_path)
    done = dfl_train(tmp_path, *by_number, "seed=0,5")
    assert done.returncode == 1
    after = rows(tmp_path)
    assert after["0"] == before["0"]
    assert (after["1"]["status"], after["1"]["accuracy"]) == ("failed", "")
    assert "another configuration" in after["1"]["reason"]
    assert dfl_train(tmp_path, *by_number, "seed=0,5", "force=true").returncode == 0
    assert rows(tmp_path)["1"]["status"] == "finished"


def test_folders_of_points_may_be_nested(tmp_path):
    nested = "hydra.sweep.subdir=seeds/${seed}/run"
    for seeds in ("0,1", "2"):  # the second command also lists the points of the first one
        done = dfl_train(tmp_path, *SWEEP, nested, f"seed={seeds}")
        assert done.returncode == 0
    assert "1 of 1 finished  (seeds/2/run: accuracy " in done.stdout
    assert {folder: row["status"] for folder, row in rows(tmp_path).items()} == {
        "seeds/0/run": "finished",
        "seeds/1/run": "finished",
        "seeds/2/run": "finished",
    }


def test_validation_accuracy_is_that_of_the_reported_epoch(tmp_path):
    options = ("protocol.accuracy=best_validation", "epochs=6", "optimizer.lr=0.1", "limit=200")
    assert dfl_train(tmp_path, *SWEEP, "seed=0,1", *options).returncode == 0
    for folder, row in rows(tmp_path).items():
        epochs = table(tmp_path / "grid" / folder / "epochs.csv")
        best = max(float(epoch["validation_accuracy"]) for epoch in epochs)
        assert float(row["validation_accuracy"]) == best


def refuse(*arguments, **options):
    raise UserError("the disk is away")


def contents(paths):
    return {path: path.read_bytes() for path in paths}


def statuses_and_accuracies(folder):
    return [(row["status"], row["accuracy"]) for row in rows(folder).values()]


@pytest.fixture
def finished_sweep(tmp_path):
    """Return the result files of a finished sweep of two seeds."""
    assert dfl_train(tmp_path, *SWEEP, "seed=0,1").returncode == 0
    return list((tmp_path / "grid").glob("*/result.json"))


def test_failed_forced_sweep_shows_no_earlier_results(finished_sweep, tmp_path, monkeypatch):
    before = contents(finished_sweep)
    monkeypatch.setattr(run, "build", refuse)
    done = dfl_train(tmp_path, *SWEEP, "seed=0,1", "force=true")
    assert done.returncode == 1
    assert contents(finished_sweep) == before
    assert statuses_and_accuracies(tmp_path) == [("failed", "")] * 2


def test_failed_point_stays_failed_if_a_launcher_repeats_its_job(
    finished_sweep, tmp_path, monkeypatch
):
    monkeypatch.setattr(run, "build", refuse)
    assert dfl_train(tmp_path, *SWEEP, "seed=0,1", "force=true").returncode == 1
    for path in finished_sweep:
        point = path.parent
        seed = json.loads(path.read_text())["seed"]
        cfg = compose([*SMALL, f"seed={seed}", "force=true"])
        job = sweep.SweepJob(read_outcome(point)["command"], 0, 1, point.parent)
        assert sweep.run_point(cfg, point, [], job) is None
        assert read_outcome(point)["status"] == "failed"


def test_forced_sweep_that_starts_no_job_shows_no_earlier_results(
    finished_sweep, tmp_path, monkeypatch
):
    monkeypatch.setattr(sweep, "lock_run", refuse)
    assert dfl_train(tmp_path, *SWEEP, "seed=0,1", "force=true").returncode == 1
    assert statuses_and_accuracies(tmp_path) == [("not started", "")] * 2


BROKEN_AUGMENTATION = """
from dfl_experiments.data.augmentation import Augmentation

class Broken(Augmentation):
    def __call__(self, images, normalise, generator):
        raise RuntimeError("the first batch fails")
"""


def test_failed_rerun_keeps_earlier_results(tmp_path, monkeypatch):
    here = (*SMALL, "hydra.run.dir=here")
    assert dfl_train(tmp_path, *here).returncode == 0
    files = [path for path in (tmp_path / "here").iterdir() if path.is_file()]
    files = [path for path in files if path.suffix != ".log"]
    before = contents(files)
    (tmp_path / "broken.py").write_text(BROKEN_AUGMENTATION)
    monkeypatch.syspath_prepend(tmp_path)
    broken = ("plugins=[broken]", "augmentation._target_=broken.Broken")
    assert dfl_train(tmp_path, *here, "force=true", *broken).returncode == 1
    assert contents(files) == before
    as_sweep = ("--multirun", *SMALL, "hydra.sweep.dir=.", "hydra.sweep.subdir=here", "seed=0")
    assert dfl_train(tmp_path, *as_sweep, "force=true", *broken).returncode == 1
    assert contents(files) == before
    (row,) = table(tmp_path / "summary.csv")
    assert (row["folder"], row["status"], row["accuracy"]) == ("here", "failed", "")
    assert dfl_train(tmp_path, *here, "force=true", "seed=1").returncode == 0
    assert json.loads((tmp_path / "here" / "result.json").read_text())["seed"] == 1


def test_force_does_not_depend_on_file_times(tmp_path):
    assert dfl_train(tmp_path, *SWEEP, "seed=0").returncode == 0
    (result,) = (tmp_path / "grid").glob("*/result.json")
    accuracies = dict.fromkeys(("last", "at_best_validation", "best"), 0.123) | {"best_epoch": 1}
    content = json.loads(result.read_text()) | {"accuracy": 0.123, "test_accuracy": accuracies}
    del content["seal"]
    result.write_text(json.dumps(content))
    for path in result.parent.iterdir():
        os.utime(path, (2**32, 2**32))  # in the future
    assert dfl_train(tmp_path, *SWEEP, "seed=0").returncode == 0
    (row,) = rows(tmp_path).values()
    assert row["accuracy"] == "0.123"
    assert dfl_train(tmp_path, *SWEEP, "seed=0", "force=true").returncode == 0
    (row,) = rows(tmp_path).values()
    assert row["accuracy"] != "0.123"


def test_summary_has_every_point_of_the_folder(tmp_path):
    assert dfl_train(tmp_path, *SWEEP, "seed=0,1,2").returncode == 0
    before = rows(tmp_path)
    done = dfl_train(tmp_path, *SWEEP, "seed=1")
    assert rows(tmp_path) == before
    assert "1 points" in done.stdout
    note = "only the points of this command; the folder holds 2 more, and dfl-report grid shows all"
    assert note in done.stdout


def test_summary_escapes_texts_of_foreign_points(tmp_path):
    assert dfl_train(tmp_path, *SWEEP, "seed=0").returncode == 0
    (point,) = (tmp_path / "grid").glob("*/result.json")
    foreign = tmp_path / "grid" / "foreign\x1b[2J"
    shutil.copytree(point.parent, foreign)
    result = json.loads(point.read_text()) | {"status": "failed", "reason": "1+1\n\x1b[2J"}
    write_result(foreign, result)
    (foreign / ".hydra" / "overrides.yaml").write_text("['x', \"\\e[2J\"]")
    done = dfl_train(tmp_path, *SWEEP, "seed=0")
    assert "\x1b" not in done.stdout
    row = rows(tmp_path)["foreign\\x1b[2J"]
    assert row["reason"] == "1+1\\n\\x1b[2J"
    assert row.keys() > {"x", "\\x1b[2J"}


def test_equal_numbers_give_one_point_name():
    def names(key, *values):
        return {point_name(compose([f"{key}={value}"])) for value in values}

    assert len(names("optimizer.weight_decay", "0", "0.0", "0e0", "-0.0")) == 1
    assert len(names("optimizer.lr", "1", "1.0", "0.1e1")) == 1
    assert len(names("optimizer.lr", "1", "2")) == 2
    assert len(names("deterministic", "true", "false")) == 2


@pytest.mark.parametrize("experiment", group_options("experiment"))
def test_experiment_as_a_single_run_uses_its_own_data_and_method(experiment):
    cfg = compose([f"experiment={experiment}"], hydra=True)
    assert (cfg.dataset.name == "digits") == (experiment in ("quick", "depth_digits"))
    if experiment != "quick":
        for key, values in grid_of(experiment).axes.items():
            if "." not in key and key != "seed":
                assert cfg[key].name in values


@pytest.mark.parametrize(
    ("choice", "key"),
    [
        ("experiment=fc_mnist,fc_cifar", "hydra.sweeper"),
        ("experiment=quick,fc_mnist", "hydra.sweeper"),
        ("sweep=a,b", "sweep"),
    ],
)
def test_experiment_and_sweep_name_cannot_be_swept(choice, key, tmp_path):
    done = dfl_train(tmp_path, "--multirun", choice)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert key in line
    assert "(in the job " in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["other pixels", "another class"])
def test_changed_data_are_refused_by_sweep_and_resume(change, tmp_path):
    folder = write_folder(tmp_path / "mine")
    data = (
        "dataset=folder",
        f"dataset.source.path={folder}",
        "dataset.source.size=8",
        "batch_size=2",
        f"data_dir={tmp_path}/d",
    )
    assert dfl_train(tmp_path, *SWEEP, *data, "seed=0").returncode == 0
    single = (*SMALL, "epochs=2", *data, "hydra.run.dir=single")
    assert dfl_train(tmp_path, *single).returncode == 0
    result = tmp_path / "single" / "result.json"
    data_before = json.loads(result.read_text())["data"]
    result.unlink()  # as if the run had been killed
    images = sorted((folder / "train").rglob("*.png"))
    if change == "other pixels":
        shutil.copyfile(images[-1], images[0])
    else:
        for split in ("train", "test"):
            shutil.copytree(folder / split / "cats", folder / split / "zebra")
    again = dfl_train(tmp_path, *SWEEP, *data, "seed=0")
    assert again.returncode == 1
    (row,) = rows(tmp_path).values()
    assert "other data" in row["reason"]
    resumed = dfl_train(tmp_path, "resume=single")
    assert resumed.returncode == 2, resumed.stderr
    assert "other data or code: data " in resumed.stderr
    assert "Traceback" not in resumed.stderr
    assert json.loads(result.read_text()).get("data") != data_before


def test_resume_under_another_version_names_both_versions(tmp_path, monkeypatch):
    assert dfl_train(tmp_path, *SMALL, "hydra.run.dir=here").returncode == 0
    state = checkpoint.load_checkpoint(tmp_path / "here")
    versions = state["training"]["made_by"][0]["versions"]
    (tmp_path / "here" / "result.json").unlink()
    monkeypatch.setattr(run, "versions", lambda: versions | {"torch": "3.0"})
    monkeypatch.setattr(run, "git_commit", lambda: "another")
    done = dfl_train(tmp_path, "resume=here")
    assert done.returncode == 0, done.stderr
    assert f"torch {versions['torch']}, now 3.0; commit" in done.stdout
    result = json.loads((tmp_path / "here" / "result.json").read_text())
    assert result["versions"]["torch"] == "3.0"
    assert result["git_commit"] == "another"
    (earlier,) = result["earlier"]
    assert earlier["versions"]["torch"] == versions["torch"]
    assert earlier["epochs"] == 1


@pytest.mark.parametrize("name", ["2024", "null"])
def test_sweep_has_the_name_written_in_a_file(name, tmp_path):
    """The names look like a number and like null in YAML."""
    (tmp_path / "my" / "experiment").mkdir(parents=True)
    text = "# @package _global_\n" + OmegaConf.to_yaml({"sweep": name})
    (tmp_path / "my" / "experiment" / "mine.yaml").write_text(text)
    launcher = "hydra/launcher=joblib" if name == "2024" else "hydra/launcher=basic"
    done = dfl_train(
        tmp_path,
        "--multirun",
        "--config-dir",
        "my",
        "experiment=mine",
        launcher,
        "seed=0,1",
        *SMALL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "outputs" / name / "summary.csv").is_file()
