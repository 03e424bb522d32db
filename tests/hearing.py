"""A webhook that keeps what it is told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TypeVar

_Told = TypeVar("_Told")


@contextmanager
def hearing(read: Callable[[bytes], _Told], status: int = 200) -> Iterator[tuple[str, list[_Told]]]:
    """Its url, and what `read` makes of the body of each POST, in order; it answers with that status."""
    told: list[_Told] = []

    class Hear(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(read(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hear)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/hook", told
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
