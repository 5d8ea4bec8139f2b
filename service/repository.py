"""The models at work while the service runs: loaded, replaced and unloaded, by calls and by watching their folders.

A version that is unloaded or replaced takes nothing new, but finishes what it has: its sessions go on until they end, or until they have
had the time that the settings give them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import structlog

from service.catalog import Catalog, natural
from service.errors import ModelLoading, ModelNotFound, ModelNotReady, ModelRefused, StartupError
from service.metrics import Metrics
from service.model_files import Entry, Failure, Key, Look, Place
from service.roles import Roles
from service.runner import Runner
from service.settings import Settings

Evict = Callable[[Runner], Awaitable[None]]

_PAUSE_S = 0.1  # between two looks at whether a version that is being unloaded is still needed

log = structlog.get_logger("repository")


class Repository:
    """The runners of a catalog's models. Use it on one event loop; files are read in threads beside it, one at a time.

    `evict` ends the sessions that are left on a runner whose time is over.
    """

    def __init__(self, catalog: Catalog, settings: Settings, metrics: Metrics, evict: Evict) -> None:
        self.catalog = catalog
        self._settings = settings
        self._metrics = metrics
        self._evict = evict
        self._runners: dict[Key, Runner] = {entry.key: self._runner(entry) for entry in catalog}
        self._retiring: dict[Runner, asyncio.Task[None]] = {}
        self._loading: set[Key] = set()
        self._owed: dict[str, float] = {}  # sessions that a model's candidate would have by its share and has not, below 1
        self._changing = asyncio.Lock()
        self._seen: dict[Key, Place] = dict(catalog.look.places)  # what each file looked like when it was last acted upon
        self._before = catalog.look  # the watcher's last
        self._trouble = ""
        self._watcher: asyncio.Task[None] | None = None

    def __iter__(self) -> Iterator[Runner]:
        """All runners, also those that are being unloaded."""
        return iter([*self._runners.values(), *self._retiring])

    def start(self) -> None:
        for runner in self._runners.values():
            runner.start()
        if self._settings.watch_s:
            self._watcher = asyncio.create_task(self._watch(self._settings.watch_s))

    async def stop(self) -> None:
        """Ends all work; whoever still waits gets `Draining`."""
        tasks = [task for task in (self._watcher, *self._retiring.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for runner in self:
            await runner.stop()

    # What is there

    def find(self, name: str, version: str | None = None) -> Runner:
        """The runner that takes new work. Raises `ModelNotFound`, `ModelLoading`, or `ModelNotReady` for one that is being unloaded."""
        try:
            entry = self.catalog.find(name, version)
        except ModelNotFound as error:
            wanted = f"model {name}" if version is None else f"version {version} of model {name}"
            if any(key[0] == name and version in (None, key[1]) for key in self._loading):
                raise ModelLoading(f"{wanted} is being loaded") from None
            if any(runner.name == name and version in (None, runner.version) for runner in self._retiring):
                raise ModelNotReady(f"{wanted} is being unloaded and takes nothing new", **error.facts) from None
            raise
        return self._runners[entry.key]

    def draw(self, name: str, version: str | None = None) -> Runner:
        """As `find`, for a new session: the candidate gets its share of those that ask for no version, evenly spread."""
        if version is not None or (tried := self.catalog.candidate(name)) is None:
            return self.find(name, version)
        candidate, share = tried
        owed = self._owed.get(name, 0.0) + share
        drawn = owed > 1 - 1e-9  # shares such as 0.1 do not add up to 1 exactly
        self._owed[name] = owed - drawn
        return self.find(name, candidate if drawn else None)

    def at_work(self, name: str) -> bool:
        """Whether any version of this model has work, be it only to finish."""
        return self.catalog.serves(name) or any(runner.name == name for runner in self._retiring)

    def states(self) -> list[dict[str, str]]:
        """Every version with its state, as the Open Inference Protocol calls it, and the reason for it; those that serve come first."""
        refused = {failure.key: failure.reason for failure in self.catalog.failures}
        states = {key: ("UNAVAILABLE", reason) for key, reason in refused.items()}
        states |= {key: ("UNAVAILABLE", "unloaded") for key in self._seen if key not in refused}
        states |= {(runner.name, runner.version): ("UNLOADING", f"{runner.rows.taken} sessions are left") for runner in self._retiring}
        states |= dict.fromkeys(self._loading, ("LOADING", ""))
        states |= {key: ("READY", f"a newer file was refused: {refused[key]}" if key in refused else "") for key in self._runners}
        listed = sorted(states.items(), key=lambda item: (item[1][0] != "READY", item[0][0], natural(item[0][1])))
        return [{"name": name, **({"version": version} if version else {}), "state": state, "reason": reason} for (name, version), (state, reason) in listed]

    # Changes

    async def load(self, name: str, version: str | None = None) -> list[str]:
        """Makes what is served of this model, or of this version, what its folder holds; returns the versions that were read.

        Raises `ModelNotFound` where there is no such folder, `ModelRefused` for a file that cannot be served: what was served before still is.
        """
        async with self._changing:
            look = await self._look()
            places = {key: place for key, place in look.of(name).items() if version in (None, key[1])}
            if not places:
                wanted = f"model {name!r:.140}" if version is None else f"version {version!r:.140} of model {name!r:.140}"
                raise ModelNotFound(f"no folder of {wanted} in {', '.join(map(str, self.catalog.files.directories))}", models=self.catalog.names())
            failures, read = [], []
            for key in sorted(places, key=lambda key: natural(key[1])):
                entry = self.catalog.get(key)
                if entry is not None and entry.place == places[key]:
                    self.catalog.forget(key)
                    continue
                failure = await self._load(key, places[key])
                read.append(key[1])
                if failure is not None:
                    failures.append(failure)
            if version is None:
                self._assign(look, look)
                for key in [key for key in self._runners if key[0] == name and key not in look.places]:
                    self._unload(key)
        if failures:
            raise ModelRefused("; ".join(f"model {failure.name} version {failure.version}: {failure.reason}" for failure in failures))
        return read

    async def unload(self, name: str, version: str | None = None) -> list[str]:
        """Takes a version, or all, from service at once; its sessions finish meanwhile. It stays away until it is loaded or its file changes.

        Raises `ModelNotFound` for what is not served.
        """
        async with self._changing:
            versions = [self.catalog.find(name, version).version] if version is not None or not self.catalog.serves(name) else self.catalog.versions(name)
            for one in versions:
                self._unload((name, one))
            return versions

    async def _look(self) -> Look:
        try:
            return await asyncio.to_thread(self.catalog.files.look)
        except StartupError as error:
            raise ModelRefused(str(error)) from None

    async def _load(self, key: Key, place: Place) -> Failure | None:
        self._loading.add(key)
        try:
            loaded = await asyncio.to_thread(self.catalog.files.read, key, place)
        except StartupError as error:
            loaded = Failure(*key, str(error))
        except Exception as error:  # whatever a file can do to its reader, it does it once: what is served and the watcher live on
            log.exception("model not served", model=key[0], version=key[1])
            loaded = Failure(*key, f"loading failed: {type(error).__name__}")
        finally:
            self._loading.discard(key)
        self._seen[key] = place
        if isinstance(loaded, Failure):
            self.catalog.refuse(loaded)
            self._metrics.models_refused.labels(*key).inc()
            return loaded
        runner = self._runner(loaded)
        runner.start()
        before = self._runners.get(key)
        self.catalog.put(loaded)
        self._runners[key] = runner
        if before is not None:
            self._retire(before)
        return None

    def _unload(self, key: Key) -> None:
        self.catalog.remove(key)
        log.info("model unloaded", model=key[0], version=key[1])
        self._retire(self._runners.pop(key))

    def _runner(self, entry: Entry) -> Runner:
        return Runner(entry, self._metrics, most_rows=self._settings.max_batch, most_waiting=self._settings.queue)

    def _retire(self, runner: Runner) -> None:
        self._retiring[runner] = asyncio.create_task(self._finish(runner))

    async def _finish(self, runner: Runner) -> None:
        """Waits until nobody needs the runner, and lets it go with its memory."""
        await _unneeded(runner, self._settings.unload_s)
        left = runner.rows.taken
        await self._evict(runner)
        await _unneeded(runner, self._settings.deadline_s)  # clips that are under way
        del self._retiring[runner]
        await runner.stop()
        await asyncio.to_thread(runner.engine.close)
        key = runner.name, runner.version
        if key not in self._runners and all((other.name, other.version) != key for other in self._retiring):
            self._metrics.forget_version(*key)
        log.info("model freed", model=runner.name, version=runner.version, sessions_ended=left)

    # The folders

    async def _watch(self, pause: float) -> None:
        while True:
            await asyncio.sleep(pause)
            try:
                await self._compare(await asyncio.to_thread(self.catalog.files.look))
                self._trouble = ""
            except StartupError as error:
                self._complain(str(error))
            except Exception:
                log.exception("the models' folders could not be followed")

    def _complain(self, trouble: str) -> None:
        """Once, however long it lasts."""
        if trouble != self._trouble:
            log.error("the models' folders cannot be watched", reason=trouble)
        self._trouble = trouble

    async def _compare(self, look: Look) -> None:
        """Acts on what has changed since it was last acted upon and was the same at the last two looks: a file may still be on its way."""
        before, self._before = self._before, look
        async with self._changing:
            self._assign(before, look)
            for key in sorted(self._seen.keys() | look.places.keys()):
                was, now = before.places.get(key), look.places.get(key)
                if was != now or now == self._seen.get(key) or (now is None and look.hides(key, self._seen[key])):
                    continue
                if now is not None and now.stamp is not None:
                    await self._load(key, now)
                else:
                    self._gone(key, now)

    def _assign(self, before: Look, look: Look) -> None:
        """Takes over roles that both looks saw; where the file cannot be read, the roles stay as they are."""
        self.catalog.refuse_folders(look.wrong())
        for name, roles in look.roles.items():
            if isinstance(roles, Roles) and before.roles.get(name) == roles:
                self.catalog.assign(name, roles)

    def _gone(self, key: Key, now: Place | None) -> None:
        if key in self._runners:
            self._unload(key)
        self.catalog.forget(key)
        if now is None:
            del self._seen[key]
        else:  # the folder is still there
            self._seen[key] = now
            self.catalog.refuse(Failure(*key, "the file is not there"))

    def figures(self, runner: Runner) -> dict[str, Any]:
        """What loading took and what it holds."""
        entry = runner.entry
        return {"load_s": round(entry.seconds, 3), "memory_bytes": entry.memory_bytes, "state_bytes": 4 * runner.manifest.state_width * runner.rows.taken}


async def _unneeded(runner: Runner, seconds: float) -> None:
    """Waits until nothing depends on the runner, at most so long."""
    limit = time.monotonic() + seconds
    while True:
        if not runner.needed or time.monotonic() >= limit:
            return
        await asyncio.sleep(_PAUSE_S)
