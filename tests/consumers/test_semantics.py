"""The hash of what decides states: it changes with each ingredient, and with nothing else."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from statestep.consumers import semantics as module
from statestep.consumers.codec import Fields
from statestep.consumers.semantics import machine, semantics

from .runs import MODEL, OTHER_MODEL, filled, marker_of, service

SETTINGS: dict[str, Any] = {"fields": {"time": "ts", "stream": None}, "max_message_bytes": 1000}


def test_it_is_the_same_again() -> None:
    """Whatever the order in which the settings were given."""
    assert semantics("ab", SETTINGS) == semantics("ab", dict(reversed(SETTINGS.items())))


@pytest.mark.parametrize("change", [{"fields": {"time": "at", "stream": None}}, {"max_message_bytes": 1001}, {"x": 1}])
def test_it_changes_with_each_setting(change: dict[str, Any]) -> None:
    """One that is deep inside as well."""
    assert semantics("ab", SETTINGS) != semantics("ab", SETTINGS | change)


def test_it_changes_with_the_model() -> None:
    """By its fingerprint."""
    assert semantics("ab", SETTINGS) != semantics("ac", SETTINGS)


@pytest.mark.parametrize("package", ["statestep", "onnxruntime", "numpy"])
def test_it_changes_with_each_release(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Kernels round differently from one release to the next."""
    before = semantics("ab", SETTINGS)
    monkeypatch.setattr(module, "version", lambda name: "0.0.0+other" if name == package else version(name))
    assert semantics("ab", SETTINGS) != before


def test_it_changes_with_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its instruction sets for which there are kernels, not by the CPU's name or its speed."""
    before = semantics("ab", SETTINGS)

    def cpu(flags: str) -> str:
        text = f"model name : any\ncpu MHz : 2000\nflags\t\t: fpu {flags}\n"
        monkeypatch.setattr(Path, "read_text", lambda self, **how: text)
        return machine()

    plain, wide = cpu("sse4_1 avx avx2 fma"), cpu("sse4_1 avx avx2 fma avx512f")
    assert plain != wide
    assert cpu("avx2 fma pcid avx sse4_1") == plain
    with_wide = semantics("ab", SETTINGS)
    monkeypatch.undo()
    assert semantics("ab", SETTINGS) == before
    cpu("")
    assert semantics("ab", SETTINGS) != with_wide


def test_the_service_writes_it_with_each_marker() -> None:
    """Model, fields, the largest message and what was said of the model by hand are in it; limits are not."""

    def of(**how: Any) -> str:
        broker = filled(20, bad=False)
        service(broker, **how).run()
        found = {seen.semantics for partition in range(3) if (seen := marker_of(broker, partition))}
        assert len(found) == 1
        return found.pop()

    usual = of()
    assert of(max_streams=50, policy="skip") == usual
    others = [
        of(model=OTHER_MODEL),
        of(fields=Fields(time="at")),
        of(max_message_bytes=2000),
        of(by_hand={"constants": {"a": 1}}),
    ]
    assert len({usual, *others}) == 5
    assert MODEL.fingerprint != OTHER_MODEL.fingerprint
