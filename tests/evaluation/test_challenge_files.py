"""The challenge's npz files: what numpy writes is read to the value, what could execute code is refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segvol_pl.errors import ChallengeError
from segvol_pl.evaluation import npz_objects
from segvol_pl.evaluation.challenge_files import case_files, read_case, read_labels, write_answer
from segvol_pl.evaluation.npz_objects import NpzReader, plain_objects
from segvol_pl.imaging.prompts import INSIDE, OUTSIDE

SHAPE = (12, 20, 16)
BOX = {
    **{"z_min": 2, "z_max": 9, "z_mid": 5},
    **{"z_mid_x_min": 3, "z_mid_y_min": 4, "z_mid_x_max": 12, "z_mid_y_max": 15},
}
IMAGE = np.random.default_rng(0).integers(0, 256, SHAPE).astype(np.uint8)


def case(folder: Path, **arrays: Any) -> Path:
    """A file as the challenge writes it: lists of dicts become pickled object arrays."""
    path = folder / "case.npz"
    np.savez_compressed(path, **{"imgs": IMAGE, "spacing": np.array([3.0, 1.0, 0.5]), **arrays})
    return path


def numpy_box() -> dict[str, np.int64]:
    return {name: np.int64(number) for name, number in BOX.items()}


# ---- what is read ----


def test_prompts_of_every_kind_are_read(tmp_path: Path) -> None:
    previous_DHW = np.zeros(SHAPE, np.uint8)
    previous_DHW[3:5] = 2
    clicks = [{"fg": [[1, 2, 3], [9, 18, 15]], "bg": [np.array([0, 0, 0])]}, {"fg": [], "bg": [(4, 4, np.int64(4))]}]
    texts = {"1": "liver", "2": " spleen ", "instance_label": 0}
    path = case(
        tmp_path,
        boxes=[BOX, numpy_box()],
        clicks=clicks,
        clicks_order=[["fg", "bg", "fg"], [None, None, "bg"]],
        prev_pred=previous_DHW,
        text_prompts=texts,
    )
    found = read_case(path)
    np.testing.assert_array_equal(found.image_DHW, IMAGE)
    assert found.spacing == (3.0, 1.0, 0.5) and found.classes == [1, 2] and not found.instances
    assert found.boxes == {1: (2, 4, 3, 9, 15, 12), 2: (2, 4, 3, 9, 15, 12)}
    assert found.texts == {1: "liver", 2: "spleen"}
    points_N3, labels_N = found.clicks[1]
    assert points_N3.tolist() == [[1, 2, 3], [0, 0, 0], [9, 18, 15]] and labels_N.tolist() == [INSIDE, OUTSIDE, INSIDE]
    assert found.clicks[2][0].tolist() == [[4, 4, 4]]
    mask_DHW = found.previous(2)
    assert mask_DHW is not None and mask_DHW.sum() == previous_DHW.astype(bool).sum() and found.previous(1) is None


def test_an_image_alone_has_no_classes(tmp_path: Path) -> None:
    path = tmp_path / "case.npz"
    np.savez(path, imgs=IMAGE.astype(np.float32))
    found = read_case(path)
    assert found.classes == [] and found.prompts() == {} and found.spacing == (1.0, 1.0, 1.0)
    assert found.image_DHW.dtype == np.float32


def test_the_challenges_own_boxes_and_clicks_are_read(shared: Path, tmp_path: Path) -> None:
    held = json.loads((shared / "reference/challenge/interactive.json").read_text())
    for number, facts in held.items():
        shape = np.load(shared / "reference/challenge/interactive.npz")[f"gts_{number}"].shape
        prompts = {"clicks": facts["clicks"], "clicks_order": np.array(facts["clicks_order"], dtype=object)}
        boxes = {} if facts["boxes"] is None else {"boxes": facts["boxes"]}
        found = read_case(case(tmp_path, imgs=np.ones(shape, np.uint8), **prompts, **boxes))
        classes = list(range(1, len(facts["classes"]) + 1))
        assert found.classes == classes and sorted(found.boxes) == (classes if boxes else [])
        for value, clicks in enumerate(facts["clicks"], 1):
            points_N3, labels_N = found.clicks[value]
            assert points_N3[labels_N == INSIDE].tolist() == clicks["fg"]
            assert points_N3[labels_N == OUTSIDE].tolist() == clicks["bg"]


def test_a_box_grows_to_hold_the_clicks_inside(tmp_path: Path) -> None:
    clicks = [{"fg": [[1, 19, 5]], "bg": [[0, 0, 15]]}, {"fg": [], "bg": [[5, 5, 5]]}, {"fg": [], "bg": [[5, 5, 5]]}]
    prompts = read_case(case(tmp_path, boxes=[BOX, BOX], clicks=clicks)).prompts()
    assert prompts[1].box == (1, 4, 3, 9, 19, 12) and prompts[1].labels_N is not None
    assert prompts[1].labels_N.tolist() == [INSIDE, OUTSIDE]
    # Clicks outside alone, and nothing to refine: the box speaks for the class, or nothing does.
    assert prompts[2].box == (2, 4, 3, 9, 15, 12) and prompts[2].points_N3 is None and 3 not in prompts


def test_clicks_outside_stay_where_a_mask_is_refined(tmp_path: Path) -> None:
    found = read_case(case(tmp_path, clicks=[{"fg": [], "bg": [[5, 5, 5]]}], prev_pred=np.ones(SHAPE, np.uint8)))
    assert found.prompts()[1].points_N3 is not None


def test_answers_come_back(tmp_path: Path) -> None:
    labels_DHW = np.random.default_rng(1).integers(0, 4, SHAPE)
    write_answer(labels_DHW, tmp_path / "case.npz")
    with np.load(tmp_path / "case.npz") as npz:
        assert list(npz) == ["segs"] and npz["segs"].dtype == np.uint8
    np.testing.assert_array_equal(read_labels(tmp_path / "case.npz", shape=SHAPE), labels_DHW)
    with pytest.raises(ValueError, match="beyond 0 to 255"):
        write_answer(labels_DHW + 255, tmp_path / "other.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["case.npz"]


VALUES: list[Any] = [
    None,
    {"a": [1, -70_000, 2**40, -(2**70)], "b": (True, False, None), 3: 0.25},
    ["text", "ä" * 300, b"bytes", (), {}, [], (1,), (1, 2), (1, 2, 3, 4)],
    [np.int8(-3), np.uint64(2**60), np.float32(0.5), np.bool_(True), np.str_("fg"), np.float16(2)],
]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_plain_values_are_read_as_pickle_reads_them(value: Any, protocol: int) -> None:
    """Except bytes and numpy's values of protocols that no numpy writes to .npy."""
    pickled = pickle.dumps(value, protocol)
    if protocol < 2 and value in VALUES[2:]:
        with pytest.raises(ValueError, match="its pickle names"):
            plain_objects(pickled)
    else:
        assert plain_objects(pickled) == value == pickle.loads(pickled)


