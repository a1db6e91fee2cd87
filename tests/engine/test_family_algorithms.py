"""Every rule of the wider family against a NumPy transcription of its equations, over several steps."""

import numpy as np
import pytest
import torch
from conftest import BATCH, CLASSES, Tiny, roundoff

RATE, STEPS = 0.1, 5
SEQUENTIAL = ("fa", "usf", "brsf", "frsf", "kp", "wm", "pfa")
DIRECT = ("dfa", "sdfa", "bdfa", "shared", "drtp", "sign", "adfa", "dkp", "fdfa")


def numpy(values):
    return [value.detach().numpy().copy() for value in values]


def softmax(z):
    z = np.exp(z - z.max(1, keepdims=True))
    return z / z.sum(1, keepdims=True)


def built(name, *overrides):
    method, own = ("drtp", ("method.projected=error_sign",)) if name == "sign" else (name, ())
    fixed = (
        "optimizer=sgd",
        f"optimizer.lr={RATE}",
        "protocol.activation_of=null",
        "dataset.fc_widths=[9,9]",
    )
    t = Tiny(method, "fc", *fixed, *own, *overrides)
    layers = [t.net.weight_layers(i)[0] for i in range(3)]
    return t, layers, numpy(layer.weight for layer in layers), numpy(layer.bias for layer in layers)


def forward(x, W, b):
    a1 = x @ W[0].T + b[0]
    a2 = np.maximum(a1, 0) @ W[1].T + b[1]
    return np.maximum(a1, 0), np.maximum(a2, 0), np.maximum(a2, 0) @ W[2].T + b[2]


def updated(W, b, deltas, inputs):
    gradients = [delta.T @ h for delta, h in zip(deltas, inputs, strict=True)]
    W = [w - RATE * g for w, g in zip(W, gradients, strict=True)]
    return W, [bias - RATE * delta.sum(0) for bias, delta in zip(b, deltas, strict=True)], gradients


def assert_equal(t, layers, W, b, B):
    found = [
        *(layer.weight for layer in layers),
        *(layer.bias for layer in layers),
        *t.method.parameters(),
    ]
    expected = [*W, *b, *B]
    largest = max(
        np.abs(p.detach().numpy() - e).max() for p, e in zip(found, expected, strict=True)
    )
    # the longest sum, of numbers of about 1 at most
    assert largest < STEPS * roundoff(layers[0].in_features)


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_steps_of_a_sequential_rule_equal_the_transcription(name):
    t, layers, W, b = built(name)
    x, y_star = t.x.flatten(1).numpy(), np.eye(CLASSES)[t.target.numpy()]
    B = numpy(t.method.parameters())  # R of PFA
    scale = [np.sqrt((w**2).mean()) for w in W[1:]]
    fixed = numpy(t.method.get_buffer(f"fixed_{k}") for k in range(2)) if name == "pfa" else None
    for step in range(STEPS):
        torch.manual_seed(step)
        t.learner.step(t.x, t.target)
        if name == "wm":
            torch.manual_seed(step)
            M = t.method.samples
            for k, w in enumerate(W[1:]):
                xi = torch.randn(M, w.shape[1], dtype=torch.float64).numpy()
                y = xi @ w.T
                rho = min(1, 0.08 * (M - 1) / (w.shape[1] + 1))
                B[k] = (1 - rho) * B[k] + rho * (y - y.mean(0)).T @ (xi - xi.mean(0)) / (M - 1)
        V = B
        if name == "usf":
            V = [s * np.sign(w) for s, w in zip(scale, W[1:], strict=True)]
        if name in ("brsf", "frsf"):
            V = [
                t.method.get_buffer(f"magnitude_{k}").numpy() * np.sign(w)
                for k, w in enumerate(W[1:])
            ]
            assert all(
                0 <= np.abs(v).min() <= np.abs(v).max() <= 3**0.5 * s
                for v, s in zip(V, scale, strict=True)
            )
        if name == "pfa":
            V = [p @ r for p, r in zip(fixed, B, strict=True)]
        h1, h2, logits = forward(x, W, b)
        e = (softmax(logits) - y_star) / BATCH
        delta2 = (e @ V[1]) * (h2 > 0)
        delta1 = (delta2 @ V[0]) * (h1 > 0)
        W, b, gradients = updated(W, b, (delta1, delta2, e), (x, h1, h2))
        if name == "kp":
            B = [beta - RATE * g for beta, g in zip(B, gradients[1:], strict=True)]
        if name == "pfa":
            B = [r - RATE * p.T @ g for r, p, g in zip(B, fixed, gradients[1:], strict=True)]
    assert_equal(t, layers, W, b, B)


@pytest.mark.parametrize("name", DIRECT)
def test_steps_of_a_direct_rule_equal_the_transcription(name):
    t, layers, W, b = built(name, "method.top=direct")
    x, y_star = t.x.flatten(1).numpy(), np.eye(CLASSES)[t.target.numpy()]
    B = numpy(t.method.parameters())  # (K, d_1), (K, d_2)
    for step in range(STEPS):
        torch.manual_seed(step)
        t.learner.step(t.x, t.target)
        h1, h2, logits = forward(x, W, b)
        e = (softmax(logits) - y_star) / BATCH
        if name == "adfa":
            B = [
                beta + t.method.rate * (product - beta)
                for beta, product in zip(B, (W[2] @ W[1], W[2]), strict=True)
            ]
        s = {"drtp": -y_star / BATCH, "sign": np.sign(e) / BATCH}.get(name, e)
        deltas = ((s @ B[0]) * (h1 > 0), (s @ B[1]) * (h2 > 0), e)
        if name == "dkp":
            B = [beta - RATE * e.T @ h for beta, h in zip(B, (h1, h2), strict=True)]
        if name == "fdfa":
            torch.manual_seed(step)
            p1, p2 = (torch.randn(*h.shape, dtype=torch.float64).numpy() for h in (h1, h2))
            d = ((p1 @ W[1].T) * (h2 > 0) + p2) @ W[2].T
            B = [
                beta - RATE * (beta - d.T @ p / BATCH) for beta, p in zip(B, (p1, p2), strict=True)
            ]
        W, b, _ = updated(W, b, deltas, (x, h1, h2))
    assert_equal(t, layers, W, b, B)
