"""A run measures stability as the specification defines it, and it ends if the net is dead."""

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

# two or three epochs to its end
RUN = ("method=ltas", "optimizer.lr=3", "epochs=6", "threads=1", "tracking=disabled")


def seen(net, *batches, error=None):
    """Return the stability of a net on a set of images. error: error of every batch."""
    activations = Activations(net.eval())
    with torch.no_grad():
        for x in batches:
            net(x, activations.add)
            activations.add_error(torch.ones(len(x), 2) if error is None else error)
    return activations.measured()


@pytest.mark.parametrize("model", MODELS)
def test_rms_and_dead_units_are_those_of_the_whole_set(model):
    t = Tiny("bp", model)
    batches = [t.x, 3 * t.x[:4] - 1]
    found, has_collapsed = seen(t.net, *batches)
    assert not has_collapsed
    traces = [t.net.trace(x, keep=True) for x in batches]
    for i in range(1, t.net.depth):
        h = torch.cat([trace.output(i) for trace in traces])
        assert found[f"activation_rms/{i}"] == pytest.approx(
            h.square().mean().sqrt().item(), rel=1e-12
        )
        if model in ("mixer", "vit"):
            assert f"dead/{i}" not in found
        else:
            assert found[f"dead/{i}"] == pytest.approx(
                (h == 0).all(0).double().mean().item(), abs=1e-12
            )
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
def test_a_block_that_ends_in_relu_is_known(post, expected):
    net = BlockNet(Block(nn.Linear(3, 3), post), head=nn.Linear(3, 2), input_shape=(3,))
    assert net.ends_in_relu(1) is expected


@pytest.mark.parametrize("model", ["fc", "conv3", "resnet18"])
def test_a_net_whose_last_hidden_layer_is_dead_has_collapsed(model):
    t = Tiny("bp", model)
    top = t.net.depth - 1
    norm_or_layer = [
        m for m in t.net.blocks[-1].pre.modules() if getattr(m, "bias", None) is not None
    ][-1]
    with torch.no_grad():
        norm_or_layer.weight.zero_()
        norm_or_layer.bias.fill_(-1e9)
    found, has_collapsed = seen(t.net, t.x, 2 * t.x)
    assert has_collapsed
    assert (found[f"activation_rms/{top}"], found[f"dead/{top}"]) == (0, 1)
    # a net without an error has learnt all there is
    assert not seen(t.net, t.x, error=torch.zeros(len(t.x), 2))[1]


def test_only_the_images_with_an_error_decide():
    net = BlockNet(Block(nn.Identity(), nn.ReLU()), head=nn.Linear(3, 2), input_shape=(3,))
    x = torch.tensor([[-1.0, -1.0, 2.0], [-1.0, -2.0, -3.0]])
    assert not seen(net, x)[1]
    # the image that has an active unit is classified without an error
    right = torch.tensor([[0.0, 0.0], [0.5, -0.5]])
    found, has_collapsed = seen(net, x, error=right)
    assert has_collapsed
    assert found["dead/1"] == pytest.approx(2 / 3)


def test_without_relu_there_is_nothing_to_be_dead():
    net = BlockNet(Block(nn.Linear(3, 3), nn.Tanh()), head=nn.Linear(3, 2), input_shape=(3,))
    net.requires_grad_(False).blocks[0].pre.weight.zero_()
    net.blocks[0].pre.bias.zero_()
    found, has_collapsed = seen(net, torch.randn(4, 3))
    assert found == {"activation_rms/1": 0}
    assert not has_collapsed


def test_a_run_is_unstable_where_activations_have_grown_or_units_died():
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
    grown = later | {"activation_rms/1": 0.06}  # counted from 1e-3
    expected = {"layer": 1, "epoch": 3, "measure": "activation_rms", "value": pytest.approx(60)}
    assert instability(grown, first, top=2) == expected
    dead = later | {"dead/2": 0.96}
    assert instability(dead, first, top=2) == {
        "layer": 2,
        "epoch": 3,
        "measure": "dead",
        "value": 0.96,
    }


