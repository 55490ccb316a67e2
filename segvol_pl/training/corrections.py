"""Corrections in training: clicks on what the model got wrong, with its last answer as a mask prompt.

1. After the first answers, one prompt of each category is asked again, `prompts.corrections` times, from the same
   encoding. Each time it has one click more, and the answer before as its mask.
2. A click is drawn on the error of that answer: likely in large errors, and in their middle. It is a foreground click
   where the structure was missed and a background click elsewhere.
3. The sample brings the random numbers. So the loss stays a pure function of the batch and the weights. Nothing here
   waits for the device.

Letters: B batch, K categories of one volume, P prompts of one volume, R rounds of corrections, N points, D H W voxels,
d h w cells: voxels of low resolution, V cells or voxels in a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from segvol_pl.data.batch import Batch
from segvol_pl.imaging.prompts import ABSENT
from segvol_pl.model.prompt_encoder import PromptTensors
from segvol_pl.training.grouped_loss import Group
from segvol_pl.training.targets import PromptTargets, mask_rows

EROSIONS = 5
"""The depth inside an error is counted up to one more than this."""
POWER = 4
"""A cell is drawn in proportion to this power of its depth."""
FAINT = 2.0**-10
"""Weight of errors smaller than a cell, such as half a cell at every border. They matter where there are no others."""
STEPS = 2**20
"""Weights are rounded to integers of this scale: sums of integers are equal on every device and in every order."""


class Corrections:
    """The rounds of corrections of one step: takes the answers of a round, and gives the prompts of the next one.

    A round counts in the loss as much as the first answers do: as its mean over the batch's masks, invalid ones as 0,
    times the number of combinations.

    Args:
        labelled: the first prompts of all categories, P = K x the combinations of each.
        combinations: how many there are.
        valid_BK: which masks are valid.
        corrected_BK: which of its prompts each category is corrected from, int64.
        chance_BKR3: uniform random numbers of each round's click, and of what becomes of the answer.
    """

    def __init__(
        self,
        labelled: PromptTargets,
        combinations: int,
        valid_BK: Tensor,
        corrected_BK: Tensor,
        chance_BKR3: Tensor,
    ) -> None:
        self.categories, self.rounds = chance_BKR3.shape[1:3]
        self._masks_BKDHW, self._chance_BKR3 = labelled.masks_BKDHW, chance_BKR3
        self._rows_K, self._share_BK = mask_rows(valid_BK), valid_BK.float() / valid_BK.numel()
        self._combinations = combinations
        each = len(labelled.rows_P) // self.categories
        self._chosen_BK = self._rows_K * each + corrected_BK
        self._prompts = [_with_room(labelled.prompts.take(self._chosen_BK), self.rounds)]
        """Of the first answers, then of each round, as far as they are known."""
        self._answers: list[dict[int, Tensor]] = [{} for _ in range(self.rounds)]
        """Low logits of each round by their first prompt. A group that is computed twice gives the same ones."""

    @classmethod
    def of(cls, batch: Batch, labelled: PromptTargets, combinations: int) -> Corrections | None:
        """Those that the batch asks for."""
        if "chance_BKR3" not in batch:
            return None
        return cls(labelled, combinations, batch["valid_BK"], batch["corrected_BK"], batch["chance_BKR3"])

    def answered(self, group: Group, low_BPdhw: Tensor) -> None:
        """Keep the answers to a group's prompts."""
        if group.asked < self.rounds:
            self._answers[group.asked][group.prompts.start] = low_BPdhw.detach()

    def targets(self, asked: int) -> PromptTargets:
        """What round `asked` asks for, from 1, once all prompts of the round before are answered."""
        if asked == len(self._prompts):
            self._prompts.append(self._next(asked - 1))
        return PromptTargets(self._prompts[asked], self._masks_BKDHW, self._rows_K, self.weights_BK)

    @property
    def weights_BK(self) -> Tensor:
        """The weights of a round's prompts in the loss; all rounds have the same."""
        return self._share_BK * self._combinations

    def by_round(self, loss_BQ: Tensor) -> Tensor:
        """The mean over masks of each round, (R,), of losses of all rounds' prompts, one round after the other."""
        loss_BRK: Tensor = loss_BQ.unflatten(1, (self.rounds, -1))
        return (self._share_BK[:, None] * loss_BRK).sum((0, 2))

    @torch.no_grad()
    def _next(self, before: int) -> PromptTensors:
        answers = self._answers[before]
        low_BKdhw = torch.cat([answers[first] for first in sorted(answers)], dim=1).float()
        if before == 0:
            low_BKdhw = torch.take_along_dim(low_BKdhw, self._chosen_BK[:, :, None, None, None], dim=1)
        chance_BK3 = self._chance_BKR3[:, :, before]
        click = draw_click(low_BKdhw > 0, self._masks_BKDHW, chance_BK3[..., :2])
        # Those who refine a mask bring a binary one; zooming in brings probabilities.
        binary_BK = chance_BK3[..., 2] < 0.5
        answer_BKdhw = torch.where(binary_BK[..., None, None, None], (low_BKdhw > 0).float(), low_BKdhw.sigmoid())
        return _corrected(self._prompts[before], click, answer_BKdhw, column=before - self.rounds)


def _with_room(prompts: PromptTensors, clicks: int) -> PromptTensors:
    """The prompts with room for so many clicks; points that their combination does not name are left out."""
    assert prompts.has_mask_BP is not None
    labels_BPN = torch.where(prompts.has_points_BP[..., None], prompts.labels_BPN, ABSENT)
    return replace(
        prompts,
        points_BPN3=F.pad(prompts.points_BPN3, (0, 0, 0, clicks)),
        labels_BPN=F.pad(labels_BPN, (0, clicks), value=ABSENT),
    )


