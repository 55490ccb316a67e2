"""The viewer: what is asked by clicks and boxes, and the page in a real browser."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from factories import save_untrained
from PIL import Image

from segvol_pl.__main__ import main
from segvol_pl.config import ViewConfig
from segvol_pl.errors import ViewError
from segvol_pl.inference.viewer import PLANES, UserPrompt, make_server

ROOT = Path(__file__).parents[2]
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
SHAPE, SPACING = (20, 40, 30), (3.0, 1.0, 2.0)
AXIAL, CORONAL, SAGITTAL = PLANES
HU = np.full((30, 40, 20), -1000, np.int16)  # as NIfTI stores it: x, y, z
HU[4:26, 5:35, 2:18] = np.random.default_rng(0).integers(-20, 20, (22, 30, 16))
HU[10:16, 12:22, 6:12] = 200


# ---- what is asked ----


def test_a_place_on_a_slice_is_a_voxel() -> None:
    assert AXIAL.voxel(x=7.9, y=5.2, place=4, spacing=SPACING) == (4, 5, 3)
    assert CORONAL.voxel(x=7.9, y=5.2, place=4, spacing=SPACING) == (1, 4, 3)
    assert SAGITTAL.voxel(x=7.9, y=5.2, place=4, spacing=SPACING) == (1, 7, 4)
    array_DHW = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    for plane in PLANES:
        d, h, w = plane.voxel(7.9, 5.2, 4, SPACING)
        y, x = (d, h, w)[plane.down], (d, h, w)[plane.along]
        assert plane.cut(array_DHW, 4)[y, x] == array_DHW[d, h, w]


def test_clicks_text_and_rectangles_become_a_prompt() -> None:
    asked = UserPrompt(SHAPE, SPACING)
    assert asked.empty and asked.box is None
    with pytest.raises(ValueError, match="at least one of"):
        asked.prompt()
    assert asked.click((4, 5, 3), 1) and asked.click((1, 2, 3), 0) and not asked.click((4, 40, 3), 1)
    asked.text = "liver"
    prompt = asked.prompt()
    assert prompt.text == "liver" and prompt.points_N3 is not None and prompt.labels_N is not None
    assert prompt.points_N3.tolist() == [[4, 5, 3], [1, 2, 3]] and prompt.labels_N.tolist() == [1, 0]


def test_a_rectangle_is_as_deep_as_wide_until_another_plane_says_more() -> None:
    asked = UserPrompt(SHAPE, SPACING)
    asked.draw(AXIAL, [(10, 20, 12), (10, 9, 7)])  # 12 mm by 12 mm
    assert asked.box == (8, 9, 7, 12, 20, 12)
    asked.draw(SAGITTAL, [(3, 15, 9), (11, 30, 9)])
    assert asked.box == (3, 15, 7, 11, 30, 12)
    asked.draw(AXIAL, [(10, -5, 99), (10, 9, 7)])
    assert asked.box == (3, 0, 7, 11, 9, 29)


# ---- starting ----


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A CT and an untrained model."""
    folder = tmp_path_factory.mktemp("viewer")
    nib.save(nib.Nifti1Image(HU, np.diag([2.0, 1.0, 3.0, 1.0])), folder / "ct.nii.gz")
    return folder / "ct.nii.gz", save_untrained(folder / "tiny.ckpt", ["liver", "liver tumour"], landmarks=["line"])


