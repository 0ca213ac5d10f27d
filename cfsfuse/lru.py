"""A dictionary that forgets: what has not been used for the longest time goes when a budget is spent."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Lru(Generic[K, V]):
    """Keeps values up to a total `budget`, each of the cost it was put in with. Safe to use from several threads.

    A value that is dropped lives on for whoever still holds it: nothing is closed or cleared here.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.spent = 0
        self._values: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: K) -> V | None:
        """Return the value of `key`, None when it is not kept."""
        with self._lock:
            found = self._values.get(key)
            if found is None:
                return None
            self._values.move_to_end(key)
            return found[0]

    def put(self, key: K, value: V, cost: int = 1) -> None:
        """Keep `value` and drop the oldest ones beyond the budget; one that exceeds it alone is not kept."""
        with self._lock:
            self._drop(key)
            if cost > self.budget:
                return
            self._values[key] = (value, cost)
            self.spent += cost
            while self.spent > self.budget:
                self._drop(next(iter(self._values)))

    def drop(self, key: K) -> None:
        """Forget `key`; nothing happens when it is not kept."""
        with self._lock:
            self._drop(key)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._values.clear()
            self.spent = 0

    def __len__(self) -> int:
        return len(self._values)

    def _drop(self, key: K) -> None:
        value = self._values.pop(key, None)
        if value is not None:
            self.spent -= value[1]
