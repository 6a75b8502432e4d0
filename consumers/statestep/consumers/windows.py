"""Labelled windows of time, from JSON: a list of [begin, end], or such a list for each stream or file by its name.

Names may be paths, as in the Numenta Anomaly Benchmark: {"realKnownCause/machine.csv": [["2014-01-27 14:20", …], …]}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from statestep.consumers.tables import FileError
from statestep.consumers.times import parse_time

Window = tuple[int, int]  # first and last moment that belong to it, ns since the epoch


def windows_of(path: Path, data: str, streams: Sequence[str]) -> dict[str, list[Window]]:
    """The windows of each of `streams`, which were read from the file `data`.

    A list holds for all of them; of an object each stream gets what stands under its own name, or else under the
    file's, with or without directory and endings. Raises `FileError` where nothing fits or a window is none.
    """
    try:
        document = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FileError(f"{path}: is not JSON: {error}") from None
    if isinstance(document, list):
        windows = _windows(path, document, "the list")
        return dict.fromkeys(streams, windows)
    if not isinstance(document, dict):
        raise FileError(
            f"{path}: holds {_short(document)}, it must be a list of [begin, end], or an object with such a list for "
            "each stream or file"
        )
    found = {name: entry for name in streams if (entry := _entry(document, (name, data))) is not None}
    if not found:
        named, wanted = (", ".join(map(repr, names[:5])) for names in (list(document), [Path(data).name, *streams]))
        raise FileError(
            f"{path}: has windows of {named or 'nothing'}, it must have some of {wanted}, a file or a stream"
        )
    return {name: _windows(path, document[found[name]], repr(found[name])) if name in found else [] for name in streams}


def labels_of(windows: Sequence[Window], times: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], int]:
    """Which rows at `times` [T] lie in a window, bool [T], and how many windows hold no row.

    >>> labels_of([(10, 20), (90, 99)], np.array([5, 10, 20, 30]))
    (array([False,  True,  True, False]), 1)
    """
    labels, empty = np.zeros(len(times), bool), 0
    for begin, end in windows:
        inside = (times >= begin) & (times <= end)
        labels |= inside
        empty += not inside.any()
    return labels, empty


def _entry(document: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The key that means the first of `names` that any key means."""
    for name in names:
        if name in document:
            return name
        wanted = {Path(name).name, _stem(name)}
        for key in document:
            if Path(key).name in wanted or _stem(key) in wanted:
                return key
    return None


def _stem(name: str) -> str:
    return Path(name).name.split(".")[0]


def _windows(path: Path, entry: Any, name: str) -> list[Window]:
    found = []
    for window in entry if isinstance(entry, list) else [entry]:
        pair = window if isinstance(window, list) and len(window) == 2 else [None, None]
        moments = [parse_time(moment) if isinstance(moment, str | int | float) else None for moment in pair]
        match moments:
            case [int(begin), int(end)] if begin <= end:
                found.append((begin, end))
            case _:
                raise FileError(
                    f"{path}: {name} has the window {_short(window)}, it must be [begin, end]: two times, ISO 8601 or "
                    "numbers since 1970, the earlier first"
                )
    return found


def _short(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else f"{text[:79]}…"
