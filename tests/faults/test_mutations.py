"""The list of injected defects and the table of results."""

import pytest

from tests.faults.mutations import MUTATIONS, ROOT, TABLE, Mutation, table


def test_the_table_has_each_defect_killed() -> None:
    """As it stands in the list; `python -m tests.faults.mutations` writes it."""
    assert TABLE.read_text() == table(alive=set())


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_what_a_defect_replaces_is_in_the_source_once(mutation: Mutation) -> None:
    """Otherwise the list is behind the code, which a complete run would report after minutes."""
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
