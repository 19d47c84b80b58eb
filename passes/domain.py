"""Operators of the domain ``qcompile``: functions with bodies, so that stock ONNX Runtime runs every stage.

The bodies are the definition. A kernel that replaces one computes the same numbers.
"""

from __future__ import annotations

import onnx
import onnx.parser
import onnx_ir as ir

DOMAIN = "qcompile"
OPSET = 23

QUANTIZE_PER_TOKEN = """
<domain: "qcompile", opset_import: ["" : 23]>
QuantizePerToken <bits: int = 8, clip: float = 1.0> (x) => (codes, scale)
{
    one = Constant <value_float: float = 1.0> ()
    two = Constant <value_float: float = 2.0> ()
    zero = Constant <value_float: float = 0.0> ()
    last = Constant <value_ints: ints = [-1]> ()
    width = Constant <value_int: int = @bits> ()
    width_f = Cast <to: int = 1> (width)
    magnitude_bits = Sub (width_f, one)
    levels = Pow (two, magnitude_bits)
    qmax = Sub (levels, one)
    qmin = Neg (qmax)
    size = Abs (x)
    absmax = ReduceMax <keepdims: int = 1> (size, last)
    share = Constant <value_float: float = @clip> ()
    largest = Mul (absmax, share)
    step = Div (largest, qmax)
    empty = Equal (step, zero)
    scale = Where (empty, one, step)
    steps = Div (x, scale)
    rounded = Round (steps)
    clipped = Clip (rounded, qmin, qmax)
    codes = Cast <to: int = 3> (clipped)
}
"""

QUANTIZE_PER_SAMPLE = """
<domain: "qcompile", opset_import: ["" : 23]>
QuantizePerSample <bits: int = 8> (x) => (codes, scale)
{
    zero = Constant <value_float: float = 0.0> ()
    one = Constant <value_float: float = 1.0> ()
    two = Constant <value_float: float = 2.0> ()
    first = Constant <value_int: int = 1> ()
    width = Constant <value_int: int = @bits> ()
    width_f = Cast <to: int = 1> (width)
    magnitude_bits = Sub (width_f, one)
    levels = Pow (two, magnitude_bits)
    qmax = Sub (levels, one)
    qmin = Neg (qmax)
    shape = Shape (x)
    rank = Size (shape)
    axes = Range (first, rank, first)
    size = Abs (x)
    absmax = ReduceMax <keepdims: int = 1> (size, axes)
    step = Div (absmax, qmax)
    empty = Equal (step, zero)
    scale = Where (empty, one, step)
    steps = Div (x, scale)
    rounded = Round (steps)
    clipped = Clip (rounded, qmin, qmax)
    codes = Cast <to: int = 3> (clipped)
}
"""

DEQUANTIZE_PER_TOKEN = """
<domain: "qcompile", opset_import: ["" : 23]>
DequantizePerToken (codes, scale) => (x)
{
    steps = Cast <to: int = 1> (codes)
    x = Mul (steps, scale)
}
"""

DEQUANTIZE_TABLE = """
<domain: "qcompile", opset_import: ["" : 23]>
DequantizeTable <block_size: int> (codes, table, scale) => (w)
{
    zero = Constant <value_int: int = 0> ()
    one = Constant <value_int: int = 1> ()
    block = Constant <value_int: int = @block_size> ()
    rows = Shape <start: int = 0, end: int = 1> (codes)
    count = Squeeze (rows)
    k = Range (zero, count, one)
    group = Div (k, block)
    steps = Gather <axis: int = 0> (scale, group)
    index = Cast <to: int = 6> (codes)
    levels = Gather <axis: int = 0> (table, index)
    w = Mul (levels, steps)
}
"""

DEQUANTIZE_PLANES = """
<domain: "qcompile", opset_import: ["" : 23]>
DequantizePlanes <block_size: int> (codes, scale, offset) => (w)
{
    zero = Constant <value_int: int = 0> ()
    one = Constant <value_int: int = 1> ()
    first = Constant <value_ints: ints = [0]> ()
    column = Constant <value_ints: ints = [-1, 1, 1]> ()
    block = Constant <value_int: int = @block_size> ()
    rows = Shape <start: int = 0, end: int = 1> (codes)
    count = Squeeze (rows)
    k = Range (zero, count, one)
    group = Div (k, block)
    planes = Shape <start: int = 0, end: int = 1> (scale)
    bits = Squeeze (planes)
    places = Range (zero, bits, one)
    bytes = Cast <to: int = 2> (places)
    shifts = Reshape (bytes, column)
    wide = Cast <to: int = 2> (codes)
    stacked = Unsqueeze (wide, first)
    moved = BitShift <direction: string = "RIGHT"> (stacked, shifts)
    lowest = Cast <to: int = 2> (one)
    set = BitwiseAnd (moved, lowest)
    real = Cast <to: int = 1> (set)
    steps = Gather <axis: int = 1> (scale, group)
    parts = Mul (real, steps)
    total = ReduceSum <keepdims: int = 0> (parts, first)
    shift = Gather <axis: int = 0> (offset, group)
    w = Add (total, shift)
}
"""

