"""A real Slurm cluster on this machine, for tests: munged, slurmctld and one slurmd per node, on loopback addresses.

Each node has its own process, host name, mount and shared-memory namespace, so that switching it off takes all its
processes away at once, as a power failure does. Needs root and the programs of Slurm and munge.
"""

import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scontrol", "scancel")
SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
START_SECONDS, STOP_SECONDS, COMMAND_SECONDS = 60.0, 10.0, 60.0
ENDED_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")

NODE = ("unshare", "--uts", "--mount", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c")

CONFIGURATION = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SlurmctldTimeout=10
SlurmdTimeout=5
KillWait=5
MessageTimeout=10
ReturnToService=2
MinJobAge=86400
EnforcePartLimits=ALL
GresTypes=gpu
FirstJobId={first_job}
NodeName=node[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.[11-{last_address}] Port=[{first_port}-{last_port}] \
CPUs={cpus} RealMemory={memory_mib} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=node[1-{nodes}] Default=YES DefaultTime=60 MaxTime=INFINITE State=UP
"""
# Devices of Slurm's GPUs are counted, never opened.
GPU_FILES = "NodeName=node[1-{nodes}] Name=gpu File={folder}/gpu[0-{last_gpu}]\n"


@dataclass(frozen=True)
class Shape:
    """What the nodes claim to have; Slurm is told to believe them."""

    nodes: int = 2
    cpus: int = 8
    memory_mib: int = 1_900_000
    gpus: int = 8


class Cluster:
    """One cluster, whose state, logs and configuration are in a folder.

    Args:
        folder: an empty folder of its own.
        shape: number and size of the nodes.
    """

    def __init__(self, folder: Path, shape: Shape = Shape()) -> None:
        self.folder = folder
        self.shape = shape
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.environment["PATH"] = f"{self.environment.get('PATH', '')}:{SYSTEM_PATH}"
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Starts everything and waits until all nodes are idle."""
        self._write_files()
        self._daemon(
            "munged",
            *("--key-file", self.folder / "munge/key", "--seed-file", self.folder / "munge/seed"),
            *("--log-file", self.folder / "munge/log", "--num-threads", 2),
            *("--socket", self.folder / "munge.socket", "--pid-file", self.folder / "munged.pid"),
        )
        self._daemon("slurmctld", "-c")
        for node in range(1, self.shape.nodes + 1):
            self.power_on(node)
        self.wait_for_nodes(self.shape.nodes)

    def _daemon(self, program: str, *arguments: object) -> None:
        path = shutil.which(program, path=self.environment["PATH"])
        assert path, f"{program} is not installed"
        subprocess.run([path, *map(str, arguments)], env=self.environment, check=True, timeout=COMMAND_SECONDS)

    def _write_files(self) -> None:
        self.folder.chmod(0o755)  # munge refuses a socket that others cannot reach
        (self.folder / "state").mkdir()
        (self.folder / "munge").mkdir(mode=0o700)
        hosts = [f"127.0.0.1 localhost {socket.gethostname()}"]
        for node in range(1, self.shape.nodes + 1):
            (self.folder / f"spool.node{node}").mkdir()
            hosts.append(f"127.0.0.{10 + node} node{node}")
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        key = self.folder / "munge/key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        for gpu in range(self.shape.gpus):
            os.mknod(self.folder / f"gpu{gpu}", 0o20666, os.makedev(1, 3))
        port = _free_ports(self.shape.nodes + 1)
        values = {
            **vars(self.shape),
            "folder": self.folder,
            "host": socket.gethostname(),
            "port": port,
            "first_job": 1 + secrets.randbelow(50_000),  # jobs of other clusters on this machine use other ports
            "first_port": port + 1,
            "last_port": port + self.shape.nodes,
            "last_address": 10 + self.shape.nodes,
            "last_gpu": self.shape.gpus - 1,
        }
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(**values))
        (self.folder / "gres.conf").write_text(GPU_FILES.format(**values))

    def power_on(self, node: int) -> None:
        """Starts a node."""
        inside = (
            f"hostname node{node} && mount --bind {self.folder}/hosts /etc/hosts && mount -t tmpfs tmpfs /dev/shm && "
            f"exec slurmd -D -s -N node{node}"
        )
        with (self.folder / f"node{node}.log").open("ab") as log:
            self._nodes[node] = subprocess.Popen(
                [*NODE, inside],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def power_off(self, node: int) -> None:
        """Takes all processes of a node away at once."""
        process = self._nodes.pop(node)
        process.kill()
        process.wait(STOP_SECONDS)

    def mount_on(self, node: int, *arguments: object) -> None:
        """Calls mount with these arguments on one node; the other nodes do not see it."""
        self._inside(node, "mount", *arguments)

    def unmount_on(self, node: int, path: Path) -> None:
        """Takes a mount away again."""
        self._inside(node, "umount", path)

    def _inside(self, node: int, *command: object) -> None:
        pid = Path(f"/proc/{self._nodes[node].pid}/task/{self._nodes[node].pid}/children").read_text().split()[0]
        self.run("nsenter", f"--target={pid}", "--mount", "--pid", *command)

    def wait_for_nodes(self, count: int) -> None:
        """Waits until so many nodes are idle.

        Raises:
            TimeoutError: they are not in time.
        """
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            answer = self.run("sinfo", "--noheader", "--states=idle", "--format=%D", check=False).stdout.split()
            if answer and int(answer[0]) >= count:
                return
            time.sleep(0.1)
        raise TimeoutError(f"{count} nodes were not idle after {START_SECONDS} s; logs are in {self.folder}")

    def run(
        self, *command: object, check: bool = True, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command as a user of the cluster would; `environment` is added to its environment."""
        return subprocess.run(
            list(map(str, command)),
            env={**self.environment, **environment},
            cwd=cwd,
            capture_output=True,
            text=True,
            check=check,
            timeout=COMMAND_SECONDS,
        )

    def state(self, job: str) -> str:
        """Slurm's word for the state of a job, such as PENDING, RUNNING or COMPLETED."""
        return self.details(job).get("JobState", "UNKNOWN")

    def details(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, by field."""
        answer = self.run("scontrol", "--oneliner", "show", "job", job, check=False).stdout
        return dict(pair.split("=", 1) for pair in answer.split() if "=" in pair)

    def wait_for(self, job: str, states: Sequence[str] = ENDED_STATES, seconds: float = 120.0) -> str:
        """Waits until a job is in one of the states, and returns it.

        Raises:
            TimeoutError: it is not in time.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            state = self.state(job)
            if state in states:
                return state
            time.sleep(0.2)
        raise TimeoutError(f"job {job} is {state} after {seconds} s, not one of {', '.join(states)}")

    @contextmanager
    def starting_nothing(self) -> Iterator[None]:
        """Jobs that are submitted meanwhile stay in the queue; they are cancelled in the end."""
        self.run("scontrol", "update", "PartitionName=main", "State=DOWN")
        try:
            yield
        finally:
            self.run("scancel", "--user=root")
            self.run("scontrol", "update", "PartitionName=main", "State=UP")

    def stop(self) -> None:
        """Cancels all jobs and ends what was started, by process id only."""
        if (self.folder / "slurmctld.pid").exists():
            with suppress(subprocess.SubprocessError):
                self.run("scancel", "--user=root", check=False)
        _end(self.folder / "slurmctld.pid", "slurmctld")
        for node in list(self._nodes):
            self.power_off(node)
        _end(self.folder / "munged.pid", "munged")


def missing_programs() -> list[str]:
    """Programs of Slurm and munge that are not installed here."""
    path = f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}"
    return [program for program in PROGRAMS if shutil.which(program, path=path) is None]


def _end(pid_file: Path, program: str) -> None:
    """Ends a daemon, if its process id still is that program's."""
    try:
        pid = int(pid_file.read_text())
        if Path(f"/proc/{pid}/comm").read_text().strip() != program:
            return
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while Path(f"/proc/{pid}").exists():
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                return
            time.sleep(0.05)
    except (OSError, ValueError):
        return


def _free_ports(count: int) -> int:
    """First of so many consecutive ports that are free on all loopback addresses now; other clusters start as well."""
    for _ in range(1000):
        first = random.randrange(17_000, 30_000 - count)
        with suppress(OSError):
            for port in range(first, first + count):
                with socket.socket() as listener:
                    listener.bind(("0.0.0.0", port))
            return first
    raise RuntimeError("no free ports")
