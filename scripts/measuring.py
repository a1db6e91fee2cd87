"""Measure times and memory for the benchmark: of contenders that take turns, and of whole processes."""

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfl_experiments.configuration.schema import Configuration
from dfl_experiments.engine.learner import Learner
from dfl_experiments.engine.losses import LOSSES
from dfl_experiments.running.device import layout_of

CPU = torch.device("cpu")


def medians(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    of: Callable[[list[float]], float] = statistics.median,
    calls: int = 10,
) -> dict[str, float]:
    """Return the seconds per call of each contender. The contenders take turns.

    of: function that summarises a contender's times.
    calls: number of calls that a GPU gets at once, as in training.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    on_gpu = device.type == "cuda"
    for index in range(rounds + 2):
        for name, call in contenders.items():
            seconds = gpu_seconds(call, calls) if on_gpu else cpu_seconds(call)
            if index >= 2:  # after two rounds of warm-up
                times[name].append(seconds)
    return {name: of(values) for name, values in times.items()}


def cpu_seconds(call: Callable[[], object]) -> float:
    """Return the seconds of a call; with one thread, its CPU time, which other load does not change."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start


def gpu_seconds(call: Callable[[], object], calls: int) -> float:
    """Return the mean seconds of several calls in a row, by the GPU's events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def learner_of(cfg: Configuration, shape: tuple[int, ...], classes: int, device: torch.device = CPU) -> Learner:
    """Return the learner that a run with this configuration has.

    shape: of one image. classes: their number.
    """
    torch.manual_seed(0)
    loss, components, precision = LOSSES[cfg.settings.loss], cfg.components, cfg.settings.precision
    net = components["model"].build(input_shape=shape, num_classes=classes)
    method = components["method"].build(net=net, num_classes=classes, loss=loss)
    layout = layout_of(cfg.settings.memory_format, net, device, precision)
    net, method = (module.to(device=device, memory_format=layout) for module in (net, method))
    return Learner(net, method, loss, components["optimizer"].build(), precision)


def random_batch(shape: tuple[int, ...], classes: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return random images and labels, whose content does not change the time."""
    return torch.randn(size, *shape, device=device), torch.randint(classes, (size,), device=device)


class Live(TorchDispatchMode):
    """A context that counts the bytes of the live tensors made inside it, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self.seen.add(tensor.untyped_storage())  # it existed before, and so did the storage of its views
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self.free, storage.nbytes())
        return result

    def free(self, size: int) -> None:
        """Subtract the size of a storage that is freed."""
        self.bytes -= size


def peak_mb(call: Callable[[], object], device: torch.device) -> float:
    """Return the megabytes that a call adds at its peak: of tensors on a CPU, of allocated memory on a GPU."""
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


def sweep_times(points: int) -> dict[str, float]:
    """Return for a sweep on the digits the seconds to its first result, seconds per point, and memory per point.

    The memory per point is the difference in peak size between a sweep of a tenth of the points and one of all.
    """
    seeds = [f"seed=range({count})" for count in (max(1, points // 10), points)]
    one_step = ("limit=64", "smoke=64", "epochs=1", "threads=1", "tracking=disabled", "checkpoint.keep=false")
    sizes, ends = [], []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "dfl_experiments.train", "--multirun", "sweep=s", seed, *one_step]
            begun = time.time()
            process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise SystemExit("the sweep did not finish")
            sizes.append(usage.ru_maxrss / 1024)
            ends = sorted(path.stat().st_mtime - begun for path in Path(folder).rglob("result.json"))
    gaps = [later - earlier for earlier, later in itertools.pairwise(ends)]
    part = max(1, len(gaps) // 10)
    return {
        "s to the first result": ends[0],
        "s a point, first tenth": statistics.median(gaps[:part]),
        "s a point, last tenth": statistics.median(gaps[-part:]),
        "MB a point": (sizes[1] - sizes[0]) / (points - max(1, points // 10)),
    }
