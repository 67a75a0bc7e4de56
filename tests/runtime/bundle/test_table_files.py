"""A table file that is not sound: refused with every problem named."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import called
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file
from safetensors.torch import save_file as save_torch_file
from tampering import TABLE, refusal, rehash

Arrays = dict[str, np.ndarray]


def change(key: str, how: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], object]:
    return lambda arrays: arrays.update({key: how(arrays[key])})


def hold(key: str, value: float) -> Callable[[Arrays], object]:
    return change(key, lambda array: np.append(array.ravel()[:-1], array.dtype.type(value)).reshape(array.shape))


TIME = "columns/time_projections"
TIMES = len({999, 499, 666, 332, 749, 249})  # of 1 to 4 steps with a trailing spacing
TABLE_EDITS = {
    "dtype": (change("2/m", np.float64), "2/m is float64 [2, 1, 1], and float32 [2, 1, 1] was expected"),
    "half precision": (change(TIME, np.float16), f"{TIME} is float16 ["),
    "no flags": (change("4/draws_noise", np.uint8), "4/draws_noise is uint8 [4], and bool [4] was expected"),
    "long index": (change("1/index", np.int64), "1/index is int64 [1], and int32 [1] was expected"),
    "shape": (change("2/v", np.ravel), "2/v is float32 [2], and float32 [2, 1] was expected"),
    "row too few": (change("3/w", lambda w: w[1:]), "3/w is float32 [2, 1], and float32 [3, 1] was expected"),
    "number that is a row": (change("1/init_noise_sigma", np.atleast_1d), "1/init_noise_sigma is float32 [1], and"),
    "missing": (lambda arrays: arrays.pop("4/start"), "4/start is missing, and float32 [4, 2] was expected"),
    "NaN": (hold("1/v", np.nan), "1/v holds NaN or infinite values"),
    "infinite": (hold("2/input_scale", np.inf), "2/input_scale holds NaN or infinite values"),
    "NaN in a column": (hold(TIME, np.nan), f"{TIME} holds NaN or infinite values"),
    "NaN as a timestep": (hold("timesteps", np.nan), "timesteps holds NaN or infinite values"),
    "index too large": (hold("2/index", TIMES), f"2/index names a timestep that is not there: there are {TIMES}"),
    "index below zero": (hold("2/index", -1), f"2/index names a timestep that is not there: there are {TIMES}"),
    "no timesteps": (lambda arrays: arrays.pop("timesteps"), "timesteps is missing, and float32 [0] was expected"),
    "timesteps of a wrong shape": (
        change("timesteps", np.atleast_2d),
        f"timesteps is float32 [1, {TIMES}], and float32 [{TIMES}] was expected",
    ),
    "one timestep that is no list": (change("timesteps", lambda t: t[0]), "timesteps is float32 [], and float32 [1]"),
    "no column": (lambda arrays: arrays.pop(TIME), f"{TIME} is missing, and float32 [{TIMES}, 1, "),
    "short column": (change(TIME, lambda column: column[..., 1:]), f"{TIME} is float32 [{TIMES}, 1, "),
    "timestep without a column": (change(TIME, lambda column: column[1:]), f"{TIME} is float32 [{TIMES - 1}, 1, "),
}


@pytest.mark.parametrize("case", TABLE_EDITS)
def test_tables_that_are_not_sound(sd: Path, copy_of, case: str) -> None:
    bundle, (edit, expected) = copy_of(sd), TABLE_EDITS[case]
    arrays = load_file(bundle / TABLE)
    edit(arrays)
    save_file(
        {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}, bundle / TABLE
    )
    rehash(bundle, TABLE)
    message = refusal(bundle)
    assert expected in message and f"{bundle / TABLE} is not what the manifest says" in message


def in_bfloat16(path: Path) -> None:
    save_torch_file({n: t.bfloat16() if n == "1/m" else t for n, t in load_torch_file(path).items()}, path)


NO_TABLES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "header": lambda path: path.write_bytes(b"\xff" * 100),
    "bfloat16": in_bfloat16,
}


@pytest.mark.parametrize("case", NO_TABLES)
def test_a_table_file_that_cannot_be_read(sd: Path, copy_of, case: str) -> None:
    """Its hash is right."""
    bundle = copy_of(sd)
    NO_TABLES[case](bundle / TABLE)
    rehash(bundle, TABLE)
    message = refusal(bundle)
    assert str(bundle / TABLE) in message and ("cannot be read" in message or "1/m is " in message)
    assert command_refuses("inspect", bundle) and command_refuses("verify", bundle)


def command_refuses(*words: object) -> bool:
    done = called("turbochain", *words)
    return (done.returncode, done.stdout) == (2, "") and TABLE in done.stderr


def test_every_problem_of_a_table_file_is_listed_once(sdxl: Path, copy_of) -> None:
    bundle = copy_of(sdxl)
    arrays = load_file(bundle / TABLE)
    arrays["1/m"] = arrays["1/m"][:0]
    for name in ("2/v", "constants/time_ids_embeds", "columns/time_embeds"):
        del arrays[name]
    save_file(arrays, bundle / TABLE)
    rehash(bundle, TABLE)
    message = refusal(bundle)
    for name in ("1/m", "2/v", "constants/time_ids_embeds", "columns/time_embeds"):
        assert message.count(f"{name} is ") == 1, name
