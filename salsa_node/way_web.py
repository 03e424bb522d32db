"""The way to a destination by DICOMweb: STOW-RS for each object (PS3.18 10.5), QIDO-RS to verify (10.6)."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.message import Message
from io import BytesIO
from pathlib import Path
from typing import Final

import pydicom
import requests
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from requests.auth import AuthBase

from salsa_node.errors import DeliveryError, DestinationRefused, FormRefused
from salsa_node.outgoing import Outgoing, Reference
from salsa_node.settings import Destination
from salsa_node.tls import remedy

_GROUP_LENGTH_END = 132 + 12  # preamble, prefix, and the element that says how long the rest is (PS3.10 7.1)
_SOP_CLASS_NOT_SUPPORTED = 0x0122
_ALREADY_THERE = (0x0111, 0xB305)  # a duplicate, as PS3.7 and as several archives say it
_WARNING, _FAILURE = "00081196", "00081197"  # Warning Reason, Failure Reason
_REFERENCED, _FAILED = "00081199", "00081198"  # sequences of what was taken, and what was not
_JSON: Final = {"Accept": "application/dicom+json"}
_NOT_ALLOWED = (401, 403)
_NOT_THIS_WAY = (400, 404, 405, 406, 415)  # the request itself is wrong there, today and tomorrow


class WebWay:
    """A session with a destination; an `outgoing.Way`."""

    def __init__(self, destination: Destination, session: requests.Session, timeout_s: float) -> None:
        self._destination = destination
        self._session = session
        self._timeout_s = timeout_s
        self.is_open = True

    def send(self, outgoing: Outgoing) -> tuple[int, str | None]:
        """The status of one object, and what to note beside plain success. Raises FormRefused, DeliveryError."""
        boundary = uuid.uuid4().hex
        head = f"--{boundary}\r\nContent-Type: application/dicom\r\nContent-Length: {len(outgoing.content)}\r\n\r\n"
        body = b"".join([head.encode(), outgoing.content, f"\r\n--{boundary}--\r\n".encode()])
        kind = f'multipart/related; type="application/dicom"; boundary={boundary}'
        try:
            answer = self._ask("POST", "/studies", data=body, headers={**_JSON, "Content-Type": kind})
        except DeliveryError as error:
            self.is_open = error.status is not None
            raise
        return self._outcome(answer, outgoing)

    def holds(self, reference: Reference) -> bool:
        """Whether that object is there. Raises DeliveryError, DestinationRefused where it cannot be asked."""
        path = f"/studies/{reference.study_uid}/series/{reference.series_uid}/instances"
        answer = self._ask("GET", path, params={"SOPInstanceUID": reference.sop_instance_uid}, headers=_JSON)
        if answer.status_code == requests.codes.no_content:
            return False
        found = _json(answer)
        uids = [_value(item, "00080018") for item in found] if isinstance(found, list) else []
        return reference.sop_instance_uid in uids

    def studies(self, conditions: Mapping[str, str]) -> list[dict[str, object]]:
        """The studies that meet those conditions, as DICOM JSON. Raises DeliveryError."""
        more = {"includefield": "NumberOfStudyRelatedInstances"}
        return _list(self._ask("GET", "/studies", params={**conditions, **more}, headers=_JSON))

    def series(self, study_uid: str) -> list[dict[str, object]]:
        """The series of a study, as DICOM JSON. Raises DeliveryError."""
        return _list(self._ask("GET", f"/studies/{study_uid}/series", headers=_JSON))

    def instances(self, study_uid: str, series_uid: str) -> Iterator[bytes]:
        """Each instance of a series as a DICOM file, as the service keeps it (WADO-RS). Raises DeliveryError."""
        path = f"/studies/{study_uid}/series/{series_uid}/instances"
        for item in _list(self._ask("GET", path, headers=_JSON)):
            accept = {"Accept": 'multipart/related; type="application/dicom"; transfer-syntax=*'}
            answer = self._ask("GET", f"{path}/{_value(item, '00080018')}", headers=accept)
            yield _only_part(answer, self._destination.name)

    def knock(self) -> None:
        """Ask for one study, whichever. Raises DeliveryError."""
        self._ask("GET", "/studies", params={"limit": "1"}, headers=_JSON)

    def _ask(self, method: str, path: str, **more: object) -> requests.Response:
        """One request; what is no answer to it is an error, with the status of HTTP but never the body's own words."""
        where = self._destination.name
        url = self._destination.url.rstrip("/") + path
        try:
            answer = self._session.request(method, url, timeout=self._timeout_s, allow_redirects=False, **more)  # type: ignore[arg-type]
        except requests.exceptions.SSLError as error:
            why = _innermost(error)
            raise DeliveryError(f"{where}: no TLS with it: {why}; {remedy(why)}") from error
        except requests.exceptions.RequestException as error:
            raise DeliveryError(
                f"{where}: cannot be reached ({type(error).__name__}); is it up, its url right, and the port open from "
                "here?"
            ) from error
        except OSError as error:
            raise DestinationRefused(
                f"{where}: authorities, certificate or key is not a file that can be read"
            ) from error
        if answer.status_code in _NOT_ALLOWED:
            raise DeliveryError(
                f"{where}: HTTP {answer.status_code}, it does not let us in; correct user and secret",
                answer.status_code,
            )
        if answer.status_code == requests.codes.not_found and method == "POST":
            raise DeliveryError(
                f"{where}: HTTP 404 to POST, as where its service is about to start; if it stays so correct its url",
                404,
            )
        if answer.status_code in _NOT_THIS_WAY:
            raise DestinationRefused(f"{where}: HTTP {answer.status_code} to {method}; correct its url")
        if not (answer.ok or answer.status_code == requests.codes.conflict):
            raise DeliveryError(f"{where}: HTTP {answer.status_code}", answer.status_code)
        return answer

    def _outcome(self, answer: requests.Response, outgoing: Outgoing) -> tuple[int, str | None]:
        where, told = self._destination.name, _json(answer)
        for item in _items(told, _FAILED):
            reason = _value(item, _FAILURE)
            status = reason if isinstance(reason, int) else None
            if status in _ALREADY_THERE:
                return int(status or 0), f"it was there already: {where}: status 0x{status:04X}"
            refused = FormRefused if status == _SOP_CLASS_NOT_SUPPORTED else DeliveryError
            raise refused(f"{where}: failure reason {'none' if status is None else f'0x{status:04X}'}", status)
        for item in _items(told, _REFERENCED):
            if _value(item, "00081155") == outgoing.sop_instance_uid:
                warning = _value(item, _WARNING)
                if isinstance(warning, int):
                    return warning, f"taken with a warning: {where}: status 0x{warning:04X}"
                return 0, None
        raise DeliveryError(f"{where}: HTTP {answer.status_code} without a word on the object", answer.status_code)


