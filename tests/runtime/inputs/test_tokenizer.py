"""The tokenizer against transformers' own CLIPTokenizer, over the real CLIP vocabulary."""

import functools
import gzip
import json
import random
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTokenizer

from turbochain.runtime.errors import BundleError, InputError
from turbochain.runtime.inputs.tokenizer import Tokenizer, check_prompt

LENGTH = 77
PADS = {"!": 0, "<|endoftext|>": 49407}

SENTENCES = {
    "English": "an extraordinarily photorealistic portrait of astronauts, riding unicorns in Reykjavík's fog",
    "Russian": "фотография рыжего кота на подоконнике, мягкий вечерний свет, высокая детализация",
    "Greek": "μια φωτογραφία μιας γάτας δίπλα στη θάλασσα, χρυσό φως του απογεύματος",
    "Arabic": "صورة قطة صغيرة تجلس على حافة النافذة في ضوء المساء الدافئ",
    "Hebrew": "תמונה של חתול קטן יושב על אדן החלון באור ערב חם",
    "Hindi": "खिड़की पर बैठी एक छोटी बिल्ली की तस्वीर, शाम की हल्की रोशनी",
    "Korean": "창가에 앉아 있는 작은 고양이 사진, 따뜻한 저녁 햇살",
    "Vietnamese": "một bức ảnh chụp chú mèo nhỏ ngồi bên cửa sổ dưới ánh nắng chiều",
    "emoji": "cat 🐈 family 👨‍👩‍👧‍👦 flag 🇮🇸 thumbs 👍🏽 rainbow 🏳️‍🌈 heart ❤️ robot 🤖 unicorn 🦄",
}
UNSPACED = {
    "Chinese": "一只橘猫坐在窗台上柔和的傍晚光线细节丰富的摄影作品",
    "Japanese": "窓辺に座っている小さな猫の写真、あたたかい夕方の光",
    "Thai": "ภาพถ่ายแมวตัวเล็กนั่งอยู่ริมหน้าต่างในแสงยามเย็นอันอบอุ่น",
    "emoji": "🐈👨‍👩‍👧‍👦🇮🇸👍🏽🏳️‍🌈❤️🤖🦄🫠",
}
ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "0123456789٣५²½Ⅷ",
    "!?.,:;'\"()[]{}<>|/\\@#$%^&*-_=+~`",
    " \t\n\r\v\f\x85\xa0\u1680\u2002\u2009\u200b\u2028\u2029\u202f\u3000\ufeff",
    "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0), 0x200C, 0x200D, 0x200E, 0x202E, 0xFFFD, 0xFFFF])),
    "éèêëñçåøßæÅŠžłİıſſﬁǅ",
    "e\u0301a\u030an\u0303o\u0308\u0323\u0315\u0344\u0958\u2126\u212b\u1e9b",
    *("".join(sorted(set(text))) for text in [*SENTENCES.values(), *UNSPACED.values()]),
    "𝓪𝔟𝕔𐍈𠀋𠮷🂡",
]
PHRASES = [
    *SENTENCES.values(),
    *UNSPACED.values(),
    *("!", "!!!", "a!b", "<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "<|endoftext|", "</w>"),
    *("it's", "they'll", "I'D", "don’t", "a photo of a cat", "masterpiece, best quality, (detailed:1.2)"),
    *("👩🏿‍🚀", "1️⃣", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "Ａｂｃ", "ÅNGSTRÖM", unicodedata.normalize("NFD", "Ångström Việt Nam 한국어")),
]


def generated(count: int, seed: int) -> list[str]:
    """Strings of mixed alphabets and phrases: empty, short, and several times the model's length."""
    rng = random.Random(seed)

    def piece() -> str:
        if rng.random() < 0.3:
            return rng.choice(PHRASES)
        return "".join(rng.choices(rng.choice(ALPHABETS), k=rng.randint(1, 8)))

    lengths = rng.choices([0, 1, 3, 10, 40, 200], weights=[1, 5, 30, 30, 30, 4], k=count)
    return [rng.choice(["", " ", ", "]).join(piece() for _ in range(length)) for length in lengths]


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The real one: bytes, bytes that end a word, merges, two markers; as OpenAI's `simple_tokenizer.py`."""
    packed = (Path(__file__).parents[3] / "export/clip/merges.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode().rstrip("\n").split("\n")
    merges = [tuple(line.split(" ")) for line in lines[1:]]
    assert len(merges) == 49152 - 256 - 2
    letters = list(byte_letters())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    return {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}, merges


def byte_letters() -> dict[str, int]:
    """GPT-2's printable letter for each byte → the byte, in the vocabulary's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


@pytest.fixture(scope="module")
def theirs_with() -> Callable[[str], CLIPTokenizer]:
    """Padding token → transformers' tokenizer, which is made once."""
    vocab, merges = clip_vocabulary()
    return functools.cache(
        lambda pad: CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=LENGTH)
    )


@pytest.fixture(scope="module", params=PADS, ids=["pad-!", "pad-endoftext"])
def pair(request, theirs_with, tmp_path_factory) -> tuple[Tokenizer, CLIPTokenizer]:
    """Our tokenizer and transformers', which it was saved from."""
    theirs = theirs_with(request.param)
    assert theirs.pad_token_id == PADS[request.param]
    folder = tmp_path_factory.mktemp("tokenizer")
    theirs.save_pretrained(folder)
    return ours_from(folder, request.param), theirs


long_with_one = pytest.mark.parametrize(
    "pair",
    ["<|endoftext|>", pytest.param("!", marks=pytest.mark.full)],
    ids=["pad-endoftext", "pad-!"],
    indirect=True,
)
"""For what takes long and has little to do with the padding: `test_phrases_one_by_one` is with both."""


def ours_from(folder: Path, pad_token: str) -> Tokenizer:
    path = folder / "tokenizer.json"
    return Tokenizer(path, max_length=LENGTH, pad_token=pad_token, pad_id=PADS[pad_token])


def expected_ids(theirs: CLIPTokenizer, prompts: list[str]) -> np.ndarray:
    return theirs(prompts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="np").input_ids


def assert_same_ids(pair, prompts: list[str]) -> None:
    ours, theirs = pair
    for start in range(0, len(prompts), 1000):
        some = prompts[start : start + 1000]
        ids, expected = ours.encode(some), expected_ids(theirs, some)
        assert ids.dtype == np.int32 and ids.shape == (len(some), LENGTH)
        wrong = np.flatnonzero((ids != expected).any(axis=1))
        assert wrong.size == 0, f"{wrong.size} prompts differ, the first is {some[wrong[0]]!r}"


def test_known_ids(pair):
    """From OpenAI's published tokenizer: the ids that everybody's CLIP gives these prompts."""
    ours, theirs = pair
    known = {
        "": [49406, 49407],
        "a photo of a cat": [49406, 320, 1125, 539, 320, 2368, 49407],
        "A  Photo\nof a DOG": [49406, 320, 1125, 539, 320, 1929, 49407],
    }
    for prompt, ids in known.items():
        assert ours.encode([prompt]).tolist() == [ids + [theirs.pad_token_id] * (LENGTH - len(ids))]


def test_phrases_one_by_one(pair):
    assert_same_ids(pair, [*PHRASES, *(phrase * 30 for phrase in PHRASES), "", " ", "\0", "a" * 32768])


@long_with_one
def test_2_000_generated_prompts(pair):
    assert_same_ids(pair, generated(2_000, seed=1))


@pytest.mark.full
def test_100_000_generated_prompts(pair):
    assert_same_ids(pair, generated(100_000, seed=2))


def test_no_prompts(pair):
    assert pair[0].encode([]).shape == (0, LENGTH)


@pytest.mark.parametrize("tokens", [74, 75, 76])
def test_the_last_place(pair, tokens):
    """75 tokens fit between the markers, and the 76th is the first to be dropped."""
    ours, _ = pair
    prompt = " ".join(["cat"] * tokens)
    assert_same_ids(pair, [prompt])
    assert ours.dropped(prompt) == ("cat" if tokens == 76 else "")


@pytest.mark.parametrize("pad_token", PADS)
def test_leftover_truncation_and_padding_are_ignored(tmp_path, theirs_with, pad_token):
    theirs = theirs_with(pad_token)
    prompts = generated(100, seed=3)
    expected = expected_ids(theirs, prompts)
    long = " ".join(["cat"] * 80)

    theirs(prompts, padding="max_length", max_length=12, truncation=True, padding_side="left")
    theirs.save_pretrained(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    assert state["truncation"] and state["padding"], "the file was to carry leftover state"

    ours = ours_from(tmp_path, pad_token)
    np.testing.assert_array_equal(ours.encode(prompts), expected)
    assert ours.dropped(long) == "cat cat cat cat cat" and ours.dropped("a cat") == ""


def bytes_beyond(theirs: CLIPTokenizer, prompt: str) -> bytes:
    """The UTF-8 of the tokens that transformers truncates, word ends removed."""
    tokens = theirs.convert_ids_to_tokens(theirs(prompt, add_special_tokens=False).input_ids[LENGTH - 2 :])
    letters = byte_letters()
    return bytes(letters[letter] for token in tokens for letter in token.removesuffix("</w>"))


def normalized(text: str) -> bytes:
    """What CLIP's normalizer and pre-tokenizer leave of `text`."""
    return "".join(unicodedata.normalize("NFC", text).lower().split()).encode()


@long_with_one
@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize(
    "text", [*SENTENCES.values(), *UNSPACED.values()], ids=[*SENTENCES, *(f"{k}-run" for k in UNSPACED)]
)
def test_dropped_is_what_the_model_never_saw(pair, text, form):
    """At every alignment of the cut with words and with the bytes of a character."""
    ours, theirs = pair
    text = unicodedata.normalize(form, text)
    for filler in range(40):
        prompt = "a " * filler + " ".join([text] * 6)
        dropped, lost = ours.dropped(prompt), bytes_beyond(theirs, prompt)
        assert lost and dropped and prompt.endswith(dropped)
        # A character that the cut goes through counts as dropped: up to 3 bytes of it reached the model.
        assert normalized(dropped).endswith(lost) and len(normalized(dropped)) - len(lost) <= 3


@long_with_one
@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("text", SENTENCES.values(), ids=SENTENCES)
def test_the_kept_head_gives_the_same_ids(pair, text, form):
    """Where the cut falls between words; inside one, the words before it keep their ids."""
    ours, theirs = pair
    text = unicodedata.normalize(form, text)
    between = 0
    for filler in range(40):
        prompt = "a " * filler + " ".join([text] * 6)
        whole, dropped = ours.encode([prompt])[0], ours.dropped(prompt)
        head = prompt.removesuffix(dropped)
        if head.endswith(" ") and normalized(dropped) == bytes_beyond(theirs, prompt):
            between += 1
            np.testing.assert_array_equal(ours.encode([head])[0], whole)
        words = ours.encode([head[: head.rfind(" ") + 1]])[0]
        count = words.tolist().index(PADS["<|endoftext|>"])
        np.testing.assert_array_equal(words[:count], whole[:count])
    assert between, "no alignment put the cut between words"


def test_a_character_cut_in_two_is_dropped(pair):
    """The first token of 👧 is the last that fits, the second does not: the model saw no girl."""
    ours, theirs = pair
    prompt = "a " * 74 + "👧"
    assert len(theirs("👧", add_special_tokens=False).input_ids) == 2
    assert ours.dropped(prompt) == "👧" and ours.dropped(prompt[2:]) == ""


@long_with_one
def test_dropped_of_generated_prompts(pair):
    ours, theirs = pair
    for prompt in generated(1_000, seed=4):
        dropped = ours.dropped(prompt)
        assert prompt.endswith(dropped)
        assert bool(dropped) == (len(theirs(prompt).input_ids) > LENGTH), repr(prompt)


@long_with_one
def test_threads_share_one_tokenizer(pair):
    ours, _ = pair
    prompts = generated(400, seed=5)
    expected = [(ours.encode([p]).tolist(), ours.dropped(p)) for p in prompts]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda p: (ours.encode([p]).tolist(), ours.dropped(p)), prompts * 4))
    assert found == expected * 4


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe\x00", b'{"model": {"type": "BPE"'])
def test_unreadable_files(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError) as caught:
        Tokenizer(path, max_length=LENGTH, pad_token="!", pad_id=0)
    message = str(caught.value)
    assert message.startswith(f"the tokenizer {path} cannot be read (")
    assert message.endswith("): build the bundle again with build-engine")


