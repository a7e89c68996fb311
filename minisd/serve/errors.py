"""How a server says no: every error as a status and a text, in the shape that the clients of a path expect.

A text names the field, what was expected and what was found; no paths of this machine, and nothing that a library has said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

from ..errors import CheckpointError, MinisdError, NonFiniteError, OutOfMemoryError, UsageError, shown

OPENAI = ("/v1/images", "/v1/models")
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
FIELD = re.compile(r"(\w+)(?=[: ])")
PATH = re.compile(r"(?:(?<=[\s'\"(])|^)(?:~|[A-Za-z]:)?[/\\][^\s'\",;:]+")


class RefusedError(MinisdError):
    """An answer that is no picture.  field: of the request, by minisd's name; code: what programs tell it by."""

    def __init__(
        self, status: int, message: str, field: str | None = None, code: str = "value_error", retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.code, self.retry = status, message, field, code, retry

    @property
    def headers(self) -> dict[str, str]:
        again = {"x-should-retry": "false"} if self.status >= 500 and self.retry is None else {}
        key = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return again | key | ({"Retry-After": str(self.retry)} if self.retry is not None else {})


def told(error: BaseException, code: str) -> RefusedError:
    """What a client hears of an error; code: of the request, by which the log has the rest of what nobody expected."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, CheckpointError):
        reason = error.reason if error.__cause__ is None else "is not put together as such a file is"
        return RefusedError(422, without_paths(f"a model file cannot be used: {reason}"), "model", "model_error")
    if isinstance(error, UsageError):
        text = without_paths(str(error))
        field = FIELD.match(text)
        return RefusedError(422, text, field[1] if field else None)
    if isinstance(error, OutOfMemoryError):
        return RefusedError(507, "there is not enough memory for this; ask for fewer or smaller pictures", code="out_of_memory")
    if isinstance(error, NonFiniteError):
        return RefusedError(500, "the network made NaN of this; another number format of the server may help", code="not_finite")
    return RefusedError(500, f"something went wrong here; the server's log has it under {code}", code="internal_error")


def without_paths(text: str) -> str:
    return shown(PATH.sub("…", text), 500)


def answer(path: str, refused: RefusedError, names: Mapping[str, str] | None = None) -> JSONResponse:
    """names: what the dialect calls a field."""
    field = (names or {}).get(refused.field or "", refused.field)
    message = refused.message
    if refused.field and field != refused.field and message.startswith(refused.field):
        message = f"{field}{message.removeprefix(refused.field)}"
    problem = {"loc": ["body", *([field] if field else [])], "msg": message, "type": refused.code}
    return shaped(path, refused, message, field, [problem])


def shaped(
    path: str, refused: RefusedError, message: str, field: str | None, problems: Sequence[Mapping[str, Any]]
) -> JSONResponse:
    status = refused.status
    body: dict[str, Any]
    if path.startswith(OPENAI):
        status = {422: 404 if refused.code == "model_not_found" else 400}.get(status, status)
        kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        body = {"error": {"message": message, "type": kind, "param": field, "code": refused.code}}
    elif status == 422:
        body = {"detail": list(problems)}
    elif path.startswith("/sdapi"):
        body = {"error": refused.code, "detail": message, "errors": message}
    else:
        body = {"message": message, "code": refused.code}
    return JSONResponse(body, status, headers=refused.headers)


def invalid(path: str, errors: Sequence[Mapping[str, Any]]) -> JSONResponse:
    """Of what FastAPI found wrong with a body: where, what was expected, and nothing of what was sent."""
    problems = [
        {
            "loc": [each if isinstance(each, int) else clean(str(each)) for each in error["loc"]][:10],
            "msg": clean(str(error["msg"])),
            "type": str(error["type"]),
        }
        for error in list(errors)[:20]
    ]
    first = problems[0] if problems else {"loc": [], "msg": "the body cannot be read"}
    names = [str(each) for each in first["loc"] if each != "body"]
    message = f"{'.'.join(names)}: {first['msg']}" if names else str(first["msg"])
    return shaped(path, RefusedError(422, message, code="invalid"), message, names[0] if names else None, problems)


def clean(text: str) -> str:
    """Without what UTF-8 cannot say."""
    return shown(text.encode("utf-8", "replace").decode(), 200)
