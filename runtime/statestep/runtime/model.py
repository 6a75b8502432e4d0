"""A step model in memory: one onnxruntime session, its contract, and the call that advances a batch by one step.

It keeps no state of its own. States go in as arguments and come out as results, batch axis first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnxruntime as ort

from statestep.runtime.adapt import one_by_one, with_constants
from statestep.runtime.contract import (
    BY_FEATURE,
    BY_STREAM,
    CONTRACT_KEY,
    NO_TIME,
    PRODUCER,
    Contract,
    ContractError,
    Output,
)
from statestep.runtime.guard import ModelError, first_line, parse, read
from statestep.runtime.invariance import rows_agree
from statestep.runtime.pairs import Named, Tensor, detect

NUMPY_NAMES = {"float": "float32", "double": "float64"}  # where onnxruntime's name for a dtype is not numpy's

Array = np.ndarray[Any, Any]


class StepModel:
    """A recurrent network that takes one timestep of many streams at a time.

    `contract` says what its tensors mean, `fingerprint` is the SHA-256 of the file in hex, `opset` the version
    of the ONNX operator set that it asks for, `size` the bytes of the file.
    """

    contract: Contract
    fingerprint: str
    opset: int
    size: int

    def __init__(
        self,
        data: bytes,
        *,
        name: str = "model",
        states: Named | None = None,
        constants: Mapping[str, Any] | None = None,
        features: int | Sequence[str] | None = None,
    ):
        graph = parse(data, name)
        self.opset = max((item.version for item in graph.opset_import if item.domain in ("", "ai.onnx")), default=0)
        self.fingerprint = hashlib.sha256(data).hexdigest()
        self.size = len(data)
        meta = {entry.key: entry.value for entry in graph.metadata_props}
        try:
            if constants:
                graph = with_constants(graph, constants, self.opset)
                data = graph.SerializeToString()
            self._session, inputs, outputs = _session(data, name)
            if CONTRACT_KEY in meta and states is None:
                if features is not None:
                    raise ContractError("its contract names its features; leave features (--features) out")
                self.contract = Contract.from_json(meta[CONTRACT_KEY])
            elif graph.producer_name == PRODUCER and states is None:
                raise ContractError("its contract is missing; was the file cut short?")
            else:
                self.contract = detect(Path(name).stem, inputs, outputs, named=states, features=features)
                if stepwise := one_by_one(graph, self.contract, inputs, outputs, self.opset):
                    graph, self.contract = stepwise
                    self._session, inputs, outputs = _session(graph.SerializeToString(), name)
            _agree(self.contract, inputs, outputs)
            self._output_names = [output.name for output in self.contract.outputs]
            self._fetched = self._output_names + [state.output for state in self.contract.states]
            self._rehearse()
        except ContractError as error:
            raise ModelError(f"{name}: {error}") from None

    @cached_property
    def batch_invariant(self) -> bool:
        """Whether a row's result does not depend on its batch-mates, as far as a try on this machine tells."""
        return rows_agree(self)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        states: Named | None = None,
        constants: Mapping[str, Any] | None = None,
        features: int | Sequence[str] | None = None,
    ) -> Self:
        """Read a step model from a file.

        What a model without a contract does not tell can be said: `states` names its pairs, state input → state
        output, or (state output, batch axis). `constants` fixes inputs that never change, such as a sample rate, to
        a number or a list. `features` names the columns of its observation, or is their number.

            StepModel.load("vad.onnx", states={"state": ("stateN", 1)}, constants={"sr": 16000}, features=576)

        Raises `ModelError`, with one sentence, for anything that is not a step model.
        """
        return cls(read(path), name=str(path), states=states, constants=constants, features=features)

    def initial_states(self) -> list[Array]:
        """What a stream that has seen nothing remembers: one array of `state.shape` for each state."""
        return [state.initial_value() for state in self.contract.states]

    def step(
        self, x: Array, states: Sequence[Array], times: Array | None = None
    ) -> tuple[dict[str, Array], list[Array]]:
        """Advance B streams by one timestep.

        `x` is [B, F] in the contract's input dtype; `states` has one array [B, *shape] for each state, in the
        contract's order; `times` int64 [B] the event times in ns since the epoch, for a model that takes them, or None
        where there are none. Returns the outputs by name, each [B, …], and the next states, shaped like `states`.
        Nothing is kept and nothing that was given is written to.
        """
        feeds = {self.contract.input: np.ascontiguousarray(x)}  # [B, F]
        if self.contract.time_input is not None:
            feeds[self.contract.time_input] = np.full(len(x), NO_TIME) if times is None else np.ascontiguousarray(times)
        for state, value in zip(self.contract.states, states, strict=True):
            feeds[state.input] = np.ascontiguousarray(_moved(value, 0, state.batch_axis))
        results = self._session.run(self._fetched, feeds)
        count = len(self._output_names)
        outputs = {
            output.name: _moved(result, output.batch_axis, 0)  # [B, …]
            for output, result in zip(self.contract.outputs, results[:count], strict=True)
        }
        following = [
            _moved(result, state.batch_axis, 0)  # [B, *shape]
            for state, result in zip(self.contract.states, results[count:], strict=True)
        ]
        return outputs, following

    def _rehearse(self) -> None:
        """Step two streams once. The shapes that a graph declares may be wrong or absent; what it gives counts."""
        rows = 2
        x = np.zeros((rows, len(self.contract.features)), self.contract.input_dtype)  # [2, F]
        states = [np.stack([value] * rows) for value in self.initial_states()]  # [2, *shape] each
        try:
            outputs, following = self.step(x, states)
        except Exception as error:  # onnxruntime raises a class of its own for every kind of fault
            raise ContractError(f"cannot step {rows} streams at once: {first_line(error)}") from None
        for state, value, given in zip(self.contract.states, states, following, strict=True):
            _expect(f"state {state.output!r}", given, value.shape, value.dtype)
        for output in self.contract.outputs:
            given = outputs[output.name]
            _expect(f"output {output.name!r}", given, _output_shape(self.contract, output, rows, given))


