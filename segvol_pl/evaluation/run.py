"""Evaluate a model over a set of cases: rows, tables, report.

1. List the labelled cases (`evaluation.cases`) and divide them among the ranks and array tasks.
2. For each category of a case, sample prompts from the ground truth (`evaluation.prompts`) and segment by them in each
   mode (`evaluation.case_runner`). The scores of a prediction are a `Row`.
3. Write the rows of a case atomically (`evaluation.results`). A restart continues with the cases that have no rows.
   With `protocol=cvpr25` a category is segmented by six calls in place of that (`evaluation.interactive`).
4. On rank 0 of a run without `part`, wait for all cases and merge them: rows.csv, interactions.csv,
   category_matches.csv, summary.json, report.html, and trackers if they are configured.

Spatial prompts come from the ground truth, as in the paper. So the figures measure how well the model follows a prompt,
not how well it finds a structure without one. Only `text` does not depend on the truth.
"""

from __future__ import annotations

import json
import logging
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console

from segvol_pl.atomic import write_text
from segvol_pl.config import EvaluateConfig, EvaluationProtocol, Mode, named_parts
from segvol_pl.config.loader import custom_function, to_yaml
from segvol_pl.device import autocast, own_device
from segvol_pl.errors import ChallengeError, ConfigError, EvaluateError, SampleError, ShardError, VolumeError
from segvol_pl.evaluation.case_runner import CaseRunner, Prediction
from segvol_pl.evaluation.cases import EvalCase, EvalCases, find_cases
from segvol_pl.evaluation.challenge import instance_counts
from segvol_pl.evaluation.figures import Picture, plot_picture, slice_planes
from segvol_pl.evaluation.interactive import answer_calls, call_settings
from segvol_pl.evaluation.mask_category import CategoryMatch, matches_of, soft_dice
from segvol_pl.evaluation.metrics import dice, score
from segvol_pl.evaluation.prompts import Setting, check_custom, settings
from segvol_pl.evaluation.protocol import INSTANCE_COLUMNS, Interaction, ProtocolFigures, interactions
from segvol_pl.evaluation.report import write_report
from segvol_pl.evaluation.results import CaseResult, Partition, ResultStore, wait_for_ranks
from segvol_pl.evaluation.summary import Row, Summary, csv_text, number
from segvol_pl.evaluation.tracking import track
from segvol_pl.folder_lock import FolderLock
from segvol_pl.hub import local
from segvol_pl.inference.zoom import Promptable
from segvol_pl.model.checkpoint import digest_of, load_model
from segvol_pl.model.text_encoder import TextBank
from segvol_pl.run_folder import manifest

__all__ = ["EvaluateError", "Row", "Summary", "evaluate", "evaluate_model"]

log = logging.getLogger(__name__)

MASKS_FOLDER = "masks"
LISTED_CASES = 5
"""Unreadable cases that an error names."""


class Evaluable(Promptable, Protocol):
    """The interface that evaluation needs of a model; SegVol has it."""

    bank: TextBank


def evaluate(config: EvaluateConfig, console: Console | None = None) -> Summary | None:
    """Evaluate this process's part of the cases into `config.out`, and merge all parts on rank 0.

    Args:
        config: What to evaluate, and how.
        console: Where to print the table of means; None prints nothing.

    Returns:
        The merged figures; None on ranks above 0 and with `config.part`, which merge nothing.

    Raises:
        EvaluateError: There is no labelled case, no case has any of the categories, or `out` holds the results of other
            settings.
        LockedError: Another process evaluates the same part into `out`.
        UnknownCategory: The model does not know a category of `config.categories`.
        CheckpointError, ShardError, CaseError: A file cannot be used.
    """
    cases = find_cases(config.data)
    model = load_model(config.checkpoint, own_device(config.device))
    evaluation = _Evaluation(config, cases, model, digest_of(local(config.checkpoint)))
    summary = evaluation.run()
    if summary and console:
        console.print(summary.table())
        if figures := evaluation.protocol_figures(summary):
            console.print(figures.table())
    return summary


