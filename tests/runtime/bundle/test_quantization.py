"""Ranges and their levels, against PyTorch's own; which layers an engine computes in int8."""

import pytest
import torch
from torch.ao.quantization import MinMaxObserver

from turbochain.runtime.bundle.quantization import Layer, Quantization, Range, Rounding


@pytest.mark.parametrize(("low", "high"), [(-0.28, 6.5), (-60.0, 70.5), (0.5, 3.0), (-3.0, -1.0), (-1e-3, 2e-3)])
def test_levels_are_those_of_pytorch(low: float, high: float) -> None:
    observer = MinMaxObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine)
    observer(torch.tensor([low, high]))
    scale, zero = observer.calculate_qparams()
    seen = Range(low, high)
    assert seen.step == pytest.approx(float(scale), rel=1e-6) and seen.zero == int(zero)


def test_a_tensor_of_zeros_has_a_step() -> None:
    assert Range(0.0, 0.0).step > 0 and Range(0.0, 0.0).zero == 0


def of(reads: dict[str, float], makes: dict[str, float], macs: dict[str, int] | None = None) -> Quantization:
    def rounding(error: float) -> Rounding:
        return Rounding(Range(-1.0, 1.0), error)

    layers = {
        name: Layer(rounding(error), 0.0, rounding(makes[name]) if name in makes else None, (macs or {}).get(name, 1))
        for name, error in reads.items()
    }
    return Quantization(layers, 1, {})


def test_the_most_that_is_within_the_budget_is_kept() -> None:
    """Errors add up as squares: 0.03 and 0.04 are 0.05 together."""
    found = of({"a": 0.12, "b": 0.03, "c": 0.04}, {})
    assert {*found.kept(0.029)} == set()
    assert {*found.kept(0.031)} == {"b"} == {*found.kept(0.049)}
    assert {*found.kept(0.0501)} == {"b", "c"}
    assert {*found.kept(0.1301)} == {"a", "b", "c"}


def test_results_count_where_they_are_rounded() -> None:
    found = of({"a": 0.01, "b": 0.02}, {"a": 0.1})
    assert {*found.kept(0.03)} == {"a", "b"} and {*found.kept(0.03, results=True)} == {"b"}


def test_what_multiplies_most_comes_first() -> None:
    """Either fits alone: the one with three times the error has a hundred times the work."""
    found = of({"small": 0.01, "large": 0.03}, {}, {"small": 10, "large": 1000})
    assert {*found.kept(0.0301)} == {"large"} and {*found.kept(0.02)} == {"small"}


def test_a_weight_of_7_bits_costs_twice_as_much() -> None:
    """0.03 and 0.04 are 0.05 together, 0.03 and 0.08 are 0.0854."""
    found = Quantization({"a": Layer(Rounding(Range(-1.0, 1.0), 0.03), 0.04, None, 1)}, 1, {})
    assert found.kept(0.0501) and not found.kept(0.0499)
    assert found.kept(0.0855, bits=7) and not found.kept(0.0853, bits=7)
