"""The server, driven by nnInteractive's own client: what it draws, what is refused, and who may use it."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import httpx
import numpy as np
import pytest
from factories import Oracle, predictor_of, save_untrained
from nnInteractive.inference.remote import ServerAtCapacityError, SessionExpiredError
from nnInteractive.inference.remote import nnInteractiveRemoteInferenceSession as Client
from nnInteractive.inference.remote.serialization import pack_array as client_packs
from nnInteractive.inference.remote.serialization import unpack_array as client_unpacks

from segvol_pl.__main__ import main
from segvol_pl.config import Precision, ServeConfig, ZoomConfig
from segvol_pl.errors import ConfigError, PromptError, RequestError, ServeError
from segvol_pl.imaging.geometry import NativeGrid, Volume
from segvol_pl.imaging.prompts import Prompt
from segvol_pl.inference.leases import Leases
from segvol_pl.inference.predictor import Predictor, Session
from segvol_pl.inference.served_arrays import pack_array, unpack_array
from segvol_pl.inference.served_session import MOST_POINTS, ServedSession, spread
from segvol_pl.inference.server import KEY_VARIABLE, Service, api_key, start

ROOT = Path(__file__).parents[2]
SHAPE = (20, 40, 30)
"""Of an image as a client sends it: slices from feet to head, rows from front to back, columns from right to left."""
ONE, OTHER = (slice(6, 12), slice(12, 22), slice(8, 14)), (slice(6, 12), slice(12, 22), slice(18, 24))
"""Two bright structures."""
ONE_BOX, OTHER_BOX = [[5, 13], [11, 23], [7, 15]], [[5, 13], [11, 23], [17, 25]]


def image() -> np.ndarray:
    """A body in the air, with two bright structures; (1,z,y,x)."""
    hu = np.full(SHAPE, -1000, np.float32)
    hu[2:18, 5:35, 4:26] = np.random.default_rng(0).integers(-20, 20, (16, 30, 22))
    hu[ONE] = hu[OTHER] = 200
    return hu[None]


def bright(*structures: tuple[slice, ...]) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    for structure in structures:
        mask[structure] = True
    return mask


@dataclass
class Running:
    address: str
    service: Service


@contextmanager
def running(predictor: Predictor, key: str | None = None, **limits: Any) -> Iterator[Running]:
    """A server in a thread of this process, at a port of this machine."""
    service = Service(predictor, ServeConfig("none", port=0, **limits), key)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    runner, address = asyncio.run_coroutine_threadsafe(start(service), loop).result(30)
    try:
        yield Running(address, service)
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()


@pytest.fixture(scope="module")
def serving() -> Iterator[Running]:
    """A server whose model finds what is bright."""
    with running(predictor_of(Oracle((8, 16, 16))), max_sessions=8, max_voxels=60_000, max_body_mb=0.5) as found:
        yield found


@pytest.fixture
def client(serving: Running) -> Iterator[Client]:
    with opened(serving) as found:
        yield found


@contextmanager
def opened(at: Running, sent: np.ndarray | None = None, **properties: Any) -> Iterator[Client]:
    """A client that has sent its image."""
    with Client(at.address) as client:
        sent = image() if sent is None else sent
        client.set_image(sent, properties)
        client.set_target_buffer(np.zeros(sent.shape[1:], np.uint8))
        yield client


def drawn(client: Client) -> np.ndarray:
    return client.target_buffer != 0


def prompted_by_text(client: Client, text: str, **more: Any) -> None:
    """What a client of ours does: the protocol's own has no method for it."""
    client._apply_prediction_response(client._post_json("/add_text_interaction", {"text": text, **more}))


# ---- what is drawn ----


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """An untrained SegVol. Its masks are large, and change with every prompt."""
    path = save_untrained(tmp_path_factory.mktemp("serve") / "tiny.ckpt", ["liver", "spleen"])
    return Predictor.from_checkpoint(path, "cpu", ZoomConfig(threshold=0.49), Precision.fp32)


Turn = Callable[[np.ndarray], np.ndarray]
AXES: dict[str, tuple[Turn, Turn, Callable[[int, int, int], tuple[int, int, int]]]] = {
    # A client's array to (d, h, w) and back, and a voxel of it.
    "SPL": (lambda a: a[:, ::-1, ::-1], lambda a: a[:, ::-1, ::-1], lambda x, y, z: (x, 39 - y, 29 - z)),
    "RSA": (lambda a: a.transpose(1, 2, 0), lambda a: a.transpose(2, 0, 1), lambda x, y, z: (y, z, x)),
}


