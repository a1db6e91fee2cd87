"""`python -m dfl_experiments`, which is `dfl-train`."""

from dfl_experiments.console import train

train()
