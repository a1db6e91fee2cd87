"""Refusals change no file, foreign configurations call no code, and unsuitable nets are refused before training."""

import shlex
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from report_helpers import dfl_report
from test_refusals import refusal
from torch import nn

from dfl_experiments import models
from dfl_experiments.configuration.components import component
from dfl_experiments.configuration.composition import compose, plain
from dfl_experiments.configuration.recorded import read_recorded
from dfl_experiments.engine.blocknet import Block, BlockNet
from dfl_experiments.engine.losses import LOSSES
from dfl_experiments.errors import UserError
from dfl_experiments.methods import Backprop
from dfl_experiments.running.result import write_result
from dfl_experiments.train import main

pytestmark = pytest.mark.usefixtures("clean_logging")
QUICK = ["epochs=1", "limit=64", "alignment.every=0", "tracking=disabled"]
VALID_CONV = '''"""One unpadded convolution."""

from torch import nn

from dfl_experiments.engine.blocknet import Block, BlockNet
from dfl_experiments.ranges import Count


def valid_conv(input_shape: tuple[int, int, int], num_classes: int, kernel: Count) -> BlockNet:
    """[conv kernel×kernel without padding; ReLU], then global pooling and a linear layer."""
    block = Block(nn.Conv2d(input_shape[0], 4, kernel), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
    return BlockNet(block, head=head, input_shape=input_shape)


def broken(input_shape: tuple[int, int, int], num_classes: int, kernel: Count) -> BlockNet:
    """A bug of its author."""
    return kernel.no_such_attribute
'''


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_refused_command_line_keeps_a_finished_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dfl-train", *QUICK, "hydra.run.dir=here"])
    main()
    capsys.readouterr()
    before = contents(tmp_path)
    assert {"result.json", "last.pt", "epochs.csv", "config.yaml"} <= {path.name for path in before}
    refused = (
        "epochs=0",
        "lr=1",
        "device=cuda:77",
        "device=gpu",
        "model._target_=os.system",
        "method=lass",
        "seed=0,1",
        "model.widths=[0]",
        "optimizer=sgd optimizer.nesterov=true",
        "dataset.std=[1,1]",
        "--multirun hydra.sweep.subdir=. seed=0,1",
    )
    here = ("hydra.run.dir=here", "hydra.sweep.dir=here")
    for arguments in refused:
        refusal([*QUICK, *here, *shlex.split(arguments)], monkeypatch, capsys)
        assert contents(tmp_path) == before, arguments


FOREIGN = {
    "a method": (
        {"method": {"name": "las", "_target_": "os.mkdir", "path": "touched"}},
        "method._target_=os.mkdir",
    ),
    "a model": (
        {"model": {"name": "fc", "_target_": "os.mkdir", "path": "touched"}},
        "model._target_=os.mkdir",
    ),
    "a plugin": (
        {"plugins": ["stranger"], "method": {"name": "las", "_target_": "stranger.Method"}},
        "method._target_=stranger.Method",
    ),
    "an interpolation": ({"data_dir": "${oc.env:HOME}"}, "has an interpolation"),
}


@pytest.mark.parametrize("key", ["repeat", "resume"])
@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_configuration_calls_no_code(what, key, stranger, monkeypatch, capsys):
    change, words = FOREIGN[what]
    stranger(change)
    assert words in refusal([f"{key}=theirs"], monkeypatch, capsys)
    assert not [name for name in ("touched", "outputs") if Path(name).exists()]


@pytest.mark.parametrize("key", ["repeat", "resume"])
def test_foreign_yaml_creates_no_object(key, stranger, monkeypatch, capsys):
    stranger({})
    Path("theirs/config.yaml").write_text("method: !!python/object/apply:os.mkdir [touched]\n")
    assert "cannot be read" in refusal([f"{key}=theirs"], monkeypatch, capsys)
    assert not Path("touched").exists()


def test_report_of_foreign_runs_calls_no_code_and_resolves_nothing(stranger, monkeypatch):
    monkeypatch.setenv("TOKEN", "sesame4711")
    change, _ = FOREIGN["a method"]
    stranger(change | {"loss": "${oc.env:TOKEN}"})
    for kind in ("terminal", "html"):
        done = dfl_report(Path(), "theirs", "--format", kind, "--out", "page")
        assert done.returncode == 0, done.stderr
        assert "las" in Path("page").read_text()
        assert "sesame4711" not in Path("page").read_text()
    Path("theirs/result.json").unlink()
    done = dfl_report(Path(), "theirs")
    assert done.returncode == 2
    assert "has an interpolation" in done.stderr
    assert not Path("touched").exists()


