"""Train the tiny GLM-5.1 of golden/tiny-glm-dsa on two cores, in about half an hour.

python -m tools.train_tiny --work build/tiny [--lib /path/to/Lib]

Three phases, as DeepSeek-V3.2's report builds sparse attention:
  dense    the model learns with attention over the whole context, the indexers asleep
  indexer  the model stands still; each indexer learns where its layer's attention looks
  sparse   both go on learning with index_topk 64 selected tokens; the indexer within the selection
The router's bias learns in noaux_tc's way: no gradient, a small step up for experts below their share.

Interrupted, it goes on from the last state in --work. Its result is --work/checkpoint (Hugging Face layout)
and --work/training.json; make_golden.py takes it from there.
"""

import argparse
import json
import platform
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from torch.nn import functional as F
from transformers import GlmMoeDsaForCausalLM

from tools import tiny_corpus, tiny_indexer, tiny_model, tiny_tokenizer
from tools.tiny_stream import Stream, bits_per_byte, measure, worth_of_bias

SEED = 20
CONTEXT = 512
BATCH = 4
SAVE_EVERY = 100
BIAS_STEP = 1e-3
TAUGHT_ROWS = 64


@dataclass(frozen=True)
class Phase:
    """A stretch of steps with one way to attend; the rates go from first to last along a straight line."""

    name: str
    steps: int
    warmup: int
    model_rate: tuple[float, float]
    indexer_rate: tuple[float, float]


PHASES = (
    Phase("dense", 2000, 60, (1e-3, 2e-4), (0.0, 0.0)),
    Phase("indexer", 300, 20, (0.0, 0.0), (2e-3, 5e-4)),
    Phase("sparse", 300, 10, (2e-4, 0.0), (5e-4, 0.0)),
)


