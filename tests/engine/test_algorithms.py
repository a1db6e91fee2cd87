"""Compare several steps of each rule with a NumPy transcription of its equations.

For the paper's methods these are its Algorithms 1 and 2, with corrected signs.
"""

import numpy as np
import pytest
import torch
from conftest import BATCH, CLASSES, Tiny, roundoff

from dfl_experiments.configuration.composition import compose
from dfl_experiments.configuration.schema import check

RATE, STEPS = 0.1, 5
SEQUENTIAL = ("fa", "usf", "brsf", "frsf", "kp", "wm", "pfa")
DIRECT = ("dfa", "sdfa", "bdfa", "shared", "drtp", "sign", "adfa", "dkp", "fdfa")


def numpy(values):
    return [value.detach().numpy().copy() for value in values]


def softmax(z):
    z = np.exp(z - z.max(1, keepdims=True))
    return z / z.sum(1, keepdims=True)


def built(name, *overrides):
    """Return a tiny net of three layers with a rule, its layers, and copies of their weights and biases."""
    method = name
    if name == "sign":
        method = "drtp"
        overrides = (*overrides, "method.projected=error_sign")
    options = (
        "optimizer=sgd",
        f"optimizer.lr={RATE}",
        "protocol.activation_of=null",
        "dataset.fc_widths=[9,9]",
    )
    t = Tiny(method, "fc", *options, *overrides)
    layers = [t.net.weight_layers(i)[0] for i in range(3)]
    return t, layers, numpy(layer.weight for layer in layers), numpy(layer.bias for layer in layers)


def forward(x, W, b):
    """Return h_1, h_2 and the logits."""
    h1 = np.maximum(x @ W[0].T + b[0], 0)
    h2 = np.maximum(h1 @ W[1].T + b[1], 0)
    return h1, h2, h2 @ W[2].T + b[2]


def updated(W, b, deltas, inputs):
    """Return the new weights, the new biases, and the gradients of the weights."""
    gradients = [delta.T @ h for delta, h in zip(deltas, inputs, strict=True)]
    W = [w - RATE * gradient for w, gradient in zip(W, gradients, strict=True)]
    b = [bias - RATE * delta.sum(0) for bias, delta in zip(b, deltas, strict=True)]
    return W, b, gradients


def assert_equal(t, layers, W, b, B):
    weights = [layer.weight for layer in layers]
    biases = [layer.bias for layer in layers]
    # the longest sum has as many terms as the first layer has inputs; all terms are at most about 1
    tolerance = STEPS * roundoff(layers[0].in_features)
    trained = [*weights, *biases, *t.method.parameters()]
    for parameter, expected in zip(trained, [*W, *b, *B], strict=True):
        assert np.abs(parameter.detach().numpy() - expected).max() < tolerance


@pytest.mark.parametrize(
    ("method", "protocol", "coefficient"),
    [
        ("bp", "fair", 2),
        ("dfa", "fair", 2),
        ("las", "fair", 2),
        ("las", "paper", 1),
        ("ltas", "fair", 2),
    ],
)
def test_steps_of_the_paper_s_methods_equal_the_numpy_transcription(method, protocol, coefficient):
    """The coefficient of LAS's local gradient is 2 for the gradient of Eq. 20, 1 for Algorithm 1 as printed."""
    t, layers, W, b = built(method, f"protocol={protocol}")
    x, y_star = t.x.flatten(1).numpy(), np.eye(CLASSES)[t.target.numpy()]
    initial_weight = W[0]
    B = numpy(t.method.parameters())  # (K, d_1); BP has none
    for _ in range(STEPS):
        t.learner.step(t.x, t.target)
        h1, h2, logits = forward(x, W, b)
        if method == "las":
            B = [B[0] - RATE * coefficient * (h1 @ B[0].T - logits).T @ h1 / BATCH]
        if method == "ltas":
            B = [B[0] - RATE * (softmax(h1 @ B[0].T) - y_star).T @ h1 / BATCH]
        e = (softmax(logits) - y_star) / BATCH
        delta2 = (e @ W[2]) * (h2 > 0)
        signal = delta2 @ W[1] if method == "bp" else e @ B[0]
        delta1 = signal * (h1 > 0)
        W, b, _ = updated(W, b, (delta1, delta2, e), (x, h1, h2))
    assert_equal(t, layers, W, b, B)
    assert np.abs(W[0] - initial_weight).max() > 1e-4


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_steps_of_sequential_rules_equal_the_numpy_transcription(name):
    t, layers, W, b = built(name)
    x, y_star = t.x.flatten(1).numpy(), np.eye(CLASSES)[t.target.numpy()]
    B = numpy(t.method.parameters())  # for PFA: R
    initial_rms = [np.sqrt((w**2).mean()) for w in W[1:]]
    if name == "pfa":
        P = numpy(t.method.get_buffer(f"fixed_{k}") for k in range(2))
    for step in range(STEPS):
        torch.manual_seed(step)
        t.learner.step(t.x, t.target)
        if name == "wm":
            torch.manual_seed(step)
            m = t.method.samples
            for k, w in enumerate(W[1:]):
                xi = torch.randn(m, w.shape[1], dtype=torch.float64).numpy()
                y = xi @ w.T
                rho = min(1, 0.08 * (m - 1) / (w.shape[1] + 1))
                covariance = (y - y.mean(0)).T @ (xi - xi.mean(0)) / (m - 1)
                B[k] = (1 - rho) * B[k] + rho * covariance
        V = B
        if name == "usf":
            V = [initial_rms[k] * np.sign(W[k + 1]) for k in range(2)]
        if name in ("brsf", "frsf"):
            M = [t.method.get_buffer(f"magnitude_{k}").numpy() for k in range(2)]
            V = [M[k] * np.sign(W[k + 1]) for k in range(2)]
            for k in range(2):
                assert M[k].min() >= 0
                assert M[k].max() <= 3**0.5 * initial_rms[k]
        if name == "pfa":
            V = [P[k] @ B[k] for k in range(2)]
        h1, h2, logits = forward(x, W, b)
        e = (softmax(logits) - y_star) / BATCH
        delta2 = (e @ V[1]) * (h2 > 0)
        delta1 = (delta2 @ V[0]) * (h1 > 0)
        W, b, gradients = updated(W, b, (delta1, delta2, e), (x, h1, h2))
        if name == "kp":
            B = [B[k] - RATE * gradients[k + 1] for k in range(2)]
        if name == "pfa":
            B = [B[k] - RATE * P[k].T @ gradients[k + 1] for k in range(2)]
    assert_equal(t, layers, W, b, B)


