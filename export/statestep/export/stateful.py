"""A state made visible: an input and an output of the graph, with the value that it starts from; and rows left out.

What the files that know the single operators share while they go from node to node.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper

from statestep.export.compare import Array
from statestep.export.errors import ExportError
from statestep.export.probe import Tag, Tags
from statestep.export.surgery import Builder
from statestep.export.whole import Layout
from statestep.runtime import State


@dataclass
class Carried:
    """The graph with its states as inputs and outputs, for any number of timesteps."""

    model: ModelProto
    layout: Layout  # of the inputs that are left; every state is one of its pairs
    states: list[State] = field(default_factory=list)
    walks: list[str] = field(default_factory=list)  # the Loops and Scans along time, by node name


@dataclass
class Work:
    """What `carried` holds while it goes from node to node."""

    graph: onnx.GraphProto
    tags: Tags
    layout: Layout
    builder: Builder
    given: set[str]  # what comes from states that the graph takes itself
    done: Carried
    ahead: dict[str, tuple[int, NodeProto]] = field(
        default_factory=dict
    )  # tensor → later rows that were left out, by whom
    names: dict[str, int] = field(default_factory=dict)


def refused(node: NodeProto, why: str) -> ExportError:
    """The sentence that names a node which cannot be streamed."""
    return ExportError(f"node {node.name!r} ({node.op_type}) {why}")


def declared(
    node: NodeProto,
    work: Work,
    stem: str,
    following: str,
    tag: Tag,
    shape: tuple[int, ...],
    initial: Array,
    batch: int,
) -> tuple[str, str]:
    """Declare a state of `shape` without its batch axis: the name it comes in by, and the one it is to leave by."""
    size: list[int | str] = [*shape[:batch], "B", *shape[batch:]]
    elem_type = helper.np_dtype_to_tensor_dtype(tag.value.dtype)
    name = work.builder.input(stem, elem_type, size)
    output = work.builder.name(following)
    work.graph.output.append(helper.make_tensor_value_info(output, elem_type, size))
    plain = bool((initial == initial.flat[0]).all()) if initial.size else True
    value = (initial.flat[0].item() if initial.size else 0) if plain else initial.tolist()
    work.done.states.append(State(name, output, shape, batch, tag.value.dtype.name, value))
    return name, output


def leave(work: Work, tensor: str, output: str) -> None:
    """Let `tensor` bear the name `output` too."""
    work.graph.node.append(helper.make_node("Identity", [tensor], [output], name=f"{output}/Identity"))


def initial_of(node: NodeProto, name: str, batch: int, shape: tuple[int, ...], work: Work) -> Array:
    """The value that the graph starts a state from, of one stream; it must not depend on the readings."""
    tag = work.tags[name]
    if tag.varies:
        raise refused(
            node,
            f"starts from {name!r}, which is computed from the readings: a stream has none yet when it starts; "
            "start it from a constant",
        )
    whole = np.broadcast_to(tag.value, _with(shape, batch, tag.value.shape[batch] if tag.value.ndim > batch else 1))
    first = whole.take(0, axis=batch)
    if not (whole == np.expand_dims(first, batch)).all():
        raise refused(node, f"starts each stream of a batch from another state ({name!r}): start all from the same")
    return np.asarray(first)


def _with(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis:])


def number(work: Work, kind: str) -> int:
    """The next number of its kind, from 1 on."""
    work.names[kind] = work.names.get(kind, 0) + 1
    return work.names[kind]


def ahead(node: NodeProto, behind: int, work: Work) -> None:
    """Note that the rows which padding at the end would have given are left out."""
    before = [work.ahead[name] for name in node.input if name in work.ahead]
    total = behind + max((rows for rows, _ in before), default=0)
    if total:
        for name in node.output:
            work.ahead[name] = total, (before[0][1] if before and not behind else node)


def refuse_ahead(name: str, work: Work) -> None:
    """What is used as a row's answer must not have been made by looking ahead."""
    if name in work.ahead:
        rows, node = work.ahead[name]
        raise refused(node, f"looks {in_rows(rows)} ahead (its padding is not on the left alone): pad only on the left")


def in_rows(count: int) -> str:
    """A number of rows in words.

    >>> in_rows(1), in_rows(4)
    ('1 row', '4 rows')
    """
    return f"{count} row" + "s" * (count != 1)
