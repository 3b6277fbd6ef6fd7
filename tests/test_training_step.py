"""The training step against a plain loop that shares no code with it, and steps that are not finite."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import TINY_LLAMA, read_metrics, small_run
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_llama2

STORY = "The mayor opened the new bridge on Monday and thanked the builders for their work. "
# Six documents whose lengths differ by a factor of 14; the validation split is not the matter here.
STORIES = [{"article": STORY * n, "highlights": "A bridge. " * (1 + n % 3)} for n in (1, 7, 2, 12, 1, 4)]
ALL_AT_ONCE = {"batch_size": 6, "num_train_epochs": 3, "max_eval_samples": 1}  # every step sees all six documents
NAN = math.nan


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def stories(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stories")
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(story) + "\n" for story in STORIES))
    return folder


def run_main(save_folder: Path, stories: Path, **flags: object) -> list[dict]:
    """Runs main() in this process and returns its training lines."""
    train_llama2.main(small_run(save_folder, **{**ALL_AT_ONCE, "dataset_name_or_path": stories, **flags}))
    return read_metrics(save_folder)[0]


def poison(monkeypatch: pytest.MonkeyPatch, is_poisoned) -> None:
    """Makes the loss of the training steps (from 0) for which `is_poisoned(step)` holds NaN."""
    healthy, step = train_llama2.token_loss_sum, iter(range(1000))

    def token_loss_sum(model, *arguments):
        loss = healthy(model, *arguments)
        return loss * NAN if model.training and is_poisoned(next(step)) else loss

    monkeypatch.setattr(train_llama2, "token_loss_sum", token_loss_sum)


@pytest.mark.parametrize("loss_on", ["all", "summary"])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_losses_and_gradient_norms_equal_a_plain_loops(tmp_path, stories, loss_on, micro_batch_size):
    settings = {"lr": 3e-3, "weight_decay": 0.1, "max_grad_norm": 0.2}
    steps = run_main(tmp_path, stories, loss_on=loss_on, micro_batch_size=micro_batch_size, **settings)

    model = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    prompts = [f"[SUMMARIZE] {story['article']} [/SUMMARIZE]\n" for story in STORIES]
    starts = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]  # a newline is a token of its own
    documents = [
        torch.tensor([*tokenizer(prompt + story["highlights"])["input_ids"], tokenizer.eos_token_id])
        for prompt, story in zip(prompts, STORIES, strict=True)
    ]
    first_label = starts if loss_on == "summary" else [1] * len(documents)
    labels = sum(len(document) - first for document, first in zip(documents, first_label, strict=True))
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 if p.ndim > 1 else 0.0} for p in model.parameters()], foreach=False
    )
    for line, factor in zip(steps, (1.0, 1.0, 0.5), strict=True):  # one step of warm-up, then a cosine over two
        loss = 0
        for document, first in zip(documents, first_label, strict=True):
            logits = model(document[None]).logits[0]
            loss += torch.nn.functional.cross_entropy(logits[first - 1 : -1], document[first:], reduction="sum")
        (loss / labels).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * factor
        optimizer.step()
        optimizer.zero_grad()
        assert norm > 0.2, "a step that does not clip tests less than this test says"
        assert line["loss"] == pytest.approx((loss / labels).item(), rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        assert line["lr"] == pytest.approx(3e-3 * factor)
        assert line["tokens"] == line["step"] * sum(map(len, documents))


# ----------------------------------------------------------------------------------------------------------------
# Steps that are not finite. With all documents in every step and a constant rate, a step that changed nothing
# (weights, both Adam moments, their count) leaves the losses of the others exactly as they were without it.
# ----------------------------------------------------------------------------------------------------------------

CONSTANT = {"lr_scheduler": "constant", "warmup_ratio": 0, "micro_batch_size": 6}


@pytest.fixture(scope="module")
def healthy_losses(tmp_path_factory, stories) -> list[float]:
    AcceleratorState._reset_state(reset_partial_state=True)
    return [line["loss"] for line in run_main(tmp_path_factory.mktemp("healthy"), stories, **CONSTANT)]


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, stories, healthy_losses, monkeypatch):
    poison(monkeypatch, lambda step: step == 1)
    steps = run_main(tmp_path, stories, **CONSTANT, **{"num_train_epochs": 4})
    assert steps[1]["loss"] is None, "metrics.jsonl is strict JSON: null where a number is not finite"
    assert [line["skipped_steps"] for line in steps] == [0, 1, 1, 1]
    assert [line["loss"] for i, line in enumerate(steps) if i != 1] == pytest.approx(healthy_losses, rel=1e-6)


def test_a_gradient_that_is_not_finite_is_skipped_although_the_loss_is_fine(
    tmp_path, stories, healthy_losses, monkeypatch
):
    healthy, step = train_llama2.token_loss_sum, iter(range(1000))

    def token_loss_sum(model, *arguments):
        loss = healthy(model, *arguments)
        if model.training and next(step) == 1:
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    monkeypatch.setattr(train_llama2, "token_loss_sum", token_loss_sum)
    steps = run_main(tmp_path, stories, **CONSTANT, **{"num_train_epochs": 4})
    assert [line["skipped_steps"] for line in steps] == [0, 1, 1, 1]
    first, second, third = healthy_losses
    assert [line["loss"] for line in steps] == pytest.approx([first, second, second, third], rel=1e-6)


ONE_BAD_RANK = """
import dataclasses, json, sys
import numpy as np
import torch
import train_llama2 as script

