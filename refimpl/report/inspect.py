"""The report of inspect on a terminal: headline, census, and one block each for what follows from it."""

from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from refimpl.files.names import Hparams
from refimpl.recipes import Mismatch
from refimpl.report.terminal import clean, count, gigabytes
from refimpl.verifier.census import Census, Class
from refimpl.verifier.findings import Finding
from refimpl.verifier.inspection import Guess, Inspection
from refimpl.verifier.labels import Claim

SHOWN = 8  # lines of one kind that are printed in full; --json has all
_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def print_inspection(found: Inspection, console: Console) -> None:
    """Print the whole report, fit for 80 columns."""
    console.print(_headline(found))
    console.print()
    console.print(Padding(_census(found.census), (0, 0, 0, 1), expand=False))
    console.print()
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for label, block in _blocks(found):
        table.add_row(label, block)
    console.print(Padding(table, (0, 0, 0, 1), expand=False))
    if found.raw is not None:
        _print_raw(found, console)


def _headline(found: Inspection) -> Text:
    c = found.census
    active = f", {count(c.active)} active" if c.active is not None else ""
    line = " · ".join(
        (
            gigabytes(found.size),
            f"{c.tensors:,} tensors",
            f"{count(c.weights)} weights{active}",
            f"{c.bits_per_weight:.2f} bits/weight",
        )
    )
    parts = [clean(found.model["architecture"] or "architecture unknown")]
    if found.header is not None:
        h = found.header
        parts += [f"GGUF v{h['version']}", f"{h['keys']:,} keys", f"data from byte {h['data_offset']:,}"]
        parts += [f"alignment {h['alignment']:,}"]
    if len(found.parts) > 1:
        parts.append(f"{len(found.parts):,} files")
    file = clean(found.path.rstrip("/").rsplit("/", 1)[-1])
    name = f"   {clean(found.model['name'])}" if found.model["name"] else ""
    return Text.assemble((file, "bold cyan"), name, "\n", line, "\n", (" · ".join(parts), "dim"))


def _census(c: Census) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name, right in (
        ("class", 0),
        ("tensors", 1),
        ("types", 0),
        ("weights", 1),
        ("bytes", 1),
        ("bits", 1),
    ):
        table.add_column(name, justify="right" if right else "left", no_wrap=name != "types")
    for one in c.classes:
        table.add_row(*_row(one, one.name), style="bold" if one.name == "routed" else "")
    table.add_section()
    whole = (f"{c.tensors:,}", "", count(c.weights), gigabytes(c.bytes), f"{c.bits_per_weight:.2f}")
    table.add_row("all", *whole, style="bold")
    return table


def _row(one: Class, name: str) -> tuple[str, ...]:
    types = " · ".join(f"{kind.upper()} {n:,}" for kind, n in one.types.most_common())
    sizes = (count(one.weights), gigabytes(one.bytes), f"{one.bits_per_weight:.2f}")
    return (name, f"{one.tensors:,}", types, *sizes)


def _blocks(found: Inspection) -> Iterator[tuple[str, RenderableType]]:
    if found.hparams is not None:
        yield "sizes", Group(*map(Text, _sizes(found.hparams)))
    elif found.unknown is not None:
        yield "sizes", Text(clean(found.unknown), "yellow")
    if found.hparams is not None:
        yield "parameters", Group(*_parameters(found.census))
    if found.guess is not None:
        yield "recipe", _recipe(found.guess, found.census.tensors)
    elif found.kind == "gguf" and found.hparams is not None:
        yield "recipe", Text("none: nothing in it is quantized")
    if found.census.claims:
        yield "labels", _labels(found.census.claims)
    rest = [f for f in found.findings if not f.code.startswith("label-")]
    yield "container", Group(*_container(rest, found.census.tensors))


def _sizes(hp: Hparams) -> list[str]:
    sparse = hp.num_hidden_layers - hp.first_k_dense_replace
    mtp = (
        f" and {hp.num_nextn_predict_layers} for multi-token prediction"
        if hp.num_nextn_predict_layers
        else ""
    )
    return [
        f"{hp.num_hidden_layers} layers, {hp.first_k_dense_replace} dense and {sparse} sparse{mtp}",
        f"hidden {hp.hidden_size:,} · vocabulary {hp.vocab_size:,} · context {hp.max_position_embeddings:,}",
        f"{hp.n_routed_experts} experts, {hp.num_experts_per_tok} per token, {hp.n_shared_experts} shared, "
        f"width {hp.moe_intermediate_size:,} · dense {hp.intermediate_size:,}",
        f"{hp.num_attention_heads} heads of {hp.qk_nope_head_dim} + {hp.qk_rope_head_dim} rotary, "
        f"values {hp.v_head_dim} · rank {hp.q_lora_rank:,}, latent {hp.kv_lora_rank:,}",
        f"indexer {hp.index_n_heads} heads of {hp.index_head_dim}, top {hp.index_topk:,} · "
        f"theta {hp.rope_theta:g} · eps {hp.rms_norm_eps:.3g}",
    ]


