"""One CT and its label map as a sample: cropped to the body, measured, encoded.

1. `prepare_case` reads a CT and its label map, or the files or channels of its categories, which `merge_masks` merges
   into one. It crops them to the body and measures what training needs to know: the intensity, and each category's
   box, voxels and anchors. The split follows from the hash of the voxels alone.
2. `pack_case` adds the overview and the pseudo-label regions, and encodes all arrays.

The `Rules` and the files determine every byte.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from scipy import ndimage

from segvol_pl.config import RegionsConfig
from segvol_pl.data.frames import ENCODING, chunk_table, encode_array
from segvol_pl.data.schema import SCHEMA, CategoryFacts, Facts, Member, Sample, Split
from segvol_pl.errors import SampleError
from segvol_pl.imaging.box import Box, box_slices
from segvol_pl.imaging.geometry import Volume
from segvol_pl.imaging.intensity import body_box, intensity_of, normalise
from segvol_pl.imaging.read import read_label, read_volume
from segvol_pl.imaging.transforms import resize_image, resize_label
from segvol_pl.packing.cases import Case
from segvol_pl.packing.m3d import read_m3d_image, read_m3d_masks
from segvol_pl.packing.regions import pseudo_regions

log = logging.getLogger(__name__)

HU = (Member.CT, Member.OVERVIEW)
"""Members that are encoded to be decoded fast: they are much larger than the others."""
VERSIONS = (SCHEMA, ENCODING, blosc2.__version__)
"""What determines a packed sample's bytes besides its files and rules."""


