"""A1111's API, as far as its clients need it. It is lenient: they send values that suit other models."""

import base64
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from turbochain.runtime.inputs.noise import check_seed
from turbochain.runtime.serve.adapters import SUFFIX
from turbochain.runtime.serve.controlnet import Unit, read_unit
from turbochain.runtime.serve.drawings import Drawing, Drawings
from turbochain.runtime.serve.encoding import Encoding, decode_base64
from turbochain.runtime.serve.errors import Refused, of_validation
from turbochain.runtime.serve.infotext import SAMPLER, Used, info, split_loras
from turbochain.runtime.serve.models import Model
from turbochain.runtime.serve.service import DECODERS, Service, off_loop, while_connected
from turbochain.runtime.serve.source import Drawn, Job
from turbochain.runtime.serve.wanted import MOST_PICTURES, Wanted, as_built, requests, seeds

if TYPE_CHECKING:
    from PIL import Image

Side = Annotated[int, Field(ge=1, le=1 << 16)]
SIDE, STRENGTH = 512, 0.75
"""A1111's defaults, for clients that leave them out: one side if the other is given, and an edit's strength."""


class Body(BaseModel):
    """What is read of a request; other fields (sampler_name, override_settings, enable_hr, …) have no effect."""

    model_config = ConfigDict(allow_inf_nan=False)

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = -1  # below 0: one is drawn
    steps: int | None = None
    cfg_scale: float | None = None
    width: Side | None = None
    height: Side | None = None
    batch_size: Annotated[int, Field(ge=1)] = 1
    n_iter: Annotated[int, Field(ge=1)] = 1
    send_images: bool = True
    alwayson_scripts: dict[str, Any] = {}  # of which ControlNet alone is read
    # of img2img
    denoising_strength: float = STRENGTH
    init_images: list[str] = []
    mask: str | None = None
    inpainting_mask_invert: bool = False
    include_init_images: bool = False

    @property
    def wanted(self) -> Wanted:
        """Return the picture that is asked for, without images."""
        unsized = self.width is None and self.height is None
        return Wanted(
            self.prompt,
            negative_prompt=self.negative_prompt,
            size=None if unsized else (self.height or SIDE, self.width or SIDE),
            num_inference_steps=self.steps,
            guidance_scale=self.cfg_scale,
        )

    def decoded(self, name: str, unit: Unit | None) -> Wanted:
        """Return the picture that is asked for at a route. Decodes; raises InputError and Refused."""
        wanted = self.with_images() if name == "img2img" else self.wanted
        return wanted if unit is None else replace(wanted, control=unit.control(wanted.image))

    def with_images(self) -> Wanted:
        """Return the picture that is asked for, with what it starts from. Decodes; raises InputError and Refused."""
        if len(self.init_images) != 1:
            sent = len(self.init_images)
            raise Refused(400, f"init_images: one picture was expected, and {sent} were sent", param="init_images")
        return replace(
            self.wanted,
            image=decode_base64("init_images", self.init_images[0]),
            mask_image=None if self.mask is None else self._mask(self.mask),
            strength=self.denoising_strength,
        )

    def _mask(self, text: str) -> "Image.Image":
        """Return the mask as diffusers': white is repainted. One with transparent places is opaque there."""
        from PIL import ImageOps

        mask = decode_base64("mask", text)
        has_alpha = "A" in mask.getbands() or "transparency" in mask.info
        alpha = mask.convert("RGBA").getchannel("A") if has_alpha else None
        levels = mask.convert("L") if alpha is None or alpha.getextrema() == (255, 255) else alpha
        return ImageOps.invert(levels) if self.inpainting_mask_invert else levels


