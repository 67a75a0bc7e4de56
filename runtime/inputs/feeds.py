"""Make what a chain is fed in one call: token ids, noise, constants, and what the caller gives."""

import logging
import threading
import weakref
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from turbochain.runtime.bundle.manifest import TokenizerFile
from turbochain.runtime.chain.opened import OpenChain
from turbochain.runtime.inputs.control import IMAGES
from turbochain.runtime.inputs.generators import advance
from turbochain.runtime.inputs.given import REPEATED
from turbochain.runtime.inputs.noise import Generator, draw_run
from turbochain.runtime.inputs.tokenizer import Tokenizer
from turbochain.runtime.request import Request

log = logging.getLogger("turbochain")

Arrays = Mapping[str, np.ndarray]


def tokenizers(chain: OpenChain) -> dict[str, Tokenizer]:
    """Return the tokenizer of each feed of ids, from files that have been hashed; BundleError if one is damaged.

    A file is read once for all feeds, chains and pipelines that use it at one time: it takes a tenth of a second.
    """
    return {name: _tokenizer(chain, entry) for name, entry in chain.tokenizers.items()}


_TOKENIZERS: weakref.WeakValueDictionary[tuple[Hashable, ...], Tokenizer] = weakref.WeakValueDictionary()


def _tokenizer(chain: OpenChain, entry: TokenizerFile) -> Tokenizer:
    settings = {name: value for name, value in vars(entry).items() if name != "file"}
    key = (chain.bundle.manifest.files[entry.file].sha256, *(str(value) for value in settings.values()))
    if (found := _TOKENIZERS.get(key)) is None:
        found = _TOKENIZERS[key] = Tokenizer(chain.bundle.path / entry.file, **settings)
    return found


class Feeds:
    """The feeds of one chain, whose files have been hashed. Safe from several threads."""

    def __init__(self, chain: OpenChain) -> None:
        """Read the tokenizers and the tables; BundleError if one is not what the manifest says."""
        self.chain = chain
        self.tokenizers = tokenizers(chain)
        zeros = [name for kind in ("history", "zeros") for name in chain.feeds(kind)]
        self._zeros = {name: self.zeros(name) for name in zeros if chain.chain.feeds[name].when == "call"}
        self._constants: dict[str, dict[str, np.ndarray]] = {}
        self._local = threading.local()

    def of_request(self, request: Request) -> dict[str, np.ndarray]:
        """Return what differs from picture to picture, for all N of them: [N, …], for every step [rows, N, …].

        What is no feed of the chain is given in place of the stages that make it.
        """
        first = self._first_generator()
        noise = self.noise(
            request, [first.manual_seed(s) if i == 0 else Generator(s) for i, s in enumerate(request.seeds)]
        )
        inputs = {name: array.value for name, array in request.inputs}
        for name in (n for n in inputs if self.chain.chain.feeds[n].is_ in REPEATED):
            inputs[name] = np.concatenate([inputs[name]] * (request.count // len(inputs[name])))
        embeds = {name: array.value for name, array in request.embeds}
        return {**self._ids(request), **noise, **self._start(request), **inputs, **embeds}

    def noise(self, request: Request, generators: Sequence[Generator]) -> dict[str, np.ndarray]:
        """Return the noise of all N pictures, as `draw_run`."""
        chain, inputs = self.chain, dict(request.inputs)
        given = {chain.first_noise: request.latents.value} if chain.first_noise and request.latents else {}
        images, masks = (
            next((len(inputs[n].value) for n in chain.feeds(kind) if n in inputs and n not in IMAGES), None)
            for kind in REPEATED
        )
        table = chain.tables[request.table]
        return draw_run(chain, table, generators, request.count, given=given, images=images, masks=masks)

    def _start(self, request: Request) -> dict[str, np.ndarray]:
        """Return what inpainting with `latents` begins with, [N, …]: these alone, at any strength, as in diffusers."""
        chain = self.chain.chain
        name = chain.carry[self.chain.latents] if self.chain.latents else ""
        if request.latents is None or name in chain.feeds:
            return {}
        return {name: self.chain.tables[request.table].init_noise_sigma * request.latents.value}

    def advance(self, generator: object, request: Request) -> None:
        """Bring a caller's generator, or each of a list, to the end of what the request draws from it."""
        given = generator if isinstance(generator, list | tuple) else [generator]
        streams = [Generator(seed) for seed in request.seeds]
        self.noise(request, streams)
        for one, stream in zip(given, streams, strict=True):
            advance(one, stream)

    def _ids(self, request: Request) -> dict[str, np.ndarray]:
        """Return every text's token ids, [N, length] int32; none for a text that is given as embeds."""
        texts = {"": request.prompts, "negative_prompt": request.negative_prompts}
        feeds = self.chain.chain.feeds
        read = {name: texts[feeds[name].of] for name in self.tokenizers}
        return {name: self.tokenizers[name].encode(text) for name, text in read.items() if text}

    def rows(self, feeds: Arrays, rows: list[int]) -> dict[str, np.ndarray]:
        """Return the feeds for some of the N pictures, and what is given in place of stages."""

        def take(name: str, value: np.ndarray) -> np.ndarray:
            feed = self.chain.chain.feeds.get(name)
            if feed is not None and feed.is_ == "number":
                return value
            return value[:, rows] if feed is not None and feed.when == "step" else value[rows]

        return {name: take(name, value) for name, value in feeds.items()}

    def constants(self, table: str) -> dict[str, np.ndarray]:
        """Return what is the same in every call: the table's columns, and zeros for history at its beginning."""
        if table not in self._constants:
            self._constants[table] = self.chain.columns(table) | self._zeros
        return self._constants[table]

    def zeros(self, name: str) -> np.ndarray:
        """Return zeros of a feed's shape and dtype."""
        tensor = self.chain.tensors[name]
        return np.zeros(tensor.shape, tensor.dtype)

    def warn_of_truncation(self, prompts: Sequence[str]) -> None:
        """Say which part of a prompt does not reach the model, as diffusers does."""
        for prompt in dict.fromkeys(prompts):
            # Tokenizers of one checkpoint mostly have the same vocabulary: one warning is enough.
            found = ((t.dropped(prompt), t.max_length) for t in self.tokenizers.values())
            dropped, limit = next(((text, limit) for text, limit in found if text), ("", 0))
            if dropped:
                log.warning("the prompt is over %d tokens long; this part of it was dropped: %s", limit, dropped)

    def _first_generator(self) -> Generator:
        """Return one that each thread keeps: making one takes as long as drawing a picture's noise."""
        generator: Generator | None = getattr(self._local, "generator", None)
        if generator is None:
            generator = self._local.generator = Generator(0)
        return generator
