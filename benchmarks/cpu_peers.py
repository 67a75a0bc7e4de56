"""The peers on a CPU beside diffusers and optimum, as drawers: OpenVINO GenAI, FastSD CPU's settings,
stable-diffusion.cpp. See peers.py.
"""

import importlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import Pipe, export
from workload import arguments


class Genai:
    """OpenVINO GenAI's `Text2ImagePipeline`, on optimum's export with OpenVINO's own tokenizers; torch draws noise."""

    def __init__(self, spec: dict[str, Any]) -> None:
        exporter = importlib.import_module("optimum.intel").OVPipelineForText2Image
        folder, genai = export(spec, exporter), importlib.import_module("openvino_genai")
        self._convert_tokenizers(Path(spec["source"]), folder)
        width, height = spec["size"]
        self.given = arguments(spec)
        self.noise = genai.TorchGenerator
        self.pipe = genai.Text2ImagePipeline(str(folder))
        self.pipe.reshape(spec["batch"], height, width, self.given["guidance_scale"])
        self.pipe.compile("CPU", **spec["options"])
        self.stages: dict[str, list[float]] = {}
        self.precision: dict[str, str] = {}
        self.batch, self.size = spec["batch"], {"width": width, "height": height}

    @staticmethod
    def _convert_tokenizers(source: Path, folder: Path) -> None:
        """Write OpenVINO's form of each tokenizer that has none, as optimum-cli does."""
        transformers, openvino = (importlib.import_module(name) for name in ("transformers", "openvino"))
        convert = importlib.import_module("openvino_tokenizers").convert_tokenizer
        for place in sorted(source.glob("tokenizer*")):
            target = folder / place.name / "openvino_tokenizer.xml"
            if not target.exists():
                openvino.save_model(convert(transformers.AutoTokenizer.from_pretrained(place)), target)

    def draw(self, prompts: list[str], seed: int, steps: int) -> Any:
        """Return pictures [B, H, W, 3] uint8; all prompts are the same one."""
        more = {"num_inference_steps": steps, "num_images_per_prompt": self.batch, "generator": self.noise(seed)}
        return self.pipe.generate(prompts[0], **more, **self.size, **self.given).data

    def gpu_seconds(self) -> float | None:
        """Return None: not measured."""
        return None

    def remark(self) -> str | None:
        """Return None: nothing."""
        return None


def fastsd(spec: dict[str, Any]) -> Pipe:
    """Load what FastSD CPU runs: optimum's OpenVINO pipeline with TAESD, in the precision that OpenVINO chooses.

    Raises RuntimeError for a checkpoint with another VAE.
    """
    diffusers, openvino = (importlib.import_module(name) for name in ("diffusers", "openvino"))
    source = Path(spec["source"])
    if json.loads((source / "vae/config.json").read_text())["_class_name"] != "AutoencoderTiny":
        raise RuntimeError("left out: FastSD CPU decodes with the tiny VAE (--vae tiny)")
    kind = importlib.import_module("optimum.intel").OVPipelineForText2Image
    with tempfile.TemporaryDirectory() as folder:
        # optimum exports no AutoencoderTiny, so that a VAE of the same shape stands in for it.
        stand_in = diffusers.AutoencoderKL(
            down_block_types=4 * ("DownEncoderBlock2D",),
            up_block_types=4 * ("UpDecoderBlock2D",),
            block_out_channels=4 * (32,),
            scaling_factor=1.0,
        )
        whole = diffusers.AutoPipelineForText2Image.from_pretrained(source, variant=spec["variant"])
        tiny, whole.vae = whole.vae, stand_in
        whole.save_pretrained(Path(folder) / source.name)
        exported = export({**spec, "source": source, "from": Path(folder) / source.name}, kind)
    pipe = kind.from_pretrained(exported, compile=False, ov_config=spec["options"])
    width, height = spec["size"]
    decoder = openvino.convert_model(_decoder(tiny), example_input=_latents(height, width))
    decoder.inputs[0].get_tensor().set_names({"latent_sample"})
    decoder.outputs[0].get_tensor().set_names({"sample"})
    pipe.vae_decoder.model = decoder
    pipe.reshape(batch_size=-1, height=height, width=width, num_images_per_prompt=1)
    pipe.compile()
    return Pipe(pipe, spec)


