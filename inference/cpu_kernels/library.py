"""The C++ library of this folder: its structures and functions, and how it is loaded."""

import ctypes
import functools
import sys
from pathlib import Path

import torch
from torch import Tensor

from parallel.errors import ConfigurationError
from parallel.extensions import build_library

FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-std=c++17")


class Matrix(ctypes.Structure):
    """See product.h."""

    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
    )


class Norm(ctypes.Structure):
    """See norms.h."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
        ("is_rms", ctypes.c_int32),
    )


class Layer(ctypes.Structure):
    """See decoder_stack.cpp."""

    _fields_ = (
        ("attention_norm", Norm),
        ("feed_forward_norm", Norm),
        ("query_norm", Norm),
        ("key_norm", Norm),
        ("query_key_value", Matrix),
        ("dense", Matrix),
        ("gate", Matrix),
        ("expand", Matrix),
        ("contract", Matrix),
    )


class Stack(ctypes.Structure):
    """See decoder_stack.cpp; the heads of attention.h lie in it."""

    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        ("num_layers", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("inner_width", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("queries", ctypes.c_int64),
        ("head_size", ctypes.c_int64),
        ("rotary_size", ctypes.c_int64),
        ("is_parallel", ctypes.c_int64),
    )


class Step(ctypes.Structure):
    """See decoder_stack.cpp; the rotary tables and the mask of attention.h lie in it."""

    _fields_ = (
        ("hidden", ctypes.c_void_p),
        ("result", ctypes.c_void_p),
        ("cache", ctypes.c_void_p),
        ("cosine", ctypes.c_void_p),
        ("sine", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("mask_of_sequence", ctypes.c_int64),
        ("mask_of_position", ctypes.c_int64),
        ("sequences", ctypes.c_int64),
        ("positions", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
        ("workspace", ctypes.c_void_p),
    )


class Library:
    """The functions of the library; pointers must be valid, nothing is checked behind them."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        step = (ctypes.POINTER(Stack), ctypes.POINTER(Step), ctypes.c_int64)
        self.run_stack = library.run_stack
        self.run_stack.argtypes, self.run_stack.restype = step, None
        self.workspace_size = library.workspace_size
        self.workspace_size.argtypes, self.workspace_size.restype = step, ctypes.c_int64
        self.run_normed_linear = library.run_normed_linear
        self.run_normed_linear.argtypes = (
            ctypes.POINTER(Norm),
            ctypes.POINTER(Matrix),
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_int64,
        )
        self.run_normed_linear.restype = None
        self.find_most_likely = library.find_most_likely
        self.find_most_likely.argtypes = (
            ctypes.c_void_p,
            *(ctypes.c_int64,) * 3,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
        )
        self.find_most_likely.restype = None
        self.use_huge_pages = library.use_huge_pages
        self.use_huge_pages.argtypes, self.use_huge_pages.restype = (ctypes.c_void_p, ctypes.c_int64), None
        library.panel_width.restype = ctypes.c_int64
        self.panel_width: int = library.panel_width()

    def memory(self, floats: int) -> Tensor:
        """Memory that has not been written to yet, in large pages where the system has them."""
        memory = torch.empty(floats)
        self.use_huge_pages(memory.data_ptr(), memory.nbytes)
        return memory

    def packed_size(self, weight: Tensor) -> int:
        """Values of a packed weight [outputs, inputs]."""
        return -(-weight.shape[0] // self.panel_width) * self.panel_width * weight.shape[1]

    def pack(self, weight: Tensor, memory: Tensor) -> None:
        """Makes panels [outputs / panel width, inputs, panel width] of a weight [outputs, inputs]; see product.h."""
        outputs, inputs = weight.shape
        panels = memory.view(-1, inputs, self.panel_width)
        whole = outputs // self.panel_width
        panels[:whole] = weight[: whole * self.panel_width].unflatten(0, (whole, self.panel_width)).transpose(1, 2)
        if whole < len(panels):
            panels[whole] = 0.0
            panels[whole, :, : outputs - whole * self.panel_width] = weight[whole * self.panel_width :].t()


def library_sources() -> list[Path]:
    """Source files and headers of the library."""
    folder = Path(__file__).resolve().parent
    return sorted([*folder.glob("*.cpp"), *folder.glob("*.h")])


def build_kernels() -> Path:
    """Builds the library if it is not there; returns its file.

    Raises:
        ConfigurationError: it cannot be built.
    """
    return build_library("cpu_kernels", library_sources(), FLAGS)


@functools.cache
def load_kernels() -> Library | None:
    """The library, built if need be; None, with a warning, where that is not possible."""
    try:
        return Library(build_kernels())
    except (ConfigurationError, OSError, AttributeError) as error:
        print(f"warning: generation on CPU goes on slowly, without its C++ kernels: {error}", file=sys.stderr)
        return None
