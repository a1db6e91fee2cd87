"""A sequential rule replaces the transpose of every weight that hidden values pass, or refuses the net by name."""

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


class Tokens(nn.Module):
    """Call a module on (N, T, C) tokens of an image (N, C, H, W), as many of them and as wide as there were."""

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


class Own(nn.Module):
    """Parameters of one's own, and an operation on them and the hidden values."""

    def __init__(self, operation, *shape):
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(*shape) / 3)
        self.operation = operation

    def forward(self, x):
        return self.operation(x, self.mixing)


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) + x @ self.weight.T


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, (weight - weight.mean()) / weight.std(), bias)


def hooked():
    layer = nn.Conv2d(PLANES, PLANES, 3, padding=1)
    layer.register_forward_hook(lambda module, args, output: 3 * output)
    return layer


class InTraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(PLANES, PLANES) / 3)

    def forward(self, x):
        return x @ self.mixing if self.training else x


class Query(nn.Module):
    """Hidden values by a matrix that other parameters make."""

    def __init__(self, make, *shape):
        super().__init__()
        self.make = make
        self.start = nn.Parameter(torch.randn(*shape))

    def forward(self, x):
        return x @ self.make(self.start).view(PLANES, PLANES)


class Prototypes(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(PLANES, PLANES)

    def forward(self, x):
        return x @ self.rows(torch.arange(PLANES)).mT


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(PLANES, PLANES, 3, padding=1)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class Bilinear(nn.Bilinear):
    def forward(self, x):
        return super().forward(x, x)


class Sized(nn.Module):
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
    "Linear": lambda: Tokens(nn.Linear(PLANES, PLANES)),
    "Linear, called twice": Twice,
}
UNIT_BY_UNIT = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(PLANES),
    "GroupNorm": lambda: nn.GroupNorm(2, PLANES),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(PLANES, affine=True),
    "LayerNorm": lambda: Tokens(nn.LayerNorm(PLANES)),
    "RMSNorm": lambda: Tokens(nn.RMSNorm(PLANES)),
    "clamp": lambda: Own(lambda x, w: torch.clamp(x, max=w), 1),
    "PReLU": lambda: nn.PReLU(PLANES),
    "layer scale": lambda: Own(lambda x, w: x + x * w, PLANES, 1, 1),
    "position embedding": lambda: Own(lambda x, w: x + w, 1, PLANES, SIDE, SIDE),
    "class token": lambda: Own(
        lambda x, w: torch.cat([x[..., 1:], w.expand(len(x), -1, -1, -1)], 3), PLANES, SIDE, 1
    ),
}
REFUSED = {
    "in_proj_weight of Attention": lambda: Tokens(Attention()),
    "weight_[ih]h_l0 of GRU": lambda: Tokens(nn.GRU(PLANES, PLANES, batch_first=True)),
    "weight_[ih]h_l0 of LSTM": lambda: Tokens(nn.LSTM(PLANES, PLANES, batch_first=True)),
    "weight_[ih]h_l0 of RNN": lambda: Tokens(nn.RNN(PLANES, PLANES, batch_first=True)),
    "weight of Bilinear": lambda: Tokens(Bilinear(PLANES, PLANES, PLANES)),
    "mixing of Own": lambda: Tokens(Own(lambda x, w: x @ w, PLANES, PLANES)),
    "mixing of Own, by F.linear": lambda: Tokens(Own(F.linear, PLANES, PLANES)),
    "mixing of Own, by einsum": lambda: Tokens(
        Own(lambda x, w: torch.einsum("ntc,cd->ntd", x, w), PLANES, PLANES)
    ),
    "mixing of Own, by conv2d": lambda: Own(
        lambda x, w: F.conv2d(x, w, padding=1), PLANES, PLANES, 3, 3
    ),
    "mixing of Own, by a sum": lambda: Tokens(
        Own(lambda x, w: (x[..., None, :] * w).sum(-1), PLANES, PLANES)
    ),
    "mixing of Own, after softmax": lambda: Tokens(
        Own(lambda x, w: x @ w.softmax(0), PLANES, PLANES)
    ),
    "original1 of ParametrizationList": lambda: parametrizations.weight_norm(
        nn.Conv2d(PLANES, PLANES, 1)
    ),
    "weight of Linear, from a parameter": lambda: Tokens(
        Query(nn.Linear(PLANES, 2 * PLANES), PLANES // 2, PLANES)
    ),
    "weight of Linear, from a constant": lambda: Tokens(Query(nn.Linear(3, PLANES**2), 3)),
    "weight of Embedding": lambda: Tokens(Prototypes()),
    "mixing of InTraining": lambda: Tokens(InTraining()),
    "mixing of Own, expanded": lambda: Tokens(
        Own(lambda x, w: (x.unsqueeze(-2).expand(-1, -1, PLANES, -1) * w).sum(-1), PLANES, PLANES)
    ),
    "mixing of Own, by quotients": lambda: Tokens(
        Own(lambda x, w: (x.unsqueeze(-2) / w).sum(-1), PLANES, PLANES)
    ),
    "weight of Scaled": lambda: Tokens(Scaled(PLANES, PLANES)),
}


def net_of(make):
    """Two blocks and a head, the middle block made of what is looked at."""
    torch.manual_seed(0)
    first = Block(nn.Conv2d(1, PLANES, 3, padding=1), nn.ReLU(inplace=True))
    middle = Block(make(), nn.Sequential(nn.ReLU(inplace=True), nn.Flatten()))
    last = Block(nn.Linear(PLANES * SIDE * SIDE, 7), nn.ReLU(inplace=True))
    return BlockNet(first, middle, last, head=nn.Linear(7, 4), input_shape=(1, SIDE, SIDE)).double()


def batch():
    torch.manual_seed(1)
    return torch.rand(5, 1, SIDE, SIDE, dtype=torch.double), torch.randint(4, (5,))


pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")


@pytest.mark.parametrize("kind", [*REPLACED, *UNIT_BY_UNIT])
def test_with_the_weights_themselves_it_is_backprop_at_every_layer(kind):
    net = net_of({**REPLACED, **UNIT_BY_UNIT}[kind])
    plain = copy.deepcopy(net)
    x, target = batch()
    F.cross_entropy(plain(x), target).backward()
    method = FeedbackAlignment(net, 4, CROSS_ENTROPY, init="copy").double()
    trace = net.trace(x, keep=True, transpose=method.transpose)
    _, error = CROSS_ENTROPY.value_and_error(trace.logits, target)
    deltas = trace.backward(method.signal, error, target)
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    for delta, reference in zip(deltas, backprop_deltas(trace, error), strict=True):
        torch.testing.assert_close(delta, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", REPLACED)
def test_with_a_b_of_zeros_nothing_passes(kind):
    net = net_of(REPLACED[kind])
    method = FeedbackAlignment(net, 4, CROSS_ENTROPY, init="default").double()
    weights = [p for p in net.blocks[1].pre.parameters() if p.dim() > 1]
    (b,) = [b for b, w in method.weight_pairs(1) if any(w is weight for weight in weights)]
    b.zero_()
    x, target = batch()
    trace = net.trace(x, keep=True, transpose=method.transpose)
    _, error = CROSS_ENTROPY.value_and_error(trace.logits, target)
    first, second, _ = trace.backward(method.signal, error, target)
    assert first.count_nonzero() == 0
    assert second.count_nonzero() > 0
    assert all(delta.count_nonzero() > 0 for delta in backprop_deltas(trace, error))


@pytest.mark.parametrize("kind", REFUSED)
def test_a_weight_that_no_b_can_replace_is_refused_by_name(kind):
    net = net_of(REFUSED[kind])
    with pytest.raises(
        UserError,
        match=rf"^model: blocks\.1\.pre\S*{kind.partition(',')[0]} is combined with hidden values",
    ):
        FeedbackAlignment(net, 4, CROSS_ENTROPY, init="default")
    assert all(p.requires_grad for p in net.parameters())
    assert net.training


@pytest.mark.parametrize("kind", REFUSED)
def test_direct_feedback_trains_what_sequential_rules_refuse(kind):
    net = net_of(REFUSED[kind])
    x, target = batch()
    method = DirectFeedback(net, 4, CROSS_ENTROPY, local_target="logits", init="product").double()
    assert not method.products.dense
    trace = net.trace(x, method.cuts)
    _, error = CROSS_ENTROPY.value_and_error(trace.logits, target)
    trace.backward(method.signal, error, target)
    assert all(p.grad is not None for p in net.blocks[0].parameters())


def test_frozen_layers_below_the_first_that_learns_need_no_b():
    net = net_of(lambda: Tokens(Attention()))
    for p in [*net.blocks[0].parameters(), *net.blocks[1].parameters()]:
        p.requires_grad_(False)
    method = FeedbackAlignment(net, 4, CROSS_ENTROPY, init="default")
    assert method.layers == [net.head]
    assert [p.requires_grad for p in net.blocks[1].parameters()] == [False] * 4


def test_a_layer_that_is_given_more_than_its_input_is_refused():
    with pytest.raises(UserError, match=r"ConvTranspose2d.* is called with several arguments"):
        FeedbackAlignment(net_of(Sized), 4, CROSS_ENTROPY, init="default")


@pytest.mark.parametrize("make", [lambda: Standardised(PLANES, PLANES, 3, padding=1), hooked])
def test_a_layer_that_does_not_compute_what_its_class_does_is_refused(make):
    with pytest.raises(UserError, match=r"changes the output of (Standardised|Conv2d)\("):
        FeedbackAlignment(net_of(make), 4, CROSS_ENTROPY, init="copy")


def test_a_weight_that_two_layers_share_decays_once():
    net = net_of(
        lambda: nn.Sequential(
            *(nn.Conv2d(PLANES, PLANES, 3, padding=1, bias=False) for _ in range(2))
        )
    )
    net.blocks[1].pre[1].weight = net.blocks[1].pre[0].weight
    method = KolenPollack(net, 4, CROSS_ENTROPY, decay=1.0, init="default").double()
    before = [
        (b - layer.weight).detach() for b, layer in zip(method.feedback, method.layers, strict=True)
    ]
    method.follow(0.1)
    for b, layer, difference in zip(method.feedback, method.layers, before, strict=True):
        torch.testing.assert_close((b - layer.weight).detach(), 0.9 * difference)
    with pytest.raises(UserError, match="share a weight"):
        ProductFeedback(net, 4, CROSS_ENTROPY, expansion=2)


@pytest.mark.parametrize("method", ["bp", "las", "fa"])
def test_frozen_weights_between_others_stay_and_let_signals_pass(method):
    t = Tiny(method, "fc")
    before = [p.requires_grad_(False).clone() for p in t.net.blocks[1].parameters()]
    t.learner.step(t.x, t.target, align=True)
    first = [p.clone() for p in t.net.blocks[0].parameters()]
    t.learner.step(t.x, t.target, align=True)
    assert all(torch.equal(p, q) for p, q in zip(t.net.blocks[1].parameters(), before, strict=True))
    assert not any(
        torch.equal(p, q) for p, q in zip(t.net.blocks[0].parameters(), first, strict=True)
    )


def test_a_net_whose_only_weights_read_the_image_has_nothing_to_replace():
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = BlockNet(
        Block(nn.Conv2d(1, 4, 3), nn.ReLU()), head=head, input_shape=(1, SIDE, SIDE)
    ).double()
    method = FeedbackAlignment(net, 4, CROSS_ENTROPY, init="default")
    assert method.layers == []
    x, target = batch()
    trace = net.trace(x, keep=True, transpose=method.transpose)
    _, error = CROSS_ENTROPY.value_and_error(trace.logits, target)
    row = measure(net, method, trace, trace.backward(method.signal, error, target), error)
    assert row[0] == pytest.approx(1)


def test_direct_feedback_refuses_a_block_that_changes_its_input_in_place():
    net = net_of(
        lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(PLANES, PLANES, 3, padding=1))
    )
    with pytest.raises(UserError, match="block 2 changes its input h_1 in place"):
        DirectFeedback(net, 4, CROSS_ENTROPY, local_target="logits", init="default")
    FeedbackAlignment(net, 4, CROSS_ENTROPY, init="default")


def test_the_product_rule_names_a_transposed_convolution():
    with pytest.raises(UserError, match="ConvTranspose2d"):
        ProductFeedback(net_of(REPLACED["ConvTranspose2d"]), 4, CROSS_ENTROPY, expansion=2)


@pytest.mark.parametrize("kind", ["ConvTranspose2d", "circular", "Conv1d"])
def test_kolen_pollack_stays_backprop_where_it_starts_so(kind):
    net = net_of(REPLACED[kind])
    method = KolenPollack(net, 4, CROSS_ENTROPY, decay=0.0, init="copy").double()
    t = Tiny("kp", "fc")  # its optimizer
    optimizer, feedback = (
        t.optimizer.make(list(net.parameters())),
        t.optimizer.make(list(method.parameters())),
    )
    x, target = batch()
    for _ in range(3):
        trace = net.trace(x, transpose=method.transpose)
        _, error = CROSS_ENTROPY.value_and_error(trace.logits, target)
        trace.backward(method.signal, error, target)
        method.follow(0.1)
        feedback.step()
        optimizer.step()
    for b, layer in zip(method.feedback, method.layers, strict=True):
        torch.testing.assert_close(b, layer.weight)


class LookUp(nn.Module):
    """Tokens, looked up and mixed with rows of another table, or of constant indices."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.table, self.rows, self.own = nn.Embedding(7, PLANES), nn.Embedding(PLANES, PLANES), own

    def forward(self, x):
        h = self.table(x[:, 1:])
        places = self.rows(torch.arange(h.shape[1]))
        return (h @ places.mT if self.own else h + places).flatten(1)


@pytest.mark.parametrize("own", [False, True], ids=["added", "multiplied"])
def test_a_look_up_of_the_input_needs_no_b_and_a_table_s_rows_as_a_matrix_are_refused(own):
    width = 3 * (3 if own else PLANES)
    blocks = (
        Block(nn.Sequential(LookUp(own), nn.Linear(width, 5)), nn.ReLU()),
        Block(nn.Linear(5, 6), nn.ReLU()),
    )
    net = BlockNet(*blocks, head=nn.Linear(6, 4), input_shape=(4,)).double()
    net.example = torch.full((1, 4), 6)
    if own:
        with pytest.raises(
            UserError,
            match=r"^model: blocks\.0\.pre\.0\.rows\.weight of Embedding is combined with hidden values",
        ):
            FeedbackAlignment(net, 4, CROSS_ENTROPY, init="default")
    else:
        assert layers_to_replace(net) == [0, 1, 2]
