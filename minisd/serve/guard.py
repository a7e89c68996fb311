"""What every request passes before anything looks at what it says: who may ask, from where, and how much.

Plain ASGI: the layer of Starlette that is usual for this hides from an endpoint that its client has gone.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import secrets
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .errors import RefusedError, answer, told
from .metrics import Log, Metrics
from .settings import Settings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGI = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

KEYLESS = ("/", "/healthz")  # the page holds no secret, and asks for the key
PAGE = "/minisd/page/"  # its files
UNGUESSABLE = ("/later/", "/uploads/")  # whose last part is a secret of its own: OctoAI's client sends no key there
STREAMED = "/uploads/"  # whose endpoint reads the body itself
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


class ClientGone(Exception):  # noqa: N818  # no error of anybody's
    """Nobody waits for the answer."""


class Guard:
    def __init__(self, app: ASGI, settings: Settings, metrics: Metrics, log: Log) -> None:
        self.app, self.settings, self.metrics, self.log = app, settings, metrics, log
        self.held = 0  # bytes of bodies that are being read

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # there are no web sockets here; the server closes it
        began, code, sent = time.monotonic(), secrets.token_hex(6), [0]
        scope["minisd.code"] = code

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent[0] = message["status"]
                message["headers"] = [*message.get("headers", []), *HEADERS, (b"x-request-id", code.encode())]
            await send(message)

        try:
            await self.answered(scope, receive, sending)
        except ClientGone:
            sent[0] = 499
        except asyncio.CancelledError:  # the server has waited long enough for it
            if not sent[0]:
                ending = RefusedError(503, "the server is ending", code="ending", retry=5)
                await answer(scope["path"], ending)(scope, receive, sending)  # type: ignore[arg-type]
        except Exception as error:
            self.log("fault", code=code, error=type(error).__name__, traceback=traceback.format_exc()[-4000:])
            if not sent[0]:
                await answer(scope["path"], told(error, code))(scope, receive, sending)  # type: ignore[arg-type]
        self.record(scope, sent[0], time.monotonic() - began, code)

    def record(self, scope: MutableMapping[str, Any], status: int, seconds: float, code: str) -> None:
        path = getattr(scope.get("route"), "path", None) or "other"
        self.metrics.requests.labels(path, status).inc()
        self.metrics.answering.labels(path).observe(seconds)
        client = scope["client"][0] if scope.get("client") else None
        self.log("request", code=code, method=scope["method"], path=path, status=status, seconds=round(seconds, 4), client=client)

    async def answered(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self.check(scope, headers)
            if not scope["path"].startswith(STREAMED):
                body = await self.body(headers, receive)
                receive = replaying(body, receive)
        except RefusedError as refused:
            await answer(scope["path"], refused)(scope, receive, send)  # type: ignore[arg-type]
            return
        await self.app(scope, receive, send)

    def check(self, scope: MutableMapping[str, Any], headers: dict[str, str]) -> None:
        """Raises RefusedError where somebody may not ask, or not from there."""
        path = scope["path"]
        if not self.settings.knows(headers.get("host", "")):
            raise RefusedError(400, "host: this server is not called so; see --allow-host", code="host")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != headers.get("host"):
            raise RefusedError(403, "origin: pages of other sites may not ask here", code="origin")
        open_ = path in KEYLESS or path.startswith((PAGE, *UNGUESSABLE))
        if self.settings.key and not open_ and not same_key(headers.get("authorization", ""), self.settings.key):
            raise RefusedError(401, "authorization: expected the key of this server", code="invalid_api_key")

    async def body(self, headers: dict[str, str], receive: Receive) -> bytes:
        """All of it, within its limits of bytes and seconds.  Raises RefusedError, ClientGone."""
        limits, parts, size = self.settings.limits, [], 0
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > limits.body:
            raise RefusedError(413, f"body: expected at most {limits.body:,} bytes, found {int(length[:20]):,}", code="too_large")
        try:
            async with asyncio.timeout(limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    part = message.get("body", b"")
                    size, self.held = size + len(part), self.held + len(part)
                    parts.append(part)
                    if size > limits.body:
                        raise RefusedError(413, f"body: expected at most {limits.body:,} bytes, found more", code="too_large")
                    if self.held > limits.bodies:
                        raise RefusedError(503, "too many large requests at once", code="busy", retry=2)
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise RefusedError(408, f"body: expected within {limits.body_seconds:g} seconds", code="timeout") from None
        finally:
            self.held -= size


def replaying(body: bytes, receive: Receive) -> Receive:
    """What has been read once more, and then what comes: that the client has gone."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return left.pop() if left else await receive()

    return replay


def same_key(authorization: str, key: str) -> bool:
    """Of `Bearer KEY`, or of `Basic`, whose password it then is; in a time that says nothing of how much of it is right."""
    scheme, _, value = authorization.partition(" ")
    given = value.strip().encode("latin-1", "replace")
    if scheme.casefold() == "basic":
        try:
            given = base64.b64decode(given, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            given = b""
    right = hmac.compare_digest(given, key.encode())
    return right and scheme.casefold() in ("bearer", "basic")
