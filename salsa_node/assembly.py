"""When a series and a study are whole, and what of it is analysed: the step between the door and the worker.

A series is COMPLETE when nothing more came for `quiet_s`. A study none of whose series is still
arriving is looked at once: the series that `selection` ranks first and that `series.inspect` accepts
goes to the pipeline, or the best few, each for a result of its own. Where there is none, a run with a
refusal is queued, so that the reader hears why. A late instance opens all this again, and the new run
supersedes the old result; only masks that a person gave stay in force until a person asks again.

What the pixels of an analysed series say of its contrast phase is kept with it and scored in place of its headers.
Where another series is then the best, that one goes next: `step` queues it, every series once at most, and what proves
to be worse than the series with the result in force yields to it (`outranked`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from math import inf
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage

from salsa_node import evidence, pacs_count, series, stacks, store
from salsa_node.candidate import Candidate, read_candidate
from salsa_node.contrast_phase import Phase, PixelPhase
from salsa_node.disk_trouble import DiskTrouble
from salsa_node.errors import SeriesRejected
from salsa_node.log import unforeseen
from salsa_node.pacs_count import Answer, Archive
from salsa_node.selection import Verdict, Volume, choose_volume
from salsa_node.selection_rules import SelectionRules
from salsa_node.series_rules import SeriesRules
from salsa_node.settings import AssemblySettings, PipelineChoice, QuerySettings
from salsa_node.store import Run, RunState, SeenPhase, SeriesState, Store, Study
from salsa_node.uids import digest

log = logging.getLogger(__name__)

NO_CT = "the study holds no CT image; there is nothing to analyse"
_Read = TypeVar("_Read")
_CT = {CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage}


@dataclass(frozen=True, slots=True)
class Rules:
    """By what a study is looked at."""

    selection: SelectionRules = field(default_factory=SelectionRules)
    series: SeriesRules = field(default_factory=SeriesRules)
    whole: AssemblySettings = field(default_factory=AssemblySettings)
    query: QuerySettings = field(default_factory=QuerySettings)


DEFAULT_RULES = Rules()


@dataclass(frozen=True, slots=True)
class Subject:
    """What one run is about.

    series_uid: the series chosen; with a refusal, the one it is about, None where it is about all.
    source_digest: changes when what would be analysed changes.
    part, images: as in `store.Run`, of a series that holds several stacks.
    """

    series_uid: str | None
    source_digest: str
    part: str = ""
    images: tuple[str, ...] | None = None

    @classmethod
    def of(cls, volume: Volume) -> Subject:
        """The run of that volume."""
        one, found = volume.candidate, volume.series
        images = tuple(image.sop_instance_uid for image in found.instances) if one.part else None
        return cls(one.series_uid, found.source_digest, one.part, images)

    @property
    def place(self) -> str:
        """As `store.Run.place`."""
        return store.place(self.series_uid, self.part)


@dataclass(frozen=True, slots=True)
class Input:
    """What of a study is analysed, or why nothing is.

    subjects: of each run that it takes, the best series first; with a refusal, the only one.
    refused: series UID -> reason, of every CT series that cannot be analysed.
    accepted: series UID -> how it ranked, of those that can.
    scores: a line for each CT series, the best first, as `selection.Verdict.as_json` has it.
    candidates: Series Instance UID -> what its headers say, of those that could be read.
    ranks: `store.Run.place` -> 1 for the best, of those that can be analysed.
    """

    subjects: tuple[Subject, ...]
    refusal: str | None
    refused: Mapping[str, str]
    accepted: Mapping[str, str]
    scores: Sequence[Mapping[str, object]]
    candidates: Mapping[str, Candidate]
    ranks: Mapping[str, int] = field(default_factory=dict)


def step(
    record: Store,
    data_dir: Path,
    pipeline: PipelineChoice,
    now: datetime,
    rules: Rules = DEFAULT_RULES,
    profiles: Mapping[str, PipelineChoice] = MappingProxyType({}),
    archive: Archive | None = None,
    trouble: DiskTrouble | None = None,
) -> store.Series | Study | None:
    """Complete one quiet series, or look at one whole study; what was done, or None when there is nothing to do.

    profiles: AE title of ours -> what looks at the studies that came to that, in place of `pipeline`.
    archive: the one of `rules.query`, asked beside the caller; without it a question holds up the step.
    trouble: remembers which studies wait for the disk; without it none does.
    A study is looked at when it is overdue, whatever still comes. A file that cannot be read is a verdict on its
    series, never an error here; only StoreError is raised.
    """
    waiting = trouble.waiting(now) if trouble else frozenset[str]()
    overdue = record.overdue_study(now - timedelta(seconds=rules.whole.max_wait_s), waiting)
    if overdue is not None:
        study = record.end_wait(overdue.study_uid, now)
    else:
        done = _complete(record, now, rules, archive)
        if done is not None:
            return done
        whole = record.study_to_assemble(waiting)
        if whole is None:
            return _reconsider(record, data_dir, pipeline, now, rules, profiles, archive)
        study = whole
    if trouble and (why := trouble.hinders(study.study_uid, _paths(record, data_dir, study), now)):
        log.error(why, extra={"event": "study.unreadable", "study_uid": study.study_uid})
        record.add_event("study", study.study_uid, "study.unreadable", why, now, study.study_uid)
        return study
    found = examine(record, data_dir, study, rules)
    if found is None:
        return record.study_assembled(study, "no CT image in this study; nothing to analyse", now)
    pipeline = profiles.get(study.called_ae, pipeline)
    runs = _queue(record, study, found, pipeline, now, rules, _counts(study, rules, archive))
    told = []
    for run in runs:
        if overdue is not None:
            record.wait_no_longer(run.id)
        of_series = found.refusal or f"series {run.series_uid} goes to pipeline {pipeline.name}"
        told.append(f"run {run.id}: {of_series if run.masks_path is None else store.KEPT}")
        log.info("study assembled", extra={"event": "study.assembled", "study_uid": study.study_uid, "run": run.id})
    return record.study_assembled(study, "; ".join(told), now)


def _paths(record: Store, data_dir: Path, study: Study) -> Iterable[Path]:
    return (data_dir / image.path for image in record.instances_of(study.study_uid))


def _counts(study: Study, rules: Rules, archive: Archive | None) -> Answer:
    return archive.latest(study.study_uid) if archive else pacs_count.ask(rules.query, study.study_uid)


def _reconsider(
    record: Store,
    data_dir: Path,
    pipeline: PipelineChoice,
    now: datetime,
    rules: Rules,
    profiles: Mapping[str, PipelineChoice],
    archive: Archive | None,
) -> Study | None:
    """One study whose pixels said something new of a phase: what is best now goes next, unless it was analysed."""
    study = record.study_to_reconsider()
    if study is None:
        return None
    found = examine(record, data_dir, study, rules)
    if any(run.state in (RunState.QUEUED, RunState.RUNNING) for run in record.runs_of(study.study_uid)):
        return study  # somebody asked for one meanwhile; considered when that has ended
    seen = {(one.place, one.source_digest) for one in record.phases_of(study.study_uid)}
    current = {run.place for run in record.current_runs(study.study_uid)}
    subjects = found.subjects if found and found.refusal is None else ()
    new = [subject for subject in subjects if (subject.place, subject.source_digest) not in seen]
    told = "what is analysed stays"
    if subjects and subjects[0].place not in current:
        told += f", though series {subjects[0].series_uid} scores more: salsa-node rerun analyses that again"
    if found and new:
        chosen = replace(found, subjects=tuple(one for one in subjects if one in new or one.place in current))
        choice = profiles.get(study.called_ae, pipeline)
        runs = _queue(record, study, chosen, choice, now, rules, _counts(study, rules, archive))
        told = "; ".join(f"run {run.id}: series {run.series_uid} is better now" for run in runs)
        log.info("study reconsidered", extra={"event": "study.reconsidered", "study_uid": study.study_uid})
    record.study_reconsidered(study.study_uid, f"the pixels said which phase it is; {told}", now)
    return study


def outranked(record: Store, data_dir: Path, run: Run, rules: Rules) -> str:
    """Why the result of a run must not take the place of one in force, which is of a better series; "" where it may.

    Asked once the pixels of its series have said which phase it is. A person's run is never outranked.
    """
    displaced = [past for past in record.current_runs(run.study_uid) if run.displaces(past) and past.place != run.place]
    if run.forced or not displaced:
        return ""
    found = examine(record, data_dir, record.study(run.study_uid), rules)
    ranks = found.ranks if found else {}
    better = [past for past in displaced if ranks.get(past.place, inf) < ranks.get(run.place, inf)]
    if not better:
        return ""
    stays = ", ".join(f"run {past.id} (series {past.series_uid})" for past in better)
    return f"series {run.series_uid} scores less, now that its pixels said which phase it is: {stays} stays"


def _complete(record: Store, now: datetime, rules: Rules, archive: Archive | None) -> store.Series | None:
    """The next quiet series: COMPLETE, or waiting again where the archive holds more images of it than came.

    What the archive still has to be asked about is passed over.
    """
    quiet_since = now - timedelta(seconds=rules.whole.quiet_s)
    unanswered: set[str] = set()
    while rules.query.ae_title and (quiet := record.quiet_series(quiet_since, unanswered)) is not None:
        if quiet.modality != "CT":
            break
        if archive is None:
            told: Answer | None = pacs_count.ask(rules.query, quiet.study_uid)
        else:
            told = archive.counts(quiet.study_uid, quiet.last_instance_at + timedelta(seconds=rules.whole.quiet_s))
        if told is None:
            unanswered.add(quiet.study_uid)
            continue
        held = told.images.get(quiet.series_uid, 0)
        if held <= quiet.instances:
            break
        log.info("series waits", extra={"event": "series.waiting", "series_uid": quiet.series_uid})
        why = f"the archive holds {held} images, {quiet.instances} came"
        return record.wait_for_series(quiet.series_uid, why, now)
    complete = record.complete_series(quiet_since, now, unanswered)
    if complete is not None:
        log.info("series complete", extra={"event": "series.complete", "series_uid": complete.series_uid})
    return complete


def select(
    record: Store, data_dir: Path, study: Study, pipeline: PipelineChoice, now: datetime, rules: Rules
) -> tuple[Input, tuple[Run, ...]]:
    """Look at a study again by those rules; a run is queued of each series that is another input than before.

    Raises SeriesRejected where the study holds no CT image.
    """
    found = examine(record, data_dir, study, rules)
    if found is None:
        raise SeriesRejected(NO_CT)
    pacs = pacs_count.ask(rules.query, study.study_uid)
    return found, _queue(record, study, found, pipeline, now, rules, pacs)


def _queue(
    record: Store, study: Study, found: Input, pipeline: PipelineChoice, now: datetime, rules: Rules, pacs: Answer
) -> tuple[Run, ...]:
    """The verdicts written down, and the run of each series that was chosen."""
    _write_down(record, study, found, now)
    runs = tuple(
        record.queue_run(
            study.study_uid,
            pipeline.name,
            subject.source_digest,
            now,
            series_uid=subject.series_uid,
            options=pipeline.options,
            refusal=found.refusal,
            part=subject.part,
            images=subject.images,
            beside=_beside(subject, found),
        )
        for subject in found.subjects
    )
    _note(record, study, runs[0], found, now, rules, pacs)
    return runs


def _beside(subject: Subject, found: Input) -> list[str]:
    return [other.place for other in found.subjects if other.place != subject.place]


def queue_again(
    record: Store,
    data_dir: Path,
    study: Study,
    pipeline: str,
    options: Mapping[str, object],
    now: datetime,
    masks: tuple[str, str] | None = None,
    rules: Rules = DEFAULT_RULES,
    only: str | None = None,
) -> tuple[Run, ...]:
    """A new run of each series that is analysed of a study, because a person asks, whatever ran before.

    masks: path relative to the data folder and SHA-256 of a person's label map, which is of one series.
    only: the Series Instance UID of the one to run again.
    Raises SeriesRejected where the study holds no CT image, `only` is not analysed, or masks could be of several.
    """
    found = examine(record, data_dir, study, rules)
    if found is None:
        raise SeriesRejected(NO_CT)
    subjects = [subject for subject in found.subjects if only in (None, subject.series_uid)]
    there = ", ".join(str(subject.series_uid) for subject in found.subjects)
    if not subjects:
        raise SeriesRejected(f"series {only} is not analysed; of this study the rules choose {there}")
    if masks and len(subjects) > 1:
        raise SeriesRejected(f"masks are of one series, {len(subjects)} are analysed; say which with --series: {there}")
    path, sha256 = masks or (None, None)
    runs = tuple(
        record.queue_run(
            study.study_uid,
            pipeline,
            subject.source_digest,
            now,
            series_uid=subject.series_uid,
            masks_path=path,
            masks_sha256=sha256,
            options=options,
            refusal=found.refusal,
            force=True,
            part=subject.part,
            images=subject.images,
            beside=_beside(subject, found),
        )
        for subject in subjects
    )
    _note(record, study, runs[0], found, now, rules, pacs_count.ask(rules.query, study.study_uid))
    return runs


def _note(record: Store, study: Study, run: Run, found: Input, now: datetime, rules: Rules, pacs: Answer) -> None:
    """Write down how the series scored, and what speaks for and against the study's being whole."""
    told = evidence.of_study(study, record.series_of(study.study_uid), found.candidates, pacs, rules.whole.quiet_s, now)
    association = evidence.of_association(study, record.events_of(study.study_uid))
    pieces = [piece.as_json() for piece in (association, *told)]
    record.note_look(study.study_uid, run.id, found.scores, pieces, now)


