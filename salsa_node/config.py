"""TOML -> frozen settings: the only reader of files and environment for settings.

An unknown key is refused with the nearest known one, a wrong type or value with what was found and
what was expected. Nothing is repaired.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import socket
import tomllib
import types
import typing
import urllib.parse
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from salsa_node.criteria import Criteria
from salsa_node.errors import ConfigError
from salsa_node.limits import Limits
from salsa_node.products import Products
from salsa_node.selection_rules import SelectionRules
from salsa_node.series_rules import SeriesRules
from salsa_node.settings import (
    SENDER,
    AssemblySettings,
    AuditSettings,
    DeliverySettings,
    Destination,
    ListenerSettings,
    NodeSettings,
    NotifySettings,
    PipelineChoice,
    Profile,
    QuerySettings,
    RetentionSettings,
    WebSettings,
    WorkerSettings,
    invalid_peer,
    invalid_template,
)

ENVIRONMENT = "SALSA_NODE_CONFIG"


@dataclass(frozen=True, slots=True)
class Config:
    """All settings of one node; the sections of the TOML file, in its order."""

    node: NodeSettings = field(default_factory=NodeSettings)
    listener: ListenerSettings = field(default_factory=ListenerSettings)
    assembly: AssemblySettings = field(default_factory=AssemblySettings)
    query: QuerySettings = field(default_factory=QuerySettings)
    selection: SelectionRules = field(default_factory=SelectionRules)
    series: SeriesRules = field(default_factory=SeriesRules)
    pipeline: PipelineChoice = field(default_factory=PipelineChoice)
    criteria: Criteria = field(default_factory=Criteria)
    guards: Limits = field(default_factory=Limits)
    results: Products = field(default_factory=Products)
    worker: WorkerSettings = field(default_factory=WorkerSettings)
    delivery: DeliverySettings = field(default_factory=DeliverySettings)
    retention: RetentionSettings = field(default_factory=RetentionSettings)
    web: WebSettings = field(default_factory=WebSettings)
    audit: AuditSettings = field(default_factory=AuditSettings)
    notify: NotifySettings = field(default_factory=NotifySettings)
    destination: tuple[Destination, ...] = ()
    profile: tuple[Profile, ...] = ()

    @property
    def profile_pipelines(self) -> Mapping[str, PipelineChoice]:
        """AE title of ours -> what looks at the studies that come to it, where that is not `pipeline`."""
        return {
            profile.ae_title: replace(self.pipeline, name=profile.pipeline, options=profile.options)
            for profile in self.profile
            if profile.pipeline
        }

    def destinations_for(self, called_ae: str) -> tuple[str, ...]:
        """Names of the destinations that results of such studies go to."""
        to = next((p.to for p in self.profile if p.ae_title == called_ae and p.to), self.delivery.to)
        return tuple(dict.fromkeys((*to, *self.delivery.research))) if self.delivery.shadow else to

    @property
    def store_url(self) -> str:
        """Where the record lies."""
        return self.node.store_url or f"sqlite:///{self.node.data_dir / 'salsa_node.sqlite'}"

    @property
    def models_dir(self) -> Path:
        """Where installed models lie."""
        return Path(self.pipeline.models_dir) if self.pipeline.models_dir else self.node.data_dir / "models"

    def destination_named(self, name: str) -> Destination:
        """The destination of that name. Raises ConfigError naming those there are."""
        for destination in self.destination:
            if destination.name == name:
                return destination
        there = ", ".join(d.name for d in self.destination) or "none; add a [[destination]] to the config"
        raise ConfigError(f"no destination is called {name!r}; there are: {there}")


def load(path: Path | None = None) -> Config:
    """Settings from `path`, else from the file that $SALSA_NODE_CONFIG names, else the defaults.

    Raises ConfigError with the file, the key, what was found and what was expected.
    """
    named = source(path)
    if named is None:
        return Config()
    try:
        text = named.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{named}: the config file cannot be read ({exc.__class__.__name__}: {exc})") from exc
    try:
        return parse(text)
    except ConfigError as exc:
        raise ConfigError(f"{named}: {exc}") from exc


def source(path: Path | None) -> Path | None:
    """The file that `load(path)` reads; None where the defaults hold."""
    return path or (Path(os.environ[ENVIRONMENT]) if os.environ.get(ENVIRONMENT) else None)


def parse(text: str) -> Config:
    """Settings from TOML text; keys that are absent keep their defaults. Raises ConfigError."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"not valid TOML: {exc}") from exc
    config = _value(Config, document, "")
    assert isinstance(config, Config)
    _check_together(config)
    return config


def dump(config: Config) -> str:
    """Those settings as TOML, every key that has not its default: `parse(dump(config)) == config`."""
    lines = []
    for section in fields(config):
        values = getattr(config, section.name)
        several = values if isinstance(values, tuple) else (values,)
        for value in several:
            lines.append(f"[[{section.name}]]" if isinstance(values, tuple) else f"[{section.name}]")
            told = ((key, getattr(value, key.name)) for key in fields(value))
            lines += [f"{key.name} = {_literal(item)}" for key, item in told if item != _default(key)]
    return "\n".join(lines) + "\n"


