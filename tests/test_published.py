"""The published model to the digit, by figures that this repository carries (see `published.py`)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from published import GOLDEN, SMALL, mask_of_box, pseudo_target, reference_image, released_state
from torch import Tensor
from transformers import CLIPTokenizer

from segvol_pl.config import TextConfig, TrainConfig
from segvol_pl.model import TextBank
from segvol_pl.model.checkpoint import BANK
from segvol_pl.model.prompt_encoder import PromptTensors
from segvol_pl.model.released import split_extra, tower_of
from segvol_pl.model.text_encoder import text_tower
from segvol_pl.training.segment import SegVolTask
from segvol_pl.training.targets import pseudo_targets, supervised_targets

KINDS = tuple(GOLDEN["logits"])
LOSSES = GOLDEN["losses"]


@pytest.fixture(scope="module")
def released() -> dict[str, Tensor]:
    return released_state(SMALL)


@pytest.fixture(scope="module")
def bank(released: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> TextBank:
    tower = text_tower(tower_of(split_extra(released)[1]), tmp_path_factory.getbasetemp())
    with torch.inference_mode():
        vectors_KE = tower.eval()(input_ids=torch.tensor(GOLDEN["token_ids"])).pooler_output
    return TextBank(["liver", "right kidney"], vectors_KE.clone())


@pytest.fixture(scope="module")
def task(released: dict[str, Tensor], bank: TextBank, tmp_path_factory: pytest.TempPathFactory) -> SegVolTask:
    """The released weights at the small geometry, loaded as a .pth file's contents would be."""
    task = SegVolTask(TrainConfig(model=SMALL), bank)
    own, _ = split_extra(released)
    task.model.load_state_dict({**own, BANK: bank.vectors_KE})
    return task.eval()


@pytest.fixture(scope="module")
def tokens_BTE(task: SegVolTask) -> Tensor:
    with torch.inference_mode():
        return task.model.encode(reference_image(SMALL, batch=2))


def prompts(kind: str) -> PromptTensors:
    has = {part: torch.full((2, 1), part in kind) for part in ("points", "box", "text")}
    return PromptTensors(
        points_BPN3=torch.tensor(GOLDEN["points"])[:, None].float(),
        labels_BPN=torch.tensor(GOLDEN["point_labels"])[:, None],
        boxes_BP6=torch.tensor(GOLDEN["box"])[:, None].float(),
        text_BP=torch.tensor([[0], [1]]),
        landmarks_BPM3=torch.zeros(2, 1, 0, 3),
        has_points_BP=has["points"],
        has_box_BP=has["box"],
        has_text_BP=has["text"],
        has_landmarks_BPM=torch.zeros(2, 1, 0, dtype=torch.bool),
    )


def test_the_text_embedding_is_the_published_one(task: SegVolTask) -> None:
    with torch.inference_mode():
        got_KE = task.model.text_encoder(torch.tensor([0, 1]))[:, ::96].numpy()
    assert np.abs(got_KE - GOLDEN["text_embedding"]).max() < 1e-4 * GOLDEN["text_embedding_range"]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_published_ones(kind: str, task: SegVolTask, tokens_BTE: Tensor) -> None:
    want = GOLDEN["logits"][kind]
    with torch.inference_mode():
        logits = task.model.decode(tokens_BTE, prompts(kind))[:, 0].double().numpy()
    picked = [logits[0, 4, 16, 16], logits[1, 0, 32, 48]]
    assert np.abs(np.subtract(picked, want["strided_0_2_4_4_and_1_0_8_12"])).max() < 1e-4 * want["range"]
    assert abs(logits.sum() - want["sum"]) < 1e-4 * want["range"] * logits.size
    assert logits.std() == pytest.approx(want["std"], rel=1e-4)


def test_the_sentence_has_the_published_tokens(tmp_path: Path) -> None:
    """A tokenizer that knows these words alone, by CLIP's own numbers; where a word has several, its split is ours."""
    start, *middle, end = GOLDEN["token_ids"][0][:12]
    words = ["a", "computerized", "tomography", "of", "a", "liver", "."]
    numbers = [middle[0], middle[1:4], middle[4:6], middle[6], middle[7], middle[8], middle[9]]
    pieces = {"computerized": ["comput", "eri", "zed"], "tomography": ["tom", "ography"]}
    vocabulary = {"<|startoftext|>": start, "<|endoftext|>": end}
    merges: list[str] = []
    for word, number in zip(words, numbers, strict=True):
        parts = pieces.get(word, [word])
        for part, value in zip(parts, number if isinstance(number, list) else [number], strict=True):
            _learn(part, "</w>" if part is parts[-1] else "", value, vocabulary, merges)
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges), ""]))
    sentence = TextConfig().template.format("liver")
    assert CLIPTokenizer.from_pretrained(tmp_path)(sentence).input_ids == GOLDEN["token_ids"][0][:12]


