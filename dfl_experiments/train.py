"""The entrypoint: `dfl-train key=value …`, one job or a multirun."""

import os
import signal
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from dfl_experiments.callbacks import MISTAKES, SHOW_TRACEBACKS, refuse
from dfl_experiments.config import CONF_DIR, UserError
from dfl_experiments.settings import check, register_resolvers

# at import: the processes of a launcher import this module and never see `main`
register_resolvers()
FULL_ERROR = "HYDRA_FULL_ERROR"


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
    except Exception as error:
        # Hydra keeps the error of a sweep's job, and with it whatever its frames hold: the network, the images
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, UserError) and group is None and not SHOW_TRACEBACKS:
            # Hydra would print a line of its own before the error of a single job
            refuse(error)
        raise


class Terminated(KeyboardInterrupt):
    """SIGTERM, which a scheduler sends before it kills: the run ends as an interrupted one does."""


def _terminate(signum: int, frame: object) -> None:
    raise Terminated


def main() -> None:
    """Run `job`; a user's mistake ends in one line and exit code 2, and HYDRA_FULL_ERROR=1 shows where it came from."""
    if SHOW_TRACEBACKS:
        job()
        return
    before = os.environ.get(FULL_ERROR)
    # Hydra then passes errors on to us instead of printing its own shortened traceback
    os.environ[FULL_ERROR] = "1"
    on_term = signal.signal(signal.SIGTERM, _terminate)
    try:
        job()
    except MISTAKES as error:
        refuse(error)
    except ValueError as error:
        # what Hydra raises for method=null
        if not str(error).startswith("Config group override"):
            raise
        refuse(error)
    except KeyboardInterrupt as stop:
        raise SystemExit(143 if isinstance(stop, Terminated) else 130) from None
    finally:
        signal.signal(signal.SIGTERM, on_term)
        os.environ.pop(FULL_ERROR)
        if before is not None:
            os.environ[FULL_ERROR] = before


if __name__ == "__main__":
    main()
