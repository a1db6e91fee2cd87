"""The machine as a run uses it: device, CPU threads, memory, and the seed of the random numbers."""

import contextlib
import ctypes
import logging
import os
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dfl_experiments.errors import UserError
from dfl_experiments.ranges import MemoryFormat, Precision

log = logging.getLogger(__name__)
ALL_THREADS = torch.get_num_threads()  # as PyTorch chooses, or OMP_NUM_THREADS
# cuBLAS is deterministic only with this; it reads the variable once, at its start
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def choose_device(name: str) -> torch.device:
    """Return a device by name; `auto` is the first GPU, else the CPU. Raises `UserError` for a missing device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        devices.append("mps")
    name = "cuda:0" if name == "cuda" else name
    if name not in devices:
        raise UserError(f"device={name}: not on this machine; there are {', '.join(devices)}")
    return torch.device(name)


def device_of_job(device: str, number: int) -> str:
    """Return the device of a sweep's job: with several GPUs, `auto` assigns them to the jobs in turn."""
    count = torch.cuda.device_count()
    return f"cuda:{number % count}" if device == "auto" and count > 1 else device


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of_job(at_once: int) -> int:
    """Return the CPU threads of each job, an equal share of the cores.

    at_once: number of jobs at once; as in joblib, -1 is one per core, -2 one per core but one.
    """
    jobs = at_once if at_once > 0 else max(1, cores() + 1 + at_once)
    return max(1, min(ALL_THREADS, cores() // jobs))


def layout_of(name: MemoryFormat, net: nn.Module, device: torch.device, precision: Precision) -> torch.memory_format:
    """Return the memory format of images; `auto` is the faster one as measured, contiguous without convolutions.

    On CPUs channels-last takes 0.8 to 0.9 of the time with Conv3's 5×5 kernels. With ResNet18's 3×3 kernels it takes
    0.9 to 1.0 in bfloat16, and 0.9 to 1.2 in float32, depending on the processor. On GPUs nothing was measured: PyTorch
    recommends channels-last for all precisions but float32.
    """
    kernels = [module.kernel_size[0] for module in net.modules() if isinstance(module, nn.Conv2d)]
    if not kernels:
        return torch.contiguous_format
    is_last = name == "channels_last"
    if name == "auto":
        is_faster = precision != "float32" or (device.type == "cpu" and min(kernels) > 3)
        is_last = is_faster and device.type != "mps"
    return torch.channels_last if is_last else torch.contiguous_format


@contextlib.contextmanager
def usual_torch() -> Iterator[None]:
    """Compute in float32 and with gradients inside the block, whatever the caller has set."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(before)


def set_up(device: torch.device, precision: Precision, seed: int, deterministic: bool, threads: int) -> None:
    """Set PyTorch's global options, so that a seed gives the same bits whatever ran in this process before.

    TF32 is set for products and for convolutions: by default PyTorch allows it for convolutions.
    Raises `UserError` for tf32 on a device without it.
    """
    if precision == "tf32" and device.type != "cuda":
        raise UserError(f"precision=tf32: {device.type} has none; only a GPU does. There are float32, bfloat16")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu":
        reuse_memory()
        if precision == "bfloat16":
            warn_of_emulation()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # to set it imports the compiler: a second
        torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


@cache
def warn_of_emulation() -> None:
    """Warn once if the processor has no instructions for bfloat16."""
    with contextlib.suppress(OSError):
        flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
        if flags and not flags & {"amx_bf16", "avx512_bf16"}:
            log.warning("precision=bfloat16: this processor has no instructions for it, and is faster with float32")


def reuse_memory() -> None:
    """Let glibc keep large freed blocks for the next step instead of returning them to the system.

    Otherwise a step's gradients and activations are mapped, zeroed and unmapped each time: a quarter of a step of the
    3×4096 net. Without glibc nothing is done.
    """
    mmap_threshold, trim_threshold = -3, -1  # <malloc.h>
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # some systems allow the smaller value only
        if libc.mallopt(mmap_threshold, 2**30) or libc.mallopt(mmap_threshold, 2**25):
            libc.mallopt(trim_threshold, 2**31 - 1)
