"""A DICOM node that finds liver lesions on CT and answers with DICOM SEG and a structured report."""

__version__ = "0.1.0"