def test_a_contradictory_padding_token(tmp_path, theirs_with):
    theirs_with("<|endoftext|>").save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    with pytest.raises(BundleError) as caught:
        Tokenizer(path, max_length=LENGTH, pad_token="<|endoftext|>", pad_id=0)
    assert str(caught.value) == (
        f"the tokenizer {path} gives the padding token '<|endoftext|>' the id 49407, but the bundle says 0: "
        "build the bundle again with build-engine"
    )


def test_a_part_of_an_inversion_that_is_no_token(tmp_path):
    """The first part, or the last."""
    vocab, merges = clip_vocabulary()
    theirs = CLIPTokenizer(vocab=vocab, merges=merges, pad_token="!", model_max_length=LENGTH)
    theirs.add_tokens(["<cat>", "<cat>_1", "<dog>_1"])
    theirs.save_pretrained(tmp_path)

    def expanding(token: str, count: int) -> Tokenizer:
        path, pad = tmp_path / "tokenizer.json", {"pad_token": "!", "pad_id": 0}
        return Tokenizer(path, max_length=LENGTH, **pad, expansions={token: count})

    found = expanding("<cat>", 2).encode(["a <cat>"])
    np.testing.assert_array_equal(found, expected_ids(theirs, ["a <cat> <cat>_1"]))
    for token, count, missing in (("<cat>", 3, "<cat>_2"), ("<dog>", 2, "<dog>")):
        with pytest.raises(BundleError, match=f"has no token '{missing}', .*: build the bundle again"):
            expanding(token, count)


