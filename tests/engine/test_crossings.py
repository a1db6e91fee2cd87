"""Check that sequential rules find every weight that multiplies hidden values, and refuse those B cannot replace."""

import copy

import pytest
import torch
from conftest import Tiny
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from dfl_experiments.engine.alignment import backprop_deltas, measure
from dfl_experiments.engine.blocknet import Block, BlockNet
from dfl_experiments.engine.crossings import layers_to_replace
from dfl_experiments.engine.losses import LOSSES
from dfl_experiments.errors import UserError
from dfl_experiments.methods import DirectFeedback, FeedbackAlignment, KolenPollack, ProductFeedback

CROSS_ENTROPY = LOSSES["cross_entropy"]
SIDE, PLANES = 6, 8


class OnTokens(nn.Module):
    """Apply a module to the pixels of an image (N, C, H, W) as tokens (N, T, C). The result has the image's shape."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        tokens = self.inner(x.flatten(2).mT)
        tokens = tokens[0] if isinstance(tokens, tuple) else tokens
        return tokens.mT.reshape(x.shape)


class Attention(nn.MultiheadAttention):
    def __init__(self):
        super().__init__(PLANES, 2, batch_first=True)

    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)


class Custom(nn.Module):
    """Apply an operation to the hidden values and a parameter of its own, as custom modules do."""

    def __init__(self, operation, *shape):
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(*shape) / 3)
        self.operation = operation

    def forward(self, x):
        return self.operation(x, self.mixing)


class UsesWeightTwice(nn.Linear):
    """Use the weight once as a Linear layer and once directly."""

    def forward(self, x):
        return super().forward(x) + x @ self.weight.T


class Standardised(nn.Conv2d):
    """A convolution with a standardised weight."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, (weight - weight.mean()) / weight.std(), bias)


def hooked():
    """Return a convolution with a hook that changes its output."""
    layer = nn.Conv2d(PLANES, PLANES, 3, padding=1)
    layer.register_forward_hook(lambda module, args, output: 3 * output)
    return layer


class InTraining(nn.Module):
    """Multiply by a matrix in training mode only."""

    def __init__(self):
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(PLANES, PLANES) / 3)

    def forward(self, x):
        return x @ self.mixing if self.training else x


class ComputedMatrix(nn.Module):
    """Multiply hidden values by a matrix that a layer computes from another parameter."""

    def __init__(self, make, *shape):
        super().__init__()
        self.make = make
        self.start = nn.Parameter(torch.randn(*shape))

    def forward(self, x):
        return x @ self.make(self.start).view(PLANES, PLANES)


class Prototypes(nn.Module):
    """Multiply hidden values by the rows of an embedding."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(PLANES, PLANES)

    def forward(self, x):
        return x @ self.rows(torch.arange(PLANES)).mT


class Twice(nn.Module):
    """Call one layer twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(PLANES, PLANES, 3, padding=1)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class Bilinear(nn.Bilinear):
    def forward(self, x):
        return super().forward(x, x)


