"""Equal compiles give equal code: the statements of shape functions, in order of the slot they write.

The virtual machine keeps sizes known at run time in a heap, and `VMShapeLower` makes functions that fill its slots from
those of the inputs' dimensions. TVM 0.27 writes these statements in the order of a hash table keyed by address.
"""

from __future__ import annotations

import tvm
from tvm import tirx

from qcompile.codegen.relax.nests import loads


@tvm.transform.module_pass(opt_level=0, name="OrderShapeFunctions")
def order_shape_functions(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
    """The module with every shape function's statements sorted."""
    for name, function in mod.functions_items():
        if isinstance(function, tirx.PrimFunc) and isinstance(function.body, tirx.SeqStmt):
            statements = list(function.body.seq)
            if _may_be_sorted(statements):
                ordered = sorted(statements, key=lambda s: int(s.indices[0]))
                mod.update_func(name, function.with_body(tirx.SeqStmt(ordered)))
    return mod


def _may_be_sorted(statements: list[tirx.Stmt]) -> bool:
    """Whether all of them write different constant places of one vector, and none reads what another writes."""
    if not all(isinstance(s, tirx.BufferStore) and len(s.indices) == 1 for s in statements):
        return False
    heap = statements[0].buffer
    slots = [s.indices[0] for s in statements]
    if not all(s.buffer.same_as(heap) for s in statements) or not all(isinstance(i, tirx.IntImm) for i in slots):
        return False
    written = {int(i) for i in slots}
    for statement in statements:
        for load in loads(statement.value):
            if not load.source.same_as(heap) or not isinstance(load.indices[0], tirx.IntImm):
                return False
            if int(load.indices[0]) in written:
                return False
    return len(written) == len(statements)
