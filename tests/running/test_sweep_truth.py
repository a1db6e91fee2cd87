"""A sweep's table shows only results that its command computed or accepted as finished, never other files."""

import csv
import json
import os
import shutil

import pytest
from data_helpers import write_folder
from experiment_grids import grid_of
from omegaconf import OmegaConf
from processes import dfl_train

from dfl_experiments.configuration.composition import compose, group_options, point_name
from dfl_experiments.errors import UserError
from dfl_experiments.running import checkpoint, run, sweep
from dfl_experiments.running.outcome import read_outcome
from dfl_experiments.running.result import write_result

SMALL = ("model.widths=[16]", "epochs=1", "limit=64", "tracking=disabled", "alignment.every=0")
SWEEP = ("--multirun", "hydra.sweep.dir=grid", *SMALL)


def rows(folder):
    with (folder / "grid" / "summary.csv").open() as file:
        return {row["folder"]: row for row in csv.DictReader(file)}


def test_another_configuration_s_run_is_not_shown_for_the_one_asked_for(tmp_path):
    by_number = (*SWEEP, "hydra.sweep.subdir=${hydra.job.num}")
    assert dfl_train(tmp_path, *by_number, "seed=0,1").returncode == 0
    old = rows(tmp_path)
    done = dfl_train(tmp_path, *by_number, "seed=0,5")
    assert done.returncode == 1
    found = rows(tmp_path)
    assert found["0"] == old["0"]
    assert (found["1"]["status"], found["1"]["accuracy"]) == ("failed", "")
    assert "another configuration" in found["1"]["reason"]
    assert dfl_train(tmp_path, *by_number, "seed=0,5", "force=true").returncode == 0
    assert rows(tmp_path)["1"]["status"] == "finished"


def test_the_validation_accuracy_is_that_of_the_reported_epoch(tmp_path):
    options = ("protocol.accuracy=best_validation", "epochs=6", "optimizer.lr=0.1", "limit=200")
    assert dfl_train(tmp_path, *SWEEP, "seed=0,1", *options).returncode == 0
    for folder, row in rows(tmp_path).items():
        with (tmp_path / "grid" / folder / "epochs.csv").open() as file:
            accuracies = [float(epoch["validation_accuracy"]) for epoch in csv.DictReader(file)]
        assert float(row["validation_accuracy"]) == max(accuracies)


def refuse(*arguments, **options):
    raise UserError("the disk is away")


def test_a_forced_sweep_whose_jobs_all_fail_shows_no_old_number(tmp_path, monkeypatch):
    assert dfl_train(tmp_path, *SWEEP, "seed=0,1").returncode == 0
    results = {path: path.read_bytes() for path in (tmp_path / "grid").glob("*/result.json")}
    monkeypatch.setattr(run, "build", refuse)
    done = dfl_train(tmp_path, *SWEEP, "seed=0,1", "force=true")
    assert done.returncode == 1
    assert {path: path.read_bytes() for path in results} == results
    assert [(row["status"], row["accuracy"]) for row in rows(tmp_path).values()] == [
        ("failed", "")
    ] * 2
    # nor when the same command comes to its jobs again
    for place in {path.parent for path in results}:
        cfg = compose(
            [
                *SMALL,
                f"seed={json.loads((place / 'result.json').read_text())['seed']}",
                "force=true",
            ]
        )
        command = read_outcome(place)["command"]
        assert sweep.run_point(cfg, place, [], sweep.SweepJob(command, 0, 1, place.parent)) is None
        assert read_outcome(place)["status"] == "failed"
    # a command that ends before its jobs is no better
    monkeypatch.setattr(sweep, "lock_run", refuse)
    assert dfl_train(tmp_path, *SWEEP, "seed=0,1", "force=true").returncode == 1
    assert [(row["status"], row["accuracy"]) for row in rows(tmp_path).values()] == [
        ("not started", "")
    ] * 2