def test_only_the_loopback_is_listened_at_by_default(
    files: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    image, checkpoint = files
    server = make_server(ViewConfig(str(checkpoint), str(image), port=0, device="cpu"))
    addresses = {place.getsockname()[0] for place in server._http._sockets.values()}
    assert addresses == {"127.0.0.1"} and "other machines" not in caplog.text
    with pytest.raises(ViewError, match=f"port: {server.port} is taken"):
        make_server(ViewConfig(str(checkpoint), str(image), port=server.port, device="cpu"))
    server.stop()
    open_to_all = make_server(ViewConfig(str(checkpoint), str(image), host="0.0.0.0", port=0, device="cpu"))
    open_to_all.stop()
    assert "other machines may reach" in caplog.text


def test_the_verb_takes_one_ct(capsys: pytest.CaptureFixture[str], files: tuple[Path, Path]) -> None:
    assert main(["view", "a.nii.gz", "b.nii.gz", "checkpoint=x"]) == 2
    assert "takes CT, got a.nii.gz b.nii.gz" in capsys.readouterr().err
    assert main(["view", "gone.nii.gz", f"checkpoint={files[1]}", "device=cpu", "show=false"]) == 1
    assert "gone.nii.gz does not exist" in capsys.readouterr().err


# ---- in a browser ----


@pytest.fixture
def page(files: tuple[Path, Path], tmp_path: Path) -> Iterator[str]:
    """Address of the viewer, run as users run it."""
    image, checkpoint = files
    keys = [f"checkpoint={checkpoint}", "port=0", "show=false", "device=cpu", "precision=fp32", "zoom.threshold=0.01"]
    command = [sys.executable, "-m", "segvol_pl", "view", str(image), *keys]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, cwd=Path(__file__).parents[2]
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if match := re.search(r"http://[\d.]+:\d+/\S+/", line):
            break
    else:
        pytest.fail("".join(said))
    yield match[0]
    process.terminate()
    process.communicate(timeout=30)


def answered(address: str, path: str, **headers: str) -> tuple[int, str]:
    """Status and body of a request whose path is sent as it is, behind the address's own."""
    host, _, secret = address.removeprefix("http://").rstrip("/").partition("/")
    connection = http.client.HTTPConnection(host, timeout=30)
    connection.request("GET", f"/{secret}{path}" if secret else path, headers=headers)
    response = connection.getresponse()
    return response.status, response.read().decode(errors="replace")


SOCKET = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "eA=="}


def test_nothing_but_the_page_is_served_and_nothing_is_fetched(page: str, files: tuple[Path, Path]) -> None:
    status, body = answered(page, "/")
    assert (status == 200 and "SegVol" in body) or "bokeh" in body
    assert not re.findall(r"(?:src|href)=[\"'](?:https?:)?//", body)
    climbing = "/static/" + "../" * 12 + str(files[0]).lstrip("/")
    for path in (str(files[0]), climbing, climbing.replace("..", "%2e%2e"), "/static/js/../../../../view.py"):
        status, body = answered(page, path)
        assert status in (403, 404), path
    bare = page[: page.index("/", len("http://"))]
    for path in ("/", "/ws", "/metadata", "/static/js/bokeh.min.js", str(files[0])):
        status, body = answered(bare, path)
        assert status == 404 and files[0].name not in body, "only who knows the address is answered"
    status, _ = answered(page, "/ws", Origin="http://elsewhere.example", **SOCKET)
    assert status == 403  # another page in the same browser


def test_a_page_under_another_name_is_refused(page: str, files: tuple[Path, Path]) -> None:
    """Another site may have its name lead to this machine (DNS rebinding): its scripts then read what is answered."""
    port = page.split("/")[2].rpartition(":")[2]
    for name in ("elsewhere.example", "localhost.elsewhere.example", "127.0.0.1.elsewhere.example"):
        elsewhere = {"Host": f"{name}:{port}", "Origin": f"http://{name}:{port}"}
        for path in ("/", "/metadata", "/autoload.js?bokeh-autoload-element=x", "/static/js/bokeh.min.js"):
            status, body = answered(page, path, **elsewhere)
            assert status == 403 and files[0].name not in body, path
        assert answered(page, "/ws", **elsewhere, **SOCKET)[0] == 403
    for name in ("localhost", "127.0.0.1", "[::1]"):
        assert answered(page, "/", Host=f"{name}:{port}")[0] == 200


