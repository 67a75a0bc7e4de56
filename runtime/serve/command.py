"""The command `turbochain serve`."""

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from turbochain.runtime.errors import BackendMissing, InputError
from turbochain.runtime.serve.settings import Settings

KEY_VARIABLE = "TURBOCHAIN_API_KEY"
NEEDED = ("fastapi", "uvicorn", "websockets", "python_multipart", "prometheus_client")


def add_arguments(parser: Any) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("bundle", nargs="+", metavar="BUNDLE", help="a folder, or a bundle on the hub as OWNER/NAME")
    add("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine alone)")
    add("--port", type=int, default=8000, help="port (default 8000; 0 for a free one)")
    add("--api-key", action="append", default=[], metavar="KEY", help=f"what clients must send (or ${KEY_VARIABLE})")
    add("--api-key-file", type=Path, metavar="FILE", help="a file with one key per line")
    add("--insecure", action="store_true", help="need no key, even at an address that others can reach")
    add("--model-name", action="append", default=[], metavar="NAME", help="name of each bundle (default: its folder's)")
    add("--queue", type=int, default=16, metavar="N", help="how many pictures may wait (default 16)")
    add("--timeout", type=float, default=60.0, metavar="SECONDS", help="for one picture, with waiting (default 60)")
    add("--strict-size", action="store_true", help="refuse a size that is not built, and do not draw the nearest")
    add("--lora-dir", metavar="DIR", help="LoRA files (*.safetensors) that requests may name, read at the start")
    add("--allow-origin", action="append", default=[], metavar="ORIGIN", help="let pages of this origin call it")
    add(
        "--allow-host", action="append", default=[], metavar="NAME", help="a further name that this server is called by"
    )
    add("--web", metavar="SITE", help="also serve what export-web wrote, at /web/; like the page it needs no key")
    add("--memory", type=float, metavar="GIB", help="what loaded bundles may weigh (default: half of the memory)")
    add("--backend", help="default: the best engine in the bundle that fits this machine")
    add("--device", help="default: the backend's own choice")
    add("--threads", type=int, help="CPU threads per launch (default: the backend's own choice)")
    add("--trust-engines", action="store_true", help="use the engines of a bundle from the hub: they may be code")


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Return the options; raises InputError."""
    return Settings(
        bundles=tuple(arguments.bundle),
        model_names=tuple(arguments.model_name),
        host=arguments.host,
        port=arguments.port,
        api_keys=keys_of(arguments.api_key, arguments.api_key_file),
        insecure=arguments.insecure,
        allow_hosts=tuple(arguments.allow_host),
        allow_origins=tuple(origin.rstrip("/") for origin in arguments.allow_origin),
        queue=arguments.queue,
        timeout=arguments.timeout,
        strict_size=arguments.strict_size,
        lora_dir=arguments.lora_dir,
        memory_bytes=None if arguments.memory is None else _bytes(arguments.memory),
        backend=arguments.backend,
        device=arguments.device,
        threads=arguments.threads,
        trust_engines=arguments.trust_engines,
        web=arguments.web,
    )


def _bytes(gib: float) -> int:
    return int(gib * 2**30) if 0 < gib < 2**20 else 0  # which `Settings` refuses


def keys_of(given: Sequence[str], path: Path | None) -> tuple[str, ...]:
    """Return the keys that are given, that of the environment and those of a file; raises InputError."""
    found = list(given)
    if key := os.environ.get(KEY_VARIABLE, "").strip():
        found.append(key)
    if path is not None:
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--api-key-file {path} cannot be read: {error}") from error
        keys = [line.strip() for line in lines if line.strip()]
        if not keys:
            raise InputError(f"--api-key-file {path} has no key: one per line was expected")
        found += keys
    return tuple(found)


def serve(arguments: argparse.Namespace) -> None:
    """Listen, load and serve until a signal comes. Raises InputError, and what ended the worker before it was ready."""
    settings = settings_of(arguments)
    if any(importlib.util.find_spec(name) is None for name in NEEDED):
        raise BackendMissing("the server's packages are not installed: pip install 'turbochain[serve]'")
    from turbochain.runtime.serve.listen import run

    run(settings)
