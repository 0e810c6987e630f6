"""Special tokens of a tokenizer as GGUF keys: their numbers, and which of them are put around a text.

Three places speak of them: the post-processor of tokenizer.json, tokenizer_config.json and config.json; the
first that gives a token a number wins. GLM's own four come last.
Source: SpecialVocab, gguf-py/gguf/vocab.py, and _set_vocab_glm, conversion/base.py, llama.cpp 0c1e570.
"""

from collections.abc import Mapping
from typing import Any

from gguf.constants import GGUFValueType as Kind

_KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_GLM = (("bos", "[gMASK]"), ("eot", "<|user|>"), ("unk", "<|endoftext|>"), ("eom", "<|observation|>"))
_KEYS = {
    "bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask",
    "eot": "eot", "eom": "eom",
}  # fmt: skip


def find_special(
    data: Mapping[str, Any], settings: Mapping[str, Any], config: Mapping[str, Any], added: Mapping[str, int]
) -> dict[str, tuple[Kind, Any]]:
    """Keys of the special tokens.

    data, settings, config : tokenizer.json, tokenizer_config.json, config.json
    added                  : number of each added token

    Raises ValueError, TypeError, KeyError or AttributeError where one of them is of another form.
    """
    settings, kinds = dict(settings), list(_KINDS)
    around = _post_process(data, settings, kinds)
    numbers: dict[str, int] = {}
    for kind in kinds:
        said = settings.get(f"add_{kind}_token")
        if isinstance(said, bool):
            around.setdefault(kind, said)
        token = settings.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str):
            _put(numbers, kind, added.get(token))
    for kind in kinds:
        _put(numbers, kind, config.get(f"{kind}_token_id"))
    for kind, token in _GLM:
        _put(numbers, kind, added[token])
    keys = {f"tokenizer.ggml.{_KEYS[k]}_token_id": (Kind.UINT32, n) for k, n in numbers.items() if k in _KEYS}
    flags = {k: v for k, v in around.items() if k in ("bos", "eos", "sep")}
    return keys | {f"tokenizer.ggml.add_{kind}_token": (Kind.BOOL, said) for kind, said in flags.items()}


def _put(numbers: dict[str, int], kind: str, number: Any) -> None:
    """Note a token's number, unless an earlier place gave one; what is no integer (a list of several) counts not."""
    if not isinstance(number, int) or isinstance(number, bool):
        return
    if number < 0:
        raise ValueError(f"{kind} has the number {number}")
    numbers.setdefault(kind, number)


def _post_process(data: Mapping[str, Any], settings: dict[str, Any], kinds: list[str]) -> dict[str, bool]:
    """Which tokens the post-processor puts around a text; a token that only it names enters the settings."""
    around: dict[str, bool] = {}
    processor = data.get("post_processor") or {}
    for part in processor.get("processors", [processor]) if processor else []:
        if part["type"] == "ByteLevel":
            around.setdefault("bos", False)
            around.setdefault("eos", False)
        elif part["type"] == "TemplateProcessing":
            _read_template(part, settings, kinds, around)
        else:
            raise ValueError(f"its post-processor is {part['type']!r}")
    return around


def _read_template(
    part: Mapping[str, Any], settings: dict[str, Any], kinds: list[str], around: dict[str, bool]
) -> None:
    single, pair = part.get("single", []), part.get("pair", [])
    first, last = (_token(single[0]), _token(single[-1])) if len(single) > 1 else (None, None)
    bos, cls, eos = (settings.get(f"{kind}_token") for kind in ("bos", "cls", "eos"))
    bos, eos = bos or cls, eos or settings.get("sep_token")
    if first is not None:
        if first not in (bos, cls):
            bos, cls = bos or first, cls or first
            settings |= {"bos_token": bos, "cls_token": cls}
        around["bos"] = first in (bos, cls)
    if last is not None:
        if last != eos:
            kinds.append("eot")
            settings |= {"eot_token": eos, "eos_token": last}
        around["eos"] = True
    inner = [item for item in pair if _token(item) is None]
    if pair and pair[pair.index(inner[0]) : pair.index(inner[-1]) + 1] != inner:
        raise ValueError("its post-processor puts a token between two texts")


def _token(item: Mapping[str, Any]) -> Any:
    return item.get("SpecialToken", {}).get("id")
