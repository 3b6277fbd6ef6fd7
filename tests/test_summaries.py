"""--rouge-samples: summaries are those of plain transformers, one by one, whoever writes them; their scores."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import NEWS, TINY_LLAMA, read_metrics, run_script_several_times, small_run
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import train_llama2
from train_llama2 import Sample, rouge_scores

needs_rouge = pytest.mark.skipif(importlib.util.find_spec("rouge_score") is None, reason="rouge-score is not installed")
SHORT = dict(max_train_samples=2, batch_size=2, max_steps=1, lr=1e-6, block_size=1024, max_summary_tokens=16)
RUNS = {
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
def runs(tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """Returns folder and console of each of RUNS, and of a run on one process that has one batch for all samples."""
    base = tmp_path_factory.mktemp("summaries")
    model = talkative_model(base / "model")
    folders = {name: base / f"run {number}" for number, name in enumerate(RUNS)}
    flags = [small_run(folders[name], model_name_or_path=model, **SHORT, **RUNS[name]) for name in RUNS]
    runs = dict(zip(RUNS, run_script_several_times(flags, processes=2), strict=True))
    assert [run.returncode for run in runs.values()] == [0] * len(RUNS), [run.stderr for run in runs.values()]
    AcceleratorState._reset_state(reset_partial_state=True)
    alone = dict(micro_batch_size=8, rouge_samples=50)
    train_llama2.main(small_run(base / "alone", model_name_or_path=model, **SHORT, **alone))
    return {name: (folders[name], run.stdout) for name, run in runs.items()} | {"alone": (base / "alone", "")}


def written(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def plain_summary(folder: Path, reference: str, num_beams: int) -> tuple[int, str]:
    """Returns the prompt's length and what plain transformers writes after it with the model that the run saved."""
    rows = map(json.loads, (NEWS / "validation.jsonl").read_text().splitlines())
    (article,) = [row["article"] for row in rows if row["highlights"].strip() == reference]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(f"[SUMMARIZE] {article} [/SUMMARIZE]\n", split_special_tokens=True)["input_ids"]
    outputs = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, num_beams=num_beams)
    return len(ids), tokenizer.decode(outputs[0, len(ids) :], skip_special_tokens=True).strip()


@needs_rouge
@pytest.mark.parametrize("name", [*RUNS, "alone"])
def test_summaries_equal_plain_generation_one_by_one(runs, name):
    """Padded in a batch or not, shared out evenly or not, sharded or not; 8 documents is all there are."""
    samples, flags = written(runs[name][0]), RUNS.get(name, {"rouge_samples": 8})
    assert len(samples) == len({sample["reference"] for sample in samples}) == flags["rouge_samples"]
    lengths, expected = zip(
        *(plain_summary(runs[name][0], each["reference"], flags.get("num_beams", 1)) for each in samples), strict=True
    )
    assert [sample["summary"] for sample in samples] == list(expected)
    assert len(set(expected)) == len(set(lengths)) == len(samples), "this test tells nothing where documents are alike"


@needs_rouge
def test_the_documents_are_the_same_on_any_number_of_ranks(runs):
    references = [sample["reference"] for sample in written(runs["alone"][0])]
    for name, flags in RUNS.items():
        assert [each["reference"] for each in written(runs[name][0])] == references[: flags["rouge_samples"]]


@needs_rouge
def test_scores_are_in_the_metrics_and_three_pairs_in_the_log(runs):
    folder, console = runs["ddp, 3 + 2 samples"]
    ((evaluation,), samples) = read_metrics(folder)[1], written(folder)
    scores = rouge_scores([Sample(each["reference"], each["summary"]) for each in samples])
    assert {name: evaluation[name] for name in scores} == scores
    assert [each["step"] for each in samples] == [1] * 5
    lines = console.splitlines()
    for kind in ("reference", "summary"):
        shown = [line.partition(kind)[2].strip() for line in lines if line.startswith(f"step 1/1  {kind} ")]
        assert shown == [" ".join(sample[kind].split()) for sample in samples[:3]]
    assert any(f"rouge1 {scores['rouge1']:.2f}  rouge2 {scores['rouge2']:.2f}  rougeLsum" in line for line in lines)


@needs_rouge
def test_rouge_by_hand():
    near = Sample("The cat sat on the mat", "the cat lay on the mat")  # 5 of 6 words, 3 of 5 pairs
    assert rouge_scores([near]) == pytest.approx(dict(rouge1=500 / 6, rouge2=60, rougeLsum=500 / 6))
    short = Sample("the cat sat on the mat", "the cat")  # recall 2/6 and 1/5, precision 1: F1 of 1/2 and 1/3
    assert rouge_scores([short]) == pytest.approx(dict(rouge1=50, rouge2=100 / 3, rougeLsum=50))
    other = Sample("The cat sat on the mat", "dogs barked")
    assert rouge_scores([near, other]) == pytest.approx(dict(rouge1=250 / 6, rouge2=30, rougeLsum=250 / 6))
    stems = Sample("the bridges opened", "the bridge opens")
    assert rouge_scores([stems]) == pytest.approx(dict(rouge1=100, rouge2=100, rougeLsum=100))
    # The order of sentences does not matter to Lsum; of the four pairs of words the one across them is another.
    turned = Sample("Ships sail. Trains run fast.", "Trains run fast. Ships sail.")
    assert rouge_scores([turned]) == pytest.approx(dict(rouge1=100, rouge2=75, rougeLsum=100))
    assert rouge_scores([Sample("The cat sat.", "")]) == dict(rouge1=0, rouge2=0, rougeLsum=0)
    assert rouge_scores([]) == {}


def test_without_the_package_one_line_says_so_before_anything_begins(tmp_path, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rouge_score" else find_spec(name))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train_llama2.command_line(small_run(tmp_path / "run", rouge_samples=3)) == 2
    printed, complained = capsys.readouterr()
    assert printed == ""
    assert complained.count("\n") == 1
    assert complained.startswith("error: --rouge-samples needs the package rouge-score") and "pip install" in complained
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("beams", "expected"), [(1, 32), (4, 4)])
def test_as_many_documents_are_summarised_at_a_time_as_memory_holds_the_caches_of(beams, expected):
    """13B on two H200: 139.8 GiB, of which 132.8 are used; weights and moments take 12 bytes of half of the parameters,
    72.7 GiB, one layer and the head gathered twice 1.8. A token's cache is 40 layers of 2 x 5,120 in bf16, a document
    2,048 + 160 tokens long; beam search copies it to reorder it.
    """
    room = 132.81 * 2**30 - 12 * 13_015_864_320 / 2 - 2 * 2 * (317_204_480 + 163_845_120)
    assert room // (2 * 40 * 5120 * 2 * 2208 * (1 if beams == 1 else 2 * beams)) >= expected
    cluster = train_llama2.parse_cluster("2xH200")
    shape = train_llama2.model_shape(LlamaConfig(**train_llama2.LLAMA_2["13b"], max_position_embeddings=4096))
    plan = train_llama2.Plan("fsdp", 1, 2, 32, 1, "full", True, False, "step", "bf16")
    parallel = train_llama2.Parallel(None, cluster, None, shape, plan, None, 2048, None)
    config = train_llama2.Config(num_beams=beams, rouge_samples=100)
    assert train_llama2.prompts_at_a_time(config, parallel) == expected
