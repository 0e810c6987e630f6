"""The engine hands results back in order, bounds what is in flight, and passes errors on."""

import threading
import time

import pytest

from refimpl import engine
from refimpl.engine import map_units


@pytest.mark.parametrize("jobs", [1, 2, 7])
def test_results_come_back_in_the_order_of_the_units(jobs):
    def work(n):
        time.sleep(0.002 * ((n * 7) % 5))
        return n * n

    assert list(map_units(range(40), work, jobs)) == [(n, n * n) for n in range(40)]


def test_no_more_units_are_drawn_than_may_be_in_flight():
    drawn, most = 0, 0
    done = 0

    def units():
        nonlocal drawn
        for n in range(50):
            drawn += 1
            yield n

    for _ in map_units(units(), lambda n: n, jobs=3):
        most = max(most, drawn - done)
        done += 1
    assert done == 50 and most <= 3 + 2


def test_units_run_on_several_threads():
    seen, both = set(), threading.Barrier(2, timeout=5)

    def work(n):
        seen.add(threading.get_ident())
        both.wait()

    list(map_units(range(2), work, jobs=2))
    assert len(seen) == 2


@pytest.mark.parametrize("jobs", [1, 3])
def test_an_error_of_the_work_is_raised(jobs):
    def work(n):
        if n == 5:
            raise ValueError("unit five")
        return n

    with pytest.raises(ValueError, match="unit five"):
        list(map_units(range(20), work, jobs))


def test_small_work_is_not_spread_over_threads():
    few, many = engine.ENOUGH - 1, 100 * engine.ENOUGH
    assert [engine.threads_worth(8, size) for size in (0, few, few + 1, many)] == [1, 1, 2, 8]
    assert [engine.threads_worth(8, size, times=4) for size in (few + 1, 4 * few + 4)] == [1, 2]
    assert engine.threads_worth(1, many) == 1
