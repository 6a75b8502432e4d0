"""A forecaster's graphs and a detector joined to one model: in front of the network what stands in for missing
readings, behind it the rules. No torch is needed: any step model with a forecast will do, whoever made it.

In the step form the detector's nodes stand in the graph itself; in the sequence form they are the body of a Scan.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, helper

from statestep.export.detector import HELD, Forecasts
from statestep.export.rules import Given, rows, stood_in
from statestep.export.surgery import OPSET, renamed
from statestep.export.terms import KINDS, Terms
from statestep.runtime import NO_TIME, Output, State

TIME = "time"
SCOPE = "detector"


@dataclass(frozen=True, slots=True)
class Ports:
    """The tensors of a forecaster's graphs that a detector is joined to, the same names in step and sequence form."""

    x: str = "x"
    prediction: str = "prediction"
    own: tuple[str, str] | None = None  # readings, and the deviation that they are in units of: each stream's own


@dataclass(frozen=True, slots=True)
class Composed:
    """A step graph with a detector in it, and what the contract has to say of it."""

    graph: ModelProto
    states: tuple[State, ...]  # the detector's
    outputs: tuple[Output, ...]
    time: str | None  # the input that takes event times, int64 [B]

    @property
    def names(self) -> dict[str, str]:
        """The name of each output of the detector by its role, for the sequence form to bear too."""
        return {output.role: output.name for output in self.outputs if output.role}


def composed(forecaster: ModelProto, d: Forecasts, ports: Ports) -> Composed:
    """The step graph of a forecaster, x [B, F] and states → prediction [B, K] and next states, with `d` in it."""
    model = ModelProto()
    model.CopyFrom(forecaster)
    graph = model.graph
    _hide(graph, ports)
    inner = list(graph.node)
    g = Terms(graph, SCOPE)
    del graph.node[:]
    time = g.builder.input(TIME, TensorProto.INT64, ["B"]) if _tells_time(d) else None
    states = {s.input: _named(s, g) for s in d.states}
    held = {}
    for name, state in states.items():
        graph.input.append(helper.make_tensor_value_info(state.input, KINDS[state.dtype], ["B", *state.shape]))
        held[name] = g.term(state.input)
    x, missing = stood_in(d, g, g.term(ports.x), held)
    graph.node.extend(renamed(node, {ports.x: x.name}) for node in inner)
    when = g.node("Unsqueeze", g.term(time), g.whole([1])) if time else g.constant(np.full((1, 1), NO_TIME), np.int64)
    z, std = (g.term(ports.own[0]), g.term(ports.own[1])) if ports.own else (None, None)
    out, after = rows(d, g, Given(x, missing, g.term(ports.prediction), z, std, when), held)
    outputs = []
    for role, features, dtype in d.outputs:
        name = g.builder.output(out[role].name, role, KINDS[dtype], ["B", *_width(features)])
        held_by = states.get(HELD.get(role, ""))
        outputs.append(Output(name, role=role, features=features, state=None if held_by is None else held_by.input))
    for name, state in states.items():
        graph.node.append(helper.make_node("Identity", [after[name].name], [state.output], name=f"{state.output}/copy"))
        graph.output.append(helper.make_tensor_value_info(state.output, KINDS[state.dtype], ["B", *state.shape]))
    return Composed(model, tuple(states.values()), tuple(outputs), time)


def composed_sequence(forecaster: ModelProto, d: Forecasts, ports: Ports, names: dict[str, str]) -> ModelProto:
    """The sequence graph of a forecaster, x [T, B, F] → prediction [T, B, K], with `d` in it.

    `names` has the name of each output of the detector by its role. Readings must not be missing: what stands in for
    them is known only step by step.
    """
    model = ModelProto()
    model.CopyFrom(forecaster)
    _hide(model.graph, ports)
    _make_way(model.graph, names.values())
    _scan(model.graph, d, ports, names)
    return model


