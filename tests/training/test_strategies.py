"""Every strategy with real processes on the CPU: the same losses, and checkpoints that any of them goes on from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import train_config
from ranks import Ranks
from trained import RELATIVE, Losses, Trained, same_averages, same_state

from segvol_pl.config import Strategy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS, HALF = 20, 10
MULTIPLE = ["ddp", "fsdp", "zero1", "zero2", "zero3"]
MATRIX = ["ddp", "fsdp", "zero2", "zero3"]
FROZEN = "freeze=[image_encoder.*]"
ADAPTED = ("optim.lora_rank=3", "optim.max_steps=4", "run.checkpoint_every=2", "run.save_every=2")


@pytest.fixture(scope="module")
def trained(phantom_shards: Path, ranks: dict[int, Ranks], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    trained = Trained(tmp_path_factory.mktemp("strategies"), ranks)
    config = train_config(phantom_shards, trained / "run", steps=STEPS)
    run = replace(config.run, checkpoint_every=HALF, save_every=HALF, val_every=0, val_batches=1)
    data = replace(config.data, samples_per_volume=5)
    # Parts of the model and of the samples that are off by default.
    model = replace(config.model, mask_prompt=True)
    prompts = replace(config.prompts, mask_fraction=0.6, per_category=3, corrections=1)
    optim = replace(config.optim, ema=0.8, weight_decay_all=False)
    config = replace(config, run=run, data=data, model=model, prompts=prompts, optim=optim)
    trained.configure(config)
    return trained


@pytest.fixture(scope="module")
def losses(trained: Trained) -> dict[str, Losses]:
    """Strategy -> losses; of one process, and of two by every strategy."""
    return {"auto": trained("auto", "auto", 1)} | {name: trained(name, name, 2) for name in MULTIPLE}


@pytest.fixture(scope="module")
def frozen(trained: Trained) -> Losses:
    """Of one process that trains the prompts' side alone."""
    return trained("frozen", "auto", 1, FROZEN)


def test_all_strategies_are_tried() -> None:
    assert {"auto", *MULTIPLE} == {strategy.value for strategy in Strategy}


def test_every_strategy_gives_the_losses_of_one_process(losses: dict[str, Losses]) -> None:
    for name, found in losses.items():
        worst = max(abs(found[step] / losses["auto"][step] - 1) for step in range(1, STEPS + 1))
        assert worst < RELATIVE, name


def test_every_strategy_tells_the_norm_of_the_gradients(losses: dict[str, Losses], trained: Trained) -> None:
    first, *others = (trained.metric(name, "train/grad_norm") for name in losses)
    assert first
    for other in others:
        assert other == pytest.approx(first, rel=RELATIVE)


def test_every_strategy_writes_the_same_checkpoint(losses: dict[str, Losses], trained: Trained) -> None:
    first, *others = (torch.load(trained / name / "checkpoints/last.ckpt", weights_only=True) for name in losses)
    for other in others:
        same_state(first, other)


def test_every_strategy_validates_the_averaged_weights(losses: dict[str, Losses], trained: Trained) -> None:
    """Which `export` finds in each checkpoint."""
    validated = trained.metric("auto", "val/loss")[STEPS]
    for name in MULTIPLE:
        assert trained.metric(name, "val/loss")[STEPS] == pytest.approx(validated, rel=RELATIVE)
        same_averages(trained / "auto/checkpoints/last.ckpt", trained / name / "checkpoints/last.ckpt")


@pytest.mark.parametrize("strategy", MATRIX)
def test_micro_batches_change_no_gradient(losses: dict[str, Losses], trained: Trained, strategy: str) -> None:
    """Clipping sees the norm of the whole step's gradients under every strategy."""
    name = f"{strategy}-accumulate"
    trained(name, strategy, 1, "run.accumulate=2", "optim.max_steps=4")
    found, whole = (trained.metric(of, "train/grad_norm") for of in (name, "auto"))
    assert found and found == pytest.approx({step: whole[step] for step in found}, rel=1e-4)


@pytest.mark.parametrize("before", MATRIX)
@pytest.mark.parametrize("to", ["same", "other world", "other strategy"])
def test_a_run_goes_on_under_another_strategy_and_world(
    losses: dict[str, Losses], trained: Trained, before: str, to: str
) -> None:
    """From the checkpoint of step 10, optimizer and averages included: the losses are those of the unbroken run."""
    after = MATRIX[(MATRIX.index(before) + 1) % len(MATRIX)] if to == "other strategy" else before
    name = f"{before}-{to}".replace(" ", "-")
    checkpoint = trained / before / f"checkpoints/step-{HALF}.ckpt"
    found = trained.after(checkpoint, name, after, 1 if to == "other world" else 2)
    assert list(found) == list(range(HALF + 1, STEPS + 1))
    expected = [losses["auto"][step] for step in found]
    np.testing.assert_allclose(list(found.values()), expected, rtol=RELATIVE)
    validated, unbroken = (trained.metric(of, "val/loss")[STEPS] for of in (name, "auto"))
    assert validated == pytest.approx(unbroken, rel=RELATIVE)


