"""The page: only its own files are served, they refer to no other host, and what the server tells it is true."""

import json
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from serving import Serving, serving

from turbochain.runtime.serve import page
from turbochain.runtime.serve.source import State


def get(url: str, **headers: str) -> Any:
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20)


def status(url: str, **headers: str) -> int:
    try:
        return int(get(url, **headers).status)
    except urllib.error.HTTPError as error:
        return error.code


def test_every_file_of_the_page_is_served_and_no_other(server: Serving) -> None:
    assert sorted(page.FILES.values()) == sorted(path.name for path in page.FOLDER.iterdir())
    for path, name in page.FILES.items():
        answer = get(server.url + path)
        assert answer.read() == (page.FOLDER / name).read_bytes()
        assert answer.headers["Content-Type"].split(";")[0] in (
            "text/html",
            "text/javascript",
            "text/css",
            "image/svg+xml",
        )
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'self'; ") and "frame-ancestors 'none'" in policy
        assert not re.search(r"connect-src|unsafe|\*|https?:|wss?:", policy)  # nothing of another server
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert status(server.url + path, **{"If-None-Match": answer.headers["ETag"]}) == 304
    for path in ("/page/", "/page/index.html", "/page/../app.py", "/page/%2e%2e/app.py", "/page//etc/passwd"):
        assert status(server.url + path) == 404, path


def test_the_page_names_nothing_of_another_host() -> None:
    for path in page.FOLDER.iterdir():
        found = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", path.read_text()))
        assert found <= {"http://www.w3.org"}, path.name  # the namespace of SVG


def test_about_says_what_is_built(server: Serving, sd: Path) -> None:
    about = json.load(get(f"{server.url}/about"))
    (model,) = about["models"]
    assert about["loras"] == []
    built = {"sizes": [[64, 64]], "steps": [1, 2, 3, 4], "strengths": [], "controlnets": []}
    assert model == {
        "name": "sd-fp32",
        "tasks": {
            "text-to-image": {**built, "strength": None},
            "image-to-image": {**built, "strength": 0.5},
        },
    }


def test_the_page_needs_no_key_but_about_does(sd: Path) -> None:
    class Idle:
        state = State(ready=True)

        async def draw(self, *_: Any) -> Any:
            raise AssertionError

        async def start(self) -> None:
            pass

        async def close(self) -> None:
            pass

    with serving(sd, source=Idle(), api_keys=("secret",)) as served:
        assert all(status(served.url + path) == 200 for path in page.FILES)
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(f"{served.url}/about")
        assert refused.value.code == 401
        assert status(f"{served.url}/about", Authorization="Bearer secret") == 200
