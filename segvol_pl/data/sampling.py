"""One training sample of a volume, drawn with the sample's own rng.

1. `sample_crop`: the complete volume (overview) or a window at native resolution, with its label map and regions.
2. `augment`: flips, scale and shift of the intensity.
3. `segment_sample`: categories with their masks and prompts, pseudo-label prompts (paper Algorithm 1).
   `simmim_sample`: the tokens to hide (paper Sec. 2.2).

Samples are packed for transfer, see `batch`.

The training step draws nothing, so the same batch gives the same loss on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from segvol_pl.config import Balance, DataConfig, PromptConfig, SegVolConfig
from segvol_pl.data.batch import packed, shade_of
from segvol_pl.data.coarse_masks import simulated_coarse
from segvol_pl.data.collate import Arrays
from segvol_pl.data.frames import Slices
from segvol_pl.data.schema import Facts, Member
from segvol_pl.imaging import transforms
from segvol_pl.imaging.box import Box, middle_slice, slice_box
from segvol_pl.imaging.intensity import Intensity, normalise
from segvol_pl.imaging.masks import BoxedMask, LabelMap
from segvol_pl.imaging.prompts import ABSENT, gathered_landmarks, jitter_box, sample_landmarks, sample_points

Read = Callable[[Mapping[Member, Slices]], dict[Member, np.ndarray]]
"""Returns a slice of each named array of the sample. A draw names all that it needs in one call: from a URL they are
then read together."""

ALL = slice(None)

GRID_OVERLAP = 0.5
"""Overlap of neighbouring windows on the grid, the default of `zoom.overlap`."""

BYTE = 255
"""A coarse mask's probability of 1, in a sample."""

PSEUDO_EXTRA_POSITIVE = (4, 10)
MERGE_INSIDE = 0.9
"""A pseudo-label box includes every region of which more than this share lies in it (published code)."""


Weights = Mapping[str, float]
"""Category -> its relative chance to be drawn, see `category_weights`."""


def category_weights(counts: Mapping[str, float], balance: Balance) -> Weights | None:
    """The chance of each category by `prompts.balance`; None: the same for all.

    counts: category -> number of training volumes that hold it.
    """
    power = {Balance.none: 0.0, Balance.sqrt: -0.5, Balance.inverse: -1.0}[balance]
    return {name: count**power for name, count in counts.items()} if power else None


@dataclass(frozen=True)
class MaskPrompt:
    """One mask of a sample, with its prompts."""

    mask: BoxedMask
    arrays: Arrays
    """All that `_stack` stacks besides."""

    def with_arrays(self, **added: np.ndarray) -> MaskPrompt:
        """Return it with further arrays."""
        return MaskPrompt(self.mask, {**self.arrays, **added})


@dataclass(frozen=True)
class Crop:
    """One training image, with its label map and pseudo-label regions on the same grid, if there are any."""

    image_DHW: np.ndarray
    """int16 HU, or float32 in [0, 1] if an overview had to be resized."""
    intensity: Intensity | None
    """How to make an image of the HU; None if `image_DHW` is an image already."""
    label_DHW: np.ndarray | None
    regions_DHW: np.ndarray | None
    category: str | None = None
    """The category that the window was drawn around; None for overviews and unlabelled volumes."""
    scale: float = 1.0
    shift: float = transforms.NO_SHIFT
    """The image is multiplied by `scale`, then `shift` is added."""
    step_3: tuple[float, ...] | None = None
    """Voxels of a window per voxel of the overview along (d, h, w), at least 1; None for overviews."""


def sample_crop(
    facts: Facts,
    read: Read,
    model: SegVolConfig,
    data: DataConfig,
    rng: np.random.Generator,
    weights: Weights | None = None,
) -> Crop:
    """The overview with probability `data.overview_fraction`, else a window at native resolution.

    weights: of the category that a window is drawn around; None: the same for all.
    """
    overview = rng.random() < data.overview_fraction
    view = _overview(facts, read, model) if overview else _window(facts, read, model, data.grid_fraction, rng, weights)
    return augment(view, data, rng)