def test_a_mistake_in_the_first_batch_costs_nothing_that_was_there(tmp_path):
    here = (*SMALL, "hydra.run.dir=here")
    assert dfl_train(tmp_path, *here).returncode == 0
    before = {
        path: path.read_bytes()
        for path in (tmp_path / "here").iterdir()
        if path.suffix != ".log" and path.is_file()
    }
    done = dfl_train(
        tmp_path, *here, "force=true", "dataset.mean=[0.5,0.5]", "dataset.std=[0.2,0.2]"
    )
    assert done.returncode != 0
    assert {path: path.read_bytes() for path in before} == before
    assert dfl_train(tmp_path, "--multirun", *SMALL, "hydra.sweep.dir=.", "hydra.sweep.subdir=here", "seed=0",
                     "force=true", "dataset.mean=[0.5,0.5]", "dataset.std=[0.2,0.2]").returncode == 1  # fmt: skip
    assert {path: path.read_bytes() for path in before} == before
    with (tmp_path / "summary.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["folder"], row["status"], row["accuracy"]) == ("here", "failed", "")
    assert dfl_train(tmp_path, *here, "force=true", "seed=1").returncode == 0
    assert json.loads((tmp_path / "here" / "result.json").read_text())["seed"] == 1


def test_force_does_not_look_at_the_clock(tmp_path):
    assert dfl_train(tmp_path, *SWEEP, "seed=0").returncode == 0
    (result,) = (tmp_path / "grid").glob("*/result.json")
    accuracies = dict.fromkeys(("last", "at_best_validation", "best"), 0.123) | {"best_epoch": 1}
    content = json.loads(result.read_text()) | {"accuracy": 0.123, "test_accuracy": accuracies}
    del content["seal"]
    result.write_text(json.dumps(content))
    for path in result.parent.iterdir():
        os.utime(path, (2**32, 2**32))
    assert dfl_train(tmp_path, *SWEEP, "seed=0").returncode == 0
    assert [row["accuracy"] for row in rows(tmp_path).values()] == ["0.123"]
    assert dfl_train(tmp_path, *SWEEP, "seed=0", "force=true").returncode == 0
    assert [row["accuracy"] for row in rows(tmp_path).values()] != ["0.123"]


def test_the_summary_has_every_point_of_the_folder(tmp_path):
    assert dfl_train(tmp_path, *SWEEP, "seed=0,1,2").returncode == 0
    whole = rows(tmp_path)
    done = dfl_train(tmp_path, *SWEEP, "seed=1")
    assert rows(tmp_path) == whole
    assert "1 points" in done.stdout
    assert (
        "only the points of this command; the folder holds 2 more, and dfl-report grid shows all"
        in done.stdout
    )


def test_the_summary_shows_a_foreign_point_s_texts_and_obeys_none(tmp_path):
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


def test_a_number_is_one_point_however_it_is_written():
    names = {
        point_name(compose([f"optimizer.weight_decay={value}"]))
        for value in ("0", "0.0", "0e0", "-0.0")
    }
    assert len(names) == 1
    assert (
        len(
            {point_name(compose([f"optimizer.lr={value}"])) for value in ("1", "1.0", "0.1e1", "2")}
        )
        == 2
    )
    assert point_name(compose(["deterministic=true"])) != point_name(
        compose(["deterministic=false"])
    )


@pytest.mark.parametrize("experiment", group_options("experiment"))
def test_an_experiment_is_a_run_of_its_own_data_and_method(experiment):
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
def test_what_is_the_command_s_to_choose_is_not_swept(choice, key, tmp_path):
    done = dfl_train(tmp_path, "--multirun", choice)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert key in line  # of a part of its own Hydra 1.4 says so itself
    assert "(in the job " in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["other pixels", "another class"])
def test_data_that_have_changed_share_no_table_and_are_not_gone_on_with(change, tmp_path):
    folder = write_folder(tmp_path / "mine")
    data = (
        "dataset=folder",
        f"dataset.source.path={folder}",
        "dataset.source.size=8",
        "batch_size=2",
        f"data_dir={tmp_path}/d",
    )
    assert dfl_train(tmp_path, *SWEEP, *data, "seed=0").returncode == 0
    single = (*SMALL[:1], "epochs=2", *SMALL[2:], *data, "hydra.run.dir=single")
    assert dfl_train(tmp_path, *single).returncode == 0
    first = json.loads((tmp_path / "single" / "result.json").read_text())
    (tmp_path / "single" / "result.json").unlink()  # as if it had been killed
    images = sorted((folder / "train").rglob("*.png"))
    if change == "other pixels":
        shutil.copyfile(images[-1], images[0])
    else:
        for split in ("train", "test"):
            place = next(path for path in (folder / split).iterdir() if path.is_dir())
            shutil.copytree(place, folder / split / "zebra")
    again = dfl_train(tmp_path, *SWEEP, *data, "seed=0")
    assert again.returncode == 1
    assert "other data" in next(iter(rows(tmp_path).values()))["reason"]
    resumed = dfl_train(tmp_path, "resume=single")
    assert resumed.returncode == 2, resumed.stderr
    assert "other data or code: data " in resumed.stderr
    assert "Traceback" not in resumed.stderr
    assert first["data"] != json.loads((tmp_path / "single" / "result.json").read_text()).get(
        "data"
    )


def test_a_run_that_goes_on_under_another_version_says_so_and_names_both(tmp_path, monkeypatch):
    assert dfl_train(tmp_path, *SMALL, "hydra.run.dir=here").returncode == 0
    state = checkpoint.load_checkpoint(tmp_path / "here")
    (tmp_path / "here" / "result.json").unlink()
    monkeypatch.setattr(
        run, "versions", lambda: state["training"]["made_by"][0]["versions"] | {"torch": "3.0"}
    )
    monkeypatch.setattr(run, "git_commit", lambda: "another")
    done = dfl_train(tmp_path, "resume=here")
    assert done.returncode == 0, done.stderr
    old = state["training"]["made_by"][0]["versions"]["torch"]
    assert f"torch {old}, now 3.0; commit" in done.stdout
    result = json.loads((tmp_path / "here" / "result.json").read_text())
    assert (result["versions"]["torch"], result["git_commit"]) == ("3.0", "another")
    (earlier,) = result["earlier"]
    assert (earlier["versions"]["torch"], earlier["epochs"]) == (old, 1)


@pytest.mark.parametrize("name", ["2024", "null"])
def test_a_sweep_is_called_what_a_file_calls_it(name, tmp_path):
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
