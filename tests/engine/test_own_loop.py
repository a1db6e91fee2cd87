"""Check `dfl.rule` in a user's own training loop: gradients, accumulation, alignment, state, and refusals."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dfl_experiments as dfl
from dfl_experiments.configuration.composition import group_options
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
    """Return a copy of each parameter's gradient, None for a parameter without one."""
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize(
    "loss", [F.cross_entropy, lambda y, t: F.mse_loss(y, F.one_hot(t, 3).float())]
)
def test_bp_with_a_loss_function_equals_loss_backward_bitwise(loss):
    net, twin = module(), module()
    value = rule_of("bp", net).backward(INPUTS, LABELS, loss=loss)
    expected = loss(twin(INPUTS), LABELS)
    expected.backward()
    assert torch.equal(value, expected.detach())
    assert all(map(torch.equal, gradients(net), gradients(twin)))


def test_las_in_a_plain_loop_equals_dfl_train():
    torch.manual_seed(1)
    net = fc((20,), 3, [16, 16], "relu")
    torch.manual_seed(1)
    twin = fc((20,), 3, [16, 16], "relu")
    rule = dfl.rule("las", net, INPUTS[:1], optimizer=lambda p: torch.optim.Adam(p, 1e-3))
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    loss = LOSSES["cross_entropy"]
    components = dfl.compose(["method=las", "optimizer.lr=1e-3"]).components
    method = components["method"].build(net=twin, num_classes=3, loss=loss)
    learner = Learner(twin, method, loss, components["optimizer"].build())
    for _ in range(50):
        optimizer.zero_grad()
        rule.backward(INPUTS, LABELS)
        optimizer.step()
        learner.step(INPUTS, LABELS)
    for p, expected in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["bp", "dfa", "las", "ltas", "dkp", "fa", "kp", "sdfa"])
def test_four_micro_batches_give_four_times_the_gradient_of_the_batch(name):
    net, twin = module(), module()
    in_parts, whole = rule_of(name, net), rule_of(name, twin)
    for inputs, labels in zip(INPUTS.chunk(4), LABELS.chunk(4), strict=True):
        in_parts.backward(inputs, labels, step_feedback=False)
    whole.backward(INPUTS, LABELS, step_feedback=False)
    for gradient, expected in zip(gradients(net), gradients(twin), strict=True):
        assert torch.allclose(gradient, 4 * expected, atol=1e-6)
    of_b, expected_of_b = gradients(in_parts.method), gradients(whole.method)
    for gradient, expected in zip(of_b, expected_of_b, strict=True):
        if expected is None:
            assert gradient is None
        else:
            assert torch.allclose(gradient, 4 * expected, atol=1e-6)


