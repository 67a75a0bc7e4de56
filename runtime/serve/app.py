"""The ASGI application: every route behind one guard."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turbochain.runtime.errors import InputError
from turbochain.runtime.serve import a1111, live, openai, page, web
from turbochain.runtime.serve.control import nets
from turbochain.runtime.serve.errors import Refused, of_input, of_validation
from turbochain.runtime.serve.guard import Guard
from turbochain.runtime.serve.metrics import Metrics
from turbochain.runtime.serve.service import Gone, Service


def make_app(service: Service) -> ASGIApp:
    """Return the application of a server; its lifespan starts and closes the source of pictures."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.source.start()
        yield
        await service.source.close()

    api = FastAPI(title="turbochain", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    for routes in (openai, a1111, live, page):
        api.include_router(routes.router(service))
    if service.settings.web is not None:
        api.include_router(web.router(Path(service.settings.web)))
    api.add_exception_handler(Refused, _refused)
    api.add_exception_handler(InputError, _input_error)
    api.add_exception_handler(RequestValidationError, _invalid)
    api.add_exception_handler(HTTPException, _http_error)
    api.add_exception_handler(Gone, _gone)
    api.add_exception_handler(Exception, _failed)

    @api.api_route("/healthz", methods=["GET", "HEAD"])
    async def healthz() -> Response:
        state = service.source.state
        return JSONResponse({"alive": state.alive, "problem": state.problem}, 200 if state.alive else 503)

    @api.api_route("/readyz", methods=["GET", "HEAD"])
    async def readyz() -> Response:
        state = service.source.state
        ready = state.ready and state.alive
        return JSONResponse({"ready": ready}, 200 if ready else 503, None if ready else {"Retry-After": "1"})

    @api.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(service.source.state.waiting), media_type="text/plain; version=0.0.4")

    takes_control = any(nets(model.bundle) for model in service.models.by_name.values())
    guarded: ASGIApp = Guard(api, service.settings, takes_control=takes_control)
    if service.settings.allow_origins:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=service.settings.allow_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client for browsers sends a dozen of its own
            expose_headers=["Retry-After"],
        )
    return Counted(guarded, service.metrics)


class Counted:
    """Counts the answers of an application, by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        """Take the application, and where to count."""
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.answered(getattr(scope.get("route"), "path", "none"), message["status"])
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)


async def _refused(http: HttpRequest, refused: Exception) -> Response:
    assert isinstance(refused, Refused)
    return JSONResponse(refused.body_at(http.url.path), refused.status, refused.headers)


async def _input_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, InputError)
    return await _refused(http, of_input(error))


async def _invalid(http: HttpRequest, error: Exception) -> Response:
    """Answer a body of the wrong form; FastAPI's own answer has no error object."""
    assert isinstance(error, RequestValidationError)
    return await _refused(http, of_validation(error.errors()))


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase
    reason = phrase.lower() if error.detail == phrase else error.detail
    answer = await _refused(http, Refused(error.status_code, f"{http.method} {http.url.path}: {reason}"))
    answer.headers.update(error.headers or {})
    return answer


async def _failed(http: HttpRequest, error: Exception) -> Response:
    """Answer what no route expected; uvicorn logs where it was."""
    return await _refused(http, Refused(500, "the server has failed; its log says where", type="server_error"))


async def _gone(_: HttpRequest, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it
