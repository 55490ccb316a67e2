"""The shipped line prompt, from training to the viewer; landmarks of a custom kind at the command line."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import toys
from bokeh.document import Document
from ct_files import write_case
from factories import evaluate_config, save_untrained, train_config

from segvol_pl.__main__ import main
from segvol_pl.config import LINE, Coordinates, PredictConfig, SegVolConfig
from segvol_pl.errors import ConfigError, PromptError
from segvol_pl.evaluation.run import evaluate
from segvol_pl.imaging.geometry import world_of
from segvol_pl.imaging.read import read_volume
from segvol_pl.inference.predictor import Mask, Predictor
from segvol_pl.inference.prompt_coordinates import check_prompt, prompt_of
from segvol_pl.inference.viewer import PLANES, Page, UserPrompt
from segvol_pl.run_folder import read_metrics
from segvol_pl.training.run import train

EXTREMES = "toys:extremes"
AXIAL = PLANES[0]


def test_a_line_is_trained_and_evaluated(phantom_shards: Path, tmp_path: Path) -> None:
    combinations = [LINE, f"{LINE}+text"]
    config = train_config(phantom_shards, tmp_path / "run", steps=2)
    prompts = replace(config.prompts, combinations=combinations, pseudo_per_volume=0)
    checkpoint = train(replace(config, model=replace(config.model, landmarks=[LINE]), prompts=prompts))
    for name in combinations:
        assert len(read_metrics(tmp_path / "run/metrics.csv", f"train/dice_loss/{name}")) == 2
    wanted = {"prompts": combinations, "categories": ["liver"], "limit": 1, "pictures": 0}
    summary = evaluate(
        evaluate_config(phantom_shards, tmp_path / "out", str(checkpoint), "all", device="cpu", **wanted)
    )
    assert summary is not None and {row.prompt for row in summary.rows} == set(combinations)


def test_an_evaluation_of_a_model_without_the_line_names_it(phantom_shards: Path, tmp_path: Path) -> None:
    bare = save_untrained(tmp_path / "bare.ckpt", ["liver"])
    wanted = {"prompts": [LINE], "categories": ["liver"], "limit": 1, "pictures": 0}
    with pytest.raises(ConfigError, match=r"the model has no landmarks line; its model\.landmarks: none"):
        evaluate(evaluate_config(phantom_shards, tmp_path / "out", str(bare), "all", device="cpu", **wanted))


def test_shipped_and_custom_kinds_count_together() -> None:
    assert SegVolConfig(landmarks=[LINE, f"6*{EXTREMES}"]).landmark_counts == {LINE: 2, EXTREMES: 6}


# ---- at the command line ----


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A CT, and an untrained model that knows a line and a custom kind."""
    folder = tmp_path_factory.mktemp("line")
    image, _ = write_case(folder, "organs")
    return image, save_untrained(folder / "line.ckpt", ["liver"], landmarks=[LINE, f"6*{EXTREMES}"])


def settings(**changes: object) -> PredictConfig:
    return PredictConfig(checkpoint="c", image="i", out="o", **changes)  # type: ignore[arg-type]


def test_a_line_in_mm_is_the_same_line_whichever_end_is_first(files: tuple[Path, Path]) -> None:
    volume = read_volume(files[0])
    ends_23 = np.array([[3, 4, 9], [3, 12, 2]])
    for line_23 in (ends_23, ends_23[::-1]):
        for coordinates in Coordinates:
            lps = coordinates is Coordinates.lps
            given_23 = line_23 if coordinates is Coordinates.voxel else world_of(line_23, volume, lps)
            prompt = prompt_of(settings(line=given_23.ravel().tolist(), coordinates=coordinates), None, volume)
            np.testing.assert_array_equal(prompt.landmarks[LINE], ends_23)


