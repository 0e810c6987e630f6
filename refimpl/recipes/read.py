"""Recipes from TOML: the ones in this package, and files of the user's own.

    name    = "my-mix"               # default: the file's name
    version = "1"                    # free text
    about   = "one line"
    base    = "q4_k_m"               # a recipe of this package: its rules follow this file's, and its default
    default = "q4_K"                 # type of a quantizable tensor that no rule matches; needed without base
    keep    = ['_norm\\.weight']      # never quantized; default: the base's, or what llama-quantize keeps
    file_type = 15                   # general.file_type of the result; default: the base's, or 0
    needs_imatrix = ["q2_k"]         # types not given without an imatrix (besides those llama-quantize refuses)

    [[rule]]                         # the first that applies wins
    match   = 'ffn_down_exps'        # lower-cased, then searched anywhere in the name, as llama-quantize does
    type    = "q6_K"                 # any case
    layers  = "0,3:5"                # optional: layers, half-open ranges; or a name, see below
    experts = 8                      # optional: only where the model has so many routed experts
    imatrix = true                   # optional: only with an imatrix; false: only without
    axes    = 3                      # optional: only for tensors of so many axes
    otherwise = "q8_0"               # optional: instead, where rows are no whole blocks of the default type

Names of layers, n blocks in all: "more_bits", llama.cpp's choice of the _M mixes; "first_eighth", below n/8;
"first_sixteenth"; "middle", from n/8 to 7n/8; "first_met": the first n/8 tensors that come to this rule and match.

Every other key is an error. `--tensor-type A=B` of llama-quantize is one rule (`override`); its
--token-embedding-type and --output-tensor-type are rules for '^token_embd\\.weight$' and
'^output\\.weight$' before all others.
"""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, cast

from refimpl.errors import BadFile, Usage
from refimpl.recipes.recipe import KEEP, PLACES, Layers, Place, Recipe, Rule, format_of

NAMES = (
    "q4_k_m", "q4_k_m-protected", "q4_k_m-protected-literal",
    "q2_k", "q2_k_s", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q5_0", "q5_1", "q5_k_s", "q5_k_m",
    "q6_k", "q8_0", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "iq3_s", "iq3_m",
    "iq4_nl", "iq4_xs", "tq1_0", "tq2_0", "mxfp4_moe", "q2_0",
)  # fmt: skip
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
MOST_BYTES = 1 << 20
LONGEST_PATTERN = 1000
_KEYS = {"name", "version", "about", "base", "default", "keep", "file_type", "needs_imatrix", "rule"}
_RULE_KEYS = {"match", "type", "layers", "experts", "imatrix", "axes", "otherwise"}


def names() -> tuple[str, ...]:
    """The recipes of this package; of equally good fits the first is named."""
    return NAMES


def load(name_or_path: str) -> Recipe:
    """A recipe by its name, or from a TOML file (a .toml file).

    Raises Usage for a name that does not exist, BadFile for a file that breaks the format above.
    """
    known = ALIASES.get(name_or_path.lower(), name_or_path.lower())
    if known in NAMES:
        return _known(known)
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


def override(recipe: Recipe, options: Sequence[str]) -> Recipe:
    """The recipe with --tensor-type options before its rules: PATTERN=TYPE, the first that is found wins.

    Raises Usage.
    """
    rules = []
    for option in options:
        pattern, equals, type = option.partition("=")
        if not (pattern and equals and type):
            raise Usage(f"--tensor-type is PATTERN=TYPE, not {option!r}")
        try:
            rules.append(Rule(_compile(pattern), _type(type)))
        except ValueError as error:
            raise Usage(f"--tensor-type {option}: {error}") from None
    return replace(recipe, rules=(*rules, *recipe.rules))


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
        file_type=_number(data, "file_type", base.file_type if base else 0) or 0,
        needs_imatrix=_types(data, base.needs_imatrix if base else frozenset()),
    )


def _build_rule(data: dict[str, Any]) -> Rule:
    _refuse_others("a rule", data, _RULE_KEYS)
    if "match" not in data or "type" not in data:
        raise ValueError("a rule needs `match` and `type`")
    imatrix = data.get("imatrix")
    if imatrix not in (None, True, False):
        raise ValueError(f"imatrix is true or false, not {imatrix!r}")
    return Rule(
        _compile(data["match"]),
        _type(data["type"]),
        _layers(data["layers"]) if "layers" in data else None,
        _number(data, "experts", None),
        imatrix,
        _number(data, "axes", None),
        _type(data["otherwise"]) if "otherwise" in data else None,
    )


def _number(data: dict[str, Any], key: str, default: int | None) -> int | None:
    value = data.get(key, default)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise ValueError(f"{key} is a number, not {value!r}")
    return value


def _types(data: dict[str, Any], default: frozenset[str]) -> frozenset[str]:
    value = data.get("needs_imatrix")
    if value is None:
        return default
    if not isinstance(value, list):
        raise ValueError("needs_imatrix is a list of types")
    return frozenset(map(_type, value))


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
    """A name of PLACES, "first_met", or ranges such as "0,3:5"."""
    if isinstance(value, str) and value in ("first_met", *PLACES):
        return cast(Place, value)
    ranges = []
    for part in value.split(",") if isinstance(value, str) else [""]:
        match = re.fullmatch(r"\s*(\d{1,6})(?:\s*:\s*(\d{1,6}))?\s*", part, re.ASCII)
        if match is None:
            raise ValueError(
                f'layers is {", ".join(PLACES)}, first_met or ranges such as "0,3:5", not {value!r}'
            )
        first = int(match[1])
        ranges.append(range(first, int(match[2]) if match[2] else first + 1))
    return tuple(ranges)
