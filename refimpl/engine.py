"""Map work units over threads and hand the results back in order.

The kernels release the GIL, so threads are enough on one machine. Results come back in the units' order
whatever the number of threads, and at most a few units are in flight, so memory stays bounded.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

U = TypeVar("U")
R = TypeVar("R")


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_units(
    units: Iterable[U], work: Callable[[U], R], jobs: int | None = None
) -> Generator[tuple[U, R], None, None]:
    """Yield (unit, work(unit)) in order, with up to `jobs` units at work and two more waiting.

    jobs : threads; None means one per core. With 1 the work runs in the calling thread.
    Raises what `work` raises; the units behind it are then dropped.
    """
    jobs = jobs or cores()
    if jobs == 1:
        for unit in units:
            yield unit, work(unit)
        return
    waiting: deque[tuple[U, Future[R]]] = deque()
    with ThreadPoolExecutor(jobs, thread_name_prefix="refimpl") as pool:
        try:
            for unit in units:
                waiting.append((unit, pool.submit(work, unit)))
                if len(waiting) >= jobs + 2:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


# A part that another thread does comes 80 us later (measured: 2 cores of a virtual machine); one thread does so many
# products in about twice that: of float32 in the caches, or of quantized weights that come from memory.
ENOUGH = 1 << 22


def threads_worth(jobs: int, size: int, times: int = 1) -> int:
    """How many of up to `jobs` threads so many products are worth, where two are worth it from times * ENOUGH on."""
    return max(1, min(jobs, 2 * size // (times * ENOUGH)))


@cache
def _threads(jobs: int) -> ThreadPoolExecutor:
    """Threads that wait for the next product: starting them takes as long as a small one."""
    return ThreadPoolExecutor(jobs, thread_name_prefix="refimpl-share")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # a child has no threads but its own


def share(work: Callable[[slice], None], count: int, jobs: int) -> None:
    """Do the work on so many rows or heads, in `jobs` equal parts side by side."""
    if jobs == 1 or count == 1:
        work(slice(0, count))
        return
    step = -(-count // jobs)
    parts = [slice(i, min(i + step, count)) for i in range(0, count, step)]
    waiting = [_threads(jobs).submit(work, part) for part in parts[1:]]
    try:
        work(parts[0])
    finally:
        wait(waiting)
    for future in waiting:
        future.result()
