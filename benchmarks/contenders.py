"""The contenders: ours, and the peers. Which exist, what each computes in, and which pairs are measured by default."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from turbochain.runtime.errors import InputError


@dataclass(frozen=True)
class Contender:
    """One way of making a picture; it runs in a process of its own."""

    name: str
    kind: str  # "ours", or one of KINDS in peers.py and cpu_peers.py
    precision: str  # what it computes in
    backend: str = ""  # ours
    options: Mapping[str, Any] = field(default_factory=dict)  # of our engine, or the peer's library's own
    channels_last: bool = False
    tuned: bool = False  # with what diffusers' guide and PyTorch offer besides: see peers.py
    compiled: bool = False  # graphed: the modules are compiled by Inductor
    vae: str = ""  # eager, compiled: "bf16", or "rescaled" to fit fp16 as our export does; "": as diffusers has it
    environment: str = ""  # its folder in .bench/ (make bench-setup); "": the Python that runs the benchmark
    truncates: bool = False  # to levels; diffusers rounds, so that half of the values are one lower
    own_vae: bool = False  # decodes with the checkpoint's own VAE although the others have --vae
    mode: str = ""  # ours: "stages" launches and times them one by one, "cached" keeps the prompt's embeddings

    @property
    def base(self) -> str:
        """Return the name without modifiers."""
        return self.name.split("+")[0]

    @property
    def ours(self) -> bool:
        """Return whether it is turbochain."""
        return self.kind == "ours"

    @property
    def bundle_precision(self) -> str:
        """Return the precision that our bundle is exported in; backends on a CPU reduce it by themselves."""
        return "fp16" if self.precision == "fp16" else "fp32"

    @property
    def differs(self) -> str | None:
        """Return as a phrase what is not like for like."""
        if self.own_vae:
            return "the peer decodes with the checkpoint's own VAE"
        if self.vae == "rescaled":
            return "the peer's VAE is rescaled to fp16 as ours is"
        return {"stages": "stages launched one by one", "cached": "the prompt is known, so no text encoder runs"}.get(
            self.mode
        )


def _openvino(name: str, precision: str, **options: Any) -> Contender:
    return Contender(name, "ours", precision, "openvino", options)


def _optimum_intel(precision: str, hint: str) -> Contender:
    options = {"INFERENCE_PRECISION_HINT": hint, "CACHE_DIR": ""}
    name, kind = f"optimum-intel-{precision}", "optimum.intel"
    return Contender(name, kind, precision, options=options, environment="optimum-intel")


def _genai(precision: str, hint: str) -> Contender:
    options = {"INFERENCE_PRECISION_HINT": hint, "CACHE_DIR": ""}
    return Contender(
        f"openvino-genai-{precision}",
        "openvino.genai",
        precision,
        options=options,
        truncates=True,
        environment="optimum-intel",
    )


def _cpp(wtype: str, precision: str) -> Contender:
    name = "stable-diffusion-cpp"
    return Contender(f"{name}-{wtype}", "stable-diffusion.cpp", precision, options={"wtype": wtype}, environment=name)


CONTENDERS = {
    contender.name: contender
    for contender in (
        _openvino("openvino-bf16", "bf16", inference_precision="bf16"),
        _openvino("openvino-fp32", "fp32", inference_precision="fp32"),
        _openvino("openvino-int8", "int8", inference_precision="bf16", int8="vae"),  # the name of before there was more
        _openvino("openvino-int8-all", "int8", inference_precision="bf16", int8="all"),
        _openvino("openvino-fp32-vae-int8", "int8", inference_precision="fp32", int8="vae"),
        _openvino("openvino-fp32-int8-all", "int8", inference_precision="fp32", int8="all"),
        Contender("onnxruntime-fp32", "ours", "fp32", "onnxruntime"),
        Contender("onnxruntime-int8-all", "ours", "int8", "onnxruntime", {"int8": "all"}),
        Contender("onnxruntime-fp16", "ours", "fp16", "onnxruntime"),
        Contender("onnxruntime-fp16-nhwc", "ours", "fp16", "onnxruntime", {"prefer_nhwc": True}),
        Contender("tensorrt-fp16", "ours", "fp16", "tensorrt"),
        Contender("eager-fp32", "eager", "fp32"),
        Contender("eager-bf16", "eager", "bf16"),
        Contender("eager-bf16-channels-last", "eager", "bf16", channels_last=True),
        Contender("eager-fp16", "eager", "fp16"),
        Contender("eager-fp16-tuned", "eager", "fp16", channels_last=True, tuned=True),
        Contender("compiled-fp32", "compiled", "fp32", channels_last=True),
        Contender("compiled-bf16", "compiled", "bf16", channels_last=True),
        Contender("compiled-fp16", "compiled", "fp16", channels_last=True, tuned=True),
        Contender("graphed-fp16", "graphed", "fp16", channels_last=True, tuned=True),
        Contender("graphed-compiled-fp16", "graphed", "fp16", channels_last=True, tuned=True, compiled=True),
        Contender("optimum-onnx", "optimum.onnxruntime", "fp32", environment="optimum-onnx"),
        _optimum_intel("fp32", "f32"),
        _optimum_intel("bf16", "bf16"),
        _genai("fp32", "f32"),
        _genai("bf16", "bf16"),
        Contender("fastsd", "fastsd", "bf16", options={"CACHE_DIR": ""}, environment="optimum-intel"),
        _cpp("f32", "fp16"),  # its convolutions are in fp16
        _cpp("f16", "fp16"),
        _cpp("q8_0", "int8"),
    )
}
REFERENCE = CONTENDERS["eager-fp32"]
"""The contender whose pictures the others' are compared with."""

