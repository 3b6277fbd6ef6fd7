"""Compares the plan's memory with PyTorch's memory tracker, and its times with published runs.

    python tests/check_plan.py --memory               # a few layers of Llama-2-13B's shape, every kind of plan
    python tests/check_plan.py --memory --full        # the full 7B, 13B and 70B shapes; this takes minutes
    python tests/check_plan.py --published            # tokens/s of published runs, predicted and measured
    python tests/check_plan.py --device               # two steps of 66 settings on this GPU, as one rank of several

`--memory` and `--published` need no GPU. The tracker follows fake tensors through a step of the real model, which
transformers shards as it does for the script. One process stands for rank 0 of a fake process group. Three traps are
avoided. DTensor computes shapes with tensors of its own, which get a fake mode of their own, because otherwise they
would be counted. Attention is the CUDA flash kernel, which saves less than the CPU's. And no mask is built. Left out
is what the tracker cannot follow: compiled layers, CPU offload, DDP's buckets, and HSDP's all-reduce when it is held
back over several micro-batches. `--device` follows all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import _sharding_prop
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig
from transformers.distributed import DistributedConfig, initialize_distributed_mesh

import train_llama2 as script
from train_llama2 import GIB, GPUS, Cluster, Plan


def llama(size: str, layers: int | None = None, **changes: int) -> LlamaConfig:
    """Returns the config of a Llama 2, with `layers` layers instead of its own where that is given."""
    shape = {**script.LLAMA_2[size], **changes}
    return LlamaConfig(**{**shape, "num_hidden_layers": layers or shape["num_hidden_layers"]})


# ----------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------


def flash_attention(module, query, key, value, mask, scaling=None, **ignored):
    """Attention that saves what the CUDA kernel saves: its inputs, its output and the log-sum-exp.

    Autocast leaves query and key in fp32, and the script casts them, as here.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)
    output = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scaling)[0]
    return output.transpose(1, 2).contiguous(), None


POST_FORWARD = FSDPState._post_forward


@contextlib.contextmanager
def fake_ranks(world_size: int, rank: int = 0) -> Iterator[None]:
    """Makes this process a rank of `world_size` inside the context. Its collectives and messages move nothing."""
    private = FakeTensorMode(allow_non_fake_inputs=True)
    original, _sharding_prop.detect_fake_mode = _sharding_prop.detect_fake_mode, lambda *_, **__: private
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        _sharding_prop.detect_fake_mode = original


def post_forward_of_groups(state: FSDPState, module: torch.nn.Module, inputs: tuple, output: torch.Tensor):
    """Runs once for modules that are one FSDP group, after the last of them, as without the tracker.

    The tracker hooks every module by itself. So it would reduce the head's gradient before that of the norm.
    """
    return POST_FORWARD(state, module, inputs, output) if module is state._modules[-1] else output


def tracked_gib(model_config: LlamaConfig, plan: Plan, rows: int, length: int, stage: int = 0) -> float:
    """Returns the peak of an optimizer step that PyTorch's tracker counts for the first rank of a stage."""
    AttentionInterface.register("tracked_attention", flash_attention)
    sharded, stages = plan.uses_fsdp, plan.pipeline_parallel_size
    parallel = SimpleNamespace(
        plan=plan,
        shape=script.model_shape(model_config),
        config=script.Config(),
        device=torch.device("cpu"),
        tensor_parallel=script.TensorParallel(),
    )
    with (
        fake_ranks(stages * plan.data_parallel_size, stage * plan.data_parallel_size),
        mock.patch.object(FSDPState, "_post_forward", post_forward_of_groups),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                model_config, dtype=plan.state_dtype, attn_implementation="tracked_attention"
            )
        if sharded or stages > 1:
            settings = DistributedConfig(pp_size=stages, fsdp_mixed_precision=plan.precision != "fp32")
            settings.fsdp_size, settings.dp_replicate_size = plan.dp_shard_size, plan.dp_replicate_size
            _, mesh = initialize_distributed_mesh(settings)
            model.config.distributed_config = settings
            with script.patched_transformers(parallel):
                model = type(model).maybe_distribute_model(model, settings, mesh)
        pipeline = TrackedPipeline(plan, parallel.device)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            model.tie_weights()
            model.train()
            if plan.recompute_every:
                model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=plan.recompute_every)
            if not plan.reshard_after_forward:
                model.set_reshard_after_forward(False)
            script.use_token_loss(model, pipeline.is_last)
            if plan.autocasts:
                model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
            optimizer = script.build_optimizer(model, script.Config())
            for parameter in model.parameters():  # a step without training, which makes AdamW's moments
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
            tracker = FSDPMemTracker(model, optimizer) if sharded else MemTracker()
            if not sharded:
                tracker.track_external(model, optimizer)
            row = torch.zeros(rows, length, dtype=torch.long)
            with tracker:
                train_once(model, optimizer, pipeline, parallel, row, tracker)
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return next(size for name, size in peak.items() if getattr(name, "value", name) == "Total") / GIB


