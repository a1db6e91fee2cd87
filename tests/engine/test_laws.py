"""Check the laws of feedback learning, for every method × every model."""

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
UPDATES_B_WITHOUT_OPTIMIZER = (WeightMirror, ProductDirectFeedback)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def gradients(module):
    """Return a copy of each parameter's gradient, None for a parameter without one."""
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


@EVERY_MODEL
@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_backprop_through_blocks_is_plain_autograd(model, loss):
    t = Tiny("bp", model, f"loss={loss}")
    logits = t.net(t.x)
    value = F.cross_entropy(logits, t.target)
    if loss == "squared_error":
        value = (logits - F.one_hot(t.target, CLASSES)).square().sum() / (2 * len(t.target))
    value.backward()
    expected = gradients(t.net)
    t.net.zero_grad()
    trace = t.net.trace(t.x)
    engine_value, error = t.loss.value_and_error(trace.logits, t.target)
    t.start(trace, error)
    close(engine_value, value.detach())
    close(gradients(t.net), expected)


@pytest.mark.parametrize(("method", "model"), REFUSED)
def test_adfa_refuses_nets_that_are_not_fully_connected(method, model):
    with pytest.raises(UserError, match="so the net must be fully connected"):
        Tiny(method, model)


@CROSS
def test_cuts_do_not_change_the_logits(method, model):
    t = Tiny(method, model)
    assert torch.equal(t.trace().logits, t.net(t.x))


@DIRECT_CROSS
def test_zero_feedback_gives_zero_gradients_below_the_highest_cut(method, model):
    t = Tiny(method, model)
    for module in t.method.feedback:
        module.weight.data.zero_()
    t.backward()
    # this includes blocks below the lowest cut, such as BDFA's convolutions
    top = max(t.method.cuts)
    lower = [p for block in t.net.blocks[:top] for p in block.parameters()]
    upper = t.net.parameters_above(top)
    assert lower
    assert all(p.grad.count_nonzero() == 0 for p in lower)
    assert any(p.grad.count_nonzero() > 0 for p in upper)


def test_dfa_with_the_jacobian_products_of_a_linear_net_is_backprop():
    # by default, B starts as the product of the weights above
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
    # Local modules have no bias, so they can equal the net only if it has no bias either.
    for i in range(t.net.depth):
        t.net.weight_layers(i)[0].bias.data.zero_()
        torch.nn.init.orthogonal_(t.net.weight_layers(i)[0].weight)
    optimizer = t.optimizer.make(list(t.method.parameters()))
    trace = t.net.trace(torch.randn(500, *t.x.shape[1:], dtype=torch.float64), t.method.cuts)
    error = torch.zeros_like(trace.logits)  # LAS ignores it: B learns from h and the logits
    for _ in range(3000):
        t.method.adapt(trace, error, t.target)
        optimizer.step()
        optimizer.zero_grad()
    weights = [t.net.weight_layers(i)[0].weight.detach() for i in range(t.net.depth)]
    products = [weights[3] @ weights[2] @ weights[1], weights[3] @ weights[2]]
    for module, product in zip(t.method.feedback, products, strict=True):
        torch.testing.assert_close(module.weight.detach(), product)
    trace, deltas, error = t.backward()
    for delta, reference in zip(deltas, backprop_deltas(trace, error), strict=True):
        torch.testing.assert_close(delta, reference)


@EVERY_MODEL
def test_dfa_with_the_head_s_weights_is_backprop_at_the_last_hidden_layer(model):
    t = Tiny("dfa", model, "method.top=direct")
    if model in ("mixer", "vit"):
        t.net.head[0] = torch.nn.Identity()  # B does not contain the Jacobian of LayerNorm
    top = t.method.feedback[-1].weight
    top.data.copy_(t.net.weight_layers(t.net.depth - 1)[0].weight.reshape(top.shape))
    trace, deltas, error = t.backward()
    close(deltas[-1], backprop_deltas(trace, error)[-1])


@DIRECT_CROSS
@pytest.mark.parametrize("top", ["backprop", "direct"])
def test_feedback_is_the_transpose_of_the_sum_pooled_local_module(method, model, top):
    t = Tiny(method, model, f"++method.top={top}")
    trace, _, error = t.backward()
    assert max(t.method.local_modules) == t.net.depth - (1 if top == "direct" else 2)
    for i, module in t.method.local_modules.items():
        h = trace.outputs[i - 1]
        y = module(h) * module.positions  # the module averages over positions
        assert y.shape == error.shape
        close((y * error).sum(), (h * module.feedback(error)).sum())


