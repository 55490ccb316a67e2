"""The processed M3D-Seg form becomes shards; what it lost is marked as unknown, its known faults are corrected."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ct_files import phantom
from scipy import sparse

from segvol_pl.__main__ import main
from segvol_pl.config import PackConfig
from segvol_pl.data.schema import Member
from segvol_pl.data.shard_index import list_samples, read_index
from segvol_pl.data.shard_reader import read_array, read_facts
from segvol_pl.data.store import Store
from segvol_pl.errors import CaseError, VolumeError
from segvol_pl.packing.m3d import is_m3d, m3d_cases, read_m3d_image, read_m3d_masks
from segvol_pl.packing.pack import pack

NAMES = ["liver", "left lung", "never there"]


def _write_case(folder: Path, seed: int) -> np.ndarray:
    """A case as the published script writes it: z-scored floats (1, W, H, D), a row a category. Its label map."""
    hu_DHW, label_DHW = phantom(seed)
    image = (hu_DHW.swapaxes(0, 2).astype(np.float64) - 20) / 250
    masks = np.stack([(label_DHW.swapaxes(0, 2) == value) for value in (1, 2, 3)]).astype(np.int32)
    folder.mkdir(parents=True)
    np.save(folder / "image.npy", image[None])
    sparse.save_npz(folder / f"mask_{masks.shape}", sparse.csr_matrix(masks.reshape(3, -1)))
    return label_DHW


def _write_list(folder: Path, ids: list[str], names: list[str], **changes: Any) -> Path:
    shape = (3, 26, 28, 24)
    rows = [{"image": f"9999/{id}/image.npy", "label": f"9999/{id}/mask_{shape}.npz"} for id in ids]
    numbered = {str(number): name for number, name in enumerate(["background", *names])}
    content = {"name": "made", "labels": numbered, "train": rows[:-1], "test": rows[-1:], **changes}
    path = folder / f"{folder.name}.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of three cases."""
    folder = tmp_path_factory.mktemp("m3d") / "9999"
    for seed in range(3):
        _write_case(folder / f"case{seed}", seed)
    return _write_list(folder, ["case0", "case1", "case2"], NAMES)


def _config(listed: Path, out: Path, **changes: Any) -> PackConfig:
    settings = {"cases": str(listed), "out": str(out), "overview_shape": [8, 16, 16], "workers": 1, **changes}
    return PackConfig(**settings)


def test_the_form_becomes_shards(listed: Path, tmp_path: Path) -> None:
    report = pack(_config(listed, tmp_path / "out", dataset="made"))
    assert report.packed == 3 and not report.bad
    store = Store(tmp_path / "out")
    for record in read_index(store).samples:
        facts = read_facts(store, record)
        _, label_DHW = phantom(int(record.key[-1]))
        packed = read_array(store, record, facts, Member.LABEL)
        assert facts.spacing is None and facts.affine is None
        assert facts.source["form"] == "M3D-Seg" and "unit unknown" in facts.source["values"]
        assert facts.source["published_split"] == ("test" if record.key == "case2" else "train")
        assert sorted(facts.categories) == ["left lung", "liver"]
        for name, value in (("liver", 1), ("left lung", 2)):
            assert np.isin(packed, facts.categories[name].values).sum() == (label_DHW == value).sum()
    assert {row["spacing"] for row in list_samples(str(tmp_path / "out"))} == {"unknown"}


def test_the_stated_formula_gives_the_published_values(listed: Path) -> None:
    stored_DHW, meaning = read_m3d_image(listed.parent / "case0/image.npy")
    published_DHW = np.load(listed.parent / "case0/image.npy")[0].swapaxes(0, 2)
    formula = re.fullmatch(r"unit unknown: published value = (.+) \+ \(stored \+ (.+)\) \* (.+)", meaning)
    assert formula is not None
    low, shift, step = map(float, formula.groups())
    assert np.abs(low + (stored_DHW + shift) * step - published_DHW).max() < 0.51 * step + 1e-6


