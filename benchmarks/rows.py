"""The dataclasses of a results file: runs, and rows of each kind of measurement."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Machine:
    """The host."""

    cpu: str
    cores: int
    memory_bytes: int
    instruction_sets: tuple[str, ...]
    system: str
    python: str


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU as PyTorch and nvidia-smi describe it."""

    name: str
    compute_capability: str
    memory_bytes: int
    driver: str | None
    cuda: str
    cudnn: int | None


@dataclass(frozen=True)
class BenchmarkRun:
    """One command that measured; None stands for what an earlier program did not record."""

    commit: str
    machine: Machine
    versions: dict[str, str]
    date: str | None  # ISO 8601, when it began
    command: str | None
    gpu: Gpu | None = None
    file: str | None = None  # the results file that its rows were merged from; None: it wrote this file itself


@dataclass(frozen=True)
class Spread:
    """Ratios, one of each round, and the interval in which their median lies with a probability of 90%."""

    median: float
    least: float
    most: float
    n: int
    low: float | None = None  # None: of too few rounds, or not recorded by an earlier program
    high: float | None = None


@dataclass(frozen=True)
class Noise:
    """What else the machine did while contenders drew, as shares of its CPU time, and its clock."""

    steal: float  # the hypervisor gave it to other guests
    others: float  # processes that are no contenders
    mhz: tuple[float, float] | None  # the mean of the cores, before and after; None: the system does not say it


@dataclass(frozen=True)
class Check:
    """Pictures against the reference, in levels of 255; `passed` by the bounds of the contender's precision."""

    passed: bool
    psnr: float  # dB; 120 for equal pictures
    mean_abs: float
    max_abs: int
    ssim: float | None = None
    fraction_differing: float | None = None


@dataclass(frozen=True)
class Figures:
    """One contender in one pair."""

    median_seconds: float
    p90_seconds: float
    least_seconds: float
    stages: dict[str, float]  # graph → median seconds of one launch
    load_seconds: float
    first_picture_seconds: float
    peak_rss_bytes: int
    rss_anon_bytes: int
    versions: dict[str, str]
    against_fp32: Check
    p99_seconds: float | None = None  # if there are 20 rounds or more
    gpu_seconds: float | None = None
    gpu_memory_bytes: int | None = None
    precision: dict[str, str] = field(default_factory=dict)  # role of a stage → what it computes in, if known
    remark: str | None = None  # such as why a chain is not one CUDA graph


@dataclass(frozen=True, kw_only=True)
class Row:
    """A measurement."""

    run: int = 0  # index into Result.runs


@dataclass(frozen=True, kw_only=True)
class Pair(Row):
    """Two contenders, interleaved. Without figures, `reason` says why; with them, what is wrong."""

    ours: str
    peer: str
    batch: int
    steps: int
    apart: bool
    task: str = "text-to-image"
    guidance_scale: float = 0.0
    strength: float | None = None
    differs: str | None = None  # what is not like for like
    reason: str | None = None
    ratio: Spread | None = None
    our_figures: Figures | None = None
    peer_figures: Figures | None = None
    clocks: dict[str, dict[str, str]] = field(default_factory=dict)  # "before", "after" → nvidia-smi's values
    noise: Noise | None = None  # on a CPU, with both contenders in memory


@dataclass(frozen=True)
class ColdStart:
    """Medians of one contender's cold starts, in seconds."""

    whole: float
    load: float
    picture: float


@dataclass(frozen=True, kw_only=True)
class Cold(Row):
    """Two contenders' cold starts, interleaved."""

    ours: str
    peer: str
    reason: str | None = None
    ratio: Spread | None = None
    seconds: dict[str, ColdStart] = field(default_factory=dict)  # contender → medians


@dataclass(frozen=True, kw_only=True)
class Growth(Row):
    """The time by the number of steps."""

    ours: str
    seconds: dict[str, float]  # steps → median
    slope_seconds: float
    unet_seconds: float
    ratio: Spread


