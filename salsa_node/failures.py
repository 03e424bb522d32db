"""Why a run came to no result: a class for each way, whether it is tried again, and what a person does about it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from salsa_node.errors import (
    DeviceExhausted,
    EncodingError,
    PipelineError,
    SalsaNodeError,
    StoreError,
    WeightsMissing,
)

JITTER = 0.25  #: a wait is this much shorter or longer by chance, so that many that failed together do not return so
MAX_WAIT_S = 3600.0


class Failure(Enum):
    """How a run ended without a result."""

    DEVICE_MEMORY = "device memory"
    MEMORY = "memory"
    DISK = "disk"
    CRASHED = "crashed"
    HUNG = "hung"
    OVERDUE = "overdue"
    ENDED = "ended"
    STORE = "store"
    WEIGHTS = "weights"
    PIPELINE = "pipeline"
    OUTPUT = "output"
    UNFORESEEN = "unforeseen"


@dataclass(frozen=True, slots=True)
class Policy:
    """What follows a failure.

    attempts: how often it is tried at most; None for worker.max_attempts, 1 for what fails the same way again.
    wait: the first wait in units of worker.retry_s; it doubles with each attempt.
    action: what a person does once the run has FAILED.
    """

    attempts: int | None
    wait: float
    action: str


_THEN = "then: salsa-node retry STUDY"

POLICIES: Final[Mapping[Failure, Policy]] = {
    Failure.DEVICE_MEMORY: Policy(
        None, 2.0, f'free the GPU of other programs, or set pipeline.device = "cpu" or another GPU; {_THEN}'
    ),
    Failure.MEMORY: Policy(
        2, 2.0, f"give the node more memory, raise worker.memory_limit_gib, or analyse a thicker series; {_THEN}"
    ),
    Failure.DISK: Policy(
        None,
        4.0,
        f"a full disk wants room (salsa-node purge), a file that is gone is named by salsa-node verify; {_THEN}",
    ),
    Failure.CRASHED: Policy(
        None, 1.0, f"look at the node's log and the GPU's driver; salsa-node models verify proves the weights; {_THEN}"
    ),
    Failure.HUNG: Policy(None, 1.0, f"look at the GPU's driver and the node's log; {_THEN}"),
    Failure.OVERDUE: Policy(
        2, 1.0, f"raise worker.run_limit_s if this machine is that slow, or look why it is; {_THEN}"
    ),
    Failure.ENDED: Policy(None, 1.0, f"look at the node's log for what the worker said last; {_THEN}"),
    Failure.STORE: Policy(None, 1.0, f"look whether node.store_url can be reached and written; {_THEN}"),
    Failure.WEIGHTS: Policy(1, 0.0, f"install them: salsa-node models list says which; {_THEN}"),
    Failure.PIPELINE: Policy(1, 0.0, f"read the reason; correct the input or the options, or choose another; {_THEN}"),
    Failure.OUTPUT: Policy(1, 0.0, "report it with the run's number: the objects could not be built from the findings"),
    Failure.UNFORESEEN: Policy(1, 0.0, f"report it with the node's log; {_THEN}"),
}


def of(error: Exception) -> Failure:
    """The class of what a worker met."""
    if isinstance(error, DeviceExhausted):
        return Failure.DEVICE_MEMORY
    if isinstance(error, MemoryError):
        return Failure.MEMORY
    if isinstance(error, OSError):
        return Failure.DISK
    if isinstance(error, WeightsMissing):
        return Failure.WEIGHTS
    if isinstance(error, PipelineError):
        return Failure.PIPELINE
    if isinstance(error, EncodingError):
        return Failure.OUTPUT
    if isinstance(error, StoreError):
        return Failure.STORE
    return Failure.PIPELINE if isinstance(error, SalsaNodeError) else Failure.UNFORESEEN


def wait_s(
    failure: Failure,
    attempt: int,
    max_attempts: int,
    retry_s: float,
    chance: Callable[[], float] = random.random,
) -> float | None:
    """Seconds until the attempt after that one (1, 2, ...); None where there is to be none.

    chance: a number from 0 to 1 for the jitter.
    """
    policy = POLICIES[failure]
    if attempt >= min(max_attempts, policy.attempts or max_attempts):
        return None
    wait = retry_s * policy.wait * 2.0 ** min(attempt - 1, 30)
    return float(min(wait, MAX_WAIT_S) * (1 + JITTER * (2 * chance() - 1)))
