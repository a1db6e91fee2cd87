"""List the jobs of a sweep from its command line."""

import itertools
from collections.abc import Iterator, Sequence

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from dfl_experiments.errors import UserError

BASIC = "basic"  # name of Hydra's default sweeper
MULTIRUN = ("--multirun", "-m")


def read_in_jobs(arguments: Sequence[str]) -> list[str]:
    """Return the arguments in a form in which Hydra reads the options of a swept group only in the jobs.

    An example is `method=dfa,sdfa method.top=direct`. Before Hydra makes the jobs, it composes a configuration without
    the sweeps, thus with the default method. Hydra would then refuse an option that the default method lacks. The form
    `method.top=choice(direct)` counts as a sweep, so that composition leaves it out.
    """
    if not set(MULTIRUN) & set(arguments):
        return [*arguments]
    swept = [argument.partition("=")[0] for argument in arguments if is_sweep(argument)]
    changed = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        is_of_swept_group = key.partition(".")[0] in swept and "." in key
        if is_of_swept_group and value and not is_sweep(argument):
            argument = f"{key}=choice({value})"
        changed.append(argument)
    return changed


def is_sweep(argument: str) -> bool:
    """Return whether an argument is an override with several values, such as a=1,2."""
    try:
        return OverridesParser.create().parse_override(argument).is_sweep_override()
    except HydraException:
        return False  # a flag, or a mistake that Hydra refuses


def sweep_points(texts: Sequence[str], sweeper: str) -> Iterator[list[str]]:
    """Yield the overrides of every job of a grid such as `a=1,2 b=3`.

    A later override of the same key replaces an earlier one. Continuous ranges are omitted: a sweeper such as Optuna
    chooses their values during the sweep.
    texts: the overrides of the command line. sweeper: name of Hydra's sweeper.
    Raises `UserError` for a continuous range with the basic sweeper, for several seeds with another sweeper, and for a
    `glob(…)` that matches nothing.
    """
    # the parser needs the loader for glob(*)
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    choices: dict[str, list[str]] = {}
    seed: Override | None = None
    for override in parser.parse_overrides(list(texts)):
        key = override.get_key_element()
        if not override.is_sweep_override():
            choices[key] = [f"{key}={override.get_value_element_as_str()}"]
        elif override.is_discrete_sweep():
            choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
            if not choices[key]:
                raise UserError(
                    f"{override.input_line}: matches no option, so the sweep has no job"
                )
        elif sweeper == BASIC:
            raise UserError(f"{override.input_line}: a continuous range needs hydra/sweeper=optuna")
        if key == "seed":
            seed = override
    if sweeper != BASIC and seed is not None:
        is_range = seed.is_sweep_override() and not seed.is_discrete_sweep()
        if is_range or len(set(choices["seed"])) > 1:
            problem = f"hydra/sweeper={sweeper} would choose a lucky seed"
            advice = "set one seed, then train the best point with several"
            raise UserError(f"{seed.input_line}: {problem}; {advice}")
    return (list(point) for point in itertools.product(*choices.values()))