BROWSER = """#!{python}
import json, os, sys
path = sys.argv[1].removeprefix("file://")
modes = [os.stat(each).st_mode & 0o777 for each in (path, os.path.dirname(path))]
with open({told!r} + ".part", "w") as stream:
    json.dump({{"arguments": sys.argv, "modes": modes, "page": open(path).read(), "path": path}}, stream)
os.rename({told!r} + ".part", {told!r})
"""


def test_the_browser_gets_the_address_from_a_file_that_nobody_else_reads(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    image, checkpoint = files
    told, browser = tmp_path / "told.json", tmp_path / "browser"
    browser.write_text(BROWSER.format(python=sys.executable, told=str(told)))
    browser.chmod(0o755)
    keys = [f"checkpoint={checkpoint}", "port=0", "device=cpu"]
    command = [sys.executable, "-m", "segvol_pl", "view", str(image), *keys]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "BROWSER": f"{browser} %s"}
    # Started behind `&`, the tests would hand down that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    try:
        while not told.exists():
            assert process.poll() is None
            time.sleep(0.1)
        seen = json.loads(told.read_text())
        (address,) = set(re.findall(r"http://[^\s\"]+", seen["page"]))
        assert answered(address, "/")[0] == 200
    finally:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    secret = address.split("/")[3]
    assert len(secret) > 20 and secret not in str(seen["arguments"]) and seen["modes"] == [0o600, 0o700]
    assert f'http-equiv="refresh" content="0; url={address}"' in seen["page"]
    assert address in said and not Path(seen["path"]).parent.exists()


def test_the_page_is_shown_in_no_frame_and_tells_nobody_its_address(page: str) -> None:
    with urllib.request.urlopen(page, timeout=30) as response:
        assert response.headers["Content-Security-Policy"] == "frame-ancestors 'none'"
        assert (response.headers["X-Frame-Options"], response.headers["Referrer-Policy"]) == ("DENY", "no-referrer")