@pytest.mark.parametrize("strategy", MATRIX)
def test_frozen_parts_stay_under_every_strategy(
    losses: dict[str, Losses], frozen: Losses, trained: Trained, strategy: str
) -> None:
    found = trained(f"frozen-{strategy}", strategy, 2, FROZEN)
    np.testing.assert_allclose(list(found.values()), list(frozen.values()), rtol=RELATIVE)
    assert found[STEPS] != losses["auto"][STEPS]


def test_frozen_parts_go_on_under_fsdp(frozen: Losses, trained: Trained) -> None:
    """Which numbers the optimizer's weights as one process does, without the frozen ones."""
    checkpoint = trained / f"frozen/checkpoints/step-{HALF}.ckpt"
    found = trained.after(checkpoint, "frozen-to-fsdp", "fsdp", 2, FROZEN)
    np.testing.assert_allclose(list(found.values()), [frozen[step] for step in found], rtol=RELATIVE)
    validated, unbroken = (trained.metric(of, "val/loss")[STEPS] for of in ("frozen-to-fsdp", "frozen"))
    assert validated == pytest.approx(unbroken, rel=RELATIVE)


@pytest.fixture(scope="module")
def adapted(trained: Trained) -> Losses:
    """Of one process that trains adapters in the place of the image encoder."""
    return trained("adapted", "auto", 1, *ADAPTED)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero3"])
def test_adapters_train_alike_under_every_strategy(adapted: Losses, trained: Trained, strategy: str) -> None:
    """Averages, checkpoints and what goes on from them included."""
    name = f"adapted-{strategy}"
    found = trained(name, strategy, 2, *ADAPTED)
    np.testing.assert_allclose(list(found.values()), list(adapted.values()), rtol=RELATIVE)
    validated, alone = (trained.metric(of, "val/loss")[4] for of in (name, "adapted"))
    assert validated == pytest.approx(alone, rel=RELATIVE)
    first, other = (torch.load(trained / of / "checkpoints/last.ckpt", weights_only=True) for of in ("adapted", name))
    same_state(first, other)
    resumed = trained.after(trained / "adapted/checkpoints/step-2.ckpt", f"{name}-on", strategy, 2, *ADAPTED)
    np.testing.assert_allclose(list(resumed.values()), [adapted[step] for step in resumed], rtol=RELATIVE)


@pytest.mark.parametrize(("strategy", "recompute"), [*((name, "blocks") for name in MATRIX), ("fsdp", "cheap")])
def test_activations_can_be_computed_again_under_every_strategy(
    losses: dict[str, Losses], trained: Trained, strategy: str, recompute: str
) -> None:
    """Prompts in small groups besides, which FSDP and ZeRO-3 compute again."""
    keys = (f"run.recompute={recompute}", "run.prompts_at_once=3")
    found = trained(f"{strategy}-{recompute}", strategy, 2, *keys)
    np.testing.assert_allclose(list(found.values()), list(losses["auto"].values()), rtol=RELATIVE)


@pytest.mark.parametrize("strategy", ["fsdp", "zero2"])
def test_what_is_split_can_stay_in_main_memory(losses: dict[str, Losses], trained: Trained, strategy: str) -> None:
    found = trained(f"{strategy}-offload", strategy, 2, "run.offload=true")
    np.testing.assert_allclose(list(found.values()), list(losses["auto"].values()), rtol=RELATIVE)


def test_offloaded_shares_train_after_a_validation(losses: dict[str, Losses], trained: Trained) -> None:
    """The way that weights take on a GPU, on CPU ranks, where there is nothing to be brought to a device."""
    patch = "\n".join(
        [
            "from torch.distributed.fsdp import OffloadPolicy",
            "from segvol_pl.training import strategies",
            "strategies.FullyShard.offloads = property(lambda self: True)",
            "strategies.CPUOffloadPolicy = OffloadPolicy",
        ]
    )
    keys = ("run.offload=true", "optim.max_steps=2", "run.checkpoint_every=1")
    found = trained("fsdp-as-on-a-gpu", "fsdp", 1, *keys, patch=patch)
    np.testing.assert_allclose(found[1], losses["auto"][1], rtol=RELATIVE)


def test_kept_checkpoints_are_bounded_and_the_best_is_there(losses: dict[str, Losses], trained: Trained) -> None:
    names = {path.name for path in (trained / "auto/checkpoints").iterdir()}
    assert names == {"last.ckpt", "best.ckpt", f"step-{HALF}.ckpt"}


def test_compiled_blocks_train_alike_where_weights_are_split(losses: dict[str, Losses], trained: Trained) -> None:
    """Blocks and groups of prompts are computed again besides."""
    keys = ("run.compile=true", "run.recompute=blocks", "run.prompts_at_once=3")
    found = trained("fsdp-compiled", "fsdp", 2, *keys)
    np.testing.assert_allclose(list(found.values()), list(losses["auto"].values()), rtol=1e-4)
