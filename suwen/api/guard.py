"""What stands before every endpoint: the key, and the size of a request."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

OPEN_PATHS = ("/health",)
# A client that is cut off while it sends never sees the reason: so much is read and thrown away first
DISCARDED_BYTES = 64 << 20


class Guard:
    """ASGI middleware; keeps no more of a request than may be, and refuses a wrong key before it reads anything."""

    def __init__(self, app: Any, body_bytes: int, authorised: Callable[[str], bool]) -> None:
        self.app, self.body_bytes, self.authorised = app, body_bytes, authorised

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if scope["path"] not in OPEN_PATHS and not self.authorised(headers.get("authorization", "")):
            await _refuse(send, 401, "authentication_error", "the API key is missing or wrong")
            return
        body, size, more = bytearray(), 0, True
        while more and size <= self.body_bytes + DISCARDED_BYTES:
            message = await receive()
            if message["type"] != "http.request":
                return  # left before the request was whole
            part = message.get("body", b"")
            size += len(part)
            if size <= self.body_bytes:
                body += part
            more = message.get("more_body", False)
        if size > self.body_bytes:
            message = f"the request is larger than {self.body_bytes} bytes"
            await _refuse(send, 413, "invalid_request_error", message)
            return
        given = False

        async def replay() -> Any:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        await self.app(scope, replay, send)


async def _refuse(send: Any, status: int, kind: str, message: str) -> None:
    body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")]  # what is left of the body is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
