"""Rules on nets with habits of real projects: checkpointing, padding masks, pruning, other data types."""

import pytest
import torch
from conftest import METHODS
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import dfl_experiments as dfl
from dfl_experiments.errors import UserError

INPUTS = torch.randn(16, 12, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(16) % 4


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    hidden = [nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)]
    return nn.Sequential(*hidden, nn.ReLU(), nn.Linear(16, 4))


def rule_of(name, net, inputs=INPUTS, boundaries="auto", **options):
    torch.manual_seed(2)
    sgd = {"optimizer": lambda p: torch.optim.SGD(p, 0.1), "lr": 0.1}
    return dfl.rule(name, net, inputs[:1], boundaries, **sgd | options)


def gradients(net):
    return [p.grad for p in net.parameters() if p.grad is not None]


class Checkpointed(nn.Module):
    """Three parts. The second is checkpointed."""

    def __init__(self, is_on: bool) -> None:
        super().__init__()
        layers = mlp()
        self.first, self.second, self.third = layers[:2], layers[2:6], layers[6:]
        self.is_on = is_on

    def forward(self, x):
        h = self.first(x)
        h = checkpoint(self.second, h, use_reentrant=False) if self.is_on else self.second(h)
        return self.third(h)


@pytest.mark.parametrize("name", ["bp", "dfa", "las"])
def test_the_ends_of_a_checkpointed_part_are_boundaries(name):
    nets = [Checkpointed(True), Checkpointed(False)]
    for net in nets:
        rule_of(name, net, boundaries=["first", "second"]).backward(INPUTS, LABELS)
    torch.testing.assert_close(gradients(nets[0]), gradients(nets[1]))


def test_what_checkpointing_would_change_is_refused():
    with pytest.raises(UserError, match="inside a part with activation checkpointing"):
        rule_of("dfa", Checkpointed(True), boundaries=["second.3"])
    with pytest.raises(UserError, match="which FA and the rules based on it do not support"):
        rule_of("fa", Checkpointed(True))


@pytest.mark.parametrize("name", ["bp", "dfa", "fdfa"])
def test_a_transformer_with_a_padding_mask(name):
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 8, padding_idx=0)
            layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            h = self.encoder(self.embedding(x), src_key_padding_mask=x == 0)
            return self.head(h.mean(1))

    tokens = torch.arange(80).view(16, 5) % 8 + 1
    tokens[:, 3:] = 0
    net = Masked()
    rule = rule_of(name, net, tokens)
    rule.backward(tokens, LABELS)
    assert len(rule.alignment(tokens, LABELS)) > 2
    if name == "bp":
        own = [gradient.clone() for gradient in gradients(net)]
        net.zero_grad()
        F.cross_entropy(net(tokens), LABELS).backward()
        torch.testing.assert_close(own, gradients(net))


def test_forward_tangents_of_a_compiled_net():
    found = []
    for is_compiled in (True, False):
        net = mlp()
        rule = rule_of("fdfa", net)
        if is_compiled:
            net.compile(backend="aot_eager")
        rule.backward(INPUTS, LABELS)  # B is zero until this call has updated it
        net.zero_grad()
        rule.backward(INPUTS, LABELS)
        found.append(gradients(net))
    torch.testing.assert_close(found[0], found[1])


def test_a_pruned_net():
    net = mlp()
    prune.random_unstructured(net[2], "weight", 0.5)
    net(INPUTS)  # so `weight` is a computed tensor
    rule_of("bp", net).backward(INPUTS, LABELS)
    own = [gradient.clone() for gradient in gradients(net)]
    net.zero_grad()
    F.cross_entropy(net(INPUTS), LABELS).backward()
    torch.testing.assert_close(own, gradients(net))


@pytest.mark.parametrize("name", METHODS)
def test_a_net_in_bfloat16(name):
    net = mlp().bfloat16()
    rule_of(name, net, INPUTS.bfloat16()).backward(INPUTS.bfloat16(), LABELS)
    found = gradients(net)
    assert len(found) == (4 if name == "shallow" else 8)
    assert all(gradient.isfinite().all() for gradient in found)


def test_a_net_of_another_type_than_b_is_refused():
    net = mlp()
    rule = rule_of("las", net)
    net.double()
    with pytest.raises(UserError, match=r"is now torch\.float64 on cpu, but B is not"):
        rule.backward(INPUTS.double(), LABELS)


# WM and BRSF draw random numbers in every call, FDFA for its B
@pytest.mark.parametrize("name", sorted({*METHODS} - {"wm", "brsf"}))
def test_weighted_micro_batches_are_one_batch(name):
    found = []
    for count in (1, 4):
        net = mlp().double()
        rule = rule_of(name, net, INPUTS.double())
        for inputs, labels in zip(INPUTS.chunk(count), LABELS.chunk(count), strict=True):
            rule.backward(inputs.double(), labels, step_feedback=False, weight=1 / count)
        rule.update_feedback()
        feedback = [] if name == "fdfa" else list(rule.method.parameters())
        found.append((gradients(net), feedback))
    torch.testing.assert_close(found[0], found[1])


