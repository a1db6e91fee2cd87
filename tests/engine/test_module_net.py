"""Check the laws of feedback learning on modules that are not chains of blocks, and the refusal of wrong boundaries."""

import copy

import pytest
import torch
from conftest import BUILT_IN, METHODS, tiny_configuration
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torchvision.models import DenseNet, ResNet, VisionTransformer, densenet121, resnet18, vgg11_bn
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import VGG, make_layers

import dfl_experiments as dfl
from dfl_experiments.engine.alignment import backprop_deltas
from dfl_experiments.engine.initialise import initialise
from dfl_experiments.engine.learner import Learner
from dfl_experiments.engine.losses import LOSSES
from dfl_experiments.engine.module_net import ModuleNet
from dfl_experiments.errors import UserError
from dfl_experiments.methods import Sequential

CLASSES, BATCH = 4, 5


class Recurrent(nn.Module):
    """A GRU that returns its last hidden state."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width, hidden, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gru(x)[0][:, -1]


def vgg() -> nn.Module:
    with torch.device("meta"):  # the original classifier, replaced below, has 120 million weights
        net = VGG(nn.Identity(), init_weights=False)
    net.features = make_layers([5, "M", 6, "M", 7], batch_norm=True)
    net.avgpool = nn.AdaptiveAvgPool2d(2)
    hidden = [
        nn.Linear(28, 9),
        nn.ReLU(True),
        nn.Dropout(),
        nn.Linear(9, 8),
        nn.ReLU(True),
        nn.Dropout(),
    ]
    net.classifier = nn.Sequential(*hidden, nn.Linear(8, CLASSES))
    return net


def resnet() -> nn.Module:
    net = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)
    net.conv1, net.bn1 = nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
    for k, (below, width) in enumerate([(5, 5), (5, 6), (6, 7)], start=1):
        shortcut = None
        if k > 1:
            shortcut = nn.Sequential(
                nn.Conv2d(below, width, 1, 2, bias=False), nn.BatchNorm2d(width)
            )
        first = BasicBlock(below, width, 1 + (k > 1), shortcut)
        setattr(net, f"layer{k}", nn.Sequential(first, BasicBlock(width, width)))
    net.layer4, net.fc = nn.Sequential(BasicBlock(7, 7)), nn.Linear(7, CLASSES)
    return net


def densenet() -> nn.Module:
    return DenseNet(4, (2, 2, 2), num_init_features=6, bn_size=2, num_classes=CLASSES)


def transformer() -> nn.Module:
    return VisionTransformer(
        8, 4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12, num_classes=CLASSES
    )


def gru() -> nn.Module:
    layers = [
        nn.Embedding(11, 6),
        Recurrent(6, 7),
        nn.Linear(7, 9),
        nn.Tanh(),
        nn.Linear(9, CLASSES),
    ]
    return nn.Sequential(*layers)


class Functional(nn.Module):
    """A net that calls one activation as a function, and one ReLU module twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 5, 3, 2), nn.Conv2d(5, 6, 3, 2)
        self.hidden, self.head = nn.Linear(54, 9), nn.Linear(9, CLASSES)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.conv1(x))
        h = self.relu(self.conv2(h)).flatten(1)
        return self.head(self.relu(self.hidden(h)))


class WithModules(Functional):
    """The same net with a module for each activation."""

    def __init__(self) -> None:
        super().__init__()
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.relu1(self.conv1(x))
        h = self.relu2(self.conv2(h)).flatten(1)
        return self.head(self.relu3(self.hidden(h)))


def layers() -> nn.Module:
    """Return a net where some boundaries are weight layers."""
    return nn.Sequential(
        nn.Linear(6, 5), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 8), nn.Linear(8, CLASSES)
    )


IMAGE, TOKENS = torch.zeros(1, 3, 16, 16), torch.zeros(1, 5, dtype=torch.long)
NETS = {
    "vgg": vgg,
    "resnet": resnet,
    "densenet": densenet,
    "transformer": transformer,
    "gru": gru,
    "functional": Functional,
}
EXAMPLES = dict.fromkeys(NETS, IMAGE) | {"transformer": torch.zeros(1, 3, 8, 8), "gru": TOKENS}
EVERY_NET = pytest.mark.parametrize("name", NETS)


