"""A hub id, owner/name: the files of its repository that are needed, downloaded or found in the hub's cache."""

import errno
import fnmatch
import os
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from turbochain.export import families
from turbochain.export.sources import ELSEWHERE, LORA, Fetched, Source, SourceKind, Want
from turbochain.export.sources.kinds.single_file import SingleFile
from turbochain.export.sources.weight_files import PICKLES, STEMS
from turbochain.runtime.errors import InputError

_TERMS = ("*.md", "LICENSE*", "LICENCE*")
_SMALL = ("*.json", "*.txt", *_TERMS, "*/*.json", "*/*.txt")
_PART = ("config.json", *(f"{stem}*.safetensors*" for stem in STEMS))
_PLAIN = re.compile(rf"({'|'.join(STEMS)})(-\d{{5}}-of-\d{{5}})?\.safetensors")  # in one file, or in shards


@dataclass(frozen=True)
class Hub:
    """A repository of the hub; its commit says all."""

    name: str

    @property
    def local(self) -> None:
        """Return None: the files of a revision are asked for by its name."""

    @property
    def tiny_vae(self) -> None:
        """Return None: the family's serves."""

    def fetch(self, want: Want) -> Fetched:
        """Download what is wanted, the small files first, or find it in the hub's cache.

        Progress is in bytes. Raises InputError for an unknown id, a gated one, or if neither the network nor the
        cache has it.
        """
        if want.part is not None and want.part.startswith(LORA):
            return self.fetch_file(want, "pytorch_lora_weights.safetensors")  # diffusers' name
        if want.part is not None:
            return self._fetch_part(want, "config.json", lambda names: select_part(names, want.variant))
        found = self._files(want, "model_index.json")
        return found if isinstance(found, Fetched) else self._download(want, *found)

    def fetch_file(self, want: Want, file: str) -> Fetched:
        """Download one file (its path in the repository) and the repository's licence; convert it as a file here.

        Raises InputError as `fetch` and `SingleFile.fetch`, and if there is no such file.
        """
        found = self._fetch_part(want, file, lambda names: [n for n in names if n == file or _is_terms(n)])
        made = SingleFile(found.folder / file).fetch(want)
        return Fetched(made.folder, found.commit, home=found.folder)

    def _fetch_part(self, want: Want, needed: str, choose: Callable[[list[str]], list[str]]) -> Fetched:
        """Download the repository's files that `choose` returns, or find them in the cache by the file `needed`."""
        found = self._files(want, needed)
        if isinstance(found, Fetched):
            return found
        commit, sizes = found
        if needed not in sizes:
            others = sorted(name for name in sizes if name.endswith(".safetensors"))
            raise InputError(f"{self.name} has no {needed}; its safetensors files are {', '.join(others) or 'none'}")
        wanted = choose(list(sizes))
        total = sum(sizes[name] for name in wanted)
        return Fetched(self._snapshot(commit, wanted, lambda done: want.progress(done, total)), commit, want.variant)

    def _files(self, want: Want, needed: str) -> tuple[str, dict[str, int]] | Fetched:
        """Return the commit and its files (name → bytes), or without network the copy in the cache with `needed`."""
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the build has its own; read at the import
        import huggingface_hub as hub
        from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

        try:
            info = hub.HfApi().model_info(self.name, revision=want.revision, files_metadata=True)
        except GatedRepoError:
            raise self._gated() from None
        except RevisionNotFoundError:
            raise InputError(f"{self.name} has no revision {want.revision!r}") from None
        except Exception as error:  # unknown, offline, unreachable: a copy in the cache still serves
            return self._cached(want, needed, error)
        return str(info.sha), {s.rfilename: s.size or 0 for s in info.siblings or []}

    def _download(self, want: Want, commit: str, sizes: dict[str, int]) -> Fetched:
        """Download the files that are needed among those in `sizes` (name → bytes)."""
        wanted = select(list(sizes), want.variant, want.skip)
        weights = [name for name in wanted if name.endswith(".safetensors")]
        small = [name for name in wanted if name not in weights]
        if not wanted:
            raise InputError(f"{self.name} has no file that a checkpoint in diffusers' format has")
        total = sum(sizes[name] for name in wanted)
        folder = self._snapshot(commit, small, lambda done: want.progress(done, total))
        here = sum(sizes[name] for name in wanted if (folder / name).exists())
        if weights:
            want.before_weights(folder, _counts(weights, sizes), total - here)
            self._snapshot(commit, weights, lambda done: want.progress(min(here + done, total), total))
        return Fetched(folder, commit, want.variant)

    def _snapshot(self, commit: str, names: list[str], progress: Callable[[int], None]) -> Path:
        """Download these files and return their folder; `progress` is called with the bytes so far."""
        import huggingface_hub as hub
        from huggingface_hub.errors import GatedRepoError

        patterns = [escape(name) for name in names]
        try:
            folder = hub.snapshot_download(
                self.name, revision=commit, allow_patterns=patterns, tqdm_class=_reporting(progress)
            )
        except GatedRepoError:
            raise self._gated() from None
        except Exception as error:  # the network's errors have no common base class
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise
            raise InputError(
                f"the download of {self.name} failed ({_first_line(error)}); the same command goes on"
            ) from error
        if missing := [name for name in names if not Path(folder, name).exists()]:
            raise InputError(f"the download of {self.name} ended without {missing[0]}; the same command goes on")
        return Path(folder)

    def _cached(self, want: Want, needed: str, error: Exception) -> Fetched:
        """Return the copy in the hub's cache, if it has the file `needed`; else InputError with the network's error."""
        import huggingface_hub as hub

        bundle = hub.try_to_load_from_cache(self.name, "bundle.json", revision=want.revision)
        if isinstance(bundle, str):
            raise InputError(
                f"{self.name} is a bundle, and a checkpoint was expected: build an engine of it with "
                f"build-engine {Path(bundle).parent}"
            ) from None
        found = hub.try_to_load_from_cache(self.name, needed, revision=want.revision)
        if not isinstance(found, str):
            raise InputError(
                f"{self.name} is neither on the hub under that name nor in the local cache, or there is no network "
                f"({_first_line(error)}); check the id, or give the path of a local folder"
            ) from None
        folder = Path(found).parents[needed.count("/")]
        return Fetched(folder, folder.name, want.variant)  # the folder of a snapshot has the commit's name

    def _gated(self) -> InputError:
        return InputError(f"{self.name} is gated: accept its licence on its page, then run: hf auth login")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _reporting(progress: Callable[[int], None]) -> type[Any]:
    """Return a silent tqdm class for `snapshot_download` that reports the bytes of all files together.

    The library counts each byte in two bars, as received and as written, and files in a third.
    """
    from tqdm import tqdm

    furthest = 0

    class Reporting(tqdm):
        def __init__(self, *arguments: Any, unit: str = "it", **options: Any) -> None:
            super().__init__(*arguments, unit=unit, **{**options, "disable": True})
            self.of_bytes, self.n = unit == "B", options.get("initial") or 0

        def update(self, n: float | None = 1) -> None:
            nonlocal furthest
            self.n += n or 0
            if self.of_bytes and self.n > furthest:
                furthest = int(self.n)
                progress(furthest)

    return Reporting


