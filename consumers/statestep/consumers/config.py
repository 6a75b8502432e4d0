"""The settings of `statestep run`: from flags, then the environment, then a TOML file, then these defaults.

A setting called `http_port` is `--http-port`, `STATESTEP_HTTP_PORT` and `http_port = 9464`. What is not known is
refused wherever it comes from: a misspelt setting that is passed by in silence is found at night.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from statestep.consumers.codec import MAX_DEAD_LETTER_BYTES, MAX_MESSAGE_BYTES
from statestep.consumers.http import DEFAULT_PORT
from statestep.consumers.kafka_client import client_properties
from statestep.consumers.times import parse_time, seconds_of
from statestep.runtime.silence import OnGap

PREFIX = "STATESTEP_"
TESTS = "STATESTEP_TEST_"  # the test suite's own
SHA256 = r"^[0-9A-Fa-f]{64}$"
TABLES = {"kafka": "Kafka client properties", "states": "state pairs", "constants": "constant inputs"}
FLAGS = {"states": "state", "constants": "set"}  # of settings that a flag gives one at a time
SPANS = "12h, 7d or 2w"  # examples of how long a stream may be silent
TOPIC = r"^[A-Za-z0-9._-]{1,249}$"  # what a broker accepts as a topic's name


class ConfigError(ValueError):
    """A setting that is unknown, missing or wrong: one sentence."""


def _start(value: str) -> str:
    if value not in ("earliest", "latest") and parse_time(value) is None:
        raise ValueError("must be earliest, latest or a time (ISO 8601 or epoch seconds)")
    return value


def span(flag: str, text: str | None, such: str) -> float | None:
    """The length of time that a flag was given, in seconds; None where it was not. Raises `ConfigError`.

    >>> span("--budget", "5m", "90s, 5m or 1h")
    300.0
    """
    seconds = None if text is None else seconds_of(text)
    if text is not None and seconds is None:
        raise ConfigError(f"{flag} is {text!r}: it must be a time such as {such}")
    return seconds


def _span(value: str | None) -> str | None:
    if value is not None and seconds_of(value) is None:
        raise ValueError(f"must be a time such as {SPANS}")
    return value


class Settings(BaseSettings):
    """Everything that can be set for the Kafka service."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    model: Path = Field(description="The step model, an .onnx file.")
    model_sha256: str | None = Field(
        None, pattern=SHA256, description="The SHA-256 of the model file, in hex; any other file is refused."
    )
    states: dict[str, str] = Field(
        {}, description='State pairs of a model without a contract, {in = "out"} or {in = "out:AXIS"}.'
    )
    constants: dict[str, Any] = Field({}, description="Inputs of the model that never change, {name = value}.")
    features: str | int | None = Field(
        None, description="Of a model without a contract: its features' names, separated by commas, or their number."
    )
    bootstrap_servers: str = Field(min_length=1, description="Kafka brokers, host:port separated by commas.")
    input: str = Field(pattern=TOPIC, description="The topic to read.")
    output: str = Field(pattern=TOPIC, description="The topic to write predictions to.")
    app_id: str = Field(
        pattern=r"^[A-Za-z0-9._-]{1,200}$",
        description="Names the application: consumer group, client, and the beginning of its own topics' names.",
    )
    dead_letters: str | None = Field(None, pattern=TOPIC, description="Dead letter topic; <app-id>-dlq by default.")
    events: str | None = Field(None, pattern=TOPIC, description="A topic for beginnings and ends of events; else none.")
    start: Annotated[str, AfterValidator(_start)] = Field(
        "earliest", description="Where a new application id begins: earliest, latest or a time."
    )
    create_topics: bool = Field(True, description="Create the topics that are written to where they are missing.")
    time: str = Field("ts", description="The message's field that holds its time; else the record's own time is taken.")
    key: str | None = Field(None, description="The field that names the stream; by default the record's key does.")
    on_gap: OnGap = Field(
        "measured", description="What is done where a stream was silent: as the model measured, or one way always."
    )
    expire_after: Annotated[str | None, AfterValidator(_span)] = Field(
        None, description="A stream that was silent for so long, by event time, is a new one; else never."
    )
    on_bad_message: Literal["dead-letter", "skip", "fail"] = Field(
        "dead-letter", description="What happens to a message that cannot be applied."
    )
    guarantee: Literal["exactly-once", "at-least-once"] = Field(
        "exactly-once", description="Whether outputs count only together with the states and offsets they belong to."
    )
    client: Literal["kafka-python", "librdkafka"] = Field("kafka-python", description="The Kafka client to use.")
    instance_id: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9._-]{1,100}$",
        description="A lasting name of this process, such as its pod's: a restart under it takes over at once.",
    )
    max_streams: int = Field(
        1_000_000, ge=1, description="Streams in memory at most; more wait in --state-dir, or stop the service."
    )
    state_dir: Path | None = Field(
        None,
        description="A directory for a local copy of the states, one process each: quick restarts, more streams.",
    )
    batch_records: int = Field(4096, ge=1, le=1_000_000, description="Records applied and committed together at most.")
    batch_bytes: int = Field(16 << 20, ge=1, description="Bytes of records applied and committed together at most.")
    commit_interval_ms: int = Field(100, ge=0, le=60_000, description="How long a record waits for others.")
    snapshot_interval_ms: int = Field(
        10_000, ge=0, le=3_600_000, description="How old a state may grow before it is written; 0 writes each at once."
    )
    snapshot_bytes: int = Field(4 << 20, ge=1, description="Bytes of states written with one transaction at most.")
    session_timeout_ms: int = Field(10_000, ge=1000, description="Silence after which the group drops this process.")
    transaction_timeout_ms: int = Field(
        10_000, ge=1000, description="Silence after which the broker aborts a transaction."
    )
    on_model_change: Literal["reject", "cold"] = Field(
        "reject", description="What another model than the one that made the states does: stop, or start streams anew."
    )
    on_semantics_change: Literal["reject", "replay", "cold"] = Field(
        "reject", description="The same where a setting, release or machine type changed and messages must be replayed."
    )
    on_offset_mismatch: Literal["stop", "marker", "cold", "skip"] = Field(
        "stop", description="What happens where the group's offset is not the one that the states go with."
    )
    max_message_bytes: int = Field(MAX_MESSAGE_BYTES, ge=1, description="A larger value is a dead letter.")
    dead_letter_max_bytes: int = Field(MAX_DEAD_LETTER_BYTES, ge=0, description="A dead letter's value is cut to this.")
    http_host: str = Field("127.0.0.1", description="Where metrics and health are served.")
    http_port: int = Field(DEFAULT_PORT, ge=0, le=65535, description="Their port; 0 takes a free one.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="What is logged to stderr.")
    client_properties: Path | None = Field(None, description="A file of Kafka client properties, name=value a line.")
    kafka: dict[str, Any] = Field({}, description="More Kafka client properties; these win over the file's.")

    @property
    def dead_letter_topic(self) -> str:
        """Where refused records go."""
        return self.dead_letters or f"{self.app_id}-dlq"

    def by_hand(self) -> dict[str, Any]:
        """What is said of the model that its file does not say, as `StepModel` takes it."""
        return {
            "states": {name: output_of(output) for name, output in self.states.items()} or None,
            "constants": self.constants or None,
            "features": features_of(self.features),
        }

    def kafka_properties(self) -> dict[str, Any]:
        """What the Kafka clients are set up with. Raises `ConfigError`."""
        given = {} if self.client_properties is None else _properties_file(self.client_properties)
        try:
            servers = [server.strip() for server in self.bootstrap_servers.split(",")]
            return client_properties(given | self.kafka) | {"bootstrap_servers": servers}
        except ValueError as error:
            raise ConfigError(str(error)) from None


def output_of(text: str) -> str | tuple[str, int]:
    """A state's output, with its batch axis where it is given.

    >>> output_of("stateN:1"), output_of("stateN")
    (('stateN', 1), 'stateN')
    """
    name, colon, axis = text.rpartition(":")
    return (name, int(axis)) if name and colon and axis.isdecimal() else text


def features_of(given: str | int | None) -> int | list[str] | None:
    """The names of a model's features, or how many there are.

    >>> features_of("flow, level"), features_of("576")
    (['flow', 'level'], 576)
    """
    if isinstance(given, str) and not given.strip().isdecimal():
        return [name.strip() for name in given.split(",") if name.strip()]
    return None if given is None else int(given)


def load(
    path: Path | None,
    flags: Mapping[str, Any],
    environ: Mapping[str, str] | None = None,
    otherwise: Mapping[str, Any] | None = None,
) -> Settings:
    """Put the settings together. `flags` holds those that were given, None where one was not.

    `otherwise` stands in for what nobody gives and the caller has no use for.

    Raises `ConfigError` for the first thing that is unknown, missing or wrong.
    """
    variables = {name.upper(): value for name, value in (os.environ if environ is None else environ).items()}
    given = {name: value for name, value in flags.items() if value is not None}
    _refuse_unknown(variables)
    named = variables.get(f"{PREFIX}CONFIG")
    path = path or (Path(named) if named else None)
    if path is not None:
        _refuse_unreadable(path)
    if "KAFKA_BOOTSTRAP_SERVERS" in variables and f"{PREFIX}BOOTSTRAP_SERVERS" not in variables:
        given.setdefault("bootstrap_servers", variables["KAFKA_BOOTSTRAP_SERVERS"])

    class Loaded(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            assert isinstance(env_settings, EnvSettingsSource)
            env_settings.env_vars = {name.lower(): value for name, value in variables.items()}
            file = () if path is None else (TomlConfigSettingsSource(settings_cls, path),)
            return init_settings, env_settings, *file, InitSettingsSource(settings_cls, dict(otherwise or {}))

    try:
        settings = Loaded(**given)
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from None
    except SettingsError as error:  # of the settings that are no plain values
        named = next((name for name in TABLES if f'"{name}"' in str(error)), "kafka")
        raise ConfigError(f"{PREFIX}{named.upper()} must be a JSON object of {TABLES[named]}") from None
    topics = [
        settings.input,
        settings.output,
        settings.dead_letter_topic,
        *([settings.events] if settings.events else []),
    ]
    if len(set(topics)) < len(topics):  # the service would feed on what it writes
        names = "input, output, dead letters and events" if settings.events else "input, output and dead letters"
        raise ConfigError(f"{names} need a topic each, they are {', '.join(topics)}")
    return settings


def describe(settings: Settings) -> str:
    """The settings as a TOML file that would give them; passwords are left out.

    Used by `run --print-config`.
    """
    lines = []
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if value is None or value == {}:
            continue
        if isinstance(value, dict):
            pairs = ", ".join(f"{_toml(k)} = {_toml('***' if _secret(k) else v)}" for k, v in value.items())
            lines.append(f"{name} = {{ {pairs} }}")
        else:
            lines.append(f"{name} = {_toml(value)}")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    """A value as TOML writes it; JSON's way of writing strings is one of TOML's."""
    return json.dumps(value if isinstance(value, int | float | list) else str(value), ensure_ascii=False)


def _secret(name: str) -> bool:
    return any(word in name.lower() for word in ("password", "jaas", "secret", "token"))


def _refuse_unknown(variables: Mapping[str, str]) -> None:
    known = {name.upper() for name in ("config", *Settings.model_fields)}
    for name in sorted(variables):
        ours = name.removeprefix(PREFIX)
        if name.startswith(PREFIX) and ours not in known and not name.startswith(TESTS):
            raise ConfigError(f"the environment variable {name} is no setting{_nearest(ours, known, PREFIX)}")


def _refuse_unreadable(path: Path) -> None:
    try:
        keys = tomllib.loads(path.read_text(encoding="utf-8")).keys()
    except OSError as error:
        raise ConfigError(f"the configuration {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration {path} is not TOML: {error}") from None
    for key in keys:
        if key not in Settings.model_fields:
            raise ConfigError(f"{path}: {key!r} is no setting{_nearest(key, set(Settings.model_fields))}")


def _nearest(name: str, known: set[str], prefix: str = "") -> str:
    if close := get_close_matches(name, known, n=1):
        return f"; did you mean {prefix}{close[0]}?"
    return f"; there are {', '.join(prefix + other for other in sorted(known))}"


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else "configuration"
    flag = f"--{FLAGS.get(name, name).replace('_', '-')}"
    if first["type"] == "missing":
        return f"{flag} is missing; give it, or {PREFIX}{name.upper()}, or {name} in the configuration file"
    reason = first["msg"].removeprefix("Value error, ").removeprefix("Input should ").removeprefix("String should ")
    value = "not understood" if name == "kafka" else repr(first["input"])  # it may hold a password
    return f"{flag} is {value}: it must {reason.removeprefix('must ')}"


def _properties_file(path: Path) -> dict[str, str]:
    """A Java properties file: name=value a line, # and ! begin comments."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"the Kafka properties {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"the Kafka properties {path} are not UTF-8: {error}") from None
    found = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line[0] in "#!":
            continue
        name, equals, value = line.partition("=")
        if not equals:
            raise ConfigError(f"{path}: line {number} is no name=value")  # and may hold a password
        found[name.strip()] = value.strip()
    return found
