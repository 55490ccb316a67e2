"""Who uses a server: each client holds a session by a lease, until it gives it back or stops answering.

Two clocks run for a lease. `idle`: since the user's last request. `liveness`: since any sign of life, such as a
heartbeat, so that the session of a client that was killed is given back soon.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from segvol_pl.errors import RequestError

log = logging.getLogger(__name__)

TOKEN_BYTES = 24
GONE, FULL = 410, 503
"""HTTP statuses that nnInteractive's client reports as an expired session, and as a server without a free one."""

Held = TypeVar("Held")


@dataclass(eq=False)
class Lease(Generic[Held]):
    """One client's hold on a session."""

    number: int
    """For the log: a token is a secret."""
    token: str
    session: Held
    seen: float
    active: float
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a request works on the session: a client's requests are answered one after another."""
    upload: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a body is read: a client sends one at a time."""


class Leases(Generic[Held]):
    """The sessions of a server.

    Args:
        create: makes a session.
        most: sessions at the same time.
        idle: seconds without a request of the user's after which a session is given back.
        liveness: seconds without a sign of life after which it is.
        clock: gives the time in seconds.
    """

    def __init__(
        self,
        create: Callable[[], Held],
        most: int,
        idle: float,
        liveness: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.create, self.most, self.idle, self.liveness, self.clock = create, most, idle, liveness, clock
        self._held: dict[str, Lease[Held]] = {}
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        return len(self._held)

    def claim(self) -> Lease[Held]:
        """Create a session. Raises RequestError (503) if there are as many as there may be."""
        self.sweep()
        if len(self._held) >= self.most:
            raise RequestError(f"all {self.most} sessions of this server are in use: try again later", FULL)
        now = self.clock()
        lease = Lease(next(self._numbers), secrets.token_urlsafe(TOKEN_BYTES), self.create(), now, now)
        self._held[lease.token] = lease
        log.info("session %d begins; %d of %d in use", lease.number, len(self), self.most)
        return lease

    def get(self, token: str | None, seen: bool = True) -> Lease[Held]:
        """The lease of a token. Raises RequestError (410) if there is none, or it has run out.

        Args:
            token: as `claim` gave it.
            seen: whether this is a sign of life.
        """
        self.sweep()
        lease = self._held.get(token or "")
        if lease is None:
            raise RequestError("this session is unknown, or was given back as it was not used: connect again", GONE)
        if seen:
            lease.seen = self.clock()
        return lease

    def use(self, lease: Lease[Held]) -> None:
        """Note a request of the user's."""
        lease.seen = lease.active = self.clock()

    def release(self, token: str | None) -> None:
        """Give a session back, if there is one."""
        lease = self._held.pop(token or "", None)
        if lease is not None:
            log.info("session %d ends; %d of %d in use", lease.number, len(self), self.most)

    def sweep(self) -> None:
        """Give back every session whose lease has run out, unless a request works on it."""
        now = self.clock()
        gone = [
            lease
            for lease in self._held.values()
            if not lease.turn.locked() and (now - lease.seen > self.liveness or now - lease.active > self.idle)
        ]
        for lease in gone:
            del self._held[lease.token]
            log.info(
                "session %d is given back, as nothing came from its client or its user; %d in use",
                lease.number,
                len(self),
            )

    def remaining(self, lease: Lease[Held]) -> float:
        """Seconds until the session is given back if the user does nothing."""
        return max(0.0, self.idle - (self.clock() - lease.active))
