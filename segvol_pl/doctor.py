"""`segvol-pl doctor`: whether this machine can run what is asked of it, one line for each thing, with the remedy.

1. Each check looks at one thing as a run meets it: packages, GPUs, cores, memory, open files, the network, SLURM,
   wandb, CLIP, and the folders that are named.
2. A line begins with `ok`, with `note` for what a user should know, or with `FAIL` for what a run would end by.
3. Nothing is changed. In each folder a small file is written and removed.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
from packaging.requirements import Requirement

from segvol_pl.planning.plan import GIB

OK, NOTE, FAIL = "ok", "note", "FAIL"
DISTRIBUTION = "segvol_pl"
LEAST_SHARED, LEAST_ROOM = 1.0, 5.0
"""GiB below which shared memory fails, and the disk of a folder is worth a note."""
MANY_RANKS = 1024
"""Number of ranks whose connections are checked."""
ANSWER, EXCHANGE = 20.0, 60.0
"""Seconds within which a tool must answer, and two ranks must have exchanged numbers."""
INFINIBAND = Path("/sys/class/infiniband")

RANK = """
import datetime, sys, torch, torch.distributed as dist
rank, port = map(int, sys.argv[1:])
limit = datetime.timedelta(seconds=30)
store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, timeout=limit)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
numbers = torch.tensor([rank + 1.0])
dist.all_reduce(numbers)
dist.barrier()
sys.exit(numbers.item() != 3.0)
"""
"""One of two ranks that add their numbers, as the ranks of a run do."""


class Finding(NamedTuple):
    """What a check found."""

    state: str
    what: str
    said: str

    @property
    def line(self) -> str:
        """What is printed."""
        return f"{self.state:<5} {self.what:<14} {self.said}"


def examine(folders: Sequence[str]) -> Iterator[Finding]:
    """Check the machine, and the folders that runs are to read or write."""
    packages = list(check_packages())
    yield from packages
    if any(finding.state == FAIL for finding in packages):
        yield Finding(NOTE, "the rest", "is checked when the packages are right")
        return
    checks: list[Callable[[], Iterator[Finding]]] = [
        check_gpus, check_cores, check_memory, check_open_files, check_network, check_slurm, check_wandb, check_clip
    ]  # fmt: skip
    for check in checks:
        yield from check()
    for folder in folders:
        yield check_folder(Path(folder))


# ---- what is installed ----


def check_packages() -> Iterator[Finding]:
    """The packages that are required, and those of the extras."""
    yield Finding(OK, "python", f"{platform.python_version()}, {sys.prefix}")
    try:
        stated = [Requirement(line) for line in importlib.metadata.requires(DISTRIBUTION) or []]
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            FAIL, "packages", f"{DISTRIBUTION} is not installed here: pip install it, so that pip checks its needs"
        )
        return
    required = [each for each in stated if each.marker is None or each.marker.evaluate({"extra": ""})]
    wrong = [text for each in required if (text := _wrong(each))]
    for text in wrong:
        yield Finding(FAIL, "packages", text)
    if not wrong:
        yield Finding(OK, "packages", f"all {len(required)} that are required")
    for extra in ("deepspeed", "dicom", "remote", "serve", "viewer"):
        needed = [
            each for each in stated if each.marker and each.marker.evaluate({"extra": extra}) and each not in required
        ]
        if missing := [text for each in needed if (text := _wrong(each))]:
            yield Finding(NOTE, f"[{extra}]", f"{'; '.join(missing)} (only for what this extra adds)")


def _wrong(requirement: Requirement) -> str:
    """What is wrong with the installed package, with the remedy; empty if nothing is."""
    remedy = f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed: {remedy}"
    if requirement.specifier.contains(version, prereleases=True):
        return ""
    return f"{requirement.name} {version} is not {requirement.specifier}: {remedy}"


# ---- the machine ----


def check_gpus() -> Iterator[Finding]:
    """Each GPU that torch sees, by a small computation; why it sees none although there is a driver."""
    import torch

    listed = [
        line.split(", ") for line in _answer("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    ]
    if not torch.cuda.is_available():
        yield _no_gpu(listed, torch.__version__, torch.version.cuda)
        return
    seen = torch.cuda.device_count()
    for index in range(seen):
        properties = torch.cuda.get_device_properties(index)
        said = (
            f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, compute {properties.major}.{properties.minor}"
        )
        try:
            computed = torch.ones(256, 256, device=f"cuda:{index}", dtype=torch.bfloat16).matmul(
                torch.ones(256, 256, device=f"cuda:{index}", dtype=torch.bfloat16)
            )
            right = computed.float().mean().item() == 256
            yield Finding(OK if right else FAIL, f"gpu {index}", said if right else f"{said}: computes wrong results")
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            yield Finding(FAIL, f"gpu {index}", f"{said}: {reason}: install a torch that is built for this GPU")
    if len(listed) > seen:
        hidden = f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')}"
        yield Finding(NOTE, "gpus", f"this process sees {seen} of {len(listed)} ({hidden})")
    version = ".".join(map(str, torch.cuda.nccl.version()))
    yield Finding(OK, "nccl", f"{version}, torch {torch.__version__}, CUDA {torch.version.cuda}")


def _no_gpu(listed: Sequence[Sequence[str]], torch_version: str, cuda: str | None) -> Finding:
    """Why torch sees no GPU. listed: name and driver of those that nvidia-smi sees."""
    if not listed:
        return Finding(NOTE, "gpus", f"none (nvidia-smi lists none): runs compute on the CPU; torch {torch_version}")
    if cuda is None:
        remedy = "install a torch that is built for CUDA, see https://pytorch.org/get-started"
        return Finding(FAIL, "gpus", f"{len(listed)} here, but torch {torch_version} is built for CPUs alone: {remedy}")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return Finding(
            FAIL,
            "gpus",
            f"{len(listed)} here, hidden by CUDA_VISIBLE_DEVICES={hidden}: ask SLURM for GPUs, or unset it",
        )
    driver = listed[0][-1]
    remedy = "update the driver, or install a torch that is built for an older CUDA"
    return Finding(
        FAIL,
        "gpus",
        f"{len(listed)} here, but torch {torch_version} (CUDA {cuda}) cannot use driver {driver}: {remedy}",
    )


def check_cores() -> Iterator[Finding]:
    """The cores that this process may use."""
    from segvol_pl.training.out_of_memory import cgroup_files

    usable, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    for limit in cgroup_files("cpu.max"):
        quota, period = limit.read_text(encoding="ascii").split()
        usable = usable if quota == "max" else min(usable, max(1, round(int(quota) / int(period))))
    if usable < there:
        limited = f"{usable} of {there} may be used here, by the limit of a job or container"
        yield Finding(NOTE, "cores", f"{limited}: all ranks and loader processes share them")
    else:
        yield Finding(OK, "cores", str(there))


def check_memory() -> Iterator[Finding]:
    """Main memory, as far as this process may use it, and the shared memory of loader processes."""
    from segvol_pl.training.out_of_memory import free_memory
    from segvol_pl.training.startup import SHARED

    free, there = free_memory() / GIB, psutil.virtual_memory().total / GIB
    yield Finding(OK, "memory", f"{free:.0f} GiB of {there:.0f} are free for this process")
    if not SHARED.is_dir():
        yield Finding(
            FAIL,
            "shared memory",
            f"no {SHARED}: loader processes (data.workers) need it; mount it, or set data.workers=0",
        )
        return
    free = shutil.disk_usage(SHARED).free / GIB
    if free < LEAST_SHARED:
        remedy = "start the container with --shm-size=16g or --ipc=host"
        yield Finding(
            FAIL, "shared memory", f"{SHARED} has {free:.2f} GiB free, which loader processes fill at once: {remedy}"
        )
    else:
        yield Finding(OK, "shared memory", f"{free:.1f} GiB free in {SHARED}")


def check_open_files() -> Iterator[Finding]:
    """Whether a process may have the connections of many ranks."""
    from segvol_pl.errors import StartUpError
    from segvol_pl.training import startup

    try:
        yield Finding(OK, "open files", f"{startup.check_open_files(MANY_RANKS)}, for {MANY_RANKS} ranks")
    except StartUpError as error:
        yield Finding(NOTE, "open files", str(error).removeprefix("open files: "))


# ---- what runs talk to ----


def check_network() -> Iterator[Finding]:
    """What other nodes would connect to, and two ranks on this node that exchange numbers."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        yield Finding(
            FAIL, "host name", f"{name} has no address: add it to /etc/hosts, or set GLOO_SOCKET_IFNAME (slurm/env.sh)"
        )
    else:
        loopback = address.startswith("127.") and "GLOO_SOCKET_IFNAME" not in os.environ
        remedy = ": other nodes cannot reach that; with several nodes set GLOO_SOCKET_IFNAME (slurm/env.sh)"
        yield Finding(NOTE if loopback else OK, "host name", f"{name} is {address}{remedy if loopback else ''}")
    up = {
        interface: [each.address for each in addresses if each.family == socket.AF_INET]
        for interface, addresses in psutil.net_if_addrs().items()
        if psutil.net_if_stats()[interface].isup
    }
    reachable = [f"{interface} {', '.join(given)}" for interface, given in up.items() if given and interface != "lo"]
    fabric = sorted(path.name for path in INFINIBAND.iterdir()) if INFINIBAND.is_dir() else []
    adapters = f"; InfiniBand: {', '.join(fabric)}" if fabric else "; no InfiniBand adapter"
    yield Finding(OK if reachable else NOTE, "interfaces", ("; ".join(reachable) or "none but loopback") + adapters)
    yield _exchange()


