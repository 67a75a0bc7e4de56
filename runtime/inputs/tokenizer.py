"""Prompts to token ids, as transformers' CLIPTokenizer makes them, without transformers."""

import functools
from collections.abc import Mapping, Sequence
from os import PathLike
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from turbochain.runtime.errors import BundleError, InputError

if TYPE_CHECKING:
    import tokenizers

MAX_PROMPT_BYTES = 32 * 1024


class Tokenizer:
    """A `tokenizer.json` with one fixed length: `max_length` ids, start and end marker included.

    `pad_token` and `pad_id` are the checkpoint's padding token and its id. The file's own truncation and
    padding state is ignored. `expansions`: an added token that stands for several vectors (textual inversion) → how
    many; see `expanded`. Nothing changes after construction, so threads may share one tokenizer.

    Raises `BundleError` for a file that cannot be read, whose id of `pad_token` is not `pad_id`, or that lacks a token
    of an expansion.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        max_length: int,
        pad_token: str,
        pad_id: int,
        expansions: Mapping[str, int] = MappingProxyType({}),
    ):
        import tokenizers  # on use: `import turbochain.runtime` stays cheap

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare `Exception`
            raise BundleError(
                f"the tokenizer {path} cannot be read ({error}): build the bundle again with build-engine"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

        found = self._tokenizer.token_to_id(pad_token)
        if found != pad_id:
            raise BundleError(
                f"the tokenizer {path} gives the padding token {pad_token!r} the id {found}, but the bundle "
                f"says {pad_id}: build the bundle again with build-engine"
            )
        self.max_length = max_length
        self._pad_id = pad_id
        parts = {token: [token, *(f"{token}_{i}" for i in range(1, count))] for token, count in expansions.items()}
        for part in (part for found in parts.values() for part in found):
            if self._tokenizer.token_to_id(part) is None:
                raise BundleError(
                    f"the tokenizer {path} has no token {part!r}, which the bundle's textual inversion has: "
                    "build the bundle again with build-engine"
                )
        self._expansions = {token: " ".join(found) for token, found in parts.items()}
        self._encoding = functools.lru_cache(16)(self._encode)  # several callers need one prompt's

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """Return the ids of `prompts`, int32 [len(prompts), max_length].

        Equal to transformers' `CLIPTokenizer(prompts, padding="max_length", truncation=True)` of the `expanded`
        prompts: of a long one the first `max_length - 2` tokens stay, between the start and the end marker.
        """
        ids = np.full((len(prompts), self.max_length), self._pad_id, np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            tokens = self._encoding(prompt).ids
            if len(tokens) > self.max_length:
                tokens = tokens[: self.max_length - 1] + tokens[-1:]
            row[: len(tokens)] = tokens
        return ids

    def dropped(self, prompt: str) -> str:
        """Return the tail of `prompt`, `expanded`, that `encode` truncates, as the user wrote it; "" if it all fits.

        The tail begins with the first character that did not reach the model whole. A long word (or a
        script without spaces) may be cut inside.
        """
        encoding = self._encoding(prompt)
        if len(encoding) <= self.max_length:
            return ""
        start, _ = encoding.offsets[self.max_length - 1]  # of the first token that lost its place
        return self.expanded(prompt)[start:]

    def expanded(self, prompt: str) -> str:
        """Return `prompt` with every token of several vectors written out: `tok` becomes `tok tok_1 tok_2`.

        As diffusers' `maybe_convert_prompt`: a token that is in the tokenized prompt is replaced wherever the prompt
        has its text. Tokens are replaced in the order in which they come; diffusers' order is random, which makes a
        difference only if the text of one holds that of another.
        """
        if not self._expansions:
            return prompt
        for token in dict.fromkeys(self._tokenizer.encode(prompt, add_special_tokens=False).tokens):
            prompt = prompt.replace(token, self._expansions.get(token, token))
        return prompt

    def _encode(self, prompt: str) -> "tokenizers.Encoding":
        return self._tokenizer.encode(self.expanded(prompt))


def check_prompt(prompt: object, *, argument: str = "prompt") -> str:
    """Return `prompt` when it is text that can be tokenised; `argument` names it in the messages.

    Raises `InputError` when it is no `str`, holds a NUL character or a lone surrogate, or is longer than
    32 KiB as UTF-8.
    """
    if not isinstance(prompt, str):
        raise InputError(f"the {argument} is of type {type(prompt).__name__}: expected a str")
    nul = prompt.find("\0")
    if nul >= 0:
        raise InputError(f"the {argument} holds a NUL character at position {nul}: expected text without any")
    try:
        size = len(prompt.encode())
    except UnicodeEncodeError as error:
        raise InputError(
            f"the {argument} holds the lone surrogate U+{ord(prompt[error.start]):04X} at position "
            f"{error.start}: expected text that can be written as UTF-8"
        ) from None
    if size > MAX_PROMPT_BYTES:
        raise InputError(
            f"the {argument} is {size:,} bytes long as UTF-8: expected at most {MAX_PROMPT_BYTES:,} (32 KiB)"
        )
    return prompt
