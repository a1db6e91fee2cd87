"""Check on a GPU that steps equal those on the CPU, that captured steps equal eager ones, and that runs finish."""

import json
import logging

import pytest
import torch
from conftest import BATCH, CLASSES, CROSS, SHAPE, Tiny, assert_near, roundoff
from processes import dfl_train

from dfl_experiments.engine import cuda_graph
from dfl_experiments.engine.alignment import signal_products
from dfl_experiments.engine.cuda_graph import WARM_UP, CapturedStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STEPS = 50


def batches(count, device):
    """Yield different batches of the same size."""
    random = torch.Generator().manual_seed(5)
    for _ in range(count):
        x = torch.randn(BATCH, *SHAPE, dtype=torch.float64, generator=random)
        yield x.to(device), torch.randint(CLASSES, (BATCH,), generator=random).to(device)


def assert_equal_state(a, b, rtol):
    for (key, value), other in zip(a.state().items(), b.state().values(), strict=True):
        torch.testing.assert_close(
            value, other, rtol=rtol, atol=rtol, msg=lambda m, key=key: f"{key}: {m}"
        )


def draws_random_numbers(method, model):
    t = Tiny(method, model)
    before = torch.get_rng_state()
    t.learner.step(t.x, t.target)
    return not torch.equal(torch.get_rng_state(), before)


@CROSS
def test_a_step_on_a_gpu_equals_one_on_the_cpu(method, model):
    # With cross-entropy, e sums to 0. If B has equal entries in a row, B e is then only a rounding error.
    loss = "squared_error" if method in ("bdfa", "usf") else "cross_entropy"
    cpu, gpu = (Tiny(method, model, f"loss={loss}", device=device) for device in ("cpu", "cuda"))
    if draws_random_numbers(method, model):
        pytest.skip("the GPU's generator draws other numbers than the CPU's")
    for t in (cpu, gpu):
        t.learner.set_lr(2.0**-10)  # the rate on a GPU is float32, which represents 2⁻¹⁰ exactly
    for x, target in batches(3, "cpu"):
        expected = cpu.learner.step(x, target, align=True)
        row = gpu.learner.step(x.cuda(), target.cuda(), align=True)
        torch.testing.assert_close(row.cpu(), expected, rtol=1e-6, atol=1e-9, equal_nan=True)
    assert_equal_state(cpu, gpu, rtol=1e-6)


@CROSS
def test_captured_steps_equal_eager_steps(method, model):
    eager, captured = (Tiny(method, model, device="cuda") for _ in range(2))
    step = CapturedStep(captured.learner, BATCH, torch.device("cuda"))
    for index, (x, target) in enumerate(batches(STEPS, "cuda")):
        if index == STEPS // 2:
            for t in (eager, captured):
                t.learner.set_lr(3e-5)
        if index % 10 == 9:  # every tenth batch is smaller
            x, target = x[:4], target[:4]
        rows = []
        for train in (eager.learner.step, step):
            torch.manual_seed(index)  # some methods draw random numbers
            rows.append(train(x, target, index % 3 > 0))
        torch.testing.assert_close(*rows, rtol=1e-6, atol=1e-9, equal_nan=True)
    assert not step.failed
    assert set(step.recordings) == {False, True}
    assert_equal_state(eager, captured, rtol=1e-6)


@CROSS
def test_measuring_alignment_in_a_captured_step_changes_no_weight(method, model):
    plain, measured = (Tiny(method, model, device="cuda") for _ in range(2))
    for t, align in ((plain, False), (measured, True)):
        step = CapturedStep(t.learner, BATCH, torch.device("cuda"))
        torch.manual_seed(0)
        for x, target in batches(WARM_UP + 5, "cuda"):
            step(x, target, align)
    assert_equal_state(plain, measured, rtol=1e-9)


def test_products_of_long_signals_equal_those_on_the_cpu():
    signals = torch.randn(2, 5, 3 * 2**14 + 7, generator=torch.Generator().manual_seed(0))
    for delta, reference in (signals, (None, signals[1]), (signals[1], signals[1])):
        products = signal_products(None if delta is None else delta.cuda(), reference.cuda())
        expected = signal_products(delta, reference)
        assert_near(products.cpu(), expected, 2 * roundoff(signals.shape[2]))


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "rmsprop", "sgd"])
def test_a_captured_step_follows_the_learning_rate(optimizer):
    t = Tiny("las", "fc", f"optimizer={optimizer}", "optimizer.clip_norm=1e-3", device="cuda")
    step = CapturedStep(t.learner, BATCH, torch.device("cuda"))
    *first, (x, target) = batches(WARM_UP + 2, "cuda")
    for batch in first:
        step(*batch)
    t.learner.set_lr(0.0)
    before = t.state()
    step(x, target)
    for key, value in t.state().items():
        assert "running" in key or torch.equal(value, before[key]), key


def test_eager_steps_continue_with_one_warning_where_capture_fails(monkeypatch, caplog):
    t = Tiny("dfa", "fc", device="cuda")
    eager_step = t.learner.step

    def step_that_synchronises(x, target, align=False):
        row = eager_step(x, target, align)
        row[0].item()  # waits for the GPU, which a capture does not allow
        return row

    monkeypatch.setattr(t.learner, "step", step_that_synchronises)
    step = CapturedStep(t.learner, BATCH, torch.device("cuda"))
    stream = torch.cuda.current_stream()
    with caplog.at_level(logging.WARNING, logger=cuda_graph.__name__):
        for x, target in batches(WARM_UP + 4, "cuda"):
            assert step(x, target)[0].isfinite()
    assert step.failed
    assert len(caplog.records) == 1
    assert torch.cuda.current_stream() == stream
    assert torch.randn(1, device="cuda").isfinite()


@pytest.mark.parametrize(
    "options", [(), ("cuda_graph=false",), ("precision=tf32",), ("precision=bfloat16",)], ids=str
)
def test_a_run_on_a_gpu_finishes_and_learns(options, tmp_path):
    done = dfl_train(
        tmp_path, "device=cuda", "epochs=4", "tracking=disabled", *options, environment={}
    )
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "outputs").glob("*/*/result.json")
    result = json.loads(path.read_text())
    assert result["status"] == "finished"
    assert result["device"].startswith("cuda (")
    assert result["test_accuracy"]["last"] > 0.6
    assert result["cosine"]["1"] > 0.6
