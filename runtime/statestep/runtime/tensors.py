"""The tensors that a model file may hold or declare: of known types, of sizes that can be, with the bytes for them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from onnx import SparseTensorProto, TensorProto, ValueInfoProto

MAX_RANK = 16  # axes of a tensor; onnxruntime's kernels are tested up to about eight
MAX_ELEMENTS = 1 << 30  # of a tensor; a state of a gibibyte is no state, and sizes beyond 32 bits crash kernels
SHOWN = 60  # characters of a name from the file that a sentence repeats

# What a tensor may be made of: bytes an element, and the field that holds those that are not raw.
ELEMENTS: dict[int, tuple[int, str]] = {
    TensorProto.FLOAT: (4, "float_data"),
    TensorProto.DOUBLE: (8, "double_data"),
    TensorProto.FLOAT16: (2, "int32_data"),
    TensorProto.BFLOAT16: (2, "int32_data"),
    TensorProto.INT8: (1, "int32_data"),
    TensorProto.INT16: (2, "int32_data"),
    TensorProto.INT32: (4, "int32_data"),
    TensorProto.INT64: (8, "int64_data"),
    TensorProto.UINT8: (1, "int32_data"),
    TensorProto.UINT16: (2, "int32_data"),
    TensorProto.UINT32: (4, "uint64_data"),
    TensorProto.UINT64: (8, "uint64_data"),
    TensorProto.BOOL: (1, "int32_data"),
}
FIELDS = tuple(sorted({field for _, field in ELEMENTS.values()}))
_KINDS = frozenset(TensorProto.DataType.values())


class RefusedError(Exception):
    """What is wrong, without the file's name."""


def refuse_sparse(sparse: SparseTensorProto) -> None:
    """A few bytes of it may stand for a tensor of any size."""
    for tensor in (sparse.values, sparse.indices):
        refuse_external(tensor)
    raise RefusedError(f"holds the sparse weight {shown(sparse.values.name)}; store it dense")


def refuse_external(tensor: TensorProto) -> None:
    """Weights kept elsewhere could name any path on the machine, or any address in memory: none is followed."""
    if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
        raise RefusedError(f"keeps weight {shown(tensor.name)} outside the file; export it with the weights inside")


def check_tensor(tensor: TensorProto) -> None:
    """A tensor has the elements that its shape says: kernels read as many without asking."""
    refuse_external(tensor)
    if tensor.data_type not in ELEMENTS:
        kind = TensorProto.DataType.Name(tensor.data_type) if tensor.data_type in _KINDS else tensor.data_type
        raise RefusedError(f"holds the weight {shown(tensor.name)} of type {kind}, which no step model needs")
    size, field = ELEMENTS[tensor.data_type]
    _check_shape(f"weight {shown(tensor.name)}", tensor.dims)
    count = prod(tensor.dims)
    held = {name: len(getattr(tensor, name)) for name in FIELDS}
    raw = len(tensor.raw_data)
    fits = raw == count * size and not any(held.values()) if raw else sum(held.values()) == held[field] == count
    if not fits or tensor.string_data or tensor.HasField("segment"):
        raise RefusedError(
            f"holds the weight {shown(tensor.name)} with other bytes than its shape "
            f"{list(tensor.dims)} says; was the file damaged?"
        )


def check_info(info: ValueInfoProto) -> None:
    """What a graph declares of a tensor that is computed: of a known kind, of a size that can be."""
    held = info.type.sequence_type.elem_type if info.type.HasField("sequence_type") else info.type
    if held.WhichOneof("value") not in (None, "tensor_type"):
        raise RefusedError(f"declares {shown(info.name)} as no tensor; a step model works on tensors alone")
    element = held.tensor_type.elem_type
    if element and element not in ELEMENTS:
        raise RefusedError(f"declares {shown(info.name)} of a type that no step model needs")
    _check_shape(shown(info.name), [dim.dim_value for dim in held.tensor_type.shape.dim])


def _check_shape(what: str, dims: Sequence[int]) -> None:
    if len(dims) > MAX_RANK:
        raise RefusedError(f"holds {what} with {len(dims)} axes, {MAX_RANK} are allowed")
    if min(dims, default=0) < 0 or prod(size for size in dims if size) > MAX_ELEMENTS:  # a 0 elsewhere hides nothing
        raise RefusedError(f"holds {what} of the shape {list(dims)}; a tensor may have 0 to {MAX_ELEMENTS:,} elements")


def shown(name: str) -> str:
    """A name from the file as a sentence may repeat it: quoted, escaped and cut.

    >>> shown("a\\n" + "b" * 100)[:8]
    "'a\\\\nbbbb"
    """
    return repr(name if len(name) <= SHOWN else name[: SHOWN - 1] + "…")
