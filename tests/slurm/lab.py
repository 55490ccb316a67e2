"""A real SLURM cluster of several nodes on one machine, for the tests: started in a folder, gone when the block ends.

    with SlurmLab(folder, nodes=2) as lab:
        job = lab.sbatch("--nodes=2", script="srun hostname")
        lab.wait(job, {"COMPLETED"})
        print(lab.log(job))

Debian and Ubuntu have it as `apt-get install -y --no-install-recommends slurm-wlm munge`. Every daemon is the child of
a `bash` that is process 1 of its own PID, mount and host-name namespaces: a node has its own host name and hosts file,
and dies as a whole, orphaned job steps included. The network is the machine's. Nothing outside the folder is written.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import psutil

DAEMONS, CLIENTS = ("munged", "slurmctld", "slurmd"), ("sbatch", "scancel", "scontrol", "sinfo", "srun")
TOOLS = (*DAEMONS, *CLIENTS, "bash", "hostname", "mount", "setpriv", "unshare")
SYSTEM_PATHS = ("/usr/sbin", "/sbin")
"""Where the daemons lie, which a user's PATH may lack."""
FINAL = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
)
"""The states that a job does not leave by itself."""
UP = re.compile(r"(idle|mixed|allocated|completing)\+?")
"""What sinfo calls a node that answers; `*` behind the state is a node that does not."""
LONGEST_FOLDER = 80
"""Characters: the sockets below it must stay under the kernel's 108."""
POLL, COMMAND, START, DOWN = 0.2, 20.0, 30.0, 60.0
"""Seconds between two looks, and the most that a command, a daemon's start and slurmctld's noticing a loss may take."""
CONTROLLER, KEEPER = "controller", "keeper"
"""Host names of slurmctld and munged, beside the nodes' n1, n2, ..."""

MUNGE_FILES = {
    "key-file": "munge.key",
    "socket": "munge.sock",
    "pid-file": "munged.pid",
    "seed-file": "munged.seed",
}
"""munged's options and the files in `folder/run` that they name."""

# Death of the thread that starts a lab kills it, should the test run itself be killed.
MORTAL = ("setpriv", "--pdeathsig", "KILL")
NAMESPACES = ("unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
INSIDE = 'hostname "$1" && mount --bind "$2" /etc/hosts || exit; shift 2; "$@" & wait $!'

# cred_expire is also how long a requeued job waits before it runs again, two minutes by default. MessageTimeout is most
# of the time that a lost node takes to be DOWN. config_overrides lets a node claim more CPUs and memory than there are.
# Without accounting, scontrol is the only memory of a finished job: MinJobAge outlasts every test. The ranks of a job
# meet at a port that Lightning derives from the job's number: two labs at once must not count alike.
CONFIG = """\
ClusterName=lab
SlurmctldHost={controller}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldLogFile={folder}/log/{controller}.log
SlurmdLogFile={folder}/log/%n.log
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
MessageTimeout=5
SlurmdTimeout=5
KillWait=2
MinJobAge=86400
FirstJobId={first_job}
JobRequeue=1
MailProg=/bin/true
GresTypes=gpu
PartitionName=lab Nodes=ALL Default=YES MaxTime=INFINITE
"""
NODE = "NodeName={name} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=65536 Gres=gpu:{gpus}\n"
# These keep daemons and srun on the loopback: they bind to the address of their host's name. Where the machine's own is
# not 127.0.0.1, which others call, an srun outside of jobs would hang; all interfaces are open there, under munge's
# key.
LOOPBACK = "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny\n"


class LabError(RuntimeError):
    """What went wrong in the lab, with the ends of its daemons' logs."""


def available() -> str | None:
    """None where a lab can run, else the reason in one line."""
    missing = [tool for tool in TOOLS if not shutil.which(tool, path=_path())]
    if missing:
        return f"no SLURM here: {', '.join(missing)} not found (apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "a SLURM lab needs root"
    tried = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True)
    return f"a SLURM lab needs namespaces: {' '.join(tried.stderr.split())}" if tried.returncode else None


