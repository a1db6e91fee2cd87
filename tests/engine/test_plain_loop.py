"""An epoch of MNIST by the engine is, to rounding, what a loop gives that does everything the plain way."""

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
    """The paper's algorithms as written: autograd for every loss, unfused Adam, a second backward pass for BP's δ."""

    def __init__(self, parts: Parts) -> None:
        copies = [p.detach().clone().requires_grad_() for p in parts.learner.net.parameters()]
        self.weights, self.biases = copies[0::2], copies[1::2]
        self.feedback = [
            p.detach().clone().requires_grad_() for p in parts.learner.method.parameters()
        ]
        lr = parts.learner.rates[0]
        self.optimizer = torch.optim.Adam(copies, lr, foreach=False, fused=False)
        self.local = (
            torch.optim.Adam(self.feedback, lr, foreach=False, fused=False)
            if self.feedback
            else None
        )

    def forward(self, x):
        h, outputs, preactivations = x.flatten(1), [], []
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            outputs.append(h)
            preactivations.append(h @ weight.T + bias)
            h = preactivations[-1].relu() if index < 2 else preactivations[-1]
        return outputs, preactivations

    def step(self, method, x, target):
        """The loss and the layer-1 cosine of one minibatch."""
        outputs, preactivations = self.forward(x)
        logits, loss = preactivations[-1], F.cross_entropy(preactivations[-1], target)
        reference = torch.autograd.grad(loss, preactivations, retain_graph=True)
        deltas = list(reference)
        if method != "bp":
            (feedback,) = self.feedback
            if method != "dfa":
                y = outputs[1].detach() @ feedback.T
                squared = (y - logits.detach()).square().sum(1).mean()
                self.local.zero_grad()
                (squared if method == "las" else F.cross_entropy(y, target)).backward()
                self.local.step()
            deltas[0] = (reference[-1] @ feedback.detach()) * (preactivations[0] > 0)
        for weight, bias, h, delta in zip(self.weights, self.biases, outputs, deltas, strict=True):
            weight.grad, bias.grad = delta.T @ h.detach(), delta.sum(0)
        self.optimizer.step()
        return loss.item(), F.cosine_similarity(deltas[0], reference[0]).mean().item()

    @torch.no_grad()
    def accuracy(self, batches):
        hits = [
            (self.forward(x)[1][-1].argmax(1) == target).float().mean() for x, target in batches
        ]
        return torch.stack(hits).mean().item()


@pytest.mark.parametrize("method", ["bp", "dfa", "las", "ltas"])
def test_an_epoch_of_mnist_equals_a_plain_loop_s(method, data_dir):
    parts = build(check(compose([f"method={method}", f"data_dir={data_dir}", *OPTIONS])))
    plain = PlainLoop(parts)
    expected = torch.tensor([plain.step(method, x, target) for x, target in parts.batches.epoch(1)])
    rows = torch.stack([parts.step(x, target, True) for x, target in parts.batches.epoch(1)])
    columns = dict(zip(parts.learner.metric_names, rows.T, strict=True))
    losses, cosines = columns["loss"], columns["cosine_sample/1"]
    # to rounding at first; then the rounding of 844 steps of Adam adds up
    torch.testing.assert_close(losses[:20], expected[:20, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cosines[:20], expected[:20, 1], rtol=1e-4, atol=1e-5)
    assert losses.mean().item() == pytest.approx(expected[:, 0].mean().item(), rel=3e-3)
    assert cosines.mean().item() == pytest.approx(expected[:, 1].mean().item(), abs=3e-3)
    accuracy = evaluate(parts, parts.test)[1]
    assert accuracy > 0.9
    assert accuracy == pytest.approx(plain.accuracy(parts.test), abs=5e-3)
