"""What is expected before a build against what builds took."""

from pathlib import Path

import pytest

import result
from turbochain.export import estimate, families
from turbochain.export.families import Shape, common
from turbochain.export.sources import presets, synthetic

RESULTS = sorted(result.FOLDER.glob("*-build-cpu-*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_it_is_what_a_measured_build_took_or_a_little_more(path: Path) -> None:
    measured = result.read(path)
    (build,) = measured.builds
    preset = measured.source.removeprefix("synthetic:")
    parts = synthetic.models(preset)
    family = families.of(presets.PRESETS[preset].pipeline)
    needs = estimate.needs(
        family,
        {name: dict(part.config.to_dict() if name.startswith("text") else part.config) for name, part in parts.items()},
        {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
        Shape(measured.width, measured.height, batch=1),
        common.precisions(family, build.precision),
        fetched=0,
    )
    peaks = {phase["name"]: phase["peak_bytes"] for phase in build.build["phases"]}
    peaks["export"] = max(peak for name, peak in peaks.items() if name.startswith("export "))
    for phase, expected in needs.memory.items():
        assert peaks[phase] <= expected <= 1.5 * peaks[phase], phase
    written = sum(build.build["engine_bytes"].values())
    assert 0.95 * written <= needs.disk <= 1.1 * written


def test_it_grows_with_the_picture() -> None:
    parts = synthetic.models("sd-turbo-mini")
    configs = {n: p.config.to_dict() if n.startswith("text") else dict(p.config) for n, p in parts.items()}
    counts = dict.fromkeys(parts, 10**6)
    family = families.of("StableDiffusionPipeline")
    needs = [
        estimate.needs(family, configs, counts, shape, common.precisions(family, "fp32"), 0).memory["verify"]
        for shape in (Shape(512, 512, 1), Shape(512, 512, 4), Shape(2048, 2048, 1), Shape(4096, 4096, 1))
    ]
    assert needs == sorted(needs) and needs[3] > 100 * 2**30  # attention alone has 512² · 512² scores
