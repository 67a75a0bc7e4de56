"""The estimate that is made before a build, against what builds took."""

from pathlib import Path
from typing import Any

import pytest

import result
from turbochain.export import estimate, families, tasks
from turbochain.export.chains import Layout
from turbochain.export.families import Family, Shape
from turbochain.export.sources import presets, synthetic

RESULTS = sorted(result.FOLDER.glob("*-build-cpu-*.json"))


def configs(parts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Component → config, as a checkpoint has it."""
    found = {n: p.config.to_dict() if n.startswith("text") else dict(p.config) for n, p in parts.items()}
    return {name: config | {"_class_name": type(parts[name]).__name__} for name, config in found.items()}


def text_to_image(family: Family, configs: dict[str, Any], *shapes: Shape) -> Layout:
    """What a build for text-to-image makes: the measured ones were."""
    return Layout(family, configs, tasks.find(["text-to-image"]), shapes)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_it_is_what_a_measured_build_took_or_a_little_more(path: Path) -> None:
    measured = result.read(path)
    (build,) = measured.builds
    preset = measured.source.removeprefix("synthetic:")
    parts = synthetic.models(preset)
    family = families.of(presets.PRESETS[preset].pipeline)
    layout = text_to_image(family, configs(parts), Shape(measured.height, measured.width, batch=1))
    needs = estimate.needs(
        layout.graphs(),
        layout.configs,
        {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
        layout.precisions(build.precision),
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
    counts, family = dict.fromkeys(parts, 10**6), families.of("StableDiffusionPipeline")

    def verify(*shapes: Shape) -> float:
        layout = text_to_image(family, configs(parts), *shapes)
        return estimate.needs(layout.graphs(), layout.configs, counts, layout.precisions("fp32"), 0).memory["verify"]

    shapes = (Shape(512, 512, 1), Shape(512, 512, 4), Shape(2048, 2048, 1), Shape(4096, 4096, 1))
    needs = [verify(shape) for shape in shapes]
    assert needs == sorted(needs) and needs[3] > 100 * 2**30  # attention alone has 512² · 512² scores
    assert verify(*shapes) >= needs[3]  # a chain of each
