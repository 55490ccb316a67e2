"""The stages of `gpu.py`, which runs each in a process of its own.

A stage is a function of a `Bench`, which knows the device, the sizes and where figures go. What it measures, with what,
stands at its docstring. Inputs are random, never zeros. Times on a GPU are between events on it, medians; `host ms` is
the time until a step's call has returned, the GPU's queue being empty before.

Letters: B volumes, K masks, D H W voxels.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from gpu_figures import FAILED, Figure, append, now, read
from torch import Tensor
from training import OPTIM, SMALL, train_batch, train_config

from segvol_pl.config import Precision, PretrainConfig, RunConfig, SegVolConfig, TrainConfig, ZoomConfig
from segvol_pl.config.loader import load
from segvol_pl.device import autocast, resolve_device
from segvol_pl.model import SegVol, TextBank
from segvol_pl.planning import flops, memory
from segvol_pl.planning.devices import accelerator
from segvol_pl.run_folder import read_metrics
from segvol_pl.training import strategies
from segvol_pl.training.graph import StepGraph
from segvol_pl.training.module import optimizer, poisoned
from segvol_pl.training.pretrain import SimMIMTask
from segvol_pl.training.segment import SegVolTask

NEEDS_GPU = "needs a GPU"
TINY = Path(__file__).parents[1] / "configs" / "tiny"
CLIP_NORM = 1.0
TRACE_LIMIT = 16 * 2**20
"""Bytes of a trace file."""


@dataclass(frozen=True)
class Bench:
    """What a stage works with."""

    stage: str
    out: Path
    scratch: Path
    small: bool
    precision: Precision
    shards: Path | None
    device: torch.device
    card: str

    def note(self, name: str, value: float | int | str, unit: str = "", **settings: Any) -> None:
        """Writes one figure, at once."""
        append(self.out, Figure(self.stage, name, value, unit, self.card, settings, now()))

    @contextlib.contextmanager
    def part(self, **settings: Any) -> Iterator[None]:
        """A part of a stage whose failure is a figure, and does not keep the next part from beginning."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.note(FAILED, f"{type(error).__name__}: {error}".splitlines()[0][:300], **settings)
        if self.gpu:
            torch.cuda.empty_cache()

    def at(self, stage: str) -> Bench:
        """The same at another stage."""
        return replace(self, stage=stage)

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def bf16(self) -> bool:
        return self.precision is Precision.bf16

    @property
    def model(self) -> SegVolConfig:
        return SMALL if self.small else SegVolConfig()


def milliseconds(work: Callable[[], Any], device: torch.device, repeats: int = 10, warm: int = 3) -> float:
    """Median of one call, by events of the GPU, calls following each other; on a CPU by the clock."""
    for _ in range(warm):
        work()
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(repeats):
            work()
            marks.append(time.perf_counter())
        return 1000 * statistics.median(after - before for before, after in pairwise(marks))
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in pairwise(events))


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations a second of a square product."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / (milliseconds(lambda: left @ right, device) / 1000)


# ---- steps ----


@dataclass
class Step:
    """Forward, backward, clipping, AdamW and schedule, as the trainer does them, on a batch that lies on the device."""

    name: str
    config: TrainConfig | PretrainConfig
    volumes: int
    task: SegVolTask | SimMIMTask
    batch: dict[str, Tensor]
    device: torch.device
    precision: Precision

    def __post_init__(self) -> None:
        self.adamw, self.scheduler = optimizer(self.task, OPTIM)

    def loss(self) -> Tensor:
        """Under the step's precision."""
        with autocast(self.device, self.precision):
            return self.task.step_losses(self.batch)[0]

    def __call__(self) -> None:
        """A whole step."""
        poisoned(self.loss()).backward()
        self.task.configure_gradient_clipping(self.adamw, CLIP_NORM)
        self.adamw.step()
        self.scheduler.step()
        self.adamw.zero_grad()

    @property
    def operations(self) -> int:
        """Of a whole step, by the model's own arithmetic."""
        return self.volumes * flops.total(flops.volume_work(self.config)).total

    @property
    def settings(self) -> dict[str, Any]:
        """What tells its figures from others."""
        told: dict[str, Any] = {"step": self.name}
        if isinstance(self.config, TrainConfig):
            told["prompts_at_once"] = self.config.run.prompts_at_once
        return {**told, "precision": self.precision.value}


def simmim_step(bench: Bench, volumes: int) -> Step:
    torch.manual_seed(0)
    config = PretrainConfig(model=bench.model, optim=OPTIM, run=RunConfig(precision=bench.precision))
    task, tokens = SimMIMTask(config), math.prod(config.model.grid)
    places_BT = torch.stack([torch.randperm(tokens) for _ in range(volumes)])
    batch = {"image_BCDHW": torch.rand(volumes, 1, *config.model.input_shape), "mask_BT": places_BT < task.hidden}
    return _on_device(bench, f"SimMIM, {volumes} volumes", config, volumes, task, batch)


