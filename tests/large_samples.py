"""Samples large enough to be read in parts."""

from __future__ import annotations

import numpy as np

from segvol_pl.data.frames import WORTH_PARTS, encode_array
from segvol_pl.data.schema import CategoryFacts, Facts, Member, Sample
from segvol_pl.imaging.intensity import Intensity
from segvol_pl.packing.prepare import HU, sample_of

SHAPE = (46, 160, 160)
OVERVIEW = (8, 16, 16)


def large_sample(key: str, seed: int = 0) -> Sample:
    """A sample of noise, whose CT and label have chunks of their own; packed as today."""
    rng = np.random.default_rng(seed)
    arrays = {
        Member.CT: rng.integers(-500, 500, SHAPE).astype(np.int16),
        Member.LABEL: rng.integers(0, 200, SHAPE).astype(np.uint8),
        Member.OVERVIEW: rng.integers(-500, 500, OVERVIEW).astype(np.int16),
        Member.OVERVIEW_LABEL: rng.integers(0, 3, OVERVIEW).astype(np.uint8),
        Member.REGIONS: rng.integers(0, 5, OVERVIEW).astype(np.uint16),
    }
    box = [0, 0, 0, *(size - 1 for size in SHAPE)]
    anchors = rng.integers(SHAPE, size=(20, 3)).tolist()
    facts = Facts(
        key=key,
        shape=list(SHAPE),
        spacing=[3.0, 1.0, 1.0],
        affine=np.eye(4).tolist(),
        source={"image": f"{key}.nii.gz", "content_sha256": f"{seed:064x}"},
        dataset="noise",
        split="train",
        modality="CT",
        intensity=Intensity(mean=0.0, low=-400.0, high=400.0, minimum=-500, maximum=499),
        categories={"liver": CategoryFacts(values=[1, 2, 3], voxels=1000, box=box, anchors=anchors)},
        labelled=True,
        overview_shape=list(OVERVIEW),
    )
    sample = sample_of(facts, {member: encode_array(array, member in HU) for member, array in arrays.items()})
    assert all(len(sample.members[member]) > WORTH_PARTS for member in (Member.CT, Member.LABEL))
    return sample
