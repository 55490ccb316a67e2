"""From CT files to masks on their own grids, with an oracle in the model's place."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from ct_files import phantom, write_dicom
from factories import Oracle, RangeOracle, predictor_of, save_untrained, tiny_model
from letters import write_clip

from segvol_pl.__main__ import main
from segvol_pl.config import WRITABLE, Coordinates, Overlaps, Precision, PredictConfig, TextConfig, ZoomConfig
from segvol_pl.errors import ConfigError, PromptError, SampleError, TextError, VolumeError
from segvol_pl.imaging.box import box_slices
from segvol_pl.imaging.dicom_seg import write_dicom_seg
from segvol_pl.imaging.geometry import NativeGrid, Volume
from segvol_pl.imaging.prompts import Prompt
from segvol_pl.imaging.read import read_volume
from segvol_pl.inference.predictor import Predictor, Session, extend_bank, predict
from segvol_pl.inference.prompt_coordinates import check_prompt, into_crop, prompt_of
from segvol_pl.model import SegVol, TextBank

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
    return predictor_of(Oracle(WINDOW))


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
    session = predictor_of(model).open(ct)
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
    predictor_of(model).open(ct).segment(Prompt(points_N3=middle_N3, labels_N=np.array([1, 0])))
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


# ---- several categories ----

MIXED = {"liver": (0.9, 2, 5.0), "spleen": (0.65, 0.9, 5.0), "organs": (0.65, 2, 2.0), "none": (2, 3, 5.0)}
"""Category -> the intensities that the oracle takes for it, and its logit. The spleen is darker than the liver here."""


@pytest.fixture
def session(ct: Path) -> Session:
    volume = read_volume(ct)
    volume.array_DHW[box_slices(SPLEEN)] = 150
    return predictor_of(RangeOracle(WINDOW, MIXED)).open(volume)


def test_several_prompts_are_answered_as_each_alone(ct: Path) -> None:
    model, other = Oracle(WINDOW), Oracle(WINDOW)
    prompts = [Prompt(text="organs"), Prompt(box=SPLEEN), Prompt(box=LIVER)]
    together, alone = predictor_of(model).open(ct), predictor_of(other).open(ct)
    for prompt, mask in zip(prompts, together.segment_each(prompts), strict=True):
        np.testing.assert_array_equal(mask, alone.segment(prompt))
        assert mask.prompt is prompt and mask.probability == pytest.approx(1 / (1 + np.exp(-5)))
    assert model.encoded == other.encoded


def test_masks_that_are_found_in_turns_leave_no_precision_on(ct: Path) -> None:
    """Between two masks, and whichever series ends first, the caller computes as before."""
    predictor = predictor_of(Oracle(WINDOW))
    predictor.precision = Precision.bf16
    prompts = [Prompt(box=LIVER), Prompt(box=SPLEEN)]
    first, second = (predictor.open(ct).segment_each(prompts) for _ in range(2))
    next(first), next(second)
    assert not torch.is_autocast_enabled("cpu")
    assert len([*first, *second]) == 2
    assert not torch.is_autocast_enabled("cpu") and (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32


def test_a_label_map_gives_a_voxel_to_the_most_probable_category(session: Session) -> None:
    labels = session.segment_all(["organs", "liver", "spleen"])
    assert labels.array_DHW.dtype == np.uint8
    np.testing.assert_array_equal(labels.array_DHW == 2, truth(LIVER))
    np.testing.assert_array_equal(labels.array_DHW == 3, truth(SPLEEN))
    organs, liver, spleen = labels.scores
    assert (organs.voxels, organs.found) == (0, truth(LIVER, SPLEEN).sum())
    assert organs.probability == pytest.approx(1 / (1 + np.exp(-2)), abs=1e-3)
    assert (liver.value, liver.voxels) == (2, truth(LIVER).sum()) and spleen.category == "spleen"
    assert liver.millilitres == pytest.approx(liver.voxels * 4.5 / 1000, rel=1e-5)


def test_a_label_map_by_order_gives_a_voxel_to_the_last_category(session: Session) -> None:
    labels = session.segment_all(["liver", "organs"], Overlaps.order)
    np.testing.assert_array_equal(labels.array_DHW, 2 * truth(LIVER, SPLEEN))


def test_without_names_all_categories_of_the_model_are_asked(session: Session) -> None:
    labels = session.segment_all()
    assert [score.category for score in labels.scores] == list(MIXED)
    none = labels.scores[-1]
    assert (none.voxels, none.found, none.probability, none.roi) == (0, 0, 0.0, None)


def test_a_label_map_lies_on_the_grid_of_the_ct_with_its_scores_beside(session: Session, tmp_path: Path) -> None:
    labels = session.segment_all(["liver", "spleen"])
    beside = labels.save(tmp_path / "organs.nii.gz")
    assert beside == tmp_path / "organs.json"
    told = json.loads(beside.read_text())
    assert [(one["category"], one["value"]) for one in told["categories"]] == [("liver", 1), ("spleen", 2)]
    assert told["overlaps"] == "probability" and told["categories"][0]["voxels"] == truth(LIVER).sum()
    saved, source = nib.load(tmp_path / "organs.nii.gz"), nib.load(session.volume.path)
    np.testing.assert_allclose(saved.affine, source.affine, atol=1e-4)
    assert saved.shape == source.shape and saved.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(places(np.asarray(saved.dataobj) == 1, saved.affine), liver_places())


def test_more_categories_than_a_byte_holds(ct: Path, tmp_path: Path) -> None:
    names = [f"part {number}" for number in range(299)]
    model = RangeOracle(WINDOW, {**dict.fromkeys(names, (2, 3, 5.0)), "organs": (0.9, 2, 5.0)})
    labels = predictor_of(model).open(ct).segment_all()
    np.testing.assert_array_equal(labels.array_DHW, 300 * truth(LIVER, SPLEEN).astype(np.uint16))
    labels.save(tmp_path / "parts.nii.gz")
    assert np.unique(np.asarray(nib.load(tmp_path / "parts.nii.gz").dataobj)).tolist() == [0, 300]


# ---- refining ----


def test_a_follow_up_prompt_refines_the_previous_mask(ct: Path) -> None:
    model = Oracle(WINDOW)
    session = predictor_of(model).open(ct)
    first = session.segment(Prompt(text="organ", box=(9, 12, 18, 15, 23, 23)))
    assert first.voxels < truth(LIVER).sum()
    encoded = len(model.seen)
    click = Prompt(points_N3=np.array([[15, 23, 29]]), labels_N=np.array([1]))
    second = session.segment(click, previous=first)
    np.testing.assert_array_equal(second, truth(LIVER))
    assert second.prompt.text == "organ"
    # Text and points: with the mask's box it would be a combination that training does not know.
    assert all(prompt.text == "organ" and prompt.box is None for prompt in model.seen[encoded:])
    third = session.segment(Prompt(points_N3=np.array([[2, 10, 10]]), labels_N=np.array([0])), previous=second)
    assert third.prompt.labels_N is not None and third.prompt.labels_N.tolist() == [1, 0]
    np.testing.assert_array_equal(session.segment(Prompt(box=SPLEEN), previous=truth()), truth(SPLEEN))
    with pytest.raises(PromptError, match=r"previous: the mask has \[1, 2, 3\]"):
        session.segment(Prompt(box=LIVER), previous=np.ones((1, 2, 3), bool))


# ---- prompts in millimetres ----


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "SAR"])
def test_a_box_and_points_in_millimetres_are_those_in_voxels(tmp_path: Path, orientation: str) -> None:
    volume = read_volume(write_ct(tmp_path, orientation))
    low, high = (np.array([-20.0, 13.0, 500.0]) + np.array(LIVER[part])[::-1] * SPACING[::-1] for part in CORNERS)
    for coordinates, sign in ((Coordinates.ras, 1), (Coordinates.lps, -1)):
        corners = np.sort([low * [sign, sign, 1], high * [sign, sign, 1]], axis=0)
        point = [*(low * [sign, sign, 1] + 0.3), 1]
        config = settings(tmp_path, box=corners.ravel().tolist(), points=[point], coordinates=coordinates)
        prompt = prompt_of(config, "liver", volume)
        assert prompt.box == LIVER and prompt.text == "liver" and prompt.points_N3 is not None
        assert prompt.points_N3.tolist() == [list(LIVER[:3])]


CORNERS = (slice(0, 3), slice(3, 6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"box": [-999, 13, 500, 0, 20, 520]}, r"box \[-999.*outside.*spans -20.5 12.2 498.5 to 19.5 78.2 582.5"),
        ({"points": [[0, 0, 0, 1]]}, r"point \[0.0, 0.0, 0.0\] lies outside the CT, which spans.* mm \(ras\)"),
        ({"box": [10, 13, 500, 0, 20, 520]}, "inverted"),
    ],
)
def test_millimetres_that_do_not_fit(tmp_path: Path, ct: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        prompt_of(settings(tmp_path, coordinates=Coordinates.ras, **changes), None, read_volume(ct))


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o027, 0o640)])
def test_masks_are_as_readable_as_other_files(umask: int, expected: int, session: Session, tmp_path: Path) -> None:
    mask, labels = session.segment(Prompt(text="liver")), session.segment_all(["liver"])
    before = os.umask(umask)
    try:
        for ending in WRITABLE:
            mask.save(tmp_path / f"mask{ending}")
        labels.save(tmp_path / "labels.nii.gz")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert len(modes) == len(WRITABLE) + 2 and set(modes.values()) == {expected}


# ---- DICOM SEG ----


def test_a_dicom_seg_refers_to_the_slices_that_the_mask_lies_in(tmp_path: Path) -> None:
    highdicom = pytest.importorskip("highdicom")
    hu, _ = phantom()
    session = predictor_of(Oracle(WINDOW)).open(write_dicom(tmp_path / "ct", hu))
    wanted = session.volume.array_DHW > 60
    mask = session.segment(Prompt(text="liver"))
    out = tmp_path / "liver.dcm"
    mask.save(out)
    read = highdicom.seg.segread(out)
    assert [read.get_segment_description(1).segment_label, read.Modality] == ["liver", "SEG"]
    volume = read.get_volume(combine_segments=True)
    affine = np.diag([-1, -1, 1, 1]) @ volume.affine
    saved = places(volume.array, affine)
    np.testing.assert_allclose(saved, places(mask.array_DHW, session.volume.affine), atol=1e-3)
    assert mask.voxels > 100 and (mask.array_DHW & wanted).sum() == mask.voxels
    np.testing.assert_allclose(sorted(volume.spacing), sorted(session.volume.spacing), atol=1e-4)


def test_a_dicom_seg_of_several_categories(tmp_path: Path) -> None:
    highdicom = pytest.importorskip("highdicom")
    hu, _ = phantom()
    volume = read_volume(write_dicom(tmp_path / "ct", hu))
    label_DHW = np.zeros(volume.array_DHW.shape, np.uint8)
    label_DHW[3:6, 4:8, 5:9], label_DHW[10:12, 4:8, 5:9] = 1, 3
    write_dicom_seg(label_DHW, ["liver", "absent", "a" * 70], volume, tmp_path / "organs.dcm")
    read = highdicom.seg.segread(tmp_path / "organs.dcm")
    assert [segment.segment_label for segment in read.SegmentSequence] == ["liver", "a" * 64]
    found = read.get_volume(combine_segments=True)
    for number, value in ((1, 1), (2, 3)):
        affine = np.diag([-1, -1, 1, 1]) @ found.affine
        saved, want = places(found.array == number, affine), places(label_DHW == value, volume.affine)
        np.testing.assert_allclose(saved, want, atol=1e-3)
    with pytest.raises(VolumeError, match="cannot be empty"):
        write_dicom_seg(np.zeros_like(label_DHW), ["liver"], volume, tmp_path / "empty.dcm")
    assert not (tmp_path / "empty.dcm").exists()


def settings(tmp_path: Path, **changes: object) -> PredictConfig:
    return PredictConfig(checkpoint="none.ckpt", image="none.nii", out=str(tmp_path / "m.nii.gz"), **changes)  # type: ignore[arg-type]


def test_prompt_of_configuration(tmp_path: Path, ct: Path) -> None:
    config = settings(tmp_path, box=[1, 2, 3, 4, 5, 6], points=[[1, 2, 3, 1], [4, 5, 6, 0]])
    prompt = prompt_of(config, "liver", read_volume(ct))
    assert prompt.text == "liver" and prompt.box == (1, 2, 3, 4, 5, 6)
    np.testing.assert_array_equal(prompt.points_N3, [[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(prompt.labels_N, [1, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"box": [4, 0, 0, 1, 5, 5]}, "inverted"),
        ({"points": [[1, 2, 3, 2]]}, "fourth number of each row"),
        ({"points": [[1, 2.5, 3, 1]]}, "2.5 is not a whole number; for millimetres set coordinates=ras"),
    ],
)
def test_wrong_prompts_in_the_configuration(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        check_prompt(settings(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "text: give at least one of text, box, points"),
        ({"text": ["liver", "spleen"], "box": [1, 2, 3, 4, 5, 6]}, "text: several categories.*leave box out"),
        ({"text": ["all"], "previous": "m.nii"}, "text: several categories.*leave previous out"),
        ({"text": ["liver", "liver"]}, "text: names a category twice"),
        ({"box": [1, 2, 3]}, "box: needs 6 numbers"),
    ],
)
def test_configurations_that_contradict_themselves(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, **changes)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("model") / "tiny.ckpt", ["liver", "liver tumour"])


def test_predict_writes_a_mask_on_the_grid_of_the_ct(
    checkpoint: Path, ct: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "liver.nii.gz"
    # An untrained model's probabilities lie about one half: a low threshold finds something.
    config = PredictConfig(str(checkpoint), str(ct), str(out), text=["liver"], zoom=ZoomConfig(threshold=0.01))
    with caplog.at_level(logging.INFO):
        mask = predict(config)
    saved, source = nib.load(out), nib.load(ct)
    assert saved.shape == source.shape and mask.voxels == int(np.asarray(saved.dataobj).sum()) > 0
    assert f"{mask.voxels} voxels" in caplog.text and " ml" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_synonym_asks_for_its_category(ct: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mask is that of its own vector, named by what was asked; text=all takes each category once."""
    bank = TextBank.seeded(["liver", "spleen", "hepar"], 16).rows(["liver", "spleen"], {"hepar": "liver"})
    model = save_untrained(tmp_path / "model.ckpt", ["liver", "spleen"], bank)
    given = ["predict", f"checkpoint={model}", f"image={ct}", "device=cpu", "zoom.threshold=0.01"]
    assert main([*given, f"out={tmp_path / 'one.nii.gz'}", "text=hepar"]) == 0
    assert np.asarray(nib.load(tmp_path / "one.nii.gz").dataobj).any()
    for text, asked in (("[hepar, spleen]", ["hepar", "spleen"]), ("all", ["liver", "spleen"])):
        assert main([*given, f"out={tmp_path / 'many.nii.gz'}", f"text={text}"]) == 0
        told = json.loads((tmp_path / "many.json").read_text())
        assert [one["category"] for one in told["categories"]] == asked
    assert main([*given, f"out={tmp_path / 'none.nii.gz'}", "text=hepr"]) == 1
    assert "nearest: hepar" in capsys.readouterr().err


