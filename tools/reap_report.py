"""Tables and plots of the pruning study, from its results; and the study's section in the README.

python -m tools.reap_report           # anew from docs/reap-study/results.json
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOMAINS = ("text", "code")
NAMES = {
    "reap": "REAP", "ean_sum": "EAN sum", "frequency": "frequency", "random": "random", "worst-first": "worst first",
    "hc_smoe": "merged, HC-SMoE", "m_smoe": "merged, M-SMoE", "parent": "parent",
}  # fmt: skip
COLOURS = {"reap": "C0", "ean_sum": "C2", "frequency": "C1", "random": "C7", "worst-first": "C3"}
START, END = "<!-- reap-study -->", "<!-- /reap-study -->"


def write(document: dict[str, Any], folder: Path, readme: Path) -> None:
    """Write the plots into a folder and the tables into the README, between its two marks."""
    plot_methods(document, folder / "methods.png")
    plot_calibration(document, folder / "calibration.png")
    plot_loops(document, folder / "loops.png")
    text = readme.read_text(encoding="utf-8")
    section = f"{START}\n{tables(document)}\n{END}"
    if START not in text:
        raise ValueError(f"{readme} has no {START}")
    readme.write_text(re.sub(f"{START}.*?{END}", lambda _: section, text, flags=re.DOTALL), encoding="utf-8")


def pick(document: dict[str, Any], method: str, calibration: str | None = None) -> list[dict[str, Any]]:
    """The rows of a method, by ratio; of random cuts the mean of all."""
    rows = [r for r in document["rows"] if r["method"] == method]
    if method != "random":
        return [r for r in rows if r["calibration"] == (calibration or "both")]
    found = []
    for ratio in sorted({r["ratio"] for r in rows}):
        same = [r for r in rows if r["ratio"] == ratio]
        mean: dict[str, Any] = {"ratio": ratio}
        for d in DOMAINS:
            mean[d] = {
                "perplexity": sum(r[d]["perplexity"] for r in same) / len(same),
                "kl": {"mean": sum(r[d]["kl"]["mean"] for r in same) / len(same)},
                "top1": {"share": sum(r[d]["top1"]["share"] for r in same) / len(same)},
            }
        found.append(mean)
    return found


def tables(document: dict[str, Any]) -> str:
    """Markdown: distance from the parent by method and ratio, and the share of continuations that loop."""
    ratios = sorted({r["ratio"] for r in document["rows"]})
    parent = document["parent"]
    lines = [
        "KL from the parent, nats per token, text · code, calibrated on both (random: mean of three cuts):",
        "",
        "| pruned | " + " | ".join(f"{r:.1%}" for r in ratios) + " |",
        "|---|" + "--:|" * len(ratios),
    ]
    for method in ("reap", "ean_sum", "frequency", "random", "worst-first"):
        cells = {
            r["ratio"]: " · ".join(f"{r[d]['kl']['mean']:.3f}" for d in DOMAINS)
            for r in pick(document, method)
        }
        lines.append(f"| {NAMES[method]} | " + " | ".join(cells[r] for r in ratios) + " |")
    for method in document["merged"]:
        row = pick(document, method)[0]
        cell = " · ".join(f"{row[d]['kl']['mean']:.3f}" for d in DOMAINS)
        lines.append(f"| {NAMES[method]} |" + " |" * (len(ratios) - 1) + f" {cell} |")
    own = ", ".join(f"{parent[d]['perplexity']:.2f} ± {parent[d]['error']:.2f} on {d}" for d in DOMAINS)
    lines += ["", f"Perplexity of the parent: {own}; of REAP's children (text · code):", ""]
    lines += [
        "| calibrated on | " + " | ".join(f"{r:.1%}" for r in ratios) + " |",
        "|---|" + "--:|" * len(ratios),
    ]
    for calibration in ("both", "text", "code"):
        cells = {
            r["ratio"]: " · ".join(f"{r[d]['perplexity']:.2f}" for d in DOMAINS)
            for r in pick(document, "reap", calibration)
        }
        lines.append(f"| {calibration} | " + " | ".join(cells[r] for r in ratios) + " |")
    size = document["size"]
    lines += [
        "",
        f"Sampled continuations of {size['tokens']} tokens that loop (rule version 1), with 95 % intervals:",
        "",
        "| model | temperature | text | code |",
        "|---|--:|--:|--:|",
    ]
    for row in document["loops"]:
        cells = [_share(row[d]) for d in DOMAINS]
        lines.append(f"| {_name(row)} | {row['temperature']:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _name(row: dict[str, Any]) -> str:
    return NAMES[row["method"]] + (f", {row['ratio']:.1%}" if row["ratio"] else "")


def _share(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['loops']} of {found['of']} ({low:.0%} to {high:.0%})"


def _figure(columns: int) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, columns, figsize=(4.6 * columns, 3.6), layout="constrained", sharey=True
    )
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110, metadata={"Software": None})


def plot_methods(document: dict[str, Any], path: Path) -> None:
    """KL against the ratio, a line per method, a panel per domain."""
    figure, axes = _figure(2)
    for axis, d in zip(axes, DOMAINS, strict=True):
        for method, colour in COLOURS.items():
            rows = pick(document, method)
            x, y = [100 * r["ratio"] for r in rows], [r[d]["kl"]["mean"] for r in rows]
            error = [r[d]["kl"].get("error", 0) for r in rows]
            axis.errorbar(
                [0, *x], [0, *y], [0, *error], color=colour, label=NAMES[method], marker="o", ms=3, lw=1.3
            )
        for method, marker in zip(document["merged"], "s^", strict=True):
            row = pick(document, method)[0]
            axis.plot(100 * row["ratio"], row[d]["kl"]["mean"], marker, color="C4", label=NAMES[method])
        axis.set(title=f"measured on {d}", xlabel="experts pruned, %")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("KL from the parent, nats per token")
    axes[0].legend(fontsize=8)
    _save(figure, path)


def plot_calibration(document: dict[str, Any], path: Path) -> None:
    """REAP by what it was calibrated on."""
    figure, axes = _figure(2)
    for axis, d in zip(axes, DOMAINS, strict=True):
        for calibration, style in (("both", "-"), ("text", "--"), ("code", ":")):
            rows = pick(document, "reap", calibration)
            x, y = [100 * r["ratio"] for r in rows], [r[d]["kl"]["mean"] for r in rows]
            axis.plot([0, *x], [0, *y], style, marker="o", ms=3, label=f"calibrated on {calibration}")
        axis.set(title=f"REAP, measured on {d}", xlabel="experts pruned, %")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("KL from the parent, nats per token")
    axes[0].legend(fontsize=8)
    _save(figure, path)


def plot_loops(document: dict[str, Any], path: Path) -> None:
    """Shares of looping continuations with their intervals."""
    figure, axes = _figure(2)
    for axis, temperature in zip(axes, (0.2, 0.8), strict=True):
        rows = [r for r in document["loops"] if r["temperature"] == temperature]
        for shift, d in ((-0.12, "text"), (0.12, "code")):
            shares = [100 * r[d]["loops"] / r[d]["of"] for r in rows]
            bars = [
                [s - 100 * r[d]["interval"][0] for s, r in zip(shares, rows, strict=True)],
                [100 * r[d]["interval"][1] - s for s, r in zip(shares, rows, strict=True)],
            ]
            places = [i + shift for i in range(len(rows))]
            axis.errorbar(
                places,
                shares,
                [[max(0, b) for b in side] for side in bars],
                fmt="o",
                ms=4,
                capsize=2,
                label=d,
            )
        axis.set_xticks(range(len(rows)), [_name(r) for r in rows], rotation=60, ha="right", fontsize=8)
        axis.set(title=f"temperature {temperature:g}", ylim=(-2, 102))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("continuations that loop, %")
    axes[0].legend(fontsize=8)
    _save(figure, path)


if __name__ == "__main__":
    place = ROOT / "docs" / "reap-study"
    write(json.loads((place / "results.json").read_text()), place, ROOT / "README.md")
