"""Twenty minutes of clients of every sort: the server's memory does not grow, and no descriptor is left open.

`SOAK_SECONDS=60 pytest -m full tests/serve/test_soak.py` is a shorter one.
"""

import base64
import contextlib
import io
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from asking import GENERATE, Client, connect, exchange, until
from PIL import Image
from websockets.sync.client import connect as ws_connect

from turbochain.runtime.serve.listen import TRIM_SECONDS

SECONDS = float(os.environ.get("SOAK_SECONDS", 20 * 60))
WARM_UP = 0.25  # of the time: the caches fill, and the allocator finds its size
PARTS = 3  # of the rest; after each the server is left alone and measured
MEMORY = {"PYTHONMALLOC": "malloc"}
"""As in runtime/serve/deploy. Python's own allocator keeps a MiB for as long as one object in it lives, which hides
what is in use: with it this server grew by 1.5% in 20 minutes, ever more slowly."""
WORDS = ("a", "cat", "dog", "red", "snow", "house", "🦊", "of glass")
PROMPTS = [" ".join(random.Random(i).choices(WORDS, k=5)) for i in range(200)]
"""No more than the server's cache holds, and the same of pictures: what it keeps of each new one is no leak."""


def noise(seed: int) -> str:
    file, numbers = io.BytesIO(), np.random.default_rng(seed)
    Image.fromarray(numbers.integers(0, 256, (100 * (seed + 1), 500), np.uint8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


IMAGES = [noise(seed) for seed in range(8)]


def steady(url: str, numbers: random.Random) -> None:
    client = Client(url)
    for _ in range(20):
        form = numbers.choice(("png", "jpeg", "webp"))
        answer = client.draw(numbers.choice(PROMPTS), n=numbers.randrange(1, 4), output_format=form)
        assert answer.status in (200, 429, 503), answer
    client.close()


def streaming(url: str, numbers: random.Random) -> None:
    client = Client(url)
    more = {"stream": True, "partial_images": 2, "num_inference_steps": 4}
    assert client.draw(numbers.choice(PROMPTS), **more).status in (200, 429, 503)
    client.close()


def leaving(url: str, numbers: random.Random) -> None:
    body = b'{"prompt": "%s", "n": 3}' % numbers.choice(PROMPTS).encode()
    head = (
        f"POST {GENERATE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    with connect(url) as connection:
        connection.sendall((head.encode() + b"\r\n\r\n" + body)[: numbers.randrange(20, 400)])
        time.sleep(numbers.random() / 50)


def editing(url: str, numbers: random.Random) -> None:
    client = Client(url)
    body = {"prompt": numbers.choice(PROMPTS), "init_images": [numbers.choice(IMAGES)]}
    assert client.ask("POST", "/sdapi/v1/img2img", body).status in (200, 429, 503)
    assert client.get("/sdapi/v1/progress").status == client.ask("POST", "/sdapi/v1/interrupt").status == 200
    client.close()


def live(url: str, numbers: random.Random) -> None:
    """Send messages that end each other, of which some are malformed."""
    with ws_connect(f"{url.replace('http', 'ws')}/ws") as ws:
        for id in range(numbers.randrange(1, 30)):
            ws.send("{" if id % 8 == 1 else json.dumps({"id": id, "prompt": numbers.choice(PROMPTS)}))
        if numbers.random() < 0.5:  # else it hangs up while they are drawn
            ws.recv(60)


def wrong(url: str, numbers: random.Random) -> None:
    client = Client(url)
    assert client.draw("a cat", num_inference_steps=99).status == 400
    assert client.ask("POST", GENERATE, b" " * (1 << 20) + b" ", Content_Type="application/json").status == 413
    assert client.get(f"/{numbers.random()}").status == 404
    client.close()
    with contextlib.suppress(ConnectionError):
        exchange(url, numbers.randbytes(500) + b"\r\n\r\n")


Sort = Callable[[str, random.Random], None]
CLIENTS: tuple[Sort, ...] = (steady, steady, steady, streaming, leaving, wrong, editing, live)


@pytest.mark.full
def test_a_server_that_is_used_does_not_grow(sd: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-c", "import sys; from turbochain.runtime.commands.main import main; sys.exit(main())"]
    line += ["serve", str(sd), "--port", "0", "--threads", "1", "--backend", "onnxruntime"]
    log = tmp_path / "log"  # no pipe: it fills, as each garbage is a line, and the server would wait for a reader
    with log.open("w") as file:
        server = subprocess.Popen(line, stderr=file, env={**os.environ, **MEMORY})
    try:
        until(lambda: log.read_text().endswith("\n"))
        url = log.read_text().split()[-1]
        until(lambda: Client(url).get("/readyz").status == 200)
        folder = Path(f"/proc/{server.pid}")
        parts = (SECONDS * WARM_UP, *(SECONDS * (1 - WARM_UP) / PARTS,) * PARTS)

        def use(seconds: float, part: int) -> None:
            """Let clients of every sort come for so long."""
            end = time.monotonic() + seconds

            def run(number: int) -> int:
                numbers, count = random.Random(f"{part} {number}"), 0
                while time.monotonic() < end:
                    CLIENTS[number](url, numbers)
                    count += 1
                return count

            with ThreadPoolExecutor(len(CLIENTS)) as pool:
                assert min(pool.map(run, range(len(CLIENTS)))) > 0

        def resident() -> int:
            """Return the bytes that are left when nobody asks for anything, and what is free has been given back."""
            until(lambda: len(descriptors()) <= len(before))
            time.sleep(2 * TRIM_SECONDS + 5)
            return int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        def descriptors() -> list[str]:
            return sorted(os.readlink(file) for file in (folder / "fd").iterdir() if file.is_symlink())

        before, sizes = descriptors(), []
        for part, seconds in enumerate(parts):
            use(seconds, part)
            sizes.append(resident())
        growth = sizes[-1] / sizes[0] - 1
        told = ", ".join(f"{size / 2**20:.1f}" for size in sizes)
        print(f"\n{SECONDS:g} s: {told} MiB, growth {100 * growth:.2f}%, {len(before)} descriptors")
        assert growth <= 0.01, told
        assert server.poll() is None
    finally:
        server.terminate()
        server.wait(60)
    said = log.read_text()
    assert (server.returncode, said.count("Traceback")) == (0, 0), said[-5000:]
