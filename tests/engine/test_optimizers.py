"""Check optimizers against plain PyTorch, the rates of the schedules, gradient clipping, and the optimizer of B."""

import copy
import math
import re
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
from dfl_experiments.optimizers import names_in_torch
from dfl_experiments.schedules import Schedule, Step

RATE, STEPS = 0.01, 5


PLAIN = {
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.5}),
    "sgd": (torch.optim.SGD, {"momentum": 0.5}),
    "torch": (torch.optim.NAdam, {"momentum_decay": 0.01}),
}


@pytest.mark.parametrize("name", PLAIN)
def test_bp_with_each_optimizer_equals_a_plain_pytorch_loop(name):
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
    bound = STEPS * roundoff(t.terms)
    if name != "sgd":  # the others may divide the rounding error of a gradient by their ε
        bound *= RATE / 1e-8
    for p, expected in zip(t.net.parameters(), net.parameters(), strict=True):
        assert (p - expected).abs().max() <= bound
    assert type(t.learner.optimizer).__name__ == kind.__name__


def factors(*overrides, batches=4):
    """Return the factors of the learning rate in all iterations of 10 epochs."""
    schedule = check(compose(["epochs=10", *overrides])).components["schedule"].build()
    result = []
    for epoch in range(1, 11):
        result += schedule.factors(epoch, 10, batches)
    return result


@dataclass(frozen=True, kw_only=True)
class SecondFactor(Schedule):
    """A schedule of the user's: the factor of the second epoch is `value`."""

    value: Any = None

    def factor(self, done, epochs):
        return self.value if done == 1 else 1.0


def test_schedule_factors_must_be_finite_and_not_negative():
    for value in (0.0, 2, np.float32(0.5), torch.tensor(0.5)):
        assert SecondFactor(value=value).factors(2, 3, 1) == [float(value)]
    for value in (-1.0, math.nan, math.inf, None, [0.5], "half", torch.ones(2)):
        message = re.escape(f"SecondFactor returns the factor {value} for done=1")
        with pytest.raises(UserError, match=message):
            SecondFactor(value=value).factors(2, 3, 1)


OWN_SCHEDULE = """
from dataclasses import dataclass
from dfl_experiments.schedules import Schedule

@dataclass(frozen=True, kw_only=True)
class Falling(Schedule):
    def factor(self, done, epochs):
        return 1.0 - done
"""


def test_negative_factor_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_falling.py").write_text(OWN_SCHEDULE)
    (tmp_path / "schedule").mkdir()
    (tmp_path / "schedule" / "falling.yaml").write_text(
        "name: falling\n_target_: my_falling.Falling"
    )
    small = ["tracking=disabled", "plugins=[my_falling]", "schedule=falling"]
    with pytest.raises(UserError, match=r"Falling returns the factor -1\.0 for done=2"):
        dfl.run(dfl.compose(["epochs=3", "limit=64", *small], tmp_path), tmp_path / "run")
    # within the last of two epochs of four batches
    options = ["epochs=2", "limit=256", "+schedule.per=iteration"]
    with pytest.raises(UserError, match=r"Falling returns the factor -0\.25 for done=1\.25"):
        dfl.run(dfl.compose([*options, *small], tmp_path), tmp_path / "run")
    assert not (tmp_path / "run" / "epochs.csv").exists()


def test_constant_schedule():
    assert factors("schedule=constant", batches=1) == [1.0] * 10


def test_step_schedule_decays_at_the_milestones():
    # the milestones of 10 epochs are 5, 7.5, 8.9 and 9.4; a rate holds for a whole epoch
    expected = [1.0] * 5 + [0.25] * 3 + [0.25**2, 0.25**3]
    assert factors("schedule=step", batches=1) == expected
    assert factors("schedule.milestones=[0.125]", "schedule.per=iteration") == (
        [1.0] * 5 + [0.25] * 35
    )
    # in exact arithmetic 0.28 · 25 is 7, but the product of the two floats is above 7
    assert Step(milestones=[0.28], decay=0.1).factor(7, 25) == pytest.approx(0.1)


def test_cosine_schedule_equals_torch_s():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10, eta_min=0.1)
    expected = []
    for _ in range(10):
        expected += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert factors("schedule=cosine", "schedule.final=0.1", batches=1) == pytest.approx(expected)
    falling_to_0 = [(1 + math.cos(math.pi * epoch / 10)) / 2 for epoch in range(10)]
    assert factors("schedule=cosine", batches=1) == pytest.approx(falling_to_0)


