"""What `bundle.json` and `engine.json` say, as frozen dataclasses, and the one strict reader for both.

The field names here are the keys of the files; FORMAT.md is the same thing in words. Reading lists every
problem at once: an unknown key, a missing one and a value of the wrong type are all errors.
"""

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from turbochain.runtime.errors import BundleError
from turbochain.runtime.files import FileRecord

FORMAT_VERSION = 1
"""The bundle format that this version writes, and the newest that it reads."""

T = TypeVar("T")


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


def read(kind: type[T], path: Path) -> T:
    """Read `path` (JSON) as the dataclass `kind`; BundleError lists every problem."""
    try:
        value = json.loads(path.read_bytes(), parse_constant=_no_constant)
    except FileNotFoundError:
        raise BundleError(f"{path.parent} is not a bundle: it has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from None
    version = value.get("format_version") if isinstance(value, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise BundleError(
            f"{path} has format version {version}, and this turbochain reads up to {FORMAT_VERSION}: "
            "pip install --upgrade turbochain"
        )
    problems: list[str] = []
    if isinstance(version, int) and version < 1:
        problems.append(f"there is no format version {version}")
    result = _convert(kind, value, "", problems)
    if problems:
        raise BundleError(f"{path} is not valid: " + "; ".join(problems))
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"it holds {name}")


def write(value: Any) -> str:
    """The JSON text of a manifest dataclass (numbers in a row stay on one line)."""
    return _format(dataclasses.asdict(value)) + "\n"


def _format(value: Any, indent: str = "") -> str:
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        items = [f"{deeper}{json.dumps(k)}: {_format(v, deeper)}" for k, v in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list | tuple) and any(isinstance(v, dict) for v in value):
        return "[\n" + ",\n".join(deeper + _format(v, deeper) for v in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)


def _convert(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    """`value` from JSON as `kind`, a dataclass, a container of such, or a plain type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _convert_dataclass(kind, value, where, problems)
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(arguments[0], v, f"{where}[{i}]", problems) for i, v in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {k: _convert(arguments[1], v, f"{where}.{k}", problems) for k, v in value.items()}
    if origin is types.UnionType:
        return None if value is None else _convert(arguments[0], value, where, problems)
    if kind is Any or type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return float(value)
    name = getattr(kind, "__name__", str(kind))
    problems.append(f"{where.lstrip('.') or 'it'} should be {name}, and is {json.dumps(value)[:60]}")
    return None


def _convert_dataclass(kind: Any, value: dict[str, Any], where: str, problems: list[str]) -> Any:
    """A field with a default may be missing: so a later version can add one and still read this version's files."""
    hints = typing.get_type_hints(kind)
    required = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
    prefix = where.lstrip(".") or "the top level"
    problems += [f"{prefix} has the unknown key {k!r}" for k in value if k not in hints]
    problems += [f"{prefix} lacks the key {k!r}" for k in hints if k in required and k not in value]
    known = {k: _convert(h, value[k], f"{where}.{k}", problems) for k, h in hints.items() if k in value}
    return kind(**known) if required <= set(known) else None
