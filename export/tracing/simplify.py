"""Take out of a traced graph what no backend needs."""

from typing import Any

from onnx_ir.passes import Sequential, common
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules import common as rules

# Of onnxscript's own choice those that match in these models: one of the others takes most of an export's time.
RULES = (
    rules.div_by_1_rule,
    rules.mul_by_1_rule,
    rules.add_0_rule,
    rules.sub_0_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.reshape_reshape_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.min_max_rule,
    rules.max_min_rule,
)
ROUNDS = 2  # what a rule leaves may be constant


def simplify(model: Any) -> None:
    """Change `model` (onnx_ir.Model) itself: fold constants, and remove what does nothing or is there twice."""
    for _ in range(ROUNDS):
        fold_constants(model, onnx_shape_inference=True, should_fold=_fold)
        rewrite(model, RULES)
    Sequential(
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


def _fold(node: Any) -> bool | None:
    """Return whether to fold a node that reads constants; None: as onnxscript would.

    A Linear's weight stays as the checkpoint has it, and the graph transposes it: that is how OpenVINO wants it, which
    would transpose it again and keep another copy in memory. ONNX Runtime takes the one or the other.
    """
    return False if node.op_type == "Transpose" else None
