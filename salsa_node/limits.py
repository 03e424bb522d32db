"""What a plausible result looks like: the numbers behind the guards, data only."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Limits:
    """Beyond these a result is flagged, and where it lies mirrored on its images it is not sent.

    min_liver_ml, max_liver_ml: adult livers hold about 800 to 3,000 ml; small remnants and large
        polycystic livers lie outside of that, so the flag begins well beyond it.
    max_share_of_body: of the body's cross-section, in the slice with most liver; a liver fills up to
        about one half, a brain taken for a liver three quarters.
    min_share_in_liver: of a lesion's voxels that lie in the liver or within near_liver_mm of it.
    mirrored: "block" keeps a result that fits its images far better when mirrored, "flag" sends it with the flag.
    """

    min_liver_ml: float = 300.0
    max_liver_ml: float = 6000.0
    max_share_of_body: float = field(default=0.65, metadata={"above": 0, "max": 1})
    min_share_in_liver: float = field(default=0.5, metadata={"max": 1})
    near_liver_mm: float = 10.0
    mirrored: str = field(default="block", metadata={"choices": ("block", "flag")})
