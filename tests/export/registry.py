"""Tests export a hundred models, and torch builds its table of operators anew for each: here it is built once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any
from unittest import mock

import pytest
from torch.onnx._internal.exporter._registration import ONNXRegistry


@pytest.fixture(scope="session", autouse=True)
def one_registry() -> Iterator[None]:
    """A third of an export's time. The table is not written to unless a translation of one's own is handed over."""
    build: Any = cache(ONNXRegistry.__dict__["from_torchlib"].__func__)
    with mock.patch.object(ONNXRegistry, "from_torchlib", classmethod(build)):
        yield
