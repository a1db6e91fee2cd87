"""Run `dfl-train` as `python -m dfl_experiments`."""

from dfl_experiments.console import train

train()
