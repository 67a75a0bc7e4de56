"""The interval of a ratio's median, when a pair has enough rounds, and what else the machine did meanwhile."""

import multiprocessing
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from scipy import stats

import figures
import noise
import tables
from figures import interval, spread
from rows import Noise


@pytest.mark.parametrize("n", [1, 4, 5, 7, 8, 11, 21, 50])
def test_the_interval_holds_the_median_as_often_as_scipy_says(n: int) -> None:
    values = np.random.default_rng(n).lognormal(size=n)
    of_scipy = stats.quantile_test(values, q=float(np.median(values)), p=0.5).confidence_interval(0.9)
    found = interval(values)
    if np.isnan([of_scipy.low, of_scipy.high]).any():
        assert found is None
    else:
        assert found == pytest.approx((of_scipy.low, of_scipy.high), abs=0)


def test_a_ratio_tells_how_well_it_is_known() -> None:
    known, wide, both = spread([1.5] * 7), spread([1.0, 1.2, 1.4, 1.6, 1.8]), spread([0.9, 1.0, 1.0, 1.0, 1.1])
    assert figures.is_narrow(known) and not figures.is_narrow(wide)
    assert "±" not in tables.ratio(known) and "±29%" in tables.ratio(wide)
    assert "not separable" in tables.ratio(both) and "not separable" not in tables.ratio(wide)
    assert not figures.is_narrow(spread([1.0]))


def _work(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_the_counters_are_those_that_psutil_reads(tmp_path: Path) -> None:
    before = psutil.cpu_times()
    found = noise.read()
    after = psutil.cpu_times()
    for name, value in (("idle", found.idle), ("steal", found.steal)):
        low, high = (of.idle + of.iowait if name == "idle" else of.steal for of in (before, after))
        assert low - 1e-6 <= value <= high + 1e-6
    busy = [of.user + of.nice + of.system + of.irq + of.softirq for of in (before, after)]
    assert busy[0] - 1e-6 <= found.busy <= busy[1] + 1e-6


def test_another_process_is_noticed() -> None:
    before = noise.read()
    other = multiprocessing.get_context("fork").Process(target=_work, args=(0.4,))
    other.start()
    other.join()
    after = noise.read()
    seen = noise.between(before, after, 0.0)
    whole = (after.busy + after.idle + after.steal) - (before.busy + before.idle + before.steal)
    assert seen.others * whole >= 0.35
    assert noise.between(before, after, after.busy - before.busy).others == 0
    assert (
        tables.disturbed(Noise(0.03, 0.5, None))
        == "3% of the time stolen by the hypervisor, 50% of the time other processes"
    )
    assert tables.disturbed(Noise(0.0, 0.01, None)) is None
    assert tables.disturbed(Noise(0.0, 0.0, (2400.0, 2398.0))) is None
    assert tables.disturbed(Noise(0.0, 0.0, (2400.0, 1200.0))) == "2400 MHz before and 1200 after"
