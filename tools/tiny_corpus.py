"""The two kinds of text that the tiny model learns: the King James Bible and Python's standard library.

text: the Debian package bible-kjv-text (the King James Version of 1611, in the public domain), printed by the
`bible` program of the package bible-kjv; both are fetched with `apt-get download` and nothing is installed.
code: the .py files of CPython's Lib/ without tests, tables and generated data (PSF licence 2.0).

A document is a chapter or a file. Every 40th document is held out: tokenizer and model never see it.
"""

import hashlib
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

KJV = {
    "bible-kjv-text_4.38_all.deb": "d61b6aad4c51ba9e2800b825325fa6a09e99a0d02a9bb6dc4724fcc4995a1b7a",
    "bible-kjv_4.38_amd64.deb": "75a49c032a6efa9faa2beb4a9acb70974380122906329d0e100de36cc88ff02d",
}
HELD_OUT_EVERY = 40
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "lib2to3", "pydoc_data", "encodings", "turtledemo"}
LARGEST_FILE = 128 * 1024  # above that it is a table or a museum piece


@dataclass(frozen=True)
class Corpus:
    """One kind of text, its documents split into those to learn and those held out."""

    kind: str
    learn: list[str]
    held_out: list[str]

    @property
    def sha256(self) -> str:
        """Hash of all documents in order, to recognise the same corpus elsewhere."""
        return hashlib.sha256("\0".join([*self.learn, "", *self.held_out]).encode()).hexdigest()


def read_bible(folder: Path) -> Corpus:
    """Fetch the two packages into the folder and print the whole Bible, a document per chapter."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, sha256 in KJV.items():
        name, version = file.split("_")[:2]
        if not (folder / file).exists():
            subprocess.run(["apt-get", "download", f"{name}={version}"], cwd=folder, check=True)
        found = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        if found != sha256:
            raise ValueError(f"{file}: sha256 {found}, expected {sha256}")
        subprocess.run(["dpkg-deb", "-x", file, "."], cwd=folder, check=True)
    # -l: one verse a line, never broken
    command = [folder / "usr/bin/bible", "-p", f"{folder}/usr/lib/", "-l100000", "gen1:1-rev22:21"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    chapters = re.split(r"\n(?=(?:[1-3] )?[A-Z][A-Za-z ]+ \d+\n)", "\n" + printed.strip())
    return _split("text", [chapter.strip() + "\n" for chapter in chapters if chapter.strip()])


def read_stdlib(lib: Path) -> Corpus:
    """Read the sources of a CPython Lib/ folder, a document per file, in the order of their names."""
    files = [p for p in sorted(lib.rglob("*.py")) if not LEFT_OUT.intersection(p.relative_to(lib).parts)]
    documents = [p.read_text(encoding="utf-8") for p in files if 0 < p.stat().st_size <= LARGEST_FILE]
    return _split("code", documents)


def read_licence(lib: Path) -> str:
    """Read the licence that must stay beside any part of the code; it lies in or above the Lib/ folder."""
    return next(p for p in (lib / "LICENSE.txt", lib.parent / "LICENSE") if p.exists()).read_text(
        encoding="utf-8"
    )


def sample(documents: list[str], pieces: int = 16, size: int = 3000) -> str:
    """Take whole lines from the middle of documents that lie evenly apart."""
    chosen = documents[:: max(1, len(documents) // pieces)][:pieces]
    starts = [d.find("\n", max(0, len(d) // 2 - size // 2)) + 1 for d in chosen]
    cuts = [d[start : start + size] for d, start in zip(chosen, starts, strict=True)]
    return "".join(cut[: cut.rfind("\n") + 1] for cut in cuts)


def _split(kind: str, documents: list[str]) -> Corpus:
    held_out = documents[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
    learn = [d for i, d in enumerate(documents) if i % HELD_OUT_EVERY != HELD_OUT_EVERY // 2]
    return Corpus(kind, learn, held_out)
