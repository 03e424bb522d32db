"""On which series a radiologist would look for liver lesions: how many, and the points behind the choice."""

from __future__ import annotations

from dataclasses import dataclass, field

_SIGNED = {"min": -1000, "max": 1000}


@dataclass(frozen=True, slots=True)
class SelectionRules:
    """What a series is worth; the one with the most points is analysed, or so many.

    best: how many series of a study are analysed, each with a result of its own; of one acquisition never two.
    portal_venous ... native: points for the contrast phase that the headers name, or the pixels showed.
    pixel_certainty: as certain a pipeline must be that saw another phase; what it saw then counts, not the headers.
    original, derived: for an image as the scanner reconstructed it; for one derived from such; none for a secondary
        one, as a reformat or a copy is.
    soft_kernel, unknown_kernel: for the reconstruction kernel; none for a sharp one.
    thin: for slices no further apart than thin_mm, fewer the further, none from thick_mm on.
    coverage: for slices that reach over liver_range_mm, which holds a liver; in proportion where they reach less far.
    abdomen, elsewhere: where Body Part Examined names the abdomen, or something else; half of the latter for its
        neighbours, chest and pelvis.
    lossy: for images that were compressed with loss.
    max_tilt_degrees: between the slices' normal and the patient's long axis; beyond, a series is not axial.
    never: words of Image Type that rule a series out.
    """

    best: int = field(default=1, metadata={"min": 1, "max": 20})
    portal_venous: float = field(default=40.0, metadata=_SIGNED)
    unknown_phase: float = field(default=20.0, metadata=_SIGNED)
    delayed: float = field(default=15.0, metadata=_SIGNED)
    arterial: float = field(default=10.0, metadata=_SIGNED)
    native: float = field(default=0.0, metadata=_SIGNED)
    pixel_certainty: float = field(default=0.7, metadata={"min": 0, "max": 1})
    original: float = field(default=20.0, metadata=_SIGNED)
    derived: float = field(default=15.0, metadata=_SIGNED)
    soft_kernel: float = field(default=15.0, metadata=_SIGNED)
    unknown_kernel: float = field(default=8.0, metadata=_SIGNED)
    thin: float = field(default=20.0, metadata=_SIGNED)
    thin_mm: float = field(default=1.0, metadata={"above": 0})
    thick_mm: float = field(default=10.0, metadata={"above": 0})
    coverage: float = field(default=60.0, metadata=_SIGNED)
    liver_range_mm: float = field(default=200.0, metadata={"above": 0})
    abdomen: float = field(default=5.0, metadata=_SIGNED)
    elsewhere: float = field(default=-40.0, metadata=_SIGNED)
    lossy: float = field(default=-5.0, metadata=_SIGNED)
    max_tilt_degrees: float = field(default=30.0, metadata={"max": 90})
    never: tuple[str, ...] = (
        "LOCALIZER",
        "SCREEN SAVE",
        "DOSEINFO",
        "DOSE_INFO",
        "SCREENSHOT",
        "PERFUSION",
        "MIP",
        "MAXIP",
        "MAX_IP",
        "MINIP",
        "MIN_IP",
        "IODINE",
        "IODINE_MAP",
        "DECOMP",
    )
