"""The dictionary that forgets."""

from __future__ import annotations

import threading

from cfsfuse.lru import Lru


def test_oldest_use_is_forgotten_first() -> None:
    kept: Lru[str, int] = Lru(3)
    for number, key in enumerate("abc"):
        kept.put(key, number)
    assert kept.get("a") == 0
    kept.put("d", 3)
    assert [kept.get(key) for key in "abcd"] == [0, None, 2, 3]


def test_costs_count_and_are_given_back() -> None:
    kept: Lru[str, str] = Lru(10)
    kept.put("a", "a", 4)
    kept.put("b", "b", 6)
    assert kept.spent == 10
    kept.put("a", "A", 1)
    assert (kept.spent, kept.get("a"), kept.get("b")) == (7, "A", "b")
    kept.put("c", "c", 4)
    assert (kept.spent, kept.get("a"), kept.get("b"), kept.get("c")) == (10, None, "b", "c")
    kept.drop("b")
    kept.drop("never there")
    assert (kept.spent, len(kept)) == (4, 1)
    kept.clear()
    assert (kept.spent, len(kept), kept.get("c")) == (0, 0, None)


def test_value_beyond_the_budget_is_not_kept_and_replaces_nothing_else() -> None:
    kept: Lru[str, str] = Lru(10)
    kept.put("a", "a", 5)
    kept.put("b", "b", 11)
    assert (kept.get("a"), kept.get("b")) == ("a", None)
    kept.put("a", "longer", 11)  # an old value must not stand for the new one
    assert (kept.get("a"), kept.spent) == (None, 0)


def test_dropped_value_lives_on_for_its_holder() -> None:
    kept: Lru[int, list[int]] = Lru(1)
    value = [1]
    kept.put(1, value)
    held = kept.get(1)
    kept.put(2, [2])
    assert held is value
    assert held == [1]


def test_threads_leave_the_sum_right() -> None:
    kept: Lru[int, int] = Lru(50)

    def work(seed: int) -> None:
        for number in range(2000):
            key = (number * seed) % 97
            kept.put(key, number, 1 + key % 3)
            kept.get((key + 1) % 97)
            if not number % 7:
                kept.drop(key)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (3, 5, 7, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept.spent == sum(1 + key % 3 for key in range(97) if kept.get(key) is not None) <= 50
