"""Cut a failing trial down: fewer rows, fewer blocks, then as many zeros as the failure survives."""

from collections.abc import Callable

import numpy as np

from refimpl.crosscheck.native_trial import Result, Trial

TRIES = {"hang": 6, "crash": 40}  # a crash costs a new process, a hang the time limit
TRIES_OTHERWISE = 1500

Failure = tuple[Trial, Result]
Runner = Callable[[Trial], Result]


def cut(trial: Trial, result: Result, run: Runner) -> Failure:
    """The fewest rows and blocks found that still fail in the same way, and how they fail."""
    return _search(trial, result, run, _cut_blocks)


def blank(trial: Trial, result: Result, run: Runner) -> Failure:
    """The same blocks with as many zeros as the failure survives."""

    def blank_all(current: Callable[[], Failure], fails: Callable[[Trial], bool]) -> None:
        for name in trial.inputs:
            _blank(lambda: current()[0], name, fails)

    return _search(trial, result, run, blank_all)


def _search(
    trial: Trial,
    result: Result,
    run: Runner,
    search: Callable[[Callable[[], Failure], Callable[[Trial], bool]], None],
) -> Failure:
    """Let `search` propose trials; whichever fails as the first one did is the current one from then on."""
    left = TRIES.get(result.kind, TRIES_OTHERWISE)

    def fails(candidate: Trial) -> bool:
        nonlocal trial, result, left
        if left <= 0:
            return False
        left -= 1
        tried = run(candidate)
        if tried.kind != result.kind:
            return False
        trial, result = candidate, tried
        return True

    search(lambda: (trial, result), fails)
    return trial, result


def _cut_blocks(current: Callable[[], Failure], fails: Callable[[Trial], bool]) -> None:
    """To one row, to the first wrong block alone; or to halves, then one block less, while it fails."""
    trial, result = current()
    if trial.rows > 1:
        per_row = trial.blocks // trial.rows
        rows = {result.block // per_row, 0, trial.rows - 1}
        if not any(fails(trial.cut(row * per_row, (row + 1) * per_row)) for row in sorted(rows)):
            return
    trial, result = current()
    if trial.blocks > 1 and not result.died and fails(trial.cut(result.block, result.block + 1)):
        return
    for drop in (lambda n: n // 2, lambda n: 1):
        while (n := current()[0].blocks) > 1:
            trial, keep = current()[0], n - drop(n)
            if not (fails(trial.cut(0, keep)) or fails(trial.cut(n - keep, n))):
                break


def _blank(current: Callable[[], Trial], name: str, fails: Callable[[Trial], bool]) -> None:
    """Set parts of an input to zero (an imatrix to one), from halves down to single numbers, while it fails."""
    neutral = 1 if name == "imatrix" else 0
    size = current().inputs[name].size
    chunk = size
    while chunk >= 1:
        for start in range(0, size, chunk):
            trial = current()
            array = trial.inputs[name].copy()
            part = array.reshape(-1)[start : start + chunk]
            if (part == neutral).all():
                continue
            part[...] = neutral
            fails(Trial(trial.case, {**trial.inputs, name: array}, trial.rows, trial.shifted))
        chunk = chunk // 2 if chunk > 1 else 0


def describe(trial: Trial) -> str:
    """How small the trial is: blocks, and numbers that are not zero."""
    busy = sum(int(np.count_nonzero(a)) for name, a in trial.inputs.items() if name != "imatrix")
    blocks = "1 block" if trial.blocks == 1 else f"{trial.blocks:,} blocks"
    return f"{blocks}, {busy:,} values other than zero"