class TrackedPipeline(script.Pipeline):
    """The script's pipeline. It empties what the script frees, because the tracker's hooks keep it for ever."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.passed: list[torch.Tensor] = []  # between stages: received, or sent

    def receive(self, *arguments) -> torch.Tensor:
        self.passed.append(super().receive(*arguments))
        return self.passed[-1]

    def send(self, tensor: torch.Tensor, *arguments) -> None:
        super().send(tensor, *arguments)
        self.passed.append(tensor)

    def empty_what_is_done(self) -> None:
        kept = [tensor for _, tensor in self.sends] + [tensor for both in self.awaiting_backward for tensor in both]
        kept_storages = {tensor.untyped_storage()._cdata for tensor in kept if tensor is not None}
        for tensor in self.passed:
            if tensor.untyped_storage()._cdata not in kept_storages:
                tensor.untyped_storage().resize_(0)
        self.passed = [tensor for tensor in self.passed if tensor.untyped_storage()._cdata in kept_storages]


def train_once(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    pipeline: TrackedPipeline,
    parallel: SimpleNamespace,
    row: torch.Tensor,
    tracker: MemTracker,
) -> None:
    """Takes the script's optimizer step, without the parts that allocate nothing."""
    plan, micro_batches = parallel.plan, parallel.plan.gradient_accumulation_steps
    micro_batch = dict(input_ids=row, predict_at=torch.arange(row.numel() - 1), targets=row.flatten()[1:])
    for action, index in pipeline.schedule(micro_batches):
        if plan.uses_fsdp:
            model.set_requires_gradient_sync(index == micro_batches - 1 or plan.gradient_sync == "micro-batch")
            model.set_requires_all_reduce(index == micro_batches - 1)
        if action == "forward":
            tracker.reset_mod_stats()  # forgets the modules' figures and keeps the peak
            pipeline.forward(model, micro_batch, parallel)
        else:
            pipeline.backward(1.0)
        pipeline.empty_what_is_done()
    pipeline.finish_sending()
    pipeline.empty_what_is_done()
    optimizer.step()
    optimizer.zero_grad()


NONE = Plan(activation_checkpointing="full")
FSDP8 = replace(NONE, dp_shard_size=8)


def memory_cases(full: bool) -> Iterator[tuple[str, LlamaConfig, Plan, int, int]]:
    """Yields (name, config, plan, rows, tokens a row)."""
    if full:
        for size, plan, rows, length in (
            ("7b", replace(FSDP8, activation_checkpointing="none"), 1, 2048),
            ("7b", replace(NONE, activation_checkpointing="every-2"), 2, 2048),
            ("13b", FSDP8, 1, 4096),
            ("13b", FSDP8, 8, 2048),
            ("13b", replace(FSDP8, activation_checkpointing="none"), 2, 2048),
            ("13b", replace(FSDP8, dp_replicate_size=2), 4, 2048),
            ("70b", replace(FSDP8, dp_shard_size=32), 1, 4096),
        ):
            yield f"{size} {plan.describe()}", llama(size), plan, rows, length
        return
    levels = ("none", "every-3", "every-2", "full")
    for level in levels:
        for rows, length in ((1, 1024), (1, 4096), (4, 2048)):
            yield "13b", llama("13b", 5), replace(FSDP8, activation_checkpointing=level), rows, length
    for level, reshard in (("none", False), ("full", False)):
        plan = replace(FSDP8, activation_checkpointing=level, reshard_after_forward=reshard)
        yield "13b", llama("13b", 5), plan, 1, 2048
    for sync in ("micro-batch", "step"):
        plan = replace(FSDP8, gradient_accumulation_steps=2, gradient_sync=sync)
        yield "13b", llama("13b", 5), plan, 1, 2048
    yield "13b", llama("13b", 5), replace(FSDP8, dp_replicate_size=2, dp_shard_size=4), 1, 2048
    yield "70b", llama("70b", 4), FSDP8, 1, 4096
    yield "7b V=128k", llama("7b", 4, vocab_size=128_256), FSDP8, 1, 2048
    for level in levels:
        for rows, length in ((1, 1024), (4, 2048), (8, 2048)):
            yield "13b", llama("13b", 5), replace(NONE, activation_checkpointing=level), rows, length
    yield "70b", llama("70b", 4), replace(NONE, activation_checkpointing="none"), 2, 4096
    yield "13b", llama("13b", 5), replace(NONE, gradient_accumulation_steps=2), 4, 2048
    yield "13b", llama("13b", 5), replace(NONE, precision="fp32", activation_checkpointing="none"), 4, 2048
    for level, steps in (("none", 1), ("full", 1), ("full", 2)):
        plan = replace(FSDP8, precision="fp32", activation_checkpointing=level, gradient_accumulation_steps=steps)
        yield "13b", llama("13b", 5), plan, 1, 2048
    for plan in (NONE, FSDP8):
        yield "13b", llama("13b", 5), replace(plan, precision="bf16-states"), 2, 2048
    staged = replace(FSDP8, pipeline_parallel_size=2, gradient_accumulation_steps=8, gradient_sync="micro-batch")
    for level, rows in (("none", 1), ("full", 2)):
        yield "13b", llama("13b", 8), replace(staged, activation_checkpointing=level), rows, 2048
    yield "13b", llama("13b", 8), replace(staged, gradient_sync="step"), 2, 2048
    staged = replace(staged, activation_checkpointing="none")
    yield "13b", llama("13b", 12), replace(staged, pipeline_parallel_size=4), 1, 2048
    for changes in (dict(dp_shard_size=1), dict(gradient_sync="step"), dict(reshard_after_forward=False)):
        yield "13b", llama("13b", 8), replace(staged, **changes), 1, 2048


