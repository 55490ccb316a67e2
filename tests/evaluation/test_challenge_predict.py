"""`segvol-pl challenge predict`: prompts of the challenge's files become one label map a case."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import Oracle, RangeOracle, predictor_of, save_untrained
from letters import write_clip

from segvol_pl.__main__ import main
from segvol_pl.config import TextConfig
from segvol_pl.errors import ConfigError, PromptError, UnknownCategory
from segvol_pl.evaluation.challenge_files import MOST, read_case, read_labels
from segvol_pl.evaluation.challenge_predict import answer
from segvol_pl.imaging.box import Box, box_slices
from segvol_pl.imaging.geometry import unplaced_volume
from segvol_pl.imaging.prompts import Prompt
from segvol_pl.inference.predictor import Predictor, Session
from segvol_pl.model.text_encoder import TextBank

ROOT = Path(__file__).parents[2]
WINDOW = (8, 16, 16)
SHAPE = (20, 32, 28)
BODY = (2, 3, 2, 17, 29, 25)
LIVER, SPLEEN = (4, 6, 5, 11, 14, 13), (8, 17, 14, 15, 25, 21)


def image() -> np.ndarray:
    """Nothing, a dim body and two bright organs."""
    image_DHW = np.zeros(SHAPE, np.uint8)
    image_DHW[box_slices(BODY)] = 60
    for organ in (LIVER, SPLEEN):
        image_DHW[box_slices(organ)] = 250
    return image_DHW


def labels(**organs: Box) -> np.ndarray:
    """Label map of organs, whose names end in their value."""
    labels_DHW = np.zeros(SHAPE, np.uint8)
    for name, organ in organs.items():
        labels_DHW[box_slices(organ)] = int(name[-1])
    return labels_DHW


def box_of_middle(box: Box) -> dict[str, int]:
    names = ("z_min", "z_mid_y_min", "z_mid_x_min", "z_max", "z_mid_y_max", "z_mid_x_max")
    return {**dict(zip(names, box, strict=True)), "z_mid": (box[0] + box[3]) // 2}


def write_case(folder: Path, name: str = "case", **arrays: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.npz"
    np.savez_compressed(path, **{"imgs": image(), "spacing": (1.0, 1.0, 1.0), **arrays})
    return path


def answered(model: Any, folder: Path, **arrays: Any) -> np.ndarray:
    return answer(read_case(write_case(folder, **arrays)), predictor_of(model))


def test_each_class_is_segmented_by_its_own_box(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    boxes = [box_of_middle(SPLEEN), box_of_middle(LIVER)]
    with caplog.at_level(logging.WARNING):
        found_DHW = answered(Oracle(WINDOW), tmp_path, boxes=boxes)
    np.testing.assert_array_equal(found_DHW, labels(spleen1=SPLEEN, liver2=LIVER))
    assert found_DHW.dtype == np.uint8 and not caplog.records


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_the_model_sees_an_image_as_it_is(dtype: Any, tmp_path: Path) -> None:
    """0 to 255 become 0 to 1, whatever else the image holds."""
    case = read_case(write_case(tmp_path, imgs=image().astype(dtype)))
    volume = unplaced_volume(case.image_DHW, (3.0, 2.0, 1.0), case.path)
    session = predictor_of(Oracle(WINDOW)).open_normalised(volume, MOST)
    assert session.body == BODY and volume.spacing == (3.0, 2.0, 1.0)
    np.testing.assert_allclose(session.zoomer.image_DHW[:], image()[box_slices(BODY)] / 255, atol=1e-6)
    np.testing.assert_array_equal(volume.native.to_canonical(image()), image())


def test_an_image_of_one_value_is_segmented_all_the_same(tmp_path: Path) -> None:
    for value in (0, 255):
        found_DHW = answered(
            Oracle(WINDOW), tmp_path, imgs=np.full(SHAPE, value, np.uint8), boxes=[box_of_middle(LIVER)]
        )
        np.testing.assert_array_equal(found_DHW, labels(liver1=LIVER) if value else labels())


def test_clicks_in_the_dark_around_the_body_are_in_the_image(tmp_path: Path) -> None:
    found_DHW = answered(Oracle(WINDOW), tmp_path, clicks=[{"fg": [[0, 0, 0]], "bg": [[19, 31, 27]]}])
    np.testing.assert_array_equal(found_DHW > 0, image() > 127)


def test_a_voxel_of_two_classes_goes_to_the_more_probable(tmp_path: Path) -> None:
    model = RangeOracle(WINDOW, {"organs": (0.5, 1.1, 2.0), "all": (0.1, 1.1, 1.0), "none": (2.0, 3.0, 1.0)})
    found_DHW = answered(model, tmp_path, text_prompts={"3": "all", "1": "organs", "7": "none", "instance_label": 0})
    expected_DHW = labels(body3=BODY, liver1=LIVER, spleen1=SPLEEN)
    np.testing.assert_array_equal(found_DHW, expected_DHW)


def test_a_class_refines_its_mask_of_the_answer_before(tmp_path: Path) -> None:
    """As `Session.segment` refines one; a class that the answer lacks is segmented from its prompt."""
    half = (4, 6, 5, 8, 14, 13)
    clicks = [{"fg": [[10, 10, 10]], "bg": [[3, 4, 3]]}, {"fg": [[10, 20, 18]], "bg": []}]
    path = write_case(tmp_path, clicks=clicks, boxes=[None, box_of_middle(SPLEEN)], prev_pred=labels(liver1=half))
    case, predictor = read_case(path), predictor_of(Oracle(WINDOW))
    session = predictor.open_normalised(unplaced_volume(case.image_DHW, case.spacing, path), MOST)
    prompts = case.prompts()
    refined = session.segment(prompts[1], case.previous(1)).array_DHW
    assert refined.any() and not np.array_equal(refined, session.segment(prompts[1]).array_DHW)
    expected_DHW = np.where(refined, 1, 2 * session.segment(prompts[2]).array_DHW)
    np.testing.assert_array_equal(answer(case, predictor), expected_DHW)


def test_a_class_without_a_prompt_is_background(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found_DHW = answered(Oracle(WINDOW), tmp_path, clicks=[{"fg": [], "bg": [[3, 3, 3]]}, {"fg": [], "bg": []}])
    assert not found_DHW.any() and found_DHW.shape == SHAPE
    assert "case.npz: no prompt says where class 1 is: background" in caplog.text
    assert not answered(Oracle(WINDOW), tmp_path).any()


def test_a_label_map_to_refine_must_have_the_shape_of_the_image() -> None:
    session = Session(predictor_of(Oracle(WINDOW)), unplaced_volume(image().astype(np.int16), (1, 1, 1), Path("x")))
    with pytest.raises(PromptError, match=r"previous: the mask has \[1, 1, 1\] voxels"):
        session.segment_prompts({1: Prompt(box=LIVER)}, np.ones((1, 1, 1), np.uint8))


# ---- the command ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("untrained") / "last.ckpt", ["liver", "spleen"])


def test_a_folder_is_segmented_and_what_cannot_be_is_listed(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    cases, out = tmp_path / "in", tmp_path / "out"
    write_case(cases, "a", boxes=[box_of_middle(LIVER)])
    write_case(cases, "b", text_prompts={"1": "livr"})
    write_case(cases, "c", text_prompts={"1": "spleen"}, boxes=[{"z_min": 3}])
    write_case(cases, "d", text_prompts={"1": "spleen"})
    (cases / "e.npz").write_bytes(b"no zip")
    (cases / "notes.txt").write_text("no case")
    given = ["challenge", "predict", str(cases), str(out), f"checkpoint={checkpoint}", "device=cpu"]
    with caplog.at_level(logging.ERROR):
        assert main(given) == 1
    assert sorted(path.name for path in out.iterdir()) == ["a.npz", "d.npz"]
    assert read_labels(out / "a.npz", shape=SHAPE).max() <= 1
    said = {Path(record.getMessage().split(": ")[0]).name: record.getMessage() for record in caplog.records}
    assert sorted(said) == ["b.npz", "c.npz", "e.npz"] and not any("\n" in line for line in said.values())
    assert "did you mean" in said["b.npz"] or "liver" in said["b.npz"]
    assert "set clip_model=FOLDER" in said["b.npz"] and "boxes: the box of class 1 lacks" in said["c.npz"]
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith("error: 3 of 5 cases were not segmented, for the reasons logged: b.npz, c.npz, e.npz")
    for name in "bce":
        (cases / f"{name}.npz").unlink()
    (out / "a.npz").write_bytes(b"an answer of an earlier call")
    assert main(given) == 0 and read_labels(out / "a.npz").shape == SHAPE


def test_cases_are_not_replaced_by_their_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = write_case(tmp_path / "cases").parent
    assert main(["challenge", "predict", str(cases), f"{cases}/../cases", "checkpoint=gone.ckpt"]) == 1
    assert "holds the cases, which the answers would replace" in capsys.readouterr().err


def test_texts_that_the_bank_lacks_come_from_its_clip(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    clip, cases, out = write_clip(tmp_path / "clip"), tmp_path / "cases", tmp_path / "out"
    bank = TextBank.from_clip(["liver"], TextConfig(clip_model=str(clip)))
    made_by_clip = save_untrained(tmp_path / "clip.ckpt", ["liver"], bank)
    case = read_case(write_case(cases, "a", text_prompts={"1": "gut"}))
    write_case(cases, "b", text_prompts={"1": "gut", "2": "bone"})
    with pytest.raises(UnknownCategory, match="set clip_model=FOLDER"):
        answer(case, Predictor.from_checkpoint(made_by_clip, device="cpu"))
    given = ["challenge", "predict", str(cases), str(out), "device=cpu", f"clip_model={clip}"]
    assert main([*given, f"checkpoint={checkpoint}"]) == 1 and not list(out.iterdir()), "its bank was made by no CLIP"
    assert main([*given, f"checkpoint={made_by_clip}"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["a.npz", "b.npz"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "takes predict IN OUT checkpoint=FILE"),
        (["train"], "takes predict IN OUT"),
        (["predict", "in"], "takes IN OUT, got in"),
        (["predict", "in", "out"], "missing checkpoint=..."),
        (["predict", "in", "out", "checkpoint=x", "clip=3"], "unknown key clip"),
    ],
)
def test_misuse_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["challenge", *arguments]) == ConfigError.status == 2
    assert said in capsys.readouterr().err


def test_the_containers_script_calls_the_command(checkpoint: Path, tmp_path: Path) -> None:
    """Its own line, with /workspace elsewhere: no container is built here."""
    write_case(tmp_path / "inputs", "CT_1", boxes=[box_of_middle(LIVER)], gts=labels(liver1=LIVER))
    script = (ROOT / "container/predict.sh").read_text().replace("/workspace", str(tmp_path))
    (tmp_path / "predict.sh").write_text(script.replace("model.safetensors", "model.ckpt"))
    (tmp_path / "model.ckpt").symlink_to(checkpoint)
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": search, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["sh", "predict.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert read_labels(tmp_path / "outputs/CT_1.npz", shape=SHAPE).dtype == np.uint8


def test_the_image_has_what_the_script_names() -> None:
    lines = (ROOT / "container/challenge.Dockerfile").read_text().splitlines()
    assert "WORKDIR /workspace" in lines and "COPY predict.sh model.safetensors ./" in lines
    assert 'CMD ["sh", "predict.sh"]' in lines and "ENTRYPOINT []" in lines
    for path in ("/workspace/inputs", "/workspace/outputs", "/workspace/model.safetensors"):
        assert path in (ROOT / "container/predict.sh").read_text()
