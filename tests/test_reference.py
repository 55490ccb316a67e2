"""The published model against the dense figures of the published code, which stand beside the repository."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published import FULL, SMALL, pseudo_target, reference_image, released_shapes, released_state
from torch import Tensor

import segvol_pl.inference.published_zoom
from segvol_pl.config import SegVolConfig
from segvol_pl.config.loader import load
from segvol_pl.imaging.box import box_slices
from segvol_pl.imaging.intensity import body_box, intensity_of, normalise
from segvol_pl.imaging.prompts import Prompt
from segvol_pl.imaging.read import read_volume
from segvol_pl.imaging.transforms import resize_label
from segvol_pl.inference.coarse import binary
from segvol_pl.inference.zoom import Zoomer, ZoomRequest
from segvol_pl.model import SegVol, TextBank
from segvol_pl.model.checkpoint import BANK
from segvol_pl.model.prompt_encoder import PromptTensors
from segvol_pl.model.released import split_extra, tower_of
from segvol_pl.model.text_encoder import text_tower

TOLERANCE = 1e-4  # of the value range
ZOOM_TOLERANCE = 1e-3
KINDS = ("text", "box", "points", "box_text", "points_text", "box_points")

IDS = {
    "liver": [12639],
    "right kidney": [1155, 14610],
    "spleen": [588, 15940],
    "spinal cord": [23925, 11181],
}
"""CLIP's tokens of the names."""
# "A computerized tomography of a ..." between the landmarks of start and end.
BEFORE, AFTER = [49406, 320, 11639, 704, 7690, 999, 22399, 539, 320], [269, 49407]
ORGANS = ("liver", "spleen", "spinal cord")


def figures_of(shared: Path, name: str) -> dict[str, np.ndarray]:
    return dict(np.load(shared / "reference" / f"{name}.npz", allow_pickle=False))


def build(config: SegVolConfig, names: tuple[str, ...]) -> SegVol:
    """The model with the reference run's weights, its text bank made by their own tower."""
    own, extra = split_extra(released_state(config))
    tower = text_tower(tower_of(extra), Path("reference")).eval()
    with torch.inference_mode():
        rows = [tower(input_ids=torch.tensor([BEFORE + IDS[name] + AFTER])).pooler_output for name in names]
    bank = TextBank(names, torch.cat(rows).clone())
    model = SegVol(config, bank)
    model.load_state_dict({**own, BANK: bank.vectors_KE})
    return model.eval()


@pytest.fixture(scope="module")
def small(shared: Path) -> SegVol:
    return build(SMALL, ("liver", "right kidney", "spleen", "spinal cord"))


@pytest.fixture(scope="module")
def tokens_BTE(small: SegVol) -> Tensor:
    with torch.inference_mode():
        return small.encode(reference_image(SMALL, batch=2))


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.ptp(want))


def prompts_of(figures: dict[str, np.ndarray], kind: str) -> PromptTensors:
    count = len(figures["box"])
    has = {part: torch.full((count, 1), part in kind) for part in ("points", "box", "text")}
    return PromptTensors(
        points_BPN3=torch.from_numpy(figures["points"])[:, None],
        labels_BPN=torch.from_numpy(figures["point_labels"]).long()[:, None],
        boxes_BP6=torch.from_numpy(figures["box"])[:, None],
        text_BP=torch.arange(count)[:, None],
        landmarks_BPM3=torch.zeros(count, 1, 0, 3),
        has_points_BP=has["points"],
        has_box_BP=has["box"],
        has_text_BP=has["text"],
        has_landmarks_BPM=torch.zeros(count, 1, 0, dtype=torch.bool),
    )


def test_the_names_and_shapes_are_the_released_ones(shared: Path) -> None:
    listed = json.loads((shared / "reference" / "state_dict_keys.json").read_text())
    assert {name: list(shape) for name, shape in released_shapes(FULL).items()} == listed


def test_image_tokens_and_text_equal_the_published_ones(small: SegVol, tokens_BTE: Tensor, shared: Path) -> None:
    figures = figures_of(shared, "forward_small")
    assert relative(tokens_BTE[:, ::8, ::16].numpy(), figures["image_tokens"]) < TOLERANCE
    with torch.inference_mode():
        text_KE = small.text_encoder(torch.tensor([0, 1])).numpy()
    assert relative(text_KE, figures["text_embedding"]) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_the_published_ones(kind: str, small: SegVol, tokens_BTE: Tensor, shared: Path) -> None:
    figures = figures_of(shared, "forward_small")
    with torch.inference_mode():
        logits = small.decode(tokens_BTE, prompts_of(figures, kind))[:, :, ::2, ::4, ::4].numpy()
    assert relative(logits, figures[f"logits_{kind}"]) < TOLERANCE