def test_exponential_schedule():
    expected = [0.95**epoch for epoch in range(10)]
    assert factors("schedule=exponential", batches=1) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["cosine", "exponential"])
def test_the_rate_changes_at_every_epoch_or_at_every_iteration(name):
    by_iteration = factors(f"schedule={name}", "schedule.per=iteration")
    assert len(set(by_iteration)) == 40
    by_epoch = factors(f"schedule={name}")
    for first in range(0, 40, 4):  # first iteration of an epoch
        assert by_epoch[first : first + 4] == [by_iteration[first]] * 4


def test_warm_up_raises_the_rate_linearly():
    four_epochs = factors("schedule=constant", "schedule.warmup=4", batches=1)
    assert four_epochs == [0.25, 0.5, 0.75] + [1.0] * 7
    ramp = factors("schedule=constant", "schedule.warmup=0.5", "schedule.per=iteration")
    assert ramp == [0.5] + [1.0] * 39
    cosine = factors("schedule=cosine", "schedule.warmup=2", batches=1)
    assert cosine[:3] == [0.5, 1.0, 1.0]  # epochs 1 and 2 are the warm-up
    assert cosine[6] == pytest.approx(0.5)  # after 4 of the 8 epochs that remain
    exponential = factors("schedule=exponential", "schedule.warmup=2", batches=1)
    assert exponential[-1] == pytest.approx(0.95**7)


def gradients(method, model, *overrides):
    """Train one step with SGD, and return W's gradients as the optimizer gets them."""
    t = Tiny(method, model, "optimizer=sgd", *overrides)
    result = []

    def store(optimizer, *_):
        for group in optimizer.param_groups:
            result.extend(p.grad.clone() for p in group["params"])

    t.learner.optimizer.register_step_pre_hook(store)
    t.learner.step(t.x, t.target)
    return result


def total_norm(tensors):
    return torch.stack([tensor.norm() for tensor in tensors]).norm().item()


@pytest.mark.parametrize("method", ["bp", "ltas", "kp", "pfa"])
def test_clipping_limits_the_norm_of_the_gradient_and_keeps_its_direction(method):
    free = gradients(method, "conv3")
    norm = total_norm(free)
    clipped = gradients(method, "conv3", f"optimizer.clip_norm={norm / 4}")
    # torch divides by the norm plus 1e-6
    assert total_norm(clipped) == pytest.approx(norm / 4, rel=1e-5)
    for gradient, unclipped in zip(clipped, free, strict=True):
        torch.testing.assert_close(gradient * (norm / total_norm(clipped)), unclipped)


@pytest.mark.parametrize("method", ["bp", "ltas", "kp", "pfa"])
def test_clipping_does_not_change_gradients_below_the_limit(method):
    free = gradients(method, "conv3")
    below = gradients(method, "conv3", f"optimizer.clip_norm={4 * total_norm(free)}")
    assert all(map(torch.equal, below, free))


@pytest.mark.parametrize("model", ["fc", "conv3"])
@pytest.mark.parametrize(
    ("method", "options", "factor"),
    [
        ("kp", (), 1.0),
        ("pfa", ("method.expansion=1", "optimizer.weight_decay=0.5"), 1 - 0.1 * 0.5),
    ],
    ids=["kp", "pfa"],
)
def test_b_learns_from_the_clipped_gradient_of_w(method, options, factor, model):
    """W - B is constant in KP, and shrinks in PFA with m = d_out by the weight decay only: also with clipping."""
    clipped_sgd = ("optimizer=sgd", "optimizer.lr=0.1", "optimizer.clip_norm=1e-3")
    t = Tiny(method, model, *clipped_sgd, *options)

    def differences():
        pairs = [pair for i in range(1, t.net.depth) for pair in t.method.weight_pairs(i)]
        return [(w - b).detach().clone() for b, w in pairs]

    start, before = t.state(), differences()
    assert before
    for _ in range(STEPS):
        t.learner.step(t.x, t.target)
    for difference, initial in zip(differences(), before, strict=True):
        torch.testing.assert_close(difference, initial * factor**STEPS)
    assert any(not torch.equal(value, start[key]) for key, value in t.state().items())


def state_after_one_step_of_dkp(*overrides):
    t = Tiny("dkp", "fc", f"optimizer.lr={RATE}", *overrides)
    t.learner.step(t.x, t.target)
    return t.state()