def _counts(weights: list[str], sizes: dict[str, int]) -> dict[str, int]:
    """Return component → values in its weights, judged by the files' sizes."""
    counts: dict[str, int] = {}
    for name in weights:
        component = name.split("/")[0]
        counts[component] = counts.get(component, 0) + sizes[name] // (2 if "16" in Path(name).name else 4)
    return counts


def select(names: list[str], variant: str | None, skip: Collection[str] = ()) -> list[str]:
    """Return the repository's files that are needed: configs, tokenizers, licence, and weights.

    The weights are the safetensors of the variant (plain ones if `variant` is None, or the only variant that there
    is), without those of the components in `skip`.
    """
    small = [n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in _SMALL) and n.count("/") <= 1]
    stems = tuple(f"/{stem}" for stem in STEMS)
    weights = [n for n in names if n.endswith(".safetensors") and n.count("/") == 1 and any(s in n for s in stems)]
    components = {c for family in families.load().values() for c in family.components}
    folders = sorted({n.split("/")[0] for n in weights} & components)
    if variant and not any(f".{variant}." in n or f".{variant}-" in n for n in weights):
        raise InputError(f"the repository has no weights of variant {variant!r}")
    for folder in folders:
        here = [n for n in weights if n.startswith(f"{folder}/")]
        plain = [n for n in here if _PLAIN.fullmatch(n.split("/")[1])]
        chosen = [n for n in here if f".{variant}." in n or f".{variant}-" in n] if variant else plain
        small += [] if folder in skip else chosen or plain or here
    if not folders:
        _refuse_pickles(names)
    return small


def select_part(names: list[str], variant: str | None) -> list[str]:
    """Return the files that are needed from a repository with one component: config, licence, and weights.

    The weights are the safetensors of the variant; plain ones, of the library's own name, if `variant` is None or they
    have none, or else all. Raises InputError if there are only pickles.
    """
    found = [n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in _PART) and "/" not in n]
    weights = [n for n in found if n.endswith(".safetensors")]
    if not weights:
        _refuse_pickles(n for n in names if "/" not in n)
    plain = [n for n in weights if _PLAIN.fullmatch(n)]
    chosen = [n for n in weights if f".{variant}." in n or f".{variant}-" in n] or plain or weights
    return [n for n in found if n not in weights] + chosen + [n for n in names if _is_terms(n)]


def _refuse_pickles(names: Iterable[str]) -> None:
    """Raise InputError if there are pickles among these files of a repository without safetensors."""
    if any(n.endswith(PICKLES) for n in names):
        raise InputError(
            "the repository has its weights only as pickles (.bin, .ckpt), which are refused because loading one "
            "runs code; convert them: load with diffusers and save_pretrained(FOLDER, safe_serialization=True)"
        )


def _is_terms(name: str) -> bool:
    return "/" not in name and any(fnmatch.fnmatch(name, pattern) for pattern in _TERMS)


def _find(name: str) -> Source | None:
    legal = re.fullmatch(r"\w([\w.-]*\w)?/\w([\w.-]*\w)?", name) and not re.search(r"--|\.\.", name)
    return Hub(name) if legal and not name.endswith((".safetensors", *PICKLES)) else None  # those are paths


KIND = SourceKind("a hub id (owner/name)", ELSEWHERE, _find, parts=True, variants=True)
