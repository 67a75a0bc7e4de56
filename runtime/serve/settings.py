"""What `turbochain serve` was told."""

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from turbochain.runtime.errors import InputError
from turbochain.runtime.web.site import is_site

IMAGE_BODY = 20 * 2**20
"""The most bytes of a request, or of a socket's message, that carries a picture."""
BODY = 2**20
"""The most bytes of any other."""


@dataclass(frozen=True)
class Settings:
    """The options of the server; every address that it can be reached at is an address of this machine."""

    bundles: tuple[str, ...]  # folders, or ids on the hub
    model_names: tuple[str, ...] = ()  # one for each bundle; () for the folders' names
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()  # any of them opens; () for no key at all
    insecure: bool = False  # whether an address that others can reach needs no key
    allow_hosts: tuple[str, ...] = ()  # further names in Host that are this server; "*" for any
    allow_origins: tuple[str, ...] = ()  # origins of other servers' pages that may call this one; "*" for any
    queue: int = 16  # pictures that may wait
    timeout: float = 60.0  # seconds that a picture may take, waiting included
    strict_size: bool = False  # whether a size that is not built is refused
    lora_dir: str | None = None  # the folder of the LoRA files that requests may name
    memory_bytes: int | None = None  # what the loaded bundles may weigh; None for half of what the device has
    backend: str | None = None
    device: str | None = None
    threads: int | None = None
    trust_engines: bool = False
    web: str | None = None  # the folder of a site that is served at /web/, to everyone who may call this server

    def __post_init__(self) -> None:
        """Raise InputError if the options contradict each other, would open the server to everyone, or name no site."""
        if not is_loopback(self.host) and not self.api_keys and not self.insecure:
            raise InputError(
                f"--host {self.host} can be reached from other machines, and there is no key: give --api-key KEY "
                "(or --api-key-file), or --insecure to let everyone draw"
            )
        if not all(self.model_names):
            raise InputError("a --model-name is empty: what clients call the bundle was expected")
        if self.model_names and len(self.model_names) != len(self.bundles):
            raise InputError(
                f"{len(self.model_names)} --model-name for {len(self.bundles)} bundles: one for each was expected"
            )
        for origin in self.allow_origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise InputError(
                    f"--allow-origin {origin}: what browsers call a page's server was expected, such as "
                    "https://page.example or http://localhost:3000, or * for any"
                )
        if self.web is not None and not is_site(Path(self.web)):
            raise InputError(f"--web {self.web} is no site: turbochain export-web BUNDLE -o {self.web} writes one")
        if self.queue < 1:
            raise InputError(f"--queue {self.queue}: at least 1 was expected")
        if not self.timeout > 0:
            raise InputError(f"--timeout {self.timeout:g}: a number of seconds above 0 was expected")
        if self.memory_bytes is not None and self.memory_bytes < 1:
            raise InputError("--memory: a number of GiB above 0 was expected")
        if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in self.api_keys):
            raise InputError(
                "a key is empty, or has characters that no header carries: letters and digits were expected"
            )


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
