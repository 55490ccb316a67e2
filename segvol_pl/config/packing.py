"""The schemas of packing and listing CT files."""

from __future__ import annotations

from dataclasses import dataclass, field

from segvol_pl.config.fields import HIGHEST_SEED, MISSING, Keys, check_triple, ranged, require


@dataclass
class PhantomsConfig(Keys):
    """Make synthetic CTs with label maps, as NIfTI files, for trying things out without data."""

    out: str = MISSING
    """Folder for images/, labels/ and categories.yaml."""
    volumes: int = ranged(48, least=1)
    """Synthetic CTs to make."""
    seed: int = ranged(0, least=0, most=HIGHEST_SEED)
    """Seed that determines all of them."""
    scale: float = ranged(1.0, above=0)
    """Multiplies the voxels along each axis, and divides their size. At 1, slices are about 5 mm apart."""
    variation: float = ranged(1.0, least=0, most=1)
    """How much bodies and scans differ. Below 1, ranges are narrower, and partial scans, artefacts, missing organs and
    contrast phases other than portal venous are rarer."""
    categories: list[str] = field(default_factory=list)
    """Categories to list in categories.yaml, as in a data set that labels only some organs. Empty: all."""
    workers: int = ranged(0, least=0)
    """Processes. 0: one per core."""


@dataclass
class RegionsConfig(Keys):
    """Pseudo-label regions (3-D Felzenszwalb-Huttenlocher), computed while packing."""

    section = "regions."

    enabled: bool = True
    """Compute pseudo-label regions."""
    sigma: float = ranged(0.8, least=0)
    """Gaussian smoothing before the graph is built (voxels of the overview)."""
    min_size: int = ranged(1000, least=1)
    """Merge regions smaller than this (voxels, at 32 x 256 x 256)."""
    min_fraction: float = ranged(0.001, least=2e-5, below=1)
    """Drop regions smaller than this fraction of all voxels."""


def parse_part(text: str) -> tuple[int, int]:
    """Split `K/N` into two numbers. Raises ConfigError unless 0 <= K < N."""
    number, _, count = text.partition("/")
    require(
        number.isdecimal() and count.isdecimal() and int(number) < int(count), "part", f"{text!r} is not K/N with K < N"
    )
    return int(number), int(count)


@dataclass
class PackConfig(Keys):
    """Pack CT files into tar shards."""

    images: str | None = None
    """CTs to pack: a CT file, a DICOM folder, a folder of cases or a glob."""
    labels: str | None = None
    """Label maps: a file, a folder or a glob. Paired with the images by case id."""
    cases: str | None = None
    """CSV or JSON file that lists the cases: id, image, label; or id, image and one column of mask files per category;
    a further column, split, may say train or test; or CODE.json of a data set in the processed M3D-Seg format."""
    recipe: str | None = None
    """YAML file of a public data set, see shards/datasets/. It names the files below images=ROOT and the categories."""
    categories: str | None = None
    """YAML file that maps category names to label values. Required with label maps."""
    part: str = ""
    """K/N: prepare only part K (from 0) of N parts of the cases, e.g. as one task of a SLURM array. A run without it
    joins the parts."""
    out: str = MISSING
    """Folder for the shards and index.json."""
    dataset: str = ""
    """Name of the data set, stored in every sample. Empty: from the recipe, otherwise unnamed."""
    modality: str = ""
    """Modality, stored in every sample. Empty: from the recipe, otherwise CT."""
    overview_shape: list[int] = ranged([32, 256, 256], least=1)
    """Size of the stored overview (voxels: d, h, w). Must be the model's input size."""
    samples_per_shard: int = ranged(32, least=1)
    """Samples per tar file."""
    test_fraction: float = ranged(0.2, least=0, most=1)
    """Fraction of cases in the test split, chosen by content hash."""
    max_bad_fraction: float = ranged(0.05, least=0, most=1)
    """Fraction of cases that may be unusable. Above it packing fails."""
    anchors: int = ranged(64, least=1)
    """Voxels stored per category as centres for foreground crops."""
    workers: int = ranged(0, least=0)
    """Processes. 0: one per core."""
    regions: RegionsConfig = field(default_factory=RegionsConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_triple("overview_shape", self.overview_shape)
        given = self.images is not None or self.cases is not None
        require(given, "images", "give images=FILE_OR_FOLDER_OR_GLOB or cases=FILE")
        if self.part:
            parse_part(self.part)
        labelled = self.labels is None or self.categories is not None
        require(labelled, "categories", "label maps need categories=FILE (YAML: name -> label values)")
        require(not (self.recipe and self.labels), "labels", "the recipe names the label maps: leave labels out")


@dataclass
class RepackConfig(Keys):
    """Upgrade the shards in DIR to today's encoding, in place. Takes disk for a second copy until it is done."""

    folder: str = MISSING
    """Folder of the shards. DIR on the command line."""
    workers: int = ranged(0, least=0)
    """Processes. 0: one per core."""


@dataclass
class InventoryConfig(Keys):
    """List the CTs in a folder tree or a list of cases, by reading only their headers."""

    images: str | None = None
    """Folder to search recursively, a CT file or a glob."""
    cases: str | None = None
    """CSV or JSON file that lists cases, as for pack."""
    out: str = "inventory.json"
    """File to write the list to. Empty: write no file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require((self.images is None) != (self.cases is None), "images", "give one of images=FOLDER and cases=FILE")