@contextmanager
def opened(destination: Destination, timeout_s: float) -> Iterator[WebWay]:
    """A session with what the destination asks for as credentials. Raises DestinationRefused where they are absent."""
    with requests.Session() as session:
        session.trust_env = False  # no proxy and no netrc that nobody wrote into the config
        session.auth = _Credentials(destination)
        session.verify = destination.authorities or True
        if destination.certificate:
            session.cert = (destination.certificate, destination.key)
        yield WebWay(destination, session, timeout_s)


class _Credentials(AuthBase):
    """Basic with a user, bearer without one; the secret is read anew for each way, and nobody repeats it."""

    def __init__(self, destination: Destination) -> None:
        self._user = destination.user
        self._secret = secret(destination)

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._secret and self._user:
            return requests.auth.HTTPBasicAuth(self._user, self._secret)(request)
        if self._secret:
            request.headers["Authorization"] = f"Bearer {self._secret}"
        return request


def secret(destination: Destination) -> str:
    """What `destination.secret` points at, "" where it is empty. Raises DestinationRefused where nothing is there."""
    kind, _, where = destination.secret.partition(":")
    if not destination.secret:
        return ""
    try:
        found = os.environ[where] if kind == "env" else Path(where).read_text(encoding="utf-8").strip()
    except (KeyError, OSError, UnicodeDecodeError) as error:
        raise DestinationRefused(
            f"{destination.name}: its secret is not where the config says ({kind}:{where}); put it there, then resend"
        ) from error
    if not found or not found.isascii() or not found.isprintable():
        raise DestinationRefused(f"{destination.name}: its secret ({kind}:{where}) is empty, or not one line of ASCII")
    return found


def meta_of(content: bytes) -> tuple[Dataset, int]:
    """The file meta information of a DICOM file, and where its data set begins. Raises DeliveryError for none."""
    try:
        ds = pydicom.dcmread(BytesIO(content), specific_tags=["SOPInstanceUID"], stop_before_pixels=True)
        length = int(ds.file_meta.FileMetaInformationGroupLength)
    except (InvalidDicomError, AttributeError, ValueError, EOFError) as error:
        raise DeliveryError(f"what came is no DICOM file ({type(error).__name__})") from error
    return ds.file_meta, _GROUP_LENGTH_END + length


def _only_part(answer: requests.Response, where: str) -> bytes:
    """The body of the one part of a multipart/related answer (RFC 2387)."""
    kind = Message()
    kind["Content-Type"] = answer.headers.get("Content-Type", "")
    boundary = str(kind.get_param("boundary", "") or "")
    _, opening, rest = answer.content.partition(f"--{boundary}\r\n".encode())
    _, _, body = rest.partition(b"\r\n\r\n")
    content, closing, _ = body.rpartition(f"\r\n--{boundary}--".encode())
    if not (boundary and opening and closing):
        raise DeliveryError(
            f"{where}: expected one part of multipart/related, found {answer.headers.get('Content-Type')}"
        )
    return content


def _list(answer: requests.Response) -> list[dict[str, object]]:
    found = _json(answer)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def _json(answer: requests.Response) -> object:
    try:
        return answer.json()
    except ValueError:
        return None


def _items(told: object, tag: str) -> list[object]:
    """The items of a sequence in DICOM JSON (PS3.18 F.2), which an archive may put into a list of its own."""
    whole = told[0] if isinstance(told, list) and told else told
    found = whole.get(tag, {}).get("Value", []) if isinstance(whole, dict) else []
    return found if isinstance(found, list) else []


def _value(item: object, tag: str) -> object:
    found = item.get(tag, {}).get("Value") if isinstance(item, dict) else None
    return found[0] if isinstance(found, list) and found else None


def _innermost(error: BaseException) -> str:
    """Why OpenSSL refused, below the layers of libraries around it."""
    reason: object = error
    while isinstance(reason, BaseException):
        message = getattr(reason, "verify_message", None)
        if message:
            return str(message).rstrip(".")
        reason = getattr(reason, "reason", None) or (reason.args[0] if reason.args else None)
    return str(reason) if isinstance(reason, str) else type(error).__name__
