"""What every request must be before anything reads it: from an allowed host and origin, with the key, small enough.

Plain ASGI: Starlette's BaseHTTPMiddleware would hide from the routes that a client has hung up.
"""

import asyncio
import base64
import binascii
import hmac
import ipaddress
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turbochain.runtime.serve.errors import Refused
from turbochain.runtime.serve.settings import BODY, IMAGE_BODY, Settings, is_loopback

OPEN = ("/healthz", "/readyz")
"""The paths that need no key, beside those of the page."""
WITH_IMAGE = ("/v1/images/edits", "/sdapi/v1/img2img")
"""The paths whose requests may carry a picture."""
WITH_CONTROL = ("/v1/images/generations", "/sdapi/v1/txt2img")
"""The paths that may if a bundle has a ControlNet."""
BODY_SECONDS = 30.0
"""How long a client may take to send its request."""
SUBPROTOCOL, KEY_PROTOCOL = "turbochain", "key."
"""A browser's socket sends no headers of its own: it names its key, in base64url, among the subprotocols."""


class Guard:
    """Refuses what is not for this server, and hands the others on with their whole body."""

    def __init__(self, app: ASGIApp, settings: Settings, *, takes_control: bool = False) -> None:
        """Take the application behind it, who may call it, and whether a bundle has a ControlNet."""
        self._app, self._settings = app, settings
        self._with_image = {*WITH_IMAGE, *(WITH_CONTROL if takes_control else ())}
        self._hosts = {name.lower() for name in ("localhost", settings.host, *settings.allow_hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = _headers(scope)
        try:
            self._check_host(headers)
            self._check_origin(scope, headers)
            scope["client_name"] = self._check_key(scope, headers)
            if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
                receive = await self._whole(scope, headers, receive)
        except Refused as refused:
            await refuse(refused, scope, send)
            return
        await self._app(scope, receive, send)

    def _check_host(self, headers: Mapping[str, str]) -> None:
        """Refuse a name that is not this server's: a foreign page may have bound its own name to this address."""
        name = _hostname(f"//{headers.get('host', '')}")
        if "*" not in self._hosts and name not in self._hosts and not _is_address(name):
            raise Refused(403, f"Host is {name!r}, which is not this server's: allow it with --allow-host", code="host")

    def _check_origin(self, scope: Scope, headers: Mapping[str, str]) -> None:
        """Refuse what a page of another server sends."""
        origin, allowed = headers.get("origin"), self._settings.allow_origins
        changes = scope["type"] == "websocket" or scope["method"] not in ("GET", "HEAD", "OPTIONS")
        if not changes or origin is None or "*" in allowed or origin in allowed:
            return
        own = headers.get("host", "").lower()
        if not own or _server(origin) != own:
            raise Refused(403, f"Origin is {origin!r}: allow this page's server with --allow-origin", code="origin")

    def _check_key(self, scope: Scope, headers: Mapping[str, str]) -> str:
        """Return the client's name, by which it takes turns: its key, else its address, else its connection's own."""
        given = _key(headers)
        here = not scope.get("client") or is_loopback(scope["client"][0])
        if not (self._settings.api_keys or self._settings.insecure or here or scope["path"] in OPEN):
            raise Refused(403, "without an API key only this machine may call: set one, or insecure", code="address")
        if self._settings.api_keys:
            known = [hmac.compare_digest(given.encode(), key.encode()) for key in self._settings.api_keys]
            if any(known):
                return f"key {known.index(True)}"
            if scope["path"] not in OPEN and not _is_page(scope):
                raise Refused(401, "the API key is missing or wrong", code="invalid_api_key")
        return f"address {scope['client'][0]}" if scope.get("client") else f"connection {id(scope)}"

    async def _whole(self, scope: Scope, headers: Mapping[str, str], receive: Receive) -> Receive:
        """Return a `receive` that gives the whole body at once; Refused if it is too large, too slow or untyped."""
        limit = IMAGE_BODY if scope["path"] in self._with_image else BODY
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _read(receive, limit)
        except TimeoutError:
            raise Refused(400, f"the request was not whole after {BODY_SECONDS:g} s", code="timeout") from None
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if body and kind not in ("application/json", "multipart/form-data"):
            raise Refused(400, f"Content-Type is {kind!r}: application/json was expected", code="content_type")
        given = False

        async def whole() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return whole


async def refuse(refused: Refused, scope: Scope, send: Send) -> None:
    """Answer a request, or a socket that has not been accepted, with an error."""
    body = json.dumps(refused.body_at(scope["path"])).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refused.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    if scope["type"] == "websocket":
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008})
            return
        await send({"type": "websocket.http.response.start", "status": refused.status, "headers": raw})
        await send({"type": "websocket.http.response.body", "body": body})
        return
    await send({"type": "http.response.start", "status": refused.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def _read(receive: Receive, limit: int) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "the client has hung up", code="disconnected")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise _too_large(limit)
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_large(limit: int) -> Refused:
    return Refused(413, f"the request is larger than {limit >> 20} MiB", code="too_large")


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _server(url: str) -> str:
    """Return host and port of a URL, "" if it has none: an opaque origin is `null`."""
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    """Return whether a host is an address, which no foreign name server can bind to another."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_page(scope: Scope) -> bool:
    """Return whether a request opens a page, for which a browser sends no key: the server's, or that of a site."""
    path, of_pages = scope["path"], ("/page/", "/web/")
    opens = path in ("/", "/web") or path.startswith(of_pages)
    return scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and opens


def _key(headers: Mapping[str, str]) -> str:
    """Return the key that a client gives: a Bearer token, Basic's password or user, or a socket's subprotocol."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        user, _, password = _decoded(value.strip()).partition(":")
        return password or user
    for protocol in headers.get("sec-websocket-protocol", "").split(","):
        if protocol.strip().startswith(KEY_PROTOCOL):
            return _decoded(protocol.strip().removeprefix(KEY_PROTOCOL))
    return ""


def _decoded(text: str) -> str:
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode()
    except (binascii.Error, ValueError):
        return ""


def chosen_protocol(scope: Mapping[str, Any]) -> str | None:
    """Return the subprotocol that a socket is accepted with."""
    return SUBPROTOCOL if SUBPROTOCOL in scope.get("subprotocols", ()) else None
