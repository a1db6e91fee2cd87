"""Shared fixtures: every method × every model of conf/ as a tiny float64 net, small data sets, and real data."""

import os

# The networks are tiny, so several threads would only slow the tests down.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import logging
import signal
import urllib.request
from contextlib import suppress
from functools import cache
from itertools import product
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

# A shell or nohup that starts the tests in the background makes them ignore these signals, and so does every program
# that they start. Tests send these signals to programs.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

THREADS = torch.get_num_threads()  # as OMP_NUM_THREADS says
CLASSES, BATCH, SHAPE = 4, 6, (3, 9, 8)


def roundoff(terms: int, dtype: torch.dtype = torch.float64) -> float:
    """Return an upper bound for the rounding error of a sum of products, relative to the size of its terms: terms · u.

    The bound holds for every order of addition (Higham, Accuracy and Stability of Numerical Algorithms, §3.1). The
    order depends on the processor, the shape and the memory layout. If the terms cancel, the error relative to the sum
    itself may be larger.

    terms: number of rounded numbers that enter the result.
    dtype: data type of the result; u is half of its eps.
    """
    return terms * torch.finfo(dtype).eps / 2


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Assert that ‖actual - expected‖ ≤ tolerance · ‖expected‖."""
    assert actual.shape == expected.shape
    error, size = (actual - expected).norm().item(), expected.norm().item()
    assert error <= tolerance * size, f"the error is {error:.2g}, allowed is {tolerance * size:.2g}"


# The laws also test a user's methods and models: DFL_CONFIG_DIR has their YAML files, DFL_PLUGINS names their package.
USER_CONF = os.environ.get("DFL_CONFIG_DIR")
CONF_DIRS = [CONF_DIR]
USER_OVERRIDES = []
if USER_CONF:
    CONF_DIRS = [Path(USER_CONF).absolute(), CONF_DIR]
    plugins = os.environ.get("DFL_PLUGINS", "")
    USER_OVERRIDES = [f"hydra.searchpath=[file://{CONF_DIRS[0]}]", f"plugins=[{plugins}]"]


def options(group: str) -> list[str]:
    """Return the names of a group's files, so that new files are tested without further changes."""
    names = set(group_options(group))
    if USER_CONF:
        names |= {path.stem for path in Path(USER_CONF, group).glob("*.yaml")}
    return sorted(names)


@cache
def node(group: str, name: str) -> DictConfig:
    """Return the content of a group's file."""
    files = [folder / group / f"{name}.yaml" for folder in CONF_DIRS]
    return OmegaConf.load(next(file for file in files if file.exists()))


METHODS, PROTOCOLS = options("method"), options("protocol")
BUILT_IN = sorted(group_options("method"))  # the methods whose name `dfl.rule` takes
# for models with boundaries, tests/engine/test_module_net.py tests the laws
MODELS = [name for name in options("model") if "boundaries" not in node("model", name)]
MODELS.remove("resnet18_cifar")  # equals resnet18 except for the stem
# ADFA's B is a product of the weight matrices, so it needs a fully connected net
REFUSED = [("adfa", model) for model in MODELS if not model.startswith("fc")]
PAIRS = [pair for pair in product(METHODS, MODELS) if pair not in REFUSED]
CROSS = pytest.mark.parametrize(("method", "model"), PAIRS)


@cache
def composed(*overrides: str) -> DictConfig:
    """Return the composed configuration, of which `tiny_configuration` replaces the method and the model."""
    return compose([*USER_OVERRIDES, *overrides])


