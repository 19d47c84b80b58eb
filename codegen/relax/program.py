"""A converted model: the Relax module, what it takes and returns, and the weights it is called with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import tvm


@dataclass(frozen=True)
class TensorSpec:
    """One tensor at the boundary of a program.

    Attributes:
        name: the name in the model.
        dtype: storage dtype (``float32``, ``int64``, ``bool``, ...); sub-byte and 8-bit float types are one byte per element.
        shape: integers, or strings for dimensions known at run time only.
        onnx_dtype: name of the ONNX type (``FLOAT``, ``INT4``, ...), which says how the bytes are to be read.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    onnx_dtype: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass
class Step:
    """Another function of a program: a decoding step that appends to its cache in place.

    Attributes:
        inputs: the tensors to pass first.
        outputs: the tensors returned.
        params: names, in `RelaxProgram.params`, of what it takes after the inputs.
        extra: those of them that ``main`` does not take.
        written: names of the inputs it writes to.
    """

    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    params: list[str]
    extra: list[str]
    written: list[str]


@dataclass
class RelaxProgram:
    """A Relax module whose ``main`` takes the inputs, then the parameters, both in order.

    Attributes:
        mod: the module; ``main`` returns one tensor, or a tuple when there are several outputs.
        params: large initializers by name; the arrays may be memory-mapped views of the model file. Those that only ``step``
            takes are the last.
        inputs: the tensors to pass first.
        outputs: the tensors returned.
        state: what converters kept, see `Context.state`.
        step: what the function ``step`` takes and returns, if there is one.
    """

    mod: tvm.IRModule
    params: dict[str, np.ndarray]
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    state: dict[Any, Any] = field(default_factory=dict)
    step: Step | None = None
