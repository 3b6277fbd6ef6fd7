"""The step against a plain loop, steps that are not finite, the validation loss, and summaries with their scores."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    NEWS,
    RANKS,
    SMALL_LLAMA,
    TINY_LLAMA,
    fresh_accelerate,
    read_metrics,
    run_script_several_times,
    small_run,
    tiny_model,
    torchrun,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

import train_llama2
from train_llama2 import rouge_scores

pytestmark = pytest.mark.usefixtures("own_processes")

STORY = "The mayor opened the new bridge on Monday and thanked the builders for their work. "
# Six documents whose lengths differ by a factor of 14; the validation split is not the matter here.
STORIES = [{"article": STORY * n, "highlights": "A bridge. " * (1 + n % 3)} for n in (1, 7, 2, 12, 1, 4)]
ALL_AT_ONCE = {"batch_size": 6, "num_train_epochs": 3, "max_eval_samples": 1}  # every step sees all six documents
NAN = math.nan


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

    model = AutoModelForCausalLM.from_pretrained(SMALL_LLAMA, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(SMALL_LLAMA)
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
    fresh_accelerate()
    return [line["loss"] for line in run_main(tmp_path_factory.mktemp("healthy"), stories, **CONSTANT)]


def test_a_non_finite_step_changes_nothing_and_is_counted(tmp_path, stories, healthy_losses, monkeypatch):
    poison(monkeypatch, lambda step: step == 1)
    steps = run_main(tmp_path, stories, **CONSTANT, **{"num_train_epochs": 4})
    assert steps[1]["loss"] is None, "metrics.jsonl is strict JSON: null where a number is not finite"
    assert [line["skipped_steps"] for line in steps] == [0, 1, 1, 1]
    assert [line["loss"] for i, line in enumerate(steps) if i != 1] == pytest.approx(healthy_losses, rel=1e-6)


def test_a_non_finite_gradient_under_a_finite_loss_is_skipped(tmp_path, stories, healthy_losses, monkeypatch):
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


def test_all_ranks_skip_together_when_one_sees_a_nan(tmp_path, stories, healthy_losses):
    flags = small_run(tmp_path, **{**ALL_AT_ONCE, **CONSTANT, "dataset_name_or_path": stories})
    run = torchrun(RANKS / "one_bad_rank.py", *flags, processes=2)
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
def test_five_bad_steps_in_a_row_end_the_run_anywhere(tmp_path, stories, monkeypatch, steps, bad):
    poison(monkeypatch, lambda step: step in bad)
    flags = {**CONSTANT, "num_train_epochs": steps, "max_train_samples": 1, "batch_size": 1}
    with pytest.raises(train_llama2.RunError, match="not finite in 5 steps in a row"):
        run_main(tmp_path, stories, **flags)
    assert not (tmp_path / "config.json").exists(), "a broken model was saved"


def test_a_run_diverging_in_its_last_step_saves_no_model(tmp_path, stories):
    """The loss of the only step is finite; its update is not."""
    with pytest.raises(train_llama2.RunError, match=r"the validation loss is (nan|inf): the weights are broken"):
        run_main(tmp_path, stories, lr=1e300, max_steps=1)
    assert not (tmp_path / "config.json").exists() and not (tmp_path / "checkpoints").exists()


def test_fewer_than_five_bad_steps_in_a_row_are_survived(tmp_path, stories, monkeypatch):
    poison(monkeypatch, lambda step: step != 4)
    flags = {**CONSTANT, "num_train_epochs": 9, "max_train_samples": 1, "batch_size": 1}
    assert run_main(tmp_path, stories, **flags)[-1]["skipped_steps"] == 8


# ----------------------------------------------------------------------------------------------------------------
# Evaluation: the mean over the tokens of all documents, each counted once
# ----------------------------------------------------------------------------------------------------------------


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


def test_on_three_ranks_eval_loss_is_the_mean_over_tokens(three_rank_run):
    """The ranks have ragged ends."""
    _, folder = three_rank_run
    assert read_metrics(folder)[1][-1]["eval_loss"] == pytest.approx(mean_token_loss(folder), rel=1e-5)


@pytest.mark.parametrize("micro_batch_size", [3, 8])
def test_on_one_process_eval_loss_is_the_mean_over_tokens(tmp_path, micro_batch_size):
    train_llama2.main(small_run(tmp_path, max_steps=1, block_size=1024, micro_batch_size=micro_batch_size))
    evaluation = read_metrics(tmp_path)[1][0]
    expected = mean_token_loss(tmp_path)
    assert evaluation["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert evaluation["eval_perplexity"] == pytest.approx(2.718281828459045**expected, rel=1e-4)


def test_evaluations_come_at_the_interval_and_at_the_end(three_rank_run):
    assert [line["step"] for line in read_metrics(three_rank_run[1])[1]] == [2, 4, 5]


# ----------------------------------------------------------------------------------------------------------------
# Summaries: those of plain transformers, one by one, whoever writes them
# ----------------------------------------------------------------------------------------------------------------

needs_rouge = pytest.mark.skipif(importlib.util.find_spec("rouge_score") is None, reason="rouge-score is not installed")
SUMMARISED = dict(max_train_samples=2, batch_size=2, max_steps=1, lr=1e-6, block_size=1024, max_summary_tokens=16)
WAYS = {
    "ddp, 3 + 2 samples": {"parallelism": "ddp", "micro_batch_size": 2, "rouge_samples": 5},
    "fsdp, 3 + 2 samples": {"parallelism": "fsdp", "micro_batch_size": 2, "rouge_samples": 5},
    "fsdp, 1 + 0 samples": {"parallelism": "fsdp", "micro_batch_size": 2, "rouge_samples": 1},
    "fsdp, 2 + 1 samples, beams": {"parallelism": "fsdp", "micro_batch_size": 1, "rouge_samples": 3, "num_beams": 3},
}


def talkative_model(folder: Path) -> Path:
    """Writes a model of large random weights: what it says, and how long, differs by document."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(TINY_LLAMA, initializer_range=0.3))
    with torch.no_grad():
        model.lm_head.weight[2] *= 2.5
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_LLAMA).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def summaries(tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """Returns folder and console of each of WAYS, and of one process with one batch for all samples."""
    base = tmp_path_factory.mktemp("summaries")
    model = talkative_model(base / "model")
    folders = {name: base / f"run {number}" for number, name in enumerate(WAYS)}
    flags = [small_run(folders[name], model_name_or_path=model, **SUMMARISED, **WAYS[name]) for name in WAYS]
    runs = dict(zip(WAYS, run_script_several_times(flags, processes=2), strict=True))
    assert [run.returncode for run in runs.values()] == [0] * len(WAYS), [run.stderr for run in runs.values()]
    fresh_accelerate()
    alone = dict(micro_batch_size=8, rouge_samples=50)
    train_llama2.main(small_run(base / "alone", model_name_or_path=model, **SUMMARISED, **alone))
    return {name: (folders[name], run.stdout) for name, run in runs.items()} | {"alone": (base / "alone", "")}


def written(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def plain_summary(folder: Path, reference: str, num_beams: int) -> tuple[int, str, bool]:
    """Returns the prompt's length, what plain transformers writes after it with the saved model, and if that ended."""
    rows = map(json.loads, (NEWS / "validation.jsonl").read_text().splitlines())
    (article,) = [row["article"] for row in rows if row["highlights"].strip() == reference]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(f"[SUMMARIZE] {article} [/SUMMARIZE]\n", split_special_tokens=True)["input_ids"]
    outputs = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, num_beams=num_beams)
    answer = outputs[0, len(ids) :]
    return len(ids), tokenizer.decode(answer, skip_special_tokens=True).strip(), tokenizer.eos_token_id in answer


@needs_rouge
@pytest.mark.parametrize("name", [*WAYS, "alone"])
def test_summaries_equal_plain_generation_one_by_one(summaries, name):
    """Padded in a batch or not, shared out evenly or not, sharded or not; 8 documents is all there are."""
    samples, flags = written(summaries[name][0]), WAYS.get(name, {"rouge_samples": 8})
    assert len(samples) == len({sample["reference"] for sample in samples}) == flags["rouge_samples"]
    lengths, expected, _ = zip(
        *(plain_summary(summaries[name][0], each["reference"], flags.get("num_beams", 1)) for each in samples),
        strict=True,
    )
    assert [sample["summary"] for sample in samples] == list(expected)
    assert len(set(expected)) == len(set(lengths)) == len(samples), "this test tells nothing where documents are alike"


@needs_rouge
def test_the_documents_are_the_same_on_any_number_of_ranks(summaries):
    references = [sample["reference"] for sample in written(summaries["alone"][0])]
    for name, flags in WAYS.items():
        assert [each["reference"] for each in written(summaries[name][0])] == references[: flags["rouge_samples"]]


@needs_rouge
def test_metrics_have_the_scores_and_the_log_three_pairs(summaries):
    folder, console = summaries["ddp, 3 + 2 samples"]
    ((evaluation,), samples) = read_metrics(folder)[1], written(folder)
    scores = rouge_scores(samples)
    assert {name: evaluation[name] for name in scores} == scores
    assert [each["step"] for each in samples] == [1] * 5
    lines = console.splitlines()
    for kind in ("reference", "summary"):
        shown = [line.partition(kind)[2].strip() for line in lines if line.startswith(f"step 1/1  {kind} ")]
        assert shown == [" ".join(sample[kind].split()) for sample in samples[:3]]
    assert any(f"rouge1 {scores['rouge1']:.2f}  rouge2 {scores['rouge2']:.2f}  rougeLsum" in line for line in lines)


def sample(reference: str, summary: str) -> dict[str, str]:
    return dict(reference=reference, summary=summary)


@needs_rouge
def test_rouge_by_hand():
    near = sample("The cat sat on the mat", "the cat lay on the mat")  # 5 of 6 words, 3 of 5 pairs
    assert rouge_scores([near]) == pytest.approx(dict(rouge1=500 / 6, rouge2=60, rougeLsum=500 / 6))
    short = sample("the cat sat on the mat", "the cat")  # recall 2/6 and 1/5, precision 1: F1 of 1/2 and 1/3
    assert rouge_scores([short]) == pytest.approx(dict(rouge1=50, rouge2=100 / 3, rougeLsum=50))
    other = sample("The cat sat on the mat", "dogs barked")
    assert rouge_scores([near, other]) == pytest.approx(dict(rouge1=250 / 6, rouge2=30, rougeLsum=250 / 6))
    stems = sample("the bridges opened", "the bridge opens")
    assert rouge_scores([stems]) == pytest.approx(dict(rouge1=100, rouge2=100, rougeLsum=100))
    # The order of sentences does not matter to Lsum; of the four pairs of words the one across them is another.
    turned = sample("Ships sail. Trains run fast.", "Trains run fast. Ships sail.")
    assert rouge_scores([turned]) == pytest.approx(dict(rouge1=100, rouge2=75, rougeLsum=100))
    assert rouge_scores([sample("The cat sat.", "")]) == dict(rouge1=0, rouge2=0, rougeLsum=0)
    assert rouge_scores([]) == {}


@pytest.mark.parametrize("name", ["rouge_samples", "test_samples"])
def test_without_the_package_one_line_says_so_before_anything_begins(tmp_path, capsys, monkeypatch, name):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rouge_score" else find_spec(name))
    assert train_llama2.command_line(small_run(tmp_path / "run", **{name: 3})) == 2
    printed, complained = capsys.readouterr()
    assert printed == ""
    assert complained.count("\n") == 1
    assert complained.startswith(f"error: {train_llama2.flag_name(name)} needs the package rouge-score")
    assert "pip install" in complained
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("beams", "expected"), [(1, 32), (4, 4)])
def test_as_many_documents_are_summarised_together_as_memory_holds_caches(beams, expected):
    """13B on two H200: 139.8 GiB, of which 132.8 are used; weights and moments take 12 bytes of half of the parameters,
    72.7 GiB, one layer and the head gathered twice 1.8. A token's cache is 40 layers of 2 x 5,120 in bf16, a document
    2,048 + 160 tokens long; beam search copies it to reorder it.
    """
    room = 132.81 * 2**30 - 12 * 13_015_864_320 / 2 - 2 * 2 * (317_204_480 + 163_845_120)
    assert room // (2 * 40 * 5120 * 2 * 2208 * (1 if beams == 1 else 2 * beams)) >= expected
    cluster = train_llama2.parse_cluster("2xH200")
    shape = train_llama2.model_shape(LlamaConfig(**train_llama2.LLAMA_2["13b"], max_position_embeddings=4096))
    plan = train_llama2.Plan(dp_shard_size=2, micro_batch_size=32, activation_checkpointing="full")
    config = train_llama2.Config(num_beams=beams, rouge_samples=100)
    parallel = train_llama2.Parallel(config, None, cluster, None, shape, plan, None)
    assert train_llama2.prompts_at_a_time(parallel) == expected