def supervised_step(bench: Bench, volumes: int, categories: int, pseudo: int, at_once: int) -> Step:
    """at_once: prompts of a volume; 0: all."""
    torch.manual_seed(0)
    config = train_config(bench.model, categories, pseudo)
    prompts = config.prompts.per_volume
    config = replace(config, run=RunConfig(precision=bench.precision, prompts_at_once=at_once or prompts))
    task = SegVolTask(config, TextBank.seeded(["one"], config.model.text_dim))
    name = f"{volumes} volume{'s' * (volumes > 1)} x {prompts} prompts"
    return _on_device(bench, name, config, volumes, task, train_batch(config, volumes))


def _on_device(
    bench: Bench,
    name: str,
    config: TrainConfig | PretrainConfig,
    volumes: int,
    task: SegVolTask | SimMIMTask,
    batch: dict[str, Tensor],
) -> Step:
    there = {key: value.to(bench.device) for key, value in batch.items()}
    return Step(name, config, volumes, task.to(bench.device), there, bench.device, bench.precision)


def all_steps(bench: Bench) -> Iterator[Callable[[], Step]]:
    """Pre-training, the default step and one of many prompts of one volume, six prompts at once and all."""
    volumes, (several, categories, pseudo), many = (2, (2, 1, 2), 2) if bench.small else (8, (4, 4, 6), 8)
    yield lambda: simmim_step(bench, volumes)
    for at_once in (6, 0):
        yield lambda at_once=at_once: supervised_step(bench, several, categories, pseudo, at_once)
        yield lambda at_once=at_once: supervised_step(bench, 1, many, 6 * many, at_once)


def steps(bench: Bench) -> None:
    """ms, host ms, volumes/s, MFU against the card's stated and measured rate, peak memory against the planner's."""
    dtype = torch.bfloat16 if bench.bf16 else torch.float32
    measured = matrix_rate(bench.device, dtype, 8192 if bench.gpu else 512)
    for make in all_steps(bench):
        with bench.part(precision=bench.precision.value):
            step = make()
            note = functools.partial(bench.note, **step.settings)
            if bench.gpu:
                torch.cuda.reset_peak_memory_stats()
            ms = milliseconds(step, bench.device, repeats=10 if bench.gpu else 2, warm=3 if bench.gpu else 1)
            note_rates(bench, step, ms, measured)
            room = float(torch.cuda.get_device_properties(bench.device).total_memory) if bench.gpu else None
            planned = memory.peak(step.config, step.volumes, bench.bf16, room).total / 2**30
            note("planned peak", round(planned, 2), "GiB")
            if bench.gpu:
                note("peak", round(torch.cuda.max_memory_allocated() / 2**30, 2), "GiB")
            del step


def note_rates(bench: Bench, step: Step, ms: float, measured: float, **told: Any) -> None:
    """What a step of so many milliseconds is worth, and how long the host alone takes for it."""
    note = functools.partial(bench.note, **step.settings, **told)
    achieved, known = step.operations / (ms / 1000), accelerator(bench.card)
    note("ms", round(ms, 2), "ms")
    note("volumes/s", round(1000 * step.volumes / ms, 2), "1/s")
    note("TFLOP", round(step.operations / 1e12, 3), "TFLOP")
    if known:
        note("MFU", round(100 * achieved / 1e12 / known.peak(bench.bf16), 2), "%")
    note("of the measured matrix rate", round(100 * achieved / measured, 2), "%")
    if bench.gpu:
        note("host ms", round(host_milliseconds(step), 2), "ms")


def host_milliseconds(step: Step, repeats: int = 5) -> float:
    """Until the call has returned, median."""
    taken = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        taken.append(time.perf_counter() - started)
    torch.cuda.synchronize()
    return 1000 * statistics.median(taken)


# ---- env ----


