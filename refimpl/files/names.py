"""Tensors of GLM-5.1 by name: sizes (hparams.py), the map (links.py), a source's rows (origin.py)."""

from refimpl.files.hparams import Hparams
from refimpl.files.links import Link, expected, from_hf, link, shape
from refimpl.files.origin import hparams, source_rows, source_shape

__all__ = [
    "Hparams",
    "Link",
    "expected",
    "from_hf",
    "hparams",
    "link",
    "shape",
    "source_rows",
    "source_shape",
]
