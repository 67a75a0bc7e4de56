"""The arithmetic around the UNet: a few nodes without weights, all in fp32."""

import torch
from torch import nn

from turbochain.export.tracing.traced import Traced


class _Arithmetic(Traced):
    """A module without weights."""

    def __init__(self, component: nn.Module, K: int = 1) -> None:
        """Set K, how many tensors go round the loop; `component` is not used, because there are no weights."""
        super().__init__()
        self.K = K


class Step(_Arithmetic):
    """One row of a table: `S' = m·S + v·prediction + w·noise`, S the latents [B, 4, h, w] and, if K > 1, the history.

    m [K, K], v [K], w [K]; the history is [K − 1, B, 4, h, w]. See `runtime.chain.tables`.
    """

    def forward(
        self,
        latents: torch.Tensor,
        prediction: torch.Tensor,
        noise: torch.Tensor,
        m: torch.Tensor,
        v: torch.Tensor,
        w: torch.Tensor,
        history: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See the class."""
        if history is None:
            return m[0] * latents + v * prediction + w * noise
        state = [latents, *history.unbind(0)]
        rows = [
            sum(m[i, j] * state[j] for j in range(self.K)) + v[i] * prediction + w[i] * noise for i in range(self.K)
        ]
        return rows[0], torch.stack(rows[1:])


class GuidedStep(_Arithmetic):
    """`Step` with the prediction that classifier-free guidance makes of two; that prediction [B, 4, h, w] comes last.

    guidance_scale [1]; the negative prediction is that for the negative prompt.
    """

    def __init__(self, component: nn.Module, K: int) -> None:
        super().__init__(component, K)
        self.step = Step(component, K)

    def forward(
        self,
        latents: torch.Tensor,
        prediction: torch.Tensor,
        negative_prediction: torch.Tensor,
        guidance_scale: torch.Tensor,
        noise: torch.Tensor,
        m: torch.Tensor,
        v: torch.Tensor,
        w: torch.Tensor,
        history: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """See the class."""
        guided = negative_prediction + guidance_scale * (prediction - negative_prediction)
        made = self.step(latents, guided, noise, m, v, w, history)
        return (made, guided) if history is None else (*made, guided)


class Start(_Arithmetic):
    """Image latents and noise [B, 4, h, w] → the latents that the loop begins with, `p·image_latents + q·start_noise`.

    p, q [1]. It is `scheduler.add_noise`, with the numbers of the row that the loop begins at.
    """

    def forward(
        self, image_latents: torch.Tensor, start_noise: torch.Tensor, p: torch.Tensor, q: torch.Tensor
    ) -> torch.Tensor:
        """See the class."""
        return p * image_latents + q * start_noise


class Enter(_Arithmetic):
    """A stream's batch: latents and embeds of the entering frame [1, …], and those of the frames under way [S − 1, …],
    the newest first → those of all [S, …], and the embeds [S − 1, …] of all but the last, which the next frame finds.
    """

    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See the class; the latents are the first of each half."""
        count = len(given) // 2
        together = [torch.cat(pair) for pair in zip(given[:count], given[count:], strict=True)]
        return (*together, *(value[:-1] for value in together[1:]))


class StreamStep(_Arithmetic):
    """A stream's batch, a row for each frame: `m·latents + v·prediction + w·noise` [S, 4, h, w]; m, v, w [S, 1, 1, 1].

    First come the last frame's latents [1, 4, h, w], which are finished, then the others', each at its next row.
    """

    def forward(
        self,
        latents: torch.Tensor,
        prediction: torch.Tensor,
        noise: torch.Tensor,
        m: torch.Tensor,
        v: torch.Tensor,
        w: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See the class."""
        made = m * latents + v * prediction + w * noise
        return made[-1:], made[:-1]


class Blend(_Arithmetic):
    """What inpainting keeps: latents [B, 4, h, w] are the image's again, as noisy as the next row reads them, at each
    pixel whose mask [B, 1, h, w] is 0; at the others they are what the step made.

    next_p, next_q [1]: p, q of the next row, and (1, 0) after the last one.
    """

    def forward(
        self,
        next_latents: torch.Tensor,
        image_latents: torch.Tensor,
        start_noise: torch.Tensor,
        mask: torch.Tensor,
        next_p: torch.Tensor,
        next_q: torch.Tensor,
    ) -> torch.Tensor:
        """See the class."""
        known = next_p * image_latents + next_q * start_noise
        return (1 - mask) * known + mask * next_latents
