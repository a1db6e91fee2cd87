"""dataset=arrays: which arrays an .npz file may hold, what reaches the net, and what is refused."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import Made
from processes import dfl_train, ended, forked

import dfl_experiments as dfl
from dfl_experiments.configuration.composition import compose, config_digest, point_name
from dfl_experiments.data.batches import Normalise, count_new_variation, preparation
from dfl_experiments.data.packs import load_pack, load_with_digest, warn_of_channels_last
from dfl_experiments.data.packs import test_images_in_training as images_in_training
from dfl_experiments.data.sources import Digits
from dfl_experiments.data.sources_arrays import ArrayFile
from dfl_experiments.running.checkpoint import load_checkpoint
from dfl_experiments.running.result import read_result

QUIET = ("tracking=disabled", "threads=1", "alignment.every=0", "hydra.run.dir=here")
NPZ = ("dataset=arrays", "dataset.source.path=data.npz")
RANDOM = np.random.default_rng(0)


def write(folder: Path, **changed) -> Path:
    """Write data.npz with 240 training and 60 test samples of three classes with 12 features, and return its path.

    changed: parts that replace the default ones; None leaves a part out.
    """
    random = np.random.default_rng(1)
    labels = random.integers(0, 3, 300)
    centres = random.normal(size=(3, 12))
    # features of very different sizes: without standardisation the large ones would dominate
    features = (centres[labels] + random.normal(size=(300, 12)) / 2) * 10.0 ** np.arange(-4, 8) + 7
    defaults = {
        "X_train": features[:240],
        "y_train": labels[:240],
        "X_test": features[240:],
        "y_test": labels[240:],
    }
    parts = defaults | changed
    np.savez(
        folder / "data.npz", **{name: parts[name] for name in parts if parts[name] is not None}
    )
    return folder / "data.npz"


def reshaped(folder: Path, *shape: int, dtype: type = np.float64) -> None:
    """Write the features of `write` in another shape and type."""
    with np.load(write(folder)) as parts:
        samples = {
            name: parts[name].reshape(-1, *shape).astype(dtype) for name in ("X_train", "X_test")
        }
    write(folder, **samples)


def trained(folder: Path, *arguments: str) -> dict:
    """Train a run in `folder`/here and return its result."""
    done = dfl_train(folder, *NPZ, *QUIET, *arguments)
    assert done.returncode == 0, done.stderr
    result = read_result(folder / "here")
    assert result is not None
    return result


@pytest.mark.parametrize("shape", [(12,), (3, 4), (3, 2, 2), (1, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float_features_of_any_shape_are_learnt(tmp_path, shape, dtype):
    reshaped(tmp_path, *shape, dtype=dtype)
    rate = ("optimizer.lr=3e-3", "epochs=5", "dataset.fc_widths=[64,64]")
    result = trained(tmp_path, *rate)
    assert result["input_shape"] == list(shape)
    # with more axes the mean and std are per channel, over features of different sizes
    if len(shape) == 1:
        assert result["accuracy"] > 0.8


def test_digits_as_features_are_learnt_as_well_as_digits_as_images(tmp_path):
    digits = load_pack("digits", Digits(), tmp_path)
    images = {"X_train": digits.train_images, "X_test": digits.test_images}
    labels = {"y_train": digits.train_labels, "y_test": digits.test_labels}
    options = ("epochs=10", "method=bp", "dataset.fc_widths=[64,64]", "optimizer.lr=1e-3")
    normalise = Normalise([0.5], [0.25])
    floats = {
        name: normalise(torch.from_numpy(part)).flatten(1).numpy() for name, part in images.items()
    }
    raw = {name: part.reshape(len(part), -1).astype(float) for name, part in images.items()}
    planes = {name: part[:, 0] for name, part in images.items()}
    kinds = {
        "images": (images, ()),
        "planes": (planes, ()),
        "normalised": (floats, ("dataset.standardise=false",)),
        "raw": (raw, ()),
    }
    results = {}
    for name, (samples, extra) in kinds.items():
        write(tmp_path, **samples, **labels)
        results[name] = trained(tmp_path, *options, *extra, "force=true")
    accuracy = {name: result["accuracy"] for name, result in results.items()}
    loss = {name: result["validation_loss"] for name, result in results.items()}
    assert accuracy["images"] > 0.93
    assert accuracy["planes"] == accuracy["images"]
    assert results["planes"]["input_shape"] == [1, 8, 8]
    # the net gets the same numbers from normalised floats
    assert loss["normalised"] == pytest.approx(loss["images"], rel=1e-3)
    assert accuracy["raw"] > accuracy["images"] - 0.03


MODEL = """
import torch
from torch import Tensor, nn
from dfl_experiments.engine.blocknet import Block, BlockNet

