"""Around the model: tokenizer, chat template, sampling, perplexity; the commands run, logits and perplexity."""

import importlib.resources
import json
import subprocess
import sys

import jsonschema
import numpy as np
import pytest

import refimpl
from refimpl.cli.main import run
from refimpl.errors import Unsupported, Usage
from refimpl.files.golden import tiny_model
from refimpl.model import perplexity
from refimpl.model.chat import Splitter, render, split_reasoning, starts_in_thought
from refimpl.model.sampling import Sampling, distribution, draw
from refimpl.model.tokenizer import PRE_SPLIT, read_tokenizer

TINY = tiny_model()
FILE = TINY / "protected.gguf"
ODD = "a\r\n\t  b  ½ 漢字 🦉 \x00 '' I'LL 1234567 <|endoftext <|user|>[gMASK]<think>"


def tokenizer(path):
    with refimpl.open(path) as source:
        return read_tokenizer(source)


@pytest.mark.parametrize("text", [ODD, (TINY / "held-out-code.txt").read_text()[:9000]])
def test_a_gguf_s_tokenizer_is_the_checkpoint_s(text):
    ours, theirs = tokenizer(FILE), tokenizer(TINY)
    ids = theirs.encode(text)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids) == text
    assert ours.eos == theirs.eos == {1256, 1263, 1265}
    assert ours.prefix == theirs.prefix == [1258, 1260]
    assert ours.template == theirs.template is not None
    assert (
        PRE_SPLIT
        in json.loads((TINY / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"][0][
            "pattern"
        ].values()
    )


def test_streamed_text_is_the_whole_text_and_never_half_a_character():
    coder = tokenizer(TINY)
    stream = coder.stream()
    parts = [stream.add(token) for token in coder.encode(ODD)]
    assert "".join(parts) + stream.finish() == ODD
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


# --- chats --------------------------------------------------------------------------------------------------


def test_a_chat_asks_for_thought_or_not():
    coder = tokenizer(FILE)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    text = render(coder.template, turns)
    assert text == "[gMASK]<sop><|system|>Be brief.<|user|>Who?<|assistant|><think>"
    assert starts_in_thought(text)
    text = render(coder.template, turns, thinking=False)
    assert text.endswith("<|assistant|></think>") and not starts_in_thought(text)


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}", "{{ lipsum.__globals__ }}",
     "{% for i in range(10**9) %}{% endfor %}", "{% include '/etc/passwd' %}", "{{ 1 / 0 }}", "{% if %}",
     "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "x" * 2_000_000],
)  # fmt: skip
def test_a_hostile_template_is_refused(template):
    with pytest.raises(Unsupported, match="template"):
        render(template, [{"role": "user", "content": "x"}])


def test_a_template_may_refuse():
    with pytest.raises(Usage, match="no tools"):
        render("{{ raise_exception('no tools') }}", [])


@pytest.mark.parametrize(
    "text, thinking, want",
    [("so</think>\n\nYes", True, ("so", "Yes")), ("so", True, ("so", "")), ("Yes", False, ("", "Yes")),
     ("<think>so</think>Yes", False, ("so", "Yes")), ("a<think>b", False, ("", "a<think>b")),
     ("</think>Yes</think>", True, ("", "Yes</think>")), ("a </th", True, ("a </th", "")), ("", True, ("", "")),
     ("<thi", False, ("", "<thi"))],
)  # fmt: skip
def test_reasoning_is_split_from_content(text, thinking, want):
    assert split_reasoning(text, thinking) == want
    splitter = Splitter(thinking)
    parts = [splitter.add(c) for c in text] + [splitter.finish()]
    assert "".join(p[0] for p in parts) == want[0]
    assert "".join(p[1] for p in parts).lstrip("\n") == want[1]


# --- sampling -----------------------------------------------------------------------------------------------

LOGITS = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))


