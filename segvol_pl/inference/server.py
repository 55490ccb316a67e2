"""A server that image viewers drive by nnInteractive's HTTP protocol, version 2. Needs aiohttp (extra `serve`).

The protocol's specification is its client, `nninteractive-client`. Here a client can prompt by text too, which that
protocol does not have.

1. `serve` loads the model, and listens, by default on the loopback interface. Elsewhere a key is required.
2. `Service` has a method for each path: it reads the body, and calls a method of the client's `ServedSession`.
3. The model works in one thread, on one request at a time, for all sessions. Bodies are read and decoded meanwhile.

An error is one line. It is sent as JSON, and as the reason behind the status, which nnInteractive's client shows.

Requests come from elsewhere: sizes have limits, the key is compared before a body is read, nothing is unpickled. A web
page that is open on the same machine can send requests too: those with an origin or another host's name are refused.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import os
import re
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import numpy as np

from segvol_pl.config import ServeConfig
from segvol_pl.errors import RequestError, SegVolError, ServeError, UnknownCategory, ran_out_of_memory
from segvol_pl.inference.leases import Lease, Leases
from segvol_pl.inference.predictor import Predictor
from segvol_pl.inference.served_arrays import pack_array, unpack_array
from segvol_pl.inference.served_session import Change, ServedSession
from segvol_pl.inference.viewer import OTHER_HOSTS, is_loopback

if TYPE_CHECKING:
    from aiohttp import web

log = logging.getLogger(__name__)

PROTOCOL = "2.6.0"
"""Version of the client whose protocol is spoken."""
META, TOKEN = "X-Meta", "X-Lease-Token"
"""Headers: the arguments that come with an array, as JSON; the lease."""
KEY_VARIABLE = "NN_INTERACTIVE_API_KEY"
"""nnInteractive's client reads its key from this variable too."""
UNAUTHORIZED, FORBIDDEN, TIMED_OUT, TOO_LARGE, BROKEN = 401, 403, 408, 413, 500

JSON_BYTES = 1 << 16
"""Size of a JSON body or header, at most."""
SILENCE = 60.0
"""Seconds without a byte after which an upload is given up."""
SWEEP = 5.0
"""Seconds between two looks for leases that have run out, at most."""
SHUTDOWN = 2.0
"""Seconds that requests have to end when the server is stopped."""
REASON = 300
"""Characters of an error behind the status."""
BRUSH = [2, 2, 2]
"""Thickness of a scribble that viewers draw, in voxels; `ServedSession.add_scribble` takes its middle."""

Result = TypeVar("Result")
Handler = Callable[["web.Request"], Awaitable["web.StreamResponse"]]


def serve(config: ServeConfig) -> None:
    """Serve until interrupted.

    Raises:
        ServeError: aiohttp or the key is missing, or the port is taken.
        CheckpointError: the model cannot be used.
    """
    if find_spec("aiohttp") is None:
        raise ServeError("the server needs aiohttp: pip install 'segvol_pl[serve]'")
    key = api_key(config)
    predictor = Predictor.from_checkpoint(config.checkpoint, config.device, config.zoom, config.precision, config.seed)
    asyncio.run(_serve(Service(predictor, config, key)))


