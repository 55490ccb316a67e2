"""The phantom: a pure function of its seed, anatomically plausible, and stored in many orientations."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from omegaconf import OmegaConf

from segvol_pl.errors import CaseError
from segvol_pl.packing.phantom import FIELD_OF_VIEW, LEAST_COVER, Phantom, make_phantom, write_phantoms
from segvol_pl.packing.phantom_anatomy import CATEGORIES, LESIONS, LUMBAR, MISSING, STRUCTURES, VALUE, draw_tissues
from segvol_pl.packing.phantom_draws import Draws

SMALL = 0.5

MEDIAN_HU = {
    "lung left": (-900, -740),
    "lung right": (-900, -740),
    "liver": (0, 130),
    "spleen": (15, 160),
    "kidney left": (20, 240),
    "kidney right": (20, 240),
    "spine": (150, 700),
    "aorta": (0, 390),
    "trachea": (-1010, -400),
    "inferior vena cava": (0, 190),
}
LARGE = ("liver", "stomach", "spine", "aorta", "inferior vena cava", "pancreas")
"""Seen in every scan: no range leaves them out."""


@pytest.fixture(scope="module")
def many() -> list[Phantom]:
    return [make_phantom(seed, SMALL) for seed in range(24)]


def _mask(phantom: Phantom, category: str) -> np.ndarray:
    return np.isin(phantom.label_DHW, CATEGORIES[category])


def _centre(phantom: Phantom, category: str) -> np.ndarray:
    return np.argwhere(_mask(phantom, category)).mean(axis=0)


def _centre_mm(phantom: Phantom, category: str) -> np.ndarray:
    """Of the category, from the spine's middle at the height of L1: where an organ is in its body."""
    return (_centre(phantom, category) - _centre(phantom, "vertebra L1")) * phantom.spacing


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


def test_some_scans_cover_a_part_of_the_trunk(many: list[Phantom]) -> None:
    covers = np.array([len(phantom.hu_DHW) * phantom.spacing[0] / FIELD_OF_VIEW[0] for phantom in many])
    assert covers.min() > LEAST_COVER - 0.03
    assert 2 <= (covers < 0.9).sum() <= 12 and (covers > 0.98).sum() >= 12


def test_categories_have_their_hounsfield_units(many: list[Phantom]) -> None:
    for seed, phantom in enumerate(many):
        for category, (low, high) in MEDIAN_HU.items():
            mask_DHW = _mask(phantom, category)
            if category in LARGE:
                assert mask_DHW.sum() >= 20, (seed, category)
            if mask_DHW.sum() >= 20:
                assert low <= np.median(phantom.hu_DHW[mask_DHW]) <= high, (seed, category)
        corner = phantom.hu_DHW[:, -3:, :3]
        assert abs(float(np.median(corner)) + 1000) < 10


def test_every_category_is_in_most_phantoms_and_what_may_be_missing_is_missing_in_some(many: list[Phantom]) -> None:
    counts = {name: sum(bool(_mask(phantom, name).any()) for phantom in many) for name in CATEGORIES}
    for name in CATEGORIES.keys() - LESIONS:
        assert counts[name] >= 12, name
    for name in LESIONS:
        assert 2 <= counts[name] < len(many), name
    assert all(sum(bool(_mask(phantom, name).any()) for name in CATEGORIES) >= 18 for phantom in many)
    assert sum(len(many) - counts[name] for name in MISSING) >= 4


def test_label_values_are_those_of_the_categories(many: list[Phantom]) -> None:
    named = {value for values in CATEGORIES.values() for value in values}
    assert named == set(VALUE.values()) == set(range(1, len(STRUCTURES) + 1))
    found = set().union(*(np.unique(phantom.label_DHW).tolist() for phantom in many))
    rare = {value for name in LESIONS for value in CATEGORIES[name]}
    assert named - rare < found <= named | {0}


@pytest.mark.parametrize("seed", range(8))
def test_sides_and_order_along_the_body(seed: int, many: list[Phantom]) -> None:
    phantom = many[seed]
    there = {name for name in CATEGORIES if _mask(phantom, name).sum() >= 10}
    middle = _centre(phantom, "spine")[2]
    assert _centre(phantom, "liver")[2] > middle
    for name in there & {"spleen", "kidney left", "lung left", "adrenal gland left", "ureter left"}:
        assert _centre(phantom, name)[2] < middle, name
    for name in there & {"kidney right", "lung right", "adrenal gland right", "ureter right", "inferior vena cava"}:
        assert _centre(phantom, name)[2] > middle, name
    downwards = ["lung right", "liver", "kidney right", "bladder"]
    heights = [_centre(phantom, name)[0] for name in downwards if name in there]
    assert heights == sorted(heights, reverse=True)
    assert _centre(phantom, "liver")[1] > _centre(phantom, "aorta")[1] > _centre(phantom, "spine")[1]
    lumbar = [_centre(phantom, name)[0] for name in LUMBAR if name in there]
    assert len(lumbar) >= 3 and lumbar == sorted(lumbar, reverse=True)


