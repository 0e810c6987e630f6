"""The container check: are all regions whole and in place, and do metadata and tensors tell one story?

Every defect of a region is an error but for bytes after the last one, which no reader looks at. A header that
cannot be read at all never comes here: opening the file raises BadFile.
"""

from refimpl.files.gguf import Gguf
from refimpl.files.source import Defect, Model
from refimpl.verifier.agreement import compare_metadata
from refimpl.verifier.findings import Finding, Severity

# code of the defect -> code of the finding and its severity
_REGIONS: dict[str, tuple[str, Severity]] = {
    "past-end": ("region-past-end", "error"),
    "short": ("region-short", "error"),
    "overlap": ("region-overlap", "error"),
    "unaligned": ("region-unaligned", "error"),
    "order": ("region-out-of-order", "error"),  # llama.cpp refuses a file with either of these two
    "gap": ("region-gap", "error"),
    "trailing": ("trailing-bytes", "warning"),
    "total-size": ("total-size", "note"),
}
# a file with one of these is a bad file (exit code 3 of inspect)
BROKEN = frozenset(code for code, severity in _REGIONS.values() if severity == "error")


def check(f: Model) -> list[Finding]:
    """What is wrong with the file as a container: regions first, then metadata that tensors contradict."""
    found = [_describe(defect) for defect in f.defects]
    return found + (compare_metadata(f) if isinstance(f, Gguf) else [])


def _describe(defect: Defect) -> Finding:
    code, severity = _REGIONS[defect.code]
    words = defect.defect
    if defect.tensor is not None:
        words = words.removeprefix(f"{defect.tensor}: ")
    return Finding(code, severity, words, tensor=defect.tensor, offset=defect.offset)
