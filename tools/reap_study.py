"""The pruning study on the trained tiny model: which experts can it lose, by whose choice, and when does it loop?

    python -m tools.reap_study            # 7 to 30 minutes on one core; writes docs/reap-study/ and the README's table
    python -m tools.reap_study --quick    # a few minutes, to see that it runs; writes nothing

The experts are scored on the first part of each held-out text and everything is measured on the rest. Every
variant is a checkpoint that `reap prune` wrote (or merge.py, for the merging baselines).
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import refimpl
from refimpl.files import source as model_files
from refimpl.model.cache import Cache
from refimpl.model.glm import Glm
from refimpl.model.perplexity import Scores, join, score_pieces
from refimpl.model.sampling import Sampling, distribution, draw
from refimpl.model.tokenizer import Tokenizer, read_tokenizer
from refimpl.reap import kept as kept_file
from refimpl.reap import state
from refimpl.reap.loops import find_loop
from refimpl.reap.presets import find_preset
from refimpl.reap.prune import prune
from refimpl.reap.saliency import Saliency, derive
from refimpl.reap.score import Text, score
from refimpl.reap.select import count_kept, select
from refimpl.reap.statistics import wilson
from tools import reap_merge

Array = NDArray[Any]
ROOT = Path(__file__).resolve().parent.parent
TINY, DOCS = ROOT / "golden" / "tiny-glm-dsa", ROOT / "docs" / "reap-study"
DOMAINS = ("text", "code")
CALIBRATIONS = ("text", "code", "both")
METHODS = ("reap", "ean_sum", "frequency", "worst-first")
RATIOS = (0.125, 0.25, 0.375, 0.4, 0.5)
SEEDS = (1, 2, 3)  # of the random cuts
LENGTH = 512


@dataclass(frozen=True)
class Size:
    """How much is measured: tokens to score over and to measure on per domain, continuations and their tokens."""

    calibration: int = 6144
    evaluation: int = 2048
    prompts: int = 30
    tokens: int = 160


class Base:
    """The parent's logits, computed once."""

    def __init__(self, model: Glm) -> None:
        self.model, self._kept = model, dict[bytes, Array]()

    def logits(self, ids: Array) -> Array:
        key = ids.tobytes()
        if key not in self._kept:
            self._kept[key] = self.model.logits(ids)
        return self._kept[key]


class Study:
    """The texts, the scores by calibration, and the folder where variants are written."""

    def __init__(self, size: Size, scratch: Path) -> None:
        self.size, self.scratch = size, scratch
        with model_files.open(TINY) as source:
            self.coder: Tokenizer = read_tokenizer(source)
            self.identity = state.identify(source)
        texts = {d: (TINY / f"held-out-{d}.txt").read_text(encoding="utf-8") for d in DOMAINS}
        ids = {d: np.array(self.coder.encode(text)) for d, text in texts.items()}
        self.calibration = {d: ids[d][: size.calibration] for d in DOMAINS}
        self.evaluation = {d: ids[d][size.calibration : size.calibration + size.evaluation] for d in DOMAINS}
        self.base = Base(refimpl.load(TINY))
        self.scores: dict[str, dict[int, Saliency]] = {}
        for d in DOMAINS:
            path = scratch / f"{d}.safetensors"
            score(TINY, [Text(d, self.calibration[d])], path, find_preset("model"), LENGTH)
            self.scores[d] = state.load(path)[1]
        both = [state.load(scratch / f"{d}.safetensors") for d in DOMAINS]
        self.scores["both"] = state.merge(both)[1]
        self.identity = both[0][0].model

    def choose(self, method: str, calibration: str, keep: int, seed: int = 0) -> dict[int, list[int]]:
        """The experts that a method keeps."""
        if method == "random":
            random = np.random.default_rng(seed)
            values = {n: random.random(self.identity.experts) for n in self.identity.layers}
        else:
            sums = {n: s.sums | derive(s.sums) for n, s in self.scores[calibration].items()}
            sign = -1 if method == "worst-first" else 1
            name = "reap" if method == "worst-first" else method
            values = {n: sign * np.asarray(s[name], np.float64) for n, s in sums.items()}
        return select(values, keep, self.identity.top_k)

    def prune(self, kept: dict[int, list[int]]) -> Path:
        """A checkpoint with these experts."""
        place, document = self.scratch / "kept.json", self.scratch / "child"
        model = self.identity.__dict__ | {"layers": list(self.identity.layers)}
        place.write_text(kept_file.dump({"model": model, "kept": {str(n): e for n, e in kept.items()}}))
        prune(TINY, document, place, force=True)
        return document

    def measure(self, model: Glm) -> dict[str, Any]:
        """Perplexity and distance from the parent, by domain."""
        found = {}
        for d in DOMAINS:
            parts: list[Scores] = list(score_pieces(model, self.evaluation[d].tolist(), LENGTH, self.base))  # type: ignore[arg-type]
            found[d] = join(parts).to_json()
        return found

    def loop_rate(self, model: Glm, temperature: float) -> dict[str, Any]:
        """How many sampled continuations loop, by domain, with Wilson's 95 % interval."""
        found = {}
        for d in DOMAINS:
            texts = list(self._continue(model, d, temperature))
            hits = sum(find_loop(text) is not None for text in texts)
            found[d] = {"loops": hits, "of": len(texts), "interval": wilson(hits, len(texts))}
        return found

    def _continue(self, model: Glm, domain: str, temperature: float) -> Iterator[str]:
        ids = self.evaluation[domain]
        for i in range(self.size.prompts):
            start = i * (len(ids) - 32) // self.size.prompts
            prompt, random = ids[start : start + 32].tolist(), np.random.default_rng([i, domain == "code"])
            cache, said, given = Cache(model.conv), list[int](), prompt
            for _ in range(self.size.tokens):
                logits = model.step(given, cache)[-1]
                token = draw(distribution(logits, [], Sampling(temperature=temperature)), random)
                if token in self.coder.eos:
                    break
                said.append(token)
                given = [token]
            yield self.coder.decode(said)


