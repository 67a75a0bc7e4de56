"""What the guard lets through, and what it answers to the rest; every refusal has OpenAI's error object."""

import base64
import hmac
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from asking import GENERATE, Client, connect, exchange
from serving import Serving, serving

from turbochain.runtime.serve import guard, listen
from turbochain.runtime.serve.listen import listening
from turbochain.runtime.serve.settings import Settings

KEYS = ("first-key", "second-key")
PAGE = "https://page.example"


@pytest.fixture(scope="module")
def open_server(small: Path) -> Iterator[Serving]:
    with serving(small, backend="onnxruntime") as server:
        yield server


@pytest.fixture(scope="module")
def keyed(small: Path) -> Iterator[Serving]:
    """With keys, another name, and another server's page."""
    options = {"api_keys": KEYS, "allow_hosts": ("Pictures.Example",), "allow_origins": (PAGE,)}
    with serving(small, backend="onnxruntime", **options) as server:
        yield server


@pytest.fixture
def client(open_server: Serving) -> Client:
    return Client(open_server.url)


def test_host_is_a_name_of_this_server(client: Client, keyed: Serving, open_server: Serving) -> None:
    """An address cannot be bound to another by a foreign name server, so each is allowed."""
    port = open_server.url.rpartition(":")[2]
    for host in ("localhost", f"localhost:{port}", "LOCALHOST", "127.0.0.1:1", "[::1]:80", "192.168.0.7"):
        assert client.get("/v1/models", Host=host).status == 200, host
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "localhost.evil.example", "["):
        answer = client.get("/v1/models", Host=host)
        assert (answer.status, answer.error["code"]) == (403, "host"), host
    named = Client(keyed.url, key=KEYS[0])
    assert named.get("/v1/models", Host="pictures.example:80").status == 200
    assert named.get("/v1/models", Host="evil.example").status == 403


def test_no_page_of_another_server_can_change_anything(client: Client, open_server: Serving) -> None:
    own = open_server.url.removeprefix("http://")
    assert client.ask("POST", GENERATE, {"prompt": "a cat"}, Origin=open_server.url).status == 200
    for origin in ("https://evil.example", "null", f"http://{own}.evil.example", "http://[", "http://localhost:1", ""):
        answer = client.ask("POST", GENERATE, {"prompt": "a cat"}, Origin=origin)
        assert (answer.status, answer.error["code"]) == (403, "origin"), origin
    assert client.get("/v1/models", Origin="https://evil.example").status == 200


def test_cors_is_off_unless_a_page_is_allowed(client: Client, keyed: Serving) -> None:
    """A browser's preflight carries no key."""
    asks = {"Origin": PAGE, "Access_Control_Request_Method": "POST"}
    wants = {"Access_Control_Request_Headers": "authorization,content-type,x-stainless-os"}
    refused = client.ask("OPTIONS", GENERATE, **asks, **wants)
    assert refused.error and not any(name.startswith("access-control") for name in refused.headers)
    assert not any(n.startswith("access-control") for n in client.get("/v1/models", Origin=PAGE).headers)
    there = Client(keyed.url)
    answer = there.ask("OPTIONS", GENERATE, **asks, **wants)
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, PAGE)
    assert "x-stainless-os" in answer.headers["access-control-allow-headers"]
    foreign = there.ask("OPTIONS", GENERATE, **(asks | {"Origin": "https://evil.example"}))
    assert foreign.status == 400 and "access-control-allow-origin" not in foreign.headers
    drawn = Client(keyed.url, key=KEYS[1]).ask("POST", GENERATE, {"prompt": "a cat"}, Origin=PAGE)
    assert (drawn.status, drawn.headers["access-control-allow-origin"]) == (200, PAGE)
    refused = there.ask("POST", GENERATE, {"prompt": "a cat"}, Origin=PAGE)  # the page can read why
    assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, PAGE)


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


def test_any_of_the_keys_opens(keyed: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    compared, compare = [], hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(b) or compare(a, b))
    client = Client(keyed.url)
    for key in KEYS:
        for given in (f"Bearer {key}", f"bearer  {key}", basic(f"anyone:{key}"), basic(f"{key}:"), basic(key)):
            assert client.get("/v1/models", Authorization=given).status == 200, given
    assert compared == [key.encode() for key in KEYS] * 10  # each with all, in constant time
    wrong = ["Bearer", "Bearer first-key2", "Bearer FIRST-KEY", f"Token {KEYS[0]}", KEYS[0], "Basic !", "Basic 4pyT4p"]
    for given in (*wrong, basic("first-key:no"), "Bearer \xe9", basic("é:é")):
        answer = client.get("/v1/models", Authorization=given.encode("latin-1"))  # type: ignore[arg-type]
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key"), given
        assert answer.headers["www-authenticate"].startswith("Bearer")
    assert client.ask("POST", GENERATE, {"prompt": "a cat"}).error["code"] == "invalid_api_key"


