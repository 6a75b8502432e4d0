"""The laws themselves: a sound model keeps each, and each is broken by a model that deserves it, in a sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from statestep.export import (
    DataError,
    LawBroken,
    agrees_with,
    check_model,
    company_does_not_matter,
    cuts_do_not_matter,
    laws_of,
    order_does_not_matter,
    outputs_are_finite,
    restored_goes_on,
    rollback_is_an_identity,
    streaming_is_offline,
)
from statestep.runtime import Model, ModelError

from ..models import Array, detector, smoother, smoother_contract, stamped
from . import broken
from .broken import offline

X = np.random.default_rng(12).standard_normal((12, 5, 2)).astype(np.float32)  # [T, B, F]
LAWS: dict[str, Callable[[Callable[[], Model]], None]] = {
    "outputs are finite": lambda make: outputs_are_finite(make(), X),
    "streaming is offline": lambda make: streaming_is_offline(make(), offline, X),
    "agrees with": lambda make: agrees_with(make(), offline, X),
    "company does not matter": lambda make: company_does_not_matter(make(), X, sizes=(2, 5)),
    "order does not matter": lambda make: order_does_not_matter(make(), X),
    "cuts do not matter": lambda make: cuts_do_not_matter(make(), X),
    "rollback is an identity": lambda make: rollback_is_an_identity(make(), X),
    "restored goes on": lambda make: restored_goes_on(make(), X, fresh=make()),
}
OF_SEQUENCES = {"streaming is offline", "agrees with"}
OF_BATCHES = {"company does not matter", "order does not matter"}
BREAKS: list[tuple[Callable[[], Model], set[str]]] = [
    (broken.sound, set()),
    (broken.runaway, {"outputs are finite"} | OF_SEQUENCES),
    (broken.forgetful, OF_SEQUENCES),
    (broken.batch_mean, OF_SEQUENCES | OF_BATCHES),
    (broken.running_sum, OF_SEQUENCES | OF_BATCHES),
    (broken.WritingInPlace, {"rollback is an identity"}),
    (broken.KeepingAside, {"restored goes on"}),
    (broken.Counting, set(LAWS) - {"outputs are finite"}),
]


@pytest.mark.parametrize(("make", "breaks"), BREAKS, ids=[make.__name__ for make, _ in BREAKS])
@pytest.mark.parametrize("law", LAWS)
def test_a_law_is_broken_by_those_who_break_it(law: str, make: Callable[[], Model], breaks: set[str]) -> None:
    """No other model is accused. The sentence names the law, the step, the stream, and what was found there."""
    if law not in breaks:
        LAWS[law](make)
        return
    with pytest.raises(LawBroken, match=rf"^{law}: (after )?step \d+, stream \d+: .*(differs: \S+ and|number: )"):
        LAWS[law](make)


def test_every_law_is_broken_by_one() -> None:
    """A law that nothing breaks would be no law."""
    assert set().union(*(breaks for _, breaks in BREAKS)) == set(LAWS)


def test_the_sentence_tells_where_and_what() -> None:
    """Law, step, stream, output, feature and both numbers, which are those of the models."""
    with pytest.raises(LawBroken) as told:
        streaming_is_offline(broken.forgetful(), offline, X)
    mine, right = X[1, 0, 0], offline(X)["y"][1, 0, 0]
    detail = f"step 2, stream 1: y of 'a' differs: {mine!s} and {right!s} (stepped, then as one sequence)"
    assert (told.value.law, told.value.detail) == ("streaming is offline", detail)
    assert str(told.value) == f"streaming is offline: {detail}"
    with pytest.raises(LawBroken, match=r"^rollback is an identity: after step 1, stream 1: state h differs: \S+ and"):
        rollback_is_an_identity(broken.WritingInPlace(), X)


def test_the_rnn_operator_rounds() -> None:
    """A row that is alone in its call gets other last bits, which a tolerance of 1e-6 lets pass."""
    x = np.random.default_rng(5).standard_normal((20, 9, 2)).astype(np.float32)
    model = broken.rnn_operator()
    with pytest.raises(LawBroken, match="company does not matter: "):
        company_does_not_matter(model, x, sizes=(9,))
    with pytest.raises(LawBroken, match="order does not matter: "):
        order_does_not_matter(model, x)
    company_does_not_matter(model, x, sizes=(9,), tolerance=1e-6)
    order_does_not_matter(model, x, tolerance=1e-6)


def test_a_tolerance_is_in_standard_deviations() -> None:
    """Half of it passes, and twice of it does not; a single row is judged by the spread of other readings."""
    model, spread = broken.sound(), offline(X)["y"].std(axis=(0, 1))  # [F], larger than the readings' own

    def off(share: float) -> Callable[[Array], dict[str, Array]]:
        return lambda x: {"y": offline(x)["y"].astype(np.float64) + share * 1e-4 * spread}

    for x in (X, X[:1, :1]):
        agrees_with(model, off(0.5), x, 1e-4, spread_of=X)
        with pytest.raises(LawBroken, match="agrees with: step 1, stream 1: y of 'a' differs: "):
            agrees_with(model, off(2.0), x, 1e-4, spread_of=X)


def test_what_could_not_fail_is_refused() -> None:
    """One stream has no company, one timestep nothing to be cut, and a reference without numbers says nothing."""
    model = broken.sound()
    among: list[Callable[..., None]] = [company_does_not_matter, order_does_not_matter]
    for law in among:
        with pytest.raises(DataError, match=r"x is 12 × 1 .* can fail from 1 timesteps of 2 streams on"):
            law(model, X[:, :1])
    along: list[Callable[..., None]] = [cuts_do_not_matter, restored_goes_on]
    for law in along:
        with pytest.raises(DataError, match=r"x is 1 × 5 .* can fail from 2 timesteps of 1 streams on"):
            law(model, X[:1])
    with pytest.raises(ValueError, match=r"gives \['z'\], none of them numbers that 'broken' gives"):
        agrees_with(model, lambda x: {"z": x}, X)
    with pytest.raises(LawBroken, match="the whole sequence has no output 'y'"):
        streaming_is_offline(model, lambda x: {"z": x}, X)


def written(folder: Path, *, keep: float = 0.5, whole: float | None = 0.5) -> Path:
    """The smoother h' = keep · h + x as a file, beside it the sequence form with `whole`, if any."""
    step = smoother()
    step.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.array(keep, np.float32), "half"))
    path = folder / "smoother.onnx"
    path.write_bytes(stamped(step, smoother_contract()))
    if whole is not None:
        (folder / "smoother.sequence.onnx").write_bytes(_scan(whole).SerializeToString())
    return path


