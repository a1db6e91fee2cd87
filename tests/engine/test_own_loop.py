"""A rule in a plain PyTorch loop: bitwise backpropagation, the same weights as dfl-train, accumulation."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dfl_experiments as dfl
from dfl_experiments.configuration.components import component
from dfl_experiments.configuration.composition import compose, group_options, plain
from dfl_experiments.engine.learner import Learner
from dfl_experiments.engine.losses import LOSSES
from dfl_experiments.errors import UserError
from dfl_experiments.methods import Direct
from dfl_experiments.models import fc

INPUTS = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3


def module():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def rule_of(name, net, **options):
    torch.manual_seed(2)
    return dfl.rule(
        name, net, INPUTS[:1], optimizer=lambda p: torch.optim.SGD(p, 0.1), lr=0.1, **options
    )


def gradients(net):
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize(
    "loss", [F.cross_entropy, lambda y, t: F.mse_loss(y, F.one_hot(t, 3).float())]
)
def test_bp_with_a_loss_is_loss_backward_bit_for_bit(loss):
    net, twin = module(), module()
    value = rule_of("bp", net).backward(INPUTS, LABELS, loss=loss)
    expected = loss(twin(INPUTS), LABELS)
    expected.backward()
    assert torch.equal(value, expected.detach())
    assert all(map(torch.equal, gradients(net), gradients(twin)))


def test_las_in_a_plain_loop_is_dfl_train_s_step():
    torch.manual_seed(1)
    net = fc((20,), 3, [16, 16], "relu")
    torch.manual_seed(1)
    twin = fc((20,), 3, [16, 16], "relu")
    rule = dfl.rule("las", net, INPUTS[:1], optimizer=lambda p: torch.optim.Adam(p, 1e-3))
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    method = component(plain(compose(["method=las"]))["method"], "method").build(
        net=twin, num_classes=3, loss=LOSSES["cross_entropy"]
    )
    adam = dfl.compose(["optimizer.lr=1e-3"]).components["optimizer"].build()
    learner = Learner(twin, method, LOSSES["cross_entropy"], adam)
    for _ in range(50):
        optimizer.zero_grad()
        rule.backward(INPUTS, LABELS)
        optimizer.step()
        learner.step(INPUTS, LABELS)
    for mine, other in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["bp", "dfa", "las", "ltas", "dkp", "fa", "kp", "sdfa"])
def test_four_micro_batches_are_one_step_on_the_summed_gradient(name):
    net, twin = module(), module()
    whole, parts = rule_of(name, twin), rule_of(name, net)
    for part in range(4):
        rows = slice(3 * part, 3 * part + 3)
        parts.backward(INPUTS[rows], LABELS[rows], step_feedback=False)
    whole.backward(INPUTS, LABELS, step_feedback=False)
    for mine, other in zip(gradients(net), gradients(twin), strict=True):
        assert torch.allclose(mine, 4 * other, atol=1e-6)
    mine, other = (
        [p.grad for p in rule.method.parameters() if p.grad is not None] for rule in (parts, whole)
    )
    for one, another in zip(mine, other, strict=True):
        assert torch.allclose(one, 4 * another, atol=1e-6)


def with_state():
    """A net whose forward pass changes buffers and draws random numbers."""
    torch.manual_seed(1)
    normalised = nn.Sequential(nn.Linear(20, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
    return nn.Sequential(normalised, nn.Sequential(nn.Linear(16, 16), nn.ReLU()), nn.Linear(16, 3))


def test_alignment_has_names():
    found = rule_of("dfa", module(), boundaries=["1", "3"]).alignment(INPUTS, LABELS)
    assert list(found) == ["1", "3"]
    assert -1 <= found["1"]["cosine_sample"] < 1
    assert found["3"]["cosine_sample"] == pytest.approx(1)  # BP's own signal


@pytest.mark.parametrize("name", group_options("method"))
def test_training_is_the_same_with_and_without_alignment(name):
    states = []
    for is_measured in (False, True):
        net = with_state()
        rule = rule_of(name, net)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        torch.manual_seed(4)
        for _ in range(3):
            optimizer.zero_grad()
            rule.backward(INPUTS, LABELS)
            if is_measured:
                with torch.no_grad():
                    rule.alignment(INPUTS.flip(0), LABELS.flip(0))
            optimizer.step()
        states.append([*net.state_dict().values(), *rule.method.state_dict().values()])
    assert all(map(torch.equal, *states))


def test_a_refused_batch_leaves_the_gradients_as_they_are():
    net = module()
    rule = rule_of("las", net)
    rule.backward(INPUTS, LABELS)
    before = gradients(net)
    for call in (rule.backward, rule.alignment):
        with pytest.raises(UserError, match="labels 0 to 3; must be 0 to 2"):
            call(INPUTS, LABELS.roll(1).where(LABELS > 0, 3 * (LABELS == 0)))
    assert all(map(torch.equal, before, gradients(net)))


@pytest.mark.parametrize("name", ["bp", "dfa", "fa", "las"])
def test_compiled_nets_of_one_class_do_not_share_their_hooks(name):
    expected, compiled = module(), module()
    rule_of(name, expected).backward(INPUTS, LABELS, step_feedback=False)
    plain, other = module(), module()
    plain.compile(backend="aot_eager")
    plain(INPUTS).sum().backward()
    rule, rule_before = rule_of(name, compiled), rule_of("dkp", other)
    for net in (compiled, other):
        net.compile(backend="aot_eager")
    for _ in range(2):
        rule_before.backward(INPUTS, LABELS)
        compiled.zero_grad()
        rule.backward(INPUTS, LABELS, step_feedback=False)
        for found, gradient in zip(gradients(compiled), gradients(expected), strict=True):
            assert torch.allclose(found, gradient, atol=1e-6)
        plain(INPUTS)
    found, alignment = (
        each.alignment(INPUTS, LABELS)["1"] for each in (rule, rule_of(name, expected))
    )
    assert found == pytest.approx(alignment)


def test_kp_learns_from_clipped_gradients():
    net = module()
    rule = rule_of("kp", net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    distances = []
    for _ in range(5):
        optimizer.zero_grad()
        rule.backward(INPUTS, LABELS, step_feedback=False)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        rule.update_feedback()
        optimizer.step()
        distances.append(rule.method.feedback[0].detach() - net[2].weight.detach())
    # without decay, B - W is constant
    assert torch.allclose(distances[0], distances[-1], atol=1e-6)


@pytest.mark.parametrize("name", ["bp", "dfa", "fa", "kp"])
def test_gradients_pass_the_hooks_of_parameters(name):
    net, twin = module(), module()
    net[2].weight.register_hook(lambda gradient: 0.5 * gradient)
    for each in (net, twin):
        rule_of(name, each).backward(INPUTS, LABELS)
    expected = gradients(twin)
    expected[2] = 0.5 * expected[2]
    torch.testing.assert_close(gradients(net), expected)


@pytest.mark.parametrize("name", ["fa", "kp", "usf"])
def test_a_layer_may_be_frozen_and_learn_again_but_not_start_frozen(name):
    net, twin = module(), module()
    rule = rule_of(name, net)
    net[:4].requires_grad_(False)
    rule.backward(INPUTS, LABELS, step_feedback=False)
    net.zero_grad()
    net.requires_grad_(True)
    rule.backward(INPUTS, LABELS, step_feedback=False)
    rule_of(name, twin).backward(INPUTS, LABELS, step_feedback=False)
    torch.testing.assert_close(gradients(net), gradients(twin))
    frozen = module()
    frozen[:4].requires_grad_(False)
    rule = rule_of(name, frozen)
    rule.backward(INPUTS, LABELS)
    frozen.requires_grad_(True)
    for call in (rule.backward, rule.alignment):
        with pytest.raises(UserError, match="that was frozen in"):
            call(INPUTS, LABELS)


@pytest.mark.parametrize("frozen", ["0.bias", "2.bias", "2.weight"])
@pytest.mark.parametrize("name", ["fa", "kp", "pfa"])
def test_a_frozen_parameter_learns_later_if_every_layer_above_it_has_a_b(name, frozen):
    net, twin = module(), module()
    net.get_parameter(frozen).requires_grad_(False)
    rules = [rule_of(name, each) for each in (net, twin)]
    net.requires_grad_(True)
    for rule in rules:
        rule.backward(INPUTS, LABELS, step_feedback=False)
    torch.testing.assert_close(gradients(net), gradients(twin))


def test_a_bias_whose_signals_would_pass_a_layer_without_b_is_refused():
    net = module()
    net[:2].requires_grad_(False)
    rule = rule_of("fa", net)
    net[0].bias.requires_grad_(True)
    with pytest.raises(UserError, match="a layer above it has no B"):
        rule.backward(INPUTS, LABELS)


def test_what_would_have_no_effect_is_refused():
    net = module()
    rule = rule_of("dfa", net)
    with pytest.raises(UserError, match="put the layers below into the module"):
        rule.backward(nn.Linear(20, 20)(INPUTS), LABELS)
    with pytest.raises(UserError, match=r"loss: also depends on a tensor of shape \(3,\)"):
        rule.backward(
            INPUTS, LABELS, loss=lambda y, t: F.cross_entropy(y, t) + net[4].bias.square().sum()
        )
    with pytest.raises(UserError, match="loss: does not depend on the logits"):
        rule.backward(INPUTS, LABELS, loss=lambda y, t: F.cross_entropy(y, t).detach())
    rule.backward(INPUTS, LABELS, loss=lambda y, t: F.cross_entropy(y, t, torch.ones(3)))
    hook = net[0].weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(UserError, match="does not call the hooks"):
        rule.backward(INPUTS, LABELS)
    hook.remove()
    rule.backward(INPUTS, LABELS)


def test_regression_works_with_a_loss_of_one_s_own():
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)
    )
    targets = torch.stack([INPUTS[:, 0], INPUTS[:, 1] * 0.5], 1)
    rule = dfl.rule("dfa", net, INPUTS[:1])
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        losses.append(rule.backward(INPUTS, targets, loss=F.mse_loss).item())
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]


def test_a_loss_of_one_s_own_takes_any_target():
    net, twin = module(), module()
    weights = torch.arange(12) / 12

    def loss(logits, target):
        labels, weights = target
        return (F.cross_entropy(logits, labels, reduction="none") * weights).sum()

    rule_of("bp", net).backward(INPUTS, (LABELS, weights), loss=loss)
    loss(twin(INPUTS), (LABELS, weights)).backward()
    assert all(map(torch.equal, gradients(net), gradients(twin)))


def test_a_rule_that_is_made_in_inference_mode_trains():
    net, twin = module(), module()
    with torch.inference_mode():
        rule = rule_of("las", net)
        assert dfl.boundaries(net, INPUTS[:1]) == dfl.boundaries(twin, INPUTS[:1])
        for call in (rule.backward, rule.alignment):
            with pytest.raises(UserError, match=r"outside of torch\.inference_mode\(\)"):
                call(INPUTS, LABELS)
    for each in (rule, rule_of("las", twin)):
        each.backward(INPUTS, LABELS)
    assert all(map(torch.equal, gradients(net), gradients(twin)))


def test_a_rule_goes_on_from_its_state():
    net = module()
    rule = rule_of("ltas", net)
    rule.backward(INPUTS, LABELS)
    twin = rule_of("ltas", net, init="zeros")
    twin.load_state_dict(rule.state_dict())
    assert all(map(torch.equal, rule.method.parameters(), twin.method.parameters()))


@pytest.mark.parametrize("is_early", [False, True])
@pytest.mark.parametrize("name", ["brsf", "frsf", "usf"])
def test_sign_symmetry_keeps_its_scales_with_its_state(name, is_early):
    net, other = module(), module()
    other[2].weight.data *= 3
    rule = rule_of(name, net)
    # early states lack the scales; W then has to be the same
    twin = rule_of(name, net if is_early else other)
    state = rule.state_dict()
    if is_early:
        del state["method"]["_extra_state"]
    twin.load_state_dict(state)
    other.load_state_dict(net.state_dict())
    found = []
    for each in (rule, twin):
        torch.manual_seed(4)
        each.net.zero_grad()
        each.backward(INPUTS, LABELS)
        found.append(gradients(each.net))
    assert all(map(torch.equal, *found))
    assert torch.equal(rule.method.get_buffer("magnitude_1"), twin.method.get_buffer("magnitude_1"))


@pytest.mark.parametrize("name", group_options("method"))
def test_every_rule_trains_in_a_plain_loop(name):
    net = module()
    rule = rule_of(name, net)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(rule.backward(INPUTS, LABELS).item())
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    assert losses[-1] < losses[0]


def test_what_is_missing_or_impossible_is_refused():
    with pytest.raises(UserError, match="trains B; pass B's optimizer"):
        dfl.rule("las", module(), INPUTS[:1])
    with pytest.raises(UserError, match="pass lr="):
        dfl.rule("kp", module(), INPUTS[:1], optimizer=lambda p: torch.optim.SGD(p, 0.1), decay=0.1)
    with pytest.raises(UserError, match="did you mean las"):
        dfl.rule("lass", module(), INPUTS[:1])
    rule = rule_of("dfa", module())
    with torch.autocast("cpu", torch.float16), pytest.raises(UserError, match="float16"):
        rule.backward(INPUTS, LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        assert rule.backward(INPUTS, LABELS).dtype == torch.float32
    with pytest.raises(UserError, match="a sample has shape"):
        rule.backward(INPUTS[:, 1:], LABELS)
    for target in (LABELS.float(), LABELS[:, None], LABELS[1:], LABELS.to(torch.uint8)):
        with pytest.raises(UserError, match="must be labels"):
            rule.alignment(INPUTS, target)
    with pytest.raises(UserError, match="this rule needs labels"):
        rule_of("ltas", module()).backward(INPUTS, torch.zeros(12, 3), loss=F.mse_loss)
    with torch.no_grad(), pytest.raises(UserError, match=r"outside of torch.no_grad\(\)"):
        rule.backward(INPUTS, LABELS)
    rule.net.requires_grad_(False)
    with pytest.raises(UserError, match="all parameters are frozen"):
        rule.backward(INPUTS, LABELS)
    rule.net.module[4] = nn.Linear(16, 3)
    with pytest.raises(UserError, match=r"call dfl\.rule again"):
        rule.backward(INPUTS, LABELS)
    with pytest.raises(
        UserError, match="choose cross_entropy or squared_error; pass a function to `backward`"
    ):
        dfl.rule("dfa", module(), INPUTS[:1], loss=torch.nn.functional.mse_loss)


@pytest.mark.parametrize(
    ("message", "inputs", "target", "loss"),
    [
        ("inputs: a ndarray; must be one tensor", INPUTS.numpy(), LABELS, None),
        ("inputs: the batch has no samples", INPUTS[:0], LABELS[:0], None),
        ("inputs: the batch has no samples", INPUTS[:0], LABELS[:0], F.cross_entropy),
        ("target: a list; must be labels", INPUTS, LABELS.tolist(), None),
        ("target: a tuple; must be labels", INPUTS, (LABELS, LABELS), None),
        ("loss: must be a function of logits and target", INPUTS, LABELS, "cross_entropy"),
        ("loss: returned a float; must be one number", INPUTS, LABELS, lambda y, t: 1.0),
        (
            r"loss: returned a tensor of shape \(12,\); must be one number",
            INPUTS,
            LABELS,
            lambda y, t: F.cross_entropy(y, t, reduction="none"),
        ),
    ],
)
@pytest.mark.parametrize("name", ["bp", "las"])
def test_what_is_no_batch_or_no_loss_is_refused(name, message, inputs, target, loss):
    rule = rule_of(name, module())
    for call in (rule.backward, rule.alignment):
        with pytest.raises(UserError, match=message):
            call(inputs, target, loss=loss)


def test_an_optimizer_that_does_not_train_b_is_refused():
    net = module()
    with pytest.raises(UserError, match="optimizer: must be a function"):
        dfl.rule("las", net, INPUTS[:1], optimizer="adam")
    for optimizer in (lambda p: None, lambda p: torch.optim.SGD(net.parameters(), 0.1)):
        with pytest.raises(UserError, match="must return an optimizer of exactly the parameters"):
            dfl.rule("las", net, INPUTS[:1], optimizer=optimizer)


class Halved(Direct):
    """δ_i = (B_{i+1} s) ⊙ f'(a_i) with s = share · e."""

    def __init__(self, net, num_classes, loss, share: float = 0.5, **options: Any):
        super().__init__(net, num_classes, loss, **options)
        self.share = share

    def source(self, error, target):
        return self.share * error


