"""The laws of correct feedback learning (spec §8), over every method × every model."""

from contextlib import nullcontext

import pytest
import torch
from conftest import CLASSES, CROSS, METHODS, MODELS, PAIRS, REFUSED, Tiny
from torch.nn import functional as F

from dfl_experiments.engine.alignment import backprop_deltas, measure
from dfl_experiments.engine.blocknet import Block, BlockNet
from dfl_experiments.engine.losses import LOSSES
from dfl_experiments.errors import UserError
from dfl_experiments.methods import Direct, ProductDirectFeedback, ProductFeedback, WeightMirror
from dfl_experiments.methods.local_module import LocalModule

DIRECT = [name for name in METHODS if isinstance(Tiny(name, "fc").method, Direct)]
DIRECT_CROSS = pytest.mark.parametrize(
    ("method", "model"), [pair for pair in PAIRS if pair[0] in DIRECT]
)
EVERY_MODEL = pytest.mark.parametrize("model", MODELS)


OF_ITSELF = (WeightMirror, ProductDirectFeedback)  # B moves without an optimizer


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@EVERY_MODEL
@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_backprop_through_blocks_is_plain_autograd(model, loss):
    t = Tiny("bp", model, f"loss={loss}")
    logits = t.net(t.x)
    value = F.cross_entropy(logits, t.target)
    if loss == "squared_error":
        value = (logits - F.one_hot(t.target, CLASSES)).square().sum() / (2 * len(t.target))
    value.backward()
    expected = [p.grad.clone() for p in t.net.parameters()]
    t.net.zero_grad()
    trace = t.net.trace(t.x)
    measured, error = t.loss.value_and_error(trace.logits, t.target)
    t.start(trace, error)
    close(measured, value.detach())
    for p, gradient in zip(t.net.parameters(), expected, strict=True):
        close(p.grad, gradient)


@pytest.mark.parametrize(("method", "model"), REFUSED)
def test_a_pair_that_has_no_meaning_is_refused(method, model):
    with pytest.raises(UserError, match="so the net must be fully connected"):
        Tiny(method, model)


@CROSS
def test_forward_pass_is_the_same_whatever_is_cut(method, model):
    t = Tiny(method, model)
    assert torch.equal(t.trace().logits, t.net(t.x))


@DIRECT_CROSS
def test_zero_feedback_reaches_no_block_below_the_last_two(method, model):
    t = Tiny(method, model)
    for module in t.method.feedback:
        module.weight.data.zero_()
    t.backward()
    # of BDFA, whose convolutions are below the lowest cut, as of the others
    top = max(t.method.cuts)
    lower = [p for block in t.net.blocks[:top] for p in block.parameters()]
    upper = t.net.parameters_above(top)
    assert lower
    assert all(p.grad.count_nonzero() == 0 for p in lower)
    assert any(p.grad.count_nonzero() > 0 for p in upper)


def test_dfa_with_the_jacobian_products_of_a_linear_net_is_backprop():
    t, bp = (Tiny(method, "fc", "model.activation=identity") for method in ("dfa", "bp"))
    for delta, reference in zip(t.backward()[1], bp.backward()[1], strict=True):
        close(delta, reference)


def test_las_on_a_linear_net_converges_to_the_jacobian_products():
    t = Tiny(
        "las",
        "fc",
        "model.activation=identity",
        "method.init=kaiming",
        "optimizer=sgd",
        "optimizer.lr=0.3",
    )
    # a local module has no bias, so that a net without is within its reach
    for i in range(t.net.depth):
        t.net.weight_layers(i)[0].bias.data.zero_()
        torch.nn.init.orthogonal_(t.net.weight_layers(i)[0].weight)
    optimizer = t.optimizer.make(list(t.method.parameters()))
    trace = t.net.trace(torch.randn(500, *t.x.shape[1:], dtype=torch.float64), t.method.cuts)
    error = torch.zeros_like(trace.logits)  # LAS learns B from h and the logits alone
    for _ in range(3000):
        t.method.adapt(trace, error, t.target)
        optimizer.step()
        optimizer.zero_grad()
    weights = [t.net.weight_layers(i)[0].weight.detach() for i in range(t.net.depth)]
    assert len(t.method.feedback) == 2
    for i, module in enumerate(t.method.feedback, start=1):
        torch.testing.assert_close(
            module.weight.detach(), torch.linalg.multi_dot([*weights[:i:-1], weights[i]])
        )
    trace, deltas, error = t.backward()
    for delta, reference in zip(deltas, backprop_deltas(trace, error), strict=True):
        torch.testing.assert_close(delta, reference)


