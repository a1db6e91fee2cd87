"""Use a learning rule in your own training loop: call `rule.backward` in place of `loss.backward`."""

import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dfl_experiments.configuration.components import component
from dfl_experiments.configuration.composition import (
    compose,
    group_options,
    plain,
    register_resolvers,
)
from dfl_experiments.configuration.refusals import did_you_mean
from dfl_experiments.engine.activation_calls import eager
from dfl_experiments.engine.alignment import measure
from dfl_experiments.engine.blocknet import BlockNet
from dfl_experiments.engine.crossings import from_the_leaves, layers_to_replace
from dfl_experiments.engine.gradients import accumulating, unchanged
from dfl_experiments.engine.losses import LOSSES, OutputLoss, precise
from dfl_experiments.engine.method import Method, refuse_shared
from dfl_experiments.engine.module_net import Boundaries, net_of
from dfl_experiments.engine.transpose import Transpose
from dfl_experiments.errors import UserError
from dfl_experiments.measured import QUANTITIES
from dfl_experiments.ranges import LossName

Loss = Callable[[Tensor, Any], Tensor]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
# of the last call of `backward`
LAST_NET: weakref.WeakValueDictionary[str, BlockNet] = weakref.WeakValueDictionary()


@torch.inference_mode(False)
def rule(
    name: str | type[Method],
    module: nn.Module,
    example: Tensor,
    boundaries: Boundaries = "auto",
    optimizer: MakeOptimizer | None = None,
    lr: float | None = None,
    loss: LossName = "cross_entropy",
    **options: Any,
) -> "Rule":
    """Return a learning rule for a module, to train the module in your own loop.

    name: name of the rule, such as "las" (see conf/method), or the class of your own rule.
    module: any `nn.Module`; it is not changed. Move it to its device and data type before, because B gets the same.
    example: a batch of one or more inputs of the module.
    boundaries: where the rule sends its error signals: names of submodules and calls, whose outputs are h_1 … h_{L-1}
        (see `dfl.boundaries`); or "auto".
    optimizer: function that makes B's optimizer from B's parameters, such as `lambda p: torch.optim.Adam(p, 1e-4)`.
        Only a rule whose B learns by gradients needs it.
    lr: the network's learning rate. Only KP with `decay` above 0 needs it.
    loss: cross_entropy or squared_error, with labels as targets. `Rule.backward` accepts any other loss.
    options: the rule's own options, such as init="zeros".

    Raises:
        UserError: an unknown rule or option, an invalid boundary, or a missing optimizer or learning rate.
    """
    if not isinstance(example, Tensor):
        raise UserError(
            "example: must be one tensor; for a net with several inputs, write a module that splits one tensor"
        )
    if loss not in LOSSES:
        raise UserError(
            f"loss={loss}: choose {' or '.join(LOSSES)}; pass a function to `backward` instead"
        )
    node, plugins = described(name, options)
    net = net_of(module, boundaries, example)
    logits = net.probe().logits
    if logits.dim() != 2:
        shape = tuple(logits.shape[1:])
        raise UserError(
            f"model: the output for one sample has shape {shape}; must be (K,), so (1,) for a single value"
        )
    classes, output_loss = logits.shape[1], LOSSES[loss]
    kind = component(node, "method", plugins)
    method: Method = kind.build(net=net, num_classes=classes, loss=output_loss)
    refuse_shared(method, net)
    method.to(example.device)
    if getattr(method, "decay", 0) and lr is None and not method.follows_rate_of_b:
        raise UserError(
            f"rule {name}: decay={method.decay} needs the network's learning rate; pass lr="
        )
    of_feedback = feedback_optimizer(method, optimizer)
    return Rule(net, method, output_loss, of_feedback, lr, classes)


