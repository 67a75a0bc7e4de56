"""The counted work against PyTorch's own counter, which runs the module that was exported."""

from pathlib import Path

import onnx
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import floor
import product
from rows import Ceilings
from turbochain.export import load
from turbochain.export.sources.checkpoint import Checkpoint
from turbochain.runtime import Bundle
from turbochain.runtime.errors import InputError

LATENTS = (1, 4, 8, 8)  # of the 64×64 miniature
EMBEDS = (1, 77, 64)


def _flops(module: torch.nn.Module, *arguments: object) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        module(*arguments)
    return counter.get_total_flops()


def _work(bundle: Path, *graphs: str) -> floor.Work:
    counted = [floor.count(bundle / "graphs" / f"{graph}.onnx") for graph in graphs]
    return floor.Work(sum(w.flops for w in counted), sum(w.bytes for w in counted))


def _bytes(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def test_unet(sd: Path, checkpoints: dict[str, Path]) -> None:
    unet = load.component(Checkpoint(checkpoints["sd"], None), "unet", torch.float32)
    work = _work(sd, "unet")
    expected = _flops(unet, torch.randn(LATENTS), torch.tensor(999), torch.randn(EMBEDS))
    # What depends on the time alone stands in the tables.
    projected = torch.randn(1, unet.time_embedding.linear_1.in_features)
    embedded = torch.randn(1, unet.time_embedding.linear_2.out_features)
    of_time = {unet.time_embedding: projected}
    of_time |= {m.time_emb_proj: embedded for m in unet.modules() if isinstance(m, ResnetBlock2D)}
    expected -= sum(_flops(module, given) for module, given in of_time.items())
    assert work.flops == pytest.approx(expected, rel=0.01)
    assert work.bytes == pytest.approx(_bytes(unet) - sum(map(_bytes, of_time)), rel=0.02)


def test_vae_decoder(sd: Path, checkpoints: dict[str, Path]) -> None:
    vae = load.component(Checkpoint(checkpoints["sd"], None), "vae", torch.float32)
    vae.forward = vae.decode
    work = _work(sd, "vae_decoder")
    assert work.flops == pytest.approx(_flops(vae, torch.randn(LATENTS)), rel=0.01)
    picture = 64 * 64 * 3
    assert work.bytes == pytest.approx(_bytes(vae.decoder) + _bytes(vae.post_quant_conv) + picture, rel=0.02)


def test_text_encoder(sd: Path, checkpoints: dict[str, Path]) -> None:
    text_encoder = load.component(Checkpoint(checkpoints["sd"], None), "text_encoder", torch.float32)
    work = _work(sd, "text_encoder")
    assert work.flops == pytest.approx(_flops(text_encoder, torch.randint(0, 999, (1, 77))), rel=0.01)
    vocabulary = text_encoder.get_input_embeddings().weight
    looked_up = 77 * vocabulary[0].nbytes
    ends = 77 * 4 + EMBEDS[1] * EMBEDS[2] * 4
    mask = 77 * 77 * 4  # a constant of the graph
    assert work.bytes == pytest.approx(_bytes(text_encoder) - vocabulary.nbytes + looked_up + mask + ends, rel=0.01)


def test_the_chain_is_the_sum_of_its_launches(opened: Bundle) -> None:
    slow = Ceilings(matrix=1e9, copy=1e12, dtype="float16", matrices={}, copies={})
    one, four = (
        floor.of(product.stages(opened.path, steps), slow, precision="fp32", batch=1, steps=steps) for steps in (1, 4)
    )
    assert set(one.stages) == {"text_encoder", "unet", "step", "vae_decoder"}
    assert four.ms - one.ms == pytest.approx(3 * (one.stages["unet"].ms + one.stages["step"].ms))
    assert one.ms - one.cached_ms == pytest.approx(one.stages["text_encoder"].ms)
    assert one.ms == pytest.approx(1e3 * sum(stage.flops for stage in one.stages.values()) / 1e9)


def test_the_larger_of_both_times_is_the_floor() -> None:
    machine = Ceilings(matrix=100.0, copy=10.0, dtype="float16", matrices={}, copies={})
    assert floor.seconds(floor.Work(flops=1000, bytes=10), machine) == 10
    assert floor.seconds(floor.Work(flops=10, bytes=1000), machine) == 100


def test_a_graph_that_cannot_be_counted_is_refused(tmp_path: Path) -> None:
    a, b, c = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4, 4]) for name in "abc")
    node = onnx.helper.make_node("Einsum", ["a", "b"], ["c"], name="scores", equation="ij,jk->ik")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [a, b], [c])), tmp_path / "g.onnx")
    with pytest.raises(InputError, match=r"g\.onnx: the operations of Einsum \(scores\) cannot be counted"):
        floor.count(tmp_path / "g.onnx")


def test_ceilings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "CPU_PRODUCTS", floor.CPU_PRODUCTS[:2])
    monkeypatch.setattr(floor, "CPU_CONVOLUTIONS", ((256, 32),))
    monkeypatch.setattr(floor, "CPU_COPIES", floor.CPU_COPIES[:1])
    found = floor.ceilings("cpu")
    assert found.matrix == max(found.matrices.values()) > 1e8
    assert found.copy == max(found.copies.values()) > 1e8
