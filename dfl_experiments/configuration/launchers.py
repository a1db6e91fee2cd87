"""Replace the defaults of Hydra's launchers and sweepers.

Hydra's own defaults start one job per core, stop runs that take long, and minimise the accuracy.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

JOBS_AT_ONCE = 2
DAY = 24 * 60  # minutes
# how often a SLURM job that reaches its time limit is restarted; it continues from its checkpoint
TIMEOUTS = 30


def register_launchers() -> None:
    """Register the defaults of this project for the launchers and sweepers that are installed.

    joblib runs two jobs at once instead of one per core. submitit gives each job one day instead of one hour. Optuna
    maximises instead of minimising, and runs two trials at once.
    """
    # load the plugins' own defaults first, so that the defaults below replace them
    Plugins.instance()

    def register(group: str, name: str, node: Any) -> None:
        store = ConfigStore.instance()
        store.store(name, node, group=f"hydra/{group}", provider="dfl_experiments")

    with suppress(ImportError):
        from hydra_plugins.hydra_joblib_launcher.config import JobLibLauncherConf

        register("launcher", "joblib", JobLibLauncherConf(n_jobs=JOBS_AT_ONCE, batch_size="1"))
    with suppress(ImportError):
        from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf

        @dataclass
        class Local(LocalQueueConf):
            # Submitit's controller must ignore Ctrl-C, or it kills the jobs. dfl-train lets the jobs save instead.
            setup: list[str] = field(default_factory=lambda: ["trap '' INT HUP"])

        slurm = SlurmQueueConf(timeout_min=DAY, max_num_timeout=TIMEOUTS, name="${sweep}")
        register("launcher", "submitit_local", Local(timeout_min=DAY, name="${sweep}"))
        register("launcher", "submitit_slurm", slurm)
    with suppress(ImportError):
        from hydra_plugins.hydra_ray_launcher.ray_launcher import RayLauncher

        # object_store_memory is None, because an existing Ray cluster does not accept the plugin's default value
        node = {"init": {"address": None, "object_store_memory": None}, "remote": {}}
        target = f"{RayLauncher.__module__}.{RayLauncher.__name__}"
        register("launcher", "ray", {"_target_": target, "ray": node})
    with suppress(ImportError):
        from hydra_plugins.hydra_optuna_sweeper.config import Direction, OptunaSweeperConf

        optuna = OptunaSweeperConf(direction=Direction.maximize, n_jobs=JOBS_AT_ONCE)
        register("sweeper", "optuna", optuna)
