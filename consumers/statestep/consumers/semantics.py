"""What decides a stream's states beside its messages, as one hash: a replay under another gives other bits."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Instruction sets for which onnxruntime has kernels of its own, which round differently.
KERNELS = (
    "sse4_1",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx_vnni",
    "amx_tile",
    "asimd",
    "sve",
)


def semantics(fingerprint: str, settings: dict[str, Any]) -> str:
    """The hash, in hex, of a model, the settings that affect states, the releases and the machine type.

    >>> semantics("ab", {"time": "ts"}) == semantics("ab", {"time": "at"})
    False
    """
    known = {
        "model": fingerprint,
        "settings": settings,
        "statestep": version("statestep"),
        "onnxruntime": version("onnxruntime"),
        "numpy": version("numpy"),
        "machine": machine(),
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:32]


def machine() -> str:
    """The kind of processor, as far as kernels are chosen by it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    lines = (line.partition(":") for line in text.splitlines())
    found = next((value.split() for name, _, value in lines if name.strip() in ("flags", "Features")), [])
    return " ".join([platform.machine(), *(name for name in (*KERNELS, "asimd", "sve") if name in found)])
