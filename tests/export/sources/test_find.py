"""`find`: a name belongs to one kind of source, which is found without torch; a name of no kind is refused, and the
message has the kinds."""

import subprocess
import sys
from pathlib import Path

import pytest

from turbochain.export.order import ExportOrder
from turbochain.export.sources import find, known
from turbochain.export.sources.kinds.demo import FOLDER
from turbochain.export.sources.presets import PRESETS
from turbochain.runtime import InputError

KINDS = "neither a .safetensors file here, nor a folder here, nor a hub id (owner/name), nor demo, nor synthetic:NAME"


def kind(name: str) -> str:
    return type(find(name)).__name__


@pytest.mark.parametrize(
    ("text", "expected"),
    [("owner/name", True), ("stabilityai/sd-turbo", True), ("a.b/c_d-1", True)]
    + [
        (text, False)
        for text in ("name", "a/b/c", "/a", "a/", "./a b", "", "a/b\n", "./a", "a/b.", "a--b/c", "a/b.safetensors")
    ],
)
def test_what_looks_like_a_hub_id(text: str, expected: bool) -> None:
    if expected:
        assert kind(text) == "Hub" and find(text).name == text and find(text).local is None
        return
    with pytest.raises(InputError) as caught:
        find(text)
    assert str(caught.value) == f"{text} is {KINDS}"


@pytest.mark.parametrize(
    ("source", "vae", "expected"),
    [
        *(("owner/name", None, True), ("demo", None, False), ("synthetic:sd-turbo-mini", None, False)),
        *((".", None, False), ("demo", "tiny", True), ("demo", "owner/name", True), ("demo", ".", False)),
        *(("synthetic:sd-turbo-mini", "tiny", False), ("owner/name", ".", True)),
    ],
)
def test_only_a_hub_id_needs_the_network(source: str, vae: str | None, expected: bool) -> None:
    """And the family's tiny VAE, which is one; a synthetic checkpoint has a tiny VAE of its own."""
    assert ExportOrder(source, vae=vae).online == expected


def test_a_folder_is_told_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = find("owner/name")  # it exists here, so it is no hub id
    assert kind("owner/name") == "Folder" and (found.name, found.local) == ("name", folder)
    monkeypatch.chdir(folder)
    assert (find(".").name, find(".").local) == ("name", folder)


def test_demo_is_a_name_and_its_folder_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert (find("demo").name, find("demo").local) == ("demo", FOLDER)
    assert find("./demo").local == tmp_path / "demo"


@pytest.mark.parametrize("name", PRESETS)
def test_synthetic(name: str) -> None:
    found = find(f"synthetic:{name}")
    assert kind(f"synthetic:{name}") == "Synthetic" and (found.name, found.local) == (f"synthetic:{name}", None)


def test_an_unknown_preset() -> None:
    with pytest.raises(InputError, match=f"no synthetic checkpoint 'x': choose {', '.join(PRESETS)}"):
        find("synthetic:x")


@pytest.mark.parametrize("part", [None, "vae", "unet"])
def test_a_single_file(part: str | None, tmp_path: Path) -> None:
    path = tmp_path / "sd.safetensors"
    (tmp_path / "blob").write_bytes(b"x")  # what is in it is looked at later
    path.symlink_to("blob")
    found = find(str(path), part)
    assert (type(found).__name__, found.name, found.local) == ("SingleFile", "sd.safetensors", path)


@pytest.mark.parametrize("name", ["demo", "synthetic:sd-turbo-mini", "nothing"])
def test_what_no_part_comes_from(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        find(name, "vae")
    assert str(caught.value) == (
        f"--vae {name} is neither tiny, nor a .safetensors file here, nor a file of the hub "
        "(owner/name/….safetensors), nor a folder here, nor a hub id (owner/name)"
    )


def test_a_file_of_a_hub_repository_is_a_part_and_no_checkpoint() -> None:
    name = "owner/name/sub/a.safetensors"
    for part in ("unet", "vae", "lora"):
        found = find(name, part)
        assert (type(found).__name__, found.name, found.local) == ("HubFile", name, None)
    assert ExportOrder("demo", lora=(f"{name}:0.5",)).online
    with pytest.raises(InputError, match=r"is neither a \.safetensors file here, nor a folder here"):
        find(name)


def test_every_module_of_kinds_is_one() -> None:
    modules = {path.stem for path in Path(FOLDER.parent, "sources", "kinds").glob("*.py")} - {"__init__"}
    assert len(known()) == len(modules) >= 5


def test_finding_imports_nothing_heavy() -> None:
    code = (
        "import sys; from turbochain.export.sources import find\n"
        "for name in ('demo', 'synthetic:sd-turbo', 'a/b', '.'): find(name).local\n"
        "print(*{'torch', 'diffusers', 'transformers', 'huggingface_hub', 'safetensors'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.returncode) == ("\n", 0), done
