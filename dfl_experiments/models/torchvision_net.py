"""Any classification network of torchvision, untrained. Its classes and input channels are adapted to the data."""

from difflib import get_close_matches
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torchvision import models

from dfl_experiments.engine.module_net import Boundaries, ModuleNet
from dfl_experiments.errors import UserError

# input channels of torchvision's networks; in each, only the first convolution has as many
CHANNELS = 3


def torchvision_net(
    input_shape: tuple[int, int, int], num_classes: int, net: str, boundaries: Boundaries = "auto"
) -> ModuleNet:
    """Return a network of `torchvision.models`.

    If the images do not have 3 channels, the first convolution gets their number of channels before the network's
    constructor draws the initial weights. So these weights have the distribution that the constructor gives them. The
    network has no auxiliary classifiers.

    input_shape: (C, H, W). num_classes: K.
    net: name of the network, such as "vgg11_bn".
    boundaries: see `ModuleNet`.
    Raises `UserError` if the name is unknown, or if the network needs square images and the images are not square.
    """
    names = models.list_models(module=models)
    if net not in names:
        close = get_close_matches(net, names, n=3) or names
        raise UserError(
            f"model.net={net}: torchvision has no such network; choose for example {', '.join(close)}"
        )
    options: dict[str, Any] = {"image_size": input_shape[-1]} if net.startswith("vit_") else {}
    if options and input_shape[1] != input_shape[2]:
        raise UserError(
            f"model.net={net}: needs square images, but the images are {input_shape[1]}×{input_shape[2]}"
        )
    if net in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}

    def fit_channels(parent: nn.Module, name: str, layer: nn.Module | None) -> None:
        """Give the first convolution the images' number of channels, when it becomes a part of the network."""
        if isinstance(layer, nn.Conv2d) and layer.in_channels == CHANNELS != input_shape[0]:
            layer.in_channels = input_shape[0]
            layer.weight = nn.Parameter(
                torch.empty(layer.out_channels, layer.in_channels, *layer.kernel_size)
            )
            layer.reset_parameters()

    with register_module_module_registration_hook(fit_channels):
        module = models.get_model(net, weights=None, num_classes=num_classes, **options)
    return ModuleNet(module, boundaries, torch.zeros(1, *input_shape))
