"""OpenAI's images API: generations, edits and models."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field, ValidationError, model_validator
from pydantic_core import to_json
from starlette.datastructures import UploadFile
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from turbochain.runtime.errors import InputError
from turbochain.runtime.inputs.noise import check_seed
from turbochain.runtime.serve.encoding import QUALITY, Encoding, decode, decode_base64, repainted
from turbochain.runtime.serve.errors import Refused, of_validation
from turbochain.runtime.serve.fields import ControlFields, Loras, Real, Whole, pairs
from turbochain.runtime.serve.models import Model
from turbochain.runtime.serve.service import DECODERS, Service, abandon, off_loop, while_connected
from turbochain.runtime.serve.source import Drawn, Job
from turbochain.runtime.serve.wanted import MOST_PICTURES, Wanted, edited, parse_size, requests, seeds

USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}
"""OpenAI's clients demand it in the events of a stream."""


class Body(ControlFields):
    """What is read of a request; other fields (quality, style, user, …) have no effect."""

    prompt: str
    model: str | None = None
    n: Annotated[Whole, Field(ge=1, le=MOST_PICTURES)] | None = None
    size: str | None = None
    response_format: str | None = None
    output_format: str | None = None
    output_compression: Annotated[Whole, Field(ge=0, le=100)] | None = None
    stream: bool | None = None
    partial_images: Annotated[Whole, Field(ge=0, le=8)] | None = None
    seed: Whole | None = None
    num_inference_steps: Whole | None = None
    guidance_scale: Real | None = None
    negative_prompt: str | None = None
    strength: Real | None = None
    loras: Loras | None = None
    control_image: str | None = None  # base64; in a form a file

    @model_validator(mode="before")
    @classmethod
    def _given(cls, sent: Any) -> Any:
        """Leave out a field that is empty, as clients send those that nobody has filled in; a prompt may be empty."""
        texts = ("prompt", "negative_prompt")
        return {n: v for n, v in sent.items() if v != "" or n in texts} if isinstance(sent, dict) else sent

    @property
    def encoding(self) -> Encoding:
        """Return how the pictures are sent. Raises InputError."""
        if self.response_format not in (None, "b64_json"):
            raise InputError(
                f"response_format={self.response_format!r}: b64_json was expected; no pictures are kept here"
            )
        quality = QUALITY if self.output_compression is None else self.output_compression
        return Encoding(self.output_format or "png", quality)

    @property
    def wanted(self) -> Wanted:
        """Return the picture that is asked for. Raises InputError."""
        return Wanted(
            self.prompt,
            size=parse_size(self.size or "auto"),
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt,
            strength=self.strength,
        )


class _Drawing:
    """One request of the API: which pictures, and how they are sent."""

    def __init__(self, service: Service, http: HttpRequest, body: Body, wanted: Wanted) -> None:
        """Check everything before anything waits in the queue. Raises InputError and Refused.

        Keeps no picture to start from: the requests have theirs, of the size that is drawn.
        """
        self._service, self._http, self._body = service, http, body
        self._encoding = body.encoding
        self._is_edit = wanted.image is not None
        self.model: Model = service.models.find(body.model)
        first = None if body.seed is None else check_seed(body.seed)
        self._seeds = seeds(first, body.n or 1)
        self._adapters = service.models.adapters.chosen(pairs(body.loras))
        if len(self._seeds) > service.settings.queue:
            raise InputError(f"n={body.n}: at most {service.settings.queue} pictures may wait in this server's queue")
        self._jobs = self._of_each_seed(wanted)
        self._partial_jobs = self._of_fewer_steps(wanted) if body.stream else []

    def _of_each_seed(self, wanted: Wanted) -> list[Job]:
        strict = self._service.settings.strict_size
        made = requests(self.model.bundle, wanted, self._seeds, strict_size=strict)
        client = self._http.scope["client_name"]
        return [Job(self.model.name, request, client, self._adapters) for request in made]

    def _of_fewer_steps(self, wanted: Wanted) -> list[list[Job]]:
        """Return the pictures of all seeds for each of the smaller step counts that are wanted and have room."""
        chain = self.model.bundle.open_chain(self._jobs[0].request.chain)
        most = chain.chain.tables[self._jobs[0].request.table].steps
        room = self._service.settings.queue // len(self._jobs) - 1
        count = min(self._body.partial_images or 0, room)
        found: list[list[Job]] = []
        for steps in (n for n in chain.steps if n < most):
            if len(found) == count:
                break
            with suppress(InputError):  # so few make none at this strength
                found.append(self._of_each_seed(replace(wanted, num_inference_steps=steps)))
        return found

    async def answer(self) -> Response:
        """Draw all pictures, and answer when they are ready."""
        drawn = await while_connected(self._http, self._service.draw(self._jobs))
        files = [await self._file(made, seed) for made, seed in zip(drawn, self._seeds, strict=True)]
        data = [{"b64_json": file, "seed": seed} for file, seed in zip(files, self._seeds, strict=True)]
        of_all = {"created": int(time.time()), "data": data, "seed": self._seeds[0], "model": self.model.name}
        content = {**of_all, **self._described(drawn[0]), "usage": USAGE}
        return Response(to_json(content), media_type="application/json")  # ten times as fast as `json` with long texts

    async def stream(self) -> Response:
        """Answer with events: pictures of fewer steps if they were asked for, then each picture."""
        events = self._events()

        async def next_event() -> bytes:
            return await anext(events)

        first = await while_connected(self._http, next_event())  # nothing is sent yet: a refusal has its status

        async def all_events() -> AsyncIterator[bytes]:
            yield first
            try:
                async for event in events:
                    yield event
            except Refused as refused:
                yield _event("error", refused.body)

        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(all_events(), media_type="text/event-stream", headers=headers)

    async def _events(self) -> AsyncIterator[bytes]:
        """Draw, and return the events in order.

        All pictures wait in the queue from the beginning: what is accepted is drawn, even if the server ends meanwhile.
        """
        kind = "image_edit" if self._is_edit else "image_generation"
        source = self._service.source
        drawing = {  # of each seed the partial pictures, and the last one
            seed: [asyncio.create_task(source.draw(job)) for job in jobs]
            for seed, *jobs in zip(self._seeds, *self._partial_jobs, self._jobs, strict=True)
        }
        try:
            for seed, (*earlier, last) in drawing.items():
                for index, task in enumerate(earlier):
                    content = await self._content(await task, seed)
                    yield _event(f"{kind}.partial_image", content | {"partial_image_index": index})
                yield _event(f"{kind}.completed", await self._content(await last, seed) | {"usage": USAGE})
        finally:
            await abandon(task for tasks in drawing.values() for task in tasks)

    async def _content(self, made: Drawn, seed: int) -> dict[str, Any]:
        file = await self._file(made, seed)
        of_event = {"created_at": int(time.time()), "quality": "auto"}  # OpenAI's clients demand them in events alone
        return {"b64_json": file, "seed": seed, **of_event, **self._described(made)}

    def _described(self, made: Drawn) -> dict[str, Any]:
        height, width, _ = made.picture.shape
        return {"size": f"{width}x{height}", "output_format": self._encoding.format, "background": "opaque"}

    async def _file(self, made: Drawn, seed: int) -> str:
        text = {"prompt": self._body.prompt, "seed": str(seed), "model": self.model.name}
        if self._adapters:
            text["loras"] = ", ".join(f"{name}: {scale:g}" for name, scale in self._adapters)
        return base64.b64encode(await off_loop(self._encoding.encode, made.picture, text)).decode()


