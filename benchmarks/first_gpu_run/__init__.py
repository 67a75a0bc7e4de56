"""The first minutes on a GPU: whether the CUDA path works at all, and what one graph and a compiler buy.

    PYTHONPATH=benchmarks python -m first_gpu_run prepare -o FOLDER                # on a CPU, with all of .venv
    PYTHONPATH=benchmarks python -m first_gpu_run run --prepared FOLDER -o results # on the GPU's machine

That machine needs PyTorch, cuda-bindings, diffusers and transformers, and turbochain's few libraries; it needs neither
TensorRT nor ONNX Runtime, because the stages are PyTorch's modules under our executor (torch_stages.py). Without
diffusers the steps that need it say so, and the others run. benchmarks/README.md has the steps.
"""