MODIFIERS: dict[str, dict[str, Any]] = {
    "own-vae": {"own_vae": True},
    "bf16-vae": {"vae": "bf16"},
    "rescaled-vae": {"vae": "rescaled"},
    "stages": {"mode": "stages"},
    "cached": {"mode": "cached"},
}
"""What may follow a name, such as "tensorrt-fp16+cached"."""


def find(name: str) -> Contender:
    """Return the contender with a name and its modifiers; InputError if there is none."""
    base, *modifiers = name.split("+")
    if base not in CONTENDERS or not set(modifiers) <= set(MODIFIERS):
        raise InputError(
            f"there is no contender {name}: choose from {', '.join(CONTENDERS)}, followed by "
            f"{', '.join(f'+{m}' for m in MODIFIERS)} if wanted"
        )
    found = CONTENDERS[base]
    for modifier in modifiers:
        found = replace(found, name=name, **MODIFIERS[modifier])
    return found


@dataclass(frozen=True)
class Defaults:
    """What is measured on a kind of device, unless options say otherwise."""

    pairs: tuple[str, ...]
    cold: tuple[str, ...]
    steps: tuple[int, ...]
    batch: tuple[int, ...]
    batches: tuple[int, ...]
    runs: int
    most_runs: int
    warmup: int
    turns: int | None  # None: both of a pair are in memory at once
    floors: tuple[str, ...]  # the precisions that floors are measured in, if a contender computes in them


CPU = Defaults(
    pairs=(
        "openvino-bf16:eager-bf16-channels-last",
        "openvino-bf16:eager-fp32",
        "openvino-fp32:eager-fp32",
        "onnxruntime-fp32:eager-fp32",
        "openvino-int8:eager-bf16-channels-last",
        "openvino-int8-all:eager-bf16-channels-last",
        "openvino-fp32-vae-int8:eager-fp32",
        "openvino-fp32-int8-all:eager-fp32",
        "onnxruntime-int8-all:eager-fp32",
        "openvino-bf16:optimum-intel-bf16",
        "openvino-fp32:optimum-intel-fp32",
        "openvino-bf16:openvino-genai-bf16",
        "openvino-fp32:openvino-genai-fp32",
        "openvino-bf16:fastsd",
        "openvino-fp32:fastsd",
        "openvino-fp32:stable-diffusion-cpp-f32",
        "openvino-fp32:stable-diffusion-cpp-f16",
        "openvino-int8-all:stable-diffusion-cpp-q8_0",
        "openvino-fp32:optimum-onnx",
        "onnxruntime-fp32:optimum-onnx",
        "openvino-bf16:compiled-bf16",
        "openvino-fp32:compiled-fp32",
    ),
    cold=(
        "onnxruntime-fp32:eager-fp32",
        "openvino-fp32:eager-fp32",
        "openvino-bf16:eager-bf16-channels-last",
    ),
    steps=(1,),
    batch=(1,),
    batches=(2, 4, 8),
    runs=7,
    most_runs=21,
    warmup=0,
    turns=None,
    floors=("bf16", "fp32"),
)
GPU = Defaults(
    pairs=(
        "tensorrt-fp16:eager-fp16",
        "tensorrt-fp16:eager-fp16-tuned",
        "tensorrt-fp16:eager-fp16-tuned+bf16-vae",
        "tensorrt-fp16:eager-fp16-tuned+rescaled-vae",
        "tensorrt-fp16:compiled-fp16",
        "tensorrt-fp16:compiled-fp16+bf16-vae",
        "tensorrt-fp16:compiled-fp16+rescaled-vae",
        "tensorrt-fp16:graphed-fp16",
        "tensorrt-fp16:graphed-compiled-fp16",
        "onnxruntime-fp16:eager-fp16",
        "onnxruntime-fp16-nhwc:onnxruntime-fp16",
        "tensorrt-fp16:onnxruntime-fp16",
        "tensorrt-fp16+cached:tensorrt-fp16",
        "tensorrt-fp16+stages:tensorrt-fp16",
        "onnxruntime-fp16+stages:onnxruntime-fp16",
    ),
    cold=("tensorrt-fp16:eager-fp16",),
    steps=(1, 2, 4),
    batch=(1, 4),
    batches=(),
    runs=50,
    most_runs=50,
    warmup=5,
    turns=2,
    floors=("fp16",),
)


def defaults(device: str) -> Defaults:
    """Return what is measured on "cpu", or on "cuda" and "cuda:N"."""
    return CPU if device == "cpu" else GPU
