"""What a run may use of the machine: its device, the CPU threads, the memory, and the random numbers it begins with."""

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
# what determinism asks of cuBLAS, which looks at it once, when it begins
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def choose_device(name: str) -> torch.device:
    """auto is the first GPU, or else the CPU. Raises `UserError` for a device that this machine does not have."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    here += ["mps"] * torch.backends.mps.is_available()
    name = "cuda:0" if name == "cuda" else name
    if name not in here:
        raise UserError(f"device={name}: not on this machine; there are {', '.join(here)}")
    return torch.device(name)


def device_of_job(device: str, number: int) -> str:
    """The device of a sweep's job: where there are several GPUs, `auto` takes them in turn."""
    count = torch.cuda.device_count()
    return f"cuda:{number % count}" if device == "auto" and count > 1 else device


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of_job(at_once: int) -> int:
    """The CPU threads of each of so many jobs at once: its part of the cores (joblib counts down from -1: one each)."""
    jobs = at_once if at_once > 0 else max(1, cores() + 1 + at_once)
    return max(1, min(ALL_THREADS, cores() // jobs))


def layout_of(name: MemoryFormat, net: nn.Module, device: torch.device, precision: Precision) -> torch.memory_format:
    """auto is what was measured to be faster for such a net; contiguous where there is no convolution.

    On CPUs channels-last takes 0.8 to 0.9 of the time with Conv3's 5×5 kernels; with ResNet18's 3×3 ones 0.9 to 1.0 in
    bfloat16, and in float32 0.9 to 1.2, by the processor. On a GPU, where nothing has been measured, PyTorch's own
    advice: channels-last for what is not float32.
    """
    kernels = [module.kernel_size[0] for module in net.modules() if isinstance(module, nn.Conv2d)]
    if not kernels:
        return torch.contiguous_format
    wins = precision != "float32" or (device.type == "cpu" and min(kernels) > 3)
    is_last = wins and device.type != "mps" if name == "auto" else name == "channels_last"
    return torch.channels_last if is_last else torch.contiguous_format


@contextlib.contextmanager
def usual_torch() -> Iterator[None]:
    """Compute in float32 and with gradients, whatever the caller has set for work of its own."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(before)


def set_up(device: torch.device, precision: Precision, seed: int, deterministic: bool, threads: int) -> None:
    """Leave nothing behind of an earlier job in this process: the same seed gives what it gives alone.

    TF32 products and convolutions are allowed or forbidden: PyTorch's own default is to convolve with them. Raises
    `UserError` for tf32 where there is none.
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
    """One warning where the processor is known to have no instructions for bfloat16."""
    with contextlib.suppress(OSError):
        flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
        if flags and not flags & {"amx_bf16", "avx512_bf16"}:
            log.warning("precision=bfloat16: this processor has no instructions for it, and is faster with float32")


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
