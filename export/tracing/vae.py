"""The VAE's graphs: a picture becomes latents, latents become a picture.

A pipeline scales the latents, and not all pipelines alike: the classes for SDXL are those whose names say so.
"""

from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from turbochain.export.tracing.traced import Traced


class _Scaled(Traced):
    """A VAE and the scale of its latents; reads only `scaling_factor` of the config, as diffusers' SD pipelines do."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def scaled(self, encoded: torch.Tensor) -> torch.Tensor:
        """Return the latents that the UNet works on, of those that the VAE makes."""
        return self.vae.config.scaling_factor * encoded

    def unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the latents that the VAE decodes."""
        return latents / self.vae.config.scaling_factor


class _Normalized(_Scaled):
    """`_Scaled` that also reads `latents_mean` and `latents_std` if the config has both."""

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
        self.normalized = mean is not None and std is not None
        if self.normalized:
            self.register_buffer("mean", torch.tensor(mean).float().reshape(1, -1, 1, 1))
            self.register_buffer("std", torch.tensor(std).float().reshape(1, -1, 1, 1))

    def scaled(self, encoded: torch.Tensor) -> torch.Tensor:
        """See `_Scaled`."""
        if not self.normalized:
            return super().scaled(encoded)
        return (encoded - self.mean) * self.vae.config.scaling_factor / self.std

    def unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """See `_Scaled`."""
        if not self.normalized:
            return super().unscaled(latents)
        return latents * self.std / self.vae.config.scaling_factor + self.mean


class VaeDecoder(_Scaled):
    """latents [B, 4, H/8, W/8] fp32 → picture [B, H, W, 3] uint8, as diffusers' image processor rounds it (SD)."""

    def forward(self, next_latents: torch.Tensor) -> torch.Tensor:
        """See the class."""
        latents = self.unscaled(next_latents)
        image = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()
        levels = torch.round((image * 0.5 + 0.5).clamp(0, 1) * 255)
        # uint8 must be the very last node: TensorRT refuses it in the middle of a graph.
        return levels.permute(0, 2, 3, 1).contiguous().to(torch.uint8)


class SDXLVaeDecoder(_Normalized, VaeDecoder):
    """`VaeDecoder` that scales latents as all of diffusers' SDXL pipelines do."""


class VaeEncoder(_Scaled):
    """picture [B, H, W, 3] uint8, posterior noise [B, 4, H/8, W/8] fp32 → image latents, shaped as the noise, fp32.

    A VAE without a distribution (AutoencoderTiny) reads no noise. The latents are scaled as in diffusers' SD pipelines
    and in its SDXL pipeline for inpainting, which ignores what `SDXLVaeEncoder` reads.
    """

    def forward(self, input_image: torch.Tensor, posterior_noise: torch.Tensor | None = None) -> torch.Tensor:
        """See the class."""
        # uint8 is cast by the very first node: TensorRT refuses it in the middle of a graph.
        image = 2 * (input_image.float().permute(0, 3, 1, 2) / 255) - 1
        encoded = self.vae.encode(image.to(self.vae.dtype), return_dict=False)[0]
        if posterior_noise is None:
            return self.scaled(encoded.float())
        posterior = DiagonalGaussianDistribution(encoded.parameters.float())
        return self.scaled(posterior.mean + posterior.std * posterior_noise)


class SDXLVaeEncoder(_Normalized, VaeEncoder):
    """`VaeEncoder` that scales latents as diffusers' SDXL pipeline for image-to-image does."""
