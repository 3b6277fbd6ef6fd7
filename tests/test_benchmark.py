"""The benchmark compares like with like: the same weights and documents, and every figure it promises."""

from __future__ import annotations

import json

import benchmark
import pytest

FIGURES = (
    "tokens_per_second", "documents_per_second", "mfu", "peak_memory_gib", "padding_share", "tokens_cut_share",
    "summaries_cut_share", "step_seconds", "build_seconds", "first_step_seconds", "over_tutorial", "over_trainer",
)  # fmt: skip


def rows_by_way(*words: object) -> dict[str, dict]:
    rows = benchmark.main([str(word) for word in ("--steps", 1, "--warmup", 1, *words)])["rows"]
    return {row["way"]: row for row in rows}


def test_all_ways_train_the_same_documents_and_every_figure_is_told(tmp_path, capsys):
    rows = rows_by_way(
        "--block-size", 384, "--batch-size", 4, "--micro-batch-size", 2, "--json", tmp_path / "ways.json"
    )
    written = json.loads((tmp_path / "ways.json").read_text())
    assert {row["way"] for row in written["rows"]} == set(rows) == {"tutorial", "trainer", "padded", "packed"}
    assert written["machine"]["commit"] and written["machine"]["torch"]
    printed = capsys.readouterr().out
    for name, row in rows.items():
        assert not row["skipped"] and set(FIGURES) <= set(row) and f"{name:>9}" in printed
        assert row["documents_of_first_step"] == rows["packed"]["documents_of_first_step"]
        assert row["mfu"] is None  # on a CPU
    loss = rows["packed"]["first_loss"]
    assert rows["padded"]["first_loss"] == pytest.approx(loss, abs=1e-5)
    assert rows["trainer"]["first_loss"] == pytest.approx(loss, abs=1e-3)
    assert rows["packed"]["padding_share"] == 0 < rows["padded"]["padding_share"]
    assert rows["tutorial"]["summaries_cut_share"] > rows["packed"]["summaries_cut_share"]


def test_the_tutorial_loop_differs_by_truncation_alone():
    """Where nothing is cut, and no mean is taken over micro-batches, it trains on the same loss."""
    words = ("--block-size", 2048, "--batch-size", 2, "--micro-batch-size", 2)
    rows = rows_by_way("--ways", "tutorial", "packed", *words)
    assert rows["tutorial"]["tokens_cut_share"] == 0
    assert rows["tutorial"]["first_loss"] == pytest.approx(rows["packed"]["first_loss"], abs=1e-4)


def test_the_sweep_says_what_it_leaves_out():
    words = ["--sweep", "--model", "tiny", "--block-size", "128", "--ways", "packed", "tutorial"]
    rows = benchmark.main([*words, "--batch-size", "4", "--budget-seconds", "0.001"])["rows"]
    assert {row["part"] for row in rows} == {"ways", "micro-batch"}
    assert all("no time left" in row["skipped"] for row in rows)


def test_the_sweep_measures_every_cell_then_overhead_and_profile_on_documents_as_long_as_the_real_ones(capsys):
    words = ["--sweep", "--model", "tiny", "--block-size", "2048", "--ways", "packed", "tutorial", "--batch-size", "2"]
    report = benchmark.main([*words, "--steps", "1", "--budget-seconds", "120"])
    measured = {(row["part"], row["way"]) for row in report["rows"] if not row["skipped"]}
    assert measured == {("ways", "packed"), ("ways", "tutorial"), ("micro-batch", "packed")}
    tutorial = next(row for row in report["rows"] if row["way"] == "tutorial")
    assert 0.25 < tutorial["padding_share"] < 0.65, "of 2,048 tokens, documents of about 1,100 leave 47%"
    assert report["overhead"]["pairs"] == 6 and "Self CPU" in report["profile"]
    assert "documents of about 1," in capsys.readouterr().out
