"""Small shards of boxes, whose masks can be worked out by hand, and an oracle that knows their names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from factories import Oracle

from segvol_pl.config import EvaluateConfig
from segvol_pl.data.frames import encode_array
from segvol_pl.data.index_builder import build_index
from segvol_pl.data.schema import CategoryFacts, Facts, Member, Sample
from segvol_pl.data.shard_writer import write_shard
from segvol_pl.evaluation.run import evaluate_model
from segvol_pl.evaluation.summary import Summary
from segvol_pl.imaging.box import box_of
from segvol_pl.imaging.intensity import intensity_of
from segvol_pl.model.text_encoder import TextBank

WINDOW = (8, 16, 16)
SHAPE = (20, 40, 36)
CATEGORIES = {"liver": [1, 2], "liver tumour": [2], "spleen": [3]}


class NamedOracle(Oracle):
    """An oracle that knows the phantom's category names."""

    def __init__(self, names: list[str] | None = None) -> None:
        super().__init__(WINDOW)
        self.bank = TextBank.seeded(names or list(CATEGORIES), 4)


def placed_affine() -> np.ndarray:
    """(d, h, w) to RAS: 3 x 1 x 1 mm."""
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = 3.0, 1.0, 1.0, 1.0
    affine[:3, 3] = (5.0, -7.0, 11.0)
    return affine


def sample_of(
    number: int,
    split: str,
    labelled: bool = True,
    spleen: bool = True,
    lesions: bool = False,
    placed: bool = True,
) -> Sample:
    """`lesions`: two small tumours far apart; not `placed`: spacing and affine unknown."""
    label_DHW = np.zeros(SHAPE, np.uint8)
    label_DHW[5:13, 8:22, 14:30] = 1
    if lesions:
        label_DHW[6:8, 9:12, 15:18] = label_DHW[11:13, 19:22, 27:30] = 2
    else:
        label_DHW[7:10, 11:15, 18:23] = 2
    if spleen:
        label_DHW[6:12, 24 + number % 3 : 34, 4:11] = 3
    hu_DHW = np.random.default_rng(number).normal(-200, 10, SHAPE).astype(np.int16)
    hu_DHW[label_DHW > 0] = 100
    key = f"case{number:02d}"
    present = {name: values for name, values in CATEGORIES.items() if labelled and np.isin(label_DHW, values).any()}
    masks = {name: np.isin(label_DHW, values) for name, values in present.items()}
    facts = Facts(
        key=key,
        shape=list(SHAPE),
        spacing=[3.0, 1.0, 1.0] if placed else None,
        affine=placed_affine().tolist() if placed else None,
        source={"image": f"{key}.nii.gz"},
        dataset="boxes",
        split=split,
        modality="CT",
        intensity=intensity_of(hu_DHW),
        categories={
            name: CategoryFacts(present[name], int(mask.sum()), list(box_of(mask)), np.argwhere(mask)[:1].tolist())
            for name, mask in masks.items()
        },
        labelled=labelled,
        overview_shape=list(WINDOW),
    )
    members = {Member.FACTS: facts.to_json().encode(), Member.CT: encode_array(hu_DHW)}
    return Sample(key, {**members, Member.LABEL: encode_array(label_DHW)} if labelled else members)


def write_boxes(folder: Path) -> Path:
    """Test split: three labelled cases, one without a spleen, and an unlabelled one; train split: one case."""
    samples = [sample_of(0, "test"), sample_of(1, "test"), sample_of(2, "test", spleen=False)]
    samples += [sample_of(3, "test", labelled=False), sample_of(4, "train")]
    write_shard(folder / "boxes-000000.tar", samples)
    build_index(folder)
    return folder


def evaluated(config: EvaluateConfig, model: Oracle | None = None) -> Summary:
    """Evaluate with an oracle."""
    summary = evaluate_model(config, model or NamedOracle())  # type: ignore[arg-type]
    assert summary is not None
    return summary