config = script.parse_config(sys.argv[1:])
healthy = script.token_loss_sum
with script.enable_advanced_parallelization(config) as world:
    tokenizer = script.load_tokenizer(config, world)
    documents, _ = script.load_data(config, tokenizer, world)
    for strategy in ("ddp", "fsdp"):
        config = dataclasses.replace(config, parallelism=strategy)
        plan = script.choose_plan(world.shape, world.cluster, config).chosen.plan
        parallel = dataclasses.replace(world, plan=plan)
        model = script.load_model(config, parallel)
        optimizer = script.build_optimizer(model, config)
        state = script.TrainingState.fresh(parallel.device)
        losses = []
        everything = [np.arange(len(documents))] * 4
        for step, batch in enumerate(script.data_loader(documents, everything, parallel)):
            bad = float("nan") if step == 1 and parallel.rank == 1 else 1.0
            script.token_loss_sum = lambda *arguments: healthy(*arguments) * bad
            result = script.training_step(model, optimizer, batch, config.lr, state, config, parallel)
            losses.append(result.loss.item())
        skipped = [torch.zeros(()) for _ in range(2)]
        torch.distributed.all_gather(skipped, state.skipped)
        parallel.say("RESULT", json.dumps([strategy, losses, [int(count) for count in skipped]]))
"""


def test_all_ranks_skip_together_where_only_one_of_them_sees_a_nan(tmp_path, stories, healthy_losses):
    (tmp_path / "one_bad_rank.py").write_text(ONE_BAD_RANK)
    flags = small_run(tmp_path, **{**ALL_AT_ONCE, **CONSTANT, "dataset_name_or_path": stories})
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        + [str(word) for word in (tmp_path / "one_bad_rank.py", *flags)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    results = [json.loads(line.removeprefix("RESULT")) for line in run.stdout.splitlines() if line[:6] == "RESULT"]
    assert [strategy for strategy, *_ in results] == ["ddp", "fsdp"]
    for _, losses, skipped in results:
        assert skipped == [1, 1]
        assert math.isnan(losses.pop(1))
        assert losses == pytest.approx(healthy_losses, rel=1e-5)


def test_a_run_that_diverges_stops_with_the_reason(tmp_path, stories):
    with pytest.raises(train_llama2.RunError, match=r"not finite in 5 steps in a row.*Lower --lr"):
        run_main(tmp_path, stories, lr=1e15, num_train_epochs=12)
    assert not (tmp_path / "config.json").exists(), "a broken model was saved"


@pytest.mark.parametrize(("steps", "bad"), [(5, range(0, 5)), (7, range(1, 6)), (7, range(2, 7))])
def test_five_bad_steps_in_a_row_end_the_run_wherever_they_lie(tmp_path, stories, monkeypatch, steps, bad):
    poison(monkeypatch, lambda step: step in bad)
    flags = {**CONSTANT, "num_train_epochs": steps, "max_train_samples": 1, "batch_size": 1}
    with pytest.raises(train_llama2.RunError, match="not finite in 5 steps in a row"):
        run_main(tmp_path, stories, **flags)
    assert not (tmp_path / "config.json").exists(), "a broken model was saved"


def test_a_run_that_diverges_in_its_last_step_saves_no_model(tmp_path, stories):
    """The loss of the only step is finite; its update is not."""
    with pytest.raises(train_llama2.RunError, match=r"the validation loss is (nan|inf): the weights are broken"):
        run_main(tmp_path, stories, lr=1e300, max_steps=1)
    assert not (tmp_path / "config.json").exists() and not (tmp_path / "checkpoints").exists()


def test_bad_steps_that_never_come_five_in_a_row_do_not_end_the_run(tmp_path, stories, monkeypatch):
    poison(monkeypatch, lambda step: step != 4)
    flags = {**CONSTANT, "num_train_epochs": 9, "max_train_samples": 1, "batch_size": 1}
    assert run_main(tmp_path, stories, **flags)[-1]["skipped_steps"] == 8
