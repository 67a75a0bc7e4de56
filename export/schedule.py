"""A diffusers scheduler → tables, found by probing the scheduler object itself.

A sampler step is linear in what it reads: `S' = m·S + v·prediction + w·noise`, S being the latents and K − 1 tensors
of history. No formula of any scheduler is written down here. Its `step` runs once on tensors whose elements are a
basis (each row's sample, prediction and noise), so that an element of the result is a coefficient. H_i, the
coefficients of all results from row i on for the basis before row i, has a rank: as many tensors of history must reach
row i (the minimal realization of a linear system, Ho and Kalman 1966). Whole runs of the scheduler are then compared.
"""

import copy
import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from turbochain.export.run import SamplerRun
from turbochain.export.sampler import Draw, Sampler, drawing, refusal
from turbochain.runtime.chain.tables import Table
from turbochain.runtime.errors import InputError

_RANK = 1e-7  # history that weighs less than this part of a result is below fp32's rounding; the probe's is 5e-16
_TOLERANCE = 1e-4
"""The largest relative L2 distance of a step. Most schedulers lose 1e-7 in fp32, and those that cancel up to 2.6e-5
(DEIS with flow sigmas); one that clips at 0.5 to 1000 is off by 0.26 or more."""
_CLIPPING = ("clip_sample", "thresholding", "clip_denoised")
_SHAPE = (2, 4, 4, 4)  # two pictures, so that a scheduler that mixes them is noticed
_RUNS = ((1.0, False), (1000.0, True))  # amplitude, replaced samples; clipping shows at one of the amplitudes


def tabulate(scheduler: Any, run: SamplerRun) -> Table:
    """Return the table of `scheduler` (a diffusers scheduler, left as it is) for a run.

    Row 0 is the scheduler's row `run.begin * scheduler.order`, with no history. Image-to-image begins with (p, q) of
    `start[0]`; inpainting blends in those of `start[i + 1]` after row i. Raises InputError if the pipelines could not
    call the scheduler, or if it is not linear.
    """
    try:
        return _checked(scheduler, run)
    except InputError as error:
        if not (options := [name for name in _CLIPPING if scheduler.config.get(name)]):
            raise
        if not _is_linear(_without(scheduler, options), run):
            raise
        named = " and ".join(f"{name}={scheduler.config[name]!r}" for name in options)
        off = json.dumps(dict.fromkeys(options, False))
        remedy = f"set {' and '.join(options)} to false with --scheduler '{off}' (add \"_class_name\" for a class), or "
        reason = f"has {named} in its config, and clipping is not linear"
        raise refusal(type(scheduler).__name__, reason, remedy) from error


def pad(table: Table, K: int) -> Table:
    """Return `table` with K tensors going round the loop, the added ones of zeros; K is at least the table's."""
    more = K - table.K
    return replace(
        table,
        m=np.pad(table.m, ((0, 0), (0, more), (0, more))),
        v=np.pad(table.v, ((0, 0), (0, more))),
        w=np.pad(table.w, ((0, 0), (0, more))),
    )


def _checked(scheduler: Any, run: SamplerRun) -> Table:
    """Return the table; InputError if a run of the scheduler differs from the table's."""
    sampler = Sampler(scheduler, run)
    table = _realize(copy.deepcopy(sampler), _probe(copy.deepcopy(sampler)))
    for amplitude, replaced in _RUNS:
        error = _trajectory_error(copy.deepcopy(sampler), table, amplitude, replaced)
        if not error <= _TOLERANCE:
            raise refusal(sampler.name, f"computes something that is not linear (a run differs by {error:.2g})")
    return table


@dataclass(frozen=True, eq=False)
class _Response:
    """What a scheduler's run made of the basis x_0, e_0, n_0, x_1, … (each row's sample, prediction and noise)."""

    coefficients: np.ndarray  # [rows, 3·rows] fp64: row i is the result of step i; zeros from column 3·(i + 1) on
    input_scale: np.ndarray  # [rows] fp64
    drawn: np.ndarray  # [rows] bool


def _probe(sampler: Sampler) -> _Response:
    """Run the scheduler over the basis; InputError if it reads, draws or makes something else."""
    rows = len(sampler.timesteps)
    # The last element is zero in every tensor: what comes out there is of the scheduler's own making.
    basis = torch.eye(3 * rows, 3 * rows + 1, dtype=torch.float64).reshape(rows, 3, 1, 1, 1, -1)
    results, scales, drawn = [], [], []
    for t, (sample, prediction, noise) in zip(sampler.timesteps, basis, strict=True):
        draws: list[torch.Tensor] = []
        scaled = sampler.scale(sample, t)
        with drawing(sampler.scheduler, lambda _: _basis_noise(noise, draws)):  # noqa: B023 (called within this iteration)
            results.append(sampler.step(prediction, t, sample, torch.Generator("cpu")).flatten())
        if len(draws) > 1:
            raise refusal(sampler.name, f"draws noise {len(draws)} times in one step")
        drawn.append(bool(draws))
        scales.append(float(scaled.sum()))
        if not torch.allclose(scaled.double(), scales[-1] * sample, rtol=1e-6, atol=0):
            raise refusal(sampler.name, "does not scale the latents by one number before the network reads them")
    made = torch.stack(results).double().numpy()
    if not (np.isfinite(made).all() and np.isfinite(scales).all()):
        raise refusal(sampler.name, f"makes NaN or infinity of its latents in {rows} rows")
    if made[:, -1].any():
        raise refusal(sampler.name, "adds noise that is not the generator's (as a random Brownian tree does)")
    return _Response(made[:, :-1], np.array(scales), np.array(drawn))


