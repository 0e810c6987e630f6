"""A comparison of traces on a terminal: what is wrong first, then how it grows."""

from typing import TYPE_CHECKING

from refimpl.crosscheck.compare import Comparison, Row
from refimpl.report.terminal import clean

if TYPE_CHECKING:
    from rich.console import Console

_MEANING = {
    "indexer_k": "the indexer's keys: rotary pairs must be neighbours (2i, 2i+1), on the first 64 channels",
    "indexer_q": "the indexer's queries: rotary pairs must be neighbours (2i, 2i+1), on the first 64 channels",
    "indexer_k_norm": "a LayerNorm with weight and bias; engines differ in its eps",
    "indexer_score": "sum over heads of weight * relu(q . k), -inf for keys after the query",
    "top_k": "the selection does not follow from the scores: count, causality, order, or the rotary pairs",
    "qr": "an RMSNorm; engines differ in its eps", "kv_cmpr": "an RMSNorm; engines differ in its eps",
    "kqv": "softmax and weighted sum over the latents", "kqv_out": "v_b on every head's mixed latent",
    "q_nope_absorbed": "k_b on every head's query",
    "ffn_moe_topk": "the choice does not follow from sigmoid(logits) + bias",
    "ffn_moe_weights_scaled": "sigmoid without the bias, normalised over the chosen, times the scaling factor",
    "ffn_moe_out": "the sum of weighted expert outputs, after down_proj", "ffn_out": "routed and shared experts",
}  # fmt: skip


def print_comparison(found: Comparison, console: "Console", all_rows: bool = False) -> None:
    """The verdict on top, then one line a layer, or one an activation."""
    console.print(f"A {clean(found.a)}\nB {clean(found.b)}")
    first = found.first
    if first is not None:
        console.print(
            f"first {'wrong' if first.verdict == 'wrong' else 'different'}: {first.key}   {_figures(first)}"
        )
        if first.name in _MEANING:
            console.print(f"  {_MEANING[first.name]}")
        later = [row for row in found.rows if row.verdict == "wrong" and row is not first]
        if later:
            console.print(f"  also out of their own bound: {', '.join(row.key for row in later[:8])}")
    console.print(
        f"\n{'layer':>7} {'activations':>12} {'worst of its bound':>26} {'flips':>7} {'distance from A':>22}"
    )
    for layer in dict.fromkeys(row.layer for row in found.rows):
        _print_layer([row for row in found.rows if row.layer == layer], console)
    if all_rows:
        console.print()
        for row in found.rows:
            console.print(f"  {row.verdict:8} {row.key:28} {_figures(row)}")
    flips = sum(row.flips or 0 for row in found.rows)
    words = (
        "nothing is wrong"
        if found.passed and found.judged
        else "no difference"
        if found.passed
        else "DIVERGES"
    )
    shown = [row.printed for row in found.rows if row.printed is not None]
    if shown:
        some, every = (sum(counts) for counts in zip(*shown, strict=True))
        console.print(
            f"\nB is a log: it prints {some:,} of the {every:,} values of {len(shown)} activations, to 4 decimals, and "
            "their sums.\nThe others are checked by the sums alone, and no operation is replayed."
        )
        if found.lacking:
            console.print(f"Not in the log, and not checked: {', '.join(map(clean, found.lacking))}")
    if not found.judged:
        words += "   (without --model nothing is judged: these are distances)"
    console.print(
        f"\n{words}{f'; {flips} selections differ, as far as B shows rightly' if flips and found.passed else ''}"
    )


def _print_layer(rows: list[Row], console: "Console") -> None:
    judged = [row for row in rows if row.ratio is not None]
    worst = max(judged, key=lambda row: row.ratio or 0, default=None)
    share = "-" if worst is None else f"{worst.name} {worst.ratio:.3g}"
    known = [row for row in rows if row.deviation is not None]
    far = max(known, key=lambda row: row.deviation or 0, default=None)
    distance = "-" if far is None else f"{far.name} {far.deviation:.2e}"
    flips = sum(row.flips or 0 for row in rows)
    layer = "-" if rows[0].layer is None else str(rows[0].layer)
    console.print(f"{layer:>7} {len(rows):>12} {share:>26} {flips:>7} {distance:>22}")


def _figures(row: Row) -> str:
    parts = []
    if row.ratio is not None:
        parts.append(
            f"{row.ratio:.3g} of its bound at {row.at}" if row.at else f"{row.ratio:.3g} of its bound"
        )
    if row.wrong:
        parts.append(f"{row.wrong} rows unexplained")
    if row.flips:
        parts.append(f"{row.flips} rows flipped")
    if row.deviation is not None:
        parts.append(f"{row.deviation:.2e} from A")
    return ", ".join(parts)