def alone(d: Forecasts) -> ModelProto:
    """The sequence form of a detector by itself: x [T, B, F], prediction [T, B, K] and, with `per_stream`, z and std
    [T, B, F] → its outputs by role, [T, B, …]. It is calibrated by this, and so by the very nodes that will judge."""
    own = ("z", "std") if getattr(d, "per_stream", False) else None
    graph = GraphProto(name=SCOPE)
    for name, width in (("x", d.width), ("prediction", len(d.targets)), *((name, d.width) for name in own or ())):
        graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["T", "B", width]))
    _scan(graph, d, Ports(own=own), {role: role for role, _, _ in d.outputs})
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)


def _scan(graph: GraphProto, d: Forecasts, ports: Ports, names: dict[str, str]) -> None:
    """Add a Scan over the rows of a sequence, and its outputs."""
    body = GraphProto(name="timestep")
    inside = Terms(body, f"{SCOPE}/row")  # an inner name must not be an outer one too
    for state in d.states:
        body.input.append(helper.make_tensor_value_info(f"{state.input}/before", KINDS[state.dtype], None))
    scanned = [ports.x, ports.prediction, *(ports.own or ())]
    for place in range(len(scanned)):
        body.input.append(helper.make_tensor_value_info(f"row/{place}", TensorProto.FLOAT, None))
    inside.builder.taken.update(value.name for value in body.input)
    held = {state.input: inside.term(f"{state.input}/before") for state in d.states}
    x, missing = stood_in(d, inside, inside.term("row/0"), held)
    z, std = (inside.term("row/2"), inside.term("row/3")) if ports.own else (None, None)
    no_time = inside.constant(np.full((1, 1), NO_TIME), np.int64)
    out, after = rows(d, inside, Given(x, missing, inside.term("row/1"), z, std, no_time), held)
    for state in d.states:
        inside.builder.output(after[state.input].name, f"{state.input}/after", KINDS[state.dtype], None)
    for role, _, dtype in d.outputs:
        inside.builder.output(out[role].name, f"{role}/row", KINDS[dtype], None)

    g = Terms(graph, f"{SCOPE}/sequence")
    streams = g.node("Gather", g.node("Shape", g.term(ports.x)), g.whole([1]), axis=0)  # [1] B
    begins = []
    for state in d.states:
        value = g.constant(state.initial_value()[None], np.dtype(state.dtype))  # [1, *shape]
        size = g.node("Concat", streams, g.whole(list(state.shape)), axis=0)
        begins.append(g.node("Expand", value, size).name)
    ends = [g.builder.name(f"{state.input}/last") for state in d.states]
    gathered = [names[role] for role, _, _ in d.outputs]
    node = helper.make_node("Scan", [*begins, *scanned], [*ends, *gathered], name=f"{SCOPE}/Scan")
    node.attribute.extend([helper.make_attribute("body", body), helper.make_attribute("num_scan_inputs", len(scanned))])
    graph.node.append(node)
    for role, features, dtype in d.outputs:
        graph.output.append(helper.make_tensor_value_info(names[role], KINDS[dtype], ["T", "B", *_width(features)]))


def _hide(graph: GraphProto, ports: Ports) -> None:
    """Make the tensors that only the detector reads no outputs any more."""
    kept = [value for value in graph.output if value.name not in (ports.own or ())]
    del graph.output[:]
    graph.output.extend(kept)


def _make_way(graph: GraphProto, names: Iterable[str]) -> None:
    """Give other names to inner tensors of a sequence graph that bear these: no tensor of the step graph does."""
    inner = {name for node in graph.node for name in node.output} | {weight.name for weight in graph.initializer}
    inner -= {value.name for value in (*graph.input, *graph.output)}
    others = {name: f"{SCOPE}/beside/{name}" for name in names if name in inner}
    if not others:
        return
    nodes = [renamed(node, others) for node in graph.node]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    for weight in graph.initializer:
        weight.name = others.get(weight.name, weight.name)


def _named(state: State, g: Terms) -> State:
    """A state under names that no tensor of the graph bears."""
    return replace(state, input=g.builder.name(state.input), output=g.builder.name(state.output))


def _tells_time(d: Forecasts) -> bool:
    return any(role == "since" for role, _, _ in d.outputs)


def _width(features: tuple[str, ...] | None) -> list[int]:
    return [] if features is None else [len(features)]
