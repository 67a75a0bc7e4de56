"""An engine without checks is verified when it is first loaded, and the result is kept."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import called, reseal
from wrong_bundles import TABLES, Copy, scaled

from turbochain.runtime import BundleError, Pipeline, VerificationError
from turbochain.runtime.bundle import hashing


@pytest.fixture
def foreign(sd: Path, copy_of: Copy) -> Path:
    """A bundle whose engine has not been verified, as one that was built on another machine."""
    bundle = copy_of(sd)
    (path,) = bundle.glob("engines/*/engine.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"checks": {}, "verified": {}}))
    return bundle


def kept(bundle: Path) -> dict[str, list[dict[str, Any]]]:
    (path,) = bundle.glob("engines/*/engine.json")
    return json.loads(path.read_text())["checks"]


def test_an_unverified_engine_is_verified_on_its_first_load(
    sd: Path, foreign: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert "unverified: " in called("turbochain", "inspect", foreign).stdout
    Pipeline.load(foreign).close()
    assert "it is verified now, which happens once" in caplog.text
    assert kept(foreign) == {"text-to-image": kept(sd)["text-to-image"]}
    with Pipeline.load(foreign, chain="image-to-image"):
        assert kept(foreign) == kept(sd) and len(kept(sd)) == 2
    assert [p.name for p in foreign.glob("engines/*/*")] == ["engine.json"]
    assert "unverified: " not in called("turbochain", "inspect", foreign).stdout
    caplog.clear()
    with Pipeline.load(foreign) as pipe:
        assert pipe("a cat", seed=0, output_type="uint8").images.any()
    assert not caplog.records


def test_verify_keeps_what_it_found_of_an_unverified_engine(sd: Path, foreign: Path) -> None:
    assert called("turbochain", "verify", foreign).returncode == 0
    assert kept(foreign) == kept(sd)


def test_an_unverified_engine_that_errs_is_refused_each_time(foreign: Path) -> None:
    scaled("m", 1.01)(foreign, Path())
    reseal(foreign)
    for _ in range(2):
        with pytest.raises(VerificationError, match=r"schedule: relative_l2 is .*, the bound is ≤ 0\.0001"):
            Pipeline.load(foreign)
    assert kept(foreign) == {}
    assert called("turbochain", "verify", foreign).returncode == 1
    assert kept(foreign).keys() == {"image-to-image"}  # its own table is right


def test_the_checks_of_another_table_are_not_believed(sd: Path, copy_of: Copy) -> None:
    """The engine's graphs are the same, but not what the chain makes of them."""
    path = copy_of(sd)
    scaled("m", 1.01)(path, Path())
    manifest = json.loads((path / "bundle.json").read_text())
    manifest["files"][TABLES] = vars(hashing.describe(path / TABLES))
    (path / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(VerificationError, match="schedule: relative_l2 is"):
        Pipeline.load(path)


def test_a_damaged_reference_verifies_nothing(foreign: Path) -> None:
    file = foreign / "reference.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match=r"'reference\.safetensors' is damaged"):
        Pipeline.load(foreign)
    assert kept(foreign) == {}


def test_an_unverified_engine_in_a_folder_that_cannot_be_written(foreign: Path, tmp_path: Path) -> None:
    """In a mount namespace of its own, which needs no privilege."""
    script = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && exec "$2" generate "$1" "a cat" -o "$3"'
    own = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    turbochain = Path(sys.executable).with_name("turbochain")
    line = [*own, foreign, turbochain, tmp_path / "cat.png"]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and (tmp_path / "cat.png").exists(), done
    assert "is verified again at each load: cannot write " in done.stderr and kept(foreign) == {}
