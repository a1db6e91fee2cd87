"""`_target_` nodes: what they may name, whether their options fit its constructor, and the thing that they describe."""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model

from dfl_experiments.configuration.refusals import refusal
from dfl_experiments.errors import UserError, clipped, shown

PACKAGE = "dfl_experiments"
# What a `_target_` may be, by the place it stands in: a subclass, or for a network a function that returns one. By
# name, because torch is slow to import.
KINDS = {
    "method": f"{PACKAGE}.engine.method.Method",
    "model": f"{PACKAGE}.engine.blocknet.BlockNet",
    "augmentation": f"{PACKAGE}.data.augmentation.Augmentation",
    "optimizer": f"{PACKAGE}.optimizers.OptimizerFactory",
    "dataset.source": f"{PACKAGE}.data.sources.Source",
}
# what the program itself gives to each when it is built
GIVEN = {"method": ("net", "num_classes", "loss"), "model": ("input_shape", "num_classes")}
# of a folder, of a part of one, and of a tag in W&B
Name = Annotated[str, Field(pattern=r"^\w[\w.+-]*$", max_length=64)]
NAME: TypeAdapter[str] = TypeAdapter(Name)
STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())


@dataclass(frozen=True)
class Component:
    """What a configuration names: a class or function, with its checked options. place: its key; path: `_target_`."""

    place: str
    path: str
    target: Callable[..., Any]
    options: dict[str, Any]

    def build(self, **given: Any) -> Any:
        """Call the target with its options and with what the program gives.

        Raises `UserError` for options that are right one by one, but from which nothing can be made.
        """
        try:
            return self.target(**given, **self.options)
        except UserError:
            raise
        except (RuntimeError, ValueError, ArithmeticError, MemoryError) as error:
            # torch says so in several lines, of a size that does not fit into memory for one
            said = ", ".join(f"{key}={shown(value)}" for key, value in self.options.items()) or "no options"
            raise UserError(f"{self.place}: cannot be built with {said} ({clipped(str(error), 200)})") from error


def named(target: str) -> Any:
    """The attribute of a module, from its full name."""
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def locate(target: Any, place: str, plugins: Sequence[str] = ()) -> Callable[..., Any]:
    """The class or function that `_target_` names: of the kind that belongs there, and defined in this package or one
    of `plugins`.

    Whatever else a module has imported is refused, so that a configuration can call nothing but what was written for
    it. Raises `UserError`.
    """
    kind, packages = named(KINDS[place]), (PACKAGE, *plugins)
    what = f"a function that returns a {kind.__name__}" if place == "model" else f"a subclass of {kind.__name__}"
    said = f"{place}._target_={target if isinstance(target, str) else shown(target)}"
    must = f"must be {what} defined in {' or '.join(packages)}, or in a package that plugins=[…] names"
    if not isinstance(target, str) or not target.startswith(tuple(f"{package}." for package in packages)):
        raise UserError(f"{said}: {must}")
    try:
        found = named(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{said}: cannot be loaded ({error}); {must}") from error
    made = found
    if place == "model":  # what calling it gives
        made = get_type_hints(found).get("return") if inspect.isfunction(found) else None
    ours = f"{getattr(found, '__module__', '')}.".startswith(tuple(f"{package}." for package in packages))
    if not ours or not inspect.isclass(made) or not issubclass(made, kind) or inspect.isabstract(found):
        raise UserError(f"{said}: {must}")
    return found


def parameters_of(target: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """The annotation and the default of every parameter; `**options` of a class stands for those of its base."""
    found: dict[str, tuple[Any, Any]] = {}
    functions: list[Callable[..., Any]] = [target]
    if inspect.isclass(target):
        functions = [vars(c)["__init__"] for c in inspect.getmro(target)[:-1] if "__init__" in vars(c)]
    for function in functions:
        hints = get_type_hints(function, include_extras=True)
        parameters = inspect.signature(function).parameters.values()
        for p in parameters:
            if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                found.setdefault(p.name, (hints.get(p.name, p.empty), p.default))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


@cache
def options_of(target: Callable[..., Any], place: str) -> type[BaseModel]:
    """The target's parameters as a pydantic model, without those that the program gives. Raises `UserError`."""
    parameters, given = parameters_of(target), GIVEN.get(place, ())
    if missing := [name for name in given if name not in parameters]:
        raise UserError(f"{place}._target_={target.__name__}: does not accept {missing[0]}, which it is given")
    fields: dict[str, Any] = {}
    for name, (hint, default) in parameters.items():
        if name in given:
            continue
        if hint is inspect.Parameter.empty:
            raise UserError(f"{place}.{name}: {target.__name__} gives it no type annotation to check it against")
        fields[name] = (hint, ... if default is inspect.Parameter.empty else default)
    return create_model("Options", __config__=STRICT, **fields)


def component(node: Mapping[str, Any], place: str, plugins: Sequence[str] = (), names: Sequence[str] = ()) -> Component:
    """The component of a node, its options checked against the annotations of the target's constructor.

    names: all keys of the configuration, for a guess at what a wrong one means. Raises `UserError`.
    """
    if "_target_" not in node:
        raise UserError(f"{place}._target_: missing")
    target = locate(node["_target_"], place, plugins)
    options = {key: value for key, value in node.items() if key not in ("_target_", "name") and value != "???"}
    model = options_of(target, place)
    try:
        checked = model.model_validate(options)
        if "name" in node:
            NAME.validate_python(node["name"], strict=True)
    except ValidationError as error:
        where = f"{place}.name" if error.title != model.__name__ else place
        raise refusal(error, where, list(model.model_fields), names) from None
    found = Component(place, node["_target_"], target, {key: getattr(checked, key) for key in options})
    if place not in GIVEN:
        found.build()  # costs nothing, and knows which options do not go together
    return found