def _decoder(vae: Any) -> Any:
    import torch

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vae = vae

        def forward(self, latents: Any) -> Any:
            return self.vae.decode(latents, return_dict=False)[0]

    return Decoder().eval()


def _latents(height: int, width: int) -> Any:
    import torch

    return torch.zeros(1, 4, height // 8, width // 8)


class StableDiffusionCpp:
    """stable-diffusion.cpp, which reads a checkpoint in diffusers' format, and can draw PyTorch's noise.

    Its convolutions are in fp16 whatever the type of the other weights is.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        if spec["batch"] > 1 or "image" in arguments(spec):
            raise RuntimeError("left out: of a batch it draws each picture from a seed of its own, so they differ")
        library = importlib.import_module("stable_diffusion_cpp")
        source = Path(spec["source"])
        config = json.loads((source / "vae/config.json").read_text())
        tiny = source / "vae/diffusion_pytorch_model.safetensors" if config["_class_name"] == "AutoencoderTiny" else ""
        self.pipe = library.StableDiffusion(
            model_path=str(source),
            taesd_path=str(tiny),
            wtype=spec["options"]["wtype"],
            n_threads=len(os.sched_getaffinity(0)),
            rng_type="cpu",
            prediction="eps",
            vae_decode_only=True,
            verbose=False,
        )
        self.scheduler = json.loads((source / "scheduler/scheduler_config.json").read_text())
        self.guidance = arguments(spec)["guidance_scale"]
        self.size = dict(zip(("width", "height"), spec["size"], strict=True))
        self.stages: dict[str, list[float]] = {}
        self.precision: dict[str, str] = {}

    def draw(self, prompts: list[str], seed: int, steps: int) -> Any:
        """Return one picture [1, H, W, 3] uint8."""
        import numpy

        noise = {"seed": seed, "sample_steps": steps, "sigmas": ",".join(map(str, sigmas(self.scheduler, steps)))}
        how = {"sample_method": "euler", "cfg_scale": self.guidance or 1.0, **noise, **self.size}
        return numpy.stack([numpy.asarray(image) for image in self.pipe.generate_image(prompts[0], **how)])

    def gpu_seconds(self) -> float | None:
        """Return None: not measured."""
        return None

    def remark(self) -> str | None:
        """Return None: nothing."""
        return None


def sigmas(scheduler: dict[str, Any], steps: int) -> list[float]:
    """Return what diffusers' EulerDiscreteScheduler of this config goes through in so many steps, with the last 0.

    Raises RuntimeError for other schedulers and spacings.
    """
    import numpy

    known = ("EulerDiscreteScheduler", "trailing", "scaled_linear")
    if tuple(scheduler.get(name) for name in ("_class_name", "timestep_spacing", "beta_schedule")) != known:
        raise RuntimeError("left out: its steps are compared with those of SD-Turbo's scheduler alone")
    count, ends = scheduler["num_train_timesteps"], (scheduler["beta_start"] ** 0.5, scheduler["beta_end"] ** 0.5)
    alphas = numpy.cumprod(1 - numpy.linspace(*ends, count) ** 2)
    times = numpy.round(count - numpy.arange(steps) * count / steps).astype(int) - 1
    return [*((1 - alphas[times]) / alphas[times]) ** 0.5, 0.0]


KINDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "openvino.genai": Genai,
    "fastsd": fastsd,
    "stable-diffusion.cpp": StableDiffusionCpp,
}
"""Contender.kind → what loads it."""
