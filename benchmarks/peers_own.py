"""segvol_pl's own rows of `benchmarks/peers.py`, run in the project's environment.

python benchmarks/peers_own.py turn FOLDER NAME SECONDS CORE
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from peers_turn import Corpus, Crop, Loader, Start, form_of, main

from segvol_pl.config import DataConfig, PromptConfig, SegVolConfig
from segvol_pl.data import sampling
from segvol_pl.data.batch import unpacked
from segvol_pl.data.collate import Arrays
from segvol_pl.data.corpus import category_names, open_folders, training_corpus
from segvol_pl.data.frames import WholeFrame, decode_alone, encode_array
from segvol_pl.data.schema import Facts, Member
from segvol_pl.data.stream import BatchPlan, Draw, Stream

CATEGORIES = 8
"""Categories of a sample with everything."""
SHARDS = "segvol_pl"
"""The folder of the shards, among those of the other formats."""


class Crops:
    """The stream, of crops and their label maps alone: no augmentation, prompts or regions."""

    package = "segvol-pl"
    form = SHARDS
    flip = intensity = 0.0

    def convert(self, corpus: Corpus, folder: Path) -> None:
        """The shards are what the corpus was made of."""

    def open(self, corpus: Corpus, folder: Path) -> None:
        torch.set_num_threads(1)
        decode_alone()
        data = DataConfig(
            shards=str(form_of(corpus, self)),
            split="all",
            overview_fraction=0.0,
            samples_per_volume=1000,
            flip=self.flip,
            intensity=self.intensity,
        )
        model = SegVolConfig(input_shape=corpus.window)
        folders = open_folders(data)
        self.corpus = training_corpus(folders, data, labelled=True)
        draw = self.draw_of(model, data, category_names(folders))
        self.batches = iter(Stream(self.corpus, draw, BatchPlan(self.corpus.num_samples, 1)))
        self._note_starts()

    def _note_starts(self) -> None:
        """Keep where each window starts: a batch does not hold it."""
        draw = sampling.window_start

        def noted(*arguments: object) -> Start:
            self.start = draw(*arguments)  # type: ignore[arg-type]
            return self.start

        sampling.window_start = noted

    def draw_of(self, model: SegVolConfig, data: DataConfig, categories: list[str]) -> Draw:
        def draw(facts: Facts, read: sampling.Read, rng: np.random.Generator) -> Arrays:
            members = {ending: sha for ending, sha in facts.members.items() if ending != Member.REGIONS.value}
            view = sampling.sample_crop(replace(facts, members=members), read, model, data, rng)
            assert view.label_DHW is not None
            return {**sampling.image_of(view), "label_CDHW": view.label_DHW[None]}

        return draw

    def sample(self) -> Crop | None:
        batch = unpacked(next(self.batches))
        key = self.corpus.located(int(batch["row_B"][0]))[1].key
        return Crop(key, self.start, batch["image_BCDHW"], batch["label_BCDHW"])


class Everything(Crops):
    """The stream as SegVol trains on it: augmentation, 8 categories and 6 pseudo-labels with masks and prompts.

    Samples are counted as they leave a loader process; the device unpacks them.
    """

    flip, intensity = DataConfig.flip, DataConfig.intensity

    def draw_of(self, model: SegVolConfig, data: DataConfig, categories: list[str]) -> Draw:
        rows = {name: row for row, name in enumerate(categories)}
        prompts = PromptConfig(categories_per_volume=CATEGORIES)
        return functools.partial(sampling.sample_segmentation, model=model, data=data, prompts=prompts, row_of=rows)

    def sample(self) -> None:
        next(self.batches)


class Decoding(Crops):
    """The windows decoded from frames in memory and normalised: no file is read and nothing is checked."""

    def open(self, corpus: Corpus, folder: Path) -> None:
        decode_alone()
        self.volumes, self.windows = corpus, corpus.windows()
        self.frames = {
            (key, role): WholeFrame(encode_array(np.asarray(corpus.raw(key, role)), fast=role == "ct"))
            for key in corpus.keys[:1]
            for role in ("ct", "label")
        }
        self.starts = corpus.starts(corpus.keys[0])

    def sample(self) -> Crop:
        key, start = self.volumes.keys[0], next(self.starts)
        window = self.volumes.slices(start)
        hu_DHW, label_DHW = (self.frames[key, role][window] for role in ("ct", "label"))
        return self.volumes.crop(key, start, hu_DHW, label_DHW)


LOADERS: dict[str, type[Loader]] = {SHARDS: Crops, "segvol_pl-everything": Everything, "decoding": Decoding}

if __name__ == "__main__":
    main(LOADERS)
