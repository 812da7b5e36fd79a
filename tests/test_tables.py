"""Text for a terminal."""

from suwen.tables import counted, printable, table, width


def test_what_others_wrote_moves_no_cursor():
    text = "血压\x1b[2J\x1b]0;title\x07 140\r/90\x9b31m\u0000\n\t按时服药"
    assert printable(text) == "血压[2J]0;title 140/9031m\n\t按时服药"


def test_things_are_counted_as_one_would_say_it():
    assert [counted(n, "update") for n in (0, 1, 1200)] == ["0 updates", "1 update", "1,200 updates"]
    assert counted(2, "process", "processes") == "2 processes"


def test_columns_are_as_wide_as_their_widest_cell_on_a_terminal():
    lines = table([("药", "n"), ("aspirin", "10")]).splitlines()
    assert lines == ["药        n", "aspirin  10"] and width(lines[0]) == width(lines[1]) == 11
