"""The dataclasses of `bundle.json` and `engine.json`; `strict_json` reads and writes them.

The field names here are the keys of the files; FORMAT.md says the same in words.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from turbochain.runtime.bundle.hashing import FileRecord

FORMAT_VERSION = 2
"""The bundle format that this version writes, and the only one that it reads."""

TEXT_TO_IMAGE, IMAGE_TO_IMAGE, INPAINTING, STREAM = "text-to-image", "image-to-image", "inpainting", "stream"
"""The tasks. The first chain of a bundle is its default."""

FEATURES = (
    "adapters",
    "control",
    "excerpts",
    "expansions",
    "keep",
    "modes",
    "multistep",
    "quantization",
    "stream",
    "wires",
)
"""The optional features of the format that this version reads."""

PLACES = ("prompt", "image", "step", "end")
"""When a stage runs: once for a prompt, once for a picture that is given, in every step, or once at the end."""

JUDGED = ("text", "image_latents", "residuals", "prediction", "state", "picture")
"""What a stage makes, which decides how verification compares it."""

FEEDS = {
    "ids": ("call",),
    "embeds": ("call",),
    "noise": ("call", "step"),
    "image": ("call",),
    "mask": ("call",),
    "number": ("call", "step"),
    "column": ("call", "step"),
    "adapter": ("held",),
    "zeros": ("call", "held"),
    "history": ("call",),
}
"""What a feed can be → when it can come."""

PER = ("picture", "image", "image_alone", "masked_image")
"""What a draw is made for: every picture; every image that was given, or every picture if each has a generator; every
image that was given, in any case; or every image that a mask makes of these."""

SCALES = ("", "init_noise_sigma")
"""What unit noise can be multiplied by: nothing, or a number of the call's table."""

TEXTS = ("", "negative_prompt")
"""What a feed of ids is made of: the prompt, or another argument of the call."""

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
        """Return the size of its values in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Graph:
    """One ONNX graph, which an engine compiles and stages run."""

    role: str  # text_encoder, text_encoder_2, unet, step, vae_decoder, …
    component: str  # the checkpoint's component that its parameters are of: unet, vae, …
    file: str  # graphs/<graph>.onnx, relative to the bundle
    data: tuple[str, ...]  # its external data files, relative to the bundle
    names: str  # JSON: what became of each parameter of the component: see FEATURES.md
    precision: str  # fp32, fp16 or bf16: what the network inside computes in
    opset: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    model_class: str = ""  # the component's, as diffusers and transformers name it; its bounds may be its own
    remedy: str = ""  # how it is kept right in that precision, or why it is in another than asked for; for people
    features: tuple[str, ...] = ()  # what the graph has beside the plain one of its role: lora, control, …
    size: tuple[int, ...] = ()  # height, width in pixels; () if it is the same for all sizes
    batch: int = 0  # pictures per launch; 0 if it is the same for all batches
    slots: str = ""  # JSON: what of an adapter goes where in lora_down and lora_up; "" if the graph has no slots
    quantization: str = ""  # JSON: what engines in int8 need, see bundle.quantization; "" if none has been built

    @property
    def files(self) -> tuple[str, ...]:
        """Return every file that a backend reads for this graph."""
        return (self.file, *self.data)

    @property
    def all_files(self) -> tuple[str, ...]:
        """Return these, and those that say what is in it."""
        return (*self.files, self.names, *filter(None, (self.slots, self.quantization)))


@dataclass(frozen=True)
class Stage:
    """A place in a chain that runs a graph."""

    graph: str
    when: str  # one of PLACES
    judged: str  # how verification compares its results: one of JUDGED
    wires: dict[str, str] = field(default_factory=dict)  # a tensor of the graph → its name in the chain, if it differs
    if_: tuple[str, ...] = ()  # runs only in calls with all of these modes
    unless: tuple[str, ...] = ()  # does not run in calls with one of these modes

    def runs(self, modes: Collection[str]) -> bool:
        """Return whether a call with these modes runs the stage."""
        return all(mode in modes for mode in self.if_) and not any(mode in modes for mode in self.unless)


@dataclass(frozen=True)
class Feed:
    """An input of a chain that no stage makes."""

    is_: str  # one of FEEDS
    when: str  # "call": once; "step": before every step; "held": only when it changes
    scale: str = ""  # of noise: the number of the table that unit noise is multiplied by
    of: str = ""  # of ids: one of TEXTS


@dataclass(frozen=True)
class Draw:
    """One draw from the generator of a call."""

    name: str  # the feed that gets it; of a discarded draw the tensor that has its shape
    per: str  # one of PER; "picture": of the shape [N, …] for N pictures; "image": for the images given, repeated to N
    discarded: bool = False  # diffusers draws it and does not use it


@dataclass(frozen=True)
class TableEntry:
    """One table of a chain; its numbers are in the chain's table file, under its name (see runtime.chain.tables)."""

    steps: int  # num_inference_steps
    rows: int  # evaluations of the network
    begin: int = 0  # how many steps are skipped
    guidance_scale: float | None = None  # the one that its columns are made for (UNets with a guidance embedding)
    strength: float | None = None  # the one that its timesteps are made for (LatentConsistencyModelImg2ImgPipeline)


