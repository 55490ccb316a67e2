"""`segvol-pl embed`: frozen features of an image encoder over shards.

1. The volumes of the split, sorted by key, are divided into parts of `volumes_per_part`. Part k is computed by rank
   k mod ranks, so that parts do not depend on the number of ranks.
2. Of each volume the encoder sees the overview: the complete body crop at the model's input shape, with intensities in
   [0, 1], as in training without augmentation. An overview of another shape is resized as the zoom-out does it.
3. The feature of a volume is the mean of the encoder's normalised output tokens. For comparison, a part also holds the
   same of an encoder with random weights, and the image itself, averaged over a coarse grid.
4. A finished part is written atomically, and a restart continues with the parts that are not there.
5. Rank 0 waits for all parts and writes the index (`feature_folder`).
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from segvol_pl.config import EmbedConfig
from segvol_pl.config.loader import to_yaml
from segvol_pl.data.sample_table import SampleRecord, SampleTable
from segvol_pl.data.schema import Member
from segvol_pl.data.shard_index import read_index
from segvol_pl.data.shard_reader import read_facts, read_slices
from segvol_pl.data.store import Store
from segvol_pl.device import autocast, own_device, uses_bf16
from segvol_pl.errors import ConfigError, EvaluateError, SampleError, ShardError, listed
from segvol_pl.evaluation.feature_folder import (
    INTENSITY,
    TOKENS,
    TRAINED,
    UNTRAINED,
    Part,
    open_folder,
    part_path,
    read_part,
    write_index,
    write_part,
)
from segvol_pl.evaluation.results import Partition, wait_for_ranks
from segvol_pl.folder_lock import FolderLock
from segvol_pl.imaging.intensity import normalise
from segvol_pl.imaging.transforms import resize_image
from segvol_pl.model.checkpoint import read_encoder
from segvol_pl.model.image_encoder import ImageEncoder
from segvol_pl.run_folder import manifest

log = logging.getLogger(__name__)

CELLS = 8
"""Cells of the pooled image along each axis, at most."""
UNTRAINED_SEED = 0
ABOUT = {
    TRAINED: "mean of the encoder's normalised output tokens over the overview, float32",
    UNTRAINED: "the same of an encoder of this architecture with random weights, float32",
    INTENSITY: f"the encoder's input, averaged over a grid of at most {CELLS} cells along each axis, float32",
    TOKENS: "the encoder's normalised output tokens over the overview, float16",
}

Item = TypeVar("Item")
Found = TypeVar("Found")


def embed(config: EmbedConfig) -> Path:
    """Compute this rank's parts of the features into `config.out`; rank 0 also writes the index.

    Returns:
        The folder.

    Raises:
        ConfigError: The shards are a pipe.
        EvaluateError: There is no volume, too many cannot be read, or `out` holds something else.
        LockedError: Another process computes the same parts into `out`.
        CheckpointError, ShardError, StoreError: The checkpoint or the shards cannot be used.
    """
    store = Store(config.shards)
    if store.piped:
        raise ConfigError("shards: a pipe: source cannot be read volume by volume: give a folder or a URL", "shards")
    samples = _samples(store, config.split)
    encoder, model = read_encoder(config.checkpoint)
    device = own_device(config.device)
    encoders = {TRAINED: encoder.to(device)}
    if config.untrained:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(UNTRAINED_SEED)
            encoders[UNTRAINED] = ImageEncoder(model).to(device).eval()
    embedding = _Embedding(config, store, samples, encoders, tuple(model.input_shape), device)
    return embedding.run(_identity(encoder, samples))


def _samples(store: Store, split: str) -> SampleTable:
    """The samples of a split, sorted by key. Raises EvaluateError if there is none."""
    every = read_index(store).samples
    samples = every.of_split(split)
    if not len(samples):
        held = ", ".join(f"{name} ({count})" for name, count in every.per_split().items()) or "none"
        raise EvaluateError(f"split: {store.folder} has no volume in {split!r}; it has {held}")
    return samples.chosen(np.argsort(samples.column("key"), kind="stable"))


def _identity(encoder: ImageEncoder, samples: SampleTable) -> dict[str, str]:
    """Digests of the weights and of the volumes, by which a folder is recognised."""
    weights, volumes = hashlib.sha256(), hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        weights.update(f"{name} {list(value.shape)}\n".encode())
        weights.update(value.cpu().contiguous().view(torch.uint8).numpy().data)
    for row in samples.texts("key", "content", "facts_sha256"):
        volumes.update(b"%s %s %s\n" % row)
    return {"encoder": weights.hexdigest(), "samples": volumes.hexdigest()}


@dataclass(frozen=True, eq=False)
class _Image:
    """The encoder's input of one volume, or why it cannot be read."""

    key: str
    image_DHW: np.ndarray | None
    problem: str = ""


