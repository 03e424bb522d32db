"""TLS for DICOM: at the door both sides show a certificate and a slow peer holds up nobody else; and outward."""

from __future__ import annotations

import logging
import socket
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from typing_extensions import Buffer

from salsa_node.errors import ConfigError
from salsa_node.settings import Destination, TlsSettings

log = logging.getLogger(__name__)


class _TurningAway(ssl.SSLSocket):
    """An accepted socket that says why it came to no TLS: pynetdicom keeps that to itself."""

    def read(self, len: int = 1024, buffer: Buffer | None = None) -> bytes:  # noqa: A002 - the library's name
        """As `ssl.SSLSocket.read`, which shakes hands first where that is not done."""
        try:
            return super().read(len, buffer)
        except ssl.SSLError as error:
            if self.version() is None:
                address = "a peer that left"
                with suppress(OSError):
                    address = self.getpeername()[0]
                why = error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else error.reason
                extra = {"event": "node.tls_refused"}
                log.warning("no TLS with %s: %s", address, why or "it ended the connection", extra=extra)
            raise


class _LateHandshake(ssl.SSLContext):
    """A context whose accepted sockets shake hands when they are first read, in the thread of their connection.

    pynetdicom wraps them in the one thread that accepts connections.
    """

    sslsocket_class = _TurningAway

    def wrap_socket(
        self,
        sock: socket.socket,
        server_side: bool = False,
        do_handshake_on_connect: bool = True,  # noqa: ARG002 - that is what this class is for
        suppress_ragged_eofs: bool = True,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLSocket:
        return super().wrap_socket(sock, server_side, False, suppress_ragged_eofs, server_hostname, session)


def server_context(settings: TlsSettings) -> ssl.SSLContext:
    """TLS 1.2 or newer (BCP 195), peers' certificates required. Raises ConfigError naming the file that is wrong."""
    context = _LateHandshake(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(settings.certificate, settings.key, password=_no_password)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"listener.tls: {settings.certificate} and {settings.key} are not a certificate and its key without "
            f"a password, as PEM files ({_why(error)})"
        ) from error
    try:
        context.load_verify_locations(settings.authorities)
    except OSError as error:
        raise ConfigError(
            f"listener.tls.authorities: {settings.authorities} holds no certificate as a PEM file ({_why(error)})"
        ) from error
    return context


class _Noting(ssl.SSLSocket):
    """A socket that tells its context why a handshake failed: pynetdicom keeps that to itself."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except OSError as error:
            if isinstance(self.context, ClientContext):
                told = str(getattr(error, "verify_message", "") or getattr(error, "reason", "") or error)
                self.context.fault = told.rstrip(".")
            raise


class ClientContext(ssl.SSLContext):
    """TLS 1.2 or newer towards one destination; fault: why the last handshake failed, "" where it did not."""

    fault = ""
    sslsocket_class = _Noting


def client_context(destination: Destination) -> ClientContext:
    """The destination's certificate is required, for its host, by a known authority. Raises ConfigError."""
    context = ClientContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    name = destination.name
    try:
        if destination.authorities:
            context.load_verify_locations(destination.authorities)
        else:
            context.load_default_certs()
    except OSError as error:
        raise ConfigError(
            f"{name}: authorities {destination.authorities} holds no certificate as a PEM file ({_why(error)})"
        ) from error
    try:
        if destination.certificate:
            context.load_cert_chain(destination.certificate, destination.key, password=_no_password)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{name}: {destination.certificate} and {destination.key} are not a certificate and its key without a "
            f"password, as PEM files ({_why(error)})"
        ) from error
    return context


#: beginnings of what OpenSSL says of a handshake that failed, and what to do then
_REMEDIES: Final = (
    ("certificate has expired", "have it renewed there"),
    ("certificate is not yet valid", "are the clocks right, there and here?"),
    ("Hostname mismatch", "give as host a name that its certificate holds"),
    ("IP address mismatch", "give as host a name that its certificate holds"),
    ("unable to get local issuer", "put the certificate of who signed its own into authorities"),
    ("self-signed", "put the certificate of who signed its own into authorities"),
    ("self signed", "put the certificate of who signed its own into authorities"),
    ("certificate revoked", "have it renewed there"),
)
_ALERTS: Final = ("SSLV3_ALERT", "TLSV1_ALERT", "TLSV13_ALERT")  # the peer's own word against us


def remedy(fault: str) -> str:
    """What to do about a handshake with a destination that failed, by OpenSSL's or the system's words for it.

    >>> remedy("certificate has expired")
    'have it renewed there'
    """
    for beginning, told in _REMEDIES:
        if fault.startswith(beginning):
            return told
    if fault.startswith(_ALERTS):
        return "does it ask for a certificate of ours (certificate, key), by an authority that it knows?"
    return "does it speak TLS at that port?"


def _no_password() -> str:
    raise ValueError("the key asks for a password; give it without one, readable by this user alone")


def _why(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
