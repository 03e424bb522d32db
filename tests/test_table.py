"""Columns of text: aligned, folded where there is no room, nothing of what was to be said left out."""

import random

import pytest
from rich.cells import cell_len

from salsa_node.table import drawn

HEADINGS = ["last image", ">images", "note"]
ROWS = [["2026-11-21T19:20:38", "31", "what is wrong\nsecond line"], ["", "1200", "肝臓の画像"]]


def test_columns_stand_under_their_headings_and_numbers_to_the_right():
    assert drawn(HEADINGS, ROWS, 160) == [
        "last image           images  note",
        "───────────────────  ──────  ─────────────",
        "2026-11-21T19:20:38      31  what is wrong",
        "                             second line",
        "                       1200  肝臓の画像",
    ]


def test_a_narrow_terminal_folds_between_words_and_long_words_anywhere():
    assert drawn(["study", "note"], [["1.2.840.113619", "images are missing"]], 20) == [
        "study      note",
        "─────────  ─────────",
        "1.2.840.1  images",
        "13619      are",
        "           missing",
    ]


def test_the_widest_column_gives_way_first():
    assert drawn(["a", "b"], [["x" * 4, "y" * 20]], 16)[1:] == [
        "────  ──────────",
        "xxxx  yyyyyyyyyy",
        "      yyyyyyyyyy",
    ]


def test_a_wide_character_takes_two_cells():
    lines = drawn(["a", "b"], [["肝臓の画像", "end"]], 11)
    assert lines[2:] == ["肝臓の  end", "画像"]


def test_a_line_break_is_kept_where_there_is_room():
    assert drawn(["abc", "d"], [["a\nb", "x"]], 80)[2:] == ["a    x", "b"]


def test_blanks_at_an_edge_make_no_empty_line():
    assert drawn(["abc"], [["abc  "], ["abc  de"]], 3)[2:] == ["abc", "abc", "de"]


def test_only_the_first_sign_of_a_heading_is_for_its_side():
    assert drawn([">a>", "b>c"], [["", "d"], ["xyz", ""]], 80) == [" a>  b>c", "───  ───", "     d", "xyz"]
    assert drawn(["b>cd", "e"], [["d", ""]], 80)[2] == "d"


def test_no_rows_leave_the_headings():
    assert drawn(["a", ">bc"], [], 10) == ["a  bc", "─  ──"]


@pytest.mark.parametrize("seed", range(20))
def test_all_that_was_to_be_said_is_there_and_no_line_is_too_long(seed):
    dice = random.Random(seed)
    columns = dice.randint(1, 6)
    rows = [
        ["".join(dice.choices("ab 肝é\n", k=dice.randint(0, 40))) for _ in range(columns)]
        for _ in range(dice.randint(0, 8))
    ]
    width = dice.randint(4 * columns, 80)
    lines = drawn(["x"] * columns, rows, width)
    assert max(map(cell_len, lines)) <= width
    said = sorted("".join(c for row in rows for cell in row for c in cell if not c.isspace()))
    assert sorted("".join(c for line in lines[2:] for c in line if not c.isspace())) == said


def test_a_terminal_too_narrow_for_anything_still_gets_all_of_it():
    assert drawn(["abc", "d"], [["肝臓", "d"]], 1) == ["ab  d", "c", "──  ─", "肝  d", "臓"]
