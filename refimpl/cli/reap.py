"""refimpl reap: score, merge, select, prune, audit."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from refimpl.cli.main import progress_bar

command = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Score a mixture's experts, select, prune and audit: which ones can a model lose?",
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


@command.command()
def score(
    source: Annotated[Path, typer.Argument(help="The unpruned model: a .gguf or an HF directory.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Where the statistics go, .safetensors.")],
    tokens: Annotated[
        list[str] | None, typer.Option(help="A .npy of integers [T] or [N, T], or a list such as 3,1,4.")
    ] = None,
    text: Annotated[list[Path] | None, typer.Option(help="UTF-8 text, in the model's own tokens.")] = None,
    preset: Annotated[
        str, typer.Option(help="paper, cerebras, cerebras-layerwise, llm-compressor or model.")
    ] = "model",
    router: Annotated[str | None, typer.Option(help="Otherwise than the preset: softmax or sigmoid.")] = None,
    selection: Annotated[str | None, typer.Option(help="… : logits or model.")] = None,
    normalise: Annotated[str | None, typer.Option(help="… : always, config or never.")] = None,
    floor: Annotated[float | None, typer.Option(help="… : least weight after the division.")] = None,
    scale: Annotated[
        bool | None, typer.Option("--scale/--no-scale", help="… : multiply by routed_scaling_factor.")
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="Most tokens of a sequence.")] = 2048,
    jobs: Annotated[int | None, typer.Option(min=1, help="Threads; by default one per core.")] = None,
    force: Force = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Score every expert over a text: REAP's saliency, and every statistic that it is compared with.

    One layer after the other goes through memory; what the next one needs lies in OUT.work, and the same
    command goes on from there after a stop. A preset names what is scored (the paper and the released programs
    differ); single switches may be set otherwise, and the state's preset then says so.

    Exit codes: 0 fine · 2 usage · 3 a file that cannot be read · 4 unsupported.
    """
    from refimpl.reap.presets import find_preset
    from refimpl.reap.score import read_texts
    from refimpl.reap.score import score as run

    chosen = find_preset(
        preset, router=router, selection=selection, normalise=normalise, floor=floor, scale=scale
    )
    texts = read_texts(source, tokens or [], text or [])
    with progress_bar("scoring", hidden=quiet, unit="tokens") as progress:
        found = run(source, texts, out, chosen, length, jobs, progress, force)
    print(f"{out}: {len(found.model.layers)} layers, {found.tokens:,} tokens, {chosen.name}", file=sys.stderr)


@command.command()
def merge(
    states: Annotated[list[Path], typer.Argument(help="States of the same model and preset.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The state of all of them together.")],
    force: Force = False,
) -> None:
    """Add the statistics of several runs, as if their texts had been one.

    Sums, counts and maxima are added; means follow from them. States of another preset, with another switch or
    of another model are refused.

    Exit codes: 0 fine · 2 usage, also states that do not add up · 3 no state.
    """
    from refimpl.reap import state

    _refuse_to_replace(out, force)
    run, layers = state.merge([state.load(path) for path in states])
    state.save(out, run, layers)
    print(f"{out}: {len(layers)} layers, {run.tokens:,} tokens", file=sys.stderr)


@command.command()
def select(
    state: Annotated[Path, typer.Argument(help="Statistics that `reap score` saved.")],
    keep: Annotated[int | None, typer.Option(help="Experts that stay in a layer.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Share to prune; the number is rounded down.")] = None,
    criterion: Annotated[str, typer.Option(help="reap, frequency, ean_sum, …: the lowest go.")] = "reap",
    scope: Annotated[str, typer.Option(help="layer: as many in each; global: one ranking.")] = "layer",
    min_per_layer: Annotated[
        int | None, typer.Option(help="With --scope global: least a layer keeps.")
    ] = None,
    preserve: Annotated[
        str | None, typer.Option(help="super, outliers, or a JSON file of experts by layer: never pruned.")
    ] = None,
    groups: Annotated[int, typer.Option(help="Keep as many in each of so many groups.")] = 1,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Where the list goes; stdout otherwise.")
    ] = None,
    force: Force = False,
) -> None:
    """Choose which experts stay, as JSON.

    Of equal scores the lower index stays. With --scope global every layer's scores are divided by their sum and
    ranked together. Cuts whose two sides differ by less than 1 percent are flagged as near-ties.

    Exit codes: 0 fine · 2 usage, also demands that cannot be met · 3 a file that cannot be read.
    """
    from refimpl.reap import kept as kept_file
    from refimpl.reap.choose import choose

    if out is not None:
        _refuse_to_replace(out, force)
    document = choose(state, criterion, keep, ratio, scope, min_per_layer, preserve, groups)
    text = kept_file.dump(document)
    near = sum(cut["near_tie"] for cut in document["cuts"])
    if out is None:
        print(text, end="")
    else:
        out.write_text(text, encoding="utf-8")
    if near:
        print(f"{near} of {len(document['cuts'])} layers are cut at a near-tie", file=sys.stderr)


@command.command()
def prune(
    source: Annotated[Path, typer.Argument(help="A .gguf or an HF directory.")],
    out: Annotated[Path, typer.Argument(help="The pruned model, of the same kind.")],
    kept: Annotated[Path, typer.Option(help="JSON of `reap select`, made for this very model.")],
    mtp: Annotated[
        str, typer.Option(help="An MTP block that the list lacks: drop it, or prune it alike.")
    ] = "drop",
    force: Force = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Take experts out of a model; quantized experts are not quantized anew.

    Experts, router rows and the selection bias are cut by one list in every layer, the config follows, and the
    map to the first ancestor's experts is written along (reap.json, or the key refimpl.reap). The output
    appears only when it is whole.

    Exit codes: 0 fine · 2 usage, also a list of another model · 3 bad file · 4 unsupported.
    """
    from refimpl.reap.prune import prune as run

    with progress_bar("pruning", hidden=quiet) as progress:
        provenance = run(source, out, kept, mtp=mtp, force=force, progress=progress)
    layers: Sequence[Any] = list(provenance["steps"][-1].values())
    print(f"{out}: {len(layers[0])} experts in each of {len(layers)} layers", file=sys.stderr)


@command.command()
def audit(
    child: Annotated[Path, typer.Argument(help="The pruned model: a .gguf or an HF directory.")],
    parent: Annotated[Path, typer.Option(help="What it was pruned from.")],
    scores: Annotated[
        Path | None, typer.Option(help="The parent's statistics, to say what was lost.")
    ] = None,
    as_json: Json = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Threads; by default one per core.")] = None,
) -> None:
    """Say which experts a model kept, whether all else is its parent's, and what it lost.

    A child of the parent's own types is compared byte by byte, a quantized one as verify does. With --scores
    the kept set is held against what each criterion would have kept: overlap, regret (how much less score was
    kept than could be), the share of the score that was lost, and Kendall's tau.

    Exit codes: 0 a child of that parent · 1 it is not, or is damaged · 2 usage · 3 bad file · 4 unsupported.
    """
    from refimpl.reap.audit import audit as run

    found = run(child, parent, scores, jobs)
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        from refimpl.report.reap import print_audit
        from refimpl.report.terminal import console

        print_audit(found, console())
    raise typer.Exit(0 if found.passed else 1)


def _refuse_to_replace(out: Path, force: bool) -> None:
    from refimpl.errors import Usage

    if out.exists() and not force:
        raise Usage(f"{out} exists; --force replaces it")
