"""Check and build components: the nodes with a `_target_`, such as method, model and optimizer."""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model

from dfl_experiments.configuration.refusals import refusal
from dfl_experiments.errors import UserError, clipped, shown

PACKAGE = "dfl_experiments"
# For each component its base class; a model is a function that returns a `BlockNet`, or in another package any
# `MODULE`. These are names, because torch is slow to import.
KINDS = {
    "method": f"{PACKAGE}.engine.method.Method",
    "model": f"{PACKAGE}.engine.blocknet.BlockNet",
    "augmentation": f"{PACKAGE}.data.augmentation.Augmentation",
    "optimizer": f"{PACKAGE}.optimizers.OptimizerFactory",
    "optimizer.feedback": f"{PACKAGE}.optimizers.OptimizerFactory",
    "schedule": f"{PACKAGE}.schedules.Schedule",
    "dataset.source": f"{PACKAGE}.data.sources.Source",
}
MODULE = "torch.nn.Module"
AS_NET = f"{PACKAGE}.engine.module_net.as_net"
# Arguments that the program passes when it builds a component; they are no options of the configuration.
PASSED = {"method": ("net", "num_classes", "loss"), "model": ("input_shape", "num_classes")}
# A name that is part of a folder's name, and a tag in W&B.
Name = Annotated[str, Field(pattern=r"^\w[\w.+-]*$", max_length=64)]
NAME: TypeAdapter[str] = TypeAdapter(Name)
STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())


@dataclass(frozen=True)
class Component:
    """A class or function that a configuration names, with its checked options."""

    key: str
    """Key of the node, such as "method"."""
    path: str
    """The node's `_target_`."""
    target: Callable[..., Any]
    """The class or function itself."""
    options: dict[str, Any]
    """Checked arguments for the target."""

    def build(self, **arguments: Any) -> Any:
        """Call the target with its options and with the arguments that the program passes.

        Raises `UserError` for options that are valid one by one, but not together.
        """
        options, input_shape = dict(self.options), arguments.get("input_shape")
        names = options.pop("boundaries", "auto") if is_plain_module(self.target, self.key) else None
        if self.key == "model":  # a module of one's own need not know both
            arguments = {name: value for name, value in arguments.items() if name in parameters_of(self.target)}
        try:
            built = self.target(**arguments, **options)
            return built if names is None else named(AS_NET)(built, names, input_shape)
        except UserError:
            raise
        except (RuntimeError, ValueError, ArithmeticError, MemoryError) as error:
            # torch's messages have several lines, for example for a size that does not fit into memory
            given = ", ".join(f"{name}={shown(value)}" for name, value in self.options.items()) or "no options"
            raise UserError(f"{self.key}: cannot be built with {given} ({clipped(str(error), 200)})") from error


def named(target: str) -> Any:
    """Import a module's attribute by its full name."""
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def locate(target: Any, key: str, plugins: Sequence[str] = ()) -> Callable[..., Any]:
    """Import the class or function that `_target_` names.

    It must have the component's base class, and be defined in this package or in one of `plugins`, not only imported
    there: so a configuration can call nothing that was not written for it. An optimizer may also be one of torch.optim.
    key: of the node. Raises `UserError`.
    """
    if isinstance(target, str) and target.startswith("torch.optim.") and key.startswith("optimizer"):
        of_torch: Callable[..., Any] = named(f"{PACKAGE}.optimizers.of_torch")(target, key)
        return of_torch
    kind = named(KINDS[key])
    packages = (PACKAGE, *plugins)
    prefixes = tuple(f"{package}." for package in packages)
    what = f"a function that returns a {kind.__name__}" if key == "model" else f"a subclass of {kind.__name__}"
    own = " (there also a class or function of any torch.nn.Module)" if key == "model" else ""
    option = f"{key}._target_={target if isinstance(target, str) else shown(target)}"
    must = f"must be {what} defined in {' or '.join(packages)}, or in a package that plugins=[…] names{own}"
    if not isinstance(target, str) or not target.startswith(prefixes):
        raise UserError(f"{option}: {must}")
    try:
        component_type = named(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{option}: cannot be loaded ({error}); {must}") from error
    result = made_by(component_type) if key == "model" else component_type
    if key == "model" and not target.startswith(f"{PACKAGE}."):
        kind = named(MODULE)
    is_defined_there = f"{getattr(component_type, '__module__', '')}.".startswith(prefixes)
    is_of_kind = inspect.isclass(result) and issubclass(result, kind) and not inspect.isabstract(component_type)
    if not is_defined_there or not is_of_kind:
        raise UserError(f"{option}: {must}")
    return component_type


def made_by(target: Any) -> Any:
    """Return the class of what a class or a function returns; None if it does not say."""
    return get_type_hints(target).get("return") if inspect.isfunction(target) else target


def is_plain_module(target: Any, key: str) -> bool:
    """Return whether a component is a model that is no `BlockNet`, and so has the option `boundaries`."""
    return key == "model" and not issubclass(made_by(target), named(KINDS["model"]))


def parameters_of(target: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Return the annotation and the default of every parameter.

    `**options` of a class stands for the parameters of its base class.
    """
    parameters_by_name: dict[str, tuple[Any, Any]] = {}
    functions: list[Callable[..., Any]] = [target]
    if inspect.isclass(target):
        functions = [vars(c)["__init__"] for c in inspect.getmro(target)[:-1] if "__init__" in vars(c)]
    for function in functions:
        hints = get_type_hints(function, include_extras=True)
        parameters = inspect.signature(function).parameters.values()
        for p in parameters:
            if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                parameters_by_name.setdefault(p.name, (hints.get(p.name, p.empty), p.default))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return parameters_by_name


@cache
def options_of(target: Callable[..., Any], key: str) -> type[BaseModel]:
    """Return the target's options as a pydantic model: its parameters without `PASSED` ones. Raises `UserError`."""
    parameters = parameters_of(target)
    passed = PASSED.get(key, ())
    is_plain = is_plain_module(target, key)
    if not is_plain and (missing := [name for name in passed if name not in parameters]):
        raise UserError(f"{key}._target_={target.__name__}: does not accept {missing[0]}, which the program passes")
    fields: dict[str, Any] = {"boundaries": (Literal["auto"] | list[str], "auto")} if is_plain else {}
    for name, (hint, default) in parameters.items():
        if name in passed:
            continue
        if hint is inspect.Parameter.empty and is_plain:
            hint = Any
        elif hint is inspect.Parameter.empty:
            raise UserError(f"{key}.{name}: its parameter of {target.__name__} needs a type annotation")
        fields[name] = (hint, ... if default is inspect.Parameter.empty else default)
    return create_model("Options", __config__=STRICT, **fields)


def component(node: Mapping[str, Any], key: str, plugins: Sequence[str] = (), names: Sequence[str] = ()) -> Component:
    """Return the component of a node, with its options checked against the annotations of its constructor.

    key: of the node. plugins: other packages that may define it.
    names: all keys of the configuration, to guess what an unknown one means.
    Raises `UserError`.
    """
    if node.get("_target_", "???") == "???":
        raise UserError(f"{key}._target_: missing; set {key}._target_=…")
    target = locate(node["_target_"], key, plugins)
    options = {name: value for name, value in node.items() if name not in ("_target_", "name") and value != "???"}
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
        result.build()  # cheap, and refuses options that do not fit together
    return result