def test_organs_do_not_keep_to_one_place_and_size(many: list[Phantom]) -> None:
    for name, spread in (("kidney left", 8), ("spleen", 10), ("stomach", 10), ("gallbladder", 9), ("liver", 7)):
        having = [phantom for phantom in many if _mask(phantom, name).any() and _mask(phantom, "vertebra L1").any()]
        places = np.array([_centre_mm(phantom, name) for phantom in having])
        volumes = np.array([_mask(phantom, name).sum() * np.prod(phantom.spacing) for phantom in having])
        assert places.std(axis=0).max() > spread, name
        assert volumes.std() > 0.15 * volumes.mean(), name


def test_contrast_phases_change_tissues_together() -> None:
    drawn = [draw_tissues(Draws(np.random.default_rng(seed), 1.0)) for seed in range(60)]
    native = [tissues for tissues in drawn if tissues["aorta"] < 60]
    arterial = [tissues for tissues in drawn if tissues["aorta"] > 230]
    late = [tissues for tissues in drawn if tissues["urine"] > 100]
    assert min(len(native), len(arterial), len(late)) >= 3
    assert all(abs(tissues["aorta"] - tissues["vein"]) < 20 and tissues["cortex"] < 50 for tissues in native)
    assert all(tissues["cortex"] > tissues["medulla"] + 40 > tissues["vein"] - 40 for tissues in arterial)
    assert all(tissues["aorta"] < 160 for tissues in late)


@pytest.mark.parametrize(
    ("lesion", "hosts"),
    [
        ("liver tumour", ["liver"]),
        ("kidney tumour", ["kidney left", "kidney right"]),
        ("lung nodule", ["lung left", "lung right"]),
        ("bone lesion", ["spine"]),
    ],
)
def test_a_lesion_lies_inside_its_organ(lesion: str, hosts: list[str], many: list[Phantom]) -> None:
    around = []
    for phantom in many:
        lesion_DHW = _mask(phantom, lesion)
        around_DHW = np.zeros_like(lesion_DHW)
        for axis in range(3):
            around_DHW |= np.roll(lesion_DHW, 1, axis) | np.roll(lesion_DHW, -1, axis)
        around.append(np.logical_or.reduce([_mask(phantom, host) for host in hosts])[around_DHW])
    inside = np.concatenate(around)
    assert len(inside) > 50 and inside.mean() > (0.6 if lesion == "bone lesion" else 0.8)


def test_less_variation_makes_phantoms_alike_and_complete(many: list[Phantom]) -> None:
    alike = [make_phantom(seed, SMALL, variation=0.1) for seed in range(8)]

    def spread(phantoms: list[Phantom], category: str) -> np.ndarray:
        kept = [each for each in phantoms if _mask(each, category).any()]
        return np.std([_centre_mm(each, category) for each in kept], axis=0)

    for category in ("liver", "kidney left", "bladder"):
        assert spread(alike, category).mean() < 0.6 * spread(many, category).mean()
    assert min(len(each.hu_DHW) * each.spacing[0] for each in alike) > 0.98 * FIELD_OF_VIEW[0]  # no partial scan
    assert all(_mask(each, organ).any() for each in alike for organ in MISSING)
    lesions = sum(_mask(each, "liver tumour").any() for each in alike)
    assert 2 <= lesions < len(alike) and len({each.label_DHW.tobytes() for each in alike}) == len(alike)


@pytest.mark.parametrize("variation", [-0.1, 1.1])
def test_variation_is_a_share(variation: float) -> None:
    with pytest.raises(ValueError, match="variation"):
        make_phantom(0, SMALL, variation)


def test_categories_that_no_phantom_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CaseError, match=r"^categories: a phantom has no appendix; there are lung left"):
        write_phantoms(tmp_path, 1, 0, categories=["appendix"])
    assert list(tmp_path.iterdir()) == []


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
    again = write_phantoms(tmp_path, count=2, seed=5, scale=0.3, workers=2)
    name = "images/phantom_000_ct.nii.gz"
    assert (again / name).read_bytes() == (folder / name).read_bytes()
