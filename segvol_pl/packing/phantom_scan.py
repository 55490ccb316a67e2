"""How a scanner shows a painted body: partial volume, table, noise, and the artefacts of CT.

Each artefact has its share of phantoms (`SHARES`): streaks around metal, streaks across shoulders and hips, where few
photons pass, and a shading as of beam hardening.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from segvol_pl.packing.phantom_draws import Draws

AIR_HU = -1000.0

SHARES = {"table": 0.6, "shading": 0.3, "starvation": 0.3, "metal": 0.1}
"""Artefact -> share of phantoms that have it."""


def scan(hu_DHW: np.ndarray, lines: list[np.ndarray], rng: Draws) -> np.ndarray:
    """Return the painted Hounsfield units as a scanner shows them.

    Args:
        hu_DHW: Float32 Hounsfield units of the body, D superior, H anterior, W right.
        lines: Places of the voxels along d, h, w, in mm.
        rng: Draws noise and artefacts.

    Returns:
        int16 (D,H,W) in [-1024, 3071].
    """
    has = {name: rng.unusual(share) for name, share in SHARES.items()}
    if has["metal"]:
        hu_DHW = _with_metal(hu_DHW, lines, rng)
    body_DHW = hu_DHW > -500
    depth, plane = rng.uniform(0.3, 0.6), rng.uniform(0.4, 0.8)
    hu_DHW = ndimage.gaussian_filter(hu_DHW, (depth, plane, plane), truncate=3)
    if has["table"]:
        _add_table(hu_DHW, lines)
    if has["shading"]:
        shape = (hu_DHW.shape[0], hu_DHW.shape[1], hu_DHW.shape[2])
        hu_DHW += draw_field(rng, shape, (3, 2, 2)) * np.float32(rng.uniform(5, 12)) * body_DHW
    hu_DHW += _noise(hu_DHW.shape, rng, has["starvation"])
    stored_DHW: np.ndarray = np.clip(np.rint(hu_DHW), -1024, 3071).astype(np.int16)
    return stored_DHW


def draw_field(rng: Draws, shape: tuple[int, int, int], cells: tuple[float, float, float]) -> np.ndarray:
    """Draw a float32 (D,H,W) field of mean about 0 and standard deviation 1, smooth over 1/cells of each axis."""
    counts = [max(1, round(cell)) for cell in cells]
    control = rng.standard_normal([count + 3 for count in counts], dtype=np.float32)
    rows, columns, bars = (_spline_basis(size, count) for size, count in zip(shape, counts, strict=True))
    field_DHW = np.tensordot(rows, columns @ control @ bars.T, axes=(1, 0))
    return np.asarray(field_DHW / field_DHW.std(), dtype=np.float32)


def _spline_basis(size: int, cells: int) -> np.ndarray:
    """Return float32 (size, cells + 3): the uniform cubic B-spline weight of each control point at `size` points."""
    place = np.linspace(0, cells, size)
    cell = np.minimum(place.astype(int), cells - 1)
    t = place - cell
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], axis=1) / 6
    basis = np.zeros((size, cells + 3), dtype=np.float32)
    np.put_along_axis(basis, cell[:, None] + np.arange(4), weights.astype(np.float32), axis=1)
    return basis


def _noise(shape: tuple[int, ...], rng: Draws, starved: bool) -> np.ndarray:
    """Draw noise; if `starved`, with streaks from side to side near both ends of the range."""
    noise_DHW = rng.standard_normal(shape, dtype=np.float32)
    grain = rng.uniform(0.5, 0.9)
    noise_DHW = ndimage.gaussian_filter(noise_DHW, (0.0, grain, grain), truncate=3)
    noise_DHW *= np.float32(np.exp(rng.uniform(np.log(7), np.log(25))) / noise_DHW.std())
    if starved:
        streaks_DHW = ndimage.uniform_filter1d(rng.standard_normal(shape, dtype=np.float32), shape[2] // 3, axis=2)
        place_D = np.linspace(-1, 1, shape[0], dtype=np.float32)
        strength_D = np.float32(rng.uniform(15, 40)) * np.abs(place_D) ** 4 / streaks_DHW.std()
        noise_DHW += streaks_DHW * strength_D[:, None, None]
    return np.asarray(noise_DHW)


def _with_metal(hu_DHW: np.ndarray, lines: list[np.ndarray], rng: Draws) -> np.ndarray:
    """Put a piece of metal into a bone, with bright and dark streaks that run away from it in its slices."""
    bone = np.argwhere(hu_DHW > 300)
    if not len(bone):
        return hu_DHW
    middle = bone[int(rng.integers(len(bone)))]
    z_D, y_H, x_W = (line - line[at] for line, at in zip(lines, middle, strict=True))
    radius = rng.uniform(4, 9)
    near_D = np.flatnonzero(np.abs(z_D) < 3 * radius)
    away_HW = np.hypot(y_H[:, None], x_W[None, :])
    angle_HW = np.arctan2(y_H[:, None], x_W[None, :])
    profile = rng.standard_normal(40)
    streaks_HW = np.interp(angle_HW, np.linspace(-np.pi, np.pi, 41), np.append(profile, profile[0]))
    streaks_HW *= rng.uniform(1500, 4000) / (away_HW + 10)
    fall_D = np.exp(-np.square(z_D[near_D] / (1.5 * radius)))
    slab_DHW = hu_DHW[near_D] + (fall_D[:, None, None] * streaks_HW).astype(np.float32)
    slab_DHW[(np.square(z_D[near_D, None, None] / 2) + np.square(away_HW)) < radius**2] = 3000
    return np.concatenate([hu_DHW[: near_D[0]], slab_DHW, hu_DHW[near_D[-1] + 1 :]])


def _add_table(hu_DHW: np.ndarray, lines: list[np.ndarray]) -> None:
    """Add a curved couch under the patient, straight through all slices: it does not follow the patient's shape."""
    _, y_H, x_W = lines
    height_HW = y_H[:, None] + 122 - np.square(x_W)[None, :] / 1500
    table_HW = (np.abs(height_HW) < 4) & (np.abs(x_W) < 150)[None, :]
    air_DHW = hu_DHW[:, table_HW]
    hu_DHW[:, table_HW] = np.where(air_DHW < -500, np.float32(-250), air_DHW)