@cache
def tiny_configuration(method: str, model: str, *overrides: str) -> Configuration:
    """Return a configuration whose model has small sizes. Neighbouring sizes differ, to reveal swapped axes."""
    if any("experiment=" in override for override in overrides):
        choices = (f"method={method}", f"model={model}")
        values = plain(compose([*USER_OVERRIDES, *choices, *overrides]))
    else:
        values = plain(with_method_and_model(method, model, *overrides))
    sizes = values["model"]
    for index, (key, value) in enumerate(sizes.items()):
        if isinstance(value, list) and all(isinstance(item, int) for item in value):
            sizes[key] = [5 + (layer + 2) % 3 for layer in range(len(value))]
        elif type(value) is int and value > 16:
            sizes[key] = 5 + index % 3
    return check(values)


def with_method_and_model(method: str, model: str, *overrides: str) -> DictConfig:
    """Put a method and a model into a composed configuration. This is faster than composing all pairs with Hydra."""
    of_method_or_model = []
    others = []
    for override in overrides:
        if override.lstrip("+").startswith(("method.", "model.")):
            of_method_or_model.append(override)
        else:
            others.append(override)
    cfg = composed(*others).copy()
    cfg.method, cfg.model = node("method", method), node("model", model)
    for override in of_method_or_model:
        key, _, value = override.lstrip("+").partition("=")
        OmegaConf.update(cfg, key, yaml.safe_load(value), force_add=True)
    return cfg


@pytest.fixture(autouse=True)
def threads() -> None:
    """Reset the number of threads, which a run in this process may have changed."""
    torch.set_num_threads(THREADS)


@pytest.fixture
def clean_logging():
    """Restore logging after the test: a command in this process makes it write to streams that end with the test."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


class Tiny:
    """A tiny float64 network with its method and its learner, and a batch."""

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
        """Return the number of layers that a signal passes. In bfloat16, each layer rounds its result once."""
        return sum(not list(module.children()) for module in self.net.modules())

    def backward(self) -> tuple[Trace, list[torch.Tensor | None], torch.Tensor]:
        """Run a forward and a backward pass. Return the kept trace, the applied signals δ_i, and the error."""
        trace = self.trace(keep=True)
        _, error = self.loss.value_and_error(trace.logits, self.target)
        return trace, self.start(trace, error), error

    def trace(self, keep: bool = False) -> Trace:
        """Run a forward pass with the method's cuts and feedback weights."""
        return self.net.trace(
            self.x, self.method.cuts, self.method.frozen, keep, self.method.transpose
        )

    def start(self, trace: Trace, error: torch.Tensor) -> list[torch.Tensor | None]:
        """Run the backward pass of the method's signals for this error. Return the applied signals."""
        return trace.backward(self.method.signal, error, self.target)

    def state(self) -> dict[str, torch.Tensor]:
        """Return a copy of every weight, buffer and B, on the CPU."""
        state = {}
        for name, module in (("net", self.net), ("method", self.method)):
            for key, value in module.state_dict().items():
                state[f"{name}.{key}"] = value.detach().cpu().clone()
        return state


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Return a temporary folder of links to the real data sets. Skip the test if there are none.

    Packed data sets are written to this folder, so the user's folder does not change.
    """
    folder = os.environ.get("DFL_DATA_DIR")
    if not folder:
        pytest.skip("DFL_DATA_DIR names no folder of real data sets")
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # parallel processes share one folder
        base = base.parent
    links = base / "real-data"
    links.mkdir(exist_ok=True)
    for item in Path(folder).iterdir():
        with suppress(FileExistsError):
            (links / item.name).symlink_to(item.resolve())
    return links


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a user's folder of images."""
    return write_folder(tmp_path / "mine")


@pytest.fixture
def tiny(tmp_path) -> Path:
    """Return a data_dir with a small TinyImageNet, extracted."""
    return write_tiny(tmp_path / "data")


@pytest.fixture
def mnist(tmp_path, monkeypatch) -> Path:
    """Return a data_dir with a small MNIST. Its checksums replace those of the published one."""
    monkeypatch.setattr(Mnist, "FILES", write_mnist(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def offline(monkeypatch) -> None:
    """Let every download fail at once, as without a network."""

    def refuse(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
