"""The site that `export-web` writes: its files, its bundle, what is refused, and how the server serves it."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ON, ROOT, called
from here import build_here
from serving import serving

from turbochain.runtime import Bundle, BundleError, InputError, Pipeline, backends
from turbochain.runtime.backends import onnxruntime
from turbochain.runtime.bundle import hashing, strict_json
from turbochain.runtime.bundle.hashing import FileRecord
from turbochain.runtime.bundle.manifest import Chain, Graph, TokenizerFile
from turbochain.runtime.chain import wiring
from turbochain.runtime.serve.source import State
from turbochain.runtime.web import export_web, manifest, vendor

CDN = "https://cdn.example/npm"
NODE = ROOT / ".node" / "node_modules"
with_packages = pytest.mark.skipif(
    not (NODE / "onnxruntime-web").is_dir(), reason="no npm packages in .node: make setup installs them"
)


@pytest.fixture(scope="module")
def bundle(sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SD miniature with an engine for browsers too."""
    path = tmp_path_factory.mktemp("web") / "sd.bundle"
    subprocess.run(["cp", "-rl", sd, path], check=True)
    build_here(str(path), path, backend="web", quiet=True)
    return path


@pytest.fixture(scope="module")
def site(bundle: Path) -> Path:
    """A site whose page loads the packages from elsewhere."""
    return export_web(bundle, bundle.with_name("site"), CDN)


