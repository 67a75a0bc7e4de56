"""The page at `/`: a few files of this package, and what the page must know of the models."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from PIL import Image
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from turbochain.runtime.bundle.manifest import IMAGE_TO_IMAGE, TEXT_TO_IMAGE
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.serve.control import nets
from turbochain.runtime.serve.models import Model
from turbochain.runtime.serve.service import Service
from turbochain.runtime.serve.wanted import Wanted, edited

FOLDER = Path(__file__).parent / "page"
MEDIA = {".html": "text/html", ".mjs": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
MODULES = (
    *("page", "settings", "live", "images", "transfers", "gallery", "sketch", "control", "loras"),
    *("local", "arrival", "drawing"),  # the pipeline in the browser, `export-web`
)
PARTS = (*(f"{name}.mjs" for name in MODULES), "style.css", "icon.svg")
FILES = {"/": "index.html", **{f"/page/{name}": name for name in PARTS}}
"""All that is served, by path: a request's path never opens a file."""
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cache-Control": "no-cache",
}


def router(service: Service) -> APIRouter:
    """Return the routes of the page; `/about` needs the key, and so tells the page whether it has the right one."""
    routes = APIRouter()
    for path, name in FILES.items():
        routes.add_api_route(path, _file(FOLDER / name), methods=["GET", "HEAD"])

    @routes.get("/about")
    async def about() -> dict[str, Any]:
        models = service.models
        return {
            "models": [_described(model) for model in models.by_name.values()],
            "loras": list(models.adapters.by_name),
        }

    return routes


def _file(path: Path) -> Callable[[HttpRequest], Response]:
    """Return a route that answers with a file, which is read now."""
    content = path.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": tag}

    async def answer(http: HttpRequest) -> Response:
        if http.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=MEDIA[path.suffix])

    return answer  # type: ignore[return-value]


def _described(model: Model) -> dict[str, Any]:
    built = {chain.task for chain in model.bundle.manifest.chains.values()}
    tasks = [task for task in (TEXT_TO_IMAGE, IMAGE_TO_IMAGE) if task in built]
    return {"name": model.name, "tasks": {task: _task(model.bundle, task) for task in tasks}}


def _task(bundle: Bundle, task: str) -> dict[str, Any]:
    """Return what a task is built for; `strengths` are all that there are, or none if it can be any number.

    `strength` is the default, and None for a task without an image. `controlnets`: the names to choose from.
    """
    sizes = bundle.sizes(task)
    chain = bundle.open_chain(bundle.find_chain(task, sizes[0], 1))
    strengths = sorted({t.strength for t in chain.chain.tables.values() if t.strength is not None})
    return {
        "sizes": [[width, height] for height, width in sizes],
        "steps": chain.steps,
        "strengths": strengths,
        "controlnets": nets(bundle, task),
        "strength": None
        if task == TEXT_TO_IMAGE
        else edited(bundle, Wanted("", image=Image.new("RGB", (8, 8)))).strength,
    }
