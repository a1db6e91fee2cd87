"""A real SLURM of one node on this machine's loopback, brought up for the tests and taken down after them.

Debian has it: `apt-get install slurmctld slurmd slurm-client munge`. It takes root, for the daemons.
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
AuthInfo=socket={place}/munge.sock
CredType=cred/munge
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd.log
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
    """Why there can be no SLURM here, None if there can."""
    if absent := [name for name in NEEDED if not program(name)]:
        return f"no SLURM: {', '.join(absent)} not installed"
    return None if os.geteuid() == 0 else "no SLURM: its daemons need root"


def program(name: str) -> str | None:
    """Return the path of a program. System folders that are not in a user's PATH are searched too."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextmanager
def cluster() -> Iterator[Path]:
    """SLURM's configuration file, which `SLURM_CONF` must name, as long as the cluster is up."""
    place = Path(tempfile.mkdtemp(prefix="slurm-"))  # a socket's path must be short
    daemons: list[subprocess.Popen[bytes]] = []
    variables = {**os.environ, "SLURM_CONF": str(place / "slurm.conf")}

    def start(name: str, *options: str) -> None:
        with (place / f"{name}.out").open("wb") as output:
            command = [program(name) or name, *options]
            daemons.append(subprocess.Popen(command, env=variables, stdout=output, stderr=output))

    try:
        place.chmod(0o755)
        values = {
            "host": socket.gethostname().partition(".")[0],
            "place": place,
            "cores": os.cpu_count(),
        }
        (place / "slurm.conf").write_text(CONFIGURATION.format(ports=free_ports(2), **values))
        (place / "cgroup.conf").write_text("CgroupPlugin=autodetect\n")
        for name in ("state", "spool"):
            (place / name).mkdir()
        (place / "munge.key").write_bytes(os.urandom(1024))
        (place / "munge.key").chmod(0o600)
        files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munge.pid", "log-file": "munge.log",
                 "seed-file": "munge.seed"}  # fmt: skip
        start(
            "munged",
            "--force",
            "--foreground",
            *(f"--{flag}={place / name}" for flag, name in files.items()),
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
            logs = "; ".join(path.read_text()[-200:].strip() for path in place.glob("*.out"))
            pytest.skip(f"no SLURM: it did not come up ({logs})")
        yield place / "slurm.conf"
    finally:
        subprocess.run(["scancel", "--user=root"], env=variables, capture_output=True)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=30)
        shutil.rmtree(place, ignore_errors=True)
