"""Diffusers' methods for LoRA, which a pipeline has."""

import os
import threading
from collections.abc import Sequence

from turbochain.runtime.adapters import Adapters, Weight
from turbochain.runtime.backends.contract import Executor


class LoraMethods:
    """Diffusers' methods for LoRA on a pipeline. Calls in other threads see a change between two calls."""

    _lock: threading.RLock
    _adapters: Adapters

    def _opened(self) -> Executor:
        raise NotImplementedError

    def load_lora_weights(
        self,
        path: str | os.PathLike[str],
        *,
        weight_name: str | None = None,
        adapter_name: str | None = None,
    ) -> None:
        """Load a LoRA, which becomes the only active one of the components that it changes, with weight 1, as in
        diffusers; the next call draws with it.

        `path`: a safetensors file (kohya's, peft's or diffusers' names, or what `turbochain adapter convert` wrote), or
        a folder with one, or with `weight_name` in it. `adapter_name` None: default_0, default_1, …. Until
        `unload_lora_weights` every call runs the graphs with slots, so that one UNet is in memory (with `keep_all` of
        `Pipeline.load` the plain one stays, too). In a bundle without slots, on ONNX Runtime on a CPU in fp32, the next
        call loads the changed graphs anew, which takes seconds.
        Raises InputError if the file is no LoRA for this model, or the bundle has no place for it.
        """
        with self._lock:
            self._opened()
            self._adapters.load(path, weight_name, adapter_name)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: Weight | Sequence[Weight] = None
    ) -> None:
        """Let these loaded adapters be active, and no others; [] for none.

        `adapter_weights`: one for all, or one for each (None: 1); a mapping has one for each component, such as
        {"unet": 0.8, "text_encoder": 0.5}. Raises InputError for a name that is not loaded, a weight that is no number,
        or if they do not fit into the slots together.
        """
        with self._lock:
            self._opened()
            self._adapters.set(adapter_names, adapter_weights)

    def unload_lora_weights(self) -> None:
        """Forget all adapters: the next call draws as if none had been loaded, bit for bit."""
        with self._lock:
            self._opened()
            self._adapters.clear()

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forget these adapters; if no active one is left, the first that is loaded becomes active, as in diffusers."""
        with self._lock:
            self._opened()
            self._adapters.delete(adapter_names)

    def get_active_adapters(self) -> list[str]:
        """Return the names of the active adapters, in the order in which they were set."""
        with self._lock:
            return list(self._adapters.active)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return component → the names of the loaded adapters that change it."""
        with self._lock:
            return self._adapters.listed
