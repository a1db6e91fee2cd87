"""Read job states on a SLURM cluster without accounting, from `squeue` instead of `sacct`."""

import itertools
import subprocess

from submitit.slurm import slurm

ENDED = (
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"
)  # fmt: skip
# not much longer, because SLURM forgets a job some minutes after its end
SECONDS_BETWEEN_QUERIES = 60


class QueueWatcher(slurm.SlurmInfoWatcher):
    """Ask `squeue` for job states. submitit asks `sacct`, and without `sacct` waits forever for a cancelled job."""

    def _make_command(self) -> list[str] | None:
        command = super()._make_command()
        if command is None:
            return None
        ids = ",".join(value for flag, value in itertools.pairwise(command) if flag == "-j")
        return ["squeue", "--states=all", "--array", "--format=%i|%T|%N", f"--jobs={ids}"]

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        """Return the state of every job in the output of `squeue`, by job ID."""
        text = string if isinstance(string, str) else string.decode()
        jobs = super().read_info(text.replace("JOBID|STATE|NODELIST", "JobID|State|NodeList", 1))
        for info in jobs.values():
            # submitit knows only some states of unfinished jobs; it regards a job in any other state as ended
            if info["State"] not in ENDED:
                info["State"] = "RUNNING"
        return jobs


def watch() -> None:
    """Let submitit watch its jobs with `squeue` if the cluster has no accounting."""
    try:
        subprocess.run(["sacct", "--noheader"], capture_output=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        slurm.SlurmJob.watcher = QueueWatcher(delay_s=SECONDS_BETWEEN_QUERIES)
