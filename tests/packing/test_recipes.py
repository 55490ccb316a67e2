"""Recipes: every one that is shipped loads and adds up; what one describes is found as it lies on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from ct_files import write_case

from segvol_pl.__main__ import main
from segvol_pl.config import PackConfig
from segvol_pl.data.shard_index import read_index
from segvol_pl.data.store import Store
from segvol_pl.errors import CaseError, ConfigError
from segvol_pl.packing.pack import pack
from segvol_pl.packing.recipes import DatasetRecipe, read_recipe, recipe_cases

BUNDLED = sorted((Path(__file__).parents[2] / "shards/datasets").glob("*.yaml"))
EXTERNAL = {"segthor", "uls23"}
RECIPE = """
name: made
title: Made here
volumes: 2
published_categories: 2
images: imagesTr/{id}_0000.nii.gz
labels: labelsTr/{id}.nii.gz
categories: {liver: [1, 2], tumour: [2]}
source: these tests
licence: none
certain: true
"""


def _recipe(folder: Path, text: str = RECIPE, **changes: str) -> Path:
    lines = [line for line in text.splitlines() if line.partition(":")[0] not in changes]
    path = folder / "made.yaml"
    path.write_text("\n".join([*lines, *(f"{key}: {value}" for key, value in changes.items() if value)]))
    return path


def _place(root: Path, source: tuple[Path, Path], image: str, label: str) -> None:
    for path, name in zip(source, (image, label), strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        path.rename(root / name)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two cases laid out as RECIPE says."""
    for seed, id in enumerate(("liver_1", "liver_2")):
        case = write_case(tmp_path / "made", id, seed)
        _place(tmp_path / "root", case, f"imagesTr/{id}_0000.nii.gz", f"labelsTr/{id}.nii.gz")
    return tmp_path / "root"


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_whole(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.name == path.stem
    assert bool(recipe.m3d_code) == (recipe.name not in EXTERNAL)
    assert len(set(recipe.m3d_labels)) == len(recipe.m3d_labels)
    assert recipe.source and recipe.licence


def test_the_shipped_recipes_are_those_of_the_paper() -> None:
    recipes = [read_recipe(path) for path in BUNDLED]
    training = [recipe for recipe in recipes if recipe.name not in EXTERNAL]
    assert sorted(recipe.m3d_code for recipe in training) == [f"{number:04d}" for number in range(25)]
    assert sum(recipe.volumes for recipe in training) == 5772
    assert {recipe.name for recipe in recipes} >= EXTERNAL


def test_known_faults_are_handled() -> None:
    named = {path.stem: read_recipe(path) for path in BUNDLED}
    for name in ("verse19", "verse20"):
        assert named[name].m3d_labels[19:21] == ["lumbar spine L1", "lumbar spine L2"]
        assert named[name].categories["lumbar spine L2"] == [21] and "L2" in named[name].faults
    assert named["amos22"].excludes("amos_0507") and not named["amos22"].excludes("amos_0404")


def test_the_described_cases_are_found_and_packed(root: Path, tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    cases = recipe_cases(read_recipe(recipe), root)
    assert [case.id for case in cases] == ["liver_1", "liver_2"]
    config = PackConfig(
        images=str(root), recipe=str(recipe), out=str(tmp_path / "out"), overview_shape=[8, 16, 16], workers=1
    )
    assert pack(config).packed == 2
    index = read_index(Store(tmp_path / "out"))
    assert index.dataset == "made" and index.categories["liver"].voxels > index.categories["tumour"].voxels


def test_an_id_may_occur_twice_and_anywhere(tmp_path: Path) -> None:
    for seed, id in enumerate(("p1", "p2")):
        case = write_case(tmp_path / "made", id, seed)
        _place(
            tmp_path / "root", case, f"part{seed}/raw/{id}/{id}_ct.nii.gz", f"part{seed}/derived/{id}/{id}_msk.nii.gz"
        )
    (tmp_path / "root/part0/raw/p2").mkdir()
    (tmp_path / "root/part0/raw/p2/p1_ct.nii.gz").write_bytes(b"another place")
    images, labels = "'**/raw/{id}/{id}_ct.nii.gz'", "'**/derived/*/{id}_msk.nii.gz'"
    recipe = read_recipe(_recipe(tmp_path, images=images, labels=labels))
    assert [case.id for case in recipe_cases(recipe, tmp_path / "root")] == ["p1", "p2"]


def test_files_of_one_category_are_joined(tmp_path: Path) -> None:
    image, label = write_case(tmp_path / "made", "a", 0)
    _place(tmp_path / "root", (image, label), "a/ct.nii.gz", "a/masks/tumor01.nii.gz")
    _, other = write_case(tmp_path / "made", "b", 1)
    other.rename(tmp_path / "root/a/masks/tumor02.nii.gz")
    files = "{tumour: [tumor01, tumor02], liver: [liver]}"
    changes = {"images": "'{id}/ct.nii.gz'", "labels": "", "categories": "", "files": files}
    recipe = _recipe(tmp_path, masks="'{id}/masks/{file}.nii.gz'", **changes)
    (case,) = recipe_cases(read_recipe(recipe), tmp_path / "root")
    assert list(case.masks) == ["tumour"] and len(case.masks["tumour"]) == 2
    config = PackConfig(
        images=str(tmp_path / "root"),
        recipe=str(recipe),
        out=str(tmp_path / "out"),
        overview_shape=[8, 16, 16],
        workers=1,
    )
    assert pack(config).packed == 1
    assert list(read_index(Store(tmp_path / "out")).categories) == ["tumour"]


def test_a_case_without_its_label_is_named_but_for_excluded_ones(root: Path, tmp_path: Path) -> None:
    (root / "labelsTr/liver_2.nii.gz").unlink()
    with pytest.raises(CaseError, match=r"no label for .*liver_2_0000.nii.gz: .* \(stack the slices\)"):
        recipe_cases(read_recipe(_recipe(tmp_path, prepare="stack the slices")), root)
    recipe = read_recipe(_recipe(tmp_path, exclude="liver_2", exclude_reason="unlabelled"))
    assert [recipe.excludes(case.id) for case in recipe_cases(recipe, root)] == [False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labelz": "x"}, "unknown key labelz: did you mean labels"),
        ({"volumes": "many"}, "volumes must be a int"),
        ({"title": ""}, "lacks title"),
        ({"images": "imagesTr"}, "does not contain {id}"),
        ({"masks": "'{id}'"}, "give one of labels"),
        ({"categories": "{liver: [0]}"}, "no label values"),
        ({"certain": "false"}, "say in doubts"),
        ({"exclude": "'('"}, "exclude is not a regular"),
        ({"name": "{"}, "is not YAML"),
    ],
)
def test_a_recipe_that_cannot_hold_says_why(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(CaseError, match=message):
        read_recipe(_recipe(tmp_path, **changes))


def test_the_root_must_be_there_and_hold_the_set(tmp_path: Path) -> None:
    recipe: DatasetRecipe = read_recipe(_recipe(tmp_path))
    with pytest.raises(CaseError, match="is not a folder"):
        recipe_cases(recipe, tmp_path / "gone")
    with pytest.raises(CaseError, match="matches nothing: give the set's root"):
        recipe_cases(recipe, tmp_path)


def test_the_command_line_refuses_labels_beside_a_recipe(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave labels out"):
        PackConfig(images=str(root), recipe="r.yaml", labels=str(root), categories="c.yaml", out="out")
    assert main(["pack", f"images={root}", f"recipe={tmp_path / 'gone.yaml'}", f"out={tmp_path / 'out'}"]) == 1
