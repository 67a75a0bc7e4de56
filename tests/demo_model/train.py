"""Train the demo model: the VAE, the text encoder, then, from pure noise in one step, the UNet with it.

    python tests/demo_model/train.py [--work FOLDER] [--minutes N] [--start CHECKPOINT] [STAGE ...]

Stages, in order: vae, text, latents-256, small, latents-512, generator, refine. Each continues where it was stopped
(Ctrl-C, SIGTERM, `--minutes`) from what FOLDER holds, and is passed over when it is done. The data of a step depend on
the seed and the step's number alone, so a run in parts sees what a run in one piece sees. A CUDA GPU is used
where there is one. `small` trains at 256×256, where a picture costs a quarter; `generator` goes on at 512×512; in
`refine` whole runs of 1 to 4 steps are trained, each step on what the steps before it made, and every object counts
alike, however small: without these, errors grew from step to step, and small stars lost their points.
`--start export/demo` takes the VAE and the text encoder from a checkpoint, so that only the UNet is trained again.
`checkpoint.py` makes a checkpoint in diffusers' format of it, and `grade.py` measures that.
"""

import argparse
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import architecture
import numpy as np
import scenes
import torch
from fitting import DEVICE, SEED, Fit, Stop, TrainingRun
from tqdm import tqdm

PICTURES = {256: 20000, 512: 6000}
BEFORE = {"small": "text", "generator": "small", "refine": "generator"}


def main() -> None:
    """Run the stages that are asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", default=[])
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop, saved, after so long")
    parser.add_argument("--start", type=Path, help="a checkpoint whose VAE and text encoder are taken")
    arguments = parser.parse_args()
    run = TrainingRun(arguments.work, time.monotonic() + 60 * arguments.minutes)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: run.stop())
    if arguments.start:
        run.take(arguments.start)
    stages: dict[str, Callable[[TrainingRun], None]] = {
        "vae": train_vae,
        "text": train_text,
        "latents-256": lambda run: encode(run, 256),
        "small": lambda run: train_generator(run, "small", 256),
        "latents-512": lambda run: encode(run, 512),
        "generator": lambda run: train_generator(run, "generator", 512),
        "refine": lambda run: train_generator(run, "refine", 512),
    }
    for name in arguments.stages or stages:
        try:
            stages[name](run)
        except Stop:
            print(f"stopped in {name}; the same command goes on")
            return


def train_vae(run: TrainingRun) -> None:
    """Reconstruct drawn pictures: most of them small, which cost less and look alike, and in full size at the end."""
    model = architecture.vae()
    fit = Fit(run, "vae", {"vae": model})

    def loss(step: int) -> torch.Tensor:
        done = step / fit.plan.steps
        batch, pixels = (16, 128) if done < 0.8 else (6, 256) if done < 0.95 else (2, 512)
        pictures = torch.stack([_picture(np.random.default_rng((SEED, 1, step, i)), pixels) for i in range(batch)])
        pictures = pictures.to(DEVICE, memory_format=torch.channels_last)
        latents = model.encode(pictures).latent_dist
        given = latents.sample()
        given = given + 0.05 * given.detach().std() * torch.randn_like(given)  # the UNet will err as much
        error = model.decode(given).sample - pictures
        kl = 0.5 * (latents.mean.square() + latents.var - 1 - latents.logvar).mean()
        return error.square().mean() + 0.2 * error.abs().mean() + 3e-6 * kl

    fit.steps(loss)


def _picture(random: np.random.Generator, pixels: int) -> torch.Tensor:
    """A training picture, (3, pixels, pixels) in [-1, 1]."""
    drawn = scenes.draw(scenes.training_scene(random), random.standard_normal(2), pixels)
    return torch.from_numpy(drawn.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)


@torch.inference_mode()
def encode(run: TrainingRun, pixels: int) -> None:
    """Draw training pictures and keep their latents, scaled to unit variance, with their prompts and places."""
    path, count, part = run.work / f"latents-{pixels}.npy", PICTURES[pixels], 500
    vae = architecture.vae().to(DEVICE, memory_format=torch.channels_last).eval()
    vae.load_state_dict(run.state("vae")["mean"]["vae"])
    parts, at_once = [], 10 if pixels < 512 else 2  # as many as a CPU's cache likes
    for first in tqdm(range(0, count, part), desc=path.stem):
        piece = path.with_name(f"{path.stem}-{first}.npy")
        if not path.exists() and not piece.exists():
            kept = [latents_of(vae, range(i, i + at_once), pixels) for i in range(first, first + part, at_once)]
            np.save(piece, np.concatenate(kept))
        parts.append(piece)
        run.require_time()
    if not path.exists():
        np.save(path, np.concatenate([np.load(piece) for piece in parts]))
        for piece in parts:
            piece.unlink()


def drawing(pixels: int, i: int) -> tuple[scenes.Scene, np.ndarray]:
    """The i-th training scene and its place."""
    random = np.random.default_rng((SEED, 2, pixels, i))
    return scenes.training_scene(random), random.standard_normal(2).astype(np.float32)


def latents_of(vae: torch.nn.Module, numbers: range, pixels: int) -> np.ndarray:
    """The latents of training pictures, (n, 4, h, w), as the encoder makes them: without the scaling factor."""
    drawn = np.stack([scenes.draw(*drawing(pixels, i), pixels) for i in numbers])
    given = torch.from_numpy(drawn).to(DEVICE).permute(0, 3, 1, 2).float() / 127.5 - 1  # channels last
    return vae.encode(given).latent_dist.mean.cpu().numpy().astype(np.float16)


def scale(run: TrainingRun) -> float:
    """The VAE's scaling_factor: 1 / the standard deviation of its latents."""
    state = run.state("vae")
    if "scale" in state:
        return float(state["scale"])
    return float(1 / np.load(run.work / "latents-256.npy", mmap_mode="r")[:2000].astype(np.float32).std())


