"""The files of a hub checkpoint that are needed, and their download."""

import errno
import fnmatch
import os
from collections.abc import Callable
from pathlib import Path

from turbochain.export import families
from turbochain.export.sources.checkpoint import PICKLES, STEMS
from turbochain.runtime.errors import InputError

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the build has its own

_SMALL = ("*.json", "*.txt", "*.md", "LICENSE*", "LICENCE*", "*/*.json", "*/*.txt")


def fetch(
    repository: str,
    revision: str | None,
    variant: str | None,
    progress: Callable[[int, int], None],
    before_weights: Callable[[Path, dict[str, int], int], None],
) -> tuple[Path, str]:
    """Download what a bundle needs of a hub repository (or find it in the hub's cache).

    Returns the local folder and the commit. `progress(done, total)` in bytes. `before_weights(folder, counts,
    bytes)` is called when all but the weights is there, with the values that each component will have and
    the bytes to come; it may raise. Raises InputError for an unknown id, a gated one, or where neither the network
    nor the cache has it.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    try:
        info = hub.HfApi().model_info(repository, revision=revision, files_metadata=True)
    except GatedRepoError:
        raise _gated(repository) from None
    except RevisionNotFoundError:
        raise InputError(f"{repository} has no revision {revision!r}") from None
    except Exception as error:  # unknown, offline, unreachable: a copy in the cache still serves
        return _cached(repository, revision, error)
    sizes = {s.rfilename: s.size or 0 for s in info.siblings or []}
    wanted = select(list(sizes), variant)
    done, total = 0, sum(sizes[name] for name in wanted)
    folder: Path | None = None
    weights = next((n for n in wanted if n.endswith(".safetensors")), None)  # the small files come before them
    for name in wanted:
        if name == weights and folder:
            before_weights(folder, _counts(wanted, sizes), total - done)
        progress(done, total)
        try:
            file = hub.hf_hub_download(repository, name, revision=info.sha)
        except GatedRepoError:
            raise _gated(repository) from None
        except Exception as error:  # the network's errors have no common base class
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise
            raise InputError(
                f"the download of {name} of {repository} failed ({_first_line(error)}); the same command goes on"
            ) from error
        folder = Path(file).parents[name.count("/")]
        done += sizes[name]
    if folder is None:
        raise InputError(f"{repository} has no file that a checkpoint in diffusers' format has")
    return folder, str(info.sha)


def fetch_model(repository: str) -> Path:
    """Download a single model in diffusers' format, or find it in the hub's cache; InputError where neither has it."""
    import huggingface_hub as hub
    from huggingface_hub.errors import GatedRepoError

    wanted = ["config.json", *(f"{stem}*.safetensors*" for stem in STEMS), "*.md", "LICENSE*", "LICENCE*"]
    try:
        return Path(hub.snapshot_download(repository, allow_patterns=wanted))
    except GatedRepoError:
        raise _gated(repository) from None
    except Exception as error:  # unknown, offline, unreachable, and no copy in the cache
        raise _nowhere(repository, error) from None


def _gated(repository: str) -> InputError:
    return InputError(f"{repository} is gated: accept its licence on its page, then run: hf auth login")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _counts(names: list[str], sizes: dict[str, int]) -> dict[str, int]:
    """Component → values in its weights, judged by the files' sizes."""
    counts: dict[str, int] = {}
    for name in names:
        if name.endswith(".safetensors"):
            component = name.split("/")[0]
            counts[component] = counts.get(component, 0) + sizes[name] // (2 if "16" in Path(name).name else 4)
    return counts


def select(names: list[str], variant: str | None) -> list[str]:
    """Of a repository's files: configs, tokenizers, licence, and the safetensors of the variant (plain
    ones where `variant` is None, or the only variant that there is)."""
    small = [n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in _SMALL) and n.count("/") <= 1]
    stems = tuple(f"/{stem}" for stem in STEMS)
    weights = [n for n in names if n.endswith(".safetensors") and n.count("/") == 1 and any(s in n for s in stems)]
    components = {c for family in families.load().values() for c in family.components}
    folders = sorted({n.split("/")[0] for n in weights} & components)
    if variant and not any(f".{variant}." in n or f".{variant}-" in n for n in weights):
        raise InputError(f"the repository has no weights of variant {variant!r}")
    for folder in folders:
        here = [n for n in weights if n.startswith(f"{folder}/")]
        plain = [n for n in here if n.split("/")[1].count(".") == 1]
        chosen = [n for n in here if f".{variant}." in n or f".{variant}-" in n] if variant else plain
        small += chosen or plain or here
    if not folders and any(n.endswith(PICKLES) for n in names):
        raise InputError(
            "the repository has its weights only as pickles (.bin, .ckpt), which are refused because loading one "
            "runs code; convert them: load with diffusers and save_pretrained(FOLDER, safe_serialization=True)"
        )
    return small


def _cached(repository: str, revision: str | None, error: Exception) -> tuple[Path, str]:
    import huggingface_hub as hub

    try:
        folder = Path(hub.snapshot_download(repository, revision=revision, local_files_only=True))
    except Exception:  # whatever it is, there is no copy here
        raise _nowhere(repository, error) from None
    return folder, folder.name


def _nowhere(repository: str, error: Exception) -> InputError:
    return InputError(
        f"{repository} is neither on the hub under that name nor in the local cache, or there is no network "
        f"({_first_line(error)}); check the id, or give the path of a local folder"
    )