def predicted_peak(shape: script.ModelShape, plan: Plan, tokens: int, stage: int = 0) -> tuple[float, str]:
    """Returns the active GiB at the peak of the plan's prediction for a stage, and the phase in which it is.

    The tracker runs on a CPU, where torch's linear_cross_entropy casts the head, its gradient and two chunks of its
    input to fp32. CUDA's matmuls take bf16 and give fp32, so the script does not count these casts, and they are added
    here; the copies of a chunk's logits in bf16 are CUDA's alone.
    """
    part = script.shapes_of_stages(shape, plan.pipeline_parallel_size)[stage]
    phases = script.memory_phases(script.StepMemory(part, plan, tokens, stage))
    if plan.precision != "fp32" and part.has_head:
        rows = min(tokens, script.HEAD_CHUNK_TOKENS)
        casts = 8 * shape.head_and_norm_parameters + 8 * shape.hidden * rows
        phases["loss"]["temporaries"] += casts - 4 * shape.vocabulary * rows
    return max((sum(terms.values()) / GIB, phase) for phase, terms in phases.items())


def check_memory(full: bool) -> bool:
    """Prints predicted and tracked memory of every case, and of stages of the first and the last.

    Returns whether all are within 0.5%, or 1% where there are stages.
    """
    print(f"{'case':<58}{'tokens':>8}{'tracked':>9}{'predicted':>11}{'error':>8}  peak")
    errors: dict[bool, float] = {False: 0.0, True: 0.0}
    for name, model_config, plan, rows, length in memory_cases(full):
        stages = plan.pipeline_parallel_size
        for stage in sorted({0, stages - 1}):
            predicted, phase = predicted_peak(script.model_shape(model_config), plan, rows * length, stage)
            tracked = tracked_gib(model_config, plan, rows, length, stage)
            error = predicted / tracked - 1
            errors[stages > 1] = max(errors[stages > 1], abs(error))
            words = f"{name} {plan.precision} {plan.describe()}" if not full else name
            phase = f"stage {stage + 1}, {phase}" if stages > 1 else phase
            print(f"{words[:57]:<58}{rows * length:>8}{tracked:>9.3f}{predicted:>11.3f}{error:>8.2%}  {phase}")
    print(f"largest error {errors[False]:.2%}, with stages {errors[True]:.2%}")
    return errors[False] <= 0.005 and errors[True] <= 0.01


# ----------------------------------------------------------------------------------------------------------------
# Time
# ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A published run. `recomputed` is the plan's word for it. `fitted` runs had a constant fitted to them."""

    source: str
    name: str
    group: str
    gpu: str
    nodes: int
    ranks_per_node: int
    shape: script.ModelShape
    strategy: str
    micro_batch_size: int
    length: int
    recomputed: str
    compiled: bool
    tokens_per_second_per_gpu: float
    fitted: bool = False


def decoder(
    hidden: int, intermediate: int, layers: int, heads: int, kv_size: int, vocabulary: int
) -> script.ModelShape:
    layer = 2 * hidden * hidden + 2 * hidden * kv_size + 3 * hidden * intermediate + 2 * hidden
    shape = script.ModelShape(
        0, layers, layer, hidden, intermediate, heads, hidden, kv_size, vocabulary, sys.maxsize, hidden // heads
    )
    around_layers = shape.head_and_norm_parameters + vocabulary * hidden
    return replace(shape, parameters=layers * shape.layer_parameters + around_layers)


MPT_13B = decoder(5120, 13_653, 40, 40, 5120, 50_368)  # two MLP matrices of 4h: as many parameters as three of 8/3 h
LLAMA_7B, LLAMA_13B = (
    decoder(h, f, n, a, h, 32_000) for h, f, n, a in ((4096, 11_008, 32, 32), (5120, 13_824, 40, 40))
)
LLAMA_70B, LLAMA_8B = decoder(8192, 28_672, 80, 64, 1024, 32_000), decoder(4096, 14_336, 32, 32, 1024, 128_256)
QWEN_14B = decoder(5120, 17_408, 40, 40, 1024, 151_936)
FOUNDRY, FMS, TITAN, FORGE = (
    "mosaicml/llm-foundry",
    "foundation-model-stack/fms-fsdp",
    "pytorch/torchtitan",
    "KempnerForge",
)
A100, H100, H200 = "A100-80GB", "H100-80GB", "H200-141GB"