def train_text(run: TrainingRun) -> None:
    """Teach the text encoder to read: what the prompt says can be told from the end-of-text token by a linear layer."""
    tokenizer = run.tokenizer()
    text = architecture.text_encoder(tokenizer)
    sizes, colours, shapes = (("none", *names) for names in (scenes.DIAMETERS, scenes.COLOURS, scenes.SHAPES))
    told = (*(sizes, colours, shapes) * 6, ("", *scenes.RELATIONS), colours)
    probe = torch.nn.Linear(text.config.hidden_size, sum(map(len, told)))
    fit = Fit(run, "text", {"text_encoder": text, "probe": probe})

    def loss(step: int) -> torch.Tensor:
        random = np.random.default_rng((SEED, 4, step))
        asked = [scenes.training_scene(random) for _ in range(fit.plan.batch)]
        ids = tokenizer([str(scene) for scene in asked], padding=True, return_tensors="pt").input_ids.to(DEVICE)
        states = text(ids).last_hidden_state
        ends = (ids == tokenizer.eos_token_id).int().argmax(1)
        logits = probe(states[torch.arange(len(ids)), ends]).split([*map(len, told)], 1)
        losses = []
        for i, (choices, scores) in enumerate(zip(told, logits, strict=True)):
            right = torch.tensor([choices.index(_told(scene)[i]) for scene in asked], device=DEVICE)
            losses.append(torch.nn.functional.cross_entropy(scores, right))
        return torch.stack(losses).sum()

    fit.steps(loss)


def _told(scene: scenes.Scene) -> list[str]:
    """The first and the second object, those on each side, where there are two, the relation and the background."""
    sides = dict.fromkeys(scenes.RELATIONS.values())
    if scene.relation:
        x, y = scenes.RELATIONS[scene.relation]
        sides |= {(x, y): scene.things[0], (-x, -y): scene.things[1]}
    things = [*scene.things, *[None] * (2 - len(scene.things)), *sides.values()]
    words = [w for thing in things for w in ((thing.size, thing.colour, thing.shape) if thing else ["none"] * 3)]
    return [*words, scene.relation, scene.background]


