"""The list of breakages and the table of what came of them."""

from tests.faults.mutations import TABLE, table


def test_the_table_has_each_breakage_killed() -> None:
    """As it stands in the list; `python -m tests.faults.mutations` writes it."""
    assert TABLE.read_text() == table(alive=set())
