"""The description of an MLflow run: blocks of Markdown that a restart replaces.

A block stands between two HTML comments, which MLflow does not show. Text that a user writes around
the blocks is kept.
"""

MAX_NOTE = 5000  # letters of a tag, a limit of the server


def with_block(note: str, name: str, text: str) -> str:
    """Return `note` with `text` as its block `name`, new ones first; an empty text removes it.

    Text that exceeds the server's limit is cut; without room for any, there is no block.
    """
    first, last = f"<!-- ddpm_ray {name} -->", f"<!-- end of {name} -->"
    before, found, rest = note.partition(first)
    after = rest.partition(last)[2] if found else note
    before = before if found else ""
    kept = [before.strip(), after.strip()]
    room = MAX_NOTE - len(f"{first}\n\n\n\n{last}\n\n\n\n") - sum(map(len, kept))
    if text and room > 0:
        kept.insert(1, f"{first}\n\n{text[:room]}\n\n{last}")
    return "\n\n".join(filter(None, kept))


def without_former_note(note: str, reason: str) -> str:
    """Return `note` without the text that earlier versions wrote: a reason or a leaderboard."""
    return "" if note == reason or note.startswith("| place | trial |") else note
