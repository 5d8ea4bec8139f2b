"""How long something that fails is tried again, and when: at once where it was lost, then after pauses. Pure: the caller has the clock."""

from __future__ import annotations

from service.client_values import Retry
from service.errors import Draining, ServiceError


class Patience:
    """With one thing that may fail many times in a row; `succeeded` ends the row. `now` is seconds on any clock that does not go back."""

    def __init__(self, retry: Retry) -> None:
        self._retry = retry
        self._since: float | None = None  # the row began
        self._not_before = 0.0
        self.tries = 0
        self.reason = "it is lost again whenever it is back"  # of the latest failure

    def succeeded(self) -> None:
        self._since, self.tries, self._not_before = None, 0, 0.0

    def failed(self, error: Exception, now: float) -> None:
        """It failed with this; a refusal's `retry_after` is heeded, but not that of a server that goes away: the next try may find another one."""
        self.reason = str(error)
        self._since = now if self._since is None else self._since
        if isinstance(error, ServiceError) and not isinstance(error, Draining):
            self._not_before = now + max(self._retry.pause_s(0), float(error.facts.get("retry_after", 0)))

    def pause_s(self, now: float) -> float | None:
        """Seconds to wait before the next try, which counts from here on; None when it is time to give up."""
        self._since = now if self._since is None else self._since
        left = self._since + self._retry.give_up_s - now
        if left <= 0:
            return None
        pause = max(self._retry.pause_s(self.tries - 1) if self.tries else 0.0, self._not_before - now)
        self.tries += 1
        return min(pause, left)

    def left_s(self, now: float) -> float:
        """How much longer one try may take."""
        return self._retry.give_up_s if self._since is None else max(0.0, self._since + self._retry.give_up_s - now)

    def given_up(self) -> str:
        return f"was lost and did not come back within {self._retry.give_up_s:g} s, in {self.tries} attempts: {self.reason}"
