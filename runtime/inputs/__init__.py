"""What a call feeds into a chain: token ids, noise and what is cached of them."""

from turbochain.runtime.inputs.canny import canny

__all__ = ["canny"]
