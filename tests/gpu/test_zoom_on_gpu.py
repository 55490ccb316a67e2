"""Zooming on a CUDA device: the CPU's masks, logits that stay there, and a host that is not kept waiting."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from factories import save_untrained

from segvol_pl.config import ZoomConfig
from segvol_pl.imaging.box import box_of, box_slices
from segvol_pl.imaging.intensity import Normalised, intensity_of
from segvol_pl.imaging.prompts import Prompt
from segvol_pl.inference import zoom
from segvol_pl.inference.coarse import CoarseLogits
from segvol_pl.inference.zoom import Zoomer
from segvol_pl.inference.zoom_result import ZoomIn, ZoomResult
from segvol_pl.model import SegVol
from segvol_pl.model.checkpoint import load_model
from segvol_pl.packing.phantom import make_phantom

pytestmark = pytest.mark.gpu

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NEAR = 1e-3
"""Logits of the two devices differ by less; masks therefore only where a logit is this near to the threshold's."""
SAME = ZoomConfig(batch=2, decode_batch=4)


class Boxed(Zoomer):
    """The coarse mask, once decoded, is the prompt's box: an untrained model's would hang on its last digits."""

    def _zoom_out(self, scaled: list[Prompt]) -> list[CoarseLogits]:
        super()._zoom_out(scaled)
        return [self._boxed(prompt) for prompt in scaled]

    def _boxed(self, prompt: Prompt) -> CoarseLogits:
        low_DHW = np.full(self.window_shape, -4, np.float32)
        low_DHW[box_slices(prompt.box or (2, 8, 8, 6, 24, 24))] = 4
        return CoarseLogits(low_DHW, self.image_DHW.shape, nearest=False)


class Unwaiting(Boxed):
    """Raises where the windows' loop waits for the GPU."""

    def _decode_windows(self, group: list[ZoomIn]) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            super()._decode_windows(group)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SegVol:
    loaded = load_model(save_untrained(tmp_path_factory.mktemp("tiny") / "tiny.ckpt", ["liver", "spleen"]))
    assert isinstance(loaded, SegVol)
    return loaded


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def image() -> Normalised:
    phantom = make_phantom(seed=3, scale=0.5)
    return Normalised(phantom.hu_DHW, intensity_of(phantom.hu_DHW))


def prompts_for(shape: tuple[int, ...]) -> list[Prompt]:
    """Text, a box, and points of whose windows each holds another number."""
    d, h, w = shape
    points_N3 = np.random.default_rng(0).integers(0, shape, size=(11, 3))
    points = Prompt(points_N3=points_N3, labels_N=np.arange(11) % 2)
    return [Prompt(text="liver"), Prompt(text="spleen", box=(1, 4, 5, d - 2, h // 2, w - 6)), points]


def answers(
    kind: type[Zoomer], model: SegVol, device: torch.device, image: Normalised, config: ZoomConfig = SAME
) -> list[ZoomResult]:
    zoomer = kind(copy.deepcopy(model).to(device), image, config)
    prompts = prompts_for(image.shape)
    return list(zoomer.zoom_all([zoomer.request(prompt, np.random.default_rng(5)) for prompt in prompts]))


def assert_alike(got: list[ZoomResult], wanted: list[ZoomResult]) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert (one.roi, one.windows) == (other.roi, other.windows) and one.windows > 1
        np.testing.assert_allclose(one.final_DHW, other.final_DHW, rtol=0, atol=NEAR)
        clear_DHW = np.abs(other.final_DHW) > NEAR
        assert clear_DHW.mean() > 0.9
        np.testing.assert_array_equal(one.mask(0.5)[clear_DHW], other.mask(0.5)[clear_DHW])


def test_masks_are_the_cpu_s_but_where_a_logit_is_at_the_threshold(model: SegVol, image: Normalised) -> None:
    got = answers(Boxed, model, GPU, image)
    assert all(one.patch_DHW.device.type == GPU.type for one in got)
    assert_alike(got, answers(Boxed, model, CPU, image))
    for one in got:
        mask_DHW, logits_N = one.found(0.5)
        np.testing.assert_array_equal(logits_N, one.patch_DHW.numpy(force=True)[mask_DHW])


def test_refining_gives_the_cpu_s_mask(model: SegVol, image: Normalised) -> None:
    previous_DHW = np.zeros(image.shape, bool)
    previous_DHW[3:12, 10:40, 8:50] = True
    got, wanted = (
        Zoomer(copy.deepcopy(model).to(device), image, SAME).refine(
            Prompt(text="liver"), previous_DHW, np.random.default_rng(1)
        )
        for device in (GPU, CPU)
    )
    assert_alike([got], [wanted])


def test_zooming_out_gives_the_cpu_s_logits(model: SegVol, image: Normalised) -> None:
    got, wanted = (
        Zoomer(copy.deepcopy(model).to(device), image, SAME).zoom_out(Prompt(text="liver")) for device in (GPU, CPU)
    )
    whole = box_of(np.ones(image.shape, bool))
    np.testing.assert_allclose(got.logits(whole), wanted.logits(whole), rtol=0, atol=NEAR)


@pytest.mark.parametrize("device_gb", [0.5, 1e-5])
def test_between_the_coarse_logits_and_the_masks_the_host_waits_for_nothing(
    device_gb: float, model: SegVol, image: Normalised
) -> None:
    """Nor where tokens go to main memory and come back, since a GPU's share of 10 kB holds none of them."""
    config = ZoomConfig(batch=2, decode_batch=4, device_gb=device_gb)
    answers(Boxed, model, GPU, image, config)  # libraries wait when they are first used
    assert_alike(answers(Unwaiting, model, GPU, image, config), answers(Boxed, model, CPU, image))


def test_without_room_the_sums_go_to_main_memory_and_one_line_says_so(
    model: SegVol, image: Normalised, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert zoom.free_bytes(GPU) > 2**20
    monkeypatch.setattr(zoom, "free_bytes", lambda device: 0.0)
    with caplog.at_level(logging.INFO):
        got = answers(Boxed, model, GPU, image)
    assert all(one.patch_DHW.device.type == "cpu" for one in got)
    assert len([line for line in caplog.messages if "summed in main memory" in line]) == 1
    assert_alike(got, answers(Boxed, model, CPU, image))


def test_a_group_s_prompts_come_whole_and_have_one_shape(model: SegVol) -> None:
    there = copy.deepcopy(model).to(GPU)
    groups = [[prompt] for prompt in prompts_for((20, 60, 60))]
    for group in groups[:2]:
        assert there.prompts([group]).points_BPN3.shape == (1, 1, 8, 3)
    got, wanted = there.prompts(groups), model.prompts(groups)
    assert got.points_BPN3.shape == (3, 1, 16, 3)
    for name, tensor in vars(wanted).items():
        sent = getattr(got, name).cpu()
        assert sent.dtype == tensor.dtype
        assert torch.equal(sent[:, :, :11] if name in ("points_BPN3", "labels_BPN") else sent, tensor)


def test_batches_are_a_gpu_s(model: SegVol, image: Normalised) -> None:
    zoomer = Zoomer(copy.deepcopy(model).to(GPU), image, ZoomConfig())
    assert (zoomer.batch, zoomer.decode_batch) == (8, 16)
