"""Pictures for what is looked at rather than read; needs the extra `plot`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from refimpl.errors import Usage

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from refimpl.crosscheck.compare import Comparison

WRONG, FINE, INK = "#c0392b", "#2c6fbb", "#333333"


def open_figure(path: Path, rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes, [rows][columns]. Raises Usage where the extra is missing or the path is no .png."""
    if path.suffix != ".png" or not path.parent.is_dir():
        raise Usage(f"{path}: plots are .png files in a folder that exists")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise Usage("plots need matplotlib: pip install 'refimpl[plot]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def plot_comparison(found: "Comparison", path: Path) -> None:
    """Above: each operation's share of its own bound. Below: the distance from A, which errors upstream feed too."""
    figure, axes = open_figure(path, 2, 1, 11, 6.5)
    for axis, field, title in (
        (
            axes[0][0],
            "ratio",
            "largest error of each operation, as a share of its own bound (over 1 is wrong)",
        ),
        (
            axes[1][0],
            "deviation",
            "largest distance of each activation from A, as a share of A's largest value (0 lies at the bottom)",
        ),
    ):
        places = [(i, getattr(row, field), row) for i, row in enumerate(found.rows)]
        shown = [(i, max(min(v, 1e9), 1e-9), row) for i, v, row in places if v is not None]
        colours = [WRONG if row.verdict == "wrong" else FINE for _, _, row in shown]
        axis.scatter([i for i, _, _ in shown], [v for _, v, _ in shown], c=colours, s=14)
        axis.set_yscale("log")
        axis.set_title(title, fontsize=10, loc="left", color=INK)
        axis.set_xlim(-1, len(found.rows))
        starts = {row.layer: i for i, row in reversed(list(enumerate(found.rows))) if row.layer is not None}
        for layer, i in sorted(starts.items()):
            axis.axvline(i - 0.5, color="#dddddd", zorder=0)
            axis.text(
                i, 1.01, f"layer {layer}", transform=axis.get_xaxis_transform(), fontsize=8, va="bottom"
            )
        axis.set_title(title, fontsize=10, loc="left", color=INK, pad=16)
        axis.set_xticks([])
    axes[0][0].axhline(1, color=WRONG, linewidth=1)
    first = found.first
    if first is not None:
        i = found.rows.index(first)
        for axis in (axes[0][0], axes[1][0]):
            axis.axvline(i, color=WRONG, linewidth=0.8, linestyle=":")
        axes[0][0].annotate(
            first.key, (i, 1), textcoords="offset points", xytext=(6, -14), fontsize=9, color=WRONG
        )
    figure.savefig(path, dpi=110)


def plot_trace(values: "dict[str, NDArray[Any]]", path: Path) -> None:
    """Left of each row what every query selected, right how often each expert was chosen."""
    import numpy as np

    layers = sorted({int(n.rpartition("-")[2]) for n in values if n.startswith(("top_k-", "ffn_moe_topk-"))})
    if not layers:
        raise Usage("no layer of this trace selects keys or experts")
    figure, axes = open_figure(path, len(layers), 2, 11, 3.2 * len(layers))
    for row, layer in zip(axes, layers, strict=True):
        mask, chosen = values.get(f"top_k-{layer}"), values.get(f"ffn_moe_topk-{layer}")
        if mask is not None:
            shown = mask.astype(float) + np.tri(*mask.shape)
            row[0].imshow(shown, cmap="Blues", aspect="auto", interpolation="nearest", vmin=0, vmax=2)
            row[0].set(xlabel="key", ylabel="query")
            row[0].set_title(
                f"layer {layer}: keys that each query looks at", fontsize=10, loc="left", color=INK
            )
        if chosen is not None:
            experts = values[f"ffn_moe_logits-{layer}"].shape[1]
            row[1].bar(np.arange(experts), np.bincount(chosen.reshape(-1), minlength=experts), color=FINE)
            row[1].axhline(chosen.size / experts, color=INK, linewidth=0.8, linestyle=":")
            row[1].set(xlabel="expert", ylabel="tokens")
            row[1].set_title(
                f"layer {layer}: tokens that each expert got", fontsize=10, loc="left", color=INK
            )
        else:
            row[1].axis("off")
    figure.savefig(path, dpi=110)
