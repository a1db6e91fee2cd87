"""From configuration nodes to checked objects: one mechanism, driven by the constructors' own type annotations."""

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from pydantic import Field, TypeAdapter, ValidationError

from dfl_experiments.messages import INTERNAL, clipped, did_you_mean, flat_keys, shown

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(gt=0, lt=2**31)]
Size = Annotated[int, Field(ge=0, lt=2**31)]
# not Literal[1, 2], which true would fit as well
Passes = Annotated[int, Field(ge=1, le=2)]
# larger ones are slips of the finger, and would be found out by a machine that runs out of memory
Depth = Annotated[int, Field(gt=0, le=1000)]
Width = Annotated[int, Field(gt=0, le=2**16)]
Widths = Annotated[list[Width], Field(min_length=1, max_length=1000)]

Node = DictConfig | Mapping[str, Any]

PACKAGE = "dfl_experiments"
# What a `_target_` may be, by the place it stands in: a subclass, or for a network a function that returns one. By
# name, because torch is slow to import.
KINDS = {
    "method": f"{PACKAGE}.methods.Method",
    "model": f"{PACKAGE}.blocknet.BlockNet",
    "augmentation": f"{PACKAGE}.data.augmentation.Augmentation",
    "optimizer": f"{PACKAGE}.optimizers.Optimizer",
    "dataset.source": f"{PACKAGE}.data.sources.Source",
    "hydra.callbacks": "hydra.experimental.callback.Callback",
}
# `conf/` is inside an installed wheel, and beside the package in a checkout.
_HERE = Path(__file__).resolve().parent
CONF_DIR = next((path for path in (_HERE / "conf", _HERE.parent / "conf") if path.is_dir()), _HERE.parent / "conf")


class UserError(ValueError):
    """A mistake of the user's: shown as its one line, without a traceback, with a non-zero exit."""

    exit_code = 2


class Fault(UserError):
    """What the machine would not do for a run: a full disk, too little memory. Shown alike."""

    exit_code = 1


class UnknownKey(UserError):
    """A key that does not exist; `key` is its full name, for a search of what was meant."""

    def __init__(self, key: str, choices: Iterable[str]) -> None:
        super().__init__(f"{key}: no such option; there are {', '.join(choices) or 'none'}")
        self.key = key


def plain(node: Any) -> Any:
    """A configuration node as resolved dictionaries, lists and scalars."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _named(target: str) -> Any:
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def targets(where: str) -> list[str]:
    """Every `_target_` that conf/ has in this place."""
    files = sorted((CONF_DIR / where.split(".")[0]).glob("*.yaml"))
    found = (re.search(r"_target_: *([\w.]+)", path.read_text(encoding="utf-8")) for path in files)
    return list(dict.fromkeys(match[1] for match in found if match))


def locate(target: Any, where: str) -> Callable[..., Any]:
    """The class or function that `_target_` names: defined in this package, and of the kind that belongs there.

    Whatever else a module of ours has imported is refused, so that a configuration can call nothing but what was
    written for it. Raises `UserError`.
    """
    kind = _named(KINDS[where])
    is_model = where == "model"
    what = f"a function that returns a {kind.__name__}" if is_model else f"a subclass of {kind.__name__}"
    said = f"{where}._target_={target if isinstance(target, str) and len(target) < 100 else shown(target)}"
    choices = f"must be {what} defined in {PACKAGE}; conf/ has {', '.join(targets(where)) or 'none'}"
    if not isinstance(target, str) or not target.startswith(f"{PACKAGE}."):
        raise UserError(f"{said}: {choices}")
    try:
        found = _named(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{said}: cannot be loaded ({error}); {choices}") from error
    made = found
    if is_model:  # what calling it gives
        made = get_type_hints(found).get("return") if inspect.isfunction(found) else None
    ours = str(getattr(found, "__module__", "")).split(".")[0] == PACKAGE
    if not ours or not inspect.isclass(made) or not issubclass(made, kind):
        raise UserError(f"{said}: {choices}")
    if inspect.isabstract(found):
        raise UserError(f"{said}: is abstract, nothing that can be built; {choices}")
    return found


def _message(where: str, error: ValidationError) -> str:
    first = error.errors()[0]
    path = ".".join(str(part) for part in (where, *first["loc"]) if part != "")
    return f"{path}={shown(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}"


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
    target = locate(plain(node)["_target_"], where)
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(target).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    for name in given:
        if name not in parameters:
            raise UserError(f"{where}._target_={plain(node)['_target_']}: does not accept {name}, which it is given")
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    choices = [name for name in parameters if name not in given]
    for key in values:
        if key not in choices:
            raise UnknownKey(f"{where}.{key}", choices)
        if key not in hints:
            raise UserError(f"{where}.{key}: {target.__name__} gives it no type annotation to check it against")
        if values[key] == "???":
            raise UserError(f"{where}.{key}: missing; set {where}.{key}=…")
    for key in choices:
        if key not in values and parameters[key].default is inspect.Parameter.empty:
            raise UserError(f"{where}.{key}: missing")
    return target, {key: checked(hints[key], value, f"{where}.{key}") for key, value in values.items()}


def build(node: Node, where: str, **given: Any) -> Any:
    """Call the target of a group's node with its checked options and the arguments that the program gives.

    Raises `UserError` for options that are right one by one, but from which nothing can be made.
    """
    target, values = check_node(node, where, tuple(given))
    try:
        return target(**given, **values)
    except UserError:
        raise
    except (RuntimeError, ValueError, ArithmeticError, MemoryError) as error:
        # torch says so in several lines, of a size that does not fit into memory for one
        said = ", ".join(f"{key}={shown(value)}" for key, value in values.items())
        raise UserError(f"{where}: cannot be built with {said or 'no options'} ({clipped(str(error), 200)})") from error


def compose(overrides: list[str], hydra: bool = False) -> DictConfig:
    """The configuration that `dfl-train` would compose from these overrides, with Hydra's own node or without."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
        return hydra_compose("config", overrides, return_hydra_config=hydra)


def one_line(error: BaseException) -> str:
    """An error as one line, which Hydra and OmegaConf spread over several, with the choices if there is no such key."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UserError):
        return clipped(text)
    for rest in (" Config search path:", " See https://", " To append to your config"):
        text = text.split(rest)[0]
    # OmegaConf names the key last, among its types
    text = re.sub(r"^(.*?) full_key: (\S+)( .*)?$", r"\2: \1", text)
    cause = error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and OmegaConf.is_dict(cause.parent_node):
        keys = ", ".join(str(key) for key in cause.parent_node if key not in INTERNAL)
        everything: Any = OmegaConf.to_container(cause.parent_node._get_root(), resolve=False)
        text += f" No such key as {cause.full_key}; there are {keys or 'none'}"
        text += did_you_mean(str(cause.full_key), flat_keys(everything))
    elif isinstance(cause, OmegaConfBaseException):
        text += f": {one_line(cause)}"
    elif isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        text += did_you_mean(error.missing_cfg_file.rpartition("/")[2], error.options)
    return clipped(text)
