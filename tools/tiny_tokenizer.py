"""A byte-level BPE tokenizer in GLM's shape: its pre-split, its special tokens, a template like its own.

As in the real vocabulary the special tokens stand after the merges, and a few ids after them have no token
(a converter writes those as [PADn]). Nothing is prefixed automatically: [gMASK]<sop> comes from the template.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

UNUSED_IDS = 4
PRE_SPLIT = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = [
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
]
# Added tokens that are text for the user, so that decoding keeps them.
MARKUP = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
]
END_OF_TURN = ["<|endoftext|>", "<|user|>", "<|observation|>"]

CHAT_TEMPLATE = """\
[gMASK]<sop>
{%- if tools %}<|system|>
# Tools
{% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}
{%- endif %}
{%- for m in messages %}
  {%- if m.role == 'system' %}{{ '<|system|>' + m.content }}
  {%- elif m.role == 'user' %}{{ '<|user|>' + m.content }}
  {%- elif m.role == 'tool' %}{{ '<|observation|><tool_response>' + m.content + '</tool_response>' }}
  {%- elif m.role == 'assistant' %}
    {%- if m.reasoning_content %}{{ '<|assistant|><think>' + m.reasoning_content + '</think>' + m.content }}
    {%- else %}{{ '<|assistant|></think>' + m.content }}
    {%- endif %}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {%- if enable_thinking is defined and not enable_thinking %}{{ '<|assistant|></think>' }}
  {%- else %}{{ '<|assistant|><think>' }}
  {%- endif %}
{%- endif %}
"""


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn the merges from the texts; the same texts give the same tokenizer."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL) - len(MARKUP) - UNUSED_IDS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKUP])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": CONTROL,
        "clean_up_tokenization_spaces": False,
        "eos_token": CONTROL[0],
        "pad_token": CONTROL[0],
        "padding_side": "left",
        "model_max_length": context,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
