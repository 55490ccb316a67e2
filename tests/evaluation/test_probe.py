"""Probes: what they measure is right, features without information are not found better, too few labels are refused."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, special

from segvol_pl.config import ProbeConfig
from segvol_pl.data.sample_table import SampleRecord, SampleTable
from segvol_pl.errors import EvaluateError
from segvol_pl.evaluation import probe_models
from segvol_pl.evaluation.feature_folder import INTENSITY, TRAINED, UNTRAINED, Part, part_path, write_index, write_part
from segvol_pl.evaluation.probe import probe
from segvol_pl.evaluation.probe_models import (
    PENALTIES,
    USUAL,
    auc,
    balanced_accuracy,
    chosen_penalty,
    linear_scores,
    neighbour_scores,
    standardised,
    stratified_folds,
)
from segvol_pl.evaluation.probe_tasks import drawn


def planted(folder: Path, count: int, strength: float, seed: int = 0, width: int = 12) -> Path:
    """Features of `count` volumes: those of the encoder tell liver from no liver, the others are noise.

    Every third volume is of the split test, and the last one has no labels.
    """
    rng = np.random.default_rng(seed)
    present_N = rng.random(count) < 0.4
    keys = [f"case-{number:04d}" for number in range(count)]
    arrays = {kind: rng.standard_normal((count, width)).astype(np.float32) for kind in (TRAINED, UNTRAINED, INTENSITY)}
    arrays[TRAINED][:, 0] += strength * present_N
    records = [
        SampleRecord(
            key,
            "a.tar",
            "train" if number % 3 else "test",
            number < count - 1,
            [1, 1, 1],
            None,
            ["body", "liver"] if present_N[number] else ["body"],
            {},
        )
        for number, key in enumerate(keys)
    ]
    (folder / "parts").mkdir(parents=True)
    parts = []
    for number, first in enumerate(range(0, count, 50)):
        rows = {kind: array[first : first + 50] for kind, array in arrays.items()}
        parts.append(Part(keys[first : first + 50], rows, {}))
        write_part(part_path(folder, number), parts[-1])
    write_index(
        folder, SampleTable.of(records), parts, {"checkpoint": "last.ckpt", "arrays": dict.fromkeys(arrays, "")}
    )
    return folder


def configured(folder: Path, **changes: object) -> ProbeConfig:
    given = {"features": str(folder), "out": str(folder / "probe"), "bootstraps": 200, "draws": 2, **changes}
    return ProbeConfig(**given)  # type: ignore[arg-type]


def results(config: ProbeConfig) -> dict[tuple[str, str, float], dict[str, float]]:
    figures = json.loads(Path(config.out, "probe.json").read_text())["figures"]
    return {(each["features"], each["probe"], each["fraction"]): each for each in figures}


# ---- classifiers and figures ----


def test_the_area_counts_pairs_within_folds() -> None:
    rng = np.random.default_rng(0)
    score, positive, fold = rng.integers(0, 5, 40) / 4, rng.random(40) < 0.5, rng.integers(0, 3, 40)
    times = rng.integers(0, 3, (4, 40))
    for weight, found in zip(times, auc(score, positive, fold, times.astype(float)), strict=True):
        right = pairs = 0.0
        for i in np.flatnonzero(positive):
            for j in np.flatnonzero(~positive & (fold == fold[i])):
                right += weight[i] * weight[j] * (float(score[i] > score[j]) + 0.5 * float(score[i] == score[j]))
                pairs += weight[i] * weight[j]
        assert found == pytest.approx(right / pairs)
    assert np.isnan(auc(score, np.ones(40, bool), fold, np.ones((1, 40))))


def test_balanced_accuracy_is_the_mean_recall() -> None:
    label = np.array([0, 0, 0, 1, 1, 2])
    score = np.eye(3)[[0, 0, 1, 1, 0, 2]]
    assert balanced_accuracy(score, label, np.ones((1, 6))) == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert balanced_accuracy(score, label, np.array([[1, 1, 0, 1, 0, 0.0]])) == pytest.approx(1.0)


@pytest.mark.parametrize("shape", [(30, 4), (12, 40)], ids=["many volumes", "many features"])
def test_the_linear_probe_is_at_the_minimum_of_its_loss(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    features, label = rng.standard_normal(shape), np.arange(shape[0]) % 3
    label[0] = 1
    weights = next(probe_models._fits(features, label, 3, (0.1,)))

    def loss(flat: np.ndarray) -> float:
        given = flat.reshape(-1, 3)
        logs = special.log_softmax(features @ given[:-1] + given[-1], axis=1)[np.arange(len(label)), label]
        means = [-logs[label == number].mean() for number in range(3)]
        return float(np.mean(means) + 0.05 * (given[:-1] ** 2).sum())

    assert np.abs(optimize.approx_fprime(weights.ravel(), loss)).max() < 2e-3
    assert loss(weights.ravel()) < loss(np.zeros(weights.size))


def test_both_probes_find_what_is_there_and_ignore_the_scale_of_features() -> None:
    rng = np.random.default_rng(0)
    label = np.arange(120) % 3
    features = rng.standard_normal((120, 5)) + 4 * np.eye(5)[label]
    for scale in (1.0, np.array([1e3, 1e-3, 1, 1, 7])):
        train, test = features[:60] * scale, features[60:] * scale
        linear = linear_scores(train, label[:60], test, 3, 0.01)
        near = neighbour_scores(train, label[:60], test, 3, 5)
        for score in (linear, near):
            assert (score.argmax(1) == label[60:]).mean() > 0.9
    assert np.allclose(near.sum(1), 1)
    constant, _ = standardised(np.ones((3, 1)), np.ones((2, 1)))
    assert not constant.any()


def test_noise_takes_a_strong_penalty_and_signal_a_weak_one() -> None:
    rng = np.random.default_rng(0)
    label, noise = np.arange(60) % 2, rng.standard_normal((60, 30))
    strong = chosen_penalty(noise, label, 2, np.random.default_rng(0))
    weak = chosen_penalty(noise + 5 * label[:, None], label, 2, np.random.default_rng(0))
    assert strong == max(PENALTIES) and weak < 0.1
    assert chosen_penalty(noise[:4], label[:4], 2, rng) == USUAL, "too few to choose"


def test_folds_keep_groups_together_and_classes_apart() -> None:
    group = np.repeat(np.arange(20), 3)
    label = np.repeat(np.arange(20) % 2, 3)
    fold = stratified_folds(label, group, 5, np.random.default_rng(0))
    assert all(len(set(fold[group == number])) == 1 for number in range(20))
    assert all(np.bincount(label[fold == number]).tolist() == [6, 6] for number in range(5))


def test_smaller_fractions_are_parts_of_larger_ones() -> None:
    label = np.array([0] * 90 + [1] * 10)
    sets = [set(drawn(label, share, 2, np.random.default_rng(3)).tolist()) for share in (0.02, 0.1, 0.5, 1.0)]
    assert [len(each) for each in sets] == [3, 10, 50, 100]
    assert all(one < other for one, other in pairwise(sets))


# ---- the command ----


def test_features_that_know_are_better_and_more_labels_help(tmp_path: Path) -> None:
    config = configured(planted(tmp_path / "features", 240, strength=2.0), fractions=[0.01, 0.05, 1.0])
    said = probe(config)
    assert "liver, linear, 191 labels: the encoder is better than raw intensity" in "\n".join(said)
    assert "liver, neighbours, 191 labels: the encoder is better than untrained encoder" in "\n".join(said)
    found = results(config)
    best = found["encoder", "linear", 1.0]
    assert best["low"] < best["value"] < best["high"] and best["value"] > 0.85
    assert best["value"] > found["encoder", "linear", 0.05]["value"]
    assert abs(found["raw intensity", "linear", 1.0]["value"] - 0.5) < 0.12
    assert any("left out 1% of the 191 labels of liver" in line and "1% needs 200 labels" in line for line in said)
    assert any("left out 1 categories (body): body: 0 in class 'absent'" in line for line in said)
    out = Path(config.out)
    with (out / "probe.csv").open(newline="") as stream:
        assert len(list(csv.DictReader(stream))) == len(found)
    page = (out / "index.html").read_text()
    assert "liver: AUC" in page and page.count("<img") == 1 and (out / "labels-0.png").stat().st_size > 1000


def test_features_without_information_are_not_found_better(tmp_path: Path) -> None:
    values, claims = [], 0
    for seed in range(6):
        config = configured(planted(tmp_path / str(seed), 90, 0.0, seed), fractions=[1.0], seed=seed)
        claims += sum("better than" in line or "worse than" in line for line in probe(config))
        found = results(config)["encoder", "linear", 1.0]
        values.append(found["value"])
        assert found["low"] < 0.6 and found["high"] > 0.4
    # 24 comparisons at 5 %; pooling scores over folds would pull the mean below 0.5.
    assert claims <= 5 and abs(np.mean(values) - 0.5) < 0.07


def test_a_split_is_trained_on_train_alone(tmp_path: Path) -> None:
    config = configured(planted(tmp_path / "features", 120, 3.0), folds=0, fractions=[0.5, 1.0])
    probe(config)
    found = results(config)
    assert found["encoder", "linear", 1.0]["labels"] == 79 and found["encoder", "linear", 1.0]["value"] > 0.9


def table(path: Path, rows: list[str], head: str = "key,label") -> str:
    path.write_text("\n".join([head, *rows]) + "\n")
    return str(path)


def test_labels_of_a_table_with_groups(tmp_path: Path) -> None:
    folder = planted(tmp_path / "features", 120, 0.0)
    kinds = ("a", "b", "c")
    rows = [f"case-{number:04d},{kinds[number // 2 % 3]},patient-{number // 2}" for number in range(120)]
    labels = table(tmp_path / "scanner.csv", [*rows, "elsewhere,a,x"], "key,label,group")
    config = configured(folder, labels=labels, fractions=[1.0])
    said = probe(config)
    assert "left out: 1 of 121 keys of scanner.csv are not among the features" in said
    found = json.loads(Path(config.out, "probe.json").read_text())
    assert found["tasks"] == {"scanner": {"metric": "balanced accuracy", "volumes": {"a": 40, "b": 40, "c": 40}}}
    assert abs(results(config)["encoder", "linear", 1.0]["value"] - 1 / 3) < 0.15


@pytest.mark.parametrize(
    ("rows", "head", "problem"),
    [
        (
            ["case-0000,a", "case-0001,b"],
            "key,label",
            r"labels: labels: 1 in class 'a': each of the 2 .* least 10",
        ),
        (["case-0000,a", "case-0001,a"], "key,label", "all labels are 'a': needs two or more"),
        (["case-0000,a"], "key,class", ":1: no column label"),
        (["case-0000,a", "case-0000,b"], "key,label", ":3: case-0000 has a label already"),
        (["nowhere,a"], "key,label", r"none of its 1 keys \(first: nowhere\)"),
    ],
)
def test_a_table_that_cannot_be_used_is_named(tmp_path: Path, rows: list[str], head: str, problem: str) -> None:
    folder = planted(tmp_path / "features", 30, 0.0)
    with pytest.raises(EvaluateError, match=problem) as caught:
        probe(configured(folder, labels=table(tmp_path / "labels.csv", rows, head)))
    assert "\n" not in str(caught.value)


def test_too_few_volumes_and_unknown_categories_are_refused(tmp_path: Path) -> None:
    config = configured(planted(tmp_path / "features", 15, 0.0))
    with pytest.raises(EvaluateError, match=r"none can be predicted: body: 0 in .* needs at least 10 .* for folds=5"):
        probe(config)
    with pytest.raises(EvaluateError, match="no volume has 'heart'; there are body, liver"):
        probe(replace(config, categories=["heart"]))
    with pytest.raises(EvaluateError, match="no finished folder of segvol-pl embed"):
        probe(replace(config, features=str(tmp_path)))