def _learn(part: str, ending: str, number: int, vocabulary: dict[str, int], merges: list[str]) -> None:
    """Adds a piece of a word, and the merges that build it letter by letter."""
    letters = [*part[:-1], part[-1] + ending]
    built = letters[0]
    for letter in letters[1:]:
        merges.append(f"{built} {letter}")
        built += letter
    for made in {*letters, *("".join(letters[:n]) for n in range(1, len(letters)))}:
        vocabulary.setdefault(made, 100_000 + len(vocabulary))
    vocabulary[built] = number


# ---- one training step ----


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    """The published training step's batch: category "liver", its prompts, the six pseudo-labels."""
    points_BK, labels_BK, boxes_BK = torch.zeros(2, 6, 21, 3), torch.full((2, 6, 21), -1), torch.zeros(2, 6, 6)
    for iteration, drawn in enumerate(LOSSES["pseudo"]):
        if "box" in drawn:
            boxes_BK[:, iteration] = torch.tensor(drawn["box"]).float()
        else:
            points_BK[:, iteration] = torch.tensor(drawn["points"]).float()
            labels_BK[:, iteration] = torch.tensor(drawn["labels"])
    masks = np.stack([[pseudo_target(iteration, image)[0] for iteration in range(6)] for image in range(2)])
    truth = np.stack([mask_of_box(box) for box in LOSSES["labels"]])
    return {
        "image_BCDHW": reference_image(SMALL, batch=2),
        "masks_BKDHW": torch.from_numpy(truth)[:, None],
        "category_BK": torch.zeros(2, 1, dtype=torch.int64),
        "points_BKN3": torch.tensor(LOSSES["sup_points"])[:, None],
        "labels_BKN": torch.tensor(LOSSES["sup_point_labels"])[:, None],
        "boxes_BK6": torch.tensor(LOSSES["labels"])[:, None],
        "valid_BK": torch.ones(2, 1, dtype=torch.bool),
        "pseudo_masks_BKDHW": torch.from_numpy(masks),
        "pseudo_category_BK": torch.zeros(2, 6, dtype=torch.int64),
        "pseudo_points_BKN3": points_BK,
        "pseudo_labels_BKN": labels_BK,
        "pseudo_boxes_BK6": boxes_BK,
        "pseudo_valid_BK": torch.ones(2, 6, dtype=torch.bool),
    }


def test_the_losses_of_a_step_are_the_published_ones(
    task: SegVolTask, tokens_BTE: Tensor, batch: dict[str, Tensor]
) -> None:
    with torch.inference_mode():
        asked = supervised_targets(batch, task.config.prompts.combinations, {})
        dice_C, bce_C = (loss_BP.mean(0) for loss_BP in task.prompt_losses(tokens_BTE, asked)[1:])
        loss, parts = task.losses(batch)
    np.testing.assert_allclose(dice_C.numpy(), LOSSES["sup_dice"], atol=1e-5)
    np.testing.assert_allclose(bce_C.numpy(), LOSSES["sup_bce"], atol=1e-5)
    assert float(parts["supervised"]) == pytest.approx(LOSSES["sl"], rel=1e-5)
    assert float(parts["pseudo"]) == pytest.approx(LOSSES["ssl"], rel=1e-5)
    assert float(loss) == pytest.approx(LOSSES["sl"] + 0.1 * LOSSES["ssl"], rel=1e-5)


def test_pseudo_label_losses_are_the_published_ones_one_by_one(
    task: SegVolTask, tokens_BTE: Tensor, batch: dict[str, Tensor]
) -> None:
    with torch.inference_mode():
        dice_P, bce_P = (loss_BP.mean(0) for loss_BP in task.prompt_losses(tokens_BTE, pseudo_targets(batch, {}))[1:])
    np.testing.assert_allclose(dice_P.numpy(), LOSSES["pseudo_dice"], atol=1e-5)
    np.testing.assert_allclose(bce_P.numpy(), LOSSES["pseudo_bce"], atol=1e-5)


@pytest.mark.parametrize("iteration", [1, 3, 5])
def test_a_pseudo_label_box_is_that_of_its_region(iteration: int) -> None:
    for image in range(2):
        assert list(pseudo_target(iteration, image)[1]) == LOSSES["pseudo"][iteration]["box"][image]


def test_dice_at_batch_one_is_one_figure_not_a_mean_over_slices(
    task: SegVolTask, tokens_BTE: Tensor, batch: dict[str, Tensor]
) -> None:
    """The published `squeeze` takes the depth of a batch of one for the batch."""
    alone = [{name: value[image : image + 1] for name, value in batch.items()} for image in range(2)]
    with torch.inference_mode():
        _, both_BP, _ = task.prompt_losses(tokens_BTE, supervised_targets(batch, ["text"], {}))
        each = [
            task.prompt_losses(tokens_BTE[i : i + 1], supervised_targets(alone[i], ["text"], {}))[1] for i in range(2)
        ]
    assert both_BP.flatten().tolist() == pytest.approx(torch.cat(each).flatten().tolist(), abs=1e-6)
