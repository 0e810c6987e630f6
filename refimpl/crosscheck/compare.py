"""Compare two traces: which operation of B is wrong first, and how what it did wrong grows.

With the model every operation of B is evaluated again in float64 on the inputs that B itself recorded, and must lie
within its own bound (bounds.py): what came in wrong is not held against it. So the first operation out of its bound is
where the error was made, and the distance between A and B below it is amplification. Selections (which keys a query
looks at, which experts a token takes) are judged as such: one that B's own scores do not explain is wrong, one that
differs from A's but is right by B's own scores is a flip, and nobody's fault. Without the model only distances are
known.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.crosscheck import operations
from refimpl.crosscheck.operations import ATTENTION, DENSE, HEAD, LAST, SPARSE, Operation
from refimpl.crosscheck.printed import compare_values
from refimpl.crosscheck.scene import Scene
from refimpl.crosscheck.trace import Trace
from refimpl.errors import Usage
from refimpl.model.glm import Glm

Array = NDArray[Any]

SELECTIONS = ("top_k", "ffn_moe_topk")
INPUTS = ("inp_embd", "inp_hidden")


@dataclass
class Row:
    """One activation.

    deviation : largest |A - B| as a share of A's largest value; None where A lacks it
    ratio     : largest distance of B from float64 as a share of its bound; None where it cannot be judged
    at        : index of that element
    flips     : rows of a selection in which A and B chose differently
    wrong     : rows of a selection that B's own scores do not explain
    printed   : of a log, how many values of A were compared, and how many there are
    verdict   : "same" bits (of a log: nothing that it prints speaks against it),
                "fine" within its bound, "flip", "wrong", "differs" (from A, not judged), "new" (not in A)
    """

    name: str
    layer: int | None
    verdict: str
    deviation: float | None = None
    ratio: float | None = None
    at: list[int] | None = None
    flips: int | None = None
    wrong: int | None = None
    printed: tuple[int, int] | None = None

    @property
    def key(self) -> str:
        """The name with its layer."""
        return self.name if self.layer is None else f"{self.name}-{self.layer}"


@dataclass
class Comparison:
    """All rows in the graph's order."""

    a: str
    b: str
    judged: bool
    rows: list[Row]
    lacking: list[str] = field(default_factory=list)  # what A has and a log B has not

    @property
    def first(self) -> Row | None:
        """The first activation that is wrong; without the model the first that differs."""
        bad = ("wrong",) if self.judged else ("wrong", "differs")
        return next((row for row in self.rows if row.verdict in bad), None)

    @property
    def passed(self) -> bool:
        """Nothing is wrong; without the model, nothing differs."""
        return self.first is None

    def to_json(self) -> dict[str, Any]:
        """One document; numbers that are not finite become strings."""
        rows = [asdict(row) for row in self.rows]
        for row in rows:
            for key in ("deviation", "ratio"):
                if row[key] is not None and not np.isfinite(row[key]):
                    row[key] = str(row[key])
        first = None if self.first is None else self.first.key
        return {
            "a": self.a,
            "b": self.b,
            "judged": self.judged,
            "passed": self.passed,
            "first": first,
            "lacking": self.lacking,
            "rows": rows,
        }


def compare(a: Trace, b: Trace, model: Glm | None = None) -> Comparison:
    """Walk the graph in order. Activations that B lacks are not compared.

    Raises: Usage where a log is A, or is to be judged: it does not hold what operations take.
    """
    if a.printed or (b.printed and model is not None):
        raise Usage(
            f"{a.path if a.printed else b.path} is a log, which prints a few values of each activation: it can be B, "
            "compared with a whole trace A, and without --model"
        )
    if b.printed:
        lacking = [name for name in a.values if name not in b.printed]
        return Comparison(a.path, b.path, False, _compare_printed(a, b), lacking)
    rows = [_compare_input(a, b, name, model) for name in INPUTS if name in b.values]
    layers = sorted({int(n.rpartition("-")[2]) for n in b.values if n.rpartition("-")[2].isdigit()})
    for layer in layers:
        rows += _compare_layer(a, b, layer, model)
    if layers:
        head = _scene(b, None, _stream(b, layers[-1] + 1), model)
        rows += [_judge(a, b, op, None, head) for op in HEAD if op.name in b.values]
    return Comparison(a.path, b.path, model is not None, rows)


