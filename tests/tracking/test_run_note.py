"""A run's description is replaced block by block, and leaves alone what a user wrote."""

from hypothesis import given
from hypothesis import strategies as st

from ddpm_ray.tracking.run_note import MAX_NOTE, with_block, without_former_note

PLAIN = st.text(st.characters(exclude_characters="<>"), max_size=80).map(str.strip)
NAMES = st.sampled_from(["end", "description"])


@given(PLAIN, st.lists(st.tuples(NAMES, PLAIN), max_size=6))
def test_a_block_holds_the_last_text_that_it_was_given(
    own: str, writes: list[tuple[str, str]]
) -> None:
    note = own
    for name, text in writes:
        note = with_block(note, name, text)
        assert with_block(note, name, text) == note
    assert note.endswith(own)
    last = dict(writes)
    for name, text in last.items():
        assert (f"<!-- ddpm_ray {name} -->\n\n{text}\n\n<!-- end of {name} -->" in note) == bool(
            text
        )
        note = with_block(note, name, "")
    assert note == own


def test_text_before_and_after_a_block_is_kept() -> None:
    note = "mine\n\n" + with_block("yours", "end", "old")
    assert with_block(note, "end", "") == "mine\n\nyours"
    assert with_block(note, "end", "new").replace("new", "old") == note


@given(st.integers(0, 2 * MAX_NOTE), st.integers(0, MAX_NOTE))
def test_a_long_text_is_cut_so_that_the_block_can_be_found_again(long: int, own: int) -> None:
    note = with_block("y" * own, "end", "x" * long)
    assert len(note) <= MAX_NOTE
    assert with_block(note, "end", "") == "y" * own


def test_what_earlier_versions_wrote_is_dropped() -> None:
    assert without_former_note("out of memory", "out of memory") == ""
    assert without_former_note("| place | trial | values |", "") == ""
    assert without_former_note("my own words", "out of memory") == "my own words"
