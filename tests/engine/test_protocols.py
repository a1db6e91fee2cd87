"""Check that every option which differs between the three protocols does what its name says."""

import pytest
import torch
from conftest import CLASSES, CROSS, PROTOCOLS, Tiny, tiny_configuration
from torch import nn

from dfl_experiments.configuration.composition import group_options
from dfl_experiments.running.epochs import early_end
from dfl_experiments.running.records import reported_accuracies

PAPER = ("bp", "shallow", "dfa", "las", "ltas")


@CROSS
def test_every_method_trains_every_model_under_every_protocol(method, model):
    tested = []
    for protocol in PROTOCOLS:
        options = ("dataset.fc_widths=[1,1,1]", f"protocol={protocol}")
        values = tiny_configuration(method, model, *options).values
        # skip a protocol whose options for this method and this model were already tested
        if (values["method"], values["model"]) in tested:
            continue
        tested.append((values["method"], values["model"]))
        t = Tiny(method, model, f"protocol={protocol}")
        lr, steps = (1e-3, 60) if method in PAPER else (5e-3, 25)
        # with some random B, the loss of these narrow nets first rises, so they need more steps
        if model == "vit" or (method, model) == ("shared", "conv2_bn"):
            lr, steps = 5e-3, 100
        t.learner.set_lr(lr)
        losses = [t.learner.step(t.x, t.target)[0] for _ in range(steps)]
        if method in PAPER:
            row = t.learner.step(t.x, t.target, align=True)
            assert row[0] < losses[0]
            assert torch.isfinite(row[2 + 5 * t.method.frozen :]).all()
        # with other methods the last loss may be above the first; a plugin's method need not learn
        elif method in group_options("method"):
            assert min(losses) < losses[0]
        assert all(value.isfinite().all() for value in t.state().values())


def modules_of(net, kind):
    return [module for module in net.modules() if isinstance(module, kind)]


def test_conv3_has_the_same_sizes_with_pooling_and_with_stride():
    pooled, strided = (Tiny("bp", "conv3", f"protocol={name}").net for name in ("authors", "paper"))
    assert len(modules_of(pooled, nn.MaxPool2d)) == 3
    assert len(modules_of(strided, nn.MaxPool2d)) == 0
    assert {layer.stride for layer in modules_of(pooled, nn.Conv2d)} == {(1, 1)}
    assert {layer.stride for layer in modules_of(strided, nn.Conv2d)} == {(2, 2)}
    assert pooled.output_shapes() == strided.output_shapes()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("model", ["conv3", "conv3_bn", "resnet18"])
def test_local_modules_use_max_pooling_only_in_the_authors_conv3(model, protocol):
    t = Tiny("las", model, f"protocol={protocol}")
    is_max = protocol == "authors" and model.startswith("conv3")
    expected = "max" if is_max else "average"
    assert {module.pooling for module in t.method.feedback} == {expected}


def test_gradient_of_las_s_local_loss_has_the_protocol_s_factor():
    gradients = []
    for name in ("fair", "paper", "authors"):
        t = Tiny("las", "fc", f"protocol={name}")
        trace = t.net.trace(t.x, t.method.cuts)
        _, error = t.loss.value_and_error(trace.logits, t.target)
        t.method.adapt(trace, error, t.target)
        gradients.append(t.method.feedback[0].weight.grad)
    fair, paper, authors = gradients
    torch.testing.assert_close(fair, paper * 2)
    torch.testing.assert_close(fair, authors * CLASSES)


@pytest.mark.parametrize(
    ("options", "is_product"),
    [
        (("protocol=fair",), True),
        (("protocol=paper",), False),
        (("protocol=authors",), False),
        (("protocol=paper", "experiment=alignment_figure"), True),
    ],
)
def test_dfa_s_b_starts_as_the_product_of_weights_where_stated(options, is_product):
    t = Tiny("dfa", "fc", *options, "dataset.fc_widths=[1,1,1]")
    product = t.net.weight_layers(3)[0].weight @ t.net.weight_layers(2)[0].weight
    assert torch.allclose(t.method.feedback[1].weight, product) == is_product


@pytest.mark.parametrize("model", ["conv3", "conv3_bn", "resnet18"])
@pytest.mark.parametrize("method", ["las", "ltas"])
def test_local_modules_of_convolutional_nets_start_with_pytorch_s_default(method, model):
    t = Tiny(method, model, "protocol=authors")
    for i, module in enumerate(t.method.feedback, start=1):
        bound = module.weight[0].numel() ** -0.5
        assert 0.7 * bound < module.weight.abs().max() <= bound
        weights = []
        for block_above in range(i, t.net.depth):
            weights += [layer.weight for layer in t.net.weight_layers(block_above)]
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
    for i in (1, 2):  # the layer that reads h_i is a 5×5 convolution
        (reader,) = t.net.weight_layers(i)
        weight = t.method.local_modules[i].weight
        bound = (2 * 3 / (reader.in_channels * 25)) ** 0.5
        assert 0.8 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize("model", ["fc", "conv2_bn"])
def test_kaiming_in_scales_b_by_the_size_of_the_hidden_layer(model):
    t = Tiny("dkp", model, "method.init=kaiming_in", "method.top=direct", classes=10)
    for i, module in t.method.local_modules.items():
        d = t.net.output_shapes()[i - 1].numel()
        assert module.weight.shape == (10, d)
        bound = (2 * 3 / d) ** 0.5  # gain √2, fan-in d
        assert 0.8 * bound < module.weight.abs().max() <= bound


