"""The form of a graph with convolutions and linear layers in int8: QuantizeLinear and DequantizeLinear around them.

The weights stay fp32 in the bundle's files, and the library rounds them when it loads the graph. A convolution's result
is rounded too, see `quantization.ROUND_RESULTS`; a linear layer's is not.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from turbochain.engines.forms import form
from turbochain.engines.forms.shapes import maker, values
from turbochain.runtime.bundle.quantization import LARGEST, Layer, Range


def quantize(path: Path, kept: Mapping[str, Layer]) -> bytes:
    """Return an ONNX file's graph with these nodes in int8, see `form`. TurbochainError if the file is no graph."""
    return form(path, [lambda model: _Quantizer(model.graph).quantize(kept)])


class _Quantizer:
    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.rounded: dict[ir.Value, ir.Value] = {}  # Q, K and V read one tensor

    def quantize(self, kept: Mapping[str, Layer]) -> int:
        """Put each of these nodes between operators that round; return how many there are."""
        found = [node for node in self.graph if node.name in kept]
        for node in found:
            layer, read = kept[node.name], node.inputs[0]
            assert read is not None
            if read not in self.rounded:
                self.rounded[read] = self._round(node, read, *_levels(layer.reads.range))
            node.replace_input_with(0, self.rounded[read])
            self._round_weight(node)
            if layer.makes is not None:
                self._round_result(node, layer.makes.range)
        return len(found)

    def _round_weight(self, node: ir.Node) -> None:
        weight, axis = node.inputs[1], 0 if node.op_type == "Conv" else 1
        transposed = maker(weight, "Transpose")
        if transposed is not None:  # of [in, out], so that the outputs are the first axis
            node, weight, axis = transposed, transposed.inputs[0], 0
        assert weight is not None and weight.const_value is not None
        data = values(weight.const_value)
        largest = np.abs(data.astype(np.float32)).max(axis=tuple(i for i in range(data.ndim) if i != axis))
        scale = np.where(largest == 0, 1, largest / LARGEST).astype(np.float32)
        rounded = self._round(node, weight, scale, np.zeros(len(scale), np.int8), axis)
        node.replace_input_with(0 if transposed is not None else 1, rounded)

    def _round_result(self, node: ir.Node, makes: Range) -> None:
        made, readers = node.outputs[0], list(node.outputs[0].uses())
        rounded = self._round(node, made, *_levels(makes), after=True)
        for reader, i in readers:
            reader.replace_input_with(i, rounded)

    def _round(
        self,
        node: ir.Node,
        value: ir.Value,
        scale: np.ndarray,
        zero: np.ndarray,
        axis: int | None = None,
        after: bool = False,
    ) -> ir.Value:
        """Return a tensor rounded to levels, by operators before a node or `after` it."""
        tape, how = ir.tape.Tape(), {} if axis is None else {"axis": axis}
        ends = [self._initializer(f"{value.name}.{name}", of) for name, of in (("scale", scale), ("zero", zero))]
        made: ir.Value = tape.op("DequantizeLinear", [tape.op("QuantizeLinear", [value, *ends], how), *ends], dict(how))
        (self.graph.insert_after if after else self.graph.insert_before)(node, list(tape.nodes))
        return made

    def _initializer(self, name: str, data: np.ndarray) -> ir.Value:
        value = ir.val(name, const_value=ir.tensor(data))
        self.graph.register_initializer(value)
        return value


def _levels(seen: Range) -> tuple[np.ndarray, np.ndarray]:
    """Return the step and the zero of a range's 256 levels."""
    return np.array(seen.step, np.float32), np.array(seen.zero, np.uint8)
