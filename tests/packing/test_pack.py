"""CT files become shards: aligned, measured, resumable to the byte; what cannot be used is listed."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from ct_files import SPACING, phantom, to_image, write_case, write_dicom, write_promise
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from segvol_pl.config import PackConfig, RegionsConfig
from segvol_pl.data.frames import decode_array
from segvol_pl.data.sample_table import KEY
from segvol_pl.data.schema import Facts, Member, Split
from segvol_pl.data.shard_index import read_index
from segvol_pl.data.shard_reader import read_facts, read_member
from segvol_pl.data.store import INDEX, Store
from segvol_pl.data.verify import verify
from segvol_pl.errors import CaseError, ConfigError, PackError
from segvol_pl.imaging.box import box_of, box_slices
from segvol_pl.imaging.read import read_label, read_volume
from segvol_pl.imaging.write import write_mask
from segvol_pl.packing import pack as packing
from segvol_pl.packing import stage as staging
from segvol_pl.packing.join import drop_duplicates
from segvol_pl.packing.pack import pack
from segvol_pl.packing.prepare import merge_masks, split_of
from segvol_pl.packing.report import PackReport
from segvol_pl.packing.stage import KEY_LENGTH, STAGING, Staged, key_of, stage

CATEGORIES = "liver: [1]\nlung: [2]\nboth: [1, 2]\nspleen: [3]\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six labelled cases and a categories file."""
    folder = tmp_path_factory.mktemp("source")
    for seed in range(6):
        write_case(folder, f"case{seed}", seed)
    (folder / "categories.yaml").write_text(CATEGORIES)
    return folder


def _config(source: Path, out: Path, **changes: Any) -> PackConfig:
    settings: dict[str, Any] = {
        "images": str(source),
        "labels": str(source),
        "categories": str(source / "categories.yaml"),
        "out": str(out),
        "dataset": "made",
        "overview_shape": [8, 16, 16],
        "samples_per_shard": 2,
        "test_fraction": 0.5,
        "anchors": 16,
        "workers": 1,
        "regions": RegionsConfig(min_size=200_000),
    }
    return PackConfig(**{**settings, **changes})


def _read(out: Path, key: str) -> tuple[Facts, dict[Member, np.ndarray]]:
    store = Store(out)
    record = next(record for record in read_index(store).samples if record.key == key)
    stored = [member for member in Member if member.value in record.members and member is not Member.FACTS]
    return read_facts(store, record), {member: decode_array(read_member(store, record, member))[:] for member in stored}


