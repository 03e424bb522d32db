"""The doctor: what surrounds a node, and the node itself, looked at from outside; each finding with what to do."""

from __future__ import annotations

import shutil
import socket
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import sqlalchemy as sa

from salsa_node import loopback, overview, preflight, reserve, ways
from salsa_node.config import Config
from salsa_node.errors import SalsaNodeError
from salsa_node.node_lock import is_running
from salsa_node.overview import Standing
from salsa_node.preflight import Check
from salsa_node.settings import Destination
from salsa_node.store import Sought, Store, StoreSettings

_GIB = 2**30
_CLOCK_SLACK = timedelta(minutes=2)
_STUCK_AFTER = timedelta(hours=1)
_ECHO_S = 5.0  # nobody waits longer for a doctor


def examine(config: Config, now: datetime) -> tuple[Check, ...]:
    """Every finding, good ones included; beside a running node, without harm.

    Nothing is written. Takes some seconds where a peer does not answer.
    """
    return (
        *preflight.checks(config),
        *_door(config),
        _disk(config, lambda folder: shutil.disk_usage(folder).free),
        *_record(config, now),
        _clock(),
        _gpu(config.pipeline.device),
        *(_peer(destination, config.delivery.timeout_s) for destination in config.destination),
        *_archive(config),
        *_told(config),
    )


def _door(config: Config) -> Iterator[Check]:
    """Whether our own node answers, or its ports are there for it."""
    running = is_running(config)
    listener = config.listener
    doors = [("listener.port", listener.host, listener.port)]
    if listener.tls.port:
        doors.append(("listener.tls.port", listener.tls.host, listener.tls.port))
    if config.web.port:
        doors.append(("web.port", config.web.host, config.web.port))
    for name, host, port in doors:
        where = "127.0.0.1" if host in ("0.0.0.0", "") else host  # noqa: S104 - compared, not bound
        with socket.socket() as sock:
            sock.settimeout(2.0)
            taken = sock.connect_ex((where, port)) == 0
        if running and taken:
            yield Check(name, ok=True, detail=f"{host}:{port} answers; the node runs")
        elif running:
            detail = f"a node runs, but nothing answers at {host}:{port}; was the config edited? restart the node"
            yield Check(name, ok=False, detail=detail)
        elif taken:
            detail = f"{host}:{port} is taken by another program and no node runs; stop that, or set another port"
            yield Check(name, ok=False, detail=detail)
        else:
            yield Check(name, ok=True, detail=f"{host}:{port} is free; the node does not run", warns=True)
    if running and not loopback.echoes(listener.port):
        detail = "the node runs but does not answer C-ECHO from this machine; see listener.allowed, then its log"
        yield Check("C-ECHO to ourselves", ok=True, detail=detail, warns=True)


def _disk(config: Config, free_bytes: Callable[[Path], int]) -> Check:
    data_dir = config.node.data_dir.absolute()
    there = next(folder for folder in (data_dir, *data_dir.parents) if folder.exists())
    free, least = free_bytes(there) / _GIB, config.listener.min_free_gib
    detail = f"{free:.1f} GiB left for {data_dir}"
    if free < reserve.NOTHING_BYTES / _GIB:
        then = "nothing can be kept, the record cannot be written: "
        kept = "room is laid by for salsa-node purge" if reserve.is_laid_by(data_dir) else ""
        return Check("disk", ok=False, detail=f"{detail}; {then}{kept or 'make room outside the data folder first'}")
    if free < least:
        then = "salsa-node purge, [retention], or a larger disk"
        return Check("disk", ok=False, detail=f"{detail}; below {least:g} GiB images are refused: {then}")
    if free < 5 * least:
        detail += f"; below {least:g} GiB (listener.min_free_gib) images will be refused: see [retention]"
        return Check("disk", ok=True, detail=detail, warns=True)
    return Check("disk", ok=True, detail=detail)


def _record(config: Config, now: datetime) -> Iterator[Check]:
    """Whether the record is sound, and what of it waits for a person."""
    settings = StoreSettings(config.store_url)
    file = Path(str(sa.make_url(config.store_url).database))
    if not settings.is_shared and not file.exists():
        yield Check("record", ok=True, detail=f"{file} is not there yet; the node's first start makes it")
        return
    try:
        with Store.open(settings) as store:
            if settings.is_shared:
                yield Check("record", ok=True, detail="the database answers; its own tools say whether it is sound")
                yield from _waiting(store, is_running(config), now)
                yield _time(store, now)
                return
            with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as raw:
                told = str(raw.execute("PRAGMA quick_check(1)").fetchone()[0])
            raw.close()
            if told != "ok":
                detail = f"{file} is damaged ({told.splitlines()[0]}); stop the node, then salsa-node restore"
                yield Check("record", ok=False, detail=detail)
                return
            yield Check("record", ok=True, detail=f"{file} is sound")
            yield from _waiting(store, is_running(config), now)
            yield _time(store, now)
    except sqlite3.Error as error:
        yield Check(
            "record", ok=False, detail=f"{file} cannot be read ({error}); stop the node, then salsa-node restore"
        )
    except SalsaNodeError as error:
        yield Check("record", ok=False, detail=str(error))


