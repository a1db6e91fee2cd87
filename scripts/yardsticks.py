"""Implement what the engine is compared with: plain PyTorch at its fastest, and LAS as in published code."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
from measuring import learner_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from dfl_experiments.configuration.composition import compose
from dfl_experiments.configuration.schema import check
from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.cuda_graph import CapturedStep
from dfl_experiments.engine.learner import Learner

MODELS = {
    "fc-mnist": ("fc", "mnist", (1, 28, 28)),
    "fc-cifar10": ("fc", "cifar10", (3, 32, 32)),
    "conv3": ("conv3", "cifar10", (3, 32, 32)),
    "conv3_bn": ("conv3_bn", "cifar10", (3, 32, 32)),
    "resnet18": ("resnet18", "cifar10", (3, 32, 32)),
}
CLASSES, BATCH = 10, 64
Step = Callable[[Tensor, Tensor], object]


def learner(
    method: str, model: str, device: torch.device, precision: str = "float32", memory_format: str = "auto"
) -> Learner:
    """Return a learner for a method on a model of the paper's size."""
    name, dataset, shape = MODELS[model]
    choices = [f"method={method}", f"model={name}", f"dataset={dataset}", f"precision={precision}"]
    choices += [f"memory_format={memory_format}"]
    return learner_of(check(compose(choices)), shape, CLASSES, device)


def plain(model: str, device: torch.device, precision: str, channels_last: bool, compiled: bool) -> Step:
    """Return a training step of the same net in plain PyTorch: nn.Sequential, loss.backward(), a fused optimizer."""
    blocks = learner("bp", model, device).net
    net = nn.Sequential(*(nn.Sequential(*block.children()) for block in blocks.blocks), blocks.head)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net = net.to(memory_format=layout)
    optimizer = torch.optim.Adam(net.parameters(), 1e-4, fused=True, capturable=device.type == "cuda")
    called: Any = torch.compile(net) if compiled else net

    def step(x: Tensor, target: Tensor) -> None:
        if x.dim() == 4:
            x = x.contiguous(memory_format=layout)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = called(x)
        F.cross_entropy(logits.float(), target).backward()
        optimizer.step()

    return step


def plain_steps(model: str, device: torch.device, precision: str) -> dict[str, Step]:
    """Return the variants of plain PyTorch: both memory formats, eager and, if a compiler is installed, compiled."""
    layouts = {"plain": False} if model.startswith("fc") else {"plain": False, "plain channels-last": True}
    compiler = device.type == "cuda" or shutil.which("g++") is not None
    torch.compiler.reset()  # earlier compilations count towards a limit
    return {
        name + " compiled" * compiled: plain(model, device, precision, channels_last, compiled)
        for name, channels_last in layouts.items()
        for compiled in (False, True)[: 1 + compiler]
    }


def captured_plain(step: Step, device: torch.device) -> Step:
    """Return a plain step as one CUDA graph, into which batches are copied as in the engine."""

    class Plain:
        optimizers = ()

        def step(self, x: Tensor, target: Tensor, align: bool) -> object:
            return step(x, target)

    trainer: Any = Plain()
    return CapturedStep(trainer, BATCH, device)


class PublishedLas:
    """LAS as in published code: images one by one, two forward passes, a convolution for every local module.

    torchvision's transforms turn each picture into a tensor; a `DataLoader` makes batches. The first pass trains the
    local modules, the second the weights, with every h detached before the next block.
    """

    def __init__(self, net: BlockNet, pictures: list[tuple[Any, int]], batch: int) -> None:
        from torchvision import transforms

        each = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.25])])
        self.data = DataLoader(_Pictures(pictures, each), batch, shuffle=True)
        self.blocks, self.head, self.device = list(net.blocks), net.head, next(net.parameters()).device
        self.locals = nn.ModuleList(local_module(net, i) for i in range(1, net.depth - 1)).to(self.device)
        self.optimizer = torch.optim.Adam(net.parameters(), 1e-4)
        self.local_optimizer = torch.optim.Adam(self.locals.parameters(), 1e-4)

    def epoch(self) -> None:
        """Train on every image once."""
        for x, target in self.data:
            self.step(x.to(self.device), target.to(self.device))

    def step(self, x: Tensor, target: Tensor) -> None:
        """Train on one batch, in two passes."""
        with torch.no_grad():
            *outputs, logits = self.pass_through(x)
        self.local_optimizer.zero_grad()
        for module, h in zip(self.locals, outputs, strict=False):
            (0.5 * (predicted(module, h) - logits).square().sum() / len(x)).backward()
        self.local_optimizer.step()

        self.optimizer.zero_grad()
        *outputs, logits = self.pass_through(x)
        logits.retain_grad()
        F.cross_entropy(logits, target).backward()
        for module, h in zip(self.locals, outputs, strict=False):
            assert logits.grad is not None, "it was retained"
            h.backward(sent_back(module, logits.grad, h))
        self.optimizer.step()

    def pass_through(self, x: Tensor) -> Iterator[Tensor]:
        """Yield h_1 … h_{L-1} and the logits. An h with a local module is detached before the next block."""
        for i, block in enumerate(self.blocks):
            h = block(x)
            yield h
            x = h.detach() if i < len(self.locals) else h
        yield self.head(x)


class _Pictures(torch.utils.data.Dataset):
    def __init__(self, pictures: list[tuple[Any, int]], each: Callable[[Any], Tensor]) -> None:
        self.pictures, self.each = pictures, each

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture, label = self.pictures[index]
        return self.each(picture), label


def local_module(net: BlockNet, i: int) -> nn.Module:
    """Return a copy of the layer that reads h_i, with an output for each class."""
    reader = net.weight_layers(i)[0]
    if isinstance(reader, nn.Linear):
        return nn.Linear(reader.in_features, CLASSES, bias=False)
    size, stride, padding = reader.kernel_size[0], reader.stride[0], int(reader.padding[0])
    return nn.Conv2d(reader.in_channels, CLASSES, size, stride, padding, bias=False)


def predicted(module: nn.Module, h: Tensor) -> Tensor:
    """Return the output of a local module, averaged over an image."""
    y = module(h)
    return y.mean((2, 3)) if y.dim() == 4 else y


@torch.no_grad()
def sent_back(module: Any, error: Tensor, h: Tensor) -> Tensor:
    """Return the error after the transpose of a local module, repeated over an image, in the shape of h."""
    if isinstance(module, nn.Linear):
        return error @ module.weight
    (size, _), (stride, _), (padding, _) = module.kernel_size, module.stride, module.padding
    height, width = ((length + 2 * padding - size) // stride + 1 for length in h.shape[2:])
    planes = error[:, :, None, None].expand(-1, -1, height, width)
    rest = [h.shape[2 + k] - ((n - 1) * stride - 2 * padding + size) for k, n in enumerate((height, width))]
    return F.conv_transpose2d(planes, module.weight, None, stride, padding, output_padding=rest)