def _exchange() -> Finding:
    """Two ranks on this node that add numbers by gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, rank, port], stderr=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    said = []
    for rank in ranks:
        try:
            said.append(rank.communicate(timeout=EXCHANGE)[1])
        except subprocess.TimeoutExpired:
            rank.kill()
            said.append(rank.communicate()[1] or f"no answer within {EXCHANGE:.0f} s")
    if any(rank.returncode for rank in ranks):
        reason = next(text for text, rank in zip(said, ranks, strict=True) if rank.returncode).strip().splitlines()[-1]
        remedy = "set GLOO_SOCKET_IFNAME to an interface of this host (slurm/env.sh)"
        return Finding(FAIL, "two ranks", f"cannot exchange numbers by gloo ({reason}): {remedy}")
    return Finding(OK, "two ranks", "exchanged numbers by gloo")


def check_slurm() -> Iterator[Finding]:
    """Whether jobs can be submitted from here."""
    if shutil.which("sbatch") is None:
        yield Finding(NOTE, "slurm", "no sbatch here: runs can be started, not queued")
        return
    answer = " ".join(_answer("scontrol", "ping"))
    if "UP" in answer:
        yield Finding(OK, "slurm", f"{' '.join(_answer('sbatch', '--version'))}; {answer}")
    else:
        said = f"sbatch is here, but slurmctld does not answer ({answer or 'scontrol ping'}): jobs cannot be queued"
        yield Finding(FAIL, "slurm", said)


def check_wandb() -> Iterator[Finding]:
    """Where wandb would write."""
    from segvol_pl.training.loggers import has_key

    if has_key():
        yield Finding(OK, "wandb", "a key is stored, or in WANDB_API_KEY")
    else:
        yield Finding(NOTE, "wandb", "no key: runs are written offline, for `wandb sync`; `wandb login` stores one")


def check_clip() -> Iterator[Finding]:
    """Whether the text tower is on this machine: compute nodes often cannot download it."""
    from transformers import AutoConfig

    from segvol_pl.config import TextConfig

    name = TextConfig().clip_model
    try:
        AutoConfig.from_pretrained(name, local_files_only=True)
    except OSError:
        remedy = (
            "download it where there is a network, give its folder as text.clip_model=DIR, or use text.source=seeded"
        )
        yield Finding(NOTE, "clip", f"{name} is not in the cache of this machine: {remedy}")
    else:
        yield Finding(OK, "clip", f"{name} is in the cache")


# ---- folders ----


def check_folder(folder: Path) -> Finding:
    """Whether a run may write to a folder, or make it, and how much room there is."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        return Finding(FAIL, "folder", f"{folder}: {place} is no folder: give another one")
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".segvol-doctor-") as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Finding(
            FAIL, "folder", f"{folder}: cannot be written ({error.strerror}): give another one, or its permissions"
        )
    free = shutil.disk_usage(place).free / GIB
    made = "" if place == folder.resolve() else f", will be made in {place}"
    return Finding(NOTE if free < LEAST_ROOM else OK, "folder", f"{folder}: {free:.1f} GiB free{made}")


def _answer(*command: str) -> list[str]:
    """The lines that a tool prints; none if it is not there, fails or does not answer."""
    if shutil.which(command[0]) is None:
        return []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER, check=False)
    except subprocess.TimeoutExpired:
        return []
    return done.stdout.strip().splitlines()
