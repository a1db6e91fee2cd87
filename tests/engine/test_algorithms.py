"""Compare the engine's steps with a NumPy transcription of the paper's Algorithms 1 and 2, with corrected signs."""

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
    """Return W, b and B after STEPS steps on the same batch. Losses are means over samples and sums over classes.

    W: list of W_i, (d_i, d_{i-1}). B: (d_1, K). x: (N, d), one sample per row.
    coefficient: of LAS's local gradient; 2 for the gradient of Eq. 20, 1 for Algorithm 1 as printed.
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
        deltas, inputs = [delta1, delta2, e], [x, h1, h2]
        for i in range(3):
            W[i] = W[i] - RATE * deltas[i].T @ inputs[i]
            b[i] = b[i] - RATE * deltas[i].sum(0)
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
def test_steps_equal_the_numpy_transcription(method, protocol, coefficient):
    overrides = ("optimizer=sgd", f"optimizer.lr={RATE}", f"protocol={protocol}")
    t = Tiny(method, "fc", "dataset.fc_widths=[9,9]", *overrides)
    layers = [t.net.weight_layers(i)[0] for i in range(3)]
    initial_weight = layers[0].weight.detach().clone()
    W = [layer.weight.detach().numpy().copy() for layer in layers]
    b = [layer.bias.detach().numpy().copy() for layer in layers]
    B = np.zeros((layers[0].out_features, CLASSES))
    for feedback in t.method.parameters():  # BP has none, the others have one
        B = feedback.detach().numpy().T.copy()
    y_star = np.eye(CLASSES)[t.target.numpy()]
    W, b, B = transcription(W, b, B, t.x.flatten(1).numpy(), y_star, method, coefficient)
    for _ in range(STEPS):
        t.learner.step(t.x, t.target)
    # the longest sum has as many terms as the first layer has inputs; all terms are below 1
    tolerance = STEPS * roundoff(layers[0].in_features)
    for layer, weight, bias in zip(layers, W, b, strict=True):
        assert np.abs(layer.weight.detach().numpy() - weight).max() < tolerance
        assert np.abs(layer.bias.detach().numpy() - bias).max() < tolerance
    for feedback in t.method.parameters():
        assert np.abs(feedback.detach().numpy().T - B).max() < tolerance
    assert (layers[0].weight - initial_weight).abs().max() > 1e-4


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
