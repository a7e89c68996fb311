"""The application, and the process that serves it."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from .. import __version__
from ..errors import OutputError, UsageError
from .dialects import DIALECTS, NAMES
from .errors import RefusedError, answer, invalid
from .guard import Guard
from .metrics import ToLog
from .page.routes import router as page
from .service import Service
from .settings import Settings

WORDS = {404: "there is nothing at this path", 405: "this path is not asked so"}
CONNECTIONS = 512
HEAD_SECONDS = 10.0  # in which the head of a request must have come


def create_app(service: Service) -> FastAPI:
    """Everything but the server itself; the routes of every dialect."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.close()

    app = FastAPI(
        title="minisd", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan,
        openapi_url=None if service.settings.public else "/openapi.json",
    )  # fmt: skip
    app.state.service = service
    for router in (page, *DIALECTS):
        app.include_router(router)

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"status": "ok" if service.queue.open else "ending", "waiting": len(service.queue)}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    add_errors(app)
    return app


def add_errors(app: FastAPI) -> None:
    @app.exception_handler(RefusedError)
    async def refused(asked: Request, error: RefusedError) -> Response:
        names = next((names for start, names in NAMES.items() if asked.url.path.startswith(start)), None)
        return answer(asked.url.path, error, names)

    @app.exception_handler(RequestValidationError)
    async def unfit(asked: Request, error: RequestValidationError) -> Response:
        return invalid(asked.url.path, error.errors())

    @app.exception_handler(HTTPException)
    async def other(asked: Request, error: HTTPException) -> Response:
        message = WORDS.get(error.status_code, "the request cannot be read")
        return answer(asked.url.path, RefusedError(error.status_code, message, code="not_found"))


class Protocol(H11Protocol):
    """Closes what does not say in time what it wants, for which uvicorn would wait without end."""

    timer: asyncio.TimerHandle | None = None
    after: object = None  # the request after which it was begun

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.timer is not None:
            self.timer.cancel()  # or all of the request would be kept until then

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        asks = self.cycle is not before or (before is not None and not before.response_complete)
        if not asks and (self.timer is None or self.after is not before):
            self.wait_for_head()  # the beginning of another request, or the rest of one that was refused

    def wait_for_head(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.after = self.cycle
        self.timer = self.loop.call_later(HEAD_SECONDS, self.close_unless_asked)

    def close_unless_asked(self) -> None:
        self.timer = None
        if self.cycle is self.after and not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """Lets who waits know at once that the server ends; what is being drawn is finished, for as long as it may take."""

    def __init__(self, config: uvicorn.Config, ending: Callable[[], None], ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.ending, self.ready = ending, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.loop = asyncio.get_running_loop()
        if self.started:
            self.ready()

    def handle_exit(self, sig: int, frame: Any) -> None:
        super().handle_exit(sig, frame)
        self.loop.call_soon_threadsafe(self.ending)


def run(settings: Settings, ready: Callable[[str], None]) -> None:
    """Serves until the process is told to end.  ready: is called with the address once requests are taken.

    Raises UsageError, CheckpointError, OutputError (the port is taken).
    """
    settings.check()
    try:
        service = Service(settings)
    except RefusedError as refused:
        raise UsageError(refused.message) from None
    listening = bound(settings)
    logging.getLogger().addHandler(ToLog(service.log))
    config = uvicorn.Config(
        Guard(create_app(service), settings, service.metrics, service.log),  # type: ignore[arg-type]
        log_config=None, access_log=False, server_header=False, date_header=False, proxy_headers=False, ws="none",
        timeout_graceful_shutdown=int(settings.grace) or 1, limit_concurrency=CONNECTIONS, lifespan="on", http=Protocol,
    )  # fmt: skip
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{listening.getsockname()[1]}"

    def ended() -> None:
        service.log("ending", waiting=len(service.queue), drawing=len(service.drawing_now))
        service.close()

    def started() -> None:
        service.log("serving", url=url, model=service.index.default().name, key=bool(settings.key))
        ready(url)

    try:
        Server(config, ended, started).run(sockets=[listening])
    finally:
        service.stop()


def bound(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((settings.host, settings.port))
        made.listen(2048)
    except OSError as error:
        made.close()
        raise OutputError(f"port: {settings.host}:{settings.port} cannot be had: {error.strerror}; choose another") from None
    return made