def examine(record: Store, data_dir: Path, study: Study, rules: Rules = DEFAULT_RULES) -> Input | None:
    """What of a study can be analysed; None where it holds no CT image. Reads headers, changes nothing."""
    images = [image for image in record.instances_of(study.study_uid) if image.sop_class_uid in _CT]
    if not images:
        return None
    paths: dict[str, list[Path]] = {}
    for image in images:
        paths.setdefault(image.series_uid, []).append(data_dir / image.path)
    seen = {one.place: _pixel_phase(one) for one in record.phases_of(study.study_uid)}
    refused: dict[str, str] = {}
    candidates: list[Candidate] = []
    for uid, files in paths.items():
        try:
            candidate = replace(_verdict(partial(read_candidate, files)), series_uid=uid)
            candidates.append(replace(candidate, pixel_phase=seen.get(uid)))
        except SeriesRejected as verdict:
            refused[uid] = verdict.reason
    choice = choose_volume(
        candidates,
        lambda files: _verdict(partial(series.inspect, files, rules.series)),
        rules.selection,
        lambda one: [
            replace(part, pixel_phase=seen.get(store.place(one.series_uid, part.part)))
            for part in stacks.apart(one, rules.series)
        ],
    )
    ranked = sorted(choice.verdicts, key=lambda verdict: (verdict.rank is None, verdict.rank or 0))
    scores = tuple(verdict.as_json() for verdict in ranked)
    told = {candidate.series_uid: candidate for candidate in candidates}
    ranks = {store.place(one.series_uid, one.candidate.part): one.rank for one in ranked if one.rank is not None}
    accepted = _reasons(verdict for verdict in choice.verdicts if verdict.accepted)
    refused |= _reasons(verdict for verdict in choice.verdicts if verdict.series_uid not in accepted)
    if choice.volumes:
        subjects = tuple(map(Subject.of, choice.volumes))
        return Input(subjects, None, refused, accepted, scores, told, ranks)
    best = choice.best_refused.series_uid if choice.best_refused else None
    refusal = refused[best] if best else _all_reasons(record, study, refused)
    everything = sorted(image.sop_instance_uid for image in images)
    about = Subject(best, digest("refused", refusal, *everything))
    return Input((about,), refusal, refused, {}, scores, told)


