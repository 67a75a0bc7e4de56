"""What `turbochain inspect` shows of a bundle, against the bundle's own files."""

import json
from pathlib import Path

from conftest import ROOT, called
from safetensors.numpy import load_file

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
