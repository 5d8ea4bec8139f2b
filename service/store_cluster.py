"""The nodes of a Redis or Valkey Cluster, between which keys are spread by their slots."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from redis.asyncio import ConnectionPool, Redis
from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, ResponseError, TryAgainError

from service.errors import StoreUnavailable
from service.store import StoreSettings
from service.store_server import Call, Reply, Server, Unfit, refused

ATTEMPTS = 5  # of a call, while slots move or a node is replaced

Address = tuple[str, int]


class Cluster:
    """Keys are spread over nodes by their slots; which node has which is learnt from the nodes, and again when one says otherwise or fails."""

    keys_in_call = 1

    def __init__(self, hosts: list[Address], options: dict[str, Any], settings: StoreSettings) -> None:
        self._first = hosts
        self._options = options
        self._settings = settings
        self._nodes: dict[Address, Server] = {}
        self._owners: dict[int, Address] = {}  # by slot
        self._learning = asyncio.Lock()
        self._learnt = 0  # how often

    async def run(self, calls: list[Call], confirm: bool, deadline: float) -> list[Reply | StoreUnavailable]:
        replies: list[Reply | StoreUnavailable] = [StoreUnavailable("no node of the Cluster has this session's slot")] * len(calls)
        left = list(range(len(calls)))
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(max(0.0, min(0.05 * 2 ** (attempt - 1), deadline - time.monotonic())))
            if attempt or not self._owners:
                failure = await self._learn(deadline)
                if failure is not None:
                    replies = [failure if index in left else reply for index, reply in enumerate(replies)]
                    continue
            left = await self._try(calls, replies, left, confirm, deadline)
            if not left or time.monotonic() >= deadline:
                break
        return replies

    async def _try(self, calls: list[Call], replies: list[Reply | StoreUnavailable], left: list[int], confirm: bool, deadline: float) -> list[int]:
        """Writes down what is answered; returns what is to be tried again."""
        parts: dict[Address, list[int]] = {}
        again = []
        for index in left:
            owner = self._owners.get(key_slot(calls[index].keys[0].encode()))
            if owner is None:
                again.append(index)
            else:
                parts.setdefault(owner, []).append(index)
        groups = [(indices, self._node(owner).run([calls[index] for index in indices], confirm, deadline)) for owner, indices in parts.items()]
        for (indices, _), answers in zip(groups, await asyncio.gather(*(run for _, run in groups), return_exceptions=True), strict=True):
            if isinstance(answers, StoreUnavailable):
                for index in indices:
                    replies[index] = answers
                again += indices
                continue
            if isinstance(answers, BaseException):
                raise answers
            for index, answer in zip(indices, answers, strict=True):
                if type(answer) is AskError:  # the slot is on its way to another node, and this key is there already
                    answer = await self._ask(answer, calls[index], confirm, deadline)
                if isinstance(answer, ResponseError):
                    replies[index] = refused(answer)
                    if isinstance(answer, AskError | TryAgainError | ClusterDownError):  # moved, asked elsewhere, or being replaced
                        again.append(index)
                else:
                    replies[index] = answer
        return again

    async def _ask(self, error: AskError, call: Call, confirm: bool, deadline: float) -> Reply | ResponseError:
        try:
            [answer] = await self._node((error.host, error.port)).run([call], confirm, deadline, asking=True)
        except StoreUnavailable:
            return error
        return answer

    async def check(self, deadline: float) -> None:
        if (failure := await self._learn(deadline)) is not None:
            raise failure
        await asyncio.gather(*(self._node(owner).check(deadline) for owner in set(self._owners.values())))

    async def close(self) -> None:
        await asyncio.gather(*(node.close() for node in self._nodes.values()))

    async def _learn(self, deadline: float) -> StoreUnavailable | None:
        """Asks the nodes, one after another, who has which slots. Of many who ask at once one does it."""
        before = self._learnt
        failure: StoreUnavailable | None = None
        async with self._learning:
            if self._learnt != before:
                return None
            for address in dict.fromkeys([*set(self._owners.values()), *self._first]):
                try:
                    slots = await self._node(address).slots(deadline)
                except StoreUnavailable as error:
                    if failure is None or isinstance(error, Unfit):
                        failure = error
                    continue
                owners = {}
                for first, last, (host, port, *_), *_ in slots:
                    name = host.decode() if isinstance(host, bytes) else host
                    owners.update(dict.fromkeys(range(first, last + 1), (name or address[0], port)))
                self._owners = owners
                self._learnt += 1
                return None
        return failure or StoreUnavailable("no node of the Cluster answers")

    def _node(self, address: Address) -> Server:
        node = self._nodes.get(address)
        if node is None:
            host, port = address
            client = Redis.from_pool(ConnectionPool(**{**self._options, "host": host, "port": port}))
            node = self._nodes[address] = Server(client, f"{host}:{port}", self._settings, cluster=True)
        return node