class _Server:
    """What A1111 keeps: the model that its clients have chosen, for all of them, and what is being drawn."""

    def __init__(self, service: Service) -> None:
        self.service, self.model, self.drawings = service, service.models.first, Drawings()

    def choose(self, sent: object) -> None:
        """Take the model that a client's options name, if there is one with this very name."""
        name = sent.get("sd_model_checkpoint") if isinstance(sent, dict) else None
        if isinstance(name, str):
            self.model = self.service.models.by_name.get(name, self.model)

    async def draw(self, http: HttpRequest, name: str) -> Response:
        """Answer txt2img or img2img."""
        sent, model = await _json(http), self.model
        body = _read(sent)
        unit = read_unit(body.alwayson_scripts)
        decodes = DECODERS if name == "img2img" or unit else None
        wanted = await off_loop(body.decoded, name, unit, threads=decodes)
        jobs = await off_loop(self._jobs, http.scope["client_name"], model, body, wanted)
        chain = model.bundle.open_chain(jobs[0].request.chain)
        drawing = Drawing(name, jobs, chain.passes(jobs[0].request.table))
        with self.drawings.listed(drawing):
            drawn = await while_connected(http, drawing.draw(self.service.source))
        used = [Used.of(model, job.request, body.prompt, unit.told if unit else None) for job in jobs]
        ready = [used[i] for i in drawn]
        images = [await off_loop(_file, drawn[i], used[i]) for i in drawn] if body.send_images else []
        if name == "img2img" and not body.include_init_images:
            sent = {**sent, "init_images": None, "mask": None}
        return _answer({"images": images, "parameters": sent, "info": info(used[0], ready, body.batch_size)})

    def _jobs(self, client: str, model: Model, body: Body, wanted: Wanted) -> list[Job]:
        """Return the pictures of a request, everything checked. Raises InputError and Refused."""
        count, most = body.batch_size * body.n_iter, min(MOST_PICTURES, self.service.settings.queue)
        if count > most:
            raise Refused(400, f"batch_size x n_iter is {count}: at most {most} were expected", param="batch_size")
        of_all = seeds(None if body.seed < 0 else check_seed(body.seed), count)
        prompt, loras = split_loras(wanted.prompt)
        adapters = self.service.models.adapters.chosen(loras)
        made = requests(model.bundle, as_built(model.bundle, replace(wanted, prompt=prompt)), of_all)
        return [Job(model.name, request, client, adapters) for request in made]


def router(service: Service) -> APIRouter:
    """Return the routes below /sdapi/v1."""
    routes, server = APIRouter(prefix="/sdapi/v1"), _Server(service)

    @routes.post("/txt2img")
    async def txt2img(http: HttpRequest) -> Response:
        return await server.draw(http, "txt2img")

    @routes.post("/img2img")
    async def img2img(http: HttpRequest) -> Response:
        return await server.draw(http, "img2img")

    @routes.get("/progress")
    async def progress(http: HttpRequest) -> Response:
        return _answer(server.drawings.progress(http.scope["client_name"]))

    @routes.post("/interrupt")
    async def interrupt(http: HttpRequest) -> Response:
        server.drawings.interrupt(http.scope["client_name"])
        return _answer({})

    @routes.get("/options")
    async def options() -> Response:
        name = server.model.name
        return _answer(
            {"sd_model_checkpoint": name, "sd_checkpoint_hash": "", "sd_vae": "None", "samples_format": "png"}
        )

    @routes.post("/options")
    async def set_options(http: HttpRequest) -> Response:
        server.choose(await _json(http))
        return _answer(None)

    @routes.get("/sd-models")
    async def sd_models() -> Response:
        unknown = {"hash": None, "sha256": None, "config": None}
        names = service.models.by_name
        return _answer([{"title": name, "model_name": name, "filename": name, **unknown} for name in names])

    @routes.get("/loras")
    async def loras() -> Response:
        names = service.models.adapters.by_name
        return _answer([{"name": name, "alias": name, "path": name + SUFFIX, "metadata": {}} for name in names])

    for path, found in _LISTS.items():
        routes.add_api_route(f"/{path}", _list(found))
    return routes


_LISTS: dict[str, list[dict[str, Any]]] = {
    "samplers": [{"name": SAMPLER, "aliases": [], "options": {}}],
    "schedulers": [
        {"name": SAMPLER, "label": SAMPLER, "aliases": None, "default_rho": -1.0, "need_inner_model": False}
    ],
    "upscalers": [{"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 1.0}],
    "latent-upscale-modes": [],
    "sd-vae": [],
    "sd-modules": [],
}
"""What there is to choose from, which is what the bundle was built with."""


def _list(found: list[dict[str, Any]]) -> Any:
    async def answer() -> Response:
        return _answer(found)

    return answer


def _answer(value: object) -> Response:
    # Not JSONResponse: what a client has sent goes back to it, lone surrogates too, which UTF-8 cannot write.
    return Response(json.dumps(value), media_type="application/json")


async def _json(http: HttpRequest) -> Any:
    """Return a body that can be sent back. Raises Refused."""
    try:
        sent = json.loads(await http.body())
        json.dumps([sent], allow_nan=False)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is no JSON, or has numbers that JSON does not have") from None
    return sent


def _read(sent: object) -> Body:
    """Return what is read of a body; a field that is null or empty is one that was left out. Raises Refused."""
    if not isinstance(sent, dict):
        raise Refused(400, "the body is no JSON object: one with a prompt was expected")
    try:
        return Body.model_validate({name: value for name, value in sent.items() if value not in (None, "")})
    except ValidationError as error:
        raise of_validation(error.errors()) from error


def _file(made: Drawn, used: Used) -> str:
    return base64.b64encode(Encoding().encode(made.picture, {"parameters": used.infotext})).decode()