def _moved(value: Array, source: int, target: int) -> Array:
    """`np.moveaxis`, which costs 4 µs even where there is nothing to move; torch's states ask for 0 and 1."""
    if source == target:
        return value
    return value.swapaxes(0, 1) if source + target == 1 else np.moveaxis(value, source, target)


def session_options() -> ort.SessionOptions:
    """Settings under which a row's bits depend on nothing but the row, and an idle process stays idle.

    One thread (scale by processes), no spinning, no cache of memory plans (it grows with every new batch
    size). Denormals stay as they are: onnxruntime's switch is process-wide and would change an embedder's bits.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.add_session_config_entry("session.load_model_format", "ONNX")  # or bytes 4 to 8 may choose another parser
    options.log_severity_level = 4  # what goes wrong is raised, in a sentence; onnxruntime's own log is noise
    return options


def _session(data: bytes, name: str) -> tuple[ort.InferenceSession, list[Tensor], list[Tensor]]:
    """A session with its inputs and outputs; the fallback to the same provider would only print on stdout."""
    try:
        session = ort.InferenceSession(data, session_options(), providers=["CPUExecutionProvider"], enable_fallback=0)
        return session, [tensor_of(n) for n in session.get_inputs()], [tensor_of(n) for n in session.get_outputs()]
    except Exception as error:  # onnxruntime raises a class of its own for every kind of fault
        raise ModelError(f"{name}: onnxruntime cannot load it: {first_line(error)}") from None


def tensor_of(node: Any) -> Tensor:
    """onnxruntime's description of an input or output, with numpy's name for its dtype."""
    kind = str(node.type).removeprefix("tensor(").removesuffix(")")
    return Tensor(node.name, tuple(node.shape), NUMPY_NAMES.get(kind, kind))


def _agree(contract: Contract, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Raise `ContractError` unless every tensor that the contract names is in the graph, and goes in as it says."""
    entering = {tensor.name: tensor for tensor in inputs}
    leaving = {tensor.name for tensor in outputs}
    wanted = {*contract.inputs, *(state.input for state in contract.states)}
    if wanted != set(entering):
        raise ContractError(f"its contract names the inputs {sorted(wanted)}, its graph has {sorted(entering)}")
    named = {o.name for o in contract.outputs} | {s.output for s in contract.states}
    if absent := named - leaving:
        raise ContractError(f"its contract names the outputs {sorted(absent)}, its graph has {sorted(leaving)}")
    x = entering[contract.input]
    wide = (len(contract.features), None)  # a width that the graph leaves open is tried by the rehearsal
    if x.dtype != contract.input_dtype or len(x.shape) != 2 or not (isinstance(x.shape[1], str) or x.shape[1] in wide):
        raise ContractError(
            f"its contract has {len(contract.features)} features of {contract.input_dtype}, "
            f"its input {x.name!r} is {x.dtype} {list(x.shape)}"
        )
    _expect_free(x, 0)
    if contract.time_input is not None:
        _agree_state((), 0, "int64", entering[contract.time_input])
    for state in contract.states:
        _agree_state(state.shape, state.batch_axis, state.dtype, entering[state.input])


def _expect_free(tensor: Tensor, axis: int) -> None:
    if isinstance(size := tensor.shape[axis], int):
        raise ContractError(f"the batch axis of {tensor.name!r} is fixed at {size}; export it with a free batch axis")


def _agree_state(shape: tuple[int, ...], axis: int, dtype: str, tensor: Tensor) -> None:
    fixed = tensor.shape[:axis] + tensor.shape[axis + 1 :]
    same = len(tensor.shape) == len(shape) + 1
    same = same and all(a == b for a, b in zip(fixed, shape, strict=True) if isinstance(a, int))
    if not same or tensor.dtype != dtype:
        raise ContractError(
            f"its contract has state {tensor.name!r} as {dtype} {list(shape)} with batch axis {axis}, "
            f"its graph as {tensor.dtype} {list(tensor.shape)}"
        )
    _expect_free(tensor, axis)


def _output_shape(contract: Contract, output: Output, rows: int, given: Any) -> tuple[int, ...]:
    """The shape that an output's role asks for; one without such a role only has a row for each stream."""
    if output.role in BY_FEATURE:
        return rows, len(output.features or contract.feature_names)
    if output.role in BY_STREAM:
        return (rows,)
    return (rows, *np.shape(given)[1:])


def _expect(what: str, value: Any, shape: tuple[int, ...], dtype: Any = None) -> None:
    """Raise `ContractError` unless `value` is an array of that shape and dtype."""
    if not isinstance(value, np.ndarray) or value.shape != shape or dtype not in (None, value.dtype):
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
        wanted = f"{dtype or ''} {list(shape)}".strip()
        raise ContractError(f"{what} is {found} for {shape[0]} streams, it must be {wanted}")
