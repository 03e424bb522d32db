"""The OHIF viewer's built pages beside an Orthanc, on the loopback: what a browser needs to show our results.

The pages come from npm's `@ohif/app` (its `dist` folder), put where `peers()` looks by ./scripts/peers.
"""

from __future__ import annotations

import http.server
import json
import mimetypes
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PROXIED = ("/dicom-web", "/wado")
ISOLATION = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
CONFIG = {
    "routerBasename": None,
    "extensions": [],
    "modes": [],
    "customizationService": {},
    "showStudyList": True,
    "maxNumberOfWebWorkers": 2,
    "showWarningMessageForCrossOrigin": False,
    "showCPUFallbackMessage": False,
    "showLoadingIndicator": True,
    "strictZSpacingForVolumeViewport": True,
    "investigationalUseDialog": {"option": "never"},
    "defaultDataSourceName": "dicomweb",
    "dataSources": [
        {
            "namespace": "@ohif/extension-default.dataSourcesModule.dicomweb",
            "sourceName": "dicomweb",
            "configuration": {
                "friendlyName": "test PACS",
                "name": "pacs",
                "wadoUriRoot": "/wado",
                "qidoRoot": "/dicom-web",
                "wadoRoot": "/dicom-web",
                "qidoSupportsIncludeField": False,
                "imageRendering": "wadors",
                "thumbnailRendering": "wadors",
                "enableStudyLazyLoad": True,
                "supportsWildcard": True,
                "omitQuotationForMultipartRequest": True,
                "bulkDataURI": {"enabled": True, "relativeResolution": "studies"},
            },
        }
    ],
}


def peers() -> Path:
    """Where ./scripts/peers puts what comes from npm."""
    return Path(os.environ.get("SALSA_NODE_PEERS", Path(__file__).parents[1] / ".peers"))


def pages() -> Path:
    """OHIF's `dist`, or a skip that says what to do."""
    folder = peers() / "ohif" / "dist"
    if not (folder / "index.html").is_file():
        pytest.skip("OHIF's pages are not there (./scripts/peers, with npm at hand)")
    return folder


@contextmanager
def serving(dist: Path, upstream: str) -> Iterator[str]:
    """The viewer's address, with `upstream`'s DICOMweb under the same origin, until the block ends."""
    mimetypes.add_type("application/wasm", ".wasm")
    mimetypes.add_type("text/javascript", ".js")
    config = f"window.config = {json.dumps(CONFIG)};".encode()

    class Viewer(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Silence."""

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if path.startswith(PROXIED):
                self._pass_on()
            elif path == "/app-config.js":
                self._answer(200, "text/javascript", config)
            else:
                file = (dist / path.lstrip("/")).resolve()
                if not file.is_relative_to(dist.resolve()) or not file.is_file():
                    file = dist / "index.html"
                kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
                self._answer(200, kind, file.read_bytes())

        do_POST = do_GET  # noqa: N815 - the name that http.server calls

        def _pass_on(self) -> None:
            accepted = {"Accept": self.headers.get("Accept", "*/*")}
            request = urllib.request.Request(upstream + self.path, headers=accepted)
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    self._answer(answer.status, answer.headers.get("Content-Type", ""), answer.read())
            except urllib.error.HTTPError as error:
                self._answer(error.code, error.headers.get("Content-Type", "text/plain"), error.read())

        def _answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **ISOLATION}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Viewer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
