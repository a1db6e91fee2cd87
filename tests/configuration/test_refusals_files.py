"""A refusal leaves files as they were, a configuration from elsewhere calls nothing, a misfit is found in time."""

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
    """A mistake of its author's."""
    return kernel.no_such_attribute
'''


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_a_refused_command_line_leaves_a_finished_run_as_it_was(tmp_path, monkeypatch, capsys):
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
    for arguments in refused:
        refusal(
            [*QUICK, "hydra.run.dir=here", "hydra.sweep.dir=here", *shlex.split(arguments)],
            monkeypatch,
            capsys,
        )
        assert contents(tmp_path) == before, arguments


STRANGERS = {
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
@pytest.mark.parametrize("what", STRANGERS)
def test_a_stranger_s_run_directory_calls_nothing(what, key, stranger, monkeypatch, capsys):
    change, words = STRANGERS[what]
    stranger(change)
    assert words in refusal([f"{key}=theirs"], monkeypatch, capsys)
    assert not [name for name in ("touched", "outputs") if Path(name).exists()]


@pytest.mark.parametrize("key", ["repeat", "resume"])
def test_a_stranger_s_yaml_makes_no_object(key, stranger, monkeypatch, capsys):
    stranger({})
    Path("theirs/config.yaml").write_text("method: !!python/object/apply:os.mkdir [touched]\n")
    assert "cannot be read" in refusal([f"{key}=theirs"], monkeypatch, capsys)
    assert not Path("touched").exists()


def test_a_report_of_a_stranger_s_runs_calls_nothing_and_resolves_nothing(stranger, monkeypatch):
    monkeypatch.setenv("TOKEN", "sesame4711")
    stranger(STRANGERS["a method"][0] | {"loss": "${oc.env:TOKEN}"})
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


def test_what_looks_like_an_interpolation_in_a_path_is_a_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DFL_DATA_DIR", str(tmp_path / "a${b}\\${oc.env:HOME}"))
    for arguments in (["hydra.run.dir=here"], ["repeat=here", "hydra.run.dir=again"]):
        monkeypatch.setattr(
            sys, "argv", ["dfl-train", *(QUICK if len(arguments) == 1 else []), *arguments]
        )
        main()
    found = [
        read_recorded(Path(folder, "config.yaml"), "")["data_dir"] for folder in ("here", "again")
    ]
    assert found == [str(tmp_path / "a${b}\\${oc.env:HOME}")] * 2
    assert "las" in dfl_report(Path(), "here").stdout


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """Makes a run directory `theirs` whose recorded configuration says something else, beside a package that acts."""
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
    """A user's model in the package and its YAML, both in a folder of the test's."""
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


def test_a_kernel_larger_than_the_images_is_refused_before_training(
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
        line = refusal(
            [*valid_conv, *QUICK, f"method={method}", "model.kernel=9", "hydra.run.dir=here"],
            monkeypatch,
            capsys,
        )
        assert "input shape (1, 8, 8)" in line
        assert "9 x 9" in line
    assert not [
        name
        for name in ("last.pt", "iterations.csv", "epochs.csv")
        if (tmp_path / "here" / name).exists()
    ]


PLUGINS = {
    "own_code": ("import no_such_package", "(No module named 'no_such_package')\n"),
    "unreadable": ("class Net:\nx = 1", "(unreadable.py, line 2))\n"),
}


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_plugin_that_fails_when_it_is_imported_is_refused_with_the_cause(
    plugin, tmp_path, monkeypatch, capsys
):
    code, cause = PLUGINS[plugin]
    (tmp_path / f"{plugin}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    said = refusal([*QUICK, f"plugins=[{plugin}]"], monkeypatch, capsys)
    assert f"plugins=[{plugin}]: cannot be imported" in said
    assert said.endswith(cause)


def test_a_mistake_in_the_code_is_not_passed_off_as_the_user_s(
    valid_conv, tmp_path, monkeypatch, capsys
):
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


def test_a_data_set_that_is_nowhere_is_refused_with_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = refusal(["dataset=mnist", "data_dir=nowhere", *QUICK], monkeypatch, capsys)
    assert "dfl-data prepare dataset=mnist" in line
    assert not list(tmp_path.rglob("last.pt"))


def test_a_network_that_no_method_can_train_is_the_user_s_mistake():
    def net(*blocks, outputs=10):
        return BlockNet(
            *blocks, head=nn.Sequential(nn.Flatten(), nn.Linear(64, outputs)), input_shape=(1, 8, 8)
        )

    hidden = Block(nn.Identity(), nn.ReLU())
    assert Backprop(net(hidden), 10, LOSSES["cross_entropy"]).depth == 2
    for wrong, words in (
        (net(), "at least one hidden block"),
        (net(hidden, outputs=7), r"\(1, 7\).*\(1, 10\)"),
        (net(Block(nn.AvgPool2d(9), nn.ReLU())), r"input shape \(1, 8, 8\)"),
        (net(Block(nn.AvgPool2d(2), nn.ReLU())), r"input shape \(1, 8, 8\)"),
    ):
        with pytest.raises(UserError, match=words):
            Backprop(wrong, 10, LOSSES["cross_entropy"])


def test_what_torch_cannot_make_is_named_with_its_options():
    node = {"_target_": "dfl_experiments.models.fc", "widths": [4], "activation": "relu"}
    with pytest.raises(
        UserError, match=r"model: cannot be built with widths=\[4\], .* \(.*negative dimension"
    ):
        component(node, "model").build(input_shape=(1, 8, -8), num_classes=10)
