"""A step runs the same operators every time, reads no value, and uses only the memory that it needs."""

import copy
import json
import math
import random

import numpy as np
import pytest
import torch
from conftest import CROSS, MODELS, Tiny, assert_near, roundoff
from measuring import peak_mb
from processes import dfl_train
from torch.utils._python_dispatch import TorchDispatchMode

from dfl_experiments.engine.alignment import (
    by_dots,
    by_products,
    compare,
    only_rounding,
    signal_products,
)
from dfl_experiments.engine.losses import CrossEntropy
from dfl_experiments.methods import SignSymmetry, WeightMirror

WAITING = {"_local_scalar_dense", "nonzero", "equal", "unique", "_unique2", "masked_select"}
# F.one_hot looks at its labels' range on a CPU, and on no GPU
RANGE_CHECK = "aminmax _local_scalar_dense _local_scalar_dense"


class Operators(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@CROSS
@pytest.mark.parametrize("align", [False, True])
def test_a_step_asks_for_the_same_operators_every_time_and_for_no_value(method, model, align):
    """A CUDA graph needs this: no operator depends on the numbers, and none waits for them."""
    t = Tiny(method, model)
    t.learner.step(t.x, t.target, align)
    steps = []
    for scale in (1.0, -0.5):
        with Operators() as operators:
            t.learner.step(t.x * scale, t.target, align)
        steps.append(" ".join(operators.names).replace(RANGE_CHECK, "").split())
    changed = [pair for pair in zip(*steps, strict=True) if pair[0] != pair[1]]
    assert not changed
    waits = WAITING & set(steps[0])
    assert not waits


@CROSS
def test_a_step_draws_from_the_default_generator_and_leaves_all_else_as_it_is(method, model):
    """A CUDA graph needs this too: only the registered generator is used, and no Python state changes in a step."""
    t = Tiny(method, model)
    t.learner.step(t.x, t.target)
    twin = copy.deepcopy(t)
    before = python_state(t.method)
    for each in (t, twin):
        torch.manual_seed(0)
        random.random()  # other numbers for the twin, if a method asked for these
        np.random.rand()
        each.learner.step(each.x, each.target)
    assert python_state(t.method) == before
    for key, value in t.state().items():
        assert torch.equal(twin.state()[key], value)


def python_state(method):
    """The plain values among a method's attributes."""
    kinds = (bool, int, float, str, tuple, list, frozenset, set)
    return {name: repr(value) for name, value in vars(method).items() if isinstance(value, kinds)}


@CROSS
def test_a_step_s_numbers_are_there_under_their_names(method, model):
    t = Tiny(method, model)
    trace = t.net.trace(t.x)
    loss, _ = t.loss.value_and_error(trace.logits, t.target)
    found = dict(
        zip(t.learner.metric_names, t.learner.step(t.x, t.target, align=True), strict=True)
    )
    assert torch.equal(found["loss"], loss)
    assert found["correct"] == (trace.logits.argmax(1) == t.target).sum()
    assert found[f"cosine_sample/{t.net.depth - 1}"] <= 1 + 1e-12
    unmeasured = dict(zip(t.learner.metric_names, t.learner.step(t.x, t.target), strict=True))
    assert {name for name, value in unmeasured.items() if not value.isnan()} == {"loss", "correct"}


@CROSS
def test_bfloat16_steps_stay_close_and_keep_their_weights_in_float32(method, model):
    exact, rounded = Tiny(method, model), Tiny(method, model)
    for t in (exact, rounded):
        t.net.float()
        t.method.float()
        t.x = t.x.float()
    rounded.learner.precision = "bfloat16"
    rows = [t.learner.step(t.x, t.target, align=True) for t in (exact, rounded)]
    assert abs(rows[0][0] - rows[1][0]) < roundoff(exact.results, torch.bfloat16) * rows[0][0]
    assert rows[1].dtype == torch.float32
    assert {p.dtype for p in [*rounded.net.parameters(), *rounded.method.parameters()]} == {
        torch.float32
    }
    changed = [not torch.equal(a, b) for a, b in zip(rows[0], rows[1], strict=True)]
    assert any(changed)


@CROSS
def test_cosines_of_confident_samples_are_in_float32_what_they_are_in_float64(method, model):
    told = []
    for dtype in (torch.float64, torch.float32):
        t = Tiny(method, model)
        logits = t.net.eval()(t.x).detach()
        target, margin = logits.argmax(1), logits.topk(2).values.diff(dim=1).abs().median()
        with torch.no_grad():
            for parameter in t.net.head.parameters():
                parameter *= 25 / margin  # then half of the probabilities are 1 in float32
        t.net.to(dtype)
        t.method.to(dtype)
        if isinstance(t.method, SignSymmetry | WeightMirror):
            t.method.adapt = lambda *args: None  # what it draws would be another's in float32
        rates = t.learner.step(t.x.to(dtype), target, align=True)
        told.append(
            [
                rates[t.learner.metric_names.index(f"cosine_sample/{i}")].item()
                for i in range(1, t.net.depth)
            ]
        )
    assert told[1] == pytest.approx(told[0], abs=1e-3, nan_ok=True)


class Unsummed(CrossEntropy):
    """Cross-entropy whose e sums to a rounding error, as sums do that a processor forms in another order."""

    def value_and_error(self, logits, target):
        value, error = super().value_and_error(logits, target)
        return value, error * (
            1 + torch.finfo(error.dtype).eps * torch.arange(error.shape[1]).to(error)
        )


@pytest.mark.parametrize("method", ["bdfa", "usf"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("classes", [2, 10])
def test_signals_that_are_nothing_but_rounding_are_left_out_and_counted(method, dtype, classes):
    t = Tiny(method, "fc", classes=classes)
    t.net.to(dtype)
    t.method.to(dtype)
    weights = (
        [module.weight for module in t.method.feedback] if method == "bdfa" else [t.net.head.weight]
    )
    for weight in weights:
        weight.data.abs_()  # all signs alike: B e = c Σ e, which is zero in exact arithmetic
    t.learner.loss = Unsummed()
    row = dict(
        zip(
            t.learner.metric_names,
            t.learner.step(t.x.to(dtype), t.target, align=True).tolist(),
            strict=True,
        )
    )
    # bdfa's highest signal is BP's
    layers = range(1, t.net.depth if method == "usf" else t.net.depth - 1)
    for i in layers:
        assert 0 <= row[f"norm/{i}"] < 1e-4 * row[f"norm_bp/{i}"]
        assert row[f"zeros/{i}"] == len(t.target)
        assert math.isnan(row[f"cosine_sample/{i}"])


@CROSS
def test_no_sample_with_a_signal_of_its_own_is_left_out(method, model):
    t = Tiny(method, model)
    trace, deltas, error = t.backward()
    grams = torch.stack([signal_products(delta, delta) for delta in deltas if delta is not None])
    is_rounding = only_rounding(t.method, trace, error, grams)
    assert not (is_rounding & (grams[..., 0, 0] > 1e-20)).any()


@pytest.mark.parametrize("method", ["las", "ltas"])
def test_confident_samples_keep_their_local_error_in_bfloat16(method):
    t = Tiny(method, "fc", classes=10)
    y, logits = torch.randn(
        2, len(t.target), 10, generator=torch.Generator().manual_seed(1)
    ).bfloat16()
    y[range(len(t.target)), t.target] += 10
    rounded = t.method._local_error(y, logits, t.target)
    exact = t.method._local_error(y.double(), logits.double(), t.target)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.double(), exact, rtol=0.005, atol=1e-9)


def test_alignment_of_bfloat16_signals_is_that_of_their_values():
    delta, noise = torch.randn(2, 300, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    reference = delta + 0.02 * noise
    delta[:257] = 0
    none = torch.zeros(300, dtype=torch.bool)
    told = compare(signal_products(delta, reference)[None], none)
    assert told.dtype == torch.float64
    assert told[0, 4] == 257
    torch.testing.assert_close(
        told, compare(signal_products(delta.double(), reference.double())[None], none)
    )


def test_products_of_long_signals_are_the_same_dot_by_dot():
    signals = torch.randn(2, 5, 3 * 2**16 + 7, generator=torch.Generator().manual_seed(0))
    for those in (signals, signals[:1]):
        assert_near(by_dots(those), by_products(those), 2 * roundoff(signals.shape[2]))


def test_signals_are_formed_one_by_one_from_the_top_and_each_output_is_let_go_of():
    t = Tiny("dfa", "conv3")
    trace = t.net.trace(t.x, t.method.cuts)
    _, error = t.loss.value_and_error(trace.logits, t.target)
    seen = []

    def signal(i, *rest):
        seen.append((i, [h is not None for h in trace.outputs]))
        return t.method.signal(i, *rest)

    trace.backward(signal, error, t.target)
    cuts = sorted(t.method.cuts, reverse=True)
    assert [i for i, _ in seen] == cuts
    for i, there in seen:
        assert [place for place, present in enumerate(there, start=1) if present] == [
            c for c in cuts[::-1] if c <= i
        ]
    assert trace.outputs == [None] * (t.net.depth - 1)


@pytest.mark.parametrize("model", MODELS)
def test_a_step_of_direct_feedback_alignment_needs_no_more_memory_than_one_of_bp(model):
    peaks = []
    for method in ("bp", "dfa"):
        t = Tiny(method, model)
        x, target = t.x.repeat(10, 1, 1, 1), t.target.repeat(10)
        t.learner.step(x, target)
        peaks.append(
            peak_mb(lambda t=t, x=x, target=target: t.learner.step(x, target), torch.device("cpu"))
        )
    assert peaks[1] <= peaks[0] + 0.001  # the kilobyte is for a few scalars


def test_precision_is_recorded_and_tf32_is_refused_where_there_is_none(tmp_path):
    done = dfl_train(tmp_path, "precision=bfloat16", "epochs=3", "tracking=disabled", "threads=1")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "outputs").glob("*/*/result.json")
    result = json.loads(path.read_text())
    assert result["config"]["precision"] == "bfloat16"
    assert result["test_accuracy"]["last"] > 0.6
    assert "1 threads" in result["device"]
    refused = dfl_train(tmp_path, "precision=tf32", "device=cpu", "tracking=disabled")
    assert refused.returncode == 2
    assert refused.stderr.startswith("dfl-train: error: precision=tf32: needs a GPU")
