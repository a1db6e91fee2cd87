"""Every row of the three protocols is an option that does what its name says (spec §6)."""

import pytest
import torch
from conftest import CLASSES, CROSS, PROTOCOLS, Tiny, tiny_configuration
from torch import nn

from dfl_experiments.configuration.composition import group_options
from dfl_experiments.running.epochs import early_end
from dfl_experiments.running.records import reported_accuracies

PAPER = ("bp", "shallow", "dfa", "las", "ltas")


@CROSS
def test_every_cell_trains_under_every_protocol(method, model):
    done = []
    for protocol in PROTOCOLS:
        values = tiny_configuration(
            method, model, "dataset.fc_widths=[1,1,1]", f"protocol={protocol}"
        ).values
        # protocols differ in nothing that is about this cell
        if (values["method"], values["model"]) in done:
            continue
        done.append((values["method"], values["model"]))
        t = Tiny(method, model, f"protocol={protocol}")
        lr, steps = (1e-3, 60) if method in PAPER else (5e-3, 25)
        # of 5 units, their losses rise at first through some random B
        if model == "vit" or (method, model) == ("shared", "conv2_bn"):
            lr, steps = 5e-3, 100
        t.learner.set_lr(lr)
        losses = [t.learner.step(t.x, t.target)[0] for _ in range(steps)]
        if method in PAPER:
            step = t.learner.step(t.x, t.target, align=True)
            assert step[0] < losses[0]
            assert torch.isfinite(step[2 + 5 * t.method.frozen :]).all()
        # through a random B some go up at first; somebody's own may be poor
        elif method in group_options("method"):
            assert min(losses) < losses[0]
        assert all(value.isfinite().all() for value in t.state().values())


def kinds(net, kind):
    return [module for module in net.modules() if isinstance(module, kind)]


def test_conv3_downsamples_by_pooling_or_by_stride_to_the_same_sizes():
    pooled, strided = (Tiny("bp", "conv3", f"protocol={name}").net for name in ("authors", "paper"))
    assert [len(kinds(net, nn.MaxPool2d)) for net in (pooled, strided)] == [3, 0]
    assert [{layer.stride for layer in kinds(net, nn.Conv2d)} for net in (pooled, strided)] == [
        {(1, 1)},
        {(2, 2)},
    ]
    assert pooled.output_shapes() == strided.output_shapes()


def test_local_pooling_is_maximal_in_the_authors_conv3_only():
    pooling = {
        (protocol, model): {
            module.pooling for module in Tiny("las", model, f"protocol={protocol}").method.feedback
        }
        for protocol in PROTOCOLS
        for model in ("conv3", "conv3_bn", "resnet18")
    }
    assert [cell for cell, values in pooling.items() if values == {"max"}] == [
        ("authors", "conv3"),
        ("authors", "conv3_bn"),
    ]
    assert set.union(*pooling.values()) == {"max", "average"}


def test_local_loss_reduction_differs_by_two_in_the_text_and_by_the_number_of_classes_in_the_code():
    gradients = []
    for name in ("fair", "paper", "authors"):
        t = Tiny("las", "fc", f"protocol={name}")
        trace = t.net.trace(t.x, t.method.cuts)
        t.method.adapt(trace, t.loss.value_and_error(trace.logits, t.target)[1], t.target)
        gradients.append(t.method.feedback[0].weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1] * 2)
    torch.testing.assert_close(gradients[0], gradients[2] * CLASSES)


def test_dfa_starts_from_the_product_only_in_the_fair_protocol_and_the_figure():
    for name, *overrides in (
        ("fair",),
        ("paper",),
        ("authors",),
        ("paper", "experiment=alignment_figure"),
    ):
        t = Tiny("dfa", "fc", f"protocol={name}", *overrides, "dataset.fc_widths=[1,1,1]")
        product = t.net.weight_layers(3)[0].weight @ t.net.weight_layers(2)[0].weight
        same = torch.allclose(t.method.feedback[1].weight, product)
        assert same == (name == "fair" or bool(overrides)), name


@pytest.mark.parametrize("model", ["conv3", "conv3_bn", "resnet18"])
@pytest.mark.parametrize("method", ["las", "ltas"])
def test_no_local_module_of_a_convolutional_net_starts_as_a_product(method, model):
    t = Tiny(method, model, "protocol=authors")
    for i, module in enumerate(t.method.feedback, start=1):
        bound = module.weight[0].numel() ** -0.5  # PyTorch's default for a layer of this shape
        assert 0.7 * bound < module.weight.abs().max() <= bound
        weights = [
            layer.weight for above in range(i, t.net.depth) for layer in t.net.weight_layers(above)
        ]
        if module.linear and all(weight.dim() == 2 for weight in weights):
            assert not torch.allclose(module.weight, torch.linalg.multi_dot(weights[::-1]))


def test_kaiming_uniform_feedback_has_the_published_scale():
    torch.manual_seed(0)
    t = Tiny("dfa", "fc", "protocol=authors", classes=10)
    linear = torch.cat([module.weight.flatten() for module in t.method.feedback])
    bound = (2 * 3 / 10) ** 0.5  # gain √2, fan-in K = 10: standard deviation 0.447
    assert linear.abs().max() <= bound
    assert linear.abs().max() > 0.9 * bound
    t = Tiny("dfa", "conv3", "protocol=authors")
    for module, reader in zip(
        t.method.feedback, (t.net.weight_layers(1)[0], t.net.weight_layers(2)[0]), strict=False
    ):
        bound = (2 * 3 / (reader.in_channels * 25)) ** 0.5
        assert 0.8 * bound < module.weight.abs().max() <= bound


