"""Branches that are always taken alike: an If whose condition does not hang on the readings gives way to what it holds.

Exporters write them for sizes and for settings. What is inside could not be given its state from outside.
"""

from __future__ import annotations

from onnx import ModelProto, NodeProto, helper

from statestep.export.compare import Array
from statestep.export.surgery import Builder, attribute, constants_of, opened, prepared, sorted_nodes
from statestep.export.whole import BATCH, STEPS, Whole, drawn


def without_branches(whole: Whole) -> ModelProto | None:
    """A copy with the branches that are taken at every size and for all readings; None where there is nothing to do.

    `whole` must be plain. Whether the choice holds at other sizes too, the proof tells.
    """
    conditions = {node.input[0] for node in whole.model.graph.node if node.op_type == "If"}
    if not conditions:
        return None
    taken = _settled(whole, conditions)
    made = ModelProto()
    made.CopyFrom(whole.model)
    builder = Builder(made.graph)
    count = 0
    for node in list(made.graph.node):
        if node.op_type == "If" and node.input[0] in taken:
            _put_in_place(node, taken[node.input[0]], builder)
            count += 1
    sorted_nodes(made.graph)
    return prepared(made) if count else None


def _settled(whole: Whole, conditions: set[str]) -> dict[str, bool]:
    """The conditions that are the same at several sizes and for several readings."""
    layout = whole.layout
    steps, streams = layout.steps or STEPS, layout.streams or BATCH
    longer, wider = (0 if layout.steps else 4), (0 if layout.streams else 1)
    held = {name: [value] for name, value in constants_of(whole.model.graph).items() if name in conditions}
    seen: dict[str, list[Array]] = {name: held.get(name, []) for name in conditions}
    for seed, (more, others) in enumerate([(0, 0), (0, 0), (longer, 0), (0, wider)]):
        x = drawn(whole.model, layout, steps + more, streams + others, seed)
        for name, value in {**whole.feeds(x), **whole.run(x)}.items():
            if name in conditions:
                seen[name].append(value)
    return {
        name: bool(values[0].reshape(-1)[0])
        for name, values in seen.items()
        if values and all(value.size == 1 and (value.reshape(-1) == values[0].reshape(-1)).all() for value in values)
    }


def _put_in_place(node: NodeProto, condition: bool, builder: Builder) -> None:
    branch = attribute(node, "then_branch" if condition else "else_branch")
    nodes, results = opened(branch, {}, builder, f"{node.name}/")
    for source, name in zip(results, node.output, strict=True):
        nodes.append(helper.make_node("Identity", [source], [name], name=f"{name}/Identity"))
    builder.graph.node.remove(node)
    builder.graph.node.extend(nodes)