def _scan(keep: float) -> onnx.ModelProto:
    """x [T, B, 2] → y [T, B, 2] by an ONNX Scan."""
    text = f"""<ir_version: 8, opset_import: ["" : 18]>
    smoother (float[T, B, 2] x) => (float[T, B, 2] y) {{
        zero = Constant <value_int = 0> ()
        first = Gather <axis = 0> (x, zero)
        birth = Sub (first, first)
        last, y = Scan <num_scan_inputs = 1, body = walk (float[B, 2] h, float[B, 2] row)
            => (float[B, 2] next, float[B, 2] shown) {{
            half = Constant <value_float = {keep}> ()
            kept = Mul (h, half)
            next = Add (kept, row)
            shown = Identity (next)
        }}> (birth, x)
    }}"""
    return onnx.parser.parse_model(text)


def test_all_laws_of_a_file(tmp_path: Path) -> None:
    """A sound file keeps them all, on given readings too; they come by name, and without torch's where it has none."""
    data: dict[str, Array] = {"a": X[:, 0], "b": X[:7, 1]}
    found = laws_of(written(tmp_path), data)
    assert [str(law) for law in found] == [law for law in LAWS if law != "agrees with"]
    for law in found:
        law()
    check_model(tmp_path / "smoother.onnx", data, seed=4)


def test_a_file_that_breaks_a_law_is_told(tmp_path: Path) -> None:
    """Its sequence file computes something else, or is not there; without it the others are kept."""
    path = written(tmp_path, keep=0.25)
    with pytest.raises(LawBroken, match="streaming is offline: step 2, stream 1: y differs: "):
        check_model(path)
    check_model(written(tmp_path, whole=0.5), sequence=True)
    (tmp_path / "smoother.sequence.onnx").unlink()
    missing = "streaming is offline: there is no sequence file 'smoother.sequence.onnx' beside the model"
    with pytest.raises(LawBroken, match=re.escape(missing)):
        check_model(path)
    check_model(path, sequence=False)


def test_given_readings_can_break_a_law(tmp_path: Path) -> None:
    """What is drawn may never come near a fault: data is stepped as well, and refused in another shape."""
    path = tmp_path / "pump.onnx"
    path.write_bytes(detector())
    with pytest.raises(LawBroken, match="outputs are finite: step 3, stream 1: score is not a finite number: inf"):
        check_model(path, {"a": np.array([[1, 1], [1, 1], [1e30, 1]], np.float32)}, sequence=False)
    with pytest.raises(DataError, match=r"stream 'a' has shape \[5, 3\]"):
        laws_of(path, {"a": np.zeros((5, 3))})
    with pytest.raises(ModelError):
        laws_of(tmp_path / "absent.onnx")
