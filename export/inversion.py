"""Textual inversion: what a tokenizer's added tokens stand for, and prompts that use every one."""

from collections.abc import Sequence
from typing import Any


def expansions(tokenizer: Any) -> dict[str, int]:
    """Return each added token of several vectors → how many: `tok` has three if `tok_1` and `tok_2` are added too.

    `tokenizer`: transformers'. As diffusers' `maybe_convert_prompt` finds them.
    """
    tokens, found = tokenizer.added_tokens_encoder, {}
    for token in tokens:
        count = 1
        while f"{token}_{count}" in tokens:
            count += 1
        if count > 1:
            found[token] = count
    return found


def prompts(pipeline: Any, tokenizers: Sequence[Any]) -> list[str]:
    """Return a few prompts whose ids have every vector of these tokenizers' added tokens.

    No token in a prompt holds the text of another one there: diffusers expands them in a random order. The markers and
    the padding are left out, because they are in every prompt. `pipeline`: diffusers', with those tokenizers.
    """
    made: list[list[str]] = []  # tokens by prompt
    reached: set[tuple[int, int]] = set()  # index of a tokenizer, id
    for token in dict.fromkeys(token for tokenizer in tokenizers for token in _added(tokenizer)):
        wanted = {(i, t.added_tokens_encoder[token]) for i, t in enumerate(tokenizers) if token in _added(t)}
        if wanted <= reached:
            continue
        last = made[-1] if made else []
        apart = not any(token in other or other in token for other in last)
        if not (last and apart and wanted <= _ids(pipeline, tokenizers, _prompt([*last, token]))):
            made.append([])
        made[-1].append(token)
        reached |= _ids(pipeline, tokenizers, _prompt(made[-1]))
    return [_prompt(tokens) for tokens in made]


def _added(tokenizer: Any) -> list[str]:
    """Return the added tokens but for the markers, the padding and the unknown, in the order of their ids."""
    own = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token}
    tokens = tokenizer.added_tokens_encoder
    return sorted(tokens.keys() - own, key=lambda token: tokens[token])


def _prompt(tokens: Sequence[str]) -> str:
    return f"a photo of {' '.join(tokens)}"


def _ids(pipeline: Any, tokenizers: Sequence[Any], prompt: str) -> set[tuple[int, int]]:
    """Return (index of a tokenizer, id) for all ids that reach the text encoders."""
    found = set()
    for i, tokenizer in enumerate(tokenizers):
        encoded = tokenizer(pipeline.maybe_convert_prompt(prompt, tokenizer), truncation=True)
        found |= {(i, id_) for id_ in encoded.input_ids}
    return found