def test_ddps_buckets_leave_less_room_for_caches():
    """7B in bf16 on two H100: 75.1 GiB are used, of which weights, moments and buckets take 8 bytes a parameter, 50.2,
    and what is gathered 1.2. Four beams of a document take 8.6 GiB.
    """
    shape = train_llama2.model_shape(LlamaConfig(**train_llama2.LLAMA_2["7b"], max_position_embeddings=4096))
    plan = train_llama2.Plan(dp_replicate_size=2, micro_batch_size=32, precision="bf16-states")
    config, cluster = train_llama2.Config(num_beams=4, rouge_samples=100), train_llama2.parse_cluster("2xH100-80GB")
    parallel = train_llama2.Parallel(config, None, cluster, None, shape, plan, None)
    assert train_llama2.prompts_at_a_time(parallel) == (75.1 - 50.2 - 1.2) // 8.6 == 2


# ----------------------------------------------------------------------------------------------------------------
# The test split: eight documents, and an empty one in row 2. Two FSDP ranks are stopped after the first call of both,
# and one process goes on.
# ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tested(tmp_path_factory) -> SimpleNamespace:
    """Returns the folder, what each of two starts left of summaries and said, and the prompts that the second wrote."""
    pytest.importorskip("rouge_score", reason="rouge-score is not installed")
    base = tmp_path_factory.mktemp("tested")
    (base / "news").mkdir()
    for split in ("train", "validation"):
        shutil.copy(NEWS / f"{split}.jsonl", base / "news")
    rows = (NEWS / "validation.jsonl").read_text().splitlines()
    empty = json.dumps(dict(json.loads(rows[0]), highlights=" "))
    (base / "news" / "test.jsonl").write_text("\n".join([*rows[:2], empty, *rows[2:]]) + "\n")
    flags = dict(model_name_or_path=talkative_model(base / "model"), dataset_name_or_path=base / "news")
    flags |= dict(SUMMARISED, test_samples="all", rouge_samples=1, save_interval=1)
    result = SimpleNamespace(folder=base / "run", flags=flags, rows=[json.loads(row) for row in rows], prompts=[])
    fsdp = small_run(result.folder, **flags, parallelism="fsdp", micro_batch_size=1)
    stopped = torchrun(RANKS / "interrupted_run.py", "sigusr1_in_the_test", *fsdp, processes=2)
    assert stopped.returncode == 0, stopped.stderr
    result.said, result.kept, result.model = stopped.stdout, test_samples(result.folder), model_times(result.folder)
    result.lines_of_stopped = [line for line in lines_of(result.folder) if "test_samples" in line]
    result.prompts = start_counting_prompts(result.folder, **flags, micro_batch_size=4)
    return result


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def model_times(folder: Path) -> dict[str, int]:
    return {
        file.name: file.stat().st_mtime_ns for file in folder.glob("*.*") if file.suffix in (".json", ".safetensors")
    }