def read(site: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((site / "bundle" / "bundle.json").read_bytes())
    return found


def problems(made: dict[str, Any]) -> list[str]:
    """What contradicts itself in a reduced manifest, as `Bundle.open` would say of a whole one."""
    graphs = strict_json.convert(dict[str, Graph], {n: {**graph, "names": ""} for n, graph in made["graphs"].items()})
    chains = strict_json.convert(dict[str, Chain], made["chains"])
    assert {graph for chain in chains.values() for graph in chain.graphs} == graphs.keys()
    return [problem for name, chain in chains.items() for problem in wiring.problems(name, chain, graphs)]


def test_the_bundle_of_a_site(site: Path, bundle: Path) -> None:
    made, whole = read(site), Bundle.open(bundle)
    records = strict_json.convert(dict[str, FileRecord], made["files"])
    hashing.check_all(site / "bundle", records, full=True)
    there = {path for path in (site / "bundle").rglob("*") if path.is_file()}
    assert {str(path.relative_to(site / "bundle")) for path in there} == {*made["files"], "bundle.json"}
    assert not any(path.is_symlink() for path in site.rglob("*"))
    assert made["id"] == whole.id and made["family"] == "sd"
    assert [*made["chains"]] == ["text-to-image", "image-to-image"] and not problems(made)
    named = {file for graph in made["graphs"].values() for file in (graph["file"], *graph["data"])}
    named |= {chain["tables_file"] for chain in made["chains"].values()}
    named |= {tokenizer["file"] for tokenizer in made["tokenizers"].values()}
    assert {*made["files"]} - named == {"LICENSE", "README.md"}  # the checkpoint's
    assert made["checkpoint"]["parts"]["unet"]["license"] == "apache-2.0"
    assert strict_json.convert(dict[str, TokenizerFile], made["tokenizers"]) == whole.manifest.tokenizers
    for name, graph in made["graphs"].items():  # the engine's forms, and nothing that only a build reads
        digest = records[graph["file"]].sha256
        assert digest in {
            g.files[f"{name}.onnx"].sha256 for e in whole.engines().values() for g in [e.graphs[name]] if g.files
        }  # type: ignore[union-attr]
        assert "names" not in graph and not graph.get("slots")


@pytest.mark.parametrize("made", ["guided", "slotted", "controlled"])
def test_what_the_page_does_not_draw_is_left_out(made: str, request: pytest.FixtureRequest) -> None:
    whole = Bundle.open(request.getfixturevalue(made))
    chains = manifest._drawn(whole)
    assert {chain.chain.task for chain in chains} <= {"text-to-image", "image-to-image"}
    for chain in chains:
        found = manifest._chain(chain.chain, whole.manifest.graphs)
        assert not wiring.problems(chain.name, found, whole.manifest.graphs)
        assert found.modes == ("guidance",) and found.draws == chain.chain.draws
        assert {feed.is_ for feed in found.feeds.values()} <= {"ids", "noise", "number", "column", "zeros", "image"}
        for modes in ((), ("guidance",)):  # a call runs the stages that it runs of the whole chain
            assert [s.graph for s in found.stages if s.runs(modes)] == [
                s.graph for s in chain.chain.stages if s.runs(modes)
            ]
        assert not {"unet+lora", "controlnet-canny", "t2i_adapter-sketch", "blend"} & {*found.graphs}
        read = {t.name for s in found.stages for t in wiring.inputs(s, whole.manifest.graphs)}
        assert found.feeds.keys() == {*read} & chain.chain.feeds.keys()


def test_the_forms_draw_what_the_graphs_do(bundle: Path) -> None:
    calls = {"prompt": "a fox", "seed": 7, "output_type": "uint8"}
    with Pipeline.load(bundle, backend="web") as web, Pipeline.load(bundle, **ON) as plain:
        for steps in (1, 3):
            found, right = (pipe(**calls, num_inference_steps=steps).images[0].astype(int) for pipe in (web, plain))
            assert np.abs(found - right).max() <= 1
        executor = onnxruntime.OnnxRuntimeCpu
        assert type(web._executor) is not executor and isinstance(web._executor, executor)


def test_no_picture_is_drawn_here_with_an_engine_for_browsers_unless_it_is_asked_for(
    bundle: Path, copy_of: Callable[[Path], Path]
) -> None:
    with Pipeline.load(bundle) as pipe:
        assert pipe.engine_name.startswith("onnxruntime-")
    path = copy_of(bundle)
    (engine,) = (path / "engines").glob("web-*")
    for other in (path / "engines").iterdir():
        if other != engine:
            shutil.rmtree(other)
    with pytest.raises(BundleError, match=f"it is for turbochain export-web .* only with --engine {engine.name}"):
        Pipeline.load(path)
    made = json.loads((engine / "engine.json").read_text())
    made["key"]["version"] = "1.20.0"  # a library of long ago verified it: a browser has its own
    (engine / "engine.json").write_text(json.dumps(made))
    said = called("turbochain", "inspect", path).stdout
    assert f"engine {engine.name}: for turbochain export-web BUNDLE -o SITE" in said and "one that fits" not in said
    assert backends.best("cpu")[0] != "web"


def test_the_page_of_a_site(site: Path) -> None:
    page = (site / "index.html").read_text()
    (text,) = re.findall(r'<script type="importmap">(.*?)</script>', page, re.DOTALL)
    assert (
        page.index("importmap") < page.index('<script type="module"')
        and '<meta name="pictures" content="bundle/">' in page
    )
    lock = json.loads((ROOT / "runtime/web/package-lock.json").read_text())["packages"]
    ort, tokenizers = (
        lock[f"node_modules/{name}"]["version"] for name in ("onnxruntime-web", "@huggingface/tokenizers")
    )
    assert json.loads(text)["imports"] == {
        "onnxruntime-web/webgpu": f"{CDN}/onnxruntime-web@{ort}/dist/ort.webgpu.bundle.min.mjs",
        "onnxruntime-web/wasm": f"{CDN}/onnxruntime-web@{ort}/dist/ort.wasm.bundle.min.mjs",
        "@huggingface/tokenizers": f"{CDN}/@huggingface/tokenizers@{tokenizers}/dist/tokenizers.min.mjs",
    }
    module = (site / "turbochain.mjs").read_text()
    assert module == (ROOT / "runtime/web/turbochain.mjs").read_text()
    assert {name for name in json.loads(text)["imports"] if f'import("{name}")' in module} == {
        *json.loads(text)["imports"]
    }
    for name in re.findall(r'(?:href|src)="/?(page/[^"]+)"', page):
        assert (site / name).read_bytes() == (ROOT / "runtime/serve" / name).read_bytes()


@with_packages
def test_the_packages_are_in_the_site(bundle: Path, copy_of: Callable[[Path], Path], tmp_path: Path) -> None:
    """It is whole: the bundle, and where the packages came from, may go."""
    gone = copy_of(bundle)
    site = export_web(gone, tmp_path / "site", node_modules=NODE)
    shutil.rmtree(gone)
    (text,) = re.findall(r'<script type="importmap">(.*?)</script>', (site / "index.html").read_text(), re.DOTALL)
    for bare, address in json.loads(text)["imports"].items():
        module = (site / address).read_text()
        assert "export" in module
        package = NODE / "/".join(bare.split("/")[: 2 if bare.startswith("@") else 1])
        assert (site / address).read_bytes() == (package / "dist" / Path(address).name).read_bytes()
        for file in set(re.findall(r'"(ort-[\w.-]+\.wasm)"', module)):  # what it loads from beside it
            assert (site / address).with_name(file).stat().st_size > 2**20
        terms = (site / address).with_name("LICENSE").read_text()
        assert "Permission is hereby granted" in terms or "Apache License" in terms
    hashing.check_all(site / "bundle", strict_json.convert(dict[str, FileRecord], read(site)["files"]), full=True)


def test_what_is_refused_leaves_nothing(bundle: Path, site: Path, sd: Path, sdxl: Path, tmp_path: Path) -> None:
    def refused(words: str, source: Path, output: Path, cdn: str | None = CDN, **more: Any) -> None:
        with pytest.raises(InputError, match=words):
            export_web(source, output, cdn, **more)

    new, folder = tmp_path / "new", tmp_path / "folder"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    refused(rf"is missing, .* build it: build-engine {re.escape(str(sd))} --backend web$", sd, new)
    refused("text-to-image with batch 3, .* one picture at a time, was expected: .*--batch 1$", sdxl, new)
    refused("no folder", bundle, tmp_path / "a" / "b")
    refused("no site; choose another folder", bundle, folder)
    refused("no site; choose another folder", bundle, folder, force=True)
    refused("a site already; .* or --force", bundle, site)
    refused("an address .* was expected", bundle, new, "cdn.example")
    refused("is not there, and version .* was expected", bundle, new, None, node_modules=tmp_path)
    assert [*tmp_path.iterdir()] == [folder] and [*folder.iterdir()] == [folder / "mine.txt"]
    before = {path: path.stat().st_mtime_ns for path in site.rglob("*")}
    assert {path: path.stat().st_mtime_ns for path in site.rglob("*")} == before


def test_without_npm(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(InputError, match=r"npm was not found: install Node\.js, or give --cdn"):
        export_web(bundle, tmp_path / "site")
    npm = programs / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error network the registry is not reached' >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(InputError, match=r"npm cannot fetch .* \(npm error network .*\): .* or give --cdn"):
        export_web(bundle, tmp_path / "site")
    npm.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setenv("PATH", f"{programs}:/bin:/usr/bin")
    monkeypatch.setattr(vendor, "_SECONDS", 0.1)
    with pytest.raises(InputError, match=r"npm cannot fetch .* \(it had not ended after 0\.1 s\): .* or give --cdn"):
        export_web(bundle, tmp_path / "site")
    npm.write_text("#!/no/such/program\n")
    with pytest.raises(InputError, match=r"npm cannot fetch .* \(it does not start: No such file .*\): .* give --cdn"):
        export_web(bundle, tmp_path / "site")
    assert [*tmp_path.iterdir()] == [programs]


def test_a_site_is_replaced_whole(bundle: Path, tmp_path: Path) -> None:
    arguments = ("turbochain", "export-web", bundle, "-o", tmp_path / "site", "--cdn", "/npm")
    assert called(*arguments).returncode == 0
    (tmp_path / "site" / "old").write_text("old")
    assert called(*arguments).returncode == 2
    done = called(*arguments, "--force")
    assert done.returncode == 0 and re.fullmatch(
        r".*site: \d+ files, [\d.]+ MiB; the largest is bundle/.*\n", done.stdout
    )
    assert [path.name for path in tmp_path.iterdir()] == ["site"] and not (tmp_path / "site" / "old").exists()


def test_a_file_that_is_not_as_it_was(bundle: Path, copy_of: Callable[[Path], Path], tmp_path: Path) -> None:
    path = copy_of(bundle)
    (form,) = path.glob("engines/web-*/unet.onnx")
    form.write_bytes(form.read_bytes()[:-1] + b"\0")
    with pytest.raises(BundleError, match=r"'unet\.onnx' is damaged"):
        export_web(path, tmp_path / "site", CDN)
    assert not (tmp_path / "site").exists()


class Idle:
    """A source that draws nothing."""

    state = State(ready=True)

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass


def test_a_served_site(site: Path, sd: Path, tmp_path: Path) -> None:
    (site / "linked.mjs").symlink_to(ROOT / "pyproject.toml")
    (site / "some.wasm").write_bytes(b"\0asm")

    def get(path: str, **headers: str) -> Any:
        return urllib.request.urlopen(urllib.request.Request(served.url + path, headers=headers), timeout=20)

    def status(path: str, **headers: str) -> int:
        try:
            return int(get(path, **headers).status)
        except urllib.error.HTTPError as error:
            return error.code

    with serving(sd, source=Idle(), web=str(site), api_keys=("secret",)) as served:  # type: ignore[arg-type]
        (site / "late.mjs").write_text("")
        page = get("/web")  # it is led to /web/, so that its addresses are below that
        assert page.url.endswith("/web/") and page.read() == (site / "index.html").read_bytes()
        policy = page.headers["Content-Security-Policy"]
        (text,) = re.findall(r'<script type="importmap">(.*?)</script>', (site / "index.html").read_text(), re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"script-src 'self' 'wasm-unsafe-eval' 'sha256-{digest}' https://cdn.example;" in policy
        assert policy.startswith("default-src 'self'; ") and "unsafe-inline" not in policy
        kinds = {
            "turbochain.mjs": "text/javascript",
            "some.wasm": "application/wasm",
            "bundle/bundle.json": "application/json",
            "bundle/graphs/unet.fp32-0.data": "application/octet-stream",
            "page/style.css": "text/css",
        }
        for name, kind in kinds.items():
            answer = get(f"/web/{name}")
            assert answer.read() == (site / name).read_bytes()
            assert answer.headers["Content-Type"].split(";")[0] == kind
            assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
            assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
            assert status(f"/web/{name}", **{"If-None-Match": answer.headers["ETag"]}) == 304
        for path in (
            "linked.mjs",
            "late.mjs",
            "../app.py",
            "%2e%2e/app.py",
            "/etc/passwd",
            "bundle/",
            "bundle/../../x",
        ):
            assert status(f"/web/{path}") == 404, path
        assert status("/about") == 401  # what draws on this machine needs the key
        assert "Cross-Origin-Opener-Policy" not in get("/").headers
    for name in ("linked.mjs", "some.wasm", "late.mjs"):
        (site / name).unlink()
    with pytest.raises(InputError, match="no site: turbochain export-web BUNDLE -o"), serving(sd, web=str(tmp_path)):
        pass
    with serving(sd, source=Idle()) as served:  # type: ignore[arg-type]
        assert status("/web/") == 404


def test_the_lock_has_no_addresses() -> None:
    lock = json.loads(vendor.LOCK.read_text())["packages"]
    for package in vendor.PACKAGES:
        entry = lock[f"node_modules/{package.name}"]
        assert entry["integrity"].startswith("sha512-") and not entry.get("dev")
    assert lock["node_modules/onnxruntime-node"]["dev"]  # 288 MB that no site needs
    assert all("resolved" not in entry for entry in lock.values())
