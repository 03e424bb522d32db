"""Words to people when something needs them: a webhook, an e-mail; by templates that hold no patient identity."""

from __future__ import annotations

import json
import logging
import smtplib
import ssl
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from email.message import EmailMessage
from http.client import HTTPException
from pathlib import Path
from urllib import request

from salsa_node import durable
from salsa_node.errors import DeliveryError, SalsaNodeError
from salsa_node.settings import FIELDS, NotifySettings
from salsa_node.store import Event, Store

log = logging.getLogger(__name__)

_TOGETHER = 50  # events in one message at most
_WAIT = timedelta(minutes=1)  # after a failure, doubled each time ...
_MAX_WAIT = timedelta(hours=1)  # ... up to this


@dataclass(slots=True)
class Notifier:
    """Tells of events as they come; remembers in the data folder how far it has told.

    name: our own, for the field `node` of a template.
    """

    settings: NotifySettings
    data_dir: Path
    name: str
    not_before: datetime | None = None
    wait: timedelta = _WAIT
    posted: int = 0  # the number of the last event that the webhook took, where the e-mail may have failed

    def step(self, store: Store, now: datetime) -> int | None:
        """Tell of what happened since the last time; of how many events, None where there was nothing.

        The first start tells nothing of the past. Raises DeliveryError where nobody could be told: the next step
        that is due tells of the same.
        """
        if not (self.settings.webhook or self.settings.email_to):
            return None
        if self.not_before and now < self.not_before <= now + _MAX_WAIT:  # else the clock was set back
            return None
        told = self._told(store)
        new = store.events_after(told)
        if not new:
            return None
        due = [event for event in new if event.name.startswith(tuple(self.settings.events))][:_TOGETHER]
        if due:
            try:
                self._send(due)
            except SalsaNodeError:
                self.not_before, self.wait = now + self.wait, min(2 * self.wait, _MAX_WAIT)
                raise
        last = due[-1].id if len(due) == _TOGETHER else new[-1].id
        durable.write(self._file, [str(last).encode()])
        self.not_before, self.wait = None, _WAIT
        return len(due)

    @property
    def _file(self) -> Path:
        return self.data_dir / "notified"

    def _told(self, store: Store) -> int:
        """The number of the last event that was told."""
        try:
            return int(self._file.read_text())
        except (OSError, ValueError):
            newest = store.find_events(limit=1)
            last = newest[0].id if newest else 0
            durable.write(self._file, [str(last).encode()])
            return last

    def _send(self, events: Sequence[Event]) -> None:
        unposted = [event for event in events if event.id > self.posted]
        if self.settings.webhook and unposted:
            subject, body = self._words(unposted)
            _post(self.settings, {"text": f"{subject}\n{body}"})
            self.posted = unposted[-1].id
        if self.settings.email_to:
            _mail(self.settings, *self._words(events))

    def _words(self, events: Sequence[Event]) -> tuple[str, str]:
        """Subject and text; what befell several objects alike is one line, at the time of the first."""
        subject = string.Template(self.settings.subject).substitute(self._values(events[0]))
        text, counts, lines = string.Template(self.settings.text), Counter[str](), dict[str, str]()
        for event in events:
            values = self._values(event)
            alike = text.substitute(values | {"at": ""})
            counts[alike] += 1
            lines.setdefault(alike, text.substitute(values))
        if len(lines) > 1:
            subject += f" (and {len(lines) - 1} more)"
        told = (f"{line}  ({counts[alike]} times)" if counts[alike] > 1 else line for alike, line in lines.items())
        return subject, "\n".join(told)

    def _values(self, event: Event) -> dict[str, str]:
        values = (event.at.isoformat(timespec="seconds"), event.name, event.study_uid or "", event.subject,
                  event.subject_id, event.detail, self.name)  # fmt: skip
        return dict(zip(FIELDS, values, strict=True))


def _post(settings: NotifySettings, value: object) -> None:
    """POST as JSON; `{"text": ...}` is what Slack, Mattermost, Teams and most others take."""
    asked = request.Request(  # noqa: S310 - the config allows http and https alone
        settings.webhook, json.dumps(value).encode(), {"Content-Type": "application/json"}
    )
    try:
        with request.urlopen(asked, timeout=settings.timeout_s):  # noqa: S310 - see above
            return
    except (OSError, HTTPException) as error:
        raise DeliveryError(f"notify.webhook: nobody was told ({type(error).__name__}: {error})") from error


def _mail(settings: NotifySettings, subject: str, body: str) -> None:
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = settings.email_from, ", ".join(settings.email_to), subject
    message.set_content(body)
    try:
        with smtplib.SMTP(settings.smtp_host, settings.smtp_port, timeout=settings.timeout_s) as server:
            if settings.smtp_tls:
                server.starttls(context=ssl.create_default_context())
            server.send_message(message)
    except (OSError, smtplib.SMTPException) as error:
        raise DeliveryError(f"notify.email_to: nobody was told ({type(error).__name__})") from error
