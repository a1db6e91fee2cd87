"""Check rules on nets as real projects have them: checkpointing, padding masks, pruning, other data types."""

import copy

import pytest
import torch
from conftest import BUILT_IN
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import dfl_experiments as dfl
from dfl_experiments.engine.blocknet import Block, BlockNet
from dfl_experiments.engine.module_net import ModuleNet
from dfl_experiments.errors import UserError
from dfl_experiments.models import fc

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


def autograd_gradients(net, inputs=INPUTS):
    """Return the gradients of a copy of the net by plain autograd."""
    twin = copy.deepcopy(net)
    twin.zero_grad()
    F.cross_entropy(twin(inputs), LABELS).backward()
    return gradients(twin)


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
def test_a_checkpointed_part_between_boundaries_does_not_change_the_gradients(name):
    checkpointed, plain = Checkpointed(True), Checkpointed(False)
    for net in (checkpointed, plain):
        rule_of(name, net, boundaries=["first", "second"]).backward(INPUTS, LABELS)
    torch.testing.assert_close(gradients(checkpointed), gradients(plain))


def test_refuses_boundaries_and_sequential_rules_inside_a_checkpointed_part():
    with pytest.raises(UserError, match="inside a part with activation checkpointing"):
        rule_of("dfa", Checkpointed(True), boundaries=["second.3"])
    with pytest.raises(UserError, match="which FA and the rules based on it do not support"):
        rule_of("fa", Checkpointed(True))


@pytest.mark.parametrize("name", ["bp", "dfa", "fdfa"])
def test_rules_train_a_transformer_with_a_padding_mask(name):
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
        torch.testing.assert_close(gradients(net), autograd_gradients(net, tokens))


def test_fdfa_gives_the_same_gradients_on_a_compiled_net():
    results = []
    for is_compiled in (True, False):
        net = mlp()
        rule = rule_of("fdfa", net)
        if is_compiled:
            net.compile(backend="aot_eager")
        rule.backward(INPUTS, LABELS)  # B is zero before the first step
        net.zero_grad()
        rule.backward(INPUTS, LABELS)
        results.append(gradients(net))
    torch.testing.assert_close(results[0], results[1])


def test_bp_on_a_pruned_net_equals_autograd():
    net, twin = mlp(), mlp()
    for pruned in (net, twin):
        torch.manual_seed(3)
        prune.random_unstructured(pruned[2], "weight", 0.5)
        pruned(INPUTS)  # `weight` is now a tensor that a forward pass computed
    rule_of("bp", net).backward(INPUTS, LABELS)
    F.cross_entropy(twin(INPUTS), LABELS).backward()
    torch.testing.assert_close(gradients(net), gradients(twin))


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_rule_trains_a_net_in_bfloat16(name):
    net = mlp().bfloat16()
    rule_of(name, net, INPUTS.bfloat16()).backward(INPUTS.bfloat16(), LABELS)
    assert len(gradients(net)) == (4 if name == "shallow" else 8)
    assert all(gradient.isfinite().all() for gradient in gradients(net))


# WM and BRSF draw other random numbers in every call. FDFA does so for B only, which is not compared.
@pytest.mark.parametrize("name", sorted({*BUILT_IN} - {"wm", "brsf"}))
def test_weighted_micro_batches_equal_one_batch(name):
    results = []
    for count in (1, 4):
        net = mlp().double()
        rule = rule_of(name, net, INPUTS.double())
        for inputs, labels in zip(INPUTS.chunk(count), LABELS.chunk(count), strict=True):
            rule.backward(inputs.double(), labels, step_feedback=False, weight=1 / count)
        rule.update_feedback()
        feedback = [] if name == "fdfa" else list(rule.method.parameters())
        results.append((gradients(net), feedback))
    torch.testing.assert_close(results[0], results[1])


def test_a_gradient_tensor_shared_by_two_parameters_is_weighted_once():
    class SumOfWeights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.extra = mlp(), nn.Parameter(torch.zeros(4, 16))

        def forward(self, x):
            return F.linear(self.net[:-1](x), self.net[6].weight + self.extra)

    net = SumOfWeights()
    rule_of("bp", net).backward(INPUTS, LABELS, weight=0.5)
    expected = [0.5 * gradient for gradient in autograd_gradients(net)]
    torch.testing.assert_close(gradients(net), expected)


def test_kp_does_not_decay_a_frozen_layer():
    net = mlp()
    net[2].requires_grad_(False)
    frozen_w, other_w = net[2].weight.clone(), net[4].weight.clone()
    rule = rule_of("kp", net, decay=0.5)
    frozen_b, other_b = (b.clone() for b in rule.method.feedback[:2])
    rule.backward(INPUTS, LABELS)
    assert torch.equal(net[2].weight, frozen_w)
    assert torch.equal(rule.method.feedback[0], frozen_b)
    torch.testing.assert_close(net[4].weight, 0.95 * other_w)
    assert not torch.equal(rule.method.feedback[1], other_b)


@pytest.mark.parametrize("name", ["kp", "pfa"])
def test_b_of_a_layer_that_is_frozen_during_training_stays(name):
    net = nn.Sequential(nn.Conv1d(3, 5, 2), nn.ReLU(), nn.Conv1d(5, 4, 1), nn.Flatten(), mlp())
    rule = rule_of(name, net, INPUTS.view(-1, 3, 4))
    net[2].requires_grad_(False)
    net[4][2].requires_grad_(False)
    frozen = [not layer.weight.requires_grad for layer in rule.method.layers]
    before = [b.clone() for b in rule.method.feedback]
    rule.backward(INPUTS.view(-1, 3, 4), LABELS)
    stays = [torch.equal(b, old) for b, old in zip(rule.method.feedback, before, strict=True)]
    assert stays == frozen


