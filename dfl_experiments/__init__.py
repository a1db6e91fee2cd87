"""Direct feedback learning with local alignment support: any method × model × dataset from one entrypoint.

From Python, for example in a notebook:

    import dfl_experiments as dfl

    configuration = dfl.compose(["method=ltas", "epochs=3"])   # as for `dfl-train method=ltas epochs=3`
    result = dfl.run(configuration, "outputs/mine")            # trains, and returns the content of result.json
    columns = dfl.read_rows("outputs/mine", "iterations")      # a NumPy array for each column name
    net = dfl.load_net("outputs/mine")                         # the trained network, a torch.nn.Module
    runs = dfl.runs("outputs/mine")                            # a DataFrame, one row for each run
    figure = dfl.draw(runs, what=["alignment"])                # curves of these runs
"""

import sys
from importlib import import_module
from typing import Any

if sys.platform == "win32":
    print(
        "dfl-experiments: error: Windows is not supported; use the Windows Subsystem for Linux",
        file=sys.stderr,
    )
    raise SystemExit(2)

__version__ = "0.1.0"
# For each public name, the module that defines the name. A module is imported when one of its names is first used,
# because importing torch or pandas is slow.
NAMES = {
    "boundaries": "engine.module_survey",
    "compose": "api",
    "curves": "report.frame",
    "draw": "report.lines",
    "load_net": "api",
    "load_run": "api",
    "read_rows": "api",
    "rule": "own_loop",
    "run": "api",
    "runs": "report.frame",
}
__all__ = [*NAMES]


def __getattr__(name: str) -> Any:
    if name in NAMES:
        return getattr(import_module(f"dfl_experiments.{NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