def api_key(config: ServeConfig) -> str | None:
    """The key that clients must send; None if they need none.

    Raises ServeError if it is missing for an address that other machines reach, or others can read its file.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if config.key_file is not None:
        path = Path(config.key_file)
        try:
            mode, key = path.stat().st_mode, path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ServeError(f"key_file: {path} cannot be read ({error})") from error
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ServeError(f"key_file: others can read {path}: chmod 600 {path}")
        if not key:
            raise ServeError(f"key_file: {path} is empty")
    if not key and not is_loopback(config.host):
        raise ServeError(f"host: other machines may reach {config.host}: give key_file=FILE, or set {KEY_VARIABLE}")
    if not key.isprintable() or " " in key:
        raise ServeError("key_file: a key is one word on one line")
    return key or None


async def _serve(service: Service) -> None:
    runner, address = await start(service)
    needs = "with its key" if service.key else "without a key: any user of this machine can use it"
    log.info("listening at %s (stop with Ctrl-C), %s", address, needs)
    if not is_loopback(service.config.host):
        log.warning("host: other machines may reach %s, and images are sent without encryption", service.config.host)
    try:
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


async def start(service: Service) -> tuple[web.AppRunner, str]:
    """Listen. Returns the runner, whose `cleanup` ends it, and the address. Raises ServeError if the port is taken."""
    from aiohttp import web

    host, port = service.config.host, service.config.port
    own = logging.getLogger(f"{__name__}.http")
    own.addFilter(_in_one_line)
    runner = web.AppRunner(
        service.application(),
        access_log=None,
        logger=own,
        auto_decompress=False,
        max_field_size=JSON_BYTES,
        shutdown_timeout=SHUTDOWN,
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        raise ServeError(f"host, port: cannot listen at {host}, {port}: {error.strerror or error}") from error
    return runner, f"http://{f'[{host}]' if ':' in host else host}:{runner.addresses[0][1]}"


def _in_one_line(record: logging.LogRecord) -> bool:
    """Shorten what aiohttp logs of bytes that are no HTTP: to it that is an error of the server, with its stack."""
    if record.exc_info:
        record.msg, record.args = f"{record.getMessage()}: {' '.join(str(record.exc_info[1]).split())}", None
        record.exc_info = record.exc_text = None
    return True


class Service:
    """The paths of the protocol, and what they do. Its methods are aiohttp's handlers.

    Args:
        predictor: the model, which all sessions share.
        config: limits, and the axes of the clients' arrays.
        key: what clients must send; None if they need none.
    """

    def __init__(self, predictor: Predictor, config: ServeConfig, key: str | None) -> None:
        self.predictor, self.config, self.key = predictor, config, key
        self.leases: Leases[ServedSession] = Leases(
            lambda: ServedSession(predictor, config.axes),
            config.max_sessions,
            config.idle_timeout,
            config.liveness_timeout,
        )
        self._model = ThreadPoolExecutor(1, "model")
        self._other_hosts = re.compile(OTHER_HOSTS) if is_loopback(config.host) else None

    def application(self) -> web.Application:
        """The web application."""
        from aiohttp import web

        @web.middleware
        async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await self._guarded(request, handler)

        app = web.Application(middlewares=[guarded], client_max_size=JSON_BYTES)
        app.add_routes(
            [
                web.get("/healthz", self.healthz),
                web.get("/capabilities", self.capabilities),
                web.get("/lease_status", self.lease_status),
                web.post("/claim", self.claim),
                web.post("/release", self.release),
                web.post("/heartbeat", self.heartbeat),
                web.post("/set_image", self.set_image),
                web.post("/set_target_buffer", self.set_target_buffer),
                web.post("/set_do_autozoom", self.set_do_autozoom),
                web.post("/reset_interactions", self.reset_interactions),
                web.post("/undo", self.undo),
                web.post("/predict", self.predict),
                web.post("/add_bbox_interaction", self.add_box),
                web.post("/add_point_interaction", self.add_point),
                web.post("/add_scribble_interaction", self.add_scribble),
                web.post("/add_lasso_interaction", self.add_lasso),
                web.post("/add_initial_seg_interaction", self.add_initial),
                web.post("/add_text_interaction", self.add_text),
            ]
        )
        app.cleanup_ctx.append(self._sweeping)
        return app

    async def _sweeping(self, app: web.Application) -> AsyncIterator[None]:
        async def sweep() -> None:
            while True:
                await asyncio.sleep(min(SWEEP, self.config.liveness_timeout, self.config.idle_timeout))
                self.leases.sweep()

        task = asyncio.create_task(sweep())
        yield
        task.cancel()
        self._model.shutdown(wait=False, cancel_futures=True)

    # ---- every request ----

    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse who may not ask, and answer every error by one line."""
        from aiohttp import web

        try:
            self._check_sender(request)
            return await handler(request)
        except RequestError as error:
            return _refusal(str(error), error.code)
        except SegVolError as error:
            return _refusal(str(error), 400)
        except web.HTTPRequestEntityTooLarge:
            return _refusal(f"body: larger than {JSON_BYTES} bytes, the most that JSON may have here", TOO_LARGE)
        except web.HTTPException as error:
            return _refusal(f"{request.method} {request.path}: {error.reason}", error.status)
        except ConnectionError:  # nobody reads the answer
            return _refusal("body: the client has gone", 400)
        except web.RequestPayloadError as error:
            return _refusal(f"body: not sent as HTTP states ({error})", 400)
        except Exception as error:
            if ran_out_of_memory(error):
                return _refusal("out of memory: send a smaller image, or serve with a lower zoom.decode_batch", BROKEN)
            log.exception("%s failed", request.path)
            return _refusal(f"unexpected {type(error).__name__}: the server's log has more", BROKEN)

    def _check_sender(self, request: web.Request) -> None:
        if "Origin" in request.headers:
            raise RequestError("this server answers programs, not web pages", FORBIDDEN)
        if self._other_hosts and self._other_hosts.fullmatch(_host_name(request)):
            raise RequestError(f"this server listens on the loopback, and has no name {request.host}", FORBIDDEN)
        given = request.headers.get("Authorization", "").removeprefix("Bearer ").encode(errors="surrogateescape")
        if self.key and request.path != "/healthz" and not hmac.compare_digest(given, self.key.encode()):
            raise RequestError(f"wrong or no key: give the client api_key=KEY, or set {KEY_VARIABLE}", UNAUTHORIZED)

    def _lease(self, request: web.Request, seen: bool = True) -> Lease[ServedSession]:
        return self.leases.get(request.headers.get(TOKEN), seen)

    async def _work(self, lease: Lease[ServedSession], call: Callable[[], Result]) -> Result:
        """Call a function in the model's thread when it is the client's turn."""
        async with lease.turn:
            self.leases.get(lease.token)  # it may have been given back meanwhile
            self.leases.use(lease)
            try:
                return await asyncio.get_running_loop().run_in_executor(self._model, call)
            finally:
                self.leases.use(lease)

    async def _changed(self, lease: Lease[ServedSession], call: Callable[[], Change]) -> web.Response:
        """Call a function that segments, and send what changed."""
        from aiohttp import web

        change = await self._work(lease, call)
        meta: dict[str, Any] = {"ran_prediction": change.ran, "bbox": change.region}
        body = b""
        if change.mask_XYZ is not None:
            meta |= {"dtype": str(change.mask_XYZ.dtype), "shape": list(change.mask_XYZ.shape)}
            body = await asyncio.to_thread(pack_array, change.mask_XYZ)
        return web.Response(body=body, headers={META: json.dumps(meta)}, content_type="application/octet-stream")

    # ---- what is read ----

    async def _arguments(self, request: web.Request) -> dict[str, Any]:
        return _object(await request.read(), "body")

    async def _array(self, request: web.Request, lease: Lease[ServedSession], ndim: int) -> np.ndarray:
        """The array that a request carries. Raises RequestError for one that is damaged or too large."""
        async with lease.upload:
            body = await self._upload(request)
            return await asyncio.to_thread(unpack_array, body, ndim, self.config.max_voxels)

    async def _upload(self, request: web.Request) -> bytearray:
        most = math.floor(self.config.max_body_mb * 1e6)
        too_large = RequestError(
            f"body: larger than {self.config.max_body_mb:g} MB, the most that this server takes", TOO_LARGE
        )
        if (request.content_length or 0) > most:
            raise too_large
        body = bytearray()
        while True:
            self.leases.use(self._lease(request))
            try:
                async with asyncio.timeout(SILENCE):
                    part = await request.content.readany()
            except TimeoutError as error:
                raise RequestError(f"body: nothing came for {SILENCE:.0f} s", TIMED_OUT) from error
            if not part:
                return body
            body += part
            if len(body) > most:
                raise too_large

    # ---- leases ----

    async def healthz(self, request: web.Request) -> web.Response:
        """Whether the server answers."""
        return _json({"ok": True})

    async def capabilities(self, request: web.Request) -> web.Response:
        """What the model can do, as nnInteractive's client reads it, and the names that a text may be."""
        try:
            categories = self.predictor.categories
        except UnknownCategory:  # weights without a text bank are prompted by points and boxes
            categories = []
        interactions = ("points", "bbox2d", "bbox3d", "scribble", "lasso")
        return _json(
            {
                "supported_interactions": dict.fromkeys(interactions, True),
                # The model has no channels for prompts; viewers need none either.
                "channel_mapping": {},
                "num_interaction_channels": 0,
                "supports_initial_label": True,
                "supports_zero_shot_label_refinement": True,
                "supports_undo": True,
                "preferred_scribble_thickness": BRUSH,
                "interaction_decay": None,
                "patch_size": list(self.predictor.model.config.input_shape),
                "do_autozoom": True,
                "inference_session_version": PROTOCOL,
                "license": "!!MISSING!!",  # how the protocol says that a checkpoint does not state it
                "categories": categories,
                "synonyms": self.predictor.synonyms,
            }
        )

    async def claim(self, request: web.Request) -> web.Response:
        """Give the client a session."""
        lease = self.leases.claim()
        return _json(
            {
                "lease_token": lease.token,
                "idle_timeout_seconds": self.leases.idle,
                "liveness_timeout_seconds": self.leases.liveness,
                "max_sessions": self.leases.most,
            }
        )

    async def release(self, request: web.Request) -> web.Response:
        """Take the session back."""
        self.leases.release(request.headers.get(TOKEN))
        return _json({"released": True})

    async def heartbeat(self, request: web.Request) -> web.Response:
        """Note that the client is alive."""
        return _json({"remaining_seconds": self.leases.remaining(self._lease(request))})

    async def lease_status(self, request: web.Request) -> web.Response:
        """How long the session stays, which this does not prolong."""
        remaining = self.leases.remaining(self._lease(request, seen=False))
        return _json({"remaining_seconds": remaining, "idle_timeout_seconds": self.leases.idle})

    # ---- the image ----

    async def set_image(self, request: web.Request) -> web.Response:
        """Take an image and encode it."""
        lease = self._lease(request)
        properties = _meta(request).get("image_properties") or {}
        if not isinstance(properties, dict):
            raise RequestError("image_properties must be an object")
        image_CXYZ = await self._array(request, lease, 4)
        await self._work(lease, partial(lease.session.set_image, image_CXYZ, properties))
        return _json({"original_image_shape": list(image_CXYZ.shape)})

    async def set_target_buffer(self, request: web.Request) -> web.Response:
        """Take the shape of the client's mask."""
        lease, arguments = self._lease(request), await self._arguments(request)
        shape = _argument(arguments, "shape", list)
        await self._work(lease, partial(lease.session.set_target_buffer, shape))
        return _json({})

    async def set_do_autozoom(self, request: web.Request) -> web.Response:
        """Accept either: this model always zooms out and in."""
        lease, arguments = self._lease(request), await self._arguments(request)
        if not _flag(arguments, "do_autozoom"):
            log.info("session %d: do_autozoom=false changes nothing: this model always zooms out and in", lease.number)
        return _json({"do_autozoom": True})

    # ---- prompts ----

    async def add_point(self, request: web.Request) -> web.Response:
        """Add a point."""
        lease, arguments = self._lease(request), await self._arguments(request)
        coordinates = _argument(arguments, "coordinates", list)
        inside, run = _flag(arguments, "include_interaction"), _flag(arguments, "run_prediction", True)
        return await self._changed(lease, partial(lease.session.add_point, coordinates, inside, run))

    async def add_box(self, request: web.Request) -> web.Response:
        """Set the box."""
        lease, arguments = self._lease(request), await self._arguments(request)
        intervals = _argument(arguments, "bbox_coords", list)
        inside, run = _flag(arguments, "include_interaction"), _flag(arguments, "run_prediction", True)
        return await self._changed(lease, partial(lease.session.add_box, intervals, inside, run))

    async def add_scribble(self, request: web.Request) -> web.Response:
        """Add points along a scribble."""
        return await self._drawn(request, ServedSession.add_scribble)

    async def add_lasso(self, request: web.Request) -> web.Response:
        """Set the box to the extent of a lasso."""
        return await self._drawn(request, ServedSession.add_lasso)

    async def _drawn(self, request: web.Request, add: Callable[..., Change]) -> web.Response:
        lease, meta = self._lease(request), _meta(request)
        inside, run = _flag(meta, "include_interaction"), _flag(meta, "run_prediction", True)
        mask = await self._array(request, lease, 3)
        call = partial(add, lease.session, mask, meta.get("interaction_bbox"), inside, run)
        return await self._changed(lease, call)

    async def add_initial(self, request: web.Request) -> web.Response:
        """Begin from a mask found elsewhere."""
        lease, run = self._lease(request), _flag(_meta(request), "run_prediction", False)
        mask_XYZ = await self._array(request, lease, 3)
        return await self._changed(lease, partial(lease.session.add_initial, mask_XYZ, run))

    async def add_text(self, request: web.Request) -> web.Response:
        """Set the category: `text`, and `run_prediction` as of the other prompts."""
        lease, arguments = self._lease(request), await self._arguments(request)
        text, run = _argument(arguments, "text", str), _flag(arguments, "run_prediction", True)
        return await self._changed(lease, partial(lease.session.add_text, text, run))

    async def predict(self, request: web.Request) -> web.Response:
        """Segment by the prompts that were added without it."""
        lease = self._lease(request)
        return await self._changed(lease, lease.session.predict)

    async def undo(self, request: web.Request) -> web.Response:
        """Take the last prompt back."""
        lease = self._lease(request)
        return await self._changed(lease, lease.session.undo)

    async def reset_interactions(self, request: web.Request) -> web.Response:
        """Drop prompts and mask."""
        lease = self._lease(request)
        await self._work(lease, lease.session.reset)
        return _json({})


