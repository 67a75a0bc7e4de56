"""What is downloaded of a hub repository, in which order, and what is said meanwhile.

The hub is a small server with the same paths; the client is the real `huggingface_hub`.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import control_nets
import numpy as np
import pytest
from safetensors.numpy import save

from turbochain.export.sources.kinds import hub
from turbochain.runtime import InputError

CONFIGS = ["model_index.json", "README.md", "LICENSE.md", "scheduler/scheduler_config.json"]
TOKENIZER = [f"tokenizer/{n}" for n in ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")]
OTHERS = [".gitattributes", "output_tile.jpg", "images/a.png"]


def part(name: str, *variants: str) -> list[str]:
    """A component's folder on the hub: config, and its weights as safetensors and as pickles."""
    stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
    files = [f"{name}/{stem}{infix}{end}" for infix in variants for end in (".safetensors", ".bin")]
    return [f"{name}/config.json", *files]


def repository(*variants: str, second: bool = False) -> list[str]:
    names = ["text_encoder", "unet", "vae", *(["text_encoder_2"] if second else [])]
    tokenizers = [*TOKENIZER, *(n.replace("tokenizer", "tokenizer_2", 1) for n in TOKENIZER if second)]
    return [*CONFIGS, *OTHERS, *tokenizers, *(f for n in names for f in part(n, *variants))]


