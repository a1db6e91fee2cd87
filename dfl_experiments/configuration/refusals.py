"""Format a mistake in a configuration as one line: the key, the value, and the choices."""

import difflib
import re
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from dfl_experiments.configuration.composition import CONF_DIR, group_options
from dfl_experiments.configuration.history import MOVED, RENAMED
from dfl_experiments.errors import Fault, UserError, clipped, of_the_system, reason, shown

MISTAKES = (HydraException, OmegaConfBaseException, YAMLError, UserError)
# The user named a file where a folder is needed, or a folder where a file is needed.
WRONG_PATHS = (FileExistsError, IsADirectoryError, NotADirectoryError)
# names of options in other programs, and of the choice that switches W&B off
OTHER_WORDS = {"learning_rate": "lr", "wd": "weight_decay", "none": "disabled", "off": "disabled"}
INTERNAL = ("hydra", "name", "_target_")  # keys that error messages do not suggest
# groups of options for B, which the command line adds to a group of the same name
OF_FEEDBACK = ("optimizer.feedback", "schedule.feedback")
SHORTEST_PART = 3  # letters; a shorter text is part of too many names
LONG_LIST = 12  # a longer list of keys is left out of a message that suggests one of them
# launchers and sweepers that are not installed by default, and the extra that has them
EXTRAS = {
    "joblib": "joblib",
    "submitit_local": "slurm",
    "submitit_slurm": "slurm",
    "ray": "ray",
    "optuna": "optuna",
}


def refuse(error: BaseException, program: str = "dfl-train") -> NoReturn:
    """Print the error in one line and exit. The exit code is 2 for a user's mistake and 1 for a `Fault`."""
    print(f"{program}: error: {one_line(error)}", file=sys.stderr)
    raise SystemExit(getattr(error, "exit_code", 2)) from None


@contextmanager
def refusing(program: str = "dfl-train") -> Iterator[None]:
    """Exit if the block raises an error. Print one line for a user's mistake or an OSError, otherwise the traceback."""
    try:
        yield
    except MISTAKES as error:
        refuse(error, program)
    except BrokenPipeError:  # the program that reads the output, such as `head`, has ended
        raise SystemExit(128 + signal.SIGPIPE) from None
    except WRONG_PATHS as error:
        refuse(UserError(of_the_system(error)), program)
    except OSError as error:
        refuse(Fault(of_the_system(error)), program)
    except Exception as error:
        traceback.print_exc()
        raise SystemExit(1) from error


def uncomposed(error: Exception, overrides: Iterable[str]) -> Exception:
    """Convert an error of Hydra's composition to a `UserError` that names the override.

    An error that is already one of `MISTAKES` is returned unchanged.
    """
    if isinstance(error, MISTAKES):
        return error
    if isinstance(error, UnicodeDecodeError):
        before = error.object[: error.start].decode(errors="replace").rpartition("\n")[2]
        return UserError(f"a YAML file is not UTF-8 text after {shown(before)}; save it as UTF-8")
    return UserError(f"{reason(error)} (in {' '.join(overrides)})")


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line, even if Hydra, OmegaConf or YAML wrote several."""
    if isinstance(error, MISTAKES) and (message := message_with_choices(error)):
        return message
    text = in_one_line(error) or type(error).__name__
    if isinstance(error.__cause__, OmegaConfBaseException):
        text += f": {in_one_line(error.__cause__)}"
    # OmegaConf writes the key at the end of its message; move the key to the start.
    return clipped(re.sub(r"^(.*?) full_key: (\S+)( .*)?$", r"\2: \1", text))


def in_one_line(error: BaseException) -> str:
    """Return the text of an error without line breaks."""
    return " ".join(str(error).split())


def flat_keys(node: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the full names of all keys of nested mappings, such as `a` and `a.b`, except `INTERNAL` keys."""
    keys = []
    for key, value in node.items():
        if key not in INTERNAL:
            keys.append(f"{prefix}{key}")
            if isinstance(value, Mapping):
                keys += flat_keys(value, f"{prefix}{key}.")
    return keys


def did_you_mean(key: str, names: Iterable[str]) -> str:
    """Return "; did you mean …?" with the known name whose last part is closest to that of an unknown key.

    If none is close, a name that contains the unknown key is suggested. Return "" if there is no such name. Of several
    names, one in the key's own group is suggested, otherwise the one with the fewest dots. For a key in a known group,
    such as optimizer.beta, a name of another group must have the same last part.
    """
    renamed = (RENAMED | MOVED).get(key)
    if renamed:
        return f"; did you mean {renamed}?"
    last = last_part(key.lower())
    last = OTHER_WORDS.get(last, last)
    candidates = [name for name in names if name != key]
    group = f"{key.partition('.')[0]}."
    is_known_group = any(name.startswith(group) for name in candidates)
    if "." in key and is_known_group:
        candidates = [
            name for name in candidates if name.startswith(group) or last_part(name) == last
        ]
    close = difflib.get_close_matches(last, map(last_part, candidates), n=1)
    guesses = [name for name in candidates if last_part(name) in close]
    if not guesses and len(last) >= SHORTEST_PART:
        guesses = [name for name in candidates if last in last_part(name)]
    if not guesses:
        return ""
    own_group = key.rpartition(".")[0]
    guess = min(guesses, key=lambda name: (name.rpartition(".")[0] != own_group, name.count(".")))
    return f"; did you mean {guess}?"


