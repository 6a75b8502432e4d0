"""Services over a real cluster of three nodes, input that never stops, and one fault after the other.

    python -m tests.broker.chaos --faults 150 --seed 7 --client librdkafka

At the end the input stops, everything heals, and what a reader of committed records finds in the output and dead
letter topics is held by `judge` against one uninterrupted run: every message answered once, in order, to the last bit.
Each run appends a line to `chaos.jsonl`. A seed gives the same faults and the same input again, not the same timing.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from kafka.errors import KafkaError

from ..models import detector
from .cluster import Cluster
from .faults import KINDS, NAMED, SESSION_SECONDS, Chaos, plan
from .feed import MAX_MESSAGE_BYTES, PERIOD_SECONDS, Feed
from .judge import Verdict, judge
from .kafka_server import KafkaServerError
from .members import Members
from .progress import Progress, read_topic

HISTORY = Path(__file__).with_name("chaos.jsonl")
PARTITIONS = 4
SERVICES = 3
RATE = 200.0  # messages a second
OVERLAPS = 0.25  # the share of faults after which nobody waits until they have healed


@dataclass(slots=True)
class Fault:
    """One fault and what was seen of it."""

    kind: str
    at_seconds: float
    seen: str = ""
    healed_seconds: float | None = None  # from its end until everything sent before that was answered


@dataclass(slots=True)
class Report:
    """One run."""

    faults: list[Fault] = field(default_factory=list)
    verdict: Verdict = field(default_factory=Verdict)
    restarts: int = 0  # after an exit with 75
    failed_starts: int = 0  # of services that found no broker
    unsent: int = 0
    seconds: float = 0.0
    failure: str = ""  # empty where the run passed


def play(
    folder: Path,
    cluster: Cluster,
    kinds: Sequence[str],
    *,
    seed: int,
    app_id: str = "chaos",
    client: str = "kafka-python",
    guarantee: str = "exactly-once",
    seconds: float = float("inf"),
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Bring about the faults `kinds` one after the other, or those that `seconds` leave time for, and judge.

    The application's topics and its folder are named after it, so that several may follow each other on one cluster.
    """
    began = time.monotonic()
    report = Report()
    rng = random.Random(seed)
    model = detector(period_seconds=PERIOD_SECONDS)
    place = folder / app_id
    place.mkdir()
    readings = f"{app_id}-readings"
    try:
        with ExitStack() as stack:
            with cluster.admin() as admin:
                admin.create_topics({readings: {"num_partitions": PARTITIONS}}, wait_for_metadata=True)
            arguments = service_arguments(place, model, cluster, rng, app_id, client, guarantee)
            members = stack.enter_context(Members(place, arguments))
            stack.callback(count_restarts, members, report)
            progress = stack.enter_context(closing(Progress(cluster, app_id, readings, PARTITIONS)))
            feed = Feed(cluster.bootstrap_servers, readings, PARTITIONS, seed=seed, rate=RATE)
            feed.start()
            stack.callback(feed.stop)
            for n in range(SERVICES):
                members.start(f"service-{n}")
            members.wait_until_ready()
            say(f"ready after {time.monotonic() - began:.0f} s; restarts: after exit 75 + for want of a broker")
            chaos = Chaos(cluster, app_id, members, progress, rng)
            chaos.wait_until_healed()  # every partition has been begun
            break_things(chaos, kinds, report, began, seconds, say)
            feed.stop()
            report.unsent = feed.failed.total()
            settle(chaos)
            topics = (readings, f"{app_id}-predictions", f"{app_id}-dlq", f"{app_id}-state-changelog")
            report.verdict = judge(model, readings, *(read_topic(cluster, topic) for topic in topics))
            report.failure = report.verdict.faults(doubles=guarantee == "at-least-once")
    except (AssertionError, KafkaError, KafkaServerError) as error:
        report.failure = f"{type(error).__name__}: {error}"
    report.seconds = time.monotonic() - began
    return report


def break_things(
    chaos: Chaos, kinds: Sequence[str], report: Report, began: float, seconds: float, say: Callable[[str], None]
) -> None:
    """The faults. After most of them what was sent must be answered before the next; some follow at once."""
    for kind in kinds:
        fault = Fault(kind, time.monotonic() - began)
        if fault.at_seconds > seconds:
            return
        report.faults.append(fault)
        say(f"{fault.at_seconds:6.0f} s  {kind} …")
        fault.seen = KINDS[kind](chaos)
        if chaos.rng.random() >= OVERLAPS:
            fault.healed_seconds = chaos.wait_until_healed()
            chaos.pass_time(0, 2)
        healed = "not waited for" if fault.healed_seconds is None else f"{fault.healed_seconds:.1f} s to heal"
        say(f"{'':10}{fault.seen}; {healed}; restarts so far {chaos.members.restarts} + {chaos.members.failed_starts}")


def count_restarts(members: Members, report: Report) -> None:
    """How often the supervisor had to do something."""
    report.restarts, report.failed_starts = members.restarts, members.failed_starts


def settle(chaos: Chaos) -> None:
    """Nothing more is sent or broken: all is answered and written, and every service must end when it is told to."""
    chaos.cluster.wait_until_whole()
    chaos.wait_until_healed()
    chaos.wait_until_written()
    for name in chaos.members.names:
        chaos.members.terminate(name)


