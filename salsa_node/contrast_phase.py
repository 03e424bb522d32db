"""In which contrast phase a series was taken, as far as its headers say so clearly.

Nothing here looks at voxels: a pipeline may, and says a `PixelPhase`.
And nothing here is trusted: what people and scanners write is read in the English,
German, French, Spanish, Dutch and Turkish of their protocols, and where it names two phases, or two attributes
disagree, the phase is unknown. Only our own words for phases and attributes come out, never the text that was read.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from enum import Enum
from typing import Final

from pydicom.dataset import Dataset


class Phase(Enum):
    """How long after the injection, in the words of liver imaging."""

    NATIVE = "non-contrast"
    ARTERIAL = "arterial"
    PORTAL_VENOUS = "portal venous"
    DELAYED = "delayed"
    UNKNOWN = "unknown"


EXPECTED: Final = Phase.PORTAL_VENOUS  # in which most liver lesions show best, and the networks were trained


@dataclass(frozen=True, slots=True)
class ContrastPhase:
    """The phase, and which attributes said what.

    said: (attribute, phase) for each attribute that names one phase, or "several"; never the text itself.
    """

    phase: Phase = Phase.UNKNOWN
    said: tuple[tuple[str, str], ...] = ()

    @property
    def wrong(self) -> str:
        """Why the phase is not the expected one, in a sentence; "" where it is, or is unknown."""
        if self.phase in (EXPECTED, Phase.UNKNOWN):
            return ""
        return (
            f"Phase wrong: {self.phase.value}, expected {EXPECTED.value}, as the headers have it "
            f"({self._attributes}). Lesions may be missed, and attenuation differs."
        )

    @property
    def sentence(self) -> str:
        """What a report says of the phase."""
        if self.wrong:
            return self.wrong
        if self.phase is not Phase.UNKNOWN:
            return f"Contrast phase: {self.phase.value}, as the headers have it ({self._attributes})."
        if self.said:
            told = ", ".join(f"{attribute}: {phase}" for attribute, phase in self.said)
            return f"Contrast phase unknown: the headers do not say one phase ({told})."
        return "Contrast phase unknown: the headers do not name it."

    @property
    def _attributes(self) -> str:
        return " and ".join(attribute for attribute, phase in self.said if phase == self.phase.value)


UNKNOWN_PHASE: Final = ContrastPhase()


@dataclass(frozen=True, slots=True)
class PixelPhase:
    """The contrast phase as the attenuation of organs shows it, whatever the headers say.

    phase: UNKNOWN where the pixels do not tell which. certainty: 0 to 1, as whoever estimated it states it.
    after_injection_s: None where only the phase was estimated.
    """

    phase: Phase
    certainty: float
    after_injection_s: float | None = None


_TEXTS: Final = {"SeriesDescription": "Series Description", "ProtocolName": "Protocol Name"}
_SEVERAL: Final = "several"

#: Seconds after the injection: where a phase is beyond doubt; between them it is not.
_DELAYS_S: Final = (
    (15.0, 45.0, Phase.ARTERIAL),
    (60.0, 110.0, Phase.PORTAL_VENOUS),
    (150.0, 1800.0, Phase.DELAYED),
)

_CONTRAST = r"(?:iv |i v )?(?:contrast\w*|kontrast\w*|km|civ|cte|pdc|produit\w*|inject\w*|iv|injection)\b"
#: In this order; what one has matched, the later ones do not see. None: contrast was given, no phase is named.
_PATTERNS: Final[tuple[tuple[str, Phase | None], ...]] = (
    (rf"\b(?:ohne|without|sans|sin|sem|zonder|w ?/ ?o|wo|no|non|ss)[ -]?{_CONTRAST}", Phase.NATIVE),
    (r"\b(?:blanco|(?:kontrast|ilac)siz)\b|\b(?:kontrast|ilac) oncesi\b|\bvoor contrast\b", Phase.NATIVE),
    (r"\b(?:w ?/ ?o|wo|without)\b", Phase.NATIVE),
    (r"\b(?:nativ[aeo]?|unenhanced|non ?enhanced|non ?con|plain|nect|ncct|spc|simple|fase basal|o ?km)\b",
     Phase.NATIVE),
    (r"\b(?:pre ?contrast\w*|vor km|avant inj\w*|precontraste)\b", Phase.NATIVE),
    (r"\bs ?/ ?c\b", Phase.NATIVE),
    (r"(?<![a-z])(?:c|iv) ?-(?![\w-])|(?:^|(?<=\s))-c(?!\w)", Phase.NATIVE),
    (r"\barteri(?:al|elle?) tardi\w*", Phase.ARTERIAL),
    (r"\b(?:late|laat|spat|spaet|tardi\w*|gec|early|fruh|frueh|vroege?|erken)[ -]?arteri(?:al|el|ell|eel|yel)\w{0,2}\b",
     Phase.ARTERIAL),
    (r"\b(?:arterial\w{0,2}|arteriel\w{0,3}|arterieel|arteriyel|arter fazi?|art|hap)\b", Phase.ARTERIAL),
    (r"\b(?:portal\w{0,2}|portaal|porto|pv|pvp)?[ -]?(?:portal\w{0,2}|portaal|pv|pvp|ven|venous|venos\w{0,2}"
     r"|venoes\w{0,2}|veineu\w{1,2}|venoz|(?:porta?al)?veneuze?|(?:porta?al|porto)?veneus|portalvenos\w{0,2}"
     r"|portalvenoes\w{0,2})\b", Phase.PORTAL_VENOUS),
    (r"\b(?:delay\w*|dly|equilib\w*|gleichgewicht\w*|excret\w*|ausscheid\w*|late|tardi\w*|retardad\w*|diferid\w*"
     r"|laat|uitscheiding\w*|evenwicht\w*|gec|gecikmis|denge)\b", Phase.DELAYED),
    (r"\b(?:spat|spaet)(?:phase|e|er)?\b", Phase.DELAYED),
    (rf"\b(?:mit|with|avec|con|com|met|na|post|nach|w ?/?|after|apres) ?{_CONTRAST}", None),
    (r"\b(?:kontrast|ilac)li\b|\b(?:kontrast|ilac) sonrasi\b", None),
    (r"\b(?:with|mit|avec|con|w ?/|w|ce|cect|enhanced|apc|c ?/ ?c)(?!\w)", None),
    (r"(?<![a-z])(?:c|iv) ?\+|\+ ?(?:c|km|iv)\b", None),
)  # fmt: skip
_SECONDS = re.compile(r"(?<![\w.,])(\d{2,3}) ?(?:s|sec|secs|sek|seg|sn)\b")
_MINUTES = re.compile(r"(?<![\w.,])(\d{1,2}) ?(?:m|min|mins|minuten|minutes|minutos|dk)\b")
_TIME = re.compile(r"\s*(\d{2}):?(\d{2}):?(\d{2}(?:\.\d+)?)")
_NO_AGENT = re.compile(r"\W*(?:no|non|none|nil|keine?|ohne|aucun|sans|ninguno|sin|without|geen|zonder|yok)\b.*|\W*")


def read(header: Dataset) -> ContrastPhase:
    """What the header of one image of a series says of its contrast phase. Raises nothing."""
    told = {name: _in_words(str(header.get(keyword) or "")) for keyword, name in _TEXTS.items()}
    delay_s = _delay_s(header)
    told["Contrast/Bolus Start Time"] = _at(delay_s) if delay_s is not None else frozenset()
    agent = str(header.get("ContrastBolusAgent") or "")
    if agent.strip() and _NO_AGENT.fullmatch(_simplified(agent)):
        told["Contrast/Bolus Agent"] = frozenset({Phase.NATIVE})
    phases = {name: found - {None} for name, found in told.items()}
    given = any(None in found for found in told.values()) or _given_into_a_vein(agent, header)
    # A protocol often names every phase of the examination: then it only must not speak against the others.
    single = [found for found in phases.values() if len(found) == 1]
    agreed = frozenset.intersection(*single) if single else frozenset()
    common = all(not found or agreed <= found for found in phases.values())
    description = phases["Series Description"]
    clear = len(agreed) == 1 and common and len(description) <= 1 and not (given and Phase.NATIVE in agreed)
    said = tuple((name, _named(found)) for name, found in phases.items() if found)
    if given and Phase.NATIVE in agreed:
        said = (*said, ("contrast agent", "given"))
    (phase,) = agreed if clear else (Phase.UNKNOWN,)
    return ContrastPhase(phase or Phase.UNKNOWN, said)


def _named(found: frozenset[Phase | None]) -> str:
    names = [phase.value for phase in found if phase is not None]
    return names[0] if len(names) == 1 else _SEVERAL


def _in_words(text: str) -> frozenset[Phase | None]:
    """The phases that a text names; None among them where it says that contrast was given."""
    rest = _simplified(text)
    found: set[Phase | None] = set()
    for pattern, phase in _PATTERNS:
        rest, times = re.subn(pattern, " | ", rest)
        if times:
            found.add(phase)
    delays_s = [float(n) for n in _SECONDS.findall(rest)] + [60 * float(n) for n in _MINUTES.findall(rest)]
    for delay_s in delays_s:
        found |= _at(delay_s)
    return frozenset(found)


def _simplified(text: str) -> str:
    """Lower case without accents; what is neither letter, digit, +, - , / nor . becomes a space."""
    plain = "".join(
        c for c in unicodedata.normalize("NFKD", text.casefold().replace("\u0131", "i")) if not unicodedata.combining(c)
    )
    return " ".join(re.sub(r"[^a-z0-9+/.-]|(?<=[a-z])\.", " ", plain).split())


def _at(delay_s: float) -> frozenset[Phase | None]:
    return frozenset(phase for earliest, latest, phase in _DELAYS_S if earliest <= delay_s <= latest)


def _given_into_a_vein(agent: str, header: Dataset) -> bool:
    """Whether the header names an agent, and no other way than a vein."""
    route = _simplified(str(header.get("ContrastBolusRoute") or ""))
    words = _simplified(agent)
    return bool(words) and not _NO_AGENT.fullmatch(words) and "oral" not in route + words and "rect" not in route


def _delay_s(header: Dataset) -> float | None:
    """From the start of the bolus to this image; None where either is missing or they cannot belong together."""
    times = [_seconds(header.get(keyword)) for keyword in ("ContrastBolusStartTime", "AcquisitionTime")]
    if times[0] is None or times[1] is None:
        return None
    delay_s = (times[1] - times[0]) % 86400  # past midnight
    return delay_s if delay_s <= _DELAYS_S[-1][1] else None


def _seconds(value: object) -> float | None:
    """Of the day (PS3.5 6.2, value representation TM)."""
    found = _TIME.match(str(value or ""))
    if found is None:
        return None
    hours, minutes, seconds = (float(part) for part in found.groups())
    return 3600 * hours + 60 * minutes + seconds
