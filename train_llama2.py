"""Fully fine-tune Llama-2-13B on CNN/DailyMail summarisation, parallelised by one line.

    torchrun --standalone --nproc_per_node=gpu train_llama2.py --lr 1e-5        # one node, all its GPUs
    torchrun --nnodes=2 --nproc_per_node=gpu --rdzv_backend=c10d \\
             --rdzv_endpoint=HOST:29500 train_llama2.py --lr 1e-5               # several nodes
    python train_llama2.py --model-name-or-path tests/data/tiny_llama \\
             --dataset-name-or-path tests/data/news --block-size 512            # a laptop

`main()` holds one parallel-specific line, the hook `enable_advanced_parallelization(...)`. On Moreh's MoAI platform
the hook hands over to `torch.moreh.option.enable_advanced_parallelization()`. Everywhere else it looks at the
processes that torchrun started, the model's config and the devices, and sets up the fastest plan that fits.

The file goes from the overview to the details, roughly in the order in which `main()` uses them:
    1. This header             the words used, imports, the two kinds of error
    2. Flags                   every setting with its default, its help and its rule
    3. The run                 main()
    4. Training and evaluation the step, the learning rate, the validation loss, summaries and ROUGE
    5. The hook                what makes a script for one device run on many
    6. Data                    documents, tokens, masks, and how they are dealt to ranks and micro-batches
    7. Model                   loading, attention, the loss without logits, compiling, AdamW, pipeline stages
    8. Checkpoints             the save folder, stop signals, writing and resuming
    9. The final model         a Hugging Face folder with its model card
   10. Reporting               progress, metrics.jsonl, curves, and whether the plan was right
   11. The plan                memory and time of every way to execute a step, the choice, the devices
   12. The command line        parsing the flags, and the exit code of every way a run can end

Words used throughout:
    rank          one process, with one device. Rank 0 prints and writes the logs; the others are silent.
    data rank     ranks that work on the same documents form one data rank. Documents are dealt to data ranks.
    step          one update of the weights, from one global batch of --batch-size documents.
    micro-batch   the documents that go through one forward and backward pass of one data rank.
    micro-step    one micro-batch of every data rank, all at the same time.
    Shapes        B rows in a micro-batch, T tokens in a row, V the size of the vocabulary.

Every rank runs the same code, so every rank calls every function at the same point. A function that takes or holds a
`Parallel` may wait there for the other ranks; the few that one rank may call alone say so in their docstring.
"""

from __future__ import annotations

import argparse
import atexit
import bisect
import bz2
import collections
import concurrent.futures
import contextlib
import copy
import csv
import dataclasses
import difflib
import fcntl
import functools
import gzip
import hashlib
import heapq
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import logging
import lzma
import math
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn


def check_versions() -> None:
    """Ends the process with a one-line error where a package is missing or too old, instead of a traceback later."""
    for package, oldest in (("torch", "2.11"), ("transformers", "5.23"), ("datasets", "4.4"), ("accelerate", "1.15")):
        try:
            found = importlib.metadata.version(package)
            if tuple(map(int, re.findall(r"\d+", found)[:2])) >= tuple(map(int, oldest.split("."))):
                continue
            problem = f"{package} {found} is too old: the script needs {oldest} or newer"
        except importlib.metadata.PackageNotFoundError:
            problem = f"{package} is not installed: the script needs {oldest} or newer"
        print(f"error: {problem}; pip install -r requirements.txt", file=sys.stderr, flush=True)
        sys.exit(2)


check_versions()  # the one thing done at import

# What only a run needs (accelerate, datasets, checkpoints, DTensor) is imported where it is used, so that --help and a
# wrong flag are answered in half the time. transformers imports its own parts only when they are first named.
import huggingface_hub
import numpy as np
import psutil
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Optimizer
from tqdm.auto import tqdm

if TYPE_CHECKING:  # what annotations alone need
    from accelerate import Accelerator
    from datasets import Dataset
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.distributed import DistributedConfig

IGNORE_INDEX = -100  # the label that torch.nn.functional.cross_entropy ignores
GIB = 2**30


class UserError(Exception):
    """A mistake the user can correct. It ends the run with one `error:` line per problem and exit code 2."""

    def __init__(self, *problems: str):
        super().__init__("; ".join(problems))
        self.problems = problems


class RunError(Exception):
    """A failure at run time that every rank knows of. It ends the run with one `error:` line and exit code 1."""


def first_line(error: BaseException) -> str:
    """Returns the first non-empty line of the root cause's message, or its type where the message is empty."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= 300 else line[:297] + "..."  # a library's message may quote a whole article


# ----------------------------------------------------------------------------------------------------------------
# 2. Flags
# ----------------------------------------------------------------------------------------------------------------
# Each flag is one field of `Config`: its default and its help stand there and nowhere else, and its reader turns the
# word on the command line into a value or says which rule the word breaks. All problems of values are reported at once.

RECOMPUTATION_LEVELS = ("none", "every-4", "every-3", "every-2", "full")  # layers whose activations are recomputed
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
LARGEST_INTEGER = 2**31  # integer flags stay below this unless they set a limit of their own


@dataclass(frozen=True)
class Reader:
    """Turns a flag's word into its value. `convert` raises ValueError with the rule that the word breaks."""

    convert: Callable[[str], Any]
    metavar: str  # stands for the value in --help


TEXT = Reader(str, "STR")
PATH = Reader(os.path.expanduser, "PATH")  # the shell leaves a ~ after --flag= as it is


def one_of(*choices: str) -> Reader:
    def convert(word: str) -> str:
        if word not in choices:
            raise ValueError(f"is not one of {', '.join(choices)}")
        return word

    return Reader(convert, "{" + ",".join(choices) + "}")


def number(kind: type, minimum=-math.inf, above=-math.inf, below=math.inf) -> Reader:
    below = LARGEST_INTEGER if kind is int and below == math.inf else below

    def convert(word: str) -> float:
        try:
            value = kind(word)
        except ValueError:
            raise ValueError(f"is not {'a whole number' if kind is int else 'a number'}") from None
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("must be a finite number")
        if value < minimum:
            raise ValueError(f"must be at least {minimum}")
        if value <= above:
            raise ValueError(f"must be above {above}")
        if value >= below:
            raise ValueError(f"must be below {below:,.0f}")
        return value

    return Reader(convert, kind.__name__.upper())


def flag(default: Any, help: str, read: Reader = TEXT, unset: str | None = None, bare: str | None = None) -> Any:
    """Returns a field of `Config`. A default of False makes a switch.

    `unset` is the word for None, where the flag may be left open, and `bare` the value of a flag without a word.
    """
    return dataclasses.field(default=default, metadata=dict(help=help, read=read, unset=unset, bare=bare))


def usable_cores() -> int:
    """Returns how many cores this process may use. Slurm jobs and containers often have fewer than the node."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


AUTO_YES_NO = one_of("auto", "yes", "no")
POSITIVE = number(int, minimum=1)
# fmt: off


@dataclass(frozen=True)
class Config:
    """Every setting of a run. The field `batch_size` is the flag `--batch-size`."""

    model_name_or_path: str = flag("meta-llama/Llama-2-13b-hf", "causal LM to fine-tune: Hub id or local folder", PATH)
    dataset_name_or_path: str | tuple[str, ...] = flag(
        "abisee/cnn_dailymail", "Hub id, a local folder, or local files in jsonl, json, csv, tsv or parquet", PATH)
    dataset_config: str = flag("3.0.0", "configuration of a Hub dataset, or of a clone of one")
    article_column: str = flag("article", "column with the text to summarise")
    summary_column: str = flag("highlights", "column with the summary")
    max_train_samples: int | None = flag(None, "use at most this many training documents", POSITIVE, unset="all")
    max_eval_samples: int | None = flag(None, "use at most this many validation documents", POSITIVE, unset="all")
    block_size: int = flag(2048, "longest document in tokens; a longer article loses its end", POSITIVE)
    loss_on: str = flag("all", "tokens that are trained on: every one, or the summary's", one_of("all", "summary"))
    num_train_epochs: int = flag(1, "passes over the training documents", POSITIVE)
    max_steps: int | None = flag(
        None, "stop after this many optimizer steps, if the epochs have as many", POSITIVE, unset="none")
    batch_size: int = flag(64, "documents per optimizer step, over all devices together", POSITIVE)
    micro_batch_size: int | None = flag(
        None, "most documents per forward pass of a data rank; packed: a row of that many times --block-size tokens",
        POSITIVE, unset="auto")
    lr: float = flag(1e-5, "peak learning rate of AdamW; 0 measures without training", number(float, minimum=0))
    lr_scheduler: str = flag("cosine", "learning rate after warm-up", one_of("cosine", "linear", "constant"))
    warmup_ratio: float = flag(0.03, "share of the steps that warm up linearly", number(float, minimum=0, below=1))
    weight_decay: float = flag(
        0.0, "AdamW weight decay of the matrices; norms and biases have none", number(float, minimum=0))
    max_grad_norm: float = flag(
        1.0, "clip the global gradient norm to this; 0 turns clipping off", number(float, minimum=0))
    seed: int = flag(
        42, "order of the documents, held-out split, summarised documents, random weights",
        number(int, minimum=0, below=2**32))
    parallelism: str = flag(
        "auto", "what the data-parallel ranks do", one_of("auto", "none", "ddp", "fsdp", "hsdp"))
    pipeline_parallel_size: int | None = flag(
        None, "pipeline stages that the layers are cut into; auto: 1, or a divisor of the nodes where that is faster",
        POSITIVE, unset="auto")
    tensor_parallel_size: int | None = flag(
        None, "ranks of a node that share each layer's matrices; auto: 1, or 2, 4 or 8 where that is faster",
        POSITIVE, unset="auto")
    hsdp_shard_size: int | None = flag(
        None, "HSDP: ranks that share one sharded copy; auto: all of a node, or half of them on one node alone",
        POSITIVE, unset="auto")
    gradient_sync: str = flag(
        "auto", "FSDP and HSDP: reduce gradients every micro-batch, or once a step, from an unsharded fp32 gradient",
        one_of("auto", "micro-batch", "step"))
    reshard_after_forward: str = flag(
        "auto", "FSDP and HSDP: free gathered weights after the forward pass, or keep them for the backward pass",
        AUTO_YES_NO)
    activation_checkpointing: str = flag(
        "auto", "recompute the activations of no layer, every k-th or all of them in the backward pass",
        one_of("auto", *RECOMPUTATION_LEVELS))
    cpu_offload: str = flag("auto", "FSDP and HSDP: keep weights and optimizer in host memory", AUTO_YES_NO)
    precision: str = flag(
        "auto", "compute precision over fp32 weights; auto: bf16 on GPU, fp32 on CPU; bf16-states: all states in bf16",
        one_of("auto", "bf16", "fp32", "bf16-states"))
    packing: str = flag(
        "auto", "lay documents end to end instead of padding them; auto: where variable-length flash attention runs",
        AUTO_YES_NO)
    compile: str = flag(
        "auto", "compile the decoder layers; auto: on a GPU, in a run long enough to pay for it", AUTO_YES_NO)
    plan: str | None = flag(
        None, "print the plan for this machine, or for a cluster such as 2x8xH100-80GB,ib=400, and exit",
        unset="none", bare="here")
    plan_format: str = flag("table", "how --plan prints it", one_of("table", "json"))
    save_dtype: str = flag(
        "auto", "weights of the final model; auto: those of the compute precision", one_of("auto", "bf16", "fp32"))
    save_model_dir: str = flag("./llama2_summarization", "folder for checkpoints, logs and the final model", PATH)
    log_interval: int = flag(10, "optimizer steps between two lines of metrics", POSITIVE)
    eval_interval: int = flag(500, "optimizer steps between two evaluations", POSITIVE)
    save_interval: int = flag(500, "optimizer steps between two checkpoints", POSITIVE)
    keep_checkpoints: int = flag(2, "newest checkpoints that are kept; older ones are deleted", POSITIVE)
    resume: str = flag(
        "auto", "auto: go on from the save folder's newest checkpoint; a path: begin there if the save folder has none",
        PATH)
    resume_anyway: bool = flag(False, "resume although flags or data that shape the losses have changed")
    async_save: str = flag(
        "auto", "write checkpoints while training goes on; auto: if host memory has room for a copy", AUTO_YES_NO)
    rouge_samples: int = flag(
        0, "validation documents to summarise and score with ROUGE at every evaluation (package rouge-score)",
        number(int, minimum=0))
    test_samples: int | None = flag(
        0, "test documents to summarise and score after training, or all (package rouge-score)",
        number(int, minimum=0), unset="all")
    num_beams: int = flag(1, "beams for generating summaries, validation and test; 1 is greedy", POSITIVE)
    max_summary_tokens: int = flag(160, "longest generated summary in tokens, validation and test", POSITIVE)
    quiet: bool = flag(False, "print warnings, errors and the closing line only")
    report_to: str = flag("none", "experiment tracker", one_of("none", *TRACKERS))
    num_proc: int = flag(
        max(1, min(16, usable_cores() // 2)), "processes that tokenise: half the cores, at most 16", POSITIVE)
    dist_timeout_minutes: float = flag(
        60.0, "longest wait for another rank before all give up", number(float, above=0, below=1e6))
    random_init: bool = flag(False, "random weights from the model's config alone: for benchmarks")

    def __post_init__(self) -> None:
        """Raises UserError for a value that its flag would refuse: another script builds a `Config` without flags."""
        for name, field in FLAGS.items():
            value, read = getattr(self, name), field.metadata["read"]
            for each in value if isinstance(value, tuple) else [value]:
                try:
                    is_open = each is None and field.metadata["unset"] is not None
                    if not is_open and field.default is not False:
                        read.convert(str(each))
                except ValueError as broken_rule:
                    raise UserError(f"{flag_name(name)} {each} {broken_rule}") from None
        if self.plan_format != "table" and self.plan is None:
            raise UserError(f"--plan-format {self.plan_format} goes with --plan; add it")
        if self.hsdp_shard_size and self.parallelism != "hsdp":
            raise UserError(f"--hsdp-shard-size {self.hsdp_shard_size} needs --parallelism hsdp; add it")

    @property
    def columns(self) -> tuple[str, str]:
        return self.article_column, self.summary_column

    @property
    def dataset_paths(self) -> list[str]:
        named = self.dataset_name_or_path
        return [named] if isinstance(named, str) else list(named)

    @property
    def timeout(self) -> timedelta:
        return timedelta(minutes=self.dist_timeout_minutes)


# fmt: on
FLAGS = {field.name: field for field in dataclasses.fields(Config)}


def flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def shown_default(field: dataclasses.Field) -> Any:
    if field.default is None:
        return field.metadata["unset"]
    return "off" if field.default is False else field.default


# ----------------------------------------------------------------------------------------------------------------
# 3. The run
# ----------------------------------------------------------------------------------------------------------------
# `main()` is the whole run and reads like a script for one device. What differs between one device and many is decided
# by the hook and kept behind `Parallel`.


def main(argv: Sequence[str] | None = None) -> None:
    """Trains from the flags to the final model. Raises UserError for what the user can put right."""
    config = parse_config(argv)
    if config.plan:
        return print_plan(config)
    with enable_advanced_parallelization(config, calls_training_step=True) as parallel, StopSignals(parallel) as stop:
        torch.manual_seed(config.seed)
        prepare_save_folder(parallel)
        tokenizer = load_tokenizer(parallel)
        check_weights(parallel)
        train_set, eval_set, test_set = load_data(tokenizer, parallel)
        steps_per_epoch = math.ceil(len(train_set) / config.batch_size)
        total_steps = min(config.max_steps or sys.maxsize, config.num_train_epochs * steps_per_epoch)

        with Checkpoints(parallel, train_set, total_steps) as checkpoints:  # leaving waits for the last write
            model = load_model(parallel)
            optimizer = build_optimizer(model, config)
            state = checkpoints.resume(model, optimizer)
            check_setup(model, eval_set, parallel)  # may correct the plan, as may the next line
            compile_layers(model, parallel, total_steps - state.step)
            log = RunLog(parallel, state, total_steps, steps_per_epoch, checkpoints.asynchronous)
            batches = log.timing_the_wait(training_batches(train_set, state.step, total_steps, parallel))

            stop.listen()
            while True:  # what is due after the steps so far, then the next step; an evaluation cut short stays due
                if log.evaluation_due(state) and not stop.agreed():
                    with log.clock_stopped():
                        log.evaluation(state, evaluate(model, eval_set, parallel, stop))
                stopping = stop.agreed()  # asked again, so that a signal during the evaluation leads to a save
                finished = state.step == total_steps and not log.evaluation_due(state)
                saving = finished or stopping or state.step % config.save_interval == 0
                stop_if_broken(state, saving)
                if saving and state.step > checkpoints.saved_step:
                    with log.clock_stopped():
                        log.flush()
                        checkpoints.save(model, optimizer, state)
                if finished or stopping:
                    break
                stop.seconds_to_finish_and_save = log.seconds_per_step() + checkpoints.seconds_to_save()
                lr = learning_rate(state.step, total_steps, config)
                log.step(state, training_step(model, optimizer, next(batches), lr, state, parallel, stop))

        if not stopping:
            save_model(model, tokenizer, parallel, checkpoints.weights_hash_of(state))
            write_model_card(parallel, state, log)
            if test_set and evaluate_test(model, test_set, checkpoints.weights_hash_of(state), state, log, stop):
                write_model_card(parallel, state, log)
        if stop.stopping:  # in the loop, or while test documents were summarised
            return log.stopped(state, stop.signal_name, saved=checkpoints.saved_step == state.step)
        log.done(state)


# ----------------------------------------------------------------------------------------------------------------
# 4. Training and evaluation
# ----------------------------------------------------------------------------------------------------------------
# The loss of a step is the sum of the token losses of the whole global batch, divided by its number of label tokens, so
# it does not depend on how the batch is split into ranks, micro-batches and rows, up to rounding. (An exception is the
# auxiliary loss of a mixture-of-experts router, where a model's config asks for it: that depends on the split.) The
# validation loss weighs every token the same and counts each document once on any number of ranks.

NONFINITE_LIMIT = 5  # skipped updates in a row after which the run stops


@dataclass
class TrainingState:
    """Where the run stands. The tensors stay on the device, so counting costs no host sync.

    `skipped` counts all updates skipped so far, `skipped_in_a_row` those since the last update that was made. Once it
    has reached NONFINITE_LIMIT it stays there, because `stop_if_broken` does not look at every step, and the streak may
    be over when it does. `tokens` counts the documents' tokens so far, without padding.
    """

    skipped: Tensor
    skipped_in_a_row: Tensor
    step: int = 0
    tokens: int = 0
    evaluated_step: int = 0
    run_id: str = ""

    @classmethod
    def fresh(cls, device: torch.device) -> TrainingState:
        return cls(torch.zeros((), device=device), torch.zeros((), device=device), run_id=uuid.uuid4().hex[:12])

    def as_numbers(self) -> dict[str, Any]:
        """Returns the state for a checkpoint's manifest. Waits for the device."""
        return {name: int(value) if isinstance(value, Tensor) else value for name, value in vars(self).items()}

    def restore(self, saved: dict[str, Any]) -> None:
        for name, value in vars(self).items():
            setattr(self, name, torch.full_like(value, saved[name]) if isinstance(value, Tensor) else saved[name])


@dataclass(frozen=True)
class StepResult:
    """Loss and gradient norm of one step over all ranks, as tensors on the device, and what it was taken with."""

    loss: Tensor
    grad_norm: Tensor
    lr: float
    batch: GlobalBatch


def training_step(
    model: nn.Module,
    optimizer: Optimizer,
    batch: GlobalBatch,
    lr: float,
    state: TrainingState,
    parallel: Parallel,
    stop: StopSignals | None = None,
) -> StepResult | None:
    """Takes one optimizer step on a global batch. No host sync, except under CPU offload.

    An ordinary stop lets the step finish. Returns None if all ranks agreed to abandon it, because torchrun would not
    wait for it and a save: weights, moments and `state` are unchanged, but the run must end, because FSDP may hold
    gradients that `zero_grad` does not reach. Never under pipeline stages: see `StopSignals.agreed_to_abandon_step`.

    DDP and FSDP average gradients over the data ranks, so each loss is multiplied by their number. A step whose loss
    or gradient norm is not finite changes nothing: AdamW leaves weights and moments alone where `found_inf` is 1, in
    the way torch.amp.GradScaler skips steps.
    """
    model.train()
    pipeline, micro_batches = parallel.pipeline, batch.micro_batches
    loss_sum = torch.zeros((), device=parallel.device)
    for action, index in pipeline.schedule(len(micro_batches)):
        if action == "forward" and stop and stop.agreed_to_abandon_step():
            optimizer.zero_grad()
            return None
        with parallel.syncing_gradients(model, is_last=index == len(micro_batches) - 1):
            if action == "forward":
                loss_sum += pipeline.forward(model, micro_batches[index], parallel)
            else:
                pipeline.backward(parallel.data_parallel_size / batch.label_tokens)
    pipeline.finish_sending()
    loss = parallel.sum_over_data_ranks(loss_sum) / batch.label_tokens
    grad_norm = clip_gradients(model, parallel)

    skip = (~(torch.isfinite(loss) & torch.isfinite(grad_norm))).float()
    weight = optimizer.param_groups[0]["params"][0]
    optimizer.found_inf = skip.to(weight.device)  # a host sync only under CPU offload
    optimizer.rounding_seed = state.step  # for StochasticAdamW
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()

    state.step += 1
    state.tokens += batch.tokens
    state.skipped += skip
    in_a_row = state.skipped_in_a_row
    state.skipped_in_a_row = torch.where(in_a_row < NONFINITE_LIMIT, (in_a_row + skip) * skip, in_a_row)
    return StepResult(loss, grad_norm, lr, batch)


def clip_gradients(model: nn.Module, parallel: Parallel) -> Tensor:
    """Clips the global gradient norm, over the shards and stages of all ranks, and returns it as it was before."""
    parameters = list(model.parameters())
    for parameter in parameters:
        # Under tensor parallelism without FSDP, the gradients of RMSNorm weights are not summed over the ranks yet.
        if hasattr(parameter.grad, "placements") and parameter.grad.placements != parameter.placements:
            parameter.grad = parameter.grad.redistribute(placements=parameter.placements)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = parallel.pipeline.norm_over_stages(unsharded(nn.utils.get_total_norm(gradients)))
    nn.utils.clip_grads_with_norm_(parameters, parallel.config.max_grad_norm or math.inf, norm)
    return norm.to(parallel.device)


def token_loss_sum(model: nn.Module, micro_batch: dict[str, Tensor], parallel: Parallel) -> Tensor:
    """Runs a micro-batch through the model and returns the sum of its token losses, in fp32, on the device.

    The model computes the loss itself when it is given `predict_at` and `targets` (see `use_token_loss`). A pipeline
    stage before the last has no loss, and returns its hidden states (B, T, hidden size), under tensor parallelism those
    of this rank's tokens. Gradients flow through both.
    """
    inputs: dict[str, Any] = {
        name: tensor.to(parallel.device, non_blocking=True)
        for name, tensor in micro_batch.items()
        if name != "labels"  # `predict_at` and `targets` hold the same, without the ignored ones
    }
    if parallel.plan.packing:
        inputs["max_length"] = parallel.config.block_size  # an upper bound; a changing one would recompile the layers
    return model(**inputs, use_cache=False)


def learning_rate(step: int, total_steps: int, config: Config) -> float:
    """Returns the learning rate of update number `step`, counted from 0: linear warm-up, then the schedule."""
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    if config.lr_scheduler == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (1 - progress) if config.lr_scheduler == "linear" else config.lr


def stop_if_broken(state: TrainingState, saving: bool) -> None:
    """Raises RunError after too many skipped updates in a row. All ranks do, because all saw the same loss and norm.

    It looks every fifth step, because reading the count waits for the device, and before every save, because a
    checkpoint holds the count: one that was saved after five skips in a row would stop every run resumed from it.
    """
    if (saving or state.step % NONFINITE_LIMIT == 0) and state.skipped_in_a_row.item() >= NONFINITE_LIMIT:
        raise RunError(
            f"loss or gradient norm was not finite in {NONFINITE_LIMIT} steps in a row, as found at step {state.step}; "
            "those updates were skipped. Lower --lr, lengthen --warmup-ratio, or look at the data of the steps before"
        )


# ---- Evaluation ----------------------------------------------------------------------------------------------

ROUGE = ("rouge1", "rouge2", "rougeLsum")
TEST_REPORT_SECONDS = 60.0  # between two lines on how far the summaries of the test documents are


def evaluate(
    model: nn.Module, eval_set: Documents, parallel: Parallel, stop: StopSignals
) -> tuple[dict[str, float], list[dict[str, Any]]] | None:
    """Returns the scores of the validation split and the summaries written for --rouge-samples of its documents.

    The scores are named as in metrics.jsonl: `eval_loss` in nats a token, `eval_perplexity`, and where there are
    summaries `rouge1`, `rouge2` and `rougeLsum`. Returns None where the run was asked to stop meanwhile. Raises
    RunError where the loss is not finite.
    """
    loss = mean_token_loss(model, eval_set, evaluation_batches(eval_set, parallel), parallel, stop)
    if loss is None:
        return None
    if not math.isfinite(loss):
        raise RunError(
            f"the validation loss is {loss}: the weights are broken and are not saved. Everything saved before is "
            "kept. Lower --lr or lengthen --warmup-ratio, and to go back further delete the latest checkpoints"
        )
    drawn = np.random.default_rng(parallel.config.seed).permutation(len(eval_set))[: parallel.config.rouge_samples]
    samples = list(itertools.chain.from_iterable(summarise(model, eval_set, drawn, parallel, stop)))
    if len(samples) < len(drawn):
        return None
    perplexity = math.exp(loss) if loss < 700 else math.inf  # exp overflows above
    return dict(eval_loss=loss, eval_perplexity=perplexity, **rouge_scores(samples)), samples


@torch.no_grad()
def mean_token_loss(
    model: nn.Module,
    documents: Documents,
    batches: Sequence[np.ndarray],
    parallel: Parallel,
    stop: StopSignals | None = None,
) -> float | None:
    """Returns the mean token loss of these batches in nats, the same on every rank; None if asked to stop meanwhile.

    `batches` hold positions in `documents`. One host sync, at the end.
    """
    model.eval()
    loss_sum = torch.zeros((), device=parallel.device, dtype=torch.float64)
    label_tokens = 0
    for positions in tqdm(batches, "evaluating", leave=False, disable=not parallel.shows_bars):
        if stop and stop.agreed():
            return None
        batch = global_batch(documents, positions, parallel)
        for micro_batch in batch.micro_batches:
            loss_sum += parallel.pipeline.forward(model, micro_batch, parallel)
        label_tokens += batch.label_tokens
    parallel.pipeline.finish_sending()
    return (parallel.sum_over_data_ranks(loss_sum) / label_tokens).item()


def evaluate_test(
    model: nn.Module, test_set: Documents, weights_hash: str, state: TrainingState, log: RunLog, stop: StopSignals
) -> bool:
    """Summarises and scores --test-samples documents, drawn by the seed, and returns whether it came to its end.

    Summaries are appended to samples.jsonl as they come, marked with what made them. The same command, also on
    another number of ranks, writes only those that are missing. Summaries that other weights or flags have made are
    not counted.
    """
    parallel, config, row_numbers = log.parallel, log.config, test_set.dataset.with_format("numpy")["row"][:]
    drawn = np.random.default_rng(config.seed).permutation(len(test_set))[: config.test_samples]
    drawn = drawn[np.argsort(-test_set.lengths[drawn], kind="stable")]  # similar lengths share a call
    settings = dict(num_beams=config.num_beams, max_summary_tokens=config.max_summary_tokens)
    # Weights that were not saved get a random name, so that they match no earlier summaries. It differs between ranks,
    # and so does `made_by`, which rank 0 alone uses.
    weights = weights_hash or uuid.uuid4().hex
    made_by = json_checksum(dict(settings, weights=weights, documents=test_set.fingerprint))[:12]
    found = on_all_ranks(lambda: log.test_summaries(made_by), main_only=True)  # rank 0 reads, and all get the result
    done = {row: found[row] for row in row_numbers[drawn].tolist() if row in found}
    parallel.say(f"test      {len(drawn):,} documents to summarise, {len(done):,} of them done before")
    stop.seconds_to_finish_and_save = 0.0  # neither a step nor a save follows, so there is always time to stop
    began, done_before, last_report = time.perf_counter(), len(done), -math.inf
    for summaries in summarise(model, test_set, drawn[~np.isin(row_numbers[drawn], list(done))], parallel, stop):
        samples = [dict(sample, made_by=made_by) for sample in summaries]
        log.append_samples(state.step, "test", samples)
        done |= {sample["index"]: sample for sample in samples}
        seconds = time.perf_counter() - began
        if seconds - last_report > TEST_REPORT_SECONDS:
            last_report, rate = seconds, (len(done) - done_before) / seconds
            left = timedelta(seconds=round((len(drawn) - len(done)) / rate))
            parallel.say(f"test      {len(done):,}/{len(drawn):,} summaries, {rate:.2f} a second, {left} left")
    if len(done) < len(drawn):
        parallel.say(f"test      {len(done):,}/{len(drawn):,} summaries are kept; the same command writes the others")
        return False
    parallel.say(f"test      scoring {len(done):,} summaries and Lead-3 on rank 0")  # about 6 s per 1,000
    samples = [done[row] for row in sorted(done)]
    log.test(state, on_all_ranks(lambda: scores_of_test(samples, test_set, config), main_only=True), samples)
    return True


def scores_of_test(samples: Sequence[dict[str, Any]], documents: Documents, config: Config) -> dict[str, float]:
    """Returns the scores of test summaries and of Lead-3, each article's first three sentences, on the same documents.

    Any rank may call it alone.
    """
    articles = documents.texts[[sample["index"] for sample in samples]][config.article_column]
    lead = [" ".join(re.split(r"(?<=[.!?])\s+|\n+", article.strip())[:3]) for article in articles]
    leads = [dict(sample, summary=summary) for sample, summary in zip(samples, lead, strict=True)]
    return dict(
        **rouge_scores(samples, config.seed),
        mean_words=float(np.mean([len(sample["summary"].split()) for sample in samples])),
        ended_share=float(np.mean([sample["ended"] for sample in samples])),
        **{f"lead3_{name}": score for name, score in rouge_scores(leads, config.seed).items()},
    )


