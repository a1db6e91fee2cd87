"""What one of several jobs that run at once may use of the machine."""

import os

import torch

ALL_THREADS = torch.get_num_threads()  # as PyTorch chooses, or OMP_NUM_THREADS


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_for(at_once: int) -> int:
    """The CPU threads of each of so many jobs at once: its part of the cores (joblib counts down from -1: one each)."""
    jobs = at_once if at_once > 0 else max(1, cores() + 1 + at_once)
    return max(1, min(ALL_THREADS, cores() // jobs))


def device_of(device: str, number: int) -> str:
    """The device of a sweep's job: where there are several GPUs, `auto` takes them in turn."""
    count = torch.cuda.device_count()
    return f"cuda:{number % count}" if device == "auto" and count > 1 else device