def last_part(key: str) -> str:
    """Return the part of a key after its last dot."""
    return key.rpartition(".")[2]


def message_with_choices(error: BaseException | None) -> str | None:
    """Return a message that says how to correct an error of Hydra or OmegaConf; None for other errors.

    The message lists the known keys or options, or says how to quote a value.
    """
    if isinstance(error, OverrideParseException):
        override = str(error.override)
        return _how_to_set(override) if override.isidentifier() else _how_to_quote(override)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        if group.startswith("hydra/") and name in EXTRAS:
            command = f"pip install -e '.[{EXTRAS[name]}]'"
            return f"{group}={name}: not installed; in the project's folder run {command}"
        suggestion = did_you_mean(name, error.options)
        if group == "optimizer":
            suggestion = _of_torch(name) or suggestion
        choices = f"there are {', '.join(error.options)}{suggestion}"
        if not group.startswith("hydra/"):
            choices += " (--config-dir=<folder> adds your own options)"
        return f"{group}={name}: {choices}"
    cause = error.__cause__ if isinstance(error, HydraException) else error
    if not isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return None
    return _unknown_key(cause) if OmegaConf.is_dict(cause.parent_node) else None


def _of_torch(name: str) -> str:
    """Return how to choose an optimizer of torch.optim that has no file in conf/; "" for another name."""
    from dfl_experiments.optimizers import name_in_torch

    full = name_in_torch(name)
    if not full or name.lower() in group_options("optimizer"):
        return ""
    return f"; did you mean optimizer=torch optimizer._target_={full}?"


def _how_to_add(group: str) -> str:
    """Return a message that says how to choose one of `OF_FEEDBACK`, such as another schedule for B."""
    kind = group.removesuffix(".feedback")
    choices = ", ".join(group_options(kind))
    return f"{group}: choose it with +{kind}@{group}=…, there are {choices}"


def _how_to_set(word: str) -> str:
    """Return a message for a word without "=", with the group that has an option of this name."""
    groups = sorted(path.name for path in CONF_DIR.iterdir() if word in group_options(path.name))
    suggestion = f"; did you mean {groups[0]}={word}?" if groups else ""
    return f"{word}: must be key=value{suggestion}"


def _how_to_quote(override: str) -> str | None:
    """Return a message with the quoted override; None if the value is empty, or contains quotes or brackets."""
    key, _, value = override.partition("=")
    if not value or set(value) & set("'\"[]{}"):
        return None
    rule = "quote a value with other characters than letters, digits and -_./"
    return f"""{rule}: "{key}='{value}'\""""


def _unknown_key(error: Any) -> str:
    """Return a message for an unknown key, with the known keys and a suggestion. error: OmegaConf's error."""
    node = error.parent_node
    known = ", ".join(str(key) for key in node if key not in INTERNAL)
    choices = f"; there are {known or 'none'}"
    root = node._get_root()
    key = str(error.full_key)
    if key in OF_FEEDBACK:
        return _how_to_add(key)
    if _constructor_takes(key, root):
        return f"{key}: no such option{choices}; +{key}=… passes it to the constructor"
    everything: Any = OmegaConf.to_container(root, resolve=False)
    suggestion = did_you_mean(key, flat_keys(everything))
    if suggestion and len(node) > LONG_LIST:
        choices = ""
    return f"{key}: no such option{suggestion}{choices}"


def _constructor_takes(key: str, root: Any) -> bool:
    """Return whether the constructor of a component takes an option that the configuration lacks.

    key: key of the option, such as `method.fixed_blocks`. root: the configuration, as OmegaConf's node.
    """
    from dfl_experiments.configuration.components import KINDS, locate, options_of

    group, _, name = key.rpartition(".")
    if group not in KINDS:
        return False
    try:
        target = OmegaConf.select(root, f"{group}._target_")
        if target is None and group == "optimizer.feedback":
            target = root.optimizer._target_
        constructor = locate(target, group, root.plugins)
        return name in options_of(constructor, group).model_fields
    except (UserError, OmegaConfBaseException):  # a wrong `_target_`
        return False


def refusal(
    error: ValidationError, where: str, options: Sequence[str], names: Iterable[str] = ()
) -> UserError:
    """Return pydantic's first error as a `UserError` with the full name of the key.

    where: key of the validated group. options: the known options to list; may be empty.
    names: all keys of the configuration, for suggestions.
    """
    first = error.errors()[0]
    parts = [where, *map(str, first["loc"])]
    key = ".".join(part for part in parts if part)
    if first["type"] == "extra_forbidden":
        known = f"; there are {', '.join(options)}" if options else ""
        return UserError(f"{key}: no such option{did_you_mean(key, names)}{known}")
    if first["type"] == "missing":
        return UserError(f"{key}: missing; set {key}=…")
    # raised by a validator of this project, whose message is complete
    if first["type"] == "value_error":
        return UserError(str(first["ctx"]["error"]))
    if key in OF_FEEDBACK and first["type"] == "dict_type":
        return UserError(_how_to_add(key))
    message = first["msg"]
    message = message[0].lower() + message[1:]
    return UserError(f"{key}={shown(first['input'])}: {message}")