def test_norm_ratios_leave_out_what_has_no_reference():
    nan, inf = torch.nan, torch.inf
    columns = {
        "norm/1": torch.tensor([3.0, 1.0, 1.0, nan, 1.0]),
        "norm_bp/1": torch.tensor([2.0, 0.0, inf, nan, 1e-30]),
    }
    expected = torch.tensor([1.5, nan, nan, nan, 1e30]).double()
    torch.testing.assert_close(norm_ratios(columns)["norm_ratio/1"], expected, equal_nan=True)


@pytest.mark.parametrize("model", ["fc", "conv3_bn"])
@pytest.mark.parametrize("method", METHODS)
def test_every_quantity_of_every_rule_is_measured_under_bfloat16(method, model):
    if (method, model) in REFUSED:
        pytest.skip("this rule has no such net")
    found = {}
    for precision in ("float32", "bfloat16"):
        t = Tiny(method, model)
        learner = Learner(
            t.net.float(), t.method.float(), t.loss, t.optimizer, precision, [*EXTRA_QUANTITIES]
        )
        torch.manual_seed(0)
        found[precision] = dict(
            zip(
                learner.metric_names,
                learner.step(t.x.float(), t.target, True).tolist(),
                strict=True,
            )
        )
    for name, value in found["float32"].items():
        if name.partition("/")[0] in EXTRA_QUANTITIES:
            # in a tiny net a ReLU more or less decides it
            near = 2.0 if name.startswith("gradient_cosine") else 0.05
            assert found["bfloat16"][name] == pytest.approx(value, abs=near, nan_ok=True), name


def stopped_in_the_second_epoch():
    """In the process that runs: SIGTERM comes while the second epoch is evaluated."""
    from dfl_experiments.running import epochs

    evaluate, calls = epochs.evaluate, []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments)

    epochs.evaluate = stopping


def test_a_run_that_collapses_ends_as_such_and_says_so(tmp_path):
    done = dfl_train(tmp_path, *RUN, "hydra.run.dir=here")
    assert done.returncode == 0, done.stderr
    result, rows = (
        json.loads((tmp_path / "here" / "result.json").read_text()),
        table(tmp_path / "here" / "epochs.csv"),
    )
    last = rows[-1]
    assert result["status"] == "collapsed"
    assert result["reason"].startswith(f"after epoch {len(rows)}: all units of layer 2 ")
    assert len(rows) == result["epochs"] < 6
    assert (last["dead/2"], last["activation_rms/2"]) == ("1", "0")
    for name in ("activation_rms", "dead", "norm_ratio"):
        for layer, value in result[name].items():
            assert last[f"{name}/{layer}"] == ("" if value is None else f"{value:.9g}")
    assert result["unstable"]["epoch"] <= len(rows)
    assert "collapsed already" in dfl_train(tmp_path, "resume=here").stdout

    assert (
        ended(forked(tmp_path, *RUN, "hydra.run.dir=there", before=stopped_in_the_second_epoch))
        == 143
    )
    assert dfl_train(tmp_path, "resume=there").returncode == 0
    again = json.loads((tmp_path / "there" / "result.json").read_text())
    differ = {"seconds", "samples_per_second", "config", "finished_at", "seal"}
    assert {k: v for k, v in again.items() if k not in differ} == {
        k: v for k, v in result.items() if k not in differ
    }

    done = dfl_train(tmp_path, *RUN, "stop_collapsed=false", "hydra.run.dir=on")
    assert done.returncode == 0, done.stderr
    went_on = json.loads((tmp_path / "on" / "result.json").read_text())
    assert (went_on["status"], went_on["epochs"], went_on["unstable"]) == (
        "finished",
        6,
        result["unstable"],
    )
    same = table(tmp_path / "on" / "epochs.csv")[: len(rows)]
    assert [row | {"seconds": ""} for row in same] == [row | {"seconds": ""} for row in rows]