@pytest.mark.parametrize("name", DIRECT)
def test_steps_of_direct_rules_equal_the_numpy_transcription(name):
    t, layers, W, b = built(name, "method.top=direct")
    x, y_star = t.x.flatten(1).numpy(), np.eye(CLASSES)[t.target.numpy()]
    B = numpy(t.method.parameters())  # (K, d_1), (K, d_2)
    for step in range(STEPS):
        torch.manual_seed(step)
        t.learner.step(t.x, t.target)
        h1, h2, logits = forward(x, W, b)
        e = (softmax(logits) - y_star) / BATCH
        if name == "adfa":
            products = [W[2] @ W[1], W[2]]
            B = [B[k] + t.method.rate * (products[k] - B[k]) for k in range(2)]
        s = e
        if name == "drtp":
            s = -y_star / BATCH
        if name == "sign":
            s = np.sign(e) / BATCH
        deltas = ((s @ B[0]) * (h1 > 0), (s @ B[1]) * (h2 > 0), e)
        if name == "dkp":
            B = [B[0] - RATE * e.T @ h1, B[1] - RATE * e.T @ h2]
        if name == "fdfa":
            torch.manual_seed(step)
            p1 = torch.randn(*h1.shape, dtype=torch.float64).numpy()
            p2 = torch.randn(*h2.shape, dtype=torch.float64).numpy()
            d = ((p1 @ W[1].T) * (h2 > 0) + p2) @ W[2].T  # forward derivative of the logits
            estimates = [d.T @ p1 / BATCH, d.T @ p2 / BATCH]
            B = [B[k] - RATE * (B[k] - estimates[k]) for k in range(2)]
        W, b, _ = updated(W, b, deltas, (x, h1, h2))
    assert_equal(t, layers, W, b, B)


def test_default_schedule_decays_at_the_paper_s_epochs():
    schedule = check(compose([])).components["schedule"].build()
    rates = [schedule.factors(epoch, 100, 1)[0] for epoch in range(1, 101)]
    changes = [epoch for epoch in range(1, 100) if rates[epoch] != rates[epoch - 1]]
    assert changes == [50, 75, 89, 94]
    assert rates[-1] == pytest.approx(0.25**4)


def test_set_lr_sets_the_rate_of_w_and_of_b():
    t = Tiny("las", "fc")
    t.learner.set_lr(0.5)
    optimizer_of_w, optimizer_of_b = t.learner.optimizers
    assert optimizer_of_w.param_groups[0]["lr"] == 0.5
    assert optimizer_of_b.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)])
def test_b_has_an_optimizer_like_that_of_w(name, kind):
    t = Tiny("ltas", "conv3", f"optimizer={name}", "optimizer.weight_decay=0.01")
    optimizer_of_w, optimizer_of_b = t.learner.optimizers
    assert isinstance(optimizer_of_w, kind)
    assert type(optimizer_of_b) is type(optimizer_of_w)
    assert optimizer_of_b.defaults == optimizer_of_w.defaults
