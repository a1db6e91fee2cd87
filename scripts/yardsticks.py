"""Implement what the benchmark compares this project with: plain PyTorch, and LAS as in published code."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
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

MODELS = {  # model, data set and shape of an image
    "fc-mnist": ("fc", "mnist", (1, 28, 28)),
    "fc-cifar10": ("fc", "cifar10", (3, 32, 32)),
    "conv3": ("conv3", "cifar10", (3, 32, 32)),
    "conv3_bn": ("conv3_bn", "cifar10", (3, 32, 32)),
    "resnet18": ("resnet18", "cifar10", (3, 32, 32)),
}
CLASSES, BATCH = 10, 64
Step = Callable[[Tensor, Tensor], object]


@dataclass(frozen=True)
class Setting:
    """A model of the paper's size, with the device and precision of its training."""

    model: str
    device: torch.device
    precision: str = "float32"

    @property
    def is_fc(self) -> bool:
        """Return whether the model is fully connected."""
        return self.model.startswith("fc")

    @property
    def on_gpu(self) -> bool:
        """Return whether the device is a GPU."""
        return self.device.type == "cuda"


def learner(method: str, setting: Setting) -> Learner:
    """Return a learner for a method."""
    model, dataset, shape = MODELS[setting.model]
    choices = [f"method={method}", f"model={model}", f"dataset={dataset}"]
    choices.append(f"precision={setting.precision}")
    return learner_of(check(compose(choices)), shape, CLASSES, setting.device)


def plain(setting: Setting, channels_last: bool, compiled: bool) -> Step:
    """Return a training step of the net in plain PyTorch: nn.Sequential, loss.backward(), a fused optimizer."""
    blocks = learner("bp", Setting(setting.model, setting.device)).net
    chain = [nn.Sequential(*block.children()) for block in blocks.blocks]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net = nn.Sequential(*chain, blocks.head).to(memory_format=layout)
    optimizer = torch.optim.Adam(net.parameters(), 1e-4, fused=True, capturable=setting.on_gpu)
    called: Any = torch.compile(net) if compiled else net

    def step(x: Tensor, target: Tensor) -> None:
        if x.dim() == 4:
            x = x.contiguous(memory_format=layout)
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=setting.precision == "bfloat16"):
            logits = called(x)
        F.cross_entropy(logits.float(), target).backward()
        optimizer.step()

    return step


def plain_steps(setting: Setting) -> dict[str, Step]:
    """Return training steps in plain PyTorch, eager and compiled, in each memory format.

    A fully connected net has one memory format, and other nets have two. If no compiler is installed, there are no
    compiled steps.
    """
    torch.compiler.reset()  # restart PyTorch's count of compilations, which has a limit
    has_compiler = setting.on_gpu or shutil.which("g++") is not None
    layouts = {"plain": False}
    if not setting.is_fc:
        layouts["plain channels-last"] = True
    steps: dict[str, Step] = {}
    for name, channels_last in layouts.items():
        steps[name] = plain(setting, channels_last, compiled=False)
        if has_compiler:
            steps[f"{name} compiled"] = plain(setting, channels_last, compiled=True)
    return steps


def captured_plain(step: Step, device: torch.device) -> Step:
    """Return a step in plain PyTorch as one CUDA graph.

    Each batch is copied into the graph's input, as in the engine.
    """
    trainer: Any = SimpleNamespace(optimizers=(), step=lambda x, target, align: step(x, target))
    return CapturedStep(trainer, BATCH, device)


class PublishedLas:
    """LAS as in published code.

    Images are converted one by one: torchvision's transforms turn each picture into a tensor, and a `DataLoader` makes
    batches. The local module of h is a convolution if a convolution reads h. Each step has two forward passes. The
    first pass trains the local modules. The second pass trains the weights. In both passes, every h with a local module
    is detached before the next block.
    """

    def __init__(self, net: BlockNet, pictures: list[tuple[Any, int]], batch: int) -> None:
        from torchvision import transforms

        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize([0.5], [0.25])]
        )
        samples: Any = pictures
        self.data = DataLoader(samples, batch, shuffle=True, collate_fn=self.batch)
        self.blocks, self.head = list(net.blocks), net.head
        self.device = next(net.parameters()).device
        modules = [local_module(net, i) for i in range(1, net.depth - 1)]
        self.locals = nn.ModuleList(modules).to(self.device)
        self.optimizer = torch.optim.Adam(net.parameters(), 1e-4)
        self.local_optimizer = torch.optim.Adam(self.locals.parameters(), 1e-4)

    def batch(self, samples: list[tuple[Any, int]]) -> tuple[Tensor, Tensor]:
        """Return pictures and labels as tensors."""
        images = [self.transform(picture) for picture, _ in samples]
        return torch.stack(images), torch.tensor([label for _, label in samples])

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
            difference = predicted(module, h) - logits
            loss = 0.5 * difference.square().sum() / len(x)
            loss.backward()
        self.local_optimizer.step()

        self.optimizer.zero_grad()
        *outputs, logits = self.pass_through(x)
        logits.retain_grad()
        F.cross_entropy(logits, target).backward()
        for module, h in zip(self.locals, outputs, strict=False):
            assert logits.grad is not None, "logits.grad was retained"
            h.backward(sent_back(module, logits.grad, h))
        self.optimizer.step()

    def pass_through(self, x: Tensor) -> Iterator[Tensor]:
        """Yield h_1 … h_{L-1} and the logits. If h_i has a local module, the next block reads a detached h_i."""
        for i, block in enumerate(self.blocks):
            h = block(x)
            yield h
            x = h.detach() if i < len(self.locals) else h
        yield self.head(x)


def local_module(net: BlockNet, i: int) -> nn.Module:
    """Return a new local module for h_i. It is like the layer that reads h_i, but has an output for each class."""
    reader = net.weight_layers(i)[0]
    if isinstance(reader, nn.Linear):
        return nn.Linear(reader.in_features, CLASSES, bias=False)
    size, stride, padding = reader.kernel_size[0], reader.stride[0], int(reader.padding[0])
    return nn.Conv2d(reader.in_channels, CLASSES, size, stride, padding, bias=False)


def predicted(module: nn.Module, h: Tensor) -> Tensor:
    """Return the output of a local module. The output of a convolution is averaged over all positions."""
    y = module(h)
    return y.mean((2, 3)) if y.dim() == 4 else y


@torch.no_grad()
def sent_back(module: Any, error: Tensor, h: Tensor) -> Tensor:
    """Apply the transpose of the local module to the error. The result has the shape of h.

    For a convolution, the error is first repeated at every position of the module's output.
    """
    if isinstance(module, nn.Linear):
        return error @ module.weight
    size, stride, padding = module.kernel_size[0], module.stride[0], module.padding[0]
    outputs, rests = [], []
    for length in h.shape[2:]:
        output, rest = divmod(length + 2 * padding - size, stride)
        outputs.append(output + 1)
        rests.append(rest)
    planes = error[:, :, None, None].expand(-1, -1, *outputs)
    return F.conv_transpose2d(planes, module.weight, None, stride, padding, output_padding=rests)
