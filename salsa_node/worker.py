"""One run, from series to objects on disk: the only room beside assembly that knows both wings.

A run is claimed by lease, carried while a heartbeat renews the lease, and written down in one
transaction. A worker that dies says nothing; its lease runs out and the run is claimed again.
"""

from __future__ import annotations

import gc
import io
import json
import logging
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from datetime import time as time_of_day
from hashlib import sha256
from pathlib import Path
from types import FrameType
from zoneinfo import ZoneInfo

import pydicom

from salsa_node import assembly, durable, failures, pipelines
from salsa_node.ahead import Ahead, as_they_lie, into_cache
from salsa_node.analysis import Analysis, Lineage, Read, Terms, analyse, check, read, refuse, summary
from salsa_node.config import Config
from salsa_node.dicom_result import Kind
from salsa_node.errors import DeviceExhausted, GuardFailed, LeaseLost, SalsaNodeError, StoreError
from salsa_node.failures import Failure
from salsa_node.log import unforeseen
from salsa_node.pipelines import Pipeline, PipelineSettings
from salsa_node.store import NewObject, Run, RunState, SeriesState, Store, StoreSettings

log = logging.getLogger(__name__)

_SENT = (RunState.PRODUCED, RunState.SUPERSEDED)


class Worker:
    """Carries runs one after the other, the pipelines it has used kept warm.

    owner: unique to this process; the name on its leases.
    clock: for the heartbeat, which runs beside a `step`.
    on_lost: called from the heartbeat when somebody else has the run; may interrupt the step.
    chance: a number from 0 to 1, for the jitter of a retry.
    """

    def __init__(
        self,
        store: Store,
        config: Config,
        owner: str,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        on_lost: Callable[[], None] = lambda: None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._store = store
        self._config = config
        self._owner = owner
        self._clock = clock
        self._on_lost = on_lost
        self._chance = chance
        self._lost = threading.Event()
        self._warm: dict[str, Pipeline] = {}
        self._looked_ahead = False
        self._loaded_since = False
        self._next: Ahead[Read] = Ahead()

    def prepare(self) -> bool:
        """Load the pipeline that a study needs while it is still arriving, where none is loaded; whether it did.

        Tried once: what stands in the way is told by the run, which meets it again.
        """
        if self._looked_ahead or self._warm:
            return False
        newest = self._store.studies(limit=1)
        if not newest or not any(s.state is SeriesState.RECEIVING for s in self._store.series_of(newest[0].study_uid)):
            return False
        self._looked_ahead = True
        choice = self._config.profile_pipelines.get(newest[0].called_ae, self._config.pipeline)
        try:
            self._loaded(choice.name, choice.options)
        except (SalsaNodeError, MemoryError, OSError, RuntimeError, ValueError) as error:
            told = str(error) if isinstance(error, SalsaNodeError) else unforeseen(error)
            log.warning("not loaded ahead", extra={"event": "pipeline.not_ahead", "error": told})
            return False
        log.info("loaded ahead", extra={"event": "pipeline.ahead", "pipeline": choice.name})
        return True

    def step(self, now: datetime) -> Run | None:
        """Claim one run and carry it to its end; the run as it then is, or None when there is nothing to do.

        A failure is written against the run, never raised; SystemExit and the like give the run back first.
        """
        settings = self._config.worker
        later = () if off_peak(settings.off_peak, now.astimezone().time()) else settings.off_peak_ae_titles
        run = self._store.claim_run(self._owner, settings.lease_s, now, settings.stat_ae_titles, later)
        if run is None:
            self._next.forget()
            return None
        if run.attempt > settings.max_attempts:
            text = f"given up after {settings.max_attempts} attempts; last: {run.error or 'the worker died'}"
            return self._store.fail_run(run.id, self._owner, text, now, run.failure or Failure.ENDED.value)
        try:
            with self._heartbeat(run):
                return self._carry(run)
        except LeaseLost:
            log.warning("run taken over", extra={"event": "run.lease_lost", "run": run.id})
            return self._store.run(run.id)
        except SalsaNodeError as error:
            if isinstance(error, DeviceExhausted):
                self._unload()
            return self._failed(run, f"{type(error).__name__}: {error}", failures.of(error))
        except MemoryError:
            self._unload()
            return self._failed(run, "the machine's memory did not suffice", Failure.MEMORY)
        except Exception as error:  # noqa: BLE001 - the loop's one broad except: it writes the failure down
            return self._failed(run, unforeseen(error), failures.of(error))
        except BaseException:
            self._give_back(run)
            raise

    def _carry(self, run: Run) -> Run:
        paths = self._paths(run)  # once: what comes in while this is carried is another run's
        result = self._analysis(run, paths)
        self._still_ours(run)
        better = self._better(run, result)
        if better:
            log.info("run yields", extra={"event": "run.yielded", "run": run.id, "reason": better})
            return self._store.yield_run(
                run.id, self._owner, result.outcome.value, result.run_digest, better, self._clock()
            )
        objects = self._earlier(run, result) or self._write(run, result)
        findings = summary(result)
        blocked = result.blocked or self._guard(run, paths, result, objects)
        if blocked:
            log.warning("run blocked", extra={"event": "run.blocked", "run": run.id, "reason": blocked})
            return self._store.block_run(
                run.id, self._owner, objects, result.outcome.value, findings, result.run_digest, blocked, self._clock()
            )
        done = self._store.produce(
            run.id,
            self._owner,
            objects,
            self._config.destinations_for(self._store.study(run.study_uid).called_ae),
            result.outcome.value,
            findings,
            result.run_digest,
            self._clock(),
        )
        log.info("run produced", extra={"event": "run.produced", "run": run.id, "outcome": result.outcome.value})
        return done

    def _analysis(self, run: Run, paths: Sequence[Path]) -> Analysis:
        label_map = any(destination.seg == "labelmap" for destination in self._config.destination)
        terms = Terms(
            self._config.criteria,
            self._config.guards,
            self._config.results,
            label_map,
            self._config.series,
            one_of_several=bool(run.beside),
            stack=run.part,
        )
        if run.refusal is not None:
            return refuse(paths, run.refusal, terms, lambda digest: self._lineage(run, digest))
        pipeline = self._pipeline(run)
        return analyse(
            paths,
            pipeline,
            terms,
            lambda digest: self._lineage(run, digest),
            lambda stage: self._begin(run, stage, pipeline),
            lambda paths, rules: self._next.take((as_they_lie(paths), rules)) or read(paths, rules),
        )

    def _better(self, run: Run, result: Analysis) -> str:
        """What its pixels said of the phase is kept; why a result in force is better then, "" where none is."""
        seen, config = result.pixel_phase, self._config
        if seen is None:
            return ""
        self._store.note_phase(run, seen.phase.value, seen.certainty, seen.after_injection_s, self._clock())
        rules = assembly.Rules(config.selection, config.series, config.assembly, config.query)
        return assembly.outranked(self._store, config.node.data_dir, run, rules)

    def _begin(self, run: Run, stage: str, pipeline: Pipeline) -> None:
        """While a GPU segments the next volume is read; where the processors do, its files come into the cache.

        Damaged pixels can end this whole process inside a decoder: a run that is carried again shares it with nobody.
        """
        self._tell(run, stage)
        following = self._store.next_in_line() if stage == "segmenting" else None
        if following is None or following.refusal is not None:
            return
        paths, rules = self._paths(following), self._config.series
        into_cache(paths)
        on_gpu = pipeline.provenance.device.startswith("cuda")
        if on_gpu and run.attempt == 1 and (key := as_they_lie(paths)):
            self._next.begin((key, rules), lambda: read(paths, rules))

    def _paths(self, run: Run) -> list[Path]:
        images = self._store.instances_of(run.study_uid, run.series_uid)
        wanted = None if run.images is None else set(run.images)
        return [
            self._config.node.data_dir / image.path
            for image in images
            if wanted is None or image.sop_instance_uid in wanted
        ]

    def _lineage(self, run: Run, run_digest: str) -> Lineage:
        """As the first run that came to this very result has it, so that the bytes never differ."""
        runs = self._store.runs_of(run.study_uid)
        first = next((past for past in runs if past.digest == run_digest), run)
        earlier = [past for past in runs if past.id < first.id and past.state in _SENT and first.displaces(past)]
        named = self._config.results.time_zone
        queued_at = first.queued_at.astimezone(ZoneInfo(named) if named else None)  # None: the machine's own
        revision = 1 + len({past.digest for past in earlier})
        return Lineage(queued_at, revision, self._reports_of(earlier[-1]) if earlier else {})

    def _reports_of(self, run: Run) -> dict[Kind, pydicom.Dataset]:
        """The reports of an earlier run that still lie on disk as they were made."""
        there: dict[Kind, pydicom.Dataset] = {}
        for kind in (Kind.SR, Kind.VIEWER_SR):
            for item in self._store.objects_of(run.id):
                path = self._config.node.data_dir / item.path
                if item.kind == kind.value and _sha256(path) == item.sha256:
                    there[kind] = pydicom.dcmread(path)
        return there

    def _guard(self, run: Run, paths: Sequence[Path], result: Analysis, objects: Sequence[NewObject]) -> str:
        """What the guards say against the objects as they lie on disk; "" where they may leave."""
        self._tell(run, "checking")
        try:
            check([(self._config.node.data_dir / item.path).read_bytes() for item in objects], paths, result)
        except GuardFailed as failed:
            return str(failed)
        return ""

    def _pipeline(self, run: Run) -> Pipeline:
        if run.masks_path:
            return pipelines.load(
                run.pipeline, self._settings(run.options, self._config.node.data_dir / run.masks_path)
            )
        return self._loaded(run.pipeline, run.options, lambda: self._tell(run, "loading"))

    def _loaded(
        self, name: str, options: Mapping[str, object], beginning: Callable[[], None] = lambda: None
    ) -> Pipeline:
        key = json.dumps([name, dict(options)], sort_keys=True)
        if key not in self._warm:
            beginning()
            self._warm[key] = pipelines.load(name, self._settings(options))
            self._loaded_since = True
        return self._warm[key]

    def settle(self) -> None:
        """Spare what stays loaded the garbage collector's passes: one falls into every study, and takes 0.15 s.

        To be called between runs.
        """
        if self._loaded_since:
            self._loaded_since = False
            gc.collect()
            gc.freeze()

    def _settings(self, options: Mapping[str, object], masks_path: Path | None = None) -> PipelineSettings:
        return PipelineSettings(self._config.pipeline.device, self._config.models_dir, masks_path, options)

    def _unload(self) -> None:
        """Give back what warm pipelines and the next volume hold, so that the next attempt finds the memory empty."""
        self._next.forget()
        gc.unfreeze()
        for pipeline in self._warm.values():
            pipeline.unload()
        self._warm.clear()

    def _earlier(self, run: Run, result: Analysis) -> list[NewObject]:
        """The objects of an earlier run that came to the very same result: they are sent again, no second ones made."""
        for past in self._store.runs_of(run.study_uid):
            if past.digest == result.run_digest and past.state in _SENT:
                there = self._store.objects_of(past.id)
                whole = all(_sha256(self._config.node.data_dir / item.path) == item.sha256 for item in there)
                if there and whole:
                    return [
                        NewObject(item.kind, item.sop_instance_uid, item.sop_class_uid, item.path, item.sha256)
                        for item in there
                    ]
        return []

    def _write(self, run: Run, result: Analysis) -> list[NewObject]:
        attempt = f"{run.id}-{run.attempt}-{sha256(self._owner.encode()).hexdigest()[:8]}"
        folder = Path("results") / run.study_uid / attempt  # no other worker writes there, however late it comes
        objects = []
        for made in result.objects:
            content = encoded(made.ds)
            path = folder / f"{made.name}.dcm"
            durable.write(self._config.node.data_dir / path, [content])
            digest = sha256(content).hexdigest()
            uids = made.ds.SOPInstanceUID, made.ds.SOPClassUID
            objects.append(NewObject(made.kind.value, *uids, path.as_posix(), digest))
        return objects

    def _failed(self, run: Run, text: str, failure: Failure) -> Run:
        settings = self._config.worker
        now = self._clock()
        wait = failures.wait_s(failure, run.attempt, settings.max_attempts, settings.retry_s, self._chance)
        log.error("run failed", extra={"event": "run.failed", "run": run.id, "error": text})
        try:
            if wait is not None:
                later = now + timedelta(seconds=wait)
                return self._store.return_run(run.id, self._owner, text, later, now, failure=failure.value)
            return self._store.fail_run(run.id, self._owner, text, now, failure.value)
        except LeaseLost:
            return self._store.run(run.id)

    def _give_back(self, run: Run) -> None:
        now = self._clock()
        try:
            self._store.return_run(run.id, self._owner, "the worker was stopped", now, now, counts=False)
        except StoreError as error:
            log.warning("run not given back, its lease will run out", extra={"run": run.id, "error": str(error)})

    def _still_ours(self, run: Run) -> None:
        if self._lost.is_set():
            raise LeaseLost(f"run {run.id} belongs to somebody else now")

    def _tell(self, run: Run, stage: str) -> None:
        self._still_ours(run)
        self._store.add_event("run", str(run.id), "run.stage", stage, self._clock(), study_uid=run.study_uid)

    @contextmanager
    def _heartbeat(self, run: Run) -> Iterator[None]:
        settings = self._config.worker
        over = threading.Event()
        self._lost.clear()

        def beat() -> None:
            while not over.wait(settings.heartbeat_s):
                try:
                    self._store.heartbeat(run.id, self._owner, settings.lease_s, self._clock())
                except LeaseLost:
                    self._lost.set()
                    self._on_lost()
                    return
                except StoreError as error:
                    log.warning("heartbeat missed", extra={"run": run.id, "error": str(error)})

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def encoded(ds: pydicom.Dataset) -> bytes:
    """A DICOM file (PS3.10) of that data set, as bytes."""
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def off_peak(hours: str, now: time_of_day) -> bool:
    """Whether that time of day lies within `hours`, "20:00-06:00"; equal ends are the whole day."""
    start, end = (time_of_day.fromisoformat(part) for part in hours.split("-"))
    return start <= now < end if start < end else now >= start or now < end


def _sha256(path: Path) -> str:
    try:
        return sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def work(config: Config, owner: str, pulse: int = -1) -> None:
    """Carry runs until SIGTERM, or until standard input closes because the node is gone.

    pulse: a file descriptor that gets a byte whenever work is looked for; -1 for none.
    """
    threading.Thread(target=_end_with_the_node, name="node watch", daemon=True).start()
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the node decides what an interrupt means
    signal.signal(signal.SIGUSR1, _let_go)
    this_thread = threading.get_ident()  # which a signal to the heartbeat's would not wake from a wait
    with Store.open(StoreSettings(config.store_url)) as store:
        worker = Worker(store, config, owner, on_lost=lambda: signal.pthread_kill(this_thread, signal.SIGUSR1))
        if pulse >= 0:
            os.set_blocking(pulse, False)
        while True:
            if pulse >= 0:
                with suppress(BlockingIOError, BrokenPipeError):  # unread while a run goes on; or the node is gone
                    os.write(pulse, b".")
            try:
                idle = worker.step(datetime.now(UTC)) is None and not worker.prepare()
            except StoreError as error:
                log.error("step failed", extra={"event": "loop.failed", "loop": "worker", "error": str(error)})
                idle = True
            worker.settle()
            if idle:
                time.sleep(config.worker.poll_s)


def _leave(signum: int, _: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def _let_go(_: int, __: FrameType | None) -> None:
    """Raised by the heartbeat: what is being computed is not wanted any more."""
    raise LeaseLost("the run was cancelled or taken over")


def _end_with_the_node() -> None:
    """The node holds the other end of standard input and never writes: the end of file means it died."""
    while os.read(0, 1):
        pass
    os._exit(1)
