"""Logs are one line a record, for people or for machines."""

from __future__ import annotations

import io
import json
import logging

import pytest

from salsa_node import log


@pytest.fixture(autouse=True)
def _restore():
    root = logging.getLogger("salsa_node")
    kept = (root.handlers[:], root.level, root.propagate)
    yield
    root.handlers[:], root.propagate = kept[0], kept[2]
    root.setLevel(kept[1])


def test_json_lines_hold_the_keys():
    stream = io.StringIO()
    log.start("info", "json", stream)
    logging.getLogger("salsa_node.assembly").info("series complete", extra={"event": "series.complete", "slices": 3})
    line = json.loads(stream.getvalue())
    assert line["message"] == "series complete"
    assert (line["event"], line["slices"], line["level"]) == ("series.complete", 3, "info")


def test_text_is_a_sentence_with_keys_and_respects_the_level():
    stream = io.StringIO()
    log.start("warning", "text", stream)
    logging.getLogger("salsa_node.x").info("not shown")
    logging.getLogger("salsa_node.x").warning("disk is %s", "full", extra={"event": "disk", "free_gib": 0})
    assert stream.getvalue().endswith("warning disk is full  free_gib=0\n")


def test_an_exception_stays_within_its_record():
    stream = io.StringIO()
    log.start("info", "json", stream)
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("salsa_node.x").exception("it broke")
    assert "boom" in json.loads(stream.getvalue())["traceback"]


def test_an_unforeseen_error_tells_its_place_and_keeps_the_words_of_others_to_itself():
    try:
        int("Doe^Jane")
    except ValueError as error:
        told = log.unforeseen(error)
    assert told.startswith("unforeseen ValueError at test_log:")
    assert "Doe" not in told
