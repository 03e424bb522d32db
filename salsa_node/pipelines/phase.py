"""How long after the injection a CT was taken, and so its contrast phase: TotalSegmentator's `totalseg_get_phase`.

Five regressors, one a fold, read the median attenuation of sixteen organs, as the 3 mm network of the task "total"
marks them, and of four vessels of the neck where the head is in the scan (Wasserthal et al., 2024). The regressors
come with TotalSegmentator; XGBoost, which runs them, does not: it is installed with `pip install salsa_node[phase]`.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from salsa_node import contrast_phase
from salsa_node.contrast_phase import PixelPhase
from salsa_node.errors import PipelineError

#: what the regressors read, in their order; the vessels of the neck come after them
ORGANS: Final = (
    "liver", "pancreas", "urinary_bladder", "gallbladder", "heart", "aorta", "inferior_vena_cava",
    "portal_vein_and_splenic_vein", "iliac_vena_left", "iliac_vena_right", "iliac_artery_left", "iliac_artery_right",
    "pulmonary_vein", "brain", "colon", "small_bowel",
)  # fmt: skip
_NECK_VESSELS: Final = 4
_BRAIN_MM3: Final = 100.0  # with more of it in the scan, the vessels of the neck are measured too
_REGRESSORS: Final = "resources/contrast_phase_classifiers_2024_07_19.pkl"
_ALLOWED: Final = (("builtins", "bytearray"), ("xgboost.core", "Booster"), ("xgboost.sklearn", "XGBRegressor"))
#: below so many seconds, which phase it is and how sure that is
_PHASES: Final = (
    (5.0, "native", 1.0), (10.0, "native", 0.7), (20.0, "early arterial", 0.7), (30.0, "early arterial", 1.0),
    (50.0, "late arterial", 1.0), (60.0, "late arterial", 0.7), (90.0, "portal venous", 1.0),
    (100.0, "portal venous", 0.7), (float("inf"), "portal venous or later", 0.3),
)  # fmt: skip

_IN_OUR_WORDS: Final = {
    "native": contrast_phase.Phase.NATIVE,
    "early arterial": contrast_phase.Phase.ARTERIAL,
    "late arterial": contrast_phase.Phase.ARTERIAL,
    "portal venous": contrast_phase.Phase.PORTAL_VENOUS,
    "portal venous or later": contrast_phase.Phase.UNKNOWN,
}


@dataclass(frozen=True, slots=True)
class Phase:
    """A contrast phase.

    after_injection_s: the mean of the five regressors; spread_s: their standard deviation.
    certainty: 0 to 1, as TotalSegmentator states it for that time.
    """

    name: str
    after_injection_s: float
    spread_s: float
    certainty: float

    @property
    def seen(self) -> PixelPhase:
        """In the words of liver imaging; "portal venous or later" is none of them."""
        return PixelPhase(_IN_OUR_WORDS[self.name], self.certainty, self.after_injection_s)


class _Regressor(Protocol):
    def predict(self, features: list[list[float]]) -> npt.NDArray[np.float32]: ...


class PhaseEstimator:
    """TotalSegmentator's regressors in memory; XGBoost must be installed."""

    def __init__(self) -> None:
        content = (resources.files("totalsegmentator") / _REGRESSORS).read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "(?s).*If you are loading a serialized model"
            )  # of 2024; it reads it well
            self._regressors: list[_Regressor] = list(_Reader(io.BytesIO(content)).load().values())

    @property
    def libraries(self) -> dict[str, str]:
        """For a Provenance: XGBoost under its name, whatever distribution it came with."""
        import xgboost

        return {"xgboost": str(xgboost.__version__)}

    def estimate(
        self, hu: npt.NDArray[np.float32], labels: npt.NDArray[np.uint8], classes: Mapping[int, str], voxel_mm3: float
    ) -> Phase | None:
        """The phase of a CT; None where the head is in the scan, whose vessels nobody has marked.

        hu, labels: of one shape, at 3 mm, as the 3 mm network saw and marked them. classes: label -> anatomy.
        """
        label_of = {name: label for label, name in classes.items()}
        medians = {name: _median(hu, labels == label_of[name]) for name in ORGANS}
        if np.count_nonzero(labels == label_of["brain"]) * voxel_mm3 > _BRAIN_MM3:
            return None
        features = [*medians.values(), *([0.0] * _NECK_VESSELS)]
        times_s = np.array([regressor.predict([features])[0] for regressor in self._regressors])
        return phase_at(round(float(times_s.mean()), 2), round(float(times_s.std()), 4))


def phase_at(after_injection_s: float, spread_s: float = 0.0) -> Phase:
    """The phase of a CT so many seconds after the injection."""
    name, certainty = next((name, sure) for below_s, name, sure in _PHASES if after_injection_s < below_s)
    return Phase(name, after_injection_s, spread_s, certainty)


def _median(hu: npt.NDArray[np.float32], mask: npt.NDArray[np.bool_]) -> float:
    return float(np.median(hu[mask].astype(np.int16))) if mask.any() else 0.0


class _Reader(pickle.Unpickler):
    """Reads the regressors and nothing else: no other class or function is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise PipelineError(f"TotalSegmentator's regressors ask for {module}.{name}; only XGBoost's own are read")
        return super().find_class(module, name)
