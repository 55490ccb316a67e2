"""Checkpoints in parts, written and read by one process: their format, what is refused, and how they replace others."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import pretrain_config, save_untrained
from torch import Tensor

from segvol_pl.atomic import put
from segvol_pl.config import CheckpointFormat
from segvol_pl.errors import CheckpointError, NonFiniteError, SegVolError
from segvol_pl.model.checkpoint import digest_of, load_model, read_header, read_weights
from segvol_pl.model.sharded import HEADER, Part, Sharded, Stored, check_parts, index_json, open_sharded
from segvol_pl.training import sharded
from segvol_pl.training.checkpoints import AtomicCheckpointIO, remove_parts
from segvol_pl.training.resume import check_intact, newest_intact
from segvol_pl.training.run import pretrain
from segvol_pl.training.sharded import own_share, taken_apart

PART = "__0_0.distcp"


def save(checkpoint: dict[str, Any], path: Path) -> Path:
    io = AtomicCheckpointIO(sharded=True)
    io.save_checkpoint(checkpoint, path)
    io.wait()
    return path


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, Any]:
    """A checkpoint as training writes it, with an optimizer's state of one parameter."""
    checkpoint: dict[str, Any] = torch.load(save_untrained(tmp_path / "whole.ckpt", ["liver"]), weights_only=True)
    (tmp_path / "whole.ckpt").unlink()
    state = {"step": torch.tensor(3.0), "exp_avg": torch.rand(4, 3), "exp_avg_sq": torch.rand(4, 3)}
    optimizer = {"state": {0: state}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0]}]}
    return {**checkpoint, "optimizer_states": [optimizer], "global_step": 3, "loops": {"batches": [1, 2]}}


@pytest.fixture
def folder(whole: dict[str, Any], tmp_path: Path) -> Path:
    return save(whole, tmp_path / "last.ckpt")


