"""Identify the origin of a result: versions, commit, the user's own code, and the device."""

import hashlib
import logging
import platform
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import distribution, packages_distributions, version
from pathlib import Path
from typing import Any

import torch

from dfl_experiments import __version__
from dfl_experiments.configuration.components import PACKAGE, Component

log = logging.getLogger(__name__)
# packages that `versions` and `git_commit` record
KNOWN = {PACKAGE, "torch", *sys.stdlib_module_names}


def versions() -> dict[str, str]:
    """Return the versions of this package, of Python and of the packages that results depend on."""
    names = ("torch", "torchvision", "numpy", "hydra-core")
    return {
        "dfl-experiments": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def git_commit() -> str | None:
    """Return the checkout's commit, with "+changes" if files were changed; None for an installed package."""
    package = Path(__file__).resolve().parent.parent
    if not (package.parent / ".git").exists():
        return None
    git = ["git", "-C", str(package)]
    quietly: Any = {"stderr": subprocess.DEVNULL, "timeout": 10}
    try:
        commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True, **quietly)
        status = [*git, "status", "--porcelain", "--", ".", "../conf"]
        changes = subprocess.check_output(status, text=True, **quietly)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("+changes" if changes.strip() else "")


def code_of(components: Mapping[str, Component]) -> dict[str, str]:
    """Return the identity of the user's own code for each configuration group. Code in a notebook is left out."""
    codes = {
        group: component_code(component.path, component.target)
        for group, component in components.items()
    }
    return {group: code for group, code in codes.items() if code}


@cache  # a process keeps the code that it has loaded, even if the files change
def component_code(path: str, target: object) -> str:
    """Identify the packages that define a component and its base classes, except the packages in `KNOWN`."""
    bases = getattr(target, "__mro__", [target])
    modules = [path.rpartition(".")[0], *(base.__module__ for base in bases)]
    packages = {module.partition(".")[0]: module for module in modules}
    return ", ".join(package_code(name, packages[name]) for name in sorted(packages.keys() - KNOWN))


def package_code(package: str, module: str) -> str:
    """Identify a package by its version if it is installed, otherwise by the SHA-256 of its `.py` files.

    An editable installation counts as not installed. The SHA-256 is shortened, as in "my_rules 3f9c0a1b2c3d".

    module: a loaded module of the package.
    """
    module_file = getattr(sys.modules[module], "__file__", None)
    for name in packages_distributions().get(package, ()):
        installed = distribution(name)
        files = [str(installed.locate_file(file)) for file in installed.files or ()]
        if installed.read_text("RECORD") and module_file in files:
            return f"{installed.name} {installed.version}"
    folders = getattr(sys.modules[package], "__path__", ())
    sources: list[Path] = []
    for folder in folders:
        sources += Path(folder).rglob("[!.]*.py")
    sources.sort()
    if not sources:
        sources = [Path(module_file or "")]
    if not sources[0].is_file():
        log.warning("%s: has no file, so a change of its code cannot be noticed", module)
        return ""
    content = b"".join(file.read_bytes() for file in sources)
    return f"{package} {hashlib.sha256(content).hexdigest()[:12]}"


def device_name(device: torch.device) -> str:
    """Return a readable name of a device: its model, and for a CPU the number of threads."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"
