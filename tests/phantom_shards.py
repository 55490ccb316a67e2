"""The small corpus that most tests train on."""

from __future__ import annotations

from pathlib import Path


def pack_phantoms(folder: Path) -> Path:
    """Six small labelled phantoms, packed into `folder`/shards: four or so to train on, the others to test on."""
    # Packing needs SimpleITK, which not every environment of the tests has.
    from segvol_pl.config import PackConfig
    from segvol_pl.packing.pack import pack
    from segvol_pl.packing.phantom import write_phantoms

    write_phantoms(folder, count=6, seed=0, scale=0.45)
    config = PackConfig(
        images=str(folder / "images"),
        labels=str(folder / "labels"),
        categories=str(folder / "categories.yaml"),
        out=str(folder / "shards"),
        dataset="phantoms",
        overview_shape=[8, 16, 16],
        samples_per_shard=2,
        test_fraction=0.4,
        workers=1,
    )
    pack(config)
    return folder / "shards"
