"""Settings: flags win over the environment, that over the file, and what is not understood is refused by name."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from statestep.consumers.config import ConfigError, Settings, describe, load

NEEDED = {"model": "m.onnx", "bootstrap_servers": "k:9092", "input": "in", "output": "out", "app_id": "app"}


def loaded(environ: dict[str, str] | None = None, path: Path | None = None, **flags: Any) -> Settings:
    return load(path, NEEDED | flags, environ or {})


def refused(environ: dict[str, str] | None = None, path: Path | None = None, **flags: Any) -> str:
    """The sentence, which has one line."""
    with pytest.raises(ConfigError) as error:
        loaded(environ, path, **flags)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    """A file that sets the port to 1, among others."""
    path = tmp_path / "statestep.toml"
    path.write_text('http_port = 1\nhttp_host = "file"\nkafka = { "client.rack" = "file", retries = 3 }\n')
    return path


def test_the_needed_settings_are_enough() -> None:
    """The others have defaults, dead letters go to a topic of the application's name."""
    settings = loaded()
    assert settings.model == Path("m.onnx")
    assert (settings.start, settings.create_topics, settings.http_host, settings.http_port) == (
        "earliest",
        True,
        "127.0.0.1",
        9464,
    )
    assert settings.dead_letter_topic == "app-dlq"
    assert loaded(dead_letters="bad").dead_letter_topic == "bad"
    assert (settings.events, loaded({"STATESTEP_EVENTS": "alarms"}).events) == (None, "alarms")
    assert settings.kafka_properties() == {"bootstrap_servers": ["k:9092"]}


@pytest.mark.parametrize(
    ("flag", "variable", "in_file", "expected"),
    [
        (None, None, False, 9464),
        (None, None, True, 1),
        (None, "2", True, 2),
        (3, None, True, 3),
        (3, "2", True, 3),
        (3, "2", False, 3),
        (None, "2", False, 2),
    ],
)
def test_flag_over_environment_over_file_over_default(
    toml: Path, flag: int | None, variable: str | None, in_file: bool, expected: int
) -> None:
    """Each setting by itself: one that is given nowhere else is still the file's."""
    environ = {} if variable is None else {"STATESTEP_HTTP_PORT": variable}
    settings = loaded(environ, toml if in_file else None, http_port=flag)
    assert settings.http_port == expected
    assert settings.http_host == ("file" if in_file else "127.0.0.1")


def test_the_needed_ones_may_come_from_anywhere(tmp_path: Path) -> None:
    """Model from the file, topics from the environment, in any case of letters."""
    path = tmp_path / "s.toml"
    path.write_text('model = "m.onnx"\napp_id = "app"\n')
    environ = {"STATESTEP_INPUT": "in", "statestep_output": "out", "STATESTEP_BOOTSTRAP_SERVERS": "k:1"}
    settings = load(path, {"input": None, "http_port": None}, environ)
    assert (settings.input, settings.output, settings.model) == ("in", "out", Path("m.onnx"))


def test_the_environment_may_name_the_file(toml: Path, tmp_path: Path) -> None:
    """STATESTEP_CONFIG does, unless a flag does."""
    assert loaded({"STATESTEP_CONFIG": str(toml)}).http_port == 1
    other = tmp_path / "other.toml"
    other.write_text("http_port = 7\n")
    assert loaded({"STATESTEP_CONFIG": str(toml)}, other).http_port == 7


def test_kafkas_usual_variable_is_taken(tmp_path: Path) -> None:
    """KAFKA_BOOTSTRAP_SERVERS counts as environment: after ours and the flag, before the file."""
    path = tmp_path / "s.toml"
    path.write_text('bootstrap_servers = "file:1"\n')
    usual, ours = {"KAFKA_BOOTSTRAP_SERVERS": "usual:1"}, {"STATESTEP_BOOTSTRAP_SERVERS": "ours:1"}
    assert loaded(usual, path, bootstrap_servers=None).bootstrap_servers == "usual:1"
    assert loaded(usual | ours, path, bootstrap_servers=None).bootstrap_servers == "ours:1"
    assert loaded(usual | ours, path, bootstrap_servers="flag:1").bootstrap_servers == "flag:1"
    assert loaded({}, path, bootstrap_servers=None).bootstrap_servers == "file:1"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "--model is missing; give it, or STATESTEP_MODEL, or model in the configuration file"),
    ({"app_id": None}, "--app-id is missing; give it, or STATESTEP_APP_ID, or app_id in the configuration file"),
    ({"input": "a b"}, "--input is 'a b': it must match pattern"),
    ({"output": "ü"}, "--output is 'ü': it must match"),
    ({"app_id": ""}, "--app-id is '': it must match"),
    ({"dead_letters": "x" * 250}, "--dead-letters is "),
    ({"bootstrap_servers": ""}, "--bootstrap-servers is '': it must have at least 1 character"),
    ({"start": "tomorrow"}, "--start is 'tomorrow': it must be earliest, latest or a time"),
    ({"on_bad_message": "ignore"}, "--on-bad-message is 'ignore': it must be 'dead-letter', 'skip' or 'fail'"),
    ({"log_level": "loud"}, "--log-level is 'loud': it must be 'debug', 'info', 'warning' or 'error'"),
    ({"max_streams": 0}, "--max-streams is 0: it must be greater than or equal to 1"),
    ({"batch_records": -1}, "--batch-records is -1"),
    ({"commit_interval_ms": 60_001}, "--commit-interval-ms is 60001: it must be less than or equal to 60000"),
    ({"http_port": 65_536}, "--http-port is 65536"),
    ({"http_port": "many"}, "--http-port is 'many': it must be a valid integer"),
    ({"create_topics": "maybe"}, "--create-topics is 'maybe': it must be a valid boolean"),
    ({"states": "h=hn"}, "--state is 'h=hn': it must be a valid dictionary"),
    ({"states": {"h": 5}}, "--state is 5: it must be a valid string"),
    ({"features": [1]}, "--features is [1]: it must be a valid string"),
    ({"output": "in"}, "input, output and dead letters need a topic each, they are in, in, app-dlq"),
    ({"dead_letters": "out"}, "need a topic each, they are in, out, out"),
    ({"input": "app-dlq"}, "need a topic each, they are app-dlq, out, app-dlq"),
    ({"events": "a b"}, "--events is 'a b': it must match pattern"),
    ({"events": "out"}, "input, output, dead letters and events need a topic each, they are in, out, app-dlq, out"),
    ({"events": "app-dlq"}, "need a topic each, they are in, out, app-dlq, app-dlq"),
]


