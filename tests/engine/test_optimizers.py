"""Optimizers and schedules: the weights that they give, beside plain PyTorch; their rates; clipping; options of B."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Tiny, roundoff

import dfl_experiments as dfl
from dfl_experiments.configuration.composition import compose
from dfl_experiments.configuration.schema import check
from dfl_experiments.errors import UserError
from dfl_experiments.schedules import Schedule, Step

RATE, STEPS = 0.01, 5


def state_after(*overrides, method="ltas", model="fc", steps=STEPS):
    t = Tiny(method, model, f"optimizer.lr={RATE}", *overrides)
    for _ in range(steps):
        t.learner.step(t.x, t.target)
    return t.state()


PLAIN = {
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.5}),
    "sgd": (torch.optim.SGD, {"momentum": 0.5}),
    "torch": (torch.optim.NAdam, {"momentum_decay": 0.01}),
}


@pytest.mark.parametrize("name", PLAIN)
def test_bp_with_each_optimizer_is_a_plain_loop_with_torch_s(name):
    kind, options = PLAIN[name]
    options = options | {"weight_decay": 0.1}
    sign = "+" if name == "torch" else ""
    overrides = [f"{sign}optimizer.{key}={value}" for key, value in options.items()]
    target = ["optimizer._target_=torch.optim.NAdam"] if name == "torch" else []
    t = Tiny("bp", "fc", f"optimizer={name}", *target, *overrides, f"optimizer.lr={RATE}")
    net = copy.deepcopy(t.net)
    optimizer = kind(net.parameters(), RATE, foreach=False, **options)
    for _ in range(STEPS):
        t.learner.step(t.x, t.target)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(t.x), t.target).backward()
        optimizer.step()
    # where a gradient is about as small as eps, its rounding is divided by it
    bound = STEPS * roundoff(t.terms) * (1 if name == "sgd" else RATE / 1e-8)
    for mine, plain in zip(t.net.parameters(), net.parameters(), strict=True):
        assert (mine - plain).abs().max() <= bound
    assert type(t.learner.optimizer).__name__ == kind.__name__


def factors(*overrides, epochs=10, batches=4):
    schedule = check(compose([f"epochs={epochs}", *overrides])).components["schedule"].build()
    return [
        factor
        for epoch in range(1, epochs + 1)
        for factor in schedule.factors(epoch, epochs, batches)
    ]


@dataclass(frozen=True, kw_only=True)
class Given(Schedule):
    """A schedule of the user's: the factor of the second epoch is `value`."""

    value: Any = None

    def factor(self, done, epochs):
        return self.value if done == 1 else 1.0


def test_a_factor_of_one_s_own_is_a_finite_number_of_0_or_more():
    for value in (0.0, 2, np.float32(0.5), torch.tensor(0.5)):
        assert Given(value=value).factors(2, 3, 1) == [float(value)]
    for value in (-1.0, math.nan, math.inf, None):
        with pytest.raises(UserError, match=f"Given returns the factor {value} after 1 epochs"):
            Given(value=value).factors(2, 3, 1)


OWN_SCHEDULE = """
from dataclasses import dataclass
from dfl_experiments.schedules import Schedule

@dataclass(frozen=True, kw_only=True)
class Falling(Schedule):
    def factor(self, done, epochs):
        return 1.0 - done
"""


def test_a_schedule_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_falling.py").write_text(OWN_SCHEDULE)
    (tmp_path / "schedule").mkdir()
    (tmp_path / "schedule" / "falling.yaml").write_text(
        "name: falling\n_target_: my_falling.Falling"
    )
    small = ["limit=64", "tracking=disabled", "plugins=[my_falling]", "schedule=falling"]
    with pytest.raises(UserError, match=r"Falling returns the factor -1\.0 after 2 epochs"):
        dfl.run(dfl.compose(["epochs=3", *small], tmp_path), tmp_path / "run")
    assert not (tmp_path / "run" / "epochs.csv").exists()


