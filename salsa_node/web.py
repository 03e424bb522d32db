"""What monitoring asks over HTTP: `/metrics` in Prometheus' text format, `/health` as JSON; no patient in either."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

from salsa_node.errors import ConfigError, SalsaNodeError
from salsa_node.settings import WebSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Metric:
    """A gauge of now.

    name: with its unit, as Prometheus wants it, without our prefix. values: labels (name -> value) and the number.
    """

    name: str
    help: str
    values: Sequence[tuple[Mapping[str, str], float]]


@dataclass(frozen=True, slots=True)
class Health:
    """Whether a node does its work; faults: what is wrong, each with what to do."""

    faults: tuple[str, ...]


def text(metrics: Sequence[Metric]) -> str:
    """Those metrics in Prometheus' text format, version 0.0.4."""
    lines = []
    for metric in metrics:
        name = f"salsa_node_{metric.name}"
        lines += [f"# HELP {name} {metric.help}", f"# TYPE {name} gauge"]
        for labels, value in metric.values:
            told = ",".join(f'{key}="{_escaped(word)}"' for key, word in labels.items())
            lines.append(f"{name}{{{told}}} {value:.10g}" if told else f"{name} {value:.10g}")
    return "\n".join(lines) + "\n"


class Web:
    """A server with a thread of its own, from `with` to its end.

    Raises ConfigError at its beginning where the port is taken.
    """

    def __init__(
        self, settings: WebSettings, measure: Callable[[], Sequence[Metric]], examine: Callable[[], Health]
    ) -> None:
        self._settings = settings
        self._answers: Mapping[str, Callable[[], tuple[HTTPStatus, str, str]]] = {
            "/metrics": lambda: (HTTPStatus.OK, "text/plain; version=0.0.4; charset=utf-8", text(measure())),
            "/health": lambda: _health(examine()),
        }

    def __enter__(self) -> Web:
        answers = self._answers

        class Answer(BaseHTTPRequestHandler):
            timeout = 10.0

            def do_GET(self) -> None:
                _answer(self, answers.get(self.path.partition("?")[0]))

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
                del format, args

        settings = self._settings
        try:
            self._server = ThreadingHTTPServer((settings.host, settings.port), Answer)
        except OSError as error:
            raise ConfigError(
                f"web.port: {settings.host}:{settings.port} cannot be bound ({error.strerror}); set another port"
            ) from error
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="web", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _answer(request: BaseHTTPRequestHandler, find: Callable[[], tuple[HTTPStatus, str, str]] | None) -> None:
    if find is None:
        status, kind, body = HTTPStatus.NOT_FOUND, "text/plain", "there are /metrics and /health\n"
    else:
        try:
            status, kind, body = find()
        except (SalsaNodeError, OSError) as error:
            status, kind, body = HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", f"{error}\n"
    content = body.encode()
    request.send_response(status)
    request.send_header("Content-Type", kind)
    request.send_header("Content-Length", str(len(content)))
    request.send_header("Cache-Control", "no-store")
    request.end_headers()
    request.wfile.write(content)


def _health(found: Health) -> tuple[HTTPStatus, str, str]:
    status = HTTPStatus.SERVICE_UNAVAILABLE if found.faults else HTTPStatus.OK
    return status, "application/json", json.dumps({"ok": not found.faults, "faults": list(found.faults)}) + "\n"


def _escaped(word: str) -> str:
    return word.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
