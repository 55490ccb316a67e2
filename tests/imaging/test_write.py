"""Masks are written on the grid of their CT, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from ct_files import write_case

from segvol_pl.errors import VolumeError
from segvol_pl.imaging.read import read_volume
from segvol_pl.imaging.write import write_mask


def test_a_mask_is_not_written_where_it_cannot_be(tmp_path: Path) -> None:
    volume = read_volume(write_case(tmp_path, "a")[0])
    mask_DHW = volume.array_DHW > 0
    with pytest.raises(VolumeError, match="change the ending"):
        write_mask(mask_DHW, volume, tmp_path / "mask.png")
    with pytest.raises(VolumeError, match="there is no folder"):
        write_mask(mask_DHW, volume, tmp_path / "gone" / "mask.nii.gz")
    with pytest.raises(VolumeError, match="does not fit"):
        write_mask(mask_DHW[1:], volume, tmp_path / "mask.nii.gz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_ct.nii.gz", "a_seg.nii.gz"]
