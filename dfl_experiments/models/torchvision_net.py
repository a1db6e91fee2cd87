"""Any classification network of torchvision, untrained. Its classes and input channels are adapted to the data."""

from difflib import get_close_matches
from typing import Any

import torch
from torch import nn
from torchvision import models

from dfl_experiments.engine.module_net import Boundaries, ModuleNet
from dfl_experiments.errors import UserError


def torchvision_net(
    input_shape: tuple[int, int, int], num_classes: int, net: str, boundaries: Boundaries = "auto"
) -> ModuleNet:
    """Return a network of `torchvision.models`.

    input_shape: (C, H, W). num_classes: K.
    net: name of the network, such as "vgg11_bn".
    boundaries: see `ModuleNet`.
    Raises `UserError` if the name is unknown, or if the network needs square images and the images are not square.
    """
    names = models.list_models(module=models)
    if net not in names:
        close = get_close_matches(net, names, n=3) or names
        raise UserError(f"model.net={net}: torchvision has no such network; choose for example {', '.join(close)}")
    options: dict[str, Any] = {"image_size": input_shape[-1]} if net.startswith("vit_") else {}
    if options and input_shape[1] != input_shape[2]:
        raise UserError(f"model.net={net}: needs square images, but the images are {input_shape[1]}×{input_shape[2]}")
    module = models.get_model(net, weights=None, num_classes=num_classes, **options)
    fit_channels(module, input_shape[0])
    return ModuleNet(module, boundaries, torch.zeros(1, *input_shape))


def fit_channels(module: nn.Module, channels: int) -> None:
    """Replace the module's first convolution if its number of input channels is not `channels`."""
    name, old = next((name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d))
    if old.in_channels == channels:
        return
    options: Any = {"padding": old.padding, "dilation": old.dilation, "bias": old.bias is not None}
    parent, _, attribute = name.rpartition(".")
    new = nn.Conv2d(channels, old.out_channels, old.kernel_size, old.stride, **options)  # type: ignore[arg-type]
    setattr(module.get_submodule(parent), attribute, new)
