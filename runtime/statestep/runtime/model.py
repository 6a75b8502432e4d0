"""A step model in memory: one onnxruntime session, its contract, and the call that advances a batch by one step.

It keeps no state of its own. States go in as arguments and come out as results, batch axis first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx
import onnxruntime as ort

from statestep.runtime.contract import CONTRACT_KEY, Contract, ContractError, Tensor, detect

NUMPY_NAMES = {"float": "float32", "double": "float64"}  # where onnxruntime's name for a dtype is not numpy's

Array = np.ndarray[Any, Any]


class ModelError(ValueError):
    """A file that is no step model: unreadable, not ONNX, refused by onnxruntime, or at odds with its contract."""


class StepModel:
    """A recurrent network that takes one timestep of many streams at a time.

    `contract` says what its tensors mean, `fingerprint` is the SHA-256 of the file in hex, `opset` the version
    of the ONNX operator set that it asks for.
    """

    contract: Contract
    fingerprint: str
    opset: int

    def __init__(self, data: bytes, *, name: str = "model", states: Mapping[str, tuple[str, int]] | None = None):
        graph = _parse(data, name)
        self.opset = max((item.version for item in graph.opset_import if item.domain in ("", "ai.onnx")), default=0)
        self.fingerprint = hashlib.sha256(data).hexdigest()
        self._session = _session(data, name)
        meta = self._session.get_modelmeta().custom_metadata_map
        inputs = [_tensor(node) for node in self._session.get_inputs()]
        outputs = [_tensor(node) for node in self._session.get_outputs()]
        try:
            if CONTRACT_KEY in meta and states is None:
                self.contract = Contract.from_json(meta[CONTRACT_KEY])
            else:
                self.contract = detect(Path(name).stem, inputs, outputs, named=states)
            _agree(self.contract, inputs, outputs)
        except ContractError as error:
            raise ModelError(f"{name}: {error}") from None
        self._output_names = [output.name for output in self.contract.outputs]
        self._fetched = self._output_names + [state.output for state in self.contract.states]

    @classmethod
    def load(cls, path: str | Path, *, states: Mapping[str, tuple[str, int]] | None = None) -> Self:
        """Read a step model from a file.

        `states` names the pairs of a model that has no contract: state input → (state output, batch axis).
        Raises `ModelError`, with one sentence, for anything that is not a step model.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
        return cls(data, name=str(path), states=states)

    def initial_states(self) -> list[Array]:
        """What a stream that has seen nothing remembers: one array of `state.shape` for each state."""
        return [state.initial_value() for state in self.contract.states]

    def step(self, x: Array, states: Sequence[Array]) -> tuple[dict[str, Array], list[Array]]:
        """Advance B streams by one timestep.

        `x` is [B, F] in the contract's input dtype; `states` has one array [B, *shape] for each state, in the
        contract's order. Returns the outputs by name, each [B, …], and the next states, shaped like `states`.
        Nothing is kept and nothing that was given is written to.
        """
        feeds = {self.contract.input: np.ascontiguousarray(x)}  # [B, F]
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


def _moved(value: Array, source: int, target: int) -> Array:
    """`np.moveaxis`, which costs 4 µs even where there is nothing to move."""
    return value if source == target else np.moveaxis(value, source, target)


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
    options.log_severity_level = 4  # what goes wrong is raised, in a sentence; onnxruntime's own log is noise
    return options


def _session(data: bytes, name: str) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(data, session_options(), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a class of its own for every kind of fault
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{name}: onnxruntime cannot load it: {reason}") from None


def _parse(data: bytes, name: str) -> onnx.ModelProto:
    """A step model is one file. Weights kept elsewhere could name any path on the machine, so none is followed."""
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's DecodeError; its class moved between releases
        raise ModelError(f"{name}: is not an ONNX file ({str(error).splitlines()[0]})") from None
    if not model.graph.node:
        raise ModelError(f"{name}: is not an ONNX file (it holds no graph)")
    for weight in model.graph.initializer:
        if weight.data_location == onnx.TensorProto.EXTERNAL:
            raise ModelError(
                f"{name}: keeps weight {weight.name!r} outside the file; export it with the weights inside"
            )
    return model


def _tensor(node: Any) -> Tensor:
    """onnxruntime's description of an input or output, with numpy's name for its dtype."""
    kind = str(node.type).removeprefix("tensor(").removesuffix(")")
    return Tensor(node.name, tuple(node.shape), NUMPY_NAMES.get(kind, kind))


def _agree(contract: Contract, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Raise `ContractError` unless every tensor that the contract names is in the graph, alike in shape and dtype."""
    entering = {tensor.name: tensor for tensor in inputs}
    leaving = {tensor.name: tensor for tensor in outputs}
    wanted = {contract.input, *(state.input for state in contract.states)}
    if wanted != set(entering):
        raise ContractError(f"its contract names the inputs {sorted(wanted)}, its graph has {sorted(entering)}")
    absent = {o.name for o in contract.outputs} | {s.output for s in contract.states}
    if absent := absent - set(leaving):
        raise ContractError(f"its contract names the outputs {sorted(absent)}, its graph has {sorted(leaving)}")
    x = entering[contract.input]
    if x.dtype != contract.input_dtype or len(x.shape) != 2 or x.shape[1] != len(contract.features):
        raise ContractError(
            f"its contract has {len(contract.features)} features of {contract.input_dtype}, "
            f"its input {x.name!r} is {x.dtype} {list(x.shape)}"
        )
    if isinstance(x.shape[0], int):
        raise ContractError(f"its batch axis is fixed at {x.shape[0]}; export it with a free batch axis")
    for state in contract.states:
        for tensor in (entering[state.input], leaving[state.output]):
            _agree_state(state.shape, state.batch_axis, state.dtype, tensor)


def _agree_state(shape: tuple[int, ...], axis: int, dtype: str, tensor: Tensor) -> None:
    fixed = tensor.shape[:axis] + tensor.shape[axis + 1 :]
    same = len(fixed) == len(shape) and all(a == b for a, b in zip(fixed, shape, strict=True) if isinstance(a, int))
    if not same or tensor.dtype != dtype:
        raise ContractError(
            f"its contract has state {tensor.name!r} as {dtype} {list(shape)} with batch axis {axis}, "
            f"its graph as {tensor.dtype} {list(tensor.shape)}"
        )
