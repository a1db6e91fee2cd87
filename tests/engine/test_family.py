"""Check the laws of each learning rule beyond the paper's five methods."""

import math

import pytest
import torch
from conftest import CLASSES, MODELS, PAIRS, Tiny, assert_near, roundoff
from torch import nn
from torch.nn import functional as F

from dfl_experiments.engine.alignment import backprop_deltas
from dfl_experiments.engine.blocknet import Block, BlockNet
from dfl_experiments.engine.learner import Learner
from dfl_experiments.engine.losses import LOSSES
from dfl_experiments.engine.quantities import FUNCTIONS
from dfl_experiments.methods import Direct, Sequential, SignSymmetry
from dfl_experiments.methods.local_module import LocalModule
from dfl_experiments.methods.weight_mirror import mirrored

EVERY_MODEL = pytest.mark.parametrize("model", MODELS)
SGD = ("optimizer=sgd", "optimizer.lr=0.1")
KINDS = {name: type(Tiny(name, "fc").method) for name in sorted({method for method, _ in PAIRS})}
SEQUENTIAL = [name for name, kind in KINDS.items() if issubclass(kind, Sequential)]
DIRECT = [name for name, kind in KINDS.items() if issubclass(kind, Direct)]
DENSE_PAIRS = [pair for pair in PAIRS if pair[0] in DIRECT and pair[0] not in ("adfa", "bdfa")]


def with_b_equal_to_w(t):
    for feedback, layer in zip(t.method.feedback, t.method.layers, strict=True):
        feedback.data.copy_(layer.weight.data)
    return t


def differences(t):
    """Return W - B of every layer of a sequential method."""
    pairs = zip(t.method.layers, t.method.feedback, strict=True)
    return [layer.weight.detach() - feedback.detach() for layer, feedback in pairs]


def close(a, b, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def vectors(net):
    """Return the weights of each block as one vector: alone, the gradient of a bias below a norm is only rounding."""
    return [torch.cat([p.detach().flatten() for p in weights]) for weights in net.weights]


def assert_same_change(net, other, start, tolerance):
    """Assert that the weights of two nets have changed equally since `start`, up to a relative error."""
    for weights, expected, before in zip(vectors(net), vectors(other), start, strict=True):
        assert_near(weights - before, expected - before, tolerance)


def quantities(t, *names):
    """Train one step, and return what it measures as a dictionary. names: quantities beside the cosines and norms."""
    t.learner = Learner(t.net, t.method, t.loss, t.optimizer, extra_quantities=list(names))
    row = t.learner.step(t.x, t.target, align=True)
    return dict(zip(t.learner.metric_names, row, strict=True))


def quantity_by_layer(t, name):
    metrics = quantities(t, name)
    return [metrics[f"{name}/{i}"] for i in range(1, t.net.depth)]


def initial_weights(t):
    """Return a copy of W of every layer of a fully connected net."""
    return [t.net.weight_layers(i)[0].weight.detach().clone() for i in range(t.net.depth)]


def lowest_gradient(t):
    """Return the gradients of block 1 as one vector."""
    return torch.cat([p.grad.flatten() for p in t.net.blocks[0].parameters()])


@EVERY_MODEL
@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_feedback_alignment_with_b_equal_to_w_is_backprop(model, precision):
    """The two are equal up to rounding: they may add the terms of a sum in different orders."""
    fa, bp = with_b_equal_to_w(Tiny("fa", model, *SGD)), Tiny("bp", model, *SGD)
    tolerance = roundoff(fa.terms)
    if precision == "bfloat16":
        tolerance = roundoff(fa.results, torch.bfloat16)
        for t in (fa, bp):
            t.net.float()
            t.method.float()
            t.x, t.learner.precision = t.x.float(), precision
    start = vectors(bp.net)
    # with AMX, oneDNN computes a wrong bfloat16 weight gradient of 3×3 convolutions with stride 2 on 1×1 images
    with torch.backends.mkldnn.flags(enabled=precision != "bfloat16"):
        row = fa.learner.step(fa.x, fa.target, align=True)
        bp.learner.step(bp.x, bp.target, align=True)
    assert_same_change(fa.net, bp.net, start, tolerance)
    cosines = row[2:].view(-1, 5)[:, :2]
    tolerance = max(tolerance, roundoff(2, row.dtype))
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=tolerance)