def test_warns_if_no_hidden_layer_has_a_b(caplog):
    rule_of("dfa", mlp()[4:], torch.zeros(1, 16))
    assert "no hidden layer has a B" in caplog.text


def test_adfa_starts_from_the_product_of_weights_and_logs_no_random_b(caplog):
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
    assert "random" not in caplog.text


def test_adfa_refuses_a_convolution_without_logging_a_random_b(caplog):
    caplog.set_level("INFO")
    convolution = [nn.Unflatten(1, (3, 4)), nn.Conv1d(3, 2, 1), nn.ReLU(), nn.Flatten()]
    with pytest.raises(UserError, match="the net must be fully connected"):
        rule_of("adfa", nn.Sequential(*convolution, nn.Linear(8, 4)))
    assert "random" not in caplog.text


@pytest.mark.parametrize("name", ["dfa", "las", "fdfa"])
def test_b_starts_random_where_an_activation_halves_the_units(name, caplog):
    caplog.set_level("INFO")
    glu = [nn.Linear(12, 16), nn.GLU(), nn.Linear(8, 16), nn.GLU(), nn.Linear(8, 4)]
    net = nn.Sequential(*glu)
    rule_of(name, net).backward(INPUTS, LABELS)
    assert len(gradients(net)) == 6
    assert ("B starts random" in caplog.text) == (name != "fdfa")  # FDFA's B starts at zero


def test_b_of_1d_convolutions_is_not_the_product_for_tokens():
    def convolutions(length):
        torch.manual_seed(1)
        layers = [nn.Conv1d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 8, 3, padding=1)]
        mean = nn.AdaptiveAvgPool1d(1)
        return nn.Sequential(*layers, nn.ReLU(), mean, nn.Flatten(), nn.Linear(8, 4))

    for length in (8, 10):  # with 8, h_i (8, 8) also has the shape of 8 tokens of the head's width
        rule = rule_of("dfa", convolutions(length), torch.zeros(1, 2, length), init="product")
        assert rule.method.products.above(1) is None


class Words(nn.Module):
    """Logits of every token, (N, T·V)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        layers = [nn.Embedding(5, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.layers(x)).flatten(1)


@pytest.mark.parametrize("name", ["bp", "dfa", "las"])
def test_rules_train_a_net_that_flattens_the_logits_of_all_tokens(name):
    tokens = torch.arange(16 * 6).view(16, 6) % 5

    def loss(logits, target):
        return F.cross_entropy(logits.view(-1, 5), target.flatten())

    net, twin = Words(), Words()
    rule = rule_of(name, net, tokens)
    rule.backward(tokens, tokens, loss=loss)
    loss(twin(tokens), tokens).backward()
    equal = [torch.equal(*pair) for pair in zip(gradients(net), gradients(twin), strict=True)]
    assert all(equal) if name == "bp" else equal[-2:] == [True, True]


def test_alignment_restores_a_buffer_that_the_forward_pass_replaces():
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
            "target: labels -100 to 3; must be 0 to 3",
            lambda: rule_of("ltas", mlp()).backward(
                INPUTS, LABELS.masked_fill(LABELS == 0, -100), loss=F.cross_entropy
            ),
        ),
    ],
)
def test_refuses_wrong_arguments(message, call):
    with pytest.raises(UserError, match=message):
        call()


class OnlyBackward(torch.autograd.Function):
    """Double the input. This function has no forward derivative."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, signal):
        return 2 * signal


class Doubled(nn.Module):
    def forward(self, x):
        return OnlyBackward.apply(x)


def test_only_fdfa_refuses_an_operation_without_a_forward_derivative():
    net = nn.Sequential(*mlp(), Doubled())
    rule_of("dfa", net).backward(INPUTS, LABELS)
    with pytest.raises(UserError, match=r"FDFA needs a forward derivative of every operation \("):
        rule_of("fdfa", net).backward(INPUTS, LABELS)


def with_new_head(net):
    (net.module if isinstance(net, ModuleNet) else net).head = nn.Linear(16, 4)
    return net


class WithHead(nn.Module):
    """A net with a head for three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = mlp()[:4], nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize("name", ["bp", "dfa"])
@pytest.mark.parametrize(
    "make",
    [lambda: fc((12,), 3, [16, 16], "relu"), lambda: ModuleNet(WithHead(), "auto", INPUTS)],
    ids=["blocks", "module"],
)
def test_a_head_that_was_replaced_in_a_loaded_net_learns(name, make):
    net = with_new_head(make())
    rule_of(name, net).backward(INPUTS, LABELS)
    head = [*net.parameters()][-2:]
    expected = torch.autograd.grad(F.cross_entropy(net(INPUTS), LABELS), head)
    for parameter, gradient in zip(head, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_refuses_blocks_that_share_a_weight():
    shared = nn.Linear(16, 16)
    first, second, third = (Block(pre, nn.ReLU()) for pre in (nn.Linear(12, 16), shared, shared))
    with pytest.raises(UserError, match=r"blocks 2 and 3 share a weight of shape \(16, 16\)"):
        BlockNet(first, second, third, head=nn.Linear(16, 4), input_shape=(12,))
