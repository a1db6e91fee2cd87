"""Every method × every model that conf/ names, tiny and in float64; and the real data, where there is some."""

import os

# The networks are tiny: several threads would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import logging
import urllib.request
from contextlib import suppress
from functools import cache
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import yaml
from data_helpers import write_folder, write_mnist, write_tiny
from omegaconf import DictConfig, OmegaConf
from report_helpers import finished_point, reported  # noqa: F401

from dfl_experiments.configuration.composition import CONF_DIR, compose, group_options, plain
from dfl_experiments.configuration.schema import Configuration, check
from dfl_experiments.data.sources import Mnist
from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.learner import Learner
from dfl_experiments.engine.losses import LOSSES
from dfl_experiments.engine.method import Method
from dfl_experiments.engine.trace import Trace

THREADS = torch.get_num_threads()  # of OMP_NUM_THREADS
CLASSES, BATCH, SHAPE = 4, 6, (3, 9, 8)


def roundoff(terms: int, dtype: torch.dtype = torch.float64) -> float:
    """Return the largest relative error of a sum of products, in whatever order it is computed: terms · u.

    The error is relative to the size of the terms, not to that of a sum whose terms cancel (Higham, Accuracy and
    Stability of Numerical Algorithms, §3.1). Another processor, shape or memory layout may have another order.

    terms: how many rounded numbers enter the result. dtype: of the results; u is half of its eps.
    """
    return terms * torch.finfo(dtype).eps / 2


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Assert that ‖found - expected‖ ≤ tolerance · ‖expected‖."""
    assert found.shape == expected.shape
    error, size = (found - expected).norm().item(), expected.norm().item()
    assert error <= tolerance * size, (
        f"an error of {error:.2g} in {size:.2g}; {tolerance * size:.2g} is rounding"
    )


# methods and models of one's own, which the same laws are for: their YAML, and the package that they name
OWN_CONF, OWN_PLUGINS = os.environ.get("DFL_CONFIG_DIR"), os.environ.get("DFL_PLUGINS", "")
OWN = (
    [f"hydra.searchpath=[file://{Path(OWN_CONF).absolute()}]", f"plugins=[{OWN_PLUGINS}]"]
    if OWN_CONF
    else []
)


def options(group: str) -> list[str]:
    """The names of a group's files: a new one is tested from the day it is added."""
    own = Path(OWN_CONF, group).glob("*.yaml") if OWN_CONF else ()
    return sorted([*group_options(group), *(path.stem for path in own)])


@cache
def node(group: str, name: str) -> DictConfig:
    """A group's choice as its file has it."""
    own = Path(OWN_CONF or "", group, f"{name}.yaml")
    return OmegaConf.load(own if OWN_CONF and own.exists() else CONF_DIR / group / own.name)


METHODS, MODELS, PROTOCOLS = (options(group) for group in ("method", "model", "protocol"))
# modules that are no chains of blocks have laws of their own, in tests/engine/test_module_net.py
MODELS = [name for name in MODELS if "boundaries" not in node("model", name)]
MODELS.remove("resnet18_cifar")  # resnet18 with another stem
# whose B follows a product of matrices
REFUSED = [("adfa", model) for model in MODELS if not model.startswith("fc")]
PAIRS = [
    (method, model) for method in METHODS for model in MODELS if (method, model) not in REFUSED
]
CROSS = pytest.mark.parametrize(("method", "model"), PAIRS)


@cache
def composed(*overrides: str) -> DictConfig:
    """The composition of everything but the method and the model."""
    return compose([*OWN, *overrides])


@cache
def tiny_configuration(method: str, model: str, *overrides: str) -> Configuration:
    """Every size of the model made small, with no two neighbours alike."""
    special = [
        override for override in overrides if override.lstrip("+").startswith(("method.", "model."))
    ]
    if any("experiment=" in override for override in overrides):
        values = plain(compose([*OWN, f"method={method}", f"model={model}", *overrides]))
    else:
        cfg = composed(*(override for override in overrides if override not in special)).copy()
        cfg.method, cfg.model = node("method", method), node("model", model)
        for override in special:
            key, _, value = override.lstrip("+").partition("=")
            OmegaConf.update(cfg, key, yaml.safe_load(value), force_add=True)
        values = plain(cfg)
    for index, (key, value) in enumerate(values["model"].items()):
        if isinstance(value, list) and all(isinstance(item, int) for item in value):
            values["model"][key] = [5 + (place + 2) % 3 for place in range(len(value))]
        elif type(value) is int and value > 16:
            values["model"][key] = 5 + index % 3
    return check(values)


