"""What a result consists of: the choices of a site, data only."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Products:
    """What is made of the findings beside the SEG by class and the record, which are always made.

    include_liver: the SEG by class gets a liver segment beside the lesions; where they come to more than 400 frames
        together, which a known viewer does not show, the liver gets a SEG and a series of its own.
    per_lesion_seg: a SEG with one segment per lesion, to which the record then refers.
    viewer_sr: a report with the diameters as lines that viewers draw.
    summary_page: the findings as a page, as Secondary Capture; summary_pdf: the same as Encapsulated PDF.
    key_images: pictures of so many slices at most, that of the largest lesion first, each with all its lesions, after
        the page.
    key_object_selection: a Key Object Selection that points at the source slices.
    first_series_number: the series of a result are numbered from it on.
    time_zone: what the dates of results are written in where the images name none, as "Europe/Berlin"; "" for that of
        the machine.
    """

    include_liver: bool = False
    per_lesion_seg: bool = True
    viewer_sr: bool = True
    summary_page: bool = True
    summary_pdf: bool = True
    key_images: int = field(default=10, metadata={"min": 0, "max": 100})
    key_object_selection: bool = True
    first_series_number: int = field(default=9001, metadata={"min": 1, "max": 2**31 - 100_001})
    time_zone: str = ""
