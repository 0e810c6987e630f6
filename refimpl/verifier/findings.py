"""What a check found. Findings are data: nothing about two files that differ is ever an exception."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing worth saying about a file, with its place.

    code     : stable machine name, such as "scale-not-finite"
    severity : an "error" fails the run
    tensor   : GGUF name, or None for the file
    expert   : index in the file's stacked tensor
    block    : index of the block within the whole tensor
    offset   : absolute byte offset in the file
    """

    code: str
    severity: Severity
    message: str
    tensor: str | None = None
    expert: int | None = None
    block: int | None = None
    offset: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