DEQUANTIZE_SUPER_BLOCKS = """
<domain: "qcompile", opset_import: ["" : 23]>
DequantizeSuperBlocks <block_size: int, super_size: int> (codes, block_scale, super_scale, block_offset, super_offset) => (w)
{
    zero = Constant <value_int: int = 0> ()
    one = Constant <value_int: int = 1> ()
    block = Constant <value_int: int = @block_size> ()
    super = Constant <value_int: int = @super_size> ()
    rows = Shape <start: int = 0, end: int = 1> (codes)
    count = Squeeze (rows)
    k = Range (zero, count, one)
    inner = Div (k, block)
    outer = Div (k, super)
    scale = Gather <axis: int = 0> (block_scale, inner)
    unit = Gather <axis: int = 0> (super_scale, outer)
    steps = Mul (scale, unit)
    offset = Gather <axis: int = 0> (block_offset, inner)
    least = Gather <axis: int = 0> (super_offset, outer)
    shift = Mul (offset, least)
    real = Cast <to: int = 1> (codes)
    scaled = Mul (real, steps)
    w = Sub (scaled, shift)
}
"""

PICK_COLUMNS = """
<domain: "qcompile", opset_import: ["" : 23]>
PickColumns (table, ids) => (picked)
{
    rest = Constant <value_ints: ints = [-1]> ()
    order = Reshape (ids, rest)
    parts = Gather <axis: int = -2> (table, order)
    lead = Shape <start: int = 0, end: int = -2> (parts)
    whole = Concat <axis: int = 0> (lead, rest)
    picked = Reshape (parts, whole)
}
"""

EXPERT_MATMUL = """
<domain: "qcompile", opset_import: ["" : 23]>
ExpertMatMul <n: int, repeat: int = 1> (x, w, ids) => (y)
{
    one = Constant <value_ints: ints = [1]> ()
    rest = Constant <value_ints: ints = [-1]> ()
    n_0 = Constant <value_int: int = @n> ()
    width = Reshape (n_0, one)
    repeat_0 = Constant <value_int: int = @repeat> ()
    times = Reshape (repeat_0, one)
    depth = Shape <start: int = 0, end: int = 1> (w)
    order = Reshape (ids, rest)
    slots = Shape (order)
    columns = Concat <axis: int = 0> (depth, slots, width)
    split = Reshape (w, columns)
    picked = Transpose <perm: ints = [1, 0, 2]> (split)
    tokens = Concat <axis: int = 0> (rest, one, depth)
    single = Reshape (x, tokens)
    spread = Concat <axis: int = 0> (one, times, one)
    repeated = Expand (single, spread)
    rows = Reshape (repeated, tokens)
    product = MatMul (rows, picked)
    positions = Shape (ids)
    whole = Concat <axis: int = 0> (positions, width)
    y = Reshape (product, whole)
}
"""

BLOCK_ROTATE = """
<domain: "qcompile", opset_import: ["" : 23]>
BlockRotate (x, matrix) => (y)
{
    whole = Shape (x)
    lead = Shape <end: int = -1> (x)
    order = Shape <start: int = 0, end: int = 1> (matrix)
    rest = Constant <value_ints: ints = [-1]> ()
    blocks = Concat <axis: int = 0> (lead, rest, order)
    split = Reshape (x, blocks)
    rotated = MatMul (split, matrix)
    y = Reshape (rotated, whole)
}
"""

KRONECKER = """
<domain: "qcompile", opset_import: ["" : 23]>
Kronecker (x, left, right) => (y)
{
    whole = Shape (x)
    lead = Shape <end: int = -1> (x)
    rows = Shape <start: int = 0, end: int = 1> (left)
    columns = Shape <start: int = 0, end: int = 1> (right)
    rest = Constant <value_ints: ints = [-1]> ()
    blocks = Concat <axis: int = 0> (lead, rest, rows, columns)
    split = Reshape (x, blocks)
    turned = Transpose <perm: ints = [1, 0]> (left)
    first = MatMul (split, right)
    second = MatMul (turned, first)
    y = Reshape (second, whole)
}
"""

_BODIES = {
    "QuantizePerSample": QUANTIZE_PER_SAMPLE,
    "QuantizePerToken": QUANTIZE_PER_TOKEN,
    "DequantizePerToken": DEQUANTIZE_PER_TOKEN,
    "DequantizeTable": DEQUANTIZE_TABLE,
    "DequantizePlanes": DEQUANTIZE_PLANES,
    "DequantizeSuperBlocks": DEQUANTIZE_SUPER_BLOCKS,
    "PickColumns": PICK_COLUMNS,
    "ExpertMatMul": EXPERT_MATMUL,
    "BlockRotate": BLOCK_ROTATE,
    "Kronecker": KRONECKER,
}


def function(name: str) -> ir.Function:
    """Return a fresh copy of the function ``qcompile::name``."""
    return ir.serde.deserialize_function(onnx.parser.parse_function(_BODIES[name]))


def add_functions(model: ir.Model) -> None:
    """Give ``model`` the body of every ``qcompile`` operator it uses and has no body for."""
    used = {n.op_type for n in model.graph.all_nodes() if n.domain == DOMAIN}
    for name in sorted(used & _BODIES.keys()):
        if (DOMAIN, name, "") not in model.functions:
            model.functions[(DOMAIN, name, "")] = function(name)
    if used:
        model.opset_imports[DOMAIN] = 1


def register_function(name: str, text: str) -> None:
    """Add an operator of this domain, given as the ONNX text form of its function.

    Raises:
        ValueError: the text is not a function of this domain with this name.
    """
    parsed = onnx.parser.parse_function(text)
    if parsed.domain != DOMAIN or parsed.name != name:
        raise ValueError(f"expected a function {DOMAIN}::{name}, got {parsed.domain}::{parsed.name}")
    _BODIES[name] = text
