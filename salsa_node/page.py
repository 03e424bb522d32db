"""Findings -> the summary page: what was found, on paper, for those who see neither SEG nor SR.

The page is set once, as a PDF with real text; its pictures are that PDF rendered. No patient identity stands on
it: the viewer shows whose it is, from the header. The same findings give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from xml.sax.saxutils import escape

import numpy as np
import numpy.typing as npt
import pypdfium2
from PIL import Image
from reportlab import rl_config
from reportlab.lib import colors
from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import ParagraphStyle
from reportlab.lib.units import mm
from reportlab.pdfgen.canvas import Canvas
from reportlab.platypus import Flowable, Paragraph, SimpleDocTemplate, Spacer, Table, TableStyle
from reportlab.platypus import Image as Picture

from salsa_node import picture
from salsa_node.codes import MEASURABLE_RGB, NON_MEASURABLE_RGB
from salsa_node.dicom_result import caveat, plain, titled, weights
from salsa_node.dicom_sr import refusal, rule_text, sentences
from salsa_node.findings import Disease, Findings, lengths_mm, table
from salsa_node.pipelines import Provenance
from salsa_node.volume import CtVolume

Pixels = npt.NDArray[np.uint8]

# Streams as bytes, a fifth smaller: else reportlab spells them out as text, ASCII85, letter by letter.
rl_config.useA85 = 0

DOTS_PER_INCH: Final = 110
_TEXT: Final = ParagraphStyle("text", fontName="Helvetica", fontSize=9, leading=12)
_SMALL: Final = ParagraphStyle("small", parent=_TEXT, fontSize=7, leading=9, textColor=colors.HexColor("#444444"))
_TITLE: Final = ParagraphStyle("title", parent=_TEXT, fontName="Helvetica-Bold", fontSize=16, leading=20)
_CAUTION: Final = ParagraphStyle("caution", parent=_TEXT, fontName="Helvetica-Bold", fontSize=10, leading=14)
_NOTICE: Final = ParagraphStyle("notice", parent=_CAUTION, textColor=colors.HexColor("#b00000"))
_HEADINGS: Final = ("lesion", "RECIST 1.1", "volume, ml", "long x short axis, mm", "mean (SD), HU")
_FLAG: Final = ParagraphStyle(
    "flag", parent=_TEXT, backColor=colors.HexColor("#fff0c0"), borderPadding=(2, 3, 2, 3), leftIndent=3, spaceAfter=6
)
_KEPT: Final = ParagraphStyle("kept", parent=_FLAG, fontName="Helvetica-Bold", backColor=colors.HexColor("#ffd8d8"))
_COLUMNS_MM: Final = (16, 34, 26, 44, 34, 16)
_WIDTH_MM: Final = 180.0
_PICTURE_MM: Final = (175.0, 110.0)  # at most so wide and so high


@dataclass(frozen=True, slots=True)
class Page:
    """The summary page as a PDF.

    pdf: the file's bytes; one or more A4 pages with text that can be searched.
    """

    pdf: bytes

    def pictures(self) -> list[Pixels]:
        """Each page rendered: (rows, columns, 3) of 8-bit RGB."""
        document = pypdfium2.PdfDocument(self.pdf)
        try:
            return [np.array(page.render(scale=DOTS_PER_INCH / 72).to_pil().convert("RGB")) for page in document]
        finally:
            document.close()


def of_findings(ct: CtVolume, findings: Findings, produced_at: datetime, about: Sequence[str] = ()) -> Page:
    """The page of an analysis: outcome, flags, table, pictures, rule, provenance.

    produced_at: aware; written on the page as it stands.
    about: sentences on the result itself, below its title: of which images it is, what it takes the place of.
    """
    provenance = findings.provenance
    said = sentences(findings)
    story: list[Flowable] = _head(provenance, produced_at, about)
    story += [Paragraph(escape(plain(said[0])), _CAUTION), Spacer(1, 2 * mm)]
    story += [Paragraph(escape(plain(flag.text)), _KEPT if flag.blocks else _FLAG) for flag in findings.flags]
    if findings.lesions:
        story += [_lesions(findings), Spacer(1, 3 * mm)]
    story += [Paragraph(escape(plain(sentence)), _TEXT) for sentence in said[1 + len(findings.flags) :]]
    story += [Spacer(1, 3 * mm), _fitted(picture.mosaic(ct, findings)), Spacer(1, 3 * mm)]
    story += [Paragraph(escape(plain(rule_text(findings.criteria))), _SMALL), *_made_by(provenance)]
    return _printed(story, provenance, produced_at)


def of_refusal(reason: str, provenance: Provenance | None, produced_at: datetime, about: Sequence[str] = ()) -> Page:
    """The page that says no analysis was possible, and why. Arguments as of `of_findings`."""
    story: list[Flowable] = _head(provenance, produced_at, about)
    story.append(Paragraph(escape(plain(refusal(reason))), _CAUTION))
    if provenance is not None:
        story += [Spacer(1, 3 * mm), *_made_by(provenance)]
    return _printed(story, provenance, produced_at)


def _head(provenance: Provenance | None, produced_at: datetime, about: Sequence[str]) -> list[Flowable]:
    made = f"Dated {produced_at:%Y-%m-%d %H:%M %Z}. Whose images these are stands in the header of this object."
    notice = provenance.notice if provenance is not None else ""
    return [
        Paragraph(escape(titled("summary", provenance)), _TITLE),
        *([Paragraph(escape(plain(notice)), _NOTICE)] if notice else []),
        Paragraph(escape(caveat(provenance)), _CAUTION),
        *(Paragraph(escape(plain(words)), _TEXT) for words in about if words),
        Paragraph(escape(plain(made)), _SMALL),
        Spacer(1, 4 * mm),
    ]


def _lesions(findings: Findings) -> Table:
    rows: list[Sequence[str]] = [(*_HEADINGS, "image" if findings.image_numbers else "slice")]
    looks: list[tuple[object, ...]] = [
        ("FONT", (0, 0), (-1, -1), "Helvetica", 8),
        ("FONT", (0, 0), (-1, 0), "Helvetica-Bold", 8),
        ("LINEBELOW", (0, 0), (-1, 0), 0.8, colors.black),
        ("ALIGN", (2, 0), (-1, -1), "RIGHT"),
        ("TOPPADDING", (0, 0), (-1, -1), 1.5),
        ("BOTTOMPADDING", (0, 0), (-1, -1), 1.5),
    ]
    for number, (row, lesion) in enumerate(zip(table(findings), findings.lesions, strict=True), start=1):
        rows.append(
            (
                f"L{row['lesion']}",
                str(row["disease"]),
                f"{lesion.volume_mm3 / 1000:.2f}",
                "{:.1f} x {:.1f}".format(*lengths_mm(lesion, findings)),
                f"{round(lesion.mean_hu)} ({round(lesion.sd_hu)})",
                findings.called(lesion.slice_index).split()[1],
            )
        )
        rgb = MEASURABLE_RGB if lesion.disease is Disease.MEASURABLE else NON_MEASURABLE_RGB
        looks.append(("LINEBEFORE", (0, number), (0, number), 3, colors.Color(*(value / 255 for value in rgb))))
    return Table(
        rows, colWidths=[width * mm for width in _COLUMNS_MM], style=TableStyle(looks), repeatRows=1, hAlign="LEFT"
    )


def _fitted(image: Image.Image) -> Picture:
    """The picture as large as the page has room for."""
    scale = min(_PICTURE_MM[0] / image.width, _PICTURE_MM[1] / image.height) * mm
    content = io.BytesIO()
    image.save(content, format="PPM")  # reportlab reads the pixels again, and compresses them itself
    content.seek(0)
    return Picture(content, width=image.width * scale, height=image.height * scale, hAlign="LEFT")


def _made_by(provenance: Provenance) -> list[Flowable]:
    # Not the device: it is no part of the digest, and one result has one page wherever it was made.
    lines = [f"Made by {provenance.pipeline} {provenance.version}.", *weights(provenance)]
    return [Paragraph(escape(plain(words)), _SMALL) for words in lines]


def _printed(story: list[Flowable], provenance: Provenance | None, produced_at: datetime) -> Page:
    content = io.BytesIO()
    margin = (210 - _WIDTH_MM) / 2 * mm
    offset = f"{produced_at:%z}"
    made = f"D:{produced_at:%Y%m%d%H%M%S}{offset[:3]}'{offset[3:5]}'"  # PDF 32000-1, 7.9.4
    SimpleDocTemplate(
        content,
        pagesize=A4,
        leftMargin=margin,
        rightMargin=margin,
        topMargin=margin,
        bottomMargin=margin,
        title=titled("summary", provenance),
        subject=" ".join(
            [caveat(provenance), *([plain(provenance.notice)] if provenance and provenance.notice else [])]
        ),
        author="salsa_node",
        creator="salsa_node",
        invariant=1,
    ).build(story, onFirstPage=lambda canvas, _: _dated(canvas, made))
    return Page(content.getvalue())


def _dated(canvas: Canvas, made: str) -> None:
    """Has the file carry that date, and an identifier that nothing in the environment decides."""
    canvas.setDateFormatter(lambda *_: made)
    canvas._doc.signature = hashlib.md5(
        usedforsecurity=False
    )  # begun with SOURCE_DATE_EPOCH, where somebody has set it
