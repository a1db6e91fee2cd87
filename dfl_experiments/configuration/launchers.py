"""Set defaults for Hydra's launchers and sweepers.

Their own defaults overload machines, end long runs, and search for the lowest accuracy.
"""

from contextlib import suppress
from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

JOBS_AT_ONCE = 2
DAY = 24 * 60  # minutes
TIMEOUTS = 30  # how often a SLURM job at its time limit is queued again


def register_launchers() -> None:
    """Register the defaults of this project for the launchers and sweepers that are installed.

    `hydra/launcher=joblib` runs two jobs at once, not one per core; submitit's launchers give a job a day, not an hour;
    `hydra/sweeper=optuna` maximises, with two trials at once.
    """
    Plugins.instance()  # installed plugins register their defaults here; those below replace them
    store = ConfigStore.instance()
    with suppress(ImportError):
        from hydra_plugins.hydra_joblib_launcher.config import JobLibLauncherConf

        joblib = JobLibLauncherConf(n_jobs=JOBS_AT_ONCE, batch_size="1")
        store.store("joblib", joblib, group="hydra/launcher", provider="dfl_experiments")
    with suppress(ImportError):
        from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf

        @dataclass
        class Local(LocalQueueConf):
            # On a terminal's SIGINT the command lets the jobs save. Their controller would kill them.
            setup: list[str] = field(default_factory=lambda: ["trap '' INT HUP"])

        local = Local(timeout_min=DAY, name="${sweep}")
        # a job at its time limit is queued again, and continues from its checkpoint
        slurm = SlurmQueueConf(timeout_min=DAY, max_num_timeout=TIMEOUTS, name="${sweep}")
        for name, node in (("submitit_local", local), ("submitit_slurm", slurm)):
            store.store(name, node, group="hydra/launcher", provider="dfl_experiments")
    with suppress(ImportError):
        from hydra_plugins.hydra_ray_launcher.ray_launcher import RayLauncher

        # an existing cluster refuses the plugin's own object_store_memory
        node = {"init": {"address": None, "object_store_memory": None}, "remote": {}}
        target = f"{RayLauncher.__module__}.{RayLauncher.__name__}"
        store.store("ray", {"_target_": target, "ray": node}, group="hydra/launcher", provider="dfl_experiments")
    with suppress(ImportError):
        from hydra_plugins.hydra_optuna_sweeper.config import Direction, OptunaSweeperConf

        optuna = OptunaSweeperConf(direction=Direction.maximize, n_jobs=JOBS_AT_ONCE)
        store.store("optuna", optuna, group="hydra/sweeper", provider="dfl_experiments")
