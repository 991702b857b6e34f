"""The look at lengths goes through every message as the parser does."""

from __future__ import annotations

import pytest

from ledgerstream.errors import ProtocolError
from ledgerstream.wire import messages
from ledgerstream.wire.skim import _entity, check_lengths
from tests.broker.test_fuzz import REAL


@pytest.mark.parametrize("frame", REAL, ids=lambda f: f"{f[5]}v{f[7]}")
def test_it_ends_where_the_message_ends(frame: bytes) -> None:
    body = frame[4:]
    schema = messages.request_type(body[1], body[3])
    header = messages.read_request_header(body, schema.__flexible__)
    assert _entity(schema)(body, header.body_at) == len(body)


@pytest.mark.parametrize("frame", REAL[-8:], ids=lambda f: f"{f[5]}v{f[7]}")
def test_a_message_that_is_cut_is_refused_wherever_it_is_cut(frame: bytes) -> None:
    body = frame[4:]
    header = messages.read_request_header(
        body, messages.request_type(body[1], body[3]).__flexible__
    )
    for end in range(header.body_at, len(body)):
        with pytest.raises(ProtocolError):
            messages.read_request(header, body[:end])


def test_more_entries_than_bytes_are_refused() -> None:
    schema = messages.request_type(3, 9)
    for count in (b"\x04\x00\x00", b"\xff\xff\xff\xff\x7f"):
        with pytest.raises(ProtocolError, match="entries"):
            check_lengths(schema, count, 0)