SD_TURBO = [*repository("", ".fp16"), "sd_turbo.safetensors"]
SDXL_TURBO = [
    *repository("", ".fp16", second=True),
    *("sd_xl_turbo_1.0.safetensors", "sd_xl_turbo_1.0_fp16.safetensors"),
    *("unet/model.onnx", "unet/model.onnx_data", "unet/openvino_model.bin", "unet/openvino_model.xml"),
    *("text_encoder/flax_model.msgpack", "vae_decoder/model.onnx", "vae_decoder/config.json"),
    *("vae_1_0/config.json", "vae_1_0/diffusion_pytorch_model.safetensors"),
]
SD_15 = [*repository("", ".fp16"), *part("safety_checker", "", ".fp16"), "feature_extractor/preprocessor_config.json"]
SHARDS = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
FP16_SHARDS = [f"unet/diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
SHARDED = [
    *(n for n in repository("", ".fp16") if "unet/diffusion" not in n),
    *("unet/diffusion_pytorch_model.safetensors.index.json", *SHARDS),
    *("unet/diffusion_pytorch_model.safetensors.index.fp16.json", *FP16_SHARDS),
]


def named(infix: str, second: bool = False) -> set[str]:
    """The safetensors of every component with this infix."""
    return {n for n in repository(infix, second=second) if n.endswith(".safetensors")}


WEIGHTS = {
    "sd-turbo": (SD_TURBO, None, named("")),
    "sd-turbo fp16": (SD_TURBO, "fp16", named(".fp16")),
    "sdxl-turbo": (SDXL_TURBO, None, named("", second=True)),
    "sdxl-turbo fp16": (SDXL_TURBO, "fp16", named(".fp16", second=True)),
    "fp16 only": (repository(".fp16"), None, named(".fp16")),
    "a safety checker": (SD_15, None, named("")),
    "sharded": (SHARDED, None, {*named("") - {"unet/diffusion_pytorch_model.safetensors"}, *SHARDS}),
    "sharded fp16": (
        SHARDED,
        "fp16",
        {*named(".fp16") - {"unet/diffusion_pytorch_model.fp16.safetensors"}, *FP16_SHARDS},
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_only_the_weights_that_are_needed_are_downloaded(case: str) -> None:
    names, variant, expected = WEIGHTS[case]
    chosen = hub.select(names, variant)
    assert len(chosen) == len(set(chosen))
    large = {n for n in chosen if not n.endswith((".json", ".txt", ".md"))}
    assert large == expected
    assert {*CONFIGS, *TOKENIZER} <= set(chosen)
    assert {n for n in names if n.endswith("config.json") and n.split("/")[0] in ("unet", "vae")} <= set(chosen)


def test_a_variant_that_the_hub_lacks_is_refused_before_the_download() -> None:
    with pytest.raises(InputError, match="the repository has no weights of variant 'fp16'"):
        hub.select(repository(""), "fp16")


@pytest.mark.parametrize("ending", [".bin", ".ckpt"])
def test_pickles_on_the_hub_are_refused(ending: str) -> None:
    names = [n.removesuffix(".bin") + ending for n in repository("") if not n.endswith(".safetensors")]
    with pytest.raises(InputError, match=r"only as pickles .* save_pretrained\(FOLDER, safe_serialization=True\)"):
        hub.select(names, None)


@pytest.mark.parametrize("skip", [(), ("vae",), ("unet", "vae")])
def test_weights_that_another_part_replaces_are_not_downloaded(skip: tuple[str, ...]) -> None:
    chosen = set(hub.select(SD_TURBO, None, skip))
    assert chosen == {n for n in hub.select(SD_TURBO, None) if n.split("/")[0] not in skip or n.endswith(".json")}


PART = ["config.json", "README.md", *(f"diffusion_pytorch_model{i}.safetensors" for i in ("", ".fp16", ".fp16-no-ema"))]


@pytest.mark.parametrize(("variant", "infixes"), [(None, ("",)), ("fp16", (".fp16", ".fp16-no-ema")), ("bf16", ("",))])
def test_of_a_component_one_variant_is_downloaded(variant: str | None, infixes: tuple[str, ...]) -> None:
    chosen = hub.select_part([*PART, "diffusion_pytorch_model.bin", "a.safetensors", "onnx/config.json"], variant)
    weights = {f"diffusion_pytorch_model{infix}.safetensors" for infix in infixes}
    assert sorted(chosen) == sorted({"config.json", "README.md", *weights})


def test_of_a_component_the_other_files_of_an_author_are_not_downloaded() -> None:
    shards = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "diffusion_pytorch_model.safetensors.index.json"
    for own in (["diffusion_pytorch_model.safetensors"], [*shards, index], ["model.safetensors"]):
        others = ["diffusion_pytorch_model_V2.safetensors", "diffusion_pytorch_model_promax.safetensors", "a.bin"]
        assert sorted(hub.select_part(["config.json", *own, *others], None)) == sorted(["config.json", *own])
    with pytest.raises(InputError, match=r"only as pickles .* save_pretrained\(FOLDER, safe_serialization=True\)"):
        hub.select_part(["config.json", "diffusion_pytorch_model.bin", "unet/model.safetensors"], None)


COMMIT = "1" * 40
ID = "owner/name"


class Hub:
    """A hub with one repository, the files of a folder; it records which of them were sent, and can lose the line."""

    def __init__(self, folder: Path) -> None:
        self.files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        self.sent: list[str] = []
        self.cut: str | None = None  # the file in whose middle the connection is lost
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def entry(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def answer(self, path: str) -> Any:
        if path.startswith(f"/api/models/{ID}/tree/{COMMIT}"):
            return [self.entry(name) for name in self.files]
        if path in (f"/api/models/{ID}", f"/api/models/{ID}/revision/main", f"/api/models/{ID}/revision/{COMMIT}"):
            siblings = [{"rfilename": name, "size": len(content)} for name, content in self.files.items()]
            return {"id": ID, "modelId": ID, "sha": COMMIT, "siblings": siblings}
        return None

    def _handler(hub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = unquote(self.path).split("?")[0]
                name = path.removeprefix(f"/{ID}/resolve/{COMMIT}/")
                if name in hub.files:
                    return self.send_file(name)
                answer = hub.answer(path)
                body = json.dumps(answer if answer is not None else {"error": "Repository not found"}).encode()
                self.send_response(404 if answer is None else 200)
                if answer is None:
                    self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def send_file(self, name: str) -> None:
                content = hub.files[name]
                self.send_response(200)
                self.send_header("ETag", f'"{hub.entry(name)["oid"]}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command == "GET":
                    hub.sent.append(name)
                    half = len(content) // 2 if name == hub.cut else len(content)
                    self.wfile.write(content[:half])
                    self.close_connection = half < len(content)

        return Handler


@pytest.fixture
def remote(checkpoints: dict[str, Path]) -> Iterator[Hub]:
    hub = Hub(checkpoints["sd"])
    yield hub
    hub.server.shutdown()


FETCH = """
import json, sys
from pathlib import Path
from turbochain.export.sources import Want, find, parts
from turbochain.runtime import InputError

said = []

def check_room(family, configs, counts, coming):
    said.append(["room", dict(counts), coming])
    if sys.argv[1] == "refuse":
        raise InputError("no room")

want = Want(Path(), progress=lambda done, total: said.append([done, total]))
try:
    found = parts.fetch(find("owner/name"), want, json.loads(sys.argv[2]), check_room)
    print(json.dumps([said, str(found.folder), found.revision, found.source]))
except InputError as error:
    print(json.dumps([said, str(error)]))
"""


def fetch(remote: Hub, cache: Path, how: str = "accept", parts: dict[str, str] | None = None) -> list[Any]:
    env = {**os.environ, "HF_ENDPOINT": remote.address, "HF_HUB_CACHE": str(cache), "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
    line = [sys.executable, "-c", FETCH, how, json.dumps(parts or {})]
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "%|" not in done.stderr, done
    return json.loads(done.stdout.splitlines()[-1])


def is_weight(name: str) -> bool:
    return name.endswith(".safetensors")


def test_the_small_files_come_first_and_are_checked_before_the_weights(remote: Hub, tmp_path: Path) -> None:
    said, folder, revision, source = fetch(remote, tmp_path)
    assert (revision, source, Path(folder).name) == (COMMIT, ID, COMMIT)
    wanted = set(hub.select(list(remote.files), None))
    assert sorted(remote.sent) == sorted(wanted)  # each once
    large = [is_weight(name) for name in remote.sent]
    assert large == sorted(large)
    assert {name: Path(folder, name).read_bytes() for name in wanted} == {n: remote.files[n] for n in wanted}
    room = next(i for i, event in enumerate(said) if event[0] == "room")
    total, weights = (sum(len(remote.files[n]) for n in wanted if is_weight(n) or full) for full in (True, False))
    counts, coming = said[room][1:]
    assert coming == weights and sum(counts.values()) == pytest.approx(weights / 4, rel=0.05)
    done = [event[0] for event in said if event[0] != "room"]
    assert done == sorted(done) and done[-1] == total and len(set(done)) > len(wanted) / 2
    assert all(event[0] <= total - weights for event in said[:room])
    remote.sent.clear()
    assert fetch(remote, tmp_path)[1] == folder and remote.sent == []  # it is in the cache


def test_what_is_refused_costs_no_weights(remote: Hub, tmp_path: Path) -> None:
    assert fetch(remote, tmp_path, "refuse")[1] == "no room"
    assert remote.sent and not any(map(is_weight, remote.sent))
    remote.files["unet/config.json"] = remote.files["unet/config.json"].replace(
        b'"in_channels": 4', b'"in_channels": 9'
    )
    said = fetch(remote, tmp_path / "other")
    assert "the UNet reads 9 channels" in said[1] and not any(map(is_weight, remote.sent))


def test_a_replaced_part_is_not_downloaded(remote: Hub, tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    said = fetch(remote, tmp_path, parts={"vae": str(checkpoints["sd"] / "vae")})
    assert said[2] == COMMIT and {n.split("/")[0] for n in remote.sent if is_weight(n)} == {"text_encoder", "unet"}


FETCH_CONTROL = """
import json, sys
from pathlib import Path
from turbochain.export.controls import KINDS
from turbochain.export.controls.kind import Control
from turbochain.export.sources import Want, find, parts
from turbochain.runtime import InputError

canny = Control(KINDS["controlnet"], "canny")
try:
    found = parts.fetch(find(sys.argv[1]), Want(Path()), {}, None, {canny: "owner/name"}).controls[canny.component]
    print(json.dumps([found.source, found.revision, [path.name for path in found.weights]]))
except InputError as error:
    print(json.dumps(str(error)))
"""


def test_a_controlnet_of_the_hub(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """In the layout of thibaud's, diffusers' and xinsir's; the checkpoint is on this disk."""
    folder = control_nets.controlnet(checkpoints["sd"], tmp_path / "canny")
    weights = folder / "diffusion_pytorch_model.safetensors"
    for other in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model_V2.safetensors"):
        (folder / other).write_bytes(b"large")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")

    def fetched() -> tuple[Any, list[str]]:
        repository = Hub(folder)
        env = {**os.environ, "HF_ENDPOINT": repository.address, "HF_HUB_CACHE": str(tmp_path / "cache")}
        line = [sys.executable, "-c", FETCH_CONTROL, str(checkpoints["sd"])]
        done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=200)
        repository.server.shutdown()
        return json.loads(done.stdout.splitlines()[-1]), repository.sent

    said, sent = fetched()
    assert said == [ID, COMMIT, [weights.name]]
    assert sorted(sent) == ["README.md", "config.json", weights.name]
    weights.unlink()
    (folder / "diffusion_pytorch_model_V2.safetensors").unlink()
    said, sent = fetched()
    assert "only as pickles" in said and sent == []


FETCH_FILES = """
import json, sys
from pathlib import Path
from turbochain.export.sources import Want, find
from turbochain.runtime import InputError

for name in sys.argv[2:]:
    try:
        found = find(name, "lora").fetch(Want(Path(sys.argv[1]), part="lora"))
        (file,) = found.folder.iterdir()
        print(json.dumps([str(file), found.commit, sorted(path.name for path in found.home.iterdir())]))
    except InputError as error:
        print(json.dumps(str(error)))
"""


def test_one_file_of_a_repository(remote: Hub, tmp_path: Path) -> None:
    remote.files |= {
        name: save({"a.lora_A.weight": np.full((1, i), i, np.float32)})
        for i, name in enumerate(("a/x.safetensors", "pytorch_lora_weights.safetensors"), 1)
    }
    names = [f"{ID}/a/x.safetensors", ID, f"{ID}/y.safetensors"]
    env = {**os.environ, "HF_ENDPOINT": remote.address, "HF_HUB_CACHE": str(tmp_path / "cache")}
    line = [sys.executable, "-c", FETCH_FILES, str(tmp_path), *names]
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=200)
    first, second, third = map(json.loads, done.stdout.splitlines())
    assert Path(first[0]).read_bytes() == remote.files["a/x.safetensors"]
    assert Path(second[0]).read_bytes() == remote.files["pytorch_lora_weights.safetensors"]
    assert first[1:] == [COMMIT, ["LICENSE", "README.md", "a"]]
    assert third.startswith(f"{ID} has no y.safetensors; its safetensors files are a/x.safetensors, pytorch_lora_")
    assert sorted(remote.sent) == ["LICENSE", "README.md", "a/x.safetensors", "pytorch_lora_weights.safetensors"]


def test_a_lost_connection_is_told_and_the_same_command_goes_on(remote: Hub, tmp_path: Path) -> None:
    remote.cut = "unet/diffusion_pytorch_model.safetensors"
    said = fetch(remote, tmp_path)
    assert f"the download of {ID} failed (" in said[1] and said[1].endswith("; the same command goes on")
    remote.cut = None
    remote.sent.clear()
    folder = Path(fetch(remote, tmp_path)[1])
    assert "unet/diffusion_pytorch_model.safetensors" in remote.sent and "unet/config.json" not in remote.sent
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (folder / name).read_bytes() == remote.files[name]


def test_an_id_that_the_hub_does_not_know(remote: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "answer", lambda path: None)
    assert f"{ID} is neither on the hub under that name nor in the local cache" in fetch(remote, tmp_path)[1]
