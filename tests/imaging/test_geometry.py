"""There and back: a mask lies, to the voxel, where the structure lies in the file, however that lies in the world."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from ct_files import phantom, write_dicom
from factories import Oracle, predictor_of

from segvol_pl.config import Coordinates, PredictConfig, ZoomConfig
from segvol_pl.imaging.prompts import Prompt
from segvol_pl.imaging.read import read_label, read_volume
from segvol_pl.inference.prompt_coordinates import prompt_of

WINDOW = (8, 16, 16)
SHAPE = (14, 22, 11)
"""Voxels along x, y, z of the unturned file: all different."""
# The organ has a part that the overview is too coarse for.
EVERYWHERE = ZoomConfig(reach=100.0)
ORGAN, BODY = 200, 0

LETTERS = ("RL", "AP", "SI")
ORIENTATIONS = [
    "".join(axis[end] for axis, end in zip(axes, ends, strict=True))
    for axes in itertools.permutations(LETTERS)
    for ends in itertools.product((0, 1), repeat=3)
]
"""All 48 ways in which a file's axes may point along the body's."""


def rotation(*degrees: float) -> np.ndarray:
    """About x, then y, then z."""
    turned = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        cos, sin = np.cos(angle), np.sin(angle)
        one, other = [place for place in range(3) if place != axis]
        step = np.eye(3)
        step[[one, other], [one, other]], step[one, other], step[other, one] = cos, -sin, sin
        turned = step @ turned
    return turned


PLACES = {
    "isotropic": np.eye(3),
    "anisotropic": np.diag([0.7, 1.5, 5.0]),
    "oblique": rotation(12, -9, 20) @ np.diag([0.7, 0.9, 3.0]),
    "far oblique": rotation(31, 25, -28) @ np.diag([2.0, 0.5, 1.1]),
}


def write_ct(path: Path, orientation: str, steps: np.ndarray) -> np.ndarray:
    """A CT with a lopsided organ, stored in the given orientation; returns where the organ is, in its array."""
    hu = np.full(SHAPE, -1000, np.int16)
    hu[1:13, 2:20, 1:10] = np.random.default_rng(0).integers(BODY - 20, BODY + 20, (12, 18, 9))
    for part in (np.s_[3:8, 5:9, 2:7], np.s_[3:5, 9:15, 2:4], np.s_[8:10, 5:6, 6:9]):
        hu[part] = ORGAN
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = steps, [-31.5, 17.25, 402.0]
    image = nib.Nifti1Image(hu, affine)
    target = nib.orientations.axcodes2ornt(orientation)
    image = image.as_reoriented(nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), target))
    nib.save(image, path)
    return np.asarray(image.dataobj) == ORGAN


def test_there_are_48_orientations() -> None:
    assert len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_mask_is_the_truth_to_the_voxel(tmp_path: Path, orientation: str, place: str) -> None:
    path, out = tmp_path / "ct.nii", tmp_path / "mask.nii"
    truth = write_ct(path, orientation, PLACES[place])
    session = predictor_of(Oracle(WINDOW), EVERYWHERE).open(path)
    session.segment(Prompt(text="organ")).save(out)
    source, saved = nib.load(path), nib.load(out)
    np.testing.assert_array_equal(np.asarray(saved.dataobj), truth)
    np.testing.assert_allclose(saved.affine, source.affine, atol=1e-4)
    assert nib.aff2axcodes(saved.affine) == nib.aff2axcodes(source.affine)
    # What was written is read again as the same voxels of the CT.
    np.testing.assert_array_equal(read_label(out, session.volume) > 0, session.volume.array_DHW == ORGAN)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("coordinates", [Coordinates.ras, Coordinates.lps])
def test_a_place_in_millimetres_is_the_voxel_that_the_file_puts_there(
    tmp_path: Path, place: str, coordinates: Coordinates
) -> None:
    for orientation in ORIENTATIONS[::5]:
        path = tmp_path / f"{orientation}.nii"
        truth = write_ct(path, orientation, PLACES[place])
        inside = np.argwhere(truth)[::17]
        world = nib.affines.apply_affine(nib.load(path).affine, inside)
        if coordinates is Coordinates.lps:
            world[:, :2] *= -1
        volume = read_volume(path)
        rows = [[*point, 1] for point in world.tolist()]
        config = PredictConfig("model", str(path), "mask", points=rows, coordinates=coordinates)
        points_N3 = prompt_of(config, None, volume).points_N3
        assert points_N3 is not None and len(np.unique(points_N3, axis=0)) == len(inside)
        assert (volume.array_DHW[tuple(points_N3.T)] == ORGAN).all()
        corners = np.array([world.min(axis=0), world.max(axis=0)]).ravel().tolist()
        config = PredictConfig("model", str(path), "mask", box=corners, coordinates=coordinates)
        box = prompt_of(config, None, volume).box
        assert box is not None
        assert ((points_N3 >= box[:3]) & (points_N3 <= box[3:])).all()


def test_a_mask_of_a_dicom_series_is_the_truth_to_the_voxel(tmp_path: Path) -> None:
    hu, _ = phantom()
    hu[hu > 60] = ORGAN
    session = predictor_of(Oracle(WINDOW)).open(write_dicom(tmp_path / "ct", hu))
    mask = session.segment(Prompt(text="organ"))
    np.testing.assert_array_equal(mask.native(), hu == ORGAN)
