"""Add an engine for OpenVINO to a bundle that was built for another backend; OpenVINO reads the bundle's own graphs."""

import dataclasses
import shutil
from pathlib import Path

import small_bundle

from turbochain.runtime import Bundle
from turbochain.runtime.bundle import strict_json
from turbochain.runtime.bundle.manifest import Engine


def copied(bundle: Path, folder: Path, precision: str = "fp32") -> Path:
    """Copy a bundle into a folder; the copy's only engine is OpenVINO's, and nothing is verified again at each load."""
    path = folder / f"openvino-{precision}.bundle"
    shutil.copytree(bundle, path, ignore=shutil.ignore_patterns("engines"))
    opened = Bundle.open(path)
    small_bundle.write_engine(path, "openvino", [*opened.manifest.graphs])
    file, chains = path / "engines/openvino/engine.json", opened.manifest.chains
    made = strict_json.read(Engine, file)
    key = dataclasses.replace(made.key, options={**made.key.options, "inference_precision": precision})
    verified = {name: opened.open_chain(name).digest for name in chains}
    changed = dataclasses.replace(made, key=key, checks=dict.fromkeys(chains, ()), verified=verified)
    file.write_text(strict_json.write(changed))
    return path