@dataclass(frozen=True, eq=False)
class _Embedding:
    """One rank's share."""

    config: EmbedConfig
    store: Store
    samples: SampleTable
    encoders: dict[str, ImageEncoder]
    input_shape: tuple[int, ...]
    device: torch.device

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def count(self) -> int:
        """Number of parts."""
        return math.ceil(len(self.samples) / self.config.volumes_per_part)

    def run(self, identity: dict[str, str]) -> Path:
        """Compute the parts of this rank; as rank 0, write the index of all. Returns the folder."""
        bf16 = uses_bf16(self.device, self.config.precision)
        settings = {
            **identity,
            "precision": "bf16" if bf16 else "fp32",
            "tokens": self.config.tokens,
            "untrained": self.config.untrained,
            "volumes_per_part": self.config.volumes_per_part,
        }
        partition = Partition.of("")
        open_folder(self.out, settings)
        with FolderLock(self.out, partition.lock):
            tried = self._compute(partition.select(range(self.count)))
            if partition.rank == 0:
                every, timeout = range(self.count), self.config.rank_timeout
                wait_for_ranks(every, lambda number: part_path(self.out, number).exists(), timeout, "part")
                # What another rank could not read may be readable here, or by now.
                self._compute([number for number in range(self.count) if number not in tried])
                self._finish(settings)
        return self.out

    def _compute(self, numbers: Sequence[int]) -> list[int]:
        """Compute the parts that are not there, or that lack volumes; return those that were computed."""
        missing = [number for number in numbers if not self._complete(number)]
        if len(missing) < len(numbers):
            log.info("%d of %d parts are already done", len(numbers) - len(missing), len(numbers))
        for done, number in enumerate(missing, start=1):
            start = time.perf_counter()
            part = self._part(number)
            write_part(part_path(self.out, number), part)
            rate = len(part.keys) / (time.perf_counter() - start)
            log.info("part %d/%d: %d volumes (%.2f volumes/s)", done, len(missing), len(part.keys), rate)
        return missing

    def _complete(self, number: int) -> bool:
        part = self._held(number)
        return part is not None and not part.unread

    def _held(self, number: int) -> Part | None:
        """A part that is there, without its tokens. Raises EvaluateError if it is damaged, or not of these volumes."""
        path = part_path(self.out, number)
        part = read_part(path, [*self.encoders, INTENSITY])
        if part is not None and part.keys != [record.key for record in self._rows(number)]:
            raise EvaluateError(f"{path} holds other volumes: set out to another folder")
        return part

    def _rows(self, number: int) -> SampleTable:
        first = number * self.config.volumes_per_part
        return self.samples[first : first + self.config.volumes_per_part]

    # ---- one part ----

    def _part(self, number: int) -> Part:
        records = list(self._rows(number))
        batches = [records[first : first + self.config.batch] for first in range(0, len(records), self.config.batch)]
        found: dict[str, list[np.ndarray]] = {name: [] for name in (*self.encoders, INTENSITY)}
        unread: dict[str, str] = {}
        for images in _one_ahead(self._read, batches):
            unread |= {image.key: image.problem for image in images if image.image_DHW is None}
            usable = [image.image_DHW for image in images if image.image_DHW is not None]
            for name, rows in self._encoded(np.stack(usable)[:, None]).items() if usable else ():
                found.setdefault(name, []).append(rows)
        return Part([record.key for record in records], {name: _joined(rows) for name, rows in found.items()}, unread)

    def _read(self, records: Sequence[SampleRecord]) -> list[_Image]:
        return [self._image(record) for record in records]

    def _image(self, record: SampleRecord) -> _Image:
        try:
            facts = read_facts(self.store, record)
            hu_DHW = read_slices(self.store, record, facts, {Member.OVERVIEW: slice(None)})[Member.OVERVIEW]
        except (ShardError, SampleError) as error:
            log.warning("%s cannot be embedded: %s", record.key, error)
            return _Image(record.key, None, " ".join(str(error).split()))
        image_DHW = normalise(hu_DHW, facts.intensity)
        fits = image_DHW.shape == self.input_shape
        return _Image(record.key, image_DHW if fits else resize_image(image_DHW, self.input_shape))

    @torch.inference_mode()
    def _encoded(self, image_BCDHW: np.ndarray) -> dict[str, np.ndarray]:
        """Array of a part -> its rows of these volumes."""
        sent_BCDHW = torch.from_numpy(image_BCDHW).to(self.device)
        tokens: dict[str, Tensor] = {}
        with autocast(self.device, self.config.precision):
            for name, encoder in self.encoders.items():
                tokens[name] = encoder(sent_BCDHW).float()
        rows = {name: tokens_BTE.mean(1).cpu().numpy() for name, tokens_BTE in tokens.items()}
        pooled = [min(size, CELLS) for size in self.input_shape]
        rows[INTENSITY] = np.stack([resize_image(image_DHW, pooled).ravel() for image_DHW in image_BCDHW[:, 0]])
        if self.config.tokens:
            rows[TOKENS] = tokens[TRAINED].half().cpu().numpy()
        return rows

    # ---- the end ----

    def _finish(self, settings: dict[str, Any]) -> None:
        parts = [part for number in range(self.count) if (part := self._held(number)) is not None]
        unread = [f"{key}: {why}" for part in parts for key, why in part.unread.items()]
        if len(unread) > self.config.max_bad_fraction * len(self.samples) or len(unread) == len(self.samples):
            raise EvaluateError(
                f"{len(unread)} of {len(self.samples)} volumes cannot be read, more than max_bad_fraction="
                f"{self.config.max_bad_fraction} allows: repair them and run again, or raise it. {listed(unread, '; ')}"
            )
        arrays = [*self.encoders, INTENSITY, *([TOKENS] if self.config.tokens else [])]
        read = next(part for part in parts if part.read)
        about = {
            "checkpoint": str(self.config.checkpoint),
            "shape": {name: list(rows.shape[1:]) for name, rows in read.arrays.items()},
            "arrays": {name: ABOUT[name] for name in arrays},
            "input_shape": list(self.input_shape),
            "settings": settings,
            "config": to_yaml(self.config),
            **manifest(),
        }
        write_index(self.out, self.samples, parts, about)
        log.info("%s: %d volumes in %d parts", self.out, len(self.samples) - len(unread), len(parts))


def _joined(rows: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(rows) if rows else np.zeros((0, 0), np.float32)


def _one_ahead(act: Callable[[Item], Found], items: Sequence[Item]) -> Iterator[Found]:
    """Act on each item in a thread that is one item ahead of the caller, so that reading overlaps computing."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(act, items[0])
        for item in items[1:]:
            current, following = following, thread.submit(act, item)
            yield current.result()
        yield following.result()
