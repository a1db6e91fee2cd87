"""Where a number comes from: the versions, the commit and the device that made it."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from dfl_experiments import __version__


def versions() -> dict[str, str]:
    """Of this package and of what its numbers depend on."""
    packages = {name: version(name) for name in ("torch", "torchvision", "numpy", "hydra-core")}
    return {"dfl-experiments": __version__, "python": platform.python_version(), **packages}


def git_commit() -> str | None:
    """The commit of the checkout this package runs from, with "+changes" where it differs; None if it is installed."""
    package = Path(__file__).resolve().parent.parent
    if not (package.parent / ".git").exists():
        return None
    try:
        commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "--", str(package), str(package.parent / "conf")])
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(package), *command], capture_output=True, text=True, check=True, timeout=10
            ).stdout
            for command in commands
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("+changes" if changes.strip() else "")


def device_name(device: torch.device) -> str:
    """What a person calls the device."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"
