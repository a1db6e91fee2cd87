"""What a configuration names, built and on its device; one epoch of it, and its evaluation."""

import contextlib
import ctypes
import os
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from dfl_experiments.alignment import QUANTITIES
from dfl_experiments.blocknet import BlockNet
from dfl_experiments.capture import CapturedStep
from dfl_experiments.config import UserError, build
from dfl_experiments.data.batches import Batches, EvaluationBatches, Normalise, resident, split
from dfl_experiments.data.datasets import load
from dfl_experiments.learning import Learner, Precision
from dfl_experiments.losses import LOSSES
from dfl_experiments.optimizers import Optimizer
from dfl_experiments.progress import Progress
from dfl_experiments.settings import Settings
from dfl_experiments.sharing import ALL_THREADS

# what determinism asks of cuBLAS, which looks at it once, when it begins
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def resolve_device(name: str) -> torch.device:
    """auto is the first GPU, or else the CPU. Raises `UserError` for a device that this machine does not have."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    here += ["mps"] * torch.backends.mps.is_available()
    name = "cuda:0" if name == "cuda" else name
    if name not in here:
        raise UserError(f"device={name}: not on this machine; there are {', '.join(here)}")
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def clean_random_state(seed: int, deterministic: bool) -> None:
    """Leave nothing behind of an earlier job in this process: the same seed gives what it gives alone."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


def set_precision(precision: Precision, device: torch.device) -> None:
    """Allow TF32 products and convolutions, or forbid them: PyTorch's own default is to convolve with them.

    Raises `UserError` for tf32 where there is none.
    """
    if precision == "tf32" and device.type != "cuda":
        raise UserError(f"precision=tf32: {device.type} has none; only a GPU does. There are float32, bfloat16")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def reuse_memory() -> None:
    """Let glibc keep the large blocks that one step frees for the next, in place of returning them to the system.

    On a CPU a step's gradients and activations are otherwise mapped, zeroed and unmapped page by page every time, a
    quarter of a step of the 3×4096 net. Elsewhere than with glibc nothing is done.
    """
    mmap_threshold, trim_threshold = -3, -1  # <malloc.h>
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # some systems allow no more than the second
        if libc.mallopt(mmap_threshold, 2**30) or libc.mallopt(mmap_threshold, 2**25):
            libc.mallopt(trim_threshold, 2**31 - 1)


class Experiment:
    """The data, the network, the method and the optimizers that a configuration names, on their device.

    threads: of the CPU, unless the settings name a number.
    """

    def __init__(self, cfg: DictConfig, settings: Settings, threads: int = ALL_THREADS) -> None:
        self.settings = settings
        self.device = resolve_device(settings.device)
        set_precision(settings.precision, self.device)
        torch.set_num_threads(settings.threads or threads)
        if self.device.type == "cpu":
            reuse_memory()
        clean_random_state(settings.seed, settings.deterministic)
        source = build(cfg.dataset.source, "dataset.source")
        arrays = load(cfg.dataset.name, source, Path(settings.data_dir))
        indices = split(len(arrays.train_labels), settings.validation_fraction, settings.seed)
        train, held_out = (index.numpy() for index in indices)
        few = settings.smoke
        train, held_out = train[:few][: settings.limit], held_out[:few]
        normalise = Normalise(list(cfg.dataset.mean), list(cfg.dataset.std))
        images, labels = arrays.train_images, arrays.train_labels
        device = self.device
        self.validation = EvaluationBatches(*resident(images[held_out], labels[held_out], device), normalise, device)
        test = resident(arrays.test_images[:few], arrays.test_labels[:few], device)
        self.test = EvaluationBatches(*test, normalise, device)
        self.batches = Batches(
            *resident(images[train], labels[train], self.device),
            normalise,
            build(cfg.augmentation, "augmentation"),
            settings.batch_size,
            settings.seed,
            self.device,
        )
        self.train_size = len(train)
        loss = LOSSES[settings.loss]
        # built on the CPU: a seed means the same weights on every device, and the same W for every method
        net = build(cfg.model, "model", input_shape=arrays.shape, num_classes=arrays.num_classes)
        method = build(cfg.method, "method", net=net, num_classes=arrays.num_classes, loss=loss)
        self.check_batches(net)
        self.schedule: Optimizer = build(cfg.optimizer, "optimizer")
        self.learner = Learner(net.to(self.device), method.to(self.device), loss, self.schedule, settings.precision)
        self.step: Callable[[Tensor, Tensor, bool], Tensor] = self.learner.row
        if self.device.type == "cuda" and settings.cuda_graph:
            self.step = CapturedStep(self.learner, settings.batch_size, self.device)

    def check_batches(self, net: BlockNet) -> None:
        """Raise `UserError` where batch normalisation would have a single number per channel to normalise."""
        size = self.settings.batch_size
        if (self.train_size % size or size) > 1 or all(plane > 1 for plane in net.normalised_planes()):
            return
        raise UserError(
            f"batch_size={size}: of {self.train_size} training images the last batch holds one, which batch "
            "normalisation cannot work with on planes of one pixel; choose another batch_size or limit"
        )

    def train_epoch(
        self,
        epoch: int,
        progress: Progress,
        done: Tensor | None = None,
        after_step: Callable[[Tensor, float], None] | None = None,
    ) -> tuple[Tensor, float]:
        """One pass over the training images, without a look at the device's values before its end.

        done: the rows of the batches that need no doing again. after_step: called with the rows so far and the seconds.
        Returns, on the CPU, the row of every iteration (iterations, 2 + 5·(L-1)), as `Learner.row` has it; and the
        seconds that this call took.
        """
        learner, every = self.learner, self.settings.alignment.every
        learner.set_lr(self.schedule.lr_at(epoch, self.settings.epochs))
        learner.net.train()
        columns = 2 + (learner.net.depth - 1) * len(QUANTITIES)
        rows = torch.empty(len(self.batches), columns, device=self.device)
        start_batch = 0 if done is None else len(done)
        if done is not None:
            rows[:start_batch] = done
        first = (epoch - 1) * len(self.batches)
        progress.begin(epoch, start_batch)
        start = time.perf_counter()
        for index, (x, target) in enumerate(self.batches.epoch(epoch, start_batch), start_batch):
            rows[index] = self.step(x, target, every > 0 and (first + index) % every == 0)
            progress.step(len(target), rows[index])
            if after_step is not None:
                after_step(rows[: index + 1], time.perf_counter() - start)
        rows = rows.cpu()
        return rows, time.perf_counter() - start

    @torch.no_grad()
    def evaluate(
        self, batches: Iterable[tuple[Tensor, Tensor]], check: Callable[[], None] | None = None
    ) -> tuple[float, float]:
        """Mean loss and accuracy over a set of images. check: called before every batch."""
        net = self.learner.net.eval()
        sums = []
        count = 0
        for x, target in batches:
            if check is not None:
                check()
            with self.learner.autocast():
                logits = net(x)
            value, _ = self.learner.value_and_error(logits, target)
            sums.append(torch.stack([value * len(target), (logits.argmax(1) == target).sum()]))
            count += len(target)
        # summed on the CPU: not every device has float64
        summed, correct = torch.stack(sums).cpu().double().sum(0).tolist()
        return summed / count, correct / count
