"""Batches on a GPU: as the host makes them, to the bit; and copied beside computing without being spoiled by it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from segvol_pl.data.ahead import Ahead, SideStream
from segvol_pl.data.batch import HOST, Batch, packed, unpacked
from segvol_pl.data.stream import collate

pytestmark = pytest.mark.gpu

SHAPE = (16, 64, 64)


def batches(count: int, mixed: bool) -> Iterator[Batch]:
    """As they come from the loader; where `mixed`, the first sample is an image already."""
    rng = np.random.default_rng(0)
    for number in range(count):
        samples = []
        for place in range(4):
            masks = [rng.random(SHAPE) < 0.3 for _ in range(9)]
            hu_CDHW = rng.integers(-32768, 32768, (1, *SHAPE)).astype(np.int16)
            shade_4 = np.array([rng.uniform(-1000, 0), rng.uniform(1, 4000), rng.uniform(0.9, 1.1), rng.uniform(-1, 1)])
            image = {"hu_CDHW": hu_CDHW, "shade_4": shade_4.astype(np.float32)}
            if mixed and place == 0:
                image = {"image_CDHW": rng.random((1, *SHAPE), dtype=np.float32)}
            told = {"row": np.array(place), "damaged_A2": np.full((4, 2), -1)}
            prompts = {"bits_JDHW": packed(masks), "valid_K": np.ones(9, dtype=bool)}
            samples.append({**image, **prompts, **told})
        yield collate(samples, number)


def check(batch: Batch, expected: Batch) -> None:
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert batch[name].dtype == value.dtype and batch[name].shape == value.shape
        assert batch[name].cpu().numpy().tobytes() == value.numpy().tobytes(), name


@pytest.mark.parametrize("mixed", [False, True])
def test_a_batch_is_unpacked_as_on_the_host(mixed: bool) -> None:
    (batch,) = batches(1, mixed)
    expected = unpacked(batch)
    assert expected["masks_BKDHW"].any() and expected["image_BCDHW"].std() > 0
    sent = {name: value.to("cuda") for name, value in batch.items()}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = unpacked(sent)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check(found, expected)


def test_batches_copied_beside_a_busy_step_arrive_whole() -> None:
    """Every step still reads its batch while the next ones are copied into memory that was freed before."""
    held = [{name: value.pin_memory() for name, value in batch.items()} for batch in batches(12, mixed=False)]
    busy = torch.randn(4096, 4096, device="cuda")
    found = []
    for batch in Ahead(held, SideStream(torch.device("cuda", torch.cuda.current_device()))):
        assert all(value.is_cuda != (name in HOST) for name, value in batch.items())
        for _ in range(20):
            busy = busy @ busy
            busy = busy / busy.norm()
        made = unpacked(batch)
        found.append({name: value.clone() for name, value in made.items()})
        # The host is ahead of the device here: what is freed has not been read yet.
        del batch, made
    assert [int(batch["seen"]) for batch in found] == list(range(12))
    for batch, expected in zip(found, held, strict=True):
        check(batch, unpacked(expected))
