"""The text bank: names to vectors, from CLIP or seeded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from letters import write_clip

from segvol_pl.config import TextConfig, TextSource
from segvol_pl.errors import TextError, UnknownCategory
from segvol_pl.model.text_encoder import TextBank


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


def test_clip_vectors_depend_on_the_name_alone(clip: Path) -> None:
    config = TextConfig(clip_model=str(clip))
    bank = TextBank.build(["liver", "left kidney"], config, dim=32)
    alone = TextBank.build(["left kidney"], config, dim=32)
    assert bank.vectors_KE.shape == (2, 32) and bank.vectors_KE.dtype == torch.float32
    assert torch.allclose(bank.vectors_KE[1], alone.vectors_KE[0], atol=1e-5)
    assert not torch.allclose(bank.vectors_KE[0], bank.vectors_KE[1], atol=1e-2)


def test_a_tower_of_another_width_or_none_is_refused(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"has width 32, model\.text_dim is 512"):
        TextBank.build(["liver"], TextConfig(clip_model=str(clip)), dim=512)
    with pytest.raises(TextError, match=r"text\.clip_model: cannot load .*none.*text\.source=seeded"):
        TextBank.build(["liver"], TextConfig(clip_model=str(tmp_path / "none")), dim=32)


def test_seeded_vectors_are_fixed_by_the_name_and_said_to_be_no_clip(caplog: pytest.LogCaptureFixture) -> None:
    config = TextConfig(source=TextSource.seeded)
    first = TextBank.build(["liver", "spleen"], config, dim=16)
    second = TextBank.build(["spleen"], config, dim=16)
    assert torch.equal(first.vectors_KE[1], second.vectors_KE[0])
    assert "not CLIP" in caplog.text


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(UnknownCategory, match=r"'livr' is not in the text bank .*nearest: liver"):
        TextBank.seeded(["spleen", "liver"], 4).index("livr")


def test_synonyms_have_the_rows_after_the_names() -> None:
    texts = ["liver", "spleen", "hepar", "lien"]
    bank = TextBank.seeded(texts, 4).rows(texts[:2], {"hepar": "liver", "lien": "spleen"})
    assert bank.names == ["liver", "spleen"] and bank.texts == texts
    assert [bank.index(text) for text in texts] == [0, 1, 2, 3]
    assert torch.equal(bank.vectors_KE, TextBank.seeded(texts, 4).vectors_KE)
    with pytest.raises(UnknownCategory, match="nearest: hepar"):
        bank.index("hepr")


def test_a_part_of_a_bank_keeps_the_synonyms_of_its_names() -> None:
    texts = ["liver", "spleen", "hepar", "lien"]
    bank = TextBank.seeded(texts, 4).rows(texts[:2], {"hepar": "liver", "lien": "spleen"})
    kept = bank.rows(["spleen"])
    assert kept.synonyms == {"lien": "spleen"} and torch.equal(kept.vectors_KE, bank.vectors_KE[[1, 3]])
    renamed = bank.rows(["hepar", "liver"])
    assert renamed.texts == ["hepar", "liver"], "a synonym that becomes a category is none any more"
    assert torch.equal(renamed.vectors_KE, bank.vectors_KE[[2, 0]])