def _compare_printed(a: Trace, b: Trace) -> list[Row]:
    """What a log shows, in A's order; then what A lacks."""
    rows = []
    for key in (*(n for n in a.values if n in b.printed), *(n for n in b.printed if n not in a.values)):
        base, dash, number = key.rpartition("-")
        row = Row(base if dash else key, int(number) if dash else None, "new")
        if key in a.values:
            row.verdict, row.deviation, count = compare_values(row.name, a.values[key], b.printed[key])
            row.printed = count, a.values[key].size
        rows.append(row)
    return rows


def _stream(b: Trace, layer: int) -> Array | None:
    """What goes into a layer, as B recorded it."""
    found = b.values.get(f"l_out-{layer - 1}")
    if found is None and not any(n.endswith(f"-{layer - 1}") for n in b.values):
        found = b.values.get("inp_hidden", b.values.get("inp_embd"))
    return found


def _scene(b: Trace, layer: int | None, stream: Array | None, model: Glm | None) -> Scene | None:
    if model is None:
        return None
    end = "" if layer is None else f"-{layer}"
    own = {n.removesuffix(end): v for n, v in b.values.items() if (n.endswith(end) if end else "-" not in n)}
    values = {n: v if v.dtype == np.bool_ else v.astype(np.float64) for n, v in own.items()}
    if stream is not None:
        values["<"] = stream.astype(np.float64)
    return Scene(
        values, model.layer[layer] if layer is not None else model.top, model.top, model.hp, model.conv
    )


def _compare_input(a: Trace, b: Trace, name: str, model: Glm | None) -> Row:
    """Embeddings are rows of a matrix: B's are right to the bit, where the tokens are known."""
    tokens = b.metadata.get("tokens")
    row = Row(name, None, *_distance(a.values.get(name), b.values[name]))
    if model is not None and name == "inp_embd" and tokens:
        want = model.embed([int(t) for t in tokens.split(",")])
        same = want.shape == b.values[name].shape and np.array_equal(want, b.values[name].astype(want.dtype))
        row.ratio, row.verdict = (0.0, row.verdict) if same else (np.inf, "wrong")
    return row


def _compare_layer(a: Trace, b: Trace, layer: int, model: Glm | None) -> list[Row]:
    scene = _scene(b, layer, _stream(b, layer), model)
    names = {n for n in b.values if n.endswith(f"-{layer}")}
    sparse = f"ffn_moe_logits-{layer}" in names or f"ffn_moe_topk-{layer}" in names
    rows: list[Row] = []
    for op in (*ATTENTION, *(SPARSE if sparse else DENSE), *LAST):
        selection = {"q_nope_absorbed": "top_k", "ffn_moe_weights_scaled": "ffn_moe_topk"}.get(op.name)
        if op is not _maker(op.name, scene, sparse):
            continue
        if selection and f"{selection}-{layer}" in names:
            rows.append(_compare_selection(a, b, selection, layer, scene))
        if f"{op.name}-{layer}" in names:
            rows.append(_judge(a, b, op, layer, scene))
    return rows


def _maker(name: str, scene: Scene | None, sparse: bool) -> Operation:
    """The operation that makes an activation from what was recorded; of several the first, or just the first."""
    makers = [op for op in (*ATTENTION, *(SPARSE if sparse else DENSE), *LAST) if op.name == name]
    ready = [op for op in makers if scene is not None and all(need in scene.values for need in op.needs)]
    found: Operation = (ready or makers)[0]
    return found


def _distance(a: Array | None, b: Array) -> tuple[str, float | None]:
    """Verdict and deviation from A alone."""
    if a is None:
        return "new", None
    if a.size != b.size:
        return "differs", float("inf")
    a, b = a.reshape(b.shape).astype(np.float64), b.astype(np.float64)
    if np.array_equal(a, b, equal_nan=True):
        return "same", 0.0
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)):
        return "differs", float("inf")
    a, b = np.where(finite, a, 0), np.where(finite, b, 0)
    return "differs", float(np.abs(a - b).max(initial=0) / max(np.abs(a).max(initial=0), 1e-300))


def _by_expert(trace: Trace, key: str) -> Any:
    """An activation; experts' weights by the experts' numbers, for engines list the chosen in different orders."""
    value, chosen = trace.values.get(key), trace.values.get(key.replace("_weights_scaled", "_topk"))
    if value is None or chosen is None or "_weights_scaled" not in key:
        return value
    return np.take_along_axis(value, np.argsort(chosen, axis=1, kind="stable"), 1)


