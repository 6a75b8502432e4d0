"""What exactly-once costs, and how long a crash is felt: a real broker, real processes, an LSTM 8→64 (512 B of state).

    python benchmarks/exactly_once.py [throughput] [commits] [snapshots] [restore] [crash] [--client librdkafka]

Without a name all are run. Each prints a Markdown table and appends its figures to results/exactly_once.jsonl.
The broker (one node, from tests/broker) shares the machine with the service, so CPU time of the service's own process
stands beside wall time, and what is compared takes turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from confluent_kafka import Consumer, Producer, TopicPartition
from tests.broker.kafka_server import KafkaServer
from tests.broker.service_process import ServiceProcess, wait_until

from statestep.consumers.bench_model import lstm_step
from statestep.consumers.changelog import MARKER, StateCodec
from statestep.consumers.kafka_changelog import KafkaChangelog
from statestep.consumers.librdkafka_changelog import LibrdkafkaChangelog
from statestep.consumers.ports import Changelog
from statestep.consumers.restore import put
from statestep.consumers.store import Store
from statestep.runtime import Engine, StepModel

PARTITIONS = 4
FEATURES = 8
RESULTS = Path(__file__).with_name("results") / "exactly_once.jsonl"
CLIENTS = ("kafka-python", "librdkafka")
GUARANTEES = ("exactly-once", "at-least-once")
CPU = "process_cpu_seconds_total"


class Bench:
    """A broker, a model, and topics of their own for every run."""

    def __init__(self, folder: Path, servers: str, clients: tuple[str, ...]):
        self.folder, self.servers, self.clients = folder, servers, clients
        self.model = folder / "lstm.onnx"
        self.model.write_bytes(lstm_step(FEATURES, 64))
        self._producer = Producer({"bootstrap.servers": servers, "linger.ms": 5, "queue.buffering.max.messages": 10**6})

    def topic(self) -> str:
        """A new input topic."""
        from kafka import KafkaAdminClient

        name = f"in-{uuid.uuid4().hex[:8]}"
        with KafkaAdminClient(bootstrap_servers=self.servers) as admin:
            admin.create_topics({name: {"num_partitions": PARTITIONS}}, wait_for_metadata=True)
        return name

    def fill(self, topic: str, messages: int, streams: int, rate: float | None = None) -> None:
        """Write messages, streams in turn; `rate` a second, or as fast as it goes."""
        rng = np.random.default_rng(0)
        rows = [json.dumps({f"s{i}": float(v) for i, v in enumerate(row)}).encode() for row in rng.normal(size=(97, 8))]
        began = time.monotonic()
        for n in range(messages):
            stream = n % streams
            if rate and n % 20 == 0:
                time.sleep(max(0.0, n / rate - (time.monotonic() - began)))
            while True:
                try:
                    self._producer.produce(topic, rows[n % 97], b"stream-%d" % stream, partition=stream % PARTITIONS)
                    break
                except BufferError:
                    self._producer.poll(0.1)
            self._producer.poll(0)
        self._producer.flush()

    def service(self, topic: str, app: str, client: str, *more: str) -> ServiceProcess:
        """`statestep run`, killed at the end of a `with`; its log is in the folder."""
        log = self.folder / f"{uuid.uuid4().hex[:8]}.log"
        arguments = ["--model", str(self.model), "--bootstrap-servers", self.servers, "--input", topic]
        arguments += ["--output", f"{app}-out", "--app-id", app, "--client", client, *more]
        return ServiceProcess(log, *arguments)

    def consumed(self, process: ServiceProcess, topic: str) -> float:
        """Messages that count so far."""
        samples = (f'statestep_records_consumed_total{{partition="{p}",topic="{topic}"}}' for p in range(PARTITIONS))
        return sum(process.metric(sample) for sample in samples)


def throughput(bench: Bench) -> list[dict[str, Any]]:
    """Messages a second of both guarantees, in turns, catching up with what lies there."""
    rows: list[dict[str, Any]] = []
    messages, streams = 120_000, 2_000
    topic = bench.topic()
    bench.fill(topic, messages, streams)
    for client in bench.clients:
        for turn in range(3):
            for guarantee in GUARANTEES:
                app = f"app-{uuid.uuid4().hex[:8]}"
                with bench.service(topic, app, client, "--guarantee", guarantee) as process:
                    wait_until(lambda p=process: bench.consumed(p, topic) > 0, "the first commit")  # type: ignore[misc]
                    first, cpu = bench.consumed(process, topic), process.metric(CPU)
                    began = time.monotonic()
                    wait_until(lambda p=process: bench.consumed(p, topic) >= messages, "the rest", 300)  # type: ignore[misc]
                    took, work, n = time.monotonic() - began, process.metric(CPU) - cpu, messages - first
                row = {
                    "client": client,
                    "guarantee": guarantee,
                    "turn": turn,
                    "per_s": n / took,
                    "cpu_us": 1e6 * work / n,
                }
                rows.append(row)
    print("| client | guarantee | messages/s | CPU µs/message | of at-least-once |\n| --- | --- | ---: | ---: | ---: |")
    for client in bench.clients:
        found = {g: [r for r in rows if (r["client"], r["guarantee"]) == (client, g)] for g in GUARANTEES}
        rates = {g: [float(row["per_s"]) for row in found[g]] for g in GUARANTEES}
        works = {g: statistics.median(float(row["cpu_us"]) for row in found[g]) for g in GUARANTEES}
        ratio = statistics.median(a / b for a, b in zip(*rates.values(), strict=True))
        for guarantee, share in zip(GUARANTEES, (ratio, 1.0), strict=True):
            rate = statistics.median(rates[guarantee])
            print(f"| {client} | {guarantee} | {rate:,.0f} | {works[guarantee]:.1f} | {share:.2f} |")
    return rows


def commits(bench: Bench) -> list[dict[str, Any]]:
    """How long a transaction takes, by commit interval, at 2,000 messages a second over 2,000 streams."""
    rows = []
    print("| client | commit interval ms | transactions | mean ms |\n| --- | ---: | ---: | ---: |")
    for client in bench.clients:
        for interval in (20, 100, 500, 1000):
            topic, app = bench.topic(), f"app-{uuid.uuid4().hex[:8]}"
            with bench.service(topic, app, client, "--commit-interval-ms", str(interval)) as process:
                process.wait_until_ready()
                bench.fill(topic, 20_000, 2_000, rate=2_000)
                wait_until(lambda p=process, t=topic: bench.consumed(p, t) >= 20_000, "all of it")  # type: ignore[misc]
                stage = 'statestep_stage_duration_seconds_{}{{stage="commit"}}'
                count, total = (process.metric(stage.format(part)) for part in ("count", "sum"))
            rows.append(
                {"client": client, "interval_ms": interval, "transactions": count, "mean_ms": 1e3 * total / count}
            )
            print(f"| {client} | {interval} | {count:,.0f} | {1e3 * total / count:.1f} |")
    return rows


def snapshots(bench: Bench) -> list[dict[str, Any]]:
    """Bytes written to the changelog per message, by snapshot interval: 1,000 streams, each once a second, for 30 s."""
    rows = []
    print("| snapshot interval s | changelog bytes/message |\n| ---: | ---: |")
    for interval in (0, 1, 10, 60):
        topic, app = bench.topic(), f"app-{uuid.uuid4().hex[:8]}"
        with bench.service(topic, app, bench.clients[-1], "--snapshot-interval-ms", str(interval * 1000)) as process:
            process.wait_until_ready()
            bench.fill(topic, 30_000, 1_000, rate=1_000)
            wait_until(lambda p=process, t=topic: bench.consumed(p, t) >= 30_000, "all of it")  # type: ignore[misc]
            written = process.metric("statestep_snapshot_bytes_total")
        rows.append({"interval_s": interval, "bytes_per_message": written / 30_000})
        print(f"| {interval} | {written / 30_000:,.0f} |")
    return rows


def kept(bench: Bench, streams: int) -> tuple[str, str]:
    """A topic and an application whose changelog holds so many streams, nothing dirty."""
    topic, app = bench.topic(), f"app-{uuid.uuid4().hex[:8]}"
    bench.fill(topic, streams, streams)
    with bench.service(topic, app, bench.clients[-1]) as process:
        wait_until(lambda: bench.consumed(process, topic) >= streams, "all streams", 300)
        process.terminate()
    return topic, app


def restore(bench: Bench) -> list[dict[str, Any]]:
    """States a second of CPU time from changelog to engine, by client, and from the local store."""
    streams = 100_000
    _, app = kept(bench, streams)
    model = StepModel.load(bench.model)
    rows = []

    def measured(name: str, changelog: Changelog | None, store: Store) -> None:
        engine, codec = Engine(model, streams), StateCodec(model.contract)
        began, cpu = time.monotonic(), time.process_time()
        for partition in range(PARTITIONS):
            if changelog is not None:
                found = {}
                changelog.open(partition)
                while not changelog.finished(partition):
                    for record in changelog.read(20_000):
                        found[record.key] = record
                changelog.shut(partition)
                found.pop(MARKER)
                put(engine, codec, list(found.values()), 0)
                continue
            after = None
            while records := store.load(partition, after, 20_000):
                after = records[-1].key
                put(engine, codec, records, 0)
        took, work = time.monotonic() - began, time.process_time() - cpu
        assert len(engine) == streams
        rows.append({"from": name, "streams": streams, "wall_per_s": streams / took, "cpu_per_s": streams / work})

    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(folder, "bench")
        made: dict[str, Any] = {"kafka-python": KafkaChangelog, "librdkafka": LibrdkafkaChangelog}
        for client in CLIENTS:
            properties = {"bootstrap_servers": [bench.servers]}
            changelog = made[client](app, properties)
            measured(client, changelog, store)
            changelog.close()
        changelog = LibrdkafkaChangelog(app, {"bootstrap_servers": [bench.servers]})
        for partition in range(PARTITIONS):
            changelog.open(partition)
            while not changelog.finished(partition):
                store.apply(changelog.read(20_000), {partition: changelog.position(partition)})
            changelog.shut(partition)
        changelog.close()
        measured("local store", None, store)
        store.close()
    print("| from | states/s | states/s of CPU time |\n| --- | ---: | ---: |")
    for row in rows:
        print(f"| {row['from']} | {row['wall_per_s']:,.0f} | {row['cpu_per_s']:,.0f} |")
    return rows


class Watch:
    """When committed outputs became visible, from a thread of its own."""

    def __init__(self, servers: str, topic: str):
        self._consumer = Consumer(
            {"bootstrap.servers": servers, "group.id": uuid.uuid4().hex, "isolation.level": "read_committed"}
        )
        self._consumer.assign([TopicPartition(topic, p, -1) for p in range(PARTITIONS)])
        self.seen: list[tuple[float, int]] = []  # (time, partition)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._stop.is_set():
            found = self._consumer.consume(1000, timeout=0.05)
            now = time.monotonic()
            self.seen += [(now, message.partition()) for message in found if message.error() is None]

    def close(self) -> None:
        """Let go."""
        self._stop.set()
        self._thread.join()
        self._consumer.close()


def crash(bench: Bench, rounds: int = 12) -> list[dict[str, Any]]:
    """kill -9 to outputs of every partition again, 100,000 streams: restarted under its name, or taken over."""
    rows = []
    client = bench.clients[-1]
    for how in ("same instance id", "same, local store", "another member"):
        topic, app = kept(bench, 100_000)
        watch = Watch(bench.servers, f"{app}-out")
        stop = threading.Event()

        def feed(topic: str = topic, stop: threading.Event = stop) -> None:
            while not stop.is_set():
                bench.fill(topic, 1_000, 100_000, rate=1_000)

        feeder = threading.Thread(target=feed, daemon=True)
        feeder.start()
        gaps: list[float] = []

        def start(name: str, app: str = app, topic: str = topic, how: str = how) -> ServiceProcess:
            more = ["--instance-id", name] if how != "another member" else []
            more += ["--state-dir", str(bench.folder / f"{app}-{name}")] if how == "same, local store" else []
            return bench.service(topic, app, client, *more)

        living = [start("one")] if how != "another member" else [start("one"), start("two")]
        for process in living:
            process.wait_until_ready()
        for number in range(rounds if how != "another member" else max(rounds // 2, 1)):
            time.sleep(2)
            victim = living.pop(0)
            victim.kill()
            killed = time.monotonic()
            if how != "another member":
                living.append(start("one"))
            # Every partition has to answer again; outputs committed before the kill may still be on their way.
            began = killed + 0.3

            def back(began: float = began, watch: Watch = watch) -> bool:
                return {p for at, p in watch.seen[-20_000:] if at > began} == set(range(PARTITIONS))

            wait_until(back, "outputs of every partition", 120)
            first = {p: at for at, p in reversed(watch.seen) if at > began}
            gaps.append(max(first.values()) - killed)
            if how == "another member":
                living.append(start(f"m{number}"))
            living[-1].wait_until_ready()
        stop.set()
        feeder.join()
        for process in living:
            process.kill()
        watch.close()
        rows.append({"how": how, "client": client, "gaps_s": gaps})
    print("| restart | kills | p50 s | p99 s |\n| --- | ---: | ---: | ---: |")
    for row in rows:
        waits = np.array(row["gaps_s"])
        print(f"| {row['how']} | {len(waits)} | {np.percentile(waits, 50):.1f} | {np.percentile(waits, 99):.1f} |")
    return rows


ALL = {"throughput": throughput, "commits": commits, "snapshots": snapshots, "restore": restore, "crash": crash}


def main() -> None:
    """Run what is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *ALL], default=[])
    parser.add_argument("--client", choices=CLIENTS, help="this client alone")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, KafkaServer(Path(name) / "kafka") as kafka:
        bench = Bench(Path(name), kafka.bootstrap_servers, (given.client,) if given.client else CLIENTS)
        for chosen in given.names or ALL:
            print(f"\n{chosen}\n")
            rows = ALL[chosen](bench)
            with RESULTS.open("a") as file:
                file.write(json.dumps({"at": time.strftime("%Y-%m-%d"), "what": chosen, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
