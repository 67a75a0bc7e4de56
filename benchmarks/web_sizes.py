"""Print what a visitor of an exported site downloads, as the table of runtime/web/README.md.

    python benchmarks/web_sizes.py                          # of the published architectures, by their parameters
    python benchmarks/web_sizes.py sd-turbo.site            # of sites, by their files

Parameters are counted in fp16, with TAESD as the VAE. That is an upper bound: a build leaves out the parameters whose
results are in its tables. A data file has at most 1 GiB.
"""

import sys
from math import ceil
from pathlib import Path

PUBLISHED = ("sd-turbo", "sdxl-turbo")
HEADING = ("", "text encoders", "UNet", "VAE", "all of the model", "largest file")
GIB = 2**30


def by_parameters(name: str) -> tuple[str, ...]:
    """Return the row of a published architecture, from models on no device."""
    import torch
    from diffusers import AutoencoderTiny

    from turbochain.export.sources import presets, synthetic

    parts = synthetic.models(name)
    with torch.device("meta"):
        tiny = AutoencoderTiny(**presets.preset(name).tiny)
    size = {part: 2 * sum(p.numel() for p in module.parameters()) for part, module in parts.items()}
    size["vae"] = 2 * sum(p.numel() for p in tiny.parameters())
    text = sum(of for part, of in size.items() if part.startswith("text"))
    return row(name, text, size["unet"], size["vae"], sum(size.values()), min(GIB, max(size.values())))


def by_files(site: Path) -> tuple[str, ...]:
    """Return the row of a site: every file of its bundle, by the component that its name begins with."""
    size = {path: path.stat().st_size for path in (site / "bundle").rglob("*") if path.is_file()}
    text, unet, vae = (sum(of for p, of in size.items() if p.name.startswith(c)) for c in ("text", "unet", "vae"))
    return row(site.name, text, unet, vae, sum(size.values()), max(size.values()))


def row(name: str, text: int, unet: int, vae: int, total: int, largest: int) -> tuple[str, ...]:
    """Return a row in GB."""
    files = f" in {ceil(unet / GIB)} files" if unet > GIB else ""
    return (name, gb(text), f"{gb(unet)}{files}", gb(vae), gb(total), gb(largest))


def gb(count: int) -> str:
    """Return bytes in GB, or in MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def main(sites: list[str]) -> None:
    """Print the table."""
    rows = [by_files(Path(site)) for site in sites] or [by_parameters(name) for name in PUBLISHED]
    for cells in (HEADING, ("---",) * len(HEADING), *rows):
        print("|", " | ".join(cells), "|")


if __name__ == "__main__":
    main(sys.argv[1:])
