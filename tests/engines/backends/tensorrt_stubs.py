"""Typed stubs of TensorRT's Python API, read out of the compiled bindings. A script: `tensorrt_stubs.py WHEEL FOLDER`.

The bindings need TensorRT's libraries to run but not to be looked at, so no library, compiler or GPU is needed.
"""

import ctypes
import importlib
import inspect
import re
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from mypy.stubgenc import DocstringSignatureGenerator, InspectionStubGenerator
from mypy.stubutil import FunctionContext, FunctionSig

SHT_DYNAMIC, SHT_DYNSYM, DT_NEEDED, DT_DEBUG, STB_WEAK = 6, 11, 1, 21, 2  # of ELF
PY_BF_GETBUFFER = 1
NONE_IS_FAILURE = ("build_serialized_network", "deserialize_cuda_engine", "create_execution_context")
TENSORRT_LIBRARY = re.compile(rb"lib(nvinfer|nvonnxparser|tensorrt)")


def standalone(module: bytes) -> bytes:
    """An ELF64 extension module that asks for no library of TensorRT; functions that it lacks are null.

    DT_NEEDED entries become DT_DEBUG, which a loader ignores; undefined symbols become weak.
    """
    image = bytearray(module)
    (sections_at,) = struct.unpack_from("<Q", image, 40)
    size, count = struct.unpack_from("<HH", image, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", image, sections_at + i * size) for i in range(count)]
    for _, kind, _, _, offset, length, strings, _, _, entry in sections:
        for at in range(offset, offset + length, entry) if kind in (SHT_DYNAMIC, SHT_DYNSYM) else ():
            if kind == SHT_DYNAMIC:
                tag, name = struct.unpack_from("<QQ", image, at)
                if tag == DT_NEEDED and TENSORRT_LIBRARY.match(image, sections[strings][4] + name):
                    struct.pack_into("<Q", image, at, DT_DEBUG)
            else:
                _, info, _, section = struct.unpack_from("<IBBH", image, at)
                if section == 0:
                    image[at + 4] = STB_WEAK << 4 | info & 15
    return bytes(image)


def unpack(wheel: Path, folder: Path) -> str:
    """Unpack the bindings into `folder`, made to load alone; the name of their extension module."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    (module,) = folder.glob("*_bindings/tensorrt*.so")
    module.write_bytes(standalone(module.read_bytes()))
    return f"{module.parent.name}.{module.stem}"


class Signatures(DocstringSignatureGenerator):
    """Signatures from pybind11's docstrings, told in Python's terms and no looser than our calls are."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.names = vars(sys.modules[module])

    def get_function_sig(self, default_sig: FunctionSig, ctx: FunctionContext) -> list[FunctionSig] | None:
        """The signatures of a function or method."""
        ctx.docstring = self._in_python(ctx.docstring)
        return [self._tidy(signature) for signature in super().get_function_sig(default_sig, ctx) or ()]

    def get_property_type(self, default_type: str | None, ctx: FunctionContext) -> str | None:
        """The type of a property."""
        ctx.docstring = self._in_python(ctx.docstring)
        return super().get_property_type(default_type, ctx)

    def _in_python(self, text: str | None) -> str | None:
        """`text` with Python names for C++ classes, which pybind11 leaves where a class was bound too late."""

        def python(match: re.Match[str]) -> str:
            known = [name for name in (match[1], match[1].removeprefix("I")) if name in self.names]
            return f"{self.module}.{known[0]}" if known else match[0]

        text = re.sub(r"\b(?:nvinfer1|nvonnxparser)::(?:\w+::)*(\w+)", python, text or "")
        # A subclass must be free to take an int, and nothing of ours passes anything else.
        return text.replace("typing.SupportsInt", "int").replace("typing.SupportsFloat", "float") or None

    def _tidy(self, signature: FunctionSig) -> FunctionSig:
        """`signature` as Python can say it, and with the None that stands for a failure."""
        last = max((i for i, arg in enumerate(signature.args) if not arg.default), default=0)
        for arg in signature.args[:last]:
            arg.default = False  # one method has a default before a parameter without
        if signature.name in NONE_IS_FAILURE:
            return signature._replace(ret_type=f"{signature.ret_type} | None")
        return signature


def buffers(module: str) -> Iterator[str]:
    """The names of classes that offer Python's buffer protocol, which before 3.12 no attribute tells."""
    slot = ctypes.pythonapi.PyType_GetSlot
    slot.argtypes, slot.restype = [ctypes.py_object, ctypes.c_int], ctypes.c_void_p
    for name, value in vars(sys.modules[module]).items():
        if inspect.isclass(value) and slot(value, PY_BF_GETBUFFER) and not hasattr(value, "__buffer__"):
            yield name


def additions(package: str) -> Iterator[str]:
    """Stubs of what the package adds to its extension module."""
    yield "__version__: str"
    for name, value in vars(sys.modules[package]).items():
        if inspect.isfunction(value) and not name.startswith("_"):
            yield f"def {name}{inspect.signature(value)}: ..."


def main(wheel: Path, folder: Path) -> None:
    """Write the API of the bindings in `wheel` as a stub package `tensorrt` into `folder`."""
    module = unpack(wheel, folder / "bindings")
    sys.path.insert(0, str(folder / "bindings"))
    importlib.import_module(module)
    generator = InspectionStubGenerator(module, known_modules=[module])
    generator.sig_generators = [Signatures(module)]
    generator.generate_module()
    # The module has a variable `bool`, which hides the type from annotations.
    text = re.sub(r"\bbool\b(?!: DataType)", "builtins.bool", generator.output())
    for name in buffers(module):
        header = f"\nclass {name}:\n"
        text = text.replace(header, f"{header}    def __buffer__(self, flags: int, /) -> memoryview: ...\n")
    stub = folder / "tensorrt/__init__.pyi"
    stub.parent.mkdir()
    stub.write_text("\n".join(["import builtins", text, *additions(module.partition(".")[0])]) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
