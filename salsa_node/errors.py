"""What can go wrong, ordered by what the node does next.

* SalsaNodeError
    * ConfigError            do not start; say which key, what was found, what was expected
    * SeriesRejected         a verdict on the input, not a fault: terminal, shown, reported
    * PipelineError          the run fails, a person decides
        * OrganNotFound      a verdict on the image: terminal, shown, reported
        * WeightsMissing     the run fails until an admin installs the weights
        * DeviceExhausted    retryable
    * EncodingError          our bug: keep everything
    * GuardFailed            the result may be wrong: keep everything, send nothing, a person decides
    * DeliveryError          retryable
        * DestinationRefused the peer will not take this object: a person decides
            * FormRefused    nor any of its SOP class: it may take the same content in another form
    * StoreError
        * UnknownStudy       the admin named a study that the store does not hold
        * IllegalTransition  a state was asked to become one that it cannot become
        * LeaseLost          somebody else has taken the work over
        * ContentConflict    the same SOP Instance UID with other content
            * PatientConflict  the same Study Instance UID under another Patient ID

`retryable` is all the worker asks. Foreign exceptions are turned once, at the seam, with
`raise ... from exc`. A text never holds patient identity: UIDs, counts, sizes, file kinds only.
"""

from __future__ import annotations


class SalsaNodeError(Exception):
    """Everything that this package raises on purpose."""

    retryable: bool = False


class ConfigError(SalsaNodeError):
    """The settings cannot be used as they are."""


class SeriesRejected(SalsaNodeError):
    """This series cannot become one regular volume; `reason` says what was found and what was expected.

    reason: one sentence without patient identity, fit for the report that goes to the reader.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class PipelineError(SalsaNodeError):
    """The segmentation could not be made."""


class OrganNotFound(PipelineError):
    """The pipeline found no liver in the volume."""


class WeightsMissing(PipelineError):
    """A model folder that the pipeline needs is absent or incomplete."""


class ModelRefused(PipelineError):
    """A model from elsewhere is damaged, of another kind, or would need more than it is given."""


class DeviceExhausted(PipelineError):
    """The device ran out of memory; the same run may succeed later or elsewhere."""

    retryable = True


class EncodingError(SalsaNodeError):
    """A result object could not be built from valid findings."""


class GuardFailed(SalsaNodeError):
    """A finished result does not lie on its own images, or cannot be what it says."""


class DeliveryError(SalsaNodeError):
    """An object did not reach its destination this time.

    status: the DIMSE status, where the peer answered one.
    """

    retryable = True

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class DestinationRefused(DeliveryError):
    """The destination will not take this object, now or later."""

    retryable = False


class FormRefused(DestinationRefused):
    """The destination takes no object of that SOP class in any transfer syntax that we have."""


class StoreError(SalsaNodeError):
    """The record could not be read or written."""

    retryable = True


class UnknownStudy(StoreError):
    """No study, series or run goes by that name."""

    retryable = False


class IllegalTransition(StoreError):
    """A row was asked for a state that its present state does not lead to."""

    retryable = False


class LeaseLost(StoreError):
    """The lease on a run has passed to another worker: put nothing down."""

    retryable = False


class ContentConflict(StoreError):
    """An instance contradicts what is stored: the same UID with other content, or a series under another study.

    brief: what contradicts what, in at most 64 characters, fit for a DIMSE Error Comment.
    path: of the file that is kept under that UID, in that series of that study, relative to the data folder; its
        content may yet be the same in another encoding. "" where the two cannot be one instance.
    """

    retryable = False

    def __init__(self, message: str, brief: str, path: str = "") -> None:
        super().__init__(message)
        self.brief = brief
        self.path = path


class PatientConflict(ContentConflict):
    """An instance of a stored study names another patient: one of the two is wrong, and a person must say which."""
