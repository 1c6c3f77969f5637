"""The list of breakages and the table of what came of them."""

import pytest

from tests.faults.mutations import MUTATIONS, ROOT, TABLE, Mutation, table


def test_the_table_has_each_breakage_killed() -> None:
    """As it stands in the list; `python -m tests.faults.mutations` writes it."""
    assert TABLE.read_text() == table(alive=set())


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_what_a_breakage_replaces_stands_in_the_source_once(mutation: Mutation) -> None:
    """Else the list is behind the code, which a run of all breakages would say after minutes."""
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