@pytest.mark.parametrize("dtype", ["<i8", ">i4", "u1", "?", "<f4", "<U3"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_within_arrays_are_read(dtype: str, order: Any) -> None:
    inner = np.asarray(np.arange(6).reshape(2, 3), dtype=dtype, order=order)
    outer = np.empty((2, 2), dtype=object, order=order)
    outer[0, 0], outer[0, 1], outer[1, 0], outer[1, 1] = inner, "b", [inner[0]], np.zeros((0, 3), dtype)
    found = plain_objects(pickle.dumps(outer, 4))
    np.testing.assert_array_equal(found[0][0], inner)
    assert pickle.loads(pickle.dumps(outer, 4)).tolist()[0][1] == "b"
    assert found[0][0].dtype == inner.dtype and found[0][1] == "b" and found[1][1].shape == (0, 3)
    np.testing.assert_array_equal(found[1][0][0], inner[0])


# ---- what is refused: nothing of it is executed ----


class Calls:
    """Pickled as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def harms(folder: Path) -> dict[str, tuple[Any, str]]:
    """What a pickle may hold to do harm, and the name that the error must give."""
    target = str(folder / "harm")
    command = f"touch {target}"
    return {
        "os.system": (Calls(os.system, command), "system"),
        "a directory": (Calls(os.mkdir, target), "mkdir"),
        "eval": (Calls(eval, f"__import__('os').system({command!r})"), "builtins.eval"),
        "exec": (Calls(exec, "import os"), "builtins.exec"),
        "a process": (Calls(subprocess.Popen, ["touch", target]), "subprocess.Popen"),
        "getattr": (Calls(getattr, "", "join"), "builtins.getattr"),
        "numpy.load": (Calls(np.load, target), "numpy.load"),
        "numpy.fromfile": (Calls(np.fromfile, "/etc/passwd"), "fromfile"),
        "numpy.save": (Calls(np.save, target, 1), "numpy.save"),
        "a memory map": (Calls(np.memmap, target, "uint8", "w+"), "numpy.memmap"),
        "an array by ndarray": (Calls(np.ndarray, (1,), "O", b"\1" * 8), "calls a function"),
        "a dtype as value": (np.dtype("i8"), "a function or a dtype"),
        "a function": (os.getcwd, "getcwd"),
        "a class of ours": (Calls(NpzReader, Path(target)), "NpzReader"),
        "a path": (Path(target), "pathlib"),
        "a set": ({1}, "opcode"),
        "a complex number": (1j, "builtins.complex"),
        "numpy's complex": (np.complex128(1j), "dtype 'c16'"),
        "a date": (np.datetime64("2025-01-01"), "dtype 'M8'"),
        "a record": (np.zeros(1, [("a", "i4")]), "dtype"),
    }


def refused(key: str, harm: Any, folder: Path) -> str:
    """What is said of a file that holds `harm` among what belongs there."""
    nested = {**BOX, "fg": [[0, {"deep": (harm,)}, 0]]}
    path = case(
        folder, **{key: np.array({"1": "liver", "harm": nested} if key == "text_prompts" else [nested], object)}
    )
    with pytest.raises(ChallengeError, match=rf"case\.npz: {key}: ") as caught:
        read_case(path)
    assert "\n" not in str(caught.value) and not (folder / "harm").exists()
    return str(caught.value)


@pytest.mark.parametrize("name", harms(Path("x")))
def test_what_could_execute_code_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    harm, named = harms(tmp_path)[name]
    assert named in refused("boxes", harm, tmp_path)


@pytest.mark.parametrize("key", ["boxes", "clicks", "clicks_order", "text_prompts"])
def test_every_object_array_is_read_that_way(key: str, tmp_path: Path) -> None:
    assert "mkdir" in refused(key, Calls(os.mkdir, str(tmp_path / "harm")), tmp_path)


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R("
I8 = b"cnumpy\ndtype\nX\x02\x00\x00\x00i8\x85R"
HANDMADE = {
    "state of an object": b"cnumpy\nndarray\nq\x00}X\x08\x00\x00\x00__dict__Nsb.",
    "state of a name": b"cnumpy.core.multiarray\n_reconstruct\n}X\x0c\x00\x00\x00__defaults__)sb.",
    "a new object": b"cnumpy\nndarray\n)\x81.",
    "an instance": b"(cos\nsystem\nX\x04\x00\x00\x00trueo.",
    "an inst": b"(S'true'\nios\nsystem\n.",
    "a persistent object": b"P1\n.",
    "an extension": b"\x82\x01.",
    "a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.__new__\x93.",
    "a name of numbers": b"\x80\x04K\x01K\x02\x93.",
    "a name as an argument": b"cnumpy\ndtype\ncnumpy\nndarray\n\x85R.",
    "a module's file": b"cnumpy.core.multiarray\nfromfile\nX\x01\x00\x00\x00x\x85R.",
    "an array of pointers": ARRAY + b"K\x01K\x01\x85cnumpy\ndtype\nX\x02\x00\x00\x00O8\x85R\x89C\x08AAAAAAAAtb.",
    "an array larger than its content": ARRAY + b"K\x01J\xff\xff\xff\x7f\x85" + I8 + b"\x89C\x08AAAAAAAAtb.",
    "an array of sizes below 0": ARRAY + b"K\x01J\xff\xff\xff\xff\x85" + I8 + b"\x89C\x00tb.",
    "a scalar of another size": b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\x02\x00\x00\x00i8\x85RC\x01A\x86R.",
    "text of no characters": b"cnumpy.core.multiarray\nscalar\n"
    + I8.replace(b"i8", b"U1")
    + b"C\x04\xff\xff\xff\xff\x86R.",
    "an array without content": ARRAY[:-1] + b".",
    "nothing": b".",
    "an end": b"]",
    "no pickle": b"hello",
    "a key that is a list": b"}(](K\x01eK\x01u.",
    "too few": b"\x85.",
    "a mark in a tuple": b"(K\x01(\x86.",
    "an unknown memo": b"h\x07.",
    "a list in itself": b"]q\x00h\x00a.",
    "a dict of itself": b"}q\x00K\x01h\x00s.",
}


@pytest.mark.parametrize("name", HANDMADE)
def test_opcodes_written_by_hand_lead_nowhere(name: str) -> None:
    with pytest.raises(ValueError, match=r"its pickle|pickle exhausted|opcode|not enough data|can't decode"):
        plain_objects(HANDMADE[name])


def test_a_small_pickle_does_not_become_large() -> None:
    """Ten levels of a list that names the one before ten times."""
    held: list[Any] = [1]
    for _ in range(10):
        held = [held] * 10
    with pytest.raises(ValueError, match="more than 262144 values"):
        plain_objects(pickle.dumps(held))
    with pytest.raises(ValueError, match="16 levels"):
        plain_objects(b"]" * 5000 + b"a" * 4999 + b".")


# ---- what is damaged, too large or does not fit ----


def test_an_array_that_is_too_large_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = case(tmp_path, boxes=[BOX])
    monkeypatch.setattr(npz_objects, "MOST_PICKLED", 100)
    with pytest.raises(ChallengeError, match=r"case\.npz: boxes: holds \d+ bytes; at most 100 are read"):
        read_case(path)
    monkeypatch.setattr(npz_objects, "MOST_VOXELS", 100)
    with pytest.raises(ChallengeError, match=r"imgs: its header promises 12 x 20 x 16 elements; at most 100"):
        read_case(path)


def written(folder: Path, name: str, shape: tuple[int, ...], content: bytes) -> Path:
    """A file whose header states a shape, whatever its content."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(folder / "case.npz", "w") as archive:
        archive.writestr(name, header.getvalue() + content)
    return folder / "case.npz"


@pytest.mark.parametrize(
    ("shape", "content", "said"),
    [
        ((2**20, 2**20, 2**20), b"", "at most"),
        ((2, 2, 2), b"1234567", "promises 8 bytes, it holds 7"),
        ((2, 2, 2), b"123456789", "promises 8 bytes, it holds 9"),
        ((-2, -2, 2), b"12345678", "promises -2 x -2 x 2"),
        ((0, 2, 2), b"", r"is uint8 of shape \[0, 2, 2\]"),
        ((8,), b"12345678", r"of shape \[8\], not numbers of a volume"),
    ],
)
def test_a_header_that_promises_something_else_is_refused(
    shape: tuple[int, ...], content: bytes, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ChallengeError, match=rf"case\.npz: imgs: .*{said}"):
        read_case(written(tmp_path, "imgs.npy", shape, content))


def test_files_that_are_no_npz_are_named(tmp_path: Path) -> None:
    path = case(tmp_path)
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ChallengeError, match=r"case\.npz: cannot be read as \.npz"):
            read_case(path)
    path.write_bytes(whole[:200] + bytes(50) + whole[250:])
    with pytest.raises(ChallengeError, match=r"case\.npz: imgs: "):
        read_case(path)
    with pytest.raises(ChallengeError, match="gone"):
        read_case(tmp_path / "gone.npz")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("imgs.npy", b"no array")
    with pytest.raises(ChallengeError, match=r"case\.npz: imgs: "):
        read_case(path)


def far(**changes: int) -> list[dict[str, int]]:
    return [BOX, {**BOX, **changes}]


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"imgs": IMAGE.astype(np.int16) - 1000}, "imgs: holds values from -1000 to -745; images of the challenge"),
        ({"imgs": np.full(SHAPE, np.nan)}, "imgs: holds NaN"),
        ({"imgs": np.array([[["a"]]])}, "imgs: holds <U1, not numbers"),
        ({"imgs": np.array([[[{}]]], dtype=object)}, "imgs: holds object, not numbers"),
        ({"imgs": IMAGE[0]}, r"imgs: is uint8 of shape \[20, 16\], not numbers of a volume"),
        ({"spacing": np.array([1.0, 2.0])}, r"spacing: is \[1.0, 2.0\], not 3 lengths in mm"),
        ({"spacing": np.array([1.0, 2.0, 0.0])}, "spacing: .* not 3 lengths"),
        (
            {"prev_pred": np.zeros((3, 3, 3), np.uint8)},
            r"prev_pred: has the shape \[3, 3, 3\], the image \[12, 20, 16\]",
        ),
        ({"prev_pred": np.full(SHAPE, 300)}, "prev_pred: holds values from 300 to 300"),
        ({"prev_pred": np.full(SHAPE, 0.5)}, "prev_pred: .* whole numbers up to 255"),
        (
            {"boxes": far(z_max=12)},
            r"boxes: the box \[2, 4, 3, 12, 15, 12\] .* of class 2 .* outside the image of 12 x",
        ),
        ({"boxes": far(z_mid_x_min=-1)}, "boxes: the box .* of class 2 is inverted or reaches outside"),
        ({"boxes": far(z_mid_y_max=3)}, "boxes: the box .* is inverted or"),
        ({"boxes": [{"z_min": 1}]}, "boxes: the box of class 1 lacks z_mid_y_min, z_mid_x_min, z_max"),
        ({"boxes": far(z_min="a")}, "boxes: a is no whole number"),  # type: ignore[arg-type]
        ({"boxes": far(z_min=1.5)}, "boxes: 1.5 is no whole number"),  # type: ignore[arg-type]
        ({"boxes": np.array([[1, 2]])}, "boxes: the entry of class 1 is no dict"),
        ({"boxes": np.array("box")}, "boxes: is no list of at most 255 classes"),
        ({"boxes": [BOX] * 256}, "boxes: is no list of at most 255 classes"),
        (
            {"clicks": [{"fg": [[1, 2, 16]], "bg": []}]},
            r"clicks: the click \[1, 2, 16\] of class 1 lies outside the image",
        ),
        ({"clicks": [{"fg": [], "bg": [[-1, 2, 3]]}]}, r"clicks: the click \[-1, 2, 3\] of class 1 lies outside"),
        ({"clicks": [{"fg": [[1, 2]], "bg": []}]}, "clicks: a click of class 1 has no 3 numbers"),
        ({"clicks": [{"fg": [[1, 2, float("nan")]]}]}, "clicks: nan is no whole number"),
        ({"clicks": [{"fg": 3}]}, "clicks: the clicks of class 1 are no list"),
        ({"clicks": [{"fg": [[1, 2, 3]] * 10_001}]}, "clicks of class 1 are no list of at most 10000"),
        ({"text_prompts": ["liver"]}, "text_prompts: is no dict"),
        ({"text_prompts": {"0": "liver"}}, "text_prompts: the entry '0' is no class from 1 to 255"),
        ({"text_prompts": {"1": 3}}, "text_prompts: the entry '1' is no class"),
        ({"text_prompts": {"9" * 5000: "liver"}}, "is no class"),
    ],
)
def test_what_does_not_fit_is_named_with_file_and_array(arrays: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ChallengeError, match=rf"case\.npz: .*{said}") as caught:
        read_case(case(tmp_path, **arrays))
    assert "\n" not in str(caught.value)


def test_a_file_without_an_image_names_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "case.npz"
    np.savez(path, gts=IMAGE)
    with pytest.raises(ChallengeError, match=r"case\.npz: has no array imgs; it has gts"):
        read_case(path)
    np.testing.assert_array_equal(read_labels(path, "gts"), IMAGE)


def test_folders_without_cases_are_named(tmp_path: Path) -> None:
    with pytest.raises(ChallengeError, match="holds no case"):
        case_files(tmp_path)
    with pytest.raises(ChallengeError, match="is no folder"):
        case_files(tmp_path / "gone")
