"""A run measures stability as the specification defines it, and stops at a collapse."""

import json
import signal

import pytest
import torch
from conftest import METHODS, MODELS, REFUSED, Tiny
from processes import dfl_train, ended, forked
from run_files import table
from torch import nn

from dfl_experiments.engine.blocknet import Block, BlockNet
from dfl_experiments.engine.learner import Learner
from dfl_experiments.measured import EXTRA_QUANTITIES
from dfl_experiments.running.stability import Activations, instability, norm_ratios

# collapses after two or three epochs
RUN = ("method=ltas", "optimizer.lr=3", "epochs=6", "threads=1", "tracking=disabled")


def measured(net, *batches, error=None):
    """Return the measures of a net on these images and whether it has collapsed. error: error of every batch."""
    activations = Activations(net.eval())
    with torch.no_grad():
        for x in batches:
            net(x, activations.add)
            activations.add_error(torch.ones(len(x), 2) if error is None else error)
    return activations.measured()


@pytest.mark.parametrize("model", MODELS)
def test_rms_and_dead_units_are_computed_over_the_whole_set(model):
    t = Tiny("bp", model)
    batches = [t.x, 3 * t.x[:4] - 1]
    values, has_collapsed = measured(t.net, *batches)
    assert not has_collapsed
    traces = [t.net.trace(x, keep=True) for x in batches]
    for i in range(1, t.net.depth):
        h = torch.cat([trace.output(i) for trace in traces])
        rms = h.square().mean().sqrt().item()
        dead = (h == 0).all(0).double().mean().item()
        assert values[f"activation_rms/{i}"] == pytest.approx(rms, rel=1e-12)
        if model in ("mixer", "vit"):  # their blocks do not end in ReLU
            assert f"dead/{i}" not in values
        else:
            assert values[f"dead/{i}"] == pytest.approx(dead, abs=1e-12)
    assert torch.equal(t.net(t.x, Activations(t.net).add), t.net(t.x))


@pytest.mark.parametrize(
    ("post", "expected"),
    [
        (nn.ReLU(), True),
        (nn.Sequential(nn.ReLU(), nn.Sequential(nn.MaxPool2d(2)), nn.Flatten()), True),
        (nn.Sequential(nn.ReLU(), nn.Linear(3, 3)), False),
        (nn.Sequential(nn.Flatten()), False),
        (nn.Sequential(nn.ReLU(), nn.Tanh()), False),
        (nn.Identity(), False),
    ],
)
def test_block_that_ends_in_relu_is_recognised(post, expected):
    net = BlockNet(Block(nn.Linear(3, 3), post), head=nn.Linear(3, 2), input_shape=(3,))
    assert net.ends_in_relu(1) is expected