class SlurmLab:
    """`nodes` nodes n1, n2, ... that claim `cpus` CPUs, 64 GiB and `gpus` GPUs each, whatever the machine has.

    A claimed GPU is a link to /dev/null: enough for SLURM to accept --gpus-per-node and set CUDA_VISIBLE_DEVICES.
    The folder must be new or empty, its path short and without blanks (ValueError); it is left for the reader of logs.
    """

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 4, gpus: int = 0) -> None:
        if not folder.is_absolute() or len(str(folder)) > LONGEST_FOLDER or re.search(r"\s", str(folder)):
            raise ValueError(
                f"{folder}: a lab's folder is absolute, at most {LONGEST_FOLDER} characters, without blanks"
            )
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{folder}: a lab's folder is new or empty")
        self.folder, self.cpus, self.gpus = folder, cpus, gpus
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.environment = _environment(folder)
        """What a SLURM command needs to speak to this cluster, and to no other that the tests may run in."""
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> SlurmLab:
        try:
            self._port = _free_ports(len(self.nodes) + 1)
            self._write()
            self._start_all()
        except BaseException:
            self._stop_all()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop_all()

    # ---- jobs ----

    def sbatch(
        self, *args: str, script: str | Path, arguments: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> str:
        """The id of a new job: `args` for sbatch, `arguments` and (beside `environment`) `env` for the script.

        `script` is a file or the lines of a bash script. Without --chdir the job runs in `folder/jobs`.
        """
        if isinstance(script, str):
            lines, script = script, self.folder / "run" / "script"
            script.write_text(f"#!/usr/bin/env bash\n{lines}", encoding="utf-8")
        return self.command("sbatch", "--parsable", *args, str(script), *arguments, env=env).strip()

    def record(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode, NodeList, StdOut and so on.

        A task of an array is called ID_TASK; an array's ID alone gives one of its tasks.
        """
        shown = self.command("scontrol", "--oneliner", "show", "job", job).splitlines()[0]
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def state(self, job: str) -> str:
        return self.record(job)["JobState"]

    def wait(self, job: str, until: Collection[str] = FINAL, timeout: float = 60.0) -> str:
        """The state in `until` that the job came to; LabError after `timeout` seconds or at another final state."""
        deadline = time.monotonic() + timeout
        while (state := self.state(job)) not in until:
            if state in FINAL or time.monotonic() > deadline:
                raise self._error(f"job {job} is {state}, not {' or '.join(sorted(until))}; it said: {self.log(job)}")
            time.sleep(POLL)
        return state

    def wait_log(self, job: str, text: str, timeout: float = 60.0) -> None:
        """Until the job has said `text`; LabError after `timeout` seconds."""
        self._until(lambda: text in self.log(job), timeout, f"{text!r} in the log of job {job}")

    def scancel(self, job: str, signal: str | None = None, batch: bool = False) -> None:
        """End the job or, with `signal`, send that to its tasks; to the batch shell alone with `batch`, as B: would."""
        sent = [f"--signal={signal}"] if signal else []
        self.command("scancel", *sent, *(["--batch"] if batch else []), job)

    def log(self, job: str) -> str:
        """What the job has written to its output file so far; empty before it starts."""
        path = Path(self.record(job)["StdOut"])
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    # ---- nodes ----

    def fail(self, node: str) -> None:
        """Cut the node's power, with all that runs on it, and wait until slurmctld has noticed and marked it DOWN."""
        self._stop(node)
        self._until(lambda: self._node_states()[node].startswith("down"), DOWN, f"{node} to be marked DOWN")

    def heal(self, node: str) -> None:
        """Switch the failed node on again and wait until it takes jobs."""
        self._start_node(node)
        self._until(lambda: self._is_up(node), START, f"{node} to be up")

    def command(self, *command: str, env: Mapping[str, str] | None = None, timeout: float = COMMAND) -> str:
        """Standard output of a command that speaks to the cluster, run in `folder/jobs`; LabError where it fails."""
        environment = {**self.environment, **(env or {})}
        folder = self.folder / "jobs"
        try:
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise self._error(f"{' '.join(command)}: no answer in {timeout:g} s") from error
        if done.returncode:
            raise self._error(f"{' '.join(command)}: exit status {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    # ---- daemons ----

    def _start_all(self) -> None:
        """In the order of who asks whom: a slurmd that finds no slurmctld tries again only seconds later."""
        run = self.folder / "run"
        places = [f"--{name}={run / file}" for name, file in MUNGE_FILES.items()]
        # --force: the folders above need not be open to all users, whom the lab does not serve.
        self._start(KEEPER, "munged", "--foreground", "--force", *places)
        self._until((run / "munge.sock").exists, START, "munged's socket")
        self._start(CONTROLLER, "slurmctld", "-D")
        self._until(lambda: _listening(self._port), START, "slurmctld to listen")
        for node in self.nodes:
            self._start_node(node)
        self._until(lambda: all(map(self._is_up, self.nodes)), START, "all nodes to be up")

    def _start_node(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-N", node)

    def _start(self, name: str, *command: str) -> None:
        if name in self._daemons:
            raise ValueError(f"{name} runs already")
        inside = ["bash", "-c", INSIDE, "bash", name, str(self.folder / "hosts"), *command]
        with (self.folder / "log" / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                [*MORTAL, *NAMESPACES, *inside],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,  # Ctrl-C is for the test run, which then stops the lab in order
            )

    def _stop(self, name: str) -> None:
        """Returns when everything in the daemon's namespace is dead: its process 1 is reaped last, by unshare."""
        if name not in self._daemons:
            raise ValueError(f"{name} does not run: there are {', '.join(self._daemons)}")
        process = self._daemons.pop(name)
        if process.poll() is None:
            inside = psutil.Process(process.pid).children()
            for each in inside:
                each.kill()
            if not inside:  # too early for a child
                process.kill()
        process.wait(START)

    def _stop_all(self) -> None:
        with ExitStack() as each:  # tries all, though one fail
            for name in self._daemons:
                each.callback(self._stop, name)

    def _is_up(self, node: str) -> bool:
        return UP.fullmatch(self._node_states()[node]) is not None

    def _node_states(self) -> dict[str, str]:
        return dict(re.findall(r"(\S+) (\S+)", self.command("sinfo", "--noheader", "--Node", "--format=%N %T")))

    def _until(self, holds: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            ended = [name for name, process in self._daemons.items() if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                reason = f"the daemon of {', '.join(ended)} has ended" if ended else f"{seconds:g} s were not enough"
                raise self._error(f"waited for {what}: {reason}")
            time.sleep(POLL)

    # ---- files ----

    def _write(self) -> None:
        for name in ("jobs", "log", "run", "state", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "run" / MUNGE_FILES["key-file"]
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        names = "".join(f"127.0.0.1 {name}\n" for name in (KEEPER, CONTROLLER, *self.nodes))
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + "\n" + names)
        (self.folder / "slurm.conf").write_text(self._config())
        (self.folder / "gres.conf").write_text(self._gres())

    def _config(self) -> str:
        text = CONFIG.format(
            controller=CONTROLLER, port=self._port, folder=self.folder, first_job=random.randrange(1, 9000)
        )
        for port, name in enumerate(self.nodes, self._port + 1):
            text += NODE.format(name=name, port=port, cpus=self.cpus, gpus=self.gpus)
        return text + (LOOPBACK if _own_address() == "127.0.0.1" else "")

    def _gres(self) -> str:
        links = [self.folder / f"gpu{number}" for number in range(self.gpus)]
        for link in links:
            link.symlink_to("/dev/null")
        return "".join(f"NodeName={node} Name=gpu File={link}\n" for node in self.nodes for link in links)

    def _error(self, message: str) -> LabError:
        """What a daemon printed counts where it has no log, as before it has read its configuration."""
        logs = [self.folder / "log" / f"{name}.log" for name in (KEEPER, CONTROLLER, *self.nodes)]
        paths = [log if log.exists() else log.with_suffix(".out") for log in logs]
        ends = [f"---- {path.name}\n{_tail(path)}" for path in paths if path.exists()]
        return LabError("\n".join([message, *ends]))


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *SYSTEM_PATHS])


def _environment(folder: Path) -> dict[str, str]:
    """Ours without the variables of a job that the tests may themselves run in."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not re.match("S(LURM|BATCH|RUN|ALLOC|INFO|CANCEL|CONTROL)_", name)
    }
    return {**kept, "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}


def _tail(path: Path, lines: int = 15) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _listening(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _own_address() -> str | None:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def _free_ports(count: int) -> int:
    """The first of `count` free ports in a row, below those that the kernel hands out while a failed node is off."""
    for _ in range(100):
        first = random.randrange(20000, 32000 - count)
        if all(_can_bind(port) for port in range(first, first + count)):
            return first
    raise LabError(f"found no {count} free ports in a row between 20000 and 32000")


def _can_bind(port: int) -> bool:
    with socket.socket() as server:
        try:
            server.bind(("", port))
        except OSError:
            return False
    return True
