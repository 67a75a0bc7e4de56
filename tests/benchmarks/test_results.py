"""Results files, the merge command, and what report.py makes of them."""

from dataclasses import replace
from pathlib import Path

import pytest

import cost_tables
import merge
import report
import result
import tables
from result import Result
from rows import Adapted, BenchmarkRun, Check, Figures, Gpu, Machine, Pair, Quantiles, Served, Spread
from turbochain.runtime.errors import BundleError

FILES = [*result.files(), *result.files(result.FOLDER / "runs")]
MERGED = result.FOLDER / "synthetic-sd-turbo-512x512-cpu-avx2.json"
HOST = Machine("a CPU", 2, 2**34, ("avx2",), "Linux", "3.11")
H200 = Gpu("NVIDIA H200", "9.0", 2**37, "580.1", "13.0", 91000)


def run(commit: str, **more: object) -> BenchmarkRun:
    return replace(BenchmarkRun(commit, HOST, {"torch": "2.13.0"}, "2026-11-30T00:00:00+00:00", "python x"), **more)  # type: ignore[arg-type]


def figures(seconds: float, passed: bool = True) -> Figures:
    return Figures(seconds, seconds, seconds, {}, 1.0, 1.0, 10**9, 10**9, {}, Check(passed, 50.0, 0.1, 1))


def pair(ours: str, peer: str, mine: float, theirs: float, n: int = 50, wrong: str = "", **more: object) -> Pair:
    """A row with these seconds."""
    right = (ours != wrong, peer != wrong)
    row = Pair(
        ours=ours, peer=peer, batch=1, steps=1, apart=False, ratio=Spread(theirs / mine, 0.1, 99.0, n),
        our_figures=figures(mine, right[0]), peer_figures=figures(theirs, right[1]),
        reason=f"wrong picture: {wrong}" if wrong else None,
    )  # fmt: skip
    return replace(row, **more)  # type: ignore[arg-type]