@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_doubling_b_multiplies_each_signal_by_a_power_of_two(activation):
    original, doubled = (Tiny("fa", "fc", f"model.activation={activation}") for _ in range(2))
    for feedback in doubled.method.feedback:
        feedback.data.mul_(2)
    _, deltas, _ = original.backward()
    _, larger_deltas, _ = doubled.backward()
    # a signal passes one B for each layer above
    for i in range(1, original.net.depth):
        layers_above = original.net.depth - i
        assert torch.equal(larger_deltas[i - 1], deltas[i - 1] * 2**layers_above)


@EVERY_MODEL
@pytest.mark.parametrize("method", SEQUENTIAL)
def test_signals_of_sequential_methods_differ_from_backprop(method, model):
    t = Tiny(method, model)
    trace, deltas, error = t.backward()
    for delta, reference in zip(deltas, backprop_deltas(trace, error), strict=True):
        assert F.cosine_similarity(delta.flatten(1), reference.flatten(1)).mean() < 0.995


def test_sign_symmetry_with_the_magnitudes_of_w_is_backprop():
    t, bp = Tiny("frsf", "conv3_bn"), Tiny("bp", "conv3_bn")
    for k, layer in enumerate(t.method.layers):
        t.method.get_buffer(f"magnitude_{k}").copy_(layer.weight.data.abs().flatten(1))
    bp.net.load_state_dict(t.net.state_dict())
    for delta, expected in zip(t.backward()[1], bp.backward()[1], strict=True):
        assert_near(delta, expected, roundoff(t.terms))


@pytest.mark.parametrize(
    ("magnitudes", "distribution_of_w", "expected"),
    [
        ("uniform", "uniform", 3**0.5 / 2),
        ("uniform", "normal", (2 / math.pi) ** 0.5),
        ("fixed", "uniform", 3 / 4),
        ("fixed", "normal", (3 / (2 * math.pi)) ** 0.5),
    ],
)
def test_sign_symmetric_b_has_the_cosine_with_w_that_theory_predicts(
    magnitudes, distribution_of_w, expected
):
    torch.manual_seed(0)
    first, layer, head = nn.Linear(3, 400), nn.Linear(400, 400), nn.Linear(400, 4)
    blocks = Block(first, nn.ReLU()), Block(layer, nn.ReLU())
    net = BlockNet(*blocks, head=head, input_shape=(3,)).double()
    w = layer.weight.data
    if distribution_of_w == "uniform":
        w.uniform_(-1, 1)
    else:
        w.normal_()
    loss = LOSSES["cross_entropy"]
    method = SignSymmetry(net, 4, loss, magnitudes, scale="weights", normal=False)
    b = method.feedback_weight(0)
    cosine = F.cosine_similarity(b.flatten(), w.flatten(), dim=0).item()
    assert cosine == pytest.approx(expected, abs=0.01)
    close(b.square().mean(), w.square().mean(), rtol=0.02)


@pytest.mark.parametrize(
    ("method", "redraws_magnitudes"), [("usf", False), ("frsf", False), ("brsf", True)]
)
def test_sign_symmetry_uses_the_current_signs_and_only_brsf_redraws_magnitudes(
    method, redraws_magnitudes
):
    t = Tiny(method, "fc")
    before = t.method.get_buffer("magnitude_0").clone()
    t.learner.step(t.x, t.target)
    is_same = torch.equal(t.method.get_buffer("magnitude_0"), before)
    assert is_same != redraws_magnitudes
    w = t.method.layers[0].weight
    w.data.neg_()
    assert torch.equal(t.method.feedback_weight(0).sign(), w.sign())