@pytest.mark.parametrize(
    "how, want",
    [({"top_p": 1}, [0.5, 0.25, 0.125, 0.125]), ({"temperature": 0}, [1, 0, 0, 0]),
     ({"top_p": 1, "top_k": 2}, [2 / 3, 1 / 3, 0, 0]), ({"top_p": 0.7}, [2 / 3, 1 / 3, 0, 0]),
     ({"top_p": 0.76}, [4 / 7, 2 / 7, 1 / 7, 0]), ({"top_p": 0}, [1, 0, 0, 0]),
     ({"top_p": 1, "min_p": 0.4}, [2 / 3, 1 / 3, 0, 0]),
     ({"top_p": 1, "temperature": 0.5}, [16 / 22, 4 / 22, 1 / 22, 1 / 22])],
)  # fmt: skip
def test_the_distribution_by_hand(how, want):
    assert np.allclose(distribution(LOGITS, [], Sampling(**how)), want, rtol=1e-6)


def test_a_penalty_makes_what_occurred_less_likely():
    plain, penalised = (distribution(LOGITS, [0], Sampling(top_p=1, penalty=x)) for x in (1, 2))
    assert np.isclose(penalised[0] / penalised[1], (0.5**2) / 0.25)  # a negative logit is doubled
    assert penalised[0] < plain[0]


def test_draws_follow_the_distribution_and_the_seed():
    p = distribution(LOGITS, [], Sampling(top_p=1))
    random = np.random.default_rng(0)
    counts = np.bincount([draw(p, random) for _ in range(4000)], minlength=4) / 4000
    assert np.abs(counts - p).max() < 0.03
    model = refimpl.load(FILE)
    texts = [list(model.sample([1258, 1260], 8, Sampling(seed=seed))) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_generation_ends_at_an_end_token():
    model = refimpl.load(FILE)
    first = model.generate([1258, 1260, 5], 4)
    assert len(first) == 4
    assert list(model.sample([1258, 1260, 5], 4, Sampling(temperature=0), frozenset({first[1]}))) == first[:2]


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": 1.1}, {"penalty": 0}, {"min_p": float("nan")}]
)
def test_absurd_sampling_is_refused(wrong):
    with pytest.raises(Usage):
        Sampling(**wrong)


# --- perplexity ---------------------------------------------------------------------------------------------


class Fixed:
    """A model that always says the same."""

    def __init__(self, p):
        self.p = np.log(np.asarray(p, np.float32))

    def logits(self, ids):
        return np.tile(self.p, (len(ids), 1))


def test_perplexity_and_divergence_by_hand():
    tokens = [
        0,
        0,
        0,
        1,
        1,
        0,
        0,
        1,
        1,
        0,
    ]  # two pieces of 4 and a rest; the second half predicts: token 3 of each
    parts = list(perplexity.score_pieces(Fixed([0.5, 0.5]), tokens, 4, Fixed([0.25, 0.75])))
    found = perplexity.join(parts).to_json()
    assert len(parts) == 2 and found["tokens"] == 2
    assert np.isclose(found["perplexity"], 2) and found["error"] < 1e-6
    assert np.isclose(found["base"]["perplexity"], 4 / 3)
    kl = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    assert np.isclose(found["kl"]["mean"], kl) and np.isclose(found["kl"]["max"], kl)
    assert found["top1"]["share"] == 0


def test_perplexity_is_what_llama_perplexity_prints():
    """To the digits printed; but it keeps a base's log probabilities in 16 bits, which KL divergence shows."""
    printed = json.loads((TINY.parent / "llama.cpp" / "perplexity.json").read_text())
    n, pieces = printed["context"], 2
    how = {"engine": "llama.cpp", "kv": "f32", "activations": "float"}
    model, base = refimpl.load(TINY / "stock.gguf", **how), refimpl.load(TINY, **how)
    ids = tokenizer(TINY).encode((TINY / "held-out-text.txt").read_text(encoding="utf-8"))[: pieces * n]
    parts = list(perplexity.score_pieces(model, ids, n, base))
    for i in range(pieces):
        found, want = perplexity.join(parts[: i + 1]).to_json(), printed["stock"][i]
        assert f"{found['base']['perplexity']:.4f}" == printed["checkpoint"]["after"][i]
        assert [f"{found['perplexity']:.4f}", f"{found['error']:.4f}"] == want["perplexity"]
        assert [f"{100 * found['top1'][k]:.3f}" for k in ("share", "error")] == want["same_top"]
        assert abs(found["kl"]["mean"] - float(want["kl"][0])) < 16 / 65535 / 2 + 5e-6
        assert abs(found["kl"]["error"] - float(want["kl"][1])) < 1e-5
    other = next(perplexity.score_pieces(refimpl.load(TINY, **how, latent_eps=1e-4), ids[:n], n))
    assert f"{perplexity.join([other]).to_json()['perplexity']:.4f}" != printed["checkpoint"]["after"][0]


