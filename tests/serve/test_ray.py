"""The server on a real Ray cluster of this machine: its pictures, lost replicas, scaling and refusals."""

import base64
import concurrent.futures
import contextlib
import http.client
import io
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from turbochain.runtime import Pipeline

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # Ray's own
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # whose name hides that the node's address is then the loopback's
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}
PROMPT = "a cat"


@dataclass(frozen=True)
class Cluster:
    """Ray on this machine, and where its proxy listens."""

    address: str
    port: int

    def run(self, *arguments: str) -> None:
        """Deploy with Ray's own command, as a user would."""
        command = [sys.executable, "-m", "ray.serve.scripts", "run", "--non-blocking", "--address", self.address]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, done.stderr
        until(lambda: self.get("/readyz")[0] == 200)

    def get(self, path: str) -> tuple[int, bytes]:
        with contextlib.closing(self._connect()) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def draw(self, key: str | None = None, **body: Any) -> tuple[int, dict[str, str], Any]:
        """Return status, headers and JSON of an answer."""
        with contextlib.closing(self.ask(key, **body)) as connection:
            answer = connection.getresponse()
            return answer.status, {name.lower(): v for name, v in answer.getheaders()}, json.loads(answer.read())

    def ask(self, key: str | None = None, **body: Any) -> http.client.HTTPConnection:
        """Send a request, and do not wait for its answer."""
        connection, text = self._connect(), json.dumps({"prompt": PROMPT, **body})
        headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
        connection.request("POST", "/v1/images/generations", text, headers)
        return connection

    def metric(self, name: str) -> float:
        lines = self.get("/metrics")[1].decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def picture(answer: Any, at: int = 0) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["data"][at]["b64_json"]))))


def replicas() -> int | None:
    """How many draw; None while Ray deploys."""
    from ray import serve

    found = serve.status().applications["default"]
    return found.deployments["Drawing"].replica_states.get("RUNNING", 0) if found.status == "RUNNING" else None


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    os.environ.update(ENVIRONMENT)  # Ray reads it when it is imported
    import ray
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # pytest's are too long for the name of a socket
        ray.init("local", include_dashboard=False, num_cpus=4, object_store_memory=100 << 20, log_to_driver=False,
                 _temp_dir=folder)  # fmt: skip
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            yield Cluster(ray.get_runtime_context().gcs_address, port)
            serve.shutdown()
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def two(cluster: Cluster, sd: Path) -> Cluster:
    """Two replicas, and 16 pictures that may wait."""
    cluster.run("turbochain.runtime.serve.ray:app", f"bundle={sd}", "replicas=2")
    return cluster


@pytest.fixture(scope="module")
def expected(sd: Path) -> Callable[[int], np.ndarray]:
    """The pipeline's picture of a seed, of two steps."""
    with Pipeline.load(sd, threads=1) as pipe:
        made = pipe([PROMPT] * 12, seed=list(range(12)), num_inference_steps=2, output_type="uint8").images
    return lambda seed: made[seed]


def pids() -> set[int]:
    """The processes of the two replicas."""
    from ray import serve

    handle = serve.get_deployment_handle("Drawing", "default")
    found: set[int] = set()

    def both() -> bool:
        found.add(handle.ready.remote().result(timeout_s=60))  # of whichever answers
        return len(found) == 2

    until(both)
    return found


def test_two_replicas_draw_the_pipelines_pictures(two: Cluster, expected: Callable[[int], np.ndarray]) -> None:
    assert len(pids()) == 2
    status, _, answer = two.draw(seed=0, n=10, num_inference_steps=2)
    assert status == 200 and answer["seed"] == 0
    for seed in range(10):
        np.testing.assert_array_equal(picture(answer, seed), expected(seed))
    assert two.metric("turbochain_pictures_total") == 10
    assert two.get("/healthz")[0] == 200
    status, _, answer = two.draw(num_inference_steps=5)
    assert status == 400 and answer["error"]["param"] == "num_inference_steps"


def test_a_socket_draws(two: Cluster, expected: Callable[[int], np.ndarray]) -> None:
    from websockets.sync.client import connect

    with connect(f"ws://127.0.0.1:{two.port}/ws", max_size=None) as ws:
        for seed in range(3):
            ws.send(json.dumps({"id": seed, "prompt": PROMPT, "seed": seed, "num_inference_steps": 2, "format": "png"}))
            message = ws.recv(timeout=60)
            assert isinstance(message, bytes), message
            file = message[message.index(b"\x89PNG") :]
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(file))), expected(seed))


