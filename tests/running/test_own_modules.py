"""Networks that were not written for this project: trained from the command line, then loaded."""

import json
import os
import signal
import sys
import time

import numpy as np
import pytest
import torch
from processes import dfl_train, ended, forked
from test_resume import assert_same, outcome

import dfl_experiments as dfl
from dfl_experiments.errors import UserError
from dfl_experiments.report.labels import OPTION
from dfl_experiments.report.lines import draw
from dfl_experiments.report.tables import alignment, sections, stability

SMALL = """
from torch import bfloat16, nn


class Small(nn.Module):
    def __init__(this, num_classes, planes=6):
        super().__init__()
        self = this
        layers = [nn.Conv2d(1, planes, 3), nn.BatchNorm2d(planes), nn.ReLU(inplace=True), nn.Dropout(0.1)]
        self.features = nn.Sequential(*layers, nn.Conv2d(planes, planes, 3), nn.ReLU())
        self.head = nn.Linear(planes, num_classes)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def plain(input_shape: tuple[int, ...], num_classes: int, width: int) -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(input_shape[1] * input_shape[2], width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, num_classes))


def double(num_classes: int) -> nn.Module:
    return Small(num_classes).double()


def frozen(num_classes: int) -> nn.Module:
    return Small(num_classes).requires_grad_(False)


class FrozenStem(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Linear(64, 16, dtype=bfloat16).requires_grad_(False)
        self.body = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, num_classes))

    def forward(self, x):
        return self.body(self.stem(x.flatten(1).bfloat16()).float())


class Unreadable(Small):
    def forward(self, x):
        if len(x) == 64:  # a batch of the training, which no check before it has
            raise RuntimeError("cannot read \\udce9.png")
        return super().forward(x)
"""
OPTIONS = ("tracking=disabled", "threads=1", "hydra.run.dir=here", "epochs=1", "limit=128")
MINE = (
    "model=module",
    "plugins=[own_modules]",
    "model._target_=own_modules.Small",
    "model.name=small",
)


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """Write a package of the user that can be imported."""
    (tmp_path / "own_modules.py").write_text(SMALL)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_modules", None)


MODELS = {
    "torchvision": (
        ("model=torchvision", "method=dfa", "model.boundaries=[layer2,layer1]"),
        "torchvision_resnet18",
    ),
    "module": ((*MINE, "method=ltas", "+model.planes=8", "model.init=orthogonal"), "small"),
    "function": (
        (*MINE, "model._target_=own_modules.plain", "+model.width=16", "method=fa"),
        "small",
    ),
    "frozen bfloat16 stem": (
        (*MINE, "model._target_=own_modules.FrozenStem", "method=dfa"),
        "small",
    ),
    "vit": (("model=vit", "method=las"), "vit"),
    "resnet18_cifar": (("model=resnet18_cifar", "model.residuals=1", "limit=64"), "resnet18_cifar"),
}


@pytest.mark.usefixtures("own_modules")
@pytest.mark.parametrize("case", MODELS)
def test_network_is_trained_from_the_command_line_and_loaded(case, tmp_path):
    options, name = MODELS[case]
    done = dfl_train(tmp_path, *OPTIONS, *options)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "here" / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["model"] == name
    is_module = case not in ("vit", "resnet18_cifar")
    assert result.get("delta_at") == ("boundary" if is_module else None)
    if case == "torchvision":  # its two boundaries
        assert len(result["cosine"]) == 2
    net = dfl.load_net(tmp_path / "here", plugins=["own_modules"])
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.usefixtures("own_modules")
def test_report_compares_own_nets_and_data_with_the_files_that_they_started_from(tmp_path):
    samples = np.random.default_rng(0).integers(256, size=(2, 64, 8, 8)).astype(np.uint8)
    labels = np.arange(64) % 3
    train = {"X_train": samples[0], "y_train": labels}
    np.savez(tmp_path / "data.npz", **train, X_test=samples[1], y_test=labels)
    data = ("dataset=arrays", "dataset.name=mine", "dataset.source.path=data.npz")
    done = dfl_train(tmp_path, *OPTIONS, *MINE, *data, "+model.planes=8", "dataset.std=[0.5]")
    assert done.returncode == 0, done.stderr
    (shared,) = dfl.runs(tmp_path / "here").shared
    assert set(OPTION.findall(shared)) == {"model.planes", "dataset.source.path", "dataset.std"}


