"""From a stream model to ONNX graphs: the step form and the sequence form, each traced by torch on its own."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import onnx
import onnxscript
import torch
from torch import Tensor, nn

from statestep.export.errors import ExportError, first_line
from statestep.export.forms import SequenceForm, StepForm, StreamModel
from statestep.export.stepping import pad_rows
from statestep.export.surgery import forget_the_machine, renamed

OPSET = 18  # the exporter's lowest, so that old runtimes read it; nothing here needs a newer one
FOLD_LIMIT = 1 << 30  # bytes; below it the optimizer folds weights into plain initialisers, its default leaves Slices
TRACE_BATCH = 3  # a batch of 1 would be frozen into the graph
TRACE_STEPS = 4
RECURRENT = ("LSTM", "GRU", "RNN")


def step_graph(model: StreamModel) -> onnx.ModelProto:
    """x [B, F] and every state → outputs and next states, B free."""
    # Each example is a tensor of its own: the exporter takes two names for one tensor as one input.
    states = [state.clone() for state in model.initial_states(TRACE_BATCH)]
    x = torch.randn(TRACE_BATCH, len(model.features), generator=torch.Generator().manual_seed(0))  # [B, F]
    graph = _export(
        StepForm(model),
        (x, *states),
        inputs=["x", *(state.input for state in model.states)],
        outputs=[*model.outputs, *(state.output for state in model.states)],
        shapes=({0: "B"}, tuple({state.batch_axis: "B"} for state in model.states)),
    )
    pad_rows(graph)
    return graph


def sequence_graph(model: StreamModel) -> onnx.ModelProto:
    """x [T, B, F] → outputs [T, B, …], T and B free."""
    x = torch.randn(TRACE_STEPS, TRACE_BATCH, len(model.features), generator=torch.Generator().manual_seed(0))
    return _export(SequenceForm(model), (x,), inputs=["x"], outputs=list(model.outputs), shapes=({0: "T", 1: "B"},))


def _export(
    form: nn.Module, example: tuple[Tensor, ...], *, inputs: list[str], outputs: list[str], shapes: tuple[Any, ...]
) -> onnx.ModelProto:
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                form.eval(),
                example,
                dynamo=True,
                opset_version=OPSET,
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes=shapes,
                verbose=False,
                optimize=False,  # the same comes below, with a limit that can be set
            )
        except Exception as error:  # the exporter raises what it met in a team's own code, of any kind
            reason = first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
            raise ExportError(f"torch cannot write the module as a graph: {reason}") from error
        assert program is not None
        folded = onnxscript.optimizer.optimize(
            program.model_proto, input_size_limit=FOLD_LIMIT, output_size_limit=FOLD_LIMIT
        )
    _check(folded)
    forget_the_machine(folded.graph)
    _number(folded.graph)
    return folded


def _number(graph: onnx.GraphProto) -> None:
    """Name constants and the tensors between by their place: torch's hang on what the process has exported before."""
    kept = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    constants = [tensor for tensor in graph.initializer if re.fullmatch(r"val_\d+", tensor.name)]  # weights have names
    names = {tensor.name: f"constant_{place}" for place, tensor in enumerate(constants)}
    for tensor in constants:
        tensor.name = names[tensor.name]
    names |= {
        output: f"{node.op_type}_{place}_{number}"
        for place, node in enumerate(graph.node)
        for number, output in enumerate(node.output)
        if output and output not in kept
    }
    nodes = [renamed(node, names) for node in graph.node]
    for place, node in enumerate(nodes):
        node.name = f"{node.op_type}_{place}"
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)


def _check(model: onnx.ModelProto) -> None:
    """The recurrent weights must be plain initialisers: behind a Slice they cannot be prepacked or quantised."""
    initialisers = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in RECURRENT:
            loose = [name for name in node.input[1:4] if name and name not in initialisers]
            if loose:
                raise ExportError(f"the exporter left the weights {loose} of {node.name!r} outside the initialisers")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notices about its own insides from the user: none says anything about their model."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", message="The tensor attributes", category=UserWarning)
            warnings.filterwarnings("ignore", message="# The axis name", category=UserWarning)
            yield
    finally:
        logger.setLevel(level)