class Trainer:
    """The model, its optimizers, and how far it has come."""

    def __init__(self, model: GlmMoeDsaForCausalLM, stream: Stream, phases: tuple[Phase, ...] = PHASES):
        self.model, self.stream, self.phases = model, stream, phases
        self.step, self.cpu_s, self.wall_s = 0, 0.0, 0.0
        indexer = {name: p for name, p in model.named_parameters() if ".indexer." in name}
        trunk = {name: p for name, p in model.named_parameters() if ".indexer." not in name}
        self.optimizers = [_adamw(trunk.values()), _adamw(indexer.values())]
        self.loads = [torch.zeros(model.config.n_routed_experts) for _ in self.routers]
        for router, load in zip(self.routers, self.loads, strict=True):
            router.register_forward_hook(partial(_count, load))

    @property
    def routers(self) -> list[torch.nn.Module]:
        first = self.model.config.first_k_dense_replace
        return [layer.mlp.gate for layer in self.model.model.layers[first:]]

    def phase(self) -> tuple[Phase, int] | None:
        """Find the phase of the present step and the step's number in it."""
        done = self.step
        for phase in self.phases:
            if done < phase.steps:
                return phase, done
            done -= phase.steps
        return None

    def learn(self, phase: Phase, at: int) -> tuple[float, float]:
        """Take one step; return the language model's and the indexers' loss."""
        for optimizer, rates in zip(self.optimizers, (phase.model_rate, phase.indexer_rate), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = (rates[0] + (rates[1] - rates[0]) * at / phase.steps) * min(
                    1.0, (at + 1) / phase.warmup
                )
        windows = self.stream.draw(self.step, BATCH, CONTEXT + 1)
        if phase.name == "dense":
            with tiny_indexer.dense(self.model):
                language, lesson = self.language_loss(windows), torch.zeros(())
        else:
            rows = torch.randperm(CONTEXT, generator=torch.Generator().manual_seed(self.step))[:TAUGHT_ROWS]
            sparse = phase.name == "sparse"
            with (
                tiny_indexer.lessons(self.model, sparse, rows.sort().values) as lessons,
                torch.set_grad_enabled(sparse),
            ):
                language = self.language_loss(windows)
            lesson = torch.stack([each.loss for each in lessons]).sum()
        (language + lesson).backward()
        used = {"dense": self.optimizers[:1], "indexer": self.optimizers[1:], "sparse": self.optimizers}[
            phase.name
        ]
        for optimizer in used:
            torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.balance(still=phase.name == "indexer")
        self.step += 1
        return language.item(), lesson.item()

    def language_loss(self, windows: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=windows[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    @torch.no_grad()
    def balance(self, still: bool) -> None:
        """Raise the bias of experts below their share, lower the others', all by the same small step."""
        for router, load in zip(self.routers, self.loads, strict=True):
            if not still:
                router.e_score_correction_bias += BIAS_STEP * torch.sign(load.mean() - load)
            load.zero_()

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": (self.step, self.cpu_s, self.wall_s),
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.cpu_s, self.wall_s = state["progress"]


def _count(load: torch.Tensor, router: torch.nn.Module, inputs: tuple, output: tuple) -> None:
    """Forward hook of a router: output[2] is the chosen experts [tokens, 4]."""
    load += output[2].flatten().bincount(minlength=len(load))


def _adamw(parameters) -> torch.optim.AdamW:
    """AdamW that decays matrices only. (With the real initialisation, 0.02, 2e-3 did not learn at all.)"""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def train(trainer: Trainer, state: Path, log: dict, check: Callable[[str], None]) -> None:
    """Run the phases to their end, saving now and then; `check` is called after each phase with its name."""
    sums, clock, cpu = torch.zeros(2, dtype=torch.float64), time.monotonic(), time.process_time()
    while current := trainer.phase():
        sums += torch.tensor(trainer.learn(*current))
        phase, at = current[0], current[1] + 1
        if at % 50 == 0 or at == phase.steps:
            trainer.wall_s += time.monotonic() - clock
            trainer.cpu_s += time.process_time() - cpu
            clock, cpu = time.monotonic(), time.process_time()
            language, lesson = (sums / ((at - 1) % 50 + 1)).tolist()
            sums.zero_()
            line = {
                "phase": phase.name,
                "step": at,
                "nats": round(language, 4),
                "indexer_kl": round(lesson, 4),
            }
            log["curve"].append(line | {"cpu_s": round(trainer.cpu_s), "wall_s": round(trainer.wall_s)})
            print(log["curve"][-1], flush=True)
        if at == phase.steps:
            check(phase.name)
        if at % SAVE_EVERY == 0 or at == phase.steps:
            trainer.save(state)
            state.with_suffix(".json").write_text(json.dumps(log))
            clock, cpu = time.monotonic(), time.process_time()


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--work", type=Path, default=Path("build/tiny"), help="folder for everything it makes"
    )
    options.add_argument(
        "--lib", type=Path, default=Path(sysconfig.get_path("stdlib")), help="a CPython Lib/"
    )
    options.add_argument("--threads", type=int, default=2)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    checkpoint, state = given.work / "checkpoint", given.work / "state.pt"
    checkpoint.mkdir(parents=True, exist_ok=True)

    corpora = [tiny_corpus.read_bible(given.work / "kjv"), tiny_corpus.read_stdlib(given.lib)]
    learn = [document for corpus in corpora for document in corpus.learn]
    tokenizer = tiny_tokenizer.train(learn, tiny_model.SHAPE["vocab_size"])
    tiny_tokenizer.save(tokenizer, checkpoint, tiny_model.SHAPE["max_position_embeddings"])
    held_out = {corpus.kind: "".join(corpus.held_out) for corpus in corpora}
    excerpts = {corpus.kind: tiny_corpus.sample(corpus.held_out) for corpus in corpora}
    for kind, text in excerpts.items():
        (given.work / f"held-out-{kind}.txt").write_text(text)
    (given.work / "LICENSE-python.txt").write_text(tiny_corpus.read_licence(given.lib))
    (given.work / "calibration.txt").write_text(tiny_corpus.sample(learn, 80, 800))

    ends = [tokenizer.token_to_id(token) for token in tiny_tokenizer.END_OF_TURN]
    model = tiny_model.build(tiny_model.configure(ends, ends[0]), SEED)
    trainer = Trainer(model, Stream(tokenizer, learn, SEED))
    log = {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "threads": given.threads,
        "corpus": [_portray(corpus) for corpus in corpora],
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch": [BATCH, CONTEXT],
        "seed": SEED,
        "phases": [asdict(phase) for phase in PHASES],
        "curve": [],
        "excerpts": {},
    }
    recall_windows = trainer.stream.draw(-1, 8, CONTEXT)

    def check(name: str) -> None:
        figures = measure(model, tokenizer, excerpts, CONTEXT)
        chosen, best = tiny_indexer.recall(model, recall_windows)
        figures["attention_selected"] = {"indexer": round(chosen, 4), "best": round(best, 4)}
        log["excerpts"][name] = figures
        print(name, figures, flush=True)

    if state.exists():
        trainer.load(state)
        log |= {
            key: json.loads(state.with_suffix(".json").read_text())[key]
            for key in ("curve", "excerpts", "untrained")
        }
        print("goes on after step", trainer.step, flush=True)
    else:
        with tiny_indexer.dense(model):
            log["untrained"] = {
                k: round(bits_per_byte(model, tokenizer, t, CONTEXT), 4) for k, t in held_out.items()
            }
        check("untrained")
    train(trainer, state, log, check)

    tiny_model.save(model, checkpoint)
    model = GlmMoeDsaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="sdpa")
    log["cpu_s"], log["wall_s"] = round(trainer.cpu_s), round(trainer.wall_s)
    log["trained"] = measure(model, tokenizer, held_out, CONTEXT)
    log["checkpoint"] = measure(model, tokenizer, excerpts, CONTEXT)
    log["checkpoint"]["without_bias"] = worth_of_bias(model, tokenizer, excerpts, CONTEXT)
    (given.work / "training.json").write_text(json.dumps(log, indent=1) + "\n")
    print({key: log[key] for key in ("untrained", "trained", "checkpoint", "cpu_s", "wall_s")})


def _portray(corpus: tiny_corpus.Corpus) -> dict:
    return {
        "kind": corpus.kind,
        "sha256": corpus.sha256,
        "documents": [len(corpus.learn), len(corpus.held_out)],
        "bytes": [sum(len(d.encode()) for d in part) for part in (corpus.learn, corpus.held_out)],
    }


if __name__ == "__main__":
    main()
