"""The socket `/ws`: pictures that follow what a person types, or what a camera sees. README.md has its protocol."""

import asyncio
import logging
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic_core
from fastapi import APIRouter, WebSocket
from pydantic import ConfigDict, Field, ValidationError
from starlette.websockets import WebSocketDisconnect

from turbochain.runtime.serve.encoding import QUALITY, Encoding, decode
from turbochain.runtime.serve.errors import Refused, failed
from turbochain.runtime.serve.fields import ControlFields, Lora, pairs
from turbochain.runtime.serve.guard import chosen_protocol
from turbochain.runtime.serve.service import DECODERS, Service, off_loop
from turbochain.runtime.serve.settings import BODY
from turbochain.runtime.serve.source import Drawn, Job
from turbochain.runtime.serve.wanted import Wanted, edited, parse_size, request

log = logging.getLogger("turbochain")

HEAD = struct.Struct("<IIff")
"""What precedes a picture's file: id, requests skipped, milliseconds drawn, milliseconds encoded."""
_LENGTH = struct.Struct("<I")

Number = Annotated[float, Field(allow_inf_nan=False)]


class Body(ControlFields):
    """The fields of a message; unlike OpenAI's API this is our own, so that an unknown field is an error."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    id: Annotated[int, Field(ge=0, lt=2**32)]
    prompt: str
    model: str | None = None
    size: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: Number | None = None
    negative_prompt: str | None = None
    strength: Number | None = None
    loras: list[Lora] | None = None
    control_bytes: Annotated[int, Field(ge=1)] | None = None  # the message's last: the file of a control image
    format: Literal["png", "jpeg", "webp"] = "jpeg"
    quality: Annotated[int, Field(ge=0, le=100)] = QUALITY


@dataclass(frozen=True)
class _Asked:
    """A message that was read; its picture is decoded when its turn comes."""

    body: Body
    image: bytes | None = None  # the file of the picture to start from
    control: bytes | None = None  # of the control image

    @property
    def has_picture(self) -> bool:
        """Return whether it carries a file."""
        return self.image is not None or self.control is not None

    def ends(self, drawn: "_Asked") -> bool:
        """Return whether this message, being newer, ends what is being drawn.

        A camera's next frame does not, nor the next stroke of a drawing: no picture would ever be ready.
        """
        others = {"id": drawn.body.id, "control_bytes": drawn.body.control_bytes}
        alike = self.body.model_copy(update=others) == drawn.body
        return not (self.has_picture and drawn.has_picture and alike)


def router(service: Service) -> APIRouter:
    """Return the route of the socket."""
    routes = APIRouter()

    @routes.websocket("/ws")
    async def ws(socket: WebSocket) -> None:
        await socket.accept(chosen_protocol(socket.scope))
        await _Session(service, socket).run()

    return routes


class _Session:
    """A socket: what is being drawn for it, and the one request that waits, the newest."""

    def __init__(self, service: Service, socket: WebSocket) -> None:
        self._service, self._socket = service, socket
        self._client: str = socket.scope["client_name"]
        self._waiting: _Asked | None = None
        self._drawn: _Asked | None = None  # what `_drawing` is about
        self._drawing: asyncio.Task[Drawn] | None = None
        self._arrived = asyncio.Event()
        self._skipped = 0

    async def run(self) -> None:
        """Read and answer until the client hangs up, which ends what is being drawn."""
        async with asyncio.TaskGroup() as group:
            answering = group.create_task(self._answer_newest())
            with suppress(WebSocketDisconnect):  # while a refusal was sent
                await self._read()
            answering.cancel()

    async def _read(self) -> None:
        """Put each message in the slot; what cannot be read is answered at once."""
        while (message := await self._socket.receive())["type"] != "websocket.disconnect":
            try:
                asked = _parse(message)
            except Refused as refused:
                await self._refuse(_id_in(message), refused)
                continue
            if self._waiting is not None:
                self._skip()
            self._waiting = asked
            self._arrived.set()
            if self._drawing is not None and self._drawn is not None and asked.ends(self._drawn):
                self._drawing.cancel()

    async def _answer_newest(self) -> None:
        with suppress(WebSocketDisconnect):  # `_read` sees it, too
            while True:
                await self._arrived.wait()
                self._arrived.clear()
                asked, self._waiting = self._waiting, None
                if asked is not None:
                    await self._answer(asked)

    async def _answer(self, asked: _Asked) -> None:
        """Send a picture, or why there is none; nothing if a newer message has ended it."""
        try:
            drawn = await self._draw(asked)
            if drawn is None:
                self._skip()
                return
            start = time.perf_counter()
            file = await off_loop(Encoding(asked.body.format, asked.body.quality).encode, drawn.picture)
            encoded = time.perf_counter() - start
        except Refused as refused:
            await self._refuse(asked.body.id, refused)
        except Exception as error:
            log.exception("a message could not be answered")
            await self._refuse(asked.body.id, failed(error))
        else:
            skipped, self._skipped = self._skipped, 0
            head = HEAD.pack(asked.body.id, skipped, drawn.seconds * 1e3, encoded * 1e3)
            await self._socket.send_bytes(head + file)

    async def _draw(self, asked: _Asked) -> Drawn | None:
        """Return the picture; None if a newer message has ended it. Raises Refused."""
        # No newer message ends this, which a thread does: so one picture at a time is decoded, whatever is sent.
        job = await off_loop(self._job, asked, threads=DECODERS if asked.has_picture else None)
        if self._waiting is not None and self._waiting.ends(asked):
            return None
        self._drawn, self._drawing = asked, asyncio.create_task(self._service.source.draw(job))
        try:
            await asyncio.wait([self._drawing])
            return None if self._drawing.cancelled() else self._drawing.result()
        finally:
            self._drawing.cancel()
            self._drawn = self._drawing = None

    def _job(self, asked: _Asked) -> Job:
        """Return what is drawn for a message. Raises InputError, or Refused if there is no such model."""
        body, service = asked.body, self._service
        model = service.models.find(body.model)
        wanted = Wanted(
            body.prompt,
            negative_prompt=body.negative_prompt,
            image=None if asked.image is None else decode("image", asked.image),
            control=body.control(None if asked.control is None else decode("control_image", asked.control)),
            size=parse_size(body.size or "auto"),
            num_inference_steps=body.num_inference_steps,
            guidance_scale=body.guidance_scale,
            strength=body.strength,
        )
        wanted = edited(model.bundle, wanted)
        made = request(model.bundle, wanted, body.seed, strict_size=service.settings.strict_size)
        return Job(model.name, made, self._client, service.models.adapters.chosen(pairs(body.loras)))

    def _skip(self) -> None:
        self._skipped += 1
        self._service.metrics.skipped()

    async def _refuse(self, id: int | None, refused: Refused) -> None:
        await self._socket.send_json({"id": id, **refused.body})


def _parse(message: Mapping[str, Any]) -> _Asked:
    """Return a message's content. Raises Refused."""
    text, files = message.get("text"), None
    if text is None:
        text, files = _split(message["bytes"])
    if len(text if isinstance(text, bytes) else text.encode()) > BODY:
        raise Refused(413, f"the message is larger than {BODY >> 20} MiB without a picture", code="too_large")
    try:
        body = Body.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        param = str(first["loc"][0]) if first["loc"] else None
        raise Refused(400, f"{where or 'the message'}: {first['msg']}", param=param) from None
    if body.control_bytes is None:
        return _Asked(body, files)
    if files is None or body.control_bytes > len(files):
        raise Refused(
            400,
            f"control_bytes is {body.control_bytes}, and {len(files or b'')} bytes follow the JSON: the length of the "
            "control image's file was expected, with which the message ends",
            param="control_bytes",
        )
    end = len(files) - body.control_bytes
    return _Asked(body, files[:end] or None, files[end:])


def _split(message: bytes) -> tuple[bytes, bytes]:
    """Return the JSON and the files of a binary message. Raises Refused."""
    if len(message) >= _LENGTH.size:
        end = _LENGTH.size + _LENGTH.unpack_from(message)[0]
        if end <= len(message):
            return message[_LENGTH.size : end], message[end:]
    raise Refused(
        400, "a binary message is the length of its JSON (32 bits, little-endian), the JSON, and a picture's file"
    )


def _id_in(message: Mapping[str, Any]) -> int | None:
    """Return the id of a message that cannot be carried out; None if it has none."""
    try:
        text = message["text"] if message.get("text") is not None else _split(message["bytes"])[0]
        found = pydantic_core.from_json(text[:BODY]).get("id")
    except (Refused, ValueError, AttributeError):
        return None
    return found if type(found) is int and 0 <= found < 2**32 else None
