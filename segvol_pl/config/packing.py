"""Packing and listing CT files."""

from __future__ import annotations

from dataclasses import dataclass, field

from segvol_pl.config.fields import MISSING, Keys, check_triple, ranged, require


@dataclass
class RegionsConfig(Keys):
    """Pseudo-label regions (3-D Felzenszwalb-Huttenlocher) computed at packing."""

    section = "regions."

    enabled: bool = True
    """Compute them."""
    sigma: float = ranged(0.8, least=0)
    """Gaussian smoothing before the graph is built, in voxels of the overview."""
    min_size: int = ranged(1000, least=1)
    """Regions under this many voxels are merged (at 32 x 256 x 256)."""
    min_fraction: float = ranged(0.001, least=2e-5, below=1)
    """Regions under this share of the voxels are dropped."""


def parse_part(text: str) -> tuple[int, int]:
    """K/N as two numbers. Raises ConfigError unless 0 <= K < N."""
    number, _, count = text.partition("/")
    require(
        number.isdecimal() and count.isdecimal() and int(number) < int(count), "part", f"{text!r} is not K/N, K < N"
    )
    return int(number), int(count)


@dataclass
class PackConfig(Keys):
    """CT files into tar shards."""

    images: str | None = None
    """A CT file, a DICOM folder, a folder of cases or a glob."""
    labels: str | None = None
    """Label maps, given likewise; paired by case id."""
    cases: str | None = None
    """CSV or JSON that states the pairs: id, image, label; or id, image and a column of files for each category; or the
    CODE.json of a set in the processed M3D-Seg form."""
    recipe: str | None = None
    """YAML of a public data set, see shards/datasets/: names its files below images=ROOT and its categories."""
    categories: str | None = None
    """YAML: category name -> label values. Needed where there are label maps."""
    part: str = ""
    """K/N: stage the K-th (from 0) of N parts of the cases alone, e.g. as a task of a SLURM array; a run without it
    joins them."""
    out: str = MISSING
    """Folder of the shards and index.json."""
    dataset: str = ""
    """Name of the data set, written to every sample. Empty: the recipe's, else unnamed."""
    modality: str = ""
    """Modality, written to every sample. Empty: the recipe's, else CT."""
    overview_shape: list[int] = ranged([32, 256, 256], least=1)
    """Shape (d, h, w) of the stored overview: the model's input shape."""
    samples_per_shard: int = ranged(32, least=1)
    """Samples in one tar."""
    test_fraction: float = ranged(0.2, least=0, most=1)
    """Share of cases, by hash of their content, that are the test split."""
    max_bad_fraction: float = ranged(0.05, least=0, most=1)
    """Share of unusable cases beyond which packing fails."""
    anchors: int = ranged(64, least=1)
    """Voxels of each category written down as centres for foreground crops."""
    workers: int = ranged(0, least=0)
    """Processes; 0 takes one per core."""
    regions: RegionsConfig = field(default_factory=RegionsConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_triple("overview_shape", self.overview_shape)
        given = self.images is not None or self.cases is not None
        require(given, "images", "give images=FILE_OR_FOLDER_OR_GLOB or cases=FILE")
        if self.part:
            parse_part(self.part)
        labelled = self.labels is None or self.categories is not None
        require(labelled, "categories", "labels need categories=FILE (YAML: name -> label values)")
        require(not (self.recipe and self.labels), "labels", "the recipe says where they are: leave labels out")


@dataclass
class InventoryConfig(Keys):
    """List what lies in a folder tree or a list of cases, by the headers alone."""

    images: str | None = None
    """A folder, searched with all below it, a CT file or a glob."""
    cases: str | None = None
    """CSV or JSON that lists cases, as for pack."""
    out: str = "inventory.json"
    """Where all of it is written; empty: nowhere."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require((self.images is None) != (self.cases is None), "images", "give one of images=FOLDER and cases=FILE")
