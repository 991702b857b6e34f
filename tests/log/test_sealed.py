from __future__ import annotations

import pytest

from ledgerstream.errors import CorruptError
from ledgerstream.log.producers import Kept, ProducerRecord
from ledgerstream.log.sealed import seal, unseal

TAG = b"lstests\x01"
CONTENT = [ProducerRecord(9, 2, (Kept(0, 2, 40, 42, 1_000),))]


def test_what_was_sealed_comes_back_as_its_type() -> None:
    assert unseal(TAG, seal(TAG, CONTENT), list[ProducerRecord]) == CONTENT


def test_any_damage_and_any_cut_is_seen() -> None:
    data = seal(TAG, CONTENT)
    for at in range(len(data)):
        with pytest.raises(CorruptError):
            unseal(TAG, data[:at], list[ProducerRecord])
        with pytest.raises(CorruptError):
            unseal(TAG, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], list[ProducerRecord])


def test_another_version_is_refused() -> None:
    with pytest.raises(CorruptError):
        unseal(b"lstests\x02", seal(TAG, CONTENT), list[ProducerRecord])
    with pytest.raises(CorruptError):
        unseal(TAG, seal(TAG, [1, 2]), list[ProducerRecord])
