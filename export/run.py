"""How a pipeline calls its scheduler. Torch-free."""

from dataclasses import dataclass

from turbochain.runtime.errors import InputError


@dataclass(frozen=True)
class SamplerRun:
    """One schedule of a scheduler: what a diffusers pipeline gives to `set_timesteps`, `set_begin_index` and `step`.

    Raises InputError if the arguments contradict each other.
    """

    steps: int  # num_inference_steps; with explicit timesteps, their number
    begin: int | None = None
    # image-to-image and inpainting: the steps skipped, 0 at full strength; None: text-to-image, without set_begin_index
    timesteps: tuple[int, ...] | None = None  # explicit ones, as `pipe(timesteps=…)`
    eta: float = 0.0
    strength: float | None = None
    # LatentConsistencyModelImg2ImgPipeline alone: it gives the strength to set_timesteps and skips nothing
    original_steps: int | None = None  # original_inference_steps of the LatentConsistencyModel pipelines

    def __post_init__(self) -> None:
        """Raise InputError if the arguments contradict each other."""
        if self.timesteps is not None and len(self.timesteps) != self.steps:
            raise InputError(
                f"{self.steps} steps do not fit the explicit timesteps {', '.join(map(str, self.timesteps))}, of which "
                f"there are {len(self.timesteps)}: ask for {len(self.timesteps)} steps"
            )
        if self.begin is not None and self.strength is not None:
            raise InputError(
                f"a run that skips {self.begin} steps has strength={self.strength}, and the strength would shorten the "
                "schedule a second time: give one of them"
            )
