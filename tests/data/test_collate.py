"""A batch travels as one piece and arrives as it was."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from segvol_pl.data.collate import ALIGNMENT, SharedBatch, identity_collate, stacked

RNG = np.random.default_rng(0)
SAMPLES = [
    {
        "image": RNG.random((1, 3, 5), dtype=np.float32),
        "mask": RNG.random((2, 7)) > 0.5,
        "row": np.array(number),
        "none": np.zeros((0, 3), dtype=np.int64),
    }
    for number in range(3)
]
NAMES = {name: f"{name}_B" for name in SAMPLES[0]}


def made() -> dict[str, torch.Tensor]:
    return stacked(SAMPLES, NAMES, {"seen": np.array(12)})


def check(batch: dict[str, torch.Tensor]) -> None:
    assert set(batch) == {*NAMES.values(), "seen"} and int(batch["seen"]) == 12
    for name, batched in NAMES.items():
        expected = np.stack([sample[name] for sample in SAMPLES])
        assert batch[batched].numpy().dtype == expected.dtype
        np.testing.assert_array_equal(batch[batched].numpy(), expected)


def test_samples_are_stacked_into_one_buffer() -> None:
    batch = made()
    check(batch)
    first = batch["image_B"].data_ptr()
    for batched in NAMES.values():
        assert (batch[batched].data_ptr() - first) % ALIGNMENT == 0 or not batch[batched].numel()
    assert max(batch[batched].data_ptr() for batched in NAMES.values()) - first < 4096


def test_it_comes_back_from_a_pickle() -> None:
    batch = SharedBatch(torch.arange(16, dtype=torch.uint8), [("a", "<i2", (2, 2), 8)])
    batch = pickle.loads(pickle.dumps(batch))
    assert type(batch) is dict
    assert batch["a"].tolist() == [[0x0908, 0x0B0A], [0x0D0C, 0x0F0E]] == batch["a"].tolist()


class _Endless(IterableDataset[dict[str, torch.Tensor]]):
    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield made()


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_it_comes_back_from_a_loader_process(method: str) -> None:
    loader = DataLoader(
        _Endless(), batch_size=None, collate_fn=identity_collate, num_workers=2, multiprocessing_context=method
    )
    batches = iter(loader)
    for _ in range(5):
        batch = next(batches)
        check(batch)
    storages = {tensor.untyped_storage().data_ptr() for tensor in batch.values() if tensor.numel()}
    assert max(storages) - min(storages) < 4096
