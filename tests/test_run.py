"""main(): the same training on any number of processes and under any strategy, in real torchrun processes."""

from __future__ import annotations

import importlib.util
import json

import pytest
from conftest import RANKS, read_metrics, run_script_several_times, small_run, start

# 12 documents of 93 to 256 tokens in batches of 5: two full batches and a ragged one of 2 an epoch; 6 steps over 2
# epochs. max_grad_norm is far below the norms of this model (about 0.7), so every step clips.
PARITY = {
    "max_train_samples": 12, "batch_size": 5, "num_train_epochs": 2, "max_grad_norm": 0.1, "eval_interval": 6,
    "block_size": 256, "max_eval_samples": 5, "tensor_parallel_size": 1,
}  # fmt: skip
# Batches of 3 documents on 4 ranks: one rank has nothing in each step and still makes every call.
FEW = {"batch_size": 3, "max_steps": 3, "max_eval_samples": 5, "block_size": 256, "tensor_parallel_size": 1}

# Three summaries on four ranks, one of which has none of its own.
SUMMARIES = {"rouge_samples": 3, "max_summary_tokens": 8} if importlib.util.find_spec("rouge_score") else {}

RUNS = {
    ("1", "one process"): {**PARITY, "micro_batch_size": 5, **SUMMARIES},
    ("1", "micro-batches of 3"): {**PARITY, "micro_batch_size": 3},
    ("1", "micro-batches of 2, recomputed"): {**PARITY, "micro_batch_size": 2, "activation_checkpointing": "full"},
    ("1", "packed"): {**PARITY, "micro_batch_size": 3, "packing": "yes"},
    ("1", "few"): {**FEW, "parallelism": "none"},
    ("2", "ddp"): {**PARITY, "parallelism": "ddp", "micro_batch_size": 2},
    ("2", "fsdp, each micro-batch reduced"): {
        **PARITY, "parallelism": "fsdp", "micro_batch_size": 1, "gradient_sync": "micro-batch",
    },
    ("2", "fsdp, each step reduced, recomputed"): {
        **PARITY, "parallelism": "fsdp", "micro_batch_size": 2, "gradient_sync": "step",
        "activation_checkpointing": "full",
    },
    ("2", "ddp, packed"): {**PARITY, "parallelism": "ddp", "micro_batch_size": 2, "packing": "yes"},
    ("2", "fsdp, compiled, recomputed"): {  # one row at a time: a graph to train, and one to evaluate
        **PARITY, "parallelism": "fsdp", "micro_batch_size": 1, "compile": "yes", "activation_checkpointing": "full",
    },
    ("2", "ddp, bf16-states"): {**FEW, "parallelism": "ddp", "precision": "bf16-states"},
    ("4", "hsdp, packed"): {**PARITY, "parallelism": "hsdp", "micro_batch_size": 1, "packing": "yes"},
    ("4", "hsdp"): {**PARITY, "parallelism": "hsdp", "micro_batch_size": 1, "dist_timeout_minutes": 7, **SUMMARIES},
    ("4", "fsdp"): {**PARITY, "parallelism": "fsdp", "micro_batch_size": 1},
    ("4", "few"): {**FEW, "parallelism": "fsdp"},
    ("4", "few, packed"): {**FEW, "parallelism": "fsdp", "packing": "yes"},
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[list[dict], list[dict], str]]:
    """Returns the training lines, the evaluations, and the console of each of RUNS."""
    base, consoles = tmp_path_factory.mktemp("runs"), {}
    before = [RANKS / "report_groups_and_replicas.py", RANKS / "without_inductor.py"]
    folders = {key: base / f"run {number}" for number, key in enumerate(RUNS)}
    for processes in ("2", "4"):
        keys = [key for key in RUNS if key[0] == processes]
        flags = [small_run(folders[key], **RUNS[key]) for key in keys]
        for key, run in zip(keys, run_script_several_times(flags, int(processes), before), strict=True):
            assert run.returncode == 0, run.stderr
            consoles[key] = run.stdout
    for key in [key for key in RUNS if key[0] == "1"]:
        assert start(folders[key], **RUNS[key]) == 0
    for key in (("1", "one process"), ("4", "hsdp")):
        consoles[key] = consoles.get(key, "") + (folders[key] / "samples.jsonl").read_text() * bool(SUMMARIES)
    return {key: (*read_metrics(folders[key]), consoles.get(key, "")) for key in RUNS}


@pytest.mark.parametrize(
    "key", [key for key in RUNS if RUNS[key].keys() >= PARITY.keys()][1:], ids=lambda key: " x ".join(key)
)
def test_losses_and_norms_equal_one_process_step_by_step(runs, key):
    expected_steps, expected_evaluations, _ = runs["1", "one process"]
    steps, evaluations, _ = runs[key]
    assert len(expected_steps) == 6
    assert all(line["grad_norm"] > 0.1 for line in steps), "a step that does not clip tests less than this test says"
    for name in ("step", "loss", "grad_norm", "lr", "tokens", "epoch"):
        assert [line[name] for line in steps] == pytest.approx([line[name] for line in expected_steps], rel=1e-5)
    assert [line["eval_loss"] for line in evaluations] == pytest.approx(
        [line["eval_loss"] for line in expected_evaluations], rel=1e-5
    )


@pytest.mark.skipif(not SUMMARIES, reason="rouge-score is not installed")
def test_hsdp_writes_the_summaries_of_one_process(runs):
    one, four = (
        [json.loads(line) for line in runs[key][2].splitlines() if line.startswith('{"step": 6, "split": "validation"')]
        for key in (("1", "one process"), ("4", "hsdp"))
    )
    assert len(one) == 3 and len({sample["reference"] for sample in one}) == 3
    assert four == one


def test_a_batch_smaller_than_the_world_trains_the_same(runs):
    one, one_evaluation, _ = runs["1", "few"]
    for key in (("4", "few"), ("4", "few, packed")):
        four, four_evaluation, _ = runs[key]
        assert [line["loss"] for line in four] == pytest.approx([line["loss"] for line in one], rel=1e-5)
        assert four_evaluation[0]["eval_loss"] == pytest.approx(one_evaluation[0]["eval_loss"], rel=1e-5)


def test_every_group_of_ranks_has_the_timeout_it_was_given(runs):
    """7 minutes for the replicas and the shards of HSDP; 60, the default, for FSDP's one group."""
    assert "TIMEOUTS [420.0, 420.0]\n" in runs["4", "hsdp"][2]
    assert "TIMEOUTS [3600.0]\n" in runs["4", "fsdp"][2]


@pytest.mark.parametrize("key", [key for key in RUNS if key[1].startswith("ddp")], ids=lambda key: key[1])
def test_replicas_end_with_equal_weights_despite_different_random_states(runs, key):
    assert "REPLICAS EQUAL True\n" in runs[key][2]