def test_the_rates_of_every_schedule():
    by_epoch = {
        name: factors(f"schedule={name}", batches=1)
        for name in ("constant", "step", "cosine", "exponential")
    }
    assert by_epoch["constant"] == [1.0] * 10
    # 8.9 and 9.4 are within the last epochs
    assert by_epoch["step"] == [1.0] * 5 + [0.25] * 3 + [0.25**2, 0.25**3]
    assert by_epoch["cosine"][0] == 1.0
    assert by_epoch["cosine"][5] == pytest.approx(0.5)
    assert by_epoch["cosine"][9] == pytest.approx((1 - 0.9510565162951535) / 2)  # cos(0.9 π)
    assert by_epoch["exponential"] == pytest.approx([0.95**epoch for epoch in range(10)])
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10, eta_min=0.1)
    found = []
    for _ in range(10):
        found += theirs.get_last_lr()
        optimizer.step()
        theirs.step()
    assert factors("schedule=cosine", "schedule.final=0.1", batches=1) == pytest.approx(found)


def test_a_rate_per_iteration_changes_at_every_batch_and_else_at_every_epoch():
    for name in ("cosine", "exponential"):
        smooth = factors(f"schedule={name}", "schedule.per=iteration")
        assert len(set(smooth)) == 40
        stairs = factors(f"schedule={name}")
        assert stairs[::4] == smooth[::4]
        assert all(len(set(stairs[start : start + 4])) == 1 for start in range(0, 40, 4))
    # 0.28 · 25 is 7 epochs, although the product of the two floats is larger
    assert Step(milestones=[0.28], decay=0.1).factor(7, 25) == pytest.approx(0.1)
    smooth = factors("schedule.milestones=[0.125]", "schedule.per=iteration")
    assert smooth == [1.0] * 5 + [0.25] * 35


def test_a_warm_up_rises_linearly_to_the_full_rate():
    assert (
        factors("schedule=constant", "schedule.warmup=4", batches=1)
        == [0.25, 0.5, 0.75] + [1.0] * 7
    )
    ramp = factors("schedule=constant", "schedule.warmup=0.5", "schedule.per=iteration")
    assert ramp == [0.5] + [1.0] * 39
    cosine = factors("schedule=cosine", "schedule.warmup=2", batches=1)
    assert cosine[:3] == [0.5, 1.0, 1.0]  # the first two belong to the warm-up
    assert cosine[6] == pytest.approx(0.5)  # half-way from epoch 2 to epoch 10
    assert factors("schedule=exponential", "schedule.warmup=2", batches=1)[-1] == pytest.approx(
        0.95**7
    )


def gradients(t):
    """W's gradients of the next step as its optimizer gets them."""
    found = {}
    t.learner.optimizer.register_step_pre_hook(
        lambda optimizer, *_: found.update(
            {p: p.grad.clone() for g in optimizer.param_groups for p in g["params"]}
        )
    )
    t.learner.step(t.x, t.target)
    return found.values()


def total(tensors):
    return torch.stack([tensor.norm() for tensor in tensors]).norm()


@pytest.mark.parametrize("method", ["bp", "ltas", "kp", "pfa"])
def test_a_gradient_is_clipped_to_the_norm_and_keeps_its_direction(method):
    free = list(gradients(Tiny(method, "conv3", "optimizer=sgd")))
    norm = total(free).item()
    clipped = list(
        gradients(Tiny(method, "conv3", "optimizer=sgd", f"optimizer.clip_norm={norm / 4}"))
    )
    assert total(clipped) == pytest.approx(norm / 4, rel=1e-5)  # torch divides by the norm and 1e-6
    for mine, other in zip(clipped, free, strict=True):
        torch.testing.assert_close(mine * (norm / total(clipped)), other)
    loose = gradients(Tiny(method, "conv3", "optimizer=sgd", f"optimizer.clip_norm={4 * norm}"))
    assert all(torch.equal(mine, other) for mine, other in zip(loose, free, strict=True))


@pytest.mark.parametrize("model", ["fc", "conv3"])
@pytest.mark.parametrize("method", ["kp", "pfa"])
def test_a_b_that_follows_the_gradient_of_w_follows_the_clipped_one(method, model):
    """KP: W - Bᵀ stays. PFA with m = d_out: W - P R shrinks by the weight decay alone. So it is with clipping."""
    options = ("optimizer=sgd", "optimizer.lr=0.1", "optimizer.clip_norm=1e-3")
    own = ("method.expansion=1", "optimizer.weight_decay=0.5") if method == "pfa" else ()
    t = Tiny(method, model, *options, *own)
    before, start = t.method.weight_pairs, t.state()
    first = [weight - b for i in range(1, t.net.depth) for b, weight in before(i)]
    first = [difference.detach().clone() for difference in first]
    for _ in range(STEPS):
        t.learner.step(t.x, t.target)
    last = [weight - b for i in range(1, t.net.depth) for b, weight in t.method.weight_pairs(i)]
    shrunk = (1 - 0.1 * 0.5) ** STEPS if method == "pfa" else 1.0
    assert first
    for difference, old in zip(last, first, strict=True):
        torch.testing.assert_close(difference, old * shrunk)
    assert any(not torch.equal(value, start[key]) for key, value in t.state().items())


