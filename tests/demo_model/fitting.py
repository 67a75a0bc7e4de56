"""What the stages of `train.py` share: their plans, where the work lies, and an optimisation that can be stopped."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import cos, pi
from pathlib import Path
from typing import Any

import architecture
import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

SEED = 0
SAVE_EVERY = 60.0  # seconds
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def processor() -> str:
    """What it trains on, in words."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name(DEVICE)
    count = torch.get_num_threads()
    return f"{count} CPU core{'s' if count > 1 else ''} ({torch.backends.cpu.get_cpu_capability()})"


class Stop(Exception):
    """It was asked to stop, or the minutes are over; everything is saved."""


@dataclass(frozen=True)
class Plan:
    """One stage of optimisation: AdamW, a warm-up and a cosine to `low`, exponential mean of the weights."""

    steps: int
    batch: int
    high: float
    low: float
    mean: float  # the mean's decay per step
    betas: tuple[float, float] = (0.9, 0.99)


PLANS = {
    "vae": Plan(3200, 16, 3e-3, 1e-4, 0.995),
    "text": Plan(1500, 64, 2e-3, 1e-4, 0.99),
    "small": Plan(4000, 16, 1.5e-3, 3e-4, 0.998),
    "generator": Plan(5000, 8, 1e-3, 2e-5, 0.998),
    "refine": Plan(900, 8, 5e-4, 1e-5, 0.99),
    "control": Plan(800, 4, 1e-3, 2e-5, 0.99),
}


@dataclass
class TrainingRun:
    """Where the work lies, and when to stop."""

    work: Path
    until: float = float("inf")

    def __post_init__(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)

    def stop(self) -> None:
        """Let the step at hand be the last."""
        self.until = 0.0

    def require_time(self) -> None:
        """Raise Stop where there is none left."""
        if time.monotonic() > self.until:
            raise Stop

    def tokenizer(self) -> CLIPTokenizer:
        """The reduced tokenizer, written on first use."""
        folder = self.work / "tokenizer"
        if not folder.is_dir():
            architecture.write_tokenizer(folder)
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)

    def state(self, stage: str) -> dict[str, Any]:
        """What a stage has saved so far."""
        return torch.load(self.work / f"{stage}.pt", map_location="cpu", weights_only=True)

    def history(self, stage: str) -> dict[str, Any]:
        """Steps, batch, seconds and losses (200 means) of a stage so far."""
        state = self.state(stage)
        if "taken" in state:
            return dict(state["taken"])
        losses = np.array_split(state["losses"], min(200, len(state["losses"])))
        means = [round(float(part.mean()), 5) for part in losses]
        done = {"steps": len(state["losses"]), "batch": PLANS[stage].batch, "seconds": round(state["seconds"])}
        return {**done, "losses": means}

    def take(self, checkpoint: Path) -> None:
        """Save a checkpoint's VAE and text encoder as those with which their stages ended."""
        vae = AutoencoderKL.from_pretrained(checkpoint / "vae", torch_dtype=torch.float32)
        text = CLIPTextModel.from_pretrained(checkpoint / "text_encoder", dtype=torch.float32)
        trained = json.loads((checkpoint / "training.json").read_text())["stages"]
        scale = float(vae.config.scaling_factor)
        taken = {"taken": trained["vae"], "mean": {"vae": vae.state_dict()}, "scale": scale}
        torch.save(taken, self.work / "vae.pt")
        torch.save({"taken": trained["text"], "mean": {"text_encoder": text.state_dict()}}, self.work / "text.pt")


@dataclass
class Fit:
    """The optimisation of one stage, which saves itself and goes on from what it saved."""

    run: TrainingRun
    stage: str
    modules: dict[str, torch.nn.Module]
    first: dict[str, Any] | None = None  # weights to begin with
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    taken: bool = False  # from a checkpoint: there is nothing to do

    def __post_init__(self) -> None:
        self.plan = PLANS[self.stage]
        self.modules = {n: m.to(DEVICE).to(memory_format=torch.channels_last) for n, m in self.modules.items()}
        for name, weights in (self.first or {}).items():
            if name in self.modules:
                self.modules[name].load_state_dict(weights)
        self.parameters = [p for m in self.modules.values() for p in m.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, betas=self.plan.betas, weight_decay=0.01)
        self.mean = {n: {k: v.detach().clone() for k, v in m.state_dict().items()} for n, m in self.modules.items()}
        if (self.run.work / f"{self.stage}.pt").is_file():
            self._load(self.run.state(self.stage))

    def _load(self, saved: dict[str, Any]) -> None:
        self.taken = "taken" in saved
        if self.taken:
            return
        self.losses, self.seconds = saved["losses"], saved["seconds"]
        self.mean = {n: {k: v.to(DEVICE) for k, v in weights.items()} for n, weights in saved["mean"].items()}
        for name, module in self.modules.items():
            module.load_state_dict(saved["now"][name])
        self.optimizer.load_state_dict(saved["optimizer"])

    def save(self) -> None:
        """Write everything, in a way that a crash leaves the old or the new."""
        path = self.run.work / f"{self.stage}.pt"
        now = {n: m.state_dict() for n, m in self.modules.items()}
        optimizer = self.optimizer.state_dict()
        kept = {"losses": self.losses, "seconds": self.seconds, "mean": self.mean, "now": now, "optimizer": optimizer}
        torch.save(kept, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def steps(self, loss: Callable[[int], torch.Tensor]) -> None:
        """Minimise `loss(step)`, until the plan's last step or the run's end (Stop)."""
        if self.taken:
            return
        bar = tqdm(total=self.plan.steps, initial=len(self.losses), desc=self.stage, mininterval=5)
        saved = began = time.monotonic()
        before = self.seconds
        try:
            while (step := len(self.losses)) < self.plan.steps:
                self.losses.append(self._step(step, loss))
                bar.update()
                now = time.monotonic()
                self.seconds = before + now - began
                if now - saved > SAVE_EVERY:
                    bar.set_postfix(loss=f"{np.mean(self.losses[-200:]):.5f}")
                    self.save()
                    saved = now
                self.run.require_time()
        finally:
            bar.close()
            self.save()

    def _step(self, step: int, loss: Callable[[int], torch.Tensor]) -> float:
        plan = self.plan
        rate = plan.low + (plan.high - plan.low) * (1 + cos(pi * step / plan.steps)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 100)
        torch.manual_seed(hash((SEED, step)))
        value = loss(step)
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(plan.mean, (step + 1) / (step + 10))
        for name, module in self.modules.items():
            for key, value_now in module.state_dict().items():
                if value_now.is_floating_point():
                    self.mean[name][key].lerp_(value_now.detach(), 1 - decay)
        return value.item()