def run(size: Size, scratch: Path, ratios: tuple[float, ...], loops: bool = True) -> dict[str, Any]:
    """Everything that is measured, as a JSON document."""
    study = Study(size, scratch)
    parent = study.measure(study.base.model)
    rows: list[dict[str, Any]] = []
    sampled: list[dict[str, Any]] = []

    def note(method: str, calibration: str, ratio: float, model: Path, **more: Any) -> Glm:
        loaded = refimpl.load(model)
        rows.append(
            {"method": method, "calibration": calibration, "ratio": ratio, **study.measure(loaded), **more}
        )
        print(_line(rows[-1]), flush=True)
        return loaded

    def sample(method: str, ratio: float, model: Glm) -> None:
        if loops:
            for temperature in (0.2, 0.8):
                found = study.loop_rate(model, temperature)
                sampled.append({"method": method, "ratio": ratio, "temperature": temperature, **found})
                print(json.dumps(sampled[-1]), flush=True)

    sample("parent", 0.0, study.base.model)
    before: dict[tuple[str, str], int] = {}
    for ratio in ratios:
        keep = count_kept(study.identity.experts, None, ratio)
        for calibration in CALIBRATIONS:
            for method in METHODS:
                if before.get((method, calibration)) == keep:  # 37.5 and 40 % of 16 experts are 6 both
                    rows.append(rows[-len(METHODS) * len(CALIBRATIONS) - len(SEEDS)] | {"ratio": ratio})
                    continue
                before[method, calibration] = keep
                model = note(method, calibration, ratio, study.prune(study.choose(method, calibration, keep)))
                if calibration == "both" and (method == "reap" or ratio == max(ratios)):
                    sample(method, ratio, model)
        for seed in SEEDS:
            if before.get(("random", str(seed))) == keep:
                rows.append(rows[-len(METHODS) * len(CALIBRATIONS) - len(SEEDS)] | {"ratio": ratio})
                continue
            before["random", str(seed)] = keep
            note("random", str(seed), ratio, study.prune(study.choose("random", "both", keep, seed)))
    merged = _merge(study, note, max(ratios), sample)
    return {
        "refimpl": refimpl.__version__, "size": size.__dict__, "experts": study.identity.experts,
        "parent": parent, "rows": rows, "loops": sampled, "merged": merged,
    }  # fmt: skip


def _merge(study: Study, note: Any, ratio: float, sample: Any) -> dict[str, Any]:
    """The merging baselines at the deepest cut, by both calibrations together."""
    keep, saliency = count_kept(study.identity.experts, None, ratio), study.scores["both"]
    sequences = [
        study.calibration[d][i : i + LENGTH]
        for d in DOMAINS
        for i in range(0, study.size.calibration, LENGTH)
    ]
    observed = reap_merge.observe(TINY, [s for s in sequences if len(s)])
    found = {}
    for name, groups, align in (
        ("hc_smoe", reap_merge.group_by_outputs(observed, keep), False),
        ("m_smoe", reap_merge.group_by_leaders(observed, saliency, keep), True),
    ):
        place = study.scratch / name
        left = reap_merge.merge(TINY, place, groups, saliency, align)
        model = note(name, "both", ratio, place)
        sample(name, ratio, model)
        found[name] = {"experts_left": left, "groups": {str(n): g for n, g in groups.items()}}
    return found


def _line(row: dict[str, Any]) -> str:
    cells = [
        f"{row[d]['perplexity']:8.3f} ± {row[d]['error']:.3f}  KL {row[d]['kl']['mean']:.4f}" for d in DOMAINS
    ]
    return f"{row['method']:12} {row['calibration']:5} {row['ratio']:6.1%}  " + "   ".join(cells)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--quick", action="store_true")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if given.quick:
            run(Size(1024, 512, 2, 16), Path(scratch), (0.25,))
            return
        document = run(Size(), Path(scratch), RATIOS)
    from tools import reap_report

    DOCS.mkdir(parents=True, exist_ok=True)
    (DOCS / "results.json").write_text(json.dumps(document) + "\n")
    reap_report.write(document, DOCS, ROOT / "README.md")
    print(f"{DOCS}", file=sys.stderr)


if __name__ == "__main__":
    main()
