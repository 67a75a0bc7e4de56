"""A schedule as numbers: what the sampler does in every row, without any scheduler code.

Every linear sampler step is `S' = m·S + v·prediction + w·noise`. S has K tensors: the latents and K − 1 of history,
which are zeros at first. K = 1 is Euler, DDIM, LCM, …; multistep solvers have K = 2 to 4.

A chain's table file (safetensors) holds `NAME/FIELD` for every field of each of its tables, and once for all of them
`timesteps` [T] and `columns/COLUMN` [T, …], which depend on the timestep alone, and `constants/COLUMN`, which are the
same in every row.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from turbochain.runtime.bundle.manifest import Chain, TableEntry, Tensor
from turbochain.runtime.errors import BundleError

OWN = {"m": "step", "v": "step", "w": "step", "input_scale": "step", "p": "call", "q": "call"} | {
    "next_p": "step",
    "next_q": "step",
}
"""The columns that a table has itself → when they are fed; others depend on the timestep or the chain alone.

`p` and `q` are those of the row where the run begins; `next_p` and `next_q` those of the row after each one: after the
last one 1 and 0, which is the image without noise.
"""
_CLEAN = np.array([[1, 0]], np.float32)

ARRAYS = ("m", "v", "w", "input_scale", "draws_noise", "start", "init_noise_sigma", "index")
"""The fields of a table that its file has of its own."""


@dataclass(frozen=True, eq=False)
class Table:
    """The rows of one schedule; `rows` evaluations of the network."""

    m: np.ndarray  # [rows, K, K] fp32
    v: np.ndarray  # [rows, K] fp32
    w: np.ndarray  # [rows, K] fp32
    input_scale: np.ndarray  # [rows] fp32: the network reads input_scale·latents
    draws_noise: np.ndarray  # [rows] bool: whether the generator is drawn from in this row
    start: np.ndarray  # [rows, 2] fp32: (p, q) of a run that begins at this row, `latents = p·image_latents + q·noise`
    init_noise_sigma: np.ndarray  # [] fp32: text-to-image begins with `latents = init_noise_sigma·noise`
    timesteps: np.ndarray  # [T] fp32: the distinct timesteps
    index: np.ndarray  # [rows] int32: the row's timestep is timesteps[index]
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)  # by name, what a row reads besides: [rows or 1, …]

    @property
    def rows(self) -> int:
        """Return the number of network evaluations."""
        return len(self.m)

    @property
    def K(self) -> int:
        """Return how many tensors go round the loop: the latents and their history."""
        return int(self.m.shape[1])

    def column(self, name: str) -> np.ndarray:
        """Return the values of a column, [rows, …] fp32, or [1, …] of one that is the same in every row."""
        own = {
            **{"m": self.m, "v": self.v, "w": self.w, "input_scale": self.input_scale},
            **{"p": self.start[:1, :1], "q": self.start[:1, 1:]},
            **dict(zip(("next_p", "next_q"), np.append(self.start[1:], _CLEAN, axis=0).T[..., None], strict=True)),
        }
        return own[name] if name in own else self.columns[name]


def read(path: Path, chain: Chain, columns: Mapping[str, Tensor]) -> dict[str, Table]:
    """Return the tables of `chain` by name from its file, which must have been hashed; raises BundleError.

    `columns`: the columns besides a table's own, and the tensor that each one fills.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path} cannot be read: {error}; build the bundle again with build-engine") from None
    times = arrays["timesteps"].size if "timesteps" in arrays else 0
    if problems := list(dict.fromkeys(_problems(chain, columns, arrays, times))):
        raise BundleError(f"{path} is not what the manifest says: {'; '.join(problems)}")
    return {name: _table(name, chain, columns, arrays) for name in chain.tables}


def _expected(name: str, entry: TableEntry, K: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the dtype and shape of everything that a table has of its own, by its name in the file."""
    rows = entry.rows
    fields = {
        "m": ("float32", (rows, K, K)),
        "v": ("float32", (rows, K)),
        "w": ("float32", (rows, K)),
        "input_scale": ("float32", (rows,)),
        "draws_noise": ("bool", (rows,)),
        "start": ("float32", (rows, 2)),
        "init_noise_sigma": ("float32", ()),
        "index": ("int32", (rows,)),
    }
    return {f"{name}/{field}": expected for field, expected in fields.items()}


def _source(column: str, chain: Chain) -> str:
    """Return a column's name in the file."""
    return f"{'constants' if chain.feeds[column].when == 'call' else 'columns'}/{column}"


def _problems(
    chain: Chain, columns: Mapping[str, Tensor], arrays: Mapping[str, np.ndarray], times: int
) -> Iterator[str]:
    """Find what is missing, of another dtype or shape, not finite, or an index of a timestep that is not there."""
    expected: dict[str, tuple[str, tuple[int, ...]]] = {"timesteps": ("float32", (times,))}
    for name, entry in chain.tables.items():
        expected |= _expected(name, entry, chain.K)
    for column, tensor in columns.items():
        source = _source(column, chain)
        of_row = (1, *tensor.shape[1:]) if chain.stream else tensor.shape  # a stream reads all rows at once
        expected[source] = ("float32", (times, *of_row) if source.startswith("columns/") else tensor.shape)
    for key, (dtype, shape) in expected.items():
        found = arrays.get(key)
        if found is None or (found.dtype.name, found.shape) != (dtype, shape):
            has = "is missing" if found is None else f"is {found.dtype.name} {list(found.shape)}"
            yield f"{key} {has}, and {dtype} {list(shape)} was expected"
        elif not np.isfinite(found).all():
            yield f"{key} holds NaN or infinite values"
        elif key.endswith("/index") and not ((found >= 0) & (found < times)).all():
            yield f"{key} names a timestep that is not there: there are {times}"


def _table(name: str, chain: Chain, columns: Mapping[str, Tensor], arrays: Mapping[str, np.ndarray]) -> Table:
    index, others = arrays[f"{name}/index"], {}
    for column in columns:
        source = _source(column, chain)
        others[column] = _rows(arrays[source], index) if source.startswith("columns/") else arrays[source][None]
    own = {field: arrays[f"{name}/{field}"] for field in ARRAYS}
    return Table(**own, timesteps=arrays["timesteps"], columns=others)


def _rows(column: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Return these rows of a column; a view if they are adjacent, as they mostly are in a run that begins later."""
    first, count = int(index[0]), len(index)
    return column[first : first + count] if (np.diff(index) == 1).all() else column[index]