@pytest.mark.parametrize("axes", AXES)
def test_a_client_draws_what_the_library_segments(axes: str, tiny: Predictor) -> None:
    """Point by point, each refining the mask of those before, in the client's axes."""
    canonical, native, voxel = AXES[axes]
    sent = image()
    hu_DHW = np.ascontiguousarray(canonical(sent[0])).astype(np.int16)
    session = tiny.open(Volume(hu_DHW, np.eye(4), NativeGrid.of(hu_DHW.shape, np.eye(4)), Path("ct")))
    inside, outside = voxel(8, 15, 10), voxel(8, 15, 20)
    corners = np.sort([voxel(5, 11, 7), voxel(12, 22, 14)], axis=0).reshape(-1)
    box = tuple(corners.tolist())
    both = {"points_N3": np.array([inside, outside]), "labels_N": np.array([1, 0])}
    prompts = [
        Prompt(points_N3=np.array([inside]), labels_N=np.array([1])),
        Prompt(**both),
        Prompt(**both, box=box),
        Prompt(**both, box=box, text="liver"),
    ]
    wanted, previous = [], None
    for prompt in prompts:
        mask = session.segment(prompt, None if previous is None else previous)
        previous = mask.array_DHW
        wanted.append(native(previous))
    assert wanted[0].any() and not any(np.array_equal(*pair) for pair in itertools.pairwise(wanted))
    with running(tiny) as at, opened(at, sent, axes=axes) as client:
        assert client.original_image_shape == (1, *SHAPE)
        client.add_point_interaction([8, 15, 10], include_interaction=True)
        assert np.array_equal(drawn(client), wanted[0])
        client.add_point_interaction([8, 15, 20], include_interaction=False)
        assert np.array_equal(drawn(client), wanted[1])
        client.add_bbox_interaction(ONE_BOX, include_interaction=True)
        assert np.array_equal(drawn(client), wanted[2])
        prompted_by_text(client, "liver")
        assert np.array_equal(drawn(client), wanted[3])


def test_only_what_changed_is_sent(client: Client) -> None:
    assert client.add_bbox_interaction(ONE_BOX, include_interaction=True) == [[6, 12], [12, 22], [8, 14]]
    assert np.array_equal(drawn(client), bright(ONE))
    assert client.add_point_interaction([8, 15, 10], include_interaction=True) is None  # nothing new is found
    assert np.array_equal(drawn(client), bright(ONE))


def test_prompts_wait_until_a_prediction_is_requested(client: Client) -> None:
    assert client._predict() is None
    client.add_bbox_interaction(ONE_BOX, include_interaction=True, run_prediction=False)
    client.add_point_interaction([8, 15, 10], include_interaction=True, run_prediction=False)
    assert not drawn(client).any()
    assert client._predict() == [[6, 12], [12, 22], [8, 14]]
    assert np.array_equal(drawn(client), bright(ONE))
    assert client._predict() is None


def test_undo_goes_back_prompt_by_prompt_and_reset_to_the_beginning(client: Client) -> None:
    client.add_point_interaction([8, 15, 10], include_interaction=True)
    assert np.array_equal(drawn(client), bright(ONE, OTHER))
    client.reset_interactions()
    assert not drawn(client).any() and not client.undo()
    client.add_bbox_interaction(ONE_BOX, include_interaction=True)
    client.add_initial_seg_interaction(bright(OTHER).astype(np.uint8))
    assert np.array_equal(drawn(client), bright(OTHER))
    assert client.undo() and np.array_equal(drawn(client), bright(ONE))
    assert client.undo() and not drawn(client).any()
    assert not client.undo()
    client.add_bbox_interaction(OTHER_BOX, include_interaction=True)
    assert np.array_equal(drawn(client), bright(OTHER))