def _host_name(request: web.Request) -> str:
    try:
        return urlsplit(f"//{request.host}").hostname or ""
    except ValueError:
        return ""


def _json(content: dict[str, Any]) -> web.Response:
    from aiohttp import web

    return web.json_response(content)


def _refusal(message: str, code: int) -> web.Response:
    from aiohttp import web

    line = " ".join(message.split())
    # nnInteractive's client reads the reason as ASCII.
    reason = line.encode("ascii", "replace").decode()[:REASON]
    return web.json_response({"detail": line}, status=code, reason="".join(filter(str.isprintable, reason)))


def _object(content: str | bytes, name: str) -> dict[str, Any]:
    """A JSON object. Raises RequestError."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise RequestError(f"{name}: not a JSON object")
    return found


def _meta(request: web.Request) -> dict[str, Any]:
    return _object(request.headers.get(META, "{}"), META)


def _argument(arguments: dict[str, Any], name: str, kind: type[Result]) -> Result:
    value = arguments.get(name)
    if not isinstance(value, kind):
        raise RequestError(f"{name}: missing, or not a {kind.__name__}")
    return value


def _flag(arguments: dict[str, Any], name: str, default: bool | None = None) -> bool:
    value = arguments.get(name, default)
    if not isinstance(value, bool):
        raise RequestError(f"{name}: give true or false")
    return value