def test_interpolation_syntax_in_a_path_is_kept_as_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DFL_DATA_DIR", str(tmp_path / "a${b}\\${oc.env:HOME}"))
    for arguments in ([*QUICK, "hydra.run.dir=here"], ["repeat=here", "hydra.run.dir=again"]):
        monkeypatch.setattr(sys, "argv", ["dfl-train", *arguments])
        main()
    for folder in ("here", "again"):
        recorded = read_recorded(Path(folder, "config.yaml"), "")
        assert recorded["data_dir"] == str(tmp_path / "a${b}\\${oc.env:HOME}")
    assert "las" in dfl_report(Path(), "here").stdout


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """Return a function that makes a run directory `theirs` with a changed configuration.

    Beside it lies a package that creates a folder when it is imported.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("stranger.py").write_text("import os\nos.mkdir('touched')\n")

    def make(change):
        values = plain(compose([*QUICK, "sweep=theirs"])) | change
        Path("theirs").mkdir(exist_ok=True)
        Path("theirs/last.pt").write_bytes(b"")
        Path("theirs/config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
        write_result(Path("theirs"), {"status": "interrupted", "reason": "", "config": values})

    return make


@pytest.fixture
def valid_conv(tmp_path, monkeypatch):
    """Add a user's model to the package, and its YAML file, both in temporary folders. Yield the options for it."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "valid_conv.py").write_text(VALID_CONV)
    (tmp_path / "conf" / "model").mkdir(parents=True)
    target = "dfl_experiments.models.valid_conv.valid_conv"
    (tmp_path / "conf" / "model" / "valid_conv.yaml").write_text(
        f"name: valid_conv\n_target_: {target}\nkernel: 3\n"
    )
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path / "code")])
    yield ["--config-dir", str(tmp_path / "conf"), "model=valid_conv"]
    sys.modules.pop("dfl_experiments.models.valid_conv")
    del models.valid_conv


def test_kernel_larger_than_the_images_is_refused_before_training(
    valid_conv, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["dfl-train", *valid_conv, *QUICK, "method=bp", "hydra.run.dir=fits"]
    )
    main()
    capsys.readouterr()
    assert (tmp_path / "fits" / "last.pt").exists()
    for method in ("bp", "las"):
        options = [f"method={method}", "model.kernel=9", "hydra.run.dir=here"]
        error = refusal([*valid_conv, *QUICK, *options], monkeypatch, capsys)
        assert "input shape (1, 8, 8)" in error
        assert "9 x 9" in error
    for name in ("last.pt", "iterations.csv", "epochs.csv"):
        assert not (tmp_path / "here" / name).exists()


PLUGINS = {
    "own_code": ("import no_such_package", "(No module named 'no_such_package')\n"),
    "unreadable": ("class Net:\nx = 1", "(unreadable.py, line 2))\n"),
}


@pytest.mark.parametrize("plugin", PLUGINS)
def test_plugin_that_cannot_be_imported_is_refused_with_the_cause(
    plugin, tmp_path, monkeypatch, capsys
):
    code, cause = PLUGINS[plugin]
    (tmp_path / f"{plugin}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    error = refusal([*QUICK, f"plugins=[{plugin}]"], monkeypatch, capsys)
    assert f"plugins=[{plugin}]: cannot be imported" in error
    assert error.endswith(cause)


def test_bug_in_a_model_is_not_reported_as_a_user_error(valid_conv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    broken = "model._target_=dfl_experiments.models.valid_conv.broken"
    monkeypatch.setattr(sys, "argv", ["dfl-train", *valid_conv, broken, *QUICK])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert "AttributeError" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["dfl-train", "--multirun", *valid_conv, broken, *QUICK])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    (path,) = tmp_path.glob("outputs/*/*/traceback.txt")
    assert f"({path.relative_to(tmp_path)} has the details)" in capsys.readouterr().out
    assert "no_such_attribute" in path.read_text()


def test_missing_data_set_is_refused_with_the_command_that_prepares_it(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    line = refusal(["dataset=mnist", "data_dir=nowhere", *QUICK], monkeypatch, capsys)
    assert "dfl-data prepare dataset=mnist" in line
    assert not list(tmp_path.rglob("last.pt"))


def test_untrainable_network_is_a_user_error():
    def net(*blocks, outputs=10):
        return BlockNet(
            *blocks, head=nn.Sequential(nn.Flatten(), nn.Linear(64, outputs)), input_shape=(1, 8, 8)
        )

    hidden = Block(nn.Identity(), nn.ReLU())
    assert Backprop(net(hidden), 10, LOSSES["cross_entropy"]).depth == 2
    for unsuitable, words in (
        (net(), "at least one hidden block"),
        (net(hidden, outputs=7), r"\(1, 7\).*\(1, 10\)"),
        (net(Block(nn.AvgPool2d(9), nn.ReLU())), r"input shape \(1, 8, 8\)"),
        (net(Block(nn.AvgPool2d(2), nn.ReLU())), r"input shape \(1, 8, 8\)"),
    ):
        with pytest.raises(UserError, match=words):
            Backprop(unsuitable, 10, LOSSES["cross_entropy"])


def test_failed_construction_names_the_options():
    node = {"_target_": "dfl_experiments.models.fc", "widths": [4], "activation": "relu"}
    with pytest.raises(
        UserError, match=r"model: cannot be built with widths=\[4\], .* \(.*negative dimension"
    ):
        component(node, "model").build(input_shape=(1, 8, -8), num_classes=10)
