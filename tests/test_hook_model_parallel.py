"""Pipeline stages and tensor parallelism: losses, summaries, checkpoints and the final model are one process's."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import (
    RANKS,
    TINY_LLAMA,
    assert_same_run,
    read_metrics,
    run_script,
    run_script_several_times,
    saved,
    small_run,
    torchrun,
    tree,
)
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from train_llama2 import (
    Config,
    Pipeline,
    Plan,
    UserError,
    candidate_plans,
    layers_of_stages,
    model_shape,
    parse_cluster,
)

# 15 documents in batches of 7: each third step has one document, which leaves a second data rank without any
SIX_STEPS = dict(
    model_name_or_path=TINY_LLAMA,
    max_train_samples=15,
    batch_size=7,
    num_train_epochs=2,
    max_grad_norm=0.5,
    micro_batch_size=2,
    block_size=128,
    eval_interval=3,
    save_interval=3,
    keep_checkpoints=2,
    max_eval_samples=3,
    activation_checkpointing="none",
)
SUMMARIES = dict(rouge_samples=3, max_summary_tokens=8)
PACKED = dict(packing="yes")
PP2, PP4 = dict(pipeline_parallel_size=2), dict(pipeline_parallel_size=4)
TP2, TP4 = dict(tensor_parallel_size=2), dict(tensor_parallel_size=4)
FSDP, REPLICAS = dict(parallelism="fsdp"), dict(parallelism="hsdp", hsdp_shard_size=1)
RECOMPUTED = dict(activation_checkpointing="full")
ONE_PROCESS = {
    "padded": SUMMARIES,
    "packed": PACKED,
    "beams": SUMMARIES | dict(num_beams=2),
    "summary": dict(loss_on="summary"),
    "skipped": {},
}
CUT = {  # by name, which holds that of the run of one process that it must equal
    "padded, 2 stages": (2, PP2 | SUMMARIES),
    "packed, 2 stages": (2, PP2 | PACKED | RECOMPUTED),
    "2 stages, skipped": (2, PP2),
    "padded, split in 2": (2, TP2 | SUMMARIES),
    "packed, split in 2": (2, TP2 | PACKED | dict(activation_checkpointing="every-2")),
    "split in 2, bf16-states": (2, TP2 | dict(precision="bf16-states")),
    "padded, 4 stages": (4, PP4 | SUMMARIES),
    "beams, 2 stages, fsdp 2": (4, PP2 | FSDP | SUMMARIES | dict(num_beams=2)),
    "padded, 2 stages, 2 replicas": (4, PP2 | REPLICAS | dict(reshard_after_forward="no")),
    "packed, split in 2, fsdp 2": (4, TP2 | FSDP | PACKED | RECOMPUTED),
    "beams, split in 2, 2 stages": (4, TP2 | PP2 | SUMMARIES | dict(num_beams=2)),
}
if os.environ.get("EVERY_CUT"):  # these take minutes on two cores, those that compile most
    CUT |= {
        "padded, 2 stages, recomputed": (2, PP2 | dict(activation_checkpointing="every-2")),
        "padded, 2 stages, compiled": (2, PP2 | dict(compile="yes")),
        "summary, split in 2": (2, TP2 | dict(loss_on="summary")),
        "split in 2, skipped": (2, TP2),
        "padded, split in 2, compiled": (2, TP2 | dict(compile="yes")),
        "padded, split in 2, compiled, recomputed": (2, TP2 | RECOMPUTED | dict(compile="yes")),
        "padded, 4 stages, one micro-batch": (4, PP4 | dict(micro_batch_size=7)),
        "packed, 4 stages": (4, PP4 | PACKED),
        "packed, 2 stages, fsdp 2": (4, PP2 | FSDP | PACKED | RECOMPUTED),
        "2 stages, fsdp 2, skipped": (4, PP2 | FSDP),
        "padded, split in 4": (4, TP4 | SUMMARIES),
        "padded, split in 2, 2 replicas": (4, TP2 | REPLICAS),
        "packed, split in 2, 2 stages": (4, TP2 | PP2 | PACKED),
        "packed, split in 2, fsdp 2, compiled": (
            4,
            TP2 | FSDP | PACKED | dict(compile="yes", activation_checkpointing="every-2"),
        ),
        "padded, split in 2, 2 stages, fsdp 2": (8, TP2 | PP2 | FSDP | SUMMARIES),
    }
LLAMA = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)


def run_all(base: Path, runs: dict[str, dict], processes: int) -> dict[str, SimpleNamespace]:
    """Runs the script with the flags of each, in the ranks of one torchrun, in a folder of that name."""
    flags = [small_run(base / name, **{**SIX_STEPS, **each}) for name, each in runs.items()]
    ended = run_script_several_times(flags, processes, before=[RANKS / "note_stages.py"], timeout=600)
    for each in ended:
        assert each.returncode == 0, each.stderr
    return dict(zip(runs, ended, strict=True))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[SimpleNamespace, Path]]:
    """Returns every run and its folder by name."""
    base = tmp_path_factory.mktemp("runs")
    needed = {each for each in ONE_PROCESS for name in (*CUT, *MOVES) if each in name}
    ended = run_all(base, {name: flags for name, flags in ONE_PROCESS.items() if name in needed}, 1)
    for processes in sorted({ranks for ranks, _ in CUT.values()}):
        ended |= run_all(base, {name: flags for name, (ranks, flags) in CUT.items() if ranks == processes}, processes)
    return {name: (run, base / name) for name, run in ended.items()}


def expected_run(name: str) -> str:
    return next(each for each in ONE_PROCESS if each in name)


COMPARED = [name for name in CUT if not name.endswith(("skipped", "bf16-states"))]


@pytest.mark.parametrize("name", COMPARED)
def test_losses_equal_one_processs(runs, name):
    folder, expected = runs[name][1], runs[expected_run(name)][1]
    assert_same_run(folder, expected)
    steps, _ = read_metrics(folder)
    assert len(steps) == 6
    assert sum(step["grad_norm"] > SIX_STEPS["max_grad_norm"] for step in steps) >= 3


@pytest.mark.parametrize("name", [name for name in CUT if "skipped" in name])
def test_an_infinite_gradient_on_some_ranks_skips_all(runs, name):
    (steps, _), (expected, _) = (read_metrics(runs[each][1]) for each in (name, "skipped"))
    assert [step["skipped_steps"] for step in steps] == [0, 0, 1, 1, 1, 1]
    assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in expected], abs=1e-5)


@pytest.mark.parametrize("name", [name for name, (_, flags) in CUT.items() if "rouge_samples" in flags])
def test_summaries_equal_one_processs(runs, name):
    summaries = (runs[name][1] / "samples.jsonl").read_text()
    assert summaries.count("\n") == 2 * SUMMARIES["rouge_samples"]
    assert summaries == (runs[expected_run(name)][1] / "samples.jsonl").read_text()


@pytest.mark.parametrize(
    "name", ["padded, 2 stages", "beams, 2 stages, fsdp 2", "padded, split in 2", "beams, split in 2, 2 stages"]
)
def test_the_final_model_is_one_processs(runs, name):
    folder, expected = runs[name][1], runs[expected_run(name)][1]
    assert {path.name for path in folder.iterdir()} == {path.name for path in expected.iterdir()}
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        assert tree(folder)[file] == tree(expected)[file]
    weights, expected_weights = (load_file(each / "model.safetensors") for each in (folder, expected))
    assert list(weights) == list(expected_weights)
    for weight, expected_weight in zip(weights.values(), expected_weights.values(), strict=True):
        assert weight.dtype == expected_weight.dtype
        torch.testing.assert_close(weight, expected_weight, rtol=0, atol=1e-4)  # Adam enlarges rounding


@pytest.mark.parametrize("name", ["padded, 2 stages", "padded, 4 stages", "beams, 2 stages, fsdp 2"])
def test_each_rank_holds_the_parameters_of_its_stage_alone(runs, name):
    line = next(line for line in runs[name][0].stdout.splitlines() if line.startswith("STAGES"))
    of_ranks = json.loads(line.removeprefix("STAGES"))
    stages = CUT[name][1]["pipeline_parallel_size"]
    of_stages = of_ranks[:: len(of_ranks) // stages]
    for rank, names in enumerate(of_ranks):
        assert names == of_stages[rank * stages // len(of_ranks)]
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY_LLAMA)
    assert [name for names in of_stages for name in names] == [name for name, _ in model.named_parameters()]


MOVES = {  # by what saved the checkpoint: on how many processes the run goes on, and with which flags
    "packed, split in 2, fsdp 2": (1, PACKED),
    "padded, 2 stages, 2 replicas": (2, PP2),
    "beams, split in 2, 2 stages": (2, FSDP | SUMMARIES | dict(num_beams=2)),
    "padded": (4, PP2 | FSDP),
    "beams": (4, TP2 | FSDP | SUMMARIES | dict(num_beams=2)),
    "padded, 4 stages": (4, PP2 | REPLICAS),
}
if os.environ.get("EVERY_CUT"):
    MOVES |= {
        "packed, 2 stages, fsdp 2": (1, PACKED),
        "padded, 2 stages": (4, FSDP),
        "padded, split in 2, 2 replicas": (4, TP2 | PP2),
    }


@pytest.fixture(scope="module")
def moved(runs, tmp_path_factory) -> dict[str, tuple[SimpleNamespace, Path]]:
    """Returns by its first part every run that went on from step 3 under another plan, and its folder."""
    base, ended = tmp_path_factory.mktemp("moved"), {}
    for processes in (1, 2, 4):
        flags_of = {name: flags for name, (ranks, flags) in MOVES.items() if ranks == processes}
        for name in flags_of:
            shutil.copytree(runs[name][1], base / name)
            shutil.rmtree(base / name / "checkpoints" / "step-000006")
        ended |= run_all(base, flags_of, processes)
    return {name: (run, base / name) for name, run in ended.items()}


def test_norms_stay_equal_on_ranks_that_split_a_layer(runs):
    """Each rank sees the gradient of its own tokens alone, and AdamW in bf16 works on what each rank holds."""
    line = next(line for line in runs["split in 2, bf16-states"][0].stdout.splitlines() if line.startswith("NORMS"))
    first, second = json.loads(line.removeprefix("NORMS"))
    assert len(first) == 9 and first == second


@pytest.mark.parametrize("name", MOVES)
def test_a_checkpoint_moves_between_plans(runs, moved, name):
    run, folder = moved[name]
    assert "resume    from" in run.stdout and "step-000003, saved with" in run.stdout
    metrics, expected = (read_metrics(each) for each in (folder, runs[expected_run(name)][1]))
    for lines, expected_lines, value in zip(metrics, expected, ("loss", "eval_loss"), strict=True):
        assert [line["step"] for line in lines] == [line["step"] for line in expected_lines]
        assert [line[value] for line in lines] == pytest.approx([line[value] for line in expected_lines], abs=1e-5)


def interrupted(act: str, folder: Path, **environment: str) -> SimpleNamespace:
    flags = small_run(folder, **{**SIX_STEPS, **PP2, "save_interval": 2})
    return torchrun(RANKS / "staged_run.py", act, *flags, processes=2, **environment)


def test_torchrun_restarts_a_killed_stage_and_the_run_goes_on(runs, tmp_path):
    run = interrupted("kill_rank_1_after_step_5", tmp_path, PET_MAX_RESTARTS="1")
    assert run.returncode == 0, run.stderr
    assert "resume    from" in run.stdout
    losses, expected = ([line["loss"] for line in read_metrics(each)[0]] for each in (tmp_path, runs["padded"][1]))
    assert losses == pytest.approx(expected, abs=1e-5)


def test_a_signal_to_one_stage_saves_all_at_one_step(tmp_path):
    run = interrupted("sigterm_to_rank_1_after_step_3", tmp_path)
    assert run.returncode == 0, run.stderr
    assert "after step 3; the checkpoint is saved" in run.stdout
    assert saved(tmp_path)[-1] == "step-000003"


def test_a_stage_that_hangs_before_training_is_named(tmp_path):
    run = interrupted("hang_rank_1_before_its_first_forward", tmp_path)
    assert run.returncode == 1
    [line] = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert "rank 0, stage 1 of 2, has waited" in line and line.endswith("for rank 1 to receive")


def test_a_model_that_cannot_be_cut_is_refused_once(tmp_path):
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig.from_pretrained(TINY_LLAMA, tie_word_embeddings=True)
    ).save_pretrained(tmp_path / "tied")
    run = run_script(*small_run(tmp_path / "run", **PP2, model_name_or_path=tmp_path / "tied"), processes=2)
    [line] = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert line == (
        "error: --pipeline-parallel-size 2 cannot be had here: the model's embedding and head are one matrix, "
        "which would lie on two stages; leave it out"
    )
    assert "exitcode  : 2" in run.stderr


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (dict(pipeline_parallel_size=8), "needs a layer for each stage, and the model has 4; use at most that"),
        (dict(pipeline_parallel_size=3), "for each of 3 parts of the model, and 8 were started; .* --nproc_per_node"),
        (PP2 | dict(parallelism="ddp"), "--parallelism ddp does not go with --pipeline-parallel-size 2; use hsdp"),
        (
            PP2 | dict(parallelism="none", tensor_parallel_size=1),
            "runs one process for each part of the model, but there are 4",
        ),
        (PP2 | dict(parallelism="hsdp", hsdp_shard_size=4), "groups of at least 1 ranks for each part of the model"),
        (dict(parallelism="hsdp", hsdp_shard_size=1, tensor_parallel_size=1), "groups of at least 2 ranks"),
        (dict(tensor_parallel_size=3), "3 cannot be had here: it does not divide 8, of which the tokens"),
        (dict(tensor_parallel_size=8), "8 cannot be had here: it does not divide the model's 4 heads"),
        (TP2 | dict(parallelism="ddp"), "--parallelism ddp does not go with --tensor-parallel-size 2; use hsdp"),
        (
            TP2 | dict(parallelism="fsdp", cpu_offload="yes"),
            "--cpu-offload yes does not go with --tensor-parallel-size",
        ),
        (TP4 | dict(parallelism="none"), "runs one process for each part of the model, but there are 2"),
        (TP4 | PP4, "--pipeline-parallel-size 4 and --tensor-parallel-size 4 needs .* 16 parts .* and 8 were started"),
    ],
    ids=str,
)
def test_parts_that_cannot_work_are_refused(config, rule):
    shape = model_shape(transformers.LlamaConfig(**LLAMA))
    with pytest.raises(UserError, match=rule):
        candidate_plans(shape, parse_cluster("8xH100-80GB"), Config(**config))


def test_tensor_parallelism_on_too_few_processes_names_nproc():
    shape, cluster = model_shape(transformers.LlamaConfig(**LLAMA)), parse_cluster("1xH100-80GB")
    with pytest.raises(UserError, match=r"does not divide the 1 rank\(s\) of a node; .* --nproc_per_node"):
        candidate_plans(shape, cluster, Config(**TP2))


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("Llama", {}, ""),
        ("Mistral", {}, ""),
        ("Qwen3", dict(head_dim=8), ""),
        ("Llama", dict(tie_word_embeddings=True), "one matrix"),
        ("Mixtral", dict(output_router_logits=True), "routers' loss"),
        ("Gemma2", {}, "several kinds"),
        ("Granite", dict(embedding_multiplier=2.0), "more than Llama's"),  # each stage would multiply again
        ("GPTNeoX", {}, "more than Llama's"),
        ("GPT2", {}, "more than Llama's"),
    ],
)
def test_models_are_cut_only_where_layers_pass_hidden_states_alone(kind, changes, reason):
    settings = LLAMA | dict(tie_word_embeddings=False) | changes
    uncuttable = model_shape(getattr(transformers, f"{kind}Config")(**settings)).uncuttable
    assert reason in uncuttable and bool(reason) == bool(uncuttable)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("Llama", {}, ""),
        ("Mistral", dict(sliding_window=None), ""),
        ("Qwen2", dict(use_sliding_window=False), ""),  # with biases on query, key and value
        ("Llama", dict(tie_word_embeddings=True), "one matrix"),
        (
            "Llama",
            dict(attention_bias=True),
            "its model.layers.0.self_attn.o_proj.bias is in no module that can be split",
        ),
        ("Mistral", dict(sliding_window=16), "is not plain causal attention"),
        ("Qwen3", dict(head_dim=8), "its model.layers.0.self_attn.q_norm.weight is in no module that can be split"),
        ("Granite", dict(logits_scaling=2.0), "its head or its last norm is not that of Llama"),
        # it multiplies what it looks up
        ("Gemma", dict(head_dim=8), "its model.embed_tokens.weight is in no module that can be split"),
        ("StableLm", {}, "its model.layers.0.input_layernorm.bias is in no module that can be split"),
        ("Arcee", {}, "it has no model.layers.*.mlp.gate_proj"),
        ("GPTNeoX", {}, "it has no model.embed_tokens"),
    ],
)
def test_models_are_split_only_where_every_parameter_has_a_rule(kind, changes, reason):
    settings = LLAMA | dict(tie_word_embeddings=False) | changes
    unsplittable = model_shape(getattr(transformers, f"{kind}Config")(**settings)).unsplittable
    assert reason in unsplittable and bool(reason) == bool(unsplittable)


def test_norms_of_another_kind_are_not_split(monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, hidden: hidden * (1 + self.weight))
    assert model_shape(transformers.LlamaConfig(**LLAMA)).unsplittable == "its norms are not those of Llama"


@pytest.mark.parametrize(
    ("layers", "vocabulary", "stages", "expected"),
    [
        (40, 32_000, 4, [10, 10, 10, 10]),  # Llama-2-13B: its head takes as long as half a layer
        (40, 32_000, 3, [13, 14, 13]),
        (16, 128_256, 4, [4, 5, 5, 2]),  # a head of two layers
        (4, 500_000, 4, [1, 1, 1, 1]),
    ],
)
def test_stages_are_as_even_as_whole_layers_and_head_allow(layers, vocabulary, stages, expected):
    shape = SimpleNamespace(layers=layers, hidden=5120, vocabulary=vocabulary, active_layer_parameters=317_204_480)
    assert layers_of_stages(shape, stages) == expected


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 3), (2, 4), (4, 6), (4, 2)])
def test_each_stage_goes_back_as_soon_as_it_can(stages, micro_batches):
    """One forward, one backward: no more micro-batches are under way than there are stages from this one on."""
    for stage in range(stages):
        pipeline = Pipeline(Plan())
        pipeline.stages, pipeline.stage = stages, stage
        actions = list(pipeline.schedule(micro_batches))
        for action in ("forward", "backward"):
            assert [index for kind, index in actions if kind == action] == list(range(micro_batches))
        under_way, most = 0, 0
        for action, _ in actions:
            under_way += 1 if action == "forward" else -1
            most = max(most, under_way)
        assert most == min(stages - stage, micro_batches)
