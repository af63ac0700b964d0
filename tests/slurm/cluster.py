"""A real two-node SLURM on this host alone: munged, slurmctld and two slurmd, loopback only.

    python tests/slurm/cluster.py        # prints `export SLURM_CONF=...`, runs until Ctrl-C

Everything lives in one folder under /tmp and dies with `stop()`; /etc is not touched, and a
SLURM that the host has already is not seen. Needs root: slurmd starts jobs as their users.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.ranks import free_port

BINARIES = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
NODES = ("n1", "n2")
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"}

# Differences from a production file, and why:
#   config_overrides, CPUs: both nodes are this host, whatever it has
#   AuthInfo: a munged of our own; cred_expire is also how long a requeued job waits (default 120 s)
#   sched_*: a job starts at once and not at the next round
CONFIG = """\
ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
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
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
JobRequeue=1
MinJobAge=3600
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


class SlurmCluster:
    """The daemons and the few client calls that a test needs. Times are limits, in seconds."""

    def __init__(self, cpus: int = 2) -> None:
        # Jobs run the lbr-ds of the Python that runs the tests.
        path = ":".join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), SYSTEM_PATH])
        missing = [name for name in BINARIES if shutil.which(name, path=path) is None]
        if missing:
            raise RuntimeError(f"no {', '.join(missing)} on this host; run .ci/install-slurm")
        # Not pytest's tmp_path: the path of a unix socket must stay below 108 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="lbr-slurm-", dir="/tmp"))
        self.folder.chmod(0o755)
        self.cpus = cpus
        self.daemons: list[subprocess.Popen[bytes]] = []
        # A job of this test must not take over settings of a job that the test itself runs in.
        self.environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("SLURM", "SBATCH", "SRUN", "MASTER_", "LBR_"))
        }
        self.environment |= {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}

    def start(self, limit: float = 240) -> SlurmCluster:
        """Start all daemons and wait until both nodes are idle."""
        ports = set[int]()
        while len(ports) < 3:
            ports.add(free_port())
        config = CONFIG.format(
            host=socket.gethostname().split(".")[0],
            folder=self.folder,
            ports=[*ports],
            cpus=self.cpus,
        )
        (self.folder / "slurm.conf").write_text(config)
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{name}={self.folder}/munge.{end}" for name, end in files.items()]
        # --force: munged would rather not live below /tmp.
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", *options)
        _wait_for((self.folder / "munge.socket").exists, 60, "munged opened no socket", self)
        self._daemon("slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
        for node in NODES:
            (self.folder / f"spool-{node}").mkdir()
            self._daemon("slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf"))
        _wait_for(self.idle, limit, "the nodes did not come up", self)
        return self

    def stop(self) -> None:
        """Cancel all jobs, end the daemons, remove the folder."""
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            self.run("scancel", "--user=root")
            _wait_for(self.idle, 30, "jobs did not end", self)
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self.daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait(timeout=10)
        self.daemons.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(
        self, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> str:
        """Standard output of a client command such as scontrol; `env` adds to the environment."""
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**self.environment, **(env or {})},
            capture_output=True,
            text=True,
            timeout=300,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def submit(self, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> str:
        """`sbatch` with these arguments, typed in the folder `cwd`. Returns the job id."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd, env=env).strip()

    def show(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`, such as JobState, ExitCode, Restarts."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, limit: float) -> dict[str, str]:
        """The job's fields once it has ended in whatever way; AssertionError after `limit`."""
        fields: dict[str, str] = {}

        def ended() -> bool:
            fields.update(self.show(job))
            return fields["JobState"] in FINAL

        _wait_for(ended, limit, f"job {job} did not end", self, job)
        return fields

    def wait_until(self, check: Callable[[], bool], limit: float, job: str) -> None:
        """Return once check() holds; AssertionError with the job's output after `limit`."""
        _wait_for(check, limit, "what was waited for did not happen", self, job)

    def log(self, job: str) -> str:
        """What the job has printed so far."""
        path = Path(self.show(job)["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def _daemon(self, *command: str) -> None:
        log = (self.folder / f"daemon-{len(self.daemons)}.out").open("wb")
        with log:
            daemon = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in a test run is for stop() to act on
            )
        self.daemons.append(daemon)

    def idle(self) -> bool:
        """Whether both nodes are up and free."""
        try:
            shown = self.run("sinfo", "--noheader", "--Node", "--format=%T")
        except RuntimeError:  # slurmctld does not answer yet
            return False
        return shown.split() == ["idle"] * len(NODES)

    def logs(self) -> str:
        """The last lines of every daemon, for a failure's message."""
        parts = []
        for path in sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")]):
            lines = path.read_text(errors="replace").splitlines()[-8:]
            parts.append("\n".join([f"--- {path.name}", *lines]))
        return "\n".join(parts)


def _wait_for(
    check: Callable[[], bool],
    limit: float,
    complaint: str,
    cluster: SlurmCluster,
    job: str | None = None,
) -> None:
    """Poll until check() holds; AssertionError with what the job or the daemons said."""
    end = time.monotonic() + limit
    while not check():
        if time.monotonic() > end:
            said = cluster.logs() if job is None else f"{cluster.show(job)}\n{cluster.log(job)}"
            raise AssertionError(f"{complaint} within {limit:.0f} s\n{said}")
        time.sleep(0.3)


@contextlib.contextmanager
def running(cpus: int = 2) -> Iterator[SlurmCluster]:
    """A cluster that is up inside the with-block and gone after it."""
    cluster = SlurmCluster(cpus)
    try:
        yield cluster.start()
    finally:
        cluster.stop()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    with running() as up, contextlib.suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={up.environment['SLURM_CONF']}", flush=True)
        signal.pause()