def test_samples(folder: Path) -> list[dict]:
    return [sample for sample in written(folder) if sample["split"] == "test"]


test_samples.__test__ = False


def start_counting_prompts(folder: Path, **flags: object) -> list[int]:
    """Runs the script in this process. Returns the lengths of the prompts that it summarised, validation included."""
    lengths, pad_prompts = [], train_llama2.pad_prompts
    fresh_accelerate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_llama2, "pad_prompts", lambda p, t: lengths.extend(map(len, p)) or pad_prompts(p, t))
        train_llama2.main(small_run(folder, **flags))
    (folder / ".lock").open().close()
    return lengths


def test_a_models_own_penalties_do_not_change_its_summaries(tmp_path):
    """They would come from its generation_config.json, and the folder that is saved does not have them."""
    summaries = []
    for name, penalties in (("plain", {}), ("penalised", dict(repetition_penalty=9.0, no_repeat_ngram_size=1))):
        model = tiny_model(tmp_path / name)
        GenerationConfig(eos_token_id=2, **penalties).save_pretrained(model)
        flags = dict(model_name_or_path=model, max_steps=1, test_samples=3, block_size=64, max_summary_tokens=6)
        folder = tmp_path / f"run of {name}"
        shutil.copytree(NEWS, tmp_path / "news", dirs_exist_ok=True)
        shutil.copy(NEWS / "validation.jsonl", tmp_path / "news" / "test.jsonl")
        start_counting_prompts(folder, **flags, dataset_name_or_path=tmp_path / "news", max_eval_samples=1)
        summaries.append([sample["summary"] for sample in test_samples(folder)])
    assert len(summaries[0]) == 3 and summaries[0] == summaries[1]


