"""ONNX Runtime: nothing is written; a graph is loaded from the bundle, and optimised in memory."""

from turbochain.engines.backends.contract import Builder

BUILDER = Builder(name="onnxruntime", reads_graphs=True, options={})
