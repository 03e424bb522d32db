"""Coded concepts and colours that the results must agree on: data only.

Codes come from DICOM PS3.16 and SNOMED CT. Where no public code says what is meant, the private
scheme 99SALSA does, and every object that uses it carries its Coding Scheme Identification
(PS3.3 C.12.1.1.4.1). A designator that begins with 99 is private by rule (PS3.16 section 8).
"""

from __future__ import annotations

from typing import Final

from pydicom.sr.coding import Code

PRIVATE_SCHEME: Final = "99SALSA"
PRIVATE_SCHEME_NAME: Final = "salsa_node private concepts"
PRIVATE_SCHEME_OWNER: Final = "salsa_node"

# What a segment or a finding is (CID 7150, CID 7159) and where it lies.
ANATOMICAL_STRUCTURE: Final = Code("91723000", "SCT", "Anatomical Structure")
ABNORMAL_STRUCTURE: Final = Code("49755003", "SCT", "Morphologically Abnormal Structure")
LIVER: Final = Code("10200004", "SCT", "Liver")
COUINAUD: Final = {  # liver segment 1 to 8
    number: Code(value, "SCT", f"Couinaud hepatic segment {roman}")
    for number, (value, roman) in enumerate(
        (
            ("71133005", "I"),
            ("277956007", "II"),
            ("277957003", "III"),
            ("277958008", "IV"),
            ("277959000", "V"),
            ("277960005", "VI"),
            ("277961009", "VII"),
            ("277962002", "VIII"),
        ),
        start=1,
    )
}
LESION: Final = Code("52988006", "SCT", "Lesion")  # no histology: never neoplasm

# The colours of a lesion by class, wherever it is shown.
MEASURABLE_RGB: Final = (255, 60, 60)
NON_MEASURABLE_RGB: Final = (255, 220, 0)

# Measurability. The dictionaries hold RECIST's target lesions and responses, not this.
MEASURABILITY: Final = Code("MEASURABILITY", PRIVATE_SCHEME, "Measurability")
MEASURABLE: Final = Code("MEASURABLE", PRIVATE_SCHEME, "Measurable lesion")
NON_MEASURABLE: Final = Code("NONMEASURABLE", PRIVATE_SCHEME, "Non-measurable lesion")
RESPONSE_EVALUATION_METHOD: Final = Code("112021", "DCM", "Response Evaluation Method")
RECIST_1_1: Final = Code("126081", "DCM", "RECIST 1.1")
VOLUME_RULE: Final = Code("VOLUMERULE", PRIVATE_SCHEME, "SALSA volume rule")

# Measurements (CID 7462, 7464, 7470) and their units.
VOLUME: Final = Code("118565006", "SCT", "Volume")
LONG_AXIS: Final = Code("103339001", "SCT", "Long axis")
SHORT_AXIS: Final = Code("103340004", "SCT", "Short axis")
ATTENUATION: Final = Code("112031", "DCM", "Attenuation Coefficient")
MEAN: Final = Code("373098007", "SCT", "Mean")
STANDARD_DEVIATION: Final = Code("386136009", "SCT", "Standard Deviation")
NUMBER_OF_LESIONS: Final = Code("246206008", "SCT", "Number of lesions (observable entity)")
SUM_OF_DIAMETERS: Final = Code("SUMDIAMETERS", PRIVATE_SCHEME, "Proposed sum of largest measurable diameters")
SUM_OF_VOXELS: Final = Code("126030", "DCM", "Sum of segmented voxel method for volume")
CUBIC_CENTIMETER: Final = Code("cm3", "UCUM", "cubic centimeter")
MILLIMETER: Final = Code("mm", "UCUM", "mm")
NO_UNITS: Final = Code("1", "UCUM", "no units")
HOUNSFIELD_UNIT: Final = Code("[hnsf'U]", "UCUM", "Hounsfield unit")

# The report's own structure (TID 1500).
REPORT_TITLE: Final = Code("126000", "DCM", "Imaging Measurement Report")
IMAGING_MEASUREMENTS: Final = Code("126010", "DCM", "Imaging Measurements")
SUMMARY: Final = Code("121111", "DCM", "Summary")
QUALITATIVE_EVALUATIONS: Final = Code("C0034375", "UMLS", "Qualitative Evaluations")
PROCEDURE_REPORTED: Final = Code("121058", "DCM", "Procedure reported")
CT_PROCEDURE: Final = Code("25045-6", "LN", "CT unspecified body region")
ENGLISH: Final = Code("en-US", "RFC5646", "English (United States)")
TRACKING_IDENTIFIER: Final = Code("112039", "DCM", "Tracking Identifier")
MEASUREMENT_GROUP: Final = Code("125007", "DCM", "Measurement Group")
TRACKING_UID: Final = Code("112040", "DCM", "Tracking Unique Identifier")
DEVICE: Final = Code("121007", "DCM", "Device")
FINDING: Final = Code("121071", "DCM", "Finding")
OF_INTEREST: Final = Code("113000", "DCM", "Of Interest")  # CID 7010
COMMENT: Final = Code("121106", "DCM", "Comment")
ARTIFICIAL_INTELLIGENCE: Final = Code("123110", "DCM", "Artificial Intelligence")
ALGORITHM_NAME: Final = Code("111001", "DCM", "Algorithm Name")
ALGORITHM_VERSION: Final = Code("111003", "DCM", "Algorithm Version")
ALGORITHM_PARAMETERS: Final = Code("111002", "DCM", "Algorithm Parameters")
