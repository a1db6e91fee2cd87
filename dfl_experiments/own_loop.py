"""Use a learning rule in your own training loop: call `rule.backward` in place of `loss.backward`."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dfl_experiments.configuration.components import component
from dfl_experiments.configuration.composition import compose, group_options, plain, register_resolvers
from dfl_experiments.configuration.refusals import did_you_mean
from dfl_experiments.engine.alignment import measure
from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.losses import LOSSES, OutputLoss, precise
from dfl_experiments.engine.method import Method
from dfl_experiments.engine.module_net import Boundaries, ModuleNet
from dfl_experiments.errors import UserError
from dfl_experiments.measured import QUANTITIES
from dfl_experiments.ranges import LossName

Loss = Callable[[Tensor, Tensor], Tensor]
Gradients = list[Tensor | None]


class Rule:
    """A learning rule for one network. It owns B and B's optimizer.

    net: the network, with its boundaries.
    method: computes the error signals.
    optimizer: B's optimizer; None if B does not learn by gradients.
    lr: the network's learning rate, which rules with `decay` use. Set it again when a scheduler changes the rate.
    """

    def __init__(
        self, net: BlockNet, method: Method, loss: OutputLoss, optimizer: torch.optim.Optimizer | None, lr: float | None
    ) -> None:
        self.net, self.method, self.loss, self.optimizer, self.lr = net, method, loss, optimizer, lr

    def backward(self, inputs: Tensor, target: Tensor, loss: Loss | None = None, step_feedback: bool = True) -> Tensor:
        """Add the rule's gradients to `.grad` of the network's parameters, and return the loss.

        B is updated before the error signals are computed. If the rule has `sends_first`, B is updated after them.
        The forward pass runs in the caller's autocast. The error signals are computed outside of autocast.

        inputs, target: a batch for the network and the loss.
        loss: any differentiable function of logits and target. Autograd then computes e, and BP equals
            `loss.backward()` bit for bit. Default: the rule's own loss, with labels as target.
        step_feedback: whether to update B. To accumulate gradients over several batches, pass True only for the last
            batch.

        Raises:
            UserError: the samples do not have the shape of the example; without `loss`, the targets are not labels; or
                autocast to float16 is enabled. float16 needs a gradient scaler, and the scaler would not scale the
                error signals.
        """
        refuse_float16(inputs.device.type)
        self._check(inputs, target, loss)
        method = self.method
        before = take_gradients(self.net.parameters())
        before_feedback = take_gradients(method.parameters())
        trace = self.net.trace(inputs, method.cuts, method.frozen, False, method.transpose)
        value, error = self._value_and_error(trace.logits, target, loss)
        method.adapt(trace, error, target)
        add_gradients(method.parameters(), before_feedback)
        with torch.autocast(inputs.device.type, enabled=False):
            if step_feedback and not method.sends_first:
                self._update_feedback()
            trace.backward(method.signal, error, target)
            add_gradients(self.net.parameters(), before)
            if step_feedback:
                method.follow(0.0 if self.lr is None else self.lr)
                if method.sends_first:
                    self._update_feedback()
        return value

    def alignment(self, inputs: Tensor, target: Tensor, loss: Loss | None = None) -> dict[str, dict[str, float]]:
        """Compare the rule's error signals with those of BP on a batch. Weights and gradients do not change.

        Returns one mapping for each boundary. It has the keys cosine_sample, cosine_batch, norm, norm_bp and zeros.
        These quantities are also columns of iterations.csv. The key of a boundary is its name, or the number of the
        layer if the network has no boundary names. From layer `rule.method.exact_from` upwards, the rule uses BP's
        own signal. The cosines of these layers are 1.
        """
        self._check(inputs, target, loss)
        method = self.method
        before = take_gradients(self.net.parameters())
        trace = self.net.trace(inputs, method.cuts, method.frozen, True, method.transpose)
        _, error = self._value_and_error(trace.logits, target, loss)
        with torch.autocast(inputs.device.type, enabled=False):
            deltas = trace.backward(method.signal, error, target)
            values = measure(self.net, method, trace, deltas, error, last=True).reshape(-1, len(QUANTITIES)).tolist()
        for parameter, gradient in zip(self.net.parameters(), before, strict=True):
            parameter.grad = gradient
        names = getattr(self.net, "boundaries", None) or [str(i) for i in range(1, self.net.depth)]
        return {name: dict(zip(QUANTITIES, row, strict=True)) for name, row in zip(names, values, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Return B and its optimizer's state."""
        optimizer = None if self.optimizer is None else self.optimizer.state_dict()
        return {"method": self.method.state_dict(), "optimizer": optimizer}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state that `state_dict` returned."""
        self.method.load_state_dict(state["method"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])

    def _check(self, inputs: Tensor, target: Tensor, loss: Loss | None) -> None:
        """Raise `UserError` for a batch that the rule cannot take."""
        shape = tuple(inputs.shape[1:])
        if self.method.cuts and shape != self.net.input_shape:  # B has the shape of h_i
            raise UserError(f"inputs: a sample has shape {shape}, but the example had {self.net.input_shape}")
        is_labels = target.dim() == 1 and not target.is_floating_point()
        if loss is None and not is_labels:
            problem = f"target: {target.dtype} of shape {tuple(target.shape)}; must be integer labels (N,)"
            raise UserError(f"{problem}. For other targets, pass loss= to this call")

    def _value_and_error(self, logits: Tensor, target: Tensor, loss: Loss | None) -> tuple[Tensor, Tensor]:
        if loss is None:
            return self.loss.value_and_error(precise(logits), target)
        leaf = logits.detach().requires_grad_()
        with torch.enable_grad():
            value = loss(leaf, target)
        (error,) = torch.autograd.grad(value, leaf)
        return value.detach(), precise(error)

    def _update_feedback(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def rule(
    name: str,
    module: nn.Module,
    example: Tensor,
    boundaries: Boundaries = "auto",
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    lr: float | None = None,
    loss: LossName = "cross_entropy",
    **options: Any,
) -> Rule:
    """Return a learning rule for a module, to train the module in your own loop.

    name: name of the rule, such as "las" (see conf/method).
    module: any `nn.Module`; it is not changed.
    example: a batch of one or more inputs of the module.
    boundaries: names of submodules whose outputs are h_1 … h_{L-1}; "auto": see `dfl.boundaries`.
    optimizer: function that makes an optimizer of B's parameters, such as `lambda p: torch.optim.Adam(p, 1e-4)`.
    lr: the network's learning rate; rules with `decay` need it.
    loss: cross_entropy or squared_error, with labels as targets. `Rule.backward` accepts any other loss.
    options: the rule's own options, such as init="zeros".

    Raises:
        UserError: an unknown rule or option, an invalid boundary, or a missing optimizer or learning rate.
    """
    register_resolvers()
    choices = group_options("method")
    if name not in choices:
        raise UserError(f"rule {name!r}: no such method{did_you_mean(name, choices)}; there are {', '.join(choices)}")
    node = plain(compose([f"method={name}"]))["method"] | options
    net = module if isinstance(module, BlockNet) else ModuleNet(module, boundaries, example)
    classes = net.probe().logits.shape[1]
    if loss not in LOSSES:
        raise UserError(f"loss={loss}: choose {' or '.join(LOSSES)}; pass a function to `backward` instead")
    output_loss = LOSSES[loss]
    method: Method = component(node, "method").build(net=net, num_classes=classes, loss=output_loss)
    method.to(example.device)
    learnt = [parameter for parameter in method.parameters() if parameter.requires_grad]
    if learnt and optimizer is None:
        raise UserError(f"rule {name}: trains B; pass B's optimizer, such as lambda p: torch.optim.Adam(p, 1e-4)")
    if getattr(method, "decay", 0) and lr is None:
        raise UserError(f"rule {name}: decay={node['decay']} needs the network's learning rate; pass lr=")
    return Rule(net, method, output_loss, optimizer(learnt) if learnt and optimizer else None, lr)


def refuse_float16(device: str) -> None:
    """Raise `UserError` if autocast to float16 is enabled."""
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
        raise UserError("float16 needs a gradient scaler, which does not scale the error signals; use bfloat16")


def take_gradients(parameters: Iterable[nn.Parameter]) -> Gradients:
    """Return `.grad` of the parameters, and set it to None."""
    gradients: Gradients = []
    for parameter in parameters:
        gradients.append(parameter.grad)
        parameter.grad = None
    return gradients


def add_gradients(parameters: Iterable[nn.Parameter], gradients: Gradients) -> None:
    """Add the gradients that `take_gradients` returned to `.grad`."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
