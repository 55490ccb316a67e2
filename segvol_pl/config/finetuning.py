"""The schema of `finetune`: your own cases, a checkpoint, and how to go from one to the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from segvol_pl.config.data import DataConfig, LastBatch, PromptConfig, check_combinations
from segvol_pl.config.evaluation import DrawConfig, Mode
from segvol_pl.config.fields import MISSING, Keys, ranged, require
from segvol_pl.config.inference import SlidingConfig, ZoomConfig
from segvol_pl.config.model import TextConfig
from segvol_pl.config.training import OptimConfig, RunConfig, TrackConfig, check_shares, check_steps


class Method(StrEnum):
    """Which weights fine-tuning changes."""

    full = "full"
    decoder = "decoder"
    lora = "lora"


DECIDED = ""
"""Value of a key of a section that `finetune` itself decides."""


@dataclass
class ForgottenConfig(Keys):
    """Cases of the categories that the checkpoint knows."""

    section = "forgotten."

    shards: str | None = None
    """Folder of packed shards with cases of categories that the checkpoint knows: data like those that it was trained
    on. The report says what their Dice was before and after. null: what was forgotten is not measured."""
    split: str = "test"
    """Split of these shards to evaluate, or `all`."""
    limit: int = ranged(0, least=0)
    """Maximum number of these cases. 0: all."""


@dataclass
class GainConfig(Keys):
    """How to evaluate before and after."""

    section = "evaluation."

    modes: list[Mode] = field(default_factory=lambda: [Mode.zoom])
    """As `modes` of evaluate."""
    prompts: list[str] = field(default_factory=lambda: ["text", "points", "box"])
    """Prompt combinations to evaluate by. Boxes and points are drawn from the ground truth. The checkpoint cannot be
    prompted by the name of a new category; points and box without text compare before and after."""
    pictures: int = ranged(3, least=0)
    """Categories to picture in the evaluations' own reports."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.modes) > 0, "evaluation.modes", "needs at least one")
        check_combinations("evaluation.prompts", self.prompts)


@dataclass
class FinetuneConfig(Keys):
    """Fine-tune a checkpoint on your own cases: pack, split, plan, evaluate, train, evaluate again, export, and report
    what was gained and what was forgotten. The same command continues wherever it was stopped."""

    checkpoint: str = MISSING
    """Checkpoint (.ckpt), exported model (.safetensors) or released file to start from. from=FILE on the command
    line."""
    images: str | None = None
    """CTs: a folder of cases or a glob, as for pack."""
    labels: str | None = None
    """Label maps, paired with the images by case id, as for pack."""
    cases: str | None = None
    """CSV or JSON file that lists the cases, as for pack, in place of images and labels. Cases with a split keep it."""
    categories: str | None = None
    """YAML file that maps category names to label values. Required with label maps."""
    shards: str | None = None
    """Folder of shards that are packed already, in place of images and labels. They need samples to train on and to
    validate with (data.split and data.val_split)."""
    out: str = MISSING
    """Folder for everything that is written: shards, evaluations, the run, model/model.safetensors, report.html."""
    method: Method = Method.full
    """full: all weights. decoder: all but those of the image encoder. lora: as decoder, and the image encoder by small
    added matrices (optim.lora_rank, 8 if it is not set), which are merged into the exported model."""
    freeze: list[str] = field(default_factory=list)
    """Patterns of further tensors to freeze, such as `mask_decoder.*`."""
    held_out: float = ranged(0.2, above=0, below=1)
    """Fraction of the cases to validate with: at least one, and at least two if there are four or more. Drawn by
    data.seed, case by case."""
    workers: int = ranged(0, least=0)
    """Processes for packing. 0: one per core."""
    forgotten: ForgottenConfig = field(default_factory=ForgottenConfig)
    evaluation: GainConfig = field(default_factory=GainConfig)
    draw: DrawConfig = field(default_factory=DrawConfig)
    data: DataConfig = field(
        default_factory=lambda: DataConfig(shards=DECIDED, global_batch=4, last_batch=LastBatch.repeat)
    )
    prompts: PromptConfig = field(default_factory=lambda: PromptConfig(pseudo_per_volume=0))
    text: TextConfig = field(default_factory=TextConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5, warmup_steps=50, max_steps=1000))
    run: RunConfig = field(
        default_factory=lambda: RunConfig(out=DECIDED, val_every=100, checkpoint_every=100, log_every=10)
    )
    track: TrackConfig = field(default_factory=TrackConfig)
    zoom: ZoomConfig = field(default_factory=ZoomConfig)
    sliding: SlidingConfig = field(default_factory=SlidingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_cases()
        require(self.data.shards == DECIDED, "data.shards", "is set by shards=DIR, or by out if cases are packed")
        require(self.run.out == DECIDED, "run.out", "is set by out: the run is OUT/train")
        require(self.run.resume, "run.resume", "finetune always resumes: remove `out`, or choose another one")
        require(not self.run.rehearse, "run.rehearse", "only the commands train and pretrain rehearse")
        require(self.run.branch_from is None, "run.branch_from", "a fine-tuning starts from=FILE")
        adapted = self.method is Method.lora or not self.optim.lora_rank
        require(adapted, "optim.lora_rank", f"needs method=lora, this is method={self.method.value}")
        check_shares(self.data, self.run)
        check_steps(self.optim, self.run)

    def _check_cases(self) -> None:
        given = [key for key in ("images", "cases", "shards") if getattr(self, key) is not None]
        one = "give one of images=DIR with labels=DIR, cases=FILE, and shards=DIR"
        require(len(given) == 1, given[-1] if given else "images", one)
        paired = (self.images is None) == (self.labels is None)
        require(paired, "labels", "images=DIR needs labels=DIR: fine-tuning learns from label maps")
        named = self.labels is None or self.categories is not None
        require(named, "categories", "label maps need categories=FILE (YAML: name -> label values)")
