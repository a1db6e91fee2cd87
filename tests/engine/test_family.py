"""The laws of the wider family, rule by rule."""

import math

import pytest
import torch
from conftest import MODELS, PAIRS, Tiny, assert_near, roundoff
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
DENSE = [pair for pair in PAIRS if pair[0] in DIRECT and pair[0] not in ("adfa", "bdfa")]


def with_the_weights(t):
    for feedback, layer in zip(t.method.feedback, t.method.layers, strict=True):
        feedback.data.copy_(layer.weight.data)
    return t


def differences(t):
    pairs = zip(t.method.layers, t.method.feedback, strict=True)
    return [layer.weight.detach() - feedback.detach() for layer, feedback in pairs]


def close(a, b, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def vectors(net):
    """Return the weights of every block and of the head as vectors: alone, a bias before a norm has no gradient."""
    return [torch.cat([p.detach().flatten() for p in weights]) for weights in net.weights]


def assert_moved_alike(net, other, start, tolerance):
    """Assert that two nets have gone the same way from where they started, to rounding."""
    for found, expected, before in zip(vectors(net), vectors(other), start, strict=True):
        assert_near(found - before, expected - before, tolerance)


@EVERY_MODEL
@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_feedback_alignment_with_the_weights_is_backprop(model, precision):
    """To rounding: its signals come from other calls than autograd's, which may sum in another order."""
    fa, bp = with_the_weights(Tiny("fa", model, *SGD)), Tiny("bp", model, *SGD)
    tolerance = roundoff(fa.terms)
    if precision == "bfloat16":
        tolerance = roundoff(fa.results, torch.bfloat16)
        for t in (fa, bp):
            t.net.float()
            t.method.float()
            t.x, t.learner.precision = t.x.float(), precision
    start = vectors(bp.net)
    # with AMX, oneDNN returns a wrong bfloat16 weight gradient for a 3×3 convolution with stride 2 on a plane of 1×1
    with torch.backends.mkldnn.flags(enabled=precision != "bfloat16"):
        row, _ = (t.learner.step(t.x, t.target, align=True) for t in (fa, bp))
    assert_moved_alike(fa.net, bp.net, start, tolerance)
    cosines = row[2:].view(-1, 5)[:, :2]
    torch.testing.assert_close(
        cosines, torch.ones_like(cosines), rtol=0, atol=max(tolerance, roundoff(2, row.dtype))
    )


@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_twice_the_feedback_is_a_learning_rate_per_layer(activation):
    once, twice = (Tiny("fa", "fc", f"model.activation={activation}") for _ in range(2))
    for feedback in twice.method.feedback:
        feedback.data.mul_(2)
    depth = once.net.depth
    for i, (a, b) in enumerate(zip(once.backward()[1], twice.backward()[1], strict=True), start=1):
        assert torch.equal(b, a * 2 ** (depth - i))


@EVERY_MODEL
@pytest.mark.parametrize("method", SEQUENTIAL)
def test_a_sequential_method_is_measured_against_backprop_and_not_against_itself(method, model):
    t, bp = Tiny(method, model), Tiny("bp", model)
    bp.net.load_state_dict(t.net.state_dict())
    trace, deltas, error = t.backward()
    references = backprop_deltas(trace, error)
    for delta, reference, expected in zip(deltas, references, bp.backward()[1], strict=True):
        assert_near(reference, expected, roundoff(t.terms))
        assert F.cosine_similarity(delta.flatten(1), reference.flatten(1)).mean() < 0.995


def test_signs_with_the_magnitudes_of_the_weights_are_backprop():
    t, bp = Tiny("frsf", "conv3_bn"), Tiny("bp", "conv3_bn")
    for k, layer in enumerate(t.method.layers):
        t.method.get_buffer(f"magnitude_{k}").copy_(layer.weight.data.abs().flatten(1))
    bp.net.load_state_dict(t.net.state_dict())
    for delta, expected in zip(t.backward()[1], bp.backward()[1], strict=True):
        assert_near(delta, expected, roundoff(t.terms))


@pytest.mark.parametrize(("method", "uniform", "normal"), [("usf", 3**0.5 / 2, (2 / math.pi) ** 0.5),
                                                           ("frsf", 3 / 4, (3 / (2 * math.pi)) ** 0.5)])  # fmt: skip
def test_the_cosine_of_signs_with_weights_is_the_expected_one(method, uniform, normal):
    torch.manual_seed(0)
    first, layer, head = (
        torch.nn.Linear(d, width).double() for d, width in ((3, 400), (400, 400), (400, 4))
    )
    net = BlockNet(
        Block(first, torch.nn.ReLU()), Block(layer, torch.nn.ReLU()), head=head, input_shape=(3,)
    )
    for expected, draw in ((uniform, lambda w: w.uniform_(-1, 1)), (normal, lambda w: w.normal_())):
        draw(layer.weight.data)
        magnitudes = {"usf": "uniform", "frsf": "fixed"}[method]
        b = SignSymmetry(
            net, 4, LOSSES["cross_entropy"], magnitudes, "weights", False
        ).feedback_weight(0)
        assert F.cosine_similarity(
            b.flatten(), layer.weight.flatten(), dim=0
        ).item() == pytest.approx(expected, abs=0.01)
        close(b.square().mean(), layer.weight.detach().square().mean(), rtol=0.02)


def test_signs_are_those_of_today_s_weights_and_magnitudes_are_drawn_when_they_should():
    for method, changes in (("usf", False), ("frsf", False), ("brsf", True)):
        t = Tiny(method, "fc")
        before = t.method.get_buffer("magnitude_0").clone()
        t.learner.step(t.x, t.target)
        assert torch.equal(before, t.method.get_buffer("magnitude_0")) != changes
        t.method.layers[0].weight.data.neg_()
        assert torch.equal(t.method.feedback_weight(0).sign(), t.method.layers[0].weight.sign())


@pytest.mark.parametrize("model", ["fc", "conv3_bn", "resnet18", "mixer"])
@pytest.mark.parametrize("optimizer", [("adam",), ("adam", "optimizer.weight_decay=0.01"),
                                       ("sgd", "optimizer.momentum=0.9", "optimizer.weight_decay=0.01")])  # fmt: skip
def test_kolen_pollack_from_the_weights_stays_backprop(model, optimizer):
    options, steps = (f"optimizer={optimizer[0]}", *optimizer[1:], "optimizer.lr=0.01"), 4
    kp, bp = with_the_weights(Tiny("kp", model, *options)), Tiny("bp", model, *options)
    start = vectors(bp.net)
    for _ in range(steps):
        kp.learner.step(kp.x, kp.target)
        bp.learner.step(bp.x, bp.target)
    # W and B go through the same operations on the same gradient
    assert all((difference == 0).all() for difference in differences(kp))
    # gradients are equal to rounding, and Adam divides by as little as its ε
    smallest = 1e-8 if optimizer[0] == "adam" else 1
    assert_moved_alike(kp.net, bp.net, start, steps * roundoff(kp.terms) / smallest)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_kolen_pollack_s_difference_shrinks_by_the_decay_and_by_nothing_else(optimizer, decay):
    t = Tiny(
        "kp", "conv3_bn", f"optimizer={optimizer}", "optimizer.lr=0.01", f"method.decay={decay}"
    )
    before = differences(t)
    for _ in range(5):
        t.learner.step(t.x, t.target)
    for difference, start in zip(differences(t), before, strict=True):
        close(difference, start * (1 - 0.01 * decay) ** 5)


def test_kolen_pollack_s_difference_under_momentum_is_a_heavy_ball():
    t = Tiny("kp", "fc", *SGD, "optimizer.momentum=0.9", "optimizer.weight_decay=0.2")
    expected, speed = differences(t), [0.0] * len(t.method.layers)
    for _ in range(6):
        t.learner.step(t.x, t.target)
        speed = [0.9 * v + 0.2 * x for v, x in zip(speed, expected, strict=True)]
        expected = [x - 0.1 * v for v, x in zip(speed, expected, strict=True)]
    for difference, one in zip(differences(t), expected, strict=True):
        close(difference, one)


def test_white_noise_is_mirrored_to_the_weights_exactly():
    torch.manual_seed(0)
    for weight in (torch.randn(4, 6).double(), torch.randn(4, 3, 2, 2).double()):
        flat = weight.flatten(1)
        noise = torch.randn(40, flat.shape[1]).double()
        noise = torch.linalg.qr(noise - noise.mean(0))[0] * 39**0.5
        close(mirrored(flat, noise), flat)


def test_the_mirror_s_cosine_at_rest_is_the_expected_one():
    t = Tiny("wm", "fc", "method.samples=20", "method.rate=0.1")
    t.learner.set_lr(0.0)
    found = []
    for step in range(600):
        t.learner.step(t.x, t.target)
        if step > 60:
            ((b, w),) = t.method.weight_pairs(1)
            found.append(F.cosine_similarity(b.flatten(), w.detach().flatten(), dim=0))
    inputs = t.method.layers[0].in_features
    expected = (1 + (inputs + 1) / 19 * 0.1 / 1.9) ** -0.5
    assert torch.stack(found).mean().item() == pytest.approx(expected, abs=0.005)


@EVERY_MODEL
def test_a_product_with_an_orthogonal_factor_comes_to_the_weights(model):
    t = Tiny("pfa", model, *SGD, "optimizer.weight_decay=0.5", "method.expansion=1")
    before = [(w - b).detach() for i in range(t.net.depth) for b, w in t.method.weight_pairs(i)]
    for _ in range(4):
        t.learner.step(t.x, t.target)
    after = [(w - b).detach() for i in range(t.net.depth) for b, w in t.method.weight_pairs(i)]
    for difference, start in zip(after, before, strict=True):
        close(difference, start * 0.95**4, atol=1e-10)


@EVERY_MODEL
@pytest.mark.parametrize("feedback", ["conv", "dense"])
def test_sparse_feedback_has_so_many_entries_a_unit_and_with_all_of_them_is_direct_feedback(
    model, feedback
):
    sparse, whole = (
        Tiny("sdfa", model, f"method.nonzeros={s}", f"method.feedback={feedback}") for s in (2, 4)
    )
    dfa = Tiny("dfa", model, f"method.feedback={feedback}")
    for module, full, other in zip(
        sparse.method.feedback, whole.method.feedback, dfa.method.feedback, strict=True
    ):
        assert ((module.weight != 0).sum(0) == 2).all()
        assert torch.equal(full.weight, other.weight)


@EVERY_MODEL
def test_binary_feedback_has_two_values_and_keeps_the_norm(model):
    t, dfa = (
        Tiny("bdfa", model, "method.convolutions=direct"),
        Tiny("dfa", model, "method.feedback=dense"),
    )
    for module, other in zip(t.method.feedback, dfa.method.feedback, strict=True):
        assert len(module.weight.unique()) == 2
        close(module.weight.norm(), other.weight.norm())
        assert torch.equal(module.weight > 0, other.weight >= 0)
    dense = Tiny("bdfa", model).method.cuts
    patches = {1} if model in ("mixer", "vit") else set()
    assert dense == ({4} if model.startswith("conv3") else t.method.cuts - patches)


@EVERY_MODEL
def test_shared_feedback_is_the_top_of_one_matrix(model):
    for scale, factor in (("layerwise", 0.5), ("global", 0.0)):
        t = Tiny("shared", model, f"method.scale={scale}", "method.top=direct")
        matrices = [m.weight.flatten(1) * m.weight[0].numel() ** factor for m in t.method.feedback]
        largest = max(matrices, key=lambda matrix: matrix.shape[1])
        for matrix in matrices:
            close(matrix, largest[:, : matrix.shape[1]])
        if scale == "global":
            assert largest.abs().max() <= largest.shape[1] ** -0.5


@pytest.mark.parametrize("model", ["fc", "conv3_bn", "mixer"])
def test_target_projection_lacks_the_probabilities_of_direct_feedback(model):
    same = ("method.top=direct", "method.feedback=dense", "protocol.activation_of=null")
    drtp, dfa = Tiny("drtp", model, *same), Tiny("dfa", model, *same)
    (trace, projected, _), (_, deltas, _) = drtp.backward(), dfa.backward()
    probabilities = trace.logits.detach().softmax(1) / len(drtp.x)
    for i, (a, b) in enumerate(zip(deltas, projected, strict=True), start=1):
        signal = drtp.method.local_modules[i].feedback(probabilities)
        expected = torch.autograd.grad(
            trace.outputs[i - 1], trace.preactivations[i - 1], signal, retain_graph=True
        )[0]
        close(a - b, expected)


def test_feedback_that_is_the_product_of_the_weights_is_backprop_on_a_linear_net():
    options = ("model.activation=identity", "method.init=kaiming", "method.top=direct", *SGD)
    whole, none = (Tiny("adfa", "fc", *options, f"method.rate={rate}") for rate in (1.0, 0.0))
    bp, dfa = Tiny("bp", "fc", "model.activation=identity", *SGD), Tiny("dfa", "fc", *options)
    for _ in range(3):
        for t in (whole, none, bp, dfa):
            t.learner.step(t.x, t.target)
    for p, q in zip(whole.net.parameters(), bp.net.parameters(), strict=True):
        close(p, q)
    for p, q in zip(none.net.parameters(), dfa.net.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("model", ["fc", "fc_ln", "conv3_bn"])
def test_direct_kolen_pollack_at_the_top_is_kolen_pollack(model):
    t = Tiny("dkp", model, *SGD, "optimizer.weight_decay=0.5", "method.top=direct")
    head, top = t.net.head.weight, t.method.feedback[-1].weight
    before = (head - top).detach()
    for _ in range(4):
        t.learner.step(t.x, t.target)
    close((head - top).detach(), before * 0.95**4)


@pytest.mark.parametrize("feedback", ["conv", "dense"])
@pytest.mark.parametrize("model", ["fc", "conv3_bn", "mixer"])
def test_tangents_average_to_the_jacobian_and_move_no_statistics(model, feedback):
    t = Tiny("fdfa", model, "method.top=direct", f"method.feedback={feedback}")
    t.x = t.x.repeat(50, 1, 1, 1)  # so many draws at once
    trace = t.trace(keep=True)
    before = {key: value.clone() for key, value in t.net.state_dict().items()}
    torch.manual_seed(0)
    (h,) = trace.inputs[-1]
    jacobian = torch.stack(
        [torch.autograd.grad(trace.logits[:, k].sum(), h, retain_graph=True)[0] for k in range(4)]
    )
    total = torch.zeros(4, *h.shape[1:], dtype=torch.float64)
    with torch.no_grad():
        for _ in range(30):
            noise, d = t.method.tangents(trace)
            total += torch.einsum("nk,n...->k...", d, noise[t.net.depth - 1]) / len(d) / 30
    assert all(torch.equal(value, before[key]) for key, value in t.net.state_dict().items())
    expected = jacobian.mean(1)
    assert F.cosine_similarity(total.flatten(), expected.flatten(), dim=0) > 0.9
    assert (total.flatten() @ expected.flatten() / expected.square().sum()).item() == pytest.approx(
        1, abs=0.2
    )


@pytest.mark.parametrize("feedback", ["conv", "dense"])
@pytest.mark.parametrize("model", ["fc", "conv3", "resnet18", "mixer"])
def test_a_forward_learnt_b_descends_the_squared_distance_to_the_estimate(model, feedback):
    t = Tiny(
        "fdfa", model, "method.top=direct", f"method.feedback={feedback}", "method.init=default"
    )
    trace, _, error = t.backward()
    torch.manual_seed(0)
    t.method.adapt(trace, error, t.target)
    torch.manual_seed(0)
    noise, d = t.method.tangents(trace)
    rows = torch.eye(4, dtype=torch.float64)
    for i, module in t.method.local_modules.items():
        found = module.weight.grad.clone()
        estimate = torch.einsum("nk,n...->k...", d, noise[i]) / len(d)
        b = module.weight.detach().requires_grad_()
        # B, (K, *h_i)
        received = torch.func.functional_call(Applied(module), {"module.weight": b}, (rows,))
        (expected,) = torch.autograd.grad((received - estimate).square().sum() / 2, b)
        close(found, expected)
        close(module.norm(), received.norm())


class Applied(torch.nn.Module):
    """A local module's feedback, as autograd goes through it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, error):
        return LocalModule.feedback.__wrapped__(self.module, error)


@pytest.mark.parametrize(("method", "model"), DENSE)
def test_dense_feedback_is_a_matrix_on_all_of_h(method, model):
    t = Tiny(method, model, "++method.feedback=dense", "++method.init=default")
    trace, _, error = t.backward()
    for i, module in t.method.local_modules.items():
        h = trace.output(i).flatten(1)
        assert module.weight.shape == (4, h.shape[1])
        close(module.feedback(error).flatten(1), error @ module.weight)
        close(module(trace.output(i)), h @ module.weight.T)


@EVERY_MODEL
def test_methods_that_start_alike_start_from_one_b(model):
    for names in (("fa", "kp", "wm"), ("dfa", "drtp", "dkp")):
        direct = ["++method.top=direct", "++method.feedback=conv"] * (names[0] == "dfa")
        first, *others = (list(Tiny(name, model, *direct).method.feedback) for name in names)
        for other in others:
            weights = [[getattr(b, "weight", b) for b in some] for some in (first, other)]
            assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_prediction_s_cosine_does_not_depend_on_its_size_and_nothing_has_none():
    found = []
    for size in (1.0, 1e-12, 0.0):
        t = Tiny("dfa", "fc")
        t.method.feedback[0].weight.data.mul_(size)
        learner = Learner(t.net, t.method, t.loss, t.optimizer, extra_quantities=["output_cosine"])
        found.append(
            dict(zip(learner.metric_names, learner.step(t.x, t.target, True), strict=True))[
                "output_cosine/1"
            ]
        )
    close(found[0], found[1])
    assert found[2].isnan()


@pytest.mark.parametrize("method", ["bp", "fa", "las"])
def test_what_is_measured_beside_the_cosine_is_what_its_name_says(method):
    t = Tiny(method, "fc", "++method.init=kaiming") if method != "bp" else Tiny(method, "fc")
    bp = Tiny("bp", "fc")
    bp.net.load_state_dict(t.net.state_dict())
    t.learner = Learner(t.net, t.method, t.loss, t.optimizer, extra_quantities=list(FUNCTIONS))
    weights = [t.net.weight_layers(i)[0].weight.detach().clone() for i in range(4)]
    found = dict(
        zip(t.learner.metric_names, t.learner.step(t.x, t.target, align=True), strict=True)
    )
    trace, _, _ = bp.backward()
    gradients = [torch.cat([p.grad.flatten() for p in b.parameters()]) for b in bp.net.blocks]
    own = Tiny(method, "fc", "++method.init=kaiming") if method == "las" else None
    if method == "bp":
        assert all(found[f"{name}/1"].isnan() for name in FUNCTIONS if name != "gradient_cosine")
        close(found["gradient_cosine/1"], torch.tensor(1.0).double())
        return
    if method == "fa":
        pairs = [(t.method.feedback[i], weights[i + 1]) for i in range(3)]
        assert found["output_cosine/1"].isnan()
    else:
        products = [weights[3] @ weights[2] @ weights[1], weights[3] @ weights[2]]
        pairs = [
            (module.weight.detach(), product)
            for module, product in zip(t.method.feedback, products, strict=True)
        ]
        y = trace.outputs[0].detach() @ t.method.feedback[0].weight.detach().T
        close(found["output_cosine/1"], F.cosine_similarity(y, trace.logits.detach()).mean())
        assert own is not None
    for i, (b, w) in enumerate(pairs, start=1):
        close(found[f"weight_cosine/{i}"], F.cosine_similarity(b.flatten(), w.flatten(), dim=0))
        close(found[f"weight_ratio/{i}"], b.norm() / w.norm())
        close(found[f"sign_agreement/{i}"], (b.sign() == w.sign()).double().mean(), atol=1e-6)
    again = Tiny(method, "fc", "++method.init=kaiming")
    again.net.load_state_dict(bp.net.state_dict())
    again.method.load_state_dict(t.method.state_dict())
    again.backward()
    mine = torch.cat([p.grad.flatten() for p in again.net.blocks[0].parameters()])
    close(found["gradient_cosine/1"], F.cosine_similarity(mine, gradients[0], dim=0))


def measured(t, name):
    t.learner = Learner(t.net, t.method, t.loss, t.optimizer, extra_quantities=[name])
    values = t.learner.step(t.x, t.target, align=True)
    found = dict(zip(t.learner.metric_names, values, strict=True))
    return [found[f"{name}/{i}"] for i in range(1, t.net.depth)]


@pytest.mark.parametrize("method", ["fa", "usf", "frsf", "kp", "pfa"])
def test_the_local_cosine_starts_from_the_methods_own_signal(method):
    t, other = Tiny(method, "fc"), Tiny(method, "fc")
    _, deltas, error = other.backward()
    weights = [other.net.weight_layers(i)[0].weight.detach().clone() for i in range(1, 4)]
    backs = [other.method.feedback_weight(k).detach().clone() for k in range(3)]
    found = measured(t, "local_cosine")
    for value, above, w, b in zip(found, [*deltas[1:], error], weights, backs, strict=True):
        sent, exactly = above @ b, above @ w
        cosines = (sent * exactly).sum(1) / sent.norm(dim=1) / exactly.norm(dim=1)
        close(value, cosines.nanmean())


@EVERY_MODEL
def test_the_local_cosine_of_feedback_equal_to_the_weights_is_one(model):
    for value in measured(with_the_weights(Tiny("fa", model)), "local_cosine"):
        close(value, torch.tensor(1.0).double())
    assert all(value.isnan() for value in measured(Tiny("dfa", model), "local_cosine"))


@pytest.mark.parametrize("top", ["direct", "backprop"])
def test_neighbouring_feedback_is_compared_with_the_weights_between(top):
    t = Tiny("dfa", "fc", "++method.init=default", f"++method.top={top}")
    weights = [t.net.weight_layers(i)[0].weight.detach().clone() for i in range(1, 4)]
    b = [module.weight.T for module in t.method.feedback]  # (d_i, K)
    if top == "backprop":
        b.append(weights[2].T)
    expected = [
        F.cosine_similarity((b[1] @ b[0].T).flatten(), weights[0].flatten(), dim=0),
        F.cosine_similarity((b[2] @ b[1].T).flatten(), weights[1].flatten(), dim=0),
        F.cosine_similarity(b[2].T.flatten(), weights[2].flatten(), dim=0),
    ]
    found = measured(t, "weight_cosine_pair")
    if top == "backprop":
        assert found.pop().isnan()
        expected.pop()
    for value, cosine in zip(found, expected, strict=True):
        close(value, cosine)


def test_dkp_decays_b_at_the_rate_of_b():
    """B ← (1 - ηλ) B - η h eᵀ, where η is B's own rate."""
    options = (*SGD, "optimizer.lr=0.1", "optimizer.feedback.lr=0.01", "method.top=direct")
    plain, decayed = (Tiny("dkp", "fc", *options, f"method.decay={decay}") for decay in (0, 0.5))
    start = [b.detach().clone() for b in plain.method.parameters()]
    for t in (plain, decayed):
        t.learner.step(t.x, t.target)
    for b, other, first in zip(
        plain.method.parameters(), decayed.method.parameters(), start, strict=True
    ):
        close(other, b - 0.01 * 0.5 * first)
