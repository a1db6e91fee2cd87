"""Check and build components: the parts of a configuration with a `_target_`, such as method, model and optimizer."""

import importlib
import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, create_model

from dfl_experiments.configuration.refusals import refusal
from dfl_experiments.errors import UserError, reason, shown
from dfl_experiments.ranges import SampleKind, matching

PACKAGE = "dfl_experiments"
# The base class of each component, by key. A model is a function, so the entry of "model" is the class of the network
# that the function returns. A plugin's model may return any `MODULE`. Classes are listed by name, because importing
# torch is slow.
KINDS = {
    "method": f"{PACKAGE}.engine.method.Method",
    "model": f"{PACKAGE}.engine.blocknet.BlockNet",
    "augmentation": f"{PACKAGE}.data.augmentation.Augmentation",
    "optimizer": f"{PACKAGE}.optimizers.OptimizerFactory",
    "optimizer.feedback": f"{PACKAGE}.optimizers.OptimizerFactory",
    "schedule": f"{PACKAGE}.schedules.Schedule",
    "schedule.feedback": f"{PACKAGE}.schedules.Schedule",
    "dataset.source": f"{PACKAGE}.data.sources.Source",
}
# an example of a `_target_`, for each group in which the user may have to set it
EXAMPLES = {"model": "my_nets.MyNet", "optimizer": "torch.optim.NAdam"}
MODULE = "torch.nn.Module"
AS_NET = f"{PACKAGE}.engine.module_net.as_net"
# Arguments that the program passes to a component's constructor. The configuration cannot set them.
PASSED = {"method": ("net", "num_classes", "loss"), "model": ("input_shape", "num_classes")}
# Type of a name that appears in folder names and as a W&B tag.
Name = Annotated[
    str,
    matching(r"\w[\w.+-]{0,63}", "1 to 64 letters, digits and . _ + -, and not begin with . + -"),
]
NAME: TypeAdapter[str] = TypeAdapter(Name)
STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())


@dataclass(frozen=True)
class Component:
    """The class or function that a `_target_` names, and its checked options."""

    key: str
    """Key in the configuration, such as "method"."""
    path: str
    """The `_target_`, such as "dfl_experiments.models.fc"."""
    target: Callable[..., Any]
    """The class or function itself."""
    options: dict[str, Any]
    """Checked arguments for the target."""

    def build(self, samples: SampleKind | None = None, **arguments: Any) -> Any:
        """Call the target with its options and `arguments`.

        samples: kind of the samples that a model reads, if known. The target does not get it.
        Raises `UserError` if the target refuses a value.
        """
        options = dict(self.options)
        accepted = arguments
        # a plugin's model may lack the parameters input_shape and num_classes
        if self.key == "model":
            parameters = parameters_of(self.target)
            accepted = {name: value for name, value in arguments.items() if name in parameters}
        try:
            if not is_plain_module(self.target, self.key):
                return self.target(**accepted, **options)
            boundaries = options.pop("boundaries", "auto")
            module = self.target(**accepted, **options)
            as_net = import_object(AS_NET)
            return as_net(module, boundaries, arguments.get("input_shape"), samples)
        except UserError as error:
            if not self.key.endswith(".feedback"):
                raise
            # a class names its options as those of W
            group = self.key.removesuffix("feedback")
            raise UserError(str(error).replace(group, f"{self.key}.")) from error
        except (RuntimeError, ValueError, ArithmeticError, MemoryError, AssertionError) as error:
            texts = [f"{name}={shown(value)}" for name, value in self.options.items()]
            listed = ", ".join(texts) or "no options"
            cause = f"{reason(error)}{self.line_of(error)}"
            raise UserError(f"{self.key}: cannot be built with {listed} ({cause})") from error

    def line_of(self, error: Exception) -> str:
        """Return the file and the line of a plugin's code that raised an error: ", my_nets.py line 7"."""
        if self.path.startswith(f"{PACKAGE}."):
            return ""
        source = inspect.getsourcefile(self.target)
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == source]
        if not source or not lines:
            return ""
        return f", {Path(source).name} line {lines[-1]}"


