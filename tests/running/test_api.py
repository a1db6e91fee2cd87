"""The Python API: run, load, predict, evaluate, and read tables of runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import dfl_train
from sklearn.datasets import load_digits
from torch.nn.utils import parameters_to_vector

import dfl_experiments as dfl
from dfl_experiments.errors import UserError
from dfl_experiments.running import device
from dfl_experiments.running.checkpoint import load_checkpoint

OPTIONS = ["epochs=3", "optimizer.lr=3e-3", "tracking=disabled", "threads=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("api") / "run"
    dfl.run(dfl.compose(OPTIONS), run_dir)
    return run_dir


def test_loaded_run_predicts_raw_images_and_reproduces_its_accuracy(folder):
    run = dfl.load_run(folder)
    assert run.evaluate()["accuracy"] == run.result["accuracy"]
    digits = load_digits()
    images = np.rint(digits.images * 255 / 16).astype(np.uint8)[:, None]
    predicted = run.predict(images).argmax(1).numpy()
    assert (predicted == digits.target).mean() > 0.8
    assert len(run.epochs) == 3
    assert run.iterations.epoch.max() == 3
    assert run.config["method"]["name"] == "las"


def test_run_of_a_gpu_in_tf32_is_evaluated_on_the_cpu(folder):
    run = dfl.load_run(folder)
    run.config = run.config | {"device": "cuda", "precision": "tf32"}
    assert run.evaluate()["accuracy"] == run.result["accuracy"]


def test_second_run_in_a_folder_is_refused_unless_it_resumes(folder):
    refusal = r'has a run already \(finished\); exist_ok="resume" .* another run_dir keeps both$'
    for changed in ([], ["epochs=4"]):
        with pytest.raises(UserError, match=refusal):
            dfl.run(dfl.compose([*OPTIONS, *changed]), folder)
    for value in (True, "overwrite"):
        with pytest.raises(UserError, match=f'exist_ok={value!r}: must be False or "resume"'):
            dfl.run(dfl.compose(OPTIONS), folder, exist_ok=value)
    again = dfl.run(dfl.compose(OPTIONS), folder, exist_ok="resume")
    assert again["finished_at"] == dfl.load_run(folder).result["finished_at"]


def test_run_returns_what_result_json_has(tmp_path):
    """Shallow sends no signal to layer 1, so that layer has no cosine."""
    options = [*OPTIONS, "method=shallow", "model.widths=[8,8,8]", "limit=64"]
    result = dfl.run(dfl.compose(options), tmp_path / "run")
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result == {key: written[key] for key in result}
    assert result["cosine"]["1"] is None


def samples_of(kind):
    """Return 300 samples of three classes with 12 features, and their labels.

    kind: "bytes" for whole numbers from 0 to 255, "raw" for features of sizes from 1e-4 to 1e7.
    """
    random = np.random.default_rng(1)
    labels = random.integers(0, 3, 300)
    features = random.normal(size=(3, 12))[labels] + random.normal(size=(300, 12)) / 2
    if kind == "bytes":  # features must not be divided by 255, as images are
        return np.rint(features * 20 + 128).clip(0, 255), labels
    return features * 10.0 ** np.arange(-4, 8) + 7, labels


@pytest.mark.parametrize("kind", ["raw", "bytes"])
def test_run_on_features_predicts_raw_features_without_its_data_file(kind, tmp_path):
    features, labels = samples_of(kind)
    data = tmp_path / "data.npz"
    np.savez(
        data,
        X_train=features[:240],
        y_train=labels[:240],
        X_test=features[240:],
        y_test=labels[240:],
    )
    options = (
        "dataset=arrays",
        "dataset.source.path=data.npz",
        "model.widths=[64,64]",
        "hydra.run.dir=here",
    )
    assert dfl_train(tmp_path, *options, *OPTIONS, "epochs=5").returncode == 0
    data.unlink()
    run = dfl.load_run(tmp_path / "here")
    accuracy = run.result["accuracy"]
    assert accuracy > 0.8
    raw = features[240:].astype(np.uint8) if kind == "bytes" else features[240:]
    for samples in (raw, torch.from_numpy(raw)):
        predicted = run.predict(samples).argmax(1).numpy()
        assert (predicted == labels[240:]).mean() == accuracy


def test_class_accuracy_shows_a_rare_class_that_is_never_predicted(tmp_path):
    features, labels = samples_of("raw")
    labels = labels.clip(max=1)
    labels[np.flatnonzero(labels == 0)[:4]] = 2  # they look like samples of class 0
    train, test = slice(0, 150), slice(0, None)
    np.savez(
        tmp_path / "data.npz",
        X_train=features[train],
        y_train=labels[train],
        X_test=features[test],
        y_test=labels[test],
    )
    options = ["dataset=arrays", "dataset.source.path=data.npz", "hydra.run.dir=here"]
    done = dfl_train(tmp_path, *options, *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert "0 in 1 of 3 classes" in done.stdout
    run = dfl.load_run(tmp_path / "here")
    predicted = run.predict(features).argmax(1).numpy()
    shares = {}
    for label in range(3):
        shares[str(label)] = (predicted[labels == label] == label).mean()
    assert run.result["class_accuracy"] == pytest.approx(shares)
    assert shares["2"] == 0 < min(shares["0"], shares["1"])


IMAGES = np.zeros((3, 1, 8, 8), np.uint8)
OTHER_INPUT = {
    "floats": IMAGES.astype(np.float32),
    "wide integers": IMAGES.astype(np.uint16),
    "channels last": IMAGES.transpose(0, 2, 3, 1),
}


@pytest.mark.parametrize("case", OTHER_INPUT)
def test_run_on_images_refuses_other_input(folder, case):
    run = dfl.load_run(folder)
    assert run.result["samples"] == "images"
    with pytest.raises(
        UserError,
        match=r"run: needs uint8 images of shape \(N, 1, 8, 8\), but gets \w+ of shape \(",
    ):
        run.predict(OTHER_INPUT[case])


def test_predict_accepts_grey_images_without_channel_axis(folder):
    run = dfl.load_run(folder)
    images = np.arange(4 * 64, dtype=np.uint8).reshape(4, 1, 8, 8)
    assert torch.equal(run.predict(images[:, 0]), run.predict(images))


def test_predict_uses_evaluation_mode(tmp_path):
    options = ["model=conv3_bn", "model.channels=[2]", "model.widths=[4]", "epochs=1", "limit=64"]
    dfl.run(dfl.compose([*options, "tracking=disabled", "threads=1"]), tmp_path / "bn")
    run = dfl.load_run(tmp_path / "bn")
    expected = run.predict(IMAGES)
    run.net.train()
    assert torch.equal(run.predict(IMAGES), expected)


def test_predict_does_not_depend_on_memory_layout(folder):
    run = dfl.load_run(folder)
    images = np.arange(4 * 64, dtype=np.uint8).reshape(4, 1, 8, 8)
    expected = run.predict(images)
    assert torch.equal(run.predict(images[::-1]), expected.flip(0))
    assert torch.equal(run.predict(np.asfortranarray(images)), expected)


def options_for_arrays(folder, features, labels):
    """Write the samples to data.npz and return the options of a run on it. The first 60 serve as test samples too."""
    np.savez(
        folder / "data.npz",
        X_train=features,
        y_train=labels,
        X_test=features[:60],
        y_test=labels[:60],
    )
    return [
        "dataset=arrays",
        f"dataset.source.path={folder / 'data.npz'}",
        "model.widths=[32]",
        *OPTIONS,
    ]


@pytest.mark.parametrize("standardise", [True, False])
def test_run_on_features_accepts_all_number_types_but_only_its_shape(tmp_path, standardise):
    features, labels = samples_of("bytes")
    features = features.reshape(300, 3, 2, 2)
    options = options_for_arrays(tmp_path, features, labels)
    dfl.run(dfl.compose([*options, f"dataset.standardise={standardise}"]), tmp_path / "here")
    run = dfl.load_run(tmp_path / "here")
    expected = run.predict(features)
    for dtype in (np.uint8, np.int64, np.float32, ">f8"):  # uint8 features are not images
        assert torch.equal(run.predict(features.astype(dtype)), expected)
    for wrong in (features[:, :1], features[0], features.astype(complex), features.astype(str)):
        with pytest.raises(
            UserError, match=r"here: needs float features of shape \(N, 3, 2, 2\), but gets "
        ):
            run.predict(wrong)


def test_evaluate_takes_moved_data_and_refuses_changed_data(tmp_path):
    features, labels = samples_of("raw")
    options = options_for_arrays(tmp_path, features, labels)
    result = dfl.run(dfl.compose(options), tmp_path / "here")
    run = dfl.load_run(tmp_path / "here")
    assert run.evaluate()["accuracy"] == result["accuracy"]
    (tmp_path / "data.npz").rename(tmp_path / "moved.npz")
    run.config["dataset"]["source"]["path"] = str(tmp_path / "moved.npz")
    assert run.evaluate()["accuracy"] == result["accuracy"]
    run.config["dataset"]["source"]["path"] = str(tmp_path / "data.npz")
    options_for_arrays(tmp_path, features * 5 + 3, labels)
    with pytest.raises(
        UserError,
        match=r"here: has a run with other data or code: data \w+, now \w+; restore the data",
    ):
        run.evaluate()
    del run.result["data"]  # early versions recorded no digest of the data
    run.evaluate()
    assert run.predict(features).shape == (300, 3)


def test_run_of_an_early_version_is_not_used_for_predictions(folder):
    run = dfl.load_run(folder)
    del run.result["samples"]
    with pytest.raises(UserError, match="an early version made this run; repeat the run"):
        run.predict(IMAGES)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("method=las", "takes a list"),
        (["method=lass"], "did you mean las"),
        (["epochs=x"], "epochs='x'"),
    ],
)
def test_compose_gives_the_error_messages_of_the_command_line(overrides, words):
    with pytest.raises(UserError, match=words):
        dfl.compose(overrides)


def test_feedback_weights_can_have_their_own_schedule(tmp_path):
    """The rate of B falls by 1e-9 after the first epoch, so B stays; the rate of W is constant, so W changes."""
    options = ["method=ltas", "optimizer=sgd", "schedule=constant", "limit=128", *OPTIONS[2:]]
    options += ["+schedule@schedule.feedback=exponential", "schedule.feedback.decay=1e-9"]
    states = []
    for epochs in (1, 2):
        folder = tmp_path / str(epochs)
        dfl.run(dfl.compose([*options, f"epochs={epochs}"]), folder)
        states.append(load_checkpoint(folder))
    for part, changes in (("method", False), ("net", True)):
        first, second = (parameters_to_vector(state[part].values()) for state in states)
        assert (torch.norm(first - second) > 1e-6 * torch.norm(first)) == changes


def test_compose_reads_options_from_config_dir(tmp_path):
    (tmp_path / "model").mkdir()
    lines = [
        "name: small",
        "_target_: dfl_experiments.models.fc",
        "widths: [8]",
        "activation: tanh",
    ]
    (tmp_path / "model" / "small.yaml").write_text("\n".join(lines))
    assert dfl.compose(["model=small"], config_dir=tmp_path).values["model"]["widths"] == [8]
    with pytest.raises(UserError, match="model=small: there are"):
        dfl.compose(["model=small"])
    (tmp_path / "model" / "small.yaml").write_bytes("name: small\n# Größe\n".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8 text after '# Gr'; save it as UTF-8"):
        dfl.compose(["model=small"], config_dir=tmp_path)


def test_bfloat16_is_refused_where_pytorch_computes_wrong_gradients(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "processor_flags", lambda: {"amx_bf16"})
    small = [
        "model=torchvision",
        "model.net=resnet18",
        "method=bp",
        "smoke=8",
        "epochs=1",
        "tracking=disabled",
    ]
    with pytest.raises(
        UserError, match=r"\(AMX\) PyTorch computes a wrong gradient for \S*layer3.0.conv1"
    ):
        dfl.run(dfl.compose([*small, "precision=bfloat16"]), tmp_path / "bfloat16")
    assert dfl.run(dfl.compose(small), tmp_path / "float32")["status"] == "finished"


def test_unknown_table_and_empty_frame_are_refused(folder):
    with pytest.raises(UserError, match="table='steps': choose epochs or iterations"):
        dfl.read_rows(folder, "steps")
    kept = Path(__file__).parents[2] / "outputs" / "reference" / "rules_mnist"
    with pytest.raises(UserError, match=r"iterations\.csv: no such file"):
        dfl.read_rows(next(kept.glob("bp-*")), "iterations")
    with pytest.raises(UserError, match="frame: has no runs to draw"):
        dfl.draw(dfl.runs(folder).iloc[:0])


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_read_rows_leaves_out_an_incomplete_last_line(rows, folder, tmp_path):
    whole = (folder / "epochs.csv").read_text()
    lines = whole.splitlines(keepends=True)
    part = whole[-40:-10]  # what a killed process left
    (tmp_path / "epochs.csv").write_text("".join(lines[: 1 + rows]) + part)
    expected = {name: column[:rows] for name, column in dfl.read_rows(folder).items()}
    np.testing.assert_equal(dfl.read_rows(tmp_path), expected)


def test_dir_lists_the_public_names():
    assert set(dir(dfl)) >= {"compose", "draw", "load_run", "rule", "run", "runs"}


@pytest.mark.parametrize("load", [dfl.load_run, dfl.load_net, dfl.read_rows])
def test_loading_refuses_a_folder_that_is_not_a_run(load, folder, tmp_path):
    with pytest.raises(UserError, match=r"is a folder of runs, not one run; dfl\.runs\(.* lists"):
        load(folder.parent)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no result\.json"):
        load(tmp_path)


def test_curves_and_draw_take_only_a_frame_of_runs(folder):
    runs = dfl.runs(folder)
    assert len(dfl.curves(runs)) == len(dfl.curves(runs[:1], table="epochs")) == 3
    assert "what: names of quantities" in dfl.draw.__doc__
    for function in (dfl.curves, dfl.draw):
        for wrong in (str(folder), folder, runs.iloc[0]):
            with pytest.raises(
                UserError, match=r"takes the table that dfl\.runs\(folder\) returns"
            ):
                function(wrong)
        with pytest.raises(UserError, match="not a PosixPath"):
            function(frame=folder)
        with pytest.raises(TypeError, match="frame"):
            function()