@pytest.mark.parametrize("model", ["fc", "conv3_bn", "resnet18", "mixer"])
@pytest.mark.parametrize(
    "optimizer",
    [
        ("optimizer=adam",),
        ("optimizer=adam", "optimizer.weight_decay=0.01"),
        ("optimizer=sgd", "optimizer.momentum=0.9", "optimizer.weight_decay=0.01"),
    ],
)
def test_kolen_pollack_that_starts_from_w_remains_backprop(model, optimizer):
    options, steps = (*optimizer, "optimizer.lr=0.01"), 4
    kp, bp = with_b_equal_to_w(Tiny("kp", model, *options)), Tiny("bp", model, *options)
    start = vectors(bp.net)
    for _ in range(steps):
        kp.learner.step(kp.x, kp.target)
        bp.learner.step(bp.x, bp.target)
    # the optimizers apply the same operations to W and to B, on the same gradient
    assert all((difference == 0).all() for difference in differences(kp))
    tolerance = steps * roundoff(kp.terms)
    if "optimizer=adam" in optimizer:
        tolerance /= 1e-8  # Adam may divide the rounding error of a gradient by its ε
    assert_same_change(kp.net, bp.net, start, tolerance)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_kolen_pollack_s_difference_shrinks_by_the_decay_only(optimizer, decay):
    options = (f"optimizer={optimizer}", "optimizer.lr=0.01", f"method.decay={decay}")
    t = Tiny("kp", "conv3_bn", *options)
    before = differences(t)
    for _ in range(5):
        t.learner.step(t.x, t.target)
    for difference, start in zip(differences(t), before, strict=True):
        close(difference, start * (1 - 0.01 * decay) ** 5)


def test_kolen_pollack_s_difference_follows_heavy_ball_under_momentum():
    t = Tiny("kp", "fc", *SGD, "optimizer.momentum=0.9", "optimizer.weight_decay=0.2")
    start, steps = differences(t), 6
    for _ in range(steps):
        t.learner.step(t.x, t.target)
    for difference, expected in zip(differences(t), start, strict=True):
        velocity = torch.zeros_like(expected)
        for _ in range(steps):
            velocity = 0.9 * velocity + 0.2 * expected
            expected = expected - 0.1 * velocity
        close(difference, expected)


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 2, 2)])
def test_white_noise_mirrors_the_weights_exactly(shape):
    torch.manual_seed(0)
    rows = torch.randn(shape).double().flatten(1)
    noise = torch.randn(40, rows.shape[1]).double()
    noise = torch.linalg.qr(noise - noise.mean(0))[0] * 39**0.5  # sample covariance: the identity
    close(mirrored(rows, noise), rows)


def test_weight_mirror_converges_to_the_cosine_that_theory_predicts():
    samples, rate = 20, 0.1
    t = Tiny("wm", "fc", f"method.samples={samples}", f"method.rate={rate}")
    t.learner.set_lr(0.0)  # W stays the same
    cosines = []
    for step in range(600):
        t.learner.step(t.x, t.target)
        if step > 60:
            ((b, w),) = t.method.weight_pairs(1)
            cosines.append(F.cosine_similarity(b.flatten(), w.detach().flatten(), dim=0))
    inputs = t.method.layers[0].in_features
    expected = (1 + (inputs + 1) / (samples - 1) * rate / (2 - rate)) ** -0.5
    assert torch.stack(cosines).mean().item() == pytest.approx(expected, abs=0.005)