def _shards(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "shards"
    report = pack(_config(source, out))
    assert (report.packed, report.bad, report.duplicates) == (6, [], {})
    return out


def test_what_is_packed_is_the_body_of_the_ct_with_its_label(source: Path, packed: Path) -> None:
    volume = read_volume(source / "case3_ct.nii.gz")
    label_DHW = read_label(source / "case3_seg.nii.gz", volume)
    facts, arrays = _read(packed, "case3")
    low = np.rint(np.linalg.solve(volume.affine, np.array(facts.affine))[:3, 3]).astype(int)
    high = low + facts.shape - 1
    body = box_slices((low[0], low[1], low[2], high[0], high[1], high[2]))
    assert np.array_equal(arrays[Member.CT], volume.array_DHW[body])
    assert np.array_equal(arrays[Member.LABEL], label_DHW[body])
    assert (volume.array_DHW > facts.intensity.low).sum() == (arrays[Member.CT] > facts.intensity.low).sum()
    assert facts.spacing == pytest.approx(SPACING[::-1])
    assert arrays[Member.CT].dtype == np.int16
    assert arrays[Member.LABEL].dtype == np.uint8


def test_overview_and_regions_share_a_grid(packed: Path) -> None:
    facts, arrays = _read(packed, "case0")
    assert facts.overview_shape == [8, 16, 16]
    for member in (Member.OVERVIEW, Member.OVERVIEW_LABEL, Member.REGIONS):
        assert arrays[member].shape == (8, 16, 16)
    assert arrays[Member.OVERVIEW][arrays[Member.OVERVIEW_LABEL] == 2].mean() < -600
    assert arrays[Member.REGIONS].dtype == np.uint16


def test_facts_measure_every_category_present(packed: Path) -> None:
    facts, arrays = _read(packed, "case1")
    assert sorted(facts.categories) == ["both", "liver", "lung"]
    for category in facts.categories.values():
        mask_DHW = np.isin(arrays[Member.LABEL], category.values)
        places = np.argwhere(mask_DHW)
        assert category.voxels == len(places)
        assert category.box == [*places.min(axis=0), *places.max(axis=0)]
        assert len({tuple(anchor) for anchor in category.anchors}) == 16
        assert mask_DHW[tuple(np.array(category.anchors).T)].all()


def test_the_split_follows_the_content_alone(source: Path, packed: Path, tmp_path: Path) -> None:
    index = read_index(Store(packed))
    assert index.splits == {"test": 2, "train": 4}
    assert all(record.split in record.shard for record in index.samples)
    for number in (4, 5):
        for role in ("ct", "seg"):
            shutil.copy(source / f"case{number}_{role}.nii.gz", tmp_path / f"renamed{number}_{role}.nii.gz")
    pack(_config(tmp_path, tmp_path / "out", categories=str(source / "categories.yaml"), regions=RegionsConfig(False)))
    before = {record.key: record.split for record in index.samples}
    after = {record.key: record.split for record in read_index(Store(tmp_path / "out")).samples}
    assert after == {"renamed4": before["case4"], "renamed5": before["case5"]}


def test_split_of_follows_the_fraction() -> None:
    hashes = [f"{number * 2654435761 % 16**8:08x}" for number in range(2000)]
    share = np.mean([split_of(value, 0.2) is Split.TEST for value in hashes])
    assert share == pytest.approx(0.2, abs=0.03)
    assert {split_of(value, 0.0) for value in hashes} == {Split.TRAIN}
    assert {split_of(value, 1.0) for value in hashes} == {Split.TEST}


def test_the_folder_is_whole_and_clean(packed: Path) -> None:
    assert verify(packed) == []
    names = sorted(path.name for path in packed.iterdir())
    assert [name for name in names if not name.endswith(".tar")] == [INDEX, "pack_report.json", "splits.csv"]
    assert len(names) == 3 + 3
    report = json.loads((packed / "pack_report.json").read_text())
    assert (report["cases"], report["splits"]) == (6, {"test": 2, "train": 4})


def test_workers_do_not_change_a_byte(source: Path, packed: Path, tmp_path: Path) -> None:
    pack(_config(source, tmp_path / "out", workers=2))
    assert _shards(tmp_path / "out") == _shards(packed)
    assert (tmp_path / "out" / INDEX).read_bytes() == (packed / INDEX).read_bytes()


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_slices_change_no_byte(source: Path, packed: Path, tmp_path: Path, count: int) -> None:
    """Whatever the number of tasks, the order in which they end, and a task that never ran."""
    out = tmp_path / "shards"
    for number in range(count)[::-1][: count - 1 or 1]:
        report = pack(_config(source, out, part=f"{number}/{count}"))
        assert not report.shards and not (out / INDEX).exists()
    pack(_config(source, out))
    assert _shards(out) == _shards(packed)
    assert (out / "splits.csv").read_text() == (packed / "splits.csv").read_text()


def test_what_slices_staged_is_not_packed_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "shards"
    for number in range(3):
        pack(_config(source, out, part=f"{number}/3"))
    monkeypatch.setattr(staging, "pack_case", None)
    monkeypatch.setattr(staging, "source_sha256", None)
    assert pack(_config(source, out)).packed == 6


def test_cases_that_are_added_later_join_the_others(source: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "source", tmp_path / "out"
    for number in range(4):
        write_case(folder, f"case{number}", number)
    settings = {"categories": str(source / "categories.yaml")}
    pack(_config(folder, out, **settings))
    for number in (4, 5):
        write_case(folder, f"case{number}", number)
    with pytest.raises(PackError, match="is complete and cases were added since: pack them without part="):
        pack(_config(folder, out, **settings, part="0/2"))
    assert pack(_config(folder, out, **settings)).packed == 6
    pack(_config(folder, tmp_path / "again", **settings))
    assert _shards(out) == _shards(tmp_path / "again") and verify(out) == []
    write_case(folder, "case0", 9)
    before = _shards(out)
    with pytest.raises(PackError, match=r"packed from other files .*case0"):
        pack(_config(folder, out, **settings))
    assert _shards(out) == before and verify(out) == []


@pytest.mark.parametrize("text", ["3/3", "1", "a/b", "-1/3", "1/0"])
def test_a_part_that_does_not_exist(source: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"part: .* is not K/N"):
        _config(source, tmp_path, part=text)


def test_masks_that_overlap_are_kept(source: Path, tmp_path: Path) -> None:
    """A label file per category: each category is its file's voxels, however they overlap."""
    volume = read_volume(source / "case0_ct.nii.gz")
    label_DHW = read_label(source / "case0_seg.nii.gz", volume)
    lung_DHW, liver_DHW = label_DHW == 2, label_DHW == 1
    halved_DHW = liver_DHW | lung_DHW
    halved_DHW[: len(halved_DHW) // 2] = False
    masks = {"lung": lung_DHW, "liver": liver_DHW, "upper half": halved_DHW, "absent": np.zeros_like(lung_DHW)}
    for name, mask_DHW in masks.items():
        write_mask(mask_DHW, volume, tmp_path / f"{name}.nii.gz")
    row = {"id": "case0", "image": str(source / "case0_ct.nii.gz"), **{name: f"{name}.nii.gz" for name in masks}}
    (tmp_path / "cases.json").write_text(json.dumps([row]))
    stated = str(tmp_path / "cases.json")
    pack(_config(source, tmp_path / "out", images=None, labels=None, categories=None, cases=stated))
    facts, arrays = _read(tmp_path / "out", "case0")
    assert sorted(facts.categories) == ["liver", "lung", "upper half"]
    for name, category in facts.categories.items():
        assert np.isin(arrays[Member.LABEL], category.values).sum() == masks[name].sum() == category.voxels
        assert category.box == list(box_of(np.isin(arrays[Member.LABEL], category.values)))
    assert facts.source["label"] == "4 files"


@given(st.lists(st.integers(0, 2**6 - 1), min_size=8, max_size=8), st.integers(1, 6))
def test_joined_masks_can_be_told_apart_again(bits: list[int], count: int) -> None:
    codes = np.array(bits).reshape(2, 2, 2)
    masks = {f"m{number}": (codes >> number) & 1 for number in range(count)}
    label_DHW, categories = merge_masks(codes.shape, sorted(masks.items()))
    for name, mask in masks.items():
        assert np.array_equal(np.isin(label_DHW, categories.get(name, [])), mask > 0)
    assert sorted(np.unique(label_DHW[label_DHW > 0])) == list(range(1, label_DHW.max() + 1))


def test_a_complete_folder_is_left_as_it_is(source: Path, packed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in packed.iterdir()}
    console = Console(record=True, width=200, file=io.StringIO())
    report = pack(_config(source, packed), console)
    assert report.packed == 6
    assert "is complete (6 samples): nothing to do" in console.export_text()
    assert {path: path.stat().st_mtime_ns for path in packed.iterdir()} == before


@pytest.mark.parametrize("change", [{"anchors": 8}, {"samples_per_shard": 3}, {"labels": None, "categories": None}])
def test_another_configuration_is_refused(source: Path, packed: Path, change: dict[str, Any]) -> None:
    with pytest.raises(PackError, match=f"out: {packed} is packed from other files or with another configuration"):
        pack(_config(source, packed, **change))


def test_a_folder_of_someone_else_is_not_touched(source: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.tar").write_bytes(b"x")
    with pytest.raises(PackError, match="holds tars that are not from an unfinished pack"):
        pack(_config(source, tmp_path))
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(PackError, match="holds an index that pack did not write"):
        pack(_config(source, tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [INDEX, "precious.tar"]


def test_unlabelled_cases_are_packed_without_labels(source: Path, tmp_path: Path) -> None:
    pack(_config(source, tmp_path, labels=None, categories=None, regions=RegionsConfig(enabled=False)))
    facts, arrays = _read(tmp_path, "case0")
    assert (facts.labelled, facts.categories) == (False, {})
    assert set(arrays) == {Member.CT, Member.OVERVIEW}


# Interruption

RUN = """
import sys
from pathlib import Path
from segvol_pl.config import PackConfig, RegionsConfig
from segvol_pl.packing.pack import pack
import json
raw = json.loads(sys.argv[1])
pack(PackConfig(**{**raw, "regions": RegionsConfig(**raw["regions"])}))
"""


def _start(config: PackConfig) -> subprocess.Popen[bytes]:
    raw = {**vars(config), "regions": vars(config.regions)}
    command = [sys.executable, "-c", RUN, json.dumps(raw)]
    return subprocess.Popen(command, start_new_session=True, cwd=Path(packing.__file__).parents[2])


def _wait(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "the packing did not get so far"
        assert process.poll() is None, "the packing ended before it could be killed"
        time.sleep(0.002)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_pack_goes_on_to_the_same_bytes(source: Path, packed: Path, tmp_path: Path, workers: int) -> None:
    config = _config(source, tmp_path / "out", workers=workers)
    staged = tmp_path / "out" / STAGING
    process = _start(config)
    _wait(lambda: len(list(staged.glob("case*.tar"))) >= 2, process)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    _wait_for_end(process.pid)
    # Workers may finish what they hold before they see their parent gone, but the index is the parent's.
    assert not (tmp_path / "out" / INDEX).exists()
    assert len(list(staged.glob("case*.tar"))) >= 2
    assert _start(config).wait() == 0
    assert _shards(tmp_path / "out") == _shards(packed)
    assert (tmp_path / "out" / INDEX).read_bytes() == (packed / INDEX).read_bytes()


def _wait_for_end(group: int) -> None:
    """Nobody tells the workers of a killed parent to end: they must see it themselves."""
    deadline = time.monotonic() + 30
    while _group_lives(group):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)


def _group_lives(group: int) -> bool:
    """Whether a process of the group still runs; one that waits for its exit status to be read does not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(of_group) == group and state != "Z":
            return True
    return False


def test_what_is_staged_is_used_again_but_not_if_stale(source: Path, packed: Path, tmp_path: Path) -> None:
    config, out = _config(source, tmp_path / "out"), tmp_path / "out"
    cases = packing._cases_of(config, None, Console(quiet=True))
    jobs = packing._jobs_of(cases, packing._rules_of(config, None), packing._open_staging(out))
    for job in jobs[:3]:
        stage(job)
    first, second, _ = sorted((out / STAGING).glob("case*.tar"))
    second.rename(second.with_name("case1.0123456789abcdef.tar"))
    kept = first.stat().st_ino
    outcomes = [stage(job) for job in jobs[:2]]
    assert all(isinstance(outcome, Staged) for outcome in outcomes)
    assert first.stat().st_ino == kept
    assert second.exists(), "a staged file of another fingerprint is not taken for this one"
    pack(config)
    assert _shards(out) == _shards(packed)


# Bad input


def _bad_source(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    return folder


def _spoil_nan(folder: Path) -> None:
    array = phantom(2)[0].astype(np.float32)
    array[0, 0, 0] = np.nan
    sitk.WriteImage(to_image(array), str(folder / "case2_ct.nii.gz"))


def _spoil_grid(folder: Path) -> None:
    label = to_image(phantom(2)[1])
    label.SetOrigin((900.0, 0.0, 0.0))
    sitk.WriteImage(label, str(folder / "case2_seg.nii.gz"))


def _spoil_axes(folder: Path) -> None:
    array = np.stack([phantom(2)[0]] * 2)
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=False), str(folder / "case2_ct.nii.gz"))


def _spoil_series(folder: Path, **changes: Any) -> None:
    (folder / "case2_ct.nii.gz").unlink()
    write_dicom(folder / "case2_ct", phantom(2)[0], **changes)


def _spoil_two_series(folder: Path) -> None:
    _spoil_series(folder)
    write_dicom(folder / "case2_ct", phantom(2)[0], "1.2.3.9")


def _spoil_header(folder: Path) -> None:
    (folder / "case2_ct.nii.gz").unlink()
    write_promise(folder / "case2_ct.nii", 30000)


SPOILERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "unreadable": (lambda folder: (folder / "case2_ct.nii.gz").write_bytes(b"x"), "case2_ct.nii.gz cannot be read"),
    "NaN": (_spoil_nan, "1 of 17472 voxels are NaN or infinite"),
    "constant": (
        lambda folder: sitk.WriteImage(to_image(np.zeros((4, 5, 6), np.int16)), str(folder / "case2_ct.nii.gz")),
        "every voxel is 0",
    ),
    "empty label": (
        lambda folder: sitk.WriteImage(to_image(phantom()[1] * 0), str(folder / "case2_seg.nii.gz")),
        "case2_seg.nii.gz: the label map is empty",
    ),
    "unknown categories": (
        lambda folder: sitk.WriteImage(to_image(phantom()[1] * 9), str(folder / "case2_seg.nii.gz")),
        "case2_seg.nii.gz: none of its values (9, 18) is in a category",
    ),
    "another grid": (_spoil_grid, "label on another grid that cannot be aligned"),
    "4-D": (_spoil_axes, "a 4-D image"),
    "absurd header": (_spoil_header, "case2_ct.nii: its header promises 30000 x 30000 x 30000 voxels"),
    "missing slice": (lambda folder: _spoil_series(folder, skip=(5,)), "a slice is missing or there twice"),
    "two series": (_spoil_two_series, "holds 2 series: 1.2.3.4 (24 slices), 1.2.3.9 (24 slices)"),
}


@pytest.mark.parametrize("name", SPOILERS)
def test_a_bad_case_is_listed_and_left_out(source: Path, tmp_path: Path, name: str) -> None:
    spoil, reason = SPOILERS[name]
    folder = _bad_source(source, tmp_path / "source")
    spoil(folder)
    console = Console(record=True, width=400, file=io.StringIO())
    out = tmp_path / "out"
    report = pack(_config(folder, out, max_bad_fraction=0.2, regions=RegionsConfig(enabled=False)), console)
    assert (report.packed, [bad.id for bad in report.bad]) == (5, ["case2"])
    assert reason in report.bad[0].reason
    assert reason in console.export_text()
    assert [bad["id"] for bad in json.loads((out / "pack_report.json").read_text())["bad"]] == ["case2"]
    assert "case2" not in [record.key for record in read_index(Store(out)).samples]


def test_the_command_reports_what_it_packed_and_left_out(source: Path, tmp_path: Path) -> None:
    folder = _bad_source(source, tmp_path / "source")
    _spoil_nan(folder)
    keys = {"images": folder, "labels": folder, "categories": folder / "categories.yaml", "out": tmp_path / "out"}
    keys |= {"overview_shape": "[8,16,16]", "max_bad_fraction": 0.2, "regions.enabled": "false", "workers": 1}
    command = [sys.executable, "-m", "segvol_pl", "pack", *(f"{key}={value}" for key, value in keys.items())]
    wide = {**os.environ, "COLUMNS": "400"}
    # Stated, since GDCM takes the process to the C locale when it writes a series.
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, env=wide)
    assert done.returncode == 0, done.stderr
    assert "1 of 6 cases cannot be used" in done.stdout and "are NaN or infinite" in done.stdout
    assert "5 samples" in done.stdout and "volumes/s" in done.stdout


def test_too_many_bad_cases_fail_and_leave_no_index(source: Path, packed: Path, tmp_path: Path) -> None:
    folder, out = _bad_source(source, tmp_path / "source"), tmp_path / "out"
    _spoil_nan(folder)
    config = _config(folder, out, max_bad_fraction=0.1)
    with pytest.raises(PackError, match=r"1 of 6 cases cannot be used, .*=0\.1 .*the first is case2: .*NaN"):
        pack(config)
    assert not (out / INDEX).exists()
    assert not _shards(out)
    assert json.loads((out / "pack_report.json").read_text())["bad"][0]["id"] == "case2"
    shutil.copy(source / "case2_ct.nii.gz", folder / "case2_ct.nii.gz")
    pack(config)
    assert _shards(out) == _shards(packed)


def test_no_good_case_fails_whatever_the_bound(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a_ct.nii.gz").write_bytes(b"x")
    with pytest.raises(PackError, match="1 of 1 cases cannot be used"):
        pack(_config(folder, tmp_path / "out", labels=None, categories=None, max_bad_fraction=1.0))


def test_a_stated_case_whose_file_is_gone(source: Path, tmp_path: Path) -> None:
    rows = [{"id": "a", "image": str(source / "case0_ct.nii.gz")}, {"id": "b", "image": "gone.nii.gz"}]
    (tmp_path / "cases.json").write_text(json.dumps(rows))
    stated = {"images": None, "labels": None, "categories": None, "cases": str(tmp_path / "cases.json")}
    report = pack(_config(source, tmp_path / "out", **stated, max_bad_fraction=0.5))
    assert [(bad.id, "gone.nii.gz" in bad.reason) for bad in report.bad] == [("b", True)]


def test_identical_cases_are_packed_once(source: Path, tmp_path: Path) -> None:
    folder = _bad_source(source, tmp_path / "source")
    for role in ("ct", "seg"):
        shutil.copy(folder / f"case1_{role}.nii.gz", folder / f"twin_{role}.nii.gz")
    report = pack(_config(folder, tmp_path / "out", regions=RegionsConfig(enabled=False)))
    assert (report.packed, report.duplicates) == (6, {"twin": "case1"})


def test_leaving_out_copies_compares_no_case_with_all_others(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = read_index(Store(packed)).samples[0]
    cases = [Staged(f"case{number}", record, f"{number % 290}", "fingerprint") for number in range(300)]
    compared: list[object] = []
    monkeypatch.setattr(Staged, "__eq__", lambda case, other: (compared.append(other), case is other)[1])
    kept, doubles = drop_duplicates(cases)
    assert len(compared) <= len(cases)
    assert [case.id for case in kept] == [f"case{number}" for number in range(290)]
    assert doubles == {f"case{number}": f"case{number - 290}" for number in range(290, 300)}


def test_stated_labels_need_categories(source: Path, tmp_path: Path) -> None:
    (tmp_path / "cases.csv").write_text("id,image,label\na,a.nii,b.nii\n")
    stated = {"images": None, "labels": None, "categories": None, "cases": str(tmp_path / "cases.csv")}
    with pytest.raises(PackError, match="give categories=FILE"):
        pack(_config(source, tmp_path / "out", **stated))


def test_ids_that_make_one_key(source: Path, tmp_path: Path) -> None:
    rows = [{"id": id, "image": str(source / "case0_ct.nii.gz")} for id in ("a.b", "a b")]
    (tmp_path / "cases.json").write_text(json.dumps(rows))
    stated = {"images": None, "labels": None, "categories": None, "cases": str(tmp_path / "cases.json")}
    with pytest.raises(PackError, match=r"cases a b, a\.b have one key"):
        pack(_config(source, tmp_path / "out", **stated))


@pytest.mark.parametrize("id", ["case0", "a.b c-1_X", "CT (2)", "1.2.840", "x" * 80])
def test_the_key_of_an_ascii_id_has_no_hash(id: str) -> None:
    assert key_of(id) == "".join(letter if letter.isalnum() or letter in "_-" else "_" for letter in id).replace(
        "__", "_"
    )


def test_ids_beyond_ascii_have_keys_of_their_own() -> None:
    ids = [
        "ü",
        "é",
        "数据一",
        "数据二",
        "naïve",
        "naive",
        "na_ve",
        "ü" * 90,
        "x" * 90 + "ü",
        "broken \udcff",
        "broken \udcfe",
    ]
    keys = [key_of(id) for id in ids]
    assert len(set(keys)) == len(ids)
    assert all(KEY.fullmatch(key) and len(key) <= KEY_LENGTH for key in keys)
    assert keys[4].startswith("na_ve-") and keys[5:7] == ["naive", "na_ve"]
    assert key_of("e\N{COMBINING ACUTE ACCENT}") == keys[1], "both spellings are one name"


def test_a_folder_of_names_beyond_ascii_is_packed(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    for number, name in enumerate(("病例一", "病例二", "ü", "é")):
        write_case(folder, name, number)
    out = tmp_path / "out"
    report = pack(
        _config(folder, out, categories=str(source / "categories.yaml"), regions=RegionsConfig(enabled=False))
    )
    assert (report.packed, report.bad, verify(out)) == (4, [], [])
    names = {read_facts(Store(out), record).source["image"] for record in read_index(Store(out)).samples}
    assert names == {f"{name}_ct.nii.gz" for name in ("病例一", "病例二", "ü", "é")}


def test_a_missing_categories_file_fails_before_anything_is_made(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CaseError, match=r"gone\.yaml does not exist"):
        pack(_config(source, tmp_path / "out", categories=str(tmp_path / "gone.yaml")))
    assert not (tmp_path / "out").exists()


def test_a_bug_is_no_bad_case(source: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        pack(_config(source, tmp_path / "out", modality=object()))


def test_unnamed_labels_and_resampling_reach_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "source"
    for seed in range(2):
        write_case(folder, f"case{seed}", seed)
    padded = sitk.ConstantPad(to_image(phantom(0)[1]), (1, 1, 1), (1, 1, 1), 0)
    sitk.WriteImage(padded, str(folder / "case0_seg.nii.gz"))
    (folder / "categories.yaml").write_text("liver: [1]\n")
    with caplog.at_level("DEBUG", logger="segvol_pl"):
        pack(_config(folder, tmp_path / "out", workers=2, regions=RegionsConfig(enabled=False)))
    assert "1 label values that no category names: [2]" in caplog.text
    assert "resampled by nearest neighbour" in caplog.text


# Real CT


@pytest.fixture(scope="module")
def real(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PackReport]:
    out = tmp_path_factory.mktemp("real")
    ct = shared / "ct"
    regions = RegionsConfig(enabled=False)
    categories = str(ct / "categories.yaml")
    return out, pack(PackConfig(str(ct), str(ct), categories=categories, out=str(out), workers=1, regions=regions))


def _mean_hu(out: Path, key: str, categories: list[str]) -> dict[str, float]:
    facts, arrays = _read(out, key)
    return {
        name: float(arrays[Member.CT][np.isin(arrays[Member.LABEL], facts.categories[name].values)].mean())
        for name in categories
    }


def test_real_cases_are_aligned(real: tuple[Path, PackReport]) -> None:
    out, report = real
    assert (report.packed, report.bad) == (2, [])
    trunk = _mean_hu(out, "trunk", ["lung upper lobe left", "lung lower lobe right", "liver", "spleen", "hip left"])
    assert -850 < trunk["lung upper lobe left"] < -700
    assert -850 < trunk["lung lower lobe right"] < -700
    assert 30 < trunk["liver"] < 60
    assert 20 < trunk["spleen"] < 60
    assert trunk["hip left"] > 150
    thorax = _mean_hu(out, "thorax", ["liver", "spleen", "aorta", "rib left 10"])
    assert 60 < thorax["liver"] < 120
    assert 60 < thorax["spleen"] < 120
    assert 80 < thorax["aorta"] < 250
    assert thorax["rib left 10"] > 150


def test_real_overviews_show_what_the_volume_shows(real: tuple[Path, PackReport]) -> None:
    facts, arrays = _read(real[0], "trunk")
    assert arrays[Member.OVERVIEW].shape == (32, 256, 256)
    liver = arrays[Member.OVERVIEW_LABEL] == 5
    share = facts.categories["liver"].voxels / np.prod(facts.shape)
    assert liver.mean() == pytest.approx(share, rel=0.1)
    assert 30 < arrays[Member.OVERVIEW][liver].mean() < 60