def _corrected(prompts: PromptTensors, click: Click, answer_BKdhw: Tensor, column: int) -> PromptTensors:
    """The prompts with one more click, in this column of the points, and with the answer as their mask."""
    points_BKN3, labels_BKN = prompts.points_BPN3.clone(), prompts.labels_BPN.clone()
    points_BKN3[:, :, column], labels_BKN[:, :, column] = click.voxel_BK3.float(), click.label_BK
    return replace(
        prompts,
        points_BPN3=points_BKN3,
        labels_BPN=labels_BKN,
        has_points_BP=prompts.has_points_BP | (click.label_BK != ABSENT),
        masks_BPDHW=answer_BKdhw,
        has_mask_BP=torch.ones_like(prompts.has_points_BP),
    )


@dataclass(frozen=True)
class Click:
    """One click for each mask: voxel_BK3 (d, h, w) and label_BK, int64. The label is ABSENT if nothing is wrong."""

    voxel_BK3: Tensor
    label_BK: Tensor


def draw_click(inside_BKdhw: Tensor, masks_BKDHW: Tensor, chance_BK2: Tensor) -> Click:
    """Draw a click on the error of an answer.

    A cell is drawn in proportion to the POWER of its depth inside the error, so that a component is drawn by its size
    and its middle before its edge. The click is one of the cell's voxels that are wrong.

    Args:
        inside_BKdhw: the answer, bool.
        masks_BKDHW: the truth, bool. Its shape is a multiple of the answer's.
        chance_BK2: uniform random numbers in [0, 1), for the cell and for the voxel.
    """
    cell = [size // cells for size, cells in zip(masks_BKDHW.shape[2:], inside_BKdhw.shape[2:], strict=True)]
    # The share of each cell's voxels that are inside.
    share_BKdhw = F.avg_pool3d(masks_BKDHW.float(), cell)
    weights_BKV = _weights(inside_BKdhw, share_BKdhw).flatten(2)
    place_BK, some_BK = _drawn(weights_BKV, chance_BK2[..., 0])
    label_BK = 1 - torch.take_along_dim(inside_BKdhw.flatten(2), place_BK[..., None], dim=2)[..., 0].long()
    voxels_BKV3 = _voxels(place_BK, inside_BKdhw.shape[2:], cell)
    shape_3 = masks_BKDHW.shape[2:]
    flat_BKV = (voxels_BKV3[..., 0] * shape_3[1] + voxels_BKV3[..., 1]) * shape_3[2] + voxels_BKV3[..., 2]
    truth_BKV = torch.take_along_dim(masks_BKDHW.flatten(2), flat_BKV, dim=2)
    wrong_BKV = truth_BKV.long() == label_BK[..., None]
    chosen_BK, _ = _drawn(wrong_BKV.long(), chance_BK2[..., 1])
    voxel_BK3 = torch.take_along_dim(voxels_BKV3, chosen_BK[..., None, None], dim=2)[:, :, 0]
    return Click(voxel_BK3, torch.where(some_BK, label_BK, ABSENT))


def _weights(inside_BKdhw: Tensor, share_BKdhw: Tensor) -> Tensor:
    """How likely each cell is drawn, int64; 0 where it is right."""
    wrong = torch.where(inside_BKdhw, 1 - share_BKdhw, share_BKdhw)
    # What no answer of this resolution gets right is no error of the answer.
    excess = wrong - torch.minimum(share_BKdhw, 1 - share_BKdhw)
    depth = excess
    for _ in range(EROSIONS):
        excess = _eroded(excess)
        depth = depth + excess
    return ((depth**POWER + FAINT * wrong) * STEPS).round().long()


def _eroded(x_BKdhw: Tensor) -> Tensor:
    """The minimum over each cell's 27 neighbours. What lies outside of the volume does not count."""
    for size in ((3, 1, 1), (1, 3, 1), (1, 1, 3)):
        x_BKdhw = -F.max_pool3d(-x_BKdhw, size, stride=1, padding=[side // 2 for side in size])
    return x_BKdhw


def _drawn(weights_BKV: Tensor, chance_BK: Tensor) -> tuple[Tensor, Tensor]:
    """An index for each row, drawn in proportion to integer weights, and whether there is any weight."""
    sums_BKV = weights_BKV.cumsum(-1)
    total_BK = sums_BKV[..., -1]
    aim_BK = torch.minimum((chance_BK.double() * total_BK).long(), total_BK - 1)
    place_BK = torch.searchsorted(sums_BKV, aim_BK[..., None], right=True)[..., 0]
    return place_BK.clamp(max=weights_BKV.shape[-1] - 1), total_BK > 0


def _voxels(place_BK: Tensor, cells: torch.Size, cell: list[int]) -> Tensor:
    """All voxels (d, h, w) of the cells with these flat indices, int64 (B,K,V,3)."""
    _, high, wide = cells
    corner = (place_BK // (high * wide), place_BK // wide % high, place_BK % wide)
    inner_V = torch.arange(math.prod(cell), device=place_BK.device)
    inside = (inner_V // (cell[1] * cell[2]), inner_V // cell[2] % cell[1], inner_V % cell[2])
    axes = [at[..., None] * size + within for at, size, within in zip(corner, cell, inside, strict=True)]
    return torch.stack(axes, dim=-1)
