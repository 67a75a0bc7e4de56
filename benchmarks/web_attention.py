"""What MultiHeadAttention costs in WebAssembly: the UNet of a site beside the one of its bundle; writes a results file.

    build-engine x.bundle --backend web
    python benchmarks/web_attention.py x.bundle

Two pipelines of `turbochain.mjs` in a headless Chromium draw the same picture in turn, on one thread; which one begins
changes with each round. One has the graphs that `export-web` writes; in the other the UNet is the bundle's own. The
first launch of a call is left out, since what a call prepares ends with it.
"""

import argparse
import functools
import json
import shutil
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cost_tables
import machine
import result
from adapter_cost import CALL, write
from chromium import chromium
from rows import Beside
from turbochain.runtime import Bundle
from turbochain.runtime.bundle import hashing
from turbochain.runtime.web import export_web

PACKAGES = machine.HERE.parent / ".node" / "node_modules"
CHANGE = "MultiHeadAttention, WebAssembly"
LOAD = """(async () => {
  const { Pipeline } = await import(`${location.origin}/site/turbochain.mjs`);
  window.pipes = [];
  for (const url of ["/plain/", "/site/bundle/"]) pipes.push(await Pipeline.load(url, { backend: "wasm" }));
})()"""
DRAW = """(async (which, prompt, steps) => {
  const ends = [];
  const observe = ({ stage }) => ends.push([stage, performance.now()]);
  await pipes[which](prompt, { seed: 0, numInferenceSteps: steps, observe });
  const taken = ends.slice(1).map(([stage, end], i) => [stage, end - ends[i][1]]);
  const unet = taken.filter(([stage]) => stage.startsWith("unet")).slice(-steps + 1).map(([, ms]) => ms / 1e3);
  return unet.reduce((a, b) => a + b) / unet.length;
})"""


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder, and prints nothing."""

    def log_message(self, *_: object) -> None:
        """Leave the line out."""


def write_plain(bundle: Bundle, site: Path, folder: Path) -> None:
    """Write a copy of a site's bundle whose UNets are those of the bundle."""
    shutil.copytree(site / "bundle", folder)
    found = json.loads((folder / "bundle.json").read_text())
    for name, graph in bundle.manifest.graphs.items():
        if graph.role == "unet" and name in found["graphs"]:
            shutil.copyfile(bundle.path / graph.file, folder / graph.file)
            record = hashing.describe(folder / graph.file)
            found["files"][graph.file] = {"size": record.size, "sha256": record.sha256}
    (folder / "bundle.json").write_text(json.dumps(found))


def measure(folder: Path, rounds: int, steps: int) -> list[list[float]]:
    """Let both draw in turn, and return the seconds of their UNets: the bundle's own, the site's."""
    seconds: list[list[float]] = [[], []]
    handler = functools.partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, chromium() as page:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page.open(f"http://127.0.0.1:{server.server_port}/site/")
        page.run(LOAD)
        for round in range(rounds + 1):  # the first one warms up
            for which in (0, 1) if round % 2 else (1, 0):
                taken = page.run(f"{DRAW}({which}, {json.dumps(CALL['prompt'])}, {json.dumps(steps)})")
                if round:
                    seconds[which].append(taken)
        server.shutdown()
    return seconds


def main() -> None:
    """Measure, write the file and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", help="one with an engine of the backend web")
    parser.add_argument("--steps", type=int, default=4, help="step count, at least 2 (default 4)")
    parser.add_argument("--rounds", type=int, default=7, help="default 7")
    parser.add_argument("--commit", help="if git cannot say it")
    parser.add_argument("--results", type=Path, default=result.FOLDER, help="folder of the results file")
    given = parser.parse_args()
    bundle, run = Bundle.open(given.bundle), machine.run(known_commit=given.commit)
    opened = bundle.open_chain("text-to-image")
    with tempfile.TemporaryDirectory() as folder:
        site = export_web(given.bundle, Path(folder) / "site", node_modules=PACKAGES)
        write_plain(bundle, site, Path(folder) / "plain")
        plain, changed = measure(Path(folder), given.rounds, given.steps)
    precision = next(graph.precision for graph in opened.graphs.values() if graph.role == "unet")
    row = Beside(
        change=CHANGE, engine="web", precision=precision, plain_seconds=tuple(plain), changed_seconds=tuple(changed)
    )
    height, width = opened.size
    source = bundle.manifest.checkpoint.source
    found, path = write(row, run, source, (width, height), "cpu", given.results, "attention-web")
    print(cost_tables.beside([found]), path, sep="\n")


if __name__ == "__main__":
    main()
