"""A pipeline's memory does not grow, its threads are as many as asked, and every thread and process draws the same."""

import hashlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from launches import PROMPTS, uint8

from turbochain.runtime import Bundle, Pipeline, selection
from turbochain.runtime.backends import cpus

MEMORY = """
import sys
from turbochain.runtime import Pipeline

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024

with Pipeline.load(sys.argv[1], threads=1, prompt_cache_bytes=2**20) as pipe:  # 53 prompts fill it
    for i in range(100):
        pipe(f"prompt {i}", seed=i, output_type="uint8")
    before = resident()
    for i in range(400):
        pipe(f"prompt {i}", seed=i, output_type="uint8")
    print(resident() - before)
"""


def test_memory_does_not_grow_over_400_calls(sd: Path) -> None:
    """One call's picture or embeddings kept would be 5 or 8 MiB in all."""
    done = subprocess.run([sys.executable, "-c", MEMORY, str(sd)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2  # MiB


def test_buffers_stay_where_they_are(sd: Path) -> None:
    bundle = Bundle.open(sd)
    chain = bundle.open_chain()
    executor = selection.open_executor(bundle, selection.select(chain))
    executor.load(chain.graphs)
    random, addresses = np.random.default_rng(0), {}
    for steps in (1, 3, 1):
        table = str(steps)
        feeds = {n: random.standard_normal((steps, *t.shape), np.float32) for n, t in chain.tensors.items()}
        feeds |= chain.columns(table) | {
            "latents": feeds["latents"][0],
            "guidance_scale": np.float32([2]),
            **dict.fromkeys(("input_ids", "negative_input_ids"), np.full((1, 77), 7, np.int32)),
        }
        everything = [name for name in chain.tensors if name != "image"]
        results = executor.execute(chain.plan(table, modes=chain.chain.modes, downloads=everything), feeds).arrays
        assert set(results) == set(chain.tensors)
        now = {name: array.ctypes.data for name, array in results.items()}
        assert now == (addresses or now)
        addresses = now
    executor.close()


def test_a_result_is_not_a_buffer(one: Pipeline) -> None:
    first = uint8(one, "a", seed=1)
    kept = first.copy()
    assert not np.array_equal(uint8(one, "b", seed=2), kept)
    np.testing.assert_array_equal(first, kept)


def test_several_threads_make_the_pictures_of_one(three: Pipeline) -> None:
    calls = [
        {"prompt": PROMPTS[i % 5 : i % 5 + 1 + i % 2], "seed": i, "num_inference_steps": 1 + i % 4} for i in range(12)
    ]
    three.prompt_cache.clear()
    expected = [uint8(three, **call) for call in calls]
    three.prompt_cache.clear()
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda call: uint8(three, **call), calls))
    for result, reference in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, reference)


def threads_alive() -> int:
    """Count this process's threads: the fewest of 20 looks, as Linux lists a thread for a moment after its end."""
    return min(len(os.listdir("/proc/self/task")) for _ in range(20) if not time.sleep(0.01))


@pytest.mark.usefixtures("all_cores")
def test_threads_are_what_was_asked(sd: Path, one: Pipeline) -> None:
    expected, started = uint8(one, "a cat", seed=1, num_inference_steps=3), {}
    most = cpus.available()
    for threads in (1, most):
        before = threads_alive()
        with Pipeline.load(sd, threads=threads) as pipe:
            started[threads] = threads_alive() - before
            difference = np.abs(uint8(pipe, "a cat", seed=1, num_inference_steps=3).astype(int) - expected)
        assert difference.max() <= 1
        assert (difference > 0).mean() <= 1e-3
    models = [graph for graph in one.bundle.open_chain().graphs.values() if graph.component]
    assert started == {1: 0, most: len(models) * (most - 1)}  # the calling thread is each graph's first


@pytest.mark.usefixtures("all_cores")
def test_a_containers_quota_bounds_the_default(sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "quota", lambda: 1)  # a container's files have tests of their own
    before = threads_alive()
    with Pipeline.load(sd) as pipe:
        assert threads_alive() == before
        uint8(pipe, "a cat", seed=1)


DIGESTS = """
import hashlib, json, sys
from turbochain.runtime import Pipeline

with Pipeline.load(sys.argv[1]) as pipe:
    prompts = json.loads(sys.argv[2])
    pictures = [pipe(p, seed=i, num_inference_steps=1 + i % 4, output_type="uint8") for i, p in enumerate(prompts)]
print(json.dumps([hashlib.sha256(p.images.tobytes()).hexdigest() for p in pictures]))
"""


def test_another_process_makes_the_same_pictures(sdxl: Path, three: Pipeline) -> None:
    line = [sys.executable, "-c", DIGESTS, str(sdxl), json.dumps(PROMPTS)]
    made = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    pictures = [uint8(three, p, seed=i, num_inference_steps=1 + i % 4) for i, p in enumerate(PROMPTS)]
    expected = [hashlib.sha256(p.tobytes()).hexdigest() for p in pictures]
    assert json.loads(made) == expected
