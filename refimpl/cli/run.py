"""refimpl run: let a model speak."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refimpl.cli.models import Cache, Dense, Engine, File, Json, Threads, Tokens, load_model
from refimpl.errors import Usage

if TYPE_CHECKING:
    from refimpl.model.glm import Glm
    from refimpl.model.sampling import Sampling
    from refimpl.model.tokenizer import Tokenizer


def command(
    file: File,
    prompt: Annotated[str | None, typer.Option(help="Text to go on from; - reads it from stdin.")] = None,
    tokens: Tokens = None,
    n: Annotated[int, typer.Option("-n", "--tokens-out", min=1, help="Tokens to generate at most.")] = 64,
    engine: Engine = "refimpl",
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's turn: apply the chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="A system turn before it.")] = None,
    thinking: Annotated[bool, typer.Option(help="Let the template ask for thought.")] = True,
    reasoning_format: Annotated[
        str,
        typer.Option(help="deepseek: reasoning goes to stderr and to a field of its own; none: tags stay."),
    ] = "deepseek",
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token; GLM-5.1 is published with 1.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(help="Only the K likeliest; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="The fewest tokens whose probabilities reach this.")] = 0.95,
    min_p: Annotated[
        float, typer.Option(help="Only tokens at least this share as likely as the likeliest.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Over 1 makes tokens that occurred less likely.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same text.")] = 0,
    dense: Dense = False,
    kv: Cache = None,
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Generate text or tokens, streaming.

    With --prompt the text begins with [gMASK]<sop>, as all texts in training did, and text is printed; with --tokens
    the ids are taken as they are and ids are printed, a line for each sequence of [N, T]. Generation ends at the
    model's end tokens or after -n.

    Exit codes: 0 fine · 2 usage · 3 bad file · 4 unsupported.
    """
    from refimpl.files.tokens import read_tokens
    from refimpl.model.sampling import Sampling
    from refimpl.model.tokenizer import read_tokenizer

    if (prompt is None) == (tokens is None):
        raise Usage("give either --prompt or --tokens")
    if reasoning_format not in ("deepseek", "none"):
        raise Usage(f"--reasoning-format {reasoning_format!r} is not deepseek or none")
    how = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    model = load_model(file, engine, dense, kv, threads)
    if tokens is not None:
        all_found = [_print_ids(model, ids.tolist(), n, how, not as_json) for ids in read_tokens(tokens)]
        found = all_found[0] if len(all_found) == 1 else {"sequences": all_found}
    else:
        tokenizer = read_tokenizer(model.weights.source)
        text = _compose(
            tokenizer, sys.stdin.read() if prompt == "-" else prompt or "", chat, system, thinking
        )
        found = _print_text(
            model, tokenizer, text, n, how, reasoning_format == "deepseek" and chat, not as_json
        )
    if as_json:
        print(json.dumps(found | {"engine": engine, "seed": seed}, indent=1))


def _compose(tokenizer: "Tokenizer", text: str, chat: bool, system: str | None, thinking: bool) -> str:
    """The text that the model sees."""
    from refimpl.model.chat import render
    from refimpl.model.tokenizer import PREFIX

    if not chat:
        return ("".join(PREFIX) if tokenizer.prefix else "") + text
    if tokenizer.template is None:
        raise Usage("this model has no chat template")
    turns = [{"role": "system", "content": system}] if system is not None else []
    return render(tokenizer.template, [*turns, {"role": "user", "content": text}], thinking)


def _print_ids(model: "Glm", ids: list[int], n: int, how: "Sampling", aloud: bool) -> dict[str, Any]:
    from refimpl.model.tokenizer import read_eos

    made = []
    for token in model.sample(ids, n, how, read_eos(model.weights.source)):
        made.append(token)
        if aloud:
            print(token, end=" ", flush=True)
    if aloud:
        print()
    return {"prompt_tokens": ids, "tokens": made}


def _print_text(
    model: "Glm", tokenizer: "Tokenizer", text: str, n: int, how: "Sampling", split: bool, aloud: bool
) -> dict[str, Any]:
    """Stream the answer: content to stdout, reasoning to stderr."""
    from refimpl.model.chat import Splitter, starts_in_thought

    ids, made, said = tokenizer.encode(text), list[int](), ["", ""]
    stream, splitter = tokenizer.stream(), Splitter(starts_in_thought(text))

    def say(reasoning: str, content: str) -> None:
        said[0], said[1] = said[0] + reasoning, said[1] + content
        if aloud:
            print(_safe(reasoning), end="", file=sys.stderr, flush=True)
            print(_safe(content), end="", flush=True)

    for token in model.sample(ids, n, how, tokenizer.eos):
        made.append(token)
        if token not in tokenizer.eos:
            part = stream.add(token)
            say(*(splitter.add(part) if split else ("", part)))
    rest = stream.finish()
    say(*(splitter.add(rest) if split else ("", rest)))
    if split:
        say(*splitter.finish())
    if aloud:
        print()
    why = "stop" if made and made[-1] in tokenizer.eos else "length"
    return {
        "prompt_tokens": ids, "tokens": made, "reasoning_content": said[0], "content": said[1], "finish_reason": why
    }  # fmt: skip


def _safe(text: str) -> str:
    """What a model says, without what a terminal would act on; lines and tabs stay."""
    from refimpl.errors import printable

    return "".join(c if c in "\n\t" else printable(c) for c in text)