def env(bench: Bench) -> None:
    """The machine, and its own rates: products in bf16 and float32, copies on the device and to it."""
    bench.note("cores", len(os.sched_getaffinity(0)))
    shm = os.statvfs("/dev/shm")
    bench.note("free /dev/shm", round(shm.f_bavail * shm.f_frsize / 2**30, 1), "GiB")
    for package in ("torch", "triton", "lightning", "transformers", "numpy", "monai", "deepspeed", "SimpleITK"):
        bench.note("version", _version(package), package=package)
    size = 512 if bench.small else 8192
    for dtype in (torch.bfloat16, torch.float32):
        rate = matrix_rate(bench.device, dtype, size) / 1e12
        bench.note("products", round(rate, 2), "TFLOP/s", dtype=str(dtype).removeprefix("torch."), size=size)
    words = 2**22 if bench.small else 2**29
    there, other = torch.randn(words, device=bench.device), torch.randn(words, device=bench.device)
    bench.note("copy on the device", _gb_per_s(lambda: other.copy_(there), 8 * words, bench.device), "GB/s")
    if not bench.gpu:
        bench.note("copy to the device", NEEDS_GPU)
        return
    query = "--query-gpu=driver_version,memory.total,clocks.max.sm,power.limit"
    told = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=False)
    bench.note("driver, memory, highest clock, power limit", told.stdout.strip() or told.stderr.strip())
    for pinned in (True, False):
        here = torch.randn(2**22 if bench.small else 2**26)
        here = here.pin_memory() if pinned else here
        part = there[: len(here)]
        inward = _gb_per_s(functools.partial(part.copy_, here, non_blocking=True), here.nbytes, bench.device)
        outward = _gb_per_s(functools.partial(here.copy_, part, non_blocking=pinned), here.nbytes, bench.device)
        bench.note("copy to the device", inward, "GB/s", pinned=pinned)
        bench.note("copy from the device", outward, "GB/s", pinned=pinned)


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gb_per_s(work: Callable[[], Any], moved: int, device: torch.device) -> float:
    return round(moved / milliseconds(work, device) / 1e6, 1)


# ---- parity ----


def parity(bench: Bench) -> None:
    """Loss and gradients of one volume against those of float32 on the CPU with all prompts at once.

    Relative: of the loss; of all gradients as one vector; of the tensor that differs most, which is named.
    """
    cases = [(torch.device("cpu"), Precision.fp32, 6)]
    devices = [torch.device("cpu"), bench.device] if bench.small and bench.gpu else [bench.device]
    for device in devices:
        cases += [(device, precision, at_once) for precision in (Precision.fp32, Precision.bf16) for at_once in (6, 0)]
    on_cpu = replace(bench, device=torch.device("cpu"), precision=Precision.fp32)
    for make in (lambda given: supervised_step(given, 1, 2, 2, 0), lambda given: simmim_step(given, 2)):
        step = make(on_cpu)
        prompts = getattr(step.config.run, "prompts_at_once", 0)
        pretraining = isinstance(step.config, PretrainConfig)
        expected = _loss_and_gradients(step)
        step.batch = {name: value.to(bench.device) for name, value in step.batch.items()}
        # Where the device is the CPU, two of them are one.
        for device, precision, at_once in dict.fromkeys(cases):
            if (pretraining and at_once == 6) or (device.type, precision, at_once) == ("cpu", Precision.fp32, 0):
                continue
            told = {"step": step.name, "device": device.type, "precision": precision.value}
            told |= {} if pretraining else {"prompts_at_once": at_once or prompts}
            with bench.part(**told):
                task = copy.deepcopy(step.task)
                task.config.run.prompts_at_once = at_once or prompts
                batch = {name: value.to(device) for name, value in step.batch.items()}
                other = replace(step, task=task.to(device), batch=batch, device=device, precision=precision)
                _note_differences(bench, expected, _loss_and_gradients(other), told)


Gradients = dict[str, Tensor]


def _loss_and_gradients(step: Step) -> tuple[float, Gradients]:
    """On the CPU."""
    step.task.zero_grad()
    loss = step.loss()
    loss.backward()
    named = step.task.named_parameters()
    return float(loss.detach()), {name: each.grad.float().cpu() for name, each in named if each.grad is not None}


def _note_differences(
    bench: Bench, expected: tuple[float, Gradients], found: tuple[float, Gradients], told: dict[str, Any]
) -> None:
    bench.note("loss", abs(found[0] - expected[0]) / abs(expected[0]), "relative", **told)
    assert found[1].keys() == expected[1].keys(), "the same tensors have gradients"
    squares = {name: float((found[1][name] - each).double().square().sum()) for name, each in expected[1].items()}
    norms = {name: float(each.double().square().sum()) for name, each in expected[1].items()}
    bench.note("gradients", math.sqrt(sum(squares.values()) / sum(norms.values())), "relative", **told)
    # What is nearly zero differs by rounding alone.
    floor = 1e-8 * sum(norms.values())
    apart = {name: math.sqrt(squares[name] / max(norms[name], floor)) for name in norms}
    worst = max(apart, key=lambda name: apart[name])
    bench.note("worst tensor", apart[worst], "relative", **told)
    bench.note("which", worst, **told)


# ---- syncs ----


