"""Every initialisation gives W the stated variance, sets biases to zero, and changes nothing else."""

import math

import pytest
import torch
from torch import nn

from dfl_experiments.engine.initialise import initialise


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64), nn.Linear(512, 256), nn.Linear(256, 512, bias=False))


@pytest.mark.parametrize(
    ("init", "variance"), [("kaiming", lambda i, o: 2 / i), ("xavier", lambda i, o: 2 / (i + o))]
)  # fmt: skip
def test_weights_have_the_variance_of_their_initialisation_and_biases_are_zero(init, variance):
    model = net()
    initialise(model, init)
    for layer, fans in ((model[0], (8 * 9, 64 * 9)), (model[2], (512, 256)), (model[3], (256, 512))):
        count = layer.weight.numel()
        assert layer.weight.var().item() == pytest.approx(variance(*fans), rel=6 * math.sqrt(2 / count))
    assert not any(layer.bias.any() for layer in (model[0], model[2]))


def test_orthogonal_weights_have_orthonormal_rows_or_columns():
    model = net()
    initialise(model, "orthogonal")
    weight = model[2].weight.double()
    assert torch.allclose(weight @ weight.T, torch.eye(256, dtype=torch.float64), atol=1e-5)


def test_default_keeps_every_bit_and_no_initialisation_touches_a_normalisation():
    before = net()
    for init in ("default", "kaiming"):
        model = net()
        initialise(model, init)
        assert torch.equal(model[1].weight, before[1].weight)
        assert torch.equal(model[0].weight, before[0].weight) == (init == "default")