class Case:
    """A tiny float64 module as a net, with a method and a batch."""

    def __init__(self, name: str, method: str, *overrides: str) -> None:
        torch.manual_seed(3)
        configuration = tiny_configuration(method, "fc", "dataset.fc_widths=[1,1,1]", *overrides)
        self.loss = LOSSES["cross_entropy"]
        module = (layers if name == "layers" else NETS[name])().double()
        example = torch.zeros(1, 6) if name == "layers" else EXAMPLES[name]
        self.net = ModuleNet(module, "auto", example)
        for p in self.net.parameters():  # some heads of torchvision start at zero
            if not p.any():
                p.data.normal_(std=0.1)
        self.method = configuration.components["method"].build(
            net=self.net, num_classes=CLASSES, loss=self.loss
        )
        self.optimizer = configuration.components["optimizer"].build()
        self.learner = Learner(self.net, self.method, self.loss, self.optimizer)
        self.x = self.net.blank(BATCH)
        if self.x.is_floating_point():
            self.x = torch.randn_like(self.x)
        else:
            self.x = torch.randint_like(self.x, 11)
        self.target = torch.randint(CLASSES, (BATCH,))

    def trace(self, keep: bool = False):
        torch.manual_seed(5)  # for dropout
        return self.net.trace(
            self.x, self.method.cuts, self.method.frozen, keep, self.method.transpose
        )

    def backward(self, keep: bool = True):
        """Return the trace, the applied signals and the error."""
        trace = self.trace(keep)
        _, error = self.loss.value_and_error(trace.logits, self.target)
        return trace, trace.backward(self.method.signal, error, self.target), error

    def gradients(self) -> list[torch.Tensor]:
        return [p.grad.clone() for p in self.net.parameters()]