@EVERY_MODEL
def test_product_feedback_with_an_orthogonal_factor_approaches_w_by_the_weight_decay(model):
    t = Tiny("pfa", model, *SGD, "optimizer.weight_decay=0.5", "method.expansion=1")

    def differences_from_product():
        return [(w - b).detach() for i in range(t.net.depth) for b, w in t.method.weight_pairs(i)]

    before = differences_from_product()
    for _ in range(4):
        t.learner.step(t.x, t.target)
    for difference, start in zip(differences_from_product(), before, strict=True):
        close(difference, start * 0.95**4, atol=1e-10)


@EVERY_MODEL
@pytest.mark.parametrize("feedback", ["conv", "dense"])
def test_sparse_feedback_has_the_chosen_number_of_nonzeros_per_unit(model, feedback):
    options = ("method.nonzeros=2", f"method.feedback={feedback}")
    for module in Tiny("sdfa", model, *options).method.feedback:
        assert ((module.weight != 0).sum(0) == 2).all()


@EVERY_MODEL
@pytest.mark.parametrize("feedback", ["conv", "dense"])
def test_sparse_feedback_without_zeros_is_dfa(model, feedback):
    sdfa = Tiny("sdfa", model, f"method.nonzeros={CLASSES}", f"method.feedback={feedback}")
    dfa = Tiny("dfa", model, f"method.feedback={feedback}")
    for module, expected in zip(sdfa.method.feedback, dfa.method.feedback, strict=True):
        assert torch.equal(module.weight, expected.weight)


@EVERY_MODEL
def test_binary_feedback_has_the_signs_and_the_norm_of_dfa_s_b(model):
    bdfa = Tiny("bdfa", model, "method.convolutions=direct")
    dfa = Tiny("dfa", model, "method.feedback=dense")
    for module, original in zip(bdfa.method.feedback, dfa.method.feedback, strict=True):
        assert len(module.weight.unique()) == 2
        close(module.weight.norm(), original.weight.norm())
        assert torch.equal(module.weight > 0, original.weight >= 0)


@EVERY_MODEL
def test_binary_feedback_cuts_above_dense_layers_by_default(model):
    cuts = Tiny("bdfa", model).method.cuts
    all_cuts = Tiny("bdfa", model, "method.convolutions=direct").method.cuts
    if model.startswith("conv3"):
        assert cuts == {4}
    elif model in ("mixer", "vit"):
        assert cuts == all_cuts - {1}  # block 1 embeds patches by a convolution
    else:
        assert cuts == all_cuts


@EVERY_MODEL
@pytest.mark.parametrize("scale", ["layerwise", "global"])
def test_shared_feedback_consists_of_parts_of_one_matrix(model, scale):
    t = Tiny("shared", model, f"method.scale={scale}", "method.top=direct")
    matrices = [module.weight.flatten(1) for module in t.method.feedback]  # (K, d_i)
    if scale == "layerwise":  # undo the factor 1/√d_i
        matrices = [matrix * matrix.shape[1] ** 0.5 for matrix in matrices]
    largest = max(matrices, key=lambda matrix: matrix.shape[1])
    for matrix in matrices:
        close(matrix, largest[:, : matrix.shape[1]])
    if scale == "global":
        assert largest.abs().max() <= largest.shape[1] ** -0.5


@pytest.mark.parametrize("model", ["fc", "conv3_bn", "mixer"])
def test_target_projection_is_dfa_without_the_probabilities(model):
    """DFA sends p - y*, target projection sends -y*, so their signals differ by that of the probabilities p."""
    same = ("method.top=direct", "method.feedback=dense", "protocol.activation_of=null")
    drtp, dfa = Tiny("drtp", model, *same), Tiny("dfa", model, *same)
    trace, projected, _ = drtp.backward()
    _, deltas, _ = dfa.backward()
    probabilities = trace.logits.detach().softmax(1) / len(drtp.x)
    for i, module in drtp.method.local_modules.items():
        signal = module.feedback(probabilities)
        h, a = trace.outputs[i - 1], trace.preactivations[i - 1]
        (difference,) = torch.autograd.grad(h, a, signal, retain_graph=True)
        close(deltas[i - 1] - projected[i - 1], difference)