@dataclass(frozen=True)
class Chain:
    """The stages of one task at one size, and what the caller feeds."""

    task: str  # text-to-image, …
    size: tuple[int, ...]  # height, width in pixels
    batch: int  # pictures per pass
    K: int  # tensors that go round the loop: the latents and their history
    stages: tuple[Stage, ...]  # in the order in which they run
    feeds: dict[str, Feed]
    draws: tuple[Draw, ...]  # in the order of diffusers' pipeline; that of a "step" feed is repeated for each row
    carry: dict[str, str]  # what a step makes → what the next one reads
    tables_file: str
    tables: dict[str, TableEntry]  # name in the file → table
    output: str  # the name of the result
    modes: tuple[str, ...] = ()  # what a call can switch on
    keep: dict[str, str] = field(default_factory=dict)  # what a call makes → the held feed that the next call reads
    defaults: dict[str, float] = field(default_factory=dict)  # argument of a call → its default
    stream: int = 0  # S, if the S rows of a table are one batch, of a frame each, and not one row after the other

    @property
    def graphs(self) -> tuple[str, ...]:
        """Return the names of the graphs, each once, in the order in which they first run."""
        return tuple(dict.fromkeys(stage.graph for stage in self.stages))


@dataclass(frozen=True)
class TokenizerFile:
    """A fast tokenizer's file and how its output is brought to a fixed length."""

    file: str
    max_length: int  # tokens, start and end markers included
    pad_token: str
    pad_id: int
    expansions: dict[str, int] = field(default_factory=dict)  # added token of several vectors → how many, 2 or more


@dataclass(frozen=True)
class PartOrigin:
    """Where one part of the checkpoint came from: a component with weights, a tokenizer or the scheduler."""

    source: str  # hub id, name of a local folder, or synthetic:…
    revision: str | None  # commit of a hub repository
    variant: str | None  # of its weight files, such as fp16
    license: str | None  # SPDX id or the name on the model card; None if there is none
    terms: tuple[str, ...]  # licence and model card, files of the bundle
    weights: dict[str, FileRecord]  # weight file in the part's folder → size, SHA-256


@dataclass(frozen=True)
class Origin:
    """Where the weights came from."""

    source: str  # of the whole: hub id, name of a local folder, or synthetic:…
    pipeline_class: str  # diffusers' _class_name
    parts: dict[str, PartOrigin]  # component, tokenizer or scheduler → where it came from


@dataclass(frozen=True)
class Manifest:
    """`bundle.json`."""

    format_version: int
    family: str
    requires: dict[str, str]  # optional feature that the bundle uses → the first turbochain that reads it
    checkpoint: Origin
    request: dict[str, Any]  # what the build was asked for: a second build with the same does nothing
    created: str  # UTC, ISO 8601
    created_by: dict[str, str]  # package → version
    tokenizers: dict[str, TokenizerFile]  # chain input that takes the ids → tokenizer
    graphs: dict[str, Graph]
    chains: dict[str, Chain]
    files: dict[str, FileRecord]  # every file of the bundle but bundle.json and engines/


@dataclass(frozen=True)
class Gpu:
    """A GPU; name and memory are None if only the architecture was asked for (`build-engine --target`)."""

    name: str | None
    compute_capability: str  # major.minor, such as "8.9"
    memory_bytes: int | None

    def __str__(self) -> str:
        memory = f", {self.memory_bytes / 2**30:.0f} GiB" if self.memory_bytes else ""
        return f"{self.name or 'any GPU of the architecture'} (sm{self.compute_capability.replace('.', '')}{memory})"


@dataclass(frozen=True)
class EngineKey:
    """What decides whether an engine runs on a machine; the folder's name is made of it.

    `Backend.misfit` says which of it must be equal there.
    """

    backend: str
    device: str  # "cpu" or "cuda"
    library: str  # the distribution that runs it
    version: str
    options: dict[str, Any]
    gpu: Gpu | None = None  # if the device is "cuda"


@dataclass(frozen=True)
class EngineGraph:
    """What was compiled of one graph."""

    digest: str  # of the bundle's files for the graph: Bundle.graph_digest
    files: dict[str, FileRecord]  # in the engine's folder; empty if the backend reads graphs/ directly
    bytes: int  # that the engine reads from disk for this graph
    build_seconds: float
    peak_bytes: int  # resident memory of the process that compiled it


@dataclass(frozen=True)
class Check:
    """One figure of a verification."""

    stage: str  # a graph of the chain, "ids", "schedule" or "image"
    metric: str
    value: float
    bound: float
    passed: bool


@dataclass(frozen=True)
class Engine:
    """`engine.json`."""

    format_version: int
    key: EngineKey
    graphs: dict[str, EngineGraph]
    checks: dict[str, tuple[Check, ...]]  # chain → its verification; a chain that is missing is not verified yet
    verify_peak_bytes: int  # resident memory of the process that verified; 0 if none did
    created: str  # UTC, ISO 8601
    created_by: dict[str, str]
    ordered: dict[str, Any] = field(default_factory=dict)  # the options that differ from the backend's defaults
    settled: dict[str, Any] = field(default_factory=dict)  # options that the verification decided, such as "auto"
    verified: dict[str, str] = field(default_factory=dict)  # chain → OpenChain.digest when it was verified

    @property
    def options(self) -> dict[str, Any]:
        """Return what it runs with."""
        return {**self.key.options, **self.settled}

    @property
    def files(self) -> dict[str, FileRecord]:
        """Return every file in the engine's folder but engine.json."""
        return {name: record for graph in self.graphs.values() for name, record in graph.files.items()}
