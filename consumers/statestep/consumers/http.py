"""The one HTTP port: /metrics for Prometheus, /livez and /readyz for whoever restarts, /streams for a person.

Loopback unless told otherwise: the page names streams, and none of it asks who is there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from socketserver import ThreadingMixIn
from threading import Thread
from typing import Any
from urllib.parse import parse_qs
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

DEFAULT_PORT = 9464
STREAMS_SHOWN = 20
STREAMS_SHOWN_MAX = 1000


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the service lives and serves, with a sentence for whoever asks why not."""

    live: bool
    ready: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Pages:
    """What the server shows; each is asked anew at every request, from the server's threads."""

    health: Callable[[], Health]
    streams: Callable[[int], dict[str, Any]]  # how many to show → {"highest_scores", "stalest", …}
    stream: Callable[[bytes], list[dict[str, Any]]]  # a key → its rows, none if unknown


STARTING = Pages(lambda: Health(True, False, "starting"), lambda count: {"streams": 0}, lambda key: [])


class PortInUse(RuntimeError):
    """The HTTP port is taken."""


class HttpServer:
    """Serves until closed. `port` 0 takes a free one; `url` says which. `pages` may be exchanged at any time."""

    def __init__(
        self, registry: CollectorRegistry, pages: Pages = STARTING, host: str = "127.0.0.1", port: int = DEFAULT_PORT
    ):
        self.pages = pages
        metrics: Callable[..., Iterable[bytes]] = make_wsgi_app(registry)

        def app(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            if environ["PATH_INFO"] == "/metrics":
                return metrics(environ, start)
            status, document = answer(environ["PATH_INFO"], environ.get("QUERY_STRING", ""), self.pages)
            body = json.dumps(document, indent=2).encode() + b"\n"
            start(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
            return [body]

        try:
            self._server = make_server(host, port, app, server_class=_Server, handler_class=_Quiet)
        except OSError as error:
            raise PortInUse(
                f"{host}:{port} cannot be listened on: {error.strerror}; --http-port takes another"
            ) from None
        self.port = self._server.server_port
        self.url = f"http://{host}:{self.port}"
        self._thread = Thread(target=self._server.serve_forever, name="http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def answer(path: str, query: str, pages: Pages) -> tuple[str, Any]:
    """The status line and JSON document for a request.

    >>> up = Pages(lambda: Health(True, False, "replaying"), lambda n: {}, lambda key: [])
    >>> answer("/readyz", "", up)
    ('503 Service Unavailable', {'ready': False, 'reason': 'replaying'})
    """
    if path in ("/livez", "/readyz"):
        health = pages.health()
        name, good = ("live", health.live) if path == "/livez" else ("ready", health.ready)
        return "200 OK" if good else "503 Service Unavailable", {name: good, "reason": health.reason}
    if path == "/streams":
        asked = parse_qs(query, errors="surrogateescape")
        if "key" in asked:
            rows = pages.stream(asked["key"][0].encode("utf-8", "surrogateescape"))
            return ("200 OK", rows) if rows else ("404 Not Found", {"error": f"there is no stream {asked['key'][0]!r}"})
        try:
            count = min(int(asked.get("n", [str(STREAMS_SHOWN)])[0]), STREAMS_SHOWN_MAX)
        except ValueError:
            return "400 Bad Request", {"error": f"n is {asked['n'][0]!r}, it must be a number"}
        return "200 OK", pages.streams(max(count, 0))
    return "404 Not Found", {"error": f"no page {path}", "pages": ["/metrics", "/livez", "/readyz", "/streams"]}


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a probe every few seconds would fill the log."""