LINEAR_NET = ("model.activation=identity", *SGD)
RANDOM_B = ("method.init=kaiming", "method.top=direct")


@pytest.mark.parametrize(
    ("rate", "method", "options"), [(1.0, "bp", ()), (0.0, "dfa", RANDOM_B)], ids=["bp", "dfa"]
)
def test_adfa_on_a_linear_net_is_bp_at_rate_1_and_dfa_at_rate_0(rate, method, options):
    adfa = Tiny("adfa", "fc", *LINEAR_NET, *RANDOM_B, f"method.rate={rate}")
    other = Tiny(method, "fc", *LINEAR_NET, *options)
    for _ in range(3):
        adfa.learner.step(adfa.x, adfa.target)
        other.learner.step(other.x, other.target)
    for p, expected in zip(adfa.net.parameters(), other.net.parameters(), strict=True):
        if method == "bp":
            close(p, expected)
        else:
            assert torch.equal(p, expected)


@pytest.mark.parametrize("model", ["fc", "fc_ln", "conv3_bn"])
def test_dkp_at_the_last_hidden_layer_is_kolen_pollack(model):
    t = Tiny("dkp", model, *SGD, "optimizer.weight_decay=0.5", "method.top=direct")
    head, top = t.net.head.weight, t.method.feedback[-1].weight
    before = (head - top).detach()
    for _ in range(4):
        t.learner.step(t.x, t.target)
    close((head - top).detach(), before * 0.95**4)


@pytest.mark.parametrize("feedback", ["conv", "dense"])
@pytest.mark.parametrize("model", ["fc", "conv3_bn", "mixer"])
def test_fdfa_estimates_the_jacobian_and_keeps_batch_norm_statistics(model, feedback):
    t = Tiny("fdfa", model, "method.top=direct", f"method.feedback={feedback}")
    t.x = t.x.repeat(50, 1, 1, 1)  # one draw for each copy
    trace = t.trace(keep=True)
    before = {key: value.clone() for key, value in t.net.state_dict().items()}
    torch.manual_seed(0)
    (h,) = trace.inputs[-1]
    rows = [
        torch.autograd.grad(logits.sum(), h, retain_graph=True)[0].mean(0).flatten()
        for logits in trace.logits.T
    ]
    jacobian = torch.cat(rows)
    estimate = torch.zeros_like(jacobian)
    with torch.no_grad():
        for _ in range(30):
            noise, d = t.method.tangents(trace)
            products = torch.einsum("nk,n...->k...", d, noise[t.net.depth - 1])
            estimate += products.flatten() / len(d) / 30
    for key, value in t.net.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert F.cosine_similarity(estimate, jacobian, dim=0) > 0.9
    scale = estimate @ jacobian / jacobian.square().sum()
    assert scale.item() == pytest.approx(1, abs=0.2)