def autograd(case: Case, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the gradients of the plain module, without a net around it."""
    module = copy.deepcopy(case.net.module)
    torch.manual_seed(5)
    logits = module(x)
    _, error = case.loss.value_and_error(logits, case.target)
    logits.backward(error)
    return [p.grad for p in module.parameters()]


@EVERY_NET
@pytest.mark.parametrize("keep", [False, True])
def test_backprop_through_the_trace_is_plain_autograd(name, keep):
    case = Case(name, "bp")
    expected = autograd(case, case.x)
    _, deltas, _ = case.backward(keep)
    assert all(map(torch.equal, case.gradients(), expected))
    assert len(deltas) == (case.net.depth - 1 if keep else 0)


@EVERY_NET
def test_backprop_s_signals_at_cut_boundaries_give_its_gradients(name):
    case = Case(name, "bp")
    expected = autograd(case, case.x)
    torch.manual_seed(5)
    trace = case.net.trace(case.x, range(1, case.net.depth), keep=True)
    assert len(trace.segments) == case.net.depth
    _, error = case.loss.value_and_error(trace.logits, case.target)
    signals = dict(enumerate(backprop_deltas(trace, error), start=1))
    deltas = trace.backward(lambda i, *_: signals[i], error, case.target)
    for i, delta in enumerate(deltas, start=1):
        assert torch.equal(delta, signals[i])
    torch.testing.assert_close(case.gradients(), expected, rtol=1e-9, atol=1e-15)


def is_sequential(method):
    return issubclass(tiny_configuration(method, "fc").components["method"].target, Sequential)


# weights that sequential rules cannot replace
IRREPLACEABLE = {"transformer": "in_proj_weight of MultiheadAttention", "gru": "_l0 of GRU"}
PAIRS = [(name, method) for name in NETS for method in METHODS if method != "adfa"]
REFUSED = [pair for pair in PAIRS if pair[0] in IRREPLACEABLE and is_sequential(pair[1])]
ACCEPTED = [pair for pair in PAIRS if pair not in REFUSED]


@pytest.mark.parametrize(("name", "method"), REFUSED)
def test_sequential_rules_refuse_nets_with_attention_or_a_gru(name, method):
    with pytest.raises(UserError, match=IRREPLACEABLE[name]):
        Case(name, method)


@pytest.mark.parametrize(("name", "method"), ACCEPTED)
def test_every_rule_trains_its_weights_and_measures_alignment(name, method):
    case = Case(name, method)
    before = copy.deepcopy(case.net.state_dict())
    case.learner.step(case.x, case.target)  # FDFA's B is zero before the first step
    row = case.learner.step(case.x, case.target, align=True)
    cosines = row[2:].view(case.net.depth - 1, 5)[:, 0]
    silent = torch.arange(case.net.depth - 1) < case.method.frozen
    assert torch.equal(cosines.isnan(), silent)
    exact = torch.arange(1, case.net.depth) >= case.method.exact_from
    torch.testing.assert_close(cosines[exact], torch.ones_like(cosines[exact]))
    if isinstance(case.method, Sequential):
        assert not torch.allclose(cosines[~exact], torch.ones_like(cosines[~exact]))
    trained = {id(p) for p in case.learner.parameters}
    for key, p in case.net.module.named_parameters():
        assert torch.equal(p, before[key]) == (id(p) not in trained), key


@pytest.mark.parametrize("name", ["vgg", "resnet", "densenet", "layers"])
def test_feedback_alignment_with_b_equal_to_w_is_backprop(name):
    case = Case(name, "fa", "method.init=copy")
    expected = autograd(case, case.x)
    trace, deltas, error = case.backward()
    torch.testing.assert_close(case.gradients(), expected, rtol=1e-9, atol=1e-15)
    for delta, reference in zip(deltas, backprop_deltas(trace, error), strict=True):
        torch.testing.assert_close(delta, reference, rtol=1e-9, atol=1e-15)


RESNET_SHAPES = [
    (5, 3, 3),
    (5, 3, 3),
    (5 * 8 * 8,),
    (6, 3, 3),
    (6 * 4 * 4,),
    (7, 3, 3),
    (7, 3, 3),
    (7, 1, 1),
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vgg", [(5, 3, 3), (6, 3, 3), (28,), (9,), (8,)]),
        ("resnet", RESNET_SHAPES),
        ("transformer", [(8,), (8,), (8,)]),  # the same B for all tokens
        ("gru", [(5 * 6,), (7,), (9,)]),
    ],
)
def test_b_has_the_shape_of_the_layer_that_alone_reads_h_or_is_dense(name, expected):
    modules = Case(name, "dfa", "method.top=direct").method.local_modules
    assert [tuple(module.weight.shape[1:]) for module in modules.values()] == expected


class Pooled(nn.Module):
    """Apply a layer to the last axis, take the mean over other axes, and apply another layer."""

    def __init__(self, features: int, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.below, self.axes = nn.Linear(3, features), axes
        self.above = nn.Linear(features, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(torch.relu(self.below(x)).mean(self.axes))


@pytest.mark.parametrize(
    ("shape", "axes", "feedback"),
    [
        # h (6, 5, 6): the channels may be the first or the last axis
        ((6, 5, 3), (1, 2), (6 * 5 * 6,)),
        # h (7, 5, 6): the channels are the last axis
        ((7, 5, 3), (1, 2), (7 * 5 * 6,)),
        # h (6, 6): the channels may be the first or the last axis
        ((6, 3), (1,), (6 * 6,)),
        # h (7, 6): 7 tokens
        ((7, 3), (1,), (6,)),
    ],
)
def test_feedback_is_dense_where_the_channel_axis_is_ambiguous_or_last(shape, axes, feedback):
    net, example = Pooled(6, axes), torch.rand(1, *shape)
    rule = dfl.rule("dfa", net, example, boundaries=["below"], top="direct")
    (module,) = rule.method.local_modules.values()
    assert tuple(module.weight.shape[1:]) == feedback


def test_b_is_not_zero_if_the_head_starts_at_zero():
    net = ModuleNet(transformer(), "auto", EXAMPLES["transformer"])
    assert not net.module.heads.head.weight.any()
    method = tiny_configuration("dfa", "fc", "method.init=product").components["method"]
    modules = method.build(net=net, num_classes=CLASSES, loss=LOSSES["cross_entropy"]).local_modules
    assert all(module.weight.any() for module in modules.values())


@EVERY_NET
def test_fdfa_s_tangents_are_products_with_the_jacobian(name):
    case = Case(name, "fdfa")
    # evaluation mode, so that there is no dropout; but the transformer's attention has no forward derivative there
    case.net.train(name == "transformer")
    trace = case.net.trace(case.x, case.method.cuts, keep=True)
    with torch.no_grad():
        noise, tangent = case.method.tangents(trace)
    assert sorted(noise) == sorted(case.method.cuts)
    uncut = case.net.trace(case.x, keep=True)
    expected = torch.zeros_like(tangent)
    for k in range(CLASSES):
        logit_k = uncut.logits[:, k].sum()
        for i, p in noise.items():
            (row,) = torch.autograd.grad(logit_k, uncut.preactivations[i - 1], retain_graph=True)
            expected[:, k] += (row * p).flatten(1).sum(1)
    torch.testing.assert_close(tangent, expected)


@EVERY_NET
def test_state_dict_is_that_of_the_module(name):
    case, module = Case(name, "bp"), NETS[name]().double()
    state = case.net.state_dict()
    assert list(state) == list(module.state_dict())
    module.load_state_dict(state)
    case.net.load_state_dict(module.state_dict())
    module.eval()
    assert torch.equal(case.net.eval()(case.x), module(case.x))


@EVERY_NET
def test_making_a_net_changes_neither_the_module_nor_the_random_state(name):
    torch.manual_seed(0)
    module = NETS[name]().double()
    frozen = next(module.parameters()).requires_grad_(False)
    module.train()
    next(module.children()).eval()
    modes = [submodule.training for submodule in module.modules()]
    state, random = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    net = ModuleNet(module, "auto", EXAMPLES[name])
    net.probe()
    assert torch.equal(torch.get_rng_state(), random)
    assert [submodule.training for submodule in module.modules()] == modes
    for key, value in module.state_dict().items():
        assert torch.equal(value, state[key])
    assert not frozen.requires_grad
    assert all(p is not frozen for p in net.parameters_above(0))


class Counter(nn.Module):
    """Count the forward passes, also in evaluation mode, and divide by their number."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return h / self.count


@pytest.mark.parametrize("method", ["bp", "dfa", "las", "fdfa", "fa", "wm"])
def test_making_a_rule_does_not_change_buffers(method):
    module = nn.Sequential(
        nn.Linear(6, 5), nn.ReLU(), Counter(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, CLASSES)
    )
    dfl.rule(method, module, torch.zeros(1, 6), optimizer=torch.optim.SGD)
    assert module[2].count == 0


@pytest.mark.parametrize("method", ["bp", "shallow", "dfa", "las", "fa"])
def test_frozen_weights_keep_their_values_and_alignment_is_measured_above(method):
    case = Case("vgg", method)
    for p in case.net.parameters_above(0)[:4]:
        p.requires_grad_(False)
    case.learner = Learner(case.net, case.method, case.loss, case.optimizer)
    before = copy.deepcopy(case.net.state_dict())
    row = case.learner.step(case.x, case.target, align=True)
    case.learner.step(case.x, case.target)
    assert row[2:].view(-1, 5)[case.method.frozen :, 0].isfinite().all()
    for key, p in case.net.module.named_parameters():
        assert p.requires_grad or torch.equal(p, before[key])


def test_forward_reports_the_output_of_every_boundary():
    case = Case("vgg", "bp")
    case.net.eval()
    outputs = {}
    assert torch.equal(case.net(case.x, outputs.setdefault), case.net.module(case.x))
    assert [h.shape[1:] for h in outputs.values()] == case.net.output_shapes()
    assert torch.equal(outputs[1], case.net.module.features[:4](case.x))


def test_ends_in_relu_recognises_the_activation():
    vgg_net, gru_net = Case("vgg", "bp").net, Case("gru", "bp").net
    assert all(vgg_net.ends_in_relu(i) for i in range(1, vgg_net.depth))
    assert not gru_net.ends_in_relu(3)  # a tanh


RESNET_BOUNDARIES = [
    "maxpool",
    "layer1.0",
    "layer1",
    "layer2.0",
    "layer2",
    "layer3.0",
    "layer3",
    "layer4.0",
    "avgpool",
]
EXPECTED_BOUNDARIES = {
    "vgg11_bn": [
        *(f"features.{i}" for i in (3, 7, 10, 14, 17, 21, 24)),
        "avgpool",
        "classifier.2",
        "classifier.5",
    ],
    "resnet18": RESNET_BOUNDARIES,
    "densenet121": [
        "features.pool0",
        *(f"features.transition{i}{end}" for i in (1, 2, 3) for end in (".relu", "")),
        "relu@121",
    ],
    "transformer": ["encoder.dropout", "encoder.layers.encoder_layer_0", "encoder"],
    "gru": ["0", "1", "3"],
    "functional": ["relu@1", "relu@2", "relu@3"],
}
BUILDERS = {"vgg11_bn": vgg11_bn, "resnet18": resnet18, "densenet121": densenet121}


@pytest.mark.parametrize("method", sorted({*BUILT_IN} - {"adfa"}))
def test_activation_functions_are_boundaries_like_activation_modules(method):
    torch.manual_seed(0)
    x, target = torch.randn(BATCH, 3, 16, 16), torch.randint(CLASSES, (BATCH,))
    gradients, signals = [], []
    for net_class in (Functional, WithModules):
        torch.manual_seed(1)
        module = net_class().double()
        rule = dfl.rule(method, module, x[:1], optimizer=lambda b: torch.optim.SGD(b, 0.1), lr=0.1)
        rule.backward(x.double(), target)
        gradients.append([p.grad for p in module.parameters() if p.grad is not None])
        signals.append(rule.alignment(x.double(), target))
    assert list(signals[0]) == ["relu@1", "relu@2", "relu@3"]
    assert list(signals[1]) == ["relu1", "relu2", "relu3"]
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close([*signals[0].values()], [*signals[1].values()], equal_nan=True)


@pytest.mark.parametrize("is_early", [True, False], ids=["compiled before", "compiled after"])
def test_compiling_does_not_change_gradients_with_functional_boundaries(is_early):
    gradients = []
    for is_compiled in (True, False):
        torch.manual_seed(1)
        module = Functional()
        if is_compiled and is_early:
            module.compile(backend="aot_eager")
            module(IMAGE)
        rule = dfl.rule("dfa", module, IMAGE)
        if is_compiled:
            module.compile(backend="aot_eager")
        rule.backward(IMAGE, torch.zeros(1, dtype=torch.long))
        gradients.append([p.grad for p in module.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_refuses_a_forward_pass_with_another_number_of_calls():
    class Skipping(Functional):
        is_short = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = F.relu(self.conv1(x))
            h = self.conv2(h) if self.is_short else F.relu(self.conv2(h))
            return self.head(F.relu(self.hidden(h.flatten(1))))

    module = Skipping()
    rule = dfl.rule("dfa", module, IMAGE, ["relu@1", "relu@2"])
    module.is_short = True
    with pytest.raises(UserError, match="this forward pass calls relu 2 times"):
        rule.backward(IMAGE, torch.zeros(1, dtype=torch.long))


def test_an_activation_function_of_a_weight_is_no_boundary():
    class BoundedWeights(Functional):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = F.relu(self.conv1(x))
            h = F.relu(self.conv2(h)).flatten(1)
            return F.linear(F.relu(self.hidden(h)), torch.tanh(self.head.weight[:2]))

    assert ModuleNet(BoundedWeights(), "auto", IMAGE).boundaries == ["relu@1", "relu@2", "relu@3"]


IN_PLACE = {
    "relu_": F.relu_,
    "method": lambda h: h.relu_(),
    "inplace=True": lambda h: F.relu(h, inplace=True),
    "module": nn.ReLU(inplace=True),
}


class InPlace(Functional):
    """`Functional` whose first activation works in place. is_used: whether it uses the returned tensor."""

    def __init__(self, activation, is_used: bool, is_pooled: bool = False) -> None:
        super().__init__()
        self.activation, self.is_used = activation, is_used
        self.pool = nn.MaxPool2d(1) if is_pooled else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(x)
        if self.is_used:
            h = self.activation(h)
        else:
            self.activation(h)
        h = h if self.pool is None else self.pool(h)
        h = F.relu(self.conv2(h)).flatten(1)
        return self.head(F.relu(self.hidden(h)))


@pytest.mark.parametrize("kind", IN_PLACE)
def test_an_in_place_activation_is_a_boundary_if_its_result_is_used(kind):
    gradients = []
    for activation in (IN_PLACE[kind], F.relu):
        torch.manual_seed(1)
        module = InPlace(activation, is_used=True)
        rule = dfl.rule("dfa", module, IMAGE)
        assert len(rule.net.boundaries) == 3
        rule.backward(IMAGE, torch.zeros(1, dtype=torch.long))
        gradients.append([p.grad for p in module.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", IN_PLACE)
def test_refuses_an_in_place_activation_whose_result_is_not_used(kind):
    for names in ("auto", ["relu@1", "relu@2"]):
        with pytest.raises(UserError, match="relu@1: it works in place and its result is not used"):
            ModuleNet(InPlace(IN_PLACE[kind], is_used=False), names, IMAGE)


@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_pooling_layer_after_an_in_place_activation_is_the_boundary(kind):
    pooled = ModuleNet(InPlace(IN_PLACE[kind], is_used=False, is_pooled=True), "auto", IMAGE)
    assert pooled.boundaries == ["pool", "relu@2", "relu@3"]


def test_only_the_last_call_in_a_recurrent_loop_is_a_boundary():
    class RecurrentLoop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input, self.recurrent = nn.Linear(3, 5), nn.Linear(5, 5)
            self.head = nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.zeros(len(x), 5)
            for t in range(x.shape[1]):
                h = torch.tanh(self.input(x[:, t]) + self.recurrent(h))
            return self.head(h)

    assert dfl.boundaries(RecurrentLoop(), torch.zeros(1, 30, 3)) == ["tanh@30"]


def test_an_activation_called_in_one_mode_only_is_no_boundary():
    class DependsOnMode(Functional):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.conv1(x)
            h = F.relu(h) if self.training else h.clamp(min=0)
            h = F.relu(self.conv2(h)).flatten(1)
            return self.head(self.hidden(h).tanh())

    assert ModuleNet(DependsOnMode(), "auto", IMAGE).boundaries == ["conv1", "conv2", "tanh@1"]
    with pytest.raises(UserError, match="relu@1: in training mode it is another call"):
        ModuleNet(DependsOnMode(), ["relu@1"], IMAGE)


@pytest.mark.parametrize("name", EXPECTED_BOUNDARIES)
def test_automatic_boundaries_are_valid_and_separate_all_weights(name):
    if name in BUILDERS:
        module, example = BUILDERS[name](), torch.zeros(1, 3, 32, 32)
    else:
        module, example = NETS[name](), EXAMPLES[name]
    net = ModuleNet(module, "auto", example)
    assert net.boundaries == EXPECTED_BOUNDARIES[name]
    valid = dfl.boundaries(module, example)
    assert [boundary for boundary in valid if boundary in net.boundaries] == net.boundaries
    assert sum(len(block) for block in net.weights) == len(list(module.parameters()))


class InvalidBoundaries(nn.Module):
    """A net whose submodules cannot be boundaries, each for another reason."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (nn.Linear(4, 4) for _ in range(4))
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.first.weight
        self.relu, self.unused, self.bypassed = nn.ReLU(), nn.Linear(4, 4), nn.Identity()
        self.gru, self.in_place, self.eval_only = nn.GRU(4, 4), nn.ReLU(inplace=True), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.relu(self.first(x))
        h = self.gru(h)[0]
        h = self.relu(self.tied(h))
        h = h + self.second(self.bypassed(h))
        h = self.in_place(self.third(h))
        if not self.training:
            h = self.eval_only(h)
        return self.last(h)


REFUSALS = {
    "nothing": "there is no such submodule or call of an activation function; there are tied",
    "relu": "it is called 2 times in a forward pass, must be called once",
    "unused": "it is called 0 times in a forward pass, must be called once",
    "eval_only": "it is called 0 times",
    "bypassed": "the forward pass has a path that bypasses it",
    "gru": "its output is not one tensor",
    "first": "the blocks below and above it share the weight first.weight",
    "third": "its output is changed in place afterwards; the next valid boundary is in_place",
    "last": "no weight is above it",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses_submodules_that_cannot_be_boundaries(name):
    with pytest.raises(UserError, match=f"model.boundaries: {name}: {REFUSALS[name]}"):
        ModuleNet(InvalidBoundaries(), [name], torch.zeros(1, 4))


def test_refuses_boundaries_without_a_weight_between_them():
    with pytest.raises(UserError, match=r"features.2, features.3: there is no weight between them"):
        ModuleNet(vgg(), ["features.3", "features.2"], IMAGE)


def test_refuses_modules_that_cannot_be_a_net():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(UserError, match="put a model that returns a tuple or a dictionary into a"):
        ModuleNet(Pair(4, 4), "auto", torch.zeros(1, 4))
    with pytest.raises(UserError, match=r"the forward pass fails for input shape \(N, 3\)"):
        ModuleNet(nn.Linear(4, 4), "auto", torch.zeros(1, 3))
    with pytest.raises(UserError, match="the module is compiled; pass the original module"):
        ModuleNet(torch.compile(nn.Linear(4, 4)), "auto", torch.zeros(1, 4))
    message = "no submodule has weight layers both below and above its output"
    with pytest.raises(UserError, match=message):
        ModuleNet(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "auto", torch.zeros(1, 4))
    with pytest.raises(UserError, match="the module has no parameters"):
        ModuleNet(nn.ReLU(), "auto", torch.zeros(1, 4))


def test_refuses_data_parallel():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(UserError, match="DataParallel would not average the rule's gradients"):
        ModuleNet(nn.DataParallel(net), "auto", torch.zeros(1, 4))


class Branches(nn.Module):
    """Two parallel branches, then a head."""

    def __init__(self):
        super().__init__()
        self.left, self.right = (nn.Sequential(nn.Linear(4, 5), nn.Tanh()) for _ in range(2))
        self.middle, self.head = nn.Sequential(nn.Linear(10, 6), nn.Tanh()), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(self.middle(torch.cat([self.left(x), self.right(x)], 1)))


class TokensAsBatch(nn.Module):
    """A net that moves the tokens into the batch axis for its first layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(15, 6), nn.Tanh())
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        h = self.first(x.reshape(-1, 4))
        return self.head(self.second(h.reshape(len(x), -1)))


class Gated(nn.Module):
    """A net with gated linear units, which halve the vector that the next layer reads."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 12), nn.Linear(6, 8)
        self.gate, self.head = nn.GLU(), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.gate(self.second(self.gate(self.first(x)))))


def with_weight_norm():
    return nn.Sequential(
        weight_norm(nn.Linear(4, 5)),
        nn.Tanh(),
        weight_norm(nn.Linear(5, 6)),
        nn.Tanh(),
        nn.Linear(6, 4),
    )


@pytest.mark.parametrize(
    ("make", "shape", "expected"),
    [
        (Branches, (4,), ["left", "middle"]),
        (TokensAsBatch, (3, 4), ["second"]),
        (Gated, (4,), ["first", "second"]),
        (with_weight_norm, (4,), ["1", "3"]),
    ],
)
@pytest.mark.parametrize("method", ["bp", "dfa", "las"])
def test_layers_with_exact_signals_get_autograd_s_gradients_in_unusual_nets(
    make, shape, expected, method
):
    torch.manual_seed(1)
    module = make()
    x, target = torch.randn(BATCH, *shape), torch.randint(CLASSES, (BATCH,))
    rule = dfl.rule(method, module, x[:1], optimizer=lambda p: torch.optim.SGD(p, 0.1))
    assert rule.net.boundaries == expected
    rule.backward(x, target)
    gradients = [p.grad.clone() for p in module.parameters()]
    assert set(rule.alignment(x, target)) == set(expected)
    module.zero_grad()
    F.cross_entropy(module(x), target).backward()
    exact = set()  # ids of the weights whose gradients equal BP's by construction
    for weights in rule.net.weights[rule.method.exact_from :]:
        exact |= set(map(id, weights))
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        if method == "bp" or id(parameter) in exact:
            assert torch.allclose(gradient, parameter.grad, atol=1e-6)
        else:
            assert gradient.any()


def test_refuses_boundaries_in_parallel_branches():
    with pytest.raises(UserError, match="left, right: are in parallel branches; choose only one"):
        ModuleNet(Branches(), ["left", "right"], torch.zeros(1, 4))


@pytest.mark.parametrize(("names", "warns"), [("auto", True), (["middle"], False)])
def test_warns_of_a_branch_to_which_no_signal_is_sent(names, warns, caplog):
    ModuleNet(Branches(), names, torch.zeros(1, 4))
    assert ("no signal is sent to right" in caplog.text) == warns


def test_refuses_a_boundary_whose_first_axis_is_not_the_batch():
    with pytest.raises(UserError, match="first: the first axis of its output is not the batch"):
        ModuleNet(TokensAsBatch(), ["first"], torch.zeros(1, 3, 4))


def test_refuses_a_recurrent_layer_that_returns_a_tuple():
    class LastState(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.gru(x)[0][:, -1])

    for names in ("auto", ["gru"]):
        message = "the output of gru is not one tensor: put it into a module"
        with pytest.raises(UserError, match=message):
            ModuleNet(LastState(), names, torch.zeros(1, 6, 4))


def test_names_the_shared_weight_that_prevents_a_boundary():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.first = nn.Embedding(3, 8), nn.GRU(8, 8, batch_first=True)
            self.last = nn.Linear(8, 3, bias=False)
            self.last.weight = self.words.weight

        def forward(self, x):
            return self.last(self.first(self.words(x))[0].mean(1).relu())

    with pytest.raises(UserError, match=r"no boundary; words: .* share the weight words\.weight"):
        ModuleNet(Tied(), "auto", torch.zeros(1, 4, dtype=torch.int64))


def test_refuses_a_forward_pass_without_a_boundary():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    wrapped = ModuleNet(net, ["1"], torch.zeros(1, 4))
    net[1] = nn.Tanh()  # the boundary is now another module
    with pytest.raises(UserError, match="model: 1 is not called in this forward pass"):
        wrapped.trace(torch.zeros(2, 4))


def test_a_copied_net_uses_its_own_weights():
    case = Case("vgg", "dfa")
    other = copy.deepcopy(case.net)
    trace = other.trace(case.x, case.method.cuts)
    assert len(trace.segments) == len(case.method.cuts) + 1
    assert trace.segments[0].parameters[0] is next(other.module.parameters())


def test_initialise_draws_weights_and_keeps_normalisation():
    net = Case("vgg", "bp").net
    before = copy.deepcopy(net.state_dict())
    initialise(net, "orthogonal")
    assert not torch.equal(net.state_dict()["classifier.3.weight"], before["classifier.3.weight"])
    assert torch.equal(net.state_dict()["features.1.weight"], before["features.1.weight"])