def _waiting(store: Store, running: bool, now: datetime) -> Iterator[Check]:
    for standing in (Standing.FAILED, Standing.BLOCKED, Standing.NOT_DELIVERED):
        count = len(overview.search(store, Sought(), (standing,), 1000))
        if count:
            word = standing.value.replace(" ", "-")
            detail = f"{count} studies wait for a person: salsa-node studies --state {word}"
            yield Check(standing.value, ok=True, detail=detail, warns=True)
    oldest = store.figures(now).oldest_queued_at
    if oldest is not None and now - oldest > _STUCK_AFTER:
        then = "is work paused? salsa-node resume; else see salsa-node logs" if running else "start the node"
        hours = (now - oldest).total_seconds() / 3600
        yield Check("queue", ok=True, detail=f"the first in line waits for {hours:.0f} h: {then}", warns=True)


def _time(store: Store, now: datetime) -> Check:
    newest = store.find_events(limit=1)
    if newest and newest[0].at > now + _CLOCK_SLACK:
        detail = (
            f"the newest event is of {newest[0].at:%Y-%m-%d %H:%M} UTC, the clock says {now:%Y-%m-%d %H:%M}: it went "
            "back, and what waits until then stands still; set it right and keep it so by NTP"
        )
        return Check("clock against the record", ok=False, detail=detail)
    return Check("clock against the record", ok=True, detail="not before the newest event")


def _clock() -> Check:
    """Whether something keeps the clock right, as systemd says it."""
    if shutil.which("timedatectl") is None:
        return Check("clock", ok=True, detail="timedatectl is not here to say whether NTP keeps it")
    asked = subprocess.run(
        ["timedatectl", "show", "-p", "NTPSynchronized", "--value"],
        capture_output=True, text=True, check=False, timeout=10,
    )  # fmt: skip
    if asked.stdout.strip() == "yes":
        return Check("clock", ok=True, detail="kept by NTP")
    detail = "not known to be kept by NTP; dates in results and waits rest on it: install chrony or systemd-timesyncd"
    return Check("clock", ok=True, detail=detail, warns=True)


def _gpu(device: str) -> Check:
    """What a GPU's driver says of itself, without torch; preflight counts what a config names."""
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists():
        first = driver.read_text(encoding="utf-8", errors="replace").splitlines()[0]
        return Check("GPU", ok=True, detail=f"driver: {first.partition(':')[2].strip() or first}")
    detail = "no NVIDIA driver is loaded: networks run on the CPU, minutes a study"
    return Check("GPU", ok=True, detail=detail, warns=device != "cpu")


def _peer(destination: Destination, timeout_s: float) -> Check:
    name = f"destination {destination.name}"
    try:
        answer = ways.echo(destination, min(timeout_s, _ECHO_S))
    except SalsaNodeError as error:
        return Check(name, ok=False, detail=str(error))
    return Check(name, ok=True, detail=f"{destination.where} answered {answer}")


def _archive(config: Config) -> Iterator[Check]:
    query = config.query
    if not query.ae_title:
        return
    archive = Destination("[query]", query.ae_title, query.host, query.port, query.calling_ae_title)
    found = _peer(archive, query.timeout_s)
    yield Check("query", ok=found.ok, detail=found.detail, warns=found.warns)


def _told(config: Config) -> Iterator[Check]:
    """Whether somebody listens where notifications and the audit trail go; nothing is sent there. UDP has no answer."""
    notify, syslog, webhook = config.notify, urlsplit(config.audit.syslog), urlsplit(config.notify.webhook)
    places = []
    if webhook.hostname:
        places.append(("notify.webhook", webhook.hostname, webhook.port or (443 if webhook.scheme == "https" else 80)))
    if notify.email_to:
        places.append(("notify.smtp_host", notify.smtp_host, notify.smtp_port))
    if syslog.scheme in ("tcp", "tls") and syslog.hostname and syslog.port:
        places.append(("audit.syslog", syslog.hostname, syslog.port))
    for name, host, port in places:
        try:
            socket.create_connection((host, port), timeout=_ECHO_S).close()
        except OSError as error:
            why = error.strerror or type(error).__name__
            detail = f"{host}:{port} does not answer ({why}); is it up, and the port open from here?"
            yield Check(name, ok=False, detail=detail)
        else:
            yield Check(name, ok=True, detail=f"{host}:{port} answers")
