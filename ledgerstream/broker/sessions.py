"""Fetch sessions (KIP-227): a reader says what it follows once, and hears of what changed."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple
from uuid import UUID

from kio.schema.errors import ErrorCode

NO_SESSION = 0
FINAL_EPOCH = -1
FIRST_EPOCH = 0
EPOCH_MAX = 2**31 - 1

Place = tuple[str | UUID, int]  # topic by name, or by id from Fetch v13 on; partition


@dataclass(slots=True)
class Followed:
    """One partition that a reader follows, and what it was last told of it."""

    name: str
    topic_id: UUID | None
    index: int
    offset: int
    bytes_max: int
    leader_epoch: int
    last_epoch: int
    told: tuple[int, int, int] | None = None  # high watermark, last stable offset, log start

    @property
    def place(self) -> Place:
        return (self.topic_id or self.name, self.index)


@dataclass(slots=True)
class Session:
    session_id: int
    by_id: bool
    epoch: int = 1
    followed: OrderedDict[Place, Followed] = field(default_factory=OrderedDict)


class Begun(NamedTuple):
    """How a fetch goes on: what it reads, and the session whose changes alone are told, if any."""

    error: ErrorCode
    followed: list[Followed]
    session: Session | None
    incremental: bool


class Sessions:
    """All sessions, oldest use first; the oldest is dropped where there are too many."""

    def __init__(self, sessions_max: int) -> None:
        self.sessions_max = sessions_max
        self._by_id: OrderedDict[int, Session] = OrderedDict()
        self._next_id = 1

    def __len__(self) -> int:
        return len(self._by_id)

    def begin(
        self,
        session_id: int,
        epoch: int,
        wanted: list[Followed],
        forgotten: list[Place],
        by_id: bool,
    ) -> Begun:
        if epoch in (FINAL_EPOCH, FIRST_EPOCH):
            if session_id != NO_SESSION:
                self._by_id.pop(session_id, None)
            if epoch == FINAL_EPOCH:
                return Begun(ErrorCode.none, wanted, None, False)
            return Begun(ErrorCode.none, wanted, self._open(wanted, by_id), False)
        session = self._by_id.get(session_id)
        if session is None:
            return Begun(ErrorCode.fetch_session_id_not_found, [], None, False)
        if session.epoch != epoch:
            return Begun(ErrorCode.invalid_fetch_session_epoch, [], None, False)
        if session.by_id != by_id:
            return Begun(ErrorCode.fetch_session_topic_id_error, [], None, False)
        self._by_id.move_to_end(session_id)
        session.epoch = 1 if epoch == EPOCH_MAX else epoch + 1
        for place in forgotten:
            session.followed.pop(place, None)
        for one in wanted:
            known = session.followed.get(one.place)
            if known is not None:
                one.told = known.told
            session.followed[one.place] = one
        return Begun(ErrorCode.none, list(session.followed.values()), session, True)

    def _open(self, wanted: list[Followed], by_id: bool) -> Session | None:
        if not wanted:
            return None
        session = Session(self._next_id, by_id)
        self._next_id = 1 if self._next_id == EPOCH_MAX else self._next_id + 1
        session.followed = OrderedDict((one.place, one) for one in wanted)
        if len(self._by_id) >= self.sessions_max:
            self._by_id.popitem(last=False)
        self._by_id[session.session_id] = session
        return session
