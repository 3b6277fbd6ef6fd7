"""The hook: MoAI's own where it exists, what it refuses, and use from another script."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from conftest import SCRIPT, TINY_LLAMA, read_metrics, small_run
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import train_llama2
from train_llama2 import Config, UserError, enable_advanced_parallelization

# A platform that does not exist here: torch.moreh, which notes when it is called.
MOAI_WRAPPER = """
import json, runpy, sys, types
import torch
from transformers import LlamaForCausalLM

events, build = [], LlamaForCausalLM.__init__

def noted_build(self, *arguments, **keywords):
    events.append("model built")
    build(self, *arguments, **keywords)

LlamaForCausalLM.__init__ = noted_build
hook = lambda: events.append("hook called")
torch.moreh = types.SimpleNamespace(option=types.SimpleNamespace(enable_advanced_parallelization=hook))
report, sys.argv = sys.argv[1], sys.argv[2:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    json.dump(events, open(report, "w"))
"""

# Another person's script, as the README shows it, with a data set of its own.
USER_SCRIPT = """
import json, sys
import torch
from train_llama2 import Config, enable_advanced_parallelization, load_model, load_tokenizer, save_model


def main():
    model_folder, save_folder = sys.argv[1:]
    config = Config(
        model_name_or_path=model_folder, save_model_dir=save_folder, batch_size=8, block_size=128, parallelism="fsdp"
    )
    with enable_advanced_parallelization(config) as parallel:
        model = load_model(config, parallel)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        documents = torch.randint(1024, (8, 128), generator=torch.Generator().manual_seed(0))[parallel.rank :: 2]
        losses = []
        for step in range(3):
            loss = model(input_ids=documents, labels=documents).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(parallel.sum_over_ranks(loss.detach()).item() / 2)
        save_model(model, load_tokenizer(config, parallel), config, parallel)
        parallel.say("LOSSES", json.dumps(losses))


if __name__ == "__main__":
    main()
"""


def test_on_moai_the_platforms_hook_is_called_once_before_the_model_and_the_run_is_a_plain_one(tmp_path):
    flags = {"max_train_samples": 4, "max_eval_samples": 2, "batch_size": 4, "num_train_epochs": 2, "precision": "fp32"}
    (tmp_path / "wrapper.py").write_text(MOAI_WRAPPER)
    moai = subprocess.run(
        [sys.executable, tmp_path / "wrapper.py", tmp_path / "events.json", SCRIPT, *small_run(tmp_path, **flags)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert moai.returncode == 0, moai.stderr
    events = json.loads((tmp_path / "events.json").read_text())
    assert events[0] == "hook called"
    assert events.count("hook called") == 1
    train_llama2.main(small_run(tmp_path / "plain", **flags))
    (steps, evaluations), (plain_steps, plain_evaluations) = read_metrics(tmp_path), read_metrics(tmp_path / "plain")
    for name in ("loss", "grad_norm", "lr", "tokens"):
        assert [line[name] for line in steps] == pytest.approx([line[name] for line in plain_steps], rel=1e-6)
    assert evaluations == [pytest.approx(line, rel=1e-6) for line in plain_evaluations]
    AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("flags", [{"parallelism": "fsdp"}, {"parallelism": "ddp"}, {"cpu_offload": "yes"}], ids=str)
def test_moai_refuses_flags_that_would_take_the_parallelism_from_it(monkeypatch, flags):
    platform = SimpleNamespace(option=SimpleNamespace(enable_advanced_parallelization=lambda: None))
    monkeypatch.setattr(torch, "moreh", platform, raising=False)
    config = Config(model_name_or_path=str(TINY_LLAMA), block_size=64, **flags)
    [(name, value)] = flags.items()
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value} is not for MoAI.*leave it out"):
        enable_advanced_parallelization(config)


def test_more_ranks_than_gpus_on_a_node_are_refused_by_each_of_them(monkeypatch):
    """Rank 0 has a GPU of its own, and is the one that speaks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for local_rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(UserError, match="more processes than the 1 GPUs here; use gpu"):
            enable_advanced_parallelization(Config(model_name_or_path=str(TINY_LLAMA), block_size=64))


@pytest.mark.parametrize(
    "kinds", [("A100-80GB", "A100-40GB"), ("H100-80GB", "L40S-48GB"), ("RTX3090-24GB", None)], ids=str
)
def test_ranks_with_unlike_gpus_plan_with_the_same_figures(monkeypatch, kinds):
    """The slower GPU's and the smaller memory, on either rank. None: an older one, without flash attention."""
    old = train_llama2.Gpu(14.6, 60, 300, 0.7, 0.75, 10, 12.5)
    gpus = [train_llama2.GPUS[kind] if kind else old for kind in kinds]
    told, clusters = [], []
    for everyones in (None, told):  # first each says what it has, then each hears it all
        for rank, gpu in enumerate(gpus):
            device = (f"GPU of rank {rank}", gpu, {"peak": f"rank {rank}"})
            monkeypatch.setattr(train_llama2, "find_device", lambda ranks_per_node, device=device: device)
            monkeypatch.setattr(train_llama2, "has_flash_attention", lambda gpu=gpu: gpu is not old)
            monkeypatch.setattr(
                train_llama2, "gather_object", lambda mine, heard=everyones: heard or told.extend(mine) or mine
            )
            clusters.append(train_llama2.find_cluster())
    first, second = clusters[2:]
    assert first == second
    assert first.memory_gib == min(gpu.memory_gib for gpu in gpus)
    slower = min(gpus, key=lambda gpu: gpu.peak_tflops)
    assert dataclasses.replace(first.gpu, memory_gib=0) == dataclasses.replace(slower, memory_gib=0)
    assert first.has_flash_attention == (old not in gpus)


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(train_llama2, "get_available_trackers", lambda: ["mlflow"])
    monkeypatch.setattr(train_llama2, "read_model_shape", None)
    config = Config(model_name_or_path=str(TINY_LLAMA), block_size=64, report_to="wandb")
    with pytest.raises(UserError, match="--report-to wandb needs a package that is not installed"):
        enable_advanced_parallelization(config)


def test_another_script_trains_another_causal_lm_with_tied_embeddings_on_two_sharded_ranks(tmp_path):
    torch.manual_seed(0)
    shape = dict(vocab_size=1032, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    plain = Qwen2ForCausalLM(Qwen2Config(**shape, num_key_value_heads=2, tie_word_embeddings=True))
    plain.save_pretrained(tmp_path / "qwen2")
    AutoTokenizer.from_pretrained(TINY_LLAMA).save_pretrained(tmp_path / "qwen2")
    (tmp_path / "mine.py").write_text(USER_SCRIPT)
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        + [str(tmp_path / name) for name in ("mine.py", "qwen2", "trained")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr

    # The same three steps in one plain process.
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    documents = torch.randint(1024, (8, 128), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(3):
        loss = plain(input_ids=documents, labels=documents).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    said = next(line for line in run.stdout.splitlines() if line.startswith("LOSSES"))
    assert json.loads(said.removeprefix("LOSSES")) == pytest.approx(losses, rel=1e-5)

    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert trained.lm_head.weight is trained.model.embed_tokens.weight
    with torch.no_grad():
        assert trained(input_ids=documents, labels=documents).loss.item() == pytest.approx(
            plain(input_ids=documents, labels=documents).loss.item(), rel=1e-4
        )


@pytest.mark.parametrize(
    ("strategy", "shards", "sync", "reduced", "all_reduced"),
    [
        ("ddp", 1, "step", [], []),
        ("fsdp", 4, "micro-batch", [True, True, True], [False, False, True]),
        ("fsdp", 4, "step", [False, False, True], [False, False, True]),
        ("hsdp", 2, "micro-batch", [True, True, True], [False, False, True]),
    ],
)
def test_gradients_travel_no_more_often_than_the_plan_says(strategy, shards, sync, reduced, all_reduced):
    """Three micro-batches. The all-reduce is HSDP's across replicas; FSDP has none, so what it is told is moot."""
    calls: dict[str, list] = {"reduce": [], "all-reduce": [], "no_sync": []}
    accelerator = SimpleNamespace(no_sync=lambda model: contextlib.nullcontext(calls["no_sync"].append(True)))
    plan = train_llama2.Plan(strategy, 4 // shards, shards, 1, 3, "none", True, False, sync, "fp32")
    parallel = train_llama2.Parallel(accelerator, None, None, None, plan, None, 64, timedelta(minutes=1))
    model = SimpleNamespace(
        set_requires_gradient_sync=calls["reduce"].append, set_requires_all_reduce=calls["all-reduce"].append
    )
    for index in range(3):
        with parallel.gradient_sync(model, is_last=index == 2):
            pass
    assert calls == {"reduce": reduced, "all-reduce": all_reduced, "no_sync": [True] * 2 * (strategy == "ddp")}
