"""Generators in a call: `torch.Generator("cpu")` as in diffusers, known by what it can do, or the seed of one."""

from typing import Any, Protocol, runtime_checkable

import numpy as np

from turbochain.runtime.errors import InputError
from turbochain.runtime.inputs.noise import Generator, check_seed

_STATE = np.dtype(
    [
        *(("seed", "<u8"), ("left", "<i4"), ("seeded", "<i4"), ("next", "<u8"), ("key", "<u8", 624)),
        *(("unused", "<f8"), ("normal", "<f8"), ("unused_2", "<f8"), ("has_normal", "<i4"), ("rest", "V12")),
    ]
)
"""The bytes of PyTorch's `Generator.get_state()`: those of `CPUGeneratorImplState` in ATen."""


@runtime_checkable
class TorchGenerator(Protocol):
    """The part of `torch.Generator` that is used here."""

    device: Any

    def initial_seed(self) -> int:
        """Return the seed that the stream began with."""

    def manual_seed(self, seed: int) -> Any:
        """Begin the stream of a seed, and return the generator."""

    def get_state(self) -> Any:
        """Return the state, a tensor of bytes."""

    def set_state(self, state: Any) -> Any:
        """Take over a state."""


def seeds_of(generator: object) -> int | list[int]:
    """Return a generator's seed, or the seeds of a list of generators.

    Raises InputError for one that is not on the CPU, that has been drawn from, or that stands twice in the list: the
    noise would differ from diffusers'.
    """
    if not isinstance(generator, list | tuple):
        return _seed_of(generator)
    known = [id(one) for one in generator if isinstance(one, TorchGenerator)]
    if len(set(known)) != len(known):
        raise InputError("generator: one generator stands twice in the list; give each picture one of its own")
    return [_seed_of(one) for one in generator]


def _seed_of(generator: Any) -> int:
    if isinstance(generator, int | np.integer):
        return check_seed(generator)
    if not isinstance(generator, TorchGenerator):
        raise InputError(
            f"generator is of type {type(generator).__name__}: a torch.Generator, an integer, or a list with one of "
            "these for each picture was expected"
        )
    mend = 'give torch.Generator("cpu").manual_seed(seed), or seed=seed'
    if str(generator.device) != "cpu":
        raise InputError(f"the generator is on {generator.device}, and the noise is that of the CPU: {mend}")
    seed = generator.initial_seed()
    fresh = type(generator)().manual_seed(seed)
    if not np.array_equal(np.asarray(generator.get_state()), np.asarray(fresh.get_state())):
        raise InputError(f"the generator has been drawn from, and its noise cannot be continued here: {mend}")
    return int(seed)


def advance(generator: object, stream: Generator) -> None:
    """Bring a caller's generator to where `stream` is, so that a second call does not repeat its noise unnoticed.

    A seed stays as it is.
    """
    if not isinstance(generator, TorchGenerator):
        return
    tensor, (key, used, normal) = generator.get_state(), stream.state()
    state = np.asarray(tensor).view(_STATE)  # in the tensor's memory
    if np.array_equal(state["key"][0], key):  # nothing was drawn: the first draw makes another key
        return
    state["key"], state["next"], state["left"] = key, used, len(key) + 1 - used
    state["normal"], state["has_normal"] = (0.0, 0) if normal is None else (normal, 1)
    generator.set_state(tensor)
