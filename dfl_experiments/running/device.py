"""Set up the machine for a run: device, CPU threads, memory, and random seeds."""

import contextlib
import ctypes
import logging
import os
import random
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.errors import UserError
from dfl_experiments.ranges import MemoryFormat, Precision

log = logging.getLogger(__name__)
ALL_THREADS = torch.get_num_threads()  # PyTorch's default number of threads, or OMP_NUM_THREADS if set
# cuBLAS is deterministic only with this variable, which it reads once when it starts
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
    """Return the device of a sweep's job. If there are several GPUs, `auto` assigns them to the jobs in turn."""
    count = torch.cuda.device_count()
    return f"cuda:{number % count}" if device == "auto" and count > 1 else device


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of_job(at_once: int) -> int:
    """Return the CPU threads of each job, an equal share of the cores.

    at_once: number of jobs at once; as in joblib, -1 is one job per core, and -2 leaves one core without a job.
    """
    jobs = at_once if at_once > 0 else max(1, cores() + 1 + at_once)
    return max(1, min(ALL_THREADS, cores() // jobs))


def layout_of(name: MemoryFormat, net: nn.Module, device: torch.device, precision: Precision) -> torch.memory_format:
    """Return the memory format of images. `auto` is the format that was faster in measurements.

    On CPUs, channels-last with Conv3's 5×5 kernels takes 0.8 to 0.9 times as long as contiguous. With ResNet18's 3×3
    kernels, the factor is 0.9 to 1.0 in bfloat16, and 0.9 to 1.2 in float32, depending on the processor. Nothing was
    measured on GPUs; for GPUs, PyTorch recommends channels-last in all precisions except float32. Networks without
    convolutions always have the contiguous format.
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
    """Make float32 the default type and enable gradients inside the block, whatever the caller has set."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(before)


def set_up(device: torch.device, precision: Precision, seed: int, deterministic: bool, threads: int) -> None:
    """Set PyTorch's global options, so that a seed gives the same bits whatever ran in this process before.

    TF32 is switched on or off for both matrix products and convolutions, which have different defaults in PyTorch.
    Raises `UserError` for tf32 on a device without TF32.
    """
    if precision == "tf32" and device.type != "cuda":
        raise UserError(f"precision=tf32: needs a GPU; device={device.type} has float32 and bfloat16")
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
    # set the option only if it changes: this takes a second, because PyTorch then imports its compiler
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


@cache
def processor_flags() -> set[str]:
    """Return the names of the processor's features, as Linux lists them; elsewhere the set is empty."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return set(text.partition("flags")[2].partition("\n")[0].split())


@cache
def warn_of_emulation() -> None:
    """Warn once if the processor has no instructions for bfloat16."""
    flags = processor_flags()
    if flags and not flags & {"amx_bf16", "avx512_bf16"}:
        log.warning("precision=bfloat16: this processor has no instructions for bfloat16; float32 is faster")


def refuse_wrong_gradients(net: BlockNet) -> None:
    """Raise `UserError` if PyTorch computes wrong bfloat16 gradients for a convolution of the net on this processor.

    On processors with AMX, oneDNN (PyTorch 2.14.1) returns wrong weight gradients for a convolution with a kernel
    larger than 1×1 and a stride larger than 1 if its input has one pixel. 24 of 24 such shapes were wrong, and none of
    264 others.
    """
    if "amx_bf16" not in processor_flags():
        return
    wrong: list[str] = []

    def visit(name: str, layer: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].shape[-2:] == (1, 1) and max(layer.stride) > 1 and max(layer.kernel_size) > 1:
            wrong.append(name)

    layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d)}
    hooks = [layer.register_forward_pre_hook(partial(visit, name)) for name, layer in layers.items()]
    net.probe()
    for hook in hooks:
        hook.remove()
    if wrong:
        problem = f"PyTorch computes a wrong gradient for {wrong[0]}, a strided convolution whose input has one pixel"
        raise UserError(f"precision=bfloat16: on this processor (AMX) {problem}; use float32 or larger images")


def reuse_memory() -> None:
    """Let glibc keep freed memory for the next step instead of returning it to the system.

    Otherwise the system maps, zeroes and unmaps memory in each step, which takes a quarter of a step of the 3×4096 net.
    Without glibc, nothing is changed.
    """
    mmap_threshold, trim_threshold = -3, -1  # <malloc.h>
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # some systems refuse 2**30 and only accept 2**25
        if libc.mallopt(mmap_threshold, 2**30) or libc.mallopt(mmap_threshold, 2**25):
            libc.mallopt(trim_threshold, 2**31 - 1)