class Guides(torch.nn.Module):
    """Linear layers on the inner blocks' outputs, for training only: they pull out what every position must know.

    That is where the noise puts the objects (`scenes.place`), the position itself, which the UNet can only tell from
    the zeros beyond the borders, the picture there, coarsely, and which object is nearest, in which direction, of
    which size and shape. Without them the first of these is found late, and the last after thousands of steps.
    """

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        widths = unet.config.block_out_channels
        blocks = dict(zip([unet.mid_block, *unet.up_blocks[:3]], [widths[-1], *reversed(widths[1:])], strict=True))
        told = 2 + 2 + 4 + 3 + len(scenes.SHAPES)
        self.layers = torch.nn.ModuleList(torch.nn.Conv2d(width, told, 1) for width in blocks.values())
        self.seen: dict[int, torch.Tensor] = {}
        self.down: dict[int, torch.Tensor] = {}
        self.pooled = torch.nn.ModuleList(torch.nn.Linear(width, 2) for width in widths[:3])
        for i, block in enumerate(unet.down_blocks[:3]):
            block.register_forward_hook(lambda block, given, made, i=i: self.down.update({i: made[0]}))
        for i, block in enumerate(blocks):
            block.register_forward_hook(lambda block, given, made, i=i: self.seen.update({i: made}))

    def loss(self, places: torch.Tensor, objects: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """How badly they tell it: `places` (n, 2), `objects` (n, 2, 3 + shapes) of `objects_of`,
        `clean` (n, 4, h, w).
        """
        total = clean.new_zeros(())
        for i, layer in enumerate(self.pooled):
            told = layer(self.down[i].float().mean((2, 3)))
            total = total + (told - torch.tanh(scenes.SQUASH * places)).square().sum(1).mean()
        for i, layer in enumerate(self.layers):
            made = self.seen[i].float()
            n, _, h, w = made.shape
            y, x = torch.meshgrid(*(torch.linspace(-1, 1, s, device=made.device) for s in (h, w)), indexing="ij")
            here = torch.stack([x, y])
            to = objects[:, :, :2, None, None] - here  # (n, 2, 2, h, w)
            second = to.square().sum(2).argmin(1)[:, None].bool()
            nearest = torch.where(second, objects[:, 1, 2:, None, None], objects[:, 0, 2:, None, None])
            wanted = (
                torch.tanh(scenes.SQUASH * places)[:, :, None, None].expand(n, 2, h, w),
                here.expand(n, 2, h, w),
                torch.nn.functional.adaptive_avg_pool2d(clean, (h, w)),
                torch.tanh(4 * torch.where(second, to[:, 1], to[:, 0])),
                nearest,
            )
            total = total + (layer(made) - torch.cat(wanted, 1)).square().sum(1).mean()
        return total


def objects_of(scene: scenes.Scene, placed: np.ndarray) -> np.ndarray:
    """Of both objects (one counts twice) the centre, -1 to 1, the size and the shape, one-hot: (2, 3 + shapes)."""
    told = [
        [2 * x / scenes.PIXELS - 1, 2 * y / scenes.PIXELS - 1, scenes.DIAMETERS[thing.size] / 64 - 2]
        + [float(thing.shape == shape) for shape in scenes.SHAPES]
        for thing, (x, y) in zip(scene.things, scenes.centres(scene, placed), strict=True)
    ]
    return np.float32([told[0], told[-1]])


def train_generator(run: TrainingRun, stage: str, pixels: int) -> None:
    """Predict the latents of the picture that belongs to a prompt and a noise, mostly from the noise alone."""
    tokenizer = run.tokenizer()
    text, unet = architecture.text_encoder(tokenizer), architecture.unet()
    guides = Guides(unet)
    before = run.state(BEFORE[stage])["mean"]
    if stage == "generator":
        del before["guides"]  # another size, another grid of positions
    fit = Fit(run, stage, {"text_encoder": text, "unet": unet, "guides": guides}, before)
    latents = np.load(run.work / f"latents-{pixels}.npy", mmap_mode="r")
    drawn = [drawing(pixels, i) for i in range(len(latents))]
    ids = tokenizer([str(scene) for scene, _ in drawn], padding="max_length", return_tensors="pt").input_ids
    places = np.stack([placed for _, placed in drawn])
    objects = np.stack([objects_of(*one) for one in drawn])
    small_stars = [i for i, (scene, _) in enumerate(drawn) if any(_is_small_star(t) for t in scene.things)]
    factor, sigma = scale(run), architecture.sigmas()
    first = torch.full((1, 1, 1, 1), max(sigma.values()), device=DEVICE)

    def step_of(
        sample: torch.Tensor, t: np.ndarray, states: torch.Tensor, clean: torch.Tensor, weights: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The squared error of one step's v-prediction, weighted, and the latents that it means."""
        s = torch.tensor([sigma[int(i)] for i in t], dtype=torch.float32, device=DEVICE)[:, None, None, None]
        with torch.autocast(DEVICE.type, torch.bfloat16):
            given = (sample / (s**2 + 1).sqrt()).contiguous(memory_format=torch.channels_last)
            v = unet(given, torch.from_numpy(t).to(DEVICE), states).sample.float()
        target = (sample / (s**2 + 1) - clean) * (s**2 + 1).sqrt() / s
        found = sample / (s**2 + 1) - v.detach() * s / (s**2 + 1).sqrt()
        return (weights * (v - target).square()).mean(), found

    def loss(step: int) -> torch.Tensor:
        random = np.random.default_rng((SEED, 3, step))
        chosen = random.integers(len(latents), size=fit.plan.batch)
        if stage == "refine":
            chosen[::2] = random.choice(small_stars, len(chosen[::2]))
        clean = torch.from_numpy(latents[chosen].astype(np.float32) * factor).to(DEVICE)
        noise = torch.from_numpy(_noise(random, places[chosen], clean.shape)).to(DEVICE)
        known = [torch.from_numpy(of[chosen]).to(DEVICE) for of in (places, objects)]
        with torch.autocast(DEVICE.type, torch.bfloat16):
            states = text(ids[chosen].to(DEVICE)).last_hidden_state
        if stage != "refine":
            others = _others(step / fit.plan.steps)
            shares = [1 - others, *[others / (len(sigma) - 1)] * (len(sigma) - 1)]
            t = random.choice(list(sigma), fit.plan.batch, p=shares)
            s = torch.tensor([sigma[int(i)] for i in t], dtype=torch.float32, device=DEVICE)[:, None, None, None]
            sample = (1 - s / first) * clean + s * noise  # Euler's way from noise alone straight to the picture
            return step_of(sample, t, states, clean, 1)[0] + 0.025 * guides.loss(*known, clean)
        # A pipeline's way: every step reads what those before it made.
        steps, total, sample = random.choice([1, 2, 3, 4], p=[0.1, 0.25, 0.3, 0.35]), clean.new_zeros(()), first * noise
        weights = weights_of(known[1], *clean.shape[2:])
        for now, following in pairwise([*architecture.timesteps(int(steps)), None]):
            error, found = step_of(sample, np.full(len(chosen), now), states, clean, weights)
            total = total + error + 0.025 * guides.loss(*known, clean)
            if following is not None:
                sample = found + (sample - found) * (sigma[following] / sigma[now])
        return total / int(steps)

    fit.steps(loss)


def _is_small_star(thing: scenes.Thing) -> bool:
    return (thing.size, thing.shape) == ("small", "star")


def weights_of(objects: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """What each position's error counts, (n, 1, h, w): 1, and each object's square gets 0.3 of the picture on top."""
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, s, device=objects.device) for s in (height, width)), indexing="ij")
    away = (objects[:, :, :2, None, None] - torch.stack([x, y])).abs().amax(2)  # (n, 2, h, w)
    diameter = 64 * (objects[:, :, 2] + 2) / scenes.PIXELS  # of `objects_of`; half of it in units of -1 to 1
    inside = (away < diameter[:, :, None, None] + 2 / width).float()
    each = 0.3 * inside / inside.mean((2, 3), keepdim=True)
    return 1 + each.sum(1, keepdim=True)


def _others(done: float) -> float:
    """How often another timestep than the first (one step) is trained.

    They come late: they show where the objects are, and with them from the start nothing looks for it in the
    noise (after 300 steps the error of the place was 0.06 without them and 0.34 with them, its variance being 0.31).
    """
    return 0.3 * min(1.0, max(0.0, (done - 0.4) / 0.2))


def _noise(random: np.random.Generator, places: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal noise whose `scenes.place` is `places`."""
    noise = random.standard_normal(shape, dtype=np.float32)
    h, w = shape[-2:]
    missing = (places - scenes.place(noise)) / np.float32(np.sqrt(h * w))
    noise[..., :2, :, :] += missing[..., None, None] * scenes.signs(h, w)
    return noise


if __name__ == "__main__":
    main()
