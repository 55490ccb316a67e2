"""The peers of `benchmarks/peers.py`, each in its own format, run in an environment of their own.

    python benchmarks/peers_loaders.py convert FOLDER NAME
    python benchmarks/peers_loaders.py turn FOLDER NAME SECONDS CORE

Each draws the windows that segvol_pl drew, except where the library draws its own: nnU-Net's loader and MONAI. Each
opens a volume for each sample, as a data set of many volumes must, except MONAI's CacheDataset.
Libraries are imported where they are used: one that is missing leaves the others usable.
"""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from peers_turn import Corpus, Crop, Start, main

CHUNK = [32, 64, 64]
"""Voxels (d, h, w) of a chunk, where a format leaves them to the user: those of segvol_pl."""
BUFFER = 4
"""Volumes in webdataset's shuffle buffer."""


class NNUNetClass:
    """nnU-Net's `nnUNetDatasetBlosc2` on int16, with its own parameters; crop and normalise by hand."""

    package = "nnunetv2"
    form = "nnunet-int16"

    def stored(self, corpus: Corpus, key: str) -> np.ndarray:
        """What is stored of the CT."""
        return np.asarray(corpus.raw(key, "ct"))

    def convert(self, corpus: Corpus, folder: Path) -> None:
        from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

        for key in corpus.keys:
            data_CDHW = self.stored(corpus, key)[None]
            seg_CDHW = np.asarray(corpus.raw(key, "label")).astype(np.int8)[None]
            blocks, chunks = comp_blosc2_params(data_CDHW.shape, corpus.window, data_CDHW.itemsize)
            seg_blocks, seg_chunks = comp_blosc2_params(seg_CDHW.shape, corpus.window, seg_CDHW.itemsize)
            # Voxels as nnU-Net lists them: channel, then (d, h, w).
            places = {
                int(value): np.pad(np.array(voxels_N3), ((0, 0), (1, 0)))
                for value, voxels_N3 in corpus.facts["volumes"][key]["anchors"].items()
            }
            nnUNetDatasetBlosc2.save_case(
                data_CDHW,
                seg_CDHW,
                {"class_locations": places},
                str(folder / key),
                chunks=chunks,
                blocks=blocks,
                chunks_seg=seg_chunks,
                blocks_seg=seg_blocks,
            )

    def open(self, corpus: Corpus, folder: Path) -> None:
        self.corpus, self.data, self.windows = corpus, self.dataset(folder), corpus.windows()

    def dataset(self, folder: Path) -> Any:
        from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

        return nnUNetDatasetBlosc2(str(folder))

    def sample(self) -> Crop:
        key, start = next(self.windows)
        data, seg, _, _ = self.data.load_case(key)
        window = self.corpus.slices(start)
        return self.corpus.crop(key, start, data[(0, *window)], seg[(0, *window)].view(np.uint8))


class NNUNetLoader(NNUNetClass):
    """The class with nnU-Net's `nnUNetDataLoader`, on float32 images, as nnU-Net stores them."""

    form = "nnunet-float32"

    def stored(self, corpus: Corpus, key: str) -> np.ndarray:
        return corpus.normalise(key, np.asarray(corpus.raw(key, "ct")))

    def open(self, corpus: Corpus, folder: Path) -> None:
        from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

        labels = SimpleNamespace(all_labels=list(range(1, 256)), has_ignore_label=False)
        self.loader = nnUNetDataLoader(
            self.dataset(folder), 1, corpus.window, corpus.window, labels, oversample_foreground_percent=1.0
        )
        draw = self.loader.get_bbox

        def noted(*arguments: Any, **keys: Any) -> Any:
            first, last = draw(*arguments, **keys)
            self.start: Start = (int(first[0]), int(first[1]), int(first[2]))
            return first, last

        self.loader.get_bbox = noted

    def sample(self) -> Crop:
        batch = next(self.loader)
        return Crop(str(batch["keys"][0]), self.start, batch["data"], batch["target"])


