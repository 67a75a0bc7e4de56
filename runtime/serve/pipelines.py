"""The models that are in memory. Only the worker's thread uses them."""

import logging
import os
import time
from collections import OrderedDict
from pathlib import Path

from turbochain.runtime.errors import InputError
from turbochain.runtime.pipeline import Pipeline
from turbochain.runtime.serve.adapters import Chosen, PipelineAdapters
from turbochain.runtime.serve.errors import of_input
from turbochain.runtime.serve.models import Model, Models
from turbochain.runtime.serve.settings import Settings

log = logging.getLogger("turbochain")


class Pipelines:
    """Loads a model when it is first asked for, and closes those that were not used for longest.

    The rule: the weights of all loaded models, as files, fit `memory_bytes`; the one in use stays in any case. The
    weights count once for each size and batch, of which each keeps its own, so that calls may alternate between them;
    if requests may name adapters, those of the UNet with slots count, too. A model that is too large for that has the
    weights of the graphs that drew last.
    """

    def __init__(self, models: Models, settings: Settings) -> None:
        """Take what is served, and how much of it may be in memory."""
        self._models, self._settings = models, settings
        self._loaded: OrderedDict[str, Pipeline] = OrderedDict()  # the one used last is the last
        self._adapters: dict[str, PipelineAdapters] = {}

    def get(self, model: Model, adapters: Chosen = ()) -> Pipeline:
        """Return a model's pipeline, loaded, which draws with these adapters and no others.

        Raises what `Pipeline.load` raises, and Refused if it cannot draw with the adapters.
        """
        if model.name not in self._loaded:
            self._make_room(model)
            settings = self._settings
            log.info("loading %s", model.name)
            self._loaded[model.name] = Pipeline.load(
                model.source,
                backend=settings.backend,
                device=settings.device,
                threads=settings.threads,
                keep_all=self._weight(model) <= self._limit,
                trust_engines=settings.trust_engines,
            )
            self._adapters[model.name] = PipelineAdapters(self._models.adapters, self._loaded[model.name])
        self._loaded.move_to_end(model.name)
        try:
            self._adapters[model.name].use(adapters)
        except InputError as error:
            raise of_input(error) from error
        return self._loaded[model.name]

    def warm_up(self, model: Model) -> float:
        """Load a model and make a picture with each of its tasks' first chains; returns the seconds of the first."""
        pipe = self.get(model)
        first_of: dict[str, str] = {}
        for name, chain in model.bundle.manifest.chains.items():
            if not chain.stream:
                first_of.setdefault(chain.task, name)
        taken = []
        for name in first_of.values():
            pipe.warmup(chain=name)  # the first picture has costs that no later one has
            start = time.perf_counter()
            pipe.warmup(chain=name)
            taken.append(time.perf_counter() - start)
        pipe.forget()
        return taken[0]

    def close(self) -> None:
        """Give back the memory of all."""
        for pipe in self._loaded.values():
            pipe.close()
        self._loaded.clear()

    def _make_room(self, model: Model) -> None:
        while self._loaded and self._weight(model) + self._weight_of_all > self._limit:
            name, pipe = self._loaded.popitem(last=False)
            log.info("closing %s, to make room for %s", name, model.name)
            pipe.close()

    def _weight(self, model: Model) -> int:
        """Return the bytes in a model's graph files, which is about the memory that it takes if all are loaded.

        Without adapters no UNet with slots ever is.
        """
        manifest, adapters = model.bundle.manifest, self._models.adapters.by_name
        graphs = [g for g in manifest.graphs.values() if adapters or not ("lora" in g.features and g.role == "unet")]
        return sum(manifest.files[file].size for graph in graphs for file in graph.files)

    @property
    def _weight_of_all(self) -> int:
        return sum(self._weight(self._models.exactly(name)) for name in self._loaded)

    @property
    def _limit(self) -> int:
        """Return how many bytes the weights may be; a GPU's memory is known when the first model is loaded."""
        if self._settings.memory_bytes is not None:
            return self._settings.memory_bytes
        gpu = next((pipe.device.gpu for pipe in self._loaded.values()), None)
        return ((gpu.memory_bytes if gpu else None) or machine_bytes()) // 2


def machine_bytes() -> int:
    """Return the memory in bytes of this machine, or of the container that this process is in."""
    own = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(own, int(Path("/sys/fs/cgroup/memory.max").read_text()))  # "max" if there is no limit
    except (OSError, ValueError):
        return own