def test_b_alone_has_the_rate_that_is_given_for_it():
    """One step from the same start: B moves as under its rate, W as under its own."""
    start = Tiny("dkp", "fc").state()
    plain, fast, other = (
        state_after(*options, method="dkp", steps=1)
        for options in ((), ("optimizer.lr=0.05",), ("optimizer.feedback.lr=0.05",))
    )
    for key, value in other.items():
        assert torch.equal(value, (fast if key.startswith("method.") else plain)[key])
        assert not torch.equal(value, start[key])
    t = Tiny(
        "dkp", "fc", "optimizer.feedback.weight_decay=0.1", "optimizer.feedback.betas=[0.8,0.9]"
    )
    mine, of_b = (optimizer.param_groups[0] for optimizer in t.learner.optimizers)
    assert (mine["weight_decay"], mine["betas"]) == (0.0, (0.9, 0.999))
    assert (of_b["weight_decay"], of_b["betas"], of_b["eps"]) == (0.1, (0.8, 0.9), mine["eps"])


def test_b_can_have_an_optimizer_of_another_kind():
    t = Tiny(
        "dkp", "fc", "optimizer=sgd", "optimizer.momentum=0.5", "+optimizer@optimizer.feedback=adam"
    )
    assert [type(optimizer).__name__ for optimizer in t.learner.optimizers] == ["SGD", "Adam"]
    assert t.learner.feedback_optimizer.param_groups[0]["lr"] == 1e-4


def test_every_optimizer_of_torch_that_takes_a_dense_gradient_of_any_shape_trains():
    for name in ("Adadelta", "Adafactor", "Adagrad", "Adamax", "ASGD", "RAdam", "Rprop"):
        t = Tiny("ltas", "conv3", "optimizer=torch", f"optimizer._target_=torch.optim.{name}")
        before = t.state()
        t.learner.step(t.x, t.target)
        after = t.state()
        assert all(
            not torch.equal(after[f"net.{key}"], before[f"net.{key}"])
            for key, _ in t.net.named_parameters()
        )


LION = """
import torch

class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr: float = 1e-4, beta=0.9, *, names: "Unknown" = ()):
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group["beta"])
                p.sub_(m.sign(), alpha=group["lr"])
"""


def test_an_optimizer_of_one_s_own_trains_w_and_b(tmp_path, monkeypatch):
    (tmp_path / "my_lion.py").write_text(LION)
    monkeypatch.syspath_prepend(tmp_path)
    own = ("optimizer=torch", "plugins=[my_lion]", "optimizer._target_=my_lion.Lion")
    t = Tiny("ltas", "fc", *own, "optimizer.lr=0.01", "+optimizer.beta=0.5")
    before = t.state()
    t.learner.step(t.x, t.target)
    assert [type(optimizer).__name__ for optimizer in t.learner.optimizers] == ["Lion", "Lion"]
    trained = [f"net.{name}" for name, _ in t.net.named_parameters()]
    trained += [f"method.{name}" for name, p in t.method.named_parameters() if p.requires_grad]
    for key in trained:
        steps = (t.state()[key] - before[key]).abs()
        # a step is 0.01, or 0 where there is no gradient
        assert torch.all((steps - 0.01).abs().minimum(steps) < 1e-12)
        assert steps.max() > 0
    with pytest.raises(
        UserError, match=r"optimizer: cannot be built with lr=.*, beta='x' \(unsupp"
    ):
        check(compose([*own, "+optimizer.beta=x"]))
    with pytest.raises(UserError, match=r"a plugin's optimizer may be any"):
        check(compose([*own[:2], "optimizer._target_=my_lion.torch.optim.LBFGS"]))