def test_a_rule_of_one_s_own_is_passed_as_its_class():
    nets = [module(), module()]
    torch.manual_seed(2)
    own = dfl.rule(Halved, nets[0], INPUTS[:1], share=0.25, top="direct")
    torch.manual_seed(2)
    dfa = dfl.rule("dfa", nets[1], INPUTS[:1], init="default", top="direct")
    for rule in (own, dfa):
        rule.backward(INPUTS, LABELS)
    for mine, other in zip(gradients(nets[0])[:4], gradients(nets[1])[:4], strict=True):
        torch.testing.assert_close(mine, 0.25 * other)
    with pytest.raises(UserError, match=r"method\.sharee: no such option"):
        dfl.rule(Halved, module(), INPUTS[:1], sharee=1.0)


def test_what_is_no_rule_or_no_module_is_refused():
    class Inside(Halved):
        pass

    with pytest.raises(UserError, match="Inside: define the class outside of functions"):
        rule_of(Inside, module())
    with pytest.raises(UserError, match="rule: a Sequential; must be a name, such as 'las', or"):
        rule_of(module(), "las")
    for made in (None, module):
        with pytest.raises(UserError, match=r"model: must be a torch\.nn\.Module, but is"):
            rule_of("las", made)


def test_the_state_of_another_kind_of_rule_is_refused():
    las, dfa = rule_of("las", module()), rule_of("dfa", module())
    for rule, other in ((las, dfa), (dfa, las)):
        before = [p.clone() for p in rule.method.parameters()]
        with pytest.raises(UserError, match="state: of another rule"):
            rule.load_state_dict(other.state_dict())
        assert all(map(torch.equal, before, rule.method.parameters()))


