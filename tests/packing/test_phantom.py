"""The phantom: a pure function of its seed, anatomically plausible, and stored in many orientations."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from omegaconf import OmegaConf

from segvol_pl.packing.phantom import CATEGORIES, FIELD_OF_VIEW, TUMOUR, Phantom, make_phantom, write_phantoms

SMALL = 0.5

MEDIAN_HU = {
    "lung left": (-900, -800),
    "lung right": (-900, -800),
    "liver": (60, 110),
    "spleen": (95, 125),
    "kidney left": (120, 200),
    "kidney right": (120, 200),
    "spine": (250, 700),
    "aorta": (150, 300),
    "liver tumour": (15, 60),
}


def _mask(phantom: Phantom, category: str) -> np.ndarray:
    return np.isin(phantom.label_DHW, CATEGORIES[category])


def _centre(phantom: Phantom, category: str) -> np.ndarray:
    return np.argwhere(_mask(phantom, category)).mean(axis=0)


def test_the_same_seed_is_the_same_phantom_and_another_seed_another() -> None:
    first, again, other = make_phantom(7, SMALL), make_phantom(7, SMALL), make_phantom(8, SMALL)
    np.testing.assert_array_equal(first.hu_DHW, again.hu_DHW)
    np.testing.assert_array_equal(first.label_DHW, again.label_DHW)
    assert first.spacing == again.spacing
    assert first.spacing != other.spacing


def test_size_types_and_field_of_view_at_full_scale() -> None:
    phantom = make_phantom(3)
    assert phantom.hu_DHW.dtype == np.int16 and phantom.label_DHW.dtype == np.uint8
    assert phantom.hu_DHW.shape == phantom.label_DHW.shape
    assert phantom.hu_DHW.size < 1_200_000
    extent = np.array(phantom.hu_DHW.shape) * phantom.spacing
    np.testing.assert_allclose(extent, FIELD_OF_VIEW, atol=max(phantom.spacing))
    assert phantom.spacing[0] > 1.2 * phantom.spacing[1]


def test_every_category_is_present_with_its_hounsfield_units_over_20_seeds() -> None:
    for seed in range(20):
        phantom = make_phantom(seed)
        for category, (low, high) in MEDIAN_HU.items():
            mask_DHW = _mask(phantom, category)
            assert mask_DHW.sum() >= 100, (seed, category)
            assert low <= np.median(phantom.hu_DHW[mask_DHW]) <= high, (seed, category)
        corner = phantom.hu_DHW[:, -3:, :3]
        assert abs(float(np.median(corner)) + 1000) < 10


def test_label_values_are_those_of_the_categories() -> None:
    named = {value for values in CATEGORIES.values() for value in values}
    assert set(np.unique(make_phantom(1, SMALL).label_DHW)) == named | {0}


@pytest.mark.parametrize("seed", range(8))
def test_sides_and_order_along_the_body(seed: int) -> None:
    phantom = make_phantom(seed, SMALL)
    middle = phantom.hu_DHW.shape[2] / 2
    assert _centre(phantom, "liver")[2] > middle > _centre(phantom, "spleen")[2]
    for organ in ("lung", "kidney"):
        assert _centre(phantom, f"{organ} right")[2] > middle > _centre(phantom, f"{organ} left")[2]
    assert _centre(phantom, "lung right")[0] > _centre(phantom, "liver")[0] > _centre(phantom, "kidney right")[0]
    assert _centre(phantom, "liver")[1] > _centre(phantom, "aorta")[1] > _centre(phantom, "spine")[1]


@pytest.mark.parametrize("seed", range(8))
def test_the_tumour_lies_inside_the_liver(seed: int) -> None:
    phantom = make_phantom(seed, SMALL)
    tumour_DHW = phantom.label_DHW == TUMOUR
    around_DHW = np.zeros_like(tumour_DHW)
    for axis in range(3):
        around_DHW |= np.roll(tumour_DHW, 1, axis) | np.roll(tumour_DHW, -1, axis)
    assert _mask(phantom, "liver")[around_DHW].mean() > 0.9


def test_scale_must_be_positive() -> None:
    with pytest.raises(ValueError, match="scale is 0"):
        make_phantom(0, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("phantoms"), count=6, seed=5, unlabelled=2, scale=0.3)


def _canonical(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = nib.as_closest_canonical(nib.load(path))
    return np.asarray(image.dataobj).transpose(2, 1, 0), image.affine


def test_files_written(folder: Path) -> None:
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    labelled = {
        f"{kind}/phantom_{i:03d}_{end}.nii.gz" for i in range(6) for kind, end in (("images", "ct"), ("labels", "seg"))
    }
    assert names == labelled | {f"unlabelled/phantom_{i:03d}_ct.nii.gz" for i in (6, 7)} | {"categories.yaml"}
    assert OmegaConf.to_container(OmegaConf.load(folder / "categories.yaml")) == CATEGORIES


def test_orientations_on_disk_vary_and_image_and_label_differ(folder: Path) -> None:
    images, labels = (
        [nib.aff2axcodes(nib.Nifti1Image.from_filename(path).affine) for path in sorted((folder / kind).iterdir())]
        for kind in ("images", "labels")
    )
    assert len(set(images)) >= 4
    assert any(image != label for image, label in zip(images, labels, strict=True))


def test_canonical_content_does_not_depend_on_the_orientation(folder: Path) -> None:
    for index in range(6):
        phantom = make_phantom(int(np.random.SeedSequence([5, index]).generate_state(1)[0]), scale=0.3)
        hu_DHW, affine = _canonical(folder / f"images/phantom_{index:03d}_ct.nii.gz")
        label_DHW, label_affine = _canonical(folder / f"labels/phantom_{index:03d}_seg.nii.gz")
        np.testing.assert_array_equal(hu_DHW, phantom.hu_DHW)
        np.testing.assert_array_equal(label_DHW, phantom.label_DHW)
        np.testing.assert_allclose(affine, label_affine, atol=1e-3)
        np.testing.assert_allclose(np.diag(affine)[2::-1], phantom.spacing, rtol=1e-5)
        np.testing.assert_allclose(affine[:3, 3], (phantom.affine @ [0, 0, 0, 1])[:3], atol=1e-3)


def test_writing_again_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = write_phantoms(tmp_path, count=1, seed=5, scale=0.3)
    name = "images/phantom_000_ct.nii.gz"
    assert (again / name).read_bytes() == (folder / name).read_bytes()
