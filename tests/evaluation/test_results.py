"""Shares of the work, and the results so far."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segvol_pl.config import CasesConfig, EvaluateConfig, ZoomConfig
from segvol_pl.errors import EvaluateError
from segvol_pl.evaluation.mask_category import CategoryMatch
from segvol_pl.evaluation.results import CaseResult, Partition, ResultStore
from segvol_pl.evaluation.summary import Row

ROW = Row("a", "liver", "zoom", "text", "", "", 1, 0.5, None, 0.25, 4.0, -1.0, 0.1, 1.0, 3, 4, 1, "")


def config_for(out: Path) -> EvaluateConfig:
    return EvaluateConfig(checkpoint="m.ckpt", data=CasesConfig(shards="s"), out=str(out))


@given(st.integers(0, 40), st.integers(1, 7), st.integers(1, 5))
def test_shares_hold_each_case_once(cases: int, ranks: int, parts: int) -> None:
    shares = [
        Partition(rank, ranks, part, parts).select(range(cases)) for rank in range(ranks) for part in range(parts)
    ]
    assert sorted(case for share in shares for case in share) == list(range(cases))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_share_is_known_from_torchrun_and_srun_but_not_from_sbatch() -> None:
    assert Partition.of("", {"RANK": "2", "WORLD_SIZE": "4"}) == Partition(2, 4)
    step = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3"}
    assert Partition.of("1/2", step) == Partition(1, 3, 1, 2)
    assert Partition.of("", {"SLURM_PROCID": "0", "SLURM_NTASKS": "3"}) == Partition()
    assert Partition.of("", {**step, "RANK": "0", "WORLD_SIZE": "9"}) == Partition(0, 9)
    with pytest.raises(EvaluateError, match="RANK=4 and WORLD_SIZE=4"):
        Partition.of("", {"RANK": "4", "WORLD_SIZE": "4"})


def test_results_are_found_again_unless_the_case_has_changed(tmp_path: Path) -> None:
    store = ResultStore(tmp_path, config_for(tmp_path), "digest")
    store.open(restart=False)
    result = CaseResult(
        "a", "mark", 1.5, [ROW], [CategoryMatch("a", "liver", "box", 1, "liver", 0.5)], ["spleen"], ["x"]
    )
    assert store.find("a", "mark") is None
    store.write(result)
    assert store.find("a", "mark") == result and store.find("a", "changed") is None
    store.open(restart=True)
    assert store.find("a", "mark") is None


def test_what_does_not_decide_the_figures_may_change(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    ResultStore(tmp_path, config, "digest").open(restart=False)
    moved = replace(config, checkpoint="elsewhere.ckpt", limit=3, pictures=0, device="cuda", part="0/2")
    ResultStore(tmp_path, moved, "digest").open(restart=False)
    roomier = replace(config, zoom=ZoomConfig(cache_gb=9.0))
    ResultStore(tmp_path, roomier, "digest").open(restart=False)
    with pytest.raises(EvaluateError, match=r"other zoom\.overlap:"):
        ResultStore(tmp_path, replace(config, zoom=ZoomConfig(overlap=0.1)), "digest").open(restart=False)
    with pytest.raises(EvaluateError, match="other timing"):
        ResultStore(tmp_path, replace(config, timing="cold"), "digest").open(restart=False)  # type: ignore[arg-type]


def test_a_file_that_is_no_result_is_named(tmp_path: Path) -> None:
    store = ResultStore(tmp_path, config_for(tmp_path), "digest")
    store.open(restart=False)
    (tmp_path / "cases" / "a.json").write_text('{"key": "a"')
    with pytest.raises(EvaluateError, match=r"cases/a\.json"):
        store.find("a", "mark")
