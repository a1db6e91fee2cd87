"""Defaults for Hydra's launchers and sweepers: theirs overload machines, end long runs, seek the lowest accuracy."""

from contextlib import suppress
from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

JOBS_AT_ONCE = 2
DAY = 24 * 60
TIMEOUTS = 30


def register_launchers() -> None:
    """Let `hydra/launcher=joblib` run two jobs at once, not one per core; give submitit's a day each, not an hour.

    Let `hydra/sweeper=optuna` maximise, with as many trials under way.
    """
    Plugins.instance()  # the plugins that are installed register theirs when they are found, and ours come after
    store = ConfigStore.instance()
    with suppress(ImportError):
        from hydra_plugins.hydra_joblib_launcher.config import JobLibLauncherConf

        joblib = JobLibLauncherConf(n_jobs=JOBS_AT_ONCE, batch_size="1")
        store.store("joblib", joblib, group="hydra/launcher", provider="dfl_experiments")
    with suppress(ImportError):
        from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf

        @dataclass
        class Local(LocalQueueConf):
            # of a terminal's SIGINT the command itself hears, and has them save; their controller would kill them
            setup: list[str] = field(default_factory=lambda: ["trap '' INT HUP"])

        local = Local(timeout_min=DAY, name="${sweep}")
        # a job that meets its time limit goes on from its checkpoint in the next
        slurm = SlurmQueueConf(timeout_min=DAY, max_num_timeout=TIMEOUTS, name="${sweep}")
        for name, node in (("submitit_local", local), ("submitit_slurm", slurm)):
            store.store(name, node, group="hydra/launcher", provider="dfl_experiments")
    with suppress(ImportError):
        from hydra_plugins.hydra_ray_launcher.ray_launcher import RayLauncher

        # the plugin's own object_store_memory is refused where the cluster is there already
        node = {"init": {"address": None, "object_store_memory": None}, "remote": {}}
        target = f"{RayLauncher.__module__}.{RayLauncher.__name__}"
        store.store("ray", {"_target_": target, "ray": node}, group="hydra/launcher", provider="dfl_experiments")
    with suppress(ImportError):
        from hydra_plugins.hydra_optuna_sweeper.config import Direction, OptunaSweeperConf

        optuna = OptunaSweeperConf(direction=Direction.maximize, n_jobs=JOBS_AT_ONCE)
        store.store("optuna", optuna, group="hydra/sweeper", provider="dfl_experiments")