@EVERY_MODEL
def test_direct_feedback_with_the_head_s_weights_is_backprop_at_the_top(model):
    t = Tiny("dfa", model, "method.top=direct")
    if model in ("mixer", "vit"):
        t.net.head[0] = torch.nn.Identity()  # the Jacobian of its normalisation is no part of B
    top = t.method.feedback[-1].weight
    top.data.copy_(t.net.weight_layers(t.net.depth - 1)[0].weight.reshape(top.shape))
    trace, deltas, error = t.backward()
    close(deltas[-1], backprop_deltas(trace, error)[-1])


@DIRECT_CROSS
@pytest.mark.parametrize("top", ["backprop", "direct"])
def test_feedback_is_the_transpose_of_the_sum_pooled_module(method, model, top):
    t = Tiny(method, model, f"++method.top={top}")
    trace, _, error = t.backward()
    assert max(t.method.local_modules) == t.net.depth - (1 if top == "direct" else 2)
    for i, module in t.method.local_modules.items():
        h = trace.outputs[i - 1]
        y = module(h) * module.positions
        assert y.shape == error.shape
        close((y * error).sum(), (h * module.feedback(error)).sum())


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [(5, 1, 2, 1), (3, 2, 1, 1), (4, 3, 0, 1), (3, 1, 2, 2)],
)
def test_local_module_is_a_pooled_convolution_and_its_transpose(kernel, stride, padding, dilation):
    torch.manual_seed(0)
    reader = torch.nn.Conv2d(3, 7, kernel, stride, padding, dilation).double()
    h = torch.randn(2, 3, 11, 9, dtype=torch.float64)
    error = torch.randn(2, CLASSES, dtype=torch.float64)
    for pooling, pool in (
        ("average", lambda planes: planes.mean((2, 3))),
        ("max", lambda planes: planes.amax((2, 3))),
    ):
        module = LocalModule(reader, h.shape[1:], CLASSES, pooling)
        module.initialise("default")
        planes = F.conv2d(h, module.weight, None, stride, padding, dilation)
        close(module(h), pool(planes))
        image = h.clone().requires_grad_()
        F.conv2d(image, module.weight, None, stride, padding, dilation).backward(
            error[:, :, None, None].expand_as(planes)
        )
        close(module.feedback(error), image.grad)


@CROSS
def test_local_and_network_losses_do_not_touch_each_other(method, model):
    t = Tiny(method, model)
    trace = t.trace()
    t.method.adapt(trace, t.loss.value_and_error(trace.logits, t.target)[1], t.target)
    assert all(p.grad is None for p in t.net.parameters())
    before = [p.grad.clone() if p.grad is not None else None for p in t.method.parameters()]
    learns = [p.requires_grad and isinstance(t.method, Direct) for p in t.method.parameters()]
    assert [b is not None for b in before] == learns
    _, error = t.loss.value_and_error(trace.logits, t.target)
    t.start(trace, error)
    for p, b in zip(t.method.parameters(), before, strict=True):
        if not isinstance(t.method, ProductFeedback):  # whose R learns on the way down
            assert p.grad is b if b is None else torch.equal(p.grad, b)
    assert all(p.grad is not None for p in t.learner.parameters)


