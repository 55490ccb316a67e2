"""From CT files to masks on their own grids, with an oracle in the model's place."""

from __future__ import annotations

import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from oracle import Oracle, save_untrained

from segvol_pl.config import PredictConfig, ZoomConfig
from segvol_pl.data.prompts import Prompt
from segvol_pl.data.sample import SampleError
from segvol_pl.data.transforms import box_slices
from segvol_pl.data.volume import Volume, VolumeError, read_volume
from segvol_pl.model.checkpoint import CheckpointError
from segvol_pl.model.text_encoder import UnknownCategory
from segvol_pl.predict import Predictor, PromptError, into_crop, predict, prompt_of

WINDOW = (8, 16, 16)
SHAPE = (28, 44, 40)
LIVER = (9, 12, 18, 15, 23, 29)
SPLEEN = (12, 26, 6, 16, 31, 11)
BODY = (2, 5, 3, 25, 38, 36)
SPACING = (3.0, 1.5, 1.0)


def hounsfield() -> np.ndarray:
    """Air, a body of noise, and two bright organs, in canonical axes."""
    hu_DHW = np.full(SHAPE, -1000, np.int16)
    body = box_slices(BODY)
    hu_DHW[body] = np.random.default_rng(0).integers(-20, 20, hu_DHW[body].shape)
    for organ in (LIVER, SPLEEN):
        hu_DHW[box_slices(organ)] = 200
    return hu_DHW


def truth(*organs: tuple[int, ...]) -> np.ndarray:
    mask_DHW = np.zeros(SHAPE, bool)
    for organ in organs:
        mask_DHW[box_slices(organ)] = True
    return mask_DHW


def write_ct(folder: Path, orientation: str) -> Path:
    """The CT as NIfTI, its array stored in the given orientation; W, H, D are R, A, S."""
    affine = np.diag([*SPACING[::-1], 1.0])
    affine[:3, 3] = [-20.0, 13.0, 500.0]
    image = nib.Nifti1Image(hounsfield().transpose(2, 1, 0), affine)
    target = nib.orientations.axcodes2ornt(orientation)
    image = image.as_reoriented(nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), target))
    path = folder / f"{orientation}.nii.gz"
    nib.save(image, path)
    return path


def places(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """World coordinates (mm, sorted) of the voxels above zero."""
    world_N3 = nib.affines.apply_affine(affine, np.argwhere(array > 0)).round(3)
    return np.unique(world_N3, axis=0)


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ct(tmp_path_factory.mktemp("ct"), "LPS")


@pytest.fixture
def predictor() -> Predictor:
    return Predictor(Oracle(WINDOW))


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "LAS", "SAR", "PIR", "ILA"])
@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd"])
def test_the_saved_mask_lies_where_the_organ_lies(
    predictor: Predictor, tmp_path: Path, orientation: str, ending: str
) -> None:
    path = write_ct(tmp_path, orientation)
    mask = predictor.open(path).segment(Prompt(box=LIVER))
    np.testing.assert_array_equal(mask, truth(LIVER))
    out = tmp_path / f"mask{ending}"
    mask.save(out)
    source = nib.load(path)
    if ending == ".nii.gz":
        saved = nib.load(out)
        assert saved.shape == source.shape and saved.get_data_dtype() == np.uint8
        np.testing.assert_allclose(saved.affine, source.affine, atol=1e-4)
        wanted = np.asarray(source.dataobj) == 200
        np.testing.assert_array_equal(places(np.asarray(saved.dataobj), saved.affine), liver_places())
        assert not (np.asarray(saved.dataobj).astype(bool) & ~wanted).any()
    else:
        saved = read_volume(out)
        np.testing.assert_array_equal(saved.array_DHW, truth(LIVER))
        np.testing.assert_allclose(saved.affine, mask.volume.affine, atol=1e-4)
    assert mask.native().shape == source.shape[::-1] and mask.native().sum() == mask.voxels


