"""What `bundle.json` and `engine.json` say, as frozen dataclasses, and the one strict reader for both.

The field names here are the keys of the files; FORMAT.md is the same thing in words. Reading lists every
problem at once: an unknown key, a missing one and a value of the wrong type are all errors.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from turbochain.runtime.bundle.hashing import FileRecord

FORMAT_VERSION = 1
"""The bundle format that this version writes, and the newest that it reads."""

TEXT_TO_IMAGE = "text-to-image"
"""The chain that every bundle has."""

REFERENCE = "reference.safetensors"
"""The file with what diffusers produced, in every bundle."""

PRECISIONS = ("fp32", "fp16", "bf16")
"""What a graph may compute in, the most precise first."""

COMPUTED = (*PRECISIONS, "int8")
"""What a backend may compute a graph in, the most precise first."""

DTYPES = ("float32", "float16", "int32", "uint8")


@dataclass(frozen=True)
class Tensor:
    """One end of a wire."""

    name: str
    dtype: str  # a numpy name: float32, float16, int32, uint8
    shape: tuple[int, ...]  # fixed; every size is at least 1

    @property
    def nbytes(self) -> int:
        """What its values take."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Graph:
    """One ONNX graph: a stage that an engine compiles and a chain runs."""

    role: str  # what it does in a chain: text_encoder, text_encoder_2, unet, vae_decoder, …
    component: str  # the checkpoint's component that its parameters are of: unet, vae, …
    file: str  # graphs/<graph>.onnx, relative to the bundle
    data: tuple[str, ...]  # its external data files, relative to the bundle
    names: str  # JSON: what became of each parameter of the component: see FORMAT.md
    precision: str  # fp32, fp16 or bf16: what the network inside computes in
    opset: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    model_class: str = ""  # the component's, as diffusers and transformers name it; its bounds may be its own
    remedy: str = ""  # what makes it right in that precision, or why it is in another than asked for; for people

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that a backend reads for this graph."""
        return (self.file, *self.data)


@dataclass(frozen=True)
class Step:
    """One row of a schedule: `next_latents = a·latents + b·prediction + c·noise`."""

    timestep: float  # as the scheduler gives it to the UNet
    timestep_embedding: tuple[float, ...]  # its sinusoidal embedding, fp32
    input_scale: float  # the network reads input_scale·latents
    a: float
    b: float
    c: float
    draws_noise: bool  # whether the generator is drawn from in this step


@dataclass(frozen=True)
class Schedule:
    """The table of one step count: `latents = p·image_latents + q·noise`, then a row per step."""

    p: float
    q: float
    rows: tuple[Step, ...]


@dataclass(frozen=True)
class Chain:
    """The graphs of one task in order, and what the caller feeds."""

    before: tuple[str, ...]  # graphs that run once, first (their outputs may be cached by the caller)
    loop: tuple[str, ...]  # graphs that run once per step
    after: tuple[str, ...]  # graphs that run once, last
    carry: dict[str, str]  # output of the loop → input of the loop, copied between steps
    inputs: tuple[str, ...]  # fed once per call
    step_inputs: tuple[str, ...]  # fed once per step
    table_inputs: tuple[str, ...]  # columns of the schedule, a row per step: constants of the bundle
    output: str  # the name of the result
    once: tuple[str, ...] = ()  # graphs that read columns alone: run at load for each row, they make further columns
    schedules: dict[str, Schedule] = field(default_factory=dict)  # text-to-image: step count as a decimal → table

    @property
    def graphs(self) -> tuple[str, ...]:
        """The graphs in the order in which they first run."""
        return (*self.once, *self.before, *self.loop, *self.after)


@dataclass(frozen=True)
class TokenizerFile:
    """A fast tokenizer's file and how its output is brought to a fixed length."""

    file: str
    max_length: int  # tokens, start and end markers included
    pad_token: str
    pad_id: int


@dataclass(frozen=True)
class Checkpoint:
    """Where the weights came from."""

    source: str  # hub id, name of a local folder, or synthetic:…
    revision: str | None  # commit of a hub checkpoint
    variant: str | None
    pipeline_class: str  # diffusers' _class_name
    license: str | None  # SPDX id or the name on the model card; None where the checkpoint does not say
    weights: dict[str, FileRecord]  # file in the checkpoint → size, SHA-256


@dataclass(frozen=True)
class Manifest:
    """`bundle.json`."""

    format_version: int
    family: str
    checkpoint: Checkpoint
    request: dict[str, Any]  # what the build was asked for: a second build with the same does nothing
    created: str  # UTC, ISO 8601
    created_by: dict[str, str]  # package → version
    tokenizers: dict[str, TokenizerFile]  # chain input that takes the ids → tokenizer
    graphs: dict[str, Graph]
    chains: dict[str, Chain]
    files: dict[str, FileRecord]  # every file of the bundle but bundle.json and engines/


@dataclass(frozen=True)
class Gpu:
    """A GPU; name and memory are None where only the architecture was asked for (`build-engine --target`)."""

    name: str | None
    compute_capability: str  # major.minor, such as "8.9"
    memory_bytes: int | None

    def __str__(self) -> str:
        memory = f", {self.memory_bytes / 2**30:.0f} GiB" if self.memory_bytes else ""
        return f"{self.name or 'any GPU of the architecture'} (sm{self.compute_capability.replace('.', '')}{memory})"


@dataclass(frozen=True)
class EngineKey:
    """What an engine depends on; `backends.<backend>.misfit` says what of it must be equal on a machine."""

    backend: str
    device: str  # "cpu" or "cuda"
    library: str  # the distribution that runs it
    version: str
    options: dict[str, Any]
    graphs: dict[str, str]  # graph → digest of its files
    gpu: Gpu | None = None  # where the device is "cuda"


@dataclass(frozen=True)
class Check:
    """One figure of a verification."""

    stage: str  # a graph of the chain, "schedule" or "image"
    metric: str
    value: float
    bound: float
    passed: bool


@dataclass(frozen=True)
class Engine:
    """`engine.json`."""

    format_version: int
    key: EngineKey
    files: dict[str, FileRecord]  # relative to the engine's folder; empty where graphs/ is read directly
    bytes: dict[str, int]  # graph → what its engine reads from disk, in bytes
    build_seconds: dict[str, float]  # graph → time its compilation took
    peak_bytes: dict[str, int]  # graph, or "verify" → peak resident memory of the process that did it
    checks: tuple[Check, ...]  # the verification; empty while one built for another machine has not met that machine
    created: str
    created_by: dict[str, str]
    ordered: dict[str, Any] = field(default_factory=dict)  # of the key's options those that are not the defaults
    settled: dict[str, Any] = field(default_factory=dict)  # options that the verification decided, such as "auto"

    @property
    def options(self) -> dict[str, Any]:
        """What it runs with."""
        return {**self.key.options, **self.settled}