def test_without_a_key_only_health_and_the_page_are_open(keyed: Serving) -> None:
    client = Client(keyed.url)
    for path, status in {"/healthz": 200, "/readyz": 200, "/metrics": 401, "/openapi.json": 401, "/x": 401}.items():
        assert client.get(path).status == status, path
    assert client.get("/").status != 401
    for path in ("//", "/page", "/pages/x", "/healthz/", "/healthz/../v1/models", "/page/..%2fv1/models", "/%2e/"):
        assert client.get(path).status in (401, 404), path
    assert client.ask("POST", "/", {}).status == 401


def upgrade(url: str, *more: str) -> bytes:
    """The first line of the answer to a socket's handshake, and its body."""
    lines = ["GET /nothing HTTP/1.1", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
    lines += ["Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==", *more, "", ""]
    return exchange(url, "\r\n".join(lines).encode())


def test_a_socket_has_the_servers_origin_and_a_key(keyed: Serving, open_server: Serving) -> None:
    own, name = open_server.url.removeprefix("http://"), "Sec-WebSocket-Protocol"
    for server, lines in (
        (open_server, [f"Host: {own}", "Origin: https://evil.example"]),
        (open_server, ["Host: evil.example", "Origin: http://evil.example"]),
        (open_server, [f"Host: {own}", "Origin: null"]),
    ):
        answer = upgrade(server.url, *lines)
        assert answer.startswith(b"HTTP/1.1 403 ") and b'{"error"' in answer
    key = base64.urlsafe_b64encode(KEYS[1].encode()).decode().rstrip("=")
    for given, status in (
        (f"turbochain, key.{key}", b"404 "),
        ("turbochain, key.eA", b"401 "),
        ("turbochain", b"401 "),
    ):
        answer = upgrade(keyed.url, "Host: localhost", f"{name}: {given}")
        assert answer.split(b" ", 1)[1].startswith((status, b"403 ") if status == b"404 " else status), answer


def test_a_post_is_json_or_a_form(client: Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonp", "", "x" * 5000):
        answer = client.ask("POST", GENERATE, b'{"prompt": "a cat"}', Content_Type=kind)
        assert (answer.status, answer.error["code"]) == (400, "content_type"), kind
    assert client.ask("POST", GENERATE, b'{"prompt": "a cat"}', Content_Type="Application/JSON; x=y").status == 200
    for body in (b"", b"{", b"[1]", b"null", b"\xff\xfe", b'{"prompt": ' + b"[" * 100_000, b'{"n": ' + b"9" * 5000):
        answer = client.ask("POST", GENERATE, body, Content_Type="application/json")
        assert (answer.status, answer.error["type"]) == (400, "invalid_request_error"), body[:20]
    for kind in ("multipart/form-data", "multipart/form-data; boundary=x", "application/json"):
        assert client.ask("POST", "/v1/images/edits", b"no form", Content_Type=kind).status == 400
        assert client.ask("POST", "/v1/images/edits", b"no form", Content_Type=kind).error


def chunked(path: str, size: int) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
    )
    return f"{head}Connection: close\r\n\r\n{size:x}\r\n".encode() + b" " * size + b"\r\n0\r\n\r\n"


@pytest.mark.parametrize(("path", "limit"), [(GENERATE, 2**20), ("/v1/images/edits", 20 * 2**20)])
def test_a_body_has_a_limit(path: str, limit: int, client: Client, open_server: Serving) -> None:
    for size, status in ((limit, 400), (limit + 1, 413)):
        answer = client.ask("POST", path, b" " * size, Content_Type="application/json")
        assert answer.status == status and answer.error["code"] == ("too_large" if status == 413 else None)
        told = exchange(open_server.url, chunked(path, size))
        assert told.startswith(f"HTTP/1.1 {status} ".encode()) and b'{"error"' in told
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {limit + 1}"
    with connect(open_server.url) as connection:
        connection.sendall(f"{head}\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")  # before it comes


def test_a_body_that_never_comes(open_server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.05)
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
    with connect(open_server.url) as connection:
        connection.sendall(head.encode() + b'{"pro')
        answer = b"".join(iter(lambda: connection.recv(4096), b""))  # to the end: the head may come by itself
    assert answer.startswith(b"HTTP/1.1 400 ") and b"timeout" in answer


def test_a_head_that_never_comes(open_server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such connections end by themselves, and none whose body is slow, which `BODY_SECONDS` is about."""
    monkeypatch.setattr(listen, "HEAD_SECONDS", 0.3)
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n"
    with connect(open_server.url) as slow:
        slow.sendall(head.encode())
        parts = (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: localhost\r\n")
        with ThreadPoolExecutor() as pool:
            assert [*pool.map(lambda sent: exchange(open_server.url, sent), parts)] == [b""] * 3
        with connect(open_server.url) as kept:
            kept.sendall(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b'{"ready":true}'):
                answer += kept.recv(4096)
            kept.sendall(b"GET / HT")
            assert kept.recv(4096) == b""
        slow.sendall(b"{}")
        assert slow.recv(4096).startswith(b"HTTP/1.1 400 ")


def test_what_is_no_http_ends_its_connection_alone(client: Client, open_server: Serving) -> None:
    get = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
    floods = [get + b"X: " + b"x" * 10**6, get + b"X-Y: z\r\n" * 10**5, b"GET /" + b"x" * 10**6 + b" HTTP/1.1\r\n"]
    garbage = [bytes(range(256)), b"\x16\x03\x01\x02\x00\x01" * 9, b"GET\r\n\r\n", b"\r\n" * 9 + b"HELO\r\n\r\n"]
    wrong = [get + b"Host: other\r\n\r\n", get + b"Content-Length: -1\r\n\r\n", get + b"A b: c\r\n\r\n"]
    for sent in (*garbage, *wrong, *floods):
        try:
            assert exchange(open_server.url, sent).startswith(b"HTTP/1.1 400 "), sent[:40]
        except ConnectionError:
            assert sent in floods  # the server has closed it while we were sending
    assert client.get("/v1/models").status == 200


def test_small_answers_are_sent_at_once() -> None:
    """Else the body of an answer waits until the client has acknowledged its head, which takes 40 ms."""
    with listening(Settings(("x",), port=0)) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_half_a_request_and_a_reset_leave_nothing(client: Client, open_server: Serving) -> None:
    for sent in (
        b"",
        b"GET /v1",
        b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
    ):
        with connect(open_server.url) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.sendall(sent)
    assert client.get("/v1/models").status == 200


def test_no_path_opens_a_file(open_server: Serving, small: Path) -> None:
    secret = (small / "bundle.json").read_bytes()[:200]
    up = "../" * 12
    paths = [f"{small}/bundle.json", f"/{small}/bundle.json", f"/{up}{small}/bundle.json", "/..", "//", "///etc/passwd"]
    for prefix in ("/", "/page/", "/v1/models/", "/v1/"):
        paths += [
            prefix + up + "etc/passwd",
            prefix + "..%2f" * 12 + "etc%2fpasswd",
            prefix + "%2e%2e/" * 12 + "etc/passwd",
        ]
        paths += [prefix + "..%5c..%5cx", prefix + "%00", prefix + "..%c0%afetc/passwd", prefix + "%252e%252e%252f"]
        paths += [f"{prefix}{small}/bundle.json", f"{prefix}file:%2f%2f{small}/bundle.json", prefix + "C:/x"]
    for path in paths:
        sent = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        head, _, body = exchange(open_server.url, sent).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 404 ") and b'{"error"' in body, path
        assert b"root:" not in body and secret not in body


def test_every_method_is_answered(client: Client) -> None:
    for path in ("/healthz", "/readyz"):
        assert client.ask("HEAD", path).body == b"" and client.ask("HEAD", path).status == 200
    for method, path, allowed in (
        ("GET", GENERATE, "POST"),
        ("DELETE", "/v1/models", "GET"),
        ("PUT", GENERATE, "POST"),
        ("OPTIONS", GENERATE, "POST"),
        ("OPTIONS", "/v1/models", "GET"),
        ("TRACE", GENERATE, "POST"),
        ("BREW", GENERATE, "POST"),
    ):
        answer = client.ask(method, path)
        assert (answer.status, answer.headers["allow"]) == (405, allowed) and answer.error, (method, path)
    assert client.ask("HEAD", GENERATE).status == 405
    for path in ("/v1/image", "/v1/images/generations/", "/v1/", "/V1/models", "/v1/models/other"):
        assert client.get(path).status == 404 and client.get(path).error["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", None), ("prompt", 7), ("prompt", ["a"]), ("prompt", "x" * 40_000), ("prompt", "a\0"),
        ("prompt", "\ud800"), ("n", 0), ("n", 11), ("n", "many"), ("n", 1.5), ("size", "16"), ("size", "0x16"),
        ("size", "9" * 5000 + "x16"), ("size", "16x-16"), ("size", "١٦x١٦"), ("response_format", "url"),
        ("output_format", "svg"), ("output_format", "\ud800"), ("output_compression", 101), ("seed", -1),
        ("seed", 2**64), ("seed", 1.5), ("seed", "x"), ("num_inference_steps", 0), ("num_inference_steps", 99),
        ("guidance_scale", float("nan")), ("guidance_scale", 1e999), ("stream", "perhaps"),
        ("partial_images", -1),
    ],
    ids=lambda value: ascii(value)[:20],
)  # fmt: skip
def test_a_wrong_field_is_named(field: str, value: object, client: Client) -> None:
    answer = client.ask("POST", GENERATE, {"prompt": "a cat", field: value})
    assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")
    assert field in answer.error["message"]
