"""Where a number comes from: the versions, the commit, one's own code and the device that made it."""

import hashlib
import logging
import platform
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import distribution, packages_distributions, version
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from dfl_experiments import __version__
from dfl_experiments.configuration.components import PACKAGE, Component

log = logging.getLogger(__name__)
KNOWN = {PACKAGE, "torch", *sys.stdlib_module_names}  # what `versions` and `git_commit` speak for


def versions() -> dict[str, str]:
    """Of this package and of what its numbers depend on."""
    packages = {name: version(name) for name in ("torch", "torchvision", "numpy", "hydra-core")}
    return {"dfl-experiments": __version__, "python": platform.python_version(), **packages}


def git_commit() -> str | None:
    """The commit of the checkout this package runs from, with "+changes" where it differs; None if it is installed."""
    package = Path(__file__).resolve().parent.parent
    if not (package.parent / ".git").exists():
        return None
    git = ["git", "-C", str(package)]
    quietly: Any = {"stderr": subprocess.DEVNULL, "timeout": 10}
    try:
        commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True, **quietly)
        changes = subprocess.check_output([*git, "status", "--porcelain", "--", ".", "../conf"], text=True, **quietly)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("+changes" if changes.strip() else "")


def code_of(components: Mapping[str, Component]) -> dict[str, str]:
    """Identify, by place, the code of the components that are not of this package; a notebook's cannot be."""
    found = {place: component_code(one.path, one.target) for place, one in components.items()}
    return {place: code for place, code in found.items() if code}


@cache  # a process goes on with the code that it has loaded, whatever becomes of the files
def component_code(path: str, target: object) -> str:
    """Identify every top-level package that a component's path and its base classes are in, except `KNOWN` ones."""
    modules = [path.rpartition(".")[0], *(one.__module__ for one in getattr(target, "__mro__", [target]))]
    packages = {module.partition(".")[0]: module for module in modules}
    return ", ".join(package_code(name, packages[name]) for name in sorted(packages.keys() - KNOWN))


def package_code(package: str, module: str) -> str:
    """Identify a package by a SHA-256 of its `.py` files, "my_rules 3f9c0a1b2c3d", or if installed by its version.

    What is installed as editable counts as files. module: one of the package's, as loaded.
    """
    place = getattr(sys.modules[module], "__file__", None)
    for found in map(distribution, packages_distributions().get(package, ())):
        if found.read_text("RECORD") and place in [str(found.locate_file(file)) for file in found.files or ()]:
            return f"{found.name} {found.version}"
    folders = getattr(sys.modules[package], "__path__", ())
    files = sorted(chain(*(Path(folder).rglob("[!.]*.py") for folder in folders))) or [Path(place or "")]
    if not files[0].is_file():
        log.warning("%s: has no file, so a change of its code will not be noticed", module)
        return ""
    content = b"".join(file.read_bytes() for file in files)
    return f"{package} {hashlib.sha256(content).hexdigest()[:12]}"


def device_name(device: torch.device) -> str:
    """What a person calls the device."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"