def test_predict_takes_a_line_and_custom_landmarks(files: tuple[Path, Path], tmp_path: Path) -> None:
    image, checkpoint = files
    given = ["predict", f"checkpoint={checkpoint}", f"image={image}", "device=cpu", "zoom.threshold=0.01"]
    assert main([*given, f"out={tmp_path / 'a.nii.gz'}", "line=[4,6,6,4,12,10]"]) == 0
    six = ",".join(["4,6,6"] * 6)
    assert main([*given, f"out={tmp_path / 'b.nii.gz'}", f"landmarks={EXTREMES}:{six}", "text=liver"]) == 0
    both = f"landmarks=[{EXTREMES}:{six.replace(',', ' ')}, line:4 6 6 4 12 10]"
    assert main([*given, f"out={tmp_path / 'c.nii.gz'}", both]) == 0
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("pair", "status", "said"),
    [
        ("line=[4,6,6,4,12]", 2, "line .*: needs 6 numbers d h w d h w, got 5"),
        ("line=[4,6,6,4,12,1.5]", 1, "line, landmarks: 1.5 is not a whole number; for millimetres"),
        ("line=[4,6,6,4,12,500]", 1, r"point \[4, 12, 500\] lies outside the CT"),
        ("landmarks=line", 2, "'line' is no NAME:d,h,w,d,h,w,..."),
        ("landmarks=line:4,6", 2, "'line:4,6' is no NAME:d,h,w"),
        ("landmarks=line:4,6,x", 2, "is no NAME:d,h,w"),
        ("landmarks=line:4,6,nan", 2, "is no NAME:d,h,w"),
        ("landmarks=line:4,6,6", 2, "model.landmarks: line has 1 landmarks, not 2"),
        (
            "landmarks=toys:other:4,6,6",
            2,
            "the model has no landmarks toys:other; its model.landmarks: line, toys:extremes",
        ),
    ],
)
def test_what_is_no_line_is_refused_in_one_line(
    pair: str, status: int, said: str, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["predict", f"checkpoint={files[1]}", f"image={files[0]}", "device=cpu", f"out={tmp_path / 'm.nii.gz'}"]
    assert main([*given, pair]) == status
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("segvol-pl predict: error: ") and re.search(said, line), line
    assert not list(tmp_path.iterdir())


def test_a_model_without_the_line_is_named_before_the_ct_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = save_untrained(tmp_path / "bare.ckpt", [])
    given = ["predict", f"checkpoint={bare}", "image=gone.nii.gz", "device=cpu", f"out={tmp_path / 'm.nii.gz'}"]
    assert main([*given, "line=[1,2,3,1,5,6]"]) == 2
    assert "the model has no landmarks line; its model.landmarks: none" in capsys.readouterr().err.splitlines()[-1]


def test_a_kind_given_twice_or_with_many_categories_is_refused() -> None:
    for changes in ({"line": [1.0] * 6, "landmarks": ["line:1,2,3,4,5,6"]}, {"landmarks": ["a:b:1,2,3"] * 2}):
        with pytest.raises(ConfigError, match="landmarks: names a kind twice"):
            settings(**changes)
    with pytest.raises(ConfigError, match="text: several categories need text alone: leave line out"):
        settings(text=["all"], line=[1.0] * 6)
    with pytest.raises(PromptError, match=r"line, landmarks: 1\.5"):
        check_prompt(settings(landmarks=["line:1,2,1.5,1,2,3"]))


# ---- in the viewer ----


def test_marks_become_landmarks_when_all_are_there() -> None:
    asked = UserPrompt((20, 40, 30), (3.0, 1.0, 2.0), kinds={LINE: 2})
    assert asked.mark(LINE, (4, 30, 3)) and asked.empty and not asked.complete
    assert not asked.mark(LINE, (4, 40, 3)) and asked.mark(LINE, (4, 5, 9)) and not asked.empty
    assert asked.prompt().landmarks[LINE].tolist() == [[4, 5, 9], [4, 30, 3]]
    assert asked.mark(LINE, (7, 1, 1)) and asked.landmarks[LINE] == [(7, 1, 1)], "the next mark begins another line"


def test_a_line_is_drawn_on_a_plane_of_the_page(files: tuple[Path, Path]) -> None:
    session = Predictor.from_checkpoint(files[1], device="cpu").open(files[0])
    with ThreadPoolExecutor(1) as worker:
        page = Page(session, worker, Document())
        page.lay_out()
        assert page.label.labels == ["inside", "outside", LINE, EXTREMES]
        panel = page.panels[0]
        panel.scroll.value, page.label.active = 4, 2
        place = [
            (float(w + 0.5) * session.volume.spacing[2], float(h + 0.5) * session.volume.spacing[1])
            for h, w in ((6, 6), (12, 10))
        ]
        page._tapped(panel, SimpleNamespace(x=place[0][0], y=place[0][1]))  # type: ignore[arg-type]
        assert page.status.text == "line: 1 of 2 marked." and page.mask is None
        page._tapped(panel, SimpleNamespace(x=place[1][0], y=place[1][1]))  # type: ignore[arg-type]
        assert page.status.text == "Segmenting ..." and panel.plane == AXIAL
    assert page.user_prompt.complete[LINE].tolist() == [[4, 6, 6], [4, 12, 10]]
    np.testing.assert_allclose(list(zip(panel.line.data["x"], panel.line.data["y"], strict=True)), place)
    assert page.panels[1].line.data["x"] == []
    assert isinstance(session.segment(page.user_prompt.prompt()), Mask)
    page._cleared()
    assert page.user_prompt.landmarks == {} and panel.line.data["x"] == []


def test_a_model_without_landmarks_offers_none(files: tuple[Path, Path], tmp_path: Path) -> None:
    bare = save_untrained(tmp_path / "bare.ckpt", ["liver"])
    with ThreadPoolExecutor(1) as worker:
        page = Page(Predictor.from_checkpoint(bare, device="cpu").open(files[0]), worker, Document())
    assert page.label.labels == ["inside", "outside"]


def test_the_custom_kind_of_these_tests_marks_six_voxels() -> None:
    assert toys.extremes(np.ones((2, 3, 4), bool), np.random.default_rng(0)).shape == (6, 3)