@pytest.mark.parametrize(("flags", "sentence"), WRONG, ids=[sentence[:30] for _, sentence in WRONG])
def test_a_wrong_value_is_one_sentence(flags: dict[str, Any], sentence: str) -> None:
    """The setting as a flag, its value, and what it must be."""
    assert sentence in refused(**flags)


@pytest.mark.parametrize("start", ["earliest", "latest", "2024-01-01", "2024-01-01T00:00:00+02:00", "1700000000"])
def test_a_start_may_be_a_time(start: str) -> None:
    """ISO 8601 or a number since 1970."""
    assert loaded(start=start).start == start


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("STATESTEP_HTPP_PORT", "did you mean STATESTEP_HTTP_PORT?"),
        ("STATESTEP_CONFIGURATION", "did you mean STATESTEP_CONFIG?"),
        ("statestep_modell", "did you mean STATESTEP_MODEL?"),
        ("STATESTEP_", "there are STATESTEP_APP_ID, "),
        ("STATESTEP_QQQQ", "there are STATESTEP_APP_ID, "),
    ],
)
def test_an_unknown_variable_is_refused(variable: str, nearest: str) -> None:
    """A misspelt one would else be passed by in silence; the nearest name is told."""
    assert f"the environment variable {variable.upper()} is no setting; {nearest}" in refused({variable: "1"})


