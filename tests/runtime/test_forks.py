"""A forked process that uses its parent's pipeline gets an error that says what to do instead, and can exit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from here import build_here

SECONDS = 60  # that a process has, so that one that hangs is told from one that works

SCRIPT = """
import json, os, signal, sys, threading, time
inside, forked = [], []
os.register_at_fork(before=lambda: forked.append(bool(inside)))  # the first that registers is the last that runs
from turbochain.runtime import Pipeline, TurbochainError
from turbochain.runtime.backends.cpu import CpuExecutor

bundle, backend, engines, limit = sys.argv[1:]
CHILDREN = 4

prepare = CpuExecutor._prepare

def prepare_slow(executor, plan):
    # each launch takes 20 ms at least, so that a fork of another thread would meet one
    def slow(launch):
        def launch_slowly():
            inside.append(launch)
            time.sleep(0.02)
            launch()
            inside.pop()
        return launch_slowly
    program = prepare(executor, plan)
    program.launches = {run: slow(launch) for run, launch in program.launches.items()}
    return program

CpuExecutor._prepare = prepare_slow

def load():
    return Pipeline.load(bundle, backend=backend, engines=engines)

def draw(pipe):
    return int(pipe("a cat", seed=0, output_type="uint8").images.sum())

def fresh():
    with load() as other:
        return draw(other)

def child(work):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = work()
        except TurbochainError as error:
            said = str(error)
        os.write(write, json.dumps(said).encode())
        sys.exit()  # as a worker of gunicorn does: the interpreter and every library end
    os.close(write)
    end = time.monotonic() + float(limit)
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "hangs"
        time.sleep(0.01)
    return json.loads(os.read(read, 10_000) or '"dies"')

def drawing(pipe, work):
    ended, started = threading.Event(), threading.Event()
    def draws():
        while not ended.is_set():
            pipe("a cat", seed=0, num_inference_steps=4, observe=lambda *_: started.set())
    thread = threading.Thread(target=draws)
    thread.start()
    started.wait()
    try:
        return [child(work) for _ in range(CHILDREN)]
    finally:
        ended.set()
        thread.join()

def from_a_callback(pipe):
    said = []
    def fork(*_):
        if not said:
            said.append(child(lambda: None))
    pipe("a cat", seed=0, observe=fork)
    return said

pipe = load()
found = {"before": draw(pipe), "nothing": child(lambda: None), "draw": child(lambda: draw(pipe))}
found |= {"close": child(pipe.close), "fresh": child(fresh), "after": draw(pipe)}
found |= {"while a thread draws": drawing(pipe, lambda: draw(pipe)), "from a callback": from_a_callback(pipe)}
found |= {"fresh while a thread draws": drawing(pipe, fresh)} if backend == "onnxruntime" else {}
pipe.close()
found |= {"nothing after": child(lambda: None), "fresh after": child(fresh), "own": fresh()}
print(json.dumps(found | {"forks": len(forked), "in a launch": sum(forked)}))
"""


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_child_is_told_and_ends(backend: str, sd: Path, tmp_path: Path) -> None:
    build_here(str(sd), backend=backend, engines=tmp_path / "engines", chains=["text-to-image"], quiet=True)
    line = [sys.executable, "-c", SCRIPT, str(sd), backend, str(tmp_path / "engines"), str(SECONDS)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=8 * SECONDS)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    picture = found.pop("before")
    assert found.pop("forks") > 8 and found.pop("in a launch") == 0
    told = [found.pop("draw"), *found.pop("while a thread draws")]
    assert all("load the pipeline in the workers alone" in said for said in told), told
    assert found.pop("from a callback") == [None]
    ended = {"nothing": None, "close": None, "nothing after": None, "after": picture, "own": picture}
    if backend == "openvino":
        assert all("load a pipeline in the workers alone" in found.pop(name) for name in ("fresh", "fresh after"))
        assert found == ended
    else:
        assert set(found.pop("fresh while a thread draws")) == {picture}
        assert found == {**ended, "fresh": picture, "fresh after": picture}
