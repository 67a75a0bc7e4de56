"""What is asked for is checked in one place: the command, `build` and `export` say the same."""

from pathlib import Path
from typing import Any

import pytest

from turbochain.engines import build, cli
from turbochain.export import export
from turbochain.runtime import InputError

OF_THE_BUNDLE: dict[str, tuple[list[str], dict[str, Any]]] = {
    "size": (["--size", "100x64"], {"size": (100, 64)}),
    "no size": (["--size", "0x8"], {"size": (0, 8)}),
    "batch": (["--batch", "0"], {"batch": 0}),
    "steps": (["--steps", "0,60"], {"steps": [0, 60]}),
    "no steps": (["--steps", "4-1"], {"steps": []}),
    "opset": (["--opset", "30"], {"opset": 30}),
    "precision": (["--precision", "int8"], {"precision": "int8"}),
    "precision of the VAE": (["--vae-precision", "fp16"], {"vae_precision": "fp16"}),
    "several": (["--batch", "0", "--opset", "3"], {"batch": 0, "opset": 3}),
}
OF_THE_ENGINE: dict[str, tuple[list[str], dict[str, Any]]] = {
    "backend": (["--backend", "abacus"], {"backend": "abacus"}),
    "device": (["--device", "tpu"], {"device": "tpu"}),
    "option": (["--backend", "onnxruntime", "-O", "a=1"], {"backend": "onnxruntime", "options": {"a": "1"}}),
    "timing cache": (["--timing-cache", "file"], {"timing_cache": "file"}),
    "target": (
        ["--backend", "onnxruntime", "--target", "sm89"],
        {"backend": "onnxruntime", "target": "sm89"},
    ),
    "vae": (["--backend", "onnxruntime", "--vae", "nothing"], {"backend": "onnxruntime", "vae": "nothing"}),
}


@pytest.mark.parametrize("case", [*OF_THE_BUNDLE, *OF_THE_ENGINE])
def test_the_command_and_python_say_the_same(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    line, given = {**OF_THE_BUNDLE, **OF_THE_ENGINE}[case]
    assert cli.main(["demo", *line]) == 2
    *_, told = capsys.readouterr().err.splitlines()
    with pytest.raises(InputError) as caught:
        build("demo", **given)
    assert told == f"build-engine: error: {caught.value}"
    if case in OF_THE_BUNDLE:
        with pytest.raises(InputError) as also:
            export("demo", **given)
        assert str(also.value) == str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
