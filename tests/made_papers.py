"""Certificates for servers on the loopback, made by the openssl program: a good one, and one that has expired."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

_CA = """
[ca]
default_ca = us
[us]
database = index.txt
serial = serial
new_certs_dir = .
default_md = sha256
policy = any
copy_extensions = copy
unique_subject = no
[any]
commonName = supplied
"""


class Papers:
    """authority: who signed them, a PEM file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.authority = folder / "authority.pem"
        (folder / "ca.conf").write_text(_CA)
        (folder / "index.txt").touch()
        (folder / "serial").write_text("01\n")
        self._run(
            "req", "-x509", *self._key("authority"), "-subj", "/CN=authority", "-days", "2", "-out", "authority.pem"
        )
        self._sign("server", "20200101000000Z", "20450101000000Z")
        self._sign("expired", "20200101000000Z", "20200102000000Z")

    def server(self, name: str = "server", *, asks: bool = False) -> ssl.SSLContext:
        """The context of a server that shows "server" or "expired", and where it `asks` wants a certificate itself."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        if asks:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.authority)
        return context

    def _sign(self, name: str, start: str, end: str) -> None:
        self._run(
            "req", *self._key(name), "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1",
            "-out", f"{name}.csr",
        )  # fmt: skip
        self._run(
            "ca", "-batch", "-notext", "-config", "ca.conf", "-cert", "authority.pem", "-keyfile", "authority.key",
            "-startdate", start, "-enddate", end, "-in", f"{name}.csr", "-out", f"{name}.pem",
        )  # fmt: skip

    @staticmethod
    def _key(name: str) -> tuple[str, ...]:
        return "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}.key"

    def _run(self, *arguments: str) -> None:
        done = subprocess.run(["openssl", *arguments], cwd=self._folder, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
