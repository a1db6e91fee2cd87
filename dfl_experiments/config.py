"""From configuration nodes to checked objects: one mechanism, driven by the constructors' own type annotations."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, TypeAdapter, ValidationError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(gt=0)]
Size = Annotated[int, Field(ge=0)]
Widths = Annotated[list[Count], Field(min_length=1)]

Node = DictConfig | Mapping[str, Any]

# `conf/` is inside an installed wheel, and beside the package in a checkout.
_HERE = Path(__file__).resolve().parent
CONF_DIR = next((path for path in (_HERE / "conf", _HERE.parent / "conf") if path.is_dir()), _HERE.parent / "conf")


class UserError(ValueError):
    """A mistake of the user's: shown as its one line, without a traceback, with a non-zero exit."""


def plain(node: Any) -> Any:
    """A configuration node as resolved dictionaries, lists and scalars."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def locate(target: str) -> Callable[..., Any]:
    """The class or function that `_target_` names, which must be one of this package's own."""
    module, _, name = str(target).rpartition(".")
    if not module.startswith("dfl_experiments"):
        raise UserError(f"_target_={target}: only names of dfl_experiments are accepted")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"_target_={target}: cannot be loaded ({error})") from error
    if not callable(found) or inspect.isabstract(found):
        raise UserError(f"_target_={target}: is nothing that can be built")
    return found


def _message(where: str, error: ValidationError) -> str:
    first = error.errors()[0]
    path = ".".join(str(part) for part in (where, *first["loc"]) if part != "")
    return f"{path}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def checked(hint: Any, value: Any, where: str) -> Any:
    """The value, if it is of the annotated type and in range; otherwise a `UserError` naming key, value and choices."""
    try:
        return TypeAdapter(hint).validate_python(value, strict=True)
    except ValidationError as error:
        raise UserError(_message(where, error)) from None


def check_node(node: Node, where: str, given: tuple[str, ...] = ()) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The target of a group's node and its keyword arguments, each checked against the target's signature.

    `given` names the arguments that the program itself passes later. Keys of the node that begin the group's own
    bookkeeping (`name`) are left out. Raises `UserError` for an unknown or missing key and for a wrong type or range.
    """
    values = {str(key): value for key, value in plain(node).items() if key not in ("_target_", "name")}
    if "_target_" not in plain(node):
        raise UserError(f"{where}._target_: missing")
    target = locate(plain(node)["_target_"])
    parameters = inspect.signature(target).parameters
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    choices = [name for name in parameters if name not in given]
    for key in values:
        if key not in choices:
            raise UserError(f"{where}.{key}: no such option; there are {', '.join(choices) or 'none'}")
        if key not in hints:
            raise UserError(f"{where}.{key}: {target.__name__} gives it no type annotation to check it against")
        if values[key] == "???":
            raise UserError(f"{where}.{key}: missing; set {where}.{key}=…")
    for key in choices:
        if key not in values and parameters[key].default is inspect.Parameter.empty:
            raise UserError(f"{where}.{key}: missing")
    return target, {key: checked(hints[key], value, f"{where}.{key}") for key, value in values.items()}


def build(node: Node, where: str, **given: Any) -> Any:
    """Call the target of a group's node with its checked options and the arguments that the program gives."""
    target, values = check_node(node, where, tuple(given))
    return target(**given, **values)


def compose(overrides: list[str]) -> DictConfig:
    """The configuration that `dfl-train` would compose from these overrides, without Hydra's own node."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
        return hydra_compose("config", overrides)


def one_line(error: Exception) -> str:
    """An error as one line, which Hydra and OmegaConf spread over several, with the choices if there is no such key."""
    text = " ".join(str(error).split()).split(" Config search path:")[0]
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and OmegaConf.is_dict(cause.parent_node):
        keys = ", ".join(str(key) for key in cause.parent_node if key not in ("hydra", "name", "_target_"))
        text = (
            f"{text.split(' To append to your config')[0]} No such key as {cause.full_key}; there are {keys or 'none'}"
        )
    return text
