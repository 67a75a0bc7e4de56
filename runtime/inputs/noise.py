"""PyTorch's CPU noise, value for value, without PyTorch: the same seed gives the same picture.

The algorithms are those of ATen's `DistributionTemplates.h` (`normal_fill`, for 16 values and more) and
`DistributionsHelper.h` (`normal_distribution<double>`, for fewer), over MT19937.
"""

import math
import reprlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.chain.tables import Table
from turbochain.runtime.errors import InputError


class Generator:
    """The stream of `torch.Generator("cpu").manual_seed(seed)`.

    `seed` is an integer in 0 … 2**64-1 (numpy's integers included); like PyTorch, the Mersenne Twister
    takes its low 32 bits. Raises `InputError` for anything else. One generator serves one thread.
    """

    def __init__(self, seed: int):
        # RandomState is MT19937 with the legacy seeding that PyTorch shares; numpy guarantees its stream.
        self._twister = np.random.RandomState(0)
        self.manual_seed(seed)

    def manual_seed(self, seed: int) -> "Generator":
        """Begin the stream of `seed`, as PyTorch's method of this name; much quicker than making another generator."""
        self._twister.seed(check_seed(seed) & 0xFFFFFFFF)
        self._cached: float | None = None
        return self

    def state(self) -> tuple[np.ndarray, int, float | None]:
        """Return the twister's 624 words, how many of them are used, and the value that waits for a small draw."""
        state = self._twister.get_state(legacy=False)["state"]
        return state["key"], state["pos"], self._cached

    def randn(self, *shape: int) -> np.ndarray:
        """Return the next fp32 standard normal values, of `shape`, as `torch.randn(shape, generator=…)` does.

        Within 1e-6 of PyTorch; below 16 values equal to it. As there, a shape of no value takes nothing
        from the stream, and fewer than 16 values are drawn by another algorithm than more.
        """
        count = math.prod(shape)
        values = self._few(count) if count < 16 else self._many(count)
        return values.reshape(shape)

    def _raw(self, count: int) -> np.ndarray:
        """Return the twister's next `count` outputs, uint32."""
        return self._twister.randint(0, 1 << 32, count, dtype=np.uint32)

    def _many(self, count: int) -> np.ndarray:
        """Draw as ATen's `normal_fill`: Box–Muller in fp32 on 24-bit uniforms, in blocks of 8 radii and 8 angles.

        A last partial block is not used: 16 fresh uniforms overwrite the last 16 values instead.
        """
        whole = count - count % 16
        raw = self._raw(count if whole == count else count + 16)
        used = np.concatenate([raw[:whole], raw[count:]]) & np.uint32(0xFFFFFF)
        # By way of int32, which converts to fp32 faster; 24 bits are exact in both.
        uniform = used.view(np.int32).astype(np.float32).reshape(-1, 2, 8) * 2.0**-24

        radius = np.sqrt(-2.0 * np.log(1.0 - uniform[:, 0]))
        angle = 2.0 * math.pi * uniform[:, 1]
        normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
        return np.concatenate([normal[: count - 16], normal[-16:]])

    def _few(self, count: int) -> np.ndarray:
        """Draw as ATen's `normal_distribution<double>`: a pair at a time, rounded to fp32 at the end.

        The sine half of a pair waits for the next small draw, however many large ones come between.
        """
        values = np.empty(count, np.float32)
        for i in range(count):
            if self._cached is not None:
                values[i], self._cached = self._cached, None
                continue
            u1, u2 = self._uniform53(), self._uniform53()
            radius, angle = math.sqrt(-2.0 * math.log1p(-u2)), 2.0 * math.pi * u1
            values[i], self._cached = radius * math.cos(angle), radius * math.sin(angle)
        return values

    def _uniform53(self) -> float:
        """Return a float64 in [0, 1) from 53 bits of two outputs, the high word first."""
        high, low = self._raw(2).tolist()
        return ((high << 32 | low) & ((1 << 53) - 1)) * 2.0**-53


def draw(generators: Sequence[Generator], shape: Sequence[int]) -> np.ndarray:
    """Return fp32 noise of `shape`, batch first, as `diffusers.utils.torch_utils.randn_tensor` draws it.

    One generator draws the whole shape at once; several draw one batch item each. Raises `InputError` when
    there are several, but not one for each item.
    """
    if len(generators) == 1:
        return generators[0].randn(*shape)
    if len(generators) != shape[0]:
        raise InputError(
            f"{len(generators)} generators were given for a batch of {shape[0]}: expected one for the whole "
            "batch, or one for each of its images."
        )
    return np.concatenate([generator.randn(1, *shape[1:]) for generator in generators])


def draw_run(
    chain: OpenChain,
    table: Table,
    generators: Sequence[Generator],
    count: int,
    *,
    given: Mapping[str, np.ndarray] = MappingProxyType({}),
    images: int | None = None,
    masks: int | None = None,
) -> dict[str, np.ndarray]:
    """Return a run's noise by feed, fp32: [count, …], and [rows, count, …] for a feed of every step.

    Of a stream that is [1, rows, …], for a frame whose rows are all in one launch: they are those of several launches.

    The draws are the chain's, in its order, which is that of diffusers' pipeline. `given`: unit noise in place of a
    draw; nothing is drawn for it. A step that does not draw has zeros. `images`, `masks`: how many were given (None:
    one for each picture): what is drawn for these alone (see `PER` in the manifest) is repeated.
    """
    made: dict[str, np.ndarray] = {}
    of_images = count if images is None else images
    drawn = {
        "picture": count,
        "image": of_images if len(generators) == 1 else count,
        "image_alone": of_images,
        "masked_image": max(of_images, count if masks is None else masks),
    }
    for step in chain.chain.draws:
        shape = (count, *chain.tensors[step.name].shape[1:])
        feed = chain.chain.feeds.get(step.name)
        if feed is not None and feed.when == "step":
            made[step.name] = np.zeros((table.rows, *shape), np.float32)
            for row in np.flatnonzero(table.draws_noise):
                made[step.name][row] = draw(generators, shape)
            if chain.chain.stream:
                made[step.name] = made[step.name].swapaxes(0, 1)
            continue
        if step.name in given and not step.discarded:
            noise = given[step.name]
        else:
            rows = drawn[step.per]
            of_rows = draw(generators[:rows] if len(generators) > 1 else generators, (rows, *shape[1:]))
            noise = np.concatenate([of_rows] * (count // rows))
        if feed is not None and not step.discarded:
            made[step.name] = table.init_noise_sigma * noise if feed.scale else noise
    return made


def check_seed(seed: object) -> int:
    """Return `seed` as an int in 0 … 2**64-1; raises InputError for anything else."""
    if isinstance(seed, (int, np.integer)) and not isinstance(seed, bool) and 0 <= seed < 1 << 64:
        return int(seed)
    raise InputError(f"the seed is {reprlib.repr(seed)}: expected an integer from 0 to 2**64-1 ({2**64 - 1})")