def _overview(facts: Facts, read: Read, model: SegVolConfig) -> Crop:
    held = read(_wanted(facts, Member.OVERVIEW, Member.OVERVIEW_LABEL, ALL))
    hu_DHW = held[Member.OVERVIEW]
    fits = hu_DHW.shape == tuple(model.input_shape)
    return Crop(
        image_DHW=hu_DHW if fits else _resized(hu_DHW, facts.intensity, model.input_shape),
        intensity=facts.intensity if fits else None,
        label_DHW=_fit_label(held[Member.OVERVIEW_LABEL], model.input_shape) if facts.labelled else None,
        regions_DHW=_fit_label(held[Member.REGIONS], model.input_shape) if has_regions(facts) else None,
    )


def _wanted(facts: Facts, hu: Member, label: Member, slices: Slices) -> dict[Member, Slices]:
    """Name what a crop needs: a slice of the HU and of the label map, and all regions, of those that there are."""
    wanted = {hu: slices}
    if facts.labelled:
        wanted[label] = slices
    if has_regions(facts):
        wanted[Member.REGIONS] = ALL
    return wanted


def _resized(hu_DHW: np.ndarray, intensity: Intensity, shape: Sequence[int]) -> np.ndarray:
    return transforms.resize_image(normalise(hu_DHW, intensity), shape)