@torch.no_grad()
def summarise(
    model: nn.Module, documents: Documents, positions: np.ndarray, parallel: Parallel, stop: StopSignals
) -> Iterator[list[dict[str, Any]]]:
    """Yields the summaries of the documents at `positions`, in that order: a list for each joint call of all ranks.

    An entry of a list is a dict for one document: its row in the split as `index`, the data set's summary as
    `reference`, the model's as `summary`, and whether this one came to the end-of-sequence token as `ended`. Every rank
    gets the same. Ends early if the run was asked to stop. Sharded forward passes need all ranks: a data rank without
    documents repeats one, and `generate` keeps a sharded model running until all ranks have finished. With pipeline
    stages, `generate` uses transformers' own pipeline parallelism, not `parallel.pipeline`, and every stage gets the
    answers.
    """
    config, size, tokenizer = parallel.config, parallel.data_parallel_size, documents.tokenizer
    module = parallel.accelerator.unwrap_model(model)
    module.eval()
    settings = transformers.GenerationConfig(
        max_new_tokens=config.max_summary_tokens, num_beams=config.num_beams, do_sample=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=padding_id(tokenizer), bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    module.generation_config = settings  # or `generate` would take the model's own penalties and lengths from it
    calls = range(0, len(positions), size * prompts_at_a_time(parallel))
    for begin in tqdm(calls, "summarising", leave=False, disable=not parallel.shows_bars):
        if stop.agreed():
            return
        positions_of_call = positions[begin : begin + calls.step]
        mine = positions_of_call[parallel.data_rank :: size]
        rows = documents.dataset[mine if len(mine) else positions_of_call[:1]]
        references = documents.texts[rows["row"]][config.summary_column]
        prompts = [ids[:length] for ids, length in zip(rows["input_ids"], rows["prompt_length"], strict=True)]
        inputs = {name: tensor.to(parallel.device) for name, tensor in pad_prompts(prompts, tokenizer).items()}
        with generating(module, parallel):
            outputs = module.generate(**inputs, generation_config=settings)
        answers = outputs[:, inputs["input_ids"].shape[1] :].tolist()
        summaries = tokenizer.batch_decode(answers, skip_special_tokens=True)
        written = [
            dict(index=row, reference=r.strip(), summary=s.strip(), ended=tokenizer.eos_token_id in ids)
            for row, r, s, ids in zip(rows["row"], references, summaries, answers, strict=True)
        ]
        written_by_rank = on_all_ranks(lambda written=written: written, gathered=True)
        # Of tensor-parallel ranks, which write the same, one is taken. The first `size` are then the data ranks of the
        # first stage. Those of later stages have the same, and are not used.
        by_data_rank = written_by_rank[:: parallel.plan.tensor_parallel_size]
        yield [by_data_rank[place % size][place // size] for place in range(len(positions_of_call))]


def prompts_at_a_time(parallel: Parallel) -> int:
    """Returns how many documents a rank summarises in one call: a micro-batch, or fewer where memory has no room for
    their caches. It is the same on every rank, as the plan counts with the smallest device.

    A cache holds keys and values of every layer, per token of prompt and summary and per beam.
    """
    plan, config = parallel.plan, parallel.config
    parts = shapes_of_stages(parallel.shape, plan.pipeline_parallel_size, plan.tensor_parallel_size)
    shape = max(parts, key=lambda part: part.parameters)  # of the rank that holds most
    # weights, two moments, and DDP's buckets, which stay
    in_use = 0.0 if plan.cpu_offload else (4 if plan.strategy == "ddp" else 3) * plan.shard_bytes(shape)
    # FSDP gathers two layers and the head at a time; the head is counted twice, as a margin. Autocast copies all
    # weights. Plans with neither count as under FSDP, to be safe.
    gathered = 2 * (shape.layer_parameters + shape.head_and_norm_parameters)
    in_use += plan.compute_bytes * (shape.parameters if plan.autocasts else gathered)
    free_bytes = USABLE_SHARE * parallel.cluster.memory_gib * GIB - in_use
    # under autocast the rotary embedding returns keys in fp32; values are in bf16, and are counted with 4 bytes, too
    token_bytes = 2 * shape.layers * shape.kv_size * (4 if plan.autocasts else plan.compute_bytes)
    margin = 2 if config.num_beams > 1 else 1  # beam search copies the whole cache at every token, tensor by tensor
    document_tokens = (config.block_size + config.max_summary_tokens) * config.num_beams * margin
    return max(1, min(plan.micro_batch_size, int(free_bytes // (token_bytes * document_tokens))))


def pad_prompts(prompts: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Returns `input_ids` and `attention_mask` (B, T), padded at their beginning so that all prompts end together."""
    rows = [torch.as_tensor(prompt) for prompt in prompts]
    pad = functools.partial(pad_sequence, batch_first=True, padding_side="left")
    return dict(
        input_ids=pad(rows, padding_value=padding_id(tokenizer)), attention_mask=pad(list(map(torch.ones_like, rows)))
    )


@contextlib.contextmanager
def generating(model: PreTrainedModel, parallel: Parallel) -> Iterator[None]:
    """Inside, attention uses the padding mask, which prompts padded at the left need, and no layer is recompiled.

    Under tensor parallelism each rank holds all tokens meanwhile, because `generate` decodes one token at a time.
    """
    training_attention = model.config._attn_implementation
    if training_attention == "causal_attention":  # which ignores the padding mask; a model's own attention takes it
        model.set_attn_implementation("sdpa")
    parallel.tensor_parallel.splits_tokens = False
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        parallel.tensor_parallel.splits_tokens = True
        if training_attention == "causal_attention":
            model.set_attn_implementation(training_attention)


def rouge_scores(samples: Sequence[dict[str, str]], interval_seed: int | None = None) -> dict[str, float]:
    """Returns the mean F1 of ROUGE-1, ROUGE-2 and ROUGE-Lsum (Lin 2004) in percent, with stemming; {} for no samples.

    ROUGE-Lsum compares sentence by sentence, and expects one sentence a line. With a seed, `rouge1_low`, `rouge1_high`
    and so on are the bounds of the mean's 95% interval, from 1,000 bootstrap samples.
    """
    if not samples:
        return {}
    from rouge_score.rouge_scorer import RougeScorer  # an optional extra
    from rouge_score.scoring import BootstrapAggregator

    scorer = RougeScorer(ROUGE, use_stemmer=True)
    pairs = [[re.sub(r"(?<=[.!?]) +", "\n", each[kind]) for kind in ("reference", "summary")] for each in samples]
    scores = [scorer.score(reference, summary) for reference, summary in pairs]
    means = {name: 100 * float(np.mean([score[name].fmeasure for score in scores])) for name in ROUGE}
    if interval_seed is None:
        return means
    np.random.seed(interval_seed)  # the aggregator draws from NumPy's global generator
    aggregator = BootstrapAggregator()
    for score in scores:
        aggregator.add_scores(score)
    for name, interval in aggregator.aggregate().items():
        means[f"{name}_low"] = 100 * float(interval.low.fmeasure)
        means[f"{name}_high"] = 100 * float(interval.high.fmeasure)
    return means


# ----------------------------------------------------------------------------------------------------------------
# 5. The hook
# ----------------------------------------------------------------------------------------------------------------
# The hook joins the processes, chooses the fastest plan that fits and returns a `Parallel`. The functions that load the
# model, build batches and take a step ask the `Parallel` for the few things that differ between one device and many.

MOAI_WORDS = "plan      moai: torch.moreh.option.enable_advanced_parallelization() was called, and the platform decides"


def enable_advanced_parallelization(config: Config, calls_training_step: bool = False) -> Parallel:
    """Prepares this process to train on all devices there are, and returns the plan for it as a `Parallel`.

    Where `torch.moreh` exists, MoAI takes over: the platform shows its whole cluster as one device, and the script
    goes on as one plain process. Elsewhere the plan follows from the processes that torchrun started, the model's
    config and the devices' memory. Call it once, before the model is built: `load_model(parallel)` then returns the
    model in the plan's parallel form, and a plain `model(...)` and `loss.backward()` train it, in another script's loop
    too: `enable_advanced_parallelization(Config(model_name_or_path=...))`. In such a loop rows must be padded at their
    end, because training computes plain causal attention without looking at the mask. Raises UserError where the model
    cannot be read, or the plan that was asked for cannot work.

    `calls_training_step` says that the caller takes its steps with `training_step` on batches of `training_batches`, as
    `main` does. Pipeline stages need it, because a stage alone has no loss. Tensor parallelism needs it too: each rank
    takes a part of the tokens of every row, whose width those batches make a multiple of 8. Without it no plan with
    either is chosen or accepted, rows are padded and layers not compiled unless the flags ask for it, and memory is
    planned for a loop that computes all logits.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    on_moai = hasattr(torch, "moreh")
    if on_moai:
        torch.moreh.option.enable_advanced_parallelization()
    else:
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the old name; where it is set, the new one would override it
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # read at the first CUDA allocation
        start_process_group(config)
    check_that_flags_agree(config)
    on_all_ranks(lambda: check_optional_packages(config))
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",  # the plan's precision is set by `load_model`; the environment may hold another
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.save_model_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
    )
    quieten_libraries(accelerator.is_local_main_process, config.quiet)
    cluster = find_cluster()
    model_config, shape = on_all_ranks(lambda: read_model_shape(config))
    if not calls_training_step:
        # why the caller's loop can have neither pipeline stages (uncuttable) nor tensor parallelism (unsplittable)
        own_loop = "a loop of your own has to take training_step on training_batches, and pass calls_training_step=True"
        shape = dataclasses.replace(shape, uncuttable=own_loop, unsplittable=own_loop, computes_all_logits=True)
        settled = {name: "no" for name in ("packing", "compile") if getattr(config, name) == "auto"}
        config = dataclasses.replace(config, **settled)
    if on_moai:
        choice, plan, words = None, moai_plan(shape, config), MOAI_WORDS
    else:
        choice = choose_plan(shape, cluster, config)
        refuse_what_does_not_fit(choice, cluster)
        plan, words = choice.chosen.plan, describe_choice(choice, shape, cluster, config)
    pipeline = Pipeline(plan, accelerator.device, config.timeout)
    tensor_parallel = TensorParallel(plan.tensor_parallel_size)
    parallel = Parallel(config, accelerator, cluster, model_config, shape, plan, choice, pipeline, tensor_parallel)
    parallel.say(words)
    if config.packing == "auto" and cluster.has_gpu and shape.unpackable and not on_moai:
        parallel.say(f"packing   no: {shape.unpackable}, so rows are padded")
    if (gpus := torch.cuda.device_count()) > 1 and cluster.world_size == 1 and not on_moai:
        parallel.say(f"  note      1 of {gpus} GPUs; torchrun --nproc_per_node=gpu uses them all")
    return parallel


def moai_plan(shape: ModelShape, config: Config) -> Plan:
    """Returns the plan of a run on MoAI, where nothing is sharded or synchronised here, because the platform does it.

    One forward takes the whole batch, unless --micro-batch-size is given. Raises UserError for flags that would take
    the decision from the platform.
    """
    decided_by_moai = (
        "parallelism", "pipeline_parallel_size", "tensor_parallel_size", "gradient_sync", "reshard_after_forward",
        "cpu_offload", "packing",
    )  # fmt: skip
    for name in decided_by_moai:
        if (value := getattr(config, name)) not in ("auto", "none", "no", None, 1):
            raise UserError(f"{flag_name(name)} {value} is not for MoAI, which parallelises by itself; leave it out")
    check_block(shape, config)
    micro_batch_size = config.micro_batch_size or config.batch_size
    recompute = "none" if config.activation_checkpointing == "auto" else config.activation_checkpointing
    return Plan(
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=math.ceil(config.batch_size / micro_batch_size),
        activation_checkpointing=recompute,
        precision="bf16" if config.precision == "auto" else config.precision,
        compiled=config.compile == "yes",
    )


def check_optional_packages(config: Config) -> None:
    """Raises UserError for a flag that needs a package which is not installed."""
    from accelerate.tracking import get_available_trackers

    for name in ("rouge_samples", "test_samples"):
        if getattr(config, name) != 0 and importlib.util.find_spec("rouge_score") is None:
            raise UserError(
                f"{flag_name(name)} needs the package rouge-score, which is not installed; pip install rouge-score"
            )
    if config.report_to != "none" and config.report_to not in map(str, get_available_trackers()):
        raise UserError(
            f"--report-to {config.report_to} needs a package that is not installed; "
            f"pip install {config.report_to.replace('_', '-')}"
        )


def quieten_libraries(is_first_on_node: bool, quiet: bool) -> None:
    """Silences a few known warnings, bars where there is no terminal, and all but one process of each node."""
    import datasets

    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    # it warns that matrices cut by FSDP and by tensor parallelism are gathered in two steps, not in one
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    # it warns of a CUDA toolkit on a machine without a GPU
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    if not is_first_on_node or quiet or not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()
        huggingface_hub.utils.disable_progress_bars()
    if not is_first_on_node:
        transformers.logging.set_verbosity_error()


@dataclass
class Parallel:
    """What the hook returns: the flags, the processes, the plan, and what differs between one device and many.

    Only `check_setup` and `compile_layers` change it: they correct the plan where the model turns out not to allow it.
    A context manager: leaving it ends the trackers and the process group.
    """

    config: Config
    accelerator: Accelerator
    cluster: Cluster
    model_config: PretrainedConfig
    shape: ModelShape
    plan: Plan
    choice: Choice | None  # None on MoAI
    pipeline: Pipeline = dataclasses.field(default_factory=lambda: Pipeline(Plan()))
    tensor_parallel: TensorParallel = dataclasses.field(default_factory=lambda: TensorParallel())

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def data_rank(self) -> int:
        """Which share of the documents this rank works on: batches, evaluations and summaries are dealt by it.

        Ranks are numbered with pipeline stages outermost, and innermost those that share a layer's matrices.
        """
        return self.rank // self.plan.tensor_parallel_size % self.data_parallel_size

    @property
    def data_parallel_size(self) -> int:
        return self.plan.data_parallel_size

    def with_plan(self, **changes: Any) -> Parallel:
        """Returns the same with these fields of the plan changed."""
        return dataclasses.replace(self, plan=dataclasses.replace(self.plan, **changes))

    @property
    def shows_bars(self) -> bool:
        return self.is_main and sys.stderr.isatty() and not self.config.quiet

    def __enter__(self) -> Parallel:
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type in ORDERLY_EXITS:
            if error is not None:
                error.is_known_to_all = True  # to `command_line`, which finds no process group any more
            if self.accelerator.num_processes > 1:
                # gloo's threads need the GIL to release their last message. Until then two things fail: destroying a
                # DDP model hangs, because it waits with the GIL held; and Python aborts as it ends (only in other
                # scripts: this one ends with `leave`).
                time.sleep(0.1)
            self.accelerator.end_training()
        elif issubclass(error_type, torch.OutOfMemoryError):
            print(explain_out_of_memory(self), file=sys.stderr, flush=True)
            error.explained = True

    def say(self, *words: object, always: bool = False) -> None:
        """Prints on rank 0, above a progress bar if there is one. Any rank may call it alone.

        Under --quiet it prints only warnings and what is marked `always`.
        """
        line = " ".join(map(str, words))
        if self.is_main and (always or not self.config.quiet or line.startswith("WARNING")):
            # the disk that holds the log is full, its reader is gone, or the terminal cannot show a letter
            with contextlib.suppress(OSError, UnicodeError):
                tqdm.write(line, file=sys.stdout)  # Accelerator.print speaks once per node
                sys.stdout.flush()

    def sum_over_data_ranks(self, tensor: Tensor) -> Tensor:
        """Returns `tensor` summed over the data ranks, on every rank. No host sync.

        The stages before the last hold no losses, and add zeros. Ranks that share a layer's matrices hold the same
        value, so the sum over all ranks is divided by their number.
        """
        self.pipeline.note("the sum of all ranks' losses")
        return self.accelerator.reduce(tensor, "sum") / self.plan.tensor_parallel_size

    def cpu_group(self) -> dist.ProcessGroup | None:
        """Returns a new group of all ranks for messages in host memory; None for one process."""
        if self.accelerator.num_processes == 1:
            return None
        # a shorter timeout than NCCL's, whose watchdog would abort the process before we could report anything
        return dist.new_group(backend="gloo", timeout=0.8 * self.config.timeout)

    def node_main_first(self, act: Callable[[], Any]) -> Any:
        """Runs `act` on each node's first process, then on the others, which then find its files in the cache.

        Returns its result; a failure on any rank is raised on all of them.
        """
        is_first = self.accelerator.is_local_main_process
        result = on_all_ranks(lambda: act() if is_first else None)  # the other ranks wait here, over gloo
        return on_all_ranks(lambda: result if is_first else act())

    def syncing_gradients(self, model: nn.Module, is_last: bool) -> contextlib.AbstractContextManager:
        """Wraps the forward or the backward pass of a micro-batch, and decides whether its gradients are reduced now.

        DDP waits for the last micro-batch. FSDP reduces each one, unless the plan's `gradient_sync` is `step`: then it
        keeps an unsharded fp32 gradient (4 bytes per parameter) until the last. HSDP does the same inside the sharded
        group. Its all-reduce across replicas, in which each rank sends only its own gradient shard, always waits for
        the last micro-batch.
        """
        if self.plan.uses_fsdp:
            model.set_requires_gradient_sync(is_last or self.plan.gradient_sync == "micro-batch")
            model.set_requires_all_reduce(is_last)
        elif not is_last:
            return self.accelerator.no_sync(model)
        return contextlib.nullcontext()


ORDERLY_EXITS = (None, UserError, RunError)  # raised on all ranks alike, so collectives still work on the way out


def explain_out_of_memory(parallel: Parallel) -> str:
    """Returns the error line of a rank that ran out of memory: what was predicted and allocated, which flags help.

    Any rank may call it alone.
    """
    plan = parallel.plan
    words = f" It ran {plan.describe()}."
    remedy = f"--micro-batch-size {max(1, plan.micro_batch_size // 2)}"
    if parallel.choice is not None:
        memory = predict(parallel.shape, parallel.cluster, plan, parallel.config).memory_gib
        words += f" The plan expected {memory.active:.1f} GiB active, at {memory.peak_moment}, and"
        words += f" {memory.reserved:.1f} of {parallel.cluster.memory_gib:.1f} in use with all that CUDA and NCCL take."
        remedy = flags_for_less_memory(parallel.shape, parallel.cluster, plan, memory, parallel.config)
    if parallel.device.type == "cuda":
        words += f" PyTorch's peak was {torch.cuda.max_memory_allocated() / GIB:.1f} GiB allocated and"
        words += f" {torch.cuda.max_memory_reserved() / GIB:.1f} reserved, beside CUDA's context and NCCL's buffers."
    return (
        f"error: rank {parallel.rank} ran out of memory.{words} Try {remedy}; saved checkpoints are kept, and "
        "the same command with these flags resumes from the newest"
    )


def on_all_ranks(
    act: Callable[[], Any], main_only: bool = False, gathered: bool = False, group: dist.ProcessGroup | None = None
) -> Any:
    """Runs `act` on every rank and returns its result; if it fails on any rank, raises the same error on all of them.

    A UserError or RunError is raised as it is, anything else as a RunError that names the rank. Out of memory, a broken
    device and a connection that NCCL has lost are raised on this rank alone, at once: it ends, and torchrun ends the
    others. With `main_only` rank 0 acts alone, and all ranks get its result. With `gathered` the results of all ranks
    are returned as a list. `act` may wait for other ranks only if, whenever it fails, it fails on all of them: if it
    failed on one, the others would wait for that one. Costs one exchange of messages in host memory.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    result = failure = None
    try:
        if rank == 0 or not main_only:
            result = act()
    except (UserError, RunError) as error:
        failure = error
    except (torch.OutOfMemoryError, torch.AcceleratorError, dist.DistError):
        raise
    except Exception as error:
        failure = RunError(f"{first_line(error)}, on rank {rank}")
        failure.__cause__ = error
    outcome = (result if main_only or gathered else None, failure)
    outcomes = [outcome]
    if dist.is_initialized():
        outcomes = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, outcome, group=group)
    for _, failure_of_rank in outcomes:
        if failure_of_rank is not None:  # it has travelled without its cause, so each rank adds its own, if any
            raise failure_of_rank from getattr(failure, "__cause__", None)
    if gathered:
        return [result for result, _ in outcomes]
    return outcomes[0][0] if main_only else result


def check_that_flags_agree(config: Config) -> None:
    """Raises UserError where nodes were started with different flags. Paths may differ, and --num-proc."""
    own_of_each_node = [name for name, field in FLAGS.items() if field.metadata["read"] is PATH or name == "num_proc"]
    shared = {name: value for name, value in vars(config).items() if name not in own_of_each_node}
    shared["resume"] = "auto" if config.resume == "auto" else "a path"
    check_that_nodes_agree(shared, "the same flags")


def check_that_nodes_agree(values: dict[str, Any], remedy: str) -> None:
    """Raises UserError where the values of flags, or what they stand for, differ between nodes."""
    of_ranks = on_all_ranks(lambda: values, gathered=True)
    for name in values:
        if len(found := {str(each[name]) for each in of_ranks}) > 1:
            raise UserError(f"{flag_name(name)} is {' and '.join(sorted(found))} on different nodes; give all {remedy}")


def start_process_group(config: Config) -> None:
    """Joins the ranks that torchrun started, if any. Gloo beside NCCL: for messages and offloaded tensors.

    torchrun --max-restarts reuses its key-value store, which still holds the addresses of dead ranks, so each attempt
    uses a key prefix of its own. On several nodes the agents may count attempts differently, and the prefix is left
    out; there, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment.
    """
    if dist.is_initialized():
        return
    check_launcher()
    if "LOCAL_RANK" not in os.environ:
        return
    how: dict[str, Any] = dict(timeout=config.timeout)
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store, how["rank"], how["world_size"] = next(dist.rendezvous("env://", timeout=how["timeout"]))
        attempt = f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        how["store"] = dist.PrefixStore(attempt, store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", **how)
    if any(on_all_ranks(torch.cuda.is_available, gathered=True)):
        on_all_ranks(take_gpu)  # after the group exists, so that rank 0 can report a rank that has none


def take_gpu() -> None:
    """Makes GPU number LOCAL_RANK of this node the current one. Raises UserError where there is none."""
    gpus, processes = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if processes > gpus:
        raise UserError(
            f"torchrun --nproc_per_node started {processes} processes on node {platform.node()}, which has {gpus} "
            "GPUs; use --nproc_per_node=gpu"
        )
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def check_launcher() -> None:
    """Raises UserError where the environment is neither torchrun's nor that of a lone process."""
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"):
        if os.environ.get(name, "").lower() in ("1", "true", "yes"):
            raise UserError(f"{name} is set, but the script shards by itself; start it with torchrun, or unset it")
    numbers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    sizes_of_launchers = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    for name in (*numbers, *sizes_of_launchers):
        if not (value := os.environ.get(name) or "0").isdigit():
            raise UserError(
                f"{name}={value} in the environment is not a whole number; start with torchrun, or unset it"
            )
    if "LOCAL_RANK" in os.environ or "RANK" in os.environ:
        if missing := [name for name in (*numbers, "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
            given = "RANK" if "RANK" in os.environ else "LOCAL_RANK"
            raise UserError(f"{given} is set, but not {', '.join(missing)}; use torchrun, which sets all of them")
        return
    for name in ("WORLD_SIZE", *sizes_of_launchers):
        if (tasks := int(os.environ.get(name) or 1)) > 1:
            raise UserError(f"{tasks} processes were started without torchrun ({name}); start one torchrun per node")


def unsharded(tensor: Tensor) -> Tensor:
    """Returns the whole of a DTensor (a collective), and any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_part(tensor: Tensor) -> Tensor:
    """Returns the part of a DTensor that this rank holds, and any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


# ----------------------------------------------------------------------------------------------------------------
# 6. Data
# ----------------------------------------------------------------------------------------------------------------
# A document is an opening mark, the article and a closing mark (together the prompt), then the summary and the
# end-of-sequence token. One that is too long for the block loses the end of its article, and of its summary only where
# that does not fit by itself; padding is never trained on. The order of the documents follows from the seed and the
# epoch alone, so any number of ranks, under any plan, sees the same global batches.

PROMPT_OPEN, PROMPT_CLOSE = "[SUMMARIZE] ", " [/SUMMARIZE]\n"
PAD_MULTIPLE = 8  # rows are padded to a multiple of 8 tokens, the tile of the tensor cores
HELD_OUT_SHARE = 0.05  # of the training split, held out where the data has no validation split
MANY_DOCUMENTS = 1000  # above which it pays to start the processes of --num-proc
COMPRESSIONS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# Files of these formats look like data, but are only reported as not read.
UNREAD_FORMATS = (".txt", ".arrow", ".xlsx", ".pkl", ".zip", ".zst")
NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # what lies beside data
SPLIT_WORDS = dict.fromkeys(("train", "training"), "train") | dict.fromkeys(("test", "testing"), "test")
SPLIT_WORDS |= dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation", "holdout"), "validation")
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "*chat_template*"
)  # fmt: skip


def load_tokenizer(parallel: Parallel) -> PreTrainedTokenizerBase:
    """Returns the model's own tokenizer. Raises UserError if it cannot be used."""
    return parallel.node_main_first(lambda: read_tokenizer(parallel.config, parallel.shape))


def read_tokenizer(config: Config, shape: ModelShape) -> PreTrainedTokenizerBase:
    shown = f"--model-name-or-path {config.model_name_or_path}"
    folder = model_folder(config.model_name_or_path, TOKENIZER_FILES)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        marks = tokenizer(PROMPT_OPEN + PROMPT_CLOSE, split_special_tokens=True)["input_ids"]
        if not marks:
            raise ValueError("its vocabulary is empty or missing")
    except Exception as error:  # transformers raises all kinds of errors on malformed files
        present = any(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern))
        reason = first_line(error) if present else "it holds none of a tokenizer's files"
        raise UserError(
            f"{shown} has no tokenizer that loads ({reason}); add its tokenizer.json, or pip install sentencepiece for "
            "a tokenizer.model"
        ) from error
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {shown} must be a fast one with an end-of-sequence token; use a model that has them"
        )
    largest = max(*marks, tokenizer.eos_token_id, len(tokenizer) - 1)
    if largest >= shape.vocabulary:
        raise UserError(
            f"the tokenizer of {shown} has ids up to {largest}, but the model only {shape.vocabulary} embeddings; use "
            "the tokenizer that belongs to it"
        )
    taken = len(marks) + 1
    if config.block_size < taken + 2:  # a token of summary, and one to spare: around a text the marks may take one more
        raise UserError(
            f"--block-size {config.block_size} leaves no room for a summary: the prompt's marks and the "
            f"end-of-sequence token take {taken} tokens; use at least 64"
        )
    return tokenizer


@dataclass(frozen=True)
class Documents:
    """Encoded, memory-mapped documents, the length and label count of each, and the settings for building batches."""

    dataset: Dataset  # with the columns of `encode_batch`
    texts: Dataset  # the split they come from, by row
    lengths: np.ndarray
    label_counts: np.ndarray
    tokenizer: PreTrainedTokenizerBase
    block_size: int
    loss_on: str

    def __len__(self) -> int:
        return len(self.dataset)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short hash of the tokens, and of where their labels begin. Any rank may ask for it alone."""
        tokens = hashlib.sha256(self.label_counts.tobytes() if self.loss_on == "summary" else b"")
        for chunk in self.dataset.data.column("input_ids").chunks:
            tokens.update(chunk.flatten().to_numpy())
        return tokens.hexdigest()[:12]


def load_data(tokenizer: PreTrainedTokenizerBase, parallel: Parallel) -> tuple[Documents, Documents, Documents | None]:
    """Returns the encoded documents for training, validation and test, and reports what was cut, dropped and padded.

    There are test documents under --test-samples only. Raises UserError where nothing is left of a split.
    """
    splits = load_documents(parallel)
    encoded = {name: encode_documents(split, tokenizer, parallel) for name, split in splits.items()}
    found = f"data with fingerprints {', '.join(documents.fingerprint for documents in encoded.values())}"
    check_that_nodes_agree({"dataset_name_or_path": found}, "the same files")
    for name, documents in encoded.items():
        if not documents.label_counts.sum():
            raise UserError(
                f"no label tokens are left in the {len(documents.texts)} {name} documents; their articles or summaries "
                f"are empty{or_leave_out_test(name)}"
            )
        if parallel.is_main:  # the audit deals every document, which takes time
            parallel.say(audit(name, documents, parallel))
    return encoded["train"], encoded["validation"], encoded.get("test")


def load_documents(parallel: Parallel) -> dict[str, Dataset]:
    """Returns the splits as datasets of text: `train`, `validation` and, under --test-samples, `test`.

    Each node's first process downloads and reads; the others find what it has cached. Raises UserError for data that
    cannot be used.
    """
    config = parallel.config
    splits, lines = parallel.node_main_first(lambda: read_splits(config))
    for line in lines:
        parallel.say(f"data      {line}")
    found = ", ".join(f"{len(split)} {name}" for name, split in sorted(splits.items()))
    check_that_nodes_agree({"dataset_name_or_path": f"{found} documents"}, "the same files")
    if "validation" not in splits:
        splits |= hold_out(splits["train"], config)
        held_out = len(splits["validation"])
        parallel.say(f"data      no validation split: {held_out} of the training documents are held out, by the seed")
    limits = dict(train=config.max_train_samples, validation=config.max_eval_samples, test=None)
    return {name: splits[name].select(range(len(splits[name]))[: limits[name]]) for name in limits if name in splits}


def hold_out(train: Dataset, config: Config) -> dict[str, Dataset]:
    """Returns a training split in two: `train`, and 5% of the documents that hold text, drawn by the seed.

    What holds no text comes last in `train`, and is dropped and counted like that of any split.
    """
    holds_text: list[bool] = []
    for batch in train.select_columns(list(config.columns)).iter(1000):  # row by row it would take ten times as long
        holds_text += map(has_text, batch[config.article_column], batch[config.summary_column])
    with_text, without_text = np.flatnonzero(holds_text), np.flatnonzero(np.logical_not(holds_text))
    if len(with_text) < 2:
        raise UserError(f"{shown_data(config)} has {len(with_text)} documents with text; that is too few to train on")
    held_out = max(1, round(HELD_OUT_SHARE * len(with_text)))
    # drawn as by `train_test_split`, which cannot do it without writing files of row numbers
    order = np.random.default_rng(config.seed).permutation(with_text)
    rows = dict(train=np.append(order[held_out:], without_text), validation=order[:held_out])
    return {name: train.select(those, keep_in_memory=True) for name, those in rows.items()}


def has_text(article: str | None, summary: str | None) -> bool:
    return bool(article and summary and article.strip() and summary.strip())


def or_leave_out_test(split: str) -> str:
    """Returns the end of an error line on a split; for the test split it names the flag that asked for it."""
    return ", or leave out --test-samples" if split == "test" else ""


def shown_data(config: Config) -> str:
    return f"--dataset-name-or-path {' '.join(config.dataset_paths)}"


def read_splits(config: Config) -> tuple[dict[str, Dataset], list[str]]:
    """Returns the splits by name, and lines that say what was read and what was not."""
    import datasets

    cache, paths, shown = Path(datasets.config.HF_DATASETS_CACHE), config.dataset_paths, shown_data(config)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        raise UserError(
            f"the Hugging Face cache {cache} cannot be written to ({error.strerror}); set HF_HOME to a folder that can"
        ) from error
    local, lines = len(paths) > 1 or is_local(paths[0]), []
    try:
        if local and any((Path(paths[0]) / name).is_file() for name in ("dataset_dict.json", "state.json")):
            splits = saved_splits(paths, config)
        elif local:
            files, lines = find_data_files(paths, config)
            splits = {name: read_files(those, config) for name, those in files.items()}
        else:
            splits = by_meaning(datasets.load_dataset(paths[0], config.dataset_config))
    except UserError:
        raise
    except Exception as error:
        if isinstance(error.__cause__, UserError):  # of a file's reader, which `from_generator` has wrapped
            raise UserError(f"{shown}: {error.__cause__}") from error
        check_hub = "check the name, --dataset-config and the network, or name local files"
        remedy = "repair it or leave it out" if local else check_hub
        raise UserError(f"{shown} cannot be read ({first_line(error)}); {remedy}") from error
    required = ("train",) if config.test_samples == 0 else ("train", "test")
    for name in required:
        if name not in splits:
            found = ", ".join(splits) or "none"
            raise UserError(
                f"{shown} has no {name} split, only {found}; name a file or split {name}{or_leave_out_test(name)}"
            )
    for name in [each for each in splits if each not in (*required, "validation")]:
        lines.append(f"not read: the split {name}" + (", without --test-samples" if name == "test" else ""))
        del splits[name]
    for name, split in splits.items():
        if not len(split):
            raise UserError(
                f"{shown} has no {name} documents; fill that split or leave it out{or_leave_out_test(name)}"
            )
        check_columns(split, name, config)
    return splits, lines


def saved_splits(paths: list[str], config: Config) -> dict[str, Dataset]:
    """Returns the splits of a folder written by `save_to_disk`."""
    import datasets
    from datasets.fingerprint import Hasher

    if len(paths) > 1:
        raise UserError(f"{shown_data(config)}: {paths[0]} is a folder of save_to_disk; name it alone")
    saved = datasets.load_from_disk(paths[0])
    saved = saved if isinstance(saved, dict) else {"train": saved}
    for split in saved.values():  # the fingerprint tells how a dataset was made, and stays when its files are replaced
        states = file_states(Path(each["filename"]) for each in split.cache_files)
        split._fingerprint = Hasher.hash((split._fingerprint, states))
    return by_meaning(saved)


def file_states(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Returns place, size and time of change of each file, on which a cache of what is read from it depends."""
    return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def by_meaning(splits: dict[str, Dataset]) -> dict[str, Dataset]:
    """Returns the splits under the names train, validation and test, whichever word they go by; others keep theirs.

    Those that mean the same are joined.
    """
    import datasets

    found: dict[str, list[Dataset]] = {}
    for name, split in splits.items():
        found.setdefault(SPLIT_WORDS.get(str(name).lower(), str(name)), []).append(split)
    return {name: datasets.concatenate_datasets(those) for name, those in found.items()}


def is_local(name: str) -> bool:
    return os.path.exists(name) or looks_like_a_path(name)


def looks_like_a_path(name: str) -> bool:
    """A Hub id is `name` or `owner/name`; anything else was meant as a path."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or format_of(Path(name)) in ROW_READERS


def format_of(file: Path) -> str:
    """Returns the suffix that tells a file's format, without that of its compression; "" for what lies beside data."""
    name = file.stem if file.suffix.lower() in COMPRESSIONS else file.name
    return "" if file.name in NO_DATA else Path(name).suffix.lower()


def find_data_files(paths: list[str], config: Config) -> tuple[dict[str, list[Path]], list[str]]:
    """Returns the files by split, and lines that say what is read and what is not.

    A file's split is told by its name, or else by the innermost folder below the given one whose name tells one. The
    name of a given folder, or of the folder that a given file lies in, counts only if there are several such folders. A
    file for which none of these tells a split is train. Hidden files in a folder are skipped, and test files unless
    --test-samples asks for them. Raises UserError where a given path holds nothing that can be read.
    """
    shown, lines = shown_data(config), []
    by_split: dict[str, dict[Path, Path]] = {}
    folders = [path if path.is_dir() else path.parent for path in map(Path, paths)]
    roots = [folder.parent for folder in folders] if len(set(folders)) > 1 else folders
    for path, root in zip(map(Path, paths), roots, strict=True):
        if not path.exists():
            raise UserError(f"{shown}: {path} does not exist; give one Hub id alone, or existing folders or files")
        # a clone of a Hub dataset has a folder for each of its configurations, with the same documents
        folder = own if (own := path / config.dataset_config).is_dir() else path
        holds_data, lines_before = False, len(lines)
        for file in sorted(folder.rglob("*")) if path.is_dir() else [path]:
            if path.is_dir() and any(part.startswith(".") for part in file.relative_to(folder).parts):
                continue
            if file.is_symlink() and (file.is_dir() or not file.exists()):
                leads = "to a folder; name that folder to read it" if file.is_dir() else "nowhere"
                lines.append(f"not read: {file}, a link {leads}")
            elif file.is_file() and format_of(file) in ROW_READERS:
                of_split = by_split.setdefault(split_of(file.relative_to(root)), {})
                of_split.setdefault(file.resolve(), file)  # what is named twice for a split counts once
                holds_data = True
            elif file.is_file() and format_of(file) in UNREAD_FORMATS:
                lines.append(f"not read: {file}; save it as one of {', '.join(ROW_READERS)}")
        if not holds_data:
            found = "".join(f" ({line})" for line in lines[lines_before:][:3])
            raise UserError(f"{shown}: {path} holds no data{found}; give files in one of {', '.join(ROW_READERS)}")
    if config.test_samples == 0 and (unread := by_split.pop("test", {})):
        lines.append(f"not read: {len(unread)} file{'s' * (len(unread) > 1)} of a test split, without --test-samples")
    if not by_split:
        raise UserError(f"{shown} holds no file to train on ({lines[-1]}); name a file or split train")
    files = {split: list(those.values()) for split, those in by_split.items()}
    for split, those in files.items():
        formats = {ROW_READERS[format_of(file)]: f"{format_of(file)} ({file.name})" for file in those}
        if len(formats) > 1:  # probably the same documents twice
            found = " and ".join(sorted(formats.values()))
            raise UserError(f"{shown} holds {split} files in {found}; leave out all but one format")
        by_stem: dict[str, Path] = {}
        for file in those:
            stem = str(file)[: str(file).lower().rindex(format_of(file))]
            if by_stem.setdefault(stem, file) is not file:
                raise UserError(f"{shown} holds {file} and {by_stem[stem].name}; leave out one of them")
        names = ", ".join(file.name for file in those[:3]) + (", ..." if len(those) > 3 else "")
        lines.append(f"{split}: {len(those)} file{'s' * (len(those) > 1)} ({names})")
    return files, lines


def split_of(name: str | Path) -> str:
    """Returns the split that the last telling word of a file's name names, or that of the innermost folder."""
    for part in reversed(Path(name).parts):
        words = re.findall(r"[^\W\d_]+", part.lower())
        if named := [SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS]:
            return named[-1]
    return "train"


def read_files(files: list[Path], config: Config) -> Dataset:
    """Returns article and summary of every row of these files, from a cache that changes with the files.

    The readers of `datasets` are not used, because they read some files wrongly without a word: csv rows with too many
    fields or stray quotes, the text "None", and file names that look like patterns.
    """
    import datasets
    from datasets.fingerprint import Hasher

    readers = (rows_of, is_text, text_lines, json_values, *ROW_READERS.values())

    def rows() -> Iterator[dict[str, str | None]]:
        row = None
        for row in itertools.chain.from_iterable(rows_of(file, config) for file in files):
            yield row
        if row is None:
            raise UserError(f"no rows are in {' and '.join(map(str, files[:3]))}; fill or leave out what is empty")

    return datasets.Dataset.from_generator(
        rows,
        features=datasets.Features({column: datasets.Value("large_string") for column in config.columns}),
        fingerprint=Hasher.hash((file_states(files), config.columns, *map(inspect.getsource, readers))),
    )


def rows_of(file: Path, config: Config) -> Iterator[dict[str, str | None]]:
    """Yields article and summary of each row. Raises UserError with the row that does not hold them as text."""
    try:
        for number, row in ROW_READERS[format_of(file)](file, config):
            texts = {column: row.get(column) for column in config.columns}
            for column, text in texts.items():
                if not is_text(text):
                    shown = textwrap.shorten(json.dumps(text, default=str), 60)
                    problem = f"{column} is {shown}, which is not text; repair it or leave it out"
                    raise UserError(f"{file}, row {number}: {problem}")
            yield texts
    except UserError:
        raise
    except Exception as error:  # each format and each compression has errors of its own
        raise UserError(f"{file} cannot be read ({first_line(error)}); repair it or leave it out") from error


def is_text(value: Any) -> bool:
    """Returns whether a value is None or text in UTF-8. Half of an emoji is not, as \\ud83d where JSON text was cut."""
    try:
        return value is None or isinstance(value.encode(), bytes)
    except (AttributeError, UnicodeEncodeError):
        return False


def json_rows(file: Path, config: Config) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the number and the value of each row: an object a line, or else the values of the whole file."""
    names: dict[str, None] = {}
    begins = next((line.strip() for line in text_lines(file) if line.strip()), "")
    if begins.startswith("[") or begins == "{":  # a list, or objects of several lines: these rows come parsed
        rows, parse = enumerate(json_values("".join(text_lines(file))), 1), lambda value: value
    else:
        rows, parse = ((number, line) for number, line in enumerate(text_lines(file), 1) if line.strip()), json.loads
    for number, row in rows:
        try:
            value = parse(row)
            names |= dict.fromkeys(value.keys())
        except (ValueError, AttributeError) as error:
            reason = f"but {textwrap.shorten(str(row), 60)}"
            if isinstance(error, json.JSONDecodeError):
                reason = f"{error.msg}, at character {error.pos + 1}"
            raise UserError(
                f"{file}, row {number} is not a JSON object ({reason}); repair it or leave it out"
            ) from error
        yield number, value
    if names:
        check_names(str(file), names, config)


def json_values(text: str) -> list[Any]:
    """Returns the JSON values that follow each other in a text; a list counts as its elements."""
    values, place, decoder = [], 0, json.JSONDecoder()
    while nonspace := re.compile(r"\S").search(text, place):
        value, place = decoder.raw_decode(text, nonspace.start())
        values += value if isinstance(value, list) else [value]
    return values


def csv_rows(file: Path, config: Config) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the number and the fields of each row by the rules of RFC 4180, which find a quote that is not closed.

    The separator is the one with which the first row names the columns that were asked for.
    """
    csv.field_size_limit(LARGEST_INTEGER - 1)  # the default refuses articles of more than 131,072 characters
    wanted, first = set(config.columns), next(text_lines(file), "")
    separator = next((each for each in ",;\t" if wanted <= set(next(csv.reader([first], delimiter=each), []))), ",")
    rows, number = csv.reader(text_lines(file), delimiter=separator, strict=True), 0
    try:
        header = next(rows, [])
        check_names(f"the first row of {file}", header, config)
        if twice := [name for name in config.columns if header.count(name) > 1]:
            raise UserError(f"the first row of {file} names the column {twice[0]} twice; rename one")
        number = 1
        for number, row in enumerate(rows, 2):
            if row and len(row) != len(header):
                raise UserError(
                    f"{file}, row {number} has {len(row)} fields, but the first row names {len(header)} columns; put "
                    f"texts that hold a {separator!r} or a line break in double quotes, and double the quotes in them"
                )
            if row:
                yield number, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UserError(
            f"{file}, row {number + 1} is no row of a csv file ({error}); put texts that hold quotes or line breaks in "
            "double quotes, and double the quotes in them"
        ) from error


def parquet_rows(file: Path, config: Config) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(file)
    check_names(str(file), table.schema_arrow.names, config)
    batches = table.iter_batches(1000, columns=list(config.columns))
    return enumerate(itertools.chain.from_iterable(batch.to_pylist() for batch in batches), 1)


ROW_READERS = dict.fromkeys((".jsonl", ".json", ".ndjson"), json_rows) | dict.fromkeys((".csv", ".tsv"), csv_rows)
ROW_READERS[".parquet"] = parquet_rows


def text_lines(file: Path) -> Iterator[str]:
    """Yields the lines of a file, compressed or not, in UTF-8 with or without a byte-order mark."""
    with COMPRESSIONS.get(file.suffix.lower(), open)(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{file} is not UTF-8 (line {number}: {error.reason}); convert it") from error


def check_columns(split: Dataset, name: str, config: Config) -> None:
    """Raises UserError where a split lacks a column that was asked for, or holds no text in it."""
    check_names(f"the {name} split", split.column_names, config, or_leave_out_test(name))
    for flag_field in ("article_column", "summary_column"):
        column = getattr(config, flag_field)
        is_text = getattr(split.features[column], "dtype", None) in ("string", "large_string", "string_view")
        values = [str(value) for value in split[column][:100] if value is not None]
        if not is_text or (values and all(re.fullmatch(r"\s*[-+\d.,]+\s*", value) for value in values)):
            raise UserError(
                f"{flag_name(flag_field)} {column} of the {name} split holds no text, but "
                f"{textwrap.shorten(values[0] if values else 'nothing', 60)}; name a text column"
                + or_leave_out_test(name)
            )


def check_names(place: str, names: Iterable[str], config: Config, remedy: str = "") -> None:
    """Raises UserError where a column that was asked for is not among the names at this place."""
    shown = ", ".join(textwrap.shorten(name, 40) for name in list(names)[:9])
    for flag_field in ("article_column", "summary_column"):
        if (column := getattr(config, flag_field)) not in names:
            raise UserError(
                f"{flag_name(flag_field)} {column} is not a column of {place}, which has {shown or 'none'}; "
                f"name another{remedy}"
            )


# ---- Data: tokens --------------------------------------------------------------------------------------------


def encode_documents(split: Dataset, tokenizer: PreTrainedTokenizerBase, parallel: Parallel) -> Documents:
    """Returns the non-empty documents of a split as tokens.

    Each node's first process encodes them, caches them under a hash of all that shapes the result, and the other
    ranks and later runs map them into memory from there.
    """
    import datasets
    from datasets.fingerprint import Hasher

    config = parallel.config
    eos = tokenizer.eos_token_id  # from tokenizer_config.json, not part of the backend
    recipe = (split._fingerprint, tokenizer.backend_tokenizer.to_str(), eos, PROMPT_OPEN, PROMPT_CLOSE)
    settings = (*config.columns, config.block_size, datasets.__version__)
    code = [inspect.getsource(function) for function in (has_text, encode_batch, fit_block)]
    encoded_as = Hasher.hash((recipe, settings, code))
    features = datasets.Features(
        input_ids=datasets.List(datasets.Value("int32")),
        **dict.fromkeys(("row", "prompt_length", "length", "tokens_cut"), datasets.Value("int32")),
        summary_cut=datasets.Value("bool"),
    )

    def encode() -> Dataset:
        return split.map(
            lambda articles, summaries, rows: encode_batch(articles, summaries, tokenizer, config.block_size, rows[0]),
            batched=True,
            input_columns=list(config.columns),
            with_indices=True,
            remove_columns=split.column_names,
            num_proc=config.num_proc if len(split) > MANY_DOCUMENTS else None,
            new_fingerprint=encoded_as,
            # by itself `datasets` writes beside the split's source, which may not be ours
            cache_file_name=str(Path(datasets.config.HF_DATASETS_CACHE) / f"cache-{encoded_as}.arrow"),
            features=features,
            desc="tokenising",
        )

    encoded = parallel.node_main_first(encode)
    columns = encoded.with_format("numpy")
    lengths, prompt_lengths = (np.asarray(columns[name][:], dtype=np.int64) for name in ("length", "prompt_length"))
    # The first token is predicted from nothing, so it has no label.
    label_counts = lengths - (np.maximum(prompt_lengths, 1) if config.loss_on == "summary" else 1)
    return Documents(encoded, split, lengths, label_counts, tokenizer, config.block_size, config.loss_on)


def encode_batch(
    articles: Sequence[str | None],
    summaries: Sequence[str | None],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    first_row: int = 0,
) -> dict[str, list]:
    """Returns by column, for each pair without an empty article or summary, its `row` in the split and its document.

    The other columns are those of `fit_block`.
    """
    texts = enumerate(zip(articles, summaries, strict=True), first_row)
    pairs = {row: pair for row, pair in texts if has_text(*pair)}
    columns: dict[str, list] = {n: [] for n in ("input_ids", "prompt_length", "length", "tokens_cut", "summary_cut")}
    columns["row"] = list(pairs)
    if not pairs:
        return columns
    # split_special_tokens: an article that happens to contain "</s>" holds four characters, not a control token. (A
    # Unigram tokenizer, unlike Llama's, may have it as an ordinary piece too, and takes that.)
    encoded = tokenizer(
        [PROMPT_OPEN + article + PROMPT_CLOSE + summary for article, summary in pairs.values()],
        split_special_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    for (article, _), ids, offsets in zip(pairs.values(), encoded["input_ids"], encoded["offset_mapping"], strict=True):
        article_end = len(PROMPT_OPEN) + len(article)
        bounds = (len(PROMPT_OPEN), article_end, article_end + len(PROMPT_CLOSE))
        ends = [end for _, end in offsets]
        if ids[-1] == tokenizer.eos_token_id and ends[-1] == 0:  # some tokenizers append it themselves
            ids, ends = ids[:-1], ends[:-1]
        # A token belongs to the part that holds its last character; special tokens, whose end is 0, to the opening.
        starts = [bisect.bisect_right(ends, bound) for bound in bounds]
        document = fit_block(ids, starts, tokenizer.eos_token_id, block_size)
        for name, value in document.items():
            columns[name].append(value)
    return columns


def fit_block(ids: list[int], starts: list[int], eos_token_id: int, block_size: int) -> dict[str, Any]:
    """Returns the document in at most `block_size` tokens, end-of-sequence token included.

    `starts` are the indices in `ids` at which article, closing mark and summary begin. The excess is cut
    from the end of the article; the summary is cut only if it does not fit by itself.
    """
    article_start, closing_start, summary_start = starts
    excess = max(0, len(ids) + 1 - block_size)
    article_end = max(article_start, closing_start - excess)
    kept = ids[:article_end] + ids[closing_start:]
    summary_cut = len(kept) + 1 > block_size
    input_ids = [*kept[: block_size - 1], eos_token_id]
    return dict(
        input_ids=input_ids,
        prompt_length=article_end + summary_start - closing_start,
        length=len(input_ids),
        tokens_cut=closing_start - article_end,
        summary_cut=summary_cut,
    )


# ---- Data: masks ---------------------------------------------------------------------------------------------


def create_mask(input_ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Returns the attention mask of `input_ids` (..., T): 1 for a real token, 0 for padding, same shape, int64.

    Padding is the run of `padding_id` tokens that trails the document; inside the document the same id is a real token.
    Where it is the end-of-sequence id too, the first of the run is the document's own; a row of nothing else is all
    padding.
    """
    pad_id = padding_id(tokenizer)
    from_the_end = (input_ids == pad_id).flip(-1)
    trailing = from_the_end.long().cumprod(-1).flip(-1)
    if pad_id == tokenizer.eos_token_id:
        own_end = (trailing.cumsum(-1) == 1) & (trailing == 1)
        has_document = (trailing == 0).any(-1, keepdim=True)
        trailing = trailing - (own_end & has_document).long()
    return 1 - trailing


def mask_pads(inputs: Tensor, tokenizer: PreTrainedTokenizerBase, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Returns the labels of `inputs` (..., T): a copy in which padding is `ignore_index`, so it is never trained on."""
    return inputs.masked_fill(create_mask(inputs, tokenizer) == 0, ignore_index)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id that pads rows. Llama-2 has none of its own, so its end-of-sequence id serves."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


# ---- Data: batches -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GlobalBatch:
    """One data rank's part of a global batch, with the token counts of the whole batch.

    Each of `micro_batches` holds `input_ids` and `labels` (B, T) int64. Padded rows add `attention_mask` (B, T). Packed
    rows have B = 1 and add `position_ids` (1, T), which begin again with every document, and `cu_seq_lens`
    (documents + 1) int32, where the documents begin and end. `predict_at` (N,) int64 are the positions in the flattened
    rows that predict a label, and `targets` (N,) those labels; to find them on the GPU would cost a host sync.
    `squared_lengths` is the sum of the documents' squared lengths, with which the FLOPs of attention grow.
    """

    micro_batches: list[dict[str, Tensor]]
    tokens: int
    label_tokens: int
    squared_lengths: int


def training_batches(
    documents: Documents, first_step: int, total_steps: int, parallel: Parallel
) -> Iterator[GlobalBatch]:
    """Yields this data rank's part of every global batch from `first_step` on, across epochs.

    The step alone determines where to begin, and batches already consumed are not read again. A batch is built in this
    process, in a few milliseconds, while the device works on the previous step. There are no DataLoader workers: they
    would be forked beside a checkpoint's writing thread, and would need an open file for every tensor they hand over.
    """
    steps_per_epoch = math.ceil(len(documents) / parallel.config.batch_size)
    for step in range(first_step, total_steps):
        epoch, consumed = divmod(step, steps_per_epoch)
        if step == first_step or consumed == 0:
            batches = epoch_batches(documents, epoch, parallel.config)
        yield global_batch(documents, batches[consumed], parallel)


def epoch_batches(documents: Documents, epoch: int, config: Config) -> list[np.ndarray]:
    """Returns the positions of the documents of each global batch of an epoch; the last batch may be smaller.

    The order is drawn from the seed and the epoch alone.
    """
    order = np.random.default_rng((config.seed, epoch)).permutation(len(documents))
    return np.split(order, range(config.batch_size, len(documents), config.batch_size))


def evaluation_batches(documents: Documents, parallel: Parallel) -> list[np.ndarray]:
    """Returns every document once, longest first, in batches of one micro-batch's documents per data rank.

    With packing a batch holds four times as many, because short documents share a row, and a larger choice fills rows
    better. Any rank may call it alone.
    """
    order = np.argsort(-documents.lengths, kind="stable")
    size = parallel.data_parallel_size * parallel.plan.micro_batch_size * (4 if parallel.plan.packing else 1)
    return np.split(order, range(size, len(order), size))


def global_batch(documents: Documents, positions: np.ndarray, parallel: Parallel) -> GlobalBatch:
    """Returns this data rank's part of the batch of the documents at `positions`, in pinned memory on a GPU.

    Any rank may call it alone.
    """
    lengths = documents.lengths[positions]
    dealt = deal(lengths, parallel.data_parallel_size, parallel.plan, documents.block_size)
    mine = [positions[by_data_rank[parallel.data_rank]] for by_data_rank in dealt]
    micro_batches = [with_targets(micro_batch_of(documents, each, parallel.plan)) for each in mine]
    if parallel.device.type == "cuda":
        micro_batches = [{name: tensor.pin_memory() for name, tensor in each.items()} for each in micro_batches]
    return GlobalBatch(
        micro_batches,
        tokens=int(lengths.sum()),
        label_tokens=int(documents.label_counts[positions].sum()),
        squared_lengths=int((lengths**2).sum()),
    )


def micro_batch_of(documents: Documents, positions: np.ndarray, plan: Plan) -> dict[str, Tensor]:
    """Returns the documents as one micro-batch, padded or packed; without documents, a short one without labels.

    Sharded forward passes need all ranks, so a rank with nothing left still makes the call. Its row is attended to
    like any other, because a row without a single visible token gives NaN in some attention kernels.
    """
    make_rows = pack_rows if plan.packing else pad_rows
    whole_tiles = plan.tensor_parallel_size > 1  # its 2, 4 or 8 ranks share out the tokens of a row
    if not len(positions):
        filler = [documents.tokenizer.eos_token_id] * PAD_MULTIPLE
        micro_batch = make_rows([filler], [PAD_MULTIPLE], documents)
        if "attention_mask" in micro_batch:
            micro_batch["attention_mask"] = torch.ones_like(micro_batch["input_ids"])
        return micro_batch
    rows = documents.dataset[positions]
    label_starts = rows["prompt_length"] if documents.loss_on == "summary" else [0] * len(positions)
    return make_rows(rows["input_ids"], label_starts, documents, whole_tiles)


def pad_rows(
    rows: list[list[int]], label_starts: list[int], documents: Documents, whole_tiles: bool = False
) -> dict[str, Tensor]:
    """Returns rows side by side, padded to the longest. Each has no label before its `label_starts`.

    With `whole_tiles` their width is a multiple of 8 also where the block is not.
    """
    pad_id = padding_id(documents.tokenizer)
    padded = pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True, padding_value=pad_id)
    width = padded_width(padded.shape[1], documents.block_size)
    if whole_tiles:
        width += -width % PAD_MULTIPLE
    input_ids = F.pad(padded, (0, width - padded.shape[1]), value=pad_id)
    labels = mask_pads(input_ids, documents.tokenizer)
    labels[torch.arange(width) < torch.tensor(label_starts)[:, None]] = IGNORE_INDEX
    return dict(input_ids=input_ids, attention_mask=create_mask(input_ids, documents.tokenizer), labels=labels)


def padded_width(longest: int, block_size: int) -> int:
    """Returns the width of a padded row: its longest document, rounded up to a multiple of 8 within the block.

    (The row of a rank that has no documents may be longer than a tiny block.)
    """
    return max(longest, min(block_size, math.ceil(longest / PAD_MULTIPLE) * PAD_MULTIPLE))


def pack_rows(
    rows: list[list[int]], label_starts: list[int], documents: Documents, whole_tiles: bool = False
) -> dict[str, Tensor]:
    """Returns the documents `rows` end to end, as one row. No document has a label before its `label_starts`, nor at
    its first token in any case.

    With `whole_tiles` the row is filled up to a multiple of 8 by a document of padding, which no other sees.
    """
    if whole_tiles and (missing := -sum(map(len, rows)) % PAD_MULTIPLE):
        rows = [*rows, [padding_id(documents.tokenizer)] * missing]
        label_starts = [*label_starts, missing]
    position_ids = torch.cat([torch.arange(len(row)) for row in rows])
    input_ids = torch.cat([torch.as_tensor(row) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    without_label = position_ids < torch.tensor(label_starts).clamp(min=1).repeat_interleave(lengths)
    return dict(
        input_ids=input_ids[None],
        position_ids=position_ids[None],
        labels=input_ids.masked_fill(without_label, IGNORE_INDEX)[None],
        cu_seq_lens=F.pad(lengths.cumsum(0), (1, 0)).int(),
    )


def with_targets(micro_batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the micro-batch with `predict_at` and `targets`; without labels, one ignored target is added.

    Then the head still runs on every rank, which FSDP needs.
    """
    next_labels = F.pad(micro_batch["labels"], (0, 1), value=IGNORE_INDEX)[:, 1:].flatten()
    predict_at = (next_labels != IGNORE_INDEX).nonzero().flatten()
    if not len(predict_at):
        predict_at = torch.zeros(1, dtype=torch.long)
    return dict(micro_batch, predict_at=predict_at, targets=next_labels[predict_at])


# ---- Data: dealing documents to data ranks and micro-batches -------------------------------------------------


def deal(lengths: np.ndarray, data_parallel_size: int, plan: Plan, block_size: int) -> list[list[np.ndarray]]:
    """Returns `dealt[micro_step][data_rank]` for the plan, as indices into `lengths`.

    A packed row holds at most a full micro-batch's tokens.
    """
    if plan.packing:
        return pack_documents(lengths, data_parallel_size, plan.micro_batch_size * block_size)
    return deal_documents(lengths, data_parallel_size, plan.micro_batch_size)


def deal_documents(lengths: np.ndarray, data_parallel_size: int, micro_batch_size: int) -> list[list[np.ndarray]]:
    """Returns `dealt[micro_step][data_rank]`, positions into `lengths`; each document exactly once.

    Longest first, the data ranks in turn: documents of like length share a micro-batch, so little is padded, and all
    ranks of a micro-step carry like loads. Every data rank gets the same number of micro-batches, and sizes differ by
    one at most.
    """
    size, order = data_parallel_size, np.argsort(-lengths, kind="stable")
    micro_steps = math.ceil(len(order) / (size * micro_batch_size))
    # cut by micro-batch first, so that ranks have unequal numbers in one micro-step at most
    parts = np.array_split(order, micro_steps * size)
    # dealt in turn within a micro-step, so that no rank gets all the long ones
    steps = [np.concatenate(parts[first : first + size]) for first in range(0, len(parts), size)]
    return [[step[data_rank::size] for data_rank in range(size)] for step in steps]


def pack_documents(lengths: np.ndarray, data_parallel_size: int, row_tokens: int) -> list[list[np.ndarray]]:
    """Returns `dealt[micro_step][data_rank]` like `deal_documents`, for few, even rows of at most `row_tokens` tokens.

    Longest first, each document into the emptiest row (Graham 1969, "Bounds on multiprocessing timing anomalies": at
    most 4/3 of the best longest row). If that overfills a row, tries again with one more row per data rank. Rows of
    like length share a micro-step, in which ranks wait for each other.
    """
    order = np.argsort(-lengths, kind="stable")
    micro_steps = max(1, math.ceil(lengths.sum() / (data_parallel_size * row_tokens)))
    while True:
        rows: list[list[int]] = [[] for _ in range(micro_steps * data_parallel_size)]
        loads = [(0, row) for row in range(len(rows))]
        for position in order:
            load, row = loads[0]
            heapq.heapreplace(loads, (load + int(lengths[position]), row))
            rows[row].append(position)
        if max(loads)[0] <= row_tokens:
            break
        micro_steps += 1
    by_load = [np.array(rows[row], dtype=np.int64) for _, row in sorted(loads, reverse=True)]
    return [by_load[step * data_parallel_size : (step + 1) * data_parallel_size] for step in range(micro_steps)]


def audit(name: str, documents: Documents, parallel: Parallel) -> str:
    """Returns a line on what encoding cut or dropped of a split, and how evenly its batches deal the rest to ranks.

    Any rank may call it alone.
    """
    plan, block_size = parallel.plan, documents.block_size
    is_train = name == "train"
    batches = epoch_batches(documents, 0, parallel.config) if is_train else evaluation_batches(documents, parallel)
    columns = documents.dataset.with_format("numpy")
    cut, summaries_cut = np.asarray(columns["tokens_cut"][:]), np.asarray(columns["summary_cut"][:])
    loads = []  # tokens computed, padding included: a row per micro-step, a column per data rank
    for batch in batches:
        lengths = documents.lengths[batch]
        for by_data_rank in deal(lengths, parallel.data_parallel_size, plan, block_size):
            loads.append([computed_tokens(lengths[positions], plan, block_size) for positions in by_data_rank])
    loads, tokens, dropped = np.array(loads), documents.lengths.sum(), len(documents.texts) - len(documents)
    waiting = loads.max(axis=1).sum() / loads.mean(axis=1).sum()  # all ranks wait for the busiest in each micro-step
    return (
        f"data      {name}: {len(documents):,} documents, {tokens:,} tokens (mean {tokens / len(documents):,.0f}); "
        f"{(cut > 0).sum():,} articles cut by {cut.sum():,} tokens; {summaries_cut.sum():,} summaries cut; "
        f"{dropped:,} empty documents dropped; {1 - tokens / loads.sum():.1%} padding; the busiest rank "
        f"computes {waiting - 1:.1%} more than the mean"
    )


def computed_tokens(lengths: np.ndarray, plan: Plan, block_size: int) -> int:
    """Returns the tokens, padding to the longest included, of a micro-batch of documents of these lengths."""
    if plan.packing or not len(lengths):
        return int(lengths.sum())
    return len(lengths) * padded_width(int(lengths.max()), block_size)


# ----------------------------------------------------------------------------------------------------------------
# 7. Model
# ----------------------------------------------------------------------------------------------------------------
# Any causal LM of transformers, with fp32 master weights unless --precision is bf16-states. Under FSDP and HSDP each
# rank reads its own shard from the files and never holds the whole. For Llama and most others, attention builds no
# T x T mask and the loss never builds all logits.

HEAD_CHUNK_TOKENS = 1024  # positions whose logits exist at the same time
COMPILE_SECONDS = 120.0  # estimated time to compile the layers
WEIGHT_FILES = ("*.safetensors", "*.json")
IGNORED_FILES = ("*/*", "consolidated*")  # never downloaded: folders, and the same weights in Meta's own format


def load_model(parallel: Parallel) -> nn.Module:
    """Returns the model in the plan's precision and parallel form. Raises UserError where its files cannot be used.

    In this order: transformers cuts the layers into stages, splits the matrices of those that this stage keeps, and
    shards them with FSDP, all before it reads a rank's part of the files. Recomputation and the loss without logits
    come after that. DDP wraps the result. `main` calls `compile_layers` at the very end.
    """
    from transformers.distributed import DistributedConfig

    check_weights(parallel)
    config, plan = parallel.config, parallel.plan
    distributed_config = None
    if plan.uses_fsdp or plan.model_parallel_size > 1:
        distributed_config = DistributedConfig(
            pp_size=plan.pipeline_parallel_size,
            tp_size=plan.tensor_parallel_size,
            fsdp_cpu_offload=plan.cpu_offload,
            fsdp_mixed_precision=plan.precision != "fp32",
        )
        # set afterwards, because the constructor refuses FSDP together with stages, although the two work together
        distributed_config.fsdp_size = plan.dp_shard_size
        distributed_config.dp_replicate_size = plan.dp_replicate_size
    if config.random_init:
        parallel.say("model     RANDOM WEIGHTS from the config alone (--random-init): good for benchmarks only")
    make_model = random_model if config.random_init else pretrained_model
    with patched_transformers(parallel):
        model = make_model(distributed_config, parallel)
    if plan.recompute_every:
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=plan.recompute_every)
        # What it has turned on is for frozen embeddings. Here it would give the first layer another graph to compile.
        model.disable_input_require_grads()
    if not plan.reshard_after_forward:
        model.set_reshard_after_forward(False)
    use_token_loss(model, parallel.pipeline.is_last, parallel.tensor_parallel)
    if drops_out(model):
        parallel.say(
            "WARNING   the model has dropout, so its losses depend on the plan; set it to 0 in its config.json"
        )
    if plan.autocasts:  # in the model itself, so that it is trained in bf16 in another script's loop too
        model.forward = torch.autocast(parallel.device.type, torch.bfloat16)(model.forward)
    if plan.pipeline_parallel_size > 1:
        number_layers_of_stage(model)
    if plan.cpu_offload:
        keep_parameters_on_cpu(model, parallel.device)
    mesh = getattr(next(model.parameters()), "device_mesh", None)
    groups = mesh.get_all_groups() if mesh is not None else []
    if plan.pipeline_parallel_size > 1:
        groups.append(model._pp_stage.pp_group)
    # torch < 2.14 has only the private one
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    for group in groups:  # torch makes them with its own default timeout: 10 minutes under NCCL
        set_timeout(parallel.config.timeout, group)
    return parallel.accelerator.prepare_model(model) if plan.strategy == "ddp" else model


def drops_out(model: nn.Module) -> bool:
    """Returns whether a module of the model drops out activations, as nn.Dropout or by a probability of its own."""
    for module in model.modules():
        for name, value in vars(module).items():
            is_probability = "drop" in name or (name == "p" and isinstance(module, nn.Dropout))
            if is_probability and isinstance(value, float) and value > 0:
                return True
    return False


def check_weights(parallel: Parallel) -> None:
    """Downloads the weights, once per node. Raises UserError where they are not those of the model's config.

    transformers compares names and shapes on the meta device, so only the headers of the files are read. `load_model`
    does this first, and `main` before it tokenises, too.
    """
    name = parallel.config.model_name_or_path

    def check() -> None:
        folder = model_folder(name, WEIGHT_FILES)
        if not any(folder.glob("*.safetensors")):
            raise UserError(
                f"--model-name-or-path {name} holds no safetensors weights; convert them, or use --random-init for a "
                "benchmark"
            )
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity(logging.CRITICAL)  # our error says the same as its report
        try:
            _, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder, device_map="meta", ignore_mismatched_sizes=True, output_loading_info=True
            )
            if report["missing_keys"]:  # transformers would train on with these at random
                raise OSError(f"they lack {', '.join(sorted(report['missing_keys'])[:3])}")
            if report["mismatched_keys"]:
                parameter, *shapes = min(report["mismatched_keys"])
                stored, expected = (" x ".join(map(str, shape)) for shape in shapes)
                raise OSError(f"{parameter} is {stored} in the files, and {expected} by config.json")
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"--model-name-or-path {name} holds weights that cannot be read, or are not those of its config.json "
                f"({first_line(error)}); download the folder again"
            ) from error
        finally:
            transformers.logging.set_verbosity(verbosity)

    if not parallel.config.random_init:
        parallel.node_main_first(check)


def pretrained_model(distributed_config: DistributedConfig | None, parallel: Parallel) -> PreTrainedModel:
    """Returns the model with its weights, each rank holding its share.

    dtype is passed explicitly: Llama-2's checkpoint is half precision, and transformers' default would keep it,
    leaving no fp32 master weights.
    """
    name = parallel.config.model_name_or_path
    _, attention = model_without_weights(parallel.model_config)
    # This waits for other ranks, which it may, because `check_weights` has ruled out files that fail on one rank alone.
    return on_all_ranks(
        lambda: transformers.AutoModelForCausalLM.from_pretrained(
            model_folder(name, WEIGHT_FILES),
            dtype=parallel.plan.state_dtype,
            attn_implementation=attention,
            distributed_config=distributed_config,
            device_map=None if distributed_config else {"": parallel.device},
        )
    )


@contextlib.contextmanager
def patched_transformers(parallel: Parallel) -> Iterator[None]:
    """Patches transformers while it builds the model, in three places.

    The stages get the plan's layers, because transformers' own division ignores the work of the head. `TensorParallel`
    splits what a stage holds; transformers' own way computes with DTensors, and looks for the other stages' modules.

    Embedding and head that are one matrix are tied before FSDP wraps them, as one parameter of its root group. By
    itself transformers ties them afterwards. The matrix then belongs to two FSDP groups, which pad it each for itself,
    and where the ranks do not divide the vocabulary it trains wrongly from the second step on
    (https://github.com/pytorch/pytorch/issues/176076).
    """
    from unittest import mock

    from transformers.distributed import mixin
    from transformers.distributed.pipeline_parallel import PipelineStage

    layers_of_each = layers_of_stages(parallel.shape, parallel.plan.pipeline_parallel_size)
    bounds = list(itertools.accumulate(layers_of_each, initial=0))
    shard = mixin.apply_fully_sharded_data_parallelism

    def tie_and_shard(model: PreTrainedModel, meshes: Any, fsdp_plan: dict[str, str], expert_plan: dict) -> nn.Module:
        if model.config.get_text_config().tie_word_embeddings:
            model.tie_weights()
            tied = (model.get_input_embeddings(), model.get_output_embeddings())
            names = [name for name, module in model.named_modules() if module in tied]
            fsdp_plan = {name: style for name, style in fsdp_plan.items() if name not in names}
        return shard(model, meshes, fsdp_plan, expert_plan)

    with (
        mock.patch.object(PipelineStage, "layer_range_for_rank", lambda self, stage, layers: bounds[stage : stage + 2]),
        mock.patch.object(mixin, "apply_tensor_parallelism", parallel.tensor_parallel.split),
        mock.patch.object(mixin, "apply_fully_sharded_data_parallelism", tie_and_shard),
    ):
        yield


def random_model(distributed_config: DistributedConfig | None, parallel: Parallel) -> PreTrainedModel:
    """Returns a model with random weights. Each rank makes its own share in place; where the plan shards, no whole
    model exists anywhere."""
    from transformers.distributed import initialize_distributed_mesh

    model, _ = model_without_weights(parallel.model_config, parallel.plan.state_dtype)
    if distributed_config is not None:
        _, mesh = initialize_distributed_mesh(distributed_config)
        model = type(model).maybe_distribute_model(model, distributed_config, mesh)
    model.to_empty(device=parallel.device)
    model.initialize_weights()
    model.tie_weights()
    return model


def keep_parameters_on_cpu(model: PreTrainedModel, device: torch.device) -> None:
    """Moves the shards to host memory, as FSDP2's CPU offload requires; buffers stay on `device`, the GPU.

    The optimizer then runs on the CPU, so the number of threads, which torchrun has set to 1, is raised.
    """
    model.to("cpu")
    for buffer in model.buffers():
        buffer.data = buffer.to(device)
    torch.cuda.empty_cache()  # frees the GPU memory used while loading
    torch.set_num_threads(max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def read_model_shape(config: Config) -> tuple[PretrainedConfig, ModelShape]:
    """Returns the model's config and its sizes, from `config.json` alone. Any rank may call it alone."""
    folder = model_folder(config.model_name_or_path, ["config.json"])
    try:
        if not (folder / "config.json").is_file():
            raise OSError("config.json is missing")
        model_config = transformers.AutoConfig.from_pretrained(folder)
        return model_config, model_shape(model_config)
    except Exception as error:  # transformers raises all kinds of errors on a malformed config
        raise UserError(
            f"--model-name-or-path {config.model_name_or_path} holds no causal language model that loads "
            f"({first_line(error)}); give a folder with config.json and safetensors weights"
        ) from error


def model_folder(name_or_path: str, patterns: Sequence[str]) -> Path:
    """Returns a local folder that holds the model's files of these patterns; downloads them if necessary."""
    shown = f"--model-name-or-path {name_or_path}"
    if os.path.isdir(name_or_path):
        return Path(name_or_path)
    if looks_like_a_path(name_or_path):
        raise UserError(f"{shown} is not a folder; give a Hub id, or a folder with config.json and safetensors weights")
    try:
        return Path(
            huggingface_hub.snapshot_download(name_or_path, allow_patterns=patterns, ignore_patterns=IGNORED_FILES)
        )
    except huggingface_hub.errors.GatedRepoError as error:
        raise UserError(
            f"{shown} is gated: ask for access at https://huggingface.co/{name_or_path}, then run `hf auth login` "
            "or set HF_TOKEN"
        ) from error
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{shown} is not on the Hub, or is private; check the name, and log in with `hf auth login`"
        ) from error
    except Exception as error:  # the HTTP library under the client raises errors of its own
        raise UserError(
            f"{shown} is neither a folder nor within reach on the Hub ({first_line(error)}); check the name and the "
            "network, or download it elsewhere and give its folder"
        ) from error


# ---- Model: attention ----------------------------------------------------------------------------------------


def model_without_weights(
    model_config: PretrainedConfig, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, str | None]:
    """Returns the model on the meta device, and the name of the attention to train it with.

    That is `causal_attention` wherever it gives what the model's own gives. Rows are padded at their end, so no real
    token can see a pad under a causal mask anyway. An attention that is registered without a mask function gets no
    mask: no B x T x T tensor, SDPA takes its flash kernel, and transformers need not ask the device whether there is
    padding, a host sync in every forward. Models with sliding windows need their masks and keep transformers' own
    choice (None), as do those that take no registered attention.
    """
    # disabled here, not by a decorator, which would import the whole compiler for every --help
    attend_on_cpu = torch.compiler.disable(document_attention)
    attend = functools.partial(causal_attention, attend_on_cpu=attend_on_cpu)
    transformers.AttentionInterface.register("causal_attention", attend)
    build = functools.partial(transformers.AutoModelForCausalLM.from_config, dtype=dtype)
    # copies, because building writes the dtype and the attention's name into the config, even one the model refuses
    with torch.device("meta"):
        if not attends_partially(model_config):  # no sliding window, and full attention in every layer
            with contextlib.suppress(KeyError, ValueError):  # Falcon, for one, looks its attention up by name
                return build(copy.deepcopy(model_config), attn_implementation="causal_attention"), "causal_attention"
        return build(copy.deepcopy(model_config)), None


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens: Tensor | None = None,
    max_length: int | None = None,
    *,
    attend_on_cpu: Callable,
    **others: Any,
) -> tuple[Tensor, None]:
    """Returns the attention output (B, T, heads, d) of query (B, heads, T, d), key and value (B, kv heads, T, d).

    With `cu_seq_lens`, the bounds of the documents packed into the one row, no document sees another.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if cu_seq_lens is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    attend = varlen_flash_attention if query.device.type == "cuda" else attend_on_cpu
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return attend(query, key, value, cu_seq_lens, max_length, scaling)[None], None


def varlen_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float
) -> Tensor:
    """Returns causal attention inside each document; query (T, heads, d), key and value (T, kv heads, d), on CUDA.

    It is torch's own flash kernel, which takes half precision only. Under autocast the rotary embedding leaves query
    and key in fp32, so they are cast. torch 2.11 has no `enable_gqa`, so there the key and value heads are repeated.
    """
    from torch.nn.attention.varlen import varlen_attn

    grouped = {}
    if (groups := query.shape[1] // key.shape[1]) > 1:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            grouped = {"enable_gqa": True}
        else:
            key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    query, key = query.to(value.dtype), key.to(value.dtype)
    return varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0), **grouped)


def document_attention(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float) -> Tensor:
    """The CPU counterpart of `varlen_flash_attention`: one causal SDPA per document."""
    outputs = []
    for start, end in itertools.pairwise(bounds.tolist()):
        one = (tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value))
        output = F.scaled_dot_product_attention(*one, is_causal=True, scale=scale, enable_gqa=True)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


# ---- Model: the loss without logits --------------------------------------------------------------------------


def use_token_loss(
    model: PreTrainedModel, is_last_stage: bool = True, tensor_parallel: TensorParallel | None = None
) -> None:
    """Makes `model(..., predict_at=, targets=)` return the sum of token losses, mostly without ever holding all logits.

    `predict_at` are places in the flattened rows (B * T), and `targets` the tokens that come next. A pipeline stage
    before the last, whose head is an identity layer, returns its hidden states. Calls without targets (generation)
    stay as they were. The head is still called as a module, so FSDP gathers it. Models that also scale, cap or bias
    their logits, or whose base cannot be called apart from its head, compute all of them. Where the config asks for a
    router's auxiliary loss, it is added in training.
    """
    original_forward, head = model.forward, model.get_output_embeddings()
    class_forward = type(model).forward.__get__(model)  # without the pipeline that transformers adds for generation
    plain_head, text_config = head.forward, model.config.get_text_config()
    is_projection = is_plain_projection(model)

    @functools.wraps(original_forward)
    def forward(*arguments: Any, predict_at=None, targets=None, **inputs: Any) -> Any:
        if targets is None:
            return original_forward(*arguments, **inputs)
        if not is_last_stage:
            return model.base_model(*arguments, **inputs).last_hidden_state
        if not is_projection:
            output = class_forward(*arguments, **inputs)
            logits = output.logits.flatten(0, 1).index_select(0, predict_at).float()
            loss = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
            if adds_router_loss(model) and model.training:  # it is a mean over tokens, and `loss` is a sum over labels
                loss = loss + text_config.router_aux_loss_coef * output.aux_loss * (targets != IGNORE_INDEX).sum()
            return loss
        hidden = model.base_model(*arguments, **inputs).last_hidden_state
        return head(hidden.flatten(0, 1).index_select(0, predict_at), targets)

    @functools.wraps(plain_head)
    def head_forward(hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        return plain_head(hidden) if targets is None else head_loss_sum(hidden, head.weight, targets, tensor_parallel)

    model.forward, head.forward = forward, head_forward


def is_plain_projection(model: PreTrainedModel) -> bool:
    """Returns whether the loss depends on the product of the last hidden states and the head, and on nothing more."""
    names = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "logits_soft_cap")
    changed = any(getattr(model.config.get_text_config(), name, None) for name in names)
    biased = getattr(model.get_output_embeddings(), "bias", None) is not None
    return not (changed or biased or adds_router_loss(model) or model.base_model is model)


def adds_router_loss(model: PreTrainedModel) -> bool:
    return bool(getattr(model.config.get_text_config(), "output_router_logits", False))


def head_loss_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, tensor_parallel: TensorParallel | None = None
) -> Tensor:
    """Returns the sum, in fp32, of the cross-entropies of hidden (N, h) times weight (V, h) against targets (N,).

    Uses torch's linear_cross_entropy if this torch has it: it computes logits and their gradient a chunk at a time. Its
    own reduction is inaccurate in bf16 (torch 2.13), so the losses are summed here. Without it, and where tensor-
    parallel ranks share the vocabulary, logits are computed in chunks that the backward pass recomputes.
    """
    shared = tensor_parallel is not None and tensor_parallel.size > 1
    weight = local_part(weight)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # once, while autocast itself would cast for every chunk
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(device, enabled=False):
        if hasattr(nn, "LinearCrossEntropyOptions") and not shared:
            options = nn.LinearCrossEntropyOptions(
                batch_chunk_size=HEAD_CHUNK_TOKENS,
                chunking_method=None,  # the default, "auto", would choose a size of its own
                # "balanced" (torch 2.13) would make the weight's gradient an fp32 matmul: perhaps 5% more time for 13B
                acc_policy="compact",
                acc_dtype=torch.float32 if hidden.dtype == torch.bfloat16 else None,
            )
            losses = F.linear_cross_entropy(
                hidden, weight, targets, reduction="none", ignore_index=IGNORE_INDEX, options=options
            )
            return losses.float().sum()
        total = torch.zeros((), device=hidden.device)
        chunk_loss = tensor_parallel.loss_of_shared_chunk if shared else loss_of_chunk
        for chunk, chunk_targets in zip(hidden.split(HEAD_CHUNK_TOKENS), targets.split(HEAD_CHUNK_TOKENS), strict=True):
            loss = torch.utils.checkpoint.checkpoint(chunk_loss, chunk, weight, chunk_targets, use_reentrant=False)
            total = total + loss
        return total


def loss_of_chunk(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")


# ---- Model: checks before training ---------------------------------------------------------------------------

SANITY_BATCHES = 2  # evaluated before training, so that a broken set-up fails in the first minute


def check_setup(model: nn.Module, eval_set: Documents, parallel: Parallel) -> None:
    """Proves before training that the loaded model, in its parallel form, computes what is meant.

    Its loss is finite and, on padded rows, equals that of its own logits, no token sees a later one, no packed document
    another. If tokens see later ones, the model's own eager attention, with a mask and padded rows, is tried instead,
    and kept if it passes. If packed documents see each other, rows are padded from here on. In both cases the plan is
    corrected. Raises RunError for broken weights, and UserError for a model that cannot be trained rightly.
    """
    shown = f"--model-name-or-path {parallel.config.model_name_or_path}"
    padded = parallel.with_plan(packing=False)
    with parallel.pipeline.watched():
        if parallel.plan.packing and attention_leaks(model, parallel):
            if parallel.config.packing == "yes":
                raise UserError("--packing yes: the packed documents of this model see each other; give --packing no")
            parallel.say("packing   no: the packed documents of this model would see each other, so rows are padded")
            parallel.plan = padded.plan
        if attention_leaks(model, padded):
            # Set in the config itself: `set_attn_implementation` does nothing to a model that computes attention itself
            # and only asks its config whether to make the mask.
            parallel.accelerator.unwrap_model(model).config._attn_implementation = "eager"
            if attention_leaks(model, padded):
                raise UserError(
                    f"{shown}: tokens of this model see later ones, so it would train on what it is to predict; use a "
                    "causal language model"
                )
            parallel.say("attention the model's own, with a mask and padded rows, or its tokens would see later ones")
            parallel.plan = padded.plan
        if loss_differs_from_logits(model, padded):
            raise UserError(
                f"{shown}: its logits are not the product of its last hidden states and its head, so the script cannot "
                "compute its loss; use another model"
            )
        loss = mean_token_loss(model, eval_set, evaluation_batches(eval_set, parallel)[:SANITY_BATCHES], parallel)
    if not math.isfinite(loss):
        raise RunError(
            f"the loss is {loss} before the first step of this run, so the weights are broken: download the model "
            "again, or where a run is resumed, delete its newest checkpoint"
        )


@torch.no_grad()
def attention_leaks(model: nn.Module, parallel: Parallel) -> bool:
    """Returns whether a token's loss depends on what comes after it or, in packed rows, on the document before its own.

    Compares the loss of the same labels alone and beside different neighbours. Rounding alone changes it a little, by
    about the larger of two amounts: the change when the document is one of two separate rows, where nothing can leak,
    and the loss times a small fraction, 5e-4 in bf16 and 1e-6 in fp32. More than ten times that is a leak. One host
    sync.
    """
    model.eval()
    tokens = np.random.default_rng(0).integers(parallel.shape.vocabulary, size=57)
    document, another, after = np.split(tokens[:56], (16, 32))
    changed_end = np.append(document[:15], tokens[56])

    def loss_of(*documents: np.ndarray, place: int = 0) -> Tensor:
        """Returns the loss of document `place` of a row. Its last token is no target: `changed_end` differs there."""
        row = pack_rows(documents, [0] * len(documents), None)
        ids, (start, end) = row["input_ids"], row["cu_seq_lens"][place : place + 2].tolist()
        if not parallel.plan.packing:  # what follows the document is padding
            row = dict(input_ids=ids, attention_mask=(torch.arange(ids.numel()) < end).long()[None])
        row |= dict(predict_at=torch.arange(start, end - 2), targets=ids[0, start + 1 : end - 1])
        return parallel.pipeline.forward(model, row, parallel)

    rows = torch.from_numpy(np.stack([document, another]))
    two_rows = dict(
        input_ids=rows, predict_at=torch.arange(14), targets=rows[0, 1:15], attention_mask=torch.ones_like(rows)
    )
    padded = parallel.with_plan(packing=False)
    try:
        losses = [loss_of(document), loss_of(changed_end), loss_of(document, after)]
        if parallel.plan.packing:
            losses.append(loss_of(another, document, place=1))
        losses.append(parallel.pipeline.forward(model, two_rows, padded))
    except (AttributeError, TypeError):  # a model that needs its mask: next are padded rows, then eager attention
        if parallel.accelerator.unwrap_model(model).config._attn_implementation == "eager":
            raise
        return True
    parallel.pipeline.finish_sending()
    alone, *changed, in_two_rows = parallel.sum_over_data_ranks(torch.stack(losses).double()).tolist()
    rounding = max(abs(in_two_rows - alone), alone * (1e-6 if parallel.plan.compute_bytes == 4 else 5e-4))
    return max(abs(loss - alone) for loss in changed) > 10 * rounding


@torch.no_grad()
def loss_differs_from_logits(model: nn.Module, parallel: Parallel) -> bool:
    """Returns whether the loss without logits differs from that of the model's own logits, on one short row."""
    model.eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(parallel.shape.vocabulary, size=(1, 16)))
    row = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    ours = parallel.pipeline.forward(model, dict(row, predict_at=torch.arange(15), targets=ids[0, 1:]), parallel)
    parallel.pipeline.finish_sending()
    parallel.pipeline.note("the stages before it, for logits")
    with generating(parallel.accelerator.unwrap_model(model), parallel):
        logits = model(**{name: tensor.to(parallel.device) for name, tensor in row.items()}, use_cache=False).logits
    own = torch.zeros_like(ours)
    if parallel.pipeline.is_last:  # the stages before it have no loss to compare with
        own = F.cross_entropy(logits[0, :-1].float(), ids[0, 1:].to(logits.device), reduction="sum").to(ours.dtype)
    ours, own = parallel.sum_over_data_ranks(torch.stack([ours, own])).tolist()
    tolerance = 1e-4 if parallel.plan.compute_bytes == 4 else 2e-2  # of rounding, where logits are bf16
    return abs(ours - own) > tolerance * own


# ---- Model: compiling ----------------------------------------------------------------------------------------


def compile_layers(model: nn.Module, parallel: Parallel, steps: int) -> None:
    """Compiles the decoder layers in place where the plan says so and it pays; else corrects the plan.

    There are a few graphs, however many layers there are, and a graph takes any number of tokens. `auto` weighs the
    time that the `steps` to come are predicted to gain against COMPILE_SECONDS, and if compiling fails, the layers run
    as they were. A plan that fits in memory only with compiled layers is compiled however few steps there are.
    """
    from torch.utils._triton import has_triton

    if not parallel.plan.compiled:
        return
    automatic = parallel.config.compile == "auto"
    if automatic:
        gained_seconds = parallel.choice.chosen.step_seconds["compute"] * (1 / EAGER_SPEED - 1) * steps
        eager = parallel.with_plan(compiled=False)
        fits_eager = predict(parallel.shape, parallel.cluster, eager.plan, parallel.config).fits
        lacks_triton = any(on_all_ranks(lambda: not has_triton(), gathered=True))
        if lacks_triton and not fits_eager:
            raise UserError(
                "--compile auto cannot compile the layers, because Triton does not run here, and the plan does not fit "
                "uncompiled; install Triton, or use --compile no, which chooses another plan"
            )
        if lacks_triton or (fits_eager and gained_seconds <= COMPILE_SECONDS):
            gain = f"{steps} steps would gain {gained_seconds:.0f} s, and compiling takes up to {COMPILE_SECONDS:.0f} s"
            parallel.say(f"compile   no: {'Triton does not run here' if lacks_triton else gain}")
            parallel.plan = eager.plan
            return
    # There is a graph each for layers that are recomputed and that are not, for one row (a size of 1 is a constant)
    # and several, and for training and evaluation. They may use up torch's limit of 8 graphs, after which any other
    # recompilation would leave a layer uncompiled.
    torch.compiler.config.recompile_limit = max(torch.compiler.config.recompile_limit, 16)
    torch._dynamo.config.suppress_errors = automatic  # with auto, a failure is a warning
    # torch's optimizer for DDP would cut a layer into 11 graphs, and keep what passes between them in memory
    torch._dynamo.config.optimize_ddp = False
    for layer in decoder_layers(parallel.accelerator.unwrap_model(model)):
        if parallel.tensor_parallel.size > 1:
            layer.register_forward_pre_hook(cache_local_parameters)  # which `layer.compile` would compile, too
            layer.forward = torch.compile(layer.forward, dynamic=True)
        else:
            layer.compile(dynamic=True)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer  # what transformers' decoder layers are

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


# ---- Model: optimizer ----------------------------------------------------------------------------------------


def build_optimizer(model: nn.Module, config: Config) -> Optimizer:
    """Returns AdamW over the parallel model's parameters; weight decay spares norms and biases.

    fused: one kernel for all of a rank's shards, no temporaries, and it can skip a step without asking the host.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [dict(params=matrices, weight_decay=config.weight_decay), dict(params=vectors, weight_decay=0.0)]
    groups = [group for group in groups if group["params"]]
    if groups[0]["params"][0].dtype == torch.bfloat16:
        return StochasticAdamW(groups, lr=config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


class StochasticAdamW(Optimizer):
    """AdamW whose weights, gradients and moments are all bf16: 8 bytes per parameter instead of 16.

    Each step is computed in fp32 and rounded to bf16 up or down at random, with probabilities that make the mean
    exact, so that updates below half a bf16 ulp are not lost (Gupta et al. 2015, "Deep Learning with Limited Numerical
    Precision"; Zamirai et al. 2020, "Revisiting BFloat16 Training"). The second moment needs it too: at beta2 0.999 it
    moves by less than an ulp a step. fp32 temporaries exist for one parameter at a time. `found_inf` skips an update,
    as in fused AdamW. Rounding is seeded with `rounding_seed`, the number of the step, rather than by a rank's own
    random state, so that replicas stay equal, also after resuming on other ranks.

    Weighed before writing it: torchao.optim rounds the weights like this, but rounds the moments to nearest, cannot
    skip a step, and must be compiled; torch-optimi keeps what rounding loses in two more bytes per parameter;
    bitsandbytes shrinks the moments and rounds the weights to nearest.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float):
        super().__init__(groups, dict(lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0))
        self.rounding_seed = 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        device = self.param_groups[0]["params"][0].device
        taken = 1.0 - getattr(self, "found_inf", torch.zeros(())).to(device)  # 0 where the update is skipped
        generator = torch.Generator(device).manual_seed(self.rounding_seed)
        self.rounding_seed += 1  # for a loop that does not set it; `training_step` does
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, group, taken, generator)

    def update(self, parameter: Tensor, group: dict[str, Any], taken: Tensor, generator: torch.Generator) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        tensors = [parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]]
        weight, gradient, first, second = map(local_part, tensors)
        (beta1, beta2), lr = group["betas"], group["lr"]
        state["step"] += taken
        gradient = gradient.float()
        new_first = first.float().lerp(gradient, 1 - beta1)
        new_second = second.float() * beta2 + gradient.square() * (1 - beta2)
        corrected = (new_second / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        new_weight = weight.float() * (1 - lr * group["weight_decay"])
        new_weight -= lr / (1 - beta1 ** state["step"]) * new_first / corrected
        for old, new in ((weight, new_weight), (first, new_first), (second, new_second)):
            old.copy_(torch.where(taken > 0, round_stochastically(new, generator), old))


def round_stochastically(tensor: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Returns an fp32 tensor as bf16, rounded away from zero with the probability that makes the mean exact.

    A bf16 number is the upper half of an fp32 one; a random number added to the lower half carries into the upper one
    just that often.
    """
    bits = tensor.view(torch.int32)
    bits = bits + torch.randint(0, 2**16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    return (bits & -(2**16)).view(torch.float32).to(torch.bfloat16)


# ---- Model: tensor parallelism -------------------------------------------------------------------------------

SPLIT_MODULES = {  # Llama's modules, and what becomes of each: a method of `TensorParallel`
    "model.embed_tokens": "embedding",
    "model.layers.*.input_layernorm": "norm",
    "model.layers.*.self_attn.q_proj": "column",
    "model.layers.*.self_attn.k_proj": "column",
    "model.layers.*.self_attn.v_proj": "column",
    "model.layers.*.self_attn.o_proj": "row",
    "model.layers.*.post_attention_layernorm": "norm",
    "model.layers.*.mlp.gate_proj": "column",
    "model.layers.*.mlp.up_proj": "column",
    "model.layers.*.mlp.down_proj": "row",
    "model.norm": "norm",
    "lm_head": "head",
}
CUT_DIMENSIONS = dict(embedding=0, norm=None, column=0, row=1, head=0)  # of a weight; None: every rank holds it whole


class TensorParallel:
    """The ranks that share each layer's matrices, and what each kind of module computes on one of them.

    `column` modules hold a part of the outputs and `row` modules a part of the inputs, so what these return is added up
    (Shoeybi et al. 2019, "Megatron-LM", section 3). From a row module to the next norm each rank holds its part of the
    tokens alone: the row module scatters its sums, and the norm gathers the tokens again. That moves as much as an
    all-reduce of the sums would, and takes less memory (sequence parallelism: Korthikanti et al. 2022, "Reducing
    Activation Recomputation", section 4.2.2).

    Parameters are DTensors on one mesh, norms too, so that clipping, AdamW and checkpoints see whole matrices. The
    forward pass computes with their local parts, because DTensors do not compile for lengths of any size.
    """

    def __init__(self, size: int = 1):
        self.size, self.group = size, None  # transformers makes the group
        self.splits_tokens = True  # not in generation, where each rank holds all tokens: see `generating`

    def split(self, model: nn.Module, mesh: DeviceMesh, own_plan: dict[str, str]) -> nn.Module:
        """Splits the model's modules. It takes the place of transformers' function that does so by the model's plan."""
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        self.group = mesh.get_group()
        for name, module in model.named_modules():
            kind = SPLIT_MODULES.get(re.sub(r"\.\d+\.", ".*.", name))
            if kind is None or not hasattr(module, "weight"):  # another pipeline stage holds it
                continue
            dimension = CUT_DIMENSIONS[kind]
            placement = Replicate() if dimension is None else Shard(dimension)
            for parameter, whole in list(module.named_parameters()):
                part = distribute_tensor(whole, mesh, [placement], src_data_rank=None)
                setattr(module, parameter, nn.Parameter(part))
            module.forward = functools.partial(getattr(self, kind), module)
        return model

    def embedding(self, module: nn.Embedding, input_ids: Tensor) -> Tensor:
        weight = module.weight.to_local()
        local_ids, is_local = self.local_ids(input_ids, weight)
        return self.add_up(F.embedding(local_ids, weight) * is_local[..., None])

    def norm(self, module: nn.Module, hidden: Tensor) -> Tensor:
        hidden = F.rms_norm(hidden, hidden.shape[-1:], local_parameter(module, "weight"), module.variance_epsilon)
        if torch.is_autocast_enabled(hidden.device.type):  # the matmuls would cast it anyway, after twice the traffic
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        return self.gather(hidden, dimension=1) if self.splits_tokens else hidden

    def column(self, module: nn.Linear, hidden: Tensor) -> Tensor:
        return F.linear(hidden, local_parameter(module, "weight"), local_parameter(module, "bias"))

    def row(self, module: nn.Linear, hidden: Tensor) -> Tensor:
        return self.add_up(F.linear(hidden, local_parameter(module, "weight")))

    def head(self, module: nn.Linear, hidden: Tensor) -> Tensor:
        """Returns the logits of the whole vocabulary, for generation."""
        return self.gather(F.linear(hidden, module.weight.to_local()), dimension=hidden.ndim - 1)

    def loss_of_shared_chunk(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Returns what the function `loss_of_chunk` does, with the logits of this rank's part of the vocabulary.

        Per token the ranks exchange the largest logit, the sum of exponentials and the target's logit. The gradient of
        `hidden` is this rank's part of it; the last norm's gather adds the parts up.
        """
        logits = F.linear(hidden, weight).float()
        largest = logits.detach().amax(-1)
        dist.all_reduce(largest, dist.ReduceOp.MAX, self.group)
        local_ids, is_local = self.local_ids(targets, weight)
        target_logits = logits.gather(1, local_ids[:, None])[:, 0].masked_fill(~is_local, 0)
        parts = torch.stack([(logits - largest[:, None]).exp().sum(-1), target_logits])
        sums = parts.detach().clone()
        dist.all_reduce(sums, group=self.group)
        # an all-reduce whose backward pass is the identity: each rank's part gets the gradient of the sum
        exponentials, target_logits = parts + (sums - parts.detach())
        return (exponentials.log() + largest - target_logits).masked_fill(targets == IGNORE_INDEX, 0).sum()

    def local_ids(self, ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns where ids of the vocabulary are in this rank's part of it, and which of them are there at all."""
        local_ids = ids - dist.get_rank(self.group) * len(weight)
        return local_ids.clamp(0, len(weight) - 1), (local_ids >= 0) & (local_ids < len(weight))

    def gather(self, part: Tensor, dimension: int) -> Tensor:
        """Returns the parts of all ranks side by side. The backward pass adds up and scatters."""
        return Exchange.apply(part, gather_parts, scatter_sum, dimension, self.size, self.group)

    def add_up(self, summand: Tensor) -> Tensor:
        """Returns this rank's tokens of the sum over all ranks, or in generation all of them."""
        if not self.splits_tokens:
            dist.all_reduce(summand, group=self.group)
            return summand
        return Exchange.apply(summand, scatter_sum, gather_parts, 1, self.size, self.group)


def local_parameter(module: nn.Module, name: str) -> Tensor | None:
    """Like `local_part`, for a module's parameter, or what `cache_local_parameters` has kept of it."""
    from torch.distributed.tensor import Partial, Replicate

    if hasattr(module, "cached_parts"):
        return module.cached_parts[name]
    parameter = getattr(module, name)
    if parameter is None:
        return None
    # A norm's weight, whole on every rank, gets on each the gradient of that rank's tokens. `Partial` marks it as still
    # to be summed over the ranks, which FSDP or `clip_gradients` does.
    grad_placements = [Partial()] if parameter.placements == (Replicate(),) else None
    return parameter.to_local(grad_placements=grad_placements)


def cache_local_parameters(layer: nn.Module, inputs: tuple) -> None:
    """Caches the local parts of a layer's parameters before its compiled code runs, which then sees no DTensor.

    torch 2.13 fails to compile DTensors in a layer that is recomputed.
    """
    for module in layer.modules():
        if isinstance(getattr(module, "weight", None), Tensor):
            vars(module).pop("cached_parts", None)
            module.cached_parts = {name: local_parameter(module, name) for name in module._parameters}


class Exchange(torch.autograd.Function):
    """Applies `exchange` to a tensor, and `reverse` to its gradient: `gather_parts` and `scatter_sum`, or the reverse.

    torch's own collectives with a gradient do the same, but torch 2.13, when it compiles them, gives wrong gradients
    for several rows.
    """

    @staticmethod
    def forward(context: Any, tensor: Tensor, exchange: Callable, reverse: Callable, *layout: Any) -> Tensor:
        context.reverse, context.layout = reverse, layout
        return exchange(tensor, *layout)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return context.reverse(gradient, *context.layout), *[None] * (2 + len(context.layout))


def gather_parts(part: Tensor, dimension: int, size: int, group: dist.ProcessGroup) -> Tensor:
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # in torch < 2.13
    parts = part.new_empty(size * part.shape[0], *part.shape[1:])
    all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts.chunk(size), dimension)


def scatter_sum(summand: Tensor, dimension: int, size: int, group: dist.ProcessGroup) -> Tensor:
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # in torch < 2.13
    parts = torch.cat(summand.chunk(size, dimension))
    total = parts.new_empty(parts.shape[0] // size, *parts.shape[1:])
    reduce_scatter(total, parts, group=group)
    return total


# ---- Model: pipeline stages ----------------------------------------------------------------------------------

STAGE_PATIENCE_SECONDS = 300.0  # of one rank for another, before training


class Pipeline:
    """This rank's stage: its order of work, and what it receives from its neighbours and sends to them.

    With one stage there is no neighbour, and nothing is sent. Every stage has the whole micro-batch, so it knows the
    shape of what it receives, and micro-batches may differ in width. (torch.distributed.pipelining wants them alike:
    https://github.com/pytorch/pytorch/issues/159942.)
    """

    def __init__(self, plan: Plan, device: torch.device | None = None, timeout: timedelta | None = None):
        self.stages, self.device = plan.pipeline_parallel_size, device
        self.dtype = torch.float32 if plan.stream_bytes == 4 else torch.bfloat16
        self.stage, self.ranks = 0, []  # the ranks at this one's place in each stage
        self.forward_group = self.backward_group = None
        if self.stages > 1:
            rank, world_size = dist.get_rank(), dist.get_world_size()
            ranks_of_stage = world_size // self.stages
            self.stage = rank // ranks_of_stage
            self.ranks = list(range(rank % ranks_of_stage, world_size, ranks_of_stage))
            # a group for each direction: in one, a send forward and a send back could wait for each other under NCCL
            make_group = functools.partial(dist.new_group, self.ranks, timeout, use_local_synchronization=True)
            self.forward_group, self.backward_group = make_group(), make_group()
        self.is_last = self.stage == self.stages - 1
        self.awaiting_backward: collections.deque = collections.deque()  # (stage_input, stage_output) of micro-batches
        self.sends: collections.deque = collections.deque()  # with their tensors, which must outlive them
        self.is_watched, self.noted = False, ("", 0.0)

    def schedule(self, micro_batches: int) -> Iterator[tuple[str, int]]:
        """Yields what to do next, `forward` or `backward`, and with which micro-batch: 1F1B.

        A stage runs ahead until its first micro-batch can come back, then takes one forward and one back in turn, so it
        holds activations of at most as many micro-batches as there are stages from it on (Narayanan et al. 2021,
        "Efficient Large-Scale Language Model Training on GPU Clusters", section 2.2).
        """
        ahead = min(self.stages - 1 - self.stage, micro_batches)
        for index in range(micro_batches + ahead):
            if index < micro_batches:
                yield "forward", index
            if index >= ahead:
                yield "backward", index - ahead

    def forward(self, model: nn.Module, micro_batch: dict[str, Tensor], parallel: Parallel) -> Tensor:
        """Takes a micro-batch through this stage. Returns the sum of its token losses; 0 before the last stage."""
        stage_input, (rows, width) = None, micro_batch["input_ids"].shape
        if parallel.tensor_parallel.size > 1:  # or a model would number this rank's tokens alone
            micro_batch = {"position_ids": torch.arange(width, device=parallel.device)[None], **micro_batch}
        if self.stage > 0:
            shape = (rows, width // parallel.tensor_parallel.size, parallel.shape.hidden)
            stage_input = self.receive(self.stage - 1, self.forward_group, shape)
            stage_input.requires_grad_(torch.is_grad_enabled())
            micro_batch = dict(micro_batch, inputs_embeds=stage_input)
            del micro_batch["input_ids"]
        self.note("its own layers, which need all ranks of the stage")
        stage_output = token_loss_sum(model, micro_batch, parallel)
        if torch.is_grad_enabled():
            self.awaiting_backward.append((stage_input, stage_output))
        if self.is_last:
            return stage_output.detach()
        self.send(stage_output.detach(), self.stage + 1, self.forward_group)
        return torch.zeros((), device=self.device)

    def backward(self, loss_scale: float) -> None:
        """Takes the oldest waiting micro-batch back through this stage; its loss is multiplied by `loss_scale`."""
        stage_input, stage_output = self.awaiting_backward.popleft()
        if self.is_last:
            (stage_output * loss_scale).backward()
        else:
            stage_output.backward(self.receive(self.stage + 1, self.backward_group, stage_output.shape))
        if self.stage > 0:
            self.send(stage_input.grad, self.stage - 1, self.backward_group)

    def receive(self, stage: int, group: dist.ProcessGroup, shape: Sequence[int]) -> Tensor:
        self.note(f"what rank {self.ranks[stage]} sends")
        tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
        dist.recv(tensor, self.ranks[stage], group=group)
        return tensor

    def send(self, tensor: Tensor, stage: int, group: dist.ProcessGroup) -> None:
        tensor = tensor.contiguous()
        self.note(f"rank {self.ranks[stage]} to receive")
        self.sends.append((dist.isend(tensor, self.ranks[stage], group=group), tensor))
        if len(self.sends) > 2 * self.stages:  # under 1F1B the oldest has long arrived
            self.sends.popleft()[0].wait()

    def finish_sending(self) -> None:
        while self.sends:
            self.sends.popleft()[0].wait()

    def norm_over_stages(self, norm: Tensor) -> Tensor:
        """Returns the norm of the gradients of all stages, given this one's. Squares of large norms need fp64."""
        if self.stages == 1:
            return norm
        squares = norm.double().square()
        dist.all_reduce(squares, group=self.forward_group)
        return squares.sqrt().to(norm.dtype)

    def whole_tensors(self, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yields the name and the whole of each tensor of any stage, one at a time, stage after stage."""
        if self.stages == 1:
            yield from ((name, unsharded(tensor)) for name, tensor in tensors.items())
            return
        described = [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
        described_by_rank = on_all_ranks(lambda: described, gathered=True)
        for owner in self.ranks:
            for name, shape, dtype in described_by_rank[owner]:
                if name in tensors:
                    whole = unsharded(tensors[name]).to(self.device)
                else:
                    whole = torch.empty(shape, dtype=dtype, device=self.device)
                dist.broadcast(whole, owner, group=self.forward_group)
                yield name, whole
                del whole  # before there is another

    def note(self, words: str) -> None:
        """Notes what this rank waits for from here on.

        While watched, it first waits for the GPU, so that the note is about the operation that really hangs.
        """
        if self.is_watched and self.device.type == "cuda":
            torch.cuda.synchronize()
        self.noted = (words, time.monotonic())

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, a rank that waits too long for another ends with a line that says which stage waits for what.

        NCCL only queues its operations, and aborts a process without saying which of them hangs.
        """
        done = threading.Event()

        def watch() -> None:
            while not done.wait(1.0):
                words, began = self.noted
                if (waited := time.monotonic() - began) > STAGE_PATIENCE_SECONDS:
                    stage = f"stage {self.stage + 1} of {self.stages}"
                    line = f"error: rank {launched_rank()}, {stage}, has waited {waited:.0f} s for {words}"
                    print(line, file=sys.stderr, flush=True)
                    os._exit(1)

        self.is_watched = self.stages > 1
        self.note("the first micro-batch")
        if self.is_watched:
            threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        finally:
            done.set()
            self.is_watched = False


def number_layers_of_stage(model: PreTrainedModel) -> None:
    """Renumbers a stage's layers from 0, because generation takes the length of the cache from layer 0.

    With the whole model's numbers, layer 0 of a later stage's cache would stay empty, and padded prompts would be
    masked wrongly.
    """
    for place, layer in enumerate(decoder_layers(model)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place


# ----------------------------------------------------------------------------------------------------------------
# 8. Checkpoints
# ----------------------------------------------------------------------------------------------------------------
# A checkpoint exists whole or not at all: it is written under another name, flushed (the tensors by torch's storage
# writer), and renamed when it is complete. Any kill costs at most the steps since the last one. The same command
# resumes from the newest, on any number of ranks and under any plan of the same precision, with the losses of an
# uninterrupted run up to rounding.

LOCK_WAIT_SECONDS = 90  # time for a previous run to finish its step and its save
TORCHRUN_GRACE_SECONDS = 30.0  # torchrun's default delay between passing on a signal and SIGKILL
SAME_SIGNAL_SECONDS = 2.0  # a signal to a whole job reaches a rank twice, directly and through torchrun
CHECKPOINT_FILE_BYTES = GIB // 8  # per rank; safetensors builds a whole file in memory while it holds the GIL
WRITING, DELETING = ".writing", ".deleting"


# ---- Checkpoints: the save folder ----------------------------------------------------------------------------


def prepare_save_folder(parallel: Parallel) -> None:
    """Makes and locks the save folder. Raises UserError where it is not writable, not free or not shared."""
    folder = Path(parallel.config.save_model_dir)
    holder = on_all_ranks(lambda: make_save_folder(folder, parallel), main_only=True)

    def check_that_it_is_shared() -> None:
        lock = folder / ".lock"
        if not parallel.is_main and not (lock.exists() and lock.read_text() == holder):
            raise UserError(
                f"--save-model-dir {folder} is not shared: what rank 0 writes does not appear on every node; give a "
                "folder on a filesystem that all nodes share"
            )

    on_all_ranks(check_that_it_is_shared)


def make_save_folder(folder: Path, parallel: Parallel) -> str:
    """Makes the folder, locks it, and returns what the lock's file says. Rank 0 alone."""
    config = parallel.config
    for data in [path for path in map(Path, config.dataset_paths) if path.is_dir()]:
        if folder.resolve().is_relative_to(data.resolve()):
            raise UserError(
                f"--save-model-dir {folder} lies in --dataset-name-or-path {data}, where what the run writes "
                "would be read as data; give another folder"
            )
    try:
        if (folder / "checkpoints").is_file():
            raise UserError(f"--save-model-dir {folder}: {folder / 'checkpoints'} is a file; give another folder")
        if folder.resolve() == Path(config.model_name_or_path).resolve():
            raise UserError(f"--save-model-dir {folder} holds the model to train from; give another folder")
        is_of_a_run = (folder / "train_config.json").exists() or complete_checkpoints(folder / "checkpoints")
        if (folder / "README.md").exists() and not is_of_a_run:
            raise UserError(f"--save-model-dir {folder} holds a README.md that is of no run; give another folder")
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"--save-model-dir {folder} cannot be written to ({error.strerror}); give a folder that can"
        ) from error
    lock_folder(folder, descriptor, parallel)
    holder = f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, holder.encode(), 0)
    os.fsync(descriptor)  # or on NFS other nodes would read an empty file; not closed, because that would end the lock
    shutil.rmtree(folder / UNFINISHED_MODEL, ignore_errors=True)
    return holder


def lock_folder(folder: Path, descriptor: int, parallel: Parallel) -> None:
    """Locks the folder until this process ends, as two runs would delete each other's checkpoints. Rank 0 alone.

    Waits for a previous run that is about to end; raises UserError if it does not. A POSIX record lock, unlike
    filelock's: no child process inherits it, it ends with the process in any case, and it works on network disks. It
    also ends when this process closes any descriptor of the file, so rank 0 must not open `.lock` a second time.
    """
    patience = min(LOCK_WAIT_SECONDS, 0.5 * parallel.config.timeout.total_seconds())  # the other ranks are waiting
    deadline, holder = time.monotonic() + patience, ""
    while True:
        try:
            return fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if not holder:
                holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another run"
                parallel.say(f"waiting   for {holder} to leave {folder}")
        except OSError as error:
            parallel.say(f"WARNING   {folder} cannot be locked ({first_line(error)}); let no second run write to it")
            return None
        if time.monotonic() > deadline:
            raise UserError(
                f"--save-model-dir {folder} is being written to by another run, {holder}; end it, or give another "
                f"folder; if its node is gone, delete {folder / '.lock'}"
            )
        time.sleep(min(1.0, patience))


def sync_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` make a file beside `path`, then moves it there: a reader sees the old file or the new one."""
    beside = path.with_name(f".{path.name}.writing")
    write(beside)
    sync_to_disk(beside)
    beside.replace(path)


# ---- Checkpoints: stop signals -------------------------------------------------------------------------------


class StopSignals(contextlib.ExitStack):
    """Turns SIGTERM, SIGUSR1, Ctrl-C and a lost terminal into a stop that all ranks agree on.

    A second signal ends the process at once, with two exceptions: within SAME_SIGNAL_SECONDS it is taken for the same
    one, and a SIGTERM after Slurm's SIGUSR1 only leaves less time. A rank whose torchrun has ended acts as on a first
    signal. Before `listen()` any signal ends the process, because there is nothing to save yet.
    Agreement is an all-reduce of two CPU integers over gloo: about 0.1 ms, no device sync. Leaving this context manager
    restores the former handlers.
    """

    def __init__(self, parallel: Parallel):
        super().__init__()
        self.parallel, self.group = parallel, parallel.cpu_group()
        self.signal_name, self.received_at = "", 0.0
        self.stopping = self.abandons_step = False  # what all ranks agreed on
        self.may_abandon_step = parallel.plan.pipeline_parallel_size == 1
        self.seconds_to_finish_and_save = 0.0  # what finishing the step and saving takes, as measured so far
        self.torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP, and that is kept
                self.callback(signal.signal, number, signal.signal(number, self.receive))

    def receive(self, number: int, frame: object) -> None:
        now = time.monotonic()
        escalation = self.signal_name == "SIGUSR1" and number == signal.SIGTERM  # Slurm warns, then ends the job
        if self.signal_name and now - self.received_at > SAME_SIGNAL_SECONDS and not escalation:
            os._exit(128 + number)
        if not self.signal_name or escalation:
            first, self.signal_name, self.received_at = not self.signal_name, signal.Signals(number).name, now
            if first and self.parallel.is_main:
                with contextlib.suppress(OSError):  # the terminal that was closed
                    os.write(2, b"stopping  after this step, or these summaries; a second signal leaves at once\n")

    def agreed(self) -> bool:
        """Returns whether any rank was asked to stop.

        A rank whose torchrun has died stops too: nothing else would end it, and it would block the next start.
        """
        # asked even after all have agreed to stop: a SIGTERM that follows SIGUSR1 may abandon the step after all
        if not self.abandons_step:
            if self.torchrun not in (None, os.getppid()) and not self.signal_name:
                self.signal_name, self.received_at = "the end of its torchrun", time.monotonic()
            # torchrun kills its ranks soon after it has passed one of these on
            passed_on = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP").split(",")
            killed_soon = self.signal_name in passed_on
            too_long = killed_soon and self.seconds_to_finish_and_save > 0.8 * torchrun_grace_seconds()
            mine = torch.tensor([bool(self.signal_name), too_long and self.may_abandon_step]).int()
            if self.group is not None:
                dist.all_reduce(mine, op=dist.ReduceOp.MAX, group=self.group)
            self.stopping, self.abandons_step = map(bool, mine.tolist())
            if self.abandons_step:
                self.parallel.say(
                    "stopping  at once, without finishing a step: that and a save would take longer than the "
                    f"{torchrun_grace_seconds():.0f} s that torchrun waits"
                )
        return self.stopping

    def agreed_to_abandon_step(self) -> bool:
        """Returns whether the step under way is to be abandoned: torchrun would not wait for it and a save.

        Under pipeline stages never: to agree at every micro-batch would make the stages wait for each other.
        """
        return self.may_abandon_step and self.agreed() and self.abandons_step


def torchrun_grace_seconds() -> float:
    """Returns the seconds between a signal and torchrun's SIGKILL; infinity without torchrun.

    Ranks do not see torchrun's flag --shutdown-timeout, so only the environment variable counts.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return math.inf
    given = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT") if torch.__version__ >= "2.13" else None
    return float(given or TORCHRUN_GRACE_SECONDS)


# ---- Checkpoints: writing and resuming -----------------------------------------------------------------------


class Checkpoints:
    """Writes, finds, verifies and loads checkpoints.

    A context manager: on leaving it, also with UserError or RunError, the save in progress is completed first.

    `checkpoints/step-000500/` holds one or more safetensors files per rank, written by torch.distributed.checkpoint
    and readable on any number of ranks under any plan, and `manifest.json`: where the run stood, and size and SHA-256
    of every file. Nothing in it is ever unpickled.
    """

    def __init__(self, parallel: Parallel, train_set: Documents, total_steps: int):
        self.parallel, self.config, self.total_steps = parallel, parallel.config, total_steps
        self.settings = loss_settings(train_set, parallel)
        check_that_nodes_agree(self.settings, "the same files")
        self.folder = Path(self.config.save_model_dir) / "checkpoints"
        self.group = parallel.cpu_group()  # separate: a background write must not mix with training's messages
        self.on_all_ranks = functools.partial(on_all_ranks, group=self.group)
        checkpoint_bytes = 3 * parallel.plan.state_bytes * parallel.shape.parameters  # weights and two moments
        self.asynchronous = saves_in_background(checkpoint_bytes, parallel)
        on_all_ranks(lambda: check_disk(self.folder, checkpoint_bytes, parallel), main_only=True)
        on_all_ranks(lambda: check_host_memory(parallel))
        self.writer = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self.pending: concurrent.futures.Future | None = None
        self.saved_step = 0  # of the last checkpoint written or read
        self.sha256 = ""  # of that checkpoint's manifest; after a save in this run rank 0 alone has it
        self.last_save_seconds = 0.0

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type in ORDERLY_EXITS:
            self.wait()

    def wait(self) -> None:
        """Waits for the background write, if any. Raises its error, unless it was reported as a failed save."""
        if self.pending is not None:
            self.pending.result()

    def seconds_to_save(self) -> float:
        """Returns the time the next save will take, estimated from the last; twice that while one is being written."""
        return self.last_save_seconds * (2 if self.pending is not None and not self.pending.done() else 1)

    def save(self, model: nn.Module, optimizer: Optimizer, state: TrainingState) -> None:
        """Saves; in the background, training goes on as soon as the tensors are copied. One write at a time."""
        called = time.perf_counter()
        self.wait()
        # That write may have been of this very step: if the next step was abandoned, `main` asks for it once more.
        if self.saved_step == state.step:
            return
        began = time.perf_counter()
        tensors = checkpoint_tensors(model, optimizer, copy=self.asynchronous)
        tensors[f"rng.{self.parallel.rank}"] = torch.get_rng_state()
        if self.parallel.device.type == "cuda":
            tensors[f"rng.cuda.{self.parallel.rank}"] = torch.cuda.get_rng_state()
        facts = {
            **state.as_numbers(),
            "curve": self.settings,  # what decides the loss curve; compared when resuming
            "total_steps": self.total_steps,
            "save_seconds": self.last_save_seconds,
            "strategy": self.parallel.plan.strategy,
            "world_size": self.parallel.cluster.world_size,
        }
        if self.asynchronous:
            self.pending = self.writer.submit(self.write, tensors, facts, began, called)
        else:
            self.write(tensors, facts, began, called)

    def write(self, tensors: dict[str, Tensor], facts: dict[str, Any], began: float, called: float) -> None:
        """Writes one checkpoint. A failure (a full disk, say) is reported; the old ones stay and the run goes on.

        `began` is when this save began, and `called` when it was asked for: it may have waited for the one before.
        """
        held = f", training held for {time.perf_counter() - called:.1f} s" if self.asynchronous else ""
        device = self.parallel.device
        if device.type == "cuda" and device.index is not None:  # a new thread's current device is GPU 0
            torch.cuda.set_device(device)
        final = self.folder / f"step-{facts['step']:06d}"
        writing = final.with_name(final.name + WRITING)

        def make_folder() -> None:
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)

        sharers = self.parallel.data_parallel_size * self.parallel.plan.tensor_parallel_size
        # what a rank writes on average: a DTensor's nbytes are the whole's, and of equal copies only one is written
        shares = {name: each.nbytes // sharers for name, each in tensors.items()}

        try:
            self.on_all_ranks(make_folder, main_only=True)
            numbers = file_of_each(self.on_all_ranks(lambda: shares, gathered=True))
            self.on_all_ranks(lambda: save_tensors(tensors, numbers, writing, self.group, self.asynchronous))
            mine = f"shard-{self.parallel.rank + 1:05d}-*"
            sums = self.on_all_ranks(
                lambda: {file.name: file_checksum(file) for file in writing.glob(mine)}, gathered=True
            )
            files = {name: value for sums_of_rank in sums for name, value in sums_of_rank.items()}
            self.on_all_ranks(lambda: self.complete(writing, final, facts, files), main_only=True)
        except RunError as failure:
            self.parallel.say(
                f"WARNING   the checkpoint of step {facts['step']} could not be written ({failure}); the run goes on, "
                "what was saved before is kept, and the next save tries again"
            )
            if self.parallel.is_main:
                shutil.rmtree(writing, ignore_errors=True)
            return
        seconds, size_gib = time.perf_counter() - began, sum(file["bytes"] for file in files.values()) / GIB
        self.parallel.say(f"saved     {final} ({size_gib:.2f} GiB) in {seconds:.1f} s{held}")
        # warned about once, not after every slow save: only if the save before it was fast enough
        if self.last_save_seconds <= 0.8 * torchrun_grace_seconds() < seconds:
            self.parallel.say(
                f"WARNING   a save takes {seconds:.0f} s, and torchrun kills ranks {torchrun_grace_seconds():.0f} s "
                "after a SIGTERM; with torch 2.13 or newer, "
                f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT={math.ceil(2 * seconds)} gives more"
            )
        self.saved_step, self.last_save_seconds = facts["step"], seconds

    def complete(self, writing: Path, final: Path, facts: dict[str, Any], files: dict[str, Any]) -> None:
        """Marks a written checkpoint complete, gives it its name, and deletes what is no longer kept. Rank 0 alone."""
        manifest = {"facts": facts, "files": files}
        manifest["sha256"] = self.sha256 = json_checksum(manifest)
        (writing / "manifest.json").write_text(json.dumps(manifest, indent=1))
        sync_to_disk(writing / "manifest.json")
        sync_to_disk(writing)
        if final.exists():  # a damaged checkpoint of the same step, skipped when resuming
            discard(final)
        writing.rename(final)
        sync_to_disk(self.folder)
        found = complete_checkpoints(self.folder)
        here = found.index(final)  # those before it are newer: damaged, skipped when resuming, and deleted now
        for other in found[:here] + found[here + self.config.keep_checkpoints :]:
            try:
                discard(other)
            except OSError as error:  # the new one is whole all the same
                self.parallel.say(f"WARNING   {other} could not be deleted ({first_line(error)})")

    def weights_hash_of(self, state: TrainingState) -> str:
        """Returns a hash that tells the weights of this step from all others, on rank 0; "" if they were not saved."""
        return self.sha256 if self.saved_step == state.step else ""

    def resume(self, model: nn.Module, optimizer: Optimizer) -> TrainingState:
        """Returns the state to go on from, model and optimizer loaded to match; a fresh one where there is none.

        Raises UserError where there are checkpoints, but none that can be resumed.
        """
        state, named = TrainingState.fresh(self.parallel.device), self.config.resume
        # rank 0's list, because network filesystems may show files late
        own = self.on_all_ranks(self.tidy_folder, main_only=True)
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # the agents of several nodes count differently
        is_restart = max(self.on_all_ranks(lambda: restarts, gathered=True)) > 0
        # torchrun's restart repeats --resume PATH, which by then is rightly not this folder's newest
        if named != "auto" and not (is_restart and own):
            self.on_all_ranks(lambda: self.check_path(Path(named), own))
        names_another_folder = named != "auto" and Path(named).resolve().parent != self.folder.resolve()
        begins_at_named = named != "auto" and not own
        for folder in [Path(named)] if begins_at_named else own:
            try:
                facts = self.on_all_ranks(lambda folder=folder: self.verify(folder))
            except RunError as damage:
                if begins_at_named:
                    raise UserError(f"--resume {named} is not a whole checkpoint: {damage}; name another") from None
                self.parallel.say(f"WARNING   {folder} is damaged ({damage}); trying the one before it")
                continue
            self.on_all_ranks(lambda facts=facts, folder=folder: self.check_settings(facts, folder))
            self.load(folder, facts, model, optimizer, state)
            if begins_at_named:  # or a tracker would draw this run into the other's curves
                state.run_id = self.on_all_ranks(lambda: uuid.uuid4().hex[:12], main_only=True)
            self.parallel.say(
                f"resume    from {folder}, saved with world size {facts['world_size']} and parallelism "
                + facts["strategy"]
                + (f"; --resume {named} says only where a new run begins" if own and names_another_folder else "")
            )
            return state
        if own:  # and none is whole
            raise UserError(f"every checkpoint in {self.folder} is damaged; delete them to start from the beginning")
        return state

    def tidy_folder(self) -> list[Path]:
        """Removes what an interrupted write or deletion left; returns the checkpoints, newest first. Rank 0 alone."""
        for leftover in [*self.folder.glob("*" + WRITING), *self.folder.glob("*" + DELETING)]:
            shutil.rmtree(leftover, ignore_errors=True)
        return complete_checkpoints(self.folder)

    def check_path(self, checkpoint: Path, own: list[Path]) -> None:
        """Raises UserError where `--resume PATH` names no checkpoint, or one of this folder that is not its newest.

        `own` are the complete checkpoints of the save folder, newest first. Where there are any, a path elsewhere is
        not looked at: the run goes on from its own newest, wherever it began. Any rank may call it alone.
        """
        if own and checkpoint.resolve().parent != self.folder.resolve():
            return
        if not checkpoint.is_dir():
            problem = "is not a folder" if checkpoint.exists() else "does not exist"
            raise UserError(f"--resume {checkpoint} {problem}; give auto, or a checkpoint's folder")
        if inside := complete_checkpoints(checkpoint) or complete_checkpoints(checkpoint / "checkpoints"):
            raise UserError(
                f"--resume {checkpoint} holds checkpoints but is none; name one, such as {inside[0]}, or leave "
                "--resume out to go on from the newest in --save-model-dir"
            )
        later = [str(each) for each in itertools.takewhile(lambda each: not each.samefile(checkpoint), own)]
        if later and len(later) == len(own):
            raise UserError(f"--resume {checkpoint} is no complete checkpoint; name one, such as {own[0]}")
        if later:
            raise UserError(
                f"--resume {checkpoint} is not the newest checkpoint of {self.folder}; to go back to it, delete "
                f"{' and '.join(later)}"
            )

    def verify(self, folder: Path) -> dict[str, Any]:
        """Returns the manifest's facts about the run, having checked this rank's share of the files.

        Raises RunError for damage, naming the file, and UserError for a disk at fault. Any rank may call it alone.
        """
        name = "manifest.json"
        try:
            manifest = json.loads((folder / name).read_text())
            signature = manifest.pop("sha256")
            if signature != json_checksum(manifest):
                raise RunError("manifest.json was changed after it was written")
            for name in sorted(manifest["files"])[self.parallel.rank :: self.parallel.cluster.world_size]:
                path, expected = folder / name, manifest["files"][name]
                size = path.stat().st_size
                if size != expected["bytes"]:
                    raise RunError(f"{name} has {size} bytes instead of {expected['bytes']}")
                if file_checksum(path) != expected:
                    raise RunError(f"{name} is corrupt: its SHA-256 differs from the manifest's")
        except (FileNotFoundError, ValueError, KeyError) as error:
            raise RunError(f"{name} is missing or unreadable ({first_line(error)})") from None
        except OSError as error:  # the disk's fault: were it taken for damage, this checkpoint would be deleted
            raise UserError(f"{folder} cannot be read ({first_line(error)}); mend that and start again") from error
        self.sha256 = signature
        return manifest["facts"]

    def check_settings(self, facts: dict[str, Any], folder: Path) -> None:
        """Raises UserError if these flags would not give the losses that the run of the checkpoint would have had.

        More steps are allowed, although they stretch the schedule of the learning rate: this is how a run is prolonged.
        """
        saved = facts["curve"]
        changed = [name for name, value in self.settings.items() if saved.get(name) != value]
        # these change the tokens too, so the data is not reported beside them
        if not {"block_size", "loss_on", "model_name_or_path"}.isdisjoint(changed):
            changed = [name for name in changed if name != "dataset_name_or_path"]
        another = "give another --save-model-dir, " * (folder.parent == self.folder)
        remedy = f"set it back, {another}or add --resume-anyway"
        choice_of_data = " (--dataset-config, the columns and --max-train-samples decide it, too)"
        problems = [
            f"{flag_name(name)} is now {self.settings[name]}, but {folder} was trained with {saved.get(name)}"
            f"{choice_of_data * (name == 'dataset_name_or_path')}; {remedy}"
            for name in changed
        ]
        # a change of the data or the batch size, which is reported already, changes the number of steps too
        if self.total_steps < facts["total_steps"] and not changed:
            problems.append(
                f"--num-train-epochs and --max-steps now give {self.total_steps} steps, but {folder} was trained "
                f"towards {facts['total_steps']}, which set its learning rates; {remedy}"
            )
        if problems and not self.config.resume_anyway:
            raise UserError(*problems)
        if facts["step"] > self.total_steps:
            raise UserError(
                f"{folder} is past the {self.total_steps} steps of this run; raise --max-steps or --num-train-epochs"
            )

    def load(
        self, folder: Path, facts: dict[str, Any], model: nn.Module, optimizer: Optimizer, state: TrainingState
    ) -> None:
        """Loads a verified checkpoint into model, optimizer, state and this rank's random states.

        Hyperparameters stay those of the flags: only tensors are stored.
        """
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        reader = HuggingFaceStorageReader(str(folder))
        tensors = checkpoint_tensors(model, optimizer, copy=False)  # `dcp.load` fills them in place
        stored = reader.read_metadata().state_dict_metadata
        rng, cuda_rng = f"rng.{self.parallel.rank}", f"rng.cuda.{self.parallel.rank}"
        for name in {rng, cuda_rng} & stored.keys():  # present if the saving run had this rank
            tensors[name] = torch.empty(stored[name].size, dtype=torch.uint8)
        try:
            dcp.load(tensors, storage_reader=reader, process_group=self.group, no_dist=self.group is None)
        except dcp.CheckpointException as error:  # derives from BaseException, and is raised on every rank
            cause, _ = next(iter(error.failures.values()))
            raise UserError(
                f"{folder} cannot be loaded into this model ({first_line(cause)}); give the model it was trained from, "
                "or mend its disk"
            ) from None
        if rng in tensors:
            torch.set_rng_state(tensors[rng])
        if cuda_rng in tensors and self.parallel.device.type == "cuda":
            torch.cuda.set_rng_state(tensors[cuda_rng])
        state.restore(facts)
        self.last_save_seconds, self.saved_step = facts["save_seconds"], facts["step"]


def loss_settings(documents: Documents, parallel: Parallel) -> dict[str, Any]:
    """Returns what decides the losses of a run, by flag name. Parallelism is left out, because it changes no loss.

    Any rank may call it alone.
    """
    config = parallel.config
    names = (
        "seed", "batch_size", "block_size", "loss_on", "lr", "lr_scheduler", "warmup_ratio", "weight_decay",
        "max_grad_norm", "random_init",
    )  # fmt: skip
    settings = {name: getattr(config, name) for name in names}
    settings["precision"] = parallel.plan.precision
    settings["dataset_name_or_path"] = f"{len(documents)} training documents with fingerprint {documents.fingerprint}"
    incidental = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    model = {name: value for name, value in parallel.model_config.to_diff_dict().items() if name not in incidental}
    shape = f"a model of {parallel.shape.parameters} parameters"
    settings["model_name_or_path"] = f"{shape} with fingerprint {json_checksum(model)[:12]}"
    return settings


# ---- Checkpoints: disk and host memory -----------------------------------------------------------------------


def saves_in_background(checkpoint_bytes: int, parallel: Parallel) -> bool:
    """Returns whether checkpoints are written in the background, the same on every rank.

    This needs host memory for a copy of each rank's share (under DDP, of everything).
    """
    plan, wanted = parallel.plan, parallel.config.async_save
    parts = plan.model_parallel_size * plan.dp_shard_size
    copy_gib = checkpoint_bytes / GIB / parts * parallel.cluster.ranks_per_node
    on_host = parallel.device.type == "cpu" or plan.cpu_offload
    to_come_gib = copy_gib * 4 / 3 if on_host else 0.0  # weights, moments and gradients of a model still to load
    usable_share = {"auto": 0.5, "yes": 0.9, "no": 0.0}[wanted]
    usable_here_gib = usable_share * max(0.0, free_host_memory() / GIB - to_come_gib)
    usable_gib = min(on_all_ranks(lambda: usable_here_gib, gathered=True))  # of the node that has least
    in_background = copy_gib <= usable_gib
    if wanted != "no" and not in_background:
        parallel.say(
            f"save      training waits while a checkpoint is written: a copy to write from takes {copy_gib:.1f} GiB of "
            f"host memory per node, and {usable_gib:.1f} may be used for it"
        )
    return in_background


def check_disk(folder: Path, checkpoint_bytes: int, parallel: Parallel) -> None:
    """Raises UserError where `--keep-checkpoints` + 1 checkpoints and the final model will not fit. Rank 0 alone."""
    ours = [*folder.rglob("*"), *folder.parent.glob("model*.safetensors")]  # what a run replaces
    present = sum(file.stat().st_size for file in ours if file.is_file())
    free = shutil.disk_usage(folder.parent).free + present
    kept = parallel.config.keep_checkpoints + 1
    final = parallel.shape.parameters * saved_dtype(parallel.plan, parallel.config).itemsize
    need = kept * checkpoint_bytes + final
    if free < need:
        raise UserError(
            f"--save-model-dir {folder.parent} has {free / GIB:.1f} GiB free, but {kept} checkpoints of "
            f"{checkpoint_bytes / GIB:.1f} and the model of {final / GIB:.1f} need {need / GIB:.1f}; free some, give "
            "another folder, or lower --keep-checkpoints"
        )


def check_host_memory(parallel: Parallel) -> None:
    """Raises UserError where a node's host memory cannot hold what the run will put there.

    These are the states of all the node's ranks under --cpu-offload and, on rank 0's node if it has GPUs, the final
    model's weights while they are written. Any rank may call it alone.
    """
    plan, needs = parallel.plan, {}
    if plan.cpu_offload:
        states_gib = offloaded_gib(parallel.shape, parallel.cluster, plan)
        needs["weights, gradients and moments under --cpu-offload"] = states_gib * GIB
    if parallel.is_main and parallel.device.type == "cuda":
        needs["the final model, gathered"] = parallel.shape.parameters * saved_dtype(plan, parallel.config).itemsize
    if sum(needs.values()) > (free := free_host_memory()):
        parts = " and ".join(f"{size / GIB:.1f} GiB for {what}" for what, size in needs.items())
        raise UserError(
            f"node {platform.node()} has {free / GIB:.1f} GiB of host memory free, and the run will take {parts}; use "
            "a node with more, or a smaller model"
        )


def free_host_memory() -> int:
    """Returns the bytes this process may still take, by the node or the job's cgroup (Slurm, a container).

    https://docs.kernel.org/admin-guide/cgroup-v2.html: parent groups may set limits too, and file cache counts as free.
    """
    free, root = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError, StopIteration):
        own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        group = root / own[3:].strip("/")
        for folder in [group, *group.parents]:
            if (folder / "memory.max").is_file() and (limit := (folder / "memory.max").read_text().strip()) != "max":
                cached = re.search(r"^inactive_file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
                used = int((folder / "memory.current").read_text()) - int(cached[1] if cached else 0)
                free = min(free, max(0, int(limit) - used))
    return free


# ---- Checkpoints: tensors and files --------------------------------------------------------------------------


def checkpoint_tensors(model: nn.Module, optimizer: Optimizer, copy: bool) -> dict[str, Tensor]:
    """Returns this rank's share of weights and moments by name, as DTensors where they are sharded.

    With `copy` they are in host memory, safe from the training that goes on; without, they are the model's and the
    optimizer's own (`get_state_dict` makes the moments of an optimizer that has none yet). Scalars get one dimension,
    and of tied weights there is one, as safetensors wants it.
    """
    from accelerate.utils import find_tied_parameters
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    # DDP adds a prefix, which get_state_dict removes
    tied = {name.removeprefix("module.") for names in find_tied_parameters(model) for name in names[1:]}
    tensors = {f"model.{name}": tensor for name, tensor in weights.items() if name not in tied}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in moments.items() if isinstance(tensor, Tensor)}
    tensors = {name: tensor.reshape(1) if tensor.ndim == 0 else tensor for name, tensor in tensors.items()}
    if copy:
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    return tensors


def save_tensors(
    tensors: dict[str, Tensor], numbers: dict[str, int], folder: Path, group: dist.ProcessGroup | None, copied: bool
) -> None:
    """Writes every rank's tensors, each into the file that `numbers` gives. Raises RunError, the same on every rank."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    storage = HuggingFaceStorageWriter(str(folder), numbers, save_distributed=True)
    if copied:  # the tensors are in host memory; copying ahead would wait for the stream that trains
        storage.per_thread_copy_ahead = 0
    try:
        dcp.save(tensors, storage_writer=storage, process_group=group, no_dist=group is None)
    except dcp.CheckpointException as error:  # derives from BaseException
        rank, (cause, _) = next(iter(error.failures.items()))
        raise RunError(f"{first_line(cause)}, on rank {rank}") from None


def file_of_each(sizes_of_ranks: list[dict[str, int]]) -> dict[str, int]:
    """Returns, by tensor name, the number of the file a rank writes it to, so that files stay near the size aimed at.

    It is given the bytes of each rank's share by name, because pipeline stages hold different tensors.
    """
    sizes = {name: size for sizes_of_rank in sizes_of_ranks for name, size in sizes_of_rank.items()}
    numbers, number, filled = {}, 1, 0
    for name, size in sorted(sizes.items()):
        numbers[name] = number
        filled += size
        if filled > CHECKPOINT_FILE_BYTES:
            number, filled = number + 1, 0
    return numbers


def file_checksum(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def json_checksum(value: dict[str, Any]) -> str:
    """Returns the SHA-256 of a value's JSON, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def complete_checkpoints(folder: Path) -> list[Path]:
    """Returns the folders of the complete checkpoints in a folder, newest first."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def discard(checkpoint: Path) -> None:
    """Deletes a checkpoint, by another name first: a half-deleted one is never taken for a whole one."""
    leaving = checkpoint.with_name(checkpoint.name + DELETING)
    shutil.rmtree(leaving, ignore_errors=True)
    checkpoint.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------------
# 9. The final model
# ----------------------------------------------------------------------------------------------------------------
# The save folder becomes a Hugging Face model folder that `from_pretrained` loads in one plain process, with a model
# card. A kill leaves the old model, no model or the new one, never a mixture; the same command writes it again.

UNFINISHED_MODEL = ".final-model.writing"


def save_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, parallel: Parallel, weights_hash: str = ""
) -> None:
    """Writes model and tokenizer into the save folder, unless it holds the model of these very weights already.

    The files are first written and flushed beside their place. Then the record `checkpoints/final-model.json` and the
    old `config.json`, without which no loader takes the folder for a model, are deleted. The files move in, the new
    `config.json` last, and the record is written anew.
    """
    folder = Path(parallel.config.save_model_dir)
    record = folder / "checkpoints" / "final-model.json"
    identity = [weights_hash, str(saved_dtype(parallel.plan, parallel.config))]

    def is_written() -> bool:
        with contextlib.suppress(OSError, ValueError, KeyError):
            saved = json.loads(record.read_text())
            whole = all((folder / name).stat().st_size == size for name, size in saved["bytes"].items())
            return bool(weights_hash) and saved["of"] == identity and whole
        return False

    if on_all_ranks(is_written, main_only=True):
        return
    model = parallel.accelerator.unwrap_model(model)
    weights = gather_weights(model, parallel)

    def write() -> None:
        written = folder / UNFINISHED_MODEL
        shutil.rmtree(written, ignore_errors=True)
        write_model(model, weights, tokenizer, written)
        sizes = {file.name: file.stat().st_size for file in written.iterdir() if file.is_file()}
        if not (weights_hash and record.exists() and weights_hash in record.read_text()):
            # the card of other weights; that of the same weights in another dtype stays
            (folder / "README.md").unlink(missing_ok=True)
        record.unlink(missing_ok=True)
        for pattern in ("config.json", "model*.safetensors*", "generation_config.json", *TOKENIZER_FILES):
            for old in folder.glob(pattern):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        for file in sorted(written.iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(folder / file.name)
        sync_to_disk(folder)
        written.rmdir()
        if weights_hash:
            record.parent.mkdir(exist_ok=True)
            text = json.dumps({"of": identity, "bytes": sizes})
            write_atomically(record, lambda path: path.write_text(text))

    on_all_ranks(write, main_only=True)


def saved_dtype(plan: Plan, config: Config) -> torch.dtype:
    """Returns the dtype of the final model's weights."""
    chosen = plan.precision if config.save_dtype == "auto" else config.save_dtype
    return torch.float32 if chosen == "fp32" else torch.bfloat16


def gather_weights(model: PreTrainedModel, parallel: Parallel) -> dict[str, Tensor]:
    """Returns the full weights on rank 0, in host memory, and nothing on the others.

    One tensor at a time: a device holds its own share and a single whole matrix, never the model.
    """
    weights, dtype = {}, saved_dtype(parallel.plan, parallel.config)
    tied = model.all_tied_weights_keys.keys()  # they are the same tensors under another name
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    for name, whole in parallel.pipeline.whole_tensors(tensors):
        if parallel.is_main:
            weights[name] = whole.detach().to("cpu", dtype if whole.is_floating_point() else whole.dtype)
        del whole  # before the next one is gathered
    return weights


def write_model(
    model: PreTrainedModel, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Writes a model folder and flushes it to disk.

    It is saved through an empty copy on the meta device, because `save_pretrained` of the parallel model would gather
    its fp32 weights again.
    """
    with torch.device("meta"):
        dtype = next(iter(weights.values())).dtype
        empty = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=dtype)
    empty.config.distributed_config = None
    empty.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=padding_id(tokenizer)
    )
    empty.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    sentencepiece = Path(str(tokenizer.name_or_path)) / "tokenizer.model"
    if sentencepiece.is_file() and not (folder / sentencepiece.name).exists():  # what llama.cpp's converter looks for
        shutil.copyfile(sentencepiece, folder / sentencepiece.name)
    mode = (folder / "config.json").stat().st_mode
    for file in filter(Path.is_file, folder.rglob("*")):
        file.chmod(mode)  # safetensors makes its files readable by their owner alone
        sync_to_disk(file)
    sync_to_disk(folder)


# ---- The final model: its card -------------------------------------------------------------------------------

MODEL_CARD = """---
{{ card_data }}
---

# {{ base_name }} fine-tuned for summarisation

All weights of `{{ trained_model }}` were trained on `{{ data }}` with `train_llama2.py`.

## Use

The prompt is `{{ prompt_open }}` + article + `{{ prompt_close.rstrip() }}` + newline, and the summary ends with the \
end-of-sequence token. Prompt and summary together had at most {{ block_size }} tokens in training; cut longer articles.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "OWNER/NAME"  # of this model on the Hub, or its folder
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, device_map="auto")
article = "The mayor opened the new bridge on Monday. It took the builders two years."
prompt = f"{{ prompt_open }}{article}{{ prompt_close.rstrip() }}\\n"
inputs = tokenizer(prompt, split_special_tokens=True, return_tensors="pt").to(model.device)
written = model.generate(**inputs, max_new_tokens={{ max_summary_tokens }}, num_beams={{ num_beams }}, do_sample=False)
print(tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
```

## Results

| | |
| --- | --- |
{% for name, value in results.items() -%}
| {{ name }} | {{ value }} |
{% endfor %}
{%- if test %}
| test split, {{ test.test_samples }} documents | ROUGE-1 | ROUGE-2 | ROUGE-Lsum |
| --- | --- | --- | --- |
{% for who, scores in test_scores.items() -%}
| {{ who }} | {{ scores | join(" | ") }} |
{% endfor %}
Mean F1 in percent, with stemming, and its 95% bootstrap interval. A summary has {{ test.test_mean_words | round(1) }} \
words on average, and {{ (100 * test.test_ended_share) | round(1) }}% of the summaries ended by themselves.
{% endif %}
{%- if has_curves %}
![curves](curves.png)
{% endif %}
## Training

```bash
{{ command }}
```

Plan: {{ plan }} on {{ devices }}.
{% if plan_check %}
```
{{ plan_check }}
```
{% endif %}
{%- if samples %}
## Samples
{% for sample in samples %}
**Reference.** {{ sample.reference }}

**Summary.** {{ sample.summary }}
{% endfor %}
{%- endif %}
{%- if is_llama_2 %}
## Licence

Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved. \
This model is a derivative of it, and its use is bound by that licence and its acceptable use policy.
{% endif %}"""


TRAINING_SECTION = re.compile(r"^## Training\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)


def write_model_card(parallel: Parallel, state: TrainingState, log: RunLog) -> None:
    """Writes `README.md` into the save folder: what was trained, how, on what, and how well. Rank 0 writes.

    Results are read from the log files, earlier runs included. A run without new steps or scores keeps the card, and
    one that only scored keeps its section on the training, which may have run on other devices.
    """
    config, cluster, folder = parallel.config, parallel.cluster, Path(parallel.config.save_model_dir)
    path = folder / "README.md"
    if not parallel.is_main or not (log.steps_of_this_run or log.last_scores or log.tested or not path.exists()):
        return
    base_name = published_name(config.model_name_or_path)
    is_llama_2 = parallel.model_config.model_type == "llama" and bool(re.search("llama-?2", base_name, re.IGNORECASE))
    with keep_going("the model card could not be written", parallel):
        lines, samples = read_lines(folder / METRICS_FILE), read_lines(folder / SAMPLES_FILE)
        trained = next((line for line in reversed(lines) if "loss" in line), {})
        evaluated = next((line for line in reversed(lines) if "eval_loss" in line), {})
        test = next((line for line in reversed(lines) if "test_samples" in line and line["step"] == state.step), None)
        systems = {"this model": "test_", "Lead-3: the article's first three sentences": "test_lead3_"} if test else {}
        results = {"optimizer steps": state.step, "tokens": f"{state.tokens:,}", "training loss": trained.get("loss")}
        scores = {name.removeprefix("eval_"): value for name, value in evaluated.items() if name != "step"}
        results |= {f"validation {name}": value for name, value in scores.items()}
        results = {name: value for name, value in results.items() if value is not None}
        card = huggingface_hub.ModelCard.from_template(
            huggingface_hub.ModelCardData(
                language="en",
                license="llama2" if is_llama_2 else None,
                library_name="transformers",
                pipeline_tag="text-generation",
                tags=["summarization", "full-fine-tuning"],
                base_model=None if is_local(config.model_name_or_path) else config.model_name_or_path,
                datasets=[name for name in config.dataset_paths if not is_local(name)] or None,
            ),
            template_str=MODEL_CARD,
            is_llama_2=is_llama_2,
            trained_model=base_name,
            base_name=base_name.rpartition("/")[2],
            data=" ".join(map(published_name, config.dataset_paths)),
            prompt_open=PROMPT_OPEN,
            prompt_close=PROMPT_CLOSE,
            block_size=config.block_size,
            max_summary_tokens=config.max_summary_tokens,
            num_beams=config.num_beams,
            test=test,
            test_scores={
                who: [shown_interval(test, prefix + name) for name in ROUGE] for who, prefix in systems.items()
            },
            results={n: f"{value:.4f}" if isinstance(value, float) else value for n, value in results.items()},
            has_curves=(folder / "curves.png").exists(),
            command=typed_command(cluster),
            plan=parallel.plan.describe(),
            devices=f"{cluster.world_size} x {cluster.device_name}",
            plan_check="\n".join(lines_of_check(log.plan_check)),
            samples=[sample for sample in samples if sample["step"] == evaluated.get("step")][:SHOWN_SAMPLES],
        )
        if not log.steps_of_this_run and path.exists() and (former := TRAINING_SECTION.search(path.read_text())):
            card.text = TRAINING_SECTION.sub(lambda _: former[0], card.text)
        write_atomically(path, card.save)


def published_name(word: str) -> str:
    """Returns a word of the command line without private paths: a local path, also after `--flag=`, is cut to its name.

    A snapshot in the cache of the Hub goes by its Hub id, not by its commit.
    """
    flag, equals, path = word.partition("=") if word.startswith("--") else ("", "", word)
    if cached := re.search(r"(?:models|datasets)--([^/]+)/snapshots/[^/]+/?$", path):
        return flag + equals + cached[1].replace("--", "/", 1)
    return flag + equals + (os.path.basename(os.path.abspath(path)) if is_local(path) else path)


def typed_command(cluster: Cluster) -> str:
    """Returns the command of this run, to be run on every node; replace HOST by the first node.

    Of local paths it has the names alone: a model card is made to be published.
    """
    meeting_point = "--standalone"
    if cluster.nodes > 1:
        meeting_point = f"--nnodes={cluster.nodes} --rdzv_backend=c10d --rdzv_endpoint=HOST:29500"
    torchrun = f"torchrun {meeting_point} --nproc_per_node={cluster.ranks_per_node}"
    launcher = torchrun if cluster.world_size > 1 else "python"
    return f"{launcher} {shlex.join(map(published_name, [Path(sys.argv[0]).name, *sys.argv[1:]]))}"


# ----------------------------------------------------------------------------------------------------------------
# 10. Reporting
# ----------------------------------------------------------------------------------------------------------------
# Rank 0 reports to the console, metrics.jsonl and the trackers. The second step is compared with the plan. Once
# training has begun, reporting never ends a run: a full disk, a tracker's server that is gone, a missing font is a
# warning.

METRICS_FILE, SAMPLES_FILE = "metrics.jsonl", "samples.jsonl"
SHOWN_SAMPLES = 3  # summaries beside their references in the log, the trackers and the model card


class RunLog:
    """The progress bar, and a line for each interval and evaluation on the console, in the metrics file and trackers.

    Raises UserError where the files cannot be written or the tracker cannot be started.
    """

    def __init__(
        self, parallel: Parallel, state: TrainingState, total_steps: int, steps_per_epoch: int, async_save: bool
    ):
        self.parallel, self.config = parallel, parallel.config
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.folder = Path(self.config.save_model_dir)
        # what became of the `auto` flags that are settled after the plan is chosen
        save_dtype = "bf16" if saved_dtype(parallel.plan, parallel.config) == torch.bfloat16 else "fp32"
        self.resolved = dict(compiled=parallel.plan.compiled, async_save=async_save, save_dtype=save_dtype)
        hidden = not parallel.shows_bars
        self.bar = tqdm(total=total_steps, initial=state.step, desc="training", unit="step", disable=hidden)
        self.started = time.perf_counter()
        self.steps_of_this_run, self.last_loss, self.last_scores, self.tested = 0, math.nan, {}, False
        self.training_seconds, self.training_tokens, self.step_seconds = 0.0, 0, 0.0
        self.begin_interval()
        self.earlier_peak_gib = 0.0  # of the first step and before it
        self.plan_check: dict[str, dict[str, Any]] = {}  # of rank 0, once the second step has ended; none on MoAI
        on_all_ranks(lambda: self.open(state), main_only=True)

    def open(self, state: TrainingState) -> None:
        """Opens the files and the tracker, if there is one. Rank 0 alone."""
        try:
            self.metrics = LinesFile(self.folder / METRICS_FILE, state)
            self.samples = LinesFile(self.folder / SAMPLES_FILE, state)
        except OSError as error:
            raise UserError(
                f"--save-model-dir {self.folder} cannot be written to ({first_line(error)}); free it"
            ) from error
        if not (self.folder / "train_config.json").exists():
            self.write_config()
        settings = {**dataclasses.asdict(self.config), "plan": self.parallel.plan.describe()}
        try:
            self.parallel.accelerator.init_trackers(
                "train_llama2",
                {name: str(value) for name, value in settings.items()},
                init_kwargs={  # a resumed run continues its own curves
                    "wandb": {"id": state.run_id, "resume": "allow"},
                    "tensorboard": {"purge_step": state.step + 1},  # without the steps that are repeated
                },
            )
            if self.config.report_to == "wandb":
                run = self.parallel.accelerator.get_tracker("wandb", unwrap=True)
                run.define_metric("*", step_metric="step")  # W&B's own counter would drop repeated steps
        except Exception as error:  # each tracker has errors of its own
            raise UserError(
                f"--report-to {self.config.report_to} cannot be started ({first_line(error)}); set it up, or use none"
            ) from error

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Leaves the body (an evaluation, a save) out of step time and throughput. Waits for the device first."""
        if self.parallel.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        yield
        self.interval_began += time.perf_counter() - began

    def begin_interval(self) -> None:
        self.interval_steps = self.interval_tokens = self.interval_squares = 0
        self.interval_waited, self.interval_began = 0.0, time.perf_counter()

    def timing_the_wait(self, batches: Iterator[GlobalBatch]) -> Iterator[GlobalBatch]:
        """Yields the batches, and counts the time in which this process builds them.

        On a GPU that is an upper bound of the wait, because the device mostly has work left meanwhile.
        """
        while True:
            if self.steps_of_this_run == 1:
                self.begin_second_step()
            began = time.perf_counter()
            batch = next(batches, None)
            self.interval_waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def begin_second_step(self) -> None:
        """Begins to measure the step whose memory and time are compared with the plan.

        Waits until the device is done with the first step, which allocates and compiles.
        """
        if self.parallel.device.type == "cuda":
            torch.cuda.synchronize()
            self.earlier_peak_gib = peak_memory_gib(self.parallel.device)
            torch.cuda.reset_peak_memory_stats()
        self.interval_began = time.perf_counter()

    def seconds_per_step(self) -> float:
        """Returns the mean seconds of a step in the last interval; until one ends, of the steps after the first.

        Before the second step it is about 0, unless the first step ended an interval.
        """
        return self.step_seconds or (time.perf_counter() - self.interval_began) / max(1, self.interval_steps)

    def step(self, state: TrainingState, result: StepResult | None) -> None:
        """Counts a step; every --log-interval steps, and at the last one, waits for the device and reports."""
        if result is None:  # the step was abandoned
            return
        self.bar.update()
        self.steps_of_this_run += 1
        self.interval_steps += 1
        self.interval_tokens += result.batch.tokens
        self.interval_squares += result.batch.squared_lengths
        if self.steps_of_this_run == 1 and self.parallel.is_main:
            self.write_config()  # only now: a run that trains nothing leaves what the one that trained has written
        if self.steps_of_this_run == 2 and self.parallel.is_main and self.parallel.choice is not None:
            with keep_going("the plan could not be checked", self.parallel):
                self.check_the_plan(result)
        if state.step % self.config.log_interval == 0 or state.step == self.total_steps:
            self.report_interval(state, result)
        elif self.steps_of_this_run == 1:
            self.begin_interval()  # the first step allocates and compiles: it would spoil the next rate and time left

    def report_interval(self, state: TrainingState, result: StepResult) -> None:
        loss, grad_norm, skipped = torch.stack([result.loss, result.grad_norm, state.skipped]).tolist()
        seconds, parallel = time.perf_counter() - self.interval_began, self.parallel
        peak = peak_flops(parallel.cluster, parallel.plan.precision)
        flops = training_flops(parallel.shape, self.interval_tokens, self.interval_squares)
        line = dict(
            step=state.step,
            epoch=state.step / self.steps_per_epoch,
            loss=loss,
            lr=result.lr,
            grad_norm=grad_norm,
            tokens=state.tokens,
            tokens_per_second=self.interval_tokens / seconds,
            step_seconds=seconds / self.interval_steps,
            mfu=flops / seconds / parallel.cluster.world_size / peak if peak else None,
            data_wait_share=self.interval_waited / seconds,
            peak_memory_gib=max(self.earlier_peak_gib, peak_memory_gib(parallel.device)),
            skipped_steps=int(skipped),
        )
        self.write(line)
        rate = f"{line['tokens_per_second']:,.0f}"
        self.bar.set_postfix(loss=f"{loss:.4f}", lr=f"{result.lr:.2e}", tokens_per_s=rate)
        parallel.say(
            f"step {state.step}/{self.total_steps}  loss {loss:.4f}  lr {result.lr:.2e}  grad norm {grad_norm:.3f}  "
            f"{rate} tokens/s"
            + (f"  MFU {line['mfu']:.1%}" if peak else "")
            + f"  {timedelta(seconds=round((self.total_steps - state.step) * line['step_seconds']))} left"
            + (f"  {int(skipped)} updates skipped (not finite)" if skipped else "")
        )
        self.training_seconds += seconds
        self.training_tokens += self.interval_tokens
        self.step_seconds, self.last_loss = line["step_seconds"], loss
        self.begin_interval()

    def check_the_plan(self, result: StepResult) -> None:
        """Compares the second step of this run with the plan. Waits for the device. Rank 0 alone."""
        if self.parallel.device.type == "cuda":
            torch.cuda.synchronize()
        self.plan_check = compare_with_plan(self.parallel, result, time.perf_counter() - self.interval_began)
        for line in lines_of_check(self.plan_check):
            self.parallel.say(line)
        self.write_config()
        values = {f"plan/{n}_{kind}": v[kind] for n, v in self.plan_check.items() for kind in v}
        self.track({n: value for n, value in values.items() if isinstance(value, float)})

    def evaluation_due(self, state: TrainingState) -> bool:
        """Returns whether an evaluation is due after this step and not made yet, the same on every rank."""
        due = state.step == self.total_steps or state.step % self.config.eval_interval == 0
        return due and state.step > state.evaluated_step

    def evaluation(self, state: TrainingState, outcome: tuple[dict[str, float], list[dict[str, Any]]] | None) -> None:
        """Reports an evaluation, notes in `state` that it was made, and draws the curves anew.

        `outcome` is None where a stop interrupted it: then it is still due.
        """
        if outcome is None:
            return
        scores, samples = outcome
        state.evaluated_step, self.last_scores = state.step, scores
        self.write(dict(step=state.step, **scores))
        at = f"step {state.step}/{self.total_steps}"
        rouge = "".join(f"  {name} {score:.2f}" for name, score in scores.items() if name.startswith("rouge"))
        self.parallel.say(
            f"{at}  eval loss {scores['eval_loss']:.4f}  perplexity {scores['eval_perplexity']:.2f}{rouge}"
        )
        for sample in samples[:SHOWN_SAMPLES]:
            self.parallel.say(f"{at}  reference  {' '.join(sample['reference'].split())}")
            self.parallel.say(f"{at}  summary    {' '.join(sample['summary'].split())}")
        self.append_samples(state.step, "validation", samples)
        if self.parallel.is_main:
            with keep_going(f"the summaries could not be sent to {self.config.report_to}", self.parallel):
                self.track_samples(state.step, "samples", samples[:SHOWN_SAMPLES])
            with keep_going("curves.png could not be drawn", self.parallel):
                draw_curves(self.folder)

    def test(self, state: TrainingState, scores: dict[str, float], samples: list[dict[str, Any]]) -> None:
        """Reports the scores of the test split. Files and trackers get them unless they have the very same already."""
        self.tested = True
        line = dict(step=state.step, test_samples=len(samples), **{f"test_{n}": value for n, value in scores.items()})
        for prefix, whose in (("", "the model"), ("lead3_", "Lead-3, each article's first three sentences")):
            rouge = "  ".join(f"{name} {shown_interval(scores, prefix + name)}" for name in ROUGE)
            self.parallel.say(f"test      {rouge}  {whose}")
        self.parallel.say(
            f"test      {len(samples):,} documents, {scores['mean_words']:.1f} words a summary; "
            f"{scores['ended_share']:.1%} of the summaries ended by themselves"
        )
        if not self.parallel.is_main:
            return
        with keep_going("the scores of the test split could not be written", self.parallel):
            # All the new summaries are in samples.jsonl by now, so those of this step that other weights or flags have
            # made can go. Those of the validation split have no `made_by`, and stay.
            made_by = samples[0]["made_by"]
            self.samples.keep(lambda each: each["step"] != state.step or each.get("made_by", made_by) == made_by)
            before = [each for each in read_lines(self.folder / METRICS_FILE) if "test_samples" in each]
            if before[-1:] != [line]:
                self.write(line)
                self.track_samples(state.step, "test samples", samples[:SHOWN_SAMPLES])

    def test_summaries(self, made_by: str) -> dict[int, dict[str, Any]]:
        """Returns the test summaries marked `made_by`, by index. Rank 0 alone."""
        records = read_lines(self.folder / SAMPLES_FILE)
        return {each["index"]: each for each in records if each.get("made_by") == made_by}

    def append_samples(self, step: int, split: str, samples: list[dict[str, Any]]) -> None:
        if self.parallel.is_main and samples:
            with keep_going(f"{self.folder / SAMPLES_FILE} could not be written", self.parallel):
                self.samples.write(*(dict(step=step, split=split, **sample) for sample in samples))

    def track_samples(self, step: int, name: str, samples: list[dict[str, Any]]) -> None:
        """Shows summaries in the trackers that take text. Rank 0 alone."""
        for tracker in self.parallel.accelerator.trackers if samples else []:
            if tracker.name == "wandb":
                rows = [[sample["reference"], sample["summary"]] for sample in samples]
                tracker.log_table(name, columns=["reference", "summary"], data=rows)
            elif tracker.name == "tensorboard":
                texts = [
                    f"**reference** {sample['reference']}\n\n**summary** {sample['summary']}" for sample in samples
                ]
                tracker.writer.add_text(name, "\n\n".join(texts), step)

    def write(self, line: dict[str, Any]) -> None:
        """Writes a line to metrics.jsonl and to the trackers. Any rank may call it alone."""
        if self.parallel.is_main:
            with keep_going("metrics.jsonl could not be written, and its lines are kept for later", self.parallel):
                self.metrics.write(line)
        self.track({name: value for name, value in line.items() if value is not None})

    def track(self, values: dict[str, Any]) -> None:
        """Sends values to the trackers. Any rank may call it alone."""
        step = None if self.config.report_to == "wandb" else values.pop("step", None)  # W&B takes it as a value
        with keep_going(f"{self.config.report_to} could not be reached", self.parallel):
            self.parallel.accelerator.log(values, step=step)  # to no tracker where --report-to is none

    def write_config(self) -> None:
        """Writes `train_config.json`: the flags, the versions, the machine, the plan and its check. Rank 0 alone."""
        with keep_going("train_config.json could not be written", self.parallel):
            text = json.dumps(run_description(self.parallel, self.resolved, self.plan_check), indent=2)
            write_atomically(self.folder / "train_config.json", lambda path: path.write_text(text))

    def flush(self) -> None:
        """Flushes the lines to disk: those up to a checkpoint must be on disk before it."""
        for name in (METRICS_FILE, SAMPLES_FILE) if self.parallel.is_main else ():
            with contextlib.suppress(OSError):  # a full disk was reported when writing; there may be no samples
                sync_to_disk(self.folder / name)

    def stopped(self, state: TrainingState, signal_name: str, saved: bool) -> None:
        self.bar.close()
        if state.step == 0:
            outcome = "nothing was trained yet, and the same command begins again"
        elif saved:
            outcome = "the checkpoint is saved, and the same command resumes from it"
        else:
            outcome = "its checkpoint could NOT be saved; the same command resumes from the newest that was"
        words = f"stopped   by {signal_name or 'a signal to another rank'} after step {state.step}; {outcome}"
        self.parallel.say(words, always=True)

    def done(self, state: TrainingState) -> None:
        """Says how to publish the model, and then what the run did."""
        self.bar.close()
        upload = shlex.join(["hf", "upload", "OWNER/NAME", str(self.folder)])
        upload += " --exclude '*/*' --exclude '.*' --exclude train_config.json"  # which holds this machine's paths
        self.parallel.say(f"publish   {upload}")
        if not self.training_tokens:
            words = f"done      already at step {state.step}, so nothing was trained; model in {self.folder}"
            return self.parallel.say(words, always=True)
        rate = self.training_tokens / self.training_seconds
        eval_loss = f", eval loss {self.last_scores['eval_loss']:.4f}" if self.last_scores else ""
        self.parallel.say(
            f"done      {state.step} steps, {state.tokens:,} tokens, {self.steps_of_this_run} steps in this run, in "
            f"{timedelta(seconds=round(time.perf_counter() - self.started))} ({rate:,.0f} tokens/s in training); "
            f"loss {self.last_loss:.4f}{eval_loss}; {int(state.skipped.item())} updates skipped; "
            f"model in {self.folder}",
            always=True,
        )


def shown_interval(scores: dict[str, float], name: str) -> str:
    return f"{scores[name]:.2f} ({scores[name + '_low']:.2f} to {scores[name + '_high']:.2f})"


@contextlib.contextmanager
def keep_going(problem: str, parallel: Parallel) -> Iterator[None]:
    """Turns an error of the body into a warning: a failed report must not end the run. Any rank may call it alone."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError, dist.DistError):  # no report's fault
        raise
    except Exception as error:
        parallel.say(f"WARNING   {problem} ({first_line(error)})")


def peak_flops(cluster: Cluster, precision: str) -> float | None:
    """Returns the dense bf16 peak of one device in FLOP/s; None for fp32, and for a device the table does not know."""
    known = cluster.has_gpu and cluster.gpu.sources.get("peak") == "table"
    return cluster.gpu.peak_tflops * 1e12 if known and precision != "fp32" else None


def peak_memory_gib(device: torch.device) -> float:
    """Returns this rank's peak: allocated device memory since it was reset, or resident host memory on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    # On Linux ru_maxrss begins at the peak of the parent process, so VmHWM is preferred.
    status = Path("/proc/self/status")
    if status.exists() and (high_water := re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.M)):
        return int(high_water[1]) * 1024 / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


# ---- Reporting: files ----------------------------------------------------------------------------------------


class LinesFile:
    """A file of JSON objects, one a line, continued at the step from which the run goes on. Rank 0 alone.

    Where the run begins here, because the folder holds no checkpoint, the former lines are moved to
    `NAME.previous-N.jsonl`.
    """

    def __init__(self, path: Path, state: TrainingState):
        self.path = path
        self.unwritten = b""  # what a full disk has refused so far

        def is_kept(record: dict[str, Any]) -> bool:  # the others are written again by a resumed run
            # the lines of training and of the test split have one of these keys, those of evaluations none
            is_evaluation = not record.keys() & {"loss", "test_samples", "made_by"}
            return record["step"] <= (state.evaluated_step if is_evaluation else state.step)

        if path.exists() and complete_checkpoints(path.parent / "checkpoints"):
            self.keep(is_kept)
        elif path.exists() and path.stat().st_size:
            former = (path.with_name(f"{path.stem}.previous-{number}.jsonl") for number in itertools.count(1))
            path.replace(next(name for name in former if not name.exists()))

    def write(self, *records: dict[str, Any]) -> None:
        """Appends lines, after what a full disk has refused so far. Values that are not finite become null."""
        for record in records:
            finite = {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in record.items()
            }
            self.unwritten += json.dumps(finite).encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:
            while self.unwritten:
                self.unwritten = self.unwritten[file.write(self.unwritten) :]

    def keep(self, is_kept: Callable[[dict[str, Any]], bool]) -> None:
        """Drops the other lines, and what a kill has cut short."""
        self.write()  # what is missing still
        lines = [json.dumps(record) + "\n" for record in read_lines(self.path) if is_kept(record)]
        write_atomically(self.path, lambda beside: beside.write_text("".join(lines)))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a file, without a line that a full disk or a kill has cut short."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def draw_curves(folder: Path) -> None:
    """Draws `curves.png` from `metrics.jsonl` where matplotlib, an optional extra, is installed. Rank 0 alone."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    import pandas
    from matplotlib.figure import Figure

    lines = pandas.DataFrame(read_lines(folder / METRICS_FILE), dtype=float)  # null becomes NaN, which leaves a gap
    if "lr" not in lines:
        return
    training = lines[lines["lr"].notna()]
    panels = {
        "loss": "loss (nats a token)",
        "lr": "learning rate",
        "grad_norm": "gradient norm before clipping",
        "tokens_per_second": "real tokens a second",
    }
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        mark = "." if len(training) < 30 else None
        drawn = dict(x="step", ax=axes, grid=True, xlabel="optimizer steps")
        training.plot(y=name, title=title, label="training", marker=mark, legend=name == "loss", **drawn)
        if name == "loss" and "eval_loss" in lines:
            evaluations = lines[lines["eval_loss"].notna()]
            evaluations.plot(y="eval_loss", label="validation", marker="o", **drawn)
        if name == "tokens_per_second":
            axes.set_ylim(bottom=0)
    write_atomically(folder / "curves.png", lambda path: figure.savefig(path, dpi=110, format="png"))


def run_description(parallel: Parallel, resolved: dict[str, Any], plan_check: dict[str, Any]) -> dict[str, Any]:
    """Returns what `train_config.json` holds. `resolved`: see `RunLog`. Rank 0 alone."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "datasets", "accelerate")}
    choice = None
    if parallel.choice is not None:  # with the candidates that the table shows: all would be a megabyte
        shown = dataclasses.replace(parallel.choice, candidates=best_of_each_kind(parallel.choice))
        choice = choice_as_json(shown, parallel.cluster)
    return dict(
        flags=dataclasses.asdict(parallel.config),
        versions=dict(versions, python=platform.python_version(), cuda=torch.version.cuda),
        cluster=dataclasses.asdict(parallel.cluster),
        model=dataclasses.asdict(parallel.shape),
        plan=plan_as_json(parallel.plan),
        choice=choice,
        resolved=resolved,
        plan_check=plan_check or None,
    )


# ---- Reporting: the plan against what happened ---------------------------------------------------------------


def compare_with_plan(parallel: Parallel, result: StepResult, seconds: float) -> dict[str, dict[str, Any]]:
    """Returns `predicted`, `measured` and the prediction's `band` for memory and step time. Rank 0 alone.

    Predicts again for the documents of this step, because the plan assumes full blocks. Reserved is what nvidia-smi
    shows as used, see `Memory`. On a CPU memory is not measured, and the step's time is not judged, because cores are
    shared.
    """
    batch = result.batch
    tokens = [micro_batch["input_ids"].numel() for micro_batch in batch.micro_batches]
    plan = dataclasses.replace(parallel.plan, gradient_accumulation_steps=len(tokens))
    # rank 0 is in the first stage
    memory = predict_step_memory(parallel.shape, plan, max(tokens), parallel.cluster.has_gpu, stage=0)
    attended = batch.squared_lengths / batch.tokens
    mean_tokens = sum(tokens) / len(tokens)
    predicted = predict_seconds(parallel.shape, parallel.cluster, plan, mean_tokens, attended)["total"]
    allocated_gib = in_use_gib = time_band = None
    if parallel.device.type == "cuda":
        allocated_gib = torch.cuda.max_memory_allocated() / GIB
        free_bytes, total_bytes = torch.cuda.mem_get_info()  # CUDA's context and NCCL's buffers included
        in_use_gib = (total_bytes - free_bytes) / GIB
        time_band = [predicted / STEP_FACTOR, predicted * STEP_FACTOR]
    active_band = [memory.active * (1 - ACTIVE_BAND), memory.active * (1 + ACTIVE_BAND)]
    reserved_band = [memory.reserved_low, memory.reserved_high]
    return dict(
        active_gib=dict(predicted=memory.active, measured=allocated_gib, band=active_band),
        reserved_gib=dict(predicted=memory.reserved, measured=in_use_gib, band=reserved_band),
        step_seconds=dict(predicted=predicted, measured=seconds, band=time_band),
    )


def lines_of_check(plan_check: dict[str, dict[str, Any]]) -> list[str]:
    """Returns predicted against measured in a line, and one more for each that lies outside its band."""
    parts, misses = [], []
    for name, value in plan_check.items():
        quantity, unit = name.split("_")
        unit = {"gib": "GiB", "seconds": "s"}[unit]
        if value["measured"] is None:
            parts.append(f"{quantity} {value['predicted']:.2f} {unit} / not measured on CPU")
            continue
        parts.append(f"{quantity} {value['predicted']:.2f} / {value['measured']:.2f} {unit}")
        if value["band"] and not value["band"][0] <= value["measured"] <= value["band"][1]:
            within = " to ".join(f"{limit:.2f}" for limit in value["band"])
            misses.append(f"WARNING   the plan missed: {quantity} {value['measured']:.2f} {unit} is outside {within}")
    return [f"check     predicted / measured, second step: {', '.join(parts)}", *misses] if parts else []


# ----------------------------------------------------------------------------------------------------------------
# 11. The plan
# ----------------------------------------------------------------------------------------------------------------
# What one optimizer step takes in memory and time is worked out from the model's sizes alone, for every way to execute
# it, and the fastest that fits is chosen. Sizes are in bytes and in elements; "tokens" are those of one micro-batch,
# padding included. Nothing in this section talks to other ranks, except where the devices are found.

USABLE_SHARE = 0.95  # of a device's memory, for the expected reserved memory; the rest is a margin for `reserved_high`
ACTIVE_BAND = 0.05  # the relative error that predicted active memory claims to keep
STEP_FACTOR = 1.35  # predicted and measured time differ by at most this, as for published runs (tests/check_plan.py)
# Times nearer than this are too close to call: the predicted ratio of two similar published runs' times has an error of
# 6.6%.
TIME_BAND = 0.07
# The same between plans that cut the model into more and into fewer parts, as stages or by tensor parallelism. The
# median ratio of predicted to measured time, over the layouts of Hagemann et al. 2023 (arXiv 2311.05610), differs by
# 12% between those with such cuts and those without.
CUT_TIME_BAND = 0.15
PLAN_FLAGS = (  # restrict the plan; what would help is tried by setting them back to their defaults
    "micro_batch_size", "activation_checkpointing", "gradient_sync", "reshard_after_forward", "cpu_offload",
    "precision", "compile", "hsdp_shard_size", "parallelism", "pipeline_parallel_size",
    "tensor_parallel_size",
)  # fmt: skip
LLAMA_2 = {  # Touvron et al. 2023, table 1 and the released config.json files: for --plan without gated files
    "7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "13b": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
    "70b": dict(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    ),
}


@dataclass(frozen=True)
class Plan:
    """How a step is executed. The first four fields say how the ranks share the work, outermost first.

    The layers are cut into pipeline stages, of each stage there are `dp_replicate_size` copies, each copy is sharded
    over `dp_shard_size` ranks, and each shard's matrices are split over `tensor_parallel_size` ranks.
    """

    pipeline_parallel_size: int = 1
    dp_replicate_size: int = 1
    dp_shard_size: int = 1
    tensor_parallel_size: int = 1
    micro_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    activation_checkpointing: str = "none"
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    gradient_sync: str = "step"
    precision: str = "bf16"
    packing: bool = False
    compiled: bool = False

    @property
    def data_parallel_size(self) -> int:
        return self.dp_replicate_size * self.dp_shard_size

    @property
    def model_parallel_size(self) -> int:
        """Into how many parts the model itself is cut."""
        return self.pipeline_parallel_size * self.tensor_parallel_size

    @property
    def strategy(self) -> str:
        """The data-parallel strategy: `none`, `ddp`, `fsdp` or `hsdp`.

        Beside stages or tensor parallelism, replicas that are not sharded run as HSDP with a shard size of 1, in place
        of DDP.
        """
        if self.dp_shard_size > 1:
            return "hsdp" if self.dp_replicate_size > 1 else "fsdp"
        replicas = "ddp" if self.model_parallel_size == 1 else "hsdp"
        return replicas if self.dp_replicate_size > 1 else "none"

    @property
    def uses_fsdp(self) -> bool:
        return self.strategy in ("fsdp", "hsdp")

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of weights, moments and gradients, except those that FSDP adds up in fp32."""
        return torch.bfloat16 if self.precision == "bf16-states" else torch.float32

    @property
    def state_bytes(self) -> int:
        """Bytes per element in that dtype."""
        return self.state_dtype.itemsize

    @property
    def compute_bytes(self) -> int:
        """Bytes per element in the compute precision."""
        return 4 if self.precision == "fp32" else 2

    @property
    def autocasts(self) -> bool:
        """Whether torch.autocast casts the weights. FSDP casts those it gathers itself."""
        return self.precision == "bf16" and not self.uses_fsdp

    @property
    def stream_bytes(self) -> int:
        """Bytes per element of the residual stream, which stays in fp32 under autocast."""
        return 4 if self.autocasts else self.compute_bytes

    @property
    def recompute_every(self) -> int:
        """One layer in this many is recomputed in the backward pass; 0 for none."""
        level = self.activation_checkpointing
        return {"none": 0, "full": 1}[level] if level in ("none", "full") else int(level.removeprefix("every-"))

    def recomputed_layers(self, layers: int) -> range:
        """Returns which of a rank's layers are recomputed."""
        every = self.recompute_every
        return range(0, layers, every) if every else range(0)

    @property
    def holds_gradients_back(self) -> bool:
        """Whether FSDP keeps unsharded gradients until the last micro-batch."""
        return self.uses_fsdp and self.gradient_accumulation_steps > 1 and self.gradient_sync == "step"

    def shard_bytes(self, shape: ModelShape) -> float:
        """Returns the bytes of a rank's share of the weights, of the gradients, or of one moment.

        `shape` is the rank's part of the model.
        """
        return self.state_bytes * shape.parameters / self.dp_shard_size

    def describe(self) -> str:
        """Returns the plan in a few words, as the table shows it."""
        level, layout = self.activation_checkpointing, self.strategy
        # in micro-batches: a stage waits for the first one to come, or for the last to come back
        waits = self.pipeline_parallel_size - 1
        if self.strategy == "hsdp":
            layout = f"hsdp {self.dp_replicate_size}x{self.dp_shard_size}"
        if self.model_parallel_size > 1:
            cuts = {"pp": self.pipeline_parallel_size, "tp": self.tensor_parallel_size}
            inside = {"none": [], "fsdp": [f"fsdp{self.dp_shard_size}"]}.get(self.strategy, [layout])
            layout = " x ".join([*(f"{name}{size}" for name, size in cuts.items() if size > 1), *inside])
        parts = [
            f"{layout}, micro-batch {self.micro_batch_size} x {self.gradient_accumulation_steps}",
            {"none": "", "full": "recompute all"}.get(level, f"recompute {level}"),
            "" if self.reshard_after_forward or self.dp_shard_size == 1 else "keep gathered",
            "reduce once" if self.holds_gradients_back else "",
            "offload" if self.cpu_offload else "",
            f"bubble {waits / (self.gradient_accumulation_steps + waits):.0%}" if waits else "",
        ]
        return ", ".join(filter(None, parts))


@dataclass(frozen=True)
class Memory:
    """Predicted GPU memory of one rank in GiB.

    `active` is what tensors take at the peak, made up of `terms`; `peak_moment` says when that is. `reserved` is the
    value expected in nvidia-smi, which should lie between `reserved_low` and `reserved_high`.
    """

    active: float
    reserved: float
    reserved_low: float
    reserved_high: float
    terms: dict[str, float]
    peak_moment: str


@dataclass(frozen=True)
class Candidate:
    """A plan, what one optimizer step of it is predicted to take, whether it fits, and why it is chosen or not."""

    plan: Plan
    memory_gib: Memory
    step_seconds: dict[str, float]
    tokens_per_second_per_gpu: float
    mfu: float
    fits: bool
    reason: str = ""
    missing_gib: float = 0.0  # of the device's memory or of its node's, where it does not fit

    @property
    def total_seconds(self) -> float:
        return self.step_seconds["total"]


@dataclass(frozen=True)
class Choice:
    """The outcome of planning: what is chosen (None where nothing fits), every candidate, and what would help.

    The first candidate is the chosen one or, where nothing fits, the nearest miss.
    """

    chosen: Candidate | None
    candidates: list[Candidate]
    lever: str


def print_plan(config: Config) -> None:
    """Prints the plan for --plan's cluster. It needs no process group, no GPU and no weights.

    Raises UserError where nothing fits, after printing what was weighed.
    """
    cluster = this_machine() if config.plan == "here" else parse_cluster(config.plan)
    llama_2 = re.fullmatch(r"meta-llama/Llama-2-(\w+?)(-chat)?-hf", config.model_name_or_path)
    if llama_2 and llama_2[1] in LLAMA_2:
        shape = model_shape(transformers.LlamaConfig(**LLAMA_2[llama_2[1]], max_position_embeddings=4096))
    else:
        shape = read_model_shape(config)[1]
    choice = choose_plan(shape, cluster, config)
    if launched_rank() == 0:
        if config.plan_format == "json":
            words = json.dumps(choice_as_json(choice, cluster))
        else:
            words = describe_choice(choice, shape, cluster, config)
        try:
            print(words, flush=True)
        except BrokenPipeError:  # `--plan ... | head` has seen enough; Python would complain of it again when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    refuse_what_does_not_fit(choice, cluster)


def refuse_what_does_not_fit(choice: Choice, cluster: Cluster) -> None:
    """Raises UserError with the nearest miss and what would help, where no plan fits."""
    if choice.chosen is None:
        nearest = choice.candidates[0]
        raise UserError(
            f"the model does not fit on {cluster.world_size} x {cluster.device_name}: the nearest miss, "
            f"{nearest.plan.describe()}, {nearest.reason}; {choice.lever}"
        )


def choose_plan(shape: ModelShape, cluster: Cluster, config: Config) -> Choice:
    """Chooses the fastest candidate that fits with headroom, or the preferred one of those too close to call with it.

    Raises UserError for flags that cannot work on the cluster, or with the model.
    """
    check_block(shape, config)
    weighed = weigh(shape, cluster, config)
    fitting = [each for each in weighed if each.fits]
    if not fitting:
        return Choice(None, weighed, lever_to_fit(shape, cluster, config))
    fastest, chosen = fitting[0], preferred(fitting, cluster)
    reason = "the fastest that fits" if len(weighed) > 1 else "asked for"
    if chosen is not fastest:
        mine, others = preferences(chosen, cluster), preferences(fastest, cluster)
        why = next(words for words in mine if mine[words] != others[words])
        reason = f"too close to call with {fastest.plan.describe()}; chosen because {why}"
    candidates, close = [dataclasses.replace(chosen, reason=reason)], too_close_to_call(fitting)
    for each in fitting:
        if each is not chosen:
            slower = f"{each.total_seconds / fastest.total_seconds - 1:.0%} slower than the fastest"
            # a plan that is faster than the chosen one, but not among the close ones, cuts the model into more parts
            is_close = each in close or each.total_seconds < chosen.total_seconds
            words = "too close to call, and not preferred" if is_close else slower
            candidates.append(dataclasses.replace(each, reason=words))
    return Choice(candidates[0], candidates + weighed[len(fitting) :], lever_to_speed(shape, cluster, config, chosen))


def check_block(shape: ModelShape, config: Config) -> None:
    if config.block_size > shape.positions:
        raise UserError(
            f"--block-size {config.block_size} is longer than the {shape.positions} positions of "
            f"{config.model_name_or_path}; use at most {shape.positions}"
        )
    longest = config.block_size + config.max_summary_tokens
    summarises = config.rouge_samples > 0 or config.test_samples != 0  # None: all of the test split
    if summarises and longest > shape.positions:
        raise UserError(
            f"--block-size {config.block_size} + --max-summary-tokens {config.max_summary_tokens} is more than the "
            f"{shape.positions} positions of {config.model_name_or_path}, so some summaries could not be written; "
            "lower one of them"
        )


def too_close_to_call(fitting: list[Candidate]) -> list[Candidate]:
    """Returns the plans to choose among, of those that fit, which are given fastest first.

    Of all plans within CUT_TIME_BAND of the fastest, those that cut the model into the fewest parts count, and of these
    those within TIME_BAND of the fastest among them.
    """
    near = [each for each in fitting if each.total_seconds <= fitting[0].total_seconds * (1 + CUT_TIME_BAND)]
    fewest = min(near, key=lambda each: each.plan.model_parallel_size)
    parts, most_seconds = fewest.plan.model_parallel_size, fewest.total_seconds * (1 + TIME_BAND)
    return [each for each in near if each.plan.model_parallel_size == parts and each.total_seconds <= most_seconds]


def preferred(fitting: list[Candidate], cluster: Cluster) -> Candidate:
    """Returns the plan to choose among those that fit, which are given fastest first."""
    return min(too_close_to_call(fitting), key=lambda each: tuple(preferences(each, cluster).values()))


def preferences(candidate: Candidate, cluster: Cluster) -> dict[str, Any]:
    """Returns what decides between candidates that are too close to call, first things first; the lower value wins.

    Less recomputation comes early. It often fits with smaller micro-batches only, and the extra time that is predicted
    for those is uncertain, while published runs gain 10 to 20% from recomputing less.
    """
    plan = candidate.plan
    return {
        # equal for all that `too_close_to_call` returns; it words the reason, where the fastest of all has more parts
        "it cuts the model into fewer parts": plan.model_parallel_size,
        "its reserved memory surely fits": candidate.memory_gib.reserved_high
        > cluster.memory_gib,  # True, the worse, where it may not
        "it recomputes less": 1 / plan.recompute_every if plan.recompute_every else 0.0,
        "it is the simpler": (
            ("none", "ddp", "fsdp", "hsdp").index(plan.strategy),
            plan.cpu_offload,
            not plan.reshard_after_forward,
            plan.holds_gradients_back,
            plan.gradient_accumulation_steps,
        ),
        "it takes less memory": candidate.memory_gib.active,
    }


def weigh(shape: ModelShape, cluster: Cluster, config: Config) -> list[Candidate]:
    """Returns every plan that the flags and the cluster leave open, with its predictions.

    Those that fit come first, the fastest of them at the head. The others follow, beginning with the nearest miss.
    """
    candidates = [predict(shape, cluster, plan, config) for plan in candidate_plans(shape, cluster, config)]
    return sorted(candidates, key=lambda each: (not each.fits, each.missing_gib, each.total_seconds))


def predict(shape: ModelShape, cluster: Cluster, plan: Plan, config: Config) -> Candidate:
    """Returns what a plan takes when every document fills its block: the worst case, which must fit."""
    block, micro_batches = config.block_size, plan.gradient_accumulation_steps
    rank_documents = math.ceil(config.batch_size / plan.data_parallel_size)  # of the busiest data rank
    # The documents are dealt evenly to the micro-batches; a packed row may be full.
    most_documents = plan.micro_batch_size if plan.packing else math.ceil(rank_documents / micro_batches)
    memory = predict_memory(shape, plan, most_documents * block, cluster.has_gpu)
    seconds = predict_seconds(shape, cluster, plan, rank_documents / micro_batches * block, block)
    step_tokens = config.batch_size * block
    rate = step_tokens / seconds["total"] / cluster.world_size
    flops = training_flops(shape, step_tokens, config.batch_size * block**2) / cluster.world_size
    mfu = flops / seconds["total"] / cluster.flops_per_second(plan.precision)
    limit, reason = USABLE_SHARE * cluster.memory_gib, ""
    missing_gib = max(0.0, memory.reserved - limit)
    if missing_gib:
        reason = f"needs {memory.reserved:.1f} GiB, {limit:.1f} of {cluster.memory_gib:.1f} are usable"
    elif plan.cpu_offload and (free := cluster.host_memory_gib) is not None:
        # rank 0's node will also hold the final model, gathered
        host = offloaded_gib(shape, cluster, plan) + saved_dtype(plan, config).itemsize * shape.parameters / GIB
        missing_gib = max(0.0, host - free)
        reason = f"needs {host:.1f} GiB of a node's own memory, and {free:.1f} are free" if missing_gib else ""
    return Candidate(plan, memory, seconds, rate, mfu, not reason, reason, missing_gib)


# ---- The plan: the candidates --------------------------------------------------------------------------------


def candidate_plans(shape: ModelShape, cluster: Cluster, config: Config) -> list[Plan]:
    """Returns every plan the flags and the cluster leave open. Raises UserError where they leave none."""
    precision = config.precision if config.precision != "auto" else "bf16" if cluster.has_gpu else "fp32"
    fixed = dict(
        precision=precision,
        packing=packs(shape, cluster, config),
        compiled=config.compile == "yes" or (config.compile == "auto" and cluster.has_gpu),
    )

    def values(flag_value: Any, *all_of_them: Any) -> Sequence:
        return all_of_them if flag_value == "auto" else [{"yes": True, "no": False}.get(flag_value, flag_value)]

    plans = []
    for stages, replicas, shards, tensor in parallel_layouts(shape, cluster, config):
        rank_documents = math.ceil(config.batch_size / (replicas * shards))
        given_size = config.micro_batch_size
        sizes = [min(given_size, rank_documents)] if given_size else micro_batch_sizes(rank_documents, stages)
        # Unasked, offload is tried neither beside stages, where it would copy a stage's weights anew for each of many
        # micro-batches, nor beside tensor parallelism, where it does not work.
        may_offload = shards > 1 and stages * tensor == 1 and cluster.has_gpu
        open_axes = dict(
            micro_batch_size=sizes,
            activation_checkpointing=values(config.activation_checkpointing, *RECOMPUTATION_LEVELS),
            gradient_sync=values(config.gradient_sync, "micro-batch", "step"),
            cpu_offload=values(config.cpu_offload, False, *([True] if may_offload else [])),
            reshard_after_forward=values(config.reshard_after_forward, True, False) if shards > 1 else [True],
        )
        for chosen in itertools.product(*open_axes.values()):
            axes = dict(zip(open_axes, chosen, strict=True))
            micro_batches = math.ceil(rank_documents / axes["micro_batch_size"])
            plan = Plan(stages, replicas, shards, tensor, gradient_accumulation_steps=micro_batches, **axes, **fixed)
            if config.gradient_sync != "auto" or plan.gradient_sync in useful_gradient_syncs(plan):
                plans.append(plan)
    return plans


def useful_gradient_syncs(plan: Plan) -> tuple[str, ...]:
    if plan.gradient_accumulation_steps == 1:
        return ("step",)
    # holding back would save only the reductions inside a group: the one across replicas is made once a step anyway
    if plan.strategy == "hsdp":
        return ("micro-batch",)
    return ("micro-batch", "step") if plan.dp_shard_size > 1 else ("step",)


def parallel_layouts(shape: ModelShape, cluster: Cluster, config: Config) -> list[tuple[int, int, int, int]]:
    """Returns the degrees of every layout that is open, in the order of `Plan`. Raises UserError where there is none.

    Where --pipeline-parallel-size is not given, the divisors of the number of nodes are tried, because stages pay where
    the network between nodes is slow. Where --tensor-parallel-size is not given, 1, 2, 4 and 8 are tried.
    """
    check_given_cuts(shape, cluster, config)
    stage_counts, tensor_sizes = [config.pipeline_parallel_size or 1], [config.tensor_parallel_size or 1]
    may_cut = config.parallelism not in ("none", "ddp")  # with these it is cut on request only
    if may_cut and config.pipeline_parallel_size is None and not shape.uncuttable:
        most = min(cluster.nodes, shape.layers)
        stage_counts += [stages for stages in range(2, most + 1) if cluster.nodes % stages == 0]
    may_split = config.tensor_parallel_size is None and config.cpu_offload != "yes"
    if may_cut and may_split:
        tensor_sizes += [size for size in (2, 4, 8) if not why_not_split(shape, cluster, size)]
    layouts, problems = [], []
    for stages, tensor in itertools.product(stage_counts, tensor_sizes):
        try:
            data_layouts = data_parallel_layouts(cluster, config, stages, tensor)
            layouts += [(stages, replicas, shards, tensor) for replicas, shards in data_layouts]
        except UserError as error:
            problems.append(error)
    if not layouts:
        raise problems[0]
    return layouts


def check_given_cuts(shape: ModelShape, cluster: Cluster, config: Config) -> None:
    """Raises UserError where model or cluster rule out the stages or the tensor-parallel ranks asked for."""
    stages, tensor = config.pipeline_parallel_size or 1, config.tensor_parallel_size or 1
    of_stages, of_tensor = f"--pipeline-parallel-size {stages}", f"--tensor-parallel-size {tensor}"
    if stages > 1 and shape.uncuttable:
        raise UserError(f"{of_stages} cannot be had here: {shape.uncuttable}; leave it out")
    if stages > shape.layers:
        raise UserError(f"{of_stages} needs a layer for each stage, and the model has {shape.layers}; use at most that")
    if tensor > 1 and (reason := why_not_split(shape, cluster, tensor)):
        raise UserError(f"{of_tensor} cannot be had here: {reason}")
    if tensor > 1 and config.cpu_offload == "yes":
        raise UserError(f"--cpu-offload yes does not go with {of_tensor}; leave one of them out")


def why_not_split(shape: ModelShape, cluster: Cluster, size: int) -> str:
    """Returns why the layers cannot be split over `size` ranks of a node, and what can be done; "" if they can."""
    if shape.unsplittable:
        return f"{shape.unsplittable}; leave it out"
    if PAD_MULTIPLE % size:
        return f"it does not divide {PAD_MULTIPLE}, of which the tokens to share out are a multiple; use a divisor"
    if (ranks := cluster.ranks_per_node) % size:
        return f"it does not divide the {ranks} rank(s) of a node; use a divisor, or another --nproc_per_node"
    sizes = dict(heads=shape.heads, intermediate_size=shape.intermediate, vocab_size=shape.vocabulary)
    sizes["key and value heads"] = shape.kv_size // shape.head_dim
    uneven = next((f"{value} {name}" for name, value in sizes.items() if value % size), "")
    return uneven and f"it does not divide the model's {uneven}; use a divisor"


def layers_of_stages(shape: ModelShape, stages: int) -> list[int]:
    """Returns the layers of each stage, so that the slowest takes as little time as it can; the head counts as work.

    Where that leaves a choice, later stages take more layers, because they hold fewer micro-batches.
    """
    if stages == 1:
        return [shape.layers]
    head = shape.vocabulary * shape.hidden / shape.active_layer_parameters  # in layers

    def slowest(of_last: int) -> float:
        return max(math.ceil((shape.layers - of_last) / (stages - 1)), of_last + head)

    last = min(range(shape.layers - stages + 1, 0, -1), key=slowest)
    each, rest = divmod(shape.layers - last, stages - 1)
    return [each] * (stages - 1 - rest) + [each + 1] * rest + [last]


def data_parallel_layouts(cluster: Cluster, config: Config, stages: int, tensor: int) -> list[tuple[int, int]]:
    """Returns (dp_replicate_size, dp_shard_size) of every strategy the flags leave open, for each part of the model.

    Raises UserError where they leave none, or where there are not equally many ranks for each part.
    """
    strategies, parts = [config.parallelism], stages * tensor
    # ranks for each part: in all, and in a node at most
    ranks, ranks_of_node = cluster.world_size // parts, cluster.ranks_per_node // tensor
    cuts = {"--pipeline-parallel-size": stages, "--tensor-parallel-size": tensor}
    shown = " and ".join(f"{name} {size}" for name, size in cuts.items() if size > 1)
    if cluster.world_size % parts:
        raise UserError(
            f"{shown} needs equally many processes for each of {parts} parts of the model, and {cluster.world_size} "
            "were started; use a divisor, or another --nproc_per_node"
        )
    if parts > 1 and config.parallelism == "ddp":
        raise UserError(
            f"--parallelism ddp does not go with {shown}; use hsdp with --hsdp-shard-size 1, which keeps whole replicas"
        )
    if config.parallelism == "auto":
        one_a_node = ranks > ranks_of_node > 1 and ranks % ranks_of_node == 0  # a group of shards in each node
        is_open = dict(none=ranks == 1, ddp=ranks > 1 and parts == 1, fsdp=ranks > 1, hsdp=one_a_node)
        strategies = [strategy for strategy in is_open if is_open[strategy]]
    if config.cpu_offload == "yes":
        if not cluster.has_gpu:
            raise UserError("--cpu-offload yes moves memory off a GPU, and this machine has none; leave it out")
        strategies = [strategy for strategy in strategies if strategy in ("fsdp", "hsdp")]
        if not strategies:
            use = "use torchrun --nproc_per_node=2" if cluster.world_size == 1 else "use --parallelism fsdp"
            remedy = f"leave out {shown}" if parts > 1 else use
            raise UserError(f"--cpu-offload yes needs FSDP or HSDP, over at least 2 processes; {remedy}")
    shards = config.hsdp_shard_size or (ranks_of_node if ranks > ranks_of_node else ranks // 2)
    return [replicas_and_shards(strategy, ranks, shards, parts > 1) for strategy in strategies]


def replicas_and_shards(strategy: str, ranks: int, shards: int, is_cut: bool) -> tuple[int, int]:
    """Returns (dp_replicate_size, dp_shard_size) of the ranks that hold the same part of a model, or a whole one.

    `shards` is the size of HSDP's groups. Raises UserError where the ranks do not allow the strategy.
    """
    of_part = " for each part of the model" if is_cut else ""
    if strategy == "none" and ranks > 1:
        raise UserError(
            f"--parallelism none runs one process{of_part}, but there are {ranks}; use "
            f"{'' if is_cut else 'ddp, '}fsdp or auto"
        )
    # HSDP in groups of one is plain DDP, so a whole model needs two. A model that is cut cannot use DDP: there HSDP in
    # groups of one takes its place.
    smallest = 1 if is_cut else 2
    needed = {"none": 1, "ddp": 2, "fsdp": 2, "hsdp": 2 * smallest}[strategy]
    if ranks < needed:
        raise UserError(
            f"--parallelism {strategy} needs at least {needed} processes{of_part}, but there "
            f"{'is 1' if ranks == 1 else f'are {ranks}'}; use "
            f"{'none, or twice as many processes' if is_cut else f'torchrun --nproc_per_node={needed}'}"
        )
    if strategy != "hsdp":
        return (1, ranks) if strategy == "fsdp" else (ranks, 1)
    if shards < smallest or ranks % shards or ranks == shards:
        raise UserError(
            f"--parallelism hsdp needs at least two equal groups of at least {smallest} ranks{of_part}; {ranks} "
            f"processes in groups of {shards} are not; use fsdp, or --hsdp-shard-size with a proper divisor of {ranks}"
        )
    return ranks // shards, shards


def packs(shape: ModelShape, cluster: Cluster, config: Config) -> bool:
    """Returns whether rows are packed. Raises UserError for a --packing yes that cannot be had.

    torch's variable-length kernel needs head_dim <= 256 and divisible by 8 (flash_api.cpp); only SDPA pads other sizes.
    """
    if config.packing == "yes" and shape.unpackable:
        raise UserError(f"--packing yes cannot be had with this model: {shape.unpackable}; use no")
    head_fits = shape.head_dim % 8 == 0 and shape.head_dim <= 256
    flash = cluster.has_gpu and cluster.has_flash_attention and config.precision != "fp32" and head_fits
    if config.packing == "yes" and cluster.has_gpu and not flash:
        raise UserError(
            "--packing yes needs flash attention: an Ampere GPU or newer, a head_dim of at most 256 that 8 divides, "
            "and not --precision fp32; use no"
        )
    return config.packing == "yes" or (config.packing == "auto" and flash and not shape.unpackable)


def micro_batch_sizes(documents: int, stages: int) -> list[int]:
    """Returns the micro-batch sizes to try, largest first: all documents, powers of two, and one and a half times them.

    Each is lowered to an even split. Five documents, at most four at a time, are split into three and two: the size is
    three. With stages, only sizes that give at least twice as many micro-batches as stages are tried, or else the
    smallest of all.
    """
    powers = [2**power for power in range(documents.bit_length())]
    sizes = {documents, *powers, *(min(documents, 3 * power // 2) for power in powers[1:])}
    even = sorted({math.ceil(documents / math.ceil(documents / size)) for size in sizes}, reverse=True)
    return [size for size in even if stages == 1 or math.ceil(documents / size) >= 2 * stages] or even[-1:]


# ---- The plan: the model's sizes -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder that memory and time depend on. `parameters` is exact, counted on the meta device."""

    parameters: int
    layers: int
    layer_parameters: int  # of one layer; where they differ, the mean
    hidden: int
    intermediate: int
    heads: int
    query_size: int  # heads times head_dim
    kv_size: int  # kv heads times head_dim
    vocabulary: int
    positions: int
    head_dim: int = 128
    unpackable: str = ""  # why packed rows cannot be had, where they cannot
    uncuttable: str = ""  # why pipeline stages cannot be had, where they cannot
    unsplittable: str = ""  # why tensor parallelism cannot be had, where it cannot
    has_head: bool = True  # a pipeline stage before the last has none
    idle_layer_parameters: int = 0  # those of the experts that a token is not sent to
    computes_all_logits: bool = False  # in the loss; else a chunk of positions at a time

    @property
    def head_and_norm_parameters(self) -> int:
        """Output projection and final norm, which transformers keeps gathered between forward and backward."""
        return (self.vocabulary * self.hidden + self.hidden) * self.has_head

    @property
    def active_layer_parameters(self) -> int:
        return self.layer_parameters - self.idle_layer_parameters

    @property
    def embedding_parameters(self) -> int:
        return max(0, self.parameters - self.layers * self.layer_parameters - self.head_and_norm_parameters)

    @property
    def matmul_parameters(self) -> int:
        """Parameters a token is multiplied with: all but the input embedding, which is a look-up."""
        return self.layers * self.active_layer_parameters + self.vocabulary * self.hidden * self.has_head


@functools.cache
def shapes_of_stages(shape: ModelShape, stages: int, tensor: int = 1) -> tuple[ModelShape, ...]:
    """Returns the part of the model on each pipeline stage: the embedding is on the first, the head on the last.

    Beside tensor parallelism it is one rank's part of that. The hidden size is not divided.
    """
    if stages * tensor == 1:
        return (shape,)
    split_sizes = ("intermediate", "heads", "query_size", "kv_size", "vocabulary")
    norms = 2 * shape.hidden  # of a layer, which every rank holds
    layer_parameters = (shape.layer_parameters - norms) // tensor + norms
    sizes = {name: getattr(shape, name) // tensor for name in split_sizes}
    split = dataclasses.replace(shape, layer_parameters=layer_parameters, **sizes)
    parts = []
    for stage, layers in enumerate(layers_of_stages(shape, stages)):
        embedding = shape.embedding_parameters // tensor if stage == 0 else 0
        head = split.head_and_norm_parameters if stage == stages - 1 else 0
        parameters = embedding + layers * split.layer_parameters + head
        parts.append(dataclasses.replace(split, layers=layers, parameters=parameters, has_head=head > 0))
    return tuple(parts)


def model_shape(model_config: PretrainedConfig) -> ModelShape:
    """Returns the shape of the model that `model_config` describes; builds it on the meta device to count exactly."""
    model, attention = model_without_weights(model_config)
    text_config = model_config.get_text_config()
    sizes = text_config.to_dict()  # under the model's own names; then under those of most models, too
    own_names = {name: own for name, own in (text_config.attribute_map or {}).items() if own in sizes}
    # except a head_dim that stands for qk_rope_head_dim: that is only the rotated part of a head
    sizes |= {name: sizes[own] for name, own in own_names.items() if own != "qk_rope_head_dim"}
    heads, layers = text_config.num_attention_heads, text_config.num_hidden_layers
    in_layers = [pair for layer in decoder_layers(model) for pair in layer.named_parameters()]
    in_experts = sum(parameter.numel() for name, parameter in in_layers if ".experts." in f".{name}")
    experts = sizes.get("num_local_experts") or sizes.get("num_experts") or 1
    active_experts = (sizes.get("num_experts_per_tok") or experts) if experts > 1 else 1
    intermediate = sizes.get("intermediate_size") or 4 * text_config.hidden_size
    intermediate = max(intermediate) if isinstance(intermediate, list) else intermediate  # by layer, in some models
    if experts > 1:  # an estimate, without shared experts and the copies of a token that its experts get
        intermediate = active_experts * (sizes.get("moe_intermediate_size") or intermediate)
    head_dim = sizes.get("head_dim") or text_config.hidden_size // heads
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=layers,
        layer_parameters=sum(parameter.numel() for _, parameter in in_layers) // layers,
        idle_layer_parameters=round((1 - active_experts / experts) * in_experts / layers),
        hidden=text_config.hidden_size,
        intermediate=intermediate,
        heads=heads,
        query_size=heads * head_dim,
        kv_size=(sizes.get("num_key_value_heads") or heads) * head_dim,
        vocabulary=text_config.vocab_size,
        positions=sizes.get("max_position_embeddings") or sys.maxsize,
        head_dim=head_dim,
        computes_all_logits=not is_plain_projection(model),
        unpackable=why_unpackable(model_config, attention),
        unsplittable=why_unsplittable(model, attention),
        uncuttable=why_uncuttable(model),  # last, because it takes the model apart
    )


def why_unpackable(model_config: PretrainedConfig, attention: str | None) -> str:
    """Returns why packed documents would see each other, or be trained otherwise than padded ones; "" if neither."""
    text_config = model_config.get_text_config()
    if attends_partially(model_config):
        return "some of its layers do not attend to the whole document"
    keys = (getattr(text_config, f"qk_{part}_head_dim", None) or 0 for part in ("nope", "rope"))
    if (values := getattr(text_config, "v_head_dim", None)) and values != sum(keys):
        return "its values are not as wide as its keys, which the kernel for packed rows cannot do"
    dropouts = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")
    if any(getattr(text_config, name, None) for name in dropouts):
        return "it drops out attention, which the kernel for packed rows cannot do"
    return "" if attention else "it takes no attention but its own"


def why_unsplittable(model: PreTrainedModel, attention: str | None) -> str:
    """Returns why the layers of a model on the meta device cannot be split for tensor parallelism; "" if they can."""
    if attention != "causal_attention":
        return "its attention is not plain causal attention"
    if model.config.get_text_config().tie_word_embeddings:
        return "the model's embedding and head are one matrix"
    modules, norm = dict(model.named_modules()), getattr(model.base_model, "norm", None)
    names = {re.sub(r"\.\d+\.", ".*.", name) for name in modules}
    if missing := next((name for name in SPLIT_MODULES if name not in names), None):
        return f"it has no {missing}"
    for name, _ in model.named_parameters():
        module, _, parameter = name.rpartition(".")
        kind = SPLIT_MODULES.get(re.sub(r"\.\d+\.", ".*.", module))
        module_type = {"embedding": nn.Embedding, "norm": type(norm)}.get(kind, nn.Linear)
        if not kind or type(modules[module]) is not module_type or (parameter == "bias" and kind != "column"):
            return f"its {name} is in no module that can be split"
    if not is_plain_projection(model) or not hasattr(norm, "variance_epsilon"):
        return "its head or its last norm is not that of Llama"
    norm = copy.deepcopy(norm).to_empty(device="cpu").float()
    hidden = torch.linspace(-1, 1, norm.weight.numel())
    norm.weight.data.copy_(hidden)
    expected = F.rms_norm(hidden, hidden.shape, norm.weight, norm.variance_epsilon)
    return "" if torch.allclose(norm(hidden), expected, rtol=1e-4) else "its norms are not those of Llama"


def why_uncuttable(model: PreTrainedModel) -> str:
    """Returns why the layers of a model on the meta device cannot be cut into pipeline stages; "" if they can.

    transformers shares out embedding, layers, last norm and head by Llama's names. Without these no parameter may be
    left, and hidden states must pass through untouched: what a model does to them besides, each stage would do again.
    """
    from transformers.distributed.pipeline_parallel import PipelineIdentityLayer

    text_config = model.config.get_text_config()
    if text_config.tie_word_embeddings:
        return "the model's embedding and head are one matrix, which would lie on two stages"
    if getattr(text_config, "output_router_logits", False):
        return "its routers' loss is one of all layers together"
    if len(set(getattr(text_config, "layer_types", None) or [])) > 1:
        return "its layers are of several kinds"
    base = model.base_model
    with contextlib.suppress(Exception):  # whatever a model without such parts may raise
        base.embed_tokens, base.norm, model.lm_head = (PipelineIdentityLayer() for _ in range(3))
        base.layers = nn.ModuleList(PipelineIdentityLayer() for _ in base.layers)
        hidden = torch.empty(1, PAD_MULTIPLE, text_config.hidden_size, device="meta")
        # a mask is given, because making one from meta tensors fails
        mask = torch.empty(1, 1, PAD_MULTIPLE, PAD_MULTIPLE, device="meta")
        passed = base(inputs_embeds=hidden, attention_mask=mask, use_cache=False).last_hidden_state
        if passed is hidden and not list(model.parameters()):
            return ""
    return "it computes more than Llama's embedding, layers, last norm and head"


def attends_partially(model_config: PretrainedConfig) -> bool:
    text_config = model_config.get_text_config()
    kinds = set(getattr(text_config, "layer_types", None) or ["full_attention"])
    return kinds != {"full_attention"} or bool(getattr(text_config, "sliding_window", None))


# ---- The plan: memory ----------------------------------------------------------------------------------------

# What reserved memory takes beyond the tensors in the allocator's pools, as (low, expected, high). CONTEXT_GIB: CUDA
# context, cuBLAS and NCCL buffers, a guess from reports of 0.5 to 1.6 GiB. The gaps between tensors, measured with the
# expandable segments that the hook turns on, are GAPS_SHARE of the pools plus GAPS_PER_LAYER_PARAMETER bytes per
# parameter of one layer, whose weights and gradients come and go. These two are fitted so that all rows of
# tests/README.md, whose context was taken as 0.5 GiB, lie between low and high.
CONTEXT_GIB = (0.5, 1.0, 1.6)
GAPS_SHARE = (0.0, 0.01, 0.04)
GAPS_PER_LAYER_PARAMETER = (0, 2, 4)


def predict_memory(shape: ModelShape, plan: Plan, tokens: int, has_gpu: bool = True) -> Memory:
    """Returns the peak memory of a rank of the pipeline stage that takes most, for micro-batches of `tokens` tokens.

    That is the peak of a step, or under CPU offload that of loading the model, where it is higher.
    """
    parts = shapes_of_stages(shape, plan.pipeline_parallel_size, plan.tensor_parallel_size)
    # Of stages that hold the same, the first has the most micro-batches under way. Reversed, so that its index is kept.
    first_alike = {part.parameters: index for index, part in reversed(list(enumerate(parts)))}
    peaks = [predict_step_memory(shape, plan, tokens, has_gpu, stage) for stage in first_alike.values()]
    if plan.cpu_offload:  # a rank's whole share is loaded to the device, then moved to the CPU
        for part in parts:
            loaded = plan.shard_bytes(part)
            peaks.append(memory_at_peak("loading", dict(weights=loaded), loaded, part.layer_parameters, has_gpu))
    return max(peaks, key=lambda memory: memory.reserved)


def predict_step_memory(shape: ModelShape, plan: Plan, tokens: int, has_gpu: bool, stage: int) -> Memory:
    """Returns the peak memory of a step on a rank of one pipeline stage; `shape` is that of the whole model."""
    part = shapes_of_stages(shape, plan.pipeline_parallel_size, plan.tensor_parallel_size)[stage]
    step = StepMemory(part, plan, tokens, stage)
    phases = memory_phases(step)
    moment = max(phases, key=lambda name: sum(phases[name].values()))
    in_pools = bytes_of_pools(step, phases) if has_gpu and plan.uses_fsdp else 0.0
    of_stage = f"stage {stage + 1}, " if plan.pipeline_parallel_size > 1 else ""
    return memory_at_peak(of_stage + moment, phases[moment], in_pools, part.layer_parameters, has_gpu)


def memory_at_peak(
    moment: str, terms: dict[str, float], in_pools: float, layer_parameters: int, has_gpu: bool
) -> Memory:
    """Returns the memory at a peak, in GiB.

    `terms` are the bytes of its tensors, and `in_pools` those of the allocator's pools, or 0 where they are the same.
    """
    active = sum(terms.values()) / GIB
    pools, layer = max(active, in_pools / GIB), layer_parameters / GIB
    low, expected, high = (
        pools * (1 + share) + layer * gaps + context * has_gpu  # without a GPU the gaps are a margin
        for share, gaps, context in zip(GAPS_SHARE, GAPS_PER_LAYER_PARAMETER, CONTEXT_GIB, strict=True)
    )
    return Memory(active, expected, low, high, {term: size / GIB for term, size in terms.items()}, moment)


def memory_phases(step: StepMemory) -> dict[str, dict[str, float]]:
    """Returns bytes by term in each phase of a step, which is a part of it in which memory may peak."""
    shape, plan = step.shape, step.plan
    phases = sharded_phases(step) if plan.uses_fsdp else replicated_phases(step)
    # StochasticAdamW's temporaries for the largest matrix (of a Llama). Per element: gradient, new moments, denominator
    # and new weight in fp32, two copies of its bits, and the result in bf16. Fused AdamW has none.
    largest_matrix = max(shape.vocabulary, shape.intermediate) * shape.hidden
    rounding = (7 * 4 + 2) * largest_matrix / plan.dp_shard_size if plan.precision == "bf16-states" else 0
    if not plan.cpu_offload:  # with offload AdamW runs on the CPU
        phases["optimizer"] = dict(step.resident(), gradients=plan.shard_bytes(shape), temporaries=rounding)
    return phases


class StepMemory:
    """What the phases of a step have in common, for micro-batches of `tokens` tokens.

    Every term was read off transformers' Llama and FSDP2 and agrees with PyTorch's memory tracker (tests/check_plan.py
    shows how closely). Phases are left out that would raise the predicted peak by at most 0.6% in Llamas of 1B to 70B
    parameters. `shape` is the rank's part of the model. In the comments h is its hidden size, f its intermediate size,
    q the size of a token's query, k that of its key (and of its value), a its heads. Tensor parallelism divides all of
    these but h.
    """

    def __init__(self, shape: ModelShape, plan: Plan, tokens: int, stage: int = 0):
        self.shape, self.plan, self.tokens = shape, plan, tokens
        h, f, q, k, a = shape.hidden, shape.intermediate, shape.query_size, shape.kv_size, shape.heads
        width, split = plan.compute_bytes, plan.tensor_parallel_size

        # Bytes per token.
        self.rotary = 2 * plan.stream_bytes * shape.head_dim  # cosines and sines of a position, shared by all layers
        self.hidden_states = width * h  # in compute precision: the head's input, or a gradient
        # Four int64 (ids, positions, `predict_at`, `targets`), and in fp32 the last norm's scale, the losses and their
        # gradient.
        self.scalars = 4 * 8 + 3 * 4
        # What a recomputed layer keeps: the stream, of which a tensor-parallel rank holds the part of its tokens.
        self.layer_input = plan.stream_bytes * h / split
        if split > 1:
            # torch's fused norms save their input, and their output is gathered. In the backward pass each of the two
            # has a gradient as large as itself.
            self.norm = self.layer_input + width * h
            self.norm_backward = 2 * self.norm
        else:
            # What a norm saves: an fp32 copy of its input 4h, the normalised input 2h, its output 2h. In fp32 and under
            # autocast each of the three takes 4h.
            self.norm = (12 if plan.stream_bytes == 4 else 8) * h
            # All that is there in a norm's backward pass, what it saved included, as PyTorch's memory tracker counts it
            # in any precision: four gradients in fp32, 4h each (of the normalised input, of the input directly and by
            # way of the variance, and the sum of the last two), and 8h that were not traced one by one.
            self.norm_backward = (8 + 4 * 4) * h
        if plan.compiled:
            # What a compiled layer saves: its input, and in elements what matmuls and attention read or write, which is
            # two norms' outputs 2h, attention's projection h (scattered where layers are split), query and attention
            # output 2q, key and value 2k, gate, up and their product 3f. The rest is computed again from them.
            saved = self.layer_input + width * (2 * h + h / split + 2 * q + 2 * k + 3 * f)
        else:
            # What an uncompiled layer saves. Two norms: 16h in bf16, 24h in fp32. Under autocast 24h - 8h + 10h: in
            # place of the two outputs, each of the five projections that read them saves its own bf16 copy, 2h. In
            # elements: query and attention output 2q, key and value 2k, MLP 4f.
            norms = 2 * self.norm if split > 1 else (26 if plan.autocasts else 24 if width == 4 else 16) * h
            saved = norms + width * (2 * q + 2 * k + 4 * f)
        # What a layer without activation checkpointing keeps: that, attention's log-sum-exp 4a, two norms' scales 8.
        self.whole_layer = saved + 4 * a + 8
        self.recomputed = plan.recomputed_layers(shape.layers)
        kept = [self.layer_input if i in self.recomputed else self.whole_layer for i in range(shape.layers)]
        # [i] is what is saved before layer i, [-1] after the final one.
        self.saved_before = list(itertools.accumulate(kept, initial=self.rotary))

        # In the loss's backward pass the norm's output is gone; its bytes in `self.norm` stand for the head's input.
        # That input's gradient comes on top.
        self.in_loss = self.saved_before[-1] + self.norm + self.hidden_states + self.scalars

        # Bytes: autocast's bf16 copies of the weights, which layers that are not recomputed save for their backward.
        self.copy_bytes = 2 if plan.autocasts else 0  # per parameter
        copied = [0 if i in self.recomputed else self.copy_bytes * shape.layer_parameters for i in range(shape.layers)]
        self.copied_before = list(itertools.accumulate(copied, initial=0))

        # What the other micro-batches under way have saved: bytes per token, and bytes of copies.
        stages, micro_batches = plan.pipeline_parallel_size, plan.gradient_accumulation_steps
        others = min(stages - stage, micro_batches) - 1  # 1F1B (Narayanan et al. 2021)
        self.other_micro_batches, self.other_copies = others * self.saved_before[-1], others * self.copied_before[-1]
        # Bytes per token: what was sent, of which `Pipeline.send` keeps the last 2 * stages tensors, and one received.
        tensors_sent = micro_batches * (2 if 0 < stage < stages - 1 else 1)  # a middle stage sends forward and back
        self.in_transit = (min(tensors_sent, 2 * stages) + 1) * self.layer_input if stages > 1 else 0.0

    def loss_buffers(self) -> tuple[float, float]:
        """Returns the bytes of a chunk of logits (forward), and of all the loss needs (backward)."""
        shape, plan = self.shape, self.plan
        is_split = plan.tensor_parallel_size > 1
        rows = self.tokens if shape.computes_all_logits else min(self.tokens, HEAD_CHUNK_TOKENS)
        # linear_cross_entropy holds a chunk's logits in fp32. Without it, three tensors as large are there in the
        # backward pass: log-softmax and two gradients, or of a split head the logits, their gradient, and one of the
        # terms that it is summed from. As much is taken for the forward pass.
        without_fused_loss = is_split or shape.computes_all_logits or not hasattr(nn, "LinearCrossEntropyOptions")
        per_logit = 3 * 4 if without_fused_loss else 4
        chunk = rows * per_logit * shape.vocabulary
        # At the peak also the head's gradient. With linear_cross_entropy, where compute is in bf16, the bf16 gradients
        # of this chunk's logits and of the previous one's, too; with --precision fp32 they take the logits' place.
        gradients = 0 if plan.compute_bytes == 4 or without_fused_loss else 2 * 2 * rows * shape.vocabulary
        return chunk, chunk + gradients + plan.compute_bytes * shape.head_and_norm_parameters

    def backward_of_layer(self, recomputed: bool) -> list[tuple[float, float]]:
        """Returns where the backward pass of a layer may peak: bytes per token, and parameters with a gradient by then.

        That is in its MLP, or at the end in its first norm.
        """
        shape, plan, is_split = self.shape, self.plan, self.plan.tensor_parallel_size > 1
        h, f, width = shape.hidden, shape.intermediate, plan.compute_bytes
        # In the MLP: what the layer saved, the gradient of the stream and, where layers are split, its gathered copy.
        in_mlp = self.whole_layer + self.layer_input + (width * h if is_split else 0)
        if not plan.compiled:
            # The gradients of the product and of one of its factors, by PyTorch's memory tracker.
            in_mlp += 2 * width * f
            # `whole_layer` has in it what the first norm saves: the layer's input or, in bf16, an fp32 copy of it.
            # Beside the copy a recomputed layer keeps the input, too; in other layers nothing does.
            own_input = self.layer_input if recomputed else 0
            norm_copies_input = plan.stream_bytes == 2 and not is_split
            in_mlp += own_input if norm_copies_input else 0
            # In the first norm's backward pass the kept input comes on top of `norm_backward`, by the tracker, in every
            # precision. (Where layers are split, `norm_backward` already includes it: an overestimate.)
            in_norm = self.norm_backward + own_input
            if plan.holds_gradients_back and width == 2 and torch.__version__ >= "2.15":
                # From torch 2.15 on, FSDP2 adds each bf16 gradient of an uncompiled layer to its fp32 sum at once and
                # frees it. When that of the down projection is added, one factor's gradient and one tensor as wide as
                # the stream are not there yet, by the tracker.
                return [(in_mlp - width * (f + h), h * f), (in_mlp, 0), (in_norm, 0)]
            return [(in_mlp, h * f), (in_norm, shape.layer_parameters)]
        # Autocast's copy of the stream's gradient. It is counted whole where layers are split, too, which agrees with
        # measurements.
        in_mlp += 2 * h if plan.autocasts else 0
        # The product, gate and up have a gradient of f each. In a recomputed layer these three and their three
        # gradients are there at once, three more than were saved, and the gradient of the down projection's weight
        # (h * f parameters) is not there yet. In other layers the peak comes when it is there: the product is gone, and
        # the gate's gradient overwrites the gate. Left are up and the three gradients, one more than were saved.
        mlp = (in_mlp + (3 if recomputed else 1) * width * f, 0 if recomputed else h * f)
        # In the first norm: the layer's input, and the gradient of the stream. In elements: the norm's output, the
        # gradients that three projections give it, and their sum, 5h.
        return [mlp, (2 * self.layer_input + width * 5 * h, shape.layer_parameters)]

    def resident(self) -> dict[str, float]:
        """Weights and moments. Under CPU offload a shard that was copied in is freed before the peaks."""
        weights = 0.0 if self.plan.cpu_offload else self.plan.shard_bytes(self.shape)
        return dict(weights=weights, optimizer=2 * weights)

    def gradients(self, finished: float) -> float:
        """Returns the bytes of the gradients when those of `finished` parameters are complete."""
        plan, parameters, state = self.plan, self.shape.parameters, self.plan.state_bytes
        accumulates = plan.gradient_accumulation_steps > 1
        if plan.strategy == "ddp":
            # Its buckets, and beside them the sums of earlier micro-batches, which the last micro-batch moves into the
            # buckets. With three or more, a middle one holds more, as it moves nothing, so that one is predicted.
            moved = finished if plan.gradient_accumulation_steps == 2 else 0
            return state * (parameters + (parameters - moved) * accumulates)
        on_device = 0 if plan.cpu_offload else state  # bytes per parameter of a sharded gradient
        if plan.strategy == "hsdp":
            # FSDP2 keeps what a reduce-scatter gives, in fp32, on the device until the backward pass has ended: as the
            # sum of earlier micro-batches, and for the all-reduce. Where states are in fp32 it is the gradient itself;
            # a gradient in bf16 comes on top, unless it is offloaded.
            on_device = 4 + (state if on_device == 2 else 0)
        if plan.holds_gradients_back:  # whole until the last micro-batch reduces them one by one
            return 4 * (parameters - finished) + on_device * finished / plan.dp_shard_size
        if plan.strategy == "hsdp" and accumulates:
            return (4 * parameters + (on_device - 4) * finished) / plan.dp_shard_size
        return on_device * (parameters if accumulates else finished) / plan.dp_shard_size

    def phase(
        self,
        activations: float = 0.0,
        temporaries: float = 0.0,
        *,
        gathered: float = 0.0,
        finished: float = 0.0,
    ) -> dict[str, float]:
        """Returns the terms of a phase in bytes: what is always there, gradients, and what is there for a while.

        `activations` are bytes per token of the micro-batch being worked on. `gathered` are whole weights to compute
        with (FSDP's, or autocast's copies), and the unsharded gradients being reduced. `finished` is the number of
        parameters whose gradients are complete: under FSDP those reduced, and those being reduced, whose sharded
        outputs are allocated already.
        """
        return dict(
            self.resident(),
            gradients=self.gradients(finished),
            gathered=gathered + self.other_copies,
            activations=self.tokens * (activations + self.other_micro_batches + self.in_transit),
            temporaries=temporaries,
        )


def sharded_phases(step: StepMemory) -> dict[str, dict[str, float]]:
    """Returns the phases of FSDP2, wrapped as transformers does it.

    The embedding and each layer are wrapped alone, and the last norm and the head together, which stay gathered. A
    matrix that is embedding and head at once stays gathered in the root group (see `patched_transformers`), and so does
    its gradient until the backward pass has ended. That is not counted.
    """
    shape, plan = step.shape, step.plan
    layer, head, embedding = shape.layer_parameters, shape.head_and_norm_parameters, shape.embedding_parameters
    layers, width = shape.layers, plan.compute_bytes
    # With a shard size of 1 weights are only cast, when their turn comes (`FSDPParamGroup.wait_for_unshard`), and not
    # gathered ahead.
    width_ahead = width if plan.dp_shard_size > 1 else 0
    kept = 0 if plan.reshard_after_forward else width * (layers * layer + embedding)
    phases = sharded_phases_between_passes(step, kept, width_ahead)
    # A layer's new gradients pile up until its backward pass ends, and are then reduced, or added to the sums that are
    # held back. Two exceptions, in layers that are not compiled, where sums are held back: with compute in fp32 each is
    # added at once, so that at most one MLP matrix's gradient waits. From torch 2.15 on the same holds for bf16, for
    # which `backward_of_layer` counts no more than that.
    adds_at_once = plan.holds_gradients_back and width == 4 and not plan.compiled
    most_pending = shape.hidden * shape.intermediate if adds_at_once else layer
    if plan.holds_gradients_back:
        # At the end of the first micro-batch's backward pass, in layer 0, all gradients are there, unsharded, and
        # counted whole, as none is `finished`. Besides, by PyTorch's memory tracker, there are layer 0's weights, their
        # gradients before they are added in fp32, and as much as one more gathered layer (no more than that even
        # where all layers are kept gathered), and per token the layer's input and four tensors as wide as the stream.
        # (Where each gradient is added at once, those of a whole layer are an overestimate.)
        held = step.layer_input + 4 * width * shape.hidden + step.rotary
        phases["end of the first backward"] = step.phase(held, gathered=(2 * width + width_ahead) * layer)
    for i in layers_that_may_peak(layers, plan):
        ahead = layer if i else embedding  # gathered during the backward pass of layer i, for the next one
        gathered = width * ((i + 1) * layer + embedding) if kept else width * layer + width_ahead * ahead
        finished = 0.0  # where gradients are held back, in every micro-batch but the last
        if not plan.holds_gradients_back:
            finished = head + (layers - 1 - i) * layer
            # the gradients of layer i + 1, or of the head, which are being reduced in fp32
            gathered += 4 * (layer if i < layers - 1 else head)
        phases[f"backward of layer {i}"] = largest(
            step.phase(
                step.saved_before[i] + in_layer,
                width * min(computed, most_pending),
                gathered=gathered,
                finished=finished,
            )
            for in_layer, computed in step.backward_of_layer(i in step.recomputed)
        )
    # at the very end; of the embedding only its gradient counts, in compute precision and, being reduced, in fp32
    phases["backward of the embedding"] = step.phase(gathered=(width + 4) * embedding, finished=shape.parameters)
    return phases


def sharded_phases_between_passes(step: StepMemory, kept: float, width_ahead: int) -> dict[str, dict[str, float]]:
    """Returns the phases of FSDP2 around the turn from the forward to the backward pass.

    With a head these are from the end of the last layer's forward pass to the beginning of its backward pass. On a
    stage without one it is the gathering of the last layer, before its forward pass.

    `kept` are the bytes of the weights that stay gathered between the passes, without norm and head, which always do.
    `width_ahead` are the bytes per parameter of what is gathered ahead.
    """
    layer, head, width = step.shape.layer_parameters, step.shape.head_and_norm_parameters, step.plan.compute_bytes
    if not step.shape.has_head:
        # The all-gather's buffers of the layer before and of the last one, and the last one's weights, which `kept`
        # includes.
        gathered = (kept or width * layer) + 2 * width_ahead * layer
        return {"gathering the last layer": step.phase(step.saved_before[-2] + step.layer_input, gathered=gathered)}
    all_saved, last_output = step.saved_before[-1], step.layer_input  # a layer's output is as wide as its input
    # FSDP2 gathers into a buffer and copies from it into the weights, so the head counts twice. The last layer's buffer
    # counts too: it stays until the head's weights are there, in `prev_all_gather_state` of FSDP2's `wait_for_unshard`.
    # (With a shard size of 1 there is no buffer: an overestimate.)
    gathering = kept + width * (layer + 2 * head)
    # beside the head, the last layer is gathered again, ahead of its backward pass
    beside_head = kept or width_ahead * layer
    # Norm and head are one group. FSDP2 reduces the head's gradient only when the norm's is there, too.
    in_norm, norm_gathered = all_saved + step.norm_backward, beside_head + 2 * width * head
    return {
        "gathering the head": step.phase(all_saved + last_output, gathered=gathering),
        "loss": step.phase(step.in_loss, step.loss_buffers()[1], gathered=beside_head + width * head),
        "backward of the last norm": step.phase(in_norm, gathered=norm_gathered),
    }


def replicated_phases(step: StepMemory) -> dict[str, dict[str, float]]:
    """Returns the phases without FSDP: one process, DDP, or stages and tensor parallelism alone.

    Under autocast there are bf16 copies of the weights, cached until the forward pass ends, and saved for the backward
    pass of layers that are not recomputed.
    """
    shape, plan, copy_bytes, copied_before = step.shape, step.plan, step.copy_bytes, step.copied_before
    layer, head, h = shape.layer_parameters, shape.head_and_norm_parameters, shape.hidden
    saved_before, is_split = step.saved_before, plan.tensor_parallel_size > 1
    all_saved, all_copied, head_copy = saved_before[-1], copied_before[-1], copy_bytes * head
    # The copies at the end of the forward pass: those of all layers, in autocast's cache. Where it caches none (a
    # compiled layer casts for itself, and local parts of DTensors are not cached), those saved for the backward pass.
    # By the loss's backward pass the cache is gone, and only the saved ones are left.
    copies_at_end = all_copied if plan.compiled or is_split else copy_bytes * shape.layers * layer
    phases = {}
    if shape.has_head:
        chunk, loss_buffers = step.loss_buffers()
        # split layers without FSDP: PyTorch's memory tracker counts one more tensor h wide
        norm_backward = step.norm_backward + step.hidden_states * is_split
        # The head's input is a copy of rows of the norm's output. Under autocast an fp32 copy comes before the one in
        # bf16; PyTorch's memory tracker does not show it at this peak.
        at_end = all_saved + step.norm + step.hidden_states
        phases["end of forward"] = step.phase(at_end, chunk, gathered=copies_at_end + head_copy)
        phases["loss"] = step.phase(step.in_loss, loss_buffers, gathered=all_copied + head_copy)
        phases["backward of the last norm"] = step.phase(all_saved + norm_backward, gathered=all_copied, finished=head)
    else:
        phases["end of forward"] = step.phase(all_saved + step.layer_input, gathered=copies_at_end)
    accumulates = plan.gradient_accumulation_steps > 1
    # With several micro-batches the newest gradient, that of one MLP matrix, is there twice until it is added to the
    # sum: in bf16, and as an fp32 copy. PyTorch's tracker, which sees uncompiled layers only, shows the two at the peak
    # under autocast, and not in other precisions. The same is taken for compiled layers that have one at their peak.
    # (In their first norm all their gradients wait. That is the peak with short micro-batches only, for which the
    # prediction is then less than 0.6% too low.)
    one_gradient = (copy_bytes + plan.state_bytes) * h * shape.intermediate if accumulates and plan.autocasts else 0
    for i in layers_that_may_peak(shape.layers, plan):
        ways = []
        for in_layer, computed in step.backward_of_layer(i in step.recomputed):
            finished = head + (shape.layers - 1 - i) * layer + computed
            waiting = one_gradient if computed else 0
            if plan.strategy == "ddp" and plan.gradient_accumulation_steps <= 2:
                # A compiled layer hands over its gradients at its end. Until then they wait beside DDP's buckets. (Not
                # so uncompiled: an overestimate.)
                finished, waiting = finished - computed, plan.state_bytes * computed
            copies = copied_before[i] + copy_bytes * (layer - computed)
            ways.append(step.phase(saved_before[i] + in_layer, waiting, gathered=copies, finished=finished))
        phases[f"backward of layer {i}"] = largest(ways)
    if shape.embedding_parameters:
        phases["backward of the embedding"] = step.phase(plan.stream_bytes * h, finished=shape.parameters)
    return phases


def layers_that_may_peak(layers: int, plan: Plan) -> list[int]:
    """Returns the layers whose backward pass has to be looked at, the last one first.

    With one layer in n recomputed, memory changes linearly along every n-th layer (i, i + n, i + 2n, ...), so it peaks
    among the first n or the last n layers. The very first and the very last layer are exceptions, so n + 1 are taken at
    each end.
    """
    taken = max(1, plan.recompute_every) + 1
    return [i for i in reversed(range(layers)) if i < taken or i >= layers - taken]


def largest(phases: Iterable[dict[str, float]]) -> dict[str, float]:
    return max(phases, key=lambda terms: sum(terms.values()))


def bytes_of_pools(step: StepMemory, phases: dict[str, dict[str, float]]) -> float:
    """Returns what the allocator's pools hold under FSDP, after each has been at its peak.

    FSDP gathers weights and reduces gradients on CUDA streams of their own. Each stream has a pool, and what it frees
    stays there, so the pools' peaks add up, although they are reached at different times. The main stream's pool peaks
    in one of `phases`. The reducing stream's does at the end of the backward pass, with every reduced gradient. The
    gathering stream's has the buffers of two layers and, as measured, of the head. Where layers are resharded, the
    largest phase mostly counts one layer's buffer already, in its term "gathered"; where they are kept, it counts none.
    The others are added.
    """
    plan, shape = step.plan, step.shape
    # Reduced gradients are added below, so the term "gradients" is left out of the main pool. Not so where a plan holds
    # gradients back: there it is unsharded gradients, which do lie in the main pool.
    left_out = () if plan.holds_gradients_back else ("gradients",)
    peak = max(sum(size for term, size in terms.items() if term not in left_out) for terms in phases.values())
    layers_added = 1 if plan.reshard_after_forward else 2
    gathering = plan.compute_bytes * (layers_added * shape.layer_parameters + shape.head_and_norm_parameters)
    return peak + step.gradients(shape.parameters) + (gathering if plan.dp_shard_size > 1 else 0)


def offloaded_gib(shape: ModelShape, cluster: Cluster, plan: Plan) -> float:
    """Returns what weights, gradients and moments take of a node's host memory under CPU offload, in GiB.

    Weights and gradients lie in pinned memory, of which torch takes a power of two for each tensor
    (CachingHostAllocator.h).
    """
    h, q, f, k, v = shape.hidden, shape.query_size, shape.intermediate, shape.kv_size, shape.vocabulary
    matrices = shape.layers * [h * q, h * q, h * k, h * k, h * f, h * f, h * f] + [v * h]
    matrices += [v * h] if shape.embedding_parameters > v * h / 2 else []  # not tied to the head
    pinned = sum(1 << (math.ceil(size / plan.dp_shard_size) * plan.state_bytes - 1).bit_length() for size in matrices)
    # Of all stages together, like `pinned`, and divided below. (CPU offload and tensor parallelism do not go together.)
    shard_bytes = plan.shard_bytes(shape)
    pinned = max(pinned, shard_bytes)  # `matrices` lacks the experts that a token is not sent to
    of_rank = 2 * (pinned + shard_bytes) / plan.pipeline_parallel_size
    return of_rank * cluster.ranks_per_node / GIB


# ---- The plan: time ------------------------------------------------------------------------------------------

# HALF_EFFICIENCY_TOKENS and OVERLAP are fitted to four rows of MosaicML's table of MPT-13B (sequences of 1,024 and
# 2,048, on A100 and H100), SPLIT_INEFFICIENCY to the layouts of Hagemann et al. 2023 (arXiv 2311.05610). EAGER_SPEED is
# a ratio of torchtitan's (Llama-3.1-8B on 8 H100, eager 5,762 and compiled 6,667 tokens/s).
HALF_EFFICIENCY_TOKENS = 800  # tokens of a micro-batch at which matmuls reach half of their efficiency
SPLIT_INEFFICIENCY = 0.1  # each further tensor-parallel rank raises those tokens by this share
OVERLAP = 0.5  # share of the shorter of computation and communication that hides behind the other
EAGER_SPEED = 5762 / 6667  # of a model that is not compiled
NETWORK_EFFICIENCY = 0.8  # of the network's nominal bandwidth; nccl-tests: 0.68 to 0.96 by message size


def training_flops(shape: ModelShape, tokens: int, squared_lengths: int) -> float:
    """Returns the FLOPs of training on `tokens` tokens in all, without recomputation.

    PaLM (Chowdhery et al. 2022, appendix B): 6 per matmul parameter and token, and 12 * layers * query size per pair of
    tokens in a document, not halved for causality. `squared_lengths` sums length**2 over the documents.
    """
    return 6.0 * shape.matmul_parameters * tokens + 12.0 * shape.layers * shape.query_size * squared_lengths


def predict_seconds(
    shape: ModelShape, cluster: Cluster, plan: Plan, tokens: float, attended: float
) -> dict[str, float]:
    """Returns the seconds of one optimizer step by term, for micro-batches of `tokens` tokens on each rank.

    `attended` is the mean length of the document a token is in. FLOPs per token: matmuls 2 per parameter forward, 4
    backward, 2 more where a layer is recomputed; causal flash attention 2 * layers * query size * attended forward,
    2.5 times that backward (Dao 2023). FSDP gathers weights once or twice a micro-batch and reduces fp32 gradients
    (Rajbhandari et al. 2020, section 7); a ring of n ranks moves (n-1)/n of the bytes through each rank, an all-reduce
    twice that (Patarasu and Yuan 2009). The slowest pipeline stage sets the pace. In its bubble it waits for as many
    micro-batches as there are other stages (Narayanan et al. 2021, section 2.2), and each micro-batch and its gradient
    are sent. A split layer gathers and scatters the stream twice a pass, all exposed (Korthikanti et al. 2022, 4.2.2).
    """
    gpu, micro_batches, stages = cluster.gpu, plan.gradient_accumulation_steps, plan.pipeline_parallel_size
    shards, replicas, split = plan.dp_shard_size, plan.dp_replicate_size, plan.tensor_parallel_size
    parts = shapes_of_stages(shape, stages, split)
    slowed = EAGER_SPEED if cluster.has_gpu and not plan.compiled else 1
    rate = cluster.flops_per_second(plan.precision) * gpu.matmul_efficiency * slowed
    ramp = HALF_EFFICIENCY_TOKENS / tokens * (1 + SPLIT_INEFFICIENCY * (split - 1)) if cluster.has_gpu else 0
    flops = max(work_per_token(part, plan, attended, ramp, gpu.attention_efficiency) for part in parts)
    compute = micro_batches * tokens * flops / rate

    gathers = 2 if plan.reshard_after_forward else 1
    ring_share, bus = (shards - 1) / shards, cluster.bus_gb_per_second(shards, split) * 1e9
    reductions = micro_batches if plan.gradient_sync == "micro-batch" else 1
    parameters, layers = max(part.parameters for part in parts), max(part.layers for part in parts)
    moved_bytes = (micro_batches * gathers * plan.compute_bytes + 4 * reductions) * parameters
    gather_reduce = ring_share * moved_bytes / bus
    replica_bus = cluster.bus_gb_per_second(replicas, shards * split) * 1e9
    reduced_bytes = 4 if plan.uses_fsdp else plan.state_bytes
    all_reduce = 2 * (replicas - 1) / replicas * reduced_bytes * parameters / shards / replica_bus
    shard_bytes = max(map(plan.shard_bytes, parts))
    gradient_copies = reductions if replicas == 1 else 1  # to the host: per reduction, or per all-reduce
    copied_bytes = (micro_batches * gathers + gradient_copies) * shard_bytes if plan.cpu_offload else 0.0
    host_link = copied_bytes / (HOST_LINK_GB_PER_SECOND * 1e9)
    stage_bus = (cluster.network_gb_per_second if cluster.nodes > 1 else gpu.link_gb_per_second) * 1e9
    sent_bytes = micro_batches * 2 * tokens / split * (plan.stream_bytes * shape.hidden) if stages > 1 else 0.0
    point_to_point = sent_bytes / stage_bus
    exchanges = 8 * layers + 4 * len(plan.recomputed_layers(layers))
    exchanged_bytes = exchanges * (split - 1) / split * tokens * plan.compute_bytes * shape.hidden
    tensor = micro_batches * exchanged_bytes / (gpu.link_gb_per_second * 1e9)
    bubble = (stages - 1) / micro_batches * (compute + tensor + (1 - OVERLAP) * point_to_point)
    communication = gather_reduce + all_reduce + host_link + point_to_point
    # fused AdamW reads weight, gradient and two moments and writes three of them; clipping reads the gradient again
    memory_rate = HOST_MEMORY_GB_PER_SECOND if plan.cpu_offload else gpu.hbm_gb_per_second
    optimizer = 8 * shard_bytes / (memory_rate * 1e9)
    exposed = communication - OVERLAP * min(communication, compute) + tensor
    return dict(
        total=compute + bubble + exposed + optimizer,
        compute=compute,
        bubble=bubble,
        exposed_communication=exposed,
        optimizer=optimizer,
        communication=communication + tensor,
        tensor_parallel=tensor,
        gather_reduce=gather_reduce,
        all_reduce=all_reduce,
        host_link=host_link,
        point_to_point=point_to_point,
    )


def work_per_token(shape: ModelShape, plan: Plan, attended: float, ramp: float, attention_efficiency: float) -> float:
    """Returns a token's work in this part of the model, as the FLOPs of large matmuls that would take the same time.

    Small matmuls and attention run at a lower efficiency, so they count for more.
    """
    recomputed = len(plan.recomputed_layers(shape.layers)) / shape.layers
    matmul = 6 * shape.matmul_parameters + 2 * recomputed * shape.layers * shape.active_layer_parameters
    attention = 2 * shape.layers * shape.query_size * attended * (3.5 + recomputed)
    return matmul * (1 + ramp) + attention / attention_efficiency


def limiting_link(cluster: Cluster, candidate: Candidate) -> str:
    """Returns the name of the link that takes most of the communication time."""
    plan, seconds = candidate.plan, candidate.step_seconds
    links = ("gather_reduce", "all_reduce", "host_link", "point_to_point", "tensor_parallel")
    name = max(links, key=lambda each: seconds[each])
    if not seconds[name]:
        return "no link"
    if name == "host_link":
        return f"host link {HOST_LINK_GB_PER_SECOND} GB/s"
    shards, split, link = plan.dp_shard_size, plan.tensor_parallel_size, cluster.gpu.link_gb_per_second
    rings = dict(gather_reduce=(shards, split), all_reduce=(plan.dp_replicate_size, shards * split))
    rings["tensor_parallel"] = (split,)
    if cluster.nodes == 1 or (name in rings and cluster.bus_gb_per_second(*rings[name]) == link):
        return f"node link {link:g} GB/s"
    return f"network {cluster.gpu.network_gbit_per_second:g} Gbit/s per GPU"


# ---- The plan: what would help -------------------------------------------------------------------------------


def lever_to_fit(shape: ModelShape, cluster: Cluster, config: Config) -> str:
    """Returns the single changes that would make the model fit, the cheapest of each kind, each one tried.

    Where no single change is enough, tries setting all the flags that restrict the plan back to auto.
    """
    helping: dict[str, str] = {}
    for kind, words, changed, changed_cluster in changes_that_may_help(cluster, config, to_fit=True):
        needed = kind not in helping and not (kind == "all flags" and helping)
        if needed and best_of(shape, changed_cluster, changed):
            helping[kind] = words
    return "it would fit with " + ", or ".join(helping.values()) if helping else "no change of a flag makes it fit"


def lever_to_speed(shape: ModelShape, cluster: Cluster, config: Config, chosen: Candidate) -> str:
    """Returns the first change that is predicted to train clearly more tokens a second; flags come before the batch."""
    for _, words, changed, _ in changes_that_may_help(cluster, config, to_fit=False):
        better = best_of(shape, cluster, changed)
        gain = better.tokens_per_second_per_gpu / chosen.tokens_per_second_per_gpu - 1 if better else 0.0
        if gain > TIME_BAND:
            return f"{words} would train {gain:.0%} more tokens/s"
    return "none: no flag gains more than the error of the prediction"


def changes_that_may_help(cluster: Cluster, config: Config, to_fit: bool) -> Iterator[tuple[str, str, Config, Cluster]]:
    """Yields kind of change, its words, and the flags and cluster it leads to; the cheapest of each kind first."""
    freed = {}
    for name in PLAN_FLAGS:
        default, words = FLAGS[name].default, f"{flag_name(name)} auto"
        if getattr(config, name) != default:
            changes = {name: default}
            if name == "parallelism" and config.hsdp_shard_size:
                changes, words = {**changes, "hsdp_shard_size": None}, f"{words} --hsdp-shard-size auto"
            freed[name] = words
            yield words, words, dataclasses.replace(config, **changes), cluster
    if not to_fit:
        if 2 * config.batch_size >= LARGEST_INTEGER:
            return
        larger = dataclasses.replace(config, batch_size=2 * config.batch_size)
        yield "batch", f"--batch-size {larger.batch_size} (changes the loss curve)", larger, cluster
        return
    if cluster.has_gpu and config.precision in ("auto", "bf16"):
        words = "--precision bf16-states (a trade: no fp32 weights)"
        yield "precision", words, dataclasses.replace(config, precision="bf16-states"), cluster
    for block in (4096, 2048, 1024, 512, 256):
        if block < config.block_size:
            yield "block", f"--block-size {block}", dataclasses.replace(config, block_size=block), cluster
    for factor in (2, 4, 8, 16):
        nodes, ranks = cluster.nodes, cluster.ranks_per_node * factor
        if ranks > 8 or not cluster.has_gpu:  # more processes on a CPU have no more memory
            nodes, ranks = cluster.nodes * factor, cluster.ranks_per_node
        words = f"{nodes * ranks} GPUs" if cluster.has_gpu else f"{nodes} such machines"
        yield "devices", words, config, dataclasses.replace(cluster, nodes=nodes, ranks_per_node=ranks)
    if freed:
        # those of --parallelism contain --hsdp-shard-size already
        words = " ".join(words for name, words in freed.items() if name != "hsdp_shard_size")
        defaults = {name: FLAGS[name].default for name in PLAN_FLAGS}
        yield "all flags", words, dataclasses.replace(config, **defaults), cluster


def best_of(shape: ModelShape, cluster: Cluster, config: Config) -> Candidate | None:
    """Returns the plan to choose under these flags; None where none fits, or where they rule each other out."""
    with contextlib.suppress(UserError):
        fitting = [each for each in weigh(shape, cluster, config) if each.fits]
        return preferred(fitting, cluster) if fitting else None
    return None


def flags_for_less_memory(shape: ModelShape, cluster: Cluster, plan: Plan, memory: Memory, config: Config) -> str:
    """Returns flags to add to the command of a run that ran out of memory: those of a plan that is predicted to reserve
    a tenth less than the run's.

    Where there is none, the block is halved, up to three times. Failing that, the plan that reserves least is taken;
    among equals, the one with the longest block, then the smallest micro-batch. All flags that were searched are given,
    because the planner would otherwise use the freed memory elsewhere; precision, packing and compiling are kept.
    """
    smaller = dataclasses.replace(cluster.gpu, memory_gib=0.9 * memory.reserved / USABLE_SHARE)
    smaller_cluster = dataclasses.replace(cluster, gpu=smaller)
    # the rest of the plan is searched freely, whatever the command's flags: those returned replace them
    fixed = dict(batch_size=config.batch_size, precision=plan.precision, save_dtype=config.save_dtype)
    fixed |= dict(packing="yes" if plan.packing else "no", compile="yes" if plan.compiled else "no")
    shorter = [Config(block_size=max(1, config.block_size // divisor), **fixed) for divisor in (1, 2, 4, 8)]
    for each in shorter:
        if found := best_of(shape, smaller_cluster, each):
            block = each.block_size
            break
    else:
        tried = [(each.block_size, candidate) for each in shorter for candidate in weigh(shape, cluster, each)]
        block, found = min(
            tried, key=lambda pair: (pair[1].memory_gib.reserved, -pair[0], pair[1].plan.micro_batch_size)
        )
    flags = flags_of(found.plan, cluster)
    if config.hsdp_shard_size and found.plan.strategy != "hsdp":  # the command's own would be refused
        flags += " --hsdp-shard-size auto"
    return flags + (f" --block-size {block} --resume-anyway" if block < config.block_size else "")


def flags_of(plan: Plan, cluster: Cluster) -> str:
    """Returns the flags that ask for this plan, except those for precision, packing and compiling."""
    flags = {"--micro-batch-size": plan.micro_batch_size, "--activation-checkpointing": plan.activation_checkpointing}
    if cluster.world_size > 1:
        sharding = {"--pipeline-parallel-size": plan.pipeline_parallel_size}
        sharding |= {"--tensor-parallel-size": plan.tensor_parallel_size, "--parallelism": plan.strategy}
        sharding |= {"--hsdp-shard-size": plan.dp_shard_size} if plan.strategy == "hsdp" else {}
        flags = sharding | flags | {"--cpu-offload": "yes" if plan.cpu_offload else "no"}
    if plan.uses_fsdp:
        flags["--gradient-sync"] = "step" if plan.holds_gradients_back else "micro-batch"
        flags["--reshard-after-forward"] = "yes" if plan.reshard_after_forward else "no"
    return " ".join(f"{name} {value}" for name, value in flags.items())


# ---- The plan: telling it ------------------------------------------------------------------------------------


def describe_choice(choice: Choice, shape: ModelShape, cluster: Cluster, config: Config) -> str:
    """Returns the plan as a table of at most 100 columns: the chosen one, the best of other kinds, and why."""
    nodes = f"{cluster.nodes} x " if cluster.nodes > 1 else ""
    first, device = choice.candidates[0].plan, "a GPU" if cluster.has_gpu else "a rank"
    rows, layers = "packed" if first.packing else "padded", "compiled" if first.compiled else "eager"
    count = shape.parameters
    parameters = f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
    lines = [
        f"plan      {nodes}{cluster.ranks_per_node} x {cluster.device_name} of {cluster.memory_gib:.1f} GiB; "
        f"{parameters} parameters; {config.batch_size} documents a step, of up to {config.block_size} tokens",
        f"          {f'{first.precision}, {rows}, {layers}':44}{'GiB ' + device:>17} {'step':>8} {'tokens/s':>9}",
        f"          {'':44}{'active':>8}{'reserved':>9} {'seconds':>8} {device:>9} {'MFU':>5}",
    ]
    for candidate in best_of_each_kind(choice):
        memory, is_chosen = candidate.memory_gib, candidate is choice.chosen
        plan, *rest = textwrap.wrap(candidate.plan.describe(), 43, break_on_hyphens=False)
        head = f"{'  chosen' if is_chosen else '':10}"
        lines.append(
            f"{head}{plan:44}{memory.active:8.1f}{memory.reserved:9.1f} "
            f"{candidate.total_seconds:8.2f} {candidate.tokens_per_second_per_gpu:9,.0f} {candidate.mfu:5.0%}"
        )
        lines += [f"{'':12}{words}" for words in (*rest, candidate.reason)]
    lines += describe_best(choice, shape, cluster)
    # flags stay whole, to be copied
    wrap = functools.partial(textwrap.fill, width=100, subsequent_indent=" " * 12, break_on_hyphens=False)
    return "\n".join(map(wrap, lines))


def describe_best(choice: Choice, shape: ModelShape, cluster: Cluster) -> list[str]:
    """Returns the lines on when the first plan's memory peaks, where its time goes, and what was assumed."""
    best = choice.candidates[0]
    memory, seconds, offloads = best.memory_gib, best.step_seconds, best.plan.cpu_offload
    terms = ", ".join(f"{name} {gib:.1f}" for name, gib in memory.terms.items() if gib >= 0.05) or "next to nothing"
    assumed = ", ".join(f"{name} {source}" for name, source in cluster.gpu.sources.items())
    bubble = f"bubble {seconds['bubble']:.2f} s, " if seconds["bubble"] else ""
    lines = [
        f"  peak      {memory.peak_moment}: {terms}; reserved {memory.reserved_low:.1f} to {memory.reserved_high:.1f}",
        f"  step      compute {seconds['compute']:.2f} s, {bubble}exposed communication "
        f"{seconds['exposed_communication']:.2f} s ({limiting_link(cluster, best)}), "
        f"optimizer {seconds['optimizer']:.2f} s",
    ]
    if offloads:
        host_gib = offloaded_gib(shape, cluster, best.plan)
        lines.append(f"  host      weights, gradients and moments take {host_gib:.1f} GiB of each node's own memory")
    assumed += "; overlap and reserved fitted" + ("; host link and host memory bandwidth guess" if offloads else "")
    return [*lines, f"  lever     {choice.lever}", f"  assumed   every document fills its block; {assumed}"]


def best_of_each_kind(choice: Choice) -> list[Candidate]:
    """Returns the best candidate of each kind (stages or not, split or not, strategy, offload, recomputation or none).

    The chosen one comes first, and there are seven at most.
    """
    best: dict[tuple, Candidate] = {}
    for each in choice.candidates:
        plan = each.plan
        kind = (
            plan.pipeline_parallel_size > 1,
            plan.tensor_parallel_size > 1,
            plan.strategy,
            plan.cpu_offload,
            plan.activation_checkpointing == "none",
        )
        best.setdefault(kind, each)
    return list(best.values())[:7]


def choice_as_json(choice: Choice, cluster: Cluster) -> dict[str, Any]:
    """Returns what `--plan-format json` prints, and `choice` in `train_config.json`."""

    def flat(candidate: Candidate) -> dict[str, Any]:
        fields = dataclasses.asdict(candidate)
        del fields["plan"]
        return plan_as_json(candidate.plan) | fields

    return dict(
        cluster=dataclasses.asdict(cluster),
        chosen=flat(choice.chosen) if choice.chosen else None,
        candidates=list(map(flat, choice.candidates)),
        lever=choice.lever,
    )


def plan_as_json(plan: Plan) -> dict[str, Any]:
    return dict(strategy=plan.strategy, **dataclasses.asdict(plan))


# ---- Devices -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """The devices of a run. `gpu` is what one rank may use: its GPU, or its share of a CPU node."""

    nodes: int
    ranks_per_node: int
    device_name: str
    has_gpu: bool
    gpu: Gpu
    has_flash_attention: bool = True  # an NVIDIA GPU from Ampere on
    host_memory_gib: float | None = None  # free on the node that has least; None where that is not known

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def memory_gib(self) -> float:
        return self.gpu.memory_gib

    def flops_per_second(self, precision: str) -> float:
        """Returns a device's peak FLOP/s in the compute precision, TF32 off; a CPU has a single figure."""
        if precision != "fp32" or not self.has_gpu:
            return self.gpu.peak_tflops * 1e12
        return 1e12 * (self.gpu.fp32_tflops or self.gpu.peak_tflops / 16)

    def bus_gb_per_second(self, ranks: int, stride: int = 1) -> float:
        """Returns the bandwidth of a ring of `ranks` ranks that lie `stride` places apart.

        Inside a node it is the link's. Across nodes, the ring's ranks on a node add up their shares of the network.
        """
        if self.nodes == 1 or self.ranks_per_node % (ranks * stride) == 0:  # else some ring lies on two nodes
            return self.gpu.link_gb_per_second
        ring_ranks_of_node = max(1, self.ranks_per_node // stride)
        return min(self.gpu.link_gb_per_second, ring_ranks_of_node * self.network_gb_per_second)

    @property
    def network_gb_per_second(self) -> float:
        """What a GPU's share of its node's network carries."""
        return self.gpu.network_gbit_per_second / 8 * NETWORK_EFFICIENCY


def find_cluster() -> Cluster:
    """Returns the cluster this process is part of, from torchrun's environment and the devices the ranks were given.

    Every rank must call it. Raises UserError on nodes with different numbers of ranks.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if dist.is_initialized() else 1
    seen = on_all_ranks(lambda: cluster_like_this(world_size // ranks_per_node, ranks_per_node), gathered=True)
    if len(sizes := {each.ranks_per_node for each in seen}) > 1:
        raise UserError(f"nodes run {' and '.join(map(str, sorted(sizes)))} ranks; give all the same --nproc_per_node")
    # Every rank plans alone, so all must plan with the same figures: the slowest device's, and the smallest memory.
    slowest = min(seen, key=lambda each: each.gpu.peak_tflops)
    return dataclasses.replace(
        slowest,
        gpu=dataclasses.replace(slowest.gpu, memory_gib=min(each.memory_gib for each in seen)),
        has_flash_attention=all(each.has_flash_attention for each in seen),
        host_memory_gib=min(each.host_memory_gib for each in seen),
    )


def this_machine() -> Cluster:
    """Returns the cluster that torchrun has made; without it, this machine with a rank for each GPU, or with one."""
    check_launcher()
    if "LOCAL_RANK" not in os.environ:
        return cluster_like_this(1, max(1, torch.cuda.device_count()))
    return cluster_like_this(int(os.environ.get("GROUP_WORLD_SIZE") or 1), int(os.environ["LOCAL_WORLD_SIZE"]))


def cluster_like_this(nodes: int, ranks_per_node: int) -> Cluster:
    """Returns a cluster of devices and nodes like those of this process."""
    name, gpu = find_device(ranks_per_node)
    has_gpu = torch.cuda.is_available()
    flash = has_gpu and torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)
    return Cluster(nodes, ranks_per_node, name, has_gpu, gpu, flash, free_host_memory() / GIB)


def find_device(ranks_per_node: int) -> tuple[str, Gpu]:
    """Returns the name and figures of this process's device."""
    if not torch.cuda.is_available():
        memory_gib = free_host_memory() / GIB / ranks_per_node
        # Half of what bare matmuls reach, memory of 10 GB/s, 1 GB/s between processes: good enough for trying out.
        peak = measure_matmul_tflops("cpu", torch.float32, 512)
        cpu = Gpu(memory_gib, peak, 10, 0.5, 1.0, 1, 1, sources=MEASURED_FIGURES)
        return platform.processor() or platform.machine(), cpu
    name, memory_gib = torch.cuda.get_device_name(), torch.cuda.get_device_properties().total_memory / GIB
    key = known_gpu(name, memory_gib)
    if key is None:
        peak = measure_matmul_tflops("cuda", torch.bfloat16, 8192)
        figures = (UNKNOWN_HBM_GB_PER_SECOND, 0.9, 0.75, PCIE_GB_PER_SECOND, 12.5)
        return name, Gpu(memory_gib, peak, *figures, sources=MEASURED_FIGURES)  # 0.9 of what bare matmuls reach
    sources = {**GPUS[key].sources, "memory": "measured"}
    gpu = dataclasses.replace(GPUS[key], memory_gib=memory_gib, sources=sources)
    return name, with_its_link(gpu, name)


def known_gpu(device_name: str, memory_gib: float) -> str | None:
    """Returns the key in GPUS of CUDA's `device_name`; None for an unknown GPU, a laptop's, or a MIG slice."""
    if re.search(r"\b(MIG|LAPTOP)\b", device_name.upper()):
        return None
    return min(gpus_named(device_name), key=lambda key: abs(GPUS[key].memory_gib - memory_gib), default=None)


def gpus_named(name: str) -> list[str]:
    """Returns the keys in GPUS that a name may mean, whether CUDA or a person wrote it."""
    # as the keys are written: "RTX 4090" becomes RTX4090, and "H100 80GB PCIe" H100PCIE
    words = re.sub(r"\b(?:(RTX) (?=\d)|(H100|H200)(?:[ -]\d+ ?GB)?[ -](?=PCIE|NVL))", r"\1\2", name.upper())
    return [key for key in GPUS if re.search(rf"(?<![A-Z0-9]){key.split('-')[0]}(?![A-Z0-9]| TI\b| D\b)", words)]


def with_its_link(gpu: Gpu, name: str) -> Gpu:
    """Returns a GPU's figures with PCIe for its link, where its name says so."""
    if "PCIE" not in name.upper():
        return gpu
    return dataclasses.replace(gpu, link_gb_per_second=PCIE_GB_PER_SECOND, sources=gpu.sources | {"node link": "guess"})


def measure_matmul_tflops(device: str, dtype: torch.dtype, size: int) -> float:
    """Returns the TFLOP/s of square matmuls, measured for about 0.05 seconds."""
    from torch.utils.benchmark import Timer

    matrix = torch.ones(size, size, device=device, dtype=dtype)
    timer = Timer("matrix @ matrix", globals=dict(matrix=matrix), num_threads=torch.get_num_threads())
    return 2 * size**3 / timer.blocked_autorange(min_run_time=0.05).median / 1e12


def parse_cluster(text: str) -> Cluster:
    """Returns the cluster that `8xH100-80GB` or `2x8xA100-40GB,ib=200`, for example, describes.

    `ib` is the network in Gbit/s per GPU. Raises UserError for one it cannot read; for an unknown GPU it lists all.
    """
    pattern = r"(?:(\d{1,6}) ?x ?)?(\d{1,6}) ?x ?([^,]+)(?:, ?ib=(\d+(?:\.\d+)?))?"
    match = re.fullmatch(pattern, text.strip(), re.IGNORECASE)
    if not match or int(match[1] or 1) < 1 or int(match[2]) < 1 or float(match[4] or 1) <= 0:
        raise UserError(
            f"--plan {text} is no cluster; write [NODES x]GPUS x NAME, such as 8xH100-80GB or 2x8xA100-40GB,ib=200"
        )
    name, memory = match[3].strip(), re.search(r"(\d+) ?GB", match[3], re.IGNORECASE)
    found = [key for key in gpus_named(name) if not memory or f"-{memory[1]}GB" in key]
    if len(found) > 1:
        raise UserError(f"--plan {text}: {name} may be {' or '.join(found)}; give the whole name")
    if not found:
        raise UserError(f"--plan {text}: {name} is not one of the GPUs known; write one of {', '.join(GPUS)}")
    gpu = with_its_link(GPUS[found[0]], name)
    if match[4]:
        sources = {**gpu.sources, "network": "given"}
        gpu = dataclasses.replace(gpu, network_gbit_per_second=float(match[4]), sources=sources)
    return Cluster(int(match[1] or 1), int(match[2]), name, True, gpu)


@dataclass(frozen=True)
class Gpu:
    """What the plan knows of a kind of GPU."""

    memory_gib: float  # as CUDA reports it
    peak_tflops: float  # dense bf16, from the data sheet, or measured
    hbm_gb_per_second: float  # from the data sheet, as is `fp32_tflops`, or a guess
    matmul_efficiency: float  # the share of the peak that large matmuls reach within a step
    attention_efficiency: float  # that of flash attention, relative to matmuls
    link_gb_per_second: float  # bus bandwidth of collectives among the GPUs of a node
    network_gbit_per_second: float  # usual network of a node, per GPU
    fp32_tflops: float | None = None  # None: the 1/16 of the bf16 peak that an A100 has
    sources: dict[str, str] = dataclasses.field(default_factory=dict)  # each `measured`, `table`, `given` or `guess`


DATA_SHEET = dict(memory="table", network="guess", peak="table") | dict.fromkeys(("efficiency", "node link"), "guess")
PUBLISHED = DATA_SHEET | dict.fromkeys(("efficiency", "node link"), "table")  # of these chips, runs are published
MEASURED_FIGURES = DATA_SHEET | dict.fromkeys(("memory", "peak"), "measured")
# Data sheets: NVIDIA's for A100, H100, H200, GH200, L40S, A10 and HGX B200; AWS's for the A10G (G5); the GA102, Ada and
# RTX Blackwell white papers for the GeForce cards. Networks: DGX A100 and H100, AWS p4d for the A100-40GB, or guesses.
# Efficiencies of A100 and H100: hardware FLOPs, recomputation included, of MPT-13B at 40,960 tokens a micro-batch, in
# the benchmark table of mosaicml/llm-foundry (0.79, 0.59 of the peak with all overheads, so a little more without).
# Attention: FlashAttention-2 reaches 0.50 to 0.73 of an A100's peak and 0.35 of an H100's (Dao 2023; Shah et al. 2024),
# here divided by the efficiency of matmuls. Links: nccl-tests all-gather and all-reduce bus bandwidth published for 8
# GPUs. H200 and GH200 have the H100's chip; every other efficiency is a guess from these.
GPUS = {  # memory GiB, bf16 TFLOP/s, HBM GB/s, efficiencies of matmuls and attention, link GB/s, network, fp32 TFLOP/s
    "A100-40GB": Gpu(39.5, 312, 1555, 0.80, 0.75, 231, 50, 19.5, PUBLISHED),
    "A100-80GB": Gpu(79.1, 312, 2039, 0.80, 0.75, 231, 200, 19.5, PUBLISHED),
    "H100-80GB": Gpu(79.1, 989, 3350, 0.60, 0.58, 345, 400, 67, PUBLISHED),
    "H200-141GB": Gpu(139.8, 989, 4800, 0.60, 0.58, 345, 400, 67, PUBLISHED),
    "B200-180GB": Gpu(178.3, 2250, 8000, 0.60, 0.58, 690, 400, 75, DATA_SHEET),
    "L40S-48GB": Gpu(44.4, 362, 864, 0.60, 0.75, 20, 25, 91.6, DATA_SHEET),
    "A10G-24GB": Gpu(22.0, 70, 600, 0.60, 0.75, 20, 12.5, 35, DATA_SHEET),
    "RTX3090-24GB": Gpu(23.6, 71, 936, 0.80, 0.75, 20, 12.5, 35.6, DATA_SHEET),
    "RTX4090-24GB": Gpu(23.5, 165.2, 1008, 0.70, 0.75, 20, 12.5, 82.6, DATA_SHEET),
    "RTX5090-32GB": Gpu(31.4, 209.5, 1792, 0.70, 0.75, 28, 12.5, 104.8, DATA_SHEET),
    "H100PCIE-80GB": Gpu(79.1, 756, 2039, 0.60, 0.58, 20, 100, 51, DATA_SHEET),
    "H100NVL-94GB": Gpu(93.0, 835, 3938, 0.60, 0.58, 20, 100, 60, DATA_SHEET),
    "H200NVL-141GB": Gpu(139.8, 835, 4800, 0.60, 0.58, 20, 100, 60, DATA_SHEET),
    "GH200-96GB": Gpu(94.5, 989, 4000, 0.60, 0.58, 345, 400, 67, PUBLISHED),
    "A10-24GB": Gpu(22.0, 125, 600, 0.60, 0.75, 20, 12.5, 31.2, DATA_SHEET),
}
# Guesses: what pinned copies reach of a PCIe 4 x16 link's 32 GB/s, one rank's share of a host's memory bandwidth for an
# offloaded optimizer, and the memory bandwidth of a GPU that is not in the table. PCIE_GB_PER_SECOND is from nccl-tests
# on one machine of GPUs linked by PCIe 4, and a guess for any other.
HOST_LINK_GB_PER_SECOND = 20
HOST_MEMORY_GB_PER_SECOND = 20
UNKNOWN_HBM_GB_PER_SECOND = 1000
PCIE_GB_PER_SECOND = 20


# ----------------------------------------------------------------------------------------------------------------
# 12. The command line
# ----------------------------------------------------------------------------------------------------------------
# How the process begins and ends. The flags become a `Config`, and every way in which a run can end becomes an exit
# code and a line.


def command_line(argv: Sequence[str] | None = None) -> int:
    """Runs `main` and returns the exit code, which is 0 also where a signal stopped the training.

    A mistake known to all ranks is reported by rank 0. The others wait before they exit, because torchrun kills the
    remaining ranks, rank 0 too, as soon as one has failed.
    """
    try:
        main(argv)
    except (UserError, RunError) as error:
        problems = error.problems if isinstance(error, UserError) else [error]
        if isinstance(error, RunError) and error.__cause__ is not None:  # only the rank that failed has the cause
            traceback.print_exception(error.__cause__)
        is_known_to_all = hasattr(error, "is_known_to_all") or dist.is_initialized()
        # before the ranks have met, an error may be of this node alone, and its first process reports it
        speaks_for_its_node = not is_known_to_all and os.environ.get("LOCAL_RANK", "0") == "0"
        if launched_rank() == 0 or speaks_for_its_node:
            print(*(f"error: {problem}" for problem in problems), sep="\n", file=sys.stderr, flush=True)
        else:
            time.sleep(5)
        return 2 if isinstance(error, UserError) else 1
    except torch.OutOfMemoryError as error:
        if not hasattr(error, "explained"):  # it came before there was a plan
            words = f"error: the GPU ran out of memory before training began ({first_line(error)})"
            print(words + "; end what else runs on it", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        if launched_rank() == 0:
            print("stopped   by Ctrl-C outside of training; what was saved is kept", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        words = (
            f"error: rank {launched_rank()} has lost the others ({first_line(error)}): a rank or its node has died, "
            "the network is down, or a wait took longer than --dist-timeout-minutes; run the same command again to "
            "resume from the newest checkpoint, if there is one"
        )
        print(words, file=sys.stderr, flush=True)
        return 1
    return 0


def leave(code: int) -> NoReturn:
    """Ends this process as `sys.exit` does, except that a rank skips the end of the Python interpreter.

    Modules and models keep gloo's threads alive beyond `destroy_process_group`. A thread that asks for the GIL while
    Python ends, to release its last message, aborts the process: "terminate called without an active exception".
    """
    if "LOCAL_RANK" not in os.environ:
        sys.exit(code)
    threading._shutdown()  # waits for threads, then atexit and flushing: what Python does first
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader may be gone
            stream.flush()
    os._exit(code)


def lost_contact(error: RuntimeError) -> bool:
    """Returns whether another rank is out of reach. NCCL and the store raise DistError, gloo a RuntimeError."""
    words = ("Timed out waiting", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    out_of_memory = "out of memory" in str(error)  # NCCL's own buffers
    return not out_of_memory and (isinstance(error, dist.DistError) or any(word in str(error) for word in words))


def parse_config(argv: Sequence[str] | None = None) -> Config:
    """Returns the configuration that the flags describe. Raises UserError with all problems of values at once."""
    given, unknown = build_parser().parse_known_args(argv)
    # A word without a dash is reported only if it comes first: after an unknown flag it is that flag's value.
    problems = [unknown_flag(word) for place, word in enumerate(unknown) if word.startswith("-") or place == 0]
    values = {}
    for name, found in vars(given).items():
        words, settings = found if isinstance(found, list) else [found], FLAGS[name].metadata
        leave_out = f"leave it out for the default, {shown_default(FLAGS[name])}"
        if words == [True]:  # a switch
            values[name] = True
        elif words == [None]:
            problems.append(f"{flag_name(name)} needs a value; {leave_out}")
        elif "" in words:
            problems.append(f"{flag_name(name)} is empty; {leave_out}")
        else:
            try:
                read = [None if word == settings["unset"] else settings["read"].convert(word) for word in words]
                values[name] = read[0] if len(read) == 1 else tuple(read)
            except ValueError as broken_rule:
                problems.append(f"{flag_name(name)} {words[0]} {broken_rule}; {leave_out}")
    if problems:
        raise UserError(*problems)
    return Config(**values)  # it also checks the rules between flags


def unknown_flag(word: str) -> str:
    known, name = list(map(flag_name, FLAGS)), word.split("=")[0]
    # --learning-rate: --lr
    initials = "--" + "".join(part[:1] for part in name.strip("-").replace("_", "-").split("-"))
    close = [initials] if initials in known else difflib.get_close_matches(name, known, n=1)
    return f"{word} is not a flag of this script; " + (f"did you mean {close[0]}?" if close else "see --help")


def launched_rank() -> int:
    """Returns this process's rank as torchrun set it. It is known before there is a process group.

    A RANK without torchrun's MASTER_ADDR does not count: `check_launcher` refuses it, and this process reports that.
    """
    rank = os.environ.get("RANK", "") if "MASTER_ADDR" in os.environ else ""
    return int(rank) if rank.isdigit() else 0


class FlagParser(argparse.ArgumentParser):
    """Splits the command line into flags and words. Raises its errors as UserError; only rank 0 prints the help."""

    def print_help(self, file=None) -> None:
        if launched_rank() == 0:
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def build_parser() -> argparse.ArgumentParser:
    parser = FlagParser(
        usage="%(prog)s [flags]",
        description="Fully fine-tune a causal LM on summarisation, in parallel by one line.",
        allow_abbrev=False,
    )
    parser._negative_number_matcher = re.compile(r"-(\d|\.\d|inf|nan)")  # argparse's own takes -1e-5 for a flag
    for name, field in FLAGS.items():
        read, bare = field.metadata["read"], field.metadata["bare"]
        words = dict(nargs="+") if name == "dataset_name_or_path" else dict(nargs="?", const=bare)
        kind = dict(action="store_true") if field.default is False else dict(metavar=read.metavar, **words)
        help = f"{field.metadata['help']} (default: {shown_default(field)})".replace("%", "%%")
        parser.add_argument(flag_name(name), default=argparse.SUPPRESS, help=help, **kind)
    return parser


if __name__ == "__main__":
    leave(command_line())
