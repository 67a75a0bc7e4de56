"""A site that `turbochain export-web` wrote, at `/web/`: its files, found when the server starts."""

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, RedirectResponse, Response

from turbochain.runtime.serve.page import HEADERS, MEDIA  # type: ignore[attr-defined]  # mypy sees the folder
from turbochain.runtime.web.site import INDEX

PREFIX, METHODS = "/web/", ["GET", "HEAD"]
MEDIA_OF_SITES = {**MEDIA, ".wasm": "application/wasm", ".json": "application/json"}
_IMPORT_MAP = re.compile(r'<script type="importmap">(.*?)</script>', re.DOTALL)


def router(folder: Path) -> APIRouter:
    """Return the routes of a site.

    What is served is the regular files that are there now: no path of a request ever opens another.
    """
    routes, headers = APIRouter(), _headers((folder / INDEX).read_text())
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not _is_linked(path, folder):
            routes.add_api_route(PREFIX + path.relative_to(folder).as_posix(), _file(path, headers), methods=METHODS)
    routes.add_api_route(PREFIX, _file(folder / INDEX, headers), methods=METHODS)
    routes.add_api_route(PREFIX.rstrip("/"), _to_the_site, methods=METHODS)
    return routes


def _is_linked(path: Path, folder: Path) -> bool:
    """Return whether a symbolic link leads to a file: it may lead out of the site."""
    return Path(os.path.realpath(path)) != Path(os.path.realpath(folder)) / path.relative_to(folder)


def _headers(index: str) -> dict[str, str]:
    """Return the headers of every file of a site whose page this is.

    The page may compile WebAssembly and start workers, has an import map in its text, and loads what that names. In a
    page that is isolated from those of other servers, WebAssembly may have threads.
    """
    found = _IMPORT_MAP.search(index)
    text = found[1] if found else ""
    named = (urlsplit(address) for address in json.loads(text)["imports"].values()) if found else ()
    others = "".join(sorted({f" {url.scheme}://{url.netloc}" for url in named if url.netloc}))
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    policy = (
        HEADERS["Content-Security-Policy"],
        f"script-src 'self' 'wasm-unsafe-eval' 'sha256-{digest}'{others}",
        "worker-src 'self' blob:",
        f"connect-src 'self'{others}",
    )
    return {
        **HEADERS,
        "Content-Security-Policy": "; ".join(policy),
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Embedder-Policy": "require-corp",
    }


def _file(path: Path, headers: dict[str, str]) -> Callable[[HttpRequest], Response]:
    """Return a route that answers with a file, of any size, and with 304 to who has it as it now is."""
    media = MEDIA_OF_SITES.get(path.suffix, "application/octet-stream")

    async def answer(http: HttpRequest) -> Response:
        status = path.stat()
        tag = f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
        if http.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={**headers, "ETag": tag})
        return FileResponse(path, headers={**headers, "ETag": tag}, media_type=media, stat_result=status)

    return answer  # type: ignore[return-value]


async def _to_the_site(_: HttpRequest) -> Response:
    return RedirectResponse(PREFIX.lstrip("/"))  # relative, as behind a proxy there may be more before it