def evaluate_model(config: EvaluateConfig, model: Evaluable) -> Summary | None:
    """Evaluate a loaded model (in eval mode). `config.checkpoint` is only its name; `config.device` is not used."""
    return _Evaluation(config, find_cases(config.data), model, config.checkpoint).run()


def _custom_metrics(metrics: Sequence[str], others: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """Map column to function. Raises ConfigError if a function is missing, or rows.csv has a column of its name."""
    taken = {*(each.name for each in fields(Row)), *others}
    found = {}
    for name in metrics:
        column = name.rpartition(":")[2]
        if column in taken:
            raise ConfigError(
                f"metrics: {name}: rows.csv already has a column {column!r}: rename the function", "metrics"
            )
        found[column] = custom_function(name, "metrics")
    return found


class _Evaluation:
    """One process's part of an evaluation."""

    def __init__(self, config: EvaluateConfig, cases: EvalCases, model: Evaluable, identity: str) -> None:
        self.config, self.cases, self.model = config, cases, model
        self.out = Path(config.out)
        self.keys = list(cases.fingerprints)[: config.limit or None]
        self.partition = Partition.of(config.part)
        if not config.resume and (self.partition.ranks > 1 or config.part):
            raise EvaluateError("resume: false would remove the results of other ranks: set out to another folder")
        for category in config.categories:
            model.bank.index(category)
        self.settings = _settings(config)
        check_custom(config)
        self.instances = config.instances or config.protocol is EvaluationProtocol.cvpr25_text
        self.custom = _custom_metrics(config.metrics, INSTANCE_COLUMNS if self.instances else ())
        self.results = ResultStore(self.out, config, identity)
        self.attempted: set[str] = set()
        """Cases that this process has evaluated; an unreadable one is not tried twice."""

    def run(self) -> Summary | None:
        # Each part has a lock of its own in the folder; a run that removes all results excludes every other.
        with FolderLock(self.out, self.partition.lock, against="" if self.config.resume else ".lock*.json"):
            return self._run()

    def _run(self) -> Summary | None:
        self.results.open(restart=not self.config.resume)
        self._evaluate(self.partition.select(self.keys))
        if self.config.part:
            log.info("part %s is done; to merge all parts, run again without part=", self.config.part)
            return None
        if self.partition.rank > 0:
            return None
        self._wait_for(self.keys)
        return self._merge()

    # ---- cases ----

    def _evaluate(self, keys: Sequence[str]) -> None:
        """Evaluate the cases without a result. An unreadable case is recorded as such; every run tries it again."""
        missing = [key for key in keys if not self._has_result(key)]
        if len(missing) < len(keys):
            log.info("%d of %d cases are already done", len(keys) - len(missing), len(keys))
        start, prompts = time.perf_counter(), 0
        for count, key in enumerate(missing, start=1):
            result = self._case(key)
            self.results.write(result)
            self.attempted.add(key)
            prompts += len(result.rows)
            rate = prompts / (time.perf_counter() - start)
            log.info("case %d/%d %s (%.2f prompts/s)", count, len(missing), key, rate)

    def _has_result(self, key: str) -> bool:
        result = self.results.find(key, self.cases.fingerprints[key])
        return result is not None and (not result.problem or key in self.attempted)

    def _case(self, key: str) -> CaseResult:
        start, fingerprint = time.perf_counter(), self.cases.fingerprints[key]
        try:
            case = self.cases.read(key)
            runner = CaseRunner(self.model, case, self.config)
            rows = list(self._rows(runner))
            matches = self._matches(runner) if self.config.match_categories else []
        except (ShardError, SampleError, VolumeError, ChallengeError) as error:
            log.warning("case %s cannot be evaluated: %s", key, error)
            return CaseResult(key, fingerprint, time.perf_counter() - start, problem=" ".join(str(error).split()))
        held, by_text = set(case.facts.categories), any(setting.has_text for setting in self.settings)
        return CaseResult(
            key,
            fingerprint,
            time.perf_counter() - start,
            rows,
            matches,
            absent=[category for category in self.config.categories if self._own_name(case, category) not in held],
            unknown=sorted(held - set(self.model.bank.texts)) if by_text else [],
        )

    def _own_name(self, case: EvalCase, category: str) -> str:
        """The name that a case has for a category. One that it lacks may be the model's synonym of one that it has."""
        if category in case.facts.categories:
            return category
        return self.model.bank.synonyms.get(category, category)

    def _rows(self, runner: CaseRunner) -> Iterator[Row]:
        case = runner.case
        for category in self.config.categories or sorted(case.facts.categories):
            truth_DHW = case.truth(self._own_name(case, category))
            for setting, prediction in self._predictions(runner, category, truth_DHW):
                yield self._row(case, category, setting, truth_DHW, prediction)

    def _predictions(
        self, runner: CaseRunner, category: str, truth_DHW: np.ndarray
    ) -> Iterator[tuple[Setting, Prediction]]:
        if self.config.protocol is EvaluationProtocol.cvpr25:
            yield from answer_calls(runner, category, truth_DHW) if truth_DHW.any() else ()
            return
        for setting in self._settings_for(category, bool(truth_DHW.any())):
            yield setting, runner.predict(setting, category, truth_DHW)

    def _prediction_of(self, row: Row, runner: CaseRunner, truth_DHW: np.ndarray) -> Prediction:
        """The prediction of a row, made again. A call of a protocol needs those before it; other settings do not."""
        if self.config.protocol is not EvaluationProtocol.cvpr25:
            return runner.predict(row.setting, row.category, truth_DHW)
        calls = answer_calls(runner, row.category, truth_DHW)
        return next(prediction for setting, prediction in calls if setting == row.setting)

    def _settings_for(self, category: str, present: bool) -> list[Setting]:
        """Settings that apply: no text for a category unknown to the model, only text for one absent from the case."""
        known = category in self.model.bank.texts
        return [
            setting
            for setting in self.settings
            if (known or not setting.has_text) and (present or setting.free_of_truth)
        ]

    def _row(
        self, case: EvalCase, category: str, setting: Setting, truth_DHW: np.ndarray, prediction: Prediction
    ) -> Row:
        scores = score(prediction.mask_DHW, truth_DHW, case.facts.spacing, self.config.tolerance)
        voxels, coarse_DHW = int(np.count_nonzero(truth_DHW)), prediction.coarse_DHW
        return Row(
            case=case.facts.key,
            category=category,
            mode=setting.mode,
            prompt=setting.prompt,
            box=setting.box,
            points=setting.points,
            components=len(prediction.prompts) if voxels else 0,
            dice=scores.dice,
            zoom_out=dice(coarse_DHW, truth_DHW) if voxels and coarse_DHW is not None else None,
            surface_dice=scores.surface_dice,
            hd95=scores.hd95,
            volume_error=scores.volume_error,
            seconds=prediction.seconds,
            memory_mb=prediction.memory_mb,
            truth_voxels=voxels,
            predicted_voxels=int(np.count_nonzero(prediction.mask_DHW)),
            windows=prediction.windows,
            mask=self._write_mask(case, category, setting, prediction) if self.config.masks else "",
            custom=self._custom(case, truth_DHW, prediction) if voxels else self._no_custom(),
        )

    def _custom(self, case: EvalCase, truth_DHW: np.ndarray, prediction: Prediction) -> dict[str, float | None]:
        """Scores of instances, and the user's own metrics; None for a metric that returns None."""
        parts_DHW = truth_DHW if case.instances_DHW is None else case.instances_DHW
        instances = instance_counts(parts_DHW, prediction.mask_DHW) if self.instances else {}
        found = {name: of(prediction.mask_DHW, truth_DHW, case.facts.spacing) for name, of in self.custom.items()}
        return {name: None if value is None else float(value) for name, value in {**instances, **found}.items()}

    def _no_custom(self) -> dict[str, float | None]:
        return dict.fromkeys([*(INSTANCE_COLUMNS if self.instances else ()), *self.custom])

    def _write_mask(self, case: EvalCase, category: str, setting: Setting, prediction: Prediction) -> str:
        """Write a mask and return its path relative to `out`; empty if the case has no affine."""
        if case.grid is None:
            log.warning("case %s has no affine: cannot write its masks", case.facts.key)
            return ""
        folder = self.out / MASKS_FOLDER / case.facts.key
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{file_stem(category)}__{file_stem(str(setting))}.nii.gz"
        case.save(prediction.mask_DHW, path)
        return path.relative_to(self.out).as_posix()

    def _matches(self, runner: CaseRunner) -> list[CategoryMatch]:
        """Match the masks of the case, each by one spatial prompt without text, with the categories they resemble."""
        case, setting, names = runner.case, self._match_setting(), self.model.bank.names
        categories = self.config.categories or sorted(case.facts.categories)
        truths = {name: truth for name in categories if (truth := case.truth(name)).any()}
        if not truths or not names:
            return []
        prompts = [runner.sample_prompts(setting, name, truth)[0].model_prompt for name, truth in truths.items()]
        tokens_BTE = runner.overview()
        with autocast(runner.device, self.config.precision):
            table_JK = soft_dice(self.model, tokens_BTE, prompts, names)
        prompt, _ = setting.named
        return [
            match
            for name, soft_dice_K in zip(truths, table_JK, strict=True)
            for match in matches_of(case.facts.key, name, prompt, soft_dice_K, names)
        ]

    def _match_setting(self) -> Setting:
        """The first configured spatial prompt, without its text; an exact box if there is none."""
        for setting in self.settings if self.config.protocol is EvaluationProtocol.none else ():
            parts = [part for part in named_parts(setting.prompt) if part != "text"]
            if parts:
                return Setting(Mode.resize.value, "+".join(parts), setting.box, setting.points)
        return Setting(Mode.resize.value, "box", "exact")

    # ---- merging ----

    def _wait_for(self, keys: Sequence[str]) -> None:
        """Wait for the result of every case. Raises EvaluateError if none arrives for `config.rank_timeout` seconds."""

        def is_there(key: str) -> bool:
            return self.results.find(key, self.cases.fingerprints[key]) is not None

        wait_for_ranks(keys, is_there, self.config.rank_timeout, "result")

    def _merge(self) -> Summary:
        # A case that another rank could not read may be readable here, or by now.
        if failed := [key for key in self.keys if not self._has_result(key)]:
            self._evaluate(failed)
        results = [self.results.find(key, self.cases.fingerprints[key]) for key in self.keys]
        summary = self._summary([result for result in results if result is not None])
        self._check(summary)
        pictures, figures = self._pictures(summary), self.protocol_figures(summary)
        about = {"config": to_yaml(self.config), **manifest()}
        write_text(self.out / "rows.csv", csv_text(Row, summary.rows))
        if self.config.match_categories:
            write_text(self.out / "category_matches.csv", csv_text(CategoryMatch, summary.matches))
        if self.config.protocol is EvaluationProtocol.cvpr25:
            found = interactions(summary.rows, self.config.target_dice)
            write_text(self.out / "interactions.csv", csv_text(Interaction, found))
        protocol = {"protocol": figures.to_dict()} if figures else {}
        text = json.dumps({**summary.to_dict(), **protocol, "manifest": about}, indent=2, ensure_ascii=False)
        write_text(self.out / "summary.json", text + "\n")
        write_report(self.out / "report.html", summary, pictures, about, figures)
        track(self.out, self.config, summary, pictures, figures)
        return summary

    def protocol_figures(self, summary: Summary) -> ProtocolFigures | None:
        """Return the figures of the configured protocol; None without one."""
        protocol = self.config.protocol
        if protocol is EvaluationProtocol.none:
            return None
        return ProtocolFigures.of(protocol, summary.rows, self.config.target_dice, self.config.seed)

    def _summary(self, results: Sequence[CaseResult]) -> Summary:
        return Summary(
            checkpoint=str(self.config.checkpoint),
            source=self.cases.source,
            split=self.cases.split,
            cases=sum(not result.problem for result in results),
            rows=[row for result in results for row in result.rows],
            absent=dict(Counter(name for result in results for name in result.absent)),
            unknown=dict(Counter(name for result in results for name in result.unknown)),
            unlabelled=self.cases.unlabelled,
            unusable={result.key: result.problem for result in results if result.problem},
            matches=[match for result in results for match in result.matches],
            seconds=sum(result.seconds for result in results),
            seed=self.config.seed,
        )

    def _check(self, summary: Summary) -> None:
        bad = len(summary.unusable)
        if bad > self.config.max_bad_fraction * len(self.keys):
            named = "; ".join(f"{case}: {why}" for case, why in list(summary.unusable.items())[:LISTED_CASES])
            raise EvaluateError(
                f"{bad} of {len(self.keys)} cases cannot be read, more than max_bad_fraction="
                f"{self.config.max_bad_fraction} allows: repair them and run again, or raise it. {named}"
            )
        if all(row.empty for row in summary.rows):
            raise EvaluateError(f"categories: no case of {summary.source} has a category that can be evaluated")

    # ---- pictures ----

    def _pictures(self, summary: Summary) -> list[Picture]:
        """Draw the worst, median and best case of the worst categories; segments them again, as no rank keeps masks."""
        last = self.settings[-1] if self.config.protocol is EvaluationProtocol.cvpr25 else None
        chosen = select_examples(summary, self.config.pictures, last)
        drawn = {
            (row.case, row.category): picture
            for case in dict.fromkeys(row.case for _, row in chosen)
            for row, picture in self._draw(case, [(label, row) for label, row in chosen if row.case == case])
        }
        return [drawn[row.case, row.category] for _, row in chosen]

    def _draw(self, key: str, rows: Sequence[tuple[str, Row]]) -> Iterator[tuple[Row, Picture]]:
        case = self.cases.read(key)
        runner = CaseRunner(self.model, case, self.config)
        for label, row in rows:
            truth_DHW = case.truth(self._own_name(case, row.category))
            prediction = self._prediction_of(row, runner, truth_DHW)
            coarse = {} if prediction.coarse_DHW is None else {"zoom-out": prediction.coarse_DHW}
            masks = {**coarse, "prediction": prediction.mask_DHW}
            planes = slice_planes(case.hu_DHW, case.facts.spacing or (1, 1, 1), truth_DHW, masks, prediction.prompts)
            before = "" if row.zoom_out is None else f"{row.zoom_out:.3f} → "
            caption = f"{row.category}, {label}: {key}, {row.setting}: Dice {before}{number(row.dice)}"
            yield row, Picture(key, row.category, caption, plot_picture(planes))


def _settings(config: EvaluateConfig) -> list[Setting]:
    """The settings of the protocol, or those of the configuration."""
    if config.protocol is EvaluationProtocol.cvpr25:
        return call_settings()
    if config.protocol is EvaluationProtocol.cvpr25_text:
        return [Setting(Mode.zoom.value, "text")]
    return settings(config)


def select_examples(summary: Summary, categories: int, setting: Setting | None = None) -> list[tuple[str, Row]]:
    """Select the worst, median and best row of up to `categories` categories, the lowest median Dice first.

    Args:
        summary: The figures.
        categories: At most so many.
        setting: The setting of all the rows. None: zoom by box and text if that was evaluated, else the first one.

    Returns:
        Pairs of a label (`worst`, `median and best`, ...) and a row.
    """
    wanted = [setting for setting in summary.settings if (setting.mode, setting.prompt) == ("zoom", "box+text")]
    setting = setting or [*wanted, *summary.settings][0]
    medians = {
        category: cell.dice.median
        for (category, where), cell in summary.cells.items()
        if where == setting and cell.dice
    }
    worst = sorted(medians, key=lambda category: (medians[category], category))[:categories]
    return [
        found
        for category in worst
        for found in _extremes([row for row in summary.rows if (row.category, row.setting) == (category, setting)])
    ]


def _extremes(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """Label the worst, median and best row by Dice; one row may carry several labels."""
    ranked = sorted((row for row in rows if row.dice is not None), key=lambda row: (row.dice, row.case))
    places = {"worst": 0, "median": len(ranked) // 2, "best": len(ranked) - 1}
    labels: dict[int, list[str]] = {}
    for label, place in places.items():
        labels.setdefault(place, []).append(label)
    return [(" and ".join(names) if len(ranked) > 1 else "only case", ranked[place]) for place, names in labels.items()]


def file_stem(name: str) -> str:
    """Make a file name of a name. A changed one ends with a hash, so that two names never share a file."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("_.")
    return plain if plain == name else f"{plain}-{zlib.crc32(name.encode()):08x}"