def test_a_stopped_test_goes_on_with_other_ranks(tested):
    assert len(tested.kept) == 2 and not tested.lines_of_stopped
    assert "test      2/8 summaries are kept; the same command writes the others" in tested.said
    assert "after step 1; the checkpoint is saved, and the same command resumes from it" in tested.said
    assert len(tested.prompts) == 6, "summaries that were done were written again, or others were not"
    samples = test_samples(tested.folder)
    assert samples[:2] == tested.kept
    assert sorted(sample["index"] for sample in samples) == [0, 1, 3, 4, 5, 6, 7, 8]
    assert {sample["made_by"] for sample in samples} == {tested.kept[0]["made_by"]}


def test_the_model_is_not_written_again_for_the_test(tested):
    times = model_times(tested.folder)
    assert {"config.json", "model.safetensors"} <= tested.model.keys()
    assert {name: times[name] for name in times if name != "train_config.json"} == {
        name: time for name, time in tested.model.items() if name != "train_config.json"
    }


def test_test_summaries_equal_plain_generation_with_their_ends(tested):
    samples = test_samples(tested.folder)
    for sample in samples:
        row = tested.rows[sample["index"] - (sample["index"] > 2)]
        assert sample["reference"] == row["highlights"].strip()
        _, summary, ended = plain_summary(tested.folder, sample["reference"], num_beams=1)
        assert (sample["summary"], sample["ended"]) == (summary, ended)
    assert {sample["ended"] for sample in samples} == {True, False}