@pytest.mark.parametrize("model", ["fc", "conv3", "resnet18"])
def test_net_with_a_dead_last_hidden_layer_has_collapsed(model):
    t = Tiny("bp", model)
    top = t.net.depth - 1
    modules = list(t.net.blocks[-1].pre.modules())
    last = [module for module in modules if getattr(module, "bias", None) is not None][-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.fill_(-1e9)
    values, has_collapsed = measured(t.net, t.x, 2 * t.x)
    assert has_collapsed
    assert values[f"activation_rms/{top}"] == 0
    assert values[f"dead/{top}"] == 1
    # without an error there is nothing left to learn
    assert not measured(t.net, t.x, error=torch.zeros(len(t.x), 2))[1]


def test_only_images_with_an_error_count_for_collapse():
    net = BlockNet(Block(nn.Identity(), nn.ReLU()), head=nn.Linear(3, 2), input_shape=(3,))
    x = torch.tensor([[-1.0, -1.0, 2.0], [-1.0, -2.0, -3.0]])
    assert not measured(net, x)[1]
    # the first image, the only one with an active unit, has no error
    error = torch.tensor([[0.0, 0.0], [0.5, -0.5]])
    values, has_collapsed = measured(net, x, error=error)
    assert has_collapsed
    assert values["dead/1"] == pytest.approx(2 / 3)


def test_net_without_relu_has_no_dead_units_and_cannot_collapse():
    net = BlockNet(Block(nn.Linear(3, 3), nn.Tanh()), head=nn.Linear(3, 2), input_shape=(3,))
    net.requires_grad_(False).blocks[0].pre.weight.zero_()
    net.blocks[0].pre.bias.zero_()
    values, has_collapsed = measured(net, torch.randn(4, 3))
    assert values == {"activation_rms/1": 0}
    assert not has_collapsed


def test_run_is_unstable_if_activations_grew_or_units_died():
    first = {
        "epoch": 1,
        "activation_rms/1": 1e-9,
        "activation_rms/2": 2.0,
        "dead/1": 0.99,
        "dead/2": 0.95,
    }
    assert instability(first, first, top=2) is None
    later = first | {"epoch": 3, "activation_rms/1": 0.049, "activation_rms/2": 99.0}
    assert instability(later, first, top=2) is None
    grown = later | {"activation_rms/1": 0.06}  # growth is relative to at least 1e-3
    expected = {"layer": 1, "epoch": 3, "measure": "activation_rms", "value": pytest.approx(60)}
    assert instability(grown, first, top=2) == expected
    dead = later | {"dead/2": 0.96}
    expected = {"layer": 2, "epoch": 3, "measure": "dead", "value": 0.96}
    assert instability(dead, first, top=2) == expected


def test_norm_ratios_leave_out_samples_without_a_reference():
    nan, inf = torch.nan, torch.inf
    columns = {
        "norm/1": torch.tensor([3.0, 1.0, 1.0, nan, 1.0]),
        "norm_bp/1": torch.tensor([2.0, 0.0, inf, nan, 1e-30]),
    }
    expected = torch.tensor([1.5, nan, nan, nan, 1e30]).double()
    torch.testing.assert_close(norm_ratios(columns)["norm_ratio/1"], expected, equal_nan=True)


@pytest.mark.parametrize("model", ["fc", "conv3_bn"])
@pytest.mark.parametrize("method", METHODS)
def test_extra_quantities_in_bfloat16_are_near_those_in_float32(method, model):
    if (method, model) in REFUSED:
        pytest.skip("this method does not support this net")
    metrics = {}
    for precision in ("float32", "bfloat16"):
        t = Tiny(method, model)
        learner = Learner(
            t.net.float(), t.method.float(), t.loss, t.optimizer, precision, [*EXTRA_QUANTITIES]
        )
        torch.manual_seed(0)
        values = learner.step(t.x.float(), t.target, True).tolist()
        metrics[precision] = dict(zip(learner.metric_names, values, strict=True))
    for name, value in metrics["float32"].items():
        if name.partition("/")[0] in EXTRA_QUANTITIES:
            # in a tiny net a single ReLU can change the gradient's direction: only require a value
            near = 2.0 if name.startswith("gradient_cosine") else 0.05
            assert metrics["bfloat16"][name] == pytest.approx(value, abs=near, nan_ok=True), name


def stop_in_the_second_epoch():
    """Send SIGTERM while the second epoch is evaluated (called in the training process)."""
    from dfl_experiments.running import epochs

    evaluate, calls = epochs.evaluate, []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments)

    epochs.evaluate = stopping


def result_of(run_dir):
    return json.loads((run_dir / "result.json").read_text())


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory):
    """Return a folder with a run `here` that has collapsed."""
    folder = tmp_path_factory.mktemp("collapsed")
    done = dfl_train(folder, *RUN, "hydra.run.dir=here")
    assert done.returncode == 0, done.stderr
    return folder


def test_collapsing_run_stops_and_records_the_reason(collapsed):
    result, rows = result_of(collapsed / "here"), table(collapsed / "here" / "epochs.csv")
    last = rows[-1]
    assert result["status"] == "collapsed"
    assert result["reason"].startswith(f"after epoch {len(rows)}: all units of layer 2 ")
    assert len(rows) == result["epochs"] < 6
    assert last["dead/2"] == "1"
    assert last["activation_rms/2"] == "0"
    for name in ("activation_rms", "dead", "norm_ratio"):
        for layer, value in result[name].items():
            assert last[f"{name}/{layer}"] == ("" if value is None else f"{value:.9g}")
    assert result["unstable"]["epoch"] <= len(rows)
    assert "collapsed already" in dfl_train(collapsed, "resume=here").stdout


def test_resumed_run_collapses_with_the_same_result(collapsed):
    options = (*RUN, "hydra.run.dir=resumed")
    assert ended(forked(collapsed, *options, before=stop_in_the_second_epoch)) == 143
    assert dfl_train(collapsed, "resume=resumed").returncode == 0
    expected, resumed = result_of(collapsed / "here"), result_of(collapsed / "resumed")
    for key in ("seconds", "samples_per_second", "config", "finished_at", "seal"):
        del expected[key], resumed[key]
    assert resumed == expected


def test_stop_collapsed_false_trains_all_epochs(collapsed):
    done = dfl_train(collapsed, *RUN, "stop_collapsed=false", "hydra.run.dir=whole")
    assert done.returncode == 0, done.stderr
    result, whole = result_of(collapsed / "here"), result_of(collapsed / "whole")
    assert whole["status"] == "finished"
    assert whole["epochs"] == 6
    assert whole["unstable"] == result["unstable"]
    expected = table(collapsed / "here" / "epochs.csv")
    rows = table(collapsed / "whole" / "epochs.csv")[: len(expected)]
    for row in (*rows, *expected):
        del row["seconds"]
    assert rows == expected
