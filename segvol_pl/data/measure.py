"""One CT and its label map as a sample: cropped to the body, measured, encoded.

1. `pack_case` reads a CT and its label map, or the files of its categories, which `join_masks` makes one map of.
2. It crops to the body, makes the overview and the pseudo-label regions, and writes down the facts that training needs.
3. The split is decided by the hash of the voxels alone.

A `Recipe` and the files decide every byte.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import blosc2
import numpy as np
from scipy import ndimage

from segvol_pl.config import RegionsConfig
from segvol_pl.data.cases import Case
from segvol_pl.data.frames import chunk_table, encode_array
from segvol_pl.data.pseudo import pseudo_regions
from segvol_pl.data.sample import SCHEMA, Box, CategoryFacts, Facts, Intensity, Member, SampleError, Split
from segvol_pl.data.shards import Sample
from segvol_pl.data.transforms import body_box, box_slices, intensity_of, normalise, resize_image, resize_label
from segvol_pl.data.volume import Volume, read_label, read_volume

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Everything beside the files themselves that decides a packed sample's bytes."""

    dataset: str
    modality: str
    overview_shape: tuple[int, int, int]
    anchors: int
    test_fraction: float
    regions: RegionsConfig
    categories: dict[str, list[int]]

    def fingerprint(self, *parts: Any) -> str:
        """Hex sha256 of the recipe and `parts`, which must be JSON."""
        text = json.dumps([SCHEMA, blosc2.__version__, asdict(self), parts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def pack_case(case: Case, key: str, recipe: Recipe, source: dict[str, str]) -> Sample:
    """Reads, crops, measures and encodes one case. `source` names and hashes its files, see `Facts.source`.

    Raises VolumeError or SampleError for a CT or label map that cannot be used.
    """
    volume = read_volume(case.image)
    label_DHW, categories = _label_of(case, volume, recipe)
    content = _content_sha256(volume.array_DHW)
    intensity = intensity_of(volume.array_DHW)
    box = body_box(volume.array_DHW, intensity)
    if label_DHW is not None:
        label_DHW = np.ascontiguousarray(label_DHW[box_slices(box)])
    arrays = _arrays_of(volume.array_DHW[box_slices(box)], label_DHW, intensity, recipe)
    facts = Facts(
        key=key,
        shape=list(arrays[Member.CT].shape),
        spacing=list(volume.spacing),
        affine=_affine_of_crop(volume, box).tolist(),
        source={**source, "content_sha256": content},
        dataset=recipe.dataset,
        split=split_of(content, recipe.test_fraction).value,
        modality=recipe.modality,
        intensity=intensity,
        categories=_categories_of(label_DHW, categories, recipe, content, case) if label_DHW is not None else {},
        labelled=label_DHW is not None,
        overview_shape=list(recipe.overview_shape),
    )
    return _encode(facts, arrays)


def split_of(content_sha256: str, test_fraction: float) -> Split:
    """The split of a case, by its content alone: it stays in it however often and with whatever the set is repacked."""
    return Split.TEST if int(content_sha256[:8], 16) < test_fraction * 16**8 else Split.TRAIN


def _content_sha256(hu_DHW: np.ndarray) -> str:
    digest = hashlib.sha256(repr(hu_DHW.shape).encode())
    digest.update(np.ascontiguousarray(hu_DHW, dtype="<i2").tobytes())
    return digest.hexdigest()


def _label_of(case: Case, volume: Volume, recipe: Recipe) -> tuple[np.ndarray | None, dict[str, list[int]]]:
    """The case's label map, if any, and what its values mean."""
    if not case.label and not case.masks:
        return None, {}
    if case.label:
        label_DHW, categories = read_label(case.label, volume), recipe.categories
    else:
        files = sorted(case.masks.items())
        label_DHW, categories = join_masks(
            volume.array_DHW.shape, ((name, read_label(path, volume)) for name, path in files)
        )
    if not label_DHW.any():
        place = case.label or f"{case.image}: its {len(case.masks)} category files"
        raise SampleError(f"{place}: the label map is empty (all 0): leave the case out or give its label map")
    return label_DHW, categories


def join_masks(
    shape: tuple[int, ...], masks: Iterable[tuple[str, np.ndarray]]
) -> tuple[np.ndarray, dict[str, list[int]]]:
    """One label map (D,H,W) of masks that may overlap, one at a time, and category -> its values.

    Each set of categories that meet in a voxel gets a value of its own, in the order of the sets' names.
    """
    groups: list[tuple[str, ...]] = [()]
    codes_DHW = np.zeros(shape, dtype=np.int32)
    for name, mask_DHW in masks:
        inside_DHW = mask_DHW > 0
        table = np.zeros(len(groups), dtype=np.int32)
        for code in np.unique(codes_DHW[inside_DHW]):
            table[code] = len(groups)
            groups.append((*groups[code], name))
        codes_DHW[inside_DHW] = table[codes_DHW[inside_DHW]]
    present = sorted(groups[code] for code in np.unique(codes_DHW) if code)
    value_of = {group: value for value, group in enumerate(present, start=1)}
    values = np.array([value_of.get(group, 0) for group in groups], dtype=np.min_scalar_type(len(present)))
    names = sorted({name for group in present for name in group})
    return values[codes_DHW], {name: [value_of[group] for group in present if name in group] for name in names}


def _arrays_of(
    hu_DHW: np.ndarray, label_DHW: np.ndarray | None, intensity: Intensity, recipe: Recipe
) -> dict[Member, np.ndarray]:
    """The arrays to store, from the body's voxels. The regions see what the model sees: HU as stored, normalised."""
    overview_DHW = np.rint(resize_image(hu_DHW, recipe.overview_shape)).astype(np.int16)
    arrays = {Member.CT: hu_DHW, Member.OVERVIEW: overview_DHW}
    if label_DHW is not None:
        arrays |= {Member.LABEL: label_DHW, Member.OVERVIEW_LABEL: resize_label(label_DHW, recipe.overview_shape)}
    if recipe.regions.enabled:
        seen_DHW = normalise(overview_DHW, intensity)
        arrays[Member.REGIONS] = pseudo_regions(seen_DHW, arrays.get(Member.OVERVIEW_LABEL), recipe.regions)
    return arrays


def _affine_of_crop(volume: Volume, box: Box) -> np.ndarray:
    shift = np.eye(4)
    shift[:3, 3] = box[:3]
    return volume.affine @ shift


def _encode(facts: Facts, arrays: dict[Member, np.ndarray]) -> Sample:
    members = {member: encode_array(arrays[member]) for member in Member if member in arrays}
    hashes = {member.value: hashlib.sha256(frame).hexdigest() for member, frame in members.items()}
    tables = {member.value: chunk_table(frame) for member, frame in members.items()}
    chunks = {ending: table for ending, table in tables.items() if table is not None}
    text = replace(facts, members=hashes, chunks=chunks).to_json()
    return Sample(facts.key, {Member.FACTS: text.encode(), **members})


def _categories_of(
    label_DHW: np.ndarray, categories: dict[str, list[int]], recipe: Recipe, content: str, case: Case
) -> dict[str, CategoryFacts]:
    """The categories present, measured. Raises SampleError where no value of the label map is any category's."""
    places = dict(enumerate(ndimage.find_objects(label_DHW), start=1))
    present = {value: place for value, place in places.items() if place is not None}
    rng = np.random.default_rng(int(content[:16], 16))
    found = {
        name: _measure(label_DHW, values, [present[value] for value in values if value in present], recipe.anchors, rng)
        for name, values in sorted(categories.items())
        if any(value in present for value in values)
    }
    if not found:
        values = ", ".join(str(value) for value in sorted(present)[:10])
        raise SampleError(f"{case.label}: none of its values ({values}) is any category's: check categories=FILE")
    unnamed = sorted(present.keys() - {value for values in categories.values() for value in values})
    if unnamed:
        log.debug("%s: %d label values that no category names: %s", case.label, len(unnamed), unnamed)
    return found


def _measure(
    label_DHW: np.ndarray, values: list[int], places: list[Any], anchors: int, rng: np.random.Generator
) -> CategoryFacts:
    """`places` are the slices that bound each value present."""
    low = [min(place[axis].start for place in places) for axis in range(3)]
    high = [max(place[axis].stop - 1 for place in places) for axis in range(3)]
    within = box_slices((low[0], low[1], low[2], high[0], high[1], high[2]))
    inside_N3 = np.argwhere(np.isin(label_DHW[within], values)) + low
    drawn = np.sort(rng.choice(len(inside_N3), size=min(anchors, len(inside_N3)), replace=False))
    return CategoryFacts(values=values, voxels=len(inside_N3), box=[*low, *high], anchors=inside_N3[drawn].tolist())