def test_a_text_too_short_is_refused():
    with pytest.raises(Usage, match="do not fill"):
        list(perplexity.score_pieces(Fixed([0.5, 0.5]), [0, 1], 4))


# --- commands -----------------------------------------------------------------------------------------------


def check_schema(name, text):
    schema = importlib.resources.files("refimpl.report").joinpath(f"schemas/{name}.json").read_text()
    document = json.loads(text)
    jsonschema.Draft202012Validator(json.loads(schema)).validate(document)
    return document


def test_run_goes_on_from_a_text(capsys):
    assert run(["run", str(FILE), "--prompt", "In the beginning", "-n", "12"]) == 0
    text = capsys.readouterr().out
    assert "the" in text and len(text) > 20
    assert run(["run", str(FILE), "--prompt", "In the beginning", "-n", "12", "--json"]) == 0
    document = check_schema("run", capsys.readouterr().out)
    assert document["content"] == text[:-1] and document["finish_reason"] == "length"
    assert document["prompt_tokens"][:2] == [1258, 1260] and len(document["tokens"]) == 12


def test_run_reads_stdin_and_prints_reasoning_elsewhere(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdin, "read", lambda: "Who is Moses?", raising=False)
    arguments = ["run", str(FILE), "--prompt", "-", "--chat", "--system", "Be brief.", "-n", "6"]
    assert run(arguments) == 0
    said = capsys.readouterr()
    assert said.out == "\n" and len(said.err) > 3  # it never says </think>: all is reasoning
    assert run([*arguments, "--no-thinking"]) == 0
    assert len(capsys.readouterr().out) > 3
    assert run([*arguments, "--reasoning-format", "none"]) == 0
    assert capsys.readouterr().out.strip() == said.err.strip()


def test_run_takes_and_prints_tokens(capsys, tmp_path):
    np.save(tmp_path / "t.npy", np.array([1258, 1260, 5]))
    for tokens in (str(tmp_path / "t.npy"), "1258,1260,5"):
        assert run(["run", str(FILE), "--tokens", tokens, "-n", "4"]) == 0
        assert [int(i) for i in capsys.readouterr().out.split()] == refimpl.load(FILE).generate(
            [1258, 1260, 5], 4
        )
    assert run(["run", str(FILE), "--tokens", "1258,1260,5", "-n", "4", "--json"]) == 0
    check_schema("run", capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments, code, word",
    [(["run", str(FILE)], 2, "either"), (["run", str(FILE), "--tokens", "1,x"], 2, "neither"),
     (["run", str(FILE), "--tokens", "1", "--engine", "vllm"], 2, "no engine"),
     (["run", str(FILE), "--tokens", "1", "--kv", "f8"], 2, "--kv"),
     (["run", str(FILE), "--tokens", "9999"], 2, "tokens must be"),
     (["run", "/nowhere.gguf", "--prompt", "x"], 3, "no such file"),
     (["logits", str(FILE), "--tokens", "/nowhere.npy"], 3, "no array of tokens"),
     (["logits", str(FILE), "--tokens", "1", "-o", "x.txt"], 2, ".npy"),
     (["perplexity", str(FILE), "--text", "/nowhere.txt"], 3, "no UTF-8"),
     (["perplexity", str(FILE), "--text", str(FILE)], 3, "no UTF-8")],
)  # fmt: skip
def test_bad_input_is_one_line(capsys, arguments, code, word):
    assert run(arguments) == code
    error = capsys.readouterr().err
    assert word in error and "Traceback" not in error