@pytest.fixture(autouse=True)
def threads() -> None:
    """Give every test the same number of threads, whatever a run in this process has set before."""
    torch.set_num_threads(THREADS)


@pytest.fixture
def clean_logging():
    """Leave logging as it was: a command run in this process sets it up for streams that end with the test."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


class Tiny:
    """A tiny float64 network with its method and its learner, and a batch to learn from."""

    def __init__(
        self, method: str, model: str, *overrides: str, classes: int = CLASSES, device: str = "cpu"
    ) -> None:
        cfg = tiny_configuration(method, model, "dataset.fc_widths=[1,1,1]", *overrides)
        torch.manual_seed(3)
        self.loss = LOSSES[cfg.settings.loss]
        self.net: BlockNet = (
            cfg.components["model"].build(input_shape=SHAPE, num_classes=classes).double()
        )
        self.method: Method = cfg.components["method"].build(
            net=self.net, num_classes=classes, loss=self.loss
        )
        self.optimizer = cfg.components["optimizer"].build()
        feedback = cfg.components.get("optimizer.feedback", cfg.components["optimizer"]).build()
        self.learner = Learner(
            self.net.to(device), self.method.to(device), self.loss, self.optimizer,
            feedback_optimizer=feedback, clip_norm=cfg.clip_norm,
        )  # fmt: skip
        random = torch.Generator().manual_seed(4)
        self.x = torch.randn(BATCH, *SHAPE, dtype=torch.float64, generator=random).to(device)
        self.target = torch.randint(classes, (BATCH,), generator=random).to(device)

    @property
    def terms(self) -> int:
        """Return an upper bound for the terms in a value of the backward pass: all weights and all inputs."""
        return sum(p.numel() for p in self.net.parameters()) + self.x.numel()

    @property
    def results(self) -> int:
        """Return the number of layers that a signal passes. In bfloat16 each layer rounds its result, a float32 sum."""
        return sum(not list(module.children()) for module in self.net.modules())

    def backward(self) -> tuple[Trace, list[torch.Tensor | None], torch.Tensor]:
        """A kept trace after its backward pass, the δ_i that were applied, and the error it started from."""
        trace = self.trace(keep=True)
        _, error = self.loss.value_and_error(trace.logits, self.target)
        return trace, self.start(trace, error), error

    def trace(self, keep: bool = False) -> Trace:
        """One forward pass, as the method wants it."""
        return self.net.trace(
            self.x, self.method.cuts, self.method.frozen, keep, self.method.transpose
        )

    def start(self, trace: Trace, error: torch.Tensor) -> list[torch.Tensor | None]:
        """Start autograd from the method's signals for this error."""
        return trace.backward(self.method.signal, error, self.target)

    def state(self) -> dict[str, torch.Tensor]:
        """Every weight, buffer and B, copied to the CPU."""
        return {
            f"{name}.{key}": value.detach().cpu().clone()
            for name, module in (("net", self.net), ("method", self.method))
            for key, value in module.state_dict().items()
        }


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Links to the real data sets, in a folder of their own to be packed in; skips, saying so, without any."""
    folder = os.environ.get("DFL_DATA_DIR")
    if not folder:
        pytest.skip("DFL_DATA_DIR names no folder of real data sets")
    place = tmp_path_factory.getbasetemp()
    # the same for all processes that run tests side by side
    links = (place.parent if "PYTEST_XDIST_WORKER" in os.environ else place) / "real-data"
    links.mkdir(exist_ok=True)
    for item in Path(folder).iterdir():
        with suppress(FileExistsError):
            (links / item.name).symlink_to(item.resolve())
    return links


@pytest.fixture
def folder(tmp_path) -> Path:
    """A user's own folder of images."""
    return write_folder(tmp_path / "mine")


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A data_dir with a small TinyImageNet, unpacked."""
    return write_tiny(tmp_path / "data")


@pytest.fixture
def mnist(tmp_path, monkeypatch) -> Path:
    """A data_dir with a small MNIST, which counts as the published one."""
    monkeypatch.setattr(Mnist, "FILES", write_mnist(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def offline(monkeypatch) -> None:
    """No network, without waiting for one."""

    def refuse(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