class Feedback(nn.Module):
    """Apply a local module's feedback so that autograd can differentiate it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, error):
        return LocalModule.feedback.__wrapped__(self.module, error)


@pytest.mark.parametrize("feedback", ["conv", "dense"])
@pytest.mark.parametrize("model", ["fc", "conv3", "resnet18", "mixer"])
def test_fdfa_s_gradient_of_b_is_that_of_the_squared_distance_to_the_estimate(model, feedback):
    options = ("method.top=direct", f"method.feedback={feedback}", "method.init=default")
    t = Tiny("fdfa", model, *options)
    trace, _, error = t.backward()
    torch.manual_seed(0)
    t.method.adapt(trace, error, t.target)
    torch.manual_seed(0)
    noise, d = t.method.tangents(trace)
    classes = torch.eye(CLASSES, dtype=torch.float64)
    for i, module in t.method.local_modules.items():
        gradient = module.weight.grad.clone()
        estimate = torch.einsum("nk,n...->k...", d, noise[i]) / len(d)
        weight = module.weight.detach().requires_grad_()
        # the whole matrix B, (K, *h_i): one feedback signal for each class
        b = torch.func.functional_call(Feedback(module), {"module.weight": weight}, (classes,))
        (expected,) = torch.autograd.grad((b - estimate).square().sum() / 2, weight)
        close(gradient, expected)
        close(module.norm(), b.norm())


@pytest.mark.parametrize(("method", "model"), DENSE_PAIRS)
def test_dense_feedback_is_one_matrix_on_the_flattened_output(method, model):
    t = Tiny(method, model, "++method.feedback=dense", "++method.init=default")
    trace, _, error = t.backward()
    for i, module in t.method.local_modules.items():
        h = trace.output(i).flatten(1)
        assert module.weight.shape == (4, h.shape[1])
        close(module.feedback(error).flatten(1), error @ module.weight)
        close(module(trace.output(i)), h @ module.weight.T)


@EVERY_MODEL
@pytest.mark.parametrize("method", ["kp", "wm"])
def test_sequential_methods_start_from_the_same_b_as_fa(method, model):
    expected = Tiny("fa", model).method.feedback
    for b, b_of_fa in zip(Tiny(method, model).method.feedback, expected, strict=True):
        assert torch.equal(b, b_of_fa)


@EVERY_MODEL
@pytest.mark.parametrize("method", ["drtp", "dkp"])
def test_direct_methods_start_from_the_same_b_as_dfa(method, model):
    options = ("++method.top=direct", "++method.feedback=conv")
    expected = Tiny("dfa", model, *options).method.feedback
    for b, b_of_dfa in zip(Tiny(method, model, *options).method.feedback, expected, strict=True):
        assert torch.equal(b.weight, b_of_dfa.weight)


def test_output_cosine_does_not_depend_on_the_scale_of_b_and_is_nan_for_zero():
    cosines = []
    for scale in (1.0, 1e-12, 0.0):
        t = Tiny("dfa", "fc")
        t.method.feedback[0].weight.data.mul_(scale)
        cosines.append(quantities(t, "output_cosine")["output_cosine/1"])
    close(cosines[0], cosines[1])
    assert cosines[2].isnan()


def test_backprop_has_no_quantities_of_b():
    metrics = quantities(Tiny("bp", "fc"), *FUNCTIONS)
    close(metrics["gradient_cosine/1"], torch.tensor(1.0).double())
    for name in FUNCTIONS:
        assert name == "gradient_cosine" or metrics[f"{name}/1"].isnan(), name


@pytest.mark.parametrize("method", ["fa", "las"])
def test_quantities_compare_b_with_w_as_defined(method):
    t = Tiny(method, "fc", "++method.init=kaiming")
    w = initial_weights(t)
    metrics = quantities(t, "weight_cosine", "weight_ratio", "sign_agreement")
    if method == "fa":
        targets = w[1:]
        feedback = list(t.method.feedback)
    else:
        targets = [w[3] @ w[2] @ w[1], w[3] @ w[2]]
        feedback = [module.weight.detach() for module in t.method.feedback]
    for i, (b, target) in enumerate(zip(feedback, targets, strict=True), start=1):
        cosine = F.cosine_similarity(b.flatten(), target.flatten(), dim=0)
        close(metrics[f"weight_cosine/{i}"], cosine)
        close(metrics[f"weight_ratio/{i}"], b.norm() / target.norm())
        agreement = (b.sign() == target.sign()).double().mean()
        close(metrics[f"sign_agreement/{i}"], agreement, atol=1e-6)


def test_output_cosine_compares_the_local_module_s_output_with_the_logits():
    t = Tiny("las", "fc", "++method.init=kaiming")
    trace = t.trace(keep=True)
    cosine = quantities(t, "output_cosine")["output_cosine/1"]
    b = t.method.feedback[0].weight.detach()  # after the step, which updates B first
    y = trace.output(1) @ b.T
    close(cosine, F.cosine_similarity(y, trace.logits.detach()).mean())


def test_output_cosine_is_nan_without_local_modules():
    assert quantities(Tiny("fa", "fc"), "output_cosine")["output_cosine/1"].isnan()


@pytest.mark.parametrize("method", ["fa", "las"])
def test_gradient_cosine_compares_the_gradients_with_backprop_s(method):
    t, same, bp = (Tiny(name, "fc") for name in (method, method, "bp"))
    cosine = quantities(t, "gradient_cosine")["gradient_cosine/1"]
    bp.backward()
    same.method.load_state_dict(t.method.state_dict())  # the step updates B first
    same.backward()
    close(cosine, F.cosine_similarity(lowest_gradient(same), lowest_gradient(bp), dim=0))


@pytest.mark.parametrize("method", ["fa", "usf", "frsf", "kp", "pfa"])
def test_local_cosine_compares_the_method_s_signal_through_b_and_through_w(method):
    t, same = Tiny(method, "fc"), Tiny(method, "fc")
    _, deltas, error = same.backward()
    signals_above = [*deltas[1:], error]
    for i, cosine in enumerate(quantity_by_layer(t, "local_cosine")):
        through_b = signals_above[i] @ same.method.feedback_weight(i).detach()
        through_w = signals_above[i] @ initial_weights(same)[i + 1]
        products = (through_b * through_w).sum(1)
        cosines = products / through_b.norm(dim=1) / through_w.norm(dim=1)
        close(cosine, cosines.nanmean())


@EVERY_MODEL
def test_local_cosine_is_1_if_b_equals_w(model):
    for cosine in quantity_by_layer(with_b_equal_to_w(Tiny("fa", model)), "local_cosine"):
        close(cosine, torch.tensor(1.0).double())


@EVERY_MODEL
def test_direct_methods_have_no_local_cosine(model):
    for cosine in quantity_by_layer(Tiny("dfa", model), "local_cosine"):
        assert cosine.isnan()


@pytest.mark.parametrize("top", ["direct", "backprop"])
def test_weight_cosine_pair_compares_the_b_of_neighbouring_layers_with_w(top):
    t = Tiny("dfa", "fc", "++method.init=default", f"++method.top={top}")
    _, w2, w3, w4 = initial_weights(t)
    b = [module.weight.T for module in t.method.feedback]  # (d_i, K)
    if top == "backprop":
        b.append(w4.T)  # the last hidden layer's signal is W_Lᵀ e
    cosines = quantity_by_layer(t, "weight_cosine_pair")
    close(cosines[0], F.cosine_similarity((b[1] @ b[0].T).flatten(), w2.flatten(), dim=0))
    close(cosines[1], F.cosine_similarity((b[2] @ b[1].T).flatten(), w3.flatten(), dim=0))
    if top == "direct":
        close(cosines[2], F.cosine_similarity(b[2].T.flatten(), w4.flatten(), dim=0))
    else:
        assert cosines[2].isnan()


def test_dkp_decays_b_at_b_s_own_learning_rate():
    """B ← (1 - ηλ) B - η h eᵀ, where η is B's own rate."""
    options = (*SGD, "optimizer.feedback.lr=0.01", "method.top=direct")
    plain = Tiny("dkp", "fc", *options, "method.decay=0")
    decayed = Tiny("dkp", "fc", *options, "method.decay=0.5")
    start = [b.detach().clone() for b in plain.method.parameters()]
    for t in (plain, decayed):
        t.learner.step(t.x, t.target)
    parameters = zip(start, plain.method.parameters(), decayed.method.parameters(), strict=True)
    for b_before, b_without_decay, b_with_decay in parameters:
        close(b_with_decay, b_without_decay - 0.01 * 0.5 * b_before)
