"""Start another process that uses the files, and talk to it over pipes."""

import subprocess
import sys
from contextlib import contextmanager

PRELUDE = """import os, subprocess, sys, time
from turbochain.runtime.bundle.hashing import *
from turbochain.runtime.bundle.lock import *
from turbochain.runtime.bundle.writing import *
"""


@contextmanager
def process(code: str, *args: object):
    """Another Python that talks over pipes; killed at the end whatever it does."""
    command = [sys.executable, "-c", PRELUDE + code, *map(str, args)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def said(child) -> str:
    return child.stdout.readline().strip()
