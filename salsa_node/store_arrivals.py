"""What the record says of images that arrive: many rows in one transaction, and a verdict on each.

An instance that contradicts what is stored (the same UID with other content, its series under another
study, its study under another patient) never becomes an instance: see `store_quarantine`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import sqlalchemy as sa

from salsa_node.errors import ContentConflict, PatientConflict
from salsa_node.store_connection import writer
from salsa_node.store_prepared import Change, Lookup
from salsa_node.store_queries import Queries
from salsa_node.store_rows import (
    INSTANCES,
    OBJECTS,
    SERIES,
    STUDIES,
    Arrival,
    Instance,
    NewInstance,
    Series,
    SeriesState,
    Study,
)
from salsa_node.store_transaction import KeptConnection, Transaction, columns, transaction

# Each runs for every commit of the door.
_OUR_RESULTS = Lookup(OBJECTS.c.sop_instance_uid, OBJECTS.c.sop_instance_uid)
_INSTANCES = Lookup(INSTANCES.c.sop_instance_uid)
_STUDIES = Lookup(STUDIES.c.study_uid)
_SERIES = Lookup(SERIES.c.series_uid)
_NEW_INSTANCES = Change(sa.insert(INSTANCES))
_GROWN_STUDY = Change(
    sa.update(STUDIES)
    .where(STUDIES.c.study_uid == sa.bindparam("uid"))
    .values(
        {
            name: sa.bindparam(f"new_{name}")
            for name in ("last_at", "calling_ae", "called_ae", "patient_id", "instances")
        }
    )
)
_GROWN_SERIES = Change(
    sa.update(SERIES)
    .where(SERIES.c.series_uid == sa.bindparam("uid"))
    .values({name: sa.bindparam(f"new_{name}") for name in ("instances", "duplicates", "last_instance_at")})
)

AGAIN = "an instance came again with the same content"

#: what becomes of one instance; None: it is a result that this node made itself, and no input
Verdict = Arrival | ContentConflict | None


class Arrivals(Queries):
    """The changes that arriving images make; each method is one transaction."""

    def __init__(self, engine: sa.Engine) -> None:
        super().__init__(engine)
        self._writer = writer(engine)
        self._kept = KeptConnection(self._writer)

    @property
    def is_shared(self) -> bool:
        """As `StoreSettings.is_shared`."""
        return self._engine.dialect.name == "postgresql"

    def close(self) -> None:
        """Close every connection."""
        self._kept.close()
        self._engine.dispose()

    def add_instance(self, new: NewInstance, now: datetime) -> Arrival:
        """The row of a stored file; the same instance with the same content is no new row.

        A new instance re-opens a series that was COMPLETE or REJECTED. Raises ContentConflict where
        the SOP Instance UID is known with other content, or the series under another study;
        PatientConflict where the study is known under another Patient ID.
        """
        with transaction(self._writer) as t:
            verdict = _Batch(t, (new,), now, results=frozenset()).verdicts()[0]
            if isinstance(verdict, ContentConflict):
                raise verdict
            assert verdict is not None, "only results have no verdict, and none was named"
            return verdict

    def add_instances(
        self, arrived: Sequence[NewInstance], now: datetime, publish: Callable[[Sequence[NewInstance]], None]
    ) -> tuple[Verdict, ...]:
        """What becomes of each of `arrived`, in their order, as `add_instance` would say.

        publish: called once with those that get a row, before any row is committed, to give their files the
        names that the rows say; what it raises undoes everything here.
        """
        with self._kept.transaction() as t:
            ours = _OUR_RESULTS.find(t.connection, [new.sop_instance_uid for new in arrived])
            batch = _Batch(t, arrived, now, results=frozenset(row["sop_instance_uid"] for row in ours))
            verdicts = batch.verdicts()
            publish(batch.new)
            return verdicts

    def count_transcoded(self, new: NewInstance, now: datetime) -> Series:
        """An instance came again with the same content in another encoding; its series, where it is a duplicate.

        Raises UnknownStudy.
        """
        with transaction(self._writer) as t:
            series = t.series(new.series_uid)
            more = sa.update(SERIES).where(SERIES.c.series_uid == new.series_uid)
            t.execute(more.values(duplicates=SERIES.c.duplicates + 1))
            if not series.duplicates:
                detail = f"{AGAIN} in another encoding ({new.transfer_syntax_uid}); later ones are only counted"
                t.event(now, series.study_uid, "series", series.series_uid, "series.duplicate", detail)
            return t.series(new.series_uid)


@dataclass(slots=True)
class _Growth:
    """How a study or a series grows by one batch."""

    instances: int = 0
    duplicates: int = 0


class _Batch:
    """Instances that arrive together: rows are read once, each study and series is written once."""

    def __init__(self, t: Transaction, arrived: Sequence[NewInstance], now: datetime, results: frozenset[str]) -> None:
        self._t = t
        self._arrived = arrived
        self._now = now
        self._results = results
        known = [Instance(**row) for row in _INSTANCES.find(t.connection, [new.sop_instance_uid for new in arrived])]
        self._instances = {row.sop_instance_uid: row for row in known}
        studies = _STUDIES.find(t.connection, sorted({new.study_uid for new in arrived}))
        self._studies = {row["study_uid"]: Study(**row) for row in studies}
        wanted = {new.series_uid for new in arrived} | {row.series_uid for row in known}
        self._series = {row["series_uid"]: Series(**row) for row in _SERIES.find(t.connection, sorted(wanted))}
        self._new_studies: dict[str, NewInstance] = {}
        self._new_series: dict[str, NewInstance] = {}
        self._of_study: dict[str, _Growth] = {}
        self._of_series: dict[str, _Growth] = {}
        self.new: list[NewInstance] = []

    def verdicts(self) -> tuple[Verdict, ...]:
        """Decide on each, then write all rows."""
        told = tuple(self._verdict(new) for new in self._arrived)
        self._write_studies()
        self._write_series()
        if self.new:
            rows = [columns(self._instances[new.sop_instance_uid]) for new in self.new]
            _NEW_INSTANCES.run(self._t.connection, rows)
        return told

    def _verdict(self, new: NewInstance) -> Verdict:
        if new.sop_instance_uid in self._results:
            return None
        there = self._instances.get(new.sop_instance_uid)
        if there is not None:
            return self._again(there, new)
        conflict = self._contradiction(new)
        if conflict is not None:
            return conflict
        if new.study_uid not in self._studies:
            self._new_studies.setdefault(new.study_uid, new)
        if new.series_uid not in self._series:
            self._new_series.setdefault(new.series_uid, new)
        self._of_study.setdefault(new.study_uid, _Growth()).instances += 1
        self._of_series.setdefault(new.series_uid, _Growth()).instances += 1
        instance = Instance(
            sop_instance_uid=new.sop_instance_uid,
            series_uid=new.series_uid,
            study_uid=new.study_uid,
            sop_class_uid=new.sop_class_uid,
            transfer_syntax_uid=new.transfer_syntax_uid,
            path=new.path,
            digest=new.digest,
            size_bytes=new.size_bytes,
            received_at=self._now,
        )
        self._instances[new.sop_instance_uid] = instance
        self.new.append(new)
        return Arrival(instance, is_new=True)

    def _again(self, there: Instance, new: NewInstance) -> Arrival | ContentConflict:
        content = (new.digest if there.digest else "", new.size_bytes, new.study_uid, new.series_uid)
        if (there.digest, there.size_bytes, there.study_uid, there.series_uid) != content:
            is_of_one_series = (there.study_uid, there.series_uid) == (new.study_uid, new.series_uid)
            return ContentConflict(
                f"instance {new.sop_instance_uid} is already stored with other content: digest {there.digest[:12]}… "
                f"is kept, {new.digest[:12]}… was refused",
                brief="stored already under this UID with other content",
                path=there.path if is_of_one_series else "",
            )
        self._of_series.setdefault(there.series_uid, _Growth()).duplicates += 1
        return Arrival(there, is_new=False)

    def _contradiction(self, new: NewInstance) -> ContentConflict | None:
        """What of the study and series already known, in the store or earlier in the batch, this cannot belong to."""
        series = self._series.get(new.series_uid) or self._new_series.get(new.series_uid)
        if series is not None and series.study_uid != new.study_uid:
            return ContentConflict(
                f"series {new.series_uid} is stored under study {series.study_uid}, this came with {new.study_uid}",
                brief="this series is stored already under another study",
            )
        study = self._studies.get(new.study_uid)
        first = self._new_studies.get(new.study_uid)
        patient_id = study.patient_id if study else first.patient_id if first else ""
        if patient_id and new.patient_id and patient_id != new.patient_id:
            return PatientConflict(
                f"study {new.study_uid} is stored under one Patient ID, instance {new.sop_instance_uid} came with "
                "another",
                brief="this study is stored already under another Patient ID",
            )
        if new.patient_id and not patient_id:  # an absent one is no other one, the first that comes counts
            if study is not None:
                self._studies[new.study_uid] = replace(study, patient_id=new.patient_id)
            elif first is not None:
                self._new_studies[new.study_uid] = replace(first, patient_id=new.patient_id)
        return None

    def _write_studies(self) -> None:
        for uid, growth in self._of_study.items():
            first = self._new_studies.get(uid)
            last = next(new for new in reversed(self.new) if new.study_uid == uid)
            if first is None:
                known = self._studies[uid]
                grown = {
                    "uid": uid,
                    "new_last_at": self._now,
                    "new_calling_ae": last.calling_ae,
                    "new_called_ae": last.called_ae,
                    "new_patient_id": known.patient_id,
                    "new_instances": known.instances + growth.instances,
                }
                _GROWN_STUDY.run(self._t.connection, [grown])
                continue
            study = Study(
                study_uid=uid,
                calling_ae=last.calling_ae,
                accession_number=first.accession_number,
                patient_id=first.patient_id,
                study_date=first.study_date,
                first_at=self._now,
                last_at=self._now,
                instances=growth.instances,
                assembled_instances=0,
                called_ae=last.called_ae,
            )
            self._t.execute(sa.insert(STUDIES).values(**columns(study)))
            self._t.event(self._now, uid, "study", uid, "study.new", f"from {first.calling_ae}")

    def _write_series(self) -> None:
        for uid, growth in self._of_series.items():
            first = self._new_series.get(uid)
            if first is not None:
                self._write_new_series(first, growth)
                continue
            known = self._series[uid]
            is_open = growth.instances or known.state is SeriesState.RECEIVING
            changes = {
                "instances": known.instances + growth.instances,
                "duplicates": known.duplicates + growth.duplicates,
                "last_instance_at": self._now if is_open else known.last_instance_at,
            }
            if growth.instances and known.state is not SeriesState.RECEIVING:
                self._t.become_series(known, SeriesState.RECEIVING, self._now, "a late instance", reason="", **changes)
            else:
                named = {f"new_{name}": value for name, value in changes.items()}
                _GROWN_SERIES.run(self._t.connection, [{"uid": uid, **named}])
            if growth.duplicates and not known.duplicates:
                self._note_duplicate(known.study_uid, uid)

    def _write_new_series(self, first: NewInstance, growth: _Growth) -> None:
        series = Series(
            series_uid=first.series_uid,
            study_uid=first.study_uid,
            modality=first.modality,
            series_number=first.series_number,
            state=SeriesState.RECEIVING,
            reason="",
            instances=growth.instances,
            duplicates=growth.duplicates,
            last_instance_at=self._now,
        )
        self._t.execute(sa.insert(SERIES).values(**columns(series)))
        detail = f"{first.modality or 'no modality'}, from {first.calling_ae}"
        self._t.event(self._now, first.study_uid, "series", first.series_uid, "series.receiving", detail)
        if growth.duplicates:
            self._note_duplicate(first.study_uid, first.series_uid)

    def _note_duplicate(self, study_uid: str, series_uid: str) -> None:
        detail = f"{AGAIN}; later ones are only counted"
        self._t.event(self._now, study_uid, "series", series_uid, "series.duplicate", detail)