def router(service: Service) -> APIRouter:
    """Return the routes below /v1."""
    routes = APIRouter(prefix="/v1")

    @routes.post("/images/generations")
    async def generations(body: Body, http: HttpRequest) -> Response:
        wanted = replace(body.wanted, strength=None)
        if body.control_image is None:
            drawing = _Drawing(service, http, body, wanted)
        else:
            drawing = await off_loop(_controlled, service, http, body, wanted, threads=DECODERS)
        return await (drawing.stream() if body.stream else drawing.answer())

    @routes.post("/images/edits")
    async def edits(http: HttpRequest) -> Response:
        body, files = await _form(http)
        drawing = await off_loop(_edit, service, http, body, files, threads=DECODERS)
        return await (drawing.stream() if body.stream else drawing.answer())

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_described(model) for model in service.models.by_name.values()]}

    @routes.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return _described(service.models.exactly(name))

    return routes


def _controlled(service: Service, http: HttpRequest, body: Body, wanted: Wanted, file: bytes | None = None) -> _Drawing:
    """Return what is drawn, with a control image if there is one: a file, or the body's.

    Decodes: call it off the event loop. Raises InputError and Refused.
    """
    image = None if body.control_image is None else decode_base64("control_image", body.control_image)
    if file is not None:
        image = decode("control_image", file)
    return _Drawing(service, http, body, replace(wanted, control=body.control(image)))


def _edit(service: Service, http: HttpRequest, body: Body, files: Mapping[str, bytes]) -> _Drawing:
    """Return what an edit draws. Decodes: call it off the event loop. Raises InputError and Refused."""
    wanted = replace(body.wanted, image=decode("image", files["image"]))
    if "mask" in files:
        wanted = replace(wanted, mask_image=repainted("mask", decode("mask", files["mask"])))
    wanted = edited(service.models.find(body.model).bundle, wanted)
    return _controlled(service, http, body, wanted, files.get("control_image"))


async def _form(http: HttpRequest) -> tuple[Body, dict[str, bytes]]:
    """Return the fields and the files of an edit: an image, and perhaps a mask and a control image. Raises Refused."""
    texts: dict[str, str] = {}
    files: dict[str, list[bytes]] = {"image": [], "mask": [], "control_image": []}
    async with http.form(max_files=8, max_fields=64) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                files.setdefault(name.removesuffix("[]"), []).append(await value.read())
            elif value:
                texts[name] = value
    for name, few in (("image", 1), ("mask", 0), ("control_image", 0)):
        if not few <= len(files[name]) <= 1:
            raise Refused(400, f"{name}: one picture was expected, and {len(files[name])} were sent", param=name)
    try:
        body = Body.model_validate(texts)
    except ValidationError as error:
        raise of_validation(error.errors()) from error
    return body, {name: found[0] for name, found in files.items() if found}


def _described(model: Model) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "turbochain"}


def _event(kind: str, content: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), to_json({"type": kind, **content}))
