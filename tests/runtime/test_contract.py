"""The contract: what is written is read back, and what makes no sense is refused in a sentence that says why."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from statestep.runtime import Contract, ContractError, Feature, Output, State, StepModel, stamp
from statestep.runtime.contract import DTYPES, MISSING_POLICIES, ROLES

from ..models import smoother, smoother_contract

MEMORY = {
    "steps": 400,
    "starts": 16,
    "outputs": {"y": {"0.01": 37, "0.0001": 80, "equal": None}},
    "curve": {"steps": [1, 10, 400], "gap": [1.5, 0.2, 1e-7]},
    "warm": 37,
}
FULL = Contract(
    name="pump",
    features=(Feature("flow", "m³/h", 0.0, 12.5), Feature('Druck\n"1"', None, -1, None)),
    states=(
        State("h0", "hn", (2, 3), batch_axis=1, initial=[[1, 2, 3], [4, 5, 6.5]]),
        State("seen", "next_seen", (), dtype="int64", initial=-4),
        State("ever", "next_ever", (1,), dtype="bool", initial=True),
    ),
    outputs=(
        Output("y", role="prediction", features=("flow",)),
        Output("s", batch_axis=1),
        Output("q", role="event", state="seen"),
    ),
    model_version="2.1",
    input="reading",
    input_dtype="float64",
    missing="own-forecast",
    period_seconds=300,
    horizon=3,
    memory=MEMORY,
    parity={"steps": 200, "max_abs_difference": 1e-7},
    producer="a test",
    license="MIT",
    trained_on="machine.csv",
    author="A. Team",
    description="Forecasts the flow.",
)

NAMES = st.text(min_size=1, max_size=8)
NUMBERS = st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**9), 10**9)


@st.composite
def contracts(draw: st.DrawFn) -> Contract:
    """Any contract that makes sense."""
    features = draw(st.lists(st.builds(Feature, NAMES, st.none() | NAMES, NUMBERS, NUMBERS), min_size=1, max_size=4))
    names = draw(st.lists(NAMES, min_size=8, max_size=8, unique=True))
    shape = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    initial = draw(st.sampled_from([0.0, 1, -2.5, np.full(shape, 0.5).tolist()]))
    state = State(names[0], names[1], shape, draw(st.integers(0, len(shape))), "float32", initial)
    other = State(names[2], names[3], (2,), dtype=draw(st.sampled_from(DTYPES)))
    roles = draw(st.lists(st.sampled_from(ROLES), max_size=3, unique=True))
    outputs = [Output(name, draw(st.integers(0, 3)), role) for name, role in zip(names[4:], roles, strict=False)]
    return Contract(
        name=draw(NAMES),
        features=tuple({feature.name: feature for feature in features}.values()),
        states=(state, other),
        outputs=tuple(outputs),
        input=names[7],
        missing=draw(st.sampled_from(MISSING_POLICIES)),
        period_seconds=draw(st.none() | st.floats(1e-3, 1e9)),
        horizon=draw(st.integers(1, 100)),
        license=draw(st.none() | NAMES),
    )


@given(contracts())
def test_any_contract_survives_the_round_trip(contract: Contract) -> None:
    """Written and read again it is equal, and written again it is the same text."""
    text = contract.to_json()
    assert Contract.from_json(text) == contract
    assert Contract.from_json(text).to_json() == text


def test_the_document_has_the_keys_that_other_tools_rely_on() -> None:
    """The public face: these keys and forms, and no key for what is absent."""
    document = json.loads(FULL.to_json())
    assert document["version"] == 1
    assert document["features"] == [
        {"name": "flow", "unit": "m³/h", "min": 0.0, "max": 12.5},
        {"name": 'Druck\n"1"', "min": -1},
    ]
    assert document["states"][0] == {
        "input": "h0",
        "output": "hn",
        "shape": [2, 3],
        "batch_axis": 1,
        "dtype": "float32",
        "initial": [[1, 2, 3], [4, 5, 6.5]],
        "lasting": False,
    }
    assert document["outputs"][0] == {"name": "y", "batch_axis": 0, "role": "prediction", "features": ["flow"]}
    assert {"name", "model_version", "input", "input_dtype", "missing", "horizon", "parity"} < set(document)
    bare = json.loads(smoother_contract().to_json())
    absent = {"period_seconds", "memory", "parity", "license", "trained_on", "producer", "author", "description"}
    assert not absent & set(bare)
    assert document["memory"] == MEMORY  # null is a finding, and stays


def test_what_is_left_out_has_its_default() -> None:
    """The smallest document that a person might write by hand is a whole contract."""
    state = '{"input": "h", "output": "g", "shape": [2]}'
    text = f'{{"name": "m", "features": [{{"name": "a"}}], "states": [{state}], "outputs": []}}'
    assert Contract.from_json(text) == Contract("m", (Feature("a"),), (State("h", "g", (2,)),), ())


def test_keys_of_a_later_release_are_passed_by() -> None:
    """More keys may be added to any part of the document without a new version."""
    document = json.loads(FULL.to_json()) | {"colour": "blue"}
    for part in ("features", "states", "outputs"):
        document[part][0]["colour"] = "blue"
    assert Contract.from_json(json.dumps(document)) == FULL


@pytest.mark.parametrize("version", [2, 0, "1", None, 1.5])
def test_another_version_is_refused(version: Any) -> None:
    """A document that this release cannot know is not guessed at; the way out is named."""
    document = json.loads(FULL.to_json()) | {"version": version}
    with pytest.raises(ContractError, match=f"has version {version!r}, this release reads version 1: upgrade"):
        Contract.from_json(json.dumps(document))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is a JSON list, it must be an object"),
        ('"x"', "is a JSON str"),
        ("{}", "contract lacks 'name'"),
        ('{"name": "m", "features": [{}], "states": [], "outputs": []}', "feature lacks 'name'"),
        (
            '{"name": "m", "features": [{"name": "a"}], "states": [{"input": "h"}], "outputs": []}',
            "state lacks 'output'",
        ),
        ('{"name": "m", "features": 3, "states": [], "outputs": []}', "cannot be read"),
        ('{"name": "m", "features": ["a"], "states": [], "outputs": []}', "cannot be read|lacks"),
        ('{"name": "m", "features": null, "states": [], "outputs": []}', "cannot be read"),
        (smoother_contract().to_json()[:-1] + ',"parity":5}', "cannot be read"),
    ],
)
def test_a_document_that_is_none_is_refused(text: str, sentence: str) -> None:
    """What is not JSON, is no object or lacks a part is told by name."""
    with pytest.raises(ContractError, match=sentence) as refused:
        Contract.from_json(text)
    assert "\n" not in str(refused.value)


SENSELESS: list[tuple[dict[str, Any], str]] = [
    ({"features": ()}, "at least one feature"),
    ({"states": ()}, "at least one state pair"),
    ({"name": ""}, "name is '', it must be a text that is not empty"),
    ({"name": 5}, "name is 5"),
    ({"input": None}, "input is None"),
    ({"model_version": 2}, "model_version is 2"),
    ({"input_dtype": "float8"}, "input_dtype is 'float8', it must be one of"),
    ({"missing": "guess"}, r"missing is 'guess', it must be one of \['own-forecast', 'reject'\]"),
    ({"missing": ["reject"]}, "missing is"),
    ({"horizon": 0}, "horizon is 0, it must be a number above 0"),
    ({"horizon": 1.5}, "horizon is 1.5"),
    ({"parity": {"steps": 3}}, r"parity is {'steps': 3}, it must have steps and max_abs_difference"),
    ({"period_seconds": 0}, "period_seconds is 0"),
    ({"period_seconds": -60.0}, "period_seconds is -60.0"),
    ({"period_seconds": "60"}, "period_seconds is '60'"),
    ({"period_seconds": float("nan")}, "period_seconds is nan"),
    ({"features": (Feature("a"), Feature("a"))}, r"names each feature once, \['a'\] stand twice"),
    ({"features": (Feature(""),)}, "a feature's name is ''"),
    ({"features": (Feature(7),)}, "a feature's name is 7"),  # type: ignore[arg-type]
    ({"features": (Feature("a", min="low"),)}, "feature 'a' has the range 'low' to None"),  # type: ignore[arg-type]
    ({"features": (Feature("a", unit=5),)}, "the unit of feature 'a' is 5, it must be a text"),  # type: ignore[arg-type]
    ({"features": (Feature("a", max=float("inf")),)}, "feature 'a' has the range None to inf"),
    ({"author": 5}, "author is 5, it must be a text"),
    ({"description": ["a"]}, r"description is \['a'\]"),
    ({"memory": 5}, "memory is 5, it must be as statestep.export.horizon gives it"),
    ({"memory": {"warm": 0}}, "memory is {'warm': 0}"),
    ({"memory": {"warm": True}}, "memory is {'warm': True}"),
    ({"memory": {"outputs": {"y": 5}}}, "memory is"),
    ({"memory": {"outputs": {"y": {"0.01": "37"}}}}, "memory is"),
    ({"memory": {"curve": {"steps": [1], "gap": []}}}, "memory is"),
    ({"memory": {"curve": {"steps": [1], "gap": [float("inf")]}}}, "memory is"),
    ({"states": (State("h", "", (2,)),)}, "the output of state 'h' is ''"),
    ({"states": (State("x", "next_h", (2,)),)}, r"each input once, \['x'\]"),
    ({"states": (State("h", "n", (2,)), State("h", "m", (2,)))}, r"each input once, \['h'\]"),
    ({"states": (State("h", "n", (2,)), State("g", "n", (2,)))}, r"each output once, \['n'\]"),
    ({"states": (State("h", "y", (2,)),)}, r"each output once, \['y'\]"),
    ({"states": (State("h", "n", (2,), dtype="float8"),)}, "the dtype of state 'h' is 'float8'"),
    ({"states": (State("h", "n", (2,), batch_axis=2),)}, r"state 'h' has batch axis 2 and shape \[2\]"),
    ({"states": (State("h", "n", (2,), batch_axis=-1),)}, "state 'h' has batch axis -1"),
    ({"states": (State("h", "n", (2,), batch_axis="0"),)}, "state 'h' has batch axis '0'"),  # type: ignore[arg-type]
    ({"states": (State("h", "n", (2, 0)),)}, r"shape \[2, 0\], each size must be 1 or more"),
    ({"states": (State("h", "n", (2,), initial=[1, 2, 3]),)}, r"initial value has shape \[3\], its own is \[2\]"),
    ({"states": (State("h", "n", (2,), initial=[[1], [2, 3]]),)}, "initial value cannot be read"),
    ({"states": (State("h", "n", (2,), initial="zero"),)}, "initial value cannot be read"),
    ({"states": (State("h", "n", (2,), initial=float("nan")),)}, "initial value is not finite"),
    ({"outputs": (Output(""),)}, "an output's name is ''"),
    ({"outputs": (Output("y", batch_axis=-1),)}, "output 'y' has batch axis -1"),
    ({"outputs": (Output("y", role="oracle"),)}, "the role of output 'y' is 'oracle', it must be one of"),
    ({"outputs": (Output("y"), Output("y"))}, r"each output once, \['y'\]"),
    ({"outputs": (Output("y", role="score"), Output("z", role="score"))}, r"each role once, \['score'\]"),
    ({"outputs": (Output("y", features=("a", "c")),)}, r"output 'y' names \['c'\], which are no features"),
    ({"outputs": (Output("y", state="next_h"),)}, "output 'y' is held by 'next_h', which is no state"),
    ({"outputs": (Output("y", state=["h"]),)}, r"output 'y' is held by \['h'\], which is no state"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("change", "sentence"), SENSELESS, ids=[sentence for _, sentence in SENSELESS])
def test_what_makes_no_sense_is_refused(change: dict[str, Any], sentence: str) -> None:
    """Each rule has a sentence of one line that names the thing and the value."""
    with pytest.raises(ContractError, match=sentence) as refused:
        replace(smoother_contract(), **change)
    assert "\n" not in str(refused.value)


def test_an_initial_value_is_a_number_or_a_list_of_the_states_shape() -> None:
    """A number stands for every element; the array that is given belongs to the caller."""
    held = State("h", "n", (2, 2), initial=3)
    assert held.initial_value().tolist() == [[3, 3], [3, 3]]
    held.initial_value()[:] = 9
    assert held.initial_value().tolist() == [[3, 3], [3, 3]]
    assert State("h", "n", (), dtype="int64", initial=7).initial_value().dtype == np.int64
    assert State("h", "n", (1,), dtype="bool", initial=[True]).initial_value().tolist() == [True]


def test_stamping_replaces_what_was_there_and_keeps_the_rest() -> None:
    """A model that is stamped twice has the second contract, one entry a key, and other tools' entries."""
    model = smoother()
    onnx.helper.set_model_props(model, {"author": "somebody", "name": "old"})
    stamp(model, smoother_contract(name="first", license="MIT"))
    stamp(model, smoother_contract(name="second"))
    entries = [(entry.key, entry.value) for entry in model.metadata_props]
    assert len(entries) == len(dict(entries))
    assert dict(entries)["author"] == "somebody"
    assert dict(entries)["name"] == "second"
    assert StepModel(model.SerializeToString()).contract == smoother_contract(name="second")


def test_flat_entries_tell_other_tools_what_a_model_is() -> None:
    """Viewers of ONNX files show these without knowing of contracts; what is absent makes no entry."""
    model = smoother()
    stamp(model, smoother_contract(author="A. Team", description="Smooths."))
    flat = {entry.key: entry.value for entry in model.metadata_props}
    assert (flat["name"], flat["version"], flat["author"], flat["description"]) == (
        "smoother",
        "1",
        "A. Team",
        "Smooths.",
    )
    assert "license" not in flat


@pytest.mark.parametrize(("memory", "warm"), [(None, None), ({}, None), ({"warm": None}, None), (MEMORY, 37)])
def test_a_stream_is_warm_from_the_step_that_the_memory_says(memory: dict[str, Any] | None, warm: int | None) -> None:
    """A model whose memory was not measured, or has no end, does not say when a stream is warm."""
    assert smoother_contract(memory=memory).warm_after == warm
