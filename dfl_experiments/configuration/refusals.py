"""What is said of a mistake in a configuration: which key, which value, and what there is to choose from."""

import difflib
import re
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from pydantic import ValidationError
from yaml import MarkedYAMLError, YAMLError

from dfl_experiments.configuration.composition import group_options
from dfl_experiments.errors import Fault, UserError, clipped, of_the_system, reason, shown

MISTAKES = (HydraException, OmegaConfBaseException, YAMLError, UserError)
INTERNAL = ("hydra", "name", "_target_")  # keys that nobody is offered


def refuse(error: BaseException, program: str = "dfl-train") -> NoReturn:
    """Print the error's one line and leave the process with its code, 2 unless the machine is to blame."""
    print(f"{program}: error: {one_line(error)}", file=sys.stderr)
    raise SystemExit(getattr(error, "exit_code", 2)) from None


@contextmanager
def refusing(program: str = "dfl-train") -> Iterator[None]:
    """A mistake inside ends the process in one line, any other error with its traceback."""
    try:
        yield
    except MISTAKES as error:
        refuse(error, program)
    except BrokenPipeError:  # nobody reads what is printed any more
        raise SystemExit(128 + signal.SIGPIPE) from None
    except OSError as error:
        refuse(Fault(of_the_system(error)), program)
    except Exception as error:
        traceback.print_exc()
        raise SystemExit(1) from error


def uncomposed(error: Exception, overrides: Iterable[str]) -> Exception:
    """An error in composing these overrides, as a mistake in them."""
    if isinstance(error, MISTAKES):
        return error
    for override in overrides:
        group, _, value = override.partition("=")
        options = group_options(group)
        if options and not isinstance(yaml.safe_load(value), str):
            return UserError(f"{override}: is no choice of the group; there are {', '.join(options)}")
    return UserError(f"{reason(error)} (in {' '.join(overrides)})")


def one_line(error: BaseException) -> str:
    """An error in one line, which Hydra, OmegaConf and YAML spread over several."""
    if isinstance(error, MISTAKES) and (ours := in_our_words(error)):
        return ours
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error.__cause__, OmegaConfBaseException):
        text += f": {' '.join(str(error.__cause__).split())}"
    # OmegaConf names the key last, among its types
    return clipped(re.sub(r"^(.*?) full_key: (\S+)( .*)?$", r"\2: \1", text))


def flat_keys(node: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The full name of every key of nested mappings, `a` and `a.b`, without Hydra's own and the program's own."""
    keys = []
    for key, value in node.items():
        if key not in INTERNAL:
            keys.append(f"{prefix}{key}")
            if isinstance(value, Mapping):
                keys += flat_keys(value, f"{prefix}{key}.")
    return keys


def did_you_mean(key: str, names: Iterable[str]) -> str:
    """What to add to a message about a wrong key: the names it looks like, or nothing.

    Last parts are compared: the same one in another place (`lr` for `optimizer.lr`), or else a similar word.
    """

    def initials(word: str) -> str:
        return "".join(part[:1] for part in word.split("_"))

    place, _, last = key.lower().rpartition(".")
    lasts = {name: name.rpartition(".")[2] for name in names if name != key}
    short = initials(last) if "_" in last else last  # learning_rate is lr, and wd is weight_decay
    similar = difflib.get_close_matches(last, lasts.values(), n=1, cutoff=0.65)
    found = (
        [name for name, word in lasts.items() if word == last]
        or [name for name, word in lasts.items() if len(short) > 1 and short in (word, initials(word))]
        or [name for name, word in lasts.items() if word in similar]
    )
    found = [name for name in found if name.rpartition(".")[0] == place] or found
    return f"; did you mean {' or '.join(found[:3])}?" if found else ""


def in_our_words(error: BaseException | None) -> str | None:
    """What Hydra's refusal leaves out, as a line: of a key or an option that does not exist, those there are; of a
    value that it cannot read, how it is quoted. None for other errors.
    """
    if isinstance(error, MarkedYAMLError):
        return yaml_line(error)
    if isinstance(error, OverrideParseException):
        key, _, value = str(error.override).partition("=")
        if not value or set(value) & set("'\"[]{}"):
            return None
        return f"""quote a value that has more than letters, digits and -_./ in it: "{key}='{value}'\""""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        there = f"there are {', '.join(error.options)}{did_you_mean(name, error.options)}"
        return f"{group}={name}: {there} (--config-dir names a folder with options of your own)"
    cause = error.__cause__ if isinstance(error, HydraException) else error
    if not isinstance(cause, ConfigAttributeError | ConfigKeyError) or not OmegaConf.is_dict(cause.parent_node):
        return None
    keys = ", ".join(str(key) for key in cause.parent_node if key not in INTERNAL)
    everything: Any = OmegaConf.to_container(cause.parent_node._get_root(), resolve=False)
    key = str(cause.full_key)
    more = f"; +{key}=… passes its constructor one more" if "_target_" in cause.parent_node else ""
    return f"{key}: no such option; there are {keys}{more}{did_you_mean(key, flat_keys(everything))}"


def yaml_line(error: MarkedYAMLError) -> str | None:
    """The line of a file that YAML cannot be read from, and why; None where no file is named."""
    mark = error.problem_mark or error.context_mark
    if mark is None or not Path(mark.name).is_file():
        return None
    lines = Path(mark.name).read_text(encoding="utf-8", errors="replace").splitlines()[: mark.line + 1]
    while lines and not lines[-1].strip():  # the end of the file is where a bracket was not closed
        lines.pop()
    return f"{mark.name}, line {len(lines)}: {clipped(lines[-1] if lines else '', 100)} ({error.problem})"


def refusal(error: ValidationError, where: str, options: Sequence[str], names: Iterable[str] = ()) -> UserError:
    """The first thing that pydantic found, told of a key by its full name.

    where: what its keys lie in; options: those of the innermost model that holds an unknown one; names: all there are.
    """
    first = error.errors()[0]
    key = ".".join(str(part) for part in (where, *first["loc"]) if part != "")
    if first["type"] == "extra_forbidden":
        return UserError(f"{key}: no such option; there are {', '.join(options) or 'none'}{did_you_mean(key, names)}")
    if first["type"] == "missing":
        return UserError(f"{key}: missing; set {key}=…")
    if first["type"] == "value_error":  # a check of ours, which has said it all
        return UserError(str(first["ctx"]["error"]))
    return UserError(f"{key}={shown(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}")