def test_feedback_lr_changes_the_rate_of_b_only():
    start = Tiny("dkp", "fc").state()
    slow = state_after_one_step_of_dkp()
    fast = state_after_one_step_of_dkp("optimizer.lr=0.05")
    fast_b_only = state_after_one_step_of_dkp("optimizer.feedback.lr=0.05")
    for key, value in fast_b_only.items():
        expected = fast if key.startswith("method.") else slow
        assert torch.equal(value, expected[key])
        assert not torch.equal(value, start[key])


def test_feedback_options_change_the_optimizer_of_b_only():
    options = ("optimizer.feedback.weight_decay=0.1", "optimizer.feedback.betas=[0.8,0.9]")
    optimizer_of_w, optimizer_of_b = Tiny("dkp", "fc", *options).learner.optimizers
    w, b = optimizer_of_w.param_groups[0], optimizer_of_b.param_groups[0]
    assert (w["weight_decay"], w["betas"]) == (0.0, (0.9, 0.999))
    assert (b["weight_decay"], b["betas"]) == (0.1, (0.8, 0.9))
    assert b["eps"] == w["eps"]


def test_b_can_have_another_kind_of_optimizer():
    options = ("optimizer=sgd", "optimizer.momentum=0.5", "+optimizer@optimizer.feedback=adam")
    optimizer_of_w, optimizer_of_b = Tiny("dkp", "fc", *options).learner.optimizers
    assert type(optimizer_of_w).__name__ == "SGD"
    assert type(optimizer_of_b).__name__ == "Adam"
    assert optimizer_of_b.param_groups[0]["lr"] == 1e-4


@pytest.mark.parametrize(
    "name", ["Adadelta", "Adafactor", "Adagrad", "Adamax", "ASGD", "RAdam", "Rprop"]
)
def test_torch_s_optimizers_for_dense_gradients_train_every_weight(name):
    t = Tiny("ltas", "conv3", "optimizer=torch", f"optimizer._target_=torch.optim.{name}")
    before = t.state()
    t.learner.step(t.x, t.target)
    after = t.state()
    for key, _ in t.net.named_parameters():
        assert not torch.equal(after[f"net.{key}"], before[f"net.{key}"]), key


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


LION_PLUGIN = ("optimizer=torch", "plugins=[my_lion]")
LION_OPTIMIZER = (*LION_PLUGIN, "optimizer._target_=my_lion.Lion")


@pytest.fixture
def lion(tmp_path, monkeypatch):
    """Write a plugin with an optimizer and put it on the path."""
    (tmp_path / "my_lion.py").write_text(LION)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("lion")
def test_a_plugin_s_optimizer_trains_w_and_b():
    t = Tiny("ltas", "fc", *LION_OPTIMIZER, "optimizer.lr=0.01", "+optimizer.beta=0.5")
    before = t.state()
    t.learner.step(t.x, t.target)
    assert [type(optimizer).__name__ for optimizer in t.learner.optimizers] == ["Lion", "Lion"]
    trained = [f"net.{name}" for name, _ in t.net.named_parameters()]
    trained += [f"method.{name}" for name, p in t.method.named_parameters() if p.requires_grad]
    for key in trained:
        steps = (t.state()[key] - before[key]).abs()
        # every weight moves by the learning rate, or not at all where its gradient is 0
        assert torch.all((steps < 1e-12) | ((steps - 0.01).abs() < 1e-12))
        assert steps.max() > 0


@pytest.mark.usefixtures("lion")
def test_refuses_wrong_options_and_other_optimizers_of_a_plugin():
    message = r"optimizer: cannot be built with lr=.*, beta='x' \(unsupp"
    with pytest.raises(UserError, match=message):
        check(compose([*LION_OPTIMIZER, "+optimizer.beta=x"]))
    with pytest.raises(UserError, match=r"a plugin's optimizer may be any"):
        check(compose([*LION_PLUGIN, "optimizer._target_=my_lion.torch.optim.LBFGS"]))


def test_lists_only_the_optimizers_of_torch_that_can_train_a_net():
    names = names_in_torch()
    assert "torch.optim.NAdam" in names
    unusable = {"torch.optim.LBFGS", "torch.optim.Muon", "torch.optim.SparseAdam"}
    assert not unusable.intersection(names)
    for name in names:
        optimizer = Tiny(
            "bp", "fc", "optimizer=torch", f"optimizer._target_={name}"
        ).learner.optimizer
        assert type(optimizer).__name__ == name.removeprefix("torch.optim.")
