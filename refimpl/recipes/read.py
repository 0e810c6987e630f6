"""Recipes from TOML: the ones in this package, and files of the user's own.

    name    = "my-mix"               # default: the file's name
    version = "1"                    # free text
    about   = "one line"
    base    = "q4_k_m"               # a recipe of this package: its rules follow this file's, and its default
    default = "q4_K"                 # type of a quantizable tensor that no rule matches; needed without base
    keep    = ['_norm\\.weight']      # never quantized; default: the base's, or what llama-quantize keeps

    [[rule]]                         # the first that applies wins
    match   = 'ffn_down_exps'        # lower-cased, then searched anywhere in the name, as llama-quantize does
    type    = "q6_K"                 # any case
    layers  = "0,3:5"                # optional: layers, half-open ranges; or "more_bits": llama.cpp's choice
    experts = 8                      # optional: only where the model has so many routed experts

Every other key is an error. `--tensor-type A=B` of llama-quantize is one rule; its --token-embedding-type and
--output-tensor-type are rules for '^token_embd\\.weight$' and '^output\\.weight$' before all others.
"""

import re
import tomllib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from refimpl.errors import BadFile, Usage
from refimpl.recipes.recipe import KEEP, Layers, Recipe, Rule, format_of

NAMES = ("q4_k_m", "q4_k_m-protected", "q4_k_m-protected-literal")
MOST_BYTES = 1 << 20
LONGEST_PATTERN = 1000
_KEYS = {"name", "version", "about", "base", "default", "keep", "rule"}
_RULE_KEYS = {"match", "type", "layers", "experts"}


def names() -> tuple[str, ...]:
    """The recipes of this package; of equally good fits the first is named."""
    return NAMES


def load(name_or_path: str) -> Recipe:
    """A recipe by its name, or from a TOML file (a .toml file).

    Raises Usage for a name that does not exist, BadFile for a file that breaks the format above.
    """
    if name_or_path in NAMES:
        return _known(name_or_path)
    if not name_or_path.endswith(".toml"):
        raise Usage(f"unknown recipe {name_or_path!r}; known: {', '.join(NAMES)}, or a .toml file")
    try:
        with open(name_or_path, "rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        words = getattr(error, "strerror", None) or str(error)
        raise BadFile(name_or_path, None, words.lower()) from None
    if len(raw) > MOST_BYTES:
        raise BadFile(name_or_path, MOST_BYTES, "too long for a recipe")
    return _parse(name_or_path, raw)


@cache
def _known(name: str) -> Recipe:
    file = resources.files(__package__).joinpath(f"{name}.toml")
    return _parse(f"{name}.toml", file.read_bytes())


def _parse(path: str, raw: bytes) -> Recipe:
    try:
        data = tomllib.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise BadFile(path, error.start, "the recipe is not UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadFile(path, None, f"not TOML: {error}") from None
    try:
        return _build(path, data)
    except ValueError as error:
        raise BadFile(path, None, str(error)) from None


def _build(path: str, data: dict[str, Any]) -> Recipe:
    _refuse_others("the recipe", data, _KEYS)
    base = None
    if "base" in data:
        if data["base"] not in NAMES:
            raise ValueError(f"base is {data['base']!r}; known: {', '.join(NAMES)}")
        base = _known(data["base"])
    elif "default" not in data:
        raise ValueError("a recipe needs `base` or `default`")
    rules = data.get("rule", [])
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise ValueError("rules are written as [[rule]] tables")
    keep = data.get("keep")
    if keep is not None and not isinstance(keep, list):
        raise ValueError("keep is a list of patterns")
    if keep is not None or base is None:
        kept = tuple(_compile(pattern) for pattern in (KEEP if keep is None else keep))
    else:
        kept = base.keep
    return Recipe(
        name=_text(data, "name", Path(path).stem),
        version=_text(data, "version", base.version if base else ""),
        about=_text(data, "about", ""),
        rules=(*map(_build_rule, rules), *(base.rules if base else ())),
        default=_type(data["default"]) if base is None or "default" in data else base.default,
        keep=kept,
    )


def _build_rule(data: dict[str, Any]) -> Rule:
    _refuse_others("a rule", data, _RULE_KEYS)
    if "match" not in data or "type" not in data:
        raise ValueError("a rule needs `match` and `type`")
    experts = data.get("experts")
    if experts is not None and (not isinstance(experts, int) or isinstance(experts, bool)):
        raise ValueError(f"experts is a number, not {experts!r}")
    layers = _layers(data["layers"]) if "layers" in data else None
    return Rule(_compile(data["match"]), _type(data["type"]), layers, experts)


def _refuse_others(what: str, data: dict[str, Any], keys: set[str]) -> None:
    others = sorted(set(data) - keys)
    if others:
        raise ValueError(f"{what} has no key {others[0]!r}; known: {', '.join(sorted(keys))}")


def _text(data: dict[str, Any], key: str, default: str) -> str:
    value = data.get(key, default)
    if not isinstance(value, str):
        raise ValueError(f"{key} is a text, not {value!r}")
    return value


def _type(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a type is a name such as 'q8_0', not {value!r}")
    return format_of(value.lower()).name


def _compile(pattern: Any) -> re.Pattern[str]:
    if not isinstance(pattern, str) or len(pattern) > LONGEST_PATTERN:
        raise ValueError(f"a pattern is a text of at most {LONGEST_PATTERN:,} characters")
    try:
        return re.compile(pattern.lower())
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"the pattern {pattern!r} is no regular expression: {error}") from None


def _layers(value: Any) -> Layers:
    """ "more_bits", or ranges such as "0,3:5"."""
    if value == "more_bits":
        return "more_bits"
    ranges = []
    for part in value.split(",") if isinstance(value, str) else [""]:
        match = re.fullmatch(r"\s*(\d{1,6})(?:\s*:\s*(\d{1,6}))?\s*", part, re.ASCII)
        if match is None:
            raise ValueError(f'layers is "more_bits" or ranges such as "0,3:5", not {value!r}')
        first = int(match[1])
        ranges.append(range(first, int(match[2]) if match[2] else first + 1))
    return tuple(ranges)