PUBLISHED = [
    Published(FOUNDRY, "MPT-13B 1024 x 40", "a", A100, 1, 8, MPT_13B, "fsdp", 40, 1024, "full", True, 2330, True),
    Published(FOUNDRY, "MPT-13B 2048 x 2", "a", A100, 1, 8, MPT_13B, "fsdp", 2, 2048, "none", True, 2262, True),
    Published(FOUNDRY, "MPT-13B 4096 x 10", "a", A100, 1, 8, MPT_13B, "fsdp", 10, 4096, "full", True, 2060),
    Published(FOUNDRY, "MPT-13B 1024 x 40", "b", H100, 1, 8, MPT_13B, "fsdp", 40, 1024, "full", True, 5502, True),
    Published(FOUNDRY, "MPT-13B 2048 x 2", "b", H100, 1, 8, MPT_13B, "fsdp", 2, 2048, "none", True, 4792, True),
    Published(FOUNDRY, "MPT-13B 4096 x 10", "b", H100, 1, 8, MPT_13B, "fsdp", 10, 4096, "full", True, 4717),
    Published(FMS, "Llama-2-7B 4096 x 2", "c", A100, 16, 8, LLAMA_7B, "hsdp", 2, 4096, "none", True, 4550),
    Published(FMS, "Llama-2-13B 4096 x 2", "c", A100, 16, 8, LLAMA_13B, "fsdp", 2, 4096, "every-2", True, 2150),
    Published(FMS, "Llama-2-70B 4096 x 2", "c", A100, 16, 8, LLAMA_70B, "fsdp", 2, 4096, "every-2", True, 410),
    Published(FMS, "Llama-2-7B 4096 x 2", "d", H100, 12, 8, LLAMA_7B, "hsdp", 2, 4096, "none", True, 9600),
    Published(FMS, "Llama-2-13B 4096 x 2", "d", H100, 12, 8, LLAMA_13B, "fsdp", 2, 4096, "every-2", True, 4850),
    Published(FMS, "Llama-2-70B 4096 x 2", "d", H100, 12, 8, LLAMA_70B, "fsdp", 2, 4096, "every-2", True, 890),
    Published(TITAN, "Llama-7B 2048 x 8", "e", H100, 1, 8, LLAMA_7B, "fsdp", 8, 2048, "full", False, 6200),
    Published(TITAN, "Llama-3.1-8B 8192 x 2", "f", H100, 1, 8, LLAMA_8B, "fsdp", 2, 8192, "every-2", True, 6667, True),
    Published(TITAN, "Llama-3.1-8B 8192 x 2", "f", H100, 1, 8, LLAMA_8B, "fsdp", 2, 8192, "every-2", False, 5762, True),
    Published(FORGE, "14.8B 4096 x 4 x 4", "g", H200, 2, 4, QWEN_14B, "fsdp", 4, 4096, "none", False, 4426),
]

# fms-fsdp's selective checkpointing recomputes a share of the layers, torchtitan's keeps half of the matmuls' outputs;
# both are taken as `every-2`. The runs below follow no plan that this script has.
NOT_EXPRESSED = (
    (FORGE, "8B 4096, compiled", f"1 x {H200}", 10471, "the dtype of its states is not published"),
    (FORGE, "14.8B, TP4 x FSDP2", f"8 x {H200}", 3418, "tensor parallel"),
    ("NVIDIA NeMo 24.12", "Llama-2-13B FP8", f"8 x {H100}", 10176, "FP8, pipeline parallel"),
)


def predicted_rate(run: Published) -> float:
    """Returns the tokens per second and GPU that the plan predicts for a published run."""
    cluster = Cluster(run.nodes, run.ranks_per_node, run.gpu, True, GPUS[run.gpu])
    world = run.nodes * run.ranks_per_node
    replicas, shards = (run.nodes, run.ranks_per_node) if run.strategy == "hsdp" else (1, world)
    plan = Plan(
        dp_replicate_size=replicas,
        dp_shard_size=shards,
        micro_batch_size=run.micro_batch_size,
        activation_checkpointing=run.recomputed,
        compiled=run.compiled,
    )
    assert plan.strategy == run.strategy
    tokens = run.micro_batch_size * run.length
    seconds = script.predict_seconds(run.shape, cluster, plan, tokens, run.length)
    return tokens / seconds["total"]


def check_published() -> tuple[float, bool]:
    """Prints predicted and published rates; returns the mean error, and whether each group is ranked right.

    A group is one model, or one family, on the same machines under one program. Its runs differ in what the plan
    decides, so a choice between plans is as good as their order.
    """
    print(f"{'published by':<34}{'run':<24}{'GPUs':<16}{'published':>10}{'predicted':>10}{'ratio':>7}")
    rates = [predicted_rate(run) for run in PUBLISHED]
    for run, rate in zip(PUBLISHED, rates, strict=True):
        gpus = f"{run.nodes * run.ranks_per_node} x {run.gpu}"
        mark = " fitted" if run.fitted else ""
        published = run.tokens_per_second_per_gpu
        print(
            f"{run.source:<34}{run.name:<24}{gpus:<16}{published:>10,.0f}{rate:>10,.0f}{rate / published:>7.2f}{mark}"
        )
    for source, name, gpus, published, reason in NOT_EXPRESSED:
        print(f"{source:<34}{name:<24}{gpus:<16}{published:>10,.0f}{'-':>10}{'-':>7} {reason}")
    errors = [abs(rate / run.tokens_per_second_per_gpu - 1) for run, rate in zip(PUBLISHED, rates, strict=True)]
    held_out = [error for run, error in zip(PUBLISHED, errors, strict=True) if not run.fitted]
    ranked = True
    for group in sorted({run.group for run in PUBLISHED}):
        pairs = [
            (run.tokens_per_second_per_gpu, rate)
            for run, rate in zip(PUBLISHED, rates, strict=True)
            if run.group == group
        ]
        ranked &= sorted(pairs) == sorted(pairs, key=lambda pair: pair[1])
    print(
        f"mean error {sum(errors) / len(errors):.1%} of all rows, "
        f"{sum(held_out) / len(held_out):.1%} of those not fitted"
    )
    print("every group is ranked as published" if ranked else "A GROUP IS RANKED WRONGLY")
    print_regret(rates)
    return sum(errors) / len(errors), ranked