@dataclass(frozen=True)
class Rules:
    """All that determines a packed sample's bytes, apart from the files."""

    dataset: str
    modality: str
    overview_shape: tuple[int, int, int]
    anchors: int
    test_fraction: float
    regions: RegionsConfig
    categories: dict[str, list[int]]

    def fingerprint(self, *parts: Any, versions: Sequence[Any] = VERSIONS) -> str:
        """Return the hex sha256 of the rules and of `parts`, which must be JSON. versions: see `VERSIONS`."""
        text = json.dumps([*versions, asdict(self), parts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Scan:
    """The content of a case's files, in canonical axes. Spacing and affine are None if the file format has none."""

    array_DHW: np.ndarray
    spacing: tuple[float, float, float] | None
    affine: np.ndarray | None
    label_DHW: np.ndarray | None
    categories: dict[str, list[int]]
    notes: dict[str, str]
    """What is known about the values, for `Facts.source`."""
    volume: Volume | None = None
    """The CT as read from its file; None if masks cannot be written in its format."""


@dataclass(frozen=True, eq=False)
class PreparedCase:
    """A case cropped to the body and measured, not yet encoded: `facts` lack the members' hashes."""

    facts: Facts
    hu_DHW: np.ndarray
    label_DHW: np.ndarray | None
    body: Box
    """The crop, in voxels of the scan."""
    volume: Volume | None
    """As `Scan.volume`."""


def pack_case(case: Case, key: str, rules: Rules, source: dict[str, str]) -> Sample:
    """Read, crop, measure and encode one case.

    Args:
        case: Its files.
        key: Of the sample.
        rules: How to pack.
        source: Names and hashes of the files, see `Facts.source`.

    Raises:
        VolumeError, SampleError: The CT or its label map cannot be used.
    """
    prepared = prepare_case(case, key, rules, source)
    arrays = _arrays_of(prepared, rules)
    frames = {member: encode_array(arrays[member], fast=member in HU) for member in Member if member in arrays}
    return sample_of(prepared.facts, frames)


def prepare_case(case: Case, key: str, rules: Rules, source: dict[str, str], allow_empty: bool = False) -> PreparedCase:
    """Read, crop and measure one case, as `pack_case` does. `allow_empty`: whether its label map may be all 0."""
    scan = _scan_of(case, rules, allow_empty)
    content = _content_sha256(scan.array_DHW)
    intensity = intensity_of(scan.array_DHW)
    box = body_box(scan.array_DHW, intensity)
    hu_DHW = scan.array_DHW[box_slices(box)]
    label_DHW = None if scan.label_DHW is None else np.ascontiguousarray(scan.label_DHW[box_slices(box)])
    facts = Facts(
        key=key,
        shape=list(hu_DHW.shape),
        spacing=None if scan.spacing is None else list(scan.spacing),
        affine=None if scan.affine is None else _affine_of_crop(scan.affine, box).tolist(),
        source={**source, **scan.notes, "content_sha256": content},
        dataset=rules.dataset,
        split=case.split or split_of(content, rules.test_fraction).value,
        modality=rules.modality,
        intensity=intensity,
        categories=_categories_of(label_DHW, scan.categories, rules, content, case, allow_empty),
        labelled=label_DHW is not None,
        overview_shape=list(rules.overview_shape),
    )
    return PreparedCase(facts, hu_DHW, label_DHW, box, scan.volume)


def split_of(content_sha256: str, test_fraction: float) -> Split:
    """Return the split of a case, by its content alone: it does not change when the data set is packed again."""
    return Split.TEST if int(content_sha256[:8], 16) < test_fraction * 16**8 else Split.TRAIN


def _content_sha256(hu_DHW: np.ndarray) -> str:
    digest = hashlib.sha256(repr(hu_DHW.shape).encode())
    digest.update(np.ascontiguousarray(hu_DHW, dtype="<i2").tobytes())
    return digest.hexdigest()


def _scan_of(case: Case, rules: Rules, allow_empty: bool) -> Scan:
    scan = _m3d_scan(case) if case.channels else _file_scan(case, rules)
    if scan.label_DHW is not None and not scan.label_DHW.any() and not allow_empty:
        place = case.label or f"{case.image}: its {len(case.masks)} categories' files"
        raise SampleError(f"{place}: the label map is empty (all 0): leave the case out or give its label map")
    return scan


def _file_scan(case: Case, rules: Rules) -> Scan:
    volume = read_volume(case.image)
    label_DHW, categories = None, rules.categories
    if case.label:
        label_DHW = read_label(case.label, volume)
    elif case.masks:
        masks = ((name, _union(paths, volume)) for name, paths in sorted(case.masks.items()))
        label_DHW, categories = merge_masks(volume.array_DHW.shape, masks)
    return Scan(volume.array_DHW, volume.spacing, volume.affine, label_DHW, categories, {}, volume)


def _union(paths: tuple[Path, ...], volume: Volume) -> np.ndarray:
    return functools.reduce(np.logical_or, (read_label(path, volume) > 0 for path in paths))


def _m3d_scan(case: Case) -> Scan:
    array_DHW, meaning = read_m3d_image(case.image)
    notes = {"values": meaning, "axes": "D is the published array's last axis; directions unknown"}
    masks = read_m3d_masks(Path(str(case.label)), case.channels, array_DHW.shape)
    label_DHW, categories = merge_masks(array_DHW.shape, masks)
    return Scan(array_DHW, None, None, label_DHW, categories, notes)


def merge_masks(
    shape: tuple[int, ...], masks: Iterable[tuple[str, np.ndarray]]
) -> tuple[np.ndarray, dict[str, list[int]]]:
    """Merge masks that may overlap into one label map (D,H,W).

    Each set of categories that occurs in a voxel gets a value of its own, in the order of the sets' names.

    Args:
        shape: (D,H,W).
        masks: Category and mask, one at a time.

    Returns:
        The label map, and category -> its values.
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


def _arrays_of(prepared: PreparedCase, rules: Rules) -> dict[Member, np.ndarray]:
    """Make the arrays to store. Regions are found in what the model sees: the stored HU, normalised."""
    hu_DHW, label_DHW, intensity = prepared.hu_DHW, prepared.label_DHW, prepared.facts.intensity
    overview_DHW = np.rint(resize_image(hu_DHW, rules.overview_shape)).astype(np.int16)
    arrays = {Member.CT: hu_DHW, Member.OVERVIEW: overview_DHW}
    if label_DHW is not None:
        arrays |= {Member.LABEL: label_DHW, Member.OVERVIEW_LABEL: resize_label(label_DHW, rules.overview_shape)}
    if rules.regions.enabled:
        seen_DHW = normalise(overview_DHW, intensity)
        arrays[Member.REGIONS] = pseudo_regions(seen_DHW, arrays.get(Member.OVERVIEW_LABEL), rules.regions)
    return arrays


def _affine_of_crop(affine: np.ndarray, box: Box) -> np.ndarray:
    shift = np.eye(4)
    shift[:3, 3] = box[:3]
    return affine @ shift


def sample_of(facts: Facts, frames: dict[Member, bytes]) -> Sample:
    """Return the sample of these arrays, encoded as of today; its facts get their hashes and chunks."""
    hashes = {member.value: hashlib.sha256(frame).hexdigest() for member, frame in frames.items()}
    tables = {member.value: chunk_table(frame) for member, frame in frames.items()}
    chunks = {ending: table for ending, table in tables.items() if table is not None}
    text = replace(facts, members=hashes, chunks=chunks, encoding=ENCODING).to_json()
    return Sample(facts.key, {Member.FACTS: text.encode(), **frames})


def _categories_of(
    label_DHW: np.ndarray | None,
    categories: dict[str, list[int]],
    rules: Rules,
    content: str,
    case: Case,
    allow_empty: bool,
) -> dict[str, CategoryFacts]:
    """Measure the categories present. Raises SampleError if no value of the label map is in a category."""
    if label_DHW is None:
        return {}
    bounds = dict(enumerate(ndimage.find_objects(label_DHW), start=1))
    present = {value: slices for value, slices in bounds.items() if slices is not None}
    if allow_empty and not present:
        return {}
    rng = np.random.default_rng(int(content[:16], 16))
    found = {
        name: _measure(label_DHW, values, [present[value] for value in values if value in present], rules.anchors, rng)
        for name, values in sorted(categories.items())
        if any(value in present for value in values)
    }
    if not found:
        values = ", ".join(str(value) for value in sorted(present)[:10])
        raise SampleError(f"{case.label}: none of its values ({values}) is in a category: check categories=FILE")
    unnamed = sorted(present.keys() - {value for values in categories.values() for value in values})
    if unnamed:
        log.debug("%s: %d label values that no category names: %s", case.label, len(unnamed), unnamed)
    return found


def _measure(
    label_DHW: np.ndarray, values: list[int], bounds: list[Any], anchors: int, rng: np.random.Generator
) -> CategoryFacts:
    """Measure one category. `bounds`: the slices around each of its values that is present."""
    low = [min(slices[axis].start for slices in bounds) for axis in range(3)]
    high = [max(slices[axis].stop - 1 for slices in bounds) for axis in range(3)]
    within = box_slices((low[0], low[1], low[2], high[0], high[1], high[2]))
    inside_N3 = np.argwhere(np.isin(label_DHW[within], values)) + low
    drawn = np.sort(rng.choice(len(inside_N3), size=min(anchors, len(inside_N3)), replace=False))
    return CategoryFacts(values=values, voxels=len(inside_N3), box=[*low, *high], anchors=inside_N3[drawn].tolist())