def test_the_test_line_has_scores_with_intervals_and_lead_3(tested):
    (line,) = [line for line in lines_of(tested.folder) if "test_samples" in line]
    samples = sorted(test_samples(tested.folder), key=lambda sample: sample["index"])
    first_three = [
        dict(sample, summary=" ".join(re.split(r"(?<=[.!?])\s+", row["article"].strip())[:3]))
        for sample, row in zip(samples, tested.rows, strict=True)
    ]
    assert line["step"] == 1 and line["test_samples"] == 8
    for prefix, some in (("test_", samples), ("test_lead3_", first_three)):
        for name, score in rouge_scores(some).items():
            assert line[prefix + name] == pytest.approx(score)
            assert line[f"{prefix}{name}_low"] <= score <= line[f"{prefix}{name}_high"]
    assert line["test_lead3_rouge1_high"] - line["test_lead3_rouge1_low"] > 1
    assert line["test_mean_words"] == np.mean([len(sample["summary"].split()) for sample in samples])
    assert line["test_ended_share"] == np.mean([sample["ended"] for sample in samples])


def test_a_finished_test_changes_nothing_when_started_again(tested, tmp_path):
    folder = shutil.copytree(tested.folder, tmp_path / "copy")
    before = [(folder / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl", "README.md")]
    assert start_counting_prompts(folder, **tested.flags, micro_batch_size=4) == []
    assert [(folder / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl", "README.md")] == before


def test_fewer_or_more_documents_reuse_what_is_written(tested, tmp_path):
    folder = shutil.copytree(tested.folder, tmp_path / "copy")
    (folder / "samples.jsonl").unlink()
    drawn = start_counting_prompts(folder, **dict(tested.flags, test_samples=3))
    assert len(drawn) == 3 and lines_of(folder)[-1]["test_samples"] == 3
    assert len(start_counting_prompts(folder, **tested.flags)) == 5
    assert lines_of(folder)[-1] == next(line for line in lines_of(tested.folder) if "test_samples" in line)


def test_summaries_of_other_flags_never_count(tested, tmp_path):
    folder = shutil.copytree(tested.folder, tmp_path / "copy")
    assert len(start_counting_prompts(folder, **dict(tested.flags, max_summary_tokens=4))) == 8
    assert len(test_samples(folder)) == 8
    assert all(sample["made_by"] != tested.kept[0]["made_by"] for sample in test_samples(folder))


def test_summaries_of_other_weights_of_the_step_never_count(tested, tmp_path):
    """The checkpoint of the last step is deleted, and the step taken again at another rate, up to its save."""
    folder = shutil.copytree(tested.folder, tmp_path / "copy")
    shutil.rmtree(folder / "checkpoints" / "step-000001")
    shutil.copytree(tested.folder / "checkpoints" / "step-000001", tmp_path / "first")
    flags = dict(tested.flags, lr=1e-2, resume_anyway=True)
    (folder / "samples.jsonl").rename(tmp_path / "samples.jsonl")
    start_counting_prompts(folder, **dict(flags, test_samples=0))
    model = (folder / "model.safetensors").read_bytes()
    (tmp_path / "samples.jsonl").rename(folder / "samples.jsonl")  # as if the kill had come before anything was dropped
    assert len(start_counting_prompts(folder, **flags)) == 8
    assert (folder / "model.safetensors").read_bytes() == model != (tested.folder / "model.safetensors").read_bytes()


# ----------------------------------------------------------------------------------------------------------------
# On a GPU
# ----------------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@contextlib.contextmanager
def gpu_step(**flags: object) -> Iterator[Callable[[], None]]:
    """Inside, a call takes one training step of a tiny Llama on one GPU, with four micro-batches; two are taken."""
    config = train_llama2.parse_config(small_run(Path("unused"), batch_size=8, micro_batch_size=2, **flags))
    with train_llama2.enable_advanced_parallelization(config) as parallel:
        tokenizer = train_llama2.load_tokenizer(parallel)
        documents, *_ = train_llama2.load_data(tokenizer, parallel)
        model = train_llama2.load_model(parallel)
        optimizer = train_llama2.build_optimizer(model, config)
        train_llama2.compile_layers(model, parallel, steps=10**6)
        batch = train_llama2.global_batch(documents, np.arange(8), parallel)
        state = train_llama2.TrainingState.fresh(parallel.device)

        def step() -> None:
            train_llama2.training_step(model, optimizer, batch, 1e-5, state, parallel)

        step()
        step()
        yield step


def kernel_launches(step: Callable[[], None]) -> int:
    """Counts with CUPTI, or with `counters()["launches"]` of the module that $COUNTERS_MODULE names."""
    if name := os.environ.get("COUNTERS_MODULE"):
        counters = importlib.import_module(name).counters
        before = counters()["launches"]
        step()
        return counters()["launches"] - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
    return sum(event.count for event in profile.key_averages() if "LaunchKernel" in event.key)


@needs_gpu
@pytest.mark.parametrize("packing", ["yes", "no"])
@pytest.mark.parametrize("precision", ["bf16", "bf16-states"])
def test_a_step_never_waits_for_the_gpu(packing, precision):
    with gpu_step(packing=packing, precision=precision, compile="no") as step:
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_compiled_layers_launch_fewer_kernels(tmp_path):
    with gpu_step(compile="no") as step:
        eager = kernel_launches(step)
        assert kernel_launches(step) == eager, "a step launches as many as the one before"
    fresh_accelerate()
    with gpu_step(compile="yes") as step:
        assert 0 < kernel_launches(step) < 0.8 * eager