@CROSS
def test_the_measured_signal_is_the_applied_signal(method, model):
    t = Tiny(method, model)
    trace, deltas, _ = t.backward()
    assert [delta is None for delta in deltas] == [
        i < t.method.frozen for i in range(t.net.depth - 1)
    ]
    for i, (block, delta) in enumerate(zip(t.net.blocks, deltas, strict=True), start=1):
        if delta is None:
            continue
        read = [x.detach() for x in trace.inputs[i - 1]]
        weights = list(block.pre.parameters())
        with nullcontext() if t.method.transpose is None else t.method.transpose.installed():
            a = block.pre(*read)
        for p, gradient in zip(weights, torch.autograd.grad(a, weights, delta), strict=True):
            close(p.grad, gradient)
        first = t.net.weight_layers(i - 1)[0]
        reads_h = isinstance(first, torch.nn.Linear) and first.in_features == read[0][0].numel()
        if len(weights) == 2 and reads_h:
            close(first.weight.grad, delta.T @ read[0].flatten(1))


@CROSS
def test_the_reference_is_the_backprop_gradient_at_every_preactivation(method, model):
    t, bp = Tiny(method, model, "protocol.activation_of=null"), Tiny("bp", model)
    bp.net.load_state_dict(t.net.state_dict())
    trace, _, error = t.backward()
    for delta, reference in zip(backprop_deltas(trace, error), bp.backward()[1], strict=True):
        close(delta, reference)


@CROSS
def test_measuring_alignment_changes_no_bit(method, model):
    plain, measured = Tiny(method, model), Tiny(method, model)
    for step in range(4):
        for t, align in ((plain, False), (measured, True)):
            torch.manual_seed(step)
            t.learner.step(t.x, t.target, align)
    for (key, a), b in zip(plain.state().items(), measured.state().values(), strict=True):
        assert torch.equal(a, b), key


@CROSS
def test_alignment_is_measured_for_every_layer(method, model):
    t = Tiny(method, model)
    t.learner.step(t.x, t.target)  # FDFA's B sends nothing at first
    alignment = t.learner.step(t.x, t.target, align=True)[2:].view(t.net.depth - 1, 5)
    cosines, norms, norms_bp, zeros = (
        alignment[:, 0],
        alignment[:, 2],
        alignment[:, 3],
        alignment[:, 4],
    )
    silent = torch.arange(t.net.depth - 1) < t.method.frozen
    assert torch.equal(cosines.isnan(), silent)
    assert torch.equal(norms == 0, silent)
    assert (norms_bp > 0).all()
    assert (zeros[silent] == len(t.x)).all()
    trace, deltas, error = t.backward()
    for delta, reference in list(zip(deltas, backprop_deltas(trace, error), strict=True))[
        t.method.exact_from - 1 :
    ]:
        close(delta, reference)  # by its own word
    exact = torch.arange(1, t.net.depth) >= t.method.exact_from
    close(cosines[exact], torch.ones(int(exact.sum()), dtype=torch.float64))
    assert cosines[~silent].abs().le(1 + 1e-12).all()


@CROSS
def test_one_step_trains_exactly_the_layers_with_a_signal(method, model):
    t = Tiny(method, model)
    before = t.state()
    for _ in range(2):  # FDFA's B sends nothing at first
        t.learner.step(t.x, t.target)
    feedback = [
        p for p in t.method.parameters() if p.requires_grad or isinstance(t.method, OF_ITSELF)
    ]
    trained = {id(p) for p in (*t.learner.parameters, *feedback)}
    for prefix, module in (("net", t.net), ("method", t.method)):
        for key, p in module.named_parameters():
            assert torch.equal(p, before[f"{prefix}.{key}"]) == (id(p) not in trained), key


