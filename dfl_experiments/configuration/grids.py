"""List the jobs of a sweep from its command line."""

import itertools
from collections.abc import Iterator, Sequence

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from dfl_experiments.errors import UserError

BASIC = "basic"  # name of Hydra's default sweeper


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
