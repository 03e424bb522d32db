"""What the record says of looks at a study: how its series scored, and what spoke for its being whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

import sqlalchemy as sa

from salsa_node.errors import UnknownStudy
from salsa_node.store_queries import Queries
from salsa_node.store_rows import LOOKS, Look
from salsa_node.store_transaction import transaction, writer


class Looks(Queries):
    """The looks; each method is one transaction."""

    def __init__(self, engine: sa.Engine) -> None:
        super().__init__(engine)
        self._writer = writer(engine)

    def note_look(
        self,
        study_uid: str,
        run_id: int | None,
        scores: Sequence[Mapping[str, object]],
        evidence: Sequence[Mapping[str, object]],
        now: datetime,
    ) -> Look:
        """Write down what a look at a study found; run_id: the run that it led to. Raises UnknownStudy."""
        values = {
            "study_uid": study_uid,
            "run_id": run_id,
            "at": now,
            "scores": list(scores),
            "evidence": list(evidence),
        }
        with transaction(self._writer) as t:
            t.study(study_uid)
            number = t.insert(LOOKS, **values)
            look = t.one(Look, sa.select(LOOKS).where(LOOKS.c.id == number))
        if look is None:
            raise UnknownStudy(f"the store holds no look {number}")
        return look

    def looks_of(self, study_uid: str) -> tuple[Look, ...]:
        """The looks at a study, oldest first."""
        with transaction(self._engine) as t:
            return t.all(Look, sa.select(LOOKS).where(LOOKS.c.study_uid == study_uid).order_by(LOOKS.c.id))