def _judge(a: Trace, b: Trace, op: Operation, layer: int | None, scene: Scene | None) -> Row:
    key = op.name if layer is None else f"{op.name}-{layer}"
    row = Row(op.name, layer, *_distance(_by_expert(a, key), _by_expert(b, key)))
    if scene is None or not all(need in scene.values for need in op.needs):
        return row
    with np.errstate(all="ignore"):
        want, bound = op.judge(scene)
    got = scene[op.name]
    if got.size != want.size:
        row.ratio, row.verdict = np.inf, "wrong"
        return row
    got = got.reshape(want.shape)
    with np.errstate(all="ignore"):
        off = np.where(got == want, 0.0, np.abs(got - want))
        share = np.where(off == 0, 0.0, off / bound)
    share = np.where(np.isnan(share), np.inf, share)
    worst = int(share.argmax())
    row.ratio = float(share.reshape(-1)[worst])
    row.at = [int(i) for i in np.unravel_index(worst, share.shape)]
    if row.ratio > 1:
        row.verdict = "wrong"
    elif row.verdict != "same":
        row.verdict = "fine"
    return row


def _compare_selection(a: Trace, b: Trace, name: str, layer: int, scene: Scene | None) -> Row:
    """Flips against A, and rows that B's own scores do not explain."""
    key = f"{name}-{layer}"
    mine, theirs = b.values[key], a.values.get(key)
    row = Row(name, layer, "new")
    width = (
        mine.shape[1] if name == "top_k" else int(max(mine.max(), 0 if theirs is None else theirs.max())) + 1
    )
    chosen = _as_mask(mine, name, width)
    if theirs is not None and theirs.shape == mine.shape:
        row.flips = int((chosen != _as_mask(theirs, name, width)).any(axis=1).sum())
        row.verdict = "flip" if row.flips else "same"
    elif theirs is not None:
        row.verdict = "differs"
    if scene is not None:
        width = width if name == "top_k" else max(width, scene.hp.n_routed_experts)
        row.wrong = _unexplained(scene, name, _as_mask(mine, name, width))
        if row.wrong:
            row.verdict = "wrong"
    elif row.verdict == "flip":
        row.verdict = "differs"
    return row


def _as_mask(chosen: Array, name: str, width: int) -> Array:
    if name == "top_k":
        return chosen.astype(np.bool_)
    mask = np.zeros((len(chosen), width), np.bool_)
    np.put_along_axis(mask, chosen.astype(np.int64), True, axis=1)
    return mask


def _unexplained(scene: Scene, name: str, chosen: Array) -> int | None:
    """Rows in which something chosen is beaten, beyond what rounding explains, by something that is not.

    A query must look at min(index_topk, keys so far) keys, none of them later, whatever the scores; which ones is
    judged by the scores that B recorded, or else by those that follow from its queries and keys, as far as rounding
    leaves no doubt; which experts, where B recorded probabilities or logits. None where nothing can be judged.
    """
    hp, slack, off = scene.hp, np.zeros(len(chosen)), np.zeros(1)
    if name == "top_k":
        allowed = np.tri(len(chosen), dtype=np.bool_)
        wanted = allowed.sum(axis=1) if scene.conv.dense else np.minimum(allowed.sum(axis=1), hp.index_topk)
        if "indexer_score" in scene.values:
            scores = scene["indexer_score"]  # B chose by what it recorded
        else:
            scores, off = operations.replay_scores(scene) or (np.where(chosen, 1.0, 0.0), off)
    elif {"ffn_moe_probs", "ffn_moe_logits"} & scene.values.keys() and hp.n_group == 1:
        allowed, wanted = np.ones_like(chosen), np.full(len(chosen), hp.num_experts_per_tok)
        scores, off = operations.probabilities(scene)
        scores = scores + scene.w.vector("exp_probs_b").astype(np.float64)
        slack = 2 * 2.0**-24 * np.abs(scores).max(axis=1)  # the sum is rounded, on both sides
    else:
        return None
    worst_in = np.where(chosen, scores + off, np.inf).min(axis=1)
    best_out = np.where(~chosen & allowed, scores - off, -np.inf).max(axis=1)
    odd = (chosen.sum(axis=1) != wanted) | (chosen & ~allowed).any(axis=1)
    return int((odd | (best_out > worst_in + slack)).sum())
