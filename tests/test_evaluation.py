"""Evaluation: the token-weighted mean over the documents, each counted once, on one process and on three."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import NEWS, read_metrics, small_run
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_llama2


def mean_token_loss(model_folder: Path) -> float:
    """Returns the loss by hand: document by document, unpadded, in plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    loss = labels = 0
    for row in map(json.loads, (NEWS / "validation.jsonl").read_text().splitlines()):
        text = f"[SUMMARIZE] {row['article']} [/SUMMARIZE]\n{row['highlights']}"
        ids = torch.tensor([*tokenizer(text, split_special_tokens=True)["input_ids"], tokenizer.eos_token_id])
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        loss += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
        labels += len(ids) - 1
    return loss / labels


def test_on_three_ranks_with_ragged_ends_the_loss_is_the_mean_over_all_tokens(three_rank_run):
    _, folder = three_rank_run
    assert read_metrics(folder)[1][-1]["eval_loss"] == pytest.approx(mean_token_loss(folder), rel=1e-5)


@pytest.mark.parametrize("micro_batch_size", [3, 8])
def test_on_one_process_the_loss_is_the_mean_over_all_tokens(tmp_path, micro_batch_size):
    AcceleratorState._reset_state(reset_partial_state=True)
    train_llama2.main(small_run(tmp_path, max_steps=1, block_size=1024, micro_batch_size=micro_batch_size))
    evaluation = read_metrics(tmp_path)[1][0]
    expected = mean_token_loss(tmp_path)
    assert evaluation["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert evaluation["eval_perplexity"] == pytest.approx(2.718281828459045**expected, rel=1e-4)


def test_evaluations_come_at_the_interval_and_at_the_end(three_rank_run):
    assert [line["step"] for line in read_metrics(three_rank_run[1])[1]] == [2, 4, 5]