def test_clicks_change_what_is_around_them_and_a_new_box_or_text_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a model that takes masks. What was added without segmenting counts at the next time."""
    session = ServedSession(predictor_of(Oracle((8, 16, 16))), "SPL")
    session.set_image(image(), {})
    asked: list[bool] = []
    segment = Session.segment

    def recorded(self: Session, prompt: Prompt, previous: Any = None, everywhere: bool = False) -> Any:
        asked.append(everywhere)
        return segment(self, prompt, previous, everywhere)

    monkeypatch.setattr(Session, "segment", recorded)
    session.add_point([8, 15, 10], True, True)
    session.add_box(ONE_BOX, True, True)
    session.add_point([8, 16, 11], True, True)
    session.add_box(OTHER_BOX, True, False)
    session.undo()
    session.add_point([8, 17, 11], True, True)
    session.add_box(OTHER_BOX, True, False)
    session.add_point([8, 15, 20], True, False)
    session.predict()
    session.add_point([8, 16, 20], True, True)
    assert asked == [False, True, False, False, True, False]


def test_an_initial_segmentation_is_refined(client: Client) -> None:
    coarse = np.zeros(SHAPE, np.uint8)
    coarse[7:11, 13:20, 7:13] = 3
    assert client.add_initial_seg_interaction(coarse) is None
    assert np.array_equal(client.target_buffer, coarse)
    client.add_initial_seg_interaction(coarse, run_prediction=True)
    refined = drawn(client)
    assert (refined & bright(ONE)).sum() > (refined & ~bright(ONE)).sum()
    assert not np.array_equal(refined, coarse != 0)
    client.add_bbox_interaction(ONE_BOX, include_interaction=True)
    assert np.array_equal(drawn(client), bright(ONE))


def test_a_new_buffer_gets_the_complete_mask(client: Client) -> None:
    client.add_bbox_interaction(ONE_BOX, include_interaction=True)
    client.set_target_buffer(np.zeros(SHAPE, np.int32))
    client.add_point_interaction([8, 15, 10], include_interaction=True)
    assert np.array_equal(drawn(client), bright(ONE))


def test_a_new_image_ends_the_prompts_of_the_one_before(client: Client) -> None:
    client.add_bbox_interaction(ONE_BOX, include_interaction=True)
    client.set_image(image()[:, :, :, 3:])
    client.set_target_buffer(np.zeros((20, 40, 27), np.uint8))
    assert not client.undo()
    client.add_bbox_interaction([[5, 13], [11, 23], [4, 12]], include_interaction=True)
    assert np.array_equal(drawn(client), bright(ONE)[:, :, 3:])


def test_a_lasso_is_its_extent_and_a_scribble_its_middle(client: Client) -> None:
    lasso = np.zeros(SHAPE, np.uint8)
    lasso[9, 12:22, 8:14] = 1
    client.add_lasso_interaction(lasso, include_interaction=True)
    assert np.array_equal(drawn(client), bright(ONE))
    client.reset_interactions()
    client.add_lasso_interaction(lasso[9:10], True, interaction_bbox=[[9, 10], [0, 40], [0, 30]])
    assert np.array_equal(drawn(client), bright(ONE))
    client.reset_interactions()
    scribble = np.zeros(SHAPE, np.uint8)
    scribble[8:10, 13:21, 10:12] = 1
    client.add_scribble_interaction(scribble, include_interaction=True)
    assert np.array_equal(drawn(client), bright(ONE, OTHER))


def test_points_are_spread_along_a_stroke() -> None:
    stroke = np.argwhere(np.ones((3, 40, 3), bool)) + np.array([7, 0, 5])
    chosen = spread(stroke, 5)
    assert chosen.tolist() == [[8, place, 6] for place in chosen[:, 1]]
    assert np.abs(np.sort(chosen[:, 1]) - [3.5, 11.5, 19.5, 27.5, 35.5]).max() <= 0.5
    assert spread(np.array([[1, 2, 3]]), 5).tolist() == [[1, 2, 3]]


def test_a_flat_box_is_as_deep_as_wide_until_another_is_drawn_across() -> None:
    session = ServedSession(predictor_of(Oracle((8, 16, 16))), "SAR")
    session.set_image(image(), {"spacing": [2.0, 1.0, 1.0]})
    session.add_box([[9, 10], [12, 22], [8, 16]], inside=True, run=False)  # 10 mm by 8 mm
    assert session.prompt.box == (7, 12, 8, 11, 21, 15)
    session.add_box([[6, 12], [15, 16], [8, 14]], inside=True, run=False)
    assert session.prompt.box == (6, 12, 8, 11, 21, 13)
    session.add_box([[3, 4], [12, 22], [8, 14]], inside=True, run=False)
    assert session.prompt.box == (3, 12, 8, 11, 21, 13)
    session.add_box([[5, 13], [11, 23], [7, 15]], inside=True, run=False)
    assert session.prompt.box == (5, 11, 7, 12, 22, 14)


def test_what_the_client_learns_of_the_model(tiny: Predictor, client: Client) -> None:
    assert all(client.supported_interactions[name] for name in ("points", "bbox2d", "bbox3d", "scribble", "lasso"))
    assert client.supports_undo and client.supports_initial_label and client.do_autozoom
    client.set_do_autozoom(False)
    assert client.lease_status()["remaining_seconds"] > 500 and client.heartbeat() > 500
    with running(tiny) as at, Client(at.address) as other:
        assert other._get_json("/capabilities")["categories"] == ["liver", "spleen"]


# ---- several clients ----


def test_two_clients_at_once_have_an_image_each(serving: Running) -> None:
    shifted = np.roll(image(), 2, axis=2)
    together = threading.Barrier(2)

    def work(sent: np.ndarray, move: int) -> list[np.ndarray]:
        found = []
        with opened(serving, sent) as client:
            for box in (ONE_BOX, OTHER_BOX) * 3:
                together.wait(30)
                client.reset_interactions()
                moved = [box[0], [box[1][0] + move, box[1][1] + move], box[2]]
                client.add_bbox_interaction(moved, include_interaction=True)
                found.append(drawn(client).copy())
        return found

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(work, [image(), shifted], [0, 2])
    for number, (mask, other) in enumerate(zip(first, second, strict=True)):
        wanted = bright((ONE, OTHER)[number % 2])
        assert np.array_equal(mask, wanted) and np.array_equal(other, np.roll(wanted, 2, axis=1))


def test_there_are_no_more_sessions_than_allowed_and_one_that_ends_is_free() -> None:
    with running(predictor_of(Oracle((8, 16, 16))), max_sessions=1) as at:
        first = Client(at.address)
        with pytest.raises(ServerAtCapacityError, match="all 1 sessions of this server are in use"):
            Client(at.address)
        first.close()
        with opened(at) as second:
            second.add_bbox_interaction(ONE_BOX, include_interaction=True)
            assert np.array_equal(drawn(second), bright(ONE))


def test_a_session_whose_client_is_silent_is_given_back() -> None:
    with running(predictor_of(Oracle((8, 16, 16))), max_sessions=1, liveness_timeout=0.3) as at:
        lost = Client(at.address)
        deadline = time.monotonic() + 20
        while len(at.service.leases) and time.monotonic() < deadline:
            time.sleep(0.05)
        with Client(at.address), lost, pytest.raises(SessionExpiredError, match=r"was given back.*connect again"):
            lost.add_point_interaction([8, 15, 10], include_interaction=True)


def test_a_lease_ends_without_signs_of_life_or_without_use() -> None:
    now = [0.0]
    leases = Leases(object, most=2, idle=100, liveness=10, clock=lambda: now[0])
    silent, idle = leases.claim(), leases.claim()
    assert silent.session is not idle.session and silent.token != idle.token
    with pytest.raises(RequestError, match="all 2 sessions") as full:
        leases.claim()
    assert full.value.code == 503
    for now[0] in range(5, 105, 5):
        assert leases.get(idle.token) is idle
    assert len(leases) == 1 and leases.remaining(idle) == 0
    now[0] = 100.5
    for lease in (silent, idle):
        with pytest.raises(RequestError, match="connect again") as gone:
            leases.get(lease.token)
        assert gone.value.code == 410
    busy = leases.claim()
    asyncio.run(busy.turn.acquire())
    now[0] = 1000
    assert leases.get(busy.token) is busy  # a long prediction


# ---- who may use it ----


def test_a_key_is_required_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with running(predictor_of(Oracle((8, 16, 16))), key="open-sesame") as at:
        for wrong in (None, "open", "open-sesame2", "ö"):
            sent = {"Authorization": f"Bearer {wrong}".encode()} if wrong else {}
            answer = httpx.post(f"{at.address}/claim", headers=sent)
            assert answer.status_code == 401 and "wrong or no key" in answer.json()["detail"]
        with pytest.raises(httpx.HTTPStatusError, match="401 wrong or no key: give the client api_key=KEY"):
            Client(at.address, api_key="open")
        assert len(at.service.leases) == 0
        assert httpx.get(f"{at.address}/healthz").json() == {"ok": True}
        with Client(at.address, api_key="open-sesame") as client:
            assert client.ping()


def test_elsewhere_than_on_the_loopback_a_key_is_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert api_key(ServeConfig("none")) is None
    assert main(["serve", "checkpoint=none.ckpt", "host=0.0.0.0"]) == 1
    with pytest.raises(ServeError, match=r"other machines may reach 0\.0\.0\.0: give key_file=FILE"):
        api_key(ServeConfig("none", host="0.0.0.0"))
    file = tmp_path / "key"
    file.write_text("secret\n")
    file.chmod(0o644)
    with pytest.raises(ServeError, match=f"others can read {file}: chmod 600"):
        api_key(ServeConfig("none", key_file=str(file)))
    file.chmod(0o600)
    assert api_key(ServeConfig("none", host="0.0.0.0", key_file=str(file))) == "secret"
    for wrong, reason in (("", "is empty"), ("two words", "one word")):
        file.write_text(wrong)
        with pytest.raises(ServeError, match=reason):
            api_key(ServeConfig("none", key_file=str(file)))
    with pytest.raises(ServeError, match="cannot be read"):
        api_key(ServeConfig("none", key_file=str(tmp_path / "none")))
    monkeypatch.setenv(KEY_VARIABLE, "of-the-environment")
    assert api_key(ServeConfig("none", host="0.0.0.0")) == "of-the-environment"
    with pytest.raises(ConfigError, match="axes: SPP is not one letter each"):
        ServeConfig("none", axes="SPP")


@pytest.mark.parametrize("header", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Host": "[:"}])
def test_web_pages_are_refused(header: dict[str, str], serving: Running) -> None:
    before = len(serving.service.leases)
    assert httpx.post(f"{serving.address}/claim", headers=header).status_code in (400, 403)
    assert len(serving.service.leases) == before


def test_a_taken_port_is_named(serving: Running) -> None:
    port = int(serving.address.rpartition(":")[2])
    service = Service(serving.service.predictor, ServeConfig("none", port=port), None)
    with pytest.raises(ServeError, match=rf"cannot listen at 127\.0\.0\.1, {port}: "):
        asyncio.run(start(service))


# ---- what is refused ----


def scribbled(shape: tuple[int, ...]) -> np.ndarray:
    return np.ones(shape, np.uint8)


REFUSED: dict[str, tuple[Callable[[Client], object], str]] = {
    "a click outside": (lambda c: c.add_point_interaction([8, 40, 10], True), r"point \[8, 40, 10\] lies outside"),
    "a click before": (lambda c: c.add_point_interaction([8, -1, 10], True), "lies outside the image of"),
    "a click of two": (lambda c: c.add_point_interaction([8, 15], True), "coordinates must be three numbers"),
    "a click nowhere": (lambda c: c.add_point_interaction([8, 15, float("nan")], True), "must be three numbers"),
    "a click on text": (lambda c: c.add_point_interaction(["8", 15, 10], True), "must be three numbers"),
    "a click in the air": (lambda c: c.add_point_interaction([0, 0, 0], True), "in the air around the body"),
    "nothing but outside": (lambda c: c.add_point_interaction([8, 15, 10], False), "begin with a positive one"),
    "a box outside": (lambda c: c.add_bbox_interaction([[5, 21], [11, 23], [7, 15]], True), "outside the image"),
    "an empty box": (lambda c: c.add_bbox_interaction([[5, 5], [11, 23], [7, 15]], True), "is empty"),
    "a box of two": (lambda c: c.add_bbox_interaction([[5, 6], [11, 23]], True), "must be three pairs"),
    "a box in the air": (lambda c: c.add_bbox_interaction([[0, 1], [0, 2], [0, 2]], True), "lies in the air"),
    "a box to exclude": (lambda c: c.add_bbox_interaction(ONE_BOX, False), "no box that excludes: use negative"),
    "a lasso to exclude": (lambda c: c.add_lasso_interaction(scribbled(SHAPE), False), "no lasso that excludes"),
    "an empty scribble": (lambda c: c.add_scribble_interaction(np.zeros(SHAPE, np.uint8), True), "nothing is drawn"),
    "a scribble elsewhere": (lambda c: c.add_scribble_interaction(scribbled((5, 5, 5)), True), r"the image has \[20"),
    "a scribble beside": (
        lambda c: c.add_scribble_interaction(scribbled((2, 2, 2)), True, interaction_bbox=[[0, 2], [0, 2], [0, 3]]),
        r"interaction_bbox has \[2, 2, 3\]",
    ),
    "a flat image": (lambda c: c.set_image(image()[:, :1]), "2-D image"),
    "two channels": (lambda c: c.set_image(np.concatenate([image()] * 2)), "2 channels: a CT has one"),
    "air alone": (lambda c: c.set_image(np.full((1, *SHAPE), -1000, np.int16)), "constant"),
    "no numbers": (lambda c: c.set_image(np.full((1, *SHAPE), np.nan, np.float32)), "NaN or infinite"),
    "strange axes": (lambda c: c.set_image(image(), {"axes": "XYZ"}), "axes must be one letter each"),
    "a strange spacing": (lambda c: c.set_image(image(), {"spacing": [1, 2]}), "spacing must be three numbers"),
    "a spacing in metres": (lambda c: c.set_image(image(), {"spacing": [1e-3] * 3}), "another unit"),
    "too large an image": (lambda c: c.set_image(np.zeros((1, 60, 40, 30), np.int16)), "takes 60000 voxels"),
    "a buffer elsewhere": (lambda c: c._post_json("/set_target_buffer", {"shape": [1, 2, 3]}), "mask has"),
    "no shape": (lambda c: c._post_json("/set_target_buffer", {}), "shape: missing, or not a list"),
    "no text": (lambda c: prompted_by_text(c, " "), "give the name of a category"),
    "no flag": (lambda c: c._post_json("/add_point_interaction", {"coordinates": [8, 15, 10]}), "include_interaction"),
    "no such path": (lambda c: c._post_json("/add_magic_interaction", {}), "404 POST /add_magic_interaction"),
    "another mask": (
        lambda c: c._post_binary("/add_initial_seg_interaction", {}, client_packs(scribbled((5, 5, 5)))),
        r"initial segmentation: the mask has \[5, 5, 5\] voxels, the image has \[20, 40, 30\]",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refusal_is_one_line_that_the_client_shows_and_the_session_lives(what: str, client: Client) -> None:
    call, reason = REFUSED[what]
    with pytest.raises(httpx.HTTPStatusError, match=reason) as refused:
        call(client)
    detail = refused.value.response.json()["detail"]
    assert "\n" not in detail and re.search(reason.removeprefix("404 "), detail)
    client.add_bbox_interaction(ONE_BOX, include_interaction=True)
    assert np.array_equal(drawn(client), bright(ONE))


def test_an_unknown_category_is_refused_with_the_nearest_names(tiny: Predictor) -> None:
    with running(tiny) as at, opened(at) as client:
        with pytest.raises(httpx.HTTPStatusError, match=r"livver.*liver"):
            prompted_by_text(client, "livver")
        prompted_by_text(client, "liver", run_prediction=False)
        assert client._predict() is not None


def test_prompts_before_an_image_are_refused(serving: Running) -> None:
    with Client(serving.address) as client:
        for call in (
            lambda: client.add_point_interaction([1, 1, 1], include_interaction=True),
            lambda: client.set_target_buffer(np.zeros(SHAPE, np.uint8)),
            client.undo,
        ):
            with pytest.raises(httpx.HTTPStatusError, match="there is no image yet: send one by set_image"):
                call()


def test_a_structure_has_so_many_points_at_most() -> None:
    session = ServedSession(predictor_of(Oracle((8, 16, 16))), "SAR")
    session.set_image(image(), {})
    for _ in range(MOST_POINTS):
        session.add_point([8, 15, 10], inside=True, run=False)
    with pytest.raises(RequestError, match=f"{MOST_POINTS} at most: reset"):
        session.add_point([8, 15, 10], inside=True, run=False)


def test_an_error_of_the_model_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    session = ServedSession(predictor_of(Oracle((8, 16, 16))), "SAR")
    session.set_image(image(), {})
    session.add_box(ONE_BOX, inside=True, run=True)
    before = session.prompt

    def fails(*_: object) -> None:
        raise PromptError("the model cannot")

    monkeypatch.setattr("segvol_pl.inference.predictor.Session.segment", fails)
    with pytest.raises(PromptError):
        session.add_point([8, 15, 20], inside=True, run=True)
    assert session.prompt is before and before.points == []


MESSAGE = client_packs(image(), filters=[blosc2.Filter.NOFILTER])
NAMED = MESSAGE.index(b"float32")
SHAPED = NAMED + len("float32")
COUNTED = SHAPED + 4 * 8
CHUNKED = COUNTED + 4 + 16


def changed(place: int, content: bytes) -> bytes:
    return MESSAGE[:place] + content + MESSAGE[place + len(content) :]


MALFORMED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "it is cut off"),
    "text": (b"hello, this is not an array", "it begins with"),
    "another version": (changed(4, b"\x02"), "it begins with"),
    "another codec": (changed(5, b"\x09"), "it begins with"),
    "objects": (MESSAGE.replace(b"float32", b"object0"), "an array of 'object0'"),
    "a strange name": (MESSAGE.replace(b"float32", b"\xff" * 7), "send whole numbers"),
    "three axes": (client_packs(image()[0]), "an array of 3 axes, not 4"),
    "less than nothing": (changed(SHAPED, struct.pack("<q", -1)), "holds nothing"),
    "more than there is": (changed(SHAPED, struct.pack("<q", 2)), "it holds 96000 bytes of 192000"),
    "more than there may be": (changed(SHAPED, struct.pack("<q", 1 << 40)), "this server takes 60000 voxels"),
    "cut off": (MESSAGE[:-50], "impossible sizes"),
    "cut off early": (MESSAGE[: COUNTED + 2], "it is cut off"),
    "many chunks": (changed(COUNTED, struct.pack("<I", 9)), "it is cut off"),
    "a larger chunk": (changed(CHUNKED - 16, struct.pack("<Q", 1 << 40)), "impossible sizes"),
    "a chunk of another size": (changed(CHUNKED + 4, struct.pack("<I", 95_996)), "impossible sizes"),
    "a codec of a plug-in": (changed(CHUNKED + 2, bytes([0b11010101])), "unknown compression"),
    "a filter of a plug-in": (changed(CHUNKED + 16, b"\xa0"), "unknown compression"),
    "a lazy chunk": (changed(CHUNKED + 31, b"\x08"), "unknown compression"),
    "damaged": (changed(CHUNKED + 40, b"\xff" * 60), "cannot be decoded"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_bodies_are_refused_and_the_session_lives(what: str, client: Client) -> None:
    body, reason = MALFORMED[what]
    with pytest.raises(httpx.HTTPStatusError, match=reason):
        client._post_binary("/set_image", {}, body)
    client.add_bbox_interaction(ONE_BOX, include_interaction=True)
    assert np.array_equal(drawn(client), bright(ONE))


def test_oversized_bodies_and_wrong_json_are_refused(client: Client, serving: Running) -> None:
    headers = dict(client._http.headers)

    def answer(path: str, **sent: Any) -> tuple[int, str]:
        found = httpx.post(serving.address + path, timeout=30, **{"headers": headers, **sent})
        return found.status_code, found.json()["detail"]

    assert answer("/set_image", content=bytes(600_000)) == (
        413,
        "body: larger than 0.5 MB, the most that this server takes",
    )
    parts = (bytes(100_000) for _ in range(20))  # whose length is not announced
    assert answer("/set_image", content=parts)[0] == 413
    status, detail = answer("/add_point_interaction", content=b"[" * 70_000)
    assert status == 413 and "the most that JSON may have" in detail
    for body in (b"", b"hello", b"[1, 2]", b"[" * 50_000, b"\xff\xfe"):
        status, detail = answer("/add_point_interaction", content=body)
        assert status == 400 and detail.startswith("body: not ")
    for meta in ("[]", "{", '{"image_properties": 3}'):
        assert answer("/set_image", content=MESSAGE, headers={**headers, "X-Meta": meta})[0] == 400
    assert answer("/set_image", content=MESSAGE[4:], headers={**headers, "Content-Encoding": "gzip"})[0] == 400
    long = {"image_properties": {"comment": "x" * 70_000}}
    with pytest.raises(httpx.HTTPStatusError, match="400"):
        client._post_binary("/set_image", long, MESSAGE)
    client._post_binary("/set_image", {"image_properties": {"comment": "x" * 30_000}}, MESSAGE)
    client.add_bbox_interaction(ONE_BOX, include_interaction=True)
    assert np.array_equal(drawn(client), bright(ONE))


def test_a_lease_is_required(serving: Running) -> None:
    for headers in ({}, {"X-Lease-Token": "made-up"}):
        answer = httpx.post(f"{serving.address}/set_image", content=MESSAGE, headers=headers)
        assert answer.status_code == 410 and "this session is unknown" in answer.json()["detail"]
        assert httpx.get(f"{serving.address}/lease_status", headers=headers).status_code == 410
    assert httpx.post(f"{serving.address}/release").json() == {"released": True}


# ---- arrays ----


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "float32", "float64"])
def test_arrays_are_those_of_the_client(dtype: str) -> None:
    array = np.random.default_rng(1).integers(0, 2, (3, 5, 7)).astype(dtype)
    for sent in (array, np.zeros_like(array)):
        assert np.array_equal(client_unpacks(pack_array(sent)), sent)
        found = unpack_array(client_packs(sent, codec=blosc2.Codec.LZ4), 3, 1000)
        assert found.dtype == sent.dtype and np.array_equal(found, sent)


def test_no_damage_gives_another_error() -> None:
    rng, array = np.random.default_rng(2), np.random.default_rng(3).integers(-50, 50, (1, 9, 10, 11)).astype(np.int16)
    message, refused = client_packs(array), 0
    for _ in range(300):
        damaged = bytearray(message)
        for place in rng.integers(0, min(len(message), 120), rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        try:
            unpack_array(damaged, 4, 10_000)
        except RequestError:
            refused += 1
    assert refused > 200


# ---- processes ----

KILLED = """
import sys, time
from nnInteractive.inference.remote import nnInteractiveRemoteInferenceSession as Client
client = Client(sys.argv[1])
print("claimed", flush=True)
time.sleep(60)
"""


def test_the_session_of_a_killed_client_is_given_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "segvol_pl")
    with running(predictor_of(Oracle((8, 16, 16))), max_sessions=1, liveness_timeout=1.0) as at:
        killed = subprocess.Popen([sys.executable, "-c", KILLED, at.address], stdout=subprocess.PIPE, text=True)
        assert killed.stdout is not None and killed.stdout.readline() == "claimed\n"
        killed.kill()
        killed.communicate(timeout=30)
        client = claimed_at_last(at.address)
        assert client.heartbeat() > 500
        client.close()
    assert "session 1 is given back, as nothing came from its client" in caplog.text


def claimed_at_last(address: str) -> Client:
    deadline = time.monotonic() + 30
    while True:
        try:
            return Client(address)
        except ServerAtCapacityError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_client_that_dies_while_it_sends_leaves_no_trace(serving: Running, caplog: pytest.LogCaptureFixture) -> None:
    with Client(serving.address) as client:
        host, _, port = serving.address.removeprefix("http://").partition(":")
        for length, body in (("Content-Length: 400000", bytes(1000)), ("Transfer-Encoding: chunked", b"no size\r\n")):
            with socket.create_connection((host, int(port))) as dying:
                lines = ["POST /set_image HTTP/1.1", f"Host: {host}", f"X-Lease-Token: {client._lease_token}", length]
                dying.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        client.set_image(image())
        client.set_target_buffer(np.zeros(SHAPE, np.uint8))
        client.add_bbox_interaction(ONE_BOX, include_interaction=True)
        assert np.array_equal(drawn(client), bright(ONE))
    assert "Traceback" not in caplog.text and "failed" not in caplog.text


@pytest.mark.slow
def test_the_command_serves_until_interrupted(tmp_path: Path) -> None:
    checkpoint = save_untrained(tmp_path / "tiny.ckpt", ["liver"])
    keys = [f"checkpoint={checkpoint}", "port=0", "device=cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", KEY_VARIABLE: "secret"}
    command = [sys.executable, "-m", "segvol_pl", "serve", *keys]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    try:
        assert server.stderr is not None
        said = []
        for line in server.stderr:
            said.append(line)
            if address := re.search(r"listening at (http://127\.0\.0\.1:\d+) .*with its key", line):
                break
        else:
            pytest.fail("".join(said))
        with Client(address[1], api_key="secret") as client:
            client.set_image(image())
            client.set_target_buffer(np.zeros(SHAPE, np.uint8))
            client.add_point_interaction([8, 15, 10], include_interaction=True)
            server.send_signal(signal.SIGINT)
            _, rest = server.communicate(timeout=30)
        assert server.returncode == 130 and "Traceback" not in rest and "serve: interrupted" in rest
    finally:
        server.kill()
        server.communicate()
