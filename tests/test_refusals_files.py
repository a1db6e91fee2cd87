"""A refusal leaves files as they were, a configuration from elsewhere calls nothing, a misfit is found in time."""

import shlex
import sys

import pytest
from test_refusals import refusal
from torch import nn

from dfl_experiments import models
from dfl_experiments.blocknet import Block, BlockNet
from dfl_experiments.config import UserError, build
from dfl_experiments.losses import LOSSES
from dfl_experiments.methods import Backprop
from dfl_experiments.train import main

QUICK = ["epochs=1", "limit=64", "alignment.every=0", "tracking=disabled"]
VALID_CONV = '''"""One unpadded convolution."""

from torch import nn

from dfl_experiments.blocknet import Block, BlockNet
from dfl_experiments.config import Count


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
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("clean_logging")
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
        "+hydra.callbacks.x._target_=os.system",
        "hydra.job_logging.root.level=LOUD",
        "model.widths=[0]",
        "optimizer=sgd optimizer.nesterov=true",
        "dataset.std=[1,1]",
        "--multirun hydra.sweep.subdir=. seed=0,1",
    )
    for arguments in refused:
        refusal([*QUICK, "hydra.run.dir=here", "hydra.sweep.dir=here", *shlex.split(arguments)], monkeypatch, capsys)
        assert contents(tmp_path) == before, arguments


ELSEWHERE = {
    "a method": "method: {_target_: os.mkdir, path: touched}",
    "a model": "model: {_target_: os.mkdir, path: touched}",
    "a source": "dataset: {source: {_target_: os.mkdir, path: touched}}",
    "a callback": "hydra: {callbacks: {x: {_target_: os.mkdir, path: touched}}}",
    "an argument of a callback": (
        "hydra: {callbacks: {x: {_target_: hydra.experimental.callbacks.LogJobReturnCallback, "
        "y: {_target_: os.mkdir, path: touched}}}}"
    ),
    "a launcher": "hydra: {launcher: {_target_: os.mkdir}}",
    "a handler": "hydra: {hydra_logging: {handlers: {console: {(): os.mkdir, path: touched}}}}",
    "a handler's class": "hydra: {job_logging: {handlers: {console: {class: os.mkdir, path: touched}}}}",
    "a hidden class": "{sweep: os.mkdir, hydra: {job_logging: {handlers: {console: {class: '${sweep}'}}}}}",
    "a hidden import": "{sweep: antigravity, hydra: {hydra_logging: {x: 'ext://${sweep}'}}}",
    "a filter": "hydra: {hydra_logging: {filters: {x: {(): os.mkdir, path: touched}}}}",
}  # fmt: skip


@pytest.mark.parametrize("multirun", [[], ["--multirun"]], ids=["run", "multirun"])
@pytest.mark.parametrize("what", ELSEWHERE)
def test_a_configuration_from_elsewhere_calls_no_code_of_its_choice(what, multirun, tmp_path, monkeypatch, capsys):
    (tmp_path / "elsewhere" / "experiment").mkdir(parents=True)
    (tmp_path / "elsewhere" / "experiment" / "evil.yaml").write_text(f"# @package _global_\n{ELSEWHERE[what]}\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    flags = [*multirun, "--config-dir", "../elsewhere"]
    line = refusal([*flags, "experiment=evil", *QUICK], monkeypatch, capsys)
    assert "os.mkdir" in line or "ext://antigravity" in line
    assert not list((tmp_path / "here").iterdir())


@pytest.fixture
def valid_conv(tmp_path, monkeypatch):
    """A user's model in the package and its YAML, both in a folder of the test's."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "valid_conv.py").write_text(VALID_CONV)
    (tmp_path / "conf" / "model").mkdir(parents=True)
    target = "dfl_experiments.models.valid_conv.valid_conv"
    (tmp_path / "conf" / "model" / "valid_conv.yaml").write_text(f"name: valid_conv\n_target_: {target}\nkernel: 3\n")
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path / "code")])
    yield ["--config-dir", str(tmp_path / "conf"), "model=valid_conv"]
    sys.modules.pop("dfl_experiments.models.valid_conv")
    del models.valid_conv


@pytest.mark.usefixtures("clean_logging")
def test_a_kernel_larger_than_the_images_is_refused_before_training(valid_conv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dfl-train", *valid_conv, *QUICK, "method=bp", "hydra.run.dir=fits"])
    main()
    capsys.readouterr()
    assert (tmp_path / "fits" / "last.pt").exists()
    for method in ("bp", "las"):
        line = refusal(
            [*valid_conv, *QUICK, f"method={method}", "model.kernel=9", "hydra.run.dir=here"], monkeypatch, capsys
        )
        assert "images of 1x8x8" in line
        assert "9 x 9" in line
    assert not [name for name in ("last.pt", "iterations.csv", "epochs.csv") if (tmp_path / "here" / name).exists()]


@pytest.mark.usefixtures("clean_logging")
def test_a_mistake_in_the_code_is_not_passed_off_as_the_user_s(valid_conv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broken = "model._target_=dfl_experiments.models.valid_conv.broken"
    monkeypatch.setattr(sys, "argv", ["dfl-train", *valid_conv, broken, *QUICK])
    with pytest.raises(AttributeError, match="no_such_attribute"):
        main()
    monkeypatch.setattr(sys, "argv", ["dfl-train", "--multirun", *valid_conv, broken, *QUICK])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    (path,) = tmp_path.glob("outputs/*/*/traceback.txt")
    assert "no_such_attribute" in path.read_text()


@pytest.mark.usefixtures("clean_logging")
def test_a_data_set_that_is_nowhere_is_refused_with_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = refusal(["dataset=mnist", "data_dir=nowhere", *QUICK], monkeypatch, capsys)
    assert "dfl-data prepare dataset=mnist" in line
    assert not list(tmp_path.rglob("last.pt"))


def test_a_network_that_no_method_can_train_is_the_user_s_mistake():
    def net(*blocks, outputs=10):
        return BlockNet(*blocks, head=nn.Sequential(nn.Flatten(), nn.Linear(64, outputs)), input_shape=(1, 8, 8))

    hidden = Block(nn.Identity(), nn.ReLU())
    assert Backprop(net(hidden), 10, LOSSES["cross_entropy"]).depth == 2
    for wrong, words in (
        (net(), "at least one hidden block"),
        (net(hidden, outputs=7), r"\(1, 7\).*\(1, 10\)"),
        (net(Block(nn.AvgPool2d(9), nn.ReLU())), "images of 1x8x8"),
        (net(Block(nn.AvgPool2d(2), nn.ReLU())), "images of 1x8x8"),
    ):
        with pytest.raises(UserError, match=words):
            Backprop(wrong, 10, LOSSES["cross_entropy"])


def test_what_torch_cannot_make_is_named_with_its_options():
    node = {"_target_": "dfl_experiments.models.fc", "widths": [4]}
    with pytest.raises(UserError, match=r"model: cannot be built with widths=\[4\] \(.*negative dimension"):
        build(node, "model", input_shape=(1, 8, -8), num_classes=10)
