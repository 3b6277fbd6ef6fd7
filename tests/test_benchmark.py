"""The benchmark compares like with like: the same weights and documents, and every figure it promises."""

from __future__ import annotations

import json
import os

import benchmark
import pytest
from conftest import warm

FIGURES = {
    "tokens_per_second", "documents_per_second", "mfu", "peak_memory_gib", "padding_share", "summaries_cut_share",
    "step_seconds", "first_step_seconds", "over_tutorial", "over_trainer", "plan_check",
}  # fmt: skip


# Each starts several processes, which takes longer than most of the suite. The modes are commands of their own.
measures = pytest.mark.skipif("BENCHMARKS" not in os.environ, reason="set BENCHMARKS=1 to try every mode")


@pytest.fixture(autouse=True)
def warm_start(monkeypatch):
    monkeypatch.setenv("PYTHON_EXEC", warm())


def measured(*words: object) -> list[dict]:
    return benchmark.main([str(word) for word in ("--steps", 1, *words)])["rows"]


def by_way(rows: list[dict]) -> dict[str, dict]:
    return {row["way"]: row for row in rows}


def test_all_ways_train_the_same_documents_and_tell_every_figure(tmp_path, capsys):
    rows = by_way(measured("--block-size", 384, "--micro-batch-size", 2, "--json", tmp_path / "ways.json"))
    written = json.loads((tmp_path / "ways.json").read_text())
    assert by_way(written["rows"]).keys() == rows.keys() == {"tutorial", "trainer", "padded", "packed"}
    assert written["machine"]["commit"] and written["machine"]["torch"]
    printed = capsys.readouterr().out
    for name, row in rows.items():
        assert row.keys() >= FIGURES and not row["skipped"] and f"{name:>10}" in printed
        assert row["mfu"] is None  # on a CPU
    packed = rows["packed"]
    assert rows["padded"]["first_loss"] == pytest.approx(packed["first_loss"], abs=1e-5)
    assert rows["trainer"]["first_loss"] == pytest.approx(packed["first_loss"], abs=1e-3)
    assert rows["trainer"]["first_step_tokens"] == rows["padded"]["first_step_tokens"] == packed["first_step_tokens"]
    assert packed["padding_share"] == 0 < rows["padded"]["padding_share"] == rows["trainer"]["padding_share"]
    assert rows["tutorial"]["summaries_cut_share"] > packed["summaries_cut_share"] == 0


@measures
def test_the_tutorial_loop_differs_by_truncation_alone():
    """Where nothing is cut, and no mean is taken over micro-batches, it trains on the same loss."""
    words = ("--block-size", 2048, "--batch-size", 2, "--micro-batch-size", 2)
    rows = by_way(measured("--ways", "tutorial", "packed", *words))
    assert rows["tutorial"]["summaries_cut_share"] == 0
    assert rows["tutorial"]["first_step_tokens"] == rows["packed"]["first_step_tokens"]
    assert rows["tutorial"]["first_loss"] == pytest.approx(rows["packed"]["first_loss"], abs=1e-4)


SWEEP = ("--sweep", "--model", "tiny", "--ways", "packed", "tutorial")


def test_the_sweep_says_what_it_leaves_out():
    rows = measured(*SWEEP, "--block-size", 128, "--batch-size", 4, "--budget-seconds", 0.001)
    assert [(row["way"], row["micro_batch_size"]) for row in rows] == [
        ("packed", None), ("tutorial", None), ("packed", 1), ("packed", 4)
    ]  # fmt: skip
    assert all("no time left" in row["skipped"] for row in rows)


@measures
def test_the_sweep_compares_with_the_plan_on_long_documents(capsys):
    packed, tutorial, of_one = measured(*SWEEP, "--block-size", 2048, "--batch-size", 2)
    assert not (packed["skipped"] or tutorial["skipped"] or of_one["skipped"])
    assert 0.25 < tutorial["padding_share"] < 0.65, "of 2,048 tokens, documents of about 1,100 leave 47%"
    assert of_one["micro_batch_size"] == 1
    for row in (packed, of_one):
        check = row["plan_check"]
        assert check["step_seconds"]["predicted"] > 0 and check["step_seconds"]["measured"] > 0
        assert check["active_gib"]["predicted"] > 0 and check["active_gib"]["measured"] is None  # on a CPU
    printed = capsys.readouterr().out
    assert "documents of about 1," in printed and "predicted / measured" in printed


def test_a_run_that_ends_is_told_with_its_error():
    [row] = measured("--ways", "padded", "--parallelism", "fsdp")
    assert "fsdp" in row["skipped"]


@measures
def test_saves_and_loads_are_measured():
    saves = benchmark.main(["--checkpoints", "1", "--model", "tiny"])["checkpoints"]
    for save in (saves["waited for"], saves["in the background"]):
        assert 0 <= save["held_seconds"] <= save["written_seconds"]
    [loading] = benchmark.main(["--loading", "--model", "tiny", "--ranks", "2"])["loading"]
    assert loading["ranks"] == 2 and loading["held_mib"] > 0
