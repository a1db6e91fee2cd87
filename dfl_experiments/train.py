"""The entrypoint: `dfl-train key=value …`, one job or a multirun."""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dfl_experiments.config import CONF_DIR, UserError, one_line
from dfl_experiments.settings import check, register_resolvers

FULL_ERROR = "HYDRA_FULL_ERROR"
# what the user asked for: `main` sets the variable for its own ends
SHOW_TRACEBACKS = os.environ.get(FULL_ERROR) == "1"


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
def job(cfg: DictConfig) -> float | None:
    """One job: check the configuration, train, and return the accuracy that the protocol reports."""
    hydra_config = HydraConfig.get()
    group = cfg.sweep if hydra_config.mode == RunMode.MULTIRUN else None
    try:
        settings = check(cfg)
        # torch is slow to import, and neither --help nor completion nor a refusal needs it
        from dfl_experiments.run import run

        return run(cfg, settings, Path(hydra_config.runtime.output_dir), group)
    except UserError as error:
        if group is not None or SHOW_TRACEBACKS:
            raise
        # Hydra would print a line of its own before the error of a single job
        raise SystemExit(_refuse(error)) from error


def _refuse(error: Exception) -> int:
    print(f"dfl-train: error: {one_line(error)}", file=sys.stderr)
    return 2


def main() -> None:
    """Run `job`; a user's mistake ends in one line and exit code 2, and HYDRA_FULL_ERROR=1 shows where it came from."""
    register_resolvers()
    if SHOW_TRACEBACKS:
        job()
        return
    # Hydra then passes errors on to us instead of printing its own shortened traceback
    os.environ[FULL_ERROR] = "1"
    try:
        job()
    except (HydraException, OmegaConfBaseException, UserError) as error:
        raise SystemExit(_refuse(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
