"""How `turbochain generate` is given its prompt."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import called
from PIL import Image

from turbochain.runtime import Pipeline
from turbochain.runtime.bundle import opened, strict_json

DASHED = "-5 degrees", pytest.param("-cold", marks=pytest.mark.full), "--steps"


@pytest.mark.parametrize("prompt", DASHED)
def test_a_prompt_that_begins_with_a_dash(sd: Path, tmp_path: Path, prompt: str) -> None:
    with Pipeline.load(sd) as pipe:
        expected = pipe(prompt, seed=3, output_type="uint8").images[0]
    options = ("-o", tmp_path / "out.png", "--seed", 3)
    lines = [
        ("--prompt", prompt, sd, *options),
        (sd, *options, f"--prompt={prompt}"),
        (*options, "--", sd, prompt),
        (sd, *options, "--", prompt),
        *([(sd, prompt, *options)] if prompt == "-5 degrees" else []),  # with a space it is no option
    ]
    for line in lines:
        done = called("turbochain", "generate", *line)
        assert done.returncode == 0, done.stderr
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), expected)
        (tmp_path / "out.png").unlink()


def test_the_manifest_is_read_once(sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def read(kind: type[Any], path: Path) -> Any:
        seen.append(path.name)
        return strict_json.read(kind, path)

    monkeypatch.setattr(opened, "strict_json", SimpleNamespace(read=read))
    assert called("turbochain", "generate", sd, "a cat", "-o", tmp_path / "out.png").returncode == 0
    assert seen.count("bundle.json") == 1


@pytest.mark.parametrize("line", [("a cat", "-cold"), ("--prompt", "a cat", "-cold")])
def test_an_unknown_option_may_be_a_prompt(tmp_path: Path, line: tuple[str, ...]) -> None:
    done = called("turbochain", "generate", tmp_path, *line)
    assert done.returncode == 2
    assert done.stderr.endswith("arguments: -cold (a prompt that begins with '-' is given as --prompt TEXT)\n")


def test_options_may_stand_before_the_prompt(sd: Path, tmp_path: Path) -> None:
    with Pipeline.load(sd) as pipe:
        expected = pipe("a cat", seed=3, output_type="uint8").images[0]
    place = tmp_path / "out.png"
    for line in ((sd, "--seed", 3, "a cat", "-o", place), ("--seed", 3, sd, "-o", place, "a cat")):
        done = called("turbochain", "generate", *line)
        assert done.returncode == 0, done.stderr
        np.testing.assert_array_equal(np.asarray(Image.open(place)), expected)
        place.unlink()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ((), "required: PROMPT (a prompt that begins with '-' is given as --prompt TEXT)"),
        (("-cold",), "required: PROMPT (a prompt that begins with '-' is given as --prompt TEXT)"),
        (("a cat", "--prompt", "a dog"), "unrecognized arguments: a dog"),
        (("--prompt",), "argument --prompt: expected one argument"),
        (
            ("a cat", "--negative-prompt", "-cold"),
            "expected one argument (a text that begins with '-' is given as --negative-prompt=TEXT)",
        ),
    ],
)
def test_one_prompt_is_expected(tmp_path: Path, line: tuple[str, ...], said: str) -> None:
    done = called("turbochain", "generate", tmp_path, *line)
    assert done.returncode == 2 and said in done.stderr
