"""Every variant of variants.py loads and runs."""

from pathlib import Path

import pytest

import cost_tables
import result
import variants


@pytest.mark.full
def test_every_variant_runs(sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [str(sd), "--runs", "2", "--graphs", "unet", "--results", str(tmp_path)]
    assert variants.main(line) == 0
    (path,) = tmp_path.glob("*.json")
    found = result.read(path)
    own, *others = found.variants
    exact = [row for row in others if row.variant == "fp32"]
    assert len(exact) == (own.precision != "fp32") and all(row.error < 1e-3 for row in exact)
    assert "| one thread | " in cost_tables.variants(found)
    assert own.ratio is None and own.seconds > 0 and own.variant in capsys.readouterr().out
    assert all(row.ratio and row.ratio.n == 2 and row.error < 0.1 and row.load_seconds > 0 for row in others)
    assert [row.variant for row in others if row.cache_bytes] == ["graph from OpenVINO's cache on disk"]
    assert (
        len({row.error for row in others}) > 2
    )  # rewrites are left out: other sums, which a decoder's uint8 would hide
