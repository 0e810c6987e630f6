"""Map work units over threads and hand the results back in order.

The kernels release the GIL, so threads are enough on one machine. Results come back in the units' order
whatever the number of threads, and at most a few units are in flight, so memory stays bounded.
"""

import atexit
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from importlib import import_module
from threading import Lock, Thread
from typing import TypeVar

import numpy as np

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


# Two threads are worth it for twice so many products of float32 in the caches, or of quantized weights that come from
# memory; below, the Python around them, which only one thread runs at a time, makes two the slower.
ENOUGH = 1 << 22


def threads_worth(jobs: int, size: int, times: int = 1) -> int:
    """How many of up to `jobs` threads so many products are worth, where two are worth it from times * ENOUGH on."""
    return max(1, min(jobs, 2 * size // (times * ENOUGH)))


AWAKE = 1 << 14  # pauses that a thread without work stays awake for: about half a millisecond
LINE = 8  # int64 numbers in a cache line: each thread's mark has its own


class Crew:
    """Threads that wait for the next product, at first awake: one that sleeps starts 80 us late (a virtual machine).

    What is said to them is said under the GIL. A mark that changes is waited for without it.
    """

    def __init__(self, size: int) -> None:
        self.wait = import_module("refimpl.arith.marks_simd").wait
        self.marks = np.zeros(LINE * (1 + size), np.int64)  # how many tasks there were; who is at work
        self.task: tuple[Callable[[slice], None], Iterator[slice]] | None = None
        self.errors: list[BaseException] = []
        self.taken = Lock()
        self.beds = [Lock() for _ in range(size)]
        self.asleep = [False] * size
        self.open = True
        self.threads = [Thread(target=self._serve, args=(i,), daemon=True) for i in range(size)]
        for thread in self.threads:
            thread.start()
        atexit.register(self.close)

    def _serve(self, me: int) -> None:
        seen, mine = 0, LINE * (1 + me)
        self.beds[me].acquire()
        while self.open:
            if not self.wait(self.marks, 0, seen, AWAKE) and self.marks[0] == seen:
                self.asleep[me] = True
                self.beds[me].acquire()
            seen, task = int(self.marks[0]), self.task
            if task is None:
                continue
            self.marks[mine] = 1  # before it takes a part: whoever ends the task waits for it
            try:
                for part in task[1]:
                    task[0](part)
            except BaseException as error:
                self.errors.append(error)
            del task
            self.marks[mine] = 0

    def _call(self) -> None:
        self.marks[0] += 1
        for i, bed in enumerate(self.beds):
            if self.asleep[i]:
                self.asleep[i] = False
                bed.release()

    def do(self, work: Callable[[slice], None], parts: list[slice]) -> None:
        """Do the work on each part; the caller takes parts as well. Raises what the work raised first."""
        left, self.errors = iter(parts), []
        self.task = work, left
        try:
            self._call()
            for part in left:
                work(part)
        finally:
            self.task = None
            for _ in left:  # after an error no one begins another part
                pass
            for mark in range(LINE, len(self.marks), LINE):
                while self.marks[mark] and not self.wait(self.marks, mark, 1, 4 * AWAKE):
                    time.sleep(1e-4)
        if self.errors:
            raise self.errors[0]

    def close(self) -> None:
        """End the threads: at exit none may be inside compiled code."""
        self.open = False
        self._call()
        for thread in self.threads:
            thread.join()


@cache
def _crew(size: int) -> Crew:
    return Crew(size)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_crew.cache_clear)  # a child has no threads but its own


def share(work: Callable[[slice], None], count: int, jobs: int) -> None:
    """Do the work on so many rows or heads, in `jobs` equal parts side by side."""
    if jobs == 1 or count == 1 or not (crew := _crew(jobs - 1)).taken.acquire(blocking=False):
        work(slice(0, count))  # alone, too, where the other threads have another product at hand
        return
    try:
        step = -(-count // jobs)
        crew.do(work, [slice(i, min(i + step, count)) for i in range(0, count, step)])
    finally:
        crew.taken.release()
