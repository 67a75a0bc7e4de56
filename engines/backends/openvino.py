"""OpenVINO: nothing is written; a graph is loaded from the bundle, and compiled in memory."""

from typing import Any

from turbochain.engines.backends import int8
from turbochain.engines.backends.contract import Builder, Option, Options
from turbochain.runtime.backends import openvino, openvino_int8
from turbochain.runtime.errors import InputError

AUTO = "auto"
FASTEST_FIRST = ("bf16", "mixed", "fp32")
OPTIONS = {
    "inference_precision": Option(
        AUTO,
        "what it computes in, even if the graphs are more precise; mixed is bf16 for the VAE and fp32 for the rest; "
        "auto is the first of bf16, mixed and fp32 that is within its bounds, fp32 if the CPU has no bf16 or with "
        "--precision fp32",
        choices=(AUTO, *FASTEST_FIRST),
    ),
    **int8.OPTIONS,
}


def settle(options: Options) -> dict[str, Any]:
    """Return the options with what this machine decides; InputError if it lacks what they ask for."""
    asked = options["inference_precision"]
    if asked == "fp32" or openvino.has_bf16():
        return dict(options)
    if asked != AUTO:
        raise InputError(f"inference_precision={asked}: this CPU does not compute in bf16; auto takes fp32 here")
    return {**options, "inference_precision": "fp32"}


def candidates(options: Options) -> list[dict[str, Any]]:
    """Return the precisions to try, in this order, and in each how much is in int8, with weights as this CPU's."""
    chosen = options["inference_precision"]
    precisions = FASTEST_FIRST if chosen == AUTO else (chosen,)
    bits = {} if options["int8"] == "none" else {"weight_bits": openvino_int8.weight_bits()}
    return [{"inference_precision": p, **error, **bits} for p in precisions for error in int8.candidates(options)]


def of_precision(precision: str) -> dict[str, Any]:
    """Return the options of a build in this precision: who asks for fp32 wants all of it in fp32."""
    return {"inference_precision": precision} if precision == "fp32" else {}


BUILDER = Builder(
    name="openvino",
    reads_graphs=True,
    options=OPTIONS,
    settle=settle,
    candidates=candidates,
    of_precision=of_precision,
    int8_of=("fp32", "fp16"),
)
