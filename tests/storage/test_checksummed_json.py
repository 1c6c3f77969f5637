"""Checksummed JSON is the value that was written, or an error."""

import json
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_ray.storage import checksummed_json, object_store
from ddpm_ray.storage.checksummed_json import ChecksumError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(value=VALUES, bit=st.integers(0))
def test_a_flipped_bit_is_an_error_or_changes_nothing(
    value: object, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    url = tmp_path_factory.getbasetemp() / "value.json"
    checksummed_json.write(str(url), value)
    assert checksummed_json.read(str(url)) == value
    data = bytearray(url.read_bytes())
    bit %= 8 * len(data)
    data[bit // 8] ^= 1 << bit % 8
    url.write_bytes(data)
    try:
        found = checksummed_json.read(str(url))
    except ChecksumError:
        return
    assert found == value  # the bit was in the layout


def test_a_person_may_reformat_it_but_not_change_it(tmp_path: Path) -> None:
    url = tmp_path / "run.json"
    checksummed_json.write(str(url), {"b": 1, "a": [2.5]})
    assert list(checksummed_json.read(str(url))) == ["b", "a"]  # in the order it was written
    held = json.loads(url.read_text())
    url.write_text(json.dumps(held, sort_keys=True))
    assert checksummed_json.read(str(url)) == {"b": 1, "a": [2.5]}
    held["value"]["b"] = 2
    url.write_text(json.dumps(held))
    with pytest.raises(
        ChecksumError, match=r"run.json: its sha256 is not that of its value; restore"
    ):
        checksummed_json.read(str(url))


def test_what_changed_on_the_way_alone_is_read_again(tmp_path: Path) -> None:
    url = str(tmp_path / "x")
    checksummed_json.write(url, 7)
    whole = object_store.read_bytes(url)
    answers = [whole.replace(b"7", b"8"), whole[:5], whole]
    with mock.patch.object(object_store, "read_bytes", side_effect=answers):
        assert checksummed_json.read(url) == 7