@pytest.mark.usefixtures("own_modules")
def test_captions_name_the_boundaries_of_own_nets(tmp_path):
    options = ("method=dfa", "model.boundaries=[features.2,features.5]", "optimizer.lr=1e-2")
    enough = ("limit=1000", "epochs=3")  # to learn more than chance
    done = dfl_train(tmp_path, *OPTIONS, *MINE, *options, *enough)
    assert done.returncode == 0, done.stderr
    frame = dfl.runs(tmp_path / "here")
    (section,) = sections(frame)
    of_layers = "Layers: 1 features.2, 2 features.5."
    assert alignment(section).caption.endswith(of_layers)
    assert stability(section).caption.endswith(of_layers)
    (legend,) = draw(frame, what=["alignment"]).legends
    assert legend.get_title().get_text().endswith("Layers: 1 features.2.")
    (legend,) = draw(frame, what=["loss"]).legends
    assert "Layers" not in legend.get_title().get_text()


@pytest.mark.usefixtures("own_modules")
def test_network_is_not_loaded_with_changed_code(tmp_path):
    assert dfl_train(tmp_path, *OPTIONS, *MINE).returncode == 0
    changed = SMALL.replace("nn.ReLU", "nn.Tanh").replace("inplace=True", "")
    (tmp_path / "own_modules.py").write_text(changed)
    run = dfl.load_run(tmp_path / "here", ["own_modules"])
    refusal = "here: has a run with other data or code: model own_modules "
    with pytest.raises(UserError, match=refusal):
        print(run.net)
    with pytest.raises(UserError, match=refusal):
        run.evaluate()


REFUSED = {
    "model.boundaries=[features.1]": "model.boundaries: features.1: its output is changed in place afterwards; the",
    "model.boundaries=first": "model.boundaries",
    "+model.boundary=[head]": "model.boundary: no such option; did you mean model.boundaries?",
    "model._target_=torch.nn.Identity": "a plugin's model may be any torch.nn.Module",
    "+model.planes=-1": "negative dimension -1: [-1, 1, 3, 3], own_modules.py line 9)",
    "model._target_=own_modules.double": "model: features.0.weight is torch.float64, but samples are float32",
    "model._target_=own_modules.frozen": "model: every parameter that this method trains is frozen",
    "model=torchvision model.net=vgg11_bm": "torchvision has no such network; choose for example vgg11_bn",
    "model=torchvision model.net=vit_b_16": "boundaries='auto' (Input shape indivisible by patch size!)",
    "model=torchvision model.net=vgg11_bn": "model: the forward pass fails for input shape (N, 1, 8, 8)",
}


@pytest.mark.usefixtures("own_modules")
@pytest.mark.parametrize("options", REFUSED)
def test_unsuitable_module_is_refused_in_one_line(options, tmp_path):
    model = () if "model=" in options else MINE
    done = dfl_train(tmp_path, *OPTIONS, *model, *options.split())
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert REFUSED[options] in line
    assert not (tmp_path / "here").exists()


@pytest.mark.usefixtures("own_modules")
def test_killed_and_resumed_run_of_a_module_is_bitwise_equal(tmp_path):
    options = (*OPTIONS, *MINE, "method=las", "epochs=3", "limit=400", f"data_dir={tmp_path}")
    options = (*options, "checkpoint.every_seconds=0.003")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    start = time.perf_counter()
    assert ended(forked(whole, *options)) == 0
    duration = time.perf_counter() - start
    arguments = options
    for _ in range(2):
        pid = forked(broken, *arguments)
        time.sleep(0.6 * duration)
        os.kill(pid, signal.SIGKILL)
        ended(pid)
        if list((broken / "here").glob("*.pt")):  # after a kill there may be previous.pt only
            arguments = ("resume=here", "plugins=[own_modules]")
    assert ended(forked(broken, *arguments)) == 0
    assert_same(outcome(whole / "here"), outcome(broken / "here"))


def test_error_with_a_name_that_is_not_utf_8_stops_only_its_point_of_a_sweep(own_modules, tmp_path):
    nets = "model._target_=own_modules.Unreadable,own_modules.Small"
    options = ("tracking=disabled", "threads=1", "hydra.sweep.dir=here", "epochs=1", "limit=128")
    done = dfl_train(tmp_path, "--multirun", *MINE, nets, *options)
    assert done.returncode == 1
    assert "2 points, 1 failed, 1 finished" in done.stdout
    (path,) = tmp_path.glob("here/*/traceback.txt")
    assert "cannot read \\udce9.png" in path.read_text(encoding="utf-8")
