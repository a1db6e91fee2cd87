"""Measure the time and memory of calls, for the benchmark."""

import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfl_experiments.configuration.schema import Configuration
from dfl_experiments.engine.learner import Learner
from dfl_experiments.engine.losses import LOSSES
from dfl_experiments.running.device import layout_of

WARM_UP = 2  # number of first rounds that do not count
Call = Callable[[], object]
Calls = dict[str, Call]
Numbers = dict[str, float]


def medians(
    contenders: Mapping[str, Call],
    rounds: int,
    device: torch.device,
    calls: int = 10,
) -> Numbers:
    """Return the median seconds per call of each contender. In every round, all contenders are called in turn.

    calls: on a GPU, how often each round calls each contender. These calls do not wait for results, as in training.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + WARM_UP):
        for name, call in contenders.items():
            seconds = gpu_seconds(call, calls) if device.type == "cuda" else cpu_seconds(call)
            times[name].append(seconds)
    return {name: statistics.median(values[WARM_UP:]) for name, values in times.items()}


def cpu_seconds(call: Call) -> float:
    """Return the seconds of a call.

    With one thread, CPU time is measured, because other programs do not change it. With more threads, wall time is
    measured.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start


def gpu_seconds(call: Call, calls: int) -> float:
    """Return the mean seconds of several calls in a row, measured with CUDA events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def learner_of(
    cfg: Configuration, shape: tuple[int, ...], classes: int, device: torch.device
) -> Learner:
    """Return the learner that a run with this configuration uses.

    shape: shape of one image. classes: number of classes.
    """
    torch.manual_seed(0)
    loss, precision = LOSSES[cfg.settings.loss], cfg.settings.precision
    net = cfg.components["model"].build(input_shape=shape, num_classes=classes)
    method = cfg.components["method"].build(net=net, num_classes=classes, loss=loss)
    optimizer = cfg.components["optimizer"].build()
    layout = layout_of(cfg.settings.memory_format, net, device, precision)
    net = net.to(device=device, memory_format=layout)
    method = method.to(device=device, memory_format=layout)
    return Learner(net, method, loss, optimizer, precision)


def random_batch(
    shape: tuple[int, ...], classes: int, size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return random images and labels. Their content does not change the time."""
    return torch.randn(size, *shape, device=device), torch.randint(classes, (size,), device=device)


class Live(TorchDispatchMode):
    """Count the bytes of the tensors that are created in this context.

    `bytes`: number of bytes in use now. `peak`: largest value of `bytes`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                # tensors from outside and their views do not count
                self.seen.add(tensor.untyped_storage())
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        """Add the size of a new storage. It is subtracted when the storage is freed."""
        if storage not in self.seen:
            self.seen.add(storage)
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.free, storage.nbytes())

    def free(self, size: int) -> None:
        """Subtract the size of a storage that is freed."""
        self.bytes -= size


def peak_mb(call: Call, device: torch.device) -> float:
    """Return the peak memory of a call in MB. On a CPU only tensors count. On a GPU all allocated memory counts."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    with Live() as live:
        call()
    return live.peak / 1e6
