"""A SLURM cluster of two nodes on loopback: munge, slurmctld and two slurmd, in one folder.

``python tests/slurm_cluster.py FOLDER`` starts one and runs until it is interrupted; then
``SLURM_CONF=FOLDER/slurm.conf squeue`` asks it. It needs root, and Debian's packages munge,
slurmctld, slurmd and slurm-client; nothing outside FOLDER is touched.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "sinfo", "scontrol")
PATH = "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin"
CONFIG = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=100000,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
OverTimeLimit=0
KillWait=2
MinJobAge=300
InactiveLimit=0
MessageTimeout=60
SlurmctldDebug=info
SlurmdDebug=info
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000 Gres=gpu:1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000 Gres=gpu:1
PartitionName=short Nodes=n1 MaxTime=10 Default=YES State=UP
PartitionName=wide Nodes=n1,n2 MaxTime=10 State=UP
PartitionName=down Nodes=n2 MaxTime=10 State=DOWN
"""


def missing() -> str:
    """Return why no cluster can be started here; empty if one can."""
    absent = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
    if absent:
        return f"{', '.join(absent)} missing (apt-get install munge slurmctld slurmd slurm-client)"
    return "" if os.getuid() == 0 else "slurmd and slurmctld are started as root only"


class Cluster:
    """The cluster's processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        held = [socket.socket() for _ in range(3)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in held]
        for one in held:
            one.close()
        (folder / "state").mkdir()
        for node in ("n1", "n2"):
            (folder / f"spool-{node}").mkdir()
        host = socket.gethostname().split(".")[0]
        self.config = folder / "slurm.conf"
        self.config.write_text(CONFIG.format(folder=folder, ports=ports, host=host))
        (folder / "gres.conf").write_text("NodeName=n[1-2] Name=gpu File=/dev/null\n")
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)

    @property
    def env(self) -> dict[str, str]:
        """Variables with which SLURM's commands find this cluster."""
        return {"SLURM_CONF": str(self.config)}

    def start(self) -> None:
        """Start everything; raises `RuntimeError` with the last words of what does not come up."""
        socket_file = self.folder / "munge.socket"
        self.spawn("munged", "-F", "--force", f"--socket={socket_file}",
                   f"--key-file={self.folder}/munge.key", f"--pid-file={self.folder}/munged.pid",
                   f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/munge.seed",
                   "--num-threads=2")  # fmt: skip
        self.until(socket_file.exists, "munged")
        self.spawn("slurmctld", "-D", "-f", str(self.config))
        for node in ("n1", "n2"):
            self.spawn(f"slurmd {node}", "-D", "-N", node, "-f", str(self.config))
        self.until(lambda: self.ask("sinfo", "-h", "-o", "%D %t", "-p", "wide") == "2 idle",
                   "slurmctld")  # fmt: skip

    def spawn(self, name: str, *words: str) -> None:
        program = shutil.which(name.split()[0], path=PATH)
        assert program
        with (self.folder / f"{name.replace(' ', '-')}.out").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [program, *words], stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                env={**os.environ, **self.env}, start_new_session=True,
            )  # fmt: skip

    def ask(self, *words: str) -> str:
        done = subprocess.run(
            list(words), capture_output=True, text=True, env={**os.environ, **self.env}, timeout=60
        )
        return done.stdout.strip()

    def until(self, true, name: str, seconds: float = 40.0) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            ended = [n for n, p in self.processes.items() if p.poll() is not None]
            if ended or time.monotonic() > deadline:
                told = "".join(p.read_text(errors="replace")[-600:]
                               for p in sorted(self.folder.glob("*.out")))  # fmt: skip
                self.stop()
                raise RuntimeError(f"{(ended or [name])[0]} does not come up: {told}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Stop everything that was started."""
        for name in reversed(list(self.processes)):
            process = self.processes.pop(name)
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


if __name__ == "__main__":
    if problem := missing():
        sys.exit(problem)
    cluster = Cluster(Path(sys.argv[1]).absolute())
    cluster.start()
    print(f"SLURM_CONF={cluster.config}", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        cluster.stop()
