"""Ask a server under test, over connections that stay open or with raw bytes."""

import base64
import http.client
import io
import json
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

GENERATE = "/v1/images/generations"


@dataclass(frozen=True)
class Answer:
    """What a server has answered."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object of a refusal, whose form is checked."""
        assert self.status >= 400 and self.headers["content-type"] == "application/json", self
        error = self.json["error"]
        assert error.keys() == {"message", "type", "param", "code"} and error["message"] and error["type"], error
        return error

    @property
    def pictures(self) -> list[np.ndarray]:
        assert self.status == 200, self.body
        files = [base64.b64decode(item["b64_json"]) for item in self.json["data"]]
        return [np.asarray(Image.open(io.BytesIO(file))) for file in files]


class Client:
    """A connection that is kept alive; `address`: which of this machine's it comes from."""

    def __init__(self, url: str, *, key: str | None = None, address: str = "127.0.0.1") -> None:
        where = urlsplit(url)
        self._connection = http.client.HTTPConnection(
            where.hostname or "", where.port, timeout=60, source_address=(address, 0)
        )
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Send a request, with a body of bytes or of JSON; `headers`: with _ for -."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None and not isinstance(body, bytes):
            body, named = json.dumps(body).encode(), {"Content-Type": "application/json"} | named
        self._connection.request(method, path, body, self._headers | named)
        answer = self._connection.getresponse()
        return Answer(answer.status, {n.lower(): v for n, v in answer.getheaders()}, answer.read())

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, **headers)

    def draw(self, prompt: str, **more: Any) -> Answer:
        return self.ask("POST", GENERATE, {"prompt": prompt, **more})

    def close(self) -> None:
        self._connection.close()


def draw(url: str, prompt: str, *, address: str = "127.0.0.1", **more: Any) -> Answer:
    """Ask for a picture over a connection of its own."""
    client = Client(url, address=address)
    try:
        return client.draw(prompt, **more)
    finally:
        client.close()


def connect(url: str) -> socket.socket:
    where = urlsplit(url)
    return socket.create_connection((where.hostname, where.port), timeout=60)


def exchange(url: str, sent: bytes) -> bytes:
    """Send bytes, and return all that comes until the server closes the connection."""
    with connect(url) as connection:
        connection.sendall(sent)
        parts = []
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def metric(url: str, name: str, **labels: str) -> float:
    """Return a figure of /metrics: the sum of those with these labels."""
    client = Client(url)
    text = client.get("/metrics").body.decode()
    client.close()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples if s.name == name]
    return sum(s.value for s in samples if labels.items() <= s.labels.items())


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that will come true."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)
