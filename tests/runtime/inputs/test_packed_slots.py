"""Adapters are packed into slots as FORMAT.md says, whatever the slots held before."""

from pathlib import Path

import lora_files
import numpy as np
import slot_packing
from test_lora_slots import draw

from turbochain.runtime import Bundle
from turbochain.runtime.inputs import adapters
from turbochain.runtime.inputs.slots import Matrices, Packed, read_layout

STATES = (["a"], ["b"], ["b", "c"], ["a", "c"], [], ["c"], ["a"], ["a", "c"], ["a", "c"])


def test_what_is_packed_does_not_depend_on_what_was_packed_before(
    slotted: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Adapters of other ranks and layers, side by side and alone, with weights that change too."""
    bundle, numbers = Bundle.open(slotted), np.random.default_rng(0)
    drawn = {
        "a": draw(checkpoints["sd"], seed=1, ranks=(4, 2), alphas=(3.0,)),
        "b": draw(checkpoints["sd"], seed=2, ranks=(3,)),
        "c": draw(checkpoints["sd"], seed=3, ranks=(1, 2), only="attn"),
    }
    files = {n: lora_files.write(tmp_path / f"{n}.safetensors", of, "kohya") for n, of in drawn.items()}
    for name in ("unet+lora", "text_encoder"):
        graph = bundle.manifest.graphs[name]
        packed, known = Packed(read_layout(bundle, name)), lora_files.shapes(checkpoints["sd"])
        read = {n: adapters.read(file, known).components[graph.component] for n, file in files.items() if n != "c"}
        if graph.component == "unet":
            read["c"] = adapters.read(files["c"], known).components["unet"]
        short = {n: {p.removeprefix("text_model."): one for p, one in added.items()} for n, added in read.items()}
        in_graph = {p.removeprefix("text_model."): p for p in packed._places}
        matrices = {n: Matrices.of(n, {in_graph[p]: one for p, one in of.items()}) for n, of in short.items()}
        for state in STATES:
            weights = [(n, float(numbers.normal())) for n in state if n in matrices]
            packed.fill([(matrices[n], weight) for n, weight in weights])
            expected = slot_packing.pack(slotted, graph, [(drawn[n], weight) for n, weight in weights])
            np.testing.assert_array_equal(packed.down, expected["lora_down"], err_msg=str(state))
            np.testing.assert_allclose(packed.up, expected["lora_up"], rtol=1e-6, err_msg=str(state))
