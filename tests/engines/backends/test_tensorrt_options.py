"""The options of TensorRT's builds, and what is refused of them before any work."""

from pathlib import Path

import pytest
from conftest import called

from turbochain.engines import build, cli, options
from turbochain.engines.backends import tensorrt
from turbochain.runtime import InputError, backends


@pytest.mark.parametrize(
    ("given", "library", "version", "refused"),
    [
        ({"refit": True}, "tensorrt-cu13", "11.3.0.99", True),
        ({"refit": True}, "tensorrt", "11.3.1", True),
        ({"refit": True}, "tensorrt", "11.4.0.106", False),
        ({"refit": True}, "tensorrt", "10.16.1.11", False),
        ({"refit": True}, "tensorrt-rtx-cu13", "11.3.0", False),  # another library, with numbers of its own
        ({"strip_plan": True}, "tensorrt", "11.3.0.99", False),  # refitted with the same weights
    ],
)
def test_refit_is_refused_where_its_results_are_wrong(
    given: dict[str, bool], library: str, version: str, refused: bool
) -> None:
    chosen = options.resolve("tensorrt", given)
    if refused:
        with pytest.raises(InputError, match=rf"option refit: {library} {version} computes wrong .* '{library}!=11.3"):
            tensorrt.check_refit(chosen, library, version)
    else:
        tensorrt.check_refit(chosen, library, version)


def test_a_build_asks_for_that_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "require", lambda name: ("tensorrt-cu13", "11.3.0.99"))
    with pytest.raises(InputError, match=r"option refit: tensorrt-cu13 11\.3\.0\.99 computes wrong"):
        tensorrt.BUILDER.settle(options.resolve("tensorrt", {"refit": True}))


WRONG = {
    "another name": ({"speed": 9}, r"tensorrt has no option 'speed': its options are builder_optimization_level, til"),
    "a word for a number": ({"workspace_gib": "much"}, r"option workspace_gib=much: 0 to 1024 was expected"),
    "too much": ({"builder_optimization_level": 6}, r"option builder_optimization_level=6: 0 to 5 was expected"),
    "too little": ({"max_aux_streams": -2}, r"option max_aux_streams=-2: -1 to 16 was expected"),
    "a flag for a number": ({"max_aux_streams": True}, r"option max_aux_streams=True: -1 to 16 was expected"),
    "a fraction": ({"workspace_gib": 0.5}, r"option workspace_gib=0.5: 0 to 1024 was expected"),
    "another choice": (
        {"tiling_optimization_level": "most"},
        r"option tiling_optimization_level=most: none, fast, moderate, full was expected",
    ),
    "no flag": ({"refit": "perhaps"}, r"option refit=perhaps: true or false was expected"),
    "several": ({"refit": 2, "speed": 9}, r"option refit=2: .*; tensorrt has no option 'speed'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_options_that_are_none(sd: Path, case: str) -> None:
    given, expected = WRONG[case]
    with pytest.raises(InputError, match=expected):
        build(str(sd), backend="tensorrt", target="sm89", options=given, quiet=True)


def test_arguments_that_are_wrong(sd: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for given, expected in (
        (
            {"backend": "onnxruntime", "options": {"speed": 1}},
            r"onnxruntime has no option 'speed': its options are prefer_nhwc",
        ),
        ({"backend": "onnxruntime", "target": "sm89"}, r"builds only for the machine that it runs on"),
        ({"target": "sm90"}, r"target 'sm90': tensorrt-rtx-cu13 \S+ builds for sm75, .*sm89"),
        ({"timing_cache": tmp_path / "file"}, r"timing cache .*file: a folder was expected"),
        ({"opset": 17}, r"opset 17: 18 to 23 was expected"),
        ({"opset": 18}, r"holds another build \(opset is 21 there and 18 here\): choose another path"),
    ):
        with pytest.raises(InputError, match=expected):
            build(str(sd), quiet=True, **given)  # type: ignore[arg-type]
    done = called("build-engine", sd, "-O", "refit")
    assert done.returncode == 2 and "-O refit: NAME=VALUE was expected" in done.stderr


def test_options_are_read_as_text_too() -> None:
    given = {"refit": "True", "workspace_gib": "8", "tiling_optimization_level": "FULL"}
    assert options.changed("tensorrt", options.resolve("tensorrt", given)) == {
        "refit": True,
        "workspace_gib": 8,
        "tiling_optimization_level": "full",
    }


def test_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    told = capsys.readouterr().out
    for name, option in tensorrt.OPTIONS.items():
        assert f"  {name}: {option.help} (" in told
