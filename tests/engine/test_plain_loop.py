"""Compare an epoch on MNIST with a plain loop that does not use the engine."""

import pytest
import torch
from torch.nn import functional as F

from dfl_experiments.configuration.composition import compose
from dfl_experiments.configuration.schema import check
from dfl_experiments.running.build import Parts, build
from dfl_experiments.running.epochs import evaluate

OPTIONS = (
    "dataset=mnist",
    "model.widths=[96,96]",
    "epochs=1",
    "optimizer.lr=1e-3",
    "device=cpu",
    "threads=1",
)


class PlainLoop:
    """Train with the paper's algorithms as printed: autograd for every loss and for BP's δ, and unfused Adam."""

    def __init__(self, parts: Parts) -> None:
        copies = [p.detach().clone().requires_grad_() for p in parts.learner.net.parameters()]
        self.weights, self.biases = copies[0::2], copies[1::2]
        self.feedback = [
            p.detach().clone().requires_grad_() for p in parts.learner.method.parameters()
        ]
        lr = parts.learner.rates[0]
        self.optimizer = torch.optim.Adam(copies, lr, foreach=False, fused=False)
        if self.feedback:
            self.feedback_optimizer = torch.optim.Adam(
                self.feedback, lr, foreach=False, fused=False
            )

    def forward(self, x):
        """Return the inputs h_0 … h_2 of the three layers, and their pre-activations a_1 … a_3."""
        h, inputs, preactivations = x.flatten(1), [], []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            a = h @ weight.T + bias
            inputs.append(h)
            preactivations.append(a)
            h = a.relu()
        return inputs, preactivations

    def step(self, method, x, target):
        """Train a minibatch, and return its loss and the cosine of layer 1."""
        inputs, preactivations = self.forward(x)
        logits = preactivations[-1]
        loss = F.cross_entropy(logits, target)
        reference = torch.autograd.grad(loss, preactivations, retain_graph=True)
        deltas = list(reference)
        if method != "bp":
            (feedback,) = self.feedback
            if method != "dfa":
                y = inputs[1].detach() @ feedback.T
                if method == "las":
                    local_loss = (y - logits.detach()).square().sum(1).mean()
                else:
                    local_loss = F.cross_entropy(y, target)
                self.feedback_optimizer.zero_grad()
                local_loss.backward()
                self.feedback_optimizer.step()
            deltas[0] = (reference[-1] @ feedback.detach()) * (preactivations[0] > 0)
        for weight, bias, h, delta in zip(self.weights, self.biases, inputs, deltas, strict=True):
            weight.grad, bias.grad = delta.T @ h.detach(), delta.sum(0)
        self.optimizer.step()
        return loss.item(), F.cosine_similarity(deltas[0], reference[0]).mean().item()

    @torch.no_grad()
    def accuracy(self, batches):
        accuracies = []
        for x, target in batches:
            logits = self.forward(x)[1][-1]
            accuracies.append((logits.argmax(1) == target).float().mean())
        return torch.stack(accuracies).mean().item()


@pytest.mark.parametrize("method", ["bp", "dfa", "las", "ltas"])
def test_an_epoch_on_mnist_equals_a_plain_loop(method, data_dir):
    parts = build(check(compose([f"method={method}", f"data_dir={data_dir}", *OPTIONS])))
    plain = PlainLoop(parts)
    expected = torch.tensor([plain.step(method, x, target) for x, target in parts.batches.epoch(1)])
    rows = torch.stack([parts.step(x, target, True) for x, target in parts.batches.epoch(1)])
    columns = dict(zip(parts.learner.metric_names, rows.T, strict=True))
    losses, cosines = columns["loss"], columns["cosine_sample/1"]
    # equal up to rounding at first; over the 844 steps of Adam, rounding errors add up
    torch.testing.assert_close(losses[:20], expected[:20, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cosines[:20], expected[:20, 1], rtol=1e-4, atol=1e-5)
    assert losses.mean().item() == pytest.approx(expected[:, 0].mean().item(), rel=3e-3)
    assert cosines.mean().item() == pytest.approx(expected[:, 1].mean().item(), abs=3e-3)
    accuracy = evaluate(parts, parts.test)[1]
    assert accuracy > 0.9
    assert accuracy == pytest.approx(plain.accuracy(parts.test), abs=5e-3)