def test_logits_are_printed_and_written(capsys, tmp_path):
    want = refimpl.load(FILE).logits([1258, 1260])
    assert run(["logits", str(FILE), "--tokens", "1258,1260", "-o", str(tmp_path / "x.npy")]) == 0
    assert np.array_equal(np.load(tmp_path / "x.npy"), want)
    assert run(["logits", str(FILE), "--tokens", "1258,1260", "--json", "--top", "3"]) == 0
    document = check_schema("logits", capsys.readouterr().out)
    assert [row["next"][0]["token"] for row in document["rows"]] == want.argmax(1).tolist()
    assert run(["logits", str(FILE), "--tokens", "1258,1260", "--top", "1"]) == 0
    assert f"{want[0].argmax()}: {want[0].max():.4f}" in capsys.readouterr().out


def test_sequences_of_a_file_do_not_see_each_other(capsys, tmp_path):
    """[N, T] for logits and run; a trace is of one, and says so."""
    tokens, out = str(tmp_path / "t.npy"), tmp_path / "x.npy"
    np.save(tokens, np.array([[1258, 1260], [5, 7]]))
    model = refimpl.load(FILE)
    want = np.stack([model.logits(ids) for ids in ([1258, 1260], [5, 7])])
    assert run(["logits", str(FILE), "--tokens", tokens, "-o", str(out)]) == 0
    assert np.array_equal(np.load(out), want)
    assert run(["logits", str(FILE), "--tokens", tokens, "--json"]) == 0
    rows = check_schema("logits", capsys.readouterr().out)["rows"]
    assert [(row["sequence"], row["token"]) for row in rows] == [(0, 1258), (0, 1260), (1, 5), (1, 7)]
    assert [row["next"][0]["token"] for row in rows] == want.argmax(2).reshape(-1).tolist()
    assert run(["logits", str(FILE), "--tokens", tokens]) == 0
    assert "sequence 1" in capsys.readouterr().out
    assert run(["run", str(FILE), "--tokens", tokens, "-n", "2", "--json"]) == 0
    found = check_schema("run", capsys.readouterr().out)["sequences"]
    assert [one["tokens"] for one in found] == [model.generate(ids, 2) for ids in ([1258, 1260], [5, 7])]
    assert run(["trace", str(FILE), "--tokens", tokens, "-o", str(tmp_path / "t.safetensors")]) == 2
    assert "a trace is of one" in capsys.readouterr().err and not (tmp_path / "t.safetensors").exists()


def test_perplexity_by_domain_and_against_a_base(capsys):
    texts = ["--text", str(TINY / "held-out-text.txt"), "--text", str(TINY / "held-out-code.txt")]
    options = ["--chunks", "2", "-c", "128"]
    assert run(["perplexity", str(TINY / "stock.gguf"), *texts, *options, "--base", str(TINY), "--json"]) == 0
    document = check_schema("perplexity", capsys.readouterr().out)
    for found in document["texts"].values():
        assert found["tokens"] == 2 * 63
        assert (
            5 < found["perplexity"] < 100 and abs(found["perplexity"] / found["base"]["perplexity"] - 1) < 0.1
        )
        assert 0 < found["kl"]["mean"] < 0.1 and found["top1"]["share"] > 0.8
    assert run(["perplexity", str(TINY / "stock.gguf"), *texts[:2], *options, "--quiet"]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_a_warm_start_leaves_scipy_alone():
    """Numba would import scipy.linalg at its first call, to see whether there is BLAS: a fifth of the start."""
    code = """
import sys, numba, numpy as np, refimpl
refimpl.load(sys.argv[1]).logits([1])
assert "scipy.linalg" not in sys.modules
assert numba.njit(lambda a: np.dot(a, a))(np.eye(2))[0, 0] == 1  # which other code in the process may want
assert "scipy.linalg" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(FILE)], check=True)