def _basis_noise(noise: torch.Tensor, draws: list[torch.Tensor]) -> Draw:
    """Return a stand-in for `randn_tensor` that gives `noise` and adds it to `draws`."""

    def draw(shape: Any, *_: Any, **__: Any) -> torch.Tensor:
        draws.append(noise)
        return noise.reshape(tuple(shape))

    return draw


def _realize(sampler: Sampler, response: _Response) -> Table:
    """Return the smallest linear system that makes these results; its history at row i is `histories[i]`·basis.

    `sampler` must not have begun its run, because `add_noise` then ignores `set_begin_index`.
    """
    g, rows = response.coefficients, len(response.coefficients)
    histories = [_history(g, row) for row in range(rows + 1)]
    K = 1 + max(len(history) for history in histories)
    m, v, w = np.zeros((rows, K, K)), np.zeros((rows, K)), np.zeros((rows, K))
    for i, kept in enumerate(histories[:-1]):
        wanted = np.concatenate([g[i : i + 1, : 3 * i + 3], histories[i + 1]])
        past, (x, e, n) = wanted[:, : 3 * i], wanted[:, 3 * i :].T
        m[i, : len(wanted), 0], v[i, : len(wanted)], w[i, : len(wanted)] = x, e, n
        m[i, : len(wanted), 1 : 1 + len(kept)] = past @ kept.T  # least squares: the rows of `kept` are orthonormal
    timesteps = sampler.timesteps.tolist()
    distinct = list(dict.fromkeys(timesteps))
    # A draw that nothing after it can notice is left out: Euler ancestral draws for its last step, with w = 0.
    noticed = np.array([bool(g[:, 3 * i + 2].any()) for i in range(rows)])
    last = max(np.flatnonzero(noticed), default=-1)
    return Table(
        m=m.astype(np.float32),
        v=v.astype(np.float32),
        w=w.astype(np.float32),
        input_scale=response.input_scale.astype(np.float32),
        draws_noise=response.drawn & (np.arange(rows) <= last),
        start=np.array([sampler.start(row) for row in range(rows)], np.float32),
        init_noise_sigma=np.array(sampler.init_noise_sigma, np.float32),
        timesteps=np.array(distinct, np.float32),
        index=np.array([distinct.index(t) for t in timesteps], np.int32),
    )


def _history(g: np.ndarray, row: int) -> np.ndarray:
    """Return the history that row `row` needs: orthonormal combinations [rank, 3·row] of the basis before it."""
    hankel = g[row:, : 3 * row] / np.abs(g[row:]).max(axis=1, keepdims=True)  # results differ in size by sigma
    if not hankel.any():
        return np.zeros((0, 3 * row))
    _, values, vectors = np.linalg.svd(hankel, full_matrices=False)
    vectors = vectors[values > _RANK]
    largest = vectors[np.arange(len(vectors)), np.abs(vectors).argmax(axis=1)]
    return vectors * np.sign(largest)[:, None]  # the sign of a singular vector is the library's choice


def _trajectory_error(sampler: Sampler, table: Table, amplitude: float, replaced: bool) -> float:
    """Return the largest distance between a step of the scheduler in fp32 and its table's, over a run.

    The distance is relative to the sample or the result, whichever is larger (L2), because a small result keeps little
    in fp32 if the sample has σ = 4096. Predictions are random; if `replaced`, the samples are too, as inpainting
    replaces a part of each.
    """
    random, theirs, ours = (torch.Generator("cpu").manual_seed(seed) for seed in (0, 1, 1))
    x = amplitude * sampler.init_noise_sigma * torch.randn(_SHAPE, generator=random)
    history, worst = np.zeros((table.K - 1, x.numel())), 0.0
    for i, t in enumerate(sampler.timesteps):
        if replaced:
            x = amplitude * torch.randn(_SHAPE, generator=random)
        prediction = amplitude * torch.randn(_SHAPE, generator=random)
        noise = torch.randn(_SHAPE, generator=ours) if table.draws_noise[i] else torch.zeros(_SHAPE)
        read = np.concatenate([_row(x), history, _row(prediction), _row(noise)])
        row = np.concatenate([table.m[i], table.v[i, :, None], table.w[i, :, None]], axis=1).astype(np.float64)
        sampler.scale(x, t)
        x = sampler.step(prediction, t, x, theirs)
        made, history = _row(x), (row @ read)[1:]
        size = max(np.linalg.norm(made), np.linalg.norm(read[0]))
        worst = np.maximum(worst, np.linalg.norm(made - row[0] @ read) / size)  # NaN if any step is NaN
    return float(worst)


def _row(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().reshape(1, -1).numpy()


def _without(scheduler: Any, options: list[str]) -> Any:
    """Return a copy of `scheduler` with these options of its config false."""
    changed = copy.deepcopy(scheduler)
    changed.register_to_config(**dict.fromkeys(options, False))
    return changed


def _is_linear(scheduler: Any, run: SamplerRun) -> bool:
    """Return whether the scheduler has a table."""
    try:
        _checked(scheduler, run)
    except InputError:
        return False
    return True