def test_a_gradient_that_two_parameters_share_is_weighted_once():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.extra = mlp(), nn.Parameter(torch.zeros(4, 16))

        def forward(self, x):
            return F.linear(self.net[:-1](x), self.net[6].weight + self.extra)

    net = Sum()
    rule_of("bp", net).backward(INPUTS, LABELS, weight=0.5)
    own = net.extra.grad.clone()
    net.zero_grad()
    F.cross_entropy(net(INPUTS), LABELS).backward()
    torch.testing.assert_close(own, 0.5 * net.extra.grad)


def test_kp_does_not_decay_a_frozen_layer():
    net = mlp()
    net[2].requires_grad_(False)
    before = [net[k].weight.clone() for k in (2, 4)]
    rule = rule_of("kp", net, decay=0.5)
    frozen, other = (b.clone() for b in rule.method.feedback[:2])
    rule.backward(INPUTS, LABELS)
    assert torch.equal(net[2].weight, before[0])
    assert torch.equal(rule.method.feedback[0], frozen)
    torch.testing.assert_close(net[4].weight, 0.95 * before[1])
    assert not torch.equal(rule.method.feedback[1], other)


def test_a_net_without_b_is_warned_of(caplog):
    rule_of("dfa", mlp()[4:], torch.zeros(1, 16))
    assert "no hidden layer has a B" in caplog.text


def test_adfa_says_nothing_of_a_random_b(caplog):
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)])

        def forward(self, x):
            first, second, third = self.layers
            return third(F.relu(second(F.relu(first(x)))))

    caplog.set_level("INFO")
    rule = rule_of("adfa", Functional())
    weights = rule.net.module.layers
    expected = weights[2].weight @ weights[1].weight
    assert torch.equal(rule.method.local_modules[1].weight, expected)
    images = nn.Sequential(nn.Unflatten(1, (3, 4)), nn.Conv1d(3, 2, 1), nn.ReLU(), nn.Flatten())
    with pytest.raises(UserError, match="the net must be fully connected"):
        rule_of("adfa", images.append(nn.Linear(8, 4)))
    assert "random" not in caplog.text


@pytest.mark.parametrize("name", ["dfa", "las", "fdfa"])
def test_units_that_an_activation_halves_have_no_product(name, caplog):
    caplog.set_level("INFO")
    glu = [nn.Linear(12, 16), nn.GLU(), nn.Linear(8, 16), nn.GLU(), nn.Linear(8, 4)]
    net = nn.Sequential(*glu)
    rule_of(name, net).backward(INPUTS, LABELS)
    assert len(gradients(net)) == 6
    assert ("B starts random" in caplog.text) == (name != "fdfa")


def test_images_of_one_axis_are_no_tokens():
    def convolutions(length):
        torch.manual_seed(1)
        layers = [nn.Conv1d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 8, 3, padding=1)]
        mean = nn.AdaptiveAvgPool1d(1)
        return nn.Sequential(*layers, nn.ReLU(), mean, nn.Flatten(), nn.Linear(8, 4))

    for length in (8, 10):  # with 8, an h_i has the shape of 8 tokens of the head's width
        rule = rule_of("dfa", convolutions(length), torch.zeros(1, 2, length), init="product")
        assert rule.method.products.above(1) is None


def test_alignment_keeps_a_buffer_that_the_forward_pass_replaces():
    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()
            self.register_buffer("mean", torch.zeros(12))

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            return self.net(x)

    net = Running()
    rule = rule_of("dfa", net)
    before = net.mean.clone()
    rule.alignment(INPUTS, LABELS)
    assert torch.equal(net.mean, before)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("example: must be one tensor", lambda: dfl.rule("dfa", mlp(), (INPUTS, INPUTS))),
        (
            "optimizer: must be a function",
            lambda: rule_of("las", mlp(), optimizer=torch.optim.SGD(mlp().parameters(), 0.1)),
        ),
        (
            r"loss: returned a tensor of shape \(16,\)",
            lambda: rule_of("dfa", mlp()).backward(
                INPUTS, LABELS, loss=lambda y, t: F.cross_entropy(y, t, reduction="none")
            ),
        ),
        (
            "target: labels -100 to 3; must be 0 to 3",
            lambda: rule_of("ltas", mlp()).backward(
                INPUTS, LABELS.masked_fill(LABELS == 0, -100), loss=F.cross_entropy
            ),
        ),
    ],
)
def test_mistakes_are_refused_in_one_sentence(message, call):
    with pytest.raises(UserError, match=message):
        call()


class OnlyBackward(torch.autograd.Function):
    """Twice the input, without a forward derivative."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, signal):
        return 2 * signal


class Doubled(nn.Module):
    """Twice the input."""

    def forward(self, x):
        return OnlyBackward.apply(x)


def test_an_operation_without_a_forward_derivative_is_refused_by_fdfa_only():
    net = nn.Sequential(*mlp(), Doubled())
    rule_of("dfa", net).backward(INPUTS, LABELS)
    with pytest.raises(UserError, match=r"FDFA needs a forward derivative of every operation \("):
        rule_of("fdfa", net).backward(INPUTS, LABELS)