def test_who_hangs_up_does_not_have_it_drawn(two: Cluster) -> None:
    before = two.metric("turbochain_pictures_total")
    left = [two.ask(seed=0, n=10, num_inference_steps=4) for _ in range(2)]  # 20: 4 are at Ray, 16 wait
    until(lambda: two.metric("turbochain_waiting") > 0)
    for connection in left:
        connection.close()
    until(lambda: two.metric("turbochain_waiting") == 0)
    assert two.draw(num_inference_steps=1)[0] == 200
    assert two.metric("turbochain_pictures_total") < before + 20


def test_a_killed_replica_loses_no_picture(two: Cluster, expected: Callable[[int], np.ndarray]) -> None:
    victim = min(pids())
    drawn = threading.Semaphore(0)

    def client(first: int) -> list[tuple[int, int, Any]]:
        found = []
        for i in range(15):
            seed = (first + i) % 12
            status, _, answer = two.draw(seed=seed, num_inference_steps=2)
            found.append((seed, status, answer))
            drawn.release()
        return found

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        running = [pool.submit(client, first) for first in range(3)]
        for _ in range(9):
            assert drawn.acquire(timeout=60)
        os.kill(victim, signal.SIGKILL)
        answers = [answer for task in running for answer in task.result(timeout=120)]
    for seed, status, answer in answers:
        assert status == 200, answer
        np.testing.assert_array_equal(picture(answer), expected(seed))
    until(lambda: replicas() == 2)
    assert victim not in pids()


def test_too_many_are_told_when_to_come_again(two: Cluster) -> None:
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda seed: two.draw(seed=seed, num_inference_steps=4), range(40)))
    refused = [(headers, answer) for status, headers, answer in answers if status != 200]
    assert len(refused) in range(1, 40)
    for headers, answer in refused:
        assert answer["error"]["code"] == "overloaded"
        assert int(headers["retry-after"]) >= 1


def test_a_replica_draws_with_loras_for_who_has_the_key(
    cluster: Cluster, slotted: Path, reference_lora: Path, tmp_path: Path
) -> None:
    shutil.copy(reference_lora, tmp_path / "ink.safetensors")
    cluster.run("turbochain.runtime.serve.ray:app", f"bundle={slotted}", f"lora_dir={tmp_path}", "api_key=secret")
    for key in (None, "wrong"):
        status, _, answer = cluster.draw(key=key)
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
    with Pipeline.load(slotted, threads=1) as pipe:
        pipe.load_lora_weights(reference_lora, adapter_name="ink")
        for weight in (0.8, 0.0, -0.5):
            pipe.set_adapters(["ink"], [weight])
            right = pipe(PROMPT, seed=[7], output_type="uint8").images[0]
            status, _, answer = cluster.draw("secret", seed=7, loras=[{"name": "ink", "scale": weight}])
            assert status == 200, answer
            np.testing.assert_array_equal(picture(answer), right)
    status, _, answer = cluster.draw("secret", loras=[{"name": "oil"}])
    assert status == 400 and "there is no LoRA 'oil': choose from ink" in answer["error"]["message"]


def test_replicas_come_with_load_and_go_without(cluster: Cluster, sd: Path, tmp_path: Path) -> None:
    arguments = {"bundle": [str(sd)], "min_replicas": 0, "max_replicas": 2, "upscale_delay": 0.5, "downscale_delay": 2}
    config = {
        "http_options": {"host": "127.0.0.1", "port": cluster.port},
        "applications": [
            {"name": "default", "import_path": "turbochain.runtime.serve.ray:app", "args": arguments},
        ],
    }
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config))  # which is YAML, too
    cluster.run(str(file))
    until(lambda: replicas() == 0 and cluster.get("/readyz")[0] == 200)
    stop = threading.Event()

    def client(_: int) -> set[str]:
        found = set()
        while not stop.is_set():
            status, _headers, answer = cluster.draw(num_inference_steps=4)
            found.add("drawn" if status == 200 else answer["error"]["message"])
        return found

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        running = [pool.submit(client, i) for i in range(6)]
        try:
            until(lambda: replicas() == 2)
        finally:
            stop.set()
        assert [task.result(timeout=60) for task in running] == [{"drawn"}] * 6
    until(lambda: replicas() == 0)
