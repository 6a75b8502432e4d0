"""The HTTP port: every page, what is no page, keys with any characters, and many who ask at once."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, quote_from_bytes

import pytest
from prometheus_client import CollectorRegistry

from statestep.consumers.http import STARTING, Health, HttpServer, Pages, PortInUse, answer
from statestep.consumers.metrics import Metrics

KEYS = [b"pump-1", b"a b&c=d/e?f#g", "Pumpe-ä😀".encode(), b"\xff\x00", b"100%"]


def pages(live: bool = True, ready: bool = True) -> Pages:
    """Pages over the streams above; `streams` tells how many it was asked for."""
    return Pages(
        lambda: Health(live, ready, "because"),
        lambda count: {"asked": count},
        lambda key: [{"place": KEYS.index(key)}] if key in KEYS else [],
    )


@pytest.fixture(scope="module")
def listening() -> Iterator[HttpServer]:
    registry = CollectorRegistry()
    Metrics(registry, "sensors", "pump")
    made = HttpServer(registry, port=0)
    yield made
    made.close()


@pytest.fixture
def server(listening: HttpServer) -> HttpServer:
    """The one server of these tests, with its usual pages."""
    listening.pages = pages()
    return listening


def get(url: str) -> tuple[int, str, str]:
    """Status, content type and body."""
    try:
        with urllib.request.urlopen(url, timeout=10) as found:
            return found.status, found.headers["Content-Type"], found.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read().decode()


def document(url: str) -> tuple[int, Any]:
    status, kind, body = get(url)
    assert kind == "application/json"
    return status, json.loads(body)


def test_prometheus_is_given_its_page(server: HttpServer) -> None:
    """In the text format, with the service's families."""
    status, kind, body = get(f"{server.url}/metrics")
    assert status == 200
    assert kind.startswith("text/plain; version=")
    assert 'statestep_records_produced_total{topic="sensors"} 0.0' in body


@pytest.mark.parametrize(
    ("live", "ready", "livez", "readyz"), [(True, True, 200, 200), (True, False, 200, 503), (False, False, 503, 503)]
)
def test_health_is_a_status_and_a_reason(server: HttpServer, live: bool, ready: bool, livez: int, readyz: int) -> None:
    """200 or 503 for those who look at nothing else, a sentence for people; pages may be exchanged."""
    server.pages = pages(live, ready)
    assert document(f"{server.url}/livez") == (livez, {"live": live, "reason": "because"})
    assert document(f"{server.url}/readyz") == (readyz, {"ready": ready, "reason": "because"})


def test_before_there_is_a_service_it_is_starting() -> None:
    """Live and not ready, without streams."""
    assert answer("/livez", "", STARTING) == ("200 OK", {"live": True, "reason": "starting"})
    assert answer("/readyz", "", STARTING)[0] == "503 Service Unavailable"
    assert answer("/streams", "", STARTING) == ("200 OK", {"streams": 0})
    assert answer("/streams", "key=a", STARTING)[0] == "404 Not Found"


@pytest.mark.parametrize(
    ("query", "asked"), [("", 20), ("?n=3", 3), ("?n=0", 0), ("?n=-5", 0), ("?n=99999999", 1000), ("?n=", 20)]
)
def test_as_many_streams_are_shown_as_asked_for(server: HttpServer, query: str, asked: int) -> None:
    """20 by default, never more than 1000."""
    assert document(f"{server.url}/streams{query}") == (200, {"asked": asked})


@pytest.mark.parametrize("n", ["many", "1.5", "1e9", "9" * 5000])
def test_a_number_that_is_none_is_told(server: HttpServer, n: str) -> None:
    """400, with what was asked for."""
    status, found = document(f"{server.url}/streams?n={n}")
    assert status == 400
    assert found["error"] == f"n is {n!r}, it must be a number"


@pytest.mark.parametrize("key", KEYS)
def test_a_stream_is_found_by_any_key(server: HttpServer, key: bytes) -> None:
    """Blanks, reserved characters, text beyond ASCII and bytes that are no text, percent-encoded."""
    assert document(f"{server.url}/streams?key={quote_from_bytes(key, safe='')}") == (200, [{"place": KEYS.index(key)}])


def test_a_stream_that_is_not_there_is_404(server: HttpServer) -> None:
    """The key is repeated, whatever it holds."""
    for key, told in (("nobody", "'nobody'"), ("%FE", "'\\udcfe'"), (quote("ä"), "'ä'")):
        assert document(f"{server.url}/streams?key={key}") == (404, {"error": f"there is no stream {told}"})


@pytest.mark.parametrize("path", ["/", "/metric", "/metrics/x", "/streams/", "/livez?x=1/../..", "/%00", "/ä"])
def test_other_paths_list_the_pages(server: HttpServer, path: str) -> None:
    """404 with the pages that there are; a query does not matter."""
    status, found = document(f"{server.url}{quote(path, safe='/?=%')}")
    if path.startswith("/livez"):
        assert status == 200
    else:
        assert (status, found["pages"]) == (404, ["/metrics", "/livez", "/readyz", "/streams"])


def test_a_port_in_use_is_told_with_the_way_out(server: HttpServer) -> None:
    """The second one does not start, the first one goes on; a free port is taken where 0 is asked for."""
    with pytest.raises(
        PortInUse, match=f"127.0.0.1:{server.port} cannot be listened on: .*; --http-port takes another"
    ):
        HttpServer(CollectorRegistry(), port=server.port)
    assert get(f"{server.url}/livez")[0] == 200
    other = HttpServer(CollectorRegistry(), port=0)
    assert other.port not in (0, server.port)
    other.close()
    again = HttpServer(CollectorRegistry(), port=other.port)  # a closed one has let go
    again.close()


def test_a_host_that_is_not_ours_is_told() -> None:
    """Neither a name that there is not nor an address of another machine can be listened on."""
    with pytest.raises(PortInUse, match=r"192\.0\.2\.1:0 cannot be listened on"):
        HttpServer(CollectorRegistry(), host="192.0.2.1", port=0)


def test_many_may_ask_at_once(server: HttpServer) -> None:
    """One that is slow to answer keeps nobody waiting."""
    slow, others = threading.Event(), threading.Event()

    def streams(count: int) -> dict[str, Any]:
        if count == 1:
            slow.set()
            assert others.wait(30)
        return {"asked": count}

    server.pages = Pages(pages().health, streams, pages().stream)
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(document(f"{server.url}/streams?n=1")))
    waiting.start()
    assert slow.wait(30)
    quick = [threading.Thread(target=lambda: found.append(get(f"{server.url}/metrics")[0])) for _ in range(8)]
    for thread in quick:
        thread.start()
    for thread in quick:
        thread.join(30)
    assert found == [200] * 8
    others.set()
    waiting.join(30)
    assert found[-1] == (200, {"asked": 1})


def test_a_page_that_fails_is_a_500_and_the_server_goes_on(
    server: HttpServer, capfd: pytest.CaptureFixture[str]
) -> None:
    """A fault of ours is the asker's answer, and nobody else's."""

    def broken() -> Health:
        raise RuntimeError("a fault")

    server.pages = Pages(broken, pages().streams, pages().stream)
    status, _, body = get(f"{server.url}/livez")
    assert status == 500
    assert "a fault" not in body
    assert get(f"{server.url}/streams")[0] == 200
    assert "a fault" in capfd.readouterr().err
