"""A schedule as numbers: what the sampler does in every row, without any scheduler code.

Every linear sampler step is `S' = m·S + v·prediction + w·noise`. S has K tensors: the latents and K − 1 of history, which are
zeros at first. K = 1 is Euler, DDIM, LCM, …; multistep solvers have K = 2 to 4.
"""

from dataclasses import dataclass

import numpy as np


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
    timesteps: np.ndarray  # [T] fp32: the distinct timesteps, in the order of their first row
    index: np.ndarray  # [rows] int32: the row's timestep is timesteps[index]

    @property
    def rows(self) -> int:
        """Return the number of network evaluations."""
        return len(self.m)

    @property
    def K(self) -> int:
        """Return how many tensors go round the loop: the latents and their history."""
        return self.m.shape[1]