class Browser:
    """A headless Chromium on the page, and what a test needs of it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def model(self, name: str, what: str) -> Any:
        """A property of one of the page's named models."""
        return self.driver.execute_script(
            "return window.Bokeh?.documents?.[0]?.get_model_by_name(arguments[0])?.[arguments[1]] ?? null", name, what
        )

    def until(self, true: Callable[[], Any], seconds: float = 60) -> Any:
        end = time.monotonic() + seconds
        while not (found := true()):
            assert time.monotonic() < end, self.model("status", "text")
            time.sleep(0.05)
        return found

    def place(self, name: str, x: float, y: float) -> tuple[int, int]:
        """Pixels of a place on a plane that is given in millimetres."""
        script = """
            const plot = Bokeh.documents[0].get_model_by_name(arguments[0]);
            const view = Bokeh.index.find_one(plot);
            const rect = view.canvas_view.el.getBoundingClientRect();
            const {x_scale, y_scale} = view.frame;
            return [rect.x + x_scale.compute(arguments[1]), rect.y + y_scale.compute(arguments[2])];
        """
        left, top = self.driver.execute_script(script, name, x, y)
        return round(left), round(top)

    def press(self, *places: tuple[int, int]) -> None:
        """A click at one place, or a drag from one to another."""
        from selenium.webdriver.common.actions.action_builder import ActionBuilder

        actions = ActionBuilder(self.driver)
        actions.pointer_action.move_to_location(*places[0])
        actions.pointer_action.pointer_down()
        for left, top in places[1:]:
            actions.pointer_action.move_to_location((places[0][0] + left) // 2, (places[0][1] + top) // 2)
            actions.pointer_action.move_to_location(left, top)
        actions.pointer_action.pointer_up()
        actions.perform()


@pytest.fixture
def browser(page: str, tmp_path: Path) -> Iterator[Browser]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs chromium and chromedriver (apt-get install chromium chromium-driver)")
    selenium = pytest.importorskip("selenium.webdriver")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1700,800"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    driver.get(page)
    found = Browser(driver)
    found.until(lambda: found.model("status", "text"))
    yield found
    driver.quit()


def test_a_click_shows_a_mask_that_can_be_downloaded(browser: Browser, tmp_path: Path) -> None:
    driver = browser.driver
    browser.until(lambda: reddish(driver.get_screenshot_as_png()) == 0 and browser.place("axial", 26, 16))
    browser.press(browser.place("axial", 26, 16))
    voxels = browser.until(lambda: re.search(r"(\d+) voxels", browser.model("status", "text")))
    browser.until(lambda: reddish(driver.get_screenshot_as_png()) > 200)
    assert [browser.model(f"{plane.name} slice", "value") for plane in PLANES] == [9, 16, 13]
    browser.press(button(driver, "Download NIfTI"))
    path = tmp_path / "downloads" / "mask.nii.gz"
    browser.until(path.exists)
    saved = nib.load(path)
    np.testing.assert_allclose(saved.affine, np.diag([2.0, 1.0, 3.0, 1.0]), atol=1e-4)
    assert saved.shape == HU.shape and int(np.asarray(saved.dataobj).sum()) == int(voxels[1]) > 0
    browser.press(button(driver, "Clear"))
    browser.until(lambda: reddish(driver.get_screenshot_as_png()) == 0)


def test_a_box_is_drawn_a_category_typed_and_a_slice_scrolled_to(browser: Browser, page: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

    browser.press(browser.place("coronal", 50, 50), browser.place("coronal", 14, 12))
    browser.until(lambda: "voxels" in browser.model("status", "text"))
    browser.until(lambda: len(browser.model("coronal box", "data").get("left", [])))

    say = "Bokeh.documents[0].get_model_by_name('category').value = arguments[0]"
    browser.driver.execute_script(say, "livre")
    browser.until(lambda: "UnknownCategory" in browser.model("status", "text"))
    assert "nearest: liver" in browser.model("status", "text")
    browser.driver.execute_script(say, "liver")
    browser.until(lambda: "voxels" in browser.model("status", "text"))

    left, top = browser.place("axial", 26, 16)
    ActionChains(browser.driver).scroll_from_origin(ScrollOrigin.from_viewport(left, top), 0, -120).perform()
    browser.until(lambda: browser.model("axial slice", "value") == 10)

    browser.driver.execute_script("Bokeh.documents[0].get_model_by_name('label').active = 2")
    browser.press(browser.place("axial", 22, 13))
    browser.until(lambda: browser.model("status", "text") == "line: 1 of 2 marked.")
    browser.press(browser.place("axial", 32, 23))
    browser.until(lambda: "voxels" in browser.model("status", "text"))
    assert browser.model("axial line", "data") == {"x": [23, 33], "y": [13.5, 23.5]}
    severe = [entry["message"] for entry in browser.driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert [message for message in severe if "favicon" not in message] == []
    traffic = str([entry["message"] for entry in browser.driver.get_log("performance")])
    fetched = set(re.findall(r'"url":"((?:https?|wss?)://[^"]+)"', traffic))
    assert fetched and {url for url in fetched if page.split("/")[2] not in url} == set()


def reddish(png: bytes) -> int:
    """Pixels in which red stands out."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    return int(((pixels[..., 0] - pixels[..., 1] > 60) & (pixels[..., 0] - pixels[..., 2] > 60)).sum())


def button(driver: Any, text: str) -> tuple[int, int]:
    """The middle of a button, which Bokeh hides in the shadow of its widgets."""
    script = """
        const search = (root) => {
            for (const element of root.querySelectorAll("*")) {
                if (element.tagName === "BUTTON" && element.textContent.trim() === arguments[0]) return element;
                const found = element.shadowRoot && search(element.shadowRoot);
                if (found) return found;
            }
        };
        const box = search(document).getBoundingClientRect();
        return [box.x + box.width / 2, box.y + box.height / 2];
    """
    left, top = driver.execute_script(script, text)
    return round(left), round(top)
