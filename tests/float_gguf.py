"""A checkpoint as the F32 GGUF that llama.cpp would make of it, without a tokenizer."""

import numpy as np

import refimpl
from refimpl.files import gguf, names
from refimpl.files.gguf import GGUFValueType as T
from refimpl.quants.formats import F32
from tests import models


def write(path, checkpoint):
    """Write every tensor that convert would write, as F32."""
    with refimpl.open(checkpoint) as source:
        hp = names.hparams(source)
        keys = models.metadata(hp) | {
            "tokenizer.ggml.model": (T.STRING, "none"),
            "glm-dsa.expert_weights_norm": (T.BOOL, True),
        }
        if hp.indexer_types:
            full = np.array([hp.has_indexer(n) for n in range(hp.num_hidden_layers)])
            keys["glm-dsa.attention.indexer.types"] = (T.ARRAY, full)
        tensors = []
        for link, shape in names.expected(hp):
            rows = names.source_rows(source, link, hp, slice(None))
            if rows.dtype == np.uint16:
                rows = (rows.astype(np.uint32) << 16).view(np.float32)
            tensors.append((link.gguf, shape, F32, [np.ascontiguousarray(rows).view(np.uint8)]))
        gguf.write(path, keys, tensors)
    return path