def _fit_label(label_DHW: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    return label_DHW if label_DHW.shape == tuple(shape) else transforms.resize_label(label_DHW, shape)


def has_regions(facts: Facts) -> bool:
    """Whether the volume was packed with pseudo-label regions."""
    return Member.REGIONS.value in facts.members


def _window(
    facts: Facts,
    read: Read,
    model: SegVolConfig,
    grid_fraction: float,
    rng: np.random.Generator,
    weights: Weights | None,
) -> Crop:
    window = model.input_shape
    category = _centre(sorted(facts.categories), weights, rng)
    # No number is drawn for a share of 0, so that samples are those of a run without it.
    on_grid = grid_fraction > 0 and rng.random() < grid_fraction
    start = (_grid_start if on_grid else window_start)(facts, category, window, rng)
    held = read(_wanted(facts, Member.CT, Member.LABEL, transforms.window_slices(start, window, facts.shape)))
    return Crop(
        image_DHW=transforms.padded(held[Member.CT], window, facts.intensity.minimum),
        intensity=facts.intensity,
        label_DHW=transforms.padded(held[Member.LABEL], window) if facts.labelled else None,
        regions_DHW=_window_regions(facts, held[Member.REGIONS], start, window) if has_regions(facts) else None,
        category=category,
        step_3=overview_step(facts, window),
    )


def _centre(names: list[str], weights: Weights | None, rng: np.random.Generator) -> str | None:
    """The category to draw a window around; None if there is none."""
    if not names:
        return None
    return names[rng.integers(len(names))] if weights is None else _permuted(names, weights, rng)[0]


def _permuted(names: list[str], weights: Weights | None, rng: np.random.Generator) -> list[str]:
    """The names in random order: those of greater weight rather come first."""
    if weights is None:
        return [str(name) for name in rng.permutation(names)]
    chances = np.array([weights[name] for name in names])
    return [str(name) for name in rng.choice(names, len(names), replace=False, p=chances / chances.sum())]


def overview_step(facts: Facts, window: Sequence[int]) -> tuple[float, ...]:
    """Voxels of a window per voxel of the overview along (d, h, w), at least 1."""
    return tuple(max(full / size, 1.0) for full, size in zip(facts.shape, window, strict=True))


def window_start(
    facts: Facts, category: str | None, window: Sequence[int], rng: np.random.Generator
) -> tuple[int, int, int]:
    """A window that holds an anchor voxel of the category anywhere in its middle two thirds."""
    centre = _anchor(facts, category, rng)
    if category is not None:
        centre = centre + np.rint(rng.uniform(-1 / 3, 1 / 3, size=3) * window).astype(int)
    return transforms.window_around(list(centre), window, facts.shape)


def _anchor(facts: Facts, category: str | None, rng: np.random.Generator) -> np.ndarray:
    """A voxel (d, h, w) of the category, or any voxel."""
    if category is None:
        return rng.integers(facts.shape)
    anchors = facts.categories[category].anchors
    return np.array(anchors[rng.integers(len(anchors))])


def _grid_start(
    facts: Facts, category: str | None, window: Sequence[int], rng: np.random.Generator
) -> tuple[int, int, int]:
    """A window of zooming in's grid, of those that hold an anchor voxel of the category."""
    starts = []
    for at, size, extent in zip(_anchor(facts, category, rng), window, facts.shape, strict=True):
        axis = transforms.grid_starts(0, extent, size, GRID_OVERLAP)
        starts.append(int(rng.choice([start for start in axis if start <= at < start + size])))
    return starts[0], starts[1], starts[2]


def _window_regions(facts: Facts, regions_DHW: np.ndarray, start: Sequence[int], window: Sequence[int]) -> np.ndarray:
    """The overview's regions in the window, by nearest neighbour; 0 outside the volume."""
    indices = [
        transforms.nearest_index(coarse, full)[first : first + size]
        for coarse, full, first, size in zip(regions_DHW.shape, facts.shape, start, window, strict=True)
    ]
    # Axis by axis: many times faster than one look-up with three indices.
    for axis, taken in enumerate(indices):
        regions_DHW = regions_DHW.take(taken, axis)
    return transforms.padded(regions_DHW, window)


def augment(view: Crop, data: DataConfig, rng: np.random.Generator) -> Crop:
    """The published flips, the same for image, label and regions, and intensity scale and shift."""
    arrays = {name: array for name, array in vars(view).items() if isinstance(array, np.ndarray)}
    flipped = transforms.flip(arrays, data.flip, rng)
    scale, shift = transforms.sample_intensity(data.intensity, rng)
    return replace(
        view,
        image_DHW=flipped["image_DHW"],
        label_DHW=flipped.get("label_DHW"),
        regions_DHW=flipped.get("regions_DHW"),
        scale=scale,
        shift=shift,
    )


def image_of(view: Crop) -> Arrays:
    """hu_CDHW int16 and shade_4 float32, from which the device makes the image; or image_CDHW float32, the image."""
    if view.intensity is None:
        return {"image_CDHW": (view.image_DHW * np.float32(view.scale) + np.float32(view.shift))[None]}
    return {"hu_CDHW": view.image_DHW[None], "shade_4": shade_of(view.intensity, view.scale, view.shift)}


def simmim_sample(view: Crop, model: SegVolConfig, mask_ratio: float, rng: np.random.Generator) -> Arrays:
    """The image, see `image_of`, and mask_T: exactly `mask_ratio` of the tokens, drawn without replacement."""
    tokens = int(np.prod(model.grid))
    mask_T = np.zeros(tokens, dtype=bool)
    mask_T[rng.permutation(tokens)[: round(mask_ratio * tokens)]] = True
    return {**image_of(view), "mask_T": mask_T}


def segment_sample(
    view: Crop,
    facts: Facts,
    row_of: dict[str, int],
    config: PromptConfig,
    model: SegVolConfig,
    rng: np.random.Generator,
    weights: Weights | None = None,
    labelled: Collection[str] = (),
    synonym_rows: Mapping[str, Sequence[int]] | None = None,
) -> Arrays:
    """The image, with masks and prompts of its categories and of its pseudo-labels.

    Args:
        view: what the sample shows.
        facts: of its volume.
        row_of: category -> row of the text bank.
        config: how many prompts and points to draw.
        model: which landmarks it has, and whether it takes masks.
        rng: the sample's own.
        weights: relative chances of categories to be drawn; None: the same for all.
        labelled: categories that the volume's folder labels, for `prompts.absent`.
        synonym_rows: category -> rows of its synonyms. The text of such a category is drawn among its row and these,
            after all else, so that the rest of the sample is the same without synonyms. Nothing is drawn for others.

    Returns:
        The image, see `image_of`. Of the categories: bits_JDHW uint8, their packed masks; category_K (row of the text
        bank), points_KN3, labels_KN, boxes_K6, valid_K; landmarks_KM3 if the model has landmarks; combination_KC
        int64 if combinations are drawn; coarse_KDHW uint8 and has_coarse_K if the model takes masks; corrected_K and
        chance_KR3 if there are corrections, see `training.corrections`. Of the pseudo-labels: masks, category, points,
        labels, boxes and valid, under names with the prefix `pseudo_`. valid is 0 in a crop without any category, or
        without any region; such a mask adds nothing to the loss.
    """
    drawn = _draw_categories(view, facts, config, rng, weights, labelled)
    categories = [_draw_prompt(each, row_of, config, model.landmark_counts, rng) for each in drawn]
    if config.per_category:
        categories = [each.with_arrays(combination_C=_draw_combinations(each, config, rng)) for each in categories]
    if model.mask_prompt:
        categories = [each.with_arrays(**_draw_coarse(each, view, config, model, rng)) for each in categories]
    pseudo = _draw_pseudos(view, config, rng)
    # Last, so that all else is the same without corrections.
    if config.corrections:
        categories = [each.with_arrays(**_draw_corrections(config, rng)) for each in categories]
    if synonym_rows:
        named = zip(drawn, categories, strict=True)
        categories = [_draw_name(each, synonym_rows.get(name, ()), rng) for (name, _), each in named]
    return {
        **image_of(view),
        **_stack(categories, ""),
        **_stack(pseudo, "pseudo_"),
    }


def _draw_categories(
    view: Crop,
    facts: Facts,
    config: PromptConfig,
    rng: np.random.Generator,
    weights: Weights | None,
    labelled: Collection[str],
) -> list[tuple[str, BoxedMask]]:
    """Names and masks of categories in the crop, and of absent ones, whose masks are empty.

    First comes the category that the crop was drawn around; none comes twice before all came once. A crop that shows
    none has nameless empty masks, or absent categories.
    """
    assert view.label_DHW is not None
    count = config.categories_per_volume
    labels = LabelMap(view.label_DHW)
    shown = [name for name in sorted(facts.categories) if labels.holds(facts.categories[name].values)]
    lacking = sorted(set(labelled) - set(facts.categories)) if config.absent else []
    if not shown:
        return [(name, BoxedMask.empty(labels.shape)) for name in _mixed([""] * count, lacking, config.absent, rng)]
    order = sorted(_permuted(shown, weights, rng), key=lambda name: name != view.category)
    repeats = -(-count // len(order))
    chosen = (order * repeats)[:count]
    chosen = _mixed(chosen, sorted(set(facts.categories) - set(shown)), config.absent_fraction, rng)
    chosen = _mixed(chosen, lacking, config.absent, rng)
    masks = {name: labels.mask(facts.categories[name].values) for name in chosen if name in facts.categories}
    return [(name, masks.get(name, BoxedMask.empty(labels.shape))) for name in chosen]


def _mixed(names: list[str], others: list[str], share: float, rng: np.random.Generator) -> list[str]:
    """The names, a share of which is replaced by others. No number is drawn for a share of 0, or without others."""
    if not others or not share:
        return names
    return [str(rng.choice(others)) if rng.random() < share else name for name in names]


def _draw_prompt(
    drawn: tuple[str, BoxedMask],
    row_of: dict[str, int],
    config: PromptConfig,
    marked: dict[str, int],
    rng: np.random.Generator,
) -> MaskPrompt:
    name, mask = drawn
    positive = 1 + int(rng.integers(config.extra_positive + 1))
    negative = int(rng.integers(config.extra_negative + 1))
    box = None
    if mask.box is not None and config.slice_boxes and rng.random() < config.slice_boxes:
        box = _drawn_on_a_slice(mask.box, mask.inside_DHW)
    prompted = _prompted(mask, row_of.get(name, 0), config, rng, positive, negative, box)
    if marked:
        mask_DHW = mask.complete()
        landmarks = {kind: sample_landmarks(kind, mask_DHW, rng) for kind in marked} if mask.box else {}
        prompted = prompted.with_arrays(landmarks_M3=gathered_landmarks(landmarks, marked))
    # An absent category has a name and an empty mask, which is what to segment.
    return prompted.with_arrays(valid=np.array(name != ""))


def _drawn_on_a_slice(box: Box, inside_DHW: np.ndarray) -> Box:
    """The box that is drawn on the middle one of the slices that the crop shows of a category. inside: of its box."""
    (d, h, w), at = box[:3], slice_box(inside_DHW, middle_slice(inside_DHW))
    return d + at[0], h + at[1], w + at[2], d + at[3], h + at[4], w + at[5]


def _draw_combinations(prompted: MaskPrompt, config: PromptConfig, rng: np.random.Generator) -> np.ndarray:
    """Indices of the combinations of one category, int64 (C,); of an absent one that of text."""
    if prompted.arrays["valid"] and prompted.mask.box is None:
        return np.full(config.per_category, config.combinations.index("text"))
    return rng.permutation(len(config.combinations))[: config.per_category]


def _draw_coarse(
    prompted: MaskPrompt, view: Crop, config: PromptConfig, model: SegVolConfig, rng: np.random.Generator
) -> Arrays:
    """A simulated coarse mask, which comes with `mask_fraction` of the prompts in windows; else zeros."""
    if view.step_3 is None or not prompted.arrays["valid"] or rng.random() >= config.mask_fraction:
        return {"coarse_DHW": np.zeros(model.mask_shape, np.uint8), "has_coarse": np.array(False)}
    likely_DHW = simulated_coarse(prompted.mask.complete(), view.step_3, model.mask_shape, rng)
    return {"coarse_DHW": np.rint(likely_DHW * BYTE).astype(np.uint8), "has_coarse": np.array(True)}


def _draw_corrections(config: PromptConfig, rng: np.random.Generator) -> Arrays:
    """Which of a category's prompts to correct, and the random numbers of each round."""
    combinations = config.per_category or len(config.combinations)
    chance_R3 = rng.random((config.corrections, 3), dtype=np.float32)
    return {"corrected": np.array(rng.integers(combinations)), "chance_R3": chance_R3}


def _draw_name(prompted: MaskPrompt, others: Sequence[int], rng: np.random.Generator) -> MaskPrompt:
    """A category's prompts with its own row of the text bank or another one, each with the same chance."""
    if not others:
        return prompted
    rows = [int(prompted.arrays["category"]), *others]
    return prompted.with_arrays(category=np.array(rows[rng.integers(len(rows))], dtype=np.int64))


def _prompted(
    mask: BoxedMask,
    row: int,
    config: PromptConfig,
    rng: np.random.Generator,
    positive: int,
    negative: int,
    box: Box | None = None,
) -> MaskPrompt:
    """A mask with points and a box (`box`, or its own). An empty mask gets neither and is not valid."""
    width = 1 + config.extra_positive + config.extra_negative
    points_N3, labels_N = np.zeros((width, 3), dtype=np.int64), np.full(width, ABSENT, dtype=np.int64)
    if mask.box is not None:
        drawn_N3, drawn_N = sample_points(mask, rng, positive, negative)
        points_N3[: len(drawn_N)], labels_N[: len(drawn_N)] = drawn_N3, drawn_N
        box = jitter_box(box or mask.box, mask.shape, config.box_jitter, rng)
    arrays = {
        "category": np.array(row, dtype=np.int64),
        "points_N3": points_N3,
        "labels_N": labels_N,
        "boxes_6": np.array(box or (0,) * 6, dtype=np.int64),
        "valid": np.array(mask.box is not None),
    }
    return MaskPrompt(mask, arrays)


def _draw_pseudos(view: Crop, config: PromptConfig, rng: np.random.Generator) -> list[MaskPrompt]:
    if config.pseudo_per_volume == 0:
        return []
    assert view.regions_DHW is not None
    regions = LabelMap(view.regions_DHW)
    return [_draw_pseudo(regions, index, config, rng) for index in range(config.pseudo_per_volume)]


def _draw_pseudo(regions: LabelMap, index: int, config: PromptConfig, rng: np.random.Generator) -> MaskPrompt:
    """A pseudo-label with its prompt: points for even indices, a box for odd ones (published order).

    The box is that of one region, as published; regions merged into its mask may reach a little beyond it.
    """
    ids = np.flatnonzero(regions.counts[1:]) + 1
    if ids.size == 0:
        return _prompted(BoxedMask.empty(regions.shape), 0, config, rng, 0, 0)
    mask = regions.mask([int(rng.choice(ids))])
    box = mask.box
    if index % 2 == 1:
        assert box is not None
        mask = merged_inside(regions, box)
    positive = 1 + min(int(rng.integers(*PSEUDO_EXTRA_POSITIVE, endpoint=True)), config.extra_positive)
    negative = int(rng.integers(config.extra_negative + 1))
    return _prompted(mask, 0, config, rng, positive, negative, box)


def merged_inside(regions: LabelMap, box: Box) -> BoxedMask:
    """All regions that lie almost completely in the box, as one mask."""
    return regions.mask(regions.mostly_in(box, MERGE_INSIDE))


def _stack(parts: list[MaskPrompt], prefix: str) -> Arrays:
    """Stack arrays along a new first axis: category becomes category_K. Masks become bits_JDHW."""
    if not parts:
        return {}
    stacked = {
        prefix + lettered(name, "K"): np.stack([part.arrays[name] for part in parts]) for name in parts[0].arrays
    }
    return {prefix + "bits_JDHW": packed([part.mask for part in parts]), **stacked}


def lettered(name: str, letter: str) -> str:
    """The name of an array with one more axis in front: points_N3 -> points_KN3, valid -> valid_K."""
    stem, _, letters = name.rpartition("_")
    return f"{stem}_{letter}{letters}" if stem and (letters[0].isupper() or letters.isdigit()) else f"{name}_{letter}"


def sample_simmim(
    facts: Facts, read: Read, rng: np.random.Generator, *, model: SegVolConfig, data: DataConfig, mask_ratio: float
) -> Arrays:
    """A pre-training sample of a volume, see `simmim_sample`."""
    return simmim_sample(sample_crop(facts, read, model, data, rng), model, mask_ratio, rng)


def sample_segmentation(
    facts: Facts,
    read: Read,
    rng: np.random.Generator,
    *,
    model: SegVolConfig,
    data: DataConfig,
    prompts: PromptConfig,
    row_of: dict[str, int],
    weights: Weights | None = None,
    labelled_by: Mapping[str, Collection[str]] | None = None,
    synonym_rows: Mapping[str, Sequence[int]] | None = None,
) -> Arrays:
    """A supervised sample of a volume, see `segment_sample`. labelled_by: data set -> the categories that it labels."""
    crop = sample_crop(facts, read, model, data, rng, weights)
    labelled = (labelled_by or {}).get(facts.dataset, ())
    return segment_sample(crop, facts, row_of, prompts, model, rng, weights, labelled, synonym_rows)
