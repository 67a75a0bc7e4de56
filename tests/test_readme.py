"""What the README says is true of this tree."""

import re
from pathlib import Path

import pytest

import report
import supported
from turbochain.engines import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_its_figures_are_those_of_the_results() -> None:
    block = README.split(report.START)[1].split(report.END)[0]
    assert block == report.headline()
    assert len(block.splitlines()) == 2 + 5
    cost = README.split(report.BUILD)[1].split(report.END_BUILD)[0]
    assert cost == report.build_cost() and len(cost.splitlines()) == 2 + 2


def test_what_is_supported_is_what_the_package_has() -> None:
    assert README.split(report.MODELS)[1].split(report.END_MODELS)[0] == supported.models()
    page = report.EXPORT.read_text()
    assert page.split(report.RECIPES)[1].split(report.END_RECIPES)[0] == supported.distilled()


def test_its_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.M)
    assert phony
    named = set(re.findall(r"make ([a-z-]+)", README))
    assert named <= set(phony[1].split()) and {"demo", "test", "check", "check-full", "bench"} <= named


def test_its_options_exist(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    told = capsys.readouterr().out
    row = next(line for line in README.splitlines() if line.startswith("| `build-engine SOURCE"))
    options = re.findall(r"(?<![\w-])(--[a-z]+)", row)
    assert len(options) > 5 and all(option in told for option in options)


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
