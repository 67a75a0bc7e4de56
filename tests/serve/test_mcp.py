"""`turbochain mcp`, called by the protocol's own client over stdin and stdout."""

import asyncio
import base64
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import command, program

from turbochain.runtime import Bundle, Pipeline
from turbochain.runtime.serve.adapters import AdapterFolder
from turbochain.runtime.serve.mcp import Tool, make_server


@pytest.mark.full  # a process of its own
def test_the_tool(sd: Path) -> None:
    from mcp import Client, StdioServerParameters  # not in every environment that collects this file

    with Pipeline.load(sd, threads=1) as pipe:
        right = pipe("a cat", seed=7, num_inference_steps=2).images[0]
    expected = io.BytesIO()
    right.save(expected, "JPEG", quality=90)

    async def calls() -> None:
        arguments = ["mcp", str(sd), "--threads", "1", "--backend", "onnxruntime"]
        async with Client(StdioServerParameters(command=str(program("turbochain")), args=arguments)) as client:
            (tool,) = (await client.list_tools()).tools
            assert tool.name == "generate_image" and "64x64" in (tool.description or "")
            wanted = ("prompt", "seed", "num_inference_steps", "negative_prompt", "guidance_scale", "size", "loras")
            assert tuple(tool.input_schema["properties"]) == wanted and tool.input_schema["required"] == ["prompt"]

            async def call(**arguments: Any) -> Any:
                return await client.call_tool("generate_image", arguments)

            drawing = asyncio.create_task(call(prompt="a cat", seed=7, num_inference_steps=2, size="1024x1024"))
            assert (await client.list_tools()).tools == [tool]  # it answers while it loads and draws
            image, text = (await drawing).content
            assert (image.type, image.mime_type, text.type) == ("image", "image/jpeg", "text")
            assert base64.b64decode(image.data) == expected.getvalue()
            assert text.text == "seed 7, size 64x64, 2 step(s)"

            several = await asyncio.gather(*(call(prompt="a cat") for _ in range(3)))
            assert len({answer.content[1].text for answer in several}) == 3  # a seed of its own each
            given_up = [asyncio.create_task(call(prompt="a cat", num_inference_steps=4)) for _ in range(3)]
            await client.list_tools()  # they have been sent
            for task in given_up:
                task.cancel()
            assert (await call(prompt="a cat", seed=8)).content[1].text.startswith("seed 8, ")
            for wrong, why in (
                ({"prompt": "a cat", "num_inference_steps": 9}, "built for these step counts: 1, 2, 3, 4"),
                ({"prompt": "a cat", "size": "large"}, "WIDTHxHEIGHT in pixels was expected"),
                ({"prompt": "a\0"}, "NUL"),
                ({"prompt": "a cat", "seed": -1}, "the seed is -1"),
                ({"seed": 1}, "prompt"),
            ):
                answer = await call(**wrong)
                assert answer.is_error and why in answer.content[0].text

    asyncio.run(calls())


def test_a_call_names_loras(slotted: Path, reference_lora: Path, tmp_path: Path) -> None:
    from mcp import Client

    shutil.copy(reference_lora, tmp_path / "ink.safetensors")

    def load() -> Pipeline:
        return Pipeline.load(slotted, threads=1, backend="onnxruntime")

    async def calls(tool: Tool) -> list[Any]:
        async with Client(make_server(tool)) as client:
            assert "LoRAs: ink." in (await client.list_tools()).tools[0].description  # type: ignore[operator]
            given: tuple[dict[str, float] | None, ...] = ({"ink": 0.8}, None, {"ink": -0.5}, {"oil": 1.0})
            arguments = {"prompt": "a cat", "seed": 7}
            return [await client.call_tool("generate_image", {**arguments, "loras": loras}) for loras in given]

    tool = Tool(Bundle.open(slotted), load, AdapterFolder.open(str(tmp_path)))
    try:
        *answers, refused = asyncio.run(calls(tool))
    finally:
        tool.close()
    assert refused.is_error and "there is no LoRA 'oil': choose from ink" in refused.content[0].text
    with load() as pipe:
        pipe.load_lora_weights(reference_lora, adapter_name="ink")
        for answer, weight in zip(answers, (0.8, 0.0, -0.5), strict=True):
            pipe.set_adapters(["ink"], [weight])
            expected = io.BytesIO()
            pipe("a cat", seed=7).images[0].save(expected, "JPEG", quality=90)
            assert base64.b64decode(answer.content[0].data) == expected.getvalue()


@pytest.mark.full
def test_a_bundle_that_cannot_be_opened_ends_it(tmp_path: Path) -> None:
    done = command("mcp", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert str(tmp_path) in done.stderr
