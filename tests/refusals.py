"""Read what a command says when it refuses."""

import subprocess


def refused(done: subprocess.CompletedProcess[str], status: int = 2) -> str:
    """The one sentence of a command that failed; above it may stand its backend and phases, nothing else."""
    assert done.returncode == status, done
    assert done.stdout == "" and "Traceback" not in done.stderr, done
    *phases, last = done.stderr.splitlines()
    assert all(line.startswith("backend ") or line.endswith((" s", " …")) for line in phases), phases
    program, error, sentence = last.split(": ", 2)
    assert program in ("turbochain", "build-engine") and error == "error", last
    assert 20 < len(sentence) < 900, sentence
    return sentence