def syncs(bench: Bench) -> None:
    """Whether anything in a step stops the GPU's queue: the bare step, the copy of a batch, a step of the trainer."""
    if not bench.gpu:
        bench.note("synchronizations", NEEDS_GPU)
        return
    for make in (lambda: simmim_step(bench, 2), lambda: supervised_step(bench, 2, 2, 2, 0)):
        with bench.part():
            step = make()
            for _ in range(3):
                step()
            _note_syncs(bench, step, step=step.name)
            pinned = {name: value.cpu().pin_memory() for name, value in step.batch.items()}
            copied = functools.partial(_copy, pinned, bench.device)
            _note_syncs(bench, copied, step=f"copy of a batch: {step.name}")
            del step
    with bench.part(step="of the trainer"):
        _trainer_syncs(bench)


def _copy(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def _note_syncs(bench: Bench, work: Callable[[], Any], **told: Any) -> None:
    """0, or their number and where the first of them are."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
        found: list[str] = []
    except RuntimeError as error:
        found = [str(error).splitlines()[0]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if found:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
        torch.cuda.set_sync_debug_mode("default")
        found = [
            f"{Path(one.filename).name}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)
        ] or found
    bench.note("synchronizations", len(found), "", **told)
    if found:
        bench.note("where", ", ".join(dict.fromkeys(found))[:200], **told)


def _trainer_syncs(bench: Bench) -> None:
    """Steps 3 and 4 of a run of the tiny model, which are not logged: all that the trainer and its callbacks do."""
    import lightning.pytorch as pl

    from segvol_pl.training import run as training_run

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if index in (2, 3):
                torch.cuda.set_sync_debug_mode("error")

        def on_train_batch_end(self, *_: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

        on_exception = on_train_batch_end

    own = training_run._callbacks
    shards = tiny_shards(bench)
    config = load("train", _arguments(bench, shards, "syncs", 5, "run.log_every=100", "run.val_batches=0"))
    with mock.patch.object(training_run, "_callbacks", lambda *given: [*own(*given), Watch()]):
        try:
            training_run.train(config)
            bench.note("synchronizations", 0, step="of the trainer")
        except RuntimeError as error:
            torch.cuda.set_sync_debug_mode("default")
            ours = [line for line in traceback.extract_tb(error.__traceback__) if "segvol_pl" in line.filename]
            bench.note("synchronizations", 1, step="of the trainer")
            bench.note(
                "where", f"{Path(ours[-1].filename).name}:{ours[-1].lineno}: {error}"[:200], step="of the trainer"
            )


# ---- runs ----

ALL_RUNS = ("auto", "ddp", "fsdp", "zero1", "zero2", "zero3")
SMALL_RUNS = ("auto", "fsdp", "zero2")
FIRST, LAST = 3, 5
"""Steps of a run, and of the same one when it has been started again."""


def runs(bench: Bench) -> None:
    """Every strategy in the trainer, one rank, the tiny model: losses against `auto`, last.ckpt, gone on from once.

    On a GPU its communication is NCCL's. Largest relative difference of a step's loss, in float32 and, over as many
    steps, in bf16.
    """
    shards = tiny_shards(bench)
    wanted = SMALL_RUNS if bench.small else ALL_RUNS
    if importlib.util.find_spec("deepspeed") is None:
        bench.note(FAILED, "DeepSpeed is not installed: zero1, zero2, zero3 did not run")
        wanted = tuple(name for name in wanted if not name.startswith("zero"))
    waiting, running, ended, noted = list(wanted), dict[int, str](), dict[str, Ended](), set[str]()
    while waiting or running:
        while waiting and len(running) < max(1, len(os.sched_getaffinity(0)) // 2):
            name = waiting.pop(0)
            running[_forked(functools.partial(_run, bench, shards, name))] = name
        pid, status = os.wait()
        name = running.pop(pid, "")
        if not name:  # one of packing's
            continue
        ended[name] = Ended(bench.scratch / "runs" / name, os.waitstatus_to_exitcode(status))
        # At once, as far as there is something to hold it against: another strategy may hang.
        for name in ended.keys() - noted if "auto" in ended else ():
            noted.add(name)
            with bench.part(strategy=name):
                _note_run(bench, name, ended[name], ended["auto"])


def _forked(work: Callable[[], None]) -> int:
    """The number of a process that does the work and ends; its status is 0 where it came to its end."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return pid


@dataclass(frozen=True)
class Ended:
    """What is left of the runs of one strategy."""

    folder: Path
    status: int

    def losses(self, kind: str) -> np.ndarray:
        """Of every step."""
        return np.array([loss for _, loss in read_metrics(self.folder / kind / "metrics.csv", "train/loss")])

    @property
    def problem(self) -> str:
        """What the last run said at its end."""
        said = [line for line in (self.folder / "log.txt").read_text().splitlines() if line.strip()]
        return said[-1][:300] if said else f"exit status {self.status}"


def _run(bench: Bench, shards: Path, strategy: str) -> None:
    """FIRST steps, then on to LAST; then LAST anew in bf16. Each in a process of its own; raises where one fails."""
    # The first with a loader process, which on a GPU a fork server begins: that takes longer than the steps.
    kinds = [("fp32", FIRST, 1), ("fp32", LAST, 0), *([] if bench.small else [("bf16", LAST, 0)])]
    folder = bench.scratch / "runs" / strategy
    folder.mkdir(parents=True)
    for kind, count, workers in kinds:
        chosen = [f"run.precision={kind}", f"run.strategy={strategy}", "run.log_every=1", "run.val_batches=1"]
        chosen.append(f"data.workers={workers}")
        arguments = _arguments(bench, shards, f"runs/{strategy}/{kind}", count, *chosen)
        pid = _forked(functools.partial(_train, arguments, folder / "log.txt"))
        if os.waitpid(pid, 0)[1]:
            print(f"---- {strategy}, {kind}, {count} steps:\n{(folder / 'log.txt').read_text()[-6000:]}", flush=True)
            raise RuntimeError(f"{strategy}, {kind}, {count} steps: see above")


def _train(arguments: list[str], log: Path) -> None:
    """`segvol-pl train`, as if started alone, by no launcher."""
    from segvol_pl.__main__ import main

    for name in list(os.environ):
        if name.startswith(("SLURM_", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_", "RANK")):
            del os.environ[name]
    with log.open("w") as text:
        os.dup2(text.fileno(), 1)
        os.dup2(text.fileno(), 2)
        if main(["train", *arguments, "--debug"]):
            raise SystemExit("it failed")


def _arguments(bench: Bench, shards: Path, name: str, steps: int, *more: str) -> list[str]:
    """configs/tiny/train.yaml on the bench's device."""
    data = [f"data.shards={shards}", "data.samples_per_volume=8", "data.workers=1"]
    run = [f"run.out={bench.scratch / name}", f"run.accelerator={bench.device.type}", f"optim.max_steps={steps}"]
    return [
        str(TINY / "train.yaml"),
        *data,
        *run,
        f"run.precision={bench.precision.value}",
        "track.wandb=disabled",
        *more,
    ]


def _note_run(bench: Bench, name: str, ended: Ended, auto: Ended) -> None:
    if ended.status:
        bench.note(FAILED, ended.problem, strategy=name)
        return
    for kind in sorted(path.name for path in ended.folder.iterdir() if path.is_dir()):
        ours, theirs = ended.losses(kind), auto.losses(kind)
        assert len(ours) == LAST, f"{len(ours)} losses of {LAST} steps"
        bench.note(f"losses, {kind}", float(np.abs(ours / theirs - 1).max()), "relative", strategy=name)
    checkpoint = torch.load(ended.folder / "fp32" / "checkpoints" / "last.ckpt", weights_only=True, mmap=True)
    bench.note("last.ckpt, resumed", checkpoint["global_step"], "step", strategy=name)


# ---- shards ----


def pack_phantoms(folder: Path, small: bool) -> None:
    """`folder`/tiny: six small phantoms, as the tests'; `folder`/base: two of 150 x 240 x 280 voxels or so."""
    pack_into(folder / "tiny", 6, 0.45, [8, 16, 16], held_out=0.4)
    if not small:
        pack_into(folder / "base", 2, 2.2, [32, 256, 256], held_out=0.0)


def pack_into(folder: Path, count: int, scale: float, overview: list[int], held_out: float) -> None:
    """Phantoms, packed into `folder`, which is left alone where it holds shards."""
    import tempfile

    from segvol_pl.packing.pack import pack
    from segvol_pl.packing.phantom import write_phantoms

    if (folder / "index.json").is_file():
        return
    with tempfile.TemporaryDirectory() as name:
        phantoms = write_phantoms(Path(name), count, seed=0, scale=scale)
        sources = [f"{part}={phantoms / part}" for part in ("images", "labels")]
        chosen = [*sources, f"categories={phantoms / 'categories.yaml'}", f"out={folder}", "dataset=phantoms"]
        sizes = [f"overview_shape={overview}", "samples_per_shard=2", f"test_fraction={held_out}"]
        pack(load("pack", [*chosen, *sizes, f"workers={min(count, len(os.sched_getaffinity(0)))}"]))


def tiny_shards(bench: Bench) -> Path:
    """Given, or packed once for all stages."""
    folder = (bench.shards or bench.scratch / "shards") / "tiny"
    pack_into(folder, 6, 0.45, [8, 16, 16], held_out=0.4)
    return folder


def pack(bench: Bench) -> None:
    """Seconds to make and pack the phantoms that the loader reads; none where they are given."""
    if bench.shards:
        bench.note("seconds", f"given: {bench.shards}")
        return
    started = time.perf_counter()
    pack_phantoms(bench.scratch / "shards", bench.small)
    bench.note("seconds", round(time.perf_counter() - started, 1), "s")


# ---- loader ----


def loader(bench: Bench) -> None:
    """Batches a second of the loader with so many workers, pinned, and what the fastest step so far would take.

    Then milliseconds to copy a batch and to make of it what the task reads. Shards of full-size volumes, in the page
    cache; batches as the trainer's.
    """
    folder = tiny_shards(bench) if bench.small else (bench.shards or bench.scratch / "shards") / "base"
    commands = {"pretrain": 2, "train": 2} if bench.small else {"pretrain": 8, "train": 4}
    for command, volumes in commands.items():
        needed = _step_rate(bench, command)
        task, module = _built(bench, command, folder, volumes)
        for workers in (1, 2) if bench.small else (1, 8, 14):
            with bench.part(command=command, workers=workers):
                module.data = replace(module.data, workers=workers)
                rate = _rate(bench, task, module, workers)
                told = {"command": command, "volumes": volumes, "workers": workers}
                bench.note("batches/s", round(rate, 2), "1/s", **told)
                bench.note("volumes/s", round(rate * volumes, 1), "1/s", **told)
                if needed:
                    bench.note("of what the step takes", round(rate * volumes / needed, 2), "", **told)


def _step_rate(bench: Bench, command: str) -> float:
    """The fastest volumes/s of that command's default step, as it comes or compiled; 0 where there is none."""
    begins = "SimMIM" if command == "pretrain" else "2 volumes" if bench.small else "4 volumes"
    return max(
        (
            float(one.value)
            for one in read(bench.out)
            if one.stage in ("steps", "compiled")
            and (one.name, one.card) == ("volumes/s", bench.card)
            and one.settings["step"].startswith(begins)
        ),
        default=0.0,
    )


def _built(bench: Bench, command: str, folder: Path, volumes: int) -> tuple[Any, Any]:
    """Task and DataModule as the command makes them, before there is a trainer."""
    from segvol_pl.training import run as training_run

    found: list[Any] = []
    model = TINY.parent / "model" / ("tiny.yaml" if bench.small else "base.yaml")
    data = [f"data.shards={folder}", "data.val_split=train", f"data.global_batch={volumes}"]
    run = [f"run.out={bench.scratch / 'loader'}", f"run.accelerator={bench.device.type}", "optim.max_steps=1000"]
    keys = [f"model={model}", *data, "data.samples_per_volume=64", *run]
    if command == "train":
        keys.append("text.source=seeded")
    with mock.patch.object(training_run, "_fit", lambda *given: found.extend(given[1:])):
        getattr(training_run, command)(load(command, keys))
    task, module = found
    strategy = SimpleNamespace(root_device=bench.device)
    module.trainer = SimpleNamespace(world_size=1, global_rank=0, training=True, strategy=strategy)
    return task, module


def _rate(bench: Bench, task: Any, module: Any, workers: int) -> float:
    """Batches a second once what was loaded ahead is used up; notes what becomes of one."""
    lasting = 1.5 if bench.small else 3.0
    batches = iter(module.train_dataloader())
    for _ in range(workers * (1 + module.data.prefetch)):
        batch = next(batches)
    started, taken = time.perf_counter(), 0
    while time.perf_counter() - started < lasting:
        batch = next(batches)
        taken += 1
    rate = taken / (time.perf_counter() - started)
    if workers == 1:
        _note_transfer(bench, task, module, batch)
    del batches
    return rate


def _note_transfer(bench: Bench, task: Any, module: Any, batch: Any) -> None:
    told = {"command": "pretrain" if isinstance(task, SimMIMTask) else "train"}
    batch = module.on_before_batch_transfer(batch, 0)
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    bench.note("a batch", round(sum(each.nbytes for each in tensors) / 2**20, 1), "MiB", **told)
    places = {str(each.device) if each.is_cuda else "pinned" if each.is_pinned() else "memory" for each in tensors}
    bench.note("arrives in", ", ".join(sorted(places)), **told)
    if not bench.gpu:
        bench.note("copy to the device", NEEDS_GPU, **told)
        return
    task.to(bench.device)
    batch = {name: value.cpu().pin_memory() if isinstance(value, Tensor) else value for name, value in batch.items()}

    def moved() -> Any:
        return module.transfer_batch_to_device(batch, bench.device, 0)

    def ready() -> Any:
        there = module.on_after_batch_transfer(moved(), 0)
        return task.on_after_batch_transfer(there, 0)

    bench.note("copy to the device", round(milliseconds(moved, bench.device), 2), "ms", **told)
    bench.note("copy, made ready", round(milliseconds(ready, bench.device), 2), "ms", **told)


# ---- compiled ----


def compiled(bench: Bench) -> None:
    """A step as it comes, recorded as one CUDA graph, compiled, and both, as run.compile has it on a single GPU.

    ms and peak memory of each; of what is compiled, the first step's seconds and graphs compiled after the first
    validation.
    """
    volumes, pseudo = (2, 2) if bench.small else (4, 6)
    makers: list[Callable[[], Step]] = [lambda: simmim_step(bench, 2 if bench.small else 8)]
    if bench.gpu:
        makers.append(lambda: supervised_step(bench, volumes, 4, pseudo, 0))
    measured = matrix_rate(bench.device, torch.bfloat16 if bench.bf16 else torch.float32, 8192 if bench.gpu else 512)
    for make in makers:
        with bench.part():
            torch._dynamo.reset()
            step = make()
            _note_form(bench, step, measured, "as it comes")
            if bench.gpu:
                step.task.graph = StepGraph(step.task, step.task.losses)
                _note_form(bench, step, measured, "recorded")
                step.task.graph = None
            _compile(bench, step, measured)
            if bench.gpu:
                step.task.graph = StepGraph(step.task, step.task.losses)
                _note_form(bench, step, measured, "compiled, recorded")
                _note_kernels(bench, step, form="compiled, recorded")
            del step


def _compile(bench: Bench, step: Step, measured: float) -> None:
    told = {**step.settings, "form": "compiled"}
    counters = torch._dynamo.utils.counters["stats"]
    strategies.compile_parts(step.task, step.config.run)
    started = time.perf_counter()
    step()
    if bench.gpu:
        torch.cuda.synchronize()
    bench.note("first step", round(time.perf_counter() - started, 1), "s", **told)
    _validate(step)
    step()
    before = counters["unique_graphs"]
    _note_form(bench, step, measured, "compiled")
    _validate(step)
    step()
    bench.note("graphs", before, "", **told)
    bench.note("compiled again", counters["unique_graphs"] - before, "", **told)


def _note_form(bench: Bench, step: Step, measured: float, form: str) -> None:
    if bench.gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    # A step that is recorded computes as it comes once, and is recorded the second time.
    ms = milliseconds(step, bench.device, repeats=8 if bench.gpu else 2, warm=3)
    note_rates(bench, step, ms, measured, form=form)
    if bench.gpu:
        bench.note("peak", round(torch.cuda.max_memory_allocated() / 2**30, 2), "GiB", **step.settings, form=form)


def _validate(step: Step) -> None:
    with torch.no_grad():
        step.loss()


# ---- profile ----


def profile(bench: Bench) -> None:
    """A step by kernels: the 30 that take longest into profile.txt, a trace beside it; how many, and for how long."""
    volumes, categories, pseudo = (2, 1, 2) if bench.small else (4, 4, 6)
    makers: dict[str, Callable[[], Step]] = {
        "simmim": lambda: simmim_step(bench, 2 if bench.small else 8),
        "supervised": lambda: supervised_step(bench, volumes, categories, pseudo, 0),
    }
    for name, make in makers.items():
        with bench.part(step=name):
            step = make()
            for _ in range(3 if bench.gpu else 1):
                step()
            found = _note_kernels(bench, step)
            _write_trace(bench, found, bench.out / f"trace-{name}.json.gz")
            del step


def _note_kernels(bench: Bench, step: Step, **told: Any) -> Any:
    """The profile of a step, whose table is added to profile.txt."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.gpu else [])]
    order = "self_device_time_total" if bench.gpu else "self_cpu_time_total"
    with torch.profiler.profile(activities=activities) as found:
        step()
        if bench.gpu:
            torch.cuda.synchronize()
    settings = {**step.settings, **told}
    with (bench.out / "profile.txt").open("a", encoding="utf-8") as text:
        print(f"==== {bench.card}, {settings}, {now()}", file=text)
        print(found.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=90), file=text)
    events = found.events() or []
    on_device = [event for event in events if event.device_type == DeviceType.CUDA]
    kernels = [event for event in on_device if not getattr(event, "is_user_annotation", False)]
    if bench.gpu:
        bench.note("kernels", len(kernels), "", **settings)
        busy = sum(event.time_range.elapsed_us() for event in kernels) / 1000
        bench.note("kernels' time", round(busy, 2), "ms", **settings)
    bench.note("operations", len(events) - len(on_device), "", **settings)
    return found


def _write_trace(bench: Bench, found: Any, path: Path) -> None:
    found.export_chrome_trace(str(path))
    size = path.stat().st_size
    bench.note("trace", round(size / 2**20, 2), "MiB", file=path.name)
    if size > TRACE_LIMIT:
        path.unlink()
        bench.note(FAILED, f"a trace of {size / 2**20:.0f} MiB is not kept", file=path.name)


# ---- zoom ----


def zoom(bench: Bench) -> None:
    """Zoom-out-zoom-in on a phantom CT of 128 x 512 x 512 voxels, an organ of a third of each axis, text+box.

    An untrained model finds no organ: its decoder works, and the organ stands for what it gave.
    """
    from segvol_pl.imaging.intensity import Normalised, intensity_of
    from segvol_pl.imaging.prompts import Prompt
    from segvol_pl.inference.zoom import Zoomer
    from segvol_pl.packing.phantom import make_phantom

    shape = (32, 96, 96) if bench.small else (128, 512, 512)
    small_DHW = make_phantom(0, 0.4 if bench.small else 1.0).hu_DHW
    places = [np.arange(size) * have // size for size, have in zip(shape, small_DHW.shape, strict=True)]
    hu_DHW = np.ascontiguousarray(small_DHW[np.ix_(*places)])
    image = Normalised(hu_DHW, intensity_of(hu_DHW))
    names = [f"organ {place}" for place in range(10)]
    torch.manual_seed(0)
    model = SegVol(bench.model, TextBank.seeded(names, bench.model.text_dim)).eval().to(bench.device)
    _hold(model, bench.device)
    d, h, w = shape
    box = (d // 3, h // 3, w // 3, 2 * d // 3 - 1, 2 * h // 3 - 1, 2 * w // 3 - 1)
    prompts = [Prompt(text=name, box=box) for name in names]
    config = ZoomConfig()
    for count in (1, 1, 1 if bench.small else 10):
        with bench.part(prompts=count):
            started = time.perf_counter()
            with autocast(bench.device, bench.precision):
                zoomer = Zoomer(model, image, config)
                zoomer.encode_overview()
                opened = time.perf_counter() - started
                asked = [zoomer.request(prompt, np.random.default_rng(0)) for prompt in prompts[:count]]
                results = [(result.windows, result.mask(0.5).any()) for result in zoomer.zoom_all(asked)]
            seconds = time.perf_counter() - started
            told = {"voxels": "x".join(map(str, shape)), "prompts": count, "precision": bench.precision.value}
            # The first one warms up: of several alike the last counts.
            windows = sum(each for each, _ in results)
            assert windows and all(any_voxel for _, any_voxel in results), "every prompt has found something"
            bench.note("seconds", round(seconds, 3), "s", **told)
            bench.note("opening", round(opened, 3), "s", **told)
            bench.note("windows", windows, "", **told)
            bench.note("windows/s", round(windows / (seconds - opened), 1), "1/s", **told)
            bench.note("volumes/s", round(1 / seconds, 3), "1/s", **told)


def _hold(model: SegVol, device: torch.device) -> None:
    """The decoder's logits are those of an organ in the middle third of what it looks at."""
    organ = torch.full(tuple(model.config.input_shape), -10.0, device=device)
    organ[tuple(slice(size // 3, 2 * size // 3) for size in model.config.input_shape)] = 10.0
    decode = model.decode

    def held(tokens_BTE: Tensor, prompts: Any) -> Tensor:
        logits_BPDHW: Tensor = decode(tokens_BTE, prompts)
        return 0 * logits_BPDHW + organ

    model.decode = held  # type: ignore[method-assign,assignment]


# ---- one stage ----


def micro(bench: Bench) -> None:
    """See `gpu_micro.py`."""
    from gpu_micro import measure

    measure(bench)


STAGES: dict[str, Callable[[Bench], None]] = {
    each.__name__: each for each in (env, parity, syncs, steps, runs, micro, pack, zoom, loader, profile, compiled)
}


def device_and_card() -> tuple[str, str]:
    """The kind of device, and its name. Touches the card."""
    device, cores = resolve_device("auto"), len(os.sched_getaffinity(0))
    return device.type, torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {cores} cores"


def bench_of(
    out: Path, scratch: Path, small: bool, precision: str | None, shards: Path | None, device: str, card: str
) -> Bench:
    """Raises SystemExit where the full-size model would run on a CPU."""
    if device == "cpu":
        if not small:
            raise SystemExit("the full-size model needs a GPU: give --small on a CPU")
        strategies.keep_freed_memory()
    chosen = Precision(precision) if precision else Precision.bf16 if device == "cuda" else Precision.fp32
    return Bench("", out, scratch, small, chosen, shards, torch.device(device), card)