def liver_places() -> np.ndarray:
    affine = np.zeros((4, 4))
    affine[[2, 1, 0], [0, 1, 2]] = SPACING
    affine[:, 3] = [-20.0, 13.0, 500.0, 1.0]
    return places(truth(LIVER), affine)


def test_many_prompts_encode_the_overview_once(ct: Path) -> None:
    model = Oracle(WINDOW)
    session = Predictor(model).open(ct)
    assert model.encoded == 1
    text = session.segment(Prompt(text="organs"))
    boxed = session.segment(Prompt(box=SPLEEN))
    encoded = model.encoded
    np.testing.assert_array_equal(text.array_DHW, truth(LIVER, SPLEEN))
    np.testing.assert_array_equal(boxed.array_DHW, truth(SPLEEN))
    again = session.segment(Prompt(text="organs"))
    np.testing.assert_array_equal(again, text)
    assert model.encoded == encoded


def test_a_mask_measures_itself(predictor: Predictor, ct: Path) -> None:
    mask = predictor.open(ct).segment(Prompt(box=LIVER))
    assert mask.voxels == truth(LIVER).sum()
    assert mask.millilitres == pytest.approx(mask.voxels * 4.5 / 1000, rel=1e-5)
    assert mask.roi is not None
    assert all(low <= organ for low, organ in zip(mask.roi[:3], LIVER[:3], strict=True))
    assert all(high >= organ for high, organ in zip(mask.roi[3:], LIVER[3:], strict=True))
    assert np.asarray(mask, dtype=np.uint8).sum() == mask.voxels


def test_a_volume_that_is_already_read_can_be_opened(predictor: Predictor, ct: Path) -> None:
    mask = predictor.open(read_volume(ct)).segment(Prompt(box=LIVER))
    np.testing.assert_array_equal(mask, truth(LIVER))