def of(*rows: Pair, runs: tuple[BenchmarkRun, ...] = (run("a"),), device: str = "cpu") -> Result:
    return Result("synthetic:sdxl-turbo", 512, 512, device, "a cat", 0, runs, pairs=rows)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_results_file_is_as_a_program_writes_it(path: Path, tmp_path: Path) -> None:
    result.write(result.read(path), tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_an_unknown_key_is_refused(tmp_path: Path) -> None:
    text = MERGED.read_text().replace('"apart": false', '"apart": false, "measured_by": "hand"', 1)
    (tmp_path / "changed.json").write_text(text)
    with pytest.raises(BundleError, match="has the unknown key 'measured_by'"):
        result.read(tmp_path / "changed.json")


def test_the_merged_file_is_what_merging_its_runs_gives(tmp_path: Path) -> None:
    sources = [result.FOLDER / "runs" / str(run.file) for run in result.read(MERGED).runs]
    assert len(sources) == 3
    assert merge.main([*map(str, sources), "-o", str(tmp_path / "merged.json")]) == 0
    assert (tmp_path / "merged.json").read_bytes() == MERGED.read_bytes()


def test_rows_keep_their_run_and_later_ones_replace_earlier_ones(tmp_path: Path) -> None:
    first = of(pair("openvino-fp32", "eager-fp32", 1, 2), pair("openvino-bf16", "eager-bf16", 1, 3))
    second = of(pair("openvino-bf16", "eager-bf16", 1, 4), runs=(run("b"),))
    for name, content in (("a.json", first), ("b.json", second)):
        result.write(content, tmp_path / name)
    line = [str(tmp_path / name) for name in ("a.json", "b.json")]
    assert merge.main([*line, "-o", str(tmp_path / "c.json")]) == 0
    merged = result.read(tmp_path / "c.json")
    assert [(row.run, row.ratio and row.ratio.median) for row in merged.pairs] == [(0, 2), (1, 4)]
    assert [(run.commit, run.file) for run in merged.runs] == [("a", "a.json"), ("b", "b.json")]
    assert "commit b, 2026-11-30" in tables.pairs(merged)
    only = result.merge(of(pair("openvino-bf16", "eager-bf16", 1, 3)), second)
    assert [run.commit for run in only.runs] == ["b"] and only.pairs[0].run == 0  # a run without rows is left out


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (replace(of(), width=768), "width is 512 in one and 768 in another"),
        (of(runs=(run("b", machine=replace(HOST, instruction_sets=("avx2", "avx512f"))),)), "one kind of machine"),
    ],
)
def test_what_is_not_alike_is_not_merged(
    other: Result, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in (("a.json", of()), ("b.json", other)):
        result.write(content, tmp_path / name)
    line = [str(tmp_path / name) for name in ("a.json", "b.json")]
    assert merge.main([*line, "-o", str(tmp_path / "c.json")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "c.json").exists()


def test_a_ratio_of_few_rounds_is_not_bold() -> None:
    few, enough = (tables.pairs(of(pair("openvino-fp32", "eager-fp32", 1, 2, n))) for n in (4, 5))
    told = "(0.10 to 99.00, n {}; not separable) |"
    assert f"| 2.00× {told.format(4)}" in few and f"| **2.00×** {told.format(5)}" in enough


def test_rows_say_what_was_called_unless_it_is_one_picture_in_one_step() -> None:
    plain = pair("openvino-bf16", "eager-bf16", 1, 2)
    assert "batch, steps" not in tables.pairs(of(plain))
    guided = replace(plain, steps=20, guidance_scale=7.5)
    assert "| 1, 20, guidance 7.5 | openvino-bf16 |" in tables.pairs(of(guided))


def test_the_results_page_is_up_to_date() -> None:
    assert report.RESULTS.read_text() == report.text()


def test_every_plot_is_there() -> None:
    page = report.RESULTS.read_text()
    for path in result.files():
        if result.read(path).pairs:
            assert path.with_suffix(".png").exists() and f"(results/{path.stem}.png)" in page


@pytest.mark.parametrize(
    ("rows", "verdicts"),
    [
        ([pair("tensorrt-fp16", "eager-fp16", 0.012, 0.060)], [True, True]),
        ([pair("tensorrt-fp16", "eager-fp16", 0.0125, 0.060)], [False, True]),
        ([pair("onnxruntime-fp16", "eager-fp16", 0.015, 0.090)], [True, False]),
        ([pair("tensorrt-fp16", "eager-fp16", 0.012, 0.060, wrong="eager-fp16")], [None, True]),
        ([pair("tensorrt-fp16", "eager-fp16", 0.012, 0.060, wrong="tensorrt-fp16")], [None, None]),
    ],
)
def test_targets(rows: list[Pair], verdicts: list[bool | None]) -> None:
    measured = of(*rows, runs=(run("a", gpu=H200),), device="NVIDIA H200")
    assert [target.passed for target in tables.targets(measured)] == verdicts
    assert len(tables.targets(replace(measured, device="another"))) == 1  # the bound in ms is for that GPU
    assert tables.targets(replace(measured, device="cpu")) == []


def test_a_gpu_has_its_table() -> None:
    slow = pair("tensorrt-fp16", "eager-fp16", 0.015, 0.060)
    left_out = Pair(ours="tensorrt-fp16", peer="eager-fp16", batch=1, steps=2, apart=False)
    rows = [slow, replace(left_out, reason="left out: the time was spent")]
    captured = replace(figures(0.002), remark="not one CUDA graph: why", gpu_seconds=0.001, p99_seconds=0.003)
    rows.append(replace(slow, peer="tensorrt-fp16+stages", peer_figures=captured))
    text = tables.pairs(of(*rows, runs=(run("a", gpu=H200),), device="NVIDIA H200"))
    assert "sdxl-turbo, 512x512**. Measured on NVIDIA H200 (driver 580.1, CUDA 13.0)" in text
    assert "| 1, 1 | tensorrt-fp16 | 15 (15) |" in text and "| 2 (2, 3) | 1 |" in text
    assert "left out: the time was spent" in text and "tensorrt-fp16+stages: not one CUDA graph: why" in text
    assert "at most 14: 15 (tensorrt-fp16), **missed**" in text
    assert "at least 5: 4 (tensorrt-fp16), **missed**" in text


def test_without_results_of_a_gpu_the_page_says_so(tmp_path: Path) -> None:
    for path in result.files():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert "Nothing has been measured yet" in report.text(tmp_path)
    rows = pair("tensorrt-fp16", "eager-fp16", 0.012, 0.060)
    result.write(of(rows, runs=(run("a", gpu=H200),), device="NVIDIA H200"), tmp_path / "gpu.json")
    text = report.text(tmp_path)
    assert "Nothing has been measured yet" not in text and "| tensorrt-fp16 | 12 (12) |" in text


@pytest.mark.parametrize(("own", "said"), [(0.005, "5.0 (1.0 to 9.0); at most 5: passed"), (0.0052, "**missed**")])
def test_the_servers_own_cost_has_a_bar(own: float, said: str) -> None:
    """It is the median of the rounds."""
    third = Quantiles(0.001, 0.002, 0.003)
    row = Served(
        format="jpeg", answer_bytes=2**20, clients=1, rounds=3, requests=60,
        server=Quantiles(0.007, 0.008, 0.009), echo=third, encoding=third, own_seconds=(0.009, own, 0.001),
    )  # fmt: skip
    text = cost_tables.served([Result("serve-cost", 512, 512, "cpu", None, None, (run("a"),), served=(row,))])
    assert "| 512x512, jpeg, 1024 KiB | 7.0 (8.0) | 1.0 (2.0) | 1.0 (2.0) |" in text and said in text


@pytest.mark.parametrize(
    ("precision", "slower", "said"),
    [
        ("fp32", 1.08, "1.080 (1.000 to 2.000), n = 3; at most 1.08: passed |"),
        ("fp32", 1.09, "1.090 (1.000 to 2.000), n = 3; at most 1.08: **missed** |"),
        ("bf16", 1.09, "1.090 (1.000 to 2.000), n = 3; at most 1.12: passed |"),
        ("fp16", 1.09, "1.090 (1.000 to 2.000), n = 3 |"),  # no bar
    ],
)
def test_slots_have_a_bar_for_their_precision(precision: str, slower: float, said: str) -> None:
    swap = Quantiles(0.01, 0.02, 0.03)
    row = Adapted(
        engine="openvino-x", graph="unet+lora", precision=precision, rank=32, matrices=9, plain_seconds=(1.0, 1.0, 1.0),
        slots_seconds=(2.0, slower, 1.0), load_seconds=(0.1,), swap=swap, before_a_launch=swap, swaps=9, rss_before=0,
        rss_after=0, equal_bits=True,
    )  # fmt: skip
    turbo = replace(of(), source="synthetic:sd-turbo", adapted=(row,))
    text = cost_tables.adapted([turbo])
    assert f"| synthetic:sd-turbo, 512x512, openvino-x, {precision}, rank 32 | {said}" in text
    assert "at most 50: passed" in text and "| yes |" in text
    assert "at most" not in cost_tables.adapted([replace(turbo, source="synthetic:sdxl-turbo")])
    row = replace(row, equal_bits=False)
    assert "| **no** |" in cost_tables.adapted([replace(turbo, adapted=(row, replace(row, equal_bits=None)))])
