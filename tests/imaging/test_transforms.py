"""Normalisation, resizing and cropping: extents coincide, nothing is invented."""

from __future__ import annotations

import numpy as np
import pytest

from segvol_pl.errors import SampleError
from segvol_pl.imaging import transforms
from segvol_pl.imaging.box import box_of
from segvol_pl.imaging.intensity import body_box, intensity_of, normalise


def _ct(shape: tuple[int, int, int] = (12, 20, 16)) -> np.ndarray:
    hu = np.full(shape, -1000, dtype=np.int16)
    hu[2:10, 4:15, 3:12] = np.random.default_rng(0).integers(0, 200, (8, 11, 9))
    return hu


def test_normalise_clips_to_the_foreground() -> None:
    hu = _ct()
    intensity = intensity_of(hu)
    foreground = hu[hu > hu.mean()]
    assert intensity.low == pytest.approx(np.percentile(foreground, 0.05))
    image = normalise(hu, intensity)
    assert image.dtype == np.float32
    assert image.min() == 0 and image.max() == 1
    assert body_box(hu, intensity) == (2, 4, 3, 9, 14, 11)


def test_a_constant_volume_is_refused() -> None:
    with pytest.raises(SampleError, match="constant"):
        intensity_of(np.full((3, 3, 3), 40, dtype=np.int16))


def test_two_valued_volumes_keep_their_contrast() -> None:
    hu = np.zeros((4, 4, 4), dtype=np.int16)
    hu[1:3, 1:3, 1:3] = 100
    image = normalise(hu, intensity_of(hu))
    assert set(np.unique(image)) == {0.0, 1.0}


def test_resizing_keeps_extents_and_means() -> None:
    ramp = np.broadcast_to(np.arange(24, dtype=np.float32), (6, 8, 24))
    small = transforms.resize_image(ramp, (6, 8, 12))
    assert np.allclose(small[0, 0], np.arange(12) * 2 + 0.5)
    large = transforms.resize_image(ramp, (12, 8, 12))
    assert large.shape == (12, 8, 12)
    assert np.allclose(large[0, 0], small[0, 0])


def test_resized_labels_hold_no_new_values() -> None:
    label = np.random.default_rng(1).choice([0, 3, 200], size=(9, 14, 11)).astype(np.uint8)
    for shape in ((4, 30, 7), (9, 14, 11), (20, 5, 23)):
        resized = transforms.resize_label(label, shape)
        assert resized.shape == shape and resized.dtype == label.dtype
        assert set(np.unique(resized)) <= {0, 3, 200}


def test_image_and_label_of_a_resized_box_agree() -> None:
    mask = np.zeros((16, 40, 40), dtype=np.uint8)
    mask[4:12, 8:32, 16:24] = 1
    label = transforms.resize_label(mask, (8, 20, 20))
    image = transforms.resize_image(mask, (8, 20, 20))
    assert np.array_equal(label == 1, image > 0.5)
    assert box_of(label) == (2, 4, 8, 5, 15, 11)


def test_windows_stay_inside_and_short_volumes_are_padded() -> None:
    shape, window = (10, 30, 6), (8, 8, 8)
    start = transforms.window_around((9, 0, 3), window, shape)
    assert start == (2, 0, 0)
    part = transforms.crop(np.ones(shape, dtype=np.int16), start, window, fill=-5)
    assert part.shape == window
    assert (part[:, :, :6] == 1).all() and (part[:, :, 6:] == -5).all()


def test_flips_move_all_arrays_alike() -> None:
    array = np.arange(24).reshape(2, 3, 4)
    flipped = transforms.flip({"a": array, "b": array + 100}, 1.0, np.random.default_rng(0))
    assert np.array_equal(flipped["a"], array[::-1, ::-1, ::-1])
    assert np.array_equal(flipped["b"], flipped["a"] + 100)
