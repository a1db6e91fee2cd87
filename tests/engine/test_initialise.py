"""Every initialisation gives W the stated variance, sets biases to zero, and changes nothing else."""

import math

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


@pytest.mark.parametrize(
    ("init", "variance"), [("kaiming", lambda i, o: 2 / i), ("xavier", lambda i, o: 2 / (i + o))]
)  # fmt: skip
def test_weights_have_the_variance_of_their_initialisation_and_biases_are_zero(init, variance):
    model = net()
    initialise(model, init)
    for layer, fans in (
        (model[0], (8 * 9, 64 * 9)),
        (model[2], (512, 256)),
        (model[3], (256, 512)),
    ):
        count = layer.weight.numel()
        assert layer.weight.var().item() == pytest.approx(
            variance(*fans), rel=6 * math.sqrt(2 / count)
        )
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


# standard deviation of the first convolution's weights, as the network's constructor in torchvision has it
STEMS = {
    # kaiming, fan_out: the channels do not matter
    "resnet18": lambda w: math.sqrt(2 / w[:, 0].numel()),
    "vgg11_bn": lambda w: math.sqrt(2 / w[:, 0].numel()),
    "googlenet": lambda w: 0.01,
    "densenet121": lambda w: math.sqrt(2 / w[0].numel()),  # kaiming, fan_in
    "squeezenet1_1": lambda w: math.sqrt(2 / w[0].numel()),
    "vit_b_32": lambda w: math.sqrt(1 / w[0].numel()),
    "alexnet": lambda w: math.sqrt(1 / (3 * w[0].numel())),  # PyTorch's default
}


@pytest.mark.parametrize("name", STEMS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_network_of_torchvision_draws_its_first_convolution_as_its_constructor_does(
    name, channels
):
    torch.manual_seed(0)
    net = torchvision_net((channels, 64, 64), 10, name)
    weights, stem = (
        net.state_dict(),
        next(layer for layer in net.modules() if isinstance(layer, nn.Conv2d)),
    )
    assert stem.in_channels == stem.weight.shape[1] == channels
    assert stem.weight.std().item() == pytest.approx(STEMS[name](stem.weight), rel=0.05)
    assert stem.bias is None or bool(stem.bias.any()) == (name == "alexnet")
    torch.manual_seed(0)
    options = {"image_size": 64} if name == "vit_b_32" else {}
    if name == "googlenet":
        options = {"aux_logits": False, "init_weights": True}
    own = models.get_model(name, weights=None, num_classes=10, **options).state_dict()
    changed = [key for key in own if own[key].shape != weights[key].shape]
    assert len(changed) == (channels != 3)
    assert channels != 3 or all(torch.equal(own[key], weights[key]) for key in own)


def test_each_network_of_torchvision_has_one_convolution_for_its_images():
    for name in models.list_models(module=models):
        if name.startswith("regnet"):  # cannot be built without memory; they share one stem
            continue
        with torch.device("meta"):
            options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            module = models.get_model(name, weights=None, num_classes=10, **options)
        channels = [layer.in_channels for layer in module.modules() if isinstance(layer, nn.Conv2d)]
        assert channels[0] == 3, name
        assert channels.count(3) == 1, name