@pytest.mark.slow
def test_the_full_geometry_equals_the_published_one(shared: Path) -> None:
    figures, model = figures_of(shared, "forward_full"), build(FULL, ("liver",))
    with torch.inference_mode():
        tokens_BTE = model.encode(reference_image(FULL, batch=1))
        assert relative(tokens_BTE[:, ::8, ::16].numpy(), figures["image_tokens"]) < TOLERANCE
        assert relative(model.text_encoder(torch.tensor([0])).numpy(), figures["text_embedding"]) < TOLERANCE
        for kind in ("box_text", "points"):
            logits = model.decode(tokens_BTE, prompts_of(figures, kind)).numpy()
            assert relative(logits[:, :, ::4, ::16, ::16], figures[f"logits_{kind}"]) < TOLERANCE
            assert float(logits.std(dtype=np.float64)) == pytest.approx(float(figures[f"std_{kind}"]), rel=1e-4)


@pytest.mark.parametrize("iteration", range(6))
def test_pseudo_label_targets_equal_the_published_ones(iteration: int, shared: Path) -> None:
    packed = figures_of(shared, "losses_small")["pseudo_labels"]
    want = np.unpackbits(packed, axis=-1).astype(bool)[iteration]
    for image in range(2):
        np.testing.assert_array_equal(pseudo_target(iteration, image)[0], want[image])


# ---- zoom-out-zoom-in on the trunk CT ----


@pytest.fixture(scope="module")
def trunk(shared: Path) -> np.ndarray:
    """The body crop, in [0, 1]."""
    volume = read_volume(shared / "ct" / "trunk_ct.nii.gz")
    intensity = intensity_of(volume.array_DHW)
    return normalise(volume.array_DHW[box_slices(body_box(volume.array_DHW, intensity))], intensity)


def test_the_preprocessed_image_is_the_published_one(trunk: np.ndarray, shared: Path) -> None:
    figures = figures_of(shared, "zoom_small")
    assert list(trunk.shape) == figures["image_shape"][1:].tolist()
    np.testing.assert_allclose(trunk[::2, ::4, ::4], figures["image_strided"][0], atol=1e-6)
    assert float(trunk.sum(dtype=np.float64)) == pytest.approx(float(figures["image_sum"]), rel=1e-6)
    np.testing.assert_allclose(resize_label(trunk, SMALL.input_shape), figures["zoom_out_image"][0], atol=1e-6)


def logged(shared: Path, kind: str) -> Iterator[list[tuple[str, np.ndarray]]]:
    """The prompts of each organ in the order in which the published run drew them; the first is the zoom-out's."""
    entries: list[tuple[str, np.ndarray]] = []
    for name, value in figures_of(shared, f"zoom_{kind}_log").items():
        what = name.split("_")[1]
        spatial = "points" if kind == "points_text" else "box"
        # The organ's first prompt is the one just before its region of interest.
        if what == "roi" and len(entries) > 1 and kind != "text":
            last = entries.pop()
            assert last[0] == spatial
            yield entries
            entries = [last]
        entries.append((what, value))
    yield entries


def first_prompt(organ: str, entries: list[tuple[str, np.ndarray]]) -> Prompt:
    what, value = entries[0]
    if what == "box":
        return Prompt(text=organ, box=tuple(int(v) for v in value))  # type: ignore[arg-type]
    if what == "points":
        return Prompt(text=organ, points_N3=value[:, :3].astype(int), labels_N=value[:, 3].astype(int))
    return Prompt(text=organ)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "box_text", "points_text"])
def test_zooming_equals_the_published_one(
    kind: str, small: SegVol, trunk: np.ndarray, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures, config = figures_of(shared, "zoom_small"), published_zoom()
    zoomer = Zoomer(small, trunk, config)
    logs = list(logged(shared, kind)) if kind != "text" else [[("text", np.zeros(0))]] * 3
    for organ, (name, entries) in enumerate(zip(ORGANS, logs, strict=True)):
        drawn = iter([value for what, value in entries[1:] if what == "points" and value[0, 3] == 1])
        monkeypatch.setattr(
            segvol_pl.inference.published_zoom, "sample_points", lambda *_, drawn=drawn, **__: replayed(next(drawn))
        )
        prompt = first_prompt(name, entries)
        result = next(zoomer.zoom_all([ZoomRequest(prompt, prompt, np.random.default_rng(0))]))
        assert next(drawn, None) is None
        want = {part: figures[f"{kind}_{organ}_{part}"] for part in ("zoomout", "logits", "roi", "mask_voxels")}
        assert relative(result.coarse_DHW[::2, ::4, ::4], want["zoomout"]) < ZOOM_TOLERANCE
        assert relative(result.final_DHW[::2, ::4, ::4], want["logits"]) < ZOOM_TOLERANCE
        # The published region may end one voxel beyond the volume; cutting it out ends it there.
        assert result.roi == (*want["roi"][:3], *np.minimum(want["roi"][3:], np.subtract(trunk.shape, 1)))
        voxels = int(binary(result.final_DHW, config.threshold).sum())
        assert voxels == pytest.approx(int(want["mask_voxels"]), rel=1e-3)


def published_zoom() -> Any:
    folder = Path(__file__).resolve().parents[1] / "configs"
    keys = ["checkpoint=x", "image=x", "out=x", "text=x", f"zoom={folder / 'zoom' / 'published.yaml'}"]
    return load("predict", keys).zoom


def replayed(points_N4: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return points_N4[:, :3].astype(np.int64), points_N4[:, 3].astype(np.int64)
