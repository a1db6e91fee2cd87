"""Check that a step fits into a CUDA graph, measures correctly at every precision, and needs little memory."""

import copy
import json
import platform
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

# operators that wait for the device
WAITING = {"_local_scalar_dense", "nonzero", "equal", "unique", "_unique2", "masked_select"}
# F.one_hot checks the range of its labels on a CPU, but not on a GPU
RANGE_CHECK = "aminmax _local_scalar_dense _local_scalar_dense"


class Operators(TorchDispatchMode):
    """Record the names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@CROSS
@pytest.mark.parametrize("align", [False, True])
def test_steps_call_the_same_operators_and_never_wait_for_the_device(method, model, align):
    """A CUDA graph requires both."""
    t = Tiny(method, model)
    t.learner.step(t.x, t.target, align)
    steps = []
    for scale in (1.0, -0.5):
        with Operators() as operators:
            t.learner.step(t.x * scale, t.target, align)
        steps.append(" ".join(operators.names).replace(RANGE_CHECK, "").split())
    assert steps[0] == steps[1]
    assert not WAITING & set(steps[0])


@CROSS
def test_a_step_draws_only_from_torch_s_generator_and_changes_no_python_state(method, model):
    """A CUDA graph requires both: it replays neither other generators nor Python code."""
    t = Tiny(method, model)
    t.learner.step(t.x, t.target)
    twin = copy.deepcopy(t)
    before = python_state(t.method)
    for case in (t, twin):
        torch.manual_seed(0)
        random.random()  # so that these two generators are in another state for the twin
        np.random.rand()
        case.learner.step(case.x, case.target)
    assert python_state(t.method) == before
    for key, value in t.state().items():
        assert torch.equal(twin.state()[key], value)


def python_state(method):
    """Return the attributes of a method that are plain Python values."""
    kinds = (bool, int, float, str, tuple, list, frozenset, set)
    return {name: repr(value) for name, value in vars(method).items() if isinstance(value, kinds)}


def metrics_of_step(t, **options):
    """Train one step, and return what it measures as a dictionary."""
    row = t.learner.step(t.x, t.target, **options)
    return dict(zip(t.learner.metric_names, row, strict=True))


@CROSS
def test_a_step_returns_the_metrics_that_it_names(method, model):
    t = Tiny(method, model)
    trace = t.net.trace(t.x)
    loss, _ = t.loss.value_and_error(trace.logits, t.target)
    metrics = metrics_of_step(t, align=True)
    assert torch.equal(metrics["loss"], loss)
    assert metrics["correct"] == (trace.logits.argmax(1) == t.target).sum()
    assert metrics[f"cosine_sample/{t.net.depth - 1}"] <= 1 + 1e-12
    unmeasured = metrics_of_step(t, align=False)
    assert {name for name, value in unmeasured.items() if not value.isnan()} == {"loss", "correct"}


@CROSS
def test_bfloat16_changes_the_loss_by_rounding_only_and_keeps_weights_in_float32(method, model):
    exact, rounded = Tiny(method, model), Tiny(method, model)
    for t in (exact, rounded):
        t.net.float()
        t.method.float()
        t.x = t.x.float()
    rounded.learner.precision = "bfloat16"
    expected = exact.learner.step(exact.x, exact.target, align=True)
    row = rounded.learner.step(rounded.x, rounded.target, align=True)
    assert abs(row[0] - expected[0]) < roundoff(exact.results, torch.bfloat16) * expected[0]
    assert not torch.equal(row.nan_to_num(), expected.nan_to_num())
    assert row.dtype == torch.float32
    for p in (*rounded.net.parameters(), *rounded.method.parameters()):
        assert p.dtype == torch.float32


@CROSS
def test_cosines_of_confident_samples_are_equal_in_float32_and_float64(method, model):
    cosines = []
    for dtype in (torch.float64, torch.float32):
        t = Tiny(method, model)
        logits = t.net.eval()(t.x).detach()
        t.target = logits.argmax(1)
        margin = logits.topk(2).values.diff(dim=1).abs().median()
        with torch.no_grad():
            for parameter in t.net.head.parameters():
                parameter *= 25 / margin  # then half of the probabilities are 1 in float32
        t.net.to(dtype)
        t.method.to(dtype)
        t.x = t.x.to(dtype)
        if isinstance(t.method, SignSymmetry | WeightMirror):
            t.method.adapt = lambda *args: None  # it would draw other numbers in float32
        metrics = metrics_of_step(t, align=True)
        layers = range(1, t.net.depth)
        cosines.append([metrics[f"cosine_sample/{i}"].item() for i in layers])
    assert cosines[1] == pytest.approx(cosines[0], abs=1e-3, nan_ok=True)


class Unsummed(CrossEntropy):
    """Cross-entropy whose e sums to a rounding error instead of 0, as on processors with another order of addition."""

    def value_and_error(self, logits, target):
        value, error = super().value_and_error(logits, target)
        classes = torch.arange(error.shape[1]).to(error)
        return value, error * (1 + torch.finfo(error.dtype).eps * classes)


@pytest.mark.parametrize("method", ["bdfa", "usf"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("classes", [2, 10])
def test_signals_that_are_only_rounding_errors_are_counted_and_left_out(method, dtype, classes):
    t = Tiny(method, "fc", classes=classes)
    t.net.to(dtype)
    t.method.to(dtype)
    t.x = t.x.to(dtype)
    if method == "bdfa":
        weights = [module.weight for module in t.method.feedback]
        layers = range(1, t.net.depth - 1)  # the last hidden layer has BP's signal
    else:
        weights = [t.net.head.weight]
        layers = range(1, t.net.depth)
    for weight in weights:
        weight.data.abs_()  # B then has equal entries: B e = c Σ e, which is 0 in exact arithmetic
    t.learner.loss = Unsummed()
    metrics = metrics_of_step(t, align=True)
    for i in layers:
        assert 0 <= metrics[f"norm/{i}"] < 1e-4 * metrics[f"norm_bp/{i}"]
        assert metrics[f"zeros/{i}"] == len(t.target)
        assert metrics[f"cosine_sample/{i}"].isnan()


@CROSS
def test_no_signal_above_1e_10_counts_as_a_rounding_error(method, model):
    t = Tiny(method, model)
    trace, deltas, error = t.backward()
    grams = torch.stack([signal_products(delta, delta) for delta in deltas if delta is not None])
    squared_norms = grams[..., 0, 0]
    is_rounding = only_rounding(t.method, trace, error, grams)
    assert not (is_rounding & (squared_norms > 1e-20)).any()


@pytest.mark.parametrize("method", ["las", "ltas"])
def test_confident_samples_keep_their_local_error_in_bfloat16(method):
    t = Tiny(method, "fc", classes=10)
    generator = torch.Generator().manual_seed(1)
    y, logits = torch.randn(2, len(t.target), 10, generator=generator).bfloat16()
    y[range(len(t.target)), t.target] += 10
    rounded = t.method._local_error(y, logits, t.target)
    exact = t.method._local_error(y.double(), logits.double(), t.target)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.double(), exact, rtol=0.005, atol=1e-9)


def test_alignment_of_bfloat16_signals_is_computed_in_float64():
    delta, noise = torch.randn(2, 300, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    reference = delta + 0.02 * noise
    delta[:257] = 0
    is_rounding = torch.zeros(300, dtype=torch.bool)
    alignment = compare(signal_products(delta, reference)[None], is_rounding)
    exact = compare(signal_products(delta.double(), reference.double())[None], is_rounding)
    assert alignment.dtype == torch.float64
    assert alignment[0, 4] == 257
    torch.testing.assert_close(alignment, exact)


@pytest.mark.parametrize("count", [1, 2])
def test_both_ways_to_multiply_long_signals_agree(count):
    generator = torch.Generator().manual_seed(0)
    signals = torch.randn(2, 5, 3 * 2**16 + 7, generator=generator)[:count]
    assert_near(by_dots(signals), by_products(signals), 2 * roundoff(signals.shape[2]))


def test_signals_are_formed_from_the_top_and_outputs_above_are_released():
    t = Tiny("dfa", "conv3")
    trace = t.net.trace(t.x, t.method.cuts)
    _, error = t.loss.value_and_error(trace.logits, t.target)
    order = []

    def signal(i, *arguments):
        order.append(i)
        stored = {j for j, h in enumerate(trace.outputs, start=1) if h is not None}
        assert stored == {cut for cut in t.method.cuts if cut <= i}
        return t.method.signal(i, *arguments)

    trace.backward(signal, error, t.target)
    assert order == sorted(t.method.cuts, reverse=True)
    assert trace.outputs == [None] * (t.net.depth - 1)


@pytest.mark.parametrize("model", MODELS)
def test_a_step_of_dfa_needs_no_more_memory_than_one_of_bp(model):
    def peak_of(method):
        t = Tiny(method, model)
        x, target = t.x.repeat(10, 1, 1, 1), t.target.repeat(10)
        t.learner.step(x, target)  # allocates the optimizer's state
        return peak_mb(lambda: t.learner.step(x, target), torch.device("cpu"))

    one_kilobyte = 0.001  # for a few scalars
    assert peak_of("dfa") <= peak_of("bp") + one_kilobyte


def test_a_run_in_bfloat16_learns_and_records_its_precision(tmp_path):
    options = ("precision=bfloat16", "epochs=3", "tracking=disabled", "threads=1")
    done = dfl_train(tmp_path, *options, environment={"ATEN_CPU_CAPABILITY": "avx2"})
    assert done.returncode == 0, done.stderr
    is_x86 = platform.machine() == "x86_64"
    assert ("this processor has no AVX-512, so float32 is faster" in done.stdout) == is_x86
    (path,) = (tmp_path / "outputs").glob("*/*/result.json")
    result = json.loads(path.read_text())
    assert result["config"]["precision"] == "bfloat16"
    assert result["test_accuracy"]["last"] > 0.6
    assert "1 threads" in result["device"]


def test_tf32_is_refused_on_a_cpu(tmp_path):
    refused = dfl_train(tmp_path, "precision=tf32", "device=cpu", "tracking=disabled")
    assert refused.returncode == 2
    assert refused.stderr.startswith("dfl-train: error: precision=tf32: needs a GPU")