def test_whole_numbers_are_kept(tmp_path: Path) -> None:
    hu_DHW, _ = phantom(0)
    np.save(tmp_path / "image.npy", hu_DHW.swapaxes(0, 2)[None].astype(np.float32))
    stored_DHW, meaning = read_m3d_image(tmp_path / "image.npy")
    assert np.array_equal(stored_DHW, hu_DHW) and meaning.startswith("as published")


def test_a_name_given_twice_asks_for_the_recipe(listed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "0014"
    folder.mkdir()
    path = _write_list(folder, ["a", "b"], ["lumbar spine L1", "lumbar spine L1", "sacrum"])
    with pytest.raises(CaseError, match=r"lumbar spine L1 twice: give recipe=FILE"):
        m3d_cases(path)


def test_a_recipe_names_the_channels_and_leaves_cases_out(listed: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "made.yaml"
    recipe.write_text(
        "name: made_set\ntitle: Made\nvolumes: 3\npublished_categories: 3\nimages: '{id}.nii.gz'\n"
        "labels: '{id}_seg.nii.gz'\ncategories: {liver: [1]}\nsource: here\nlicence: none\ncertain: false\n"
        "doubts: all of it\nm3d_labels: [liver, lung, other]\nexclude: case1\nexclude_reason: an MRI\n"
    )
    assert pack(_config(listed, tmp_path / "out", recipe=str(recipe))).packed == 2
    index = read_index(Store(tmp_path / "out"))
    assert index.dataset == "made_set" and sorted(index.categories) == ["liver", "lung"]
    assert {record.key for record in index.samples} == {"case0", "case2"}


def test_faults_name_the_file(listed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "9999"
    for id in "abcd":
        _write_case(folder / id, 1)
    mask = next((folder / "a").glob("*.npz"))
    mask.write_bytes(mask.read_bytes()[:100])
    np.save(folder / "b/image.npy", np.full((1, 4, 4, 4), np.nan))
    np.save(folder / "c/image.npy", np.array([{"pickled": 1}], dtype=object), allow_pickle=True)
    path = _write_list(folder, ["a", "b", "c", "d"], NAMES)
    report = pack(_config(path, tmp_path / "out", max_bad_fraction=0.9))
    assert report.packed == 1
    reasons = {bad.id: bad.reason for bad in report.bad}
    assert "npz cannot be read" in reasons["a"] and "NaN" in reasons["b"] and "cannot be read" in reasons["c"]


def test_a_mask_of_another_image_is_refused(listed: Path) -> None:
    mask = next((listed.parent / "case0").glob("*.npz"))
    with pytest.raises(VolumeError, match="belongs to another image"):
        list(read_m3d_masks(mask, NAMES, (2, 3, 4)))
    with pytest.raises(VolumeError, match="belongs to another image"):
        list(read_m3d_masks(mask, NAMES[:2], (24, 28, 26)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": [], "test": []}, "lists no case"),
        ({"labels": {"1": "liver", "7": "lung"}}, "labels must be"),
        ({"train": [{"image": "9999/a/image.npy"}]}, "is not an object with image and label"),
        ({"train": [{"image": "9999/a/i.npy", "label": "9999/a/l.npz"}] * 2}, "lists a twice"),
    ],
)
def test_a_list_that_cannot_be_read_says_why(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = _write_list(tmp_path, ["a"], ["liver"], **changes)
    with pytest.raises(CaseError, match=message):
        m3d_cases(path)


def test_other_lists_are_no_m3d(tmp_path: Path) -> None:
    (tmp_path / "cases.json").write_text('[{"id": "a", "image": "a.nii.gz"}]')
    (tmp_path / "broken.json").write_text("{")
    assert not is_m3d(tmp_path / "cases.json") and not is_m3d(tmp_path / "broken.json")


def test_the_verb_packs_it(listed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", f"cases={listed}", f"out={tmp_path / 'out'}", "overview_shape=[8,16,16]", "workers=1"]) == 0
    assert "3 samples" in capsys.readouterr().out
