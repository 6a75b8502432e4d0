"""What is wrong with a graph before anything of it is tried: each in a sentence that says what to do."""

from __future__ import annotations

from onnx import ModelProto

from statestep.export.errors import ExportError
from statestep.export.surgery import attribute, session
from statestep.export.whole import RECURRENT


def refuse_unfit(model: ModelProto) -> None:
    """Raise `ExportError` for a prepared graph that cannot be run, or whose inputs and outputs cannot be told apart."""
    graph = model.graph
    for node in graph.node:
        if node.op_type in RECURRENT and attribute(node, "layout", 0) != 0:
            raise ExportError(
                f"node {node.name!r} ({node.op_type}) has layout 1, batch before time, which onnxruntime does not run: "
                "export it with layout 0, and Transpose before and behind it"
            )
    names = [value.name for value in graph.output]
    if not names:
        raise ExportError("the graph has no output: export it with the answers that it is to give")
    for name in names:
        if names.count(name) > 1:
            raise ExportError(f"output {name!r} is listed twice: list it once")
        if name in {value.name for value in graph.input}:
            raise ExportError(f"output {name!r} is an input too: take it out of the outputs, or give it its own name")
    for value in graph.input:
        if not value.type.tensor_type.HasField("shape"):
            raise ExportError(
                f"input {value.name!r} does not say its shape: export it with its axes, batch and time free, and a "
                "feature axis of a fixed size"
            )
    try:
        session(model)
    except ExportError as error:
        raise ExportError(f"{error}; export it again, and try it with onnx.checker.check_model") from None