def _default(entry: Field[Any]) -> object:
    """What a key is when it is left out; MISSING where it may not be."""
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def _literal(value: object) -> str:
    """A value as TOML writes it; a JSON string is a TOML string."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Enum):
        return json.dumps(value.value)
    if isinstance(value, str | Path):
        return json.dumps(str(value))
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{json.dumps(str(key))} = {_literal(item)}' for key, item in value.items())} }}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_literal, value))}]"
    assert is_dataclass(value), f"a setting of a kind that TOML does not have: {type(value).__name__}"
    pairs = ((key, getattr(value, key.name)) for key in fields(value))
    return f"{{ {', '.join(f'{key.name} = {_literal(item)}' for key, item in pairs if item != _default(key))} }}"


def _value(kind: object, found: object, key: str) -> object:
    """`found` as a `kind`, or a ConfigError that names `key`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind) and isinstance(kind, type):
        return _section(kind, found, key)
    if origin is tuple:
        if not isinstance(found, list):
            raise ConfigError(f"{key}: expected a list, found {found!r}")
        return tuple(_value(arguments[0], item, f"{key}[{n}]") for n, item in enumerate(found))
    if origin in (typing.Union, types.UnionType):
        return _value(next(a for a in arguments if a is not type(None)), found, key)
    if origin in (Mapping, dict):
        if not isinstance(found, dict):
            raise ConfigError(f"{key}: expected a table, found {found!r}")
        return found
    if isinstance(kind, type) and issubclass(kind, Enum):
        try:
            return kind(found)
        except ValueError:
            raise ConfigError(
                f"{key}: expected one of {', '.join(str(m.value) for m in kind)}, found {found!r}"
            ) from None
    if kind is Path and isinstance(found, str):
        return Path(found)
    if kind is float and isinstance(found, int) and not isinstance(found, bool):
        return float(found)
    if isinstance(kind, type) and isinstance(found, kind) and (kind is bool or not isinstance(found, bool)):
        return found
    expected = kind.__name__ if isinstance(kind, type) else str(kind)
    raise ConfigError(f"{key}: expected {'text' if kind in (str, Path) else expected}, found {found!r}")


def _section(kind: type, found: object, key: str) -> object:
    if not isinstance(found, dict):
        raise ConfigError(f"{key}: expected a table, found {found!r}")
    known = {f.name: f for f in fields(kind)}
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
            raise ConfigError(f"{_dotted(key, name)}: no such key; {hint}")
    for name, entry in known.items():
        if name not in found and entry.default is MISSING and entry.default_factory is MISSING:
            raise ConfigError(f"{_dotted(key, name)}: missing")
    hints = typing.get_type_hints(kind)
    values = {name: _value(hints[name], found[name], _dotted(key, name)) for name in found}
    for name, value in values.items():
        _check_alone(known[name], value, _dotted(key, name))
    return kind(**values)


