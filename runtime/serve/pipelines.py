"""The models that are in memory. Only the worker's thread uses them."""

import logging
import os
import time
from collections import OrderedDict

from turbochain.runtime.pipeline import Pipeline
from turbochain.runtime.serve.models import Model, Models
from turbochain.runtime.serve.settings import Settings

log = logging.getLogger("turbochain")


class Pipelines:
    """Loads a model when it is first asked for, and closes those that were not used for longest.

    The rule: the weights of all loaded models, as files, fit `memory_bytes`; the one in use stays in any case.
    """

    def __init__(self, models: Models, settings: Settings) -> None:
        """Take what is served, and how much of it may be in memory."""
        self._models, self._settings = models, settings
        self._loaded: OrderedDict[str, Pipeline] = OrderedDict()  # the one used last is the last

    def get(self, model: Model) -> Pipeline:
        """Return a model's pipeline, loaded. Raises what `Pipeline.load` raises."""
        if model.name not in self._loaded:
            self._make_room(model)
            settings = self._settings
            log.info("loading %s", model.name)
            self._loaded[model.name] = Pipeline.load(
                model.source,
                backend=settings.backend,
                device=settings.device,
                threads=settings.threads,
                trust_engines=settings.trust_engines,
            )
        self._loaded.move_to_end(model.name)
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
        limit = self._settings.memory_bytes or device_bytes() // 2
        while self._loaded and _weight(model) + sum(_weight(self._models.exactly(n)) for n in self._loaded) > limit:
            name, pipe = self._loaded.popitem(last=False)
            log.info("closing %s, to make room for %s", name, model.name)
            pipe.close()


def device_bytes() -> int:
    """Return this machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _weight(model: Model) -> int:
    """Return the size of a model's files, which is about what its weights take in memory."""
    return sum(record.size for record in model.bundle.manifest.files.values())
