"""What `turbochain inspect` shows of a bundle, against the bundle's own files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, called
from safetensors.numpy import load_file

from turbochain.runtime import BundleError
from turbochain.runtime.checks.verify import verify_bundle

GOLDEN = ROOT / "tests" / "golden" / "bundle"


def test_tables_as_json_are_the_manifests_entries_and_the_files_rows() -> None:
    shown = json.loads(called("turbochain", "inspect", GOLDEN, "--json").stdout)["chains"]
    chains = json.loads((GOLDEN / "bundle.json").read_text())["chains"]
    assert shown.keys() == chains.keys()
    for name, chain in chains.items():
        arrays = load_file(GOLDEN / chain["tables_file"])
        assert shown[name]["tables"].keys() == chain["tables"].keys()
        for table, entry in chain["tables"].items():
            found = shown[name]["tables"][table]
            assert {**found, **entry, "rows": found["rows"]} == found and len(found["rows"]) == entry["rows"]
            for field in ("m", "v", "w", "start", "draws_noise", "input_scale"):
                assert [row[field] for row in found["rows"]] == arrays[f"{table}/{field}"].tolist()


def test_an_engines_checks_are_told_by_chain(sd: Path) -> None:
    (made,) = (json.loads(file.read_text()) for file in sd.glob("engines/*/engine.json"))
    lines = called("turbochain", "inspect", sd).stdout.splitlines()
    for chain, checks in made["checks"].items():
        (line,) = (line for line in lines if line.startswith(f"  {chain} checked: "))
        assert line.count(";") == len(checks) - 1


def test_an_engine_that_lacks_the_first_chain(sd: Path, copy_of: Callable[[Path], Path]) -> None:
    """It fits for the other one, which is verified."""
    bundle = copy_of(sd)
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["chains"] = dict(reversed(manifest["chains"].items()))
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    (file,) = bundle.glob("engines/*/engine.json")
    made = json.loads(file.read_text())
    for of, name in (("graphs", "vae_encoder"), ("graphs", "start"), ("checks", "image-to-image")):
        del made[of][name]
    file.write_text(json.dumps(made))
    shown = called("turbochain", "inspect", bundle).stdout
    lacks = "it lacks vae_encoder, start of the chain image-to-image"
    assert f"fits this machine for text-to-image alone: {lacks}\n  to add the others: build-engine {bundle}" in shown
    _, checks = verify_bundle(bundle)
    assert checks.keys() == {"text-to-image"} and all(check.passed for check in checks["text-to-image"])
    with pytest.raises(BundleError, match=lacks):
        verify_bundle(bundle, chain="image-to-image")