def test_variables_of_others_do_not_matter() -> None:
    """Those of the test suite, and whatever does not begin with our name."""
    environ = {"STATESTEP_TEST_BOOTSTRAP_SERVERS": "x", "HTTP_PORT": "1", "MY_STATESTEP_PORT": "1", "MODEL": "x"}
    assert loaded(environ).model_dump() == loaded().model_dump()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("http_prot = 1", "'http_prot' is no setting; did you mean http_port?"),
        ("[http]\nport = 1", "'http' is no setting"),
        ("http_port = ", "is not TOML"),
        ("http_port: 1", "is not TOML"),
        ("http_port = 'x'", "--http-port is 'x': it must be a valid integer"),
        ("kafka = 'sasl_password=secret'", "--kafka is not understood: it must be a valid dictionary"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    """No TOML, an unknown key, a wrong value; a value that may hold a password is not repeated."""
    path = tmp_path / "s.toml"
    path.write_text(text)
    found = refused(path=path)
    assert sentence in found
    assert "secret" not in found


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """It is not there, is a folder, or is not text."""
    assert "gone.toml cannot be read: No such file or directory" in refused(path=tmp_path / "gone.toml")
    assert "cannot be read: Is a directory" in refused({"STATESTEP_CONFIG": str(tmp_path)})
    (tmp_path / "latin.toml").write_bytes(b'model = "\xe4"')
    assert "is not TOML" in refused(path=tmp_path / "latin.toml")


class TestKafkaProperties:
    """Properties for the client, under the names that people know."""

    def test_all_sources_are_put_together(self, tmp_path: Path, toml: Path) -> None:
        """A properties file, then the TOML's table, then variables, then flags: the later wins, name by name."""
        properties = tmp_path / "client.properties"
        properties.write_text(
            "# a comment\n! another\n\nsecurity.protocol=SASL_PLAINTEXT\nsasl.mechanism = PLAIN\n"
            "sasl.password=a=b=c\nclient.rack=properties\nrequest.timeout.ms=9000\n"
        )
        settings = loaded(
            {"STATESTEP_KAFKA": '{"sasl.username": "me", "retries": 4}'},
            toml,
            client_properties=str(properties),
            kafka={"retries": "5"},
        )
        assert settings.kafka_properties() == {
            "bootstrap_servers": ["k:9092"],
            "security_protocol": "SASL_PLAINTEXT",
            "sasl_mechanism": "PLAIN",
            "sasl_plain_password": "a=b=c",
            "sasl_plain_username": "me",
            "client_rack": "file",
            "request_timeout_ms": 9000,
            "retries": 5,
        }

    def test_servers_are_a_list(self) -> None:
        """By commas, spaces around them or not."""
        assert loaded(bootstrap_servers="a:1, b:2,c").kafka_properties()["bootstrap_servers"] == ["a:1", "b:2", "c"]

    @pytest.mark.parametrize(
        ("properties", "sentence"),
        [
            ({"group.id": "x"}, "'group.id' is the service's own to set; leave it out"),
            ({"isolation-level": "x"}, "'isolation-level' is the service's own"),
            ({"bootstrap_servers": "x"}, "'bootstrap_servers' is the service's own"),
            ({"no.such.thing": "x"}, "'no.such.thing' is not known to the client kafka-python"),
            ({"request.timeout.ms": "soon"}, "'request.timeout.ms' is 'soon', it must be a whole number"),
            ({"ssl.check.hostname": "maybe"}, "'ssl.check.hostname' is 'maybe', it must be true or false"),
        ],
    )
    def test_what_cannot_be_set_is_refused(self, properties: dict[str, str], sentence: str) -> None:
        """Ours, unknown ones, and values of another type."""
        with pytest.raises(ConfigError, match=sentence.replace(".", r"\.")):
            loaded(kafka=properties).kafka_properties()

    @pytest.mark.parametrize("text", ["[1]", "sasl_password=secret", "{", '"secret"'])
    def test_a_variable_that_is_no_object_is_refused(self, text: str) -> None:
        """STATESTEP_KAFKA holds JSON; what else it holds is not repeated, since it may be a password."""
        assert "secret" not in refused({"STATESTEP_KAFKA": text})

    def test_a_broken_properties_file_is_one_sentence(self, tmp_path: Path) -> None:
        """The line is told by its number and not repeated; a missing file by the system's reason."""
        path = tmp_path / "client.properties"
        path.write_text("security.protocol=SSL\nsasl.password secret\n")
        with pytest.raises(ConfigError, match=r"client\.properties: line 2 is no name=value$"):
            loaded(client_properties=str(path)).kafka_properties()
        with pytest.raises(ConfigError, match="gone cannot be read: No such file or directory"):
            loaded(client_properties=str(tmp_path / "gone")).kafka_properties()
        path.write_bytes(b"a=\xff")
        with pytest.raises(ConfigError, match="are not UTF-8"):
            loaded(client_properties=str(path)).kafka_properties()


@pytest.mark.parametrize("place", ["file", "environment"])
def test_what_a_model_does_not_say_is_said_in_tables(tmp_path: Path, place: str) -> None:
    """State pairs with or without their batch axis, constants of any kind, features by name or number."""
    states, constants = {"state": "stateN:1", "h": "hn"}, {"sr": 16000, "mask": [1, 0], "on": True}
    if place == "file":
        path = tmp_path / "statestep.toml"
        path.write_text(describe(loaded(states=states, constants=constants, features=576)))
        settings = load(path, {}, {})
    else:
        environ = {"STATESTEP_STATES": json.dumps(states), "STATESTEP_CONSTANTS": json.dumps(constants)}
        settings = loaded(environ | {"STATESTEP_FEATURES": "576"})
    assert settings.by_hand() == {
        "states": {"state": ("stateN", 1), "h": "hn"},
        "constants": constants,
        "features": 576,
    }
    assert loaded(features="flow, level").by_hand()["features"] == ["flow", "level"]
    assert loaded().by_hand() == {"states": None, "constants": None, "features": None}


@pytest.mark.parametrize("name", ["STATES", "CONSTANTS"])
def test_a_table_in_the_environment_is_json(name: str) -> None:
    """What cannot be read is named by its variable."""
    assert refused({f"STATESTEP_{name}": "h=hn"}).startswith(f"STATESTEP_{name} must be a JSON object of ")


def test_what_is_printed_is_a_file_that_gives_the_same_settings(tmp_path: Path) -> None:
    """Quotes, backslashes, emoji and numbers survive; what has no value is left out."""
    settings = loaded(
        key='a "quoted" \\ 😀',
        events="alarms",
        max_streams=5,
        create_topics=False,
        kafka={"client.rack": "x", "retries": 3},
    )
    path = tmp_path / "printed.toml"
    path.write_text(describe(settings))
    assert "client_properties" not in tomllib.loads(path.read_text())
    assert load(path, {}, {}).model_dump() == settings.model_dump()


@pytest.mark.parametrize("name", ["sasl.password", "ssl_password", "sasl.jaas.config", "SASL_Password", "oauth.token"])
def test_secrets_are_not_printed(name: str) -> None:
    """A property that holds one is starred, whatever the case of its name."""
    text = describe(loaded(kafka={name: "hunter2", "client.rack": "x"}))
    assert "hunter2" not in text
    assert tomllib.loads(text)["kafka"] == {name: "***", "client.rack": "x"}