def _pixel_phase(seen: SeenPhase) -> PixelPhase:
    return PixelPhase(Phase(seen.phase), seen.certainty, seen.after_injection_s)


def _reasons(verdicts: Iterable[Verdict]) -> dict[str, str]:
    """Series Instance UID -> reason; of a series of several stacks, of each."""
    told: dict[str, list[str]] = {}
    for verdict in verdicts:
        stack = f"stack {verdict.candidate.part}: " if verdict.candidate.part else ""
        told.setdefault(verdict.series_uid, []).append(f"{stack}{verdict.reason}")
    return {uid: "; ".join(reasons) for uid, reasons in told.items()}


def _verdict(read: Callable[[], _Read]) -> _Read:
    """What `read` returns; whatever stands in the way becomes SeriesRejected."""
    try:
        return read()
    except SeriesRejected:
        raise
    except Exception as error:
        # One odd file must not hold up every other study.
        log.error("series not examined", extra={"event": "series.unforeseen", "error": unforeseen(error)})
        raise SeriesRejected(f"the series cannot be examined ({type(error).__name__})") from error


def _all_reasons(record: Store, study: Study, refused: Mapping[str, str]) -> str:
    """Why no series can be analysed, each by its number."""
    told = [
        f"series {row.series_uid if row.series_number is None else row.series_number}: {refused[row.series_uid]}"
        for row in record.series_of(study.study_uid)
        if row.series_uid in refused
    ]
    return f"no series of this study can be analysed; {'; '.join(told)}"


def _write_down(record: Store, study: Study, found: Input, now: datetime) -> None:
    """Every CT series learns its verdict: REJECTED with the reason, or an event that says how it ranked."""
    states = {row.series_uid: row.state for row in record.series_of(study.study_uid)}
    for uid, reason in found.refused.items():
        if states[uid] is SeriesState.COMPLETE:
            record.reject_series(uid, reason, now)
    for uid, reason in found.accepted.items():
        record.add_event("series", uid, "series.ranked", reason, now, study.study_uid)
