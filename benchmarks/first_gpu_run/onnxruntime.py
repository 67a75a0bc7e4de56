"""Step: ONNX Runtime's CUDA provider on a miniature, if onnxruntime-gpu is installed."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from turbochain.engines import build
from turbochain.runtime import Pipeline, backends
from turbochain.runtime.errors import InputError

from .chains import figures
from .results import Report

BUNDLE = "onnxruntime.bundle"


def run(report: Report, prepared: Path, runs: int = 30) -> None:
    """Build an engine, which verifies it against diffusers, and report its figures; or why that is left out."""
    try:
        backends.get("onnxruntime").device("cuda")
    except InputError as error:
        report.add("left out", str(error))
        return
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder, BUNDLE)
        shutil.copytree(prepared / BUNDLE, bundle)
        if report.attempt("build", lambda: _build(bundle)):
            with Pipeline.load(bundle, backend="onnxruntime", device="cuda") as pipe:
                report.attempt("figures", lambda: figures(pipe, runs))


def _build(bundle: Path) -> dict[str, Any]:
    made = build(str(bundle), bundle, backend="onnxruntime", device="cuda", quiet=True)
    return {f"{c.stage}: {c.metric}": c.value for checks in made.checks.values() for c in checks}