def test_b_is_dense_where_a_linear_layer_reads_the_flattened_image():
    """In conv2 the third block pools and flattens h_2 before its linear layer; h_1 is read by a convolution."""
    t = Tiny("dfa", "conv2_bn", "method.feedback=conv", "method.top=direct")
    shapes = [module.weight.shape[1:] for module in t.method.local_modules.values()]
    h = t.net.output_shapes()
    assert shapes == [(h[0][0], 3, 3), (h[1].numel(),), (h[2].numel(),)]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_dfa_s_last_hidden_layer_gets_backprop_s_signal_only_in_the_fair_protocol(protocol):
    t = Tiny("dfa", "fc", f"protocol={protocol}")
    trace, deltas, error = t.backward()
    backprop = (error @ t.net.head.weight) * (trace.output(t.net.depth - 1) > 0)
    assert torch.allclose(deltas[-1], backprop) == (protocol == "fair")
    assert not any(p.requires_grad for p in t.method.parameters())


def test_a_leaking_skip_passes_backprop_s_signal_to_the_block_below():
    leak, cut = (Tiny("dfa", "resnet18", f"model.skip={name}") for name in ("leak", "cut"))
    for t in (leak, cut):
        for module in t.method.feedback:
            module.weight.data.zero_()
    _, cut_deltas, _ = cut.backward()
    assert all((delta == 0).all() for delta in cut_deltas[:-1])
    trace, deltas, _ = leak.backward()
    # with B = 0, h_4 gets only the gradient through the shortcut of the stage above
    branch = trace.output(4)
    shortcut = trace.output(4).requires_grad_()
    first_residual, *residuals = leak.net.blocks[-1].pre.residuals
    a = first_residual(branch, shortcut)
    for residual in residuals:
        a = residual(a.relu())
    (expected,) = torch.autograd.grad(a, shortcut, deltas[-1])
    torch.testing.assert_close(deltas[-2], expected * (trace.output(4) > 0))
    assert deltas[-2].abs().max() > 0


def test_two_batch_norm_updates_equal_two_forward_passes():
    once, twice = (Tiny("las", "conv3_bn", f"model.batch_norm_updates={n}") for n in (1, 2))
    once.net(once.x)
    once.net(once.x)
    twice.net(twice.x)
    for a, b in zip(
        modules_of(once.net, nn.BatchNorm2d), modules_of(twice.net, nn.BatchNorm2d), strict=True
    ):
        torch.testing.assert_close(a.running_mean, b.running_mean)
        torch.testing.assert_close(a.running_var, b.running_var)


@pytest.mark.parametrize(
    ("method", "below", "top"), [("las", 2, 2), ("ltas", 2, 1), ("dfa", 1, 1), ("bp", 1, 1)]
)
def test_authors_protocol_updates_batch_norm_twice_where_their_code_does(method, below, top):
    """Their second forward pass goes through the whole net in LAS, and ends below ResNet18's stage 4 in LTAS."""
    resnet = Tiny(method, "resnet18", "protocol=authors").net
    *blocks_below, last_block = resnet.blocks
    conv_net = Tiny(method, "conv3_bn", "protocol=authors").net
    momentum = {
        1: 0.1,
        2: 0.19,
    }  # by the number of updates: two with momentum 0.1 are one with 0.19
    for block in (*blocks_below, conv_net):
        for norm in modules_of(block, nn.BatchNorm2d):
            assert norm.momentum == pytest.approx(momentum[below])
    for norm in modules_of(last_block, nn.BatchNorm2d):
        assert norm.momentum == pytest.approx(momentum[top])


def test_reports_the_accuracy_of_the_last_the_chosen_and_the_best_epoch():
    validation_and_test = [(0.5, 0.4), (0.8, 0.6), (0.7, 0.9), (0.8, 0.5)]
    expected = {"last": 0.5, "at_best_validation": 0.6, "best": 0.9, "best_epoch": 3}
    assert reported_accuracies(validation_and_test) == expected
    assert reported_accuracies([(None, 0.4)])["at_best_validation"] is None


def test_runs_without_progress_end_after_six_epochs():
    net, losses = Tiny("bp", "fc").net, torch.ones(3)
    assert early_end(losses, 5, net, best=0.11, initial=0.1) is None
    end = early_end(losses, 6, net, best=0.11, initial=0.1)
    assert "0.1100 < 1.15 × the initial 0.1000" in end["reason"]
    assert early_end(losses, 6, net, best=0.11, initial=0.09) is None
    assert early_end(losses, 6, net, best=0.11, initial=0.0) is None


def test_runs_end_at_a_loss_that_is_not_finite():
    losses = torch.tensor([1.0, torch.nan, 1.0])  # of epoch 2, so the second loss is of iteration 5
    end = early_end(losses, 2, Tiny("bp", "fc").net, best=0.11, initial=0.0)
    assert end["reason"].endswith("from iteration 5 on")


@pytest.mark.parametrize("method", ["las", "dkp"])
def test_fixed_blocks_keep_their_weights_and_b_learns_as_without_them(method):
    fixed, free = (Tiny(method, "fc", f"++method.fixed_blocks={count}") for count in (2, 0))
    before = fixed.state()
    for t in (fixed, free):
        torch.manual_seed(0)
        row = t.learner.step(t.x, t.target, align=True)
        assert row.isfinite().all()
    after, expected = fixed.state(), free.state()
    for key, value in before.items():
        assert torch.equal(after[key], value) == key.startswith(("net.blocks.0", "net.blocks.1"))
        if key.startswith("method"):
            assert torch.equal(after[key], expected[key])
