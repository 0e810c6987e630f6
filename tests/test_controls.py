"""Every must-fail control fails as it must, and a verifier broken on purpose turns the controls red."""

import numpy as np
import pytest

from refimpl.verifier import container, controls, experts, identify, requantize, settle, verdict
from refimpl.verifier.controls import CONTROLS, run_controls


@pytest.mark.parametrize("name", CONTROLS)
def test_control_is_caught(name, tmp_path):
    [(_, _, problem)] = run_controls(tmp_path, [name])
    assert problem is None


def broken(monkeypatch, tmp_path, names):
    """The controls among `names` that still hold after the patch."""
    return [name for name, _, problem in run_controls(tmp_path, names) if problem is None]


def test_a_comparison_that_always_agrees_turns_the_controls_red(monkeypatch, tmp_path):
    names = ["code-bit-q4-k", "lowest-code-bit-imatrix", "experts-swapped", "norm-plus-one", "expert-zeroed"]
    monkeypatch.setattr(verdict, "classify", lambda tally, fmt: "exact")
    monkeypatch.setattr(verdict, "looks_foreign", lambda tally, fmt: False)
    monkeypatch.setattr(verdict, "describe_damage", lambda *a, **k: [])
    assert broken(monkeypatch, tmp_path, names) == []


def test_an_encoder_that_returns_the_file_turns_the_controls_red(monkeypatch, tmp_path):
    names = ["code-bit-q4-k", "scale-byte-q4-k", "experts-swapped", "gate-and-up-swapped"]
    monkeypatch.setattr(np, "array_equal", lambda a, b: True)
    assert broken(monkeypatch, tmp_path, names) == []


def test_without_the_nearest_check_the_imatrix_control_turns_red(monkeypatch, tmp_path):
    nearest = requantize.quants.nearest

    def blind(raw, fmt, x):
        found = nearest(raw, fmt, x)
        found["off"] = found["far"] = 0
        return found

    monkeypatch.setattr(requantize.quants, "nearest", blind)
    assert broken(monkeypatch, tmp_path, ["lowest-code-bit-imatrix"]) == []


def test_without_the_zero_check_a_zeroed_block_turns_the_control_red(monkeypatch, tmp_path):
    zeroed = requantize.zeroed
    monkeypatch.setattr(requantize, "zeroed", lambda *a: zeroed(*a) & False)
    assert broken(monkeypatch, tmp_path, ["block-zeroed-imatrix", "expert-zeroed"]) == []


def test_a_skipped_container_stage_turns_the_controls_red(monkeypatch, tmp_path):
    monkeypatch.setattr(container, "check", lambda f: [])
    assert broken(monkeypatch, tmp_path, ["head-count-kv-lies", "tensor-cut-short"]) == []


def test_a_skipped_expert_map_turns_the_child_red(monkeypatch, tmp_path):
    monkeypatch.setattr(experts, "map_experts", lambda job: ({}, []))
    assert broken(monkeypatch, tmp_path, ["sound-child"]) == []


def test_a_verifier_that_names_nothing_turns_the_controls_red(monkeypatch, tmp_path):
    monkeypatch.setattr(settle, "identify", lambda *a: None)
    assert (
        broken(monkeypatch, tmp_path, ["experts-swapped", "expert-of-another-layer", "k-b-not-transposed"])
        == []
    )


def test_a_verifier_that_cries_wolf_turns_the_sound_controls_red(monkeypatch, tmp_path):
    monkeypatch.setattr(identify, "NEAR", 0.0)
    monkeypatch.setattr(verdict, "classify", lambda tally, fmt: "degraded")
    assert broken(monkeypatch, tmp_path, ["sound-stock", "sound-child"]) == []


def test_a_control_that_expects_the_wrong_block_is_not_satisfied(tmp_path):
    [(_, _, problem)] = run_controls(tmp_path, ["code-bit-q4-k"])
    assert problem is None
    bench = controls.Bench(controls.tiny_model(), tmp_path, controls.tiny_model())
    expect = CONTROLS["code-bit-q4-k"](bench)
    from refimpl.verifier.run import verify

    report = verify(tmp_path / "model.gguf", controls.tiny_model(), jobs=1)
    wrong = controls.Expect(expect.code, expect.verdicts, expect.expert, expect.block + 1)
    assert controls.check(report, expect) is None
    assert "named, not" in controls.check(report, wrong)