def module_with_batch_norm_and_dropout():
    torch.manual_seed(1)
    normalised = nn.Sequential(nn.Linear(20, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
    return nn.Sequential(normalised, nn.Sequential(nn.Linear(16, 16), nn.ReLU()), nn.Linear(16, 3))


def test_alignment_is_returned_by_boundary():
    alignment = rule_of("dfa", module(), boundaries=["1", "3"]).alignment(INPUTS, LABELS)
    assert list(alignment) == ["1", "3"]
    assert -1 <= alignment["1"]["cosine_sample"] < 1
    assert alignment["3"]["cosine_sample"] == pytest.approx(1)  # this layer has BP's signal


@pytest.mark.parametrize("name", group_options("method"))
def test_measuring_alignment_does_not_change_training(name):
    states = []
    for is_measured in (False, True):
        net = module_with_batch_norm_and_dropout()
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


def test_a_refused_batch_does_not_change_the_gradients():
    net = module()
    rule = rule_of("las", net)
    rule.backward(INPUTS, LABELS)
    before = gradients(net)
    wrong_labels = LABELS + 1
    for call in (rule.backward, rule.alignment):
        with pytest.raises(UserError, match="labels 1 to 3; must be 0 to 2"):
            call(INPUTS, wrong_labels)
    assert all(map(torch.equal, before, gradients(net)))


@pytest.mark.parametrize("name", ["bp", "dfa", "fa", "las"])
def test_compiled_nets_of_the_same_class_do_not_share_hooks(name):
    expected, compiled = module(), module()
    rule_of(name, expected).backward(INPUTS, LABELS, step_feedback=False)
    without_rule, with_dkp = module(), module()
    without_rule.compile(backend="aot_eager")
    without_rule(INPUTS).sum().backward()
    rule, dkp = rule_of(name, compiled), rule_of("dkp", with_dkp)
    compiled.compile(backend="aot_eager")
    with_dkp.compile(backend="aot_eager")
    for _ in range(2):
        dkp.backward(INPUTS, LABELS)
        compiled.zero_grad()
        rule.backward(INPUTS, LABELS, step_feedback=False)
        for gradient, correct in zip(gradients(compiled), gradients(expected), strict=True):
            assert torch.allclose(gradient, correct, atol=1e-6)
        without_rule(INPUTS)
    alignment = rule.alignment(INPUTS, LABELS)["1"]
    assert alignment == pytest.approx(rule_of(name, expected).alignment(INPUTS, LABELS)["1"])


def test_update_feedback_uses_clipped_gradients_in_kp():
    net = module()
    rule = rule_of("kp", net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    differences = []
    for _ in range(5):
        optimizer.zero_grad()
        rule.backward(INPUTS, LABELS, step_feedback=False)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        rule.update_feedback()
        optimizer.step()
        differences.append(rule.method.feedback[0].detach() - net[2].weight.detach())
    # without decay, B - W is constant
    assert torch.allclose(differences[0], differences[-1], atol=1e-6)


@pytest.mark.parametrize("name", ["bp", "dfa", "fa", "kp"])
def test_hooks_of_parameters_change_their_gradients(name):
    net, twin = module(), module()
    net[2].weight.register_hook(lambda gradient: 0.5 * gradient)
    rule_of(name, net).backward(INPUTS, LABELS)
    rule_of(name, twin).backward(INPUTS, LABELS)
    expected = gradients(twin)
    expected[2] = 0.5 * expected[2]
    torch.testing.assert_close(gradients(net), expected)


@pytest.mark.parametrize("name", ["fa", "kp", "usf"])
def test_layers_can_be_frozen_and_unfrozen_later(name):
    net, twin = module(), module()
    rule = rule_of(name, net)
    net[:4].requires_grad_(False)
    rule.backward(INPUTS, LABELS, step_feedback=False)
    net.zero_grad()
    net.requires_grad_(True)
    rule.backward(INPUTS, LABELS, step_feedback=False)
    rule_of(name, twin).backward(INPUTS, LABELS, step_feedback=False)
    torch.testing.assert_close(gradients(net), gradients(twin))


@pytest.mark.parametrize("name", ["fa", "kp", "usf"])
def test_refuses_to_train_layers_that_were_frozen_when_the_rule_was_made(name):
    net = module()
    net[:4].requires_grad_(False)
    rule = rule_of(name, net)
    rule.backward(INPUTS, LABELS)
    net.requires_grad_(True)
    for call in (rule.backward, rule.alignment):
        with pytest.raises(UserError, match="that was frozen in"):
            call(INPUTS, LABELS)


def test_refuses_inputs_that_need_a_gradient():
    below = nn.Linear(20, 20)
    with pytest.raises(UserError, match="put the layers below into the module"):
        rule_of("dfa", module()).backward(below(INPUTS), LABELS)


@pytest.mark.parametrize("frozen", ["0.bias", "2.bias", "2.weight"])
@pytest.mark.parametrize("name", ["fa", "kp", "pfa"])
def test_parameter_unfrozen_later_learns_if_every_layer_above_it_has_a_b(name, frozen):
    net, twin = module(), module()
    net.get_parameter(frozen).requires_grad_(False)
    rules = [rule_of(name, each) for each in (net, twin)]
    net.requires_grad_(True)
    for rule in rules:
        rule.backward(INPUTS, LABELS, step_feedback=False)
    torch.testing.assert_close(gradients(net), gradients(twin))


def test_refuses_to_train_a_bias_below_a_layer_without_b():
    net = module()
    net[:2].requires_grad_(False)
    rule = rule_of("fa", net)
    net[0].bias.requires_grad_(True)
    with pytest.raises(UserError, match="a layer above it has no B"):
        rule.backward(INPUTS, LABELS)


def test_refuses_a_loss_that_depends_on_more_than_the_logits():
    net = module()
    rule = rule_of("dfa", net)

    def regularised(logits, labels):
        return F.cross_entropy(logits, labels) + net[4].bias.square().sum()

    with pytest.raises(UserError, match=r"loss: also depends on a tensor of shape \(3,\)"):
        rule.backward(INPUTS, LABELS, loss=regularised)
    rule.backward(INPUTS, LABELS, loss=lambda y, t: F.cross_entropy(y, t, torch.ones(3)))


def test_refuses_hooks_that_it_would_not_call():
    net = module()
    rule = rule_of("dfa", net)
    hook = net[0].weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(UserError, match="does not call the hooks"):
        rule.backward(INPUTS, LABELS)
    hook.remove()
    rule.backward(INPUTS, LABELS)


def test_dfa_learns_regression_with_the_user_s_loss():
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


def test_own_loss_accepts_any_target():
    net, twin = module(), module()
    weights = torch.arange(12) / 12

    def loss(logits, target):
        labels, weights = target
        return (F.cross_entropy(logits, labels, reduction="none") * weights).sum()

    rule_of("bp", net).backward(INPUTS, (LABELS, weights), loss=loss)
    loss(twin(INPUTS), (LABELS, weights)).backward()
    assert all(map(torch.equal, gradients(net), gradients(twin)))


def test_rule_created_in_inference_mode_trains():
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


def test_load_state_dict_restores_b():
    net = module()
    rule = rule_of("ltas", net)
    rule.backward(INPUTS, LABELS)
    twin = rule_of("ltas", net, init="zeros")
    twin.load_state_dict(rule.state_dict())
    assert all(map(torch.equal, rule.method.parameters(), twin.method.parameters()))


@pytest.mark.parametrize("has_scales", [True, False])
@pytest.mark.parametrize("name", ["brsf", "frsf", "usf"])
def test_sign_symmetry_restores_its_scales(name, has_scales):
    net, other = module(), module()
    other[2].weight.data *= 3
    rule = rule_of(name, net)
    # states of earlier versions lack the scales, which are then computed from W
    twin = rule_of(name, other if has_scales else net)
    state = rule.state_dict()
    if not has_scales:
        del state["method"]["_extra_state"]
    twin.load_state_dict(state)
    other.load_state_dict(net.state_dict())
    gradients_of_both = []
    for restored in (rule, twin):
        torch.manual_seed(4)
        restored.net.zero_grad()
        restored.backward(INPUTS, LABELS)
        gradients_of_both.append(gradients(restored.net))
    assert all(map(torch.equal, *gradients_of_both))
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


def test_refuses_wrong_arguments_of_rule():
    with pytest.raises(UserError, match="this rule trains B, so pass a function"):
        dfl.rule("las", module(), INPUTS[:1])
    with pytest.raises(UserError, match="pass lr="):
        dfl.rule("kp", module(), INPUTS[:1], optimizer=lambda p: torch.optim.SGD(p, 0.1), decay=0.1)
    with pytest.raises(UserError, match="did you mean las"):
        dfl.rule("lass", module(), INPUTS[:1])
    message = "choose cross_entropy or squared_error; pass a function to `backward`"
    with pytest.raises(UserError, match=message):
        dfl.rule("dfa", module(), INPUTS[:1], loss=torch.nn.functional.mse_loss)


def test_autocast_works_with_bfloat16_and_is_refused_with_float16():
    rule = rule_of("dfa", module())
    with torch.autocast("cpu", torch.float16), pytest.raises(UserError, match="float16"):
        rule.backward(INPUTS, LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        assert rule.backward(INPUTS, LABELS).dtype == torch.float32


def test_refuses_wrong_targets():
    rule = rule_of("dfa", module())
    for target in (LABELS.float(), LABELS[:, None], LABELS[1:], LABELS.to(torch.uint8)):
        with pytest.raises(UserError, match="must be labels"):
            rule.alignment(INPUTS, target)
    with pytest.raises(UserError, match="this rule needs labels"):
        rule_of("ltas", module()).backward(INPUTS, torch.zeros(12, 3), loss=F.mse_loss)


def test_refuses_a_net_that_cannot_be_trained():
    rule = rule_of("dfa", module())
    with torch.no_grad(), pytest.raises(UserError, match=r"outside of torch.no_grad\(\)"):
        rule.backward(INPUTS, LABELS)
    rule.net.requires_grad_(False)
    with pytest.raises(UserError, match="all parameters are frozen"):
        rule.backward(INPUTS, LABELS)
    rule.net.module[4] = nn.Linear(16, 3)
    with pytest.raises(UserError, match=r"call dfl\.rule again"):
        rule.backward(INPUTS, LABELS)


@pytest.mark.parametrize(
    ("message", "inputs", "target", "loss"),
    [
        ("inputs: must be one tensor", INPUTS.numpy(), LABELS, None),
        ("with at least one sample", INPUTS[:0], LABELS[:0], None),
        ("with at least one sample", INPUTS[:0], LABELS[:0], F.cross_entropy),
        ("target: of type list; must be labels", INPUTS, LABELS.tolist(), None),
        (
            r"loss: must return a tensor with one value.* not \(\d+,\)",
            INPUTS,
            LABELS,
            nn.CrossEntropyLoss(reduction="none"),
        ),
        ("loss: must return a tensor with one value.* not int", INPUTS, LABELS, lambda *_: 1),
        ("target: of type tuple; must be labels", INPUTS, (LABELS, LABELS), None),
    ],
)
@pytest.mark.parametrize("name", ["bp", "las"])
def test_refuses_wrong_inputs_and_targets(name, message, inputs, target, loss):
    rule = rule_of(name, module())
    for call in (rule.backward, rule.alignment):
        with pytest.raises(UserError, match=message):
            call(inputs, target, loss=loss)


def test_refuses_an_optimizer_that_does_not_train_b():
    net = module()
    of_net = torch.optim.SGD(net.parameters(), 0.1)
    for optimizer in ("adam", of_net, lambda p: None, lambda p: of_net):
        with pytest.raises(UserError, match="returns an optimizer of exactly the parameters"):
            dfl.rule("las", net, INPUTS[:1], optimizer=optimizer)


class ScaledDirectFeedback(Direct):
    """δ_i = (B_{i+1} s) ⊙ f'(a_i) with s = share · e."""

    def __init__(self, net, num_classes, loss, share: float = 0.5, **options: Any):
        super().__init__(net, num_classes, loss, **options)
        self.share = share

    def source(self, error, target):
        return self.share * error


def test_the_user_s_rule_is_passed_as_its_class():
    net, twin = module(), module()
    torch.manual_seed(2)
    scaled = dfl.rule(ScaledDirectFeedback, net, INPUTS[:1], share=0.25, top="direct")
    torch.manual_seed(2)
    dfa = dfl.rule("dfa", twin, INPUTS[:1], init="default", top="direct")
    scaled.backward(INPUTS, LABELS)
    dfa.backward(INPUTS, LABELS)
    hidden, hidden_of_dfa = gradients(net)[:4], gradients(twin)[:4]
    for gradient, expected in zip(hidden, hidden_of_dfa, strict=True):
        torch.testing.assert_close(gradient, 0.25 * expected)
    with pytest.raises(UserError, match=r"method\.sharee: no such option"):
        dfl.rule(ScaledDirectFeedback, module(), INPUTS[:1], sharee=1.0)


def test_refuses_wrong_rules_and_modules():
    class Inside(ScaledDirectFeedback):
        pass

    with pytest.raises(UserError, match="a class of your own that is defined outside of functions"):
        rule_of(Inside, module())
    with pytest.raises(UserError, match="rule: must be a name, such as 'las', or"):
        rule_of(module(), "las")
    for made in (None, module):
        with pytest.raises(UserError, match=r"model: must be a torch\.nn\.Module, but is"):
            rule_of("las", made)


def test_refuses_boundaries_of_a_blocknet():
    net = fc((20,), 3, [16, 16], "relu")
    rule_of("dfa", net, boundaries="auto")
    with pytest.raises(UserError, match="boundaries: a BlockNet has fixed boundaries"):
        rule_of("dfa", net, boundaries=["1"])


def test_refuses_a_state_that_is_not_of_such_a_rule():
    net = module()
    las, dfa = rule_of("las", net), rule_of("dfa", module())
    binary = rule_of("bdfa", module())
    checkpoint = {"net": net.state_dict(), "rule": las.state_dict()}
    for rule, state in (
        (las, dfa.state_dict()),
        (dfa, las.state_dict()),
        (dfa, binary.state_dict()),
        (las, net.state_dict()),
        (las, checkpoint),
        (las, {}),
    ):
        before = [p.clone() for p in rule.method.parameters()]
        with pytest.raises(UserError, match="state: must be what state_dict"):
            rule.load_state_dict(state)
        assert all(map(torch.equal, before, rule.method.parameters()))


class StoresNet(ScaledDirectFeedback):
    def __init__(self, net, num_classes, loss, **options: Any):
        super().__init__(net, num_classes, loss, **options)
        self.net = net


class ChangesError(ScaledDirectFeedback):
    def source(self, error, target):
        return error.mul_(self.share)


def test_refuses_a_rule_that_stores_the_net_or_changes_the_error():
    with pytest.raises(UserError, match="weights would count as B"):
        rule_of(StoresNet, module())
    with pytest.raises(UserError, match="changes e in place"):
        rule_of(ChangesError, module()).backward(INPUTS, LABELS)


class SourceOfWrongShape(ScaledDirectFeedback):
    def source(self, error, target):
        return error.mean(0)


class SignalWithoutReturn(ScaledDirectFeedback):
    def signal(self, i, trace, error, target):
        super().signal(i, trace, error, target)


class ErrorAsSignal(ScaledDirectFeedback):
    def signal(self, i, trace, error, target):
        return error


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            SourceOfWrongShape,
            r"s, which `source` returns, .* shape \(12, 3\), but has shape \(3,\)",
        ),
        (
            SignalWithoutReturn,
            r"the signal to h_1 must be a tensor of shape \(12, 16\), but is a None",
        ),
        (ErrorAsSignal, r"the signal to h_1 .* shape \(12, 16\), but has shape \(12, 3\)"),
    ],
)
def test_refuses_signals_of_a_wrong_shape(rule, message):
    with pytest.raises(UserError, match=message):
        rule_of(rule, module()).backward(INPUTS, LABELS)


def test_warns_of_an_activation_outside_its_block(caplog):
    class ActivationAsMethod(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(20, 16), nn.Linear(16, 16)
            self.third = nn.Linear(16, 3)

        def forward(self, x):
            h = F.dropout(self.first(x), 0.1).clamp(min=0)  # a ReLU, but no activation function
            return self.third(F.relu(self.second(h)))

    rule_of("dfa", ActivationAsMethod())
    assert "the activation after first is outside its block" in caplog.text
    caplog.clear()
    rule_of("dfa", module())
    assert not caplog.text
