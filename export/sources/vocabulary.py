"""The CLIP vocabulary, for checkpoints that are written here, and for those in one file, which have none of their own.

Every Stable Diffusion text encoder shares OpenAI's byte-pair vocabulary of 49,408 tokens. Its merges are part of this
package: `export/clip`, with their licence.
"""

import gzip
import json
from pathlib import Path

VOCABULARY_SIZE = 49408
MAX_TOKENS = 77
BEGIN, END = "<|startoftext|>", "<|endoftext|>"

_MERGES = Path(__file__).parents[1] / "clip" / "merges.txt.gz"
# The printable stand-ins for the 256 bytes, in the order of their ids (GPT-2's `bytes_to_unicode`).
_BYTES = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return CLIP's token → id (49,408 entries) and its 48,894 merges, in order of precedence.

    Built as OpenAI's `simple_tokenizer.py` builds it: bytes, bytes at the end of a word, merges, specials.
    """
    with gzip.open(_MERGES, "rt", encoding="utf-8") as file:
        lines = file.read().rstrip("\n").split("\n")[1:]  # the first line names the version
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    tokens = [*_BYTES, *(b + "</w>" for b in _BYTES), *(a + b for a, b in merges), BEGIN, END]
    return {token: i for i, token in enumerate(tokens)}, merges


def write_tokenizer(folder: Path, *, pad_token: str) -> None:
    """Write CLIP's tokenizer into `folder`: tokenizer.json and its config, vocab.json, merges.txt.

    `pad_token` is what fills a prompt up to 77 tokens: "!" in SD 2.1 and SDXL's second tokenizer, else
    "<|endoftext|>". The files hold no truncation or padding state.
    """
    save_tokenizer(folder, *clip_vocabulary(), pad_token=pad_token)


def save_tokenizer(folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]], *, pad_token: str) -> None:
    """Write a tokenizer like `write_tokenizer`, with another vocabulary (token → id) and its merges in order."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(folder)
    # transformers 5 no longer writes these two; older readers and the folders on the hub have them.
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    merge_lines = "".join(f"{first} {second}\n" for first, second in merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merge_lines}", encoding="utf-8")