class TensorStore:
    """tensorstore on zarr v3: one shard a volume, chunks behind byte shuffle and zstd 5, one thread."""

    package = "tensorstore"
    form = "zarr"

    def convert(self, corpus: Corpus, folder: Path) -> None:
        import tensorstore

        for key in corpus.keys:
            for role in ("ct", "label"):
                array_DHW = np.asarray(corpus.raw(key, role))
                shard = [-(-extent // chunk) * chunk for extent, chunk in zip(array_DHW.shape, CHUNK, strict=True)]
                packed = {"cname": "zstd", "clevel": 5, "shuffle": "shuffle", "typesize": array_DHW.itemsize}
                inner = [{"name": "bytes"}, {"name": "blosc", "configuration": packed}]
                sharded = {
                    "chunk_shape": CHUNK,
                    "codecs": inner,
                    "index_codecs": [{"name": "bytes"}, {"name": "crc32c"}],
                }
                store = tensorstore.open(
                    {
                        **self.spec(folder, key, role),
                        "metadata": {
                            "shape": list(array_DHW.shape),
                            "data_type": array_DHW.dtype.name,
                            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
                            "codecs": [{"name": "sharding_indexed", "configuration": sharded}],
                        },
                    },
                    create=True,
                    delete_existing=True,
                ).result()
                store.write(array_DHW).result()

    def spec(self, folder: Path, key: str, role: str) -> dict[str, Any]:
        return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder / key}.{role}.zarr/"}}

    def open(self, corpus: Corpus, folder: Path) -> None:
        import tensorstore

        one = {"limit": 1}
        self.context = tensorstore.Context({"data_copy_concurrency": one, "file_io_concurrency": one})
        self.corpus, self.folder, self.windows = corpus, folder, corpus.windows()

    def sample(self) -> Crop:
        import tensorstore

        key, start = next(self.windows)
        opened = [
            tensorstore.open(self.spec(self.folder, key, role), context=self.context, open=True, read=True)
            for role in ("ct", "label")
        ]
        window = self.corpus.slices(start)
        hu_DHW, label_DHW = (read.result() for read in [store.result()[window].read() for store in opened])
        return self.corpus.crop(key, start, hu_DHW, label_DHW)


def endless(data: Iterable[dict[str, Any]]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Key, CT and label map of each item, epoch after epoch."""
    while True:
        for item in data:
            yield item["key"], item["ct"], item["label"]


class OfVolumes:
    """A loader that yields complete volumes in an order of its own; a window is cut out of each."""

    corpus: Corpus

    def open(self, corpus: Corpus, folder: Path) -> None:
        self.corpus = corpus
        self.starts = {key: corpus.starts(key) for key in corpus.keys}
        self.samples = self.volumes(folder)

    def volumes(self, folder: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Keys, HU and labels (D,H,W), epoch after epoch."""
        raise NotImplementedError

    def sample(self) -> Crop:
        key, hu_DHW, label_DHW = next(self.samples)
        start = next(self.starts[key])
        window = self.corpus.slices(start)
        return self.corpus.crop(key, start, hu_DHW[window], np.ascontiguousarray(label_DHW[window]))


class LitData(OfVolumes):
    """litdata, complete volumes, uncompressed chunks of one volume."""

    package = "litdata"
    form = "litdata"

    def convert(self, corpus: Corpus, folder: Path) -> None:
        from litdata.streaming import Cache

        cache = Cache(str(folder), chunk_size=1)
        for number, key in enumerate(corpus.keys):
            hu_DHW, label_DHW = (np.asarray(corpus.raw(key, role)) for role in ("ct", "label"))
            cache[number] = {"key": key, "ct": hu_DHW, "label": label_DHW}
        cache.done()
        cache.merge()

    def volumes(self, folder: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        import litdata

        return endless(litdata.StreamingDataset(str(folder), shuffle=True))


class Mosaic(OfVolumes):
    """mosaicml-streaming, complete volumes, uncompressed."""

    package = "mosaicml-streaming"
    form = "mosaicml"

    def __init__(self) -> None:
        # Its part for pictures imports torchvision, of which not every build of torch has a matching one.
        sys.modules["streaming.vision"] = ModuleType("streaming.vision")

    def convert(self, corpus: Corpus, folder: Path) -> None:
        from streaming import MDSWriter

        columns = {"key": "str", "ct": "ndarray", "label": "ndarray"}
        with MDSWriter(out=str(folder), columns=columns, size_limit=1 << 28) as writer:
            for key in corpus.keys:
                hu_DHW, label_DHW = (np.asarray(corpus.raw(key, role)) for role in ("ct", "label"))
                writer.write({"key": key, "ct": hu_DHW, "label": label_DHW})

    def volumes(self, folder: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        from streaming import StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        # A process that ended leaves its own behind.
        clean_stale_shared_memory()
        return endless(StreamingDataset(local=str(folder), shuffle=True, batch_size=1))


class WebDataset(OfVolumes):
    """webdataset, complete volumes as raw .npy in a tar, shuffled by its buffer."""

    package = "webdataset"
    form = "webdataset"

    def convert(self, corpus: Corpus, folder: Path) -> None:
        with tarfile.open(folder / "volumes.tar", "w") as tar:
            for key in corpus.keys:
                for role in ("ct", "label"):
                    tar.add(corpus.folder / "raw" / f"{key}.{role}.npy", f"{key}.{role}.npy")

    def volumes(self, folder: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        import webdataset

        data = webdataset.WebDataset(str(folder / "volumes.tar"), shardshuffle=False).shuffle(BUFFER).repeat()
        for item in data:
            hu_DHW, label_DHW = (np.load(io.BytesIO(item[f"{role}.npy"])) for role in ("ct", "label"))
            yield item["__key__"], hu_DHW, label_DHW


class MonaiPersistent:
    """MONAI's PersistentDataset of normalised volumes, with its own RandCropByPosNegLabeld."""

    package = "monai"
    form = "monai"
    indices = False
    """Whether the places of foreground and background are stored too."""

    def loaded(self, corpus: Corpus) -> list[Any]:
        """The transforms before the crop, whose result is cached."""
        import torch
        from monai.transforms import EnsureTyped, FgBgToIndicesd, Transform

        # MONAI caches the result of the transforms up to the first that is random, or no Transform.
        class Load(Transform):  # type: ignore[misc]
            def __call__(self, key: str) -> dict[str, Any]:
                hu_DHW, label_DHW = (np.array(corpus.raw(key, role)) for role in ("ct", "label"))
                return {"key": key, "image": corpus.normalise(key, hu_DHW)[None], "label": label_DHW[None]}

        typed = EnsureTyped(["image", "label"], dtype=[torch.float32, torch.uint8])
        return [Load(), typed, *([FgBgToIndicesd("label")] if self.indices else [])]

    def cropped(self, corpus: Corpus) -> Any:
        from monai.transforms import RandCropByPosNegLabeld

        stored = {"fg_indices_key": "label_fg_indices", "bg_indices_key": "label_bg_indices"} if self.indices else {}
        return RandCropByPosNegLabeld(["image", "label"], "label", corpus.window, pos=1, neg=0, num_samples=1, **stored)

    def dataset(self, corpus: Corpus, folder: Path) -> Any:
        from monai.data import PersistentDataset
        from monai.transforms import Compose

        steps = Compose([*self.loaded(corpus), self.cropper])
        return PersistentDataset(corpus.keys, steps, cache_dir=folder)

    def convert(self, corpus: Corpus, folder: Path) -> None:
        self.open(corpus, folder)
        for number in range(len(corpus.keys)):
            self.data[number]
        stored = sum(path.stat().st_size for path in folder.glob("*.pt"))
        if stored < sum(corpus.raw(key, "ct").nbytes for key in corpus.keys):
            raise ValueError(f"PersistentDataset stored {stored} bytes: it does not cache the volumes")

    def open(self, corpus: Corpus, folder: Path) -> None:
        self.cropper, self.window = self.cropped(corpus), corpus.window
        self.data = self.dataset(corpus, folder)
        self.order = self.rows(len(corpus.keys))

    def rows(self, count: int) -> Iterator[int]:
        rng = np.random.default_rng(0)
        while True:
            yield from rng.permutation(count).tolist()

    def sample(self) -> Crop:
        (item,) = self.data[next(self.order)]
        centre = self.cropper.cropper.centers[0]
        first = [int(middle) - size // 2 for middle, size in zip(centre, self.window, strict=True)]
        image_BCDHW, label_BCDHW = (item[name].as_tensor()[None] for name in ("image", "label"))
        return Crop(item["key"], (first[0], first[1], first[2]), image_BCDHW, label_BCDHW)


class MonaiPersistentIndices(MonaiPersistent):
    """The same with FgBgToIndicesd before the crop."""

    form = "monai-indices"
    indices = True


class MonaiCache(MonaiPersistent):
    """MONAI's CacheDataset: every volume in memory."""

    form = "monai-cache"

    def dataset(self, corpus: Corpus, folder: Path) -> Any:
        from monai.data import CacheDataset
        from monai.transforms import Compose

        steps = Compose([*self.loaded(corpus), self.cropper])
        return CacheDataset(corpus.keys, steps, num_workers=None, progress=False)

    def convert(self, corpus: Corpus, folder: Path) -> None:
        """Nothing is stored."""


class MonaiCacheIndices(MonaiCache):
    """The same with FgBgToIndicesd before the crop."""

    indices = True


LOADERS = {
    "nnunet-class": NNUNetClass,
    "nnunet-loader": NNUNetLoader,
    "tensorstore": TensorStore,
    "litdata": LitData,
    "mosaicml-streaming": Mosaic,
    "webdataset": WebDataset,
    "monai-cache": MonaiCache,
    "monai-cache-indices": MonaiCacheIndices,
    "monai-persistent": MonaiPersistent,
    "monai-persistent-indices": MonaiPersistentIndices,
}

if __name__ == "__main__":
    main(LOADERS)
