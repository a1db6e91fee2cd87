"""Law 7: the engine against a NumPy transcription of the paper's Algorithms 1 and 2, their signs corrected."""

import numpy as np
import pytest
import torch
from conftest import CLASSES, Tiny, roundoff

from dfl_experiments.configuration.composition import compose
from dfl_experiments.configuration.schema import check

RATE, STEPS = 0.1, 5


def softmax(z):
    z = np.exp(z - z.max(1, keepdims=True))
    return z / z.sum(1, keepdims=True)


def transcription(W, b, B, x, y_star, method, coefficient):
    """STEPS minibatch steps on the same batch x: (N, d), rows are samples. W_i: (d_i, d_{i-1}), B: (d_1, K).

    Means over the batch, sums over classes; coefficient: 2 for the gradient of Eq. 20, 1 for Algorithm 1 as printed.
    """
    n = len(x)
    for _ in range(STEPS):
        a1 = x @ W[0].T + b[0]
        h1 = np.maximum(a1, 0)
        a2 = h1 @ W[1].T + b[1]
        h2 = np.maximum(a2, 0)
        a3 = h2 @ W[2].T + b[2]
        y1 = h1 @ B
        if method == "las":
            B = B - RATE * h1.T @ (coefficient * (y1 - a3)) / n
        if method == "ltas":
            B = B - RATE * h1.T @ (softmax(y1) - y_star) / n
        e = (softmax(a3) - y_star) / n
        delta2 = (e @ W[2]) * (a2 > 0)
        delta1 = (e @ B.T) * (a1 > 0)
        if method == "bp":
            delta1 = (delta2 @ W[1]) * (a1 > 0)
        for i, (delta, h) in enumerate(((delta1, x), (delta2, h1), (e, h2))):
            W[i] = W[i] - RATE * delta.T @ h
            b[i] = b[i] - RATE * delta.sum(0)
    return W, b, B


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
def test_steps_equal_the_transcription(method, protocol, coefficient):
    overrides = ("optimizer=sgd", f"optimizer.lr={RATE}", f"protocol={protocol}")
    t = Tiny(method, "fc", "dataset.fc_widths=[9,9]", *overrides)
    layers = [t.net.weight_layers(i)[0] for i in range(3)]
    feedback = list(t.method.parameters())
    B = (
        feedback[0].detach().numpy().T.copy()
        if feedback
        else np.zeros((layers[0].out_features, CLASSES))
    )
    W, b = (
        [getattr(layer, name).detach().numpy().copy() for layer in layers]
        for name in ("weight", "bias")
    )
    y_star = np.eye(CLASSES)[t.target.numpy()]
    W, b, B = transcription(W, b, B, t.x.flatten(1).numpy(), y_star, method, coefficient)
    for _ in range(STEPS):
        t.learner.step(t.x, t.target)
    pairs = [(layer.weight, w) for layer, w in zip(layers, W, strict=True)]
    pairs += [(layer.bias, bias) for layer, bias in zip(layers, b, strict=True)]
    pairs += [(p.T, B) for p in feedback]
    largest = max(np.abs(p.detach().numpy() - expected).max() for p, expected in pairs)
    assert largest < STEPS * roundoff(layers[0].in_features)  # the longest sum, of numbers below 1
    start = Tiny(method, "fc", "dataset.fc_widths=[9,9]").net.weight_layers(0)[0].weight
    assert (layers[0].weight - start).abs().max() > 1e-4


def test_the_learning_rate_falls_at_the_paper_s_fractions():
    schedule = check(compose([])).components["schedule"].build()
    rates = [schedule.factors(epoch, 100, 1)[0] for epoch in range(1, 101)]
    changes = [epoch for epoch in range(1, 100) if rates[epoch] != rates[epoch - 1]]
    assert changes == [50, 75, 89, 94]
    assert rates[-1] == pytest.approx(0.25**4)
    t = Tiny("las", "fc")
    t.learner.set_lr(0.5)
    assert [group["lr"] for o in t.learner.optimizers for group in o.param_groups] == [0.5, 0.5]


def test_both_optimizers_are_of_the_same_kind():
    for name in ("adam", "sgd"):
        first, second = Tiny(
            "ltas", "conv3", f"optimizer={name}", "optimizer.weight_decay=0.01"
        ).learner.optimizers
        assert type(first) is type(second)
        assert first.defaults == second.defaults
        assert isinstance(first, {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[name])