def print_regret(rates: list[float]) -> None:
    """Prints what choosing by the predicted rates costs in each group of runs of one model on the same GPUs.

    That is the published time of the run with the best predicted rate, over the best published time, less one.
    """
    groups: dict[tuple, list[tuple[float, float]]] = {}
    for run, rate in zip(PUBLISHED, rates, strict=True):
        key = (run.source, run.shape, run.gpu, run.nodes * run.ranks_per_node)
        groups.setdefault(key, []).append((rate, run.tokens_per_second_per_gpu))
    for (source, shape, gpu, count), runs in groups.items():
        if len(runs) > 1:
            regret = max(published for _, published in runs) / max(runs)[1] - 1
            name = f"{source}, {shape.parameters / 1e9:.1f}B on {count} x {gpu}"
            print(f"regret {regret:.1%} of {len(runs)} runs of {name}")


# Hagemann et al. 2023, "Efficient Parallelization Layouts for Large-Scale Distributed Model Training" (arXiv
# 2311.05610). 2,048 sequences a step, each of 2,048 tokens, over 128,000 pieces. Flash attention 2 with a fused kernel
# for norms stands for compiled layers, without it for layers that are not compiled.
HAGEMANN = Path(__file__).parent / "data" / "hagemann2023_layouts.csv"
HAGEMANN_SHAPES = {
    "13B": decoder(5120, 13_824, 40, 40, 5120, 128_000),
    "30B": decoder(6656, 17_920, 60, 52, 6656, 128_000),
    "65B": decoder(8192, 22_016, 80, 64, 8192, 128_000),
}