class Holding(Halved):
    def __init__(self, net, num_classes, loss, **options: Any):
        super().__init__(net, num_classes, loss, **options)
        self.net = net


class Changing(Halved):
    def source(self, error, target):
        return error.mul_(self.share)


def test_a_rule_that_changes_the_net_or_the_error_is_refused():
    with pytest.raises(UserError, match="weights would count as B"):
        rule_of(Holding, module())
    with pytest.raises(UserError, match="changes e in place"):
        rule_of(Changing, module()).backward(INPUTS, LABELS)


class WithoutShape(Halved):
    def source(self, error, target):
        return error.mean(0)


class WithoutReturn(Halved):
    def signal(self, i, trace, error, target):
        super().signal(i, trace, error, target)


class ErrorAsSignal(Halved):
    def signal(self, i, trace, error, target):
        return error


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (WithoutShape, r"s, which `source` returns, .* shape \(12, 3\), but has shape \(3,\)"),
        (WithoutReturn, r"the signal to h_1 must be a tensor of shape \(12, 16\), but is a None"),
        (ErrorAsSignal, r"the signal to h_1 .* shape \(12, 16\), but has shape \(12, 3\)"),
    ],
)
def test_a_signal_of_another_shape_than_h_is_refused(rule, message):
    with pytest.raises(UserError, match=message):
        rule_of(rule, module()).backward(INPUTS, LABELS)


def test_an_activation_outside_the_blocks_is_warned_of(caplog):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(20, 16), nn.Linear(16, 16)
            self.third = nn.Linear(16, 3)

        def forward(self, x):
            x = F.dropout(self.first(x), 0.1).clamp(min=0)
            return self.third(F.relu(self.second(x)))

    rule_of("dfa", Functional())
    assert "the activation after first is outside its block" in caplog.text
    caplog.clear()
    rule_of("dfa", module())
    assert not caplog.text