@pytest.mark.parametrize("prompt", ["", "a cat", "🐈" * 8192, "x" * 32768, "\x01\t\n", *PHRASES])
def test_good_prompts_come_back(prompt):
    assert check_prompt(prompt) is prompt


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "the prompt is of type NoneType: expected a str"),
        (b"a cat", "the prompt is of type bytes: expected a str"),
        (["a cat"], "the prompt is of type list: expected a str"),
        ("\0", "the prompt holds a NUL character at position 0: expected text without any"),
        ("a\0cat", "the prompt holds a NUL character at position 1: expected text without any"),
        (
            "cat \ud83d!",
            "the prompt holds the lone surrogate U+D83D at position 4: expected text that can be written as UTF-8",
        ),
        ("x" * 32769, "the prompt is 32,769 bytes long as UTF-8: expected at most 32,768 (32 KiB)"),
        ("é" * 16385, "the prompt is 32,770 bytes long as UTF-8: expected at most 32,768 (32 KiB)"),
    ],
)
def test_bad_prompts(prompt, message):
    with pytest.raises(InputError) as caught:
        check_prompt(prompt)
    assert str(caught.value) == message
    with pytest.raises(InputError) as caught:
        check_prompt(prompt, argument="negative_prompt")
    assert str(caught.value) == message.replace("the prompt", "the negative_prompt")
