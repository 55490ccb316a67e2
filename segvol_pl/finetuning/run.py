"""Fine-tune a checkpoint on your own cases (command `finetune`).

1. The cases are found and divided (`division`), and packed. Shards that exist already are taken as they are.
2. The plan is printed: cases per category, device, time, memory (`estimate`).
3. The checkpoint is evaluated on the validation cases, and on cases of what it knew if there are any.
4. Training, then export, then the same evaluations of the exported model.
5. The two evaluations are compared case by case (`gains`), and the report is written (`report`).

Everything is in one folder. A stage that is done is not done again (`stages`), and a stage that was interrupted
continues, as the command of its own does. Several ranks may run the command: each takes part in evaluating and
training, and rank 0 does the rest.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console

from segvol_pl.atomic import remove, write_text
from segvol_pl.config import FinetuneConfig, Method, TrainConfig, named_parts
from segvol_pl.config.loader import differences, flat, load, plain, to_yaml
from segvol_pl.credentials import masked
from segvol_pl.data.sample_table import SampleTable
from segvol_pl.data.shard_index import Index, read_index
from segvol_pl.data.store import Store
from segvol_pl.errors import SIGNALLED, CaseError, ConfigError, RunError, listed
from segvol_pl.evaluation.results import Partition
from segvol_pl.evaluation.run import evaluate
from segvol_pl.finetuning import settings
from segvol_pl.finetuning.division import CASES, divided, find_cases, same_cases, write_cases
from segvol_pl.finetuning.estimate import describe_cases, estimate
from segvol_pl.finetuning.gains import Gain, gains, read_rows, what_cases_show
from segvol_pl.finetuning.report import Findings, gained, lost, table, write_report
from segvol_pl.finetuning.settings import MODEL, RUN, shards_of
from segvol_pl.finetuning.stages import Stages
from segvol_pl.folder_lock import FolderLock
from segvol_pl.hub import local
from segvol_pl.launched import rank_named
from segvol_pl.model.checkpoint import digest_of, read_header, read_weights
from segvol_pl.model.convert import export
from segvol_pl.packing.cases import Case, read_cases
from segvol_pl.packing.pack import pack
from segvol_pl.training.run import train

log = logging.getLogger(__name__)

CONFIG = "config.yaml"
BEFORE, AFTER, OLD = "before", "after", "-old"
"""Folders of the evaluations; the suffix is that of the old categories."""
LENGTH = "optim.max_steps"
FREE = ("images", "labels", "cases", "workers", "forgotten", "evaluation.pictures", "zoom.cache_gb", "zoom.device_gb")
"""Keys that may change when a fine-tuning is continued, in addition to those that may change in a training run. The
cases themselves are compared one by one."""
NOT_MEASURED = (
    "What was forgotten was not measured. The checkpoint knows {known}; how well it still segments them is not known. "
    "To measure it, give forgotten.shards=DIR, packed cases of these categories, and run the same command again: only "
    "the evaluations of these cases and this report will be made."
)


def finetune(config: FinetuneConfig, console: Console | None = None) -> Path | None:
    """Fine-tune in `config.out`, from the first stage that is not done.

    Args:
        config: What to fine-tune on what, and how.
        console: Where to print the tables; None prints nothing.

    Returns:
        The report; None on ranks above 0.

    Raises:
        ConfigError: The configuration does not fit the checkpoint, the shards, or what `out` was begun with.
        CaseError, PackError: Cases cannot be found, divided or packed.
        CheckpointError, HubError, ShardError, EvaluateError, TextError: As the stages do.
        RunError: Training in processes of its own failed.
        LockedError: Another process fine-tunes in `out`.
    """
    first = not rank_named()
    with FolderLock(Path(config.out)) if first else nullcontext():
        return _Finetuning(config, first, console or Console(quiet=True)).run()


class _Finetuning:
    """One process's part of a fine-tuning."""

    def __init__(self, config: FinetuneConfig, first: bool, console: Console) -> None:
        self.config, self.first, self.console = config, first, console
        self.out, self.checkpoint = Path(config.out), local(config.checkpoint)
        self.stages = Stages(self.out, first)
        self.weights = read_weights(self.checkpoint)
        self.start = digest_of(self.checkpoint)
        self.training = settings.training(config, self.weights)

    def run(self) -> Path | None:
        self._same_settings()
        old = self._old_categories()
        if self.config.shards is None:
            self._pack()
        train_table, validation = self._tables()
        plan = self._plan(train_table, validation)
        source = [self.start, shards_of(self.config)]
        self._evaluate(BEFORE, self.checkpoint, source, old, answers=self._answers(train_table, validation))
        run = self.config.run
        length = [self.config.optim.max_steps, run.early_stop, run.early_stop_delta]
        self.stages.run("train", [*source, *length], self._train, together=True)
        chosen = self._chosen()
        self.stages.run("export", [digest_of(chosen)], lambda: self._export(chosen))
        model = self.out / MODEL
        self._evaluate(AFTER, model, [digest_of(model), shards_of(self.config)], old)
        return self._report(plan, len(train_table), len(validation), chosen) if self.first else None

    # ---- what the folder was begun with ----

    def _same_settings(self) -> None:
        """Refuse a folder that was begun with other settings. Rank 0 records those of this start."""
        path, digest = self.out / CONFIG, f"# checkpoint: sha256 {self.start}\n"
        if path.exists():
            text = path.read_text(encoding="utf-8")
            before, now = plain(load("finetune", [str(path)])), plain(self.config)
            longer = self.config.optim.max_steps > flat(before)[LENGTH]
            changed = [
                each
                for each in differences(before, now)
                if not each.startswith((*FREE, "out", "checkpoint")) and not (longer and each.startswith(LENGTH))
            ]
            if not text.startswith(digest):
                changed.append("another checkpoint")
            if changed:
                raise ConfigError(
                    f"out: {self.out} holds a fine-tuning with {', '.join(changed[:5])}: restore that, or choose "
                    "another out"
                )
        if self.first:
            write_text(path, digest + to_yaml(self.config))

    def _pack(self) -> None:
        path = self.out / CASES
        known = read_cases(path) if path.exists() else None
        cases = self._divided(known)
        if known is not None and (changed := same_cases(known, cases)):
            raise CaseError(
                f"out: {self.out} holds a fine-tuning on other cases ({changed}): restore them, or choose another out"
            )
        if self.first and known is None:
            write_cases(path, cases)
        inputs = [[case.id, case.split] for case in sorted(cases, key=lambda case: case.id)]
        self.stages.run("pack", inputs, lambda: pack(settings.packing(self.config, self.weights), self.console))

    def _divided(self, known: list[Case] | None) -> list[Case]:
        try:
            return divided(find_cases(self.config), self.config.held_out, self.config.data.seed)
        except CaseError as error:
            if known is None or "pack" not in self.stages.read():
                raise
            log.info("%s: they are packed already", error)
            return known

    # ---- the data ----

    def _tables(self) -> tuple[SampleTable, SampleTable]:
        """The labelled samples to train on, and to validate with. Raises ConfigError if there are none of either."""
        index, data = read_index(Store(shards_of(self.config))), self.config.data
        found = [index.samples.of_split(split).labelled() for split in (data.split, data.val_split)]
        for key, split, samples in zip(("split", "val_split"), (data.split, data.val_split), found, strict=True):
            if not len(samples):
                place = masked(shards_of(self.config))
                raise ConfigError(
                    f"data.{key}: {place} has no labelled sample in {split!r} (it has {index.splits}): give "
                    "images=DIR with labels=DIR, which are divided by data.seed, or name another split"
                )
        return found[0], found[1]

    def _old_categories(self) -> list[str] | None:
        """The categories by which to measure forgetting; empty: all of these shards; None: it is not measured."""
        if self.config.forgotten.shards is None:
            return None
        index: Index = read_index(Store(self.config.forgotten.shards))
        known = sorted(set(index.categories) & set(self.weights.categories))
        if self.weights.categories and not known:
            place, held = masked(self.config.forgotten.shards), listed(sorted(index.categories))
            raise ConfigError(
                f"forgotten.shards: {place} has {held}, none of which the checkpoint knows: it knows "
                f"{listed(self.weights.categories)}"
            )
        # Named categories are also prompted where they are absent, which takes longer.
        return known if len(known) < len(index.categories) and known else []

    def _plan(self, train_table: SampleTable, validation: SampleTable) -> list[str]:
        if not self.first:
            return []
        lines = [*describe_cases(train_table, validation), estimate(self.training).text]
        for line in lines:
            (log.warning if line.startswith("caution") else log.info)("%s", line)
        return lines

    # ---- the stages ----

    def _answers(self, *tables: SampleTable) -> bool:
        """Whether the checkpoint can answer any of the prompts: a new category's name means nothing to it."""
        names = {name for samples in tables for name in samples.per_category()}
        free_of_text = any("text" not in named_parts(prompt) for prompt in self.config.evaluation.prompts)
        return free_of_text or bool(names & set(self.weights.bank.texts))

    def _evaluate(self, name: str, model: Path, inputs: list[str], old: list[str] | None, answers: bool = True) -> None:
        config = settings.evaluation(self.config, model, name)
        if answers:
            self.stages.run(f"evaluate {name}", inputs, lambda: evaluate(config), together=True)
        else:
            log.info("evaluate %s: left out: the checkpoint knows none of the names, and all prompts have text", name)
        if old is None:
            return
        forgotten = self.config.forgotten
        inputs = [inputs[0], str(forgotten.shards), forgotten.split, str(forgotten.limit)]
        config = settings.old_evaluation(self.config, model, f"{name}{OLD}", old)
        self.stages.run(f"evaluate {name}{OLD}", inputs, lambda: evaluate(config), together=True)

    def _train(self) -> None:
        """Train in this process. Ranks that no launcher has started are started from a process of their own."""
        config = self.training
        ranks = config.run.devices * config.run.nodes
        if ranks == 1 or Partition.of("").ranks > 1:
            train(config)
        else:
            self._train_apart(config)

    def _train_apart(self, config: TrainConfig) -> None:
        """Lightning starts the other ranks by running the command of this process again."""
        path = self.out / "train.yaml"
        write_text(path, to_yaml(config))
        status = subprocess.run([sys.executable, "-m", "segvol_pl", "train", str(path)], check=False).returncode
        if status > SIGNALLED:
            raise SystemExit(status)
        if status:
            raise RunError(f"training failed (status {status}): see the lines above, then run the same command again")

    def _chosen(self) -> Path:
        """The checkpoint to export: with `run.early_stop` that of the best validation Dice, otherwise the last one."""
        folder = self.out / RUN / "checkpoints"
        best = folder / "best.ckpt"
        return best if self.config.run.early_stop and best.exists() else folder / "last.ckpt"

    def _export(self, checkpoint: Path) -> None:
        # The evaluations of an earlier model, which had fewer steps.
        for name in (AFTER, f"{AFTER}{OLD}"):
            remove(self.out / name)
        target = self.out / MODEL
        target.parent.mkdir(parents=True, exist_ok=True)
        export(checkpoint, target)

    # ---- the report ----

    def _report(self, plan: list[str], trained: int, validated: int, chosen: Path) -> Path:
        config, names = self.config, self.weights.categories
        found = gains(read_rows(self.out / BEFORE), read_rows(self.out / AFTER))
        forgotten = self._forgotten()
        findings = Findings(
            facts={
                "checkpoint": config.checkpoint,
                "model": str(self.out / MODEL),
                "cases": f"{trained} to train on, {validated} to validate with (data.seed={config.data.seed})",
                "method": {
                    Method.full: "full: all weights",
                    Method.decoder: "decoder: all weights but the image encoder's",
                    Method.lora: "lora: added matrices in the image encoder, and the rest",
                }[config.method],
                "steps": self._steps(chosen),
            },
            plan=plan,
            gained=found,
            forgotten=forgotten,
            about_forgetting=self._about_forgetting(names),
            few=what_cases_show(found, validated),
            config=to_yaml(config),
            stages=self.stages.read(),
        )
        write_report(self.out, findings)
        self.console.print(table(f"Dice of {validated} validation cases, before and after", found))
        if forgotten:
            self.console.print(table("Dice of the old categories, before and after", forgotten))
        for line in (gained(found), lost(forgotten) or findings.about_forgetting, findings.few):
            self.console.print(line)
        self.console.print(f"Model: {self.out / MODEL}\nReport: {self.out / 'report.html'}")
        return self.out / "report.html"

    def _steps(self, chosen: Path) -> str:
        """The steps of the exported model. Of the best validation, its figures on these cases are too good."""
        optim, step = self.config.optim, int(read_header(chosen)["global_step"])
        made = f"{step} of {optim.max_steps}, of {self.config.data.global_batch} volumes each"
        best = "; chosen by the validation cases, so that its figures on them are too good"
        return f"{made}{best if chosen.name == 'best.ckpt' else ''}"

    def _forgotten(self) -> list[Gain] | None:
        if self.config.forgotten.shards is None:
            return None
        return gains(read_rows(self.out / f"{BEFORE}{OLD}"), read_rows(self.out / f"{AFTER}{OLD}"))

    def _about_forgetting(self, names: list[str]) -> str:
        forgotten = self.config.forgotten
        if forgotten.shards is None:
            return NOT_MEASURED.format(known=listed(names) if names else "no names, but follows boxes and points")
        return (
            f"Categories that the checkpoint knew, on the cases of split {forgotten.split} of "
            f"{masked(forgotten.shards)}, before and after."
        )