def described(
    name: str | type[Method], options: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return the configuration of a rule, and the packages outside this one that define the rule.

    Raises `UserError` if there is no such rule.
    """
    if isinstance(name, str):
        return node_of(name) | options, []
    if not isinstance(name, type) or "<locals>" in name.__qualname__:
        raise UserError(
            "rule: must be a name, such as 'las', or a class of your own that is defined outside of functions"
        )
    target = f"{name.__module__}.{name.__qualname__}"
    return {"_target_": target, **options}, [name.__module__.partition(".")[0]]


def node_of(name: str) -> dict[str, Any]:
    """Return the options of a rule in conf/method. Raises `UserError` if there is no such rule."""
    register_resolvers()
    choices = group_options("method")
    if name not in choices:
        raise UserError(
            f"rule {name!r}: no such method{did_you_mean(name, choices)}; there are {', '.join(choices)}"
        )
    options: dict[str, Any] = plain(compose([f"method={name}"]))["method"]
    return options


def feedback_optimizer(method: Method, make: MakeOptimizer | None) -> torch.optim.Optimizer | None:
    """Return B's optimizer, or None if B does not learn by gradients.

    Raises `UserError` if the optimizer is missing, or does not train exactly the parameters of B.
    """
    learnt = [parameter for parameter in method.parameters() if parameter.requires_grad]
    if not learnt:
        return None
    optimizer = make(learnt) if callable(make) else None
    groups = getattr(optimizer, "param_groups", [])
    if {p for group in groups for p in group["params"]} != set(learnt):
        raise UserError(
            "optimizer: this rule trains B, so pass a function that returns an optimizer of exactly the parameters "
            "that it gets, such as optimizer=lambda p: torch.optim.Adam(p, 1e-4)"
        )
    return optimizer


class Rule:
    """A learning rule for one network. It owns B and B's optimizer.

    net: the network, with its boundaries.
    method: computes the error signals.
    optimizer: B's optimizer; None if B does not learn by gradients.
    lr: the network's learning rate, which rules with `decay` use. Set it again when a scheduler changes the rate.
    classes: K, the number of logits.
    """

    def __init__(
        self,
        net: BlockNet,
        method: Method,
        loss: OutputLoss,
        optimizer: torch.optim.Optimizer | None,
        lr: float | None,
        classes: int,
    ) -> None:
        self.net, self.method, self.loss, self.optimizer, self.lr = net, method, loss, optimizer, lr
        self.classes = classes
        self._parameters = list(net.parameters())
        self._frozen = [p for p in self._parameters if not p.requires_grad]

    def __repr__(self) -> str:
        boundaries = ", ".join(self.boundary_names)
        return f"Rule({type(self.method).__name__}, boundaries: {boundaries})"

    @property
    def boundary_names(self) -> list[str]:
        """Names of the boundaries, or the numbers of the hidden layers if the network has no boundary names."""
        names = getattr(self.net, "boundaries", None)
        return names or [str(i) for i in range(1, self.net.depth)]

    def backward(
        self,
        inputs: Tensor,
        target: Any,
        loss: Loss | None = None,
        step_feedback: bool = True,
        weight: float = 1.0,
    ) -> Tensor:
        """Add the rule's gradients to `.grad` of the network's parameters, and return the loss of this batch.

        B is updated before the error signals are computed, or after them if `rule.method.sends_first` is true.
        The forward pass runs in the caller's autocast. The error signals are computed outside of autocast.

        inputs: a batch for the network.
        target: labels (N,) of type torch.int64. With `loss`, it may be anything that this function takes, unless the
            rule needs labels.
        loss: any differentiable function of logits and target. Autograd then computes e, and BP equals
            `loss.backward()` bit for bit. Default: the rule's own loss.
        step_feedback: whether to update B. To accumulate gradients over several batches, pass True only for the last
            batch.
        weight: factor of the gradients of W and B, not of the returned loss. To accumulate gradients over k batches of
            equal size, pass 1/k.

        Raises:
            UserError: something would make the gradients wrong or absent, and PyTorch would raise no error.
        """
        self._check(inputs, target, loss)
        self._check_autograd(inputs)
        use_own_compiled_code(self.net)
        method = self.method
        trace = self.net.trace(inputs, method.cuts, method.frozen, False, method.transpose)
        value, error = self._value_and_error(trace.logits, target, loss)
        feedback = list(method.parameters())
        with accumulating(feedback, weight):
            method.adapt(trace, error, target)
        with torch.autocast(inputs.device.type, enabled=False):
            if step_feedback and not method.sends_first:
                self._step_optimizer()
            with accumulating([*self._parameters, *feedback], weight):
                trace.backward(method.signal, error, target)
            if step_feedback and method.sends_first:
                self.update_feedback()
            elif step_feedback:
                method.follow(self._followed_rate())
        return value

    def update_feedback(self) -> None:
        """Update B, after a `backward` with `step_feedback=False`.

        In between you can clip the gradients. KP then learns B from the clipped gradients of the network. PFA has
        gradients of its own, in `rule.method.parameters()`.
        """
        self.method.follow(self._followed_rate())
        self._step_optimizer()

    def alignment(
        self, inputs: Tensor, target: Any, loss: Loss | None = None
    ) -> dict[str, dict[str, float]]:
        """Compare the rule's error signals with those of BP on a batch. Pass the same `loss` as to `backward`.

        The network keeps its weights, gradients, batch statistics and random state. A compiled network runs without its
        compiled code.

        Returns one mapping for each boundary, by the name of the boundary, or by the number of the layer if the network
        has no boundary names. It has the keys cosine_sample and cosine_batch (1 is perfect agreement), norm and norm_bp
        (lengths of the rule's and of BP's signal), and zeros (samples without a signal). The guide's section on the run
        directory explains them. From layer `rule.method.exact_from` upwards, the rule uses BP's own signal. There the
        cosines are 1.
        """
        self._check(inputs, target, loss)
        method = self.method
        with (
            unchanged(nn.ModuleList([self.net, method]), inputs.device),
            torch.enable_grad(),
            eager(),
        ):
            trace = self.net.trace(inputs, method.cuts, method.frozen, True, method.transpose)
            _, error = self._value_and_error(trace.logits, target, loss)
            with torch.autocast(inputs.device.type, enabled=False):
                deltas = trace.backward(method.signal, error, target)
                measured = measure(self.net, method, trace, deltas, error, last=True)
        values = measured.reshape(-1, len(QUANTITIES)).tolist()
        return {
            name: dict(zip(QUANTITIES, row, strict=True))
            for name, row in zip(self.boundary_names, values, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the rule's class, B and its optimizer's state."""
        optimizer = None if self.optimizer is None else self.optimizer.state_dict()
        kind = type(self.method).__name__
        return {"rule": kind, "method": self.method.state_dict(), "optimizer": optimizer}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state that `state_dict` returned. Raises `UserError` if it is not the state of such a rule."""
        own = type(self.method).__name__
        is_other = not {"method", "optimizer"} <= set(state) or state.get("rule", own) != own
        if is_other or (state["optimizer"] is None) != (self.optimizer is None):
            raise UserError(
                "state: must be what state_dict() of the same kind of rule returned, not a whole checkpoint"
            )
        self.method.load_state_dict(state["method"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])

    def _check(self, inputs: Tensor, target: Any, loss: Loss | None) -> None:
        """Raise `UserError` for a batch that the rule cannot take, or for a network that has changed."""
        if torch.is_inference_mode_enabled():
            raise UserError("the rule needs autograd; call it outside of torch.inference_mode()")
        if not isinstance(inputs, Tensor) or inputs.shape[:1] == (0,):
            raise UserError("inputs: must be one tensor with at least one sample")
        parameters = list(self.net.parameters())
        if list(map(id, parameters)) != list(map(id, self._parameters)):
            raise UserError(
                "model: a parameter was added or replaced after dfl.rule; call dfl.rule again"
            )
        if not any(parameter.requires_grad for parameter in parameters):
            raise UserError("model: all parameters are frozen (requires_grad=False)")
        if self.method.transpose is not None and any(p.requires_grad for p in self._frozen):
            self._check_unfrozen(self.method.transpose)
        if loss is None or self.method.needs_labels:
            self._check_labels(inputs, target)

    def _check_unfrozen(self, transpose: Transpose) -> None:
        """Raise `UserError` if a layer above a parameter that was frozen has no B, and the parameter learns now."""
        layers = [layer for i in range(self.net.depth) for layer in self.net.weight_layers(i)]
        passed = {layers[index] for index in layers_to_replace(self.net)}
        if not passed <= set(transpose.layers):
            raise UserError(
                "model: a parameter that was frozen in dfl.rule learns now, but a layer above it has no B; "
                "call dfl.rule again, or call it before you freeze parameters"
            )
        self._frozen = [parameter for parameter in self._frozen if not parameter.requires_grad]

    def _check_labels(self, inputs: Tensor, target: Any) -> None:
        """Raise `UserError` if the target does not consist of one label for each sample."""
        expected = f"torch.int64 of shape {tuple(inputs.shape[:1])}"
        found = f"of type {type(target).__name__}"
        if isinstance(target, Tensor):
            found = f"{target.dtype} of shape {tuple(target.shape)}"
        if found != expected:
            advice = "for other targets, pass loss="
            if self.method.needs_labels:
                advice = "this rule needs labels"
            raise UserError(f"target: {found}; must be labels, {expected}; {advice}")
        # Do not check the range on a GPU, because the check would wait for the device.
        if not target.is_cuda:
            lowest, highest = int(target.min()), int(target.max())
            if lowest < 0 or highest >= self.classes:
                raise UserError(
                    f"target: labels {lowest} to {highest}; must be 0 to {self.classes - 1}"
                )

    def _check_autograd(self, inputs: Tensor) -> None:
        """Raise `UserError` for settings of autograd with which gradients would be absent or wrong."""
        if not torch.is_grad_enabled():
            raise UserError(
                "backward: gradients are disabled here; call it outside of torch.no_grad()"
            )
        if inputs.requires_grad:
            raise UserError(
                "inputs: need a gradient, but the rule sends none; pass inputs.detach(), or put the layers below "
                "into the module"
            )
        # PyTorch has no public way to ask for these hooks
        if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in self._parameters):
            raise UserError(
                "model: the rule does not call the hooks of register_post_accumulate_grad_hook; remove them, and step "
                "the optimizer after `backward`"
            )
        device = inputs.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            raise UserError(
                "float16 needs a gradient scaler, which does not scale the error signals; use bfloat16"
            )

    def _value_and_error(
        self, logits: Tensor, target: Any, loss: Loss | None
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch, and e in float32 or higher precision."""
        if loss is None:
            return self.loss.value_and_error(precise(logits), target)
        leaf = logits.detach().requires_grad_()
        with torch.enable_grad():
            value = loss(leaf, target)
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(
                f"loss: must return a tensor with one value, the batch's mean or sum, not {found}"
            )
        for node in from_the_leaves(value.grad_fn):
            variable = getattr(node, "variable", leaf)
            if variable is not leaf:
                raise UserError(
                    f"loss: also depends on a tensor of shape {tuple(variable.shape)} that requires a gradient, but "
                    "the rule sends it none; detach it, or call backward() on this part of the loss yourself"
                )
        (error,) = torch.autograd.grad(value, leaf)
        return value.detach(), precise(error)

    def _followed_rate(self) -> float:
        """Return the learning rate for `Method.follow`."""
        if self.method.follows_rate_of_b and self.optimizer is not None:
            return float(self.optimizer.param_groups[0]["lr"])
        return 0.0 if self.lr is None else self.lr

    def _step_optimizer(self) -> None:
        """Step B's optimizer, if there is one."""
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def use_own_compiled_code(net: BlockNet) -> None:
    """Discard the compiled code of other networks, if `net` is not the network of the last call.

    torch.compile shares its code between modules of the same class, and does not notice that their hooks differ.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return
    dynamo.config.skip_nnmodule_hook_guards = False
    if LAST_NET.get("net") is not net:
        torch.compiler.reset()
        LAST_NET["net"] = net
