"""The real command line on the bundled digits: run directory, W&B, sweeps, interruptions, completion, the wheel."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import wandb
from hydra.errors import HydraException
from processes import dfl_train

from dfl_experiments.configuration.composition import CONF_DIR, compose, group_options, point_name
from dfl_experiments.configuration.schema import Tracking, check
from dfl_experiments.running import checkpoint
from dfl_experiments.running.run_directory import epoch_columns
from dfl_experiments.running.tracking import track

ROOT = Path(__file__).resolve().parents[2]
TRACKING = Tracking(mode="offline", project="test", entity=None, tags=[])
QUICK = ("epochs=2", "tracking=disabled")


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def records(run_dir):
    """The records of the one offline W&B run in a run directory, by type."""
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    found = {}
    for record in map(json.loads, lines):
        found.setdefault(record["type"], []).append(record[record["type"]])
    return found


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("default")
    done = dfl_train(folder, "epochs=2")
    assert done.returncode == 0, done.stderr
    (run_dir,) = (folder / "outputs").glob("*/*")
    return run_dir, done.stdout


def test_the_run_directory_holds_what_the_contract_names(default_run):
    run_dir, _ = default_run
    rows, epochs = table(run_dir / "iterations.csv"), table(run_dir / "epochs.csv")
    layer = ["cosine_sample/{}", "cosine_batch/{}", "norm/{}", "norm_bp/{}"]
    expected = ["iteration", "epoch", "loss", *(name.format(i) for i in (1, 2) for name in layer)]
    assert list(rows[0]) == expected
    assert list(epochs[0]) == epoch_columns(3)
    assert [int(row["iteration"]) for row in rows] == list(range(1, 43))
    assert [row["epoch"] for row in rows] == ["1"] * 21 + ["2"] * 21
    assert [row["epoch"] for row in epochs] == ["1", "2"]
    assert all(0 < float(row["cosine_sample/1"]) < 1 for row in rows)
    assert [float(row["cosine_sample/2"]) for row in rows] == pytest.approx([1.0] * 42)
    result = json.loads((run_dir / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["test_accuracy"]["last"] == pytest.approx(float(epochs[-1]["test_accuracy"]))
    assert result["validation_accuracy"] == pytest.approx(float(epochs[-1]["validation_accuracy"]))
    mean = sum(float(row["cosine_sample/1"]) for row in rows[21:]) / 21
    assert float(epochs[-1]["cosine/1"]) == pytest.approx(result["cosine"]["1"]) == pytest.approx(mean, rel=1e-5)
    assert result["cosine_by_construction"] == ["2"]
    assert result["config"]["optimizer"]["lr"] == 1e-4
    assert (run_dir / ".hydra" / "overrides.yaml").exists()
    assert (run_dir / "config.yaml").read_text().count("${") == 0
    assert not list(run_dir.glob(".*[0-9]"))


def test_the_last_checkpoint_holds_weights_feedback_and_both_optimizers(default_run):
    state = checkpoint.load(default_run[0])
    assert (state["epoch"], state["batch"]) == (2, 0)
    assert state["method"]["feedback.0.weight"].shape == (10, 256)
    assert len(state["optimizers"]) == 2
    assert all(torch.isfinite(value).all() for value in state["net"].values())


def test_the_end_of_a_run_is_a_readable_summary(default_run):
    run_dir, printed = default_run
    for words in ("test accuracy", "layer 1", "layer 2   1.000 (BP's own signal, by construction)", str(run_dir)):
        assert words in printed


def test_wandb_mirrors_the_local_files(default_run):
    run_dir, _ = default_run
    found = records(run_dir)
    logged = [item["item"] for item in found["history"]]
    for name, key in (("iterations.csv", "loss"), ("epochs.csv", "lr")):
        rows = table(run_dir / name)
        mirrored = [item for item in logged if key in item]
        assert len(mirrored) == len(rows)
        for item, row in zip(mirrored, rows, strict=True):
            values = {column: float(value) for column, value in row.items() if value}
            assert {column: item[column] for column in values} == values
    steps = {metric["name"]: metric.get("step_metric") for metric in found["metric"]}
    assert steps["loss"] == steps["cosine_sample/1"] == "iteration"
    assert steps["test_accuracy"] == steps["cosine/1"] == "epoch"
    assert [end.get("exit_code") for end in found["exit"]] == [0]
    config = found["run"][0]["config"]["update"]
    assert config["optimizer"]["betas"] == [0.9, 0.999]
    assert found["run"][0]["job_type"] == "las"
    result = json.loads((run_dir / "result.json").read_text())
    summary = {}
    for update in found["summary"]:
        summary.update(update.get("update", {}))
    for key in set(result) - {"config"}:
        assert summary[key] == result[key], key


def test_a_crashed_job_s_run_ends_as_failed_and_the_next_one_is_another(tmp_path):
    config = {key: {"name": key} for key in ("method", "model", "dataset", "augmentation", "protocol")}
    columns, ends = {"iteration": ["iteration", "loss"]}, []
    for name in ("crashed", "fine"):
        folder = tmp_path / name
        folder.mkdir()
        expectation = pytest.raises(RuntimeError) if name == "crashed" else nullcontext()
        with (
            expectation,
            track(TRACKING, folder, config, columns, "sweep") as tracker,
        ):
            tracker.log([{"iteration": 1, "loss": 0.5}])
            if name == "crashed":
                raise RuntimeError
        found = records(folder)
        assert found["run"][0]["run_group"] == "sweep"
        ends.append((found["run"][0]["run_id"], found["exit"][0].get("exit_code")))
    wandb.teardown()  # its service would serve every process that this one starts
    assert [code for _, code in ends] == [1, 0]
    assert ends[0][0] != ends[1][0]


def test_a_sweep_s_jobs_give_what_each_gives_alone(tmp_path):
    done = dfl_train(tmp_path, "--multirun", "method=bp,shallow,dfa,ltas", "seed=0,1", "sweep=grid", *QUICK)
    assert done.returncode == 0, done.stderr
    points = sorted((tmp_path / "outputs" / "grid").glob("*/result.json"))
    assert len(points) == 8
    alone = dfl_train(tmp_path, "method=ltas", "seed=1", *QUICK)
    assert alone.returncode == 0, alone.stderr
    (single,) = (tmp_path / "outputs").glob("*/*-ltas-fc-digits")
    (swept,) = (tmp_path / "outputs" / "grid").glob("ltas-fc-digits-none-seed1-*")
    assert (swept / "iterations.csv").read_text() == (single / "iterations.csv").read_text()
    weights, others = checkpoint.load(swept)["net"], checkpoint.load(single)["net"]
    assert all(torch.equal(value, others[key]) for key, value in weights.items())


def test_one_failing_job_of_a_sweep_leaves_the_others_their_results(tmp_path):
    sweep = ("--multirun", "dataset=mnist,digits", "data_dir=nowhere", "sweep=mixed", "method=bp", *QUICK)
    done = dfl_train(tmp_path, *sweep)
    assert done.returncode == 1
    assert "sweep mixed: 2 points, 1 failed, 1 finished" in done.stdout
    assert "dfl-data prepare dataset=mnist" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    results = [json.loads(path.read_text()) for path in (tmp_path / "outputs" / "mixed").glob("*/result.json")]
    assert {result["dataset"]: result["status"] for result in results} == {"mnist": "failed", "digits": "finished"}


def test_a_diverging_run_says_so_and_stops(tmp_path):
    done = dfl_train(tmp_path, "optimizer=sgd", "optimizer.lr=1e30", "epochs=3", "tracking=disabled", "method=bp")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "outputs").glob("*/*/result.json")
    result = json.loads(path.read_text())
    assert result["status"] == "diverged"
    assert "iteration" in result["reason"]
    assert len(table(path.parent / "epochs.csv")) == 1


def test_alignment_every_k_leaves_the_other_rows_empty_and_the_weights_alone(tmp_path):
    states = []
    for every in (0, 4):
        folder = tmp_path / str(every)
        folder.mkdir()
        done = dfl_train(folder, f"alignment.every={every}", "method=dfa", *QUICK)
        assert done.returncode == 0, done.stderr
        (run_dir,) = (folder / "outputs").glob("*/*")
        measured = [row["iteration"] for row in table(run_dir / "iterations.csv") if row["cosine_sample/1"]]
        assert measured == [str(i) for i in range(1, 43, 4) if every]
        states.append(checkpoint.load(run_dir)["net"])
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize(
    "choice",
    [f"{group.name}={name}" for group in sorted(CONF_DIR.iterdir()) if group.is_dir() and group.name != "hydra"
     for name in group_options(group.name)],
)  # fmt: skip
def test_every_file_of_every_group_composes(choice):
    assert check(compose([choice, *(["dataset.source.path=here"] if choice == "dataset=folder" else [])]))


def test_a_point_s_name_follows_its_science_alone():
    base = point_name(compose([]))
    assert base.startswith("las-fc-digits-none-seed0-")
    for same in (["device=cpu"], ["tracking=disabled"], ["data_dir=elsewhere"], ["sweep=name"]):
        assert point_name(compose(same)) == base
    for other in (["optimizer.lr=1e-3"], ["seed=1"], ["method.init=kaiming"], ["epochs=7"], ["limit=9"]):
        assert point_name(compose(other)) != base


def test_unknown_protocol_is_refused_with_the_choices():
    with pytest.raises(HydraException, match="authors"):
        compose(["protocol=nobody"])


def test_help_lists_the_groups_and_an_example_of_each_use(tmp_path):
    printed = dfl_train(tmp_path, "--help", environment={}).stdout
    for words in ("method: bp, dfa, las, ltas, shallow", "protocol: authors, fair, paper", "--multirun", "--cfg job"):
        assert words in printed


def test_completion_offers_a_group_s_options(tmp_path):
    line = "dfl-train method=l"
    environment = {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    done = dfl_train(tmp_path, "--shell-completion", "query=bash", environment=environment)
    assert done.stdout.split() == ["method=las", "method=ltas"]


def test_wandb_is_not_imported_when_tracking_is_off(tmp_path):
    code = (
        "import sys; from dfl_experiments.train import main\n"
        "try: main()\n"
        "finally: print('wandb' in sys.modules, file=sys.stderr)"
    )
    arguments = [sys.executable, "-c", code, "method=bp", *QUICK]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.split() == ["False"]


def test_the_wheel_works_from_any_directory(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels, site, elsewhere = tmp_path / "wheels", tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(ROOT)]
    subprocess.run(build, check=True, timeout=200)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, timeout=200)
    done = dfl_train(elsewhere, "method=dfa", *QUICK, environment={"PYTHONPATH": str(site)})
    assert done.returncode == 0, done.stderr
    assert list((elsewhere / "outputs").glob("*/*/result.json"))
    where = [sys.executable, "-c", "import dfl_experiments; print(dfl_experiments.__file__)"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    printed = subprocess.run(where, cwd=elsewhere, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.startswith(str(site))
    report = [sys.executable, "-m", "dfl_experiments.report.dfl_report", "outputs", "--format", "html"]
    subprocess.run(report, cwd=elsewhere, env=environment, check=True, timeout=100)
    assert "digits, none, fc, dfa: 1 finished" in (elsewhere / "report.html").read_text()


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_keeps_what_it_knew(stop, code, tmp_path):
    command = [sys.executable, "-m", "dfl_experiments.train", "epochs=100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        found = list((tmp_path / "outputs").glob("*/*/epochs.csv"))
        if found and len(table(found[0])) >= 3:
            break
        time.sleep(0.1)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    run_dir = found[0].parent
    result = json.loads((run_dir / "result.json").read_text())
    assert result["status"] == "interrupted"
    rows = table(run_dir / "epochs.csv")
    assert result["epochs"] == len(rows)
    assert result["test_accuracy"]["last"] == pytest.approx(float(rows[-1]["test_accuracy"]))
    found = records(run_dir)
    assert found["exit"][0]["exit_code"] != 0
    assert "interrupted" in [update.get("update", {}).get("status") for update in found["summary"]]


def test_a_run_that_starts_anew_claims_nothing_of_the_one_before(tmp_path):
    assert dfl_train(tmp_path, "hydra.run.dir=here", "method=bp", *QUICK).returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "here").rglob("*.*") if path.is_file()}
    again = dfl_train(tmp_path, "hydra.run.dir=here", "method=las", *QUICK)
    assert again.returncode == 2
    assert "holds a run already (finished)" in again.stderr
    assert {path: path.read_bytes() for path in before} == before
    missing = ("dataset=mnist", "data_dir=nowhere", "force=true")
    assert dfl_train(tmp_path, "hydra.run.dir=here", "method=las", *missing, *QUICK).returncode == 2
    assert all(path.read_bytes() == before[path] for path in before if path.suffix in (".csv", ".json", ".pt"))
    assert dfl_train(tmp_path, "hydra.run.dir=here", "method=las", "force=true", *QUICK).returncode == 0
    assert json.loads((tmp_path / "here" / "result.json").read_text())["method"] == "las"


def test_the_training_loss_is_the_mean_over_images(tmp_path):
    done = dfl_train(tmp_path, "epochs=1", "limit=65", "tracking=disabled", "alignment.every=7")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "outputs").glob("*/*/epochs.csv")
    first, second = (float(row["loss"]) for row in table(path.parent / "iterations.csv"))
    assert float(table(path)[0]["train_loss"]) == pytest.approx((64 * first + second) / 65)