@dataclass(frozen=True)
class MeasuredLayout:
    """A row of Hagemann et al.: a layout of pipeline stages, tensor-parallel and data ranks, with its time.

    Some layouts are there twice, with and without sequence parallelism, which moves as much.
    """

    model: str
    gpus: int
    micro_batch_size: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    sequence_parallel: int
    activation_checkpointing: str
    kernel: str
    step_seconds: float

    @property
    def plan(self) -> Plan:
        data_parallel_size = self.gpus // (self.pipeline_parallel_size * self.tensor_parallel_size)
        return Plan(
            pipeline_parallel_size=self.pipeline_parallel_size,
            tensor_parallel_size=self.tensor_parallel_size,
            dp_shard_size=data_parallel_size,
            micro_batch_size=self.micro_batch_size,
            gradient_accumulation_steps=2048 // data_parallel_size // self.micro_batch_size,
            activation_checkpointing={"disabled": "none", "every_layer": "full"}[self.activation_checkpointing],
            reshard_after_forward=False,
            compiled="RMS" in self.kernel,
        )

    def predicted_seconds(self) -> float:
        """Returns the step's seconds under ZeRO-1, which the script itself does not have.

        Every data rank has its stage's weights whole. Gradients are reduced and weights gathered once a step.
        """
        plan = self.plan
        cluster = Cluster(self.gpus // 8, 8, A100, True, GPUS[A100])
        tokens = 2048 * self.micro_batch_size
        seconds = script.predict_seconds(HAGEMANN_SHAPES[self.model], cluster, plan, tokens, 2048)
        as_fsdp = 2 * plan.gradient_accumulation_steps + 4  # bytes a parameter
        communication = seconds["gather_reduce"] * (2 + 4) / as_fsdp + seconds["point_to_point"]
        exposed = communication - script.OVERLAP * min(communication, seconds["compute"]) + seconds["tensor_parallel"]
        return seconds["compute"] + seconds["bubble"] + exposed + seconds["optimizer"]


def measured_layouts() -> list[MeasuredLayout]:
    kinds = dict.fromkeys(("gpus", "micro_batch_size", "sequence_parallel"), int) | dict(step_seconds=float)
    kinds |= dict.fromkeys(("tensor_parallel_size", "pipeline_parallel_size"), int)
    with HAGEMANN.open() as file:
        rows = list(csv.DictReader(file))
    return [MeasuredLayout(**{name: kinds.get(name, str)(value) for name, value in row.items()}) for row in rows]


def check_layouts() -> dict[str, float]:
    """Prints predicted and measured seconds of every layout of Hagemann et al., and whether the best one is found.

    Returns the median ratio for each kind of layout: each kernel, with and without tensor parallelism. The layout that
    is found is the one with the best prediction. It misses the best where it expects larger micro-batches to be faster:
    here they were slower. Without the fused kernel their norms took as long on each of several tensor-parallel ranks as
    on one, which the script's do not, so those times are underestimated.
    """
    print(f"\n{'Hagemann et al. 2023':<24}{'kernel':<32}{'layout':<40}{'measured':>9}{'predicted':>10}{'ratio':>7}")
    ratios: dict[str, list[float]] = {}
    groups: dict[tuple[str, int, str], list[tuple[float, float]]] = {}
    for row in measured_layouts():
        predicted = row.predicted_seconds()
        kind = row.kernel + (", tensor parallel" if row.tensor_parallel_size > 1 else "")
        ratios.setdefault(kind, []).append(predicted / row.step_seconds)
        groups.setdefault((row.model, row.gpus, row.kernel), []).append((predicted, row.step_seconds))
        degrees = f"pp{row.pipeline_parallel_size}, tp{row.tensor_parallel_size}{', sp' * row.sequence_parallel}"
        layout = f"{degrees}, micro-batch {row.micro_batch_size}, {row.activation_checkpointing}"
        print(
            f"{row.model + f' on {row.gpus} A100':<24}{row.kernel:<32}{layout:<40}{row.step_seconds:>9.2f}"
            f"{predicted:>10.2f}{predicted / row.step_seconds:>7.2f}"
        )
    medians = {kernel: statistics.median(values) for kernel, values in ratios.items()}
    for kind, median in medians.items():
        near = sum(0.8 <= ratio <= 1.25 for ratio in ratios[kind]) / len(ratios[kind])
        print(f"median ratio {median:.3f}, {near:.0%} within 0.80 to 1.25, of {len(ratios[kind])} rows with {kind}")
    for (model, gpus, kernel), rows in groups.items():
        regret = min(rows)[1] / min(measured for _, measured in rows) - 1
        found = "found" if regret == 0 else "found within 5%" if regret <= 0.05 else f"missed by {regret:.1%}"
        print(f"{model} on {gpus} A100, {kernel}: the best of {len(rows)} layouts is {found}")
    return medians


# ----------------------------------------------------------------------------------------------------------------
# On this machine's devices
# ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A Llama 2 of `layers` layers on rank 0 of `ranks`, on `nodes` nodes, with `documents` full blocks a step."""

    size: str
    layers: int
    ranks: int
    documents: int
    flags: str
    nodes: int = 1


def settings_of(compiled: str) -> Iterator[Setting]:
    """Yields settings of every parallelism and recomputation; what the plan would decide is given."""

    def flags(parallelism: str, size: int, recompute: str, more: str = "") -> str:
        words = f"--parallelism {parallelism} --micro-batch-size {size} --activation-checkpointing {recompute} {more}"
        return f"{words} --compile {compiled}"

    fsdp = "--reshard-after-forward yes --cpu-offload no"
    each, states = f"{fsdp} --gradient-sync micro-batch", "--precision bf16-states"
    yield Setting("13b", 40, 8, 8, flags("fsdp", 8, "full", fsdp))
    yield Setting("13b", 40, 8, 8, flags("fsdp", 2, "none", each))
    yield Setting("13b", 40, 8, 8, flags("fsdp", 4, "every-2", each))
    yield Setting("13b", 40, 8, 4, flags("fsdp", 4, "none", fsdp))
    yield Setting("13b", 40, 8, 8, flags("fsdp", 4, "full", f"{fsdp} --gradient-sync step"))
    yield Setting("13b", 40, 8, 2, flags("fsdp", 2, "every-3", "--reshard-after-forward no --cpu-offload no"))
    yield Setting("13b", 40, 8, 2, flags("fsdp", 2, "none", f"{fsdp} --packing no"))
    yield Setting("13b", 8, 8, 4, flags("fsdp", 4, "full", "--reshard-after-forward yes --cpu-offload yes"))
    yield Setting("7b", 32, 8, 4, flags("fsdp", 4, "every-2", fsdp))
    yield Setting("13b", 40, 16, 8, flags("hsdp", 8, "full", fsdp), nodes=2)
    yield Setting("13b", 40, 16, 8, flags("hsdp", 2, "none", fsdp), nodes=2)
    yield Setting("13b", 8, 16, 8, flags("hsdp", 4, "every-2", f"{fsdp} {states}"), nodes=2)
    yield Setting("7b", 4, 16, 8, flags("hsdp", 4, "full", "--reshard-after-forward yes --cpu-offload yes"), nodes=2)
    yield Setting("7b", 8, 8, 6, flags("ddp", 2, "none"))
    yield Setting("7b", 32, 8, 4, flags("ddp", 4, "full"))
    yield Setting("7b", 32, 8, 2, flags("ddp", 2, "every-2"))
    yield Setting("13b", 40, 8, 1, flags("ddp", 1, "none"))
    yield Setting("7b", 32, 1, 2, flags("none", 2, "none"))
    yield Setting("7b", 32, 1, 8, flags("none", 4, "full"))
    yield Setting("13b", 40, 1, 2, flags("none", 1, "none", states))
    yield Setting("13b", 40, 1, 4, flags("none", 4, "every-2", states))
    yield Setting("13b", 40, 1, 8, flags("none", 4, "full", states))
    yield Setting("7b", 8, 1, 4, flags("none", 2, "none"))  # these fit on one GPU of 80 GB
    yield Setting("13b", 10, 1, 4, flags("none", 4, "full"))
    stages, whole = "--pipeline-parallel-size 2", "--pipeline-parallel-size 2 --hsdp-shard-size"
    yield Setting("13b", 8, 16, 4, flags("fsdp", 1, "none", f"{each} {stages}"), nodes=2)
    yield Setting("13b", 8, 16, 4, flags("fsdp", 1, "full", f"{fsdp} --gradient-sync step {stages}"), nodes=2)
    kept = "--reshard-after-forward no --cpu-offload no --gradient-sync micro-batch"
    yield Setting("13b", 8, 16, 4, flags("fsdp", 1, "none", f"{kept} {stages}"), nodes=2)
    yield Setting("13b", 8, 8, 4, flags("hsdp", 1, "none", f"{whole} 1"), nodes=2)
    yield Setting("13b", 8, 16, 4, flags("hsdp", 1, "full", f"{whole} 4"), nodes=2)
    yield Setting("13b", 8, 8, 1, flags("fsdp", 2, "none", f"{each} --tensor-parallel-size 2"))
    yield Setting("13b", 8, 8, 1, flags("fsdp", 4, "full", f"{each} --tensor-parallel-size 4"))
    yield Setting("13b", 8, 8, 1, flags("none", 4, "none", "--tensor-parallel-size 8"))
    yield Setting("13b", 8, 16, 2, flags("fsdp", 2, "none", f"{each} {stages} --tensor-parallel-size 2"), nodes=2)


TINY_SETTINGS = [
    Setting("tiny", 2, ranks, 2, f"--block-size 128 --micro-batch-size 1 --parallelism {parallelism}")
    for ranks, parallelism in ((1, "none"), (4, "fsdp"))
]
COUNTERS = os.environ.get("COUNTERS_MODULE")


def check_device(settings: list[Setting]) -> bool:
    """Takes two steps in every setting, in a process of its own, and compares the second with the plan.

    Returns whether everything lies in its band. One process plays rank 0 of several, over torch's fake process group:
    the memory is that of a real rank, but for NCCL's buffers; the time is not, and is compared for one rank only. Where
    $COUNTERS_MODULE names a module that counts what a device does which computes nothing, the launches of the step are
    printed instead of its time.
    """
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, torch {torch.__version__}, commit {commit}")
    step = "launches" if COUNTERS else "step"
    print(f"| model, layers | ranks | plan | active | measured | ratio | reserved | measured | {step} | |")
    print("| --- " * 10 + "|")
    inside, errors = True, [0.0]
    for setting in settings:
        words = [sys.executable, __file__, "--measure", json.dumps(asdict(setting))]
        run = subprocess.run(words, capture_output=True, text=True, check=False)
        if run.returncode:
            reason = next((line for line in run.stderr.splitlines() if "does not fit" in line), run.stderr[-300:])
            inside &= "does not fit" in reason
            print(
                f"| {setting.size}, {setting.layers} | {setting.ranks} | {setting.flags} | {reason.strip()[-90:]} |",
                flush=True,
            )
            continue
        check = json.loads(run.stdout.splitlines()[-1])
        inside &= print_row(setting, check)
        if check["active_gib"]["measured"]:
            errors.append(check["active_gib"]["predicted"] / check["active_gib"]["measured"] - 1)
    print(f"largest error of active memory {max(map(abs, errors)):.2%}")
    return inside


def print_row(setting: Setting, check: dict) -> bool:
    """Prints predicted against measured of one setting, and returns whether all lie in their bands."""
    launches, active, reserved = check.pop("launches", None), check["active_gib"], check["reserved_gib"]
    name = f"| {setting.size}, {setting.layers} | {setting.ranks} | {check.pop('plan')}"
    missed = len(script.lines_of_check(check)) - 1  # the first line is the comparison
    if active["measured"] is None:
        print(f"{name} | {active['predicted']:.2f} | not on a CPU |", flush=True)
        return not missed
    low, high = reserved["band"]
    seconds = check.get("step_seconds", dict(band=None))
    step = f"{seconds['predicted']:.2f} / {seconds['measured']:.2f} s" if seconds["band"] else launches or "-"
    print(
        f"{name} | {active['predicted']:.2f} | {active['measured']:.2f} | "
        f"{active['predicted'] / active['measured']:.4f} | {low:.1f} to {high:.1f} | {reserved['measured']:.1f} | "
        f"{step} | {'MISSED' if missed else 'inside'} |",
        flush=True,
    )
    return not missed


def measure(setting: Setting) -> dict:
    """Takes two steps on random weights and full blocks, and returns what the script's own check says of the second."""
    play_rank_0(setting.ranks, setting.nodes)
    changes = dict(hidden_size=64, intermediate_size=172, num_attention_heads=4, vocab_size=1024)
    tiny = setting.size == "tiny"
    model_config = llama("7b", setting.layers, **changes) if tiny else llama(setting.size, setting.layers)
    model_config.max_position_embeddings = 4096
    with tempfile.TemporaryDirectory() as folder:  # the hook reads it, and nothing after it does
        model_config.save_pretrained(folder)
        words = ["--model-name-or-path", folder, "--batch-size", str(setting.documents * setting.ranks)]
        config = script.parse_config([*words, "--random-init", "--quiet", *setting.flags.split()])
        parallel = script.enable_advanced_parallelization(config, calls_training_step=True)
        model = script.load_model(parallel)
    if parallel.plan.strategy == "ddp":
        model.register_comm_hook(None, lambda _, bucket: answered(bucket.buffer()))
    optimizer = script.build_optimizer(model, config)
    script.compile_layers(model, parallel, steps=10**6)
    batch, state = full_batch(parallel), script.TrainingState.fresh(parallel.device)
    counters = importlib.import_module(COUNTERS).counters if COUNTERS else dict
    on_gpu = parallel.device.type == "cuda"
    for _ in range(2):  # as `RunLog` does: the first one allocates and compiles
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        before, began = counters(), time.perf_counter()
        result = script.training_step(model, optimizer, batch, 1e-5, state, parallel)
        after = counters()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    plan, found = parallel.plan, script.compare_with_plan(parallel, result, seconds)
    assert not plan.compiled or torch._dynamo.utils.counters["stats"]["unique_graphs"], "no layer was compiled"
    kind = ("compiled" if plan.compiled else "eager", plan.precision, "" if plan.packing else "padded")
    found["plan"] = ", ".join(filter(None, (plan.describe(), *kind)))
    if COUNTERS:
        del found["step_seconds"]
        found["launches"] = after["launches"] - before["launches"]
    elif setting.ranks > 1:
        found["step_seconds"]["band"] = None
    return found


def answered(bucket: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
    """Returns what DDP takes for a finished reduction; the fake process group's answer is nothing that it takes."""
    future = torch.futures.Future()
    future.set_result(bucket)
    return future


def play_rank_0(ranks: int, nodes: int) -> None:
    """Makes the script see `ranks` ranks, of which this process is the first and the others hold the same."""
    if ranks == 1:
        return
    environment = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks // nodes, GROUP_WORLD_SIZE=nodes)
    os.environ |= {name: str(value) for name, value in environment.items()}
    os.environ |= dict(MASTER_ADDR="localhost", MASTER_PORT="29500")
    alone = lambda act, gathered=False, **_: [act()] * ranks if gathered else act()  # noqa: E731
    mock.patch.object(script, "on_all_ranks", alone).start()  # unlike an assignment, it fails where the name is gone
    dist.distributed_c10d._store_based_barrier = lambda *_, **__: None  # new groups wait for nobody
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)


def full_batch(parallel: script.Parallel) -> script.GlobalBatch:
    """Returns a step's micro-batches in pinned memory, of documents that all fill their block."""
    plan, block = parallel.plan, parallel.config.block_size
    documents = SimpleNamespace(tokenizer=SimpleNamespace(eos_token_id=2, pad_token_id=None), block_size=block)
    make_rows = script.pack_rows if plan.packing else script.pad_rows
    rows = [list(range(5, 5 + block))] * plan.micro_batch_size
    micro_batch = script.with_targets(make_rows(rows, [0] * len(rows), documents))
    if parallel.device.type == "cuda":
        micro_batch = {name: tensor.pin_memory() for name, tensor in micro_batch.items()}
    micro_batches = [micro_batch] * plan.gradient_accumulation_steps
    count = parallel.config.batch_size
    return script.GlobalBatch(micro_batches, count * block, count * (block - 1), count * block**2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="against the tracker")
    parser.add_argument("--full", action="store_true", help="with --memory: the full shapes")
    parser.add_argument("--published", action="store_true", help="against published runs")
    parser.add_argument("--device", action="store_true", help="against two steps on this machine's GPU")
    parser.add_argument("--tiny", action="store_true", help="with --device: a tiny model, to try it on a CPU")
    parser.add_argument("--compile", choices=("yes", "no"), help="with --device: only compiled layers, or eager ones")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # a setting of --device, in this process
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(Setting(**json.loads(options.measure)))), flush=True)
        os._exit(0)  # there are no other ranks to say good-bye to
    if options.device:
        kinds = [options.compile] if options.compile else ["yes", "no"]
        settings = TINY_SETTINGS if options.tiny else [each for kind in kinds for each in settings_of(kind)]
        return 0 if check_device(settings) else 1
    passed, began = True, time.perf_counter()
    if options.memory or not options.published:
        passed &= check_memory(options.full)
    if options.published or not options.memory:
        error, ranked = check_published()
        medians = check_layouts()
        medians.pop("flash_attention2, tensor parallel")
        passed &= error <= 0.15 and ranked and all(0.9 <= median <= 1.1 for median in medians.values())
    print(f"{'passed' if passed else 'FAILED'} in {time.perf_counter() - began:.0f} s")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