@pytest.mark.parametrize("pooling", ["average", "max"])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [(5, 1, 2, 1), (3, 2, 1, 1), (4, 3, 0, 1), (3, 1, 2, 2)],
)
def test_local_module_is_a_pooled_convolution_and_feedback_its_transpose(
    kernel, stride, padding, dilation, pooling
):
    torch.manual_seed(0)
    reader = torch.nn.Conv2d(3, 7, kernel, stride, padding, dilation).double()
    h = torch.randn(2, 3, 11, 9, dtype=torch.float64)
    error = torch.randn(2, CLASSES, dtype=torch.float64)
    module = LocalModule(reader, h.shape[1:], CLASSES, pooling)
    module.initialise("default")
    h.requires_grad_()
    planes = F.conv2d(h, module.weight, None, stride, padding, dilation)
    pooled = planes.mean((2, 3)) if pooling == "average" else planes.amax((2, 3))
    close(module(h), pooled)
    repeated_error = error[:, :, None, None].expand_as(planes)
    (transposed,) = torch.autograd.grad(planes, h, repeated_error)
    close(module.feedback(error), transposed)


@CROSS
def test_local_losses_change_only_b_and_error_signals_change_only_w(method, model):
    t = Tiny(method, model)
    trace = t.trace()
    _, error = t.loss.value_and_error(trace.logits, t.target)
    t.method.adapt(trace, error, t.target)
    assert all(p.grad is None for p in t.net.parameters())
    for p in t.method.parameters():
        is_learned = p.requires_grad and isinstance(t.method, Direct)
        assert (p.grad is not None) == is_learned
    before = gradients(t.method)
    t.start(trace, error)
    assert all(p.grad is not None for p in t.learner.parameters)
    if not isinstance(t.method, ProductFeedback):  # PFA's R gets its gradient in the backward pass
        torch.testing.assert_close(gradients(t.method), before, rtol=0, atol=0)


@CROSS
def test_the_measured_signal_is_the_applied_signal(method, model):
    t = Tiny(method, model)
    trace, deltas, _ = t.backward()
    for i, (block, delta) in enumerate(zip(t.net.blocks, deltas, strict=True), start=1):
        assert (delta is None) == (i <= t.method.frozen)
        if delta is None:
            continue
        inputs = [x.detach() for x in trace.inputs[i - 1]]
        weights = list(block.pre.parameters())
        with nullcontext() if t.method.transpose is None else t.method.transpose.installed():
            a = block.pre(*inputs)
        for p, gradient in zip(weights, torch.autograd.grad(a, weights, delta), strict=True):
            close(p.grad, gradient)
        layer = t.net.weight_layers(i - 1)[0]
        h = inputs[0].flatten(1)
        reads_h = isinstance(layer, torch.nn.Linear) and layer.in_features == h.shape[1]
        if reads_h and len(weights) == 2:  # the block has no other weights
            close(layer.weight.grad, delta.T @ h)


@CROSS
def test_the_reference_signals_are_those_of_backprop(method, model):
    t, bp = Tiny(method, model, "protocol.activation_of=null"), Tiny("bp", model)
    bp.net.load_state_dict(t.net.state_dict())
    trace, _, error = t.backward()
    for delta, reference in zip(backprop_deltas(trace, error), bp.backward()[1], strict=True):
        close(delta, reference)


@CROSS
def test_measuring_alignment_does_not_change_training(method, model):
    plain, measured = Tiny(method, model), Tiny(method, model)
    for step in range(4):
        for t, align in ((plain, False), (measured, True)):
            torch.manual_seed(step)
            t.learner.step(t.x, t.target, align)
    for (key, a), b in zip(plain.state().items(), measured.state().values(), strict=True):
        assert torch.equal(a, b), key


