"""What goes wrong: within one rank, at one moment of its run. This is called in every rank, before `main`.

Nothing is imitated. A hang sleeps for ever, a kill is SIGKILL, a full disk is full, a refused allocation is one that
the allocator refused, NaN is in the numbers. Moments are places in the run's own code, not times.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from segvol_pl.model.image_encoder import Block
from segvol_pl.training.checkpoints import AtomicCheckpointIO
from segvol_pl.training.segment import SegVolTask


class Fault(StrEnum):
    """What goes wrong."""

    hang = "hang"
    crash = "crash"
    slow = "slow"
    kill = "kill -9"
    stop = "SIGSTOP"
    disk = "disk full"
    store = "store down"
    outage = "store away for a moment"
    nan = "NaN"
    memory = "out of memory"


class Moment(StrEnum):
    """When it does."""

    first = "first step"
    middle = "mid-epoch"
    validation = "validation"
    saving = "saving"


STEP = {Moment.first: 0, Moment.middle: 5, Moment.validation: 4, Moment.saving: 6}
"""Steps done at each moment."""
VALIDATED = 1
"""The validation batch at which it happens: the second one."""
LAG, LONG_SAVE = 0.3, 2.0
"""Seconds that a slow rank loses in each step, and that a slow disk takes longer to write a checkpoint."""
TOO_MUCH = 1 << 50
"""Bytes that no machine has."""
BLOCK = 1 << 20

Act = Callable[[Any, dict[str, Any]], None]
"""Takes the task and the batch; of a save, the writer and the checkpoint."""


def inject(fault: str, moment: str, rank: int, mark: str, out: str, port: int) -> None:
    """Arrange the fault, if this process is the rank that it befalls.

    mark: file that says that it has happened, and when; out: the run folder; port: that of the store, 0 without one.
    """
    if int(os.environ["LOCAL_RANK"]) != rank:
        return
    what, when = Fault(fault), Moment(moment)

    def act(owner: Any, held: dict[str, Any]) -> None:
        if not Path(mark).exists():
            Path(mark).write_text(json.dumps(time.time()))
        _act(what, when, held, Path(out), port)

    if what is Fault.slow and when is not Moment.saving:
        _slow_down(when, act)
    elif when is Moment.saving:
        _when_saving(what, act)
    else:
        _when_computing(when, act)


def _when_computing(when: Moment, act: Act) -> None:
    """At the beginning of a step's forward pass, or of a validation batch's."""
    name = "validation_step" if when is Moment.validation else "training_step"
    compute = getattr(SegVolTask, name)

    def wrapped(self: SegVolTask, batch: dict[str, Any], index: int) -> Any:
        if self.global_step == STEP[when] and (when is not Moment.validation or index == VALIDATED):
            act(self, batch)
        return compute(self, batch, index)

    setattr(SegVolTask, name, wrapped)


def _slow_down(when: Moment, act: Act) -> None:
    """In the blocks of the encoder, as a slow device does: of all steps from this one on, or of all of a validation."""
    name = "validation_step" if when is Moment.validation else "training_step"
    compute, forward = getattr(SegVolTask, name), Block.forward
    computing: list[SegVolTask] = []

    def wrapped(self: SegVolTask, batch: dict[str, Any], index: int) -> Any:
        computing.extend([self] if self.global_step >= STEP[when] else [])
        try:
            return compute(self, batch, index)
        finally:
            computing.clear()

    def wrapped_forward(self: Block, *arguments: Any, **named: Any) -> Any:
        if computing:
            act(computing[0], {})
        return forward(self, *arguments, **named)

    setattr(SegVolTask, name, wrapped)
    Block.forward = wrapped_forward  # type: ignore[method-assign]


def _when_saving(what: Fault, act: Act) -> None:
    """When half of a checkpoint is written, or, for what befalls its numbers or its memory, before that."""
    save, save_checkpoint = torch.save, AtomicCheckpointIO.save_checkpoint
    stores = (Fault.store, Fault.outage)
    before = what in (Fault.nan, Fault.memory, Fault.disk, *stores)
    # The first save: at the second one, the last samples have been read.
    step = STEP[Moment.saving] // 2 if what in stores else STEP[Moment.saving]

    def due(checkpoint: dict[str, Any]) -> bool:
        return bool(checkpoint["global_step"] == step)

    def wrapped_save(checkpoint: dict[str, Any], part: Path) -> None:
        save(checkpoint, part)
        if due(checkpoint) and not before:
            os.truncate(part, part.stat().st_size // 2)
            act(None, checkpoint)
            save(checkpoint, part)

    def wrapped_checkpoint(self: AtomicCheckpointIO, checkpoint: dict[str, Any], path: Any, **options: Any) -> None:
        if due(checkpoint) and before:
            act(self, checkpoint)
        save_checkpoint(self, checkpoint, path, **options)

    torch.save = wrapped_save  # type: ignore[assignment]
    AtomicCheckpointIO.save_checkpoint = wrapped_checkpoint  # type: ignore[method-assign]


def _act(what: Fault, when: Moment, held: dict[str, Any], out: Path, port: int) -> None:
    if what is Fault.hang:
        while True:
            time.sleep(60)
    elif what is Fault.crash:
        raise RuntimeError("injected fault")
    elif what is Fault.slow:
        time.sleep(LONG_SAVE if when is Moment.saving else LAG)
    elif what is Fault.kill:
        os.kill(os.getpid(), signal.SIGKILL)
    elif what is Fault.stop:
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what is Fault.disk:
        _fill(out)
    elif what in (Fault.store, Fault.outage):
        _wait_until_closed(port)
    elif what is Fault.nan:
        _poison(held, when)
    elif what is Fault.memory:
        torch.empty(TOO_MUCH, dtype=torch.uint8)


FILLER = "filler"
"""The file that fills the run folder's disk."""


def _fill(out: Path) -> None:
    try:
        with (out / FILLER).open("wb", buffering=0) as file:
            while True:
                file.write(bytes(BLOCK))
    except OSError:
        with (out / FILLER).open("ab", buffering=0) as file:
            _fill_up(file)


def _fill_up(file: Any) -> None:
    """With the single bytes for which a block is too large."""
    size = BLOCK
    while size:
        try:
            file.write(bytes(size))
        except OSError:
            size //= 2


def _wait_until_closed(port: int) -> None:
    """The one who looks at the mark closes the store; from then on nothing is read from it."""
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            return
        time.sleep(0.01)


def _poison(held: dict[str, Any], when: Moment) -> None:
    """A weight of what is saved, or the image of a batch."""
    if when is Moment.saving:
        # Not in place: under ddp that would be the weight itself, and the next step's loss the first to show it.
        name, weight = next((name, each) for name, each in held["state_dict"].items() if each.is_floating_point())
        held["state_dict"][name] = torch.full_like(weight, float("nan"))
    else:
        held["image_BCDHW"].fill_(float("nan"))
