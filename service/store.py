"""The seam to where session records are kept, so that a stream outlives its process: its values, its rules, its errors.

A store holds for each session one record, as bytes it does not read, and says who may write it:

- `attach` makes its caller the session's only owner: it raises the session's **epoch** by one and hands out the record. Whoever attached before is
  fenced from then on.
- `save` replaces the record only if `(epoch, next_frame, sequence)` does not fall behind what is there; comparison and writing are one step. The epoch
  decides first: a replica that was taken over is refused however far ahead its frames are. Owners have a random mark beside the epoch, because a
  store that loses its latest writes (a failover to a replica that lagged) may give one epoch out twice: of two such owners it knows the one that it
  saw attach last.
- Nothing there is no refusal: a store that was emptied is filled again by those who serve the sessions. So a new session under an id that nobody can
  guess needs no `attach`: its first save, with epoch 1, makes it known. A session that was ended leaves a mark for a while instead, so that late
  writes do not bring it back.
- Whoever attaches may save from any frame on; after that, its frames do not go back. So a session begun anew under its id, whose frames count from 0
  again, is attached again, or its saves are `STALE`.

Records expire `idle_s` after the last attach, save or touch, and `age_s` after the session was first stored.

Ids are capabilities, so stores use `key(id)`, a digest, wherever keys show (logs, monitors). The record still holds the id: guard the store as you
guard the tokens.

What a level of `durability` can still lose, once `save` has said SAVED:

===========  ==============================================  ====================================================================================
level        confirmed when                                  lost by
===========  ==============================================  ====================================================================================
memory       the store's process holds the record            a crash of the store's machine, or of its process where that keeps no file; a failover
fsynced      the store's disk holds it                       the loss of that disk; a failover to a replica that lagged
replicated   the store's process and one replica hold it     the loss of both at once; a partition in which the replica promoted is not that one
===========  ==============================================  ====================================================================================

`store_memory`, `store_sqlite` and `store_redis` say what these mean for each of them.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, Protocol

Durability = Literal["memory", "fsynced", "replicated"]

MOST_IN_BATCH = 256  # checkpoints in one save, sessions in one touch
MOST_EPOCH = 2**53 - 1  # what a script of Redis can still count exactly
MOST_FRAMES = 2**64 - 1
LEAST_MARK_S = 60.0  # a session that was ended is remembered at least that long


class Outcome(Enum):
    """What became of one checkpoint."""

    SAVED = "saved"  # and as durable as the store was told to make it
    UNCONFIRMED = "unconfirmed"  # perhaps saved, not known to be that durable: save it, or a later one, again
    FENCED = "fenced"  # another owner has attached: this one's copy is to be dropped
    STALE = "stale"  # this owner has saved something later already
    ENDED = "ended"  # the session was ended, here or elsewhere


@dataclass(frozen=True, slots=True)
class Attached:
    """What a store holds of a session."""

    epoch: int  # 1 for a session that is new
    record: bytes | None  # the latest that was saved; None before the first


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A session's record after frame `next_frame` - 1, as its owner of this epoch holds it."""

    session_id: str
    epoch: int
    next_frame: int
    record: bytes = field(repr=False)
    sequence: int = 0  # orders the checkpoints of one owner at one frame: a reset or an ack changes the record and takes no frame

    def __post_init__(self) -> None:
        if not 1 <= self.epoch <= MOST_EPOCH:
            raise ValueError(f"epoch {self.epoch}: from 1 to {MOST_EPOCH} can be stored")
        if not (0 <= self.next_frame <= MOST_FRAMES and 0 <= self.sequence <= MOST_FRAMES):
            raise ValueError(f"next_frame {self.next_frame}, sequence {self.sequence}: from 0 to {MOST_FRAMES} can be stored")


@dataclass(frozen=True, slots=True)
class Mark:
    """What decides about the next save of a session: who wrote last, and where that stands."""

    epoch: int
    owner: str
    next_frame: int = 0
    sequence: int = 0
    ended: bool = False

    def may_end(self, epoch: int, owner: str) -> bool:
        """Whether the owner of this epoch may end the session; ending it twice is no fault."""
        return self.ended or epoch > self.epoch or (epoch, owner) == (self.epoch, self.owner)


def decide(held: Mark | None, checkpoint: Checkpoint, owner: str) -> Outcome:
    """Whether the checkpoint of this owner may replace what the store holds; SAVED if so. Every store decides like this."""
    if held is None or checkpoint.epoch > held.epoch:  # a higher epoch than the store's own: the store has lost the attach that gave it out
        return Outcome.SAVED
    if held.ended:
        return Outcome.ENDED
    if checkpoint.epoch < held.epoch or owner != held.owner:
        return Outcome.FENCED
    if (checkpoint.next_frame, checkpoint.sequence) < (held.next_frame, held.sequence):
        return Outcome.STALE
    return Outcome.SAVED


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """How a store is used. `url` says where it is and of which kind, see `stores.open_store`."""

    url: str = field(default="memory://", repr=False)  # may have a password
    durability: Durability = "memory"
    idle_s: float = 600.0
    age_s: float | None = None
    timeout_s: float = 2.0  # no call takes longer
    prefix: str = "indrnn:"  # of keys, where others share the store
    owner: str = field(default_factory=lambda: secrets.token_hex(8))  # this process, for as long as it lives


class Store(Protocol):
    """Where records are kept. Safe to call from many tasks of one event loop, which it never blocks.

    Every call but `close` raises `StoreUnavailable`, within `timeout_s`, when the store cannot be reached or cannot take it; whether a write
    has happened is then not known, and it may be made again. What was cancelled is the same.
    """

    @property
    def settings(self) -> StoreSettings: ...

    async def start(self) -> None:
        """Reaches the store once. Raises `StartupError` for what waiting does not mend (a wrong password, too old a version, a file that is none),
        else `StoreUnavailable`; after the latter all other calls may be used, and will work when the store is there."""

    async def attach(self, session_id: str, *, create: bool = True) -> Attached:
        """Makes this process the session's owner. Without `create` raises `SessionNotFound` where the store has no such session, or one that was ended."""

    async def load(self, session_id: str) -> Attached | None:
        """What the store holds, for those who only look; None if nothing."""

    async def save(self, checkpoints: Sequence[Checkpoint]) -> list[Outcome]:
        """One outcome for each, in order; one round trip. At most `MOST_IN_BATCH`, of different sessions, else `ValueError`. Neighbours are independent."""

    async def touch(self, session_ids: Sequence[str]) -> list[str]:
        """Puts off their expiry, of at most `MOST_IN_BATCH`; returns those that the store does not have (any more), which are to be saved again."""

    async def end(self, session_id: str, epoch: int) -> bool:
        """Drops the record, unless another owner has attached since: then False, and nothing changes. The epoch goes on counting if the id comes again."""

    async def ping(self) -> None:
        """Returns if the store answers."""

    async def close(self) -> None:
        """Gives back what it holds; waits no longer than `timeout_s` for calls under way."""


def key(session_id: str) -> str:
    """64 hexadecimal digits under which a session is stored: whoever sees a key cannot use the session."""
    return hashlib.sha256(session_id.encode("utf-8", "surrogatepass")).hexdigest()


def check_batch(session_ids: Sequence[str]) -> None:
    """Raises `ValueError` for a batch that is too large or names a session twice: which of the two would be the later?"""
    if len(session_ids) > MOST_IN_BATCH:
        raise ValueError(f"{len(session_ids)} sessions in one batch, at most {MOST_IN_BATCH}")
    if len(set(session_ids)) < len(session_ids):
        raise ValueError("a session is in the batch more than once")