@CROSS
def test_alignment_is_measured_for_every_layer_with_a_signal(method, model):
    t = Tiny(method, model)
    t.learner.step(t.x, t.target)  # FDFA's B is zero before the first step
    alignment = t.learner.step(t.x, t.target, align=True)[2:].view(t.net.depth - 1, 5)
    cosines, _, norms, norms_bp, zeros = alignment.unbind(1)
    silent = torch.arange(t.net.depth - 1) < t.method.frozen
    assert torch.equal(cosines.isnan(), silent)
    assert torch.equal(norms == 0, silent)
    assert (norms_bp > 0).all()
    assert (zeros[silent] == len(t.x)).all()
    assert cosines[~silent].abs().le(1 + 1e-12).all()

    trace, deltas, error = t.backward()
    references = backprop_deltas(trace, error)
    # from the layer `exact_from` on, the signals equal BP's by construction
    for i in range(t.method.exact_from, t.net.depth):
        close(deltas[i - 1], references[i - 1])
        close(cosines[i - 1], torch.ones_like(cosines[i - 1]))


@CROSS
def test_a_step_changes_the_trained_weights_and_no_others(method, model):
    t = Tiny(method, model)
    before = t.state()
    for _ in range(2):  # FDFA's B is zero before the first step
        t.learner.step(t.x, t.target)
    trained = {id(p) for p in t.learner.parameters}
    for p in t.method.parameters():
        if p.requires_grad or isinstance(t.method, UPDATES_B_WITHOUT_OPTIMIZER):
            trained.add(id(p))
    for prefix, module in (("net", t.net), ("method", t.method)):
        for key, p in module.named_parameters():
            assert torch.equal(p, before[f"{prefix}.{key}"]) == (id(p) not in trained), key


def test_samples_with_a_zero_signal_are_counted_and_left_out_of_the_mean():
    t = Tiny("dfa", "fc")
    t.net.blocks[0].pre[-1].bias.data.fill_(-0.2)
    t.x[3:] = 0.0  # on these samples, no unit of layer 1 is active
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


def test_cosines_do_not_depend_on_the_scale_of_the_error_in_float32():
    t = Tiny("dfa", "fc")
    t.net.float()
    t.method.float()
    t.x = t.x.float()
    trace = t.net.trace(t.x, t.method.cuts, keep=True)
    _, error = t.loss.value_and_error(trace.logits, t.target)
    cosines = []
    for factor in (1.0, 1e-30):
        scaled = error * factor
        deltas = t.start(trace, scaled)
        cosines.append(measure(t.net, t.method, trace, deltas, scaled).view(-1, 5)[:, :2])
    torch.testing.assert_close(cosines[0], cosines[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["conv3_bn", "resnet18"])
def test_confident_samples_leave_alignment_finite_with_batch_norm(model):
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
    # one sample is so confident that squares of its signals underflow in float32
    assert error.abs().amax(1).min() < 1e-12
    alignment = measure(t.net, t.method, trace, deltas, error).view(-1, 5)
    assert torch.isfinite(alignment).all()
    assert alignment[:, :2].abs().le(1 + 1e-5).all()


def test_frozen_blocks_of_shallow_get_no_signal_through_a_leaking_skip():
    t = Tiny("shallow", "resnet18", "protocol=authors")
    alignment = t.learner.step(t.x, t.target, align=True)[2:].view(-1, 5)
    assert (alignment[: t.method.frozen, 2] == 0).all()


def test_refuses_a_method_with_cuts_but_no_signal():
    t = Tiny("bp", "fc")
    t.method.cuts = frozenset({1})
    with pytest.raises(
        LookupError, match="Backprop cuts the graph after block 1 but does not implement `signal`"
    ):
        t.learner.step(t.x, t.target)


def test_direct_feedback_refuses_outputs_that_are_no_vectors_tokens_or_images():
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
def test_channels_last_gives_the_same_steps(method, model):
    plain, last = Tiny(method, model), Tiny(method, model)
    last.net.to(memory_format=torch.channels_last)
    last.method.to(memory_format=torch.channels_last)
    last.x = last.x.contiguous(memory_format=torch.channels_last)
    steps = 20 if method in ("bp", "dfa", "las", "ltas") else 4
    for step in range(steps):
        rows = []
        for t in (plain, last):
            torch.manual_seed(step)  # some methods draw random numbers
            rows.append(t.learner.step(t.x, t.target, align=step == steps - 1))
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-8, atol=1e-10, equal_nan=True)
    for key, value in plain.state().items():
        torch.testing.assert_close(last.state()[key], value, rtol=1e-8, atol=1e-10)
