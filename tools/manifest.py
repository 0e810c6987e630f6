"""golden/MANIFEST.toml: what every file in golden/ is, who made it, and its sha256.

Each tool owns one top-level table and rewrites that alone; what other tools wrote stays as it is. A table
that has `file` (path inside golden/) and `sha256` describes one file; it may stand at any depth, so
[vectors.q4_k] and [tiny-glm-dsa.stock] both do. Other keys are free: oracle, version, command, licence.
"""

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

NAME = "MANIFEST.toml"
HEAD = "# Written by the programs in tools/. A table with `file` and `sha256` describes one file.\n"


def read(golden: Path) -> dict[str, Any]:
    """Read the manifest of a golden folder; a missing one is empty."""
    path = golden / NAME
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def update(golden: Path, table: str, content: Mapping[str, Any]) -> None:
    """Replace one top-level table and leave all others."""
    tables = dict(sorted({**read(golden), table: content}.items()))
    text = HEAD + "".join(_lines([name], tables[name]) for name in tables)
    assert tomllib.loads(text) == json.loads(json.dumps(tables)), "the manifest does not read back as written"
    (golden / NAME).write_text(text, encoding="utf-8")


def describe(golden: Path, file: str, **facts: Any) -> dict[str, Any]:
    """Make the entry of one file: its path inside golden/, size and sha256, then the given facts."""
    data = (golden / file).read_bytes()
    return {"file": file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), **facts}


def files(table: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Walk the entries that describe a file, at any depth."""
    if "file" in table and "sha256" in table:
        yield table
    for value in table.values():
        if isinstance(value, Mapping):
            yield from files(value)


def _lines(names: list[str], table: Mapping[str, Any]) -> str:
    plain = {k: v for k, v in table.items() if not isinstance(v, Mapping)}
    inner = {k: v for k, v in table.items() if isinstance(v, Mapping)}
    text = ""
    if plain or not inner:
        text += "\n[" + ".".join(_key(n) for n in names) + "]\n"
        text += "".join(f"{_key(k)} = {_value(v)}\n" for k, v in plain.items())
    return text + "".join(_lines([*names, k], v) for k, v in inner.items())


def _key(name: str) -> str:
    bare = name.isascii() and name.replace("-", "").replace("_", "").isalnum()
    return name if bare else _value(name)


def _value(value: Any) -> str:
    match value:
        case str():  # a TOML basic string escapes as JSON does, and DEL besides
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case bool() | int() | float():
            return json.dumps(value)
        case list() | tuple():
            return "[" + ", ".join(_value(v) for v in value) + "]"
        case _:
            raise TypeError(f"cannot write {type(value).__name__} to TOML")
