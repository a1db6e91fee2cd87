"""Check the variance of the weights after each initialisation, zero biases, and that nothing else changes."""

import math
import re

import pytest
import torch
from torch import nn
from torchvision import models

from dfl_experiments.engine.initialise import initialise
from dfl_experiments.models import torchvision_net


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 64, 3),
        nn.BatchNorm2d(64),
        nn.Linear(512, 256),
        nn.Linear(256, 512, bias=False),
    )


@pytest.mark.parametrize("init", ["kaiming", "xavier"])
@pytest.mark.parametrize(
    ("index", "fan_in", "fan_out"), [(0, 8 * 9, 64 * 9), (2, 512, 256), (3, 256, 512)]
)
def test_weights_have_the_stated_variance_and_biases_are_zero(index, fan_in, fan_out, init):
    model = net()
    initialise(model, init)
    layer = model[index]
    expected = {"kaiming": 2 / fan_in, "xavier": 2 / (fan_in + fan_out)}[init]
    six_standard_errors = 6 * math.sqrt(2 / layer.weight.numel())
    assert layer.weight.var().item() == pytest.approx(expected, rel=six_standard_errors)
    assert layer.bias is None or not layer.bias.any()


def test_orthogonal_weights_have_orthonormal_rows_or_columns():
    model = net()
    initialise(model, "orthogonal")
    weight = model[2].weight.double()
    assert torch.allclose(weight @ weight.T, torch.eye(256, dtype=torch.float64), atol=1e-5)


def test_default_changes_no_weight():
    before, model = net(), net()
    initialise(model, "default")
    for key, value in model.state_dict().items():
        assert torch.equal(value, before.state_dict()[key]), key


def test_normalisation_layers_keep_their_weights():
    model = net()
    model[1].weight.data.fill_(2)
    model[1].bias.data.fill_(3)
    initialise(model, "kaiming")
    assert (model[1].weight == 2).all()
    assert (model[1].bias == 3).all()


# standard deviation of the first convolution's weights, as torchvision's constructor draws them
STEMS = {
    # kaiming, fan_out: does not depend on the number of input channels
    "resnet18": lambda w: math.sqrt(2 / w[:, 0].numel()),
    "googlenet": lambda w: 0.01,
    "squeezenet1_1": lambda w: math.sqrt(2 / w[0].numel()),  # kaiming, fan_in
    "vit_b_32": lambda w: math.sqrt(1 / w[0].numel()),
    "alexnet": lambda w: math.sqrt(1 / (3 * w[0].numel())),  # PyTorch's default
}


@pytest.mark.parametrize("name", STEMS)
@pytest.mark.parametrize("channels", [3, 4])
def test_first_convolution_is_drawn_as_in_torchvision_s_constructor(name, channels):
    torch.manual_seed(0)
    net = torchvision_net((channels, 64, 64), 10, name)
    weights = net.state_dict()
    stem = next(layer for layer in net.modules() if isinstance(layer, nn.Conv2d))
    assert stem.in_channels == stem.weight.shape[1] == channels
    assert stem.weight.std().item() == pytest.approx(STEMS[name](stem.weight), rel=0.05)
    assert stem.bias is None or bool(stem.bias.any()) == (name == "alexnet")
    torch.manual_seed(0)
    options = {"image_size": 64} if name == "vit_b_32" else {}
    if name == "googlenet":
        options = {"aux_logits": False, "init_weights": True}
    original = models.get_model(name, weights=None, num_classes=10, **options).state_dict()
    replaced = [key for key in original if original[key].shape != weights[key].shape]
    assert len(replaced) == (0 if channels == 3 else 1)
    for key, value in original.items():
        assert channels != 3 or torch.equal(value, weights[key]), key


def test_each_torchvision_family_has_one_convolution_that_reads_the_image():
    names = models.list_models(module=models)
    # one network for each family, such as "resnet"
    families = {re.match("[a-z]+", name)[0]: name for name in names}
    del families["regnet"]  # its constructor fails on the meta device
    for name in families.values():
        with torch.device("meta"):
            options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            module = models.get_model(name, weights=None, num_classes=10, **options)
        channels = [layer.in_channels for layer in module.modules() if isinstance(layer, nn.Conv2d)]
        assert channels[0] == 3, name
        assert channels.count(3) == 1, name