@pytest.mark.parametrize("model", ["fc", "conv2_bn"])
def test_kaiming_in_has_the_fan_in_of_b(model):
    t = Tiny("dkp", model, "method.init=kaiming_in", "method.top=direct", classes=10)
    for i, module in t.method.local_modules.items():
        d = t.net.output_shapes()[i - 1].numel()
        assert module.weight.shape == (10, d)
        bound = (2 * 3 / d) ** 0.5  # gain √2, fan-in d
        assert 0.8 * bound < module.weight.abs().max() <= bound


def test_a_linear_layer_that_reads_the_flattened_image_gives_a_dense_b():
    """In conv2 the third block pools and flattens h_2 before its linear layer; h_1 is read by a convolution."""
    t = Tiny("dfa", "conv2_bn", "method.feedback=conv", "method.top=direct")
    shapes = [module.weight.shape[1:] for module in t.method.local_modules.values()]
    h = t.net.output_shapes()
    assert shapes == [(h[0][0], 3, 3), (h[1].numel(),), (h[2].numel(),)]


def test_the_last_hidden_layer_receives_the_transposed_weights_in_the_fair_protocol_only():
    for name in PROTOCOLS:
        t = Tiny("dfa", "fc", f"protocol={name}")
        _, deltas, error = t.backward()
        trace = t.net.trace(t.x, keep=True)
        backprop = (error @ t.net.head.weight) * (trace.output(t.net.depth - 1) > 0)
        assert torch.allclose(deltas[-1], backprop) == (name == "fair")
        assert not any(p.requires_grad for p in t.method.parameters())


def test_a_leaking_skip_carries_backprop_s_signal_past_the_cut():
    leak, cut = (Tiny("dfa", "resnet18", f"model.skip={name}") for name in ("leak", "cut"))
    for t in (leak, cut):
        for module in t.method.feedback:
            module.weight.data.zero_()
    assert all((delta == 0).all() for delta in cut.backward()[1][:-1])
    trace, deltas, _ = leak.backward()
    above = deltas[-1]
    stage = leak.net.blocks[-1].pre.residuals[0]
    # what reaches h_4 without any direct signal is the shortcut's share of the stage above
    branch = trace.outputs[3].detach()
    shortcut = trace.outputs[3].detach().requires_grad_()
    a = stage(branch, shortcut)
    for residual in leak.net.blocks[-1].pre.residuals[1:]:
        a = residual(a.relu())
    (expected,) = torch.autograd.grad(a, shortcut, above)
    torch.testing.assert_close(deltas[-2], expected * (trace.output(4) > 0))
    assert deltas[-2].abs().max() > 0


def test_two_updates_of_the_statistics_are_two_forward_passes_over_the_batch():
    once, twice = (Tiny("las", "conv3_bn", f"model.batch_norm_updates={n}") for n in (1, 2))
    once.net(once.x)
    once.net(once.x)
    twice.net(twice.x)
    for a, b in zip(kinds(once.net, nn.BatchNorm2d), kinds(twice.net, nn.BatchNorm2d), strict=True):
        torch.testing.assert_close(a.running_mean, b.running_mean)
        torch.testing.assert_close(a.running_var, b.running_var)


@pytest.mark.parametrize(
    ("method", "below", "top"), [("las", 2, 2), ("ltas", 2, 1), ("dfa", 1, 1), ("bp", 1, 1)]
)
def test_the_authors_second_pass_moves_all_statistics_in_las_and_in_ltas_those_below_stage_4(
    method, below, top
):
    net = Tiny(method, "resnet18", "protocol=authors").net
    momenta = [
        {round(norm.momentum, 6) for norm in kinds(block, nn.BatchNorm2d)} for block in net.blocks
    ]
    expected = {1: {0.1}, 2: {0.19}}
    assert momenta == [expected[below]] * 4 + [expected[top]]
    norms = kinds(Tiny(method, "conv3_bn", "protocol=authors").net, nn.BatchNorm2d)
    assert {round(norm.momentum, 6) for norm in norms} == expected[below]


def test_accuracies_are_reported_for_the_last_the_chosen_and_the_best_epoch():
    found = reported_accuracies([(0.5, 0.4), (0.8, 0.6), (0.7, 0.9), (0.8, 0.5)])
    assert found == {"last": 0.5, "at_best_validation": 0.6, "best": 0.9, "best_epoch": 3}
    assert reported_accuracies([(None, 0.4)])["at_best_validation"] is None


def test_untrainable_runs_stop_after_six_epochs_by_the_published_rule():
    net, losses = Tiny("bp", "fc").net, torch.ones(3)
    assert early_end(losses, 5, net, best=0.11, initial=0.1) is None
    assert (
        "0.1100 < 1.15 × the initial 0.1000"
        in early_end(losses, 6, net, best=0.11, initial=0.1)["reason"]
    )
    assert early_end(losses, 6, net, best=0.11, initial=0.09) is None
    assert early_end(losses, 6, net, best=0.11, initial=0.0) is None
    losses[1] = torch.nan
    assert early_end(losses, 2, net, best=0.11, initial=0.0)["reason"].endswith(
        "from iteration 5 on"
    )


@pytest.mark.parametrize("method", ["las", "dkp"])
def test_fixed_blocks_keep_their_weights_and_B_still_learns(method):
    fixed, free = (Tiny(method, "fc", f"++method.fixed_blocks={count}") for count in (2, 0))
    before = fixed.state()
    for t in (fixed, free):
        torch.manual_seed(0)
        numbers = t.learner.step(t.x, t.target, True)
    assert numbers.isfinite().all()
    after, other = fixed.state(), free.state()
    for key, value in before.items():
        assert torch.equal(after[key], value) == key.startswith(("net.blocks.0", "net.blocks.1"))
        if key.startswith("method"):  # the first step's local modules and signals are as without it
            assert torch.equal(after[key], other[key])