class Sized(nn.Module):
    """Call a layer with a second argument."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(PLANES, PLANES, 3, padding=1)

    def forward(self, x):
        return self.up(x, output_size=x.shape)


REPLACED = {
    "Conv2d": lambda: nn.Conv2d(PLANES, PLANES, 3, padding=1),
    "circular": lambda: nn.Conv2d(PLANES, PLANES, 3, padding=1, padding_mode="circular"),
    "reflect": lambda: nn.Conv2d(PLANES, PLANES, 3, padding=1, padding_mode="reflect"),
    "replicate": lambda: nn.Conv2d(
        PLANES, PLANES, (3, 5), padding=(1, 2), padding_mode="replicate"
    ),
    "same": lambda: nn.Conv2d(PLANES, PLANES, 4, padding="same"),
    "groups": lambda: nn.Conv2d(PLANES, PLANES, 3, padding=1, groups=4),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(PLANES, PLANES, 3, padding=1, groups=2),
    "Conv1d": lambda: nn.Sequential(
        nn.Flatten(2), nn.Conv1d(PLANES, PLANES, 3, padding=1), nn.Unflatten(2, (SIDE, SIDE))
    ),
    "Conv3d": lambda: nn.Sequential(
        nn.Unflatten(1, (PLANES, 1)),
        nn.Conv3d(PLANES, PLANES, (1, 3, 3), padding="same"),
        nn.Flatten(1, 2),
    ),
    "Linear": lambda: OnTokens(nn.Linear(PLANES, PLANES)),
    "Conv2d, called twice": Twice,
}
UNIT_BY_UNIT = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(PLANES),
    "GroupNorm": lambda: nn.GroupNorm(2, PLANES),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(PLANES, affine=True),
    "LayerNorm": lambda: OnTokens(nn.LayerNorm(PLANES)),
    "RMSNorm": lambda: OnTokens(nn.RMSNorm(PLANES)),
    "clamp": lambda: Custom(lambda x, w: torch.clamp(x, max=w), 1),
    "PReLU": lambda: nn.PReLU(PLANES),
    "layer scale": lambda: Custom(lambda x, w: x + x * w, PLANES, 1, 1),
    "position embedding": lambda: Custom(lambda x, w: x + w, 1, PLANES, SIDE, SIDE),
    "class token": lambda: Custom(
        lambda x, w: torch.cat([x[..., 1:], w.expand(len(x), -1, -1, -1)], 3), PLANES, SIDE, 1
    ),
}
REFUSED = {
    "in_proj_weight of Attention": lambda: OnTokens(Attention()),
    "weight_[ih]h_l0 of GRU": lambda: OnTokens(nn.GRU(PLANES, PLANES, batch_first=True)),
    "weight_[ih]h_l0 of LSTM": lambda: OnTokens(nn.LSTM(PLANES, PLANES, batch_first=True)),
    "weight_[ih]h_l0 of RNN": lambda: OnTokens(nn.RNN(PLANES, PLANES, batch_first=True)),
    "weight of Bilinear": lambda: OnTokens(Bilinear(PLANES, PLANES, PLANES)),
    "mixing of Custom": lambda: OnTokens(Custom(lambda x, w: x @ w, PLANES, PLANES)),
    "mixing of Custom, by F.linear": lambda: OnTokens(Custom(F.linear, PLANES, PLANES)),
    "mixing of Custom, by einsum": lambda: OnTokens(
        Custom(lambda x, w: torch.einsum("ntc,cd->ntd", x, w), PLANES, PLANES)
    ),
    "mixing of Custom, by conv2d": lambda: Custom(
        lambda x, w: F.conv2d(x, w, padding=1), PLANES, PLANES, 3, 3
    ),
    "mixing of Custom, by a sum": lambda: OnTokens(
        Custom(lambda x, w: (x[..., None, :] * w).sum(-1), PLANES, PLANES)
    ),
    "mixing of Custom, after softmax": lambda: OnTokens(
        Custom(lambda x, w: x @ w.softmax(0), PLANES, PLANES)
    ),
    "original1 of ParametrizationList": lambda: parametrizations.weight_norm(
        nn.Conv2d(PLANES, PLANES, 1)
    ),
    "weight of Linear, from a parameter": lambda: OnTokens(
        ComputedMatrix(nn.Linear(PLANES, 2 * PLANES), PLANES // 2, PLANES)
    ),
    "weight of Linear, from a constant": lambda: OnTokens(
        ComputedMatrix(nn.Linear(3, PLANES**2), 3)
    ),
    "weight of Embedding": lambda: OnTokens(Prototypes()),
    "mixing of InTraining": lambda: OnTokens(InTraining()),
    "mixing of Custom, expanded": lambda: OnTokens(
        Custom(
            lambda x, w: (x.unsqueeze(-2).expand(-1, -1, PLANES, -1) * w).sum(-1), PLANES, PLANES
        )
    ),
    "mixing of Custom, by quotients": lambda: OnTokens(
        Custom(lambda x, w: (x.unsqueeze(-2) / w).sum(-1), PLANES, PLANES)
    ),
    "weight of UsesWeightTwice": lambda: OnTokens(UsesWeightTwice(PLANES, PLANES)),
}


def net_of(make):
    """Return a net of three blocks and a head; `make` returns the layer under test, in the middle block."""
    torch.manual_seed(0)
    first = Block(nn.Conv2d(1, PLANES, 3, padding=1), nn.ReLU(inplace=True))
    middle = Block(make(), nn.Sequential(nn.ReLU(inplace=True), nn.Flatten()))
    last = Block(nn.Linear(PLANES * SIDE * SIDE, 7), nn.ReLU(inplace=True))
    return BlockNet(first, middle, last, head=nn.Linear(7, 4), input_shape=(1, SIDE, SIDE)).double()


def batch():
    torch.manual_seed(1)
    return torch.rand(5, 1, SIDE, SIDE, dtype=torch.double), torch.randint(4, (5,))


def backward(net, method, keep=True):
    """Run a forward and a backward pass on a batch. Return the trace, the error signals and the error."""
    x, target = batch()
    trace = net.trace(x, method.cuts, keep=keep, transpose=method.transpose)
    _, error = CROSS_ENTROPY.value_and_error(trace.logits, target)
    return trace, trace.backward(method.signal, error, target), error


pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")


@pytest.mark.parametrize("kind", [*REPLACED, *UNIT_BY_UNIT])
def test_feedback_alignment_with_b_equal_to_w_is_backprop(kind):
    net = net_of({**REPLACED, **UNIT_BY_UNIT}[kind])
    plain = copy.deepcopy(net)
    x, target = batch()
    F.cross_entropy(plain(x), target).backward()
    method = FeedbackAlignment(net, 4, CROSS_ENTROPY, init="copy").double()
    trace, deltas, error = backward(net, method)
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    for delta, reference in zip(deltas, backprop_deltas(trace, error), strict=True):
        torch.testing.assert_close(delta, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", REPLACED)
def test_no_signal_passes_a_layer_whose_b_is_zero(kind):
    net = net_of(REPLACED[kind])
    method = FeedbackAlignment(net, 4, CROSS_ENTROPY, init="default").double()
    (weight,) = [p for p in net.blocks[1].pre.parameters() if p.dim() > 1]
    (b,) = [b for b, w in method.weight_pairs(1) if w is weight]
    b.zero_()
    trace, (first, second, _), error = backward(net, method)
    assert first.count_nonzero() == 0
    assert second.count_nonzero() > 0
    assert all(delta.count_nonzero() > 0 for delta in backprop_deltas(trace, error))


@pytest.mark.parametrize("kind", REFUSED)
def test_refuses_weights_that_b_cannot_replace(kind):
    net = net_of(REFUSED[kind])
    weight = kind.partition(",")[0]
    message = rf"^model: blocks\.1\.pre\S*{weight} is combined with hidden values"
    with pytest.raises(UserError, match=message):
        FeedbackAlignment(net, 4, CROSS_ENTROPY, init="default")
    assert all(p.requires_grad for p in net.parameters())
    assert net.training


@pytest.mark.parametrize("kind", REFUSED)
def test_direct_feedback_trains_nets_that_sequential_rules_refuse(kind):
    net = net_of(REFUSED[kind])
    method = DirectFeedback(net, 4, CROSS_ENTROPY, local_target="logits", init="product").double()
    assert not method.products.dense
    backward(net, method, keep=False)
    assert all(p.grad is not None for p in net.blocks[0].parameters())


def test_frozen_layers_below_all_trained_layers_need_no_b():
    net = net_of(lambda: OnTokens(Attention()))
    for p in [*net.blocks[0].parameters(), *net.blocks[1].parameters()]:
        p.requires_grad_(False)
    method = FeedbackAlignment(net, 4, CROSS_ENTROPY, init="default")
    assert method.layers == [net.head]
    assert [p.requires_grad for p in net.blocks[1].parameters()] == [False] * 4


def test_refuses_a_layer_called_with_several_arguments():
    with pytest.raises(UserError, match=r"ConvTranspose2d.* is called with several arguments"):
        FeedbackAlignment(net_of(Sized), 4, CROSS_ENTROPY, init="default")


@pytest.mark.parametrize("make", [lambda: Standardised(PLANES, PLANES, 3, padding=1), hooked])
def test_refuses_a_layer_whose_output_is_changed(make):
    with pytest.raises(UserError, match=r"changes the output of (Standardised|Conv2d)\("):
        FeedbackAlignment(net_of(make), 4, CROSS_ENTROPY, init="copy")


def net_with_shared_weight():
    convolutions = [nn.Conv2d(PLANES, PLANES, 3, padding=1, bias=False) for _ in range(2)]
    convolutions[1].weight = convolutions[0].weight
    return net_of(lambda: nn.Sequential(*convolutions))


def test_kolen_pollack_decays_a_shared_weight_once():
    net = net_with_shared_weight()
    method = KolenPollack(net, 4, CROSS_ENTROPY, decay=1.0, init="default").double()
    pairs = list(zip(method.feedback, method.layers, strict=True))
    before = [(b - layer.weight).detach() for b, layer in pairs]
    method.follow(0.1)
    for (b, layer), difference in zip(pairs, before, strict=True):
        torch.testing.assert_close((b - layer.weight).detach(), 0.9 * difference)


def test_product_feedback_refuses_a_shared_weight():
    with pytest.raises(UserError, match="share a weight"):
        ProductFeedback(net_with_shared_weight(), 4, CROSS_ENTROPY, expansion=2)


@pytest.mark.parametrize("method", ["bp", "las", "fa"])
def test_a_frozen_block_keeps_its_weights_and_the_block_below_learns(method):
    t = Tiny(method, "fc")
    t.net.blocks[1].requires_grad_(False)
    for _ in range(2):
        before = t.state()
        t.learner.step(t.x, t.target, align=True)
        after = t.state()
        for name, _ in t.net.named_parameters():
            is_frozen = name.startswith("blocks.1.")
            assert torch.equal(after[f"net.{name}"], before[f"net.{name}"]) == is_frozen, name


def test_a_net_with_one_weight_layer_needs_no_b():
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = BlockNet(
        Block(nn.Conv2d(1, 4, 3), nn.ReLU()), head=head, input_shape=(1, SIDE, SIDE)
    ).double()
    method = FeedbackAlignment(net, 4, CROSS_ENTROPY, init="default")
    assert method.layers == []
    trace, deltas, error = backward(net, method)
    cosine = measure(net, method, trace, deltas, error)[0]
    assert cosine == pytest.approx(1)


def test_direct_feedback_refuses_a_block_that_changes_its_input_in_place():
    net = net_of(
        lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(PLANES, PLANES, 3, padding=1))
    )
    with pytest.raises(UserError, match="block 2 changes its input h_1 in place"):
        DirectFeedback(net, 4, CROSS_ENTROPY, local_target="logits", init="default")
    FeedbackAlignment(net, 4, CROSS_ENTROPY, init="default")


def test_product_feedback_refuses_a_transposed_convolution():
    with pytest.raises(UserError, match="ConvTranspose2d"):
        ProductFeedback(net_of(REPLACED["ConvTranspose2d"]), 4, CROSS_ENTROPY, expansion=2)


@pytest.mark.parametrize("kind", ["ConvTranspose2d", "circular", "Conv1d"])
def test_kolen_pollack_keeps_b_equal_to_w(kind):
    net = net_of(REPLACED[kind])
    method = KolenPollack(net, 4, CROSS_ENTROPY, decay=0.0, init="copy").double()
    optimizer_of_w = torch.optim.Adam(net.parameters(), 0.1)
    optimizer_of_b = torch.optim.Adam(method.parameters(), 0.1)
    for _ in range(3):
        backward(net, method, keep=False)
        method.follow(0.1)
        optimizer_of_b.step()
        optimizer_of_w.step()
    for b, layer in zip(method.feedback, method.layers, strict=True):
        torch.testing.assert_close(b, layer.weight)


class Embedded(nn.Module):
    """Embed three tokens, and add position embeddings or multiply by them as by a matrix."""

    def __init__(self, is_multiplied: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, PLANES)
        self.positions = nn.Embedding(PLANES, PLANES)
        self.is_multiplied = is_multiplied

    def forward(self, x):
        h = self.tokens(x[:, 1:])
        positions = self.positions(torch.arange(h.shape[1]))
        h = h @ positions.mT if self.is_multiplied else h + positions
        return h.flatten(1)


def embedding_net(is_multiplied):
    width = 3 * 3 if is_multiplied else 3 * PLANES
    first = Block(nn.Sequential(Embedded(is_multiplied), nn.Linear(width, 5)), nn.ReLU())
    second = Block(nn.Linear(5, 6), nn.ReLU())
    net = BlockNet(first, second, head=nn.Linear(6, 4), input_shape=(4,)).double()
    net.example = torch.full((1, 4), 6)
    return net


def test_embeddings_need_no_b():
    assert layers_to_replace(embedding_net(is_multiplied=False)) == [0, 1, 2]


def test_refuses_an_embedding_used_as_a_matrix():
    message = r"^model: blocks\.0\.pre\.0\.positions\.weight of Embedding is combined with hidden"
    with pytest.raises(UserError, match=message):
        FeedbackAlignment(embedding_net(is_multiplied=True), 4, CROSS_ENTROPY, init="default")
