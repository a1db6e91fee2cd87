"""Set up the machine for a run: device, CPU threads, memory, and random seeds."""

import contextlib
import ctypes
import logging
import os
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.errors import UserError
from dfl_experiments.ranges import MemoryFormat, Precision

log = logging.getLogger(__name__)

# PyTorch's default number of threads, or OMP_NUM_THREADS if set
ALL_THREADS = torch.get_num_threads()
# cuBLAS is deterministic only with this variable. It reads the variable once, when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def choose_device(name: str) -> torch.device:
    """Return a device by name. `auto` is the first GPU, or the CPU if there is no GPU.

    Raises `UserError` if this machine does not have the device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        devices.append("mps")
    name = "cuda:0" if name == "cuda" else name
    if name not in devices:
        raise UserError(f"device={name}: not on this machine; available: {', '.join(devices)}")
    return torch.device(name)


def device_of_job(device: str, number: int) -> str:
    """Return the device of a sweep's job. If there are several GPUs, `auto` assigns them to the jobs in turn."""
    count = torch.cuda.device_count()
    return f"cuda:{number % count}" if device == "auto" and count > 1 else device


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of_job(at_once: int) -> int:
    """Return the number of CPU threads of each job. The jobs share the cores equally.

    at_once: number of jobs that run at once. -1 means one job per core, and -2 means one job less, as in joblib.
    """
    jobs = at_once if at_once > 0 else max(1, cores() + 1 + at_once)
    return max(1, min(ALL_THREADS, cores() // jobs))


def layout_of(
    name: MemoryFormat, net: nn.Module, device: torch.device, precision: Precision
) -> torch.memory_format:
    """Return the memory format of images. `auto` chooses the format that is expected to be faster.

    Networks without convolutions always have the contiguous format. On CPUs, channels-last takes 0.8 to 0.9 of the
    time for 5×5 kernels, 0.9 to 1.0 for 3×3 kernels in bfloat16, and 0.9 to 1.2 for 3×3 kernels in float32. GPUs were
    not measured: `auto` follows PyTorch's recommendation, which is channels-last, but not in float32.
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
    """Set float32 as the default type and the CPU as the default device, and enable gradients inside the block.

    Afterwards, restore the random states and all settings that `set_up` changes.
    """
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    tf32 = matmul.allow_tf32, cudnn.allow_tf32
    benchmark = cudnn.benchmark
    python_state, numpy_state = random.getstate(), np.random.get_state()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    # a device as a context makes each call of PyTorch slower, so it is set only if it is needed
    is_cpu = torch.get_default_device().type == "cpu"
    cpu = contextlib.nullcontext() if is_cpu else torch.device("cpu")
    torch.set_default_dtype(torch.float32)
    try:
        with cpu, torch.random.fork_rng(gpus), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        matmul.allow_tf32, cudnn.allow_tf32 = tf32
        cudnn.benchmark = benchmark
        set_deterministic(is_deterministic)


def set_deterministic(is_deterministic: bool) -> None:
    """Choose whether PyTorch refuses operators that are not deterministic."""
    # Call PyTorch only if the value changes. The call takes a second, because PyTorch then imports its compiler.
    if torch.are_deterministic_algorithms_enabled() != is_deterministic:
        torch.use_deterministic_algorithms(is_deterministic)


def set_up(
    device: torch.device, precision: Precision, seed: int, deterministic: bool, threads: int
) -> None:
    """Set PyTorch's global options and the random seeds. Earlier runs in this process then have no influence.

    TF32 is set for matrix products and for convolutions, because PyTorch's defaults for them differ.
    Raises `UserError` for tf32 on a device without TF32.
    """
    if precision == "tf32" and device.type != "cuda":
        raise UserError(
            f"precision=tf32: needs a GPU; device={device.type} has float32 and bfloat16"
        )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu":
        reuse_memory()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    set_deterministic(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


def processor_flags() -> set[str]:
    """Return the names of the processor's features, as Linux lists them; elsewhere the set is empty."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return set(text.partition("flags")[2].partition("\n")[0].split())


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
    hooks = [
        layer.register_forward_pre_hook(partial(visit, name)) for name, layer in layers.items()
    ]
    net.probe()
    for hook in hooks:
        hook.remove()
    if wrong:
        problem = f"PyTorch computes a wrong gradient for {wrong[0]}, a strided convolution whose input has one pixel"
        raise UserError(
            f"precision=bfloat16: on this processor (AMX) {problem}; use float32 or larger images"
        )


def warn_of_slow_bfloat16() -> None:
    """Log a warning if this processor computes bfloat16 more slowly than float32."""
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        log.warning(
            "precision=bfloat16: this processor has no AVX-512, so float32 is faster (10 times in our test)"
        )


def reuse_memory() -> None:
    """Let glibc keep freed memory for the next step instead of returning it to the system.

    By default, the system maps, zeroes and unmaps memory in each step. This takes a quarter of the time of a step of
    the 3×4096 network. On systems without glibc, nothing is changed.
    """
    mmap_threshold, trim_threshold = -3, -1  # <malloc.h>
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # some systems refuse 2**30 and only accept 2**25
        if libc.mallopt(mmap_threshold, 2**30) or libc.mallopt(mmap_threshold, 2**25):
            libc.mallopt(trim_threshold, 2**31 - 1)
