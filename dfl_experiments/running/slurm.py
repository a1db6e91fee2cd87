"""A SLURM without accounting, as small clusters have it: its controller is asked how jobs are, in place of `sacct`."""

import itertools
import subprocess

from submitit.slurm import slurm

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE")
LOOKS = 60  # seconds between two, at most: the controller forgets a job that has ended after some minutes


class QueueWatcher(slurm.SlurmInfoWatcher):
    """Where submitit learns the state of its jobs: without accounting it would wait for a cancelled one for ever."""

    def _make_command(self) -> list[str] | None:
        command = super()._make_command()
        if command is None:
            return None
        ids = ",".join(value for flag, value in itertools.pairwise(command) if flag == "-j")
        return ["squeue", "--states=all", "--array", "--format=%i|%T|%N", f"--jobs={ids}"]

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        """The state of every job that the controller has told of."""
        text = string if isinstance(string, str) else string.decode()
        jobs = super().read_info(text.replace("JOBID|STATE|NODELIST", "JobID|State|NodeList", 1))
        # the controller has words for a job on its way that submitit would take for its end
        return {job: told if told["State"] in ENDED else told | {"State": "RUNNING"} for job, told in jobs.items()}


def watch() -> None:
    """Have submitit's jobs watched in the way that this cluster has."""
    try:
        subprocess.run(["sacct", "--noheader"], capture_output=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        slurm.SlurmJob.watcher = QueueWatcher(delay_s=LOOKS)
