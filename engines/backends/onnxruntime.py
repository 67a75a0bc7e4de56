"""ONNX Runtime: nothing is written; a graph is loaded from the bundle, and optimised in memory."""

from turbochain.engines.backends.contract import Builder, Option

OPTIONS = {"prefer_nhwc": Option(False, "on a GPU let convolutions and norms work channels last")}

BUILDER = Builder(name="onnxruntime", reads_graphs=True, options=OPTIONS)
