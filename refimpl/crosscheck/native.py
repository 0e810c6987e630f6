"""Judge a ggml shared library: every function that it exports and refimpl defines, on ordinary and edge inputs.

The library runs in a process of its own (native_library); what fails is cut down to the smallest input
(native_minimise), named where it is a classic mistake (native_mistakes) and saved as a program that shows it
without refimpl (native_reproducer).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refimpl import dots, quants
from refimpl.arith.builds import list_builds
from refimpl.crosscheck import native_activations, native_codecs, native_dots
from refimpl.crosscheck.native_inputs import list_blocks, list_importances, list_weights
from refimpl.crosscheck.native_library import Library, find_libraries
from refimpl.crosscheck.native_minimise import blank, cut, describe
from refimpl.crosscheck.native_mistakes import find_mistake
from refimpl.crosscheck.native_reproducer import save
from refimpl.crosscheck.native_symbols import Symbol, list_symbols
from refimpl.crosscheck.native_trial import Result, Trial
from refimpl.errors import BadFile, Unsupported
from refimpl.quants.formats import CODEBOOKS

VERDICTS = ("same bits", "inside the bound", "wrong", "crashed", "absent")
BLOCKS = 100_000  # of the largest trial
SEARCHED_BLOCKS = 1000  # of the largest trial of an encoder that searches a codebook: it takes ggml a second
BYTES_PER_BLOCK = 2048  # of the arena, inputs and outputs of the widest format
WEIGHED_CASES = ("ordinary weights", "groups of zeros", "scales far apart", "outliers")


@dataclass(frozen=True)
class Judgement:
    """What one function is worth."""

    symbol: str
    kind: str
    format: str
    verdict: str
    against: (
        str | None
    )  # the build, encoder or order whose bits it has; of a wrong one, the one it was held against
    cases: int = 0
    weights: int = 0
    ratio: float | None = None  # dots: the largest error as a share of the proven bound
    problem: str | None = None
    case: str | None = None  # the trial that failed
    mistake: str | None = None  # the classic one that explains it
    smallest: str | None = None
    reproducer: str | None = None


@dataclass(frozen=True)
class Report:
    """All judgements of a library."""

    library: str
    judgements: list[Judgement]

    @property
    def passed(self) -> bool:
        """Nothing is wrong and nothing crashed."""
        return not any(j.verdict in ("wrong", "crashed") for j in self.judgements)

    @property
    def counts(self) -> dict[str, int]:
        """How many functions have each verdict."""
        found = Counter(j.verdict for j in self.judgements)
        return {verdict: found[verdict] for verdict in VERDICTS}

    def to_json(self) -> dict[str, Any]:
        """The document of --json."""
        symbols = [asdict(j) for j in self.judgements]
        return {"library": self.library, "passed": self.passed, "counts": self.counts, "symbols": symbols}


def judge(
    target: str,
    reproducers: Path,
    blocks: int = BLOCKS,
    limit: float = 60.0,
    only: str = "",
    tell: Callable[[Judgement, int, int], None] = lambda *_: None,
) -> Report:
    """Judge a shared library, or the one inside an installed package (which is not imported).

    reproducers : folder for the programs that show what is wrong; made when there is something to save
    blocks      : size of the largest trial
    limit       : seconds that one call may take
    only        : judge only functions whose name contains this
    tell        : called with each judgement, its number and how many there are

    Raises: Usage for a package without a library; BadFile for a file that cannot be loaded; Unsupported for
    a library that exports nothing of ggml's.
    """
    symbols = [s for s in list_symbols() if only in s.name]
    memory = max(blocks, 1024) * BYTES_PER_BLOCK + (1 << 24)
    path, present = _choose(find_libraries(target), [s.name for s in symbols], memory, limit)
    judgements = []
    with Library(path, memory, limit) as library:
        for i, symbol in enumerate(symbols):
            if symbol.name in present:
                judgement = _judge_symbol(library, symbol, blocks, reproducers)
            else:
                judgement = Judgement(symbol.name, symbol.kind, symbol.format.name, "absent", None)
            judgements.append(judgement)
            tell(judgement, i + 1, len(symbols))
    return Report(str(path), judgements)


def _choose(paths: list[Path], names: list[str], memory: int, limit: float) -> tuple[Path, set[str]]:
    """The library that exports most of the names, and which of them. One that cannot be loaded is passed by,
    unless it is the only one."""
    best: tuple[Path, set[str]] | None = None
    for path in paths:
        try:
            with Library(path, memory, limit) as library:
                found = library.find(names)
        except BadFile:
            if len(paths) == 1:
                raise
            continue
        if best is None or len(found) > len(best[1]):
            best = path, found
    if best is None or not best[1]:
        raise Unsupported(f"{paths[0]} exports no function of ggml's that refimpl can judge")
    return best


def run(library: Library, symbol: Symbol, trial: Trial, text: str | None) -> Result:
    """Try a function. text: the build, encoder or order whose bits it must have; None: the bound, or the one answer."""
    match symbol.kind:
        case "decode":
            return native_codecs.decode(library, symbol, trial)
        case "encode" | "row":
            return native_codecs.encode(library, symbol, trial, text or quants.BUILDS[0])
        case "activation":
            return native_activations.encode(library, symbol, trial, text)
        case _:
            return native_dots.multiply(library, symbol, trial, text)


def list_texts(symbol: Symbol) -> tuple[str | None, ...]:
    """The builds, encoders or orders that a function is held against one after the other; None: as in run."""
    match symbol.kind:
        case "decode" | "product":
            return (None,)
        case "encode" | "row":
            builds = list_builds(symbol.format.name)
            return builds[:1] if native_codecs.is_unsearched(symbol) else builds
        case "activation":
            return (*native_activations.ENCODERS, None)
        case _:
            known = symbol.format.name in dots.PARTNERS
            return (*(dots.ORDERS if known else ()), None)


def list_trials(symbol: Symbol, blocks: int) -> Iterator[Trial]:
    """Everything that a function is tried on, small trials first."""
    fmt = symbol.format
    if fmt in CODEBOOKS and symbol.kind in ("encode", "row"):
        blocks = min(blocks, SEARCHED_BLOCKS)
    if symbol.kind == "decode":
        for case, raw, shifted in list_blocks(fmt, blocks):
            yield Trial(case, {"blocks": raw}, 1, shifted)
        return
    if symbol.kind in ("dot", "product"):
        yield from native_dots.list_products(symbol, blocks)
        return
    for case, x, shifted in list_weights(fmt, blocks):
        rows = len(x) if symbol.kind == "encode" else 1
        plain = Trial(case, {"x": x.reshape(-1, fmt.weights)}, rows, shifted)
        if symbol.kind == "activation" or native_codecs.is_defined(fmt, plain):
            yield plain
            importances = list(list_importances(fmt, x.shape[1])) if case in WEIGHED_CASES else []
        else:
            importances = list(list_importances(fmt, x.shape[1]))[: None if case in WEIGHED_CASES else 1]
        for importance, row in importances if symbol.kind == "encode" else []:
            inputs = {**plain.inputs, "imatrix": row.reshape(-1, fmt.weights)}
            weighed = Trial(f"{case}, {importance}", inputs, rows, shifted)
            if native_codecs.is_defined(fmt, weighed):
                yield weighed


def _judge_symbol(library: Library, symbol: Symbol, blocks: int, reproducers: Path) -> Judgement:
    failures = []
    for text in list_texts(symbol):
        weights, ratio = 0, 0.0
        for cases, trial in enumerate(list_trials(symbol, blocks), 1):
            weights += trial.blocks * symbol.format.weights
            result = run(library, symbol, trial, text)
            if result.problem is not None:
                failures.append((text, trial, result, cases, weights))
                break
            ratio = max(ratio, result.ratio or 0.0)
        else:
            bound = text is None and symbol.kind != "decode"
            verdict, share = ("inside the bound", ratio) if bound else ("same bits", None)
            return Judgement(
                symbol.name, symbol.kind, symbol.format.name, verdict, text, cases, weights, share
            )
        if result.kind not in ("values", "signs"):
            break  # a crash, a hang, a spill: no text would forgive it
    encodes = symbol.kind in ("encode", "row")
    text, trial, result, cases, weights = failures[0 if encodes else -1]
    return _condemn(library, symbol, trial, result, text, reproducers, cases, weights)


def _condemn(
    library: Library,
    symbol: Symbol,
    trial: Trial,
    result: Result,
    text: str | None,
    reproducers: Path,
    cases: int,
    weights: int,
) -> Judgement:
    case, problem = trial.case, result.problem

    def again(candidate: Trial) -> Result:
        return run(library, symbol, candidate, text)

    trial, result = cut(trial, result, again)
    mistake = _name_mistake(symbol, trial, result)  # zeros would let several mistakes give the same
    trial, result = blank(trial, result, again)
    return Judgement(
        symbol.name,
        symbol.kind,
        symbol.format.name,
        "crashed" if result.died else "wrong",
        text,
        cases,
        weights,
        result.ratio,
        problem,
        case,
        mistake,
        describe(trial),
        str(save(reproducers, library.path, symbol, trial, result)),
    )


def _name_mistake(symbol: Symbol, trial: Trial, result: Result) -> str | None:
    """The classic mistake that gives exactly this result."""
    got, want = result.got, result.want
    if result.kind not in ("values", "signs") or got is None or want is None:
        return None
    fmt = symbol.format
    if symbol.kind in ("dot", "product"):
        return native_dots.name_mistake(symbol, trial, result)
    if (got.view(np.uint8).reshape(len(got), -1)[-1] == 0xAA).all():
        return "the last block is skipped"
    if symbol.kind == "activation":
        return None
    if symbol.kind == "decode":
        return find_mistake(
            fmt, trial.inputs["blocks"], lambda v: _same(v.astype(np.float32), got)
        ) or _six_bit_pattern(got, want, symbol)
    decoded = quants.dequantize(got, fmt)
    return find_mistake(fmt, want, lambda v: _same(v.astype(np.float32), decoded))


def _six_bit_pattern(got: Any, want: Any, symbol: Symbol) -> str | None:
    """Sub-blocks 0 to 3 right and 4 to 7 wrong, where those have their 6-bit scales elsewhere."""
    names = symbol.format.block.names or ()
    if "dmin" not in names or symbol.format.block["scales"].shape != (12,):
        return None
    half = symbol.format.weights // 2
    if _same(got[:, :half], want[:, :half]):
        return "6-bit scales of sub-blocks 4 to 7 are unpacked wrongly"
    return None


def _same(a: Any, b: Any) -> bool:
    a, b = np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)
    return bool(((a == b) | (np.isnan(a) & np.isnan(b))).all())