def service_arguments(
    folder: Path, model: bytes, cluster: Cluster, rng: random.Random, app_id: str, client: str, guarantee: str
) -> Callable[[str, Path], Sequence[str]]:
    """The arguments of a service by its name and the folder of its state. Those in `NAMED` are named to the group."""
    path = folder / "model.onnx"
    path.write_bytes(model)
    common = {
        "model": str(path),
        "model_sha256": sha256(model).hexdigest(),
        "bootstrap_servers": cluster.bootstrap_servers,
        "app_id": app_id,
        "input": f"{app_id}-readings",
        "output": f"{app_id}-predictions",
        "client": client,
        "guarantee": guarantee,
        "snapshot_interval_ms": rng.choice([0, 500, 2000, 10_000]),
        "max_message_bytes": MAX_MESSAGE_BYTES,
    }
    quick = ["--kafka", f"session.timeout.ms={SESSION_SECONDS * 1000:.0f}", "--kafka", "heartbeat.interval.ms=1000"]

    def arguments(name: str, state: Path) -> Sequence[str]:
        settings = common | {"state_dir": str(state)} | ({"instance_id": name} if name in NAMED else {})
        config = state.with_suffix(".toml")  # not by the name: another of this name may not have read its own yet
        config.write_text("".join(f"{setting} = {json.dumps(value)}\n" for setting, value in settings.items()))
        return ["--config", str(config), *quick]

    return arguments


def line(report: Report, tested: str, seed: int, client: str, guarantee: str) -> str:
    """What `chaos.jsonl` keeps of a run; `tested` is the release."""
    return json.dumps(
        {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "release": tested,
            "seed": seed,
            "client": client,
            "guarantee": guarantee,
            "faults": dict(sorted(Counter(fault.kind for fault in report.faults).items())),
            "messages": report.verdict.messages,
            "answers": report.verdict.answers,
            "missing": len(report.verdict.missing),
            "doubled": len(report.verdict.doubled),
            "streams": report.verdict.streams,
            "restarts": report.restarts,
            "failed_starts": report.failed_starts,
            "seconds": round(report.seconds),
            "result": report.failure.splitlines()[0] if report.failure else "passed",
        }
    )


def release() -> str:
    """The version, and the commit where the code lies in a repository."""
    described = ["git", "-C", str(HISTORY.parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(described, capture_output=True, text=True).stdout.strip()
    return f"{version('statestep')}+{commit}" if commit else version("statestep")


def table(report: Report) -> str:
    """The faults by kind, with the seconds until what was sent before their end was answered."""
    healed: dict[str, list[float]] = {fault.kind: [] for fault in report.faults}
    for fault in report.faults:
        if fault.healed_seconds is not None:
            healed[fault.kind].append(fault.healed_seconds)
    counts = Counter(fault.kind for fault in report.faults)
    lines = [f"{'fault':<18}{'times':>6}{'median s':>10}{'max s':>8}"]
    for kind, seconds in sorted(healed.items()):
        figures = f"{statistics.median(seconds):>10.1f}{max(seconds):>8.1f}" if seconds else f"{'–':>10}{'–':>8}"
        lines.append(f"{kind:<18}{counts[kind]:>6}{figures}")
    found = report.verdict
    lines.append(
        f"{found.messages} messages, {found.answers} answers, {len(found.missing)} missing, {len(found.doubled)} "
        f"doubled, {len(found.wrong)} wrong, {len(found.disordered)} out of order; {found.streams} streams, "
        f"{len(found.states)} states wrong; {report.unsent} could not be sent, "
        f"{report.restarts} restarts after exit 75, "
        f"{report.failed_starts} starts without a broker, {report.seconds:.0f} s"
    )
    return "\n".join(lines)


def main() -> int:
    """Play, print, and write the line."""
    parser = argparse.ArgumentParser(description="Faults on a real cluster, under statestep run.")
    parser.add_argument("--faults", type=int, default=15, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of faults and input")
    parser.add_argument("--client", choices=["kafka-python", "librdkafka"], default="kafka-python")
    parser.add_argument("--guarantee", choices=["exactly-once", "at-least-once"], default="exactly-once")
    parser.add_argument("--kinds", nargs="+", choices=sorted(KINDS), help="these faults alone")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no fault after so many")
    parser.add_argument("--folder", type=Path, help="where logs and data are kept; else they are deleted")
    options = parser.parse_args()
    kinds = plan(options.faults, random.Random(options.seed), options.kinds or tuple(KINDS))
    tested = release()
    print(f"{tested}, seed {options.seed}, {options.client}, {options.guarantee}")
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        report = play(
            folder,
            stack.enter_context(Cluster(folder / "kafka")),
            kinds,
            seed=options.seed,
            client=options.client,
            guarantee=options.guarantee,
            seconds=options.seconds,
            say=lambda text: print(text, flush=True),
        )
    print(table(report))
    with HISTORY.open("a") as history:
        history.write(line(report, tested, options.seed, options.client, options.guarantee) + "\n")
    print(f"FAILED: {report.failure}" if report.failure else "passed")
    return 1 if report.failure else 0


if __name__ == "__main__":
    sys.exit(main())
