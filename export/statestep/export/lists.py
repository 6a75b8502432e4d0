"""Lists that a Loop appends to, one tensor a timestep, as torch's scripted loops do: turned into what ONNX gathers."""

from __future__ import annotations

from onnx import GraphProto, NodeProto, ValueInfoProto, helper

from statestep.export.surgery import attribute, bodies


def without_lists(graph: GraphProto) -> None:
    """Rewrite, in place, `SequenceEmpty` → appended to in a Loop → stacked by `ConcatFromSequence`.

    What the Loop appends becomes a scan output [T, …], and the stacking a transposition. Lists that are used in any
    other way stay, and with them the operators that nothing else here knows.
    """
    empty = {node.output[0] for node in graph.node if node.op_type == "SequenceEmpty"}
    for node in list(graph.node):
        if node.op_type != "Loop":
            continue
        for place in reversed(range(2, len(node.input))):
            if node.input[place] in empty:
                _gathered(graph, node, place)


def _gathered(graph: GraphProto, node: NodeProto, place: int) -> None:
    """One list: carried into the Loop at input `place`."""
    body = next(bodies(node))
    carried, result, given = body.input[place], body.output[place - 1], node.output[place - 2]
    appended = next((inner for inner in body.node if result.name in inner.output), None)
    users = [other for other in graph.node if given in other.input]
    plain = appended is not None and appended.op_type == "SequenceInsert" and len(appended.input) == 2
    if not plain or appended is None or appended.input[0] != carried.name:
        return
    if any(user.op_type != "ConcatFromSequence" or not attribute(user, "new_axis", 0) for user in users):
        return
    element = carried.type.sequence_type.elem_type.tensor_type
    rank = len(element.shape.dim) + 1
    row = ValueInfoProto()
    row.CopyFrom(helper.make_tensor_value_info(appended.input[1], element.elem_type, None))
    body.node.remove(appended)
    body.input.remove(carried)
    body.output.remove(result)
    body.output.append(row)
    inputs, outputs = list(node.input), list(node.output)
    del inputs[place], outputs[place - 2]
    node.ClearField("input")
    node.ClearField("output")
    node.input.extend(inputs)
    node.output.extend([*outputs, given])  # [T, …]
    for user in users:
        axis = attribute(user, "axis", 0) % rank
        order = [*range(1, axis + 1), 0, *range(axis + 1, rank)]
        turned = helper.make_node("Transpose", [given], list(user.output), name=user.name, perm=order)
        user.CopyFrom(turned)
