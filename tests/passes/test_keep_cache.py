"""Which decoders get a step that appends to its cache in place, and what becomes of their lengths."""

import onnx_ir as ir
import pytest

from qcompile.passes.lower.cache import keep_cache

HEADS = {"heads": 2, "kv_heads": 2, "head_dim": 4, "value_dim": 4, "is_causal": 0, "scale": 0.5}


def decoder(*, past="past", total="past + seq", axis=-2, layout="heads", turned=False, reader="", masked=True):
    """One attention over a cache; what is odd about it are the arguments."""

    def value(name, dims, dtype=ir.DataType.FLOAT):
        return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype))

    q, k, v = (value(n, ["batch", 2, "seq", 4]) for n in "qkv")
    mask = value("mask", ["batch", 1, "seq", total], ir.DataType.BOOL)
    pasts = [value("past_k", ["batch", 2, "past", 4]), value("past_v", ["batch", 2, past, 4])]
    news = [ir.node("Neg", [x]) for x in (k, v)]
    joined = [
        ir.node("Concat", [new.outputs[0], old] if turned else [old, new.outputs[0]], attributes={"axis": axis})
        for old, new in zip(pasts, news)
    ]
    presents = [node.outputs[0] for node in joined]
    for present, name in zip(presents, ("present_k", "present_v")):
        present.name, present.dtype, present.shape = name, ir.DataType.FLOAT, ir.Shape(["batch", 2, total, 4])
    attend = ir.node(
        "Attention", [q, *presents, *([mask] if masked else [])], domain="qcompile.kernel",
        attributes={**HEADS, "layout": layout},
    )  # fmt: skip
    length = ir.node("Shape", [pasts[0]])
    outputs = [attend.outputs[0], *presents, length.outputs[0]]
    for output, name in zip((outputs[0], outputs[3]), ("y", "length")):
        output.name = name
    nodes = [*news, *joined, attend, length]
    if reader:
        nodes.append(ir.node("Neg", [pasts[0] if reader == "past" else presents[0]]))
        outputs.append(nodes[-1].outputs[0])
    graph = ir.Graph([q, k, v, mask, *pasts], outputs, nodes=nodes, opset_imports={"": 23, "qcompile.kernel": 1})
    return ir.Model(graph, ir_version=10)


def test_what_was_returned_is_kept():
    model = decoder()
    step = keep_cache(model)
    assert [i.name for i in step.graph.inputs] == [i.name for i in model.graph.inputs]
    assert [o.name for o in step.graph.outputs] == ["y", "length"]
    assert [str(i.shape) for i in step.graph.inputs][3:] == ["[batch,1,seq,total]", *["[batch,2,capacity,4]"] * 2]
    kinds = [node.op_type for node in step.graph]
    assert kinds.count("Append") == 2 and "Attention" in kinds
    attend = next(node for node in step.graph if node.op_type == "Attention")
    assert attend.attributes["layout"].as_string() == "cache"
    assert {v.producer().op_type for v in attend.inputs[1:3]} == {"Append"}
    # The length asked for is that of before, not the capacity.
    length = step.graph.outputs[1].producer()
    assert length.op_type == "Concat" and length.inputs[2].producer().op_type == "Sub"
    assert [o.name for o in model.graph.outputs] == ["y", "present_k", "present_v", "length"], "the model is a copy"


@pytest.mark.parametrize(
    "odd",
    [{"past": "other"}, {"total": "all"}, {"axis": 1}, {"layout": "rows"}, {"turned": True}, {"reader": "past"},
     {"reader": "present"}, {"masked": False}],
    ids=str,
)  # fmt: skip
def test_others_are_left_alone(odd):
    assert keep_cache(decoder(**odd)) is None
