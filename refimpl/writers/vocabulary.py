"""A tokenizer.json as GGUF keys: tokens with their types, merges, special tokens, the chat template.

Byte-level BPE alone; tokens are written as the file spells them. A number that no token has becomes [PADn].
Source: get_vocab_base and _set_vocab_glm, conversion/base.py, llama.cpp 0c1e570.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, TokenType
from gguf.constants import GGUFValueType as Kind

from refimpl.errors import BadFile
from refimpl.files.hparams import ARCHITECTURE
from refimpl.files.names import Hparams
from refimpl.files.safetensors import Checkpoint
from refimpl.files.source import LocalFile
from refimpl.writers.special import find_special

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
TEMPLATE_BYTES = 1 << 22
FILE_BYTES = 1 << 27  # GLM-5.1's has 20 MB
_REST = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GLM4_SPLITS = (  # two spellings of one pattern
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|" + _REST,
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + _REST,
)
_LOOKS_SPECIAL = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
_ALWAYS_SPECIAL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")


def add_vocabulary(source: Checkpoint, hp: Hparams) -> dict[str, tuple[Kind, Any]]:
    """The tokenizer's keys, in the converter's order."""
    folder = Path(source.path)
    data = _read(folder / TOKENIZER)
    settings = _read(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    try:
        tokens, types, added = _list_tokens(data, settings, hp.vocab_size)
        _require_split(data)
        merges = _list_merges(data["model"]["merges"])
        special = find_special(data, settings, source.config, added)
        templates = _write_templates(folder, settings)
    except (AttributeError, TypeError, ValueError, IndexError, RecursionError, OverflowError) as error:
        raise BadFile(folder / TOKENIZER, None, f"no tokenizer such as GLM-5.1 has: {error}") from None
    except KeyError as error:
        raise BadFile(
            folder / TOKENIZER, None, f"no tokenizer such as GLM-5.1 has: {error} is missing"
        ) from None
    return {
        "tokenizer.ggml.model": (Kind.STRING, "gpt2"),
        "tokenizer.ggml.pre": (Kind.STRING, "glm4"),
        "tokenizer.ggml.tokens": (Kind.ARRAY, tokens),
        "tokenizer.ggml.token_type": (Kind.ARRAY, np.array(types, np.int32)),
        "tokenizer.ggml.merges": (Kind.ARRAY, merges),
        **special,
        **templates,
    }


def _read(path: Path) -> Any:
    file = LocalFile(os.fspath(path))
    try:
        if file.size > FILE_BYTES:
            raise BadFile(path, 0, f"{file.size:,} bytes of JSON are more than {FILE_BYTES:,}")
        got = json.loads(file.read(0, file.size))
    except (ValueError, RecursionError) as error:
        raise BadFile(path, None, f"not JSON: {error}") from None
    finally:
        file.close()
    if not isinstance(got, dict):
        raise BadFile(path, 0, "the JSON is not an object")
    return got


def _list_tokens(data: Any, settings: Any, size: int) -> tuple[list[str], list[int], dict[str, int]]:
    """Tokens by number, their types, and the numbers of the added ones."""
    model = data["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"its model is {model['type']!r}, not BPE")
    by_number = {_number(number, size): token for token, number in model["vocab"].items()}
    entries = {_number(entry["id"], size): entry for entry in data["added_tokens"]}
    by_number |= {number: entry["content"] for number, entry in entries.items()}
    named = _named_special(settings)
    tokens, types = [], []
    for number in range(size):
        token = by_number.get(number)
        if token is None:
            token, kind = f"[PAD{number}]", TokenType.UNUSED
        elif number not in entries:
            kind = TokenType.NORMAL
        elif entries[number].get("special") is True or token in named or _looks_special(token):
            kind = TokenType.CONTROL
        else:
            token, kind = token.replace("\u2581", " "), TokenType.USER_DEFINED
        tokens.append(token)
        types.append(int(kind))
    return tokens, types, {entry["content"]: number for number, entry in entries.items()}


def _number(value: Any, size: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < size:
        raise ValueError(f"a token has the number {value!r}, the model has {size:,} tokens")
    return value


def _named_special(settings: Any) -> set[str]:
    """Tokens that tokenizer_config.json names as special: transformers then counts them as such."""
    named = []
    for key, value in settings.items():
        if key in ("additional_special_tokens", "extra_special_tokens"):
            named += list(value.values() if isinstance(value, dict) else value or [])
        elif key.endswith("_token") and not key.startswith("add_"):
            named.append(value)
    return {v["content"] if isinstance(v, dict) else v for v in named if isinstance(v, str | dict)}


def _looks_special(token: str) -> bool:
    """What the converter takes for a control token whatever the file says."""
    bounded = any(token.startswith(first) and token.endswith(last) for first, last in _LOOKS_SPECIAL)
    return bounded or token in _ALWAYS_SPECIAL


def _list_merges(merges: Any) -> list[str]:
    """Merges as "left right"; a space inside a half is written as byte-level BPE spells it."""
    found = [m if isinstance(m, str) else " ".join(_half(half) for half in m) for m in merges]
    if not found or any(m.count(" ") != 1 for m in found):
        raise ValueError("its merges are not pairs")
    return found


def _half(half: Any) -> str:
    if not isinstance(half, str):
        raise TypeError(f"a merge of {half!r}")
    return half.replace(" ", "\u0120")


def _require_split(data: Any) -> None:
    """Raise ValueError unless words are split as GLM-4 does: llama.cpp knows it as "glm4"."""
    parts = data["pre_tokenizer"].get("pretokenizers", [data["pre_tokenizer"]])
    found = [part["pattern"].get("Regex") for part in parts if part["type"] == "Split"]
    if len(found) != 1 or found[0] not in GLM4_SPLITS:
        raise ValueError("it splits words otherwise than GLM-4 does")
    if (data.get("normalizer") or {}).get("type") in (
        "Lowercase",
        "StripAccents",
        "BertNormalizer",
        "Sequence",
    ):
        raise ValueError("it normalizes text")


def _write_templates(folder: Path, settings: Any) -> dict[str, tuple[Kind, Any]]:
    """The chat template: of tokenizer_config.json, else of its own file."""
    template: Any = None
    if (folder / TEMPLATE).is_file():
        template = _read_text(folder / TEMPLATE)
        others = sorted((folder / TEMPLATES).glob("*.jinja"))
        if others:
            template = [{"name": "default", "template": template}]
            template += [{"name": one.stem, "template": _read_text(one)} for one in others]
    template = settings.get("chat_template", template)
    if template is None:
        return {}
    writer = GGUFWriter(None, ARCHITECTURE)
    writer.add_chat_template(template)
    keys = {key: (value.type, value.value) for key, value in writer.kv_data[0].items()}
    del keys["general.architecture"]
    return keys


def _read_text(path: Path) -> str:
    file = LocalFile(os.fspath(path))
    try:
        if file.size > TEMPLATE_BYTES:
            raise BadFile(path, TEMPLATE_BYTES, "too long for a chat template")
        return file.read(0, file.size).decode().replace("\r\n", "\n")
    finally:
        file.close()