class LookUp(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.int64, x.dtype
        return super().forward(x).flatten(1)

def tokens(input_shape: tuple[int, ...], num_classes: int, vocabulary: int) -> BlockNet:
    first = Block(nn.Sequential(LookUp(vocabulary, 8), nn.Linear(8 * input_shape[0], 32)), nn.ReLU())
    return BlockNet(first, head=nn.Linear(32, num_classes), input_shape=input_shape)
"""


@pytest.fixture
def token_model(tmp_path, monkeypatch) -> tuple[str, ...]:
    """Write tokens, of which the first decides the class. Return the options for a model with an embedding."""
    tokens = np.random.default_rng(2).integers(0, 20, (600, 6)).astype(np.int32)
    labels = (tokens[:, 0] > 9).astype(np.uint8)
    write(
        tmp_path,
        X_train=tokens[:500],
        y_train=labels[:500],
        X_test=tokens[500:],
        y_test=labels[500:],
    )
    (tmp_path / "my_tokens.py").write_text(MODEL)
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "look_up.yaml").write_text(
        "name: look_up\n_target_: my_tokens.tokens\nvocabulary: 20\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "--config-dir", "conf", "plugins=[my_tokens]", "model=look_up"


@pytest.mark.parametrize(
    ("method", "precision"), [("las", "bfloat16"), ("fa", "float32"), ("dfa", "float32")]
)
def test_tokens_reach_the_net_as_integers(tmp_path, token_model, method, precision):
    options = (
        f"method={method}",
        f"precision={precision}",
        "epochs=15",
        "optimizer.lr=1e-2",
        "alignment.every=5",
    )
    result = trained(tmp_path, *token_model, *options)
    assert result["accuracy"] > 0.8
    assert result["input_shape"] == [6]


def test_module_can_read_tokens_without_an_embedding(tmp_path, token_model):
    module = """
import torch

class OneHot(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.one_hot(x, 20).float().flatten(1)

def one_hot():
    return torch.nn.Sequential(OneHot(), torch.nn.Linear(120, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
"""
    (tmp_path / "my_module.py").write_text(module)
    model = ("model=module", "model._target_=my_module.one_hot", "model.name=one_hot")
    result = trained(
        tmp_path, "plugins=[my_module]", *model, "method=dfa", "epochs=15", "optimizer.lr=1e-2"
    )
    assert result["accuracy"] > 0.8
    run = dfl.load_run(tmp_path / "here", ["my_module"])
    assert run.predict(np.zeros((3, 6), np.int32)).shape == (3, 2)


def test_tokens_are_refused_beyond_the_vocabulary_and_by_nets_for_floats(tmp_path, token_model):
    for options in ((*token_model, "model.vocabulary=19"), ("model=fc",)):
        done = dfl_train(tmp_path, *NPZ, *QUIET, *options)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "the forward pass fails for input shape (6,) of integers up to 19 (" in done.stderr
        assert not (tmp_path / "here").exists()
    assert "; integers are tokens; save features as float32" in done.stderr


def ones_with(value: float, index: tuple[int, int]) -> np.ndarray:
    """Return training samples of ones with another value at one index."""
    samples = np.ones((240, 12))
    samples[index] = value
    return samples


LABELS = np.arange(240) % 3
PICTURES = np.zeros((240, 8, 8, 3), np.uint8)
REFUSED = {
    "no part": ({"X_test": None}, (), "X_test is not a file in the archive"),
    "not a number": ({"X_train": ones_with(np.nan, (17, 3))}, (), "X_train: holds nan at [17, 3]"),
    "beyond float32": ({"X_train": ones_with(1e39, (2, 0))}, (), "X_train: holds 1e+39 at [2, 0]"),
    "channels last": ({"X_train": PICTURES}, (), "X_train: (240, 8, 8, 3) is (N, H, W, C)"),
    "negative tokens": (
        {"X_train": np.full((240, 12), -1)},
        (),
        "X_train: tokens must be 0 or more",
    ),
    "other kind": (
        {"X_test": np.ones((60, 12), int)},
        (),
        "X_test: has tokens of shape (12,), but",
    ),
    "other shape": ({"X_test": np.ones((60, 11))}, (), "features of shape (11,), but"),
    "too few labels": ({"y_train": LABELS[:9]}, (), "y_train: must be 240 integers, is int64 (9,)"),
    "texts for labels": (
        {"y_train": LABELS.astype(str)},
        (),
        "y_train: must be 240 integers, is <U21 (240,); before the split, np.unique(y, return_inverse=True)",
    ),
    "targets of a regression": (
        {"y_train": LABELS / 2},
        (),
        "y_train: must be 240 integers, is float64",
    ),
    "one-hot labels": ({"y_train": np.eye(3, dtype=int)[LABELS]}, (), "is int64 (240, 3)"),
    "a negative label": (
        {"y_train": LABELS - 1},
        (),
        "labels must be 0 to 1, one for each class; they range from -1",
    ),
    "a label outside": ({"y_test": LABELS[:60] + 1}, (), "y_test: labels must be 0 to 2"),
    "years for labels": ({"y_train": LABELS + 2000}, (), "y_train: has the label 2002"),
    "one class": (
        {"y_train": LABELS * 0, "y_test": LABELS[:60] * 0},
        (),
        "y_train: must name at least two classes",
    ),
    "a net for images": (
        {},
        ("model=conv3",),
        "model=conv3: needs samples with 3 axes, but their shape is (12,)",
    ),
    "augmentation": (
        {},
        ("augmentation=crop_flip",),
        "augmentation=crop_flip: needs uint8 images larger",
    ),
    "channels of an augmentation": (
        {name: np.zeros((240, 4, 8, 8), np.uint8) for name in ("X_train", "X_test")}
        | {"y_train": LABELS, "y_test": LABELS},
        ("augmentation=randaugment_cutout_flip",),
        "needs images of 1 or 3 channels, not 4",
    ),
    "another name": (
        {},
        ("dataset.name=mnist",),
        "dataset.name='mnist': this name does not belong to the data source",
    ),
    "absent": ({}, ("dataset.source.path=none.npz",), "no such file"),
    "no archive": ({}, ("dataset.source.path=words.npz",), "File is not a zip file"),
    "no path": ({}, ("dataset.source.path=???",), "dataset.source.path: missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsuitable_arrays_are_refused_in_one_line_before_training(tmp_path, case):
    changed, options, message = REFUSED[case]
    write(tmp_path, **changed)
    (tmp_path / "words.npz").write_text("words")
    done = dfl_train(tmp_path, *NPZ, *QUIET, *options)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert message in done.stderr
    assert not (tmp_path / "here").exists()


def test_class_without_training_samples_and_all_integer_types_are_allowed(tmp_path):
    write(
        tmp_path, y_train=(LABELS * 2).astype(np.uint8), y_test=(LABELS[:60] + 1).astype(np.int16)
    )
    assert trained(tmp_path, "epochs=1")["num_classes"] == 5
    log = (tmp_path / "here" / "run.log").read_text()
    assert log.count("arrays: 2 of 5 classes have no training sample, such as 1\n") == 1


@pytest.mark.parametrize(
    "types", [("f4", "f4"), ("f8", "f4"), ("f4", "f8"), (">f4", "<f4"), ("i4", "i8")]
)
def test_test_samples_among_training_samples_are_found_for_all_types(types, caplog):
    samples = np.round(RANDOM.normal(size=(9, 5)) * 1e3, 3 if "f" in types[0] else 0)
    train, test = samples[:7].astype(types[0]), samples[4:].astype(types[1])
    assert images_in_training("made", Made(train_images=train, test_images=test).arrays) == 3
    assert caplog.messages == ["made: 3 of 5 test samples are also training samples"]


def test_features_constant_only_in_training_are_warned_about(tmp_path):
    with np.load(write(tmp_path)) as parts:
        train, test = parts["X_train"], parts["X_test"]
    train[:, 3:6] = test[:, 3:6] = 0.1
    test[7, 4], test[8, 5] = 1e6, -1e6
    write(tmp_path, X_train=train, X_test=test.astype(np.float32))
    trained(tmp_path, "epochs=1")
    log = (tmp_path / "here" / "run.log").read_text()
    assert (
        log.count(
            "arrays: 2 features are constant in the training samples, but not in the test samples"
        )
        == 1
    )


def test_features_with_the_shape_of_images_h_w_c_are_warned_about(caplog):
    for shape in ((8, 8, 3), (3, 8, 8), (8, 3)):
        features = RANDOM.normal(size=(7, *shape))
        warn_of_channels_last("made", Made(train_images=features, test_images=features).arrays)
    assert len(caplog.messages) == 1
    assert "features of shape (8, 8, 3) are read as (C, H, W)" in caplog.text


def test_features_in_another_shape_have_another_digest(tmp_path):
    digests = set()
    for shape in ((12,), (4, 3), (3, 4), (3, 2, 2)):
        reshaped(tmp_path, *shape)
        source = ArrayFile(str(tmp_path / "data.npz"))
        digests.add(load_with_digest("arrays", source, tmp_path)[1])
    assert len(digests) == 4


@pytest.mark.parametrize("shape", [(4,), (5, 4), (4, 3, 2)], ids=str)
def test_constant_features_are_counted_along_their_axis(shape):
    training, test = RANDOM.normal(size=(9, *shape)), RANDOM.normal(size=(6, *shape))
    first = (slice(None), slice(None), 0) if len(shape) == 2 else (slice(None), 0)
    assert count_new_variation(training, test) == 0
    training[first] = 2.0
    assert count_new_variation(training, test) == 1
    test[first] = 2.0
    assert count_new_variation(training, test) == 0


def test_npz_is_read_directly_and_not_packed(tmp_path):
    path = write(tmp_path)
    arrays = load_pack("arrays", ArrayFile(str(path)), tmp_path / "data")
    assert not (tmp_path / "data").exists()
    with np.load(path) as parts:
        assert np.array_equal(arrays.train_images, parts["X_train"])
        assert np.array_equal(arrays.test_labels, parts["y_test"])
    assert arrays.classes == ["0", "1", "2"]


SOURCE = """
import numpy as np
from dfl_experiments.data.sources import Arrays, Source

class Noise(Source):
    def __init__(self, kind: str, is_packed: bool) -> None:
        self.kind, self.is_packed = kind, is_packed

    def cache_name(self, name):
        return name if self.is_packed else None

    def read(self, data_dir, download):
        labels = np.arange(200) % 2
        samples = np.random.default_rng(0).normal(size=(200, 3, 16, 16)) + labels[:, None, None, None]
        if self.kind == "tokens":
            samples = (samples * 50).astype(np.int32)[:, 0, 0] % 9
        if self.kind == "gaps":
            samples[7, 0, 0, 1] = np.nan
        return Arrays(samples, labels, samples[:50], labels[:50], ["no", "yes"])
"""


DATASET = """
name: mine
source: {_target_: my_source.Noise, kind: floats, is_packed: true}
mean: [0.5]
std: [0.25]
epochs: 3
fc_widths: [32]
"""


@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "unpacked"])
def test_own_source_may_return_floats_or_tokens_but_no_gaps(tmp_path, token_model, is_packed):
    (tmp_path / "my_source.py").write_text(SOURCE)
    (tmp_path / "conf" / "dataset").mkdir()
    (tmp_path / "conf" / "dataset" / "mine.yaml").write_text(DATASET)
    dataset = (
        "--config-dir",
        "conf",
        "plugins=[my_source,my_tokens]",
        "dataset=mine",
        "data_dir=.",
        *QUIET,
    )

    def run(kind: str, *options: str) -> tuple[int, str]:
        source = (
            f"dataset.source.kind={kind}",
            f"dataset.source.is_packed={is_packed}",
            "force=true",
        )
        done = dfl_train(tmp_path, *dataset, *source, *options)
        return done.returncode, done.stderr

    name = "mine/train_images.npy" if is_packed else "dataset mine: train_images"
    code, error = run("gaps")
    assert code == 2
    assert error.count("\n") == 1
    assert f"{name}: holds nan at [7, 0, 0, 1]; values must be finite" in error
    small = (
        "model.channels=[4,4,4]",
        "model.widths=[16]",
        "memory_format=channels_last",
        "optimizer.lr=1e-2",
        "epochs=12",
    )
    assert run("floats", "model=conv3", *small) == (0, "")
    assert (tmp_path / "mine" / "train_images.npy").exists() == is_packed
    result = read_result(tmp_path / "here")
    assert result["input_shape"] == [3, 16, 16]
    assert result["accuracy"] > 0.9
    assert run("tokens", "dataset.name=words", "model=look_up", "model.vocabulary=9") == (0, "")


@pytest.mark.parametrize(
    ("shape", "axes"), [((30, 4), 0), ((30, 5, 4), (0, 1)), ((30, 4, 2, 3), (0, 2, 3))], ids=str
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_standardised_features_have_mean_0_and_deviation_1(shape, axes, dtype):
    training = (RANDOM.normal(size=shape) * 1e-3 + 1e3).astype(dtype)
    prepared = preparation(training, True)(training)
    assert prepared.dtype == np.float32
    assert np.abs(prepared.mean(axes, np.float64)).max() < 1e-5
    assert np.abs(prepared.std(axes, np.float64) - 1).max() < 1e-5
    assert np.array_equal(preparation(training, False)(training), training.astype(np.float32))


def test_standardisation_uses_training_samples_only_and_zeroes_constant_features():
    training = RANDOM.normal(size=(50, 3))
    training[:, 0], training[:, 1] = 0.1, 0
    prepare = preparation(training, True)
    assert np.abs(prepare(training)[:, :2]).max() < 1e-12
    other = RANDOM.normal(size=(7, 3)) + 5
    expected = (other[:, 2] - training[:, 2].mean()) / training[:, 2].std()
    np.testing.assert_allclose(prepare(other)[:, 2], expected, rtol=1e-6)
    images = RANDOM.integers(0, 256, (3, 1, 2, 2)).astype(np.uint8)
    assert preparation(images, True)(images) is images


def test_killed_and_resumed_run_on_features_is_bitwise_equal(tmp_path):
    write(tmp_path)
    options = (
        *NPZ,
        *QUIET[:3],
        "epochs=30",
        "checkpoint.every_seconds=0.003",
        "dataset.fc_widths=[32,32]",
    )
    assert dfl_train(tmp_path, *options, "hydra.run.dir=whole").returncode == 0
    pid = forked(tmp_path, *options, "hydra.run.dir=broken")
    deadline = time.monotonic() + 60
    while not (tmp_path / "broken" / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    assert ended(pid) == -signal.SIGKILL
    assert dfl_train(tmp_path, "resume=broken").returncode == 0
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert (broken / "iterations.csv").read_bytes() == (whole / "iterations.csv").read_bytes()
    torch.testing.assert_close(
        load_checkpoint(broken)["net"], load_checkpoint(whole)["net"], rtol=0, atol=0
    )
    with np.load(tmp_path / "data.npz") as parts:
        write(tmp_path, X_train=parts["X_train"] + 1)
    changed = dfl_train(tmp_path, "resume=broken")
    assert changed.returncode == 2
    assert "has a run with other data or code: data " in changed.stderr
    dry = dfl_train(tmp_path, "resume=broken", "--dry-run").stdout
    assert "1 will be refused; the first: broken: has a run with other data or code: data " in dry


def test_validation_split_option_keeps_recorded_names():
    before = compose([])
    assert before.validation_split == "random"
    stratified = compose(["validation_split=stratified"])
    assert config_digest(stratified) != config_digest(before)
    del before.validation_split
    assert point_name(before) == point_name(compose([]))
