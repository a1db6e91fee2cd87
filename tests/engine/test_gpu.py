"""On a GPU, where there is one: the step equals the CPU's, captured as a CUDA graph too, and whole runs go through."""

import json
import logging

import pytest
import torch
from conftest import BATCH, CLASSES, CROSS, SHAPE, Tiny, assert_near, roundoff
from processes import dfl_train

from dfl_experiments.engine import cuda_graph
from dfl_experiments.engine.alignment import signal_products
from dfl_experiments.engine.cuda_graph import WARM_UP, CapturedStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
STEPS = 50


def batches(count, device):
    """Different batches of one size."""
    random = torch.Generator().manual_seed(5)
    for _ in range(count):
        x = torch.randn(BATCH, *SHAPE, dtype=torch.float64, generator=random)
        yield x.to(device), torch.randint(CLASSES, (BATCH,), generator=random).to(device)


def same(a, b, rtol):
    for (key, value), other in zip(a.state().items(), b.state().values(), strict=True):
        torch.testing.assert_close(
            value, other, rtol=rtol, atol=rtol, msg=lambda m, key=key: f"{key}: {m}"
        )


def draws_in_a_step(method, model):
    t = Tiny(method, model)
    before = torch.get_rng_state()
    t.learner.step(t.x, t.target)
    return not torch.equal(torch.get_rng_state(), before)


@CROSS
def test_a_step_is_the_cpu_s(method, model):
    # with cross-entropy Σe = 0, and a B of equal entries would leave nothing but rounding of it
    loss = "squared_error" if method in ("bdfa", "usf") else "cross_entropy"
    cpu, gpu = (Tiny(method, model, f"loss={loss}", device=device) for device in ("cpu", "cuda"))
    if draws_in_a_step(method, model):
        pytest.skip("it draws its noise on the device, where other numbers come")
    for t in (cpu, gpu):
        t.learner.set_lr(2.0**-10)  # which float32, as the device holds it, has exactly
    for (x, target), (y, other) in zip(batches(3, "cpu"), batches(3, "cuda"), strict=True):
        rows = cpu.learner.step(x, target, align=True), gpu.learner.step(y, other, align=True).cpu()
        torch.testing.assert_close(*rows, rtol=1e-6, atol=1e-9, equal_nan=True)
    same(cpu, gpu, rtol=1e-6)


@CROSS
def test_a_captured_step_is_the_eager_one(method, model):
    eager, captured = (Tiny(method, model, device="cuda") for _ in range(2))
    step = CapturedStep(captured.learner, BATCH, torch.device("cuda"))
    for index, (x, target) in enumerate(batches(STEPS, "cuda")):
        if index == STEPS // 2:
            for t in (eager, captured):
                t.learner.set_lr(3e-5)
        cut = slice(0, 4 if index % 10 == 9 else BATCH)  # a ragged batch now and then
        rows = []
        for one in (eager.learner.step, step):
            torch.manual_seed(index)  # for what a method draws
            rows.append(one(x[cut], target[cut], index % 3 > 0))
        torch.testing.assert_close(*rows, rtol=1e-6, atol=1e-9, equal_nan=True)
    assert not step.failed
    assert set(step.recordings) == {False, True}
    same(eager, captured, rtol=1e-6)


@CROSS
def test_measuring_alignment_in_a_captured_step_changes_no_weight(method, model):
    plain, measured = (Tiny(method, model, device="cuda") for _ in range(2))
    for t, align in ((plain, False), (measured, True)):
        step = CapturedStep(t.learner, BATCH, torch.device("cuda"))
        torch.manual_seed(0)
        for x, target in batches(WARM_UP + 5, "cuda"):
            step(x, target, align)
    same(plain, measured, rtol=1e-9)


def test_long_signals_are_compared_as_on_the_cpu():
    signals = torch.randn(2, 5, 3 * 2**14 + 7, generator=torch.Generator().manual_seed(0))
    for delta, reference in (signals, (None, signals[1]), (signals[1], signals[1])):
        there = signal_products(None if delta is None else delta.cuda(), reference.cuda())
        assert_near(there.cpu(), signal_products(delta, reference), 2 * roundoff(signals.shape[2]))


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
    assert all(
        torch.equal(value, before[key]) for key, value in t.state().items() if "running" not in key
    )


def test_where_capture_fails_the_eager_path_goes_on_with_one_warning(monkeypatch, caplog):
    t = Tiny("dfa", "fc", device="cuda")
    own = t.learner.step

    def waiting(x, target, align=False):
        found = own(x, target, align)
        found[0].item()  # a look at the device, which no capture allows
        return found

    monkeypatch.setattr(t.learner, "step", waiting)
    step, main = CapturedStep(t.learner, BATCH, torch.device("cuda")), torch.cuda.current_stream()
    with caplog.at_level(logging.WARNING, logger=cuda_graph.__name__):
        for x, target in batches(WARM_UP + 4, "cuda"):
            assert step(x, target)[0].isfinite()
    assert step.failed
    assert len(caplog.records) == 1
    assert torch.cuda.current_stream() == main
    assert torch.randn(1, device="cuda").isfinite()


@pytest.mark.parametrize(
    "options", [(), ("cuda_graph=false",), ("precision=tf32",), ("precision=bfloat16",)], ids=str
)
def test_a_run_on_a_gpu(options, tmp_path):
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
