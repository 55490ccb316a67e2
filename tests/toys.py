"""What users of the command line may bring: a strategy, a kind of prompt, ways to draw others, a figure, a source."""

from __future__ import annotations

from collections.abc import Sequence

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.strategies import SingleDeviceStrategy

from segvol_pl.config import RunConfig
from segvol_pl.imaging.box import Box, box_of
from segvol_pl.imaging.prompts import INSIDE


class Single(SingleDeviceStrategy):
    """One device, counting the steps of its optimizer."""

    steps = 0

    def optimizer_step(self, *args: object, **kwargs: object) -> object:
        Single.steps += 1
        return super().optimizer_step(*args, **kwargs)  # type: ignore[arg-type]


def single(run: RunConfig) -> Single:
    return Single(device=run.accelerator)


def half(truth_DHW: np.ndarray, spacing: Sequence[float] | None, rng: np.random.Generator) -> Box:
    """The lower half of the structure's box."""
    d0, h0, w0, d1, h1, w1 = box_of(truth_DHW)
    return d0, h0, w0, (d0 + d1) // 2, h1, w1


def first(
    truth_DHW: np.ndarray, spacing: Sequence[float] | None, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The first voxel of the structure."""
    return np.argwhere(truth_DHW)[:1], np.array([INSIDE])


def extremes(mask_DHW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The structure's first and last voxel along each axis; of several one that is drawn. Rows of d h w, (6,3)."""
    inside_N3 = np.argwhere(mask_DHW)
    ends = [(axis, end(inside_N3[:, axis])) for axis in range(3) for end in (np.min, np.max)]
    return np.stack([rng.choice(inside_N3[inside_N3[:, axis] == at]) for axis, at in ends])


def flat(mask_DHW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One voxel, where rows of voxels are wanted."""
    return np.argwhere(mask_DHW)[0]


def jaccard(mask_DHW: np.ndarray, truth_DHW: np.ndarray, spacing: Sequence[float] | None) -> float:
    return np.count_nonzero(mask_DHW & truth_DHW) / np.count_nonzero(mask_DHW | truth_DHW)


class Cupboard(LocalFileSystem):
    """A place of one's own: cupboard://FOLDER/FILE."""

    protocol = "cupboard"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:  # type: ignore[override]
        return str(super()._strip_protocol(path.removeprefix("cupboard://")))


fsspec.register_implementation("cupboard", Cupboard, clobber=True)
