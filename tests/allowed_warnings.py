"""What validators say of our objects although nothing is wrong: exact text -> why it may stand."""

from __future__ import annotations

#: dicom3tools 1.00~20220618093127
DCIODVFY = {
    "Warning - Unrecognized defined term <99SALSA> for value 1 of attribute <Coding Scheme Designator>": (
        "Measurability has no code in a public scheme; ours is private by its 99 and carries its Coding Scheme "
        "Identification (PS3.16 section 8)."
    ),
    "Warning - Missing attribute or value that would be needed to build DICOMDIR - Patient ID": (
        "The source has none, and a result never invents one; Patient ID is type 2."
    ),
    "Warning - Missing attribute or value that would be needed to build DICOMDIR - Study ID": (
        "The source has none, and a result never invents one; Study ID is type 2."
    ),
    "Warning - Missing attribute or value that would be needed to build DICOMDIR - Study Date": (
        "The source has none, and a result never invents one; Study Date is type 2."
    ),
    "Warning - Missing attribute or value that would be needed to build DICOMDIR - Study Time": (
        "The source has none, and a result never invents one; Study Time is type 2."
    ),
}

#: the same, for values of the source that are carried over as they are; here those of the suite, by case
DCIODVFY_SOURCE = {
    "a name without components": {
        "Warning - Value dubious for this VR - (0x0010,0x0010) PN Patient's Name  PN [1] = <Anonymized> - Retired "
        "Person Name form": "A name without ^; so of every name of the source, whosesoever it is.",
    },
    "a coding scheme of the vendor": {
        "Warning - Unrecognized defined term <SECTRA> for value 1 of attribute <Coding Scheme Designator>": (
            "Of the source's Procedure Code Sequence; so of any scheme that the validator does not know."
        ),
    },
    "a body part of the vendor": {
        "Warning - Unrecognized defined term <PARTIALBODY> for value 1 of attribute <Body Part Examined>": (
            "Of SEG, LESION_SEG and LABELMAP; so of any term that the validator does not know."
        ),
    },
}

_NOT_KNOWN = "dicom3tools of 2022 does not know Supplement 243, so it judges no module of the object."
#: the same, of LABELMAP alone, and errors by its own account
DCIODVFY_LABEL_MAP = {
    "Error - Information Object Not found": _NOT_KNOWN,
    "Error - SegmentNumber not monotonically increasing from one by one - have SegmentSequence item number 1 "
    "(from one) with SegmentNumber of 0": "The background has to be described, as number 0; the rule binds BINARY.",
}

#: dcmtk 3.6.7; its reader tells the same of any document in these character sets
DCMTK = {
    "W: The VR checker does not support this Specific Character Set: ISO_IR 126": "Greek, carried over as it is.",
    "W: The VR checker does not support this Specific Character Set: ISO_IR 127": "Arabic, carried over as it is.",
    "W: The VR checker does not support this Specific Character Set: ISO_IR 192": "UTF-8, carried over as it is.",
    "W: The VR checker does not support this Specific Character Set: \\ISO 2022 IR 87": (
        "Japanese, carried over as it is."
    ),
    "W: Reading unknown/unsupported SpecificCharacterSet (\\ISO 2022 IR 87)": "Japanese, carried over as it is.",
    "W: Check for template constraints not yet supported": (
        "Of KO: dsrdump says so of every key object selection; PixelMed's validator does check the template."
    ),
}

_GROUP = (
    '/CONTAINER (126000,DCM,"Imaging Measurement Report")/CONTAINER (126010,DCM,"Imaging Measurements")'
    '/CONTAINER (125007,DCM,"Measurement Group")'
)
_SOURCE_SERIES = '(121232,DCM,"Source Series for Segmentation")'
_TEMPLATE_SERIES = 'UIDREF (121232,DCM,"Source series for segmentation")'
_SOURCE = 'IMAGE (121112,DCM,"Source of Measurement"): Content Item not in template'

_SUMMARY = '/CONTAINER (126000,DCM,"Imaging Measurement Report")/CONTAINER (121111,DCM,"Summary")'
_ORGAN = f'{_SUMMARY}/CONTAINER (125007,DCM,"Measurement Group")'
_OF_ORGAN = "What is measured of the whole liver; TID 1500 is extensible."
_VOLUME = 'NUM (118565006,SCT,"Volume")'
_NUMBER = 'NUM (246206008,SCT,"Number of lesions (observable entity)")'
_SUM = 'NUM (SUMDIAMETERS,99SALSA,"Proposed sum of largest measurable diameters")'
_AXIS = 'NUM (103339001,SCT,"Long axis")'
_IN_ORGAN_GROUP = (
    'TEXT (112039,DCM,"Tracking Identifier")',
    'UIDREF (112040,DCM,"Tracking Unique Identifier")',
    'CODE (121071,DCM,"Finding")',
    'CODE (363698007,SCT,"Finding Site")',
    _VOLUME,
    f'{_VOLUME}/CODE (370129005,SCT,"Measurement Method")',
    f'{_VOLUME}/TEXT (111001,DCM,"Algorithm Name")',
    f'{_VOLUME}/TEXT (111003,DCM,"Algorithm Version")',
    _NUMBER,
    f'{_NUMBER}/CODE (MEASURABILITY,99SALSA,"Measurability")',
    _SUM,
    f"{_SUM}/{_AXIS}",
    f'{_SUM}/{_AXIS}/TEXT (112039,DCM,"Tracking Identifier")',
    f'{_SUM}/{_AXIS}/UIDREF (112040,DCM,"Tracking Unique Identifier")',
    'IMAGE (121191,DCM,"Referenced Segment")',
    'UIDREF (121232,DCM,"Source Series for Segmentation")',
)

#: PixelMed 20220618, without the number of the content item that it begins with
PIXELMED = {
    f'Template 1411 VolumetricROIMeasurements/[Row 1] CONTAINER (125007,DCM,"Measurement Group")/[Row 12] '
    f"{_TEMPLATE_SERIES}: {_GROUP}/UIDREF {_SOURCE_SERIES}: Code {_SOURCE_SERIES} has different code meaning "
    '("Source Series for Segmentation") than code meaning in template concept name '
    '("Source series for segmentation")': "A letter's case in the code's meaning, which is not normative.",
    f'{_GROUP}/NUM (103339001,SCT,"Long axis")/{_SOURCE}': (
        "Names the image the axis was measured on; TID 1411 is extensible."
    ),
    f'{_GROUP}/NUM (103340004,SCT,"Short axis")/{_SOURCE}': (
        "Names the image the axis was measured on; TID 1411 is extensible."
    ),
    f'{_GROUP}/CODE (MEASURABILITY,99SALSA,"Measurability"): Content Item not in template': (
        "TID 1411 is extensible and allows qualitative evaluations."
    ),
    f'{_GROUP}/CODE (112021,DCM,"Response Evaluation Method"): Content Item not in template': (
        "TID 1411 is extensible and allows qualitative evaluations."
    ),
    f"{_SUMMARY}: Content Item not in template": _OF_ORGAN,
    f"{_ORGAN}: Content Item not in template": _OF_ORGAN,
    **{f"{_ORGAN}/{item}: Content Item not in template": _OF_ORGAN for item in _IN_ORGAN_GROUP},
}
