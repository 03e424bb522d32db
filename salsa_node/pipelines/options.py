"""What the pipelines' own settings may be, by name and value; known without importing any of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from salsa_node.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Option:
    """One setting of a pipeline.

    expected: what it may be, in words. fits: whether a value is that.
    needs: the module and the extra of this package that it needs where it is on.
    """

    expected: str
    fits: Callable[[object], bool]
    needs: tuple[str, str] = ("", "")


def _words(*words: str) -> Option:
    return Option(f"one of {', '.join(words)}", lambda value: value in words)


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _is_label(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _are_labels(value: object) -> bool:
    return _is_label(value) or (isinstance(value, list | tuple) and all(_is_label(label) for label in value))


_SWITCH: Final = Option("true or false", lambda value: isinstance(value, bool))
_SHARE: Final = Option("a share of the patch, above 0 and at most 1", _is_share)
_LABELS: Final = Option("a list of labels (1, 2, ...)", _are_labels)
_PRECISION: Final = _words("auto", "float32", "bfloat16")
_ENGINE: Final = _words("own", "compiled", "reference")

#: pipeline -> its own settings
OPTIONS: Final[Mapping[str, Mapping[str, Option]]] = {
    "demo": {"mirroring": _SWITCH, "precision": _PRECISION, "engine": _ENGINE},
    "salsa": {
        "preset": _words("salsa", "salsa-2025", "salsa-2024"),
        "mirroring": _SWITCH,
        "tile_step": _SHARE,
        "precision": _PRECISION,
        "engine": _ENGINE,
        "fast_liver": _SWITCH,
    },
    "given_masks": {"organ_labels": _LABELS, "lesion_labels": _LABELS, "lesion_per_label": _SWITCH},
    "totalsegmentator-liver-lesions": {
        "body_region": _SWITCH,
        "contrast_phase": Option(_SWITCH.expected, _SWITCH.fits, needs=("xgboost", "phase")),
        "couinaud": _SWITCH,
        "precision": _PRECISION,
        "engine": _ENGINE,
    },
}


def check(name: str, found: Mapping[str, object]) -> None:
    """Raises ConfigError for a setting that the pipeline of that name does not have, or cannot have with that value.

    Also for one that needs a package which is not installed. Imports neither the pipeline nor what it needs.
    """
    known = OPTIONS[name]
    for key, value in found.items():
        if key not in known:
            raise ConfigError(f"pipeline.options.{key}: the pipeline {name} has {', '.join(known)}")
        option = known[key]
        if not option.fits(value):
            raise ConfigError(f"pipeline.options.{key}: {name} takes {option.expected}; found {value!r}")
        module, extra = option.needs
        if module and value and importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"pipeline.options.{key}: needs the package {module}, which is not installed; "
                f"run: pip install 'salsa_node[{extra}]'"
            )