def _check_alone(entry: Field[object], value: object, key: str) -> None:
    """What a value must obey by itself; the unit in the key's name says most of it."""
    choices = entry.metadata.get("choices")
    if choices and value not in choices:
        raise ConfigError(f"{key}: expected one of {', '.join(choices)}, found {value!r}")
    title = entry.name.endswith("ae_title") and value != entry.default
    if title and isinstance(value, str) and not _is_ae_title(value):
        raise ConfigError(
            f"{key}: an AE title has 1 to 16 printable ASCII characters without backslash, found {value!r}"
        )
    pattern = entry.metadata.get("pattern")
    for text in value if isinstance(value, tuple) else (value,):
        if pattern and not re.fullmatch(pattern, str(text)):
            raise ConfigError(f"{key}: expected text of the form {pattern}, found {text!r}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        _check_number(entry, value, key)


def _check_number(entry: Field[object], value: float, key: str) -> None:
    above, low = entry.metadata.get("above"), entry.metadata.get("min", 0)
    high = entry.metadata.get("max", 1e9)  # a larger number of seconds, slices or bytes is a slip of the hand
    if above is not None and not above < value <= high:
        raise ConfigError(f"{key}: expected more than {above} and at most {high:.10g}, found {value!r}")
    if not low <= value <= high:
        raise ConfigError(f"{key}: expected at least {low} and at most {high:.10g}, found {value!r}")


def _check_together(config: Config) -> None:
    """What several values must obey together."""
    if 2 * config.worker.heartbeat_s > config.worker.lease_s:
        raise ConfigError(
            f"worker.heartbeat_s: expected at most half of worker.lease_s ({config.worker.lease_s:g}), "
            f"found {config.worker.heartbeat_s:g}"
        )
    if config.guards.min_liver_ml >= config.guards.max_liver_ml:
        raise ConfigError(
            f"guards.min_liver_ml: expected less than guards.max_liver_ml ({config.guards.max_liver_ml:g}), "
            f"found {config.guards.min_liver_ml:g}"
        )
    if config.selection.thick_mm <= config.selection.thin_mm:
        raise ConfigError(
            f"selection.thick_mm: expected more than selection.thin_mm ({config.selection.thin_mm:g}), "
            f"found {config.selection.thick_mm:g}"
        )
    for key in ("stat_ae_titles", "off_peak_ae_titles"):
        for title in getattr(config.worker, key):
            if not _is_ae_title(title):
                raise ConfigError(f"worker.{key}: expected AE titles of 1 to 16 characters, found {title!r}")
    both = set(config.worker.stat_ae_titles) & set(config.worker.off_peak_ae_titles)
    if both:
        raise ConfigError(f"worker.off_peak_ae_titles: {min(both)!r} is among worker.stat_ae_titles; choose one")
    wrong = invalid_peer(config.listener.allowed) or invalid_template(config.notify)
    if wrong:
        raise ConfigError(wrong)
    tls = config.listener.tls
    absent = [name for name in ("certificate", "key", "authorities") if not getattr(tls, name)]
    if tls.port and absent:
        raise ConfigError(
            f"listener.tls.{absent[0]}: expected a PEM file, found none; with a port all three are needed"
        )
    if tls.port == config.listener.port:
        raise ConfigError(f"listener.tls.port: {tls.port} is the port of the plain door; each needs its own")
    if config.node.store_url and not config.node.store_url.startswith(("sqlite:///", "postgresql://")):
        raise ConfigError(
            "node.store_url: expected sqlite:///FILE, postgresql://USER@HOST/DATABASE, "
            'or "" for a file in node.data_dir'
        )
    try:
        ZoneInfo(config.results.time_zone or "UTC")
    except (ValueError, OSError, ZoneInfoNotFoundError) as exc:
        raise ConfigError(
            f'results.time_zone: expected a name such as "Europe/Berlin", or "" for the machine\'s own, found '
            f"{config.results.time_zone!r}"
        ) from exc
    names = [destination.name for destination in config.destination]
    for name in names:
        if names.count(name) > 1 or name == SENDER:
            raise ConfigError(f"destination: the name {name!r} is taken; each needs its own")
    for number, destination in enumerate(config.destination):
        _check_way(f"destination[{number}]", destination, config.listener)
    _check_destinations("delivery.to", config.delivery.to, names)
    _check_destinations("delivery.research", config.delivery.research, names)
    titles = [config.listener.ae_title]
    for number, profile in enumerate(config.profile):
        if profile.ae_title in titles:
            raise ConfigError(f"profile[{number}].ae_title: {profile.ae_title!r} is taken; each needs its own")
        titles.append(profile.ae_title)
        if profile.options and not profile.pipeline:
            raise ConfigError(f"profile[{number}].options: name the pipeline that they belong to")
        _check_destinations(f"profile[{number}].to", profile.to, names)


def _check_way(key: str, destination: Destination, door: ListenerSettings) -> None:
    """One way to each destination, whole, and none of them back to ourselves."""
    network = {name: getattr(destination, name) for name in ("ae_title", "host", "port")}
    ways = [name for name in ("url", "folder") if getattr(destination, name)]
    if not ways:
        for name, value in network.items():
            if not value:
                raise ConfigError(f"{key}.{name}: missing; or give a url (DICOMweb) or a folder instead")
    elif len(ways) > 1 or any(network.values()):
        raise ConfigError(
            f"{key}: expected ae_title, host and port, or a url, or a folder; found more than one of them"
        )
    if bool(destination.certificate) != bool(destination.key):
        raise ConfigError(f"{key}: certificate and key go together")
    if destination.tls and not destination.host:
        raise ConfigError(f"{key}.tls: is for DICOM; with a url write https")
    if destination.secret and not destination.url:
        raise ConfigError(f"{key}.secret: is for a url; DICOM shows a certificate instead")
    if destination.secret and not destination.url.startswith("https:") and not _is_here(destination.url):
        raise ConfigError(f"{key}.secret: would go over the network unencrypted; use https")
    here = destination.host in ("localhost", "127.0.0.1", "::1", door.host, socket.gethostname())
    if here and destination.port in (door.port, door.tls.port):
        raise ConfigError(f"{key}: {destination.host} port {destination.port} is this node itself; name the archive's")


def _is_here(url: str) -> bool:
    return urllib.parse.urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def _check_destinations(key: str, to: tuple[str, ...], names: list[str]) -> None:
    for name in to:
        if to.count(name) > 1:
            raise ConfigError(f"{key}: {name!r} stands there twice; each destination once")
        if name != SENDER and name not in names:
            there = ", ".join([*names, SENDER])
            raise ConfigError(f"{key}: no [[destination]] is called {name!r}; there are: {there}")


def _is_ae_title(text: str) -> bool:
    """PS3.5 6.2, value representation AE."""
    return len(text.strip()) >= 1 and len(text) <= 16 and all(32 <= ord(c) < 127 and c != "\\" for c in text)


def _dotted(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name
