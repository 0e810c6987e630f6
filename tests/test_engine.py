"""The engine hands results back in order, bounds what is in flight, and passes errors on."""

import os
import threading
import time
import weakref

import numpy as np
import pytest

from refimpl import engine
from refimpl.engine import map_units, share


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


@pytest.mark.parametrize("jobs", [1, 2, 4])
def test_every_row_is_done_once_by_threads_awake_and_asleep(jobs):
    for count in (1, 2, 3, 7, 100):
        for pause in (0, 0.02):  # by then those without work sleep
            done = []
            time.sleep(pause)
            share(lambda rows: done.extend(range(rows.start, rows.stop)), count, jobs)  # noqa: B023
            assert sorted(done) == list(range(count))


def test_parts_of_a_product_run_side_by_side():
    both = threading.Barrier(2, timeout=5)
    for _ in range(20):
        share(lambda rows: both.wait(), 2, 2)


@pytest.mark.parametrize("bad", [0, 1])
def test_an_error_in_any_part_of_a_product_is_raised_and_the_threads_go_on(bad):
    both = threading.Barrier(2, timeout=5)

    def work(rows):
        both.wait()
        if rows.start == bad:
            raise ValueError(f"row {rows.start}")

    for _ in range(3):
        with pytest.raises(ValueError, match=f"row {bad}"):
            share(work, 2, 2)
        share(lambda rows: both.wait(), 2, 2)


def test_a_product_within_a_part_and_products_of_several_callers_are_done():
    done = []
    share(lambda rows: share(lambda inner: done.append((rows.start, inner)), 5, 2), 2, 2)
    assert all(sum(i.stop - i.start for row, i in done if row == outer) == 5 for outer in (0, 1))
    done.clear()
    callers = [
        threading.Thread(target=lambda: [share(done.append, 3, 2) for _ in range(200)]) for _ in range(3)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert sum(rows.stop - rows.start for rows in done) == 3 * 3 * 200


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_has_threads_of_its_own():
    share(lambda rows: None, 2, 2)
    pid = os.fork()
    if not pid:
        done = []
        share(done.append, 4, 2)
        os._exit(sum(rows.stop - rows.start for rows in done))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 4


def test_nothing_of_a_product_is_kept():
    matrix = np.zeros(8)
    kept = weakref.ref(matrix)
    share(lambda rows, matrix=matrix: matrix[rows].sum(), 8, 2)
    del matrix
    for _ in range(100):
        if kept() is None:
            break
        time.sleep(0.01)
    assert kept() is None