def test_it_holds_what_a_whole_checkpoint_holds(whole: dict[str, Any], folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [PART, HEADER]
    found = AtomicCheckpointIO().load_checkpoint(folder)
    (ours,), (theirs,) = whole.pop("optimizer_states"), found.pop("optimizer_states")
    assert ours["param_groups"] == theirs["param_groups"]
    assert all(torch.equal(value, theirs["state"][0][key]) for key, value in ours["state"][0].items())
    weights, read = whole.pop("state_dict"), found.pop("state_dict")
    assert list(weights) == list(read) and all(torch.equal(weights[name], read[name]) for name in weights)
    assert found == whole


def test_its_weights_are_read_like_those_of_every_file(whole: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    torch.save(whole, tmp_path / "whole.ckpt")
    expected, found = read_weights(tmp_path / "whole.ckpt"), read_weights(folder)
    assert (found.config, found.categories) == (expected.config, expected.categories)
    assert all(torch.equal(value, found.tensors[name]) for name, value in expected.tensors.items())
    assert load_model(folder).config == expected.config
    assert read_header(folder)["global_step"] == 3


def test_its_digest_changes_with_a_weight(whole: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    again = save(whole, tmp_path / "again.ckpt")
    whole["state_dict"][next(iter(whole["state_dict"]))] += 1
    other = save(whole, tmp_path / "other.ckpt")
    assert digest_of(folder) == digest_of(again) != digest_of(other)


def test_what_is_written_is_the_state_when_it_was_saved(whole: dict[str, Any], tmp_path: Path) -> None:
    io, name = AtomicCheckpointIO(sharded=True), next(iter(whole["state_dict"]))
    before = whole["state_dict"][name].clone()
    io.save_checkpoint(whole, tmp_path / "last.ckpt")
    whole["state_dict"][name] += 1
    io.wait()
    assert torch.equal(open_sharded(tmp_path / "last.ckpt").weights()[name], before)


def test_weights_that_are_not_finite_are_not_saved(whole: dict[str, Any], folder: Path) -> None:
    name = next(iter(whole["state_dict"]))
    whole["state_dict"][name].fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=f"last.ckpt: not saved, because state_dict.{name} is not finite"):
        save({**whole, "global_step": 4}, folder)
    assert read_header(folder)["global_step"] == 3
    assert [path.name for path in folder.parent.iterdir()] == ["last.ckpt"]


def test_a_part_that_rank_0_does_not_see_is_named(
    whole: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was written to a folder of another node."""
    monkeypatch.setattr(sharded, "part_of", lambda file: file.unlink() or Part(1, 1))
    with pytest.raises(SegVolError, match=r"last\.ckpt: rank 0 does not see the part __0_0\.distcp"):
        save({**whole, "global_step": 4}, folder)
    assert read_header(folder)["global_step"] == 3


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / PART).unlink(), "lacks its part __0_0.distcp"),
        (lambda folder: flip(folder / PART), "is damaged .*__0_0.distcp"),
        (lambda folder: os.truncate(folder / PART, 100), "is damaged .*__0_0.distcp"),
        (lambda folder: (folder / HEADER).unlink(), "a folder without checkpoint.pt"),
        (lambda folder: flip(folder / HEADER), "damaged|cannot be read"),
        (lambda folder: os.truncate(folder / HEADER, 100), "cannot be read"),
    ],
)
def test_damage_is_found_and_the_run_goes_on_from_another(
    whole: dict[str, Any], folder: Path, damage: Callable[[Path], None], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = save({**whole, "global_step": 2}, folder.with_name("step-2.ckpt"))
    check_intact(folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        check_intact(folder)
    assert "\n" not in str(caught.value)
    found = newest_intact(folder.parent)
    assert found is not None and (found[0], found[1]["global_step"]) == (other, 2)
    assert "resuming from step-2.ckpt" in caplog.text


class Code:
    """Leaves a file where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return self.trace.write_text, ("run",)


def test_code_in_it_is_not_run(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (folder / ".metadata").write_bytes(pickle.dumps(Code(trace)))
    load_model(folder)

    content = (folder / HEADER).read_bytes()
    torch.save({"format": "segvol_pl sharded/1", "checkpoint": {"a": Code(trace)}}, folder / HEADER)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: holds more than tensors and plain values"):
        load_model(folder)

    (folder / HEADER).write_bytes(content)
    size = (folder / PART).stat().st_size
    torch.save(Code(trace), folder / PART)
    with (folder / PART).open("ab") as part:
        part.truncate(size)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(folder)
    assert not trace.exists()


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the index of a checkpoint."""
    raw = torch.load(folder / HEADER, weights_only=True)
    index = json.loads(raw["index"])
    change(index)
    torch.save({**raw, "index": json.dumps(index)}, folder / HEADER)


def first(index: dict[str, Any]) -> list[Any]:
    """at, dtype, shape, pieces."""
    found: list[Any] = next(iter(index["tensors"].values()))
    return found


def renamed(index: dict[str, Any]) -> None:
    index["parts"] = {f"../{name}": part for name, part in index["parts"].items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, "no name of a part"),
        (lambda index: first(index).__setitem__(1, "Storage"), "unknown type Storage"),
        (lambda index: first(index)[3].clear(), "is not complete"),
        (lambda index: first(index)[2].__setitem__(0, 10**9), "is not complete"),
        (lambda index: first(index)[3][0][0].__setitem__(0, -1), "a piece outside"),
        (lambda index: first(index)[3][0].__setitem__(3, 10**12), "a piece outside"),
        (lambda index: first(index)[3][0].__setitem__(4, 1), "a piece outside"),
        (lambda index: first(index)[3][0].__setitem__(2, 7), "cannot be read"),
        (lambda index: index.pop("tensors"), "cannot be read"),
    ],
)
def test_an_index_that_lies_is_refused(folder: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    rewritten(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value) and str(folder / HEADER) in str(caught.value)


def test_a_tensor_without_a_place_is_refused(folder: Path) -> None:
    rewritten(folder, lambda index: first(index).__setitem__(0, ["state_dict", "elsewhere"]))
    with pytest.raises(CheckpointError, match=r"has no place for state_dict\.elsewhere"):
        open_sharded(folder).complete()


def test_another_models_tensors_are_refused(folder: Path) -> None:
    found = open_sharded(folder)
    name = next(iter(found.tensors))
    with pytest.raises(CheckpointError, match=r"it lacks state_dict\.other"):
        found.load_into({"state_dict.other": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=rf"{name} is .*, not \[2, 2, 2\]"):
        found.load_into({name: torch.zeros(2, 2, 2)})


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.ckpt").mkdir()
    with pytest.raises(CheckpointError, match=r"empty\.ckpt: is a folder without checkpoint\.pt"):
        load_model(tmp_path / "empty.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "empty.ckpt" / HEADER)
    with pytest.raises(CheckpointError, match="is no sharded checkpoint of this version"):
        load_model(tmp_path / "empty.ckpt")


def test_either_form_replaces_the_other(whole: dict[str, Any], folder: Path) -> None:
    for parts, step in ((False, 4), (False, 5), (True, 6), (True, 7)):
        io = AtomicCheckpointIO(parts)
        io.save_checkpoint({**whole, "global_step": step}, folder)
        io.wait()
        assert folder.is_dir() is parts
        assert read_header(folder)["global_step"] == step
        assert [path.name for path in folder.parent.iterdir()] == ["last.ckpt"]


def test_a_kill_between_the_two_names_leaves_the_checkpoint_before(
    whole: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, rename = save({**whole, "global_step": 4}, folder.with_name(".last.ckpt.x.part")), Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self == new:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        put(new, folder)
    monkeypatch.undo()
    found = newest_intact(folder.parent)
    assert found is not None and (found[0].name, found[1]["global_step"]) == ("before-last.ckpt", 3)
    remove_parts(folder.parent)
    assert [path.name for path in folder.parent.iterdir()] == ["before-last.ckpt"], "the only one"
    save({**whole, "global_step": 5}, folder)
    remove_parts(folder.parent)
    assert [path.name for path in folder.parent.iterdir()] == ["last.ckpt"]


def test_ranks_divide_what_they_all_hold() -> None:
    tree = {"weights": {name: torch.zeros(size) for size, name in enumerate("abcdefgh", 2)}, "steps": [torch.ones(1)]}
    rest, tensors = taken_apart(tree)
    assert rest == {"weights": dict.fromkeys("abcdefgh"), "steps": tree["steps"]}
    shares: list[dict[Any, Tensor]] = [own_share(tensors, rank, 3) for rank in range(3)]
    assert sorted(at for share in shares for at in share) == sorted(tensors)
    sizes = [sum(tensor.numel() for tensor in share.values()) for share in shares]
    assert max(sizes) < 1.3 * min(sizes)


def test_an_index_keeps_every_piece(folder: Path) -> None:
    found = open_sharded(folder)
    assert isinstance(found, Sharded) and all(isinstance(each, Stored) for each in found.tensors.values())
    raw = torch.load(folder / HEADER, weights_only=True)
    assert index_json(found.parts, found.tensors) == raw["index"]
    check_parts(folder)


def test_a_run_of_one_process_goes_on_from_parts(phantom_shards: Path, tmp_path: Path) -> None:
    """Interrupted by its length, and made longer in the other form."""
    config = pretrain_config(phantom_shards, tmp_path / "run", steps=4)
    unbroken = torch.load(pretrain(config), weights_only=True)
    run = replace(config.run, out=str(tmp_path / "parts"), checkpoint_format=CheckpointFormat.sharded)
    config = replace(config, run=run)
    assert pretrain(replace(config, optim=replace(config.optim, max_steps=2))).is_dir()
    last = pretrain(replace(config, run=replace(run, checkpoint_format=CheckpointFormat.full)))
    found = torch.load(last, weights_only=True)
    assert found["global_step"] == 4 and found["state_dict"].keys() == unbroken["state_dict"].keys()
    assert [path.name for path in last.parent.glob(".*")] == []