@dataclass(frozen=True, kw_only=True)
class Batches(Row):
    """The time per picture in larger batches."""

    ours: str
    seconds: dict[str, float]  # pictures in a batch → median seconds per picture
    ratio: dict[str, Spread]
    reasons: dict[str, str]  # batches that failed


@dataclass(frozen=True)
class Ceilings:
    """The best rates of a device."""

    matrix: float  # floating-point operations per second in a large matrix product, on a CPU also in a convolution
    copy: float  # bytes per second, those read plus those written
    dtype: str  # of the matrices
    matrices: dict[str, float]  # shape → rate; `matrix` is the largest
    copies: dict[str, float]  # bytes copied → bandwidth; `copy` is the largest


@dataclass(frozen=True)
class StageFloor:
    """The floor of one stage's launch, and how many launches a call has."""

    flops: int
    bytes: int
    launches: int
    ms: float
    limit: str


@dataclass(frozen=True, kw_only=True)
class Floor(Row):
    """The floor of one call."""

    precision: str
    batch: int
    steps: int
    ceilings: Ceilings
    stages: dict[str, StageFloor]
    ms: float
    cached_ms: float  # without the text encoders


@dataclass(frozen=True, kw_only=True)
class Tried(Row):
    """One variant of one graph (variants.py)."""

    graph: str
    variant: str
    precision: str  # of the backend's own way
    load_seconds: float
    error: float
    seconds: float
    ratio: Spread | None = None  # None: it is the backend's own way
    cache_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Build(Row):
    """A bundle from nothing (build_cost.py), with the JSON that the commands print."""

    precision: str
    build: dict[str, Any]  # build-engine --json
    bench: dict[str, Any]  # steps → turbochain bench --json
    import_seconds: float
    import_rss_bytes: int
    load_seconds: float
    load_weight_bytes: int
    load_peak_rss_anon_bytes: int


@dataclass(frozen=True)
class EngineContent:
    """What an engine of TensorRT consists of."""

    layers: int  # of its inspector: one kernel or a few each
    fused_attentions: int
    fp32_inside: int  # layers that write fp32 alone, and no output of the graph
    kinds: dict[str, int]  # type of layer → how many
    engine_bytes: int


@dataclass(frozen=True)
class Compiled(Row):
    """How TensorRT-RTX compiles a graph: as it is in the bundle, and in the form that build-engine gives it."""

    graph: str
    precision: str
    architecture: str
    as_in_bundle: EngineContent
    rewritten: EngineContent


@dataclass(frozen=True)
class Quantiles:
    """Seconds of one way to be answered."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, kw_only=True)
class Served(Row):
    """A picture that is ready, asked of the server (serve_cost.py)."""

    format: str
    answer_bytes: int  # the body, in which the picture is base64
    clients: int
    rounds: int
    requests: int  # of each way in a round
    server: Quantiles
    echo: Quantiles
    encoding: Quantiles
    own_seconds: tuple[float, ...]  # the server's median less the encoding's, of each round


@dataclass(frozen=True, kw_only=True)
class Adapted(Row):
    """A UNet with slots beside the one without, and what adapters cost besides (adapter_cost.py)."""

    engine: str
    graph: str
    precision: str
    rank: int  # of the slots, and of the adapters that fill them
    matrices: int  # of the UNet that have a slot
    plain_seconds: tuple[float, ...]  # a launch of the UNet without slots, of each round
    slots_seconds: tuple[float, ...]  # with slots, in the same round
    load_seconds: tuple[float, ...]  # load_lora_weights
    swap: Quantiles
    before_a_launch: Quantiles  # what a call does up to the first launch if no adapter has changed
    swaps: int
    rss_before: int  # resident bytes before so many swaps
    rss_after: int
    equal_bits: bool | None = None  # whether equal states gave equal latents, and others other ones; None: not tried


@dataclass(frozen=True, kw_only=True)
class Beside(Row):
    """A UNet's launch beside the plain UNet's (unet_cost.py, web_attention.py)."""

    change: str  # what is not plain, in words
    engine: str  # of the plain one
    precision: str
    plain_seconds: tuple[float, ...]  # the mean of a call's launches, of each round
    changed_seconds: tuple[float, ...]  # in the same round