def _parameters(c: Census) -> Iterable[Text]:
    total, *totals = c.numbers.total.values()
    more = f" · {count(totals[0])} with an MTP layer" if totals else ""
    yield Text.assemble((f"{count(total)} in all", "bold"), more)
    if c.active is not None:
        head, *others = c.numbers.active.items()
        yield Text.assemble((f"{count(head[1])} active", "bold"), f" per token, {head[0]}")
        yield Text(" · ".join(f"{count(n)} {how}" for how, n in others), "dim")


def _recipe(guess: Guess, tensors: int) -> RenderableType:
    name, wrong = guess.recipe.name, len(guess.mismatches)
    if not wrong:
        return Text.assemble(
            (name, "green"), f": all {tensors:,} tensors as it says ({guess.recipe.version})"
        )
    if 4 * wrong > tensors:
        said = f"none that is known; closest {name}, where {wrong:,} of {tensors:,} tensors differ"
        return Text(said, "yellow")
    heading = Text.assemble(
        (name, "yellow"), f" but for {wrong:,} of {tensors:,} tensors", f", {_signed(guess.bytes_delta)}"
    )
    groups = _group(guess.mismatches)
    lines = [Text(f"  {clean(line)}") for line in groups[:SHOWN]]
    if len(groups) > SHOWN:
        lines.append(Text(f"  … and {len(groups) - SHOWN:,} more kinds (--json lists all tensors)", "dim"))
    return Group(heading, *lines)


def _group(mismatches: list[Mismatch]) -> list[str]:
    """One line for all layers that have the same tensor in the same wrong type."""
    kinds: dict[tuple[str, str, str], list[Mismatch]] = {}
    for m in mismatches:
        head, _, rest = m.tensor.partition(".")
        layer, _, tail = rest.partition(".")
        kind = tail if head == "blk" and layer.isdecimal() and tail else m.tensor
        kinds.setdefault((kind, m.found, m.expected), []).append(m)
    lines = []
    for (kind, found, expected), group in kinds.items():
        place = group[0].tensor if len(group) == 1 else f"{kind} in {len(group):,} layers"
        delta = _signed(sum(m.bytes_delta for m in group))
        lines.append(f"{place}: {found.upper()}, not {expected.upper()}, {delta}")
    return lines


def _signed(size: int) -> str:
    return f"{'+' if size >= 0 else '−'}{gigabytes(abs(size))}"


def _labels(claims: list[Claim]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for claim in claims[:SHOWN]:
        fits = ("fits", "green") if claim.fits is not None else ("does not fit", "bold red")
        true = sorted(claim.true.values()) if claim.fits is None else [claim.true[claim.fits]]
        numbers = " to ".join(dict.fromkeys(map(count, true[:1] + true[-1:]))) or "unknown"
        what = {"total": "in all", "active": "active", "experts": "shared and one expert"}[claim.kind]
        where = Text(f"({clean(', '.join(claim.where))})", "dim")
        table.add_row(claim.text, Text(*fits), Text.assemble(f"{numbers} {what} ", where))
    return table


def _container(findings: list[Finding], tensors: int) -> Iterable[Text]:
    if not any(f.severity == "error" for f in findings):
        yield Text.assemble(("ok", "green"), f"  header, {tensors:,} regions, metadata and tensors agree")
    for f in sorted(findings, key=lambda f: ("error", "warning", "note").index(f.severity))[:SHOWN]:
        place = f"{clean(f.tensor)}: " if f.tensor else ""
        yield Text.assemble((f.code, _STYLES[f.severity]), f"  {place}{clean(f.message)}")
    if len(findings) > SHOWN:
        yield Text(f"… and {len(findings) - SHOWN:,} more (--json lists them all)", "dim")


def _print_raw(found: Inspection, console: Console) -> None:
    """Every key and tensor, one line each, as the file has them."""
    raw = found.raw or {}
    console.print()
    for entry in raw["metadata"]:
        line = Text.assemble(
            (clean(entry["key"]), "cyan"), (f" {entry['type']}  ", "dim"), clean(_value(entry["value"]))
        )
        console.print(line, soft_wrap=True)
    console.print()
    axes = "ne" if found.kind == "gguf" else "shape"
    console.print(Text(f"{'offset':>18}  {'bytes':>15}  {'type':<8}  {axes:<22}  name", "dim"))
    for t in raw["tensors"]:
        shape = str(t["stored_shape"]).replace(" ", "")
        row = f"{t['offset']:>18,}  {t['bytes']:>15,}  {t['type']:<8}  {shape:<22}  {clean(t['name'])}"
        console.print(Text(row), soft_wrap=True)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        first = ", ".join(_value(v) for v in value["first"])
        more = ", …" if value["length"] > len(value["first"]) else ""
        return f"{value['length']:,} × {value['array']} [{first}{more}]"
    return repr(value)
