"""The command `turbochain mcp`: a server of the Model Context Protocol over stdin and stdout, with one tool."""

import argparse
import importlib.metadata
import importlib.util
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any

from turbochain.runtime.bundle.manifest import TEXT_TO_IMAGE
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.errors import BackendMissing, TurbochainError
from turbochain.runtime.inputs.noise import check_seed
from turbochain.runtime.pipeline import Pipeline
from turbochain.runtime.request import Request
from turbochain.runtime.serve.adapters import AdapterFolder, Chosen, PipelineAdapters
from turbochain.runtime.serve.encoding import Encoding
from turbochain.runtime.serve.wanted import Wanted, parse_size, request, seeds

if TYPE_CHECKING:
    from mcp.server import MCPServer

JPEG = Encoding("jpeg")
"""How a picture is sent: as PNG a large one exceeds what some clients take from a tool."""


def add_arguments(parser: Any) -> None:
    """Add the options of the command, beside the bundle."""
    parser.add_argument("--backend", help="default: the best engine in the bundle that fits this machine")
    parser.add_argument("--device", help="default: the backend's own choice")
    parser.add_argument("--threads", type=int, help="CPU threads per launch (default: the backend's own choice)")
    parser.add_argument("--lora-dir", metavar="DIR", help="LoRA files (*.safetensors) that the tool may add")


def mcp(arguments: argparse.Namespace) -> None:
    """Serve until stdin ends. Raises InputError if the bundle cannot be opened, or draws no text."""
    if importlib.util.find_spec("mcp") is None:
        raise BackendMissing("the package mcp is not installed: pip install 'turbochain[mcp]'")
    bundle = Bundle.open(arguments.bundle, trust_engines=arguments.trust_engines)
    names = ("backend", "device", "threads", "trust_engines")
    how = {name: getattr(arguments, name) for name in names}
    adapters = AdapterFolder.open(arguments.lora_dir)
    tool = Tool(bundle, lambda: Pipeline.load(arguments.bundle, chain=_first(bundle), **how), adapters)
    try:
        make_server(tool).run()
    finally:
        tool.close()


class Tool:
    """Draws in a thread of its own, which loads the model first, so that the protocol stays alive."""

    def __init__(self, bundle: Bundle, load: Callable[[], Pipeline], adapters: AdapterFolder) -> None:
        """Begin to load: `load()` returns the pipeline; `adapters`: the LoRA files that a call may name."""
        self._bundle, self._thread = bundle, ThreadPoolExecutor(1, "turbochain-mcp")
        self._loaded: Future[Pipeline] = self._thread.submit(load)
        self._adapting = self._thread.submit(lambda: PipelineAdapters(adapters, self._loaded.result()))
        self.adapters = adapters

    async def draw(self, request: Request, chosen: Chosen = ()) -> bytes:
        """Return the file of a picture with these adapters. If the task that awaits this is cancelled, so is the
        drawing. Raises InputError if the model cannot draw with them."""
        import asyncio  # every command imports this module, and needs none of it

        unwanted = threading.Event()

        def made() -> bytes:
            self._adapting.result().use(chosen)
            (picture,) = self._loaded.result().draw(request, cancel=unwanted.is_set).images
            return JPEG.encode(picture)

        try:
            return await asyncio.wrap_future(self._thread.submit(made))
        finally:
            unwanted.set()

    def request(self, wanted: Wanted, seed: int | None) -> Request:
        """Return the request of a picture. Raises InputError."""
        (drawn,) = seeds(None if seed is None else check_seed(seed), 1)
        return request(self._bundle, wanted, drawn)

    def told(self, made: Request) -> str:
        """Return what a model that calls the tool should know about its picture."""
        chain = self._bundle.open_chain(made.chain)
        height, width = chain.size
        return f"seed {made.seeds[0]}, size {width}x{height}, {chain.chain.tables[made.table].steps} step(s)"

    @property
    def choices(self) -> str:
        """Return the sizes, the step counts and the LoRAs that there are."""
        sizes = ", ".join(f"{width}x{height}" for height, width in self._bundle.sizes(TEXT_TO_IMAGE))
        steps = ", ".join(map(str, self._bundle.open_chain(_first(self._bundle)).steps))
        loras = f" LoRAs: {', '.join(self.adapters.by_name)}." if self.adapters.by_name else ""
        return f"Sizes: {sizes}. Step counts: {steps}.{loras}"

    def close(self) -> None:
        """Give back the model's memory."""
        self._thread.shutdown(cancel_futures=True)
        if self._loaded.done() and not self._loaded.cancelled() and self._loaded.exception() is None:
            self._loaded.result().close()


def make_server(tool: Tool) -> "MCPServer":
    """Return the server of a tool. Raises InputError if the bundle draws no text."""
    from mcp.server.mcpserver import Image, MCPServer
    from mcp.server.mcpserver.exceptions import ToolError
    from pydantic import Field

    server = MCPServer("turbochain", version=importlib.metadata.version("turbochain"), log_level="WARNING")
    description = f"Draw a picture of a text. {tool.choices} Another size is drawn at the nearest of these."

    @server.tool(description=description, structured_output=False)
    async def generate_image(
        prompt: Annotated[str, Field(description="what to draw")],
        seed: Annotated[int | None, Field(description="0 to 2**64-1; the same one draws the same picture")] = None,
        num_inference_steps: Annotated[int | None, Field(description="more steps draw finer pictures")] = None,
        negative_prompt: Annotated[str | None, Field(description="what not to draw, if there is guidance")] = None,
        guidance_scale: Annotated[float | None, Field(description="above 1: with guidance")] = None,
        size: Annotated[str | None, Field(description="WIDTHxHEIGHT in pixels, or auto")] = None,
        loras: Annotated[dict[str, float] | None, Field(description="LoRAs to draw with, each with its scale")] = None,
    ) -> list[Image | str]:
        try:
            wanted = Wanted(
                prompt,
                negative_prompt=negative_prompt,
                size=parse_size(size or "auto"),
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
            )
            made = tool.request(wanted, seed)
            chosen = tool.adapters.chosen((loras or {}).items())
            return [Image(data=await tool.draw(made, chosen), format=JPEG.format), tool.told(made)]
        except TurbochainError as error:
            raise ToolError(str(error)) from error

    return server


def _first(bundle: Bundle) -> str:
    return bundle.find_chain(TEXT_TO_IMAGE, bundle.sizes(TEXT_TO_IMAGE)[0], 1)