def test_zero_signals_are_left_out_of_the_mean_and_counted():
    t = Tiny("dfa", "fc")
    t.net.blocks[0].pre[-1].bias.data.fill_(-0.2)
    t.x[3:] = 0.0  # no unit of layer 1 is active on these
    trace, deltas, error = t.backward()
    cosine, cosine_batch, norm, norm_bp, zeros = measure(t.net, t.method, trace, deltas, error)[:5]
    applied, reference = deltas[0], backprop_deltas(trace, error)[0]
    silent = (applied == 0).all(1) | (reference == 0).all(1)
    assert silent[3:].all()
    assert not silent.all()
    assert zeros == silent.sum()
    close(cosine, F.cosine_similarity(applied, reference)[~silent].mean())
    close(cosine_batch, F.cosine_similarity(applied.flatten(), reference.flatten(), dim=0))
    close(norm, applied.norm())
    close(norm_bp, reference.norm())


def test_tiny_signals_keep_their_direction():
    t = Tiny("dfa", "fc")
    t.net.float()
    t.method.float()
    t.x = t.x.float()
    trace = t.net.trace(t.x, t.method.cuts, keep=True)
    _, error = t.loss.value_and_error(trace.logits, t.target)
    results = []
    for factor in (1.0, 1e-30):
        scaled = error * factor
        deltas = t.start(trace, scaled)
        results.append(measure(t.net, t.method, trace, deltas, scaled).view(-1, 5)[:, :2])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["conv3_bn", "resnet18"])
def test_a_confident_sample_does_not_blank_the_others_behind_batch_norm(model):
    t = Tiny("las", model)
    t.net.float()
    t.method.float()
    t.x = t.x.float()
    with torch.no_grad():
        layer = t.net.weight_layers(t.net.depth - 1)[0]
        layer.weight *= 300.0
        logits = t.net(t.x)
    t.target = logits.argmax(1)
    t.target[0] = (t.target[0] + 1) % CLASSES
    trace, deltas, error = t.backward()
    # confident: in float32, squares of its signals underflow
    assert error.abs().amax(1).min() < 1e-12
    alignment = measure(t.net, t.method, trace, deltas, error).view(-1, 5)
    assert torch.isfinite(alignment).all()
    assert alignment[:, :2].abs().le(1 + 1e-5).all()


def test_shallow_s_frozen_blocks_receive_nothing_through_a_leaking_skip():
    t = Tiny("shallow", "resnet18", "protocol=authors")
    alignment = t.learner.step(t.x, t.target, align=True)[2:].view(-1, 5)
    assert (alignment[: t.method.frozen, 2] == 0).all()


def test_a_method_that_cuts_and_has_no_signal_is_refused():
    t = Tiny("bp", "fc")
    t.method.cuts = frozenset({1})
    with pytest.raises(
        LookupError, match="Backprop cuts the graph after block 1 but does not implement `signal`"
    ):
        t.learner.step(t.x, t.target)


def test_a_block_s_output_is_a_vector_tokens_or_an_image():
    block = Block(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Unflatten(1, (3, 1, 1, 1))),
        torch.nn.Identity(),
    )
    head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, CLASSES))
    net = BlockNet(block, head=head, input_shape=(3, 1, 1))
    with pytest.raises(
        UserError, match=r"h_1 has shape \(3, 1, 1, 1\) per sample; must be \(d,\), \(T, C\) or"
    ):
        Direct(net, CLASSES, LOSSES["cross_entropy"], top="direct")


@pytest.mark.parametrize(
    ("method", "model"),
    [(method, model) for method, model in PAIRS if model.startswith(("conv", "resnet"))],
)
def test_images_in_another_memory_format_give_the_same(method, model):
    plain, last = Tiny(method, model), Tiny(method, model)
    last.net.to(memory_format=torch.channels_last)
    last.method.to(memory_format=torch.channels_last)
    last.x = last.x.contiguous(memory_format=torch.channels_last)
    steps = 20 if method in ("bp", "dfa", "las", "ltas") else 4
    for step in range(steps):
        rows = []
        for t in (plain, last):
            torch.manual_seed(step)  # of rules that draw
            rows.append(t.learner.step(t.x, t.target, align=step == steps - 1))
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-8, atol=1e-10, equal_nan=True)
    for key, value in plain.state().items():
        torch.testing.assert_close(last.state()[key], value, rtol=1e-8, atol=1e-10)
