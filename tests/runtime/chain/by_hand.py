"""What the chains of `small_bundle` make, in numpy and with PyTorch's generator, as DESIGN.md defines it.

Nothing here is of the runtime. A call is one pass: as many pictures as the chain's batch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import small_bundle
import torch
from small_graphs import BATCH, I2I, LATENTS, LENGTH, T2I, WEIGHTS, WORDS

Arrays = dict[str, np.ndarray]


def ids(texts: Sequence[str]) -> np.ndarray:
    """Return the token of each word; of a long text the first and the last are kept."""
    rows = []
    for text in texts:
        found = [WORDS.index(word) if word in WORDS else WORDS.index("?") for word in text.split()]
        found = found if len(found) <= LENGTH else [*found[: LENGTH - 1], found[-1]]
        rows.append([*found, *[0] * (LENGTH - len(found))])
    return np.array(rows, np.int32)


def encode_text(tokens: np.ndarray) -> np.ndarray:
    return WEIGHTS["table"][tokens] + WEIGHTS["positions"]


def randn(generators: list[torch.Generator], shape: tuple[int, ...]) -> np.ndarray:
    """Return what diffusers' `randn_tensor` draws: all at once, or each picture with its own generator."""
    if len(generators) == 1:
        return torch.randn(shape, generator=generators[0]).numpy()
    return np.concatenate([torch.randn((1, *shape[1:]), generator=g).numpy() for g in generators])


def seeded(seed: int | list[int]) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(s) for s in (seed if isinstance(seed, list) else [seed])]


def points(pictures: np.ndarray, weight: str) -> np.ndarray:
    """Return the mean of each block of 8×8 pixels, 0 to 1, in the latents' channels."""
    count, height, width, _ = pictures.shape
    blocks = pictures.reshape(count, height // 8, 8, width // 8, 8, 3).astype(np.float32).mean((2, 4)) / 255
    return (blocks @ WEIGHTS[weight]).transpose(0, 3, 1, 2)


def decode(latents: np.ndarray) -> np.ndarray:
    levels = np.round(np.clip(latents.transpose(0, 2, 3, 1) @ WEIGHTS["decode"] * 40 + 128, 0, 255))
    return levels.repeat(8, 1).repeat(8, 2).astype(np.uint8)


class Schedule:
    """The rows of a table."""

    def __init__(self, chain: str, steps: int) -> None:
        arrays = small_bundle.tables(chain)
        own = {key.removeprefix(f"{steps}/"): a for key, a in arrays.items() if key.startswith(f"{steps}/")}
        self.m, self.v, self.w, self.scale = (own[k] for k in ("m", "v", "w", "input_scale"))
        self.draws, self.sigma = own["draws_noise"], own["init_noise_sigma"]
        self.time, self.extent = arrays["columns/time"][own["index"]], arrays["constants/extent"]
        self.rows = len(self.m)

    def noise(self, generators: list[torch.Generator], shape: tuple[int, ...]) -> np.ndarray:
        zeros = np.zeros(shape, np.float32)
        return np.stack([randn(generators, shape) if draws else zeros for draws in self.draws])

    def predict(self, row: int, latents: np.ndarray, embeds: np.ndarray) -> np.ndarray:
        gain = embeds.sum(1)[:, :, None, None] * np.float32(0.05)
        return (latents * self.scale[row] * gain + self.time[row]) * self.extent

    def step(self, row: int, state: np.ndarray, prediction: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Return M·S + v·prediction + w·noise, S being [K, …]."""
        kept = np.tensordot(self.m[row], state, 1)
        return kept + np.multiply.outer(self.v[row], prediction) + np.multiply.outer(self.w[row], noise)


def text_to_image(
    prompts: Sequence[str],
    seed: int | list[int],
    steps: int,
    guidance: float | None = None,
    negative: Sequence[str] = ("",) * BATCH,
    latents: np.ndarray | None = None,
) -> Arrays:
    """Return everything that a call reads and makes, by name; of a step [rows, …]."""
    table, generators, shape = Schedule(T2I, steps), seeded(seed), LATENTS[T2I]
    made: dict[str, Any] = {"input_ids": ids(prompts)}
    made["prompt_embeds"] = encode_text(made["input_ids"])
    if guidance is not None:
        made |= {"negative_input_ids": ids(negative), "guidance_scale": np.array([guidance], np.float32)}
        made["negative_prompt_embeds"] = encode_text(made["negative_input_ids"])
    x = (randn(generators, shape) if latents is None else latents) * table.sigma
    made["noise"] = table.noise(generators, shape)
    rows: list[Arrays] = []
    for i in range(table.rows):
        row = {"latents": x, "prediction": table.predict(i, x, made["prompt_embeds"]), "time": table.time[i]}
        used = row["prediction"]
        if guidance is not None:
            row["negative_prediction"] = table.predict(i, x, made["negative_prompt_embeds"])
            used = row["negative_prediction"] + np.float32(guidance) * (used - row["negative_prediction"])
            row["guided_prediction"] = used
        (x,) = table.step(i, x[None], used, made["noise"][i])
        rows.append({**row, "next_latents": x})
    return {**made, **_stacked(rows), "image": decode(x)}


def image_to_image(
    prompts: Sequence[str],
    images: np.ndarray,
    seed: int | list[int],
    p: float,
    q: float,
    scales: Sequence[float],
    stream: np.ndarray | float = 0.0,
    control: np.ndarray | None = None,
) -> Arrays:
    """Return everything that a call of two steps reads and makes; one image may serve both pictures.

    With one generator the posterior's noise is drawn for the images that there are, and drawn again for nothing.
    """
    table, generators, shape = Schedule(I2I, 2), seeded(seed), LATENTS[I2I]
    times = BATCH // len(images)
    drawn = (len(images) if len(generators) == 1 else BATCH, *shape[1:])

    def posterior() -> np.ndarray:
        noise = randn(generators, drawn)
        return np.concatenate([noise] * (BATCH // len(noise)))

    made: dict[str, Any] = {"input_ids": ids(prompts), "input_image": np.concatenate([images] * times)}
    made |= {"p": np.array([p], np.float32), "q": np.array([q], np.float32)}
    made["conditioning_scale"] = np.array(scales, np.float32)[:, None]
    made["prompt_embeds"] = encode_text(made["input_ids"])
    made["posterior_noise"] = posterior()
    made["start_noise"] = randn(generators, shape)
    posterior()
    made["noise"] = table.noise(generators, shape)
    made["image_latents"] = points(made["input_image"], "encode") + np.float32(0.1) * made["posterior_noise"]
    residual = np.zeros(shape, np.float32)
    if control is not None:
        made |= {"control_image": control, "residual": points(control, "control")}
        residual = made["residual"]
    state = np.zeros((3, *shape), np.float32)
    state[0] = made["p"] * made["image_latents"] + made["q"] * made["start_noise"]
    rows: list[Arrays] = []
    for i in range(table.rows):
        own = table.predict(i, state[0], made["prompt_embeds"])
        prediction = own + np.float32(0.5) * stream + residual * np.float32(scales[i])
        row = {"latents": state[0], "prediction": prediction, "time": table.time[i]}
        state = table.step(i, state, prediction, made["noise"][i]).astype(np.float32)
        rows.append({**row, "next_latents": state[0], "next_stream": np.float32(0.25) * prediction})
    return {**made, **_stacked(rows), "image": decode(state[0])}


def _stacked(rows: list[Arrays]) -> Arrays:
    return {name: np.stack([row[name] for row in rows]).astype(np.float32) for name in rows[0]}
