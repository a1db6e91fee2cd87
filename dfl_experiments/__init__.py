"""Direct feedback learning with local alignment support: any method × model × dataset from one entrypoint.

From Python, say in a notebook:

    import dfl_experiments as dfl

    configuration = dfl.compose(["method=ltas", "epochs=3"])   # as `dfl-train method=ltas epochs=3` would
    result = dfl.run(configuration, "outputs/mine")            # trains, and gives the content of result.json
    columns = dfl.read_rows("outputs/mine", "iterations")      # pandas.DataFrame(columns) makes a table of them
    net = dfl.load_net("outputs/mine")                         # the trained network, a torch.nn.Module
"""

import sys
from typing import Any

if sys.platform == "win32":
    print("dfl-experiments: error: Windows is not supported; use the Windows Subsystem for Linux", file=sys.stderr)
    raise SystemExit(2)

__version__ = "0.1.0"
__all__ = ["compose", "load_net", "read_rows", "run"]


def __getattr__(name: str) -> Any:
    # only when one of them is asked for: they bring torch along, which is slow to import
    if name in __all__:
        from dfl_experiments import notebook

        return getattr(notebook, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