def import_object(target: str) -> Any:
    """Import an object by its full name, such as "torch.nn.Module"."""
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def locate(target: Any, key: str, plugins: Sequence[str] = ()) -> Any:
    """Import the class or function that `_target_` names.

    The target must be a subclass of the base class in `KINDS`. For a model, it may also be a function that returns an
    object of such a class. The target must be defined in this package or in a plugin, so that a configuration cannot
    call arbitrary functions. An optimizer may also be a class of torch.optim, or a subclass of torch.optim.Optimizer
    in a plugin.
    key: the component's key, such as "method". plugins: names of the plugin packages.
    Raises `UserError` for a target that breaks these rules.
    """
    target = str(target)
    if target.startswith("torch.optim.") and key.startswith("optimizer"):
        return import_object(f"{PACKAGE}.optimizers.of_torch")(target, key)
    base = import_object(KINDS[key])
    packages = (PACKAGE, *plugins)
    prefixes = tuple(f"{package}." for package in packages)
    kind, exception = f"a subclass of {KINDS[key]},", ""
    if key == "model":
        kind = "a model"
        exception = "; a plugin's model may be any torch.nn.Module, or a function that returns one"
    elif key.startswith("optimizer"):
        kind = "an optimizer of torch.optim, or one"
        exception = "; a plugin's optimizer may be any torch.optim.Optimizer with a parameter lr and no closure"
    option = f"{key}._target_={target}"
    rule = f"must be {kind} defined in {' or '.join(packages)}, or in a package listed in plugins=[…]{exception}"
    if not target.startswith(prefixes):
        if key.startswith("optimizer"):
            known = import_object(f"{PACKAGE}.optimizers.name_in_torch")(target)
            if known:
                raise UserError(f"{option}: did you mean {known}?")
        module = target.rpartition(".")[0] or "…"
        raise UserError(f'{option}: {rule}; for code of your own, add "plugins=[{module}]"')
    try:
        imported = import_object(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{option}: cannot be loaded ({error}); {rule}") from error
    is_defined_there = f"{getattr(imported, '__module__', '')}.".startswith(prefixes)
    if key.startswith("optimizer"):
        optimizers = importlib.import_module(f"{PACKAGE}.optimizers")
        if optimizers.is_usable(imported):
            imported = optimizers.factory_of(imported)
    built_class = returned_class(imported) if key == "model" else imported
    if key == "model" and not target.startswith(f"{PACKAGE}."):
        base = import_object(MODULE)
    has_base = inspect.isclass(built_class) and issubclass(built_class, base)
    if not is_defined_there or not has_base or inspect.isabstract(imported):
        raise UserError(f"{option}: {rule}")
    return imported


def returned_class(target: Any) -> Any:
    """Return a class itself. For a function, return its return annotation; without one, return torch.nn.Module."""
    if not inspect.isfunction(target):
        return target
    return get_type_hints(target).get("return", import_object(MODULE))


def is_plain_module(target: Any, key: str) -> bool:
    """Return whether a component is a model other than a `BlockNet`. Such a model has the option `boundaries`."""
    if key != "model":
        return False
    net = import_object(KINDS["model"])
    return not issubclass(returned_class(target), net)


def parameters_of(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a class or function by name, with their annotations as types, not as texts.

    If a constructor has `**options`, the parameters of its base class's constructor are included.
    """
    functions: list[Callable[..., Any]] = [target]
    skipped = 0
    if inspect.isclass(target):
        classes = inspect.getmro(target)[:-1]
        functions = [vars(c)["__init__"] for c in classes if "__init__" in vars(c)]
        skipped = 1  # the first parameter of a constructor, usually `self`
    by_name: dict[str, inspect.Parameter] = {}
    for function in functions:
        hints = get_type_hints(function, include_extras=True)
        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())[skipped:]
        for p in parameters:
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                continue
            hint = hints.get(p.name, p.empty)
            by_name.setdefault(p.name, p.replace(annotation=hint))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return by_name


@cache
def options_of(target: Callable[..., Any], key: str) -> type[BaseModel]:
    """Return a pydantic model of the target's options: its parameters except those in `PASSED`.

    A parameter without a type annotation takes any value. Raises `UserError` if a parameter in `PASSED` is missing,
    except in a plain module (see `is_plain_module`).
    """
    passed = PASSED.get(key, ())
    parameters = parameters_of(target)
    fields: dict[str, Any] = {}
    if is_plain_module(target, key):
        fields["boundaries"] = (Literal["auto"] | list[str], "auto")
    else:
        missing = [name for name in passed if name not in parameters]
        if missing:
            raise UserError(
                f"{key}._target_={target.__name__}: needs a parameter {missing[0]}, which the program passes"
            )
    for name, p in parameters.items():
        if name not in passed:
            hint = Any if p.annotation is p.empty else p.annotation
            default = ... if p.default is p.empty else p.default
            fields[name] = (hint, default)
    return create_model("Options", __config__=STRICT, **fields)


def component(
    node: Mapping[str, Any], key: str, plugins: Sequence[str] = (), names: Sequence[str] = ()
) -> Component:
    """Check a component's options against the type annotations of its constructor, and return the component.

    node: the part of the configuration with `_target_` and the options.
    key: key of this part, such as "method". plugins: names of the plugin packages.
    names: all keys of the configuration, for suggestions in messages.
    Raises `UserError` for a wrong target, option or value.
    """
    if node.get("_target_", "???") == "???":
        example = EXAMPLES.get(key.partition(".")[0])
        advice = f", for example {example}" if example else ""
        raise UserError(f"{key}._target_: missing; set {key}._target_=…{advice}")
    target = locate(node["_target_"], key, plugins)
    options = {name: value for name, value in node.items() if value != "???"}
    options.pop("_target_")
    options.pop("name", None)
    model = options_of(target, key)
    try:
        checked = model.model_validate(options)
        if "name" in node:
            NAME.validate_python(node["name"], strict=True)
    except ValidationError as error:
        where = f"{key}.name" if error.title != model.__name__ else key
        raise refusal(error, where, list(model.model_fields), names) from None
    values = {name: getattr(checked, name) for name in options}
    result = Component(key, node["_target_"], target, values)
    if key not in PASSED:
        result.build()  # a trial: raises UserError if the options contradict each other
    return result
