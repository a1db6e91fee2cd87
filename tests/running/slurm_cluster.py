"""A real SLURM cluster with one node on the loopback interface. The tests start it and stop it.

On Debian: `apt-get install slurmctld slurmd slurm-client munge`. The daemons need root.
"""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NEEDED = ("slurmctld", "slurmd", "munged", "sbatch")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
KillWait=10
SchedulerParameters=sched_interval=1,batch_sched_delay=0
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP OverSubscribe=FORCE:4
"""


def missing() -> str | None:
    """Return the reason why SLURM cannot run here, None if it can."""
    if absent := [name for name in NEEDED if not program(name)]:
        return f"no SLURM: {', '.join(absent)} not installed"
    return None if os.geteuid() == 0 else "no SLURM: its daemons need root"


def program(name: str) -> str | None:
    """Return the path of a program. System folders that are not in a user's PATH are searched too."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def free_ports(count: int) -> list[int]:
    """Return ports on which no program listens."""
    sockets = [socket.socket() for _ in range(count)]
    for probe in sockets:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in sockets]
    for probe in sockets:
        probe.close()
    return ports


@contextmanager
def cluster() -> Iterator[Path]:
    """Run a cluster and yield its configuration file, which `SLURM_CONF` must name."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a socket's path must be short
    daemons: list[subprocess.Popen[bytes]] = []
    variables = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(name: str, *options: str) -> None:
        with (folder / f"{name}.out").open("wb") as output:
            command = [program(name) or name, *options]
            daemons.append(subprocess.Popen(command, env=variables, stdout=output, stderr=output))

    try:
        folder.chmod(0o755)
        values = {
            "host": socket.gethostname().partition(".")[0],
            "folder": folder,
            "cores": os.cpu_count(),
        }
        (folder / "slurm.conf").write_text(CONFIGURATION.format(ports=free_ports(2), **values))
        (folder / "cgroup.conf").write_text("CgroupPlugin=autodetect\n")
        for name in ("state", "spool"):
            (folder / name).mkdir()
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)
        files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munge.pid", "log-file": "munge.log",
                 "seed-file": "munge.seed"}  # fmt: skip
        start(
            "munged",
            "--force",
            "--foreground",
            *(f"--{flag}={folder / name}" for flag, name in files.items()),
        )
        start("slurmctld", "-D")
        start("slurmd", "-D")
        for _ in range(100):
            states = subprocess.run(
                ["sinfo", "-h", "-o", "%t"], env=variables, capture_output=True, text=True
            )
            if states.stdout.strip() == "idle":
                break
            time.sleep(0.2)
        else:
            logs = "; ".join(path.read_text()[-200:].strip() for path in folder.glob("*.out"))
            pytest.skip(f"no SLURM: it did not start ({logs})")
        yield folder / "slurm.conf"
    finally:
        subprocess.run(["scancel", "--user=root"], env=variables, capture_output=True)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)