def test_points_prompt(ct: Path) -> None:
    model = Oracle(WINDOW)
    middle_N3 = np.array([[12, 17, 23], [0, 0, 0]])
    Predictor(model).open(ct).segment(Prompt(points_N3=middle_N3, labels_N=np.array([1, 0])))
    shrunk = model.seen[0]
    assert shrunk.points_N3 is not None and shrunk.labels_N is not None
    np.testing.assert_array_equal(shrunk.labels_N, [1])  # the other lies in the air
    extent = np.array(BODY[3:]) - BODY[:3] + 1
    np.testing.assert_array_equal(
        shrunk.points_N3[0], np.floor((middle_N3[0] - BODY[:3] + 0.5) * np.array(WINDOW) / extent).astype(int)
    )


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt(box=(0, 0, 0, 28, 10, 10)), r"box \[0, 0, 0, 28, 10, 10\] reaches outside.*27 43 39"),
        (Prompt(box=(-1, 0, 0, 8, 10, 10)), "reaches outside"),
        (Prompt(box=(0, 0, 0, 1, 10, 10)), "lies in the air"),
        (Prompt(points_N3=np.array([[5, 50, 5]]), labels_N=np.array([1])), r"point \[5, 50, 5\] lies outside"),
        (Prompt(points_N3=np.array([[0, 0, 0]]), labels_N=np.array([1])), "none with label 1 lies inside the body"),
        (Prompt(points_N3=np.array([[9, 12, 18]]), labels_N=np.array([0])), "none with label 1"),
    ],
)
def test_prompts_that_do_not_fit_the_ct(predictor: Predictor, ct: Path, prompt: Prompt, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        predictor.open(ct).segment(prompt)


def test_a_box_is_clipped_to_the_body() -> None:
    assert into_crop(Prompt(box=(0, 6, 3, 27, 8, 39)), SHAPE, BODY).box == (0, 1, 0, 23, 3, 33)


def test_a_constant_volume_is_refused_by_name(predictor: Predictor, ct: Path) -> None:
    volume = read_volume(ct)
    flat = Volume(np.full_like(volume.array_DHW, 40), volume.affine, volume.native, volume.path)
    with pytest.raises(SampleError, match=r"LPS\.nii\.gz: the volume is constant"):
        predictor.open(flat)


def settings(tmp_path: Path, **changes: object) -> PredictConfig:
    return PredictConfig(checkpoint="none.ckpt", image="none.nii", out=str(tmp_path / "m.nii.gz"), **changes)  # type: ignore[arg-type]


def test_prompt_of_configuration(tmp_path: Path) -> None:
    prompt = prompt_of(settings(tmp_path, text="liver", box=[1, 2, 3, 4, 5, 6], points=[[1, 2, 3, 1], [4, 5, 6, 0]]))
    assert prompt.text == "liver" and prompt.box == (1, 2, 3, 4, 5, 6)
    np.testing.assert_array_equal(prompt.points_N3, [[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(prompt.labels_N, [1, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"box": [4, 0, 0, 1, 5, 5]}, "inverted"), ({"points": [[1, 2, 3, 2]]}, "label of each row")],
)
def test_wrong_prompts_in_the_configuration(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        prompt_of(settings(tmp_path, **changes))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("model") / "tiny.ckpt", ["liver", "liver tumour"])


def test_predict_writes_a_mask_on_the_grid_of_the_ct(
    checkpoint: Path, ct: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "liver.nii.gz"
    # An untrained model's probabilities lie about one half: a low threshold finds something.
    config = PredictConfig(str(checkpoint), str(ct), str(out), text="liver", zoom=ZoomConfig(threshold=0.01))
    with caplog.at_level(logging.INFO):
        mask = predict(config)
    saved, source = nib.load(out), nib.load(ct)
    assert saved.shape == source.shape and mask.voxels == int(np.asarray(saved.dataobj).sum()) > 0
    assert f"{mask.voxels} voxels" in caplog.text and " ml" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_predict_says_that_nothing_was_found(
    checkpoint: Path, ct: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "liver.nii.gz"
    config = PredictConfig(str(checkpoint), str(ct), str(out), text="liver", zoom=ZoomConfig(threshold=0.999))
    mask = predict(config)
    assert mask.voxels == 0 and mask.roi is None and not np.asarray(nib.load(out).dataobj).any()
    assert "zooming out found nothing" in caplog.text


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"text": "liver tumor"}, UnknownCategory, "'liver tumor'.*nearest: liver tumour"),
        ({"text": "liver", "image": "gone.nii.gz"}, VolumeError, "gone.nii.gz does not exist"),
        ({"text": "liver", "out": "mask.png"}, VolumeError, "out: mask.png must end in one of .nii"),
        ({"text": "liver", "out": "nowhere/mask.nii.gz"}, VolumeError, "out: there is no folder nowhere"),
        ({"text": "liver", "checkpoint": "gone.ckpt"}, CheckpointError, "gone.ckpt: no such checkpoint"),
        ({"box": [0, 0, 0, 99, 9, 9]}, PromptError, "reaches outside the CT"),
    ],
)
def test_predict_refuses_in_one_line_and_writes_nothing(
    checkpoint: Path, ct: Path, tmp_path: Path, changes: dict[str, str], error: type[ValueError], message: str
) -> None:
    given = {"checkpoint": str(checkpoint), "image": str(ct), "out": str(tmp_path / "mask.nii.gz"), **changes}
    with pytest.raises(error, match=message) as raised:
        predict(PredictConfig(**given))  # type: ignore[arg-type]
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


def test_the_readme_s_three_lines(checkpoint: Path, ct: Path) -> None:
    predictor = Predictor.from_checkpoint(checkpoint, device="cpu")
    mask = predictor.open(ct).segment(Prompt(text="liver"))
    assert np.asarray(mask).shape == SHAPE and np.asarray(mask).dtype == bool