def test_predict_says_that_nothing_was_found(
    checkpoint: Path, ct: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "liver.nii.gz"
    config = PredictConfig(str(checkpoint), str(ct), str(out), text=["liver"], zoom=ZoomConfig(threshold=0.999))
    mask = predict(config)
    assert mask.voxels == 0 and mask.roi is None and not np.asarray(nib.load(out).dataobj).any()
    assert "zooming out found nothing" in caplog.text


def test_predict_writes_a_label_map_and_scores(checkpoint: Path, ct: Path, tmp_path: Path) -> None:
    out = tmp_path / "organs.nii.gz"
    text = ["text=all", "zoom.threshold=0.01", "overlaps=order", "device=cpu"]
    assert main(["predict", f"checkpoint={checkpoint}", f"image={ct}", f"out={out}", *text]) == 0
    told = json.loads((tmp_path / "organs.json").read_text())
    counts = np.bincount(np.asarray(nib.load(out).dataobj).reshape(-1), minlength=3)
    assert [one["category"] for one in told["categories"]] == ["liver", "liver tumour"]
    assert [one["voxels"] for one in told["categories"]] == counts[1:3].tolist() and counts[2] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["organs.json", "organs.nii.gz"]


def test_predict_refines_a_mask_in_a_file(checkpoint: Path, ct: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.nii.gz", tmp_path / "second.nii.gz"
    given = ["predict", f"checkpoint={checkpoint}", f"image={ct}", "device=cpu", "zoom.threshold=0.01"]
    assert main([*given, f"out={first}", "text=liver"]) == 0
    assert main([*given, f"out={second}", "points=[[12, 17, 23, 1]]", f"previous={first}"]) == 0
    assert np.asarray(nib.load(second).dataobj).any()


# ---- what is wrong is told in one line ----


@pytest.fixture
def say(
    checkpoint: Path, ct: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Exit status and the one line of error of `predict` with other keys than the right ones."""

    def run(**changes: object) -> tuple[int, str]:
        given = {"checkpoint": checkpoint, "image": ct, "out": tmp_path / "mask.nii.gz", "device": "cpu", **changes}
        status = main(["predict", *(f"{key}={value}" for key, value in given.items())])
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("segvol-pl")]
        return status, line

    return run


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"box": [0, 0, 0, 99, 9, 9]}, 1, r"box \[0, 0, 0, 99, 9, 9\] reaches outside the CT, .* 27 43 39"),
        ({"box": [4, 0, 0, 1, 5, 5]}, 1, r"box \[.*\] is inverted"),
        ({"box": [0, 0, 0, 1, 5, 5]}, 1, "lies in the air"),
        ({"points": [[5, 50, 5, 1]]}, 1, r"point \[5, 50, 5\] lies outside the CT"),
        ({"points": [[5, 500, 5, 1]], "coordinates": "lps"}, 1, r"lies outside the CT, which spans .* mm \(lps\)"),
        ({"text": "liver tumor"}, 1, "'liver tumor' is not in the text bank.*nearest: liver tumour.*clip_model=FOLDER"),
        ({"text": "[liver, spline]"}, 1, "'spline' is not in the text bank"),
        ({"text": "spline", "clip_model": "./nowhere"}, 1, r"error: clip_model: cannot load \./nowhere"),
        ({"text": "[liver, liver]"}, 2, "text .*names a category twice"),
        ({"text": "liver", "image": "gone.nii.gz"}, 1, "gone.nii.gz does not exist"),
        ({"text": "liver", "out": "mask.png"}, 1, "out: mask.png must end in one of .nii"),
        ({"text": "liver", "out": "nowhere/mask.nii.gz"}, 1, "out: folder nowhere does not exist"),
        ({"text": "liver", "out": "mask.dcm"}, 1, "out: a DICOM SEG refers to the slices of a DICOM folder"),
        ({"text": "liver", "out": "mask.rtstruct.dcm"}, 1, "out: a DICOM RTSTRUCT refers to the slices of a DICOM"),
        ({"text": "liver", "checkpoint": "gone.ckpt"}, 1, "gone.ckpt: no such checkpoint"),
        ({"text": "liver", "previous": "gone.nii.gz"}, 1, "gone.nii.gz does not exist"),
        ({"text": "liver", "coordinates": "world"}, 2, "'world' is none of voxel, ras, lps"),
        ({}, 2, "text: give at least one of text, box, points"),
    ],
)
def test_predict_refuses_in_one_line_and_writes_nothing(
    say: Callable[..., tuple[int, str]], tmp_path: Path, changes: dict[str, str], status: int, message: str
) -> None:
    got, line = say(**changes)
    assert got == status and re.search(message, line), line
    assert not list(tmp_path.iterdir())


def test_a_4_d_ct_is_refused(say: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    path = tmp_path / "series.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 8, 2), np.int16), np.eye(4)), path)
    status, line = say(image=path, text="liver")
    assert status == 1 and line.startswith(f"segvol-pl predict: error: {path}: a 4-D image: give one 3-D volume")


def test_weights_without_text_are_refused_for_text_alone(say: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    bare = save_untrained(tmp_path / "bare.ckpt", [])
    status, line = say(checkpoint=bare, text="liver")
    assert status == 1 and "this model holds no text bank: import its weights with categories=FILE" in line
    status, line = say(checkpoint=bare, text="all")
    assert status == 1 and "holds no text bank" in line
    box = ["box=[9, 12, 18, 15, 23, 29]", "device=cpu", "zoom.threshold=0.01"]
    image = write_ct(tmp_path, "RAS")
    assert main(["predict", f"checkpoint={bare}", f"image={image}", f"out={tmp_path / 'm.nii.gz'}", *box]) == 0


def test_weights_that_lack_text_tensors_are_named(
    say: Callable[..., tuple[int, str]], checkpoint: Path, tmp_path: Path
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    del content["state_dict"]["model.text_encoder.dim_align.weight"]
    torch.save(content, tmp_path / "torn.ckpt")
    status, line = say(checkpoint=tmp_path / "torn.ckpt", text="liver")
    assert status == 1 and "lacks text_encoder.dim_align.weight" in line


def test_an_mr_is_warned_of(predictor: Predictor, ct: Path, caplog: pytest.LogCaptureFixture) -> None:
    volume = read_volume(ct)
    predictor.open(volume)
    assert "perhaps an MR" not in caplog.text
    signal = Volume((volume.array_DHW + 1000).clip(0), volume.affine, volume.native, volume.path)
    predictor.open(signal)
    assert f"{ct}: values from 0 to 1200, no air: not a CT in Hounsfield units, perhaps an MR" in caplog.text


def test_a_ct_smaller_than_one_window_is_padded() -> None:
    hu_DHW = hounsfield()[8:14, 10:24, 16:30]
    volume = Volume(hu_DHW, np.eye(4), NativeGrid.of(hu_DHW.shape, np.eye(4)), Path("small.nii.gz"))
    mask = predictor_of(Oracle(WINDOW)).open(volume).segment(Prompt(text="organ"))
    np.testing.assert_array_equal(mask, hu_DHW == 200)


def test_names_that_the_bank_lacks_come_from_the_clip_that_made_it(tmp_path: Path) -> None:
    clip = write_clip(tmp_path)
    config = tiny_model(text_dim=32)
    made = TextBank.from_clip(["liver", "hepar"], TextConfig(clip_model=str(clip)))
    model = SegVol(config, made.rows(["liver"], {"hepar": "liver"}))
    extend_bank(model, ["spleen"], str(clip))
    assert model.bank.names == ["liver", "spleen"] and model.bank.synonyms == {"hepar": "liver"}
    assert torch.equal(model.text_encoder.bank_KE[[0, model.bank.index("hepar")]], made.vectors_KE)
    want = TextBank.from_clip(["spleen"], TextConfig(clip_model=str(clip))).vectors_KE[0]
    torch.testing.assert_close(model.text_encoder.bank_KE[1], want)
    other = SegVol(config, TextBank.seeded(["liver"], 32))
    with pytest.raises(TextError, match="did not make this model's text bank"):
        extend_bank(other, ["spleen"], str(clip))


def test_the_readme_s_three_lines(checkpoint: Path, ct: Path) -> None:
    predictor = Predictor.from_checkpoint(checkpoint, device="cpu")
    mask = predictor.open(ct).segment(Prompt(text="liver"))
    assert np.asarray(mask).shape == SHAPE and np.asarray(mask).dtype == bool
