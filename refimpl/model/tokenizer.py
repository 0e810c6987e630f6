"""Text to tokens and back: byte-level BPE with GLM's pre-split, from tokenizer.json or from a GGUF's metadata."""

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from refimpl.errors import BadFile, Unsupported
from refimpl.files.gguf import Gguf
from refimpl.files.safetensors import Checkpoint

if TYPE_CHECKING:
    import tokenizers

# Letters, up to three digits, punctuation, line breaks, spaces.
# Source: llama.cpp 0c1e570, LLAMA_VOCAB_PRE_TYPE_CHATGLM4.
PRE_SPLIT = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PREFIX = ("[gMASK]", "<sop>")  # what every text began with in training
_CONTROL, _USER = 3, 4  # token types of a GGUF that are matched before the split


class Tokenizer:
    """Encodes and decodes.

    template : the chat template, None where the model has none
    eos      : ids that end a generation
    """

    def __init__(self, coder: "tokenizers.Tokenizer", template: str | None, eos: frozenset[int]) -> None:
        self.coder, self.template, self.eos = coder, template, eos

    @property
    def prefix(self) -> list[int]:
        """The ids of [gMASK]<sop>, none where the vocabulary lacks them."""
        ids = [self.coder.token_to_id(token) for token in PREFIX]
        found = [i for i in ids if i is not None]
        return found if len(found) == len(PREFIX) else []

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens in it are recognised, none are added."""
        return list(self.coder.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return str(self.coder.decode(list(ids), skip_special_tokens=False))

    def stream(self) -> "Stream":
        """A decoder that takes ids one by one."""
        return Stream(self)


class Stream:
    """Decodes ids one by one: text is held back while its last character is not whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._ids, self._said = tokenizer, list[int](), ""

    def add(self, token: int) -> str:
        """What can be said now."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        new, self._said = text[len(self._said) :], text
        if text.endswith("\n"):  # a line is over: nothing before it changes any more
            self._ids, self._said = [], ""
        return new

    def finish(self) -> str:
        """What is still held back: bytes that make no whole character."""
        return self._tokenizer.decode(self._ids)[len(self._said) :]


def read_eos(source: Gguf | Checkpoint) -> frozenset[int]:
    """The ids that end a generation; a model without a tokenizer may still say them."""
    if isinstance(source, Gguf):
        found = [source.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    else:
        stated = source.config.get("eos_token_id")
        found = stated if isinstance(stated, list) else [stated]
    return frozenset(i for i in found if isinstance(i, int))


def read_tokenizer(source: Gguf | Checkpoint) -> Tokenizer:
    """The tokenizer of an open model. Raises BadFile or Unsupported."""
    return _from_gguf(source) if isinstance(source, Gguf) else _from_folder(source)


def _from_folder(source: Checkpoint) -> Tokenizer:
    import tokenizers

    path = os.path.join(source.path, "tokenizer.json")
    if not os.path.isfile(path):
        raise BadFile(path, None, "there is no tokenizer beside the weights: give --tokens")
    try:
        coder = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the library raises nothing narrower
        raise BadFile(path, None, f"not a tokenizer: {error}") from None
    return Tokenizer(coder, _folder_template(source.path), read_eos(source))


def _folder_template(folder: str) -> str | None:
    """chat_template.jinja, or the key in tokenizer_config.json."""
    path = os.path.join(folder, "chat_template.jinja")
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            return file.read()
    path = os.path.join(folder, "tokenizer_config.json")
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        template = json.load(file).get("chat_template")
    return template if isinstance(template, str) else None


def _from_gguf(source: Gguf) -> Tokenizer:
    """Build the BPE from tokens, merges and token types."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    keys = source.metadata
    kind, pre = keys.get("tokenizer.ggml.model"), keys.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre != "glm4":
        raise Unsupported(
            f"{source.path}: tokenizer {kind!r} with pre-split {pre!r}; 'gpt2' with 'glm4' is known"
        )
    tokens = _strings(source, "tokenizer.ggml.tokens")
    merges = [merge.partition(" ")[::2] for merge in _strings(source, "tokenizer.ggml.merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or not all(a and b for a, b in merges):
        raise BadFile(
            source.path, None, "tokenizer.ggml: a token occurs twice, or a merge is not of two parts"
        )
    try:
        coder = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    except Exception as error:  # the library raises nothing narrower
        raise BadFile(source.path, None, f"tokenizer.ggml is not a BPE: {error}") from None
    coder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PRE_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    coder.decoder = decoders.ByteLevel()
    types = list(keys.get("tokenizer.ggml.token_type", []))
    for wanted, add in ((_CONTROL, coder.add_special_tokens), (_USER, coder.add_tokens)):
        add(
            [
                tokenizers.AddedToken(t, normalized=False)
                for t, k in zip(tokens, types, strict=False)
                if k == wanted
            ]
        )
    return Tokenizer(coder, keys.get("tokenizer.chat_template"), read_eos(source))


def _strings(source: Gguf, key: str) -> list[str]:
    values: Any = source.metadata.get(key)
    if values is None or isinstance(values, str) or not all(isinstance(v, str) for v in values):
        raise BadFile(source.path, source.metadata.offsets.get(key), f"{key} is not a list of strings")
    return list(values)
