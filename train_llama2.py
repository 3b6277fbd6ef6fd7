"""Fully fine-tune Llama-2-13B on CNN/DailyMail summarisation, in parallel by one line.

    torchrun --standalone --nproc_per_node=gpu train_llama2.py --lr 1e-5        # one node, all its GPUs
    torchrun --nnodes=2 --nproc_per_node=gpu --rdzv_backend=c10d \\
             --rdzv_endpoint=HOST:29500 train_llama2.py --lr 1e-5               # several nodes
    python train_llama2.py --model-name-or-path tests/data/tiny_llama \\
             --dataset-name-or-path tests/data/news --block-size 512            # a laptop

The one parallel-specific line of `main()` is the hook, `enable_advanced_parallelization(...)`. On Moreh's MoAI
platform it hands over to `torch.moreh.option.enable_advanced_parallelization()`. Everywhere else it looks at the
processes torchrun made, the model's config and the devices, and carries out the fastest plan that fits.

Sections, in the order the data flows:
    1. Constants               prompt, ignore index, file names
    2. Configuration           one dataclass holds the flags, their defaults, their help and their rules
    3. The plan                memory and time of every way to execute a step, and the choice among them
    4. The hook                the plan carried out: processes, sharding, gradient synchronisation
    5. Data                    prompt, truncation that keeps the summary, masks, packed or padded batches
    6. Model                   loading each rank's share, attention, token loss, optimizer, schedule
    7. Training step           scaling, clipping, non-finite steps
    8. Evaluation              token-weighted, exact on any number of ranks; summaries and their ROUGE
    9. Checkpoints             whole or not at all, resumable on any number of ranks; stop signals
   10. The final model         in Hugging Face format, with its card
   11. Reporting               progress, metrics.jsonl, curves, throughput, MFU, the plan against what happened
   12. main()

Shapes: B documents in a micro-batch, T tokens of its longest document, V vocabulary.
"""

from __future__ import annotations

import argparse
import bisect
import concurrent.futures
import contextlib
import dataclasses
import difflib
import fcntl
import functools
import hashlib
import heapq
import importlib.util
import inspect
import itertools
import json
import logging
import math
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import sys
import textwrap
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import accelerate
import datasets
import huggingface_hub
import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object, set_seed
from datasets.fingerprint import Hasher
from safetensors import SafetensorError
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.utils.rnn import pad_sequence
from torch.utils._triton import has_triton
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig
from transformers.distributed.utils import initialize_distributed_mesh
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# ----------------------------------------------------------------------------------------------------------------
# 1. Words and constants used throughout
# ----------------------------------------------------------------------------------------------------------------

PROMPT_OPEN, PROMPT_CLOSE = "[SUMMARIZE] ", " [/SUMMARIZE]\n"
IGNORE_INDEX = -100  # the label that torch.nn.functional.cross_entropy ignores
GIB = 2**30
METRICS_FILE, SAMPLES_FILE = LOG_FILES = ("metrics.jsonl", "samples.jsonl")


class UserError(Exception):
    """A mistake the user can fix: reported as one `error:` line per problem, with exit code 2 and no traceback."""

    def __init__(self, *problems: str):
        super().__init__("; ".join(problems))
        self.problems = problems


class RunError(Exception):
    """A run that cannot continue, as every rank finds: one `error:` line, exit code 1, no traceback."""


LEFT_TOGETHER = (None, UserError, RunError)  # how all ranks leave a context alike, so that collectives still work


def root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def first_line(error: BaseException) -> str:
    """Returns the first non-empty line of the root cause's message, or its type where the message is empty."""
    cause = root_cause(error)
    return next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)


# ----------------------------------------------------------------------------------------------------------------
# 2. Flags
# ----------------------------------------------------------------------------------------------------------------
# Each flag is one field of `Config`: its default and its help stand there and nowhere else, and its reader turns the
# word on the command line into a value or says which rule the word breaks. All problems are reported at once.

RECOMPUTATION_LEVELS = ("none", "every-4", "every-3", "every-2", "full")  # layers whose activations are recomputed
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
LARGEST_INTEGER = 2**32  # no flag has a meaning beyond it


@dataclass(frozen=True)
class Reader:
    """Turns a flag's word into its value. Raises ValueError with the rule that the word breaks.

    `metavar` stands for the value in --help. `unset` is the word for None, where the flag may be left open.
    """

    convert: Callable[[str], Any]
    metavar: str
    unset: str | None = None

    def __call__(self, word: str) -> Any:
        return None if word == self.unset else self.convert(word)


def text(unset: str | None = None) -> Reader:
    return Reader(str, "STR", unset)


def one_of(*choices: str) -> Reader:
    def convert(word: str) -> str:
        if word not in choices:
            raise ValueError(f"is not one of {', '.join(choices)}")
        return word

    return Reader(convert, "{" + ",".join(choices) + "}")


def number(kind: type, minimum=-math.inf, above=-math.inf, below=math.inf, unset: str | None = None) -> Reader:
    below = min(below, LARGEST_INTEGER) if kind is int else below

    def convert(word: str) -> float:
        try:
            value = kind(word)
        except ValueError:
            raise ValueError(f"is not {'a whole number' if kind is int else 'a number'}") from None
        if not math.isfinite(value):
            raise ValueError("must be a finite number")
        if value < minimum:
            raise ValueError(f"must be at least {minimum}")
        if value <= above:
            raise ValueError(f"must be above {above}")
        if value >= below:
            raise ValueError(f"must be below {below:g}")
        return value

    return Reader(convert, kind.__name__.upper(), unset)


def flag(default: Any, help: str, read: Reader | None = None, bare: str | None = None) -> Any:
    """Returns a field of `Config`. A default of False makes a switch; `bare` is the value of a flag without a word."""
    return dataclasses.field(default=default, metadata=dict(help=help, read=read or text(), bare=bare))


def usable_cores() -> int:
    """Returns how many cores this process may use. Slurm jobs and containers often have fewer than the node."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


AUTO_YES_NO = one_of("auto", "yes", "no")
POSITIVE = number(int, minimum=1)
# fmt: off


@dataclass(frozen=True)
class Config:
    """Every setting of a run. The field `batch_size` is the flag `--batch-size`."""

    model_name_or_path: str = flag("meta-llama/Llama-2-13b-hf", "causal LM to fine-tune: Hub id or local folder")
    dataset_name_or_path: str | tuple[str, ...] = flag(
        "abisee/cnn_dailymail", "Hub id, a local folder, or local files in jsonl, json, csv or parquet")
    dataset_config: str = flag("3.0.0", "configuration of a Hub dataset; ignored for local data")
    article_column: str = flag("article", "column with the text to summarise")
    summary_column: str = flag("highlights", "column with the summary")
    max_train_samples: int | None = flag(
        None, "use at most this many training documents", number(int, minimum=1, unset="all"))
    max_eval_samples: int | None = flag(
        None, "use at most this many validation documents", number(int, minimum=1, unset="all"))
    block_size: int = flag(2048, "tokens of a document at most; a longer article loses its end", POSITIVE)
    loss_on: str = flag("all", "tokens that are trained on: every one, or the summary's", one_of("all", "summary"))
    num_train_epochs: int = flag(1, "passes over the training documents", POSITIVE)
    max_steps: int | None = flag(None, "stop after this many optimizer steps", number(int, minimum=1, unset="none"))
    batch_size: int = flag(64, "documents per optimizer step, over all devices together", POSITIVE)
    micro_batch_size: int | None = flag(
        None, "documents per forward per device, at most", number(int, minimum=1, unset="auto"))
    lr: float = flag(1e-5, "peak learning rate of AdamW", number(float, above=0))
    lr_scheduler: str = flag("cosine", "learning rate after warm-up", one_of("cosine", "linear", "constant"))
    warmup_ratio: float = flag(0.03, "share of the steps that warm up linearly", number(float, minimum=0, below=1))
    weight_decay: float = flag(
        0.0, "AdamW weight decay of the matrices; norms and biases have none", number(float, minimum=0))
    max_grad_norm: float = flag(
        1.0, "clip the global gradient norm to this; 0 leaves it alone", number(float, minimum=0))
    seed: int = flag(42, "order of the documents and the held-out split", number(int, minimum=0, below=2**32))
    parallelism: str = flag(
        "auto", "what the data-parallel ranks do", one_of("auto", "none", "ddp", "fsdp", "hsdp"))
    hsdp_shard_size: int | None = flag(
        None, "HSDP: ranks that share one sharded copy; auto: those of a node, or half of a single node's",
        number(int, minimum=2, unset="auto"))
    gradient_sync: str = flag(
        "auto", "FSDP: reduce gradients every micro-batch, or once a step (keeps an unsharded fp32 gradient)",
        one_of("auto", "micro-batch", "step"))
    reshard_after_forward: str = flag(
        "auto", "FSDP and HSDP: free gathered weights after the forward pass, or keep them for the backward pass",
        AUTO_YES_NO)
    activation_checkpointing: str = flag(
        "auto", "recompute the activations of no layer, every k-th or all of them in the backward pass",
        one_of("auto", *RECOMPUTATION_LEVELS))
    cpu_offload: str = flag("auto", "FSDP and HSDP: keep weights and optimizer in host memory", AUTO_YES_NO)
    precision: str = flag(
        "auto", "compute precision over fp32 master weights, bf16 on GPU and fp32 on CPU; bf16-states keeps no fp32",
        one_of("auto", "bf16", "fp32", "bf16-states"))
    packing: str = flag(
        "auto", "lay documents end to end instead of padding them; auto: where variable-length flash attention runs",
        AUTO_YES_NO)
    compile: str = flag(
        "auto", "compile the decoder layers; auto: on a GPU, in a run long enough to pay for it", AUTO_YES_NO)
    plan: str | None = flag(
        None, "print the plan for this machine, or for a cluster such as 2x8xH100-80GB,ib=400, and exit",
        text(unset="none"), bare="here")
    plan_format: str = flag("table", "how --plan prints it", one_of("table", "json"))
    save_dtype: str = flag(
        "auto", "weights of the final model; auto: those of the compute precision", one_of("auto", "bf16", "fp32"))
    save_model_dir: str = flag("./llama2_summarization", "folder for everything the run writes")
    log_interval: int = flag(10, "optimizer steps between two lines of metrics", POSITIVE)
    eval_interval: int = flag(500, "optimizer steps between two evaluations", POSITIVE)
    save_interval: int = flag(500, "optimizer steps between two checkpoints", POSITIVE)
    keep_checkpoints: int = flag(2, "newest checkpoints that are kept; older ones are deleted", POSITIVE)
    resume: str = flag("auto", "auto, or the path of a checkpoint to begin from where the folder holds none yet")
    resume_anyway: bool = flag(False, "resume although flags or data that shape the losses have changed")
    async_save: str = flag(
        "auto", "write checkpoints while training goes on; auto: where host memory holds a copy", AUTO_YES_NO)
    rouge_samples: int = flag(
        0, "validation documents to summarise and score with ROUGE at every evaluation (package rouge-score)",
        number(int, minimum=0))
    num_beams: int = flag(1, "beams of those summaries; 1 is greedy", POSITIVE)
    max_summary_tokens: int = flag(160, "tokens of those summaries at most", POSITIVE)
    quiet: bool = flag(False, "print warnings, errors and the closing line only")
    report_to: str = flag("none", "experiment tracker", one_of("none", *TRACKERS))
    num_proc: int = flag(
        max(1, min(16, usable_cores() // 2)), "processes that tokenise: half the cores, at most 16", POSITIVE)
    dist_timeout_minutes: float = flag(
        60.0, "longest wait for another rank before all give up", number(float, above=0, below=1e6))
    random_init: bool = flag(False, "random weights from the model's config alone: for benchmarks")

    @property
    def dataset_paths(self) -> list[str]:
        named = self.dataset_name_or_path
        return [named] if isinstance(named, str) else list(named)


# fmt: on
FLAGS = {field.name: field for field in dataclasses.fields(Config)}


def flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def shown_default(field: dataclasses.Field) -> Any:
    if field.default is None:
        return field.metadata["read"].unset
    return "off" if field.default is False else field.default


def parse_config(argv: Sequence[str] | None = None) -> Config:
    """Returns the configuration that the flags describe. Raises UserError with every problem of the flags at once."""
    given, unknown = build_parser().parse_known_args(argv)
    # A word without a dash is reported only if it comes first: after an unknown flag it is that flag's value.
    problems = [unknown_flag(word) for word in unknown if word.startswith("-") or word is unknown[0]]
    values = {}
    for name, words in vars(given).items():
        leave_out = f"leave it out for the default, {shown_default(FLAGS[name])}"
        if words is True:
            values[name] = words
        elif words is None:
            problems.append(f"{flag_name(name)} needs a value; {leave_out}")
        elif "" in words:
            problems.append(f"{flag_name(name)} is empty; {leave_out}")
        else:
            try:
                read = [FLAGS[name].metadata["read"](word) for word in words]
                values[name] = read[0] if len(read) == 1 else tuple(read)
            except ValueError as broken_rule:
                problems.append(f"{flag_name(name)} {words[0]} {broken_rule}; {leave_out}")
    if values.get("hsdp_shard_size") and values.get("parallelism") != "hsdp":
        problems.append(f"--hsdp-shard-size {values['hsdp_shard_size']} needs --parallelism hsdp; add it")
    if problems:
        raise UserError(*problems)
    return Config(**values)


def unknown_flag(word: str) -> str:
    known, name = list(map(flag_name, FLAGS)), word.split("=")[0]
    initials = "--" + "".join(part[:1] for part in name.strip("-").replace("_", "-").split("-"))  # of --learning-rate
    close = [initials] if initials in known else difflib.get_close_matches(name, known, n=1)
    return f"{word} is not a flag of this script; " + (f"did you mean {close[0]}?" if close else "see --help")


def launched_rank() -> int:
    """Returns this process's rank as torchrun set it. It is known before there is a process group."""
    return int(os.environ.get("RANK", 0))


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
        words = dict(nargs="+") if name == "dataset_name_or_path" else dict(nargs="?", const=bare, type=lambda w: [w])
        kind = dict(action="store_true") if field.default is False else dict(metavar=read.metavar, **words)
        help = f"{field.metadata['help']} (default: {shown_default(field)})".replace("%", "%%")
        parser.add_argument(flag_name(name), default=argparse.SUPPRESS, help=help, **kind)
    return parser


# ----------------------------------------------------------------------------------------------------------------
# 3. The run
# ----------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """One run, top to bottom. Raises UserError for what the user can put right."""
    config = parse_config(argv)
    if config.plan:
        return plan_only(config)
    with (
        enable_advanced_parallelization(config) as parallel,
        StopSignals(parallel) as stop,
        contextlib.ExitStack() as leaving,
    ):
        set_seed(config.seed)
        prepare_save_folder(config, parallel)
        tokenizer = load_tokenizer(config, parallel)
        train_documents, eval_documents = load_data(config, tokenizer, parallel)
        eval_loader = data_loader(eval_documents, evaluation_batches(eval_documents.lengths, parallel), parallel)
        steps_per_epoch = math.ceil(len(train_documents) / config.batch_size)
        total_steps = min(config.max_steps or sys.maxsize, config.num_train_epochs * steps_per_epoch)

        curve = curve_settings(config, parallel, train_documents)
        checkpoints = leaving.enter_context(Checkpoints(config, parallel, curve, total_steps))
        model = load_model(config, parallel)
        optimizer = build_optimizer(model, config)
        state = checkpoints.resume(model, optimizer, parallel.device)
        resolved = dict(
            compiled=compile_layers(model, config, parallel, total_steps - state.step),
            async_save=checkpoints.asynchronous,
            save_dtype="bf16" if saved_dtype(config, parallel) == torch.bfloat16 else "fp32",
        )

        check_setup(model, eval_loader, parallel)
        log = RunLog(config, parallel, state, total_steps, steps_per_epoch, resolved)

        def evaluate_if_due() -> None:
            if log.evaluation_due(state) and not stop.agreed():
                with log.clock_stopped():
                    log.evaluation(state, assess(model, eval_loader, config, parallel, stop))

        evaluate_if_due()  # the run before may have been stopped at it
        batches = remaining_batches(train_documents, state.step, total_steps, config, parallel)
        for batch in log.timing_the_wait(batches):
            lr = learning_rate(state.step, total_steps, config)
            result = training_step(model, optimizer, batch, lr, state, config, parallel, stop)
            if result is not None:
                log.step(state, result)
            evaluate_if_due()
            stopping = stop.agreed()  # asked once: a signal from here on is for the next step to find, and to save
            saving = stopping or state.step == total_steps or state.step % config.save_interval == 0
            stop_if_broken(state, saving)
            if saving:
                with log.clock_stopped():
                    log.sync()
                    checkpoints.save(model, optimizer, state)
            if stopping:
                break
            stop.seconds_to_leave = log.seconds_per_step() + checkpoints.seconds_to_save()
        checkpoints.wait()

        if state.step < total_steps:
            log.stopped(state, stop.signal_name, saved=checkpoints.saved_step == state.step)
        else:
            save_model(model, tokenizer, config, parallel)
            write_model_card(config, parallel, state, log)
            log.summary(state)


def command_line(argv: Sequence[str] | None = None) -> int:
    """Runs `main` and returns the exit code. Under torchrun all ranks find the same mistakes and rank 0 reports them.

    The others wait before they exit, because torchrun kills the remaining ranks, rank 0 too, as soon as one has failed.
    """
    try:
        main(argv)
    except (UserError, RunError) as error:
        problems = error.problems if isinstance(error, UserError) else [error]
        if launched_rank() == 0:
            print(*(f"error: {problem}" for problem in problems), sep="\n", file=sys.stderr, flush=True)
        else:
            time.sleep(5)
        return 2 if isinstance(error, UserError) else 1
    except torch.OutOfMemoryError:  # told by the hook's context, which knows the plan
        return 1
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        words = (
            f"error: rank {launched_rank()} has lost the others ({first_line(error)}): a rank, its node or "
            "the network is gone for longer than --dist-timeout-minutes; the same command goes on from the newest "
            "checkpoint"
        )
        print(words, file=sys.stderr, flush=True)
        return 1
    return 0


def lost_contact(error: RuntimeError) -> bool:
    """Returns whether another rank is out of reach. NCCL and the store raise DistError; gloo only words tell apart."""
    words = ("Timed out waiting", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    out_of_memory = "out of memory" in str(error)  # NCCL's own buffers
    return not out_of_memory and (isinstance(error, dist.DistError) or any(word in str(error) for word in words))


# ----------------------------------------------------------------------------------------------------------------
# 4. Training step and evaluation
# ----------------------------------------------------------------------------------------------------------------

NONFINITE_LIMIT = 5  # skipped updates in a row after which the run stops
SANITY_BATCHES = 2  # evaluated before training, so that a broken set-up fails in the first minute


@dataclass
class TrainingState:
    """Where the run stands. The tensors stay on the device, so counting costs no host sync."""

    skipped: torch.Tensor
    skipped_in_a_row: torch.Tensor
    longest_skip: torch.Tensor
    step: int = 0
    tokens: int = 0
    evaluated_step: int = 0
    run_id: str = ""

    @classmethod
    def fresh(cls, device: torch.device) -> TrainingState:
        return cls(*(torch.zeros((), device=device) for _ in range(3)), run_id=uuid.uuid4().hex[:12])

    def as_facts(self) -> dict[str, Any]:
        """Returns the state for a checkpoint's manifest. Waits for the device."""
        return {name: int(value) if isinstance(value, torch.Tensor) else value for name, value in vars(self).items()}

    def restore(self, facts: dict[str, Any]) -> None:
        for name, value in vars(self).items():
            setattr(self, name, torch.full_like(value, facts[name]) if isinstance(value, torch.Tensor) else facts[name])


@dataclass(frozen=True)
class StepResult:
    """Loss and gradient norm of one optimizer step over all ranks, as tensors on the device, and its counts."""

    loss: torch.Tensor
    grad_norm: torch.Tensor
    lr: float
    tokens: int
    squared_lengths: int
    micro_batch_tokens: list[int]  # of this rank, padding included


def training_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: GlobalBatch,
    lr: float,
    state: TrainingState,
    config: Config,
    parallel: Parallel,
    stop: StopSignals | None = None,
) -> StepResult | None:
    """One optimizer step on a global batch. Every rank must call it. No host sync.

    Returns None, having changed nothing, if all ranks agreed to stop before the step was complete.

    The loss is (sum of token losses over all ranks) / (label tokens over all ranks). DDP and FSDP average gradients
    over the ranks, hence the factor dp_size. A step whose loss or gradient norm is not finite changes nothing: fused
    AdamW leaves weights and moments alone where `found_inf` is 1, the way torch.amp.GradScaler skips.
    """
    model.train()
    loss_sum = torch.zeros((), device=parallel.device)
    for index, micro_batch in enumerate(batch.micro_batches):
        if stop and stop.agreed_to_leave_step():
            optimizer.zero_grad()
            return None
        with parallel.gradient_sync(model, is_last=index == len(batch.micro_batches) - 1):
            micro_loss = token_loss_sum(model, micro_batch, parallel)
            (micro_loss * (parallel.dp_size / batch.label_tokens)).backward()
        loss_sum += micro_loss.detach()
    loss = parallel.sum_over_ranks(loss_sum) / batch.label_tokens
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor().to(parallel.device)
    skip = (~(torch.isfinite(loss) & torch.isfinite(grad_norm))).float()
    parameter = optimizer.param_groups[0]["params"][0]
    optimizer.grad_scale, optimizer.found_inf = None, skip.to(parameter.device)  # a host sync only under CPU offload
    optimizer.rounding_seed = state.step  # of StochasticAdamW
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    state.step += 1
    state.tokens += batch.tokens
    state.skipped += skip
    state.skipped_in_a_row = (state.skipped_in_a_row + skip) * skip
    state.longest_skip = torch.maximum(state.longest_skip, state.skipped_in_a_row)
    micro_batch_tokens = [micro_batch["input_ids"].numel() for micro_batch in batch.micro_batches]
    return StepResult(loss, grad_norm, lr, batch.tokens, batch.squared_lengths, micro_batch_tokens)


def token_loss_sum(model: torch.nn.Module, micro_batch: dict[str, torch.Tensor], parallel: Parallel) -> torch.Tensor:
    """Returns the sum of the token losses of a micro-batch, fp32, on the device; differentiable."""
    inputs: dict[str, Any] = {
        name: tensor.to(parallel.device, non_blocking=True)
        for name, tensor in micro_batch.items()
        if name != "labels"  # the head is given its targets
    }
    if parallel.plan.packing:
        inputs["max_length"] = parallel.block_size  # a bound that never changes, or compiled layers would
    with torch.autocast(parallel.device.type, torch.bfloat16, enabled=parallel.plan.autocasts):
        return model(**inputs, use_cache=False)


def stop_if_broken(state: TrainingState, saving: bool) -> None:
    """Ends the run after too many skipped updates in a row, on all ranks alike, as all saw the same loss and norm.

    Reading the count waits for the device, so it is read every fifth step, and before a save: a checkpoint inside
    such a row would end every run that resumes from it. The steps in between do no harm: their updates are skipped as
    well.
    """
    if (saving or state.step % NONFINITE_LIMIT == 0) and state.longest_skip.item() >= NONFINITE_LIMIT:
        raise RunError(
            f"loss or gradient norm was not finite in {NONFINITE_LIMIT} steps in a row, up to step {state.step}; "
            "those updates were skipped. Lower --lr, lengthen --warmup-ratio, or look at the data of these steps"
        )


def learning_rate(step: int, total_steps: int, config: Config) -> float:
    """Returns the learning rate of update number `step` (from 0): linear warm-up, then the schedule down to 0."""
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    if config.lr_scheduler == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (1 - progress) if config.lr_scheduler == "linear" else config.lr


def check_setup(model: torch.nn.Module, loader: DataLoader, parallel: Parallel) -> None:
    """Evaluates the two batches of the longest documents before training: a broken set-up fails in the first minute."""
    loss = evaluate(model, loader, parallel, max_batches=SANITY_BATCHES)
    if not math.isfinite(loss):
        raise RunError(f"the loss is {loss} before any training; the model's weights are broken: download them again")


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: mean token loss in nats; with --rouge-samples the summaries and their scores."""

    loss: float
    rouge: dict[str, float]
    samples: list[Sample]


@dataclass(frozen=True)
class Sample:
    """A validation document's own summary beside the model's."""

    reference: str
    summary: str


def assess(
    model: torch.nn.Module, loader: DataLoader, config: Config, parallel: Parallel, stop: StopSignals
) -> Evaluation | None:
    """Returns the evaluation of the whole validation split, None where the run was asked to stop meanwhile.

    Every rank must call it. Raises RunError where the loss is not finite.
    """
    loss = evaluate(model, loader, parallel, stop=stop)
    if loss is not None and not math.isfinite(loss):
        raise RunError(
            f"the validation loss is {loss}: the weights are broken, and are not saved; what was saved before is kept. "
            "Delete the later checkpoints to go back to an earlier one, and lower --lr, or lengthen --warmup-ratio"
        )
    if loss is None:
        return None
    samples = summarise(model, loader.dataset.documents, config, parallel, stop)
    return None if samples is None else Evaluation(loss, rouge_scores(samples), samples)


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    loader: DataLoader,
    parallel: Parallel,
    max_batches: int | None = None,
    stop: StopSignals | None = None,
) -> float | None:
    """Returns the mean token loss in nats over the loader's (first `max_batches`) batches, the same on every rank.

    Every rank must call it. Weighted by tokens, and each document counts once on any number of ranks. None where
    the run was asked to stop meanwhile.
    """
    model.eval()
    loss_sum = torch.zeros((), device=parallel.device, dtype=torch.float64)
    label_tokens, steps = 0, min(len(loader), max_batches or len(loader))
    for batch in tqdm(
        itertools.islice(loader, steps), "evaluating", steps, leave=False, disable=not shows_bars(parallel)
    ):
        if stop and stop.agreed():
            return None
        for micro_batch in batch.micro_batches:
            loss_sum += token_loss_sum(model, micro_batch, parallel)
        label_tokens += batch.label_tokens
    return (parallel.sum_over_ranks(loss_sum) / label_tokens).item()


@torch.no_grad()
def summarise(
    model: torch.nn.Module, documents: Documents, config: Config, parallel: Parallel, stop: StopSignals
) -> list[Sample] | None:
    """Returns the model's summaries of `--rouge-samples` documents drawn by the seed, the same list on every rank.

    Every rank must call it; None where the run was asked to stop meanwhile. The documents are dealt to the ranks, and
    every rank makes the same number of calls: sharded forwards are collective, so a rank with nothing left summarises
    a document once more, and transformers keeps all ranks of a call going until the last has ended its summaries.
    """
    module, tokenizer = parallel.accelerator.unwrap_model(model), documents.tokenizer
    module.eval()
    drawn = np.random.default_rng(config.seed).permutation(len(documents))[: config.rouge_samples]
    mine, size = drawn[parallel.rank :: parallel.dp_size], prompts_at_a_time(config, parallel)
    calls = math.ceil(math.ceil(len(drawn) / parallel.dp_size) / size)
    settings = transformers.GenerationConfig(
        max_new_tokens=config.max_summary_tokens, num_beams=config.num_beams, do_sample=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=padding_id(tokenizer), bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    written: list[Sample] = []
    for call in tqdm(range(calls), "summarising", leave=False, disable=not shows_bars(parallel)):
        if stop.agreed():
            return None
        batch = mine[call * size : (call + 1) * size]
        rows = documents.rows[batch if len(batch) else drawn[:1]]
        documents_and_prompts = list(zip(rows["input_ids"], rows["prompt_length"], strict=True))
        prompts = [ids[:length] for ids, length in documents_and_prompts]
        references = [ids[length:] for ids, length in documents_and_prompts]
        inputs = {name: tensor.to(parallel.device) for name, tensor in pad_prompts(prompts, tokenizer).items()}
        with generating(module, parallel):
            outputs = module.generate(**inputs, generation_config=settings)
        texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        references = tokenizer.batch_decode(references, skip_special_tokens=True)
        written += map(Sample, map(str.strip, references), map(str.strip, texts))
    everyones = gather_object([written])  # by rank; what fills an empty share comes last in it, and is left out here
    return [everyones[place % parallel.dp_size][place // parallel.dp_size] for place in range(len(drawn))]


def prompts_at_a_time(config: Config, parallel: Parallel) -> int:
    """Returns how many documents a rank summarises in one call: a micro-batch, or fewer where their caches need more
    memory than weights and moments leave. The same on every rank, as the plan counts with the smallest device.

    A cache holds keys and values of every layer, per token of prompt and summary and per beam.
    """
    shape, plan, cluster = parallel.shape, parallel.plan, parallel.cluster
    step = StepMemory(shape, plan, tokens=1)
    gathered = 2 * step.width * (shape.layer_parameters + shape.head_parameters)
    room = HEADROOM * cluster.memory_gib * GIB - sum(step.resident().values()) - gathered
    token_bytes = 2 * shape.layers * shape.kv_width * (4 if plan.autocasts else step.width)
    beams_reordered = 2 if config.num_beams > 1 else 1  # beam search copies the cache to reorder it
    document_bytes = token_bytes * (config.block_size + config.max_summary_tokens) * config.num_beams * beams_reordered
    return max(1, min(plan.micro_batch_size, int(room // document_bytes)))


def pad_prompts(prompts: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """Returns `input_ids` and `attention_mask` (B, T), padded at their beginning, so that all end at one place."""
    rows = [torch.as_tensor(prompt) for prompt in prompts]
    pad = functools.partial(pad_sequence, batch_first=True, padding_side="left")
    return dict(
        input_ids=pad(rows, padding_value=padding_id(tokenizer)), attention_mask=pad(list(map(torch.ones_like, rows)))
    )


@contextlib.contextmanager
def generating(model: PreTrainedModel, parallel: Parallel) -> Iterator[None]:
    """Inside, attention uses the padding mask, which left-padded prompts need, and no layer is recompiled."""
    training_attention = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    autocast = torch.autocast(parallel.device.type, torch.bfloat16, enabled=parallel.plan.autocasts)
    try:
        with autocast, torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.set_attn_implementation(training_attention)


def rouge_scores(samples: Sequence[Sample]) -> dict[str, float]:
    """Returns the mean F1 of ROUGE-1, ROUGE-2 and ROUGE-Lsum (Lin 2004) in percent, with stemming; {} for no samples.

    Lsum compares sentence by sentence, a line each.
    """
    if not samples:
        return {}
    from rouge_score.rouge_scorer import RougeScorer  # an optional extra

    names = ("rouge1", "rouge2", "rougeLsum")
    scorer = RougeScorer(names, use_stemmer=True)
    scores = [scorer.score(sentence_lines(each.reference), sentence_lines(each.summary)) for each in samples]
    return {name: 100 * float(np.mean([score[name].fmeasure for score in scores])) for name in names}


def sentence_lines(text: str) -> str:
    return re.sub(r"(?<=[.!?]) +", "\n", text)


# ----------------------------------------------------------------------------------------------------------------
# 5. The hook
# ----------------------------------------------------------------------------------------------------------------


def enable_advanced_parallelization(config: Config) -> Parallel:
    """Makes the rest of a single-GPU script run on every device there is; returns what it set up.

    Where `torch.moreh` exists, MoAI takes over: the platform shows its whole cluster as one device, and the script
    goes on as one plain process. Elsewhere the strategy is chosen from the world torchrun made, the model's own
    config and the devices' memory. Call it once, on every rank, before the model is built.

    Works for other causal LMs and other scripts: `enable_advanced_parallelization(Config(model_name_or_path=...))`.
    Raises UserError when the model cannot be read, or the plan that was asked for cannot work.
    """
    on_moai = hasattr(torch, "moreh")
    if on_moai:
        torch.moreh.option.enable_advanced_parallelization()
    else:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # read at the first CUDA allocation
        start_process_group(config)
    check_optional_packages(config)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.save_model_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
    )
    quieten_libraries(accelerator.is_local_main_process, config.quiet)
    cluster = find_cluster()
    with agreed_by_all_ranks():
        model_config, shape = read_model_shape(config)
        if on_moai:
            check_block(shape, config)
            choice, plan, told = None, moai_plan(config), MOAI_WORDS
        else:
            choice = choose_plan(shape, cluster, config)
            refuse_what_does_not_fit(choice, cluster)
            plan, told = choice.chosen.plan, describe_choice(choice, shape, cluster, config)
    timeout = timedelta(minutes=config.dist_timeout_minutes)
    parallel = Parallel(
        accelerator, cluster, model_config, shape, plan, choice, config.block_size, timeout, config.quiet
    )
    parallel.say(told)
    if (gpus := torch.cuda.device_count()) > 1 and cluster.world_size == 1 and not on_moai:
        parallel.say(f"  note      1 of {gpus} GPUs; torchrun --nproc_per_node=gpu uses them all")
    return parallel


def check_optional_packages(config: Config) -> None:
    """Raises UserError for a flag that needs a package which is not installed."""
    if config.rouge_samples and importlib.util.find_spec("rouge_score") is None:
        raise UserError(
            "--rouge-samples needs the package rouge-score, which is not installed; pip install rouge-score"
        )
    if config.report_to != "none" and config.report_to not in map(str, get_available_trackers()):
        raise UserError(
            f"--report-to {config.report_to} needs a package that is not installed; "
            f"pip install {config.report_to.replace('_', '-')}"
        )


def moai_plan(config: Config) -> Plan:
    """On MoAI the platform decides: one forward takes the whole batch, and nothing is sharded or synchronised here.

    Raises UserError for flags that would take the decision from it.
    """
    for name in ("parallelism", "cpu_offload"):
        if (value := getattr(config, name)) not in ("auto", "none", "no"):
            raise UserError(f"{flag_name(name)} {value} is not for MoAI, which parallelises by itself; leave it out")
    micro_batch_size = config.micro_batch_size or config.batch_size
    recompute = "none" if config.activation_checkpointing == "auto" else config.activation_checkpointing
    return Plan(
        strategy="moai",
        dp_replicate_size=1,
        dp_shard_size=1,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=math.ceil(config.batch_size / micro_batch_size),
        activation_checkpointing=recompute,
        reshard_after_forward=True,
        cpu_offload=False,
        gradient_sync="step",
        precision="bf16" if config.precision == "auto" else config.precision,
        compiled=config.compile == "yes",
    )


MOAI_WORDS = "plan      moai: torch.moreh.option.enable_advanced_parallelization() was called, and the platform decides"


@dataclass(frozen=True)
class Parallel:
    """What the hook returns: the processes, the plan, and the few operations that differ between one device and many.

    A context manager: leaving it ends the trackers and the process group.
    """

    accelerator: Accelerator
    cluster: Cluster
    model_config: transformers.PretrainedConfig
    shape: ModelShape
    plan: Plan
    choice: Choice | None
    block_size: int
    timeout: timedelta
    quiet: bool = False

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
    def dp_size(self) -> int:
        """The number of ranks with documents of their own: all of them, as there is no tensor parallelism."""
        return self.plan.dp_replicate_size * self.plan.dp_shard_size

    def __enter__(self) -> Parallel:
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type in LEFT_TOGETHER:
            if self.accelerator.num_processes > 1:
                # gloo's threads need the GIL to release their last message; destroying a DDP model, or Python's exit,
                # would wait for them while holding it: now and then a hang or an abort
                time.sleep(0.1)
            self.accelerator.end_training()
        elif issubclass(error_type, torch.OutOfMemoryError):
            print(self.explain_out_of_memory(), file=sys.stderr, flush=True)

    def explain_out_of_memory(self) -> str:
        """Returns the error line of a rank that ran out: what was predicted, what was allocated, which flags help."""
        words = f" It ran {self.plan.describe()}."
        remedy = f"--micro-batch-size {max(1, self.plan.micro_batch_size // 2)}"
        if self.choice is not None:
            memory = self.choice.chosen.memory
            words += f" The plan expected {memory.active:.1f} GiB active and {memory.reserved[1]:.1f} reserved"
            words += f" of {self.cluster.memory_gib:.1f}, at {memory.peak_moment}."
            remedy = flags_for_less_memory(self.shape, self.cluster, self.plan, memory.active, self.block_size)
        if self.device.type == "cuda":
            words += f" PyTorch's peak was {torch.cuda.max_memory_allocated() / GIB:.1f} GiB allocated and"
            words += f" {torch.cuda.max_memory_reserved() / GIB:.1f} reserved."
        return (
            f"error: rank {self.rank} ran out of memory.{words} Try {remedy}; saved checkpoints are kept, and "
            "the same command with these flags resumes from the newest"
        )

    def say(self, *words: object, always: bool = False) -> None:
        """Prints on rank 0 alone, above a progress bar if there is one. Any rank may call it.

        Under --quiet only warnings and what is marked `always`.
        """
        line = " ".join(map(str, words))
        if self.is_main and (always or not self.quiet or line.startswith("WARNING")):
            tqdm.write(line, file=sys.stdout)  # Accelerator.print speaks once per node
            sys.stdout.flush()

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns `tensor` summed over all ranks, on each of them. Every rank must call it. No host sync."""
        return self.accelerator.reduce(tensor, "sum")

    def cpu_group(self) -> dist.ProcessGroup | None:
        """Returns a new group of all ranks for messages in host memory, None for one process. Every rank calls it."""
        if self.accelerator.num_processes == 1:
            return None
        # a shorter timeout than NCCL's, whose watchdog would abort the process before we could report anything
        return dist.new_group(backend="gloo", timeout=0.8 * self.timeout)

    @contextlib.contextmanager
    def node_main_first(self) -> Iterator[None]:
        """Runs the body on each node's first process, then on the others, which find its files and caches ready."""
        if not self.accelerator.is_local_main_process:
            self.wait_for_everyone()
        try:
            yield
        finally:
            if self.accelerator.is_local_main_process:
                self.wait_for_everyone()

    def wait_for_everyone(self) -> None:
        """A barrier in host memory. Accelerate's would be NCCL's, which keeps the GPU busy while others tokenise."""
        if self.accelerator.num_processes > 1:
            dist.barrier()  # without device_ids, torch takes gloo of a group that has both

    @contextlib.contextmanager
    def gradient_sync(self, model: torch.nn.Module, is_last: bool) -> Iterator[None]:
        """Wraps one micro-batch's forward and backward; decides whether its gradients are reduced now or later.

        DDP waits for the last micro-batch. FSDP reduces each one unless the plan found room for an unsharded fp32
        gradient (4 bytes per parameter). HSDP reduces inside the sharded group each time, and only the all-reduce
        across replicas, which carries 1/shards of it, waits for the last.
        """
        if self.plan.dp_shard_size > 1:
            model.set_requires_gradient_sync(is_last or self.plan.gradient_sync == "micro-batch")
            model.set_requires_all_reduce(is_last)
            yield
        else:
            with self.accelerator.no_sync(model) if not is_last else contextlib.nullcontext():
                yield


@contextlib.contextmanager
def agreed_by_all_ranks() -> Iterator[None]:
    """A UserError that one rank raises in the body is raised on every rank, so that all leave together.

    Every rank must enter. The body must hold no collective that a failing rank would leave the others in;
    `node_main_first` is none, as a failing rank reaches its barrier too.
    """
    problems: tuple[str, ...] = ()
    try:
        yield
    except UserError as error:
        problems = error.problems
    if found := next(filter(None, gather_object([problems])), None):
        raise UserError(*found)


def start_process_group(config: Config) -> None:
    """Joins the ranks that torchrun started, if any. Gloo beside NCCL, because offloaded tensors live on the CPU.

    When `--max-restarts` restarts the ranks, torchrun reuses its key-value store, where they would find the addresses
    of dead ranks: each attempt gets a key prefix of its own. With several agents this is not safe, as they may count
    attempts differently; there, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment.
    """
    if dist.is_initialized():
        return
    if "LOCAL_RANK" not in os.environ:
        tasks = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
        if tasks > 1:
            raise UserError(f"{tasks} processes were started without torchrun; start one torchrun per node")
        return
    if torch.cuda.is_available():
        local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if int(os.environ["LOCAL_WORLD_SIZE"]) > gpus:  # found by every rank of the node, so that one can tell
            raise UserError(f"torchrun --nproc_per_node started more processes than the {gpus} GPUs here; use gpu")
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(minutes=config.dist_timeout_minutes)
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        return dist.init_process_group(backend, timeout=timeout)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    attempt = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=attempt, rank=rank, world_size=world_size, timeout=timeout)


def quieten_libraries(speaks: bool, quiet: bool) -> None:
    """Silences the libraries' warnings on all but one process per node, and their bars unless it has a terminal."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # a file it cannot read is our error line
    if not speaks or quiet or not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()
        huggingface_hub.utils.disable_progress_bars()
    if not speaks:
        transformers.logging.set_verbosity_error()


# ----------------------------------------------------------------------------------------------------------------
# 6. Data
# ----------------------------------------------------------------------------------------------------------------

PAD_MULTIPLE = 8  # rows are padded to a multiple of 8 tokens, the tile of the tensor cores
HELD_OUT_SHARE = 0.05  # of the training split, held out when the data has no validation split
MANY_DOCUMENTS = 1000  # above which it pays to start the processes of --num-proc
DATA_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt")


def load_tokenizer(config: Config, parallel: Parallel) -> PreTrainedTokenizerBase:
    """Returns the model's own tokenizer. Every rank must call it. Raises UserError where it cannot serve."""
    with agreed_by_all_ranks(), parallel.node_main_first():
        folder = model_folder(config.model_name_or_path, TOKENIZER_FILES)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            marks = tokenizer(PROMPT_OPEN + PROMPT_CLOSE, split_special_tokens=True)["input_ids"]
            if not marks:
                raise ValueError("its vocabulary is empty or missing")
        except Exception as error:  # transformers raises all kinds of errors on malformed files
            present = any(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern))
            reason = first_line(error) if present else "it holds none of a tokenizer's files"
            raise UserError(
                f"--model-name-or-path {config.model_name_or_path} has no tokenizer that loads "
                f"({reason}); add its tokenizer.json, or pip install sentencepiece for a tokenizer.model"
            ) from error
        if not tokenizer.is_fast or tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer of --model-name-or-path {config.model_name_or_path} must be a fast one with an "
                "end-of-sequence token; use a model that has them"
            )
        largest = max(*marks, tokenizer.eos_token_id, len(tokenizer) - 1)
        if largest >= parallel.shape.vocabulary:
            raise UserError(
                f"the tokenizer of --model-name-or-path {config.model_name_or_path} has ids up to {largest}, but the "
                f"model only {parallel.shape.vocabulary} embeddings; use the tokenizer that belongs to it"
            )
        taken = len(marks) + 1
        if config.block_size < taken + 2:
            raise UserError(
                f"--block-size {config.block_size} leaves no room for a summary: the prompt's marks and the "
                f"end-of-sequence token take {taken} tokens; use at least 64"
            )
    return tokenizer


def load_data(config: Config, tokenizer: PreTrainedTokenizerBase, parallel: Parallel) -> tuple[Documents, Documents]:
    """Returns the encoded training and validation documents. Every rank must call it; rank 0 prints an audit.

    Raises UserError where nothing is left to learn from.
    """
    encoded = {}
    for name, split in load_documents(config, parallel).items():
        documents = encode_documents(split, tokenizer, config, parallel)
        if not documents.label_counts.sum() > 0:
            raise UserError(
                f"no label tokens are left in the {len(split)} {name} documents; their articles or summaries are empty"
            )
        if name == "train":
            batches = training_batches(len(documents), epoch=0, config=config)
        else:
            batches = evaluation_batches(documents.lengths, parallel)
        if parallel.is_main:  # costly, as it deals every document
            parallel.say(audit(name, len(split), documents, batches, parallel))
        encoded[name] = documents
    return encoded["train"], encoded["validation"]


@dataclass(frozen=True)
class Documents:
    """Encoded, memory-mapped documents, the length and label count of each, and what turning them into rows takes."""

    rows: datasets.Dataset
    lengths: np.ndarray
    label_counts: np.ndarray
    tokenizer: PreTrainedTokenizerBase
    block_size: int
    loss_on: str

    def __len__(self) -> int:
        return len(self.rows)


def load_documents(config: Config, parallel: Parallel) -> datasets.DatasetDict:
    """Returns the splits `train` and `validation`, text columns only. Every rank must call it.

    Each node's first process downloads and parses; the others read the cache it made. Without a validation split,
    5% of the training split is held out, drawn by the seed. Raises UserError for data that cannot be used.
    """
    with agreed_by_all_ranks(), parallel.node_main_first():
        splits = read_splits(config)
    train = splits["train"]
    if "validation" in splits:
        validation = splits["validation"]
    else:
        held_out = max(1, round(HELD_OUT_SHARE * len(train)))
        parts = train.train_test_split(test_size=held_out, seed=config.seed)
        train, validation = parts["train"], parts["test"]
        parallel.say(f"data      no validation split: {held_out} of the training documents are held out, by the seed")
    train = train.select(range(min(len(train), config.max_train_samples or len(train))))
    validation = validation.select(range(min(len(validation), config.max_eval_samples or len(validation))))
    return datasets.DatasetDict(train=train, validation=validation)


def read_splits(config: Config) -> datasets.DatasetDict:
    paths = config.dataset_paths
    shown = f"--dataset-name-or-path {' '.join(paths)}"
    local = len(paths) > 1 or is_local(paths[0])
    try:
        if local:
            file_format, files = find_data_files(paths, shown)
            options = {"keep_default_na": False} if file_format == "csv" else {}  # or "None" would be missing
            load = functools.partial(datasets.load_dataset, file_format, split="train", **options)
            # one call a split: a single call would demand the same columns of all of them
            splits = datasets.DatasetDict({name: load(data_files=those) for name, those in files.items()})
        else:
            splits = datasets.load_dataset(paths[0], config.dataset_config)
    except UserError:
        raise
    except Exception as error:
        if isinstance(root_cause(error), UnicodeDecodeError):
            remedy = "it is not UTF-8: convert it"
        elif local:
            remedy = "repair or leave out the malformed file: each needs the same columns, and at least one row"
        else:
            remedy = "check the name, --dataset-config and the network, or name local files"
        raise UserError(f"{shown} cannot be read ({first_line(error)}); {remedy}") from error
    if "train" not in splits:
        raise UserError(f"{shown} has no train split, only {', '.join(splits)}; name a file or split train")
    for name, split in splits.items():
        check_columns(split, name, config)
    if len(splits["train"]) < (1 if "validation" in splits else 2):
        raise UserError(f"{shown} has {len(splits['train'])} training documents; that is too few to train on")
    return splits


def find_data_files(paths: list[str], shown: str) -> tuple[str, dict[str, list[str]]]:
    """Returns (format of `datasets`, files by split). A file's path names its split; the default is train."""
    files: list[tuple[Path, str]] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{shown}: {path} does not exist; give a Hub id, or an existing folder or file")
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        files += [(file, str(file.relative_to(path) if path.is_dir() else file.name)) for file in inside]
    files = [(file, name) for file, name in files if file.is_file() and file.suffix.lower() in DATA_FORMATS]
    formats = {DATA_FORMATS[file.suffix.lower()] for file, _ in files}
    if not files or len(formats) > 1:
        found = f"holds {' and '.join(sorted(formats))} side by side" if files else "holds no data file"
        raise UserError(f"{shown} {found}; give files of one format: {', '.join(DATA_FORMATS)}")
    if empty := [str(file) for file, _ in files if file.stat().st_size == 0]:
        raise UserError(f"{shown}: {empty[0]} is empty; leave it out or fill it")
    for file, _ in files:
        if problem := json_problem(file):
            raise UserError(f"{shown}: {file} {problem}")
    by_split: dict[str, list[str]] = {}
    for file, name in files:
        by_split.setdefault(split_of(name), []).append(str(file))
    return formats.pop(), by_split


def json_problem(file: Path) -> str:
    """Returns what is wrong with the beginning of a JSON file, on which pyarrow would end the process (a `null`)."""
    if DATA_FORMATS[file.suffix.lower()] != "json":
        return ""
    with file.open("rb") as stream:
        beginning = stream.read(2**16)
    if beginning.startswith(b"\xef\xbb\xbf"):
        return "begins with a byte-order mark; save it as UTF-8 without one"
    if re.match(rb"\s*\{" if file.suffix.lower() == ".jsonl" else rb"\s*(\[\s*)?\{", beginning):
        return ""
    return "does not begin with a JSON object; give one object a line, or in .json a list of objects"


def split_of(name: str) -> str:
    words = set(re.findall(r"[^\W\d_]+", name.lower()))
    if words & {"validation", "valid", "val", "dev", "eval"}:
        return "validation"
    return "test" if "test" in words else "train"


def check_columns(split: datasets.Dataset, name: str, config: Config) -> None:
    for flag_field in ("article_column", "summary_column"):
        column = getattr(config, flag_field)
        if column not in split.column_names:
            raise UserError(
                f"{flag_name(flag_field)} {column} is not a column of the {name} split; "
                f"it has {', '.join(split.column_names)}"
            )
        if getattr(split.features[column], "dtype", None) not in ("string", "large_string"):
            raise UserError(f"{flag_name(flag_field)} {column} of the {name} split holds no text; name a text column")


def data_folders(config: Config) -> list[Path]:
    """Returns the local folders among what `--dataset-name-or-path` names."""
    return [path for path in map(Path, config.dataset_paths) if path.is_dir()]


def is_local(name: str) -> bool:
    return os.path.exists(name) or looks_like_a_path(name)


def looks_like_a_path(name: str) -> bool:
    """A Hub id is `name` or `owner/name`; anything else was meant as a path."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in DATA_FORMATS


# ---- Data: tokens ----------------------------------------------------------------------------------------------


def encode_documents(
    split: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, config: Config, parallel: Parallel
) -> Documents:
    """Returns the non-empty documents of a split as tokens. Every rank must call it.

    Encoded by each node's first process, cached under a hash of all that shapes the result, and memory-mapped from
    there by the other ranks and by later runs.
    """
    eos = tokenizer.eos_token_id  # from tokenizer_config.json, not part of the backend
    recipe = (split._fingerprint, tokenizer.backend_tokenizer.to_str(), eos, PROMPT_OPEN, PROMPT_CLOSE)
    settings = (config.article_column, config.summary_column, config.block_size, datasets.__version__)
    features = datasets.Features(
        input_ids=datasets.List(datasets.Value("int32")),
        prompt_length=datasets.Value("int32"),
        length=datasets.Value("int32"),
        tokens_cut=datasets.Value("int32"),
        summary_cut=datasets.Value("bool"),
    )
    with agreed_by_all_ranks(), parallel.node_main_first():
        try:
            rows = split.map(
                lambda pairs: encode_batch(
                    pairs[config.article_column], pairs[config.summary_column], tokenizer, config.block_size
                ),
                batched=True,
                remove_columns=split.column_names,
                num_proc=config.num_proc if len(split) > MANY_DOCUMENTS else None,
                new_fingerprint=Hasher.hash((recipe, settings)),
                features=features,
                desc="tokenising",
            )
        except UnicodeDecodeError as error:
            raise UserError(
                f"--dataset-name-or-path {config.dataset_name_or_path} is not UTF-8 ({error}); convert it"
            ) from error
    columns = rows.with_format("numpy")
    lengths, prompts = (np.asarray(columns[name][:], dtype=np.int64) for name in ("length", "prompt_length"))
    labels = label_counts(lengths, prompts, config.loss_on)
    return Documents(rows, lengths, labels, tokenizer, config.block_size, config.loss_on)


def encode_batch(
    articles: Sequence[str | None], summaries: Sequence[str | None], tokenizer: PreTrainedTokenizerBase, block_size: int
) -> dict[str, list]:
    """Returns the columns of `encode_documents`, without the pairs whose article or summary is empty."""
    pairs = [(a, s) for a, s in zip(articles, summaries, strict=True) if a and s and a.strip() and s.strip()]
    columns: dict[str, list] = {n: [] for n in ("input_ids", "prompt_length", "length", "tokens_cut", "summary_cut")}
    if not pairs:
        return columns
    # split_special_tokens: an article that happens to contain "</s>" holds four characters, not a control token.
    encoded = tokenizer(
        [PROMPT_OPEN + article + PROMPT_CLOSE + summary for article, summary in pairs],
        split_special_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    for (article, _), ids, offsets in zip(pairs, encoded["input_ids"], encoded["offset_mapping"], strict=True):
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

    `starts` are the first tokens of the article, of the closing mark, and of the summary. The excess is cut
    from the end of the article; the summary is cut only if it does not fit by itself.
    """
    article, closing, summary = starts
    excess = max(0, len(ids) + 1 - block_size)
    kept_article = max(article, closing - excess)
    kept = ids[:kept_article] + ids[closing:]
    summary_start = kept_article + summary - closing
    summary_cut = len(kept) + 1 > block_size
    kept = [*kept[: block_size - 1], eos_token_id]
    return dict(
        input_ids=kept,
        prompt_length=summary_start,
        length=len(kept),
        tokens_cut=closing - kept_article,
        summary_cut=summary_cut,
    )


def label_counts(lengths: np.ndarray, prompt_lengths: np.ndarray, loss_on: str) -> np.ndarray:
    """Returns how many labels each document has. The first token is predicted from nothing, so it never counts."""
    return lengths - (np.maximum(prompt_lengths, 1) if loss_on == "summary" else 1)


# ---- Data: masks -----------------------------------------------------------------------------------------------


def create_mask(input_ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Returns the attention mask of `input_ids` (..., T): 1 for a real token, 0 for padding, same shape, int64.

    Padding is what trails the document, in `pad_token_id`, else `eos_token_id`. Inside the document these ids are
    real tokens. Where both are the same id, the first of the trailing ones is the document's own end-of-sequence
    token; a row of nothing else is all padding.
    """
    pad_id = padding_id(tokenizer)
    from_the_end = (input_ids == pad_id).flip(-1)
    trailing = from_the_end.long().cumprod(-1).flip(-1)
    if pad_id == tokenizer.eos_token_id:
        own_end = (trailing.cumsum(-1) == 1) & (trailing == 1)
        has_document = (trailing == 0).any(-1, keepdim=True)
        trailing = trailing - (own_end & has_document).long()
    return 1 - trailing


def mask_pads(
    inputs: torch.Tensor, tokenizer: PreTrainedTokenizerBase, ignore_index: int = IGNORE_INDEX
) -> torch.Tensor:
    """Returns the labels of `inputs` (..., T): a copy in which padding is `ignore_index`, so it is never trained on."""
    return inputs.masked_fill(create_mask(inputs, tokenizer) == 0, ignore_index)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id that pads rows. Llama-2 has none of its own, so its end-of-sequence id serves."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


# ---- Data: dealing documents to ranks and micro-batches --------------------------------------------------------


def training_batches(documents: int, epoch: int, config: Config) -> list[np.ndarray]:
    """Returns the global batches of an epoch: an order drawn from seed and epoch alone; the last may be smaller."""
    order = np.random.default_rng((config.seed, epoch)).permutation(documents)
    return np.split(order, range(config.batch_size, documents, config.batch_size))


def evaluation_batches(lengths: np.ndarray, parallel: Parallel) -> list[np.ndarray]:
    """Returns every document once, longest first, in batches of one micro-batch per rank (packed, of about four)."""
    order, size = np.argsort(-lengths, kind="stable"), parallel.dp_size * parallel.plan.micro_batch_size
    size *= 4 if parallel.plan.packing else 1
    return np.split(order, range(size, len(order), size))


def deal(lengths: np.ndarray, dp_size: int, plan: Plan, block_size: int) -> list[list[np.ndarray]]:
    """Returns `dealt[micro_step][rank]` for the plan; a packed row holds at most what a full padded one does."""
    if plan.packing:
        return pack_documents(lengths, dp_size, plan.micro_batch_size * block_size)
    return deal_documents(lengths, dp_size, plan.micro_batch_size)


def deal_documents(lengths: np.ndarray, dp_size: int, micro_batch_size: int) -> list[list[np.ndarray]]:
    """Returns `dealt[micro_step][rank]`, positions into `lengths`; each document exactly once.

    Longest first, the ranks in turn: documents of like length share a micro-batch, so little is padded, and all
    ranks of a micro-step carry like loads. Every rank gets the same number of micro-batches, and sizes differ by
    one at most.
    """
    order = np.argsort(-lengths, kind="stable")
    micro_steps = math.ceil(len(order) / (dp_size * micro_batch_size))
    parts = np.array_split(order, micro_steps * dp_size)  # sizes differ by one at most
    steps = [np.concatenate(parts[first : first + dp_size]) for first in range(0, len(parts), dp_size)]
    return [[step[rank::dp_size] for rank in range(dp_size)] for step in steps]


def pack_documents(lengths: np.ndarray, dp_size: int, row_tokens: int) -> list[list[np.ndarray]]:
    """Returns `dealt[micro_step][rank]` like `deal_documents`, for rows of at most `row_tokens` tokens, few and even.

    Longest first, each document into the emptiest row (Graham 1969, "Bounds on multiprocessing timing anomalies": at
    most 4/3 of the best longest row). If that overfills a row, tries again with one more row per rank. Rows of like
    length share a micro-step, in which ranks wait for each other.
    """
    order = np.argsort(-lengths, kind="stable")
    micro_steps = max(1, math.ceil(lengths.sum() / (dp_size * row_tokens)))
    while True:
        rows: list[list[int]] = [[] for _ in range(micro_steps * dp_size)]
        loads = [(0, row) for row in range(len(rows))]
        for position in order:
            load, row = loads[0]
            heapq.heapreplace(loads, (load + int(lengths[position]), row))
            rows[row].append(position)
        if max(loads)[0] <= row_tokens:
            break
        micro_steps += 1
    by_load = [np.array(rows[row], dtype=np.int64) for _, row in sorted(loads, reverse=True)]
    return [by_load[step * dp_size : (step + 1) * dp_size] for step in range(micro_steps)]


def audit(name: str, total: int, documents: Documents, batches: Sequence[np.ndarray], parallel: Parallel) -> str:
    """Returns a line on what encoding cut or dropped of `total` pairs, and how evenly `batches` deal the rest."""
    columns = documents.rows.with_format("numpy")
    cut, summaries_cut = np.asarray(columns["tokens_cut"][:]), np.asarray(columns["summary_cut"][:])
    loads = []  # tokens computed, padding included: a row per micro-step, a column per rank
    for batch in batches:
        lengths = documents.lengths[batch]
        for ranks in deal(lengths, parallel.dp_size, parallel.plan, documents.block_size):
            loads.append([executed_tokens(lengths[rank], parallel.plan, documents.block_size) for rank in ranks])
    loads, tokens = np.array(loads), documents.lengths.sum()
    waiting = loads.max(axis=1).sum() / loads.mean(axis=1).sum()  # all ranks wait for the busiest in each micro-step
    return (
        f"data      {name}: {len(documents):,} documents, {tokens:,} tokens (mean {tokens / len(documents):,.0f}); "
        f"{(cut > 0).sum():,} articles cut by {cut.sum():,} tokens; {summaries_cut.sum():,} summaries cut; "
        f"{total - len(documents):,} empty documents dropped; {1 - tokens / loads.sum():.1%} padding; longest rank "
        f"{waiting:.3f} of the mean"
    )


def executed_tokens(lengths: np.ndarray, plan: Plan, block_size: int) -> int:
    """Returns the tokens, padding included, of a micro-batch of documents of these lengths."""
    if plan.packing or not len(lengths):
        return int(lengths.sum())
    return len(lengths) * row_width(int(lengths.max()), block_size)


# ---- Data: batches ---------------------------------------------------------------------------------------------


def remaining_batches(
    documents: Documents, step: int, total_steps: int, config: Config, parallel: Parallel
) -> Iterator[GlobalBatch]:
    """Yields this rank's part of every global batch from `step` on, across epochs.

    The step alone determines where to begin; batches already consumed are not read again.
    """
    steps_per_epoch = math.ceil(len(documents) / config.batch_size)
    while step < total_steps:
        epoch, consumed = divmod(step, steps_per_epoch)
        batches = training_batches(len(documents), epoch, config)[consumed:][: total_steps - step]
        yield from data_loader(documents, batches, parallel)
        step += len(batches)


def data_loader(documents: Documents, batches: Sequence[np.ndarray], parallel: Parallel) -> DataLoader:
    """Returns a loader of this rank's `GlobalBatch` for each of `batches`.

    Made in this process: some milliseconds, while the device is still busy with the step before. A worker process
    would be forked beside a checkpoint's writing thread, and would need open files for every tensor it hands over.
    """
    batches_of_rank = GlobalBatches(documents, batches, parallel)
    return DataLoader(batches_of_rank, batch_size=None, pin_memory=parallel.device.type == "cuda")


@dataclass(frozen=True)
class GlobalBatch:
    """One rank's part of a global batch, with the counts of the whole of it.

    Each of `micro_batches` holds `input_ids` and `labels` (B, T) int64. Padded rows add `attention_mask` (B, T). Packed
    rows have B = 1 and add `position_ids` (1, T), restarting with every document, and `cu_seq_lens` (documents + 1)
    int32, where the documents begin and end. For the head, so that the device need not be asked where labels are:
    `predict_at` (N,) int64, the positions of the flattened rows that predict a label, and `targets` (N,), that label.
    """

    micro_batches: list[dict[str, torch.Tensor]]
    tokens: int
    label_tokens: int
    squared_lengths: int

    def pin_memory(self) -> GlobalBatch:
        pinned = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in self.micro_batches]
        return dataclasses.replace(self, micro_batches=pinned)


class GlobalBatches(torch.utils.data.Dataset):
    """Item i is this rank's part of the i-th of `batches`, each an array of document indices."""

    def __init__(self, documents: Documents, batches: Sequence[np.ndarray], parallel: Parallel):
        self.documents, self.batches = documents, batches
        self.rank, self.dp_size, self.plan = parallel.rank, parallel.dp_size, parallel.plan

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> GlobalBatch:
        batch = self.batches[index]
        lengths = self.documents.lengths[batch]
        dealt = deal(lengths, self.dp_size, self.plan, self.documents.block_size)
        return GlobalBatch(
            micro_batches=[with_targets(self.collate(batch[ranks[self.rank]])) for ranks in dealt],
            tokens=int(lengths.sum()),
            label_tokens=int(self.documents.label_counts[batch].sum()),
            squared_lengths=int((lengths**2).sum()),
        )

    def collate(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """Returns the documents as one micro-batch, padded or packed; with none, a short one that trains on nothing.

        Sharded forwards are collective, so a rank with nothing left still makes the call. Its row is attended to
        like any other, since a row without a single visible token gives NaN in some attention kernels.
        """
        if not len(indices):
            filler, length = [self.documents.tokenizer.eos_token_id] * PAD_MULTIPLE, [PAD_MULTIPLE]
            if self.plan.packing:
                return self.pack([filler], length)
            row = self.pad([filler], length)
            return dict(row, attention_mask=torch.ones_like(row["input_ids"]))
        rows = self.documents.rows[indices]
        unlabelled = rows["prompt_length"] if self.documents.loss_on == "summary" else [0] * len(indices)
        return (self.pack if self.plan.packing else self.pad)(rows["input_ids"], unlabelled)

    def pad(self, rows: list[list[int]], unlabelled: list[int]) -> dict[str, torch.Tensor]:
        """Returns rows side by side, padded to the longest; the first `unlabelled` tokens of each have no label."""
        input_ids = pad_rows(rows, self.documents.tokenizer, self.documents.block_size)
        labels = mask_pads(input_ids, self.documents.tokenizer)
        labels[torch.arange(input_ids.shape[1]) < torch.tensor(unlabelled)[:, None]] = IGNORE_INDEX
        attention_mask = create_mask(input_ids, self.documents.tokenizer)
        return dict(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    def pack(self, rows: list[list[int]], unlabelled: list[int]) -> dict[str, torch.Tensor]:
        """Returns rows end to end; the first token of each is predicted from nothing, so it has no label either."""
        position_ids = torch.cat([torch.arange(len(row)) for row in rows])
        input_ids = torch.cat([torch.as_tensor(row) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        without_label = position_ids < torch.tensor(unlabelled).clamp(min=1).repeat_interleave(lengths)
        return dict(
            input_ids=input_ids[None],
            position_ids=position_ids[None],
            labels=input_ids.masked_fill(without_label, IGNORE_INDEX)[None],
            cu_seq_lens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        )


def with_targets(micro_batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the micro-batch with `predict_at` and `targets`; one without labels gets one that is ignored."""
    next_labels = torch.nn.functional.pad(micro_batch["labels"], (0, 1), value=IGNORE_INDEX)[:, 1:].flatten()
    predict_at = (next_labels != IGNORE_INDEX).nonzero().flatten()
    if not len(predict_at):
        predict_at = torch.zeros(1, dtype=torch.long)
    return dict(micro_batch, predict_at=predict_at, targets=next_labels[predict_at])


def row_width(longest: int, block_size: int) -> int:
    """Returns the width of a micro-batch: its longest document, up to a multiple of 8 that stays in the block."""
    return max(longest, min(block_size, math.ceil(longest / PAD_MULTIPLE) * PAD_MULTIPLE))


def pad_rows(rows: list[list[int]], tokenizer: PreTrainedTokenizerBase, block_size: int) -> torch.Tensor:
    """Returns the rows as (B, T) int64, padded at their end."""
    pad_id = padding_id(tokenizer)
    padded = pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True, padding_value=pad_id)
    longest = padded.shape[1]
    return torch.nn.functional.pad(padded, (0, row_width(longest, block_size) - longest), value=pad_id)


# ----------------------------------------------------------------------------------------------------------------
# 7. Model
# ----------------------------------------------------------------------------------------------------------------

HEAD_CHUNK_TOKENS = 1024  # positions whose logits exist at the same time
COMPILE_SECONDS = 120.0  # estimate for compiling the layers: forward and backward, fixed and varying lengths
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")


def load_model(config: Config, parallel: Parallel) -> torch.nn.Module:
    """Returns the model in the plan's precision (fp32 as a rule) and parallel form. Every rank must call it.

    Downloaded once per node. Under FSDP and HSDP each rank reads its own shard from the files and never holds the
    whole. dtype is passed explicitly: Llama-2's checkpoint is half precision, and transformers' default would keep it,
    leaving no fp32 master weights.
    """
    plan = parallel.plan
    distributed_config = None
    if plan.dp_shard_size > 1:
        distributed_config = DistributedConfig(
            fsdp_size=plan.dp_shard_size,
            dp_replicate_size=plan.dp_replicate_size,
            fsdp_cpu_offload=plan.cpu_offload,
            fsdp_mixed_precision=plan.precision != "fp32",
        )
    if config.random_init:
        parallel.say("model     RANDOM WEIGHTS from the config alone (--random-init): good for benchmarks only")
        model = random_model(parallel.model_config, distributed_config, parallel.device, state_dtype(plan))
    else:
        model = pretrained_model(config, distributed_config, parallel)
    apply_plan(model, plan)
    use_token_loss(model)
    if plan.cpu_offload:
        keep_parameters_on_cpu(model)
    if plan.dp_shard_size > 1:
        limit_waiting(next(model.parameters()).device_mesh, parallel.timeout)
    return parallel.accelerator.prepare_model(model) if plan.strategy == "ddp" else model


def state_dtype(plan: Plan) -> torch.dtype:
    """Returns the dtype of weights, gradients and moments: fp32, except with --precision bf16-states."""
    return torch.bfloat16 if plan.precision == "bf16-states" else torch.float32


def apply_plan(model: PreTrainedModel, plan: Plan) -> None:
    """Sets which layers recompute their activations, and whether FSDP frees gathered weights between the passes."""
    if plan.activation_checkpointing != "none":
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if plan.activation_checkpointing.startswith("every-"):
        for index, layer in enumerate(model.model.layers):
            layer.gradient_checkpointing = plan.checkpoints_layer(index)
    if not plan.reshard_after_forward:
        model.set_reshard_after_forward(False)


def limit_waiting(mesh: DeviceMesh, timeout: timedelta) -> None:
    """Gives the groups of a mesh the run's own timeout; torch makes those of HSDP with its default of 30 minutes."""
    for dimension in range(mesh.ndim):
        dist.distributed_c10d._set_pg_timeout(timeout, mesh.get_group(dimension))


def pretrained_model(
    config: Config, distributed_config: DistributedConfig | None, parallel: Parallel
) -> PreTrainedModel:
    with agreed_by_all_ranks(), parallel.node_main_first():
        folder = model_folder(config.model_name_or_path, [*WEIGHT_FILES, "*.json"])
        if not any(folder.glob("*.safetensors")):
            raise UserError(
                f"--model-name-or-path {config.model_name_or_path} holds no safetensors weights; convert them, or "
                "use --random-init for a benchmark"
            )
    placement = {} if distributed_config else {"device_map": {"": parallel.device}}
    attention = attention_implementation(parallel.model_config)
    with agreed_by_all_ranks():
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=state_dtype(parallel.plan),
                attn_implementation=attention,
                distributed_config=distributed_config,
                output_loading_info=True,
                **placement,
            )
            if report["missing_keys"]:  # transformers would train on with these at random
                raise OSError(f"they lack {', '.join(sorted(report['missing_keys'])[:3])}")
        except (torch.OutOfMemoryError, torch.AcceleratorError, dist.DistError):
            raise
        except (SafetensorError, OSError, RuntimeError) as error:
            raise UserError(
                f"--model-name-or-path {config.model_name_or_path} holds weights that cannot be read, or are not those "
                f"of its config.json ({first_line(error)}); download the folder again"
            ) from error
    return model


def random_model(
    model_config: transformers.PretrainedConfig,
    distributed_config: DistributedConfig | None,
    device: torch.device,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """Returns a model with random weights, each rank's shard made in place; no whole model exists anywhere.

    Raises UserError for tied embeddings under FSDP, which wraps embedding and head apart before they are loaded.
    """
    if distributed_config is not None and model_config.get_text_config().tie_word_embeddings:
        raise UserError("--random-init under FSDP needs a model whose embeddings are not tied; use --parallelism ddp")
    with torch.device("meta"):
        attention = attention_implementation(model_config)
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, attn_implementation=attention)
    if distributed_config is not None:
        _, mesh = initialize_distributed_mesh(distributed_config)
        model = type(model).maybe_distribute_model(model, distributed_config, mesh)
    model.to_empty(device=device)
    model.initialize_weights()
    model.tie_weights()
    return model


def keep_parameters_on_cpu(model: PreTrainedModel) -> None:
    """Moves the shards to host memory, where FSDP2's offload policy wants them; buffers stay with the compute.

    There the optimizer computes, for which torchrun leaves each rank one thread.
    """
    buffers = dict(model.named_buffers())
    model.to("cpu")
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer)
    torch.cuda.empty_cache()  # of what the shards were loaded through
    torch.set_num_threads(max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def model_folder(name_or_path: str, patterns: Sequence[str]) -> Path:
    """Returns a local folder that holds the model's files of these patterns; downloads them if necessary."""
    shown = f"--model-name-or-path {name_or_path}"
    if os.path.isdir(name_or_path):
        return Path(name_or_path)
    if looks_like_a_path(name_or_path):
        raise UserError(f"{shown} is not a folder; give a Hub id, or a folder with config.json and safetensors weights")
    try:
        return Path(huggingface_hub.snapshot_download(name_or_path, allow_patterns=list(patterns)))
    except huggingface_hub.errors.GatedRepoError as error:
        raise UserError(
            f"{shown} is gated: ask for access at https://huggingface.co/{name_or_path}, then run `hf auth login` "
            "or set HF_TOKEN"
        ) from error
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{shown} is not on the Hub, or is private; check the name, and log in with `hf auth login`"
        ) from error
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise UserError(
            f"{shown} is neither a folder nor within reach on the Hub ({first_line(error)}); check the name and the "
            "network, or download it elsewhere and give its folder"
        ) from error


def read_model_shape(config: Config) -> tuple[transformers.PretrainedConfig, ModelShape]:
    """Returns the model's config and its sizes, from `config.json` alone."""
    folder = model_folder(config.model_name_or_path, ["config.json"])
    try:
        if not (folder / "config.json").is_file():
            raise OSError("config.json is missing")
        model_config = AutoConfig.from_pretrained(folder)
        return model_config, model_shape(model_config)
    except Exception as error:  # transformers raises all kinds of errors on a malformed config
        raise UserError(
            f"--model-name-or-path {config.model_name_or_path} holds no causal language model that loads "
            f"({first_line(error)}); give a folder with config.json and safetensors weights"
        ) from error


# ---- Model: attention ------------------------------------------------------------------------------------------


def attention_implementation(model_config: transformers.PretrainedConfig) -> str | None:
    """Returns the name of the attention to train with: `causal_attention` wherever the result is the same.

    Rows are padded at their end, so no real token can see a pad under a causal mask anyway. An attention that is
    registered without a mask function gets no mask: no B x T x T tensor, SDPA takes its flash kernel, and
    transformers does not ask the device whether there is padding, a host sync in every forward. Models with sliding
    windows need their masks and keep transformers' own choice (None).
    """
    if not attends_fully(model_config):
        return None
    AttentionInterface.register("causal_attention", causal_attention)
    return "causal_attention"


def causal_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens: torch.Tensor | None = None,
    max_length: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Returns the attention output (B, T, heads, d) of query (B, heads, T, d), key and value (B, kv heads, T, d).

    With `cu_seq_lens`, the bounds of the documents packed into the one row, no document sees another.
    """
    if cu_seq_lens is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    attend = varlen_flash_attention if query.device.type == "cuda" else document_attention
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return attend(query, key, value, cu_seq_lens, max_length, scaling)[None], None


def varlen_flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    """Returns causal attention inside each document; query (T, heads, d), key and value (T, kv heads, d), on CUDA.

    torch's own flash kernel, in half precision: autocast leaves query and key in fp32. torch 2.11 knows no grouped
    heads, so there they are repeated.
    """
    grouped = {}
    if (groups := query.shape[1] // key.shape[1]) > 1:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            grouped = {"enable_gqa": True}
        else:
            key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    query, key = query.to(value.dtype), key.to(value.dtype)
    return varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0), **grouped)


@torch.compiler.disable
def document_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    """The CPU counterpart of `varlen_flash_attention`: one causal SDPA per document."""
    outputs = []
    for start, end in itertools.pairwise(bounds.tolist()):
        one = (tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value))
        output = torch.nn.functional.scaled_dot_product_attention(*one, is_causal=True, scale=scale, enable_gqa=True)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


# ---- Model: loss -----------------------------------------------------------------------------------------------


def use_token_loss(model: PreTrainedModel) -> None:
    """Makes `model(..., predict_at=, targets=)` return the sum of token losses, without ever holding all logits.

    Calls without targets (generation) stay as they were. The head is still called as a module, so FSDP gathers it.
    Models that also scale, cap or bias their logits compute all of them.
    """
    plain_forward, head = model.forward, model.get_output_embeddings()
    plain_head, text_config = head.forward, model.config.get_text_config()
    names = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "logits_soft_cap")
    projects_only = head.bias is None and not any(getattr(text_config, name, None) for name in names)

    @functools.wraps(plain_forward)
    def forward(*arguments: Any, predict_at=None, targets=None, **inputs: Any) -> Any:
        if targets is None:
            return plain_forward(*arguments, **inputs)
        if not projects_only:
            logits = plain_forward(*arguments, **inputs).logits.flatten(0, 1).index_select(0, predict_at).float()
            return torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
        hidden = model.base_model(*arguments, **inputs).last_hidden_state
        return head(hidden.flatten(0, 1).index_select(0, predict_at), targets)

    @functools.wraps(plain_head)
    def head_forward(hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        return plain_head(hidden) if targets is None else summed_token_loss(hidden, head.weight, targets)

    model.forward, head.forward = forward, head_forward


def summed_token_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns the sum of cross-entropies in fp32 of hidden (N, h) times weight (V, h) against targets (N,).

    torch's linear_cross_entropy, where torch has it, computes logits and their gradient a chunk at a time. Its own sum
    in bf16 is wrong (torch 2.13), so the losses are summed here. Elsewhere chunks are recomputed in the backward pass.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions(
            batch_chunk_size=HEAD_CHUNK_TOKENS,
            chunking_method=None,
            # "balanced" makes the weight's gradient an fp32 matmul on CUDA: by its FLOPs, some 5% of a step of 13B
            acc_policy="compact" if device == "cuda" else "balanced",
            acc_dtype=torch.float32 if hidden.dtype == torch.bfloat16 else None,
        )
        with torch.autocast(device, enabled=False):
            losses = torch.nn.functional.linear_cross_entropy(
                hidden, weight, targets, reduction="none", ignore_index=IGNORE_INDEX, options=options
            )
        return losses.float().sum()
    total = torch.zeros((), device=hidden.device)
    for chunk, chunk_targets in zip(hidden.split(HEAD_CHUNK_TOKENS), targets.split(HEAD_CHUNK_TOKENS), strict=True):
        total = total + checkpoint(loss_of_chunk, chunk, weight, chunk_targets, use_reentrant=False)
    return total


def loss_of_chunk(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        logits = torch.nn.functional.linear(hidden, weight).float()
        return torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")


# ---- Model: compiling ------------------------------------------------------------------------------------------


def compile_layers(model: torch.nn.Module, config: Config, parallel: Parallel, steps: int) -> bool:
    """Compiles the decoder layers in place where the plan says so and it pays, and returns whether it did.

    Every rank must call it. One graph serves all layers; it takes lengths of any size after its first recompilation.
    `auto` weighs the time that the `steps` to come are predicted to gain against COMPILE_SECONDS; should compiling fail
    then, the layers run as they were.
    """
    if not parallel.plan.compiled:
        return False
    if config.compile == "auto":
        gained_seconds = parallel.choice.chosen.seconds["compute"] * (1 / EAGER_SPEED - 1) * steps
        if not has_triton() or gained_seconds <= COMPILE_SECONDS:
            gain = f"{steps} steps would gain {gained_seconds:.0f} s, and compiling takes up to {COMPILE_SECONDS:.0f} s"
            parallel.say(f"compile   no: {gain if has_triton() else 'Triton is not installed'}")
            return False
    # Layers that recompute and those that do not, one row and several, training and evaluation: 10 kinds of graph
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 16)
    torch._dynamo.config.suppress_errors = config.compile == "auto"  # where nobody asked for it, a warning will do
    for layer in parallel.accelerator.unwrap_model(model).model.layers:
        layer.compile(dynamic=True)
    return True


# ---- Model: optimizer ------------------------------------------------------------------------------------------


def build_optimizer(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
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


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW whose weights, gradients and moments are all bf16: 8 bytes per parameter instead of 16.

    Each step is computed in fp32 and rounded to bf16 up or down at random, with probabilities that make the mean
    exact, so that updates below half a bf16 ulp are not lost (Gupta et al. 2015, "Deep Learning with Limited Numerical
    Precision"; Zamirai et al. 2020, "Revisiting BFloat16 Training"). The second moment needs it too: at beta2 0.999 it
    moves by less than an ulp a step. Its fp32 temporaries are of one parameter at a time. `found_inf` skips an update,
    as in fused AdamW. Rounding is seeded with `rounding_seed`, the number of the step, rather than by a rank's own
    random state, so that replicas stay equal, also after resuming on other ranks.

    Weighed before writing it: torchao.optim rounds the weights like this, but moments to the nearest, cannot skip a
    step, and must be compiled; torch-optimi keeps what rounding loses in two more bytes per parameter; bitsandbytes
    shrinks the moments and leaves the weights to the nearest.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas=(0.9, 0.999), eps: float = 1e-8):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0))
        self.rounding_seed = 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        skip = getattr(self, "found_inf", None)
        generator = torch.Generator(self.param_groups[0]["params"][0].device).manual_seed(self.rounding_seed)
        self.rounding_seed += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, group, skip, generator)

    def update(
        self, parameter: torch.Tensor, group: dict[str, Any], skip: torch.Tensor | None, generator: torch.Generator
    ) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        tensors = [parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]]
        weight, gradient, first, second = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
        (beta1, beta2), lr = group["betas"], group["lr"]
        taken = 1.0 if skip is None else 1.0 - skip.to(weight.device)
        state["step"] += taken
        gradient = torch.where(taken > 0, gradient.float(), 0.0) if skip is not None else gradient.float()
        new_first = first.float().lerp(gradient, 1 - beta1)
        new_second = second.float() * beta2 + gradient.square() * (1 - beta2)
        corrected = (new_second / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        new_weight = weight.float() * (1 - lr * group["weight_decay"])
        new_weight -= lr / (1 - beta1 ** state["step"]) * new_first / corrected
        for old, new in ((weight, new_weight), (first, new_first), (second, new_second)):
            rounded = round_stochastically(new, generator)
            old.copy_(rounded if skip is None else torch.where(taken > 0, rounded, old))


def round_stochastically(tensor: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Returns an fp32 tensor as bf16, rounded away from zero with the probability that makes the mean exact.

    A bf16 number is the upper half of an fp32 one; a random number added to the lower half carries into the upper one
    just that often.
    """
    bits = tensor.view(torch.int32)
    bits = bits + torch.randint(0, 2**16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    return (bits & -(2**16)).view(torch.float32).to(torch.bfloat16)


# ----------------------------------------------------------------------------------------------------------------
# 8. Checkpoints
# ----------------------------------------------------------------------------------------------------------------

TORCHRUN_GRACE_SECONDS = 30.0  # torchrun's default delay between passing on a signal and SIGKILL
SAME_SIGNAL_SECONDS = 2.0  # Ctrl-C reaches a rank twice, from the terminal and from torchrun
CHECKPOINT_FILE_BYTES = GIB // 8  # per rank; safetensors builds a file in memory, holding the GIL
WRITING, DELETING = ".writing", ".deleting"
LOCK_WAIT_SECONDS = 90  # for a former run to finish the step and the save it is in


# ---- Checkpoints: the save folder ------------------------------------------------------------------------------


def prepare_save_folder(config: Config, parallel: Parallel) -> None:
    """Makes the save folder, checks that it is writable and shared, and locks it. Every rank must call it."""
    folder = Path(config.save_model_dir)
    with agreed_by_all_ranks():
        if parallel.is_main:
            for data in data_folders(config):
                if folder.resolve().is_relative_to(data.resolve()):
                    raise UserError(
                        f"--save-model-dir {folder} lies in --dataset-name-or-path {data}, where what the run writes "
                        "would be read as data; give another folder"
                    )
            if (folder / "checkpoints").is_file():
                raise UserError(f"--save-model-dir {folder}: {folder / 'checkpoints'} is a file; give another folder")
            try:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / ".writable").touch()
                (folder / ".writable").unlink()
            except OSError as error:
                raise UserError(
                    f"--save-model-dir {folder} cannot be written to ({error.strerror}); give a folder that can"
                ) from error
            if folder.resolve() == Path(config.model_name_or_path).resolve() and not (folder / "checkpoints").exists():
                raise UserError(f"--save-model-dir {folder} holds the model to train from; give another folder")
            hold_folder(folder, parallel)
            finish_interrupted_save(folder)
            (folder / ".shared").touch()
    with agreed_by_all_ranks():
        if not (folder / ".shared").exists():
            raise UserError(
                f"--save-model-dir {folder} is not shared: what rank 0 writes does not appear on every node; give a "
                "folder on a filesystem that all nodes share"
            )
    if parallel.is_main:
        (folder / ".shared").unlink()


def hold_folder(folder: Path, parallel: Parallel) -> None:
    """Locks the folder until this process ends; two runs would delete each other's checkpoints. Rank 0 only.

    Waits for a previous run that is about to end; raises UserError if it does not. A POSIX record lock, unlike
    filelock's: no child process inherits it, it ends with the process in any case, and it works on network disks.
    """
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    patience = min(LOCK_WAIT_SECONDS, 0.5 * parallel.timeout.total_seconds())  # the other ranks are waiting
    deadline, holder = time.monotonic() + patience, ""
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
            return
        except (BlockingIOError, PermissionError):
            if not holder:
                holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another run"
                parallel.say(f"waiting   for {holder} to leave {folder}")
        except OSError as error:
            parallel.say(f"WARNING   {folder} cannot be locked ({first_line(error)}); let no second run write to it")
            return
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


# ---- Checkpoints: stop signals ---------------------------------------------------------------------------------


class StopSignals:
    """Turns SIGTERM, SIGUSR1, Ctrl-C and a lost terminal into a stop that all ranks agree on; a second signal leaves
    at once.

    A context manager. Agreement is an all-reduce of one CPU integer over gloo: about 0.1 ms, no device sync.
    """

    HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

    def __init__(self, parallel: Parallel):
        self.parallel, self.group = parallel, parallel.cpu_group()
        self.signal_name, self.received_at = "", 0.0
        self.stopping = self.leaves_step = False  # what all ranks agreed on
        self.seconds_to_leave = 0.0  # what finishing the step and saving takes, as measured so far
        self.torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def __enter__(self) -> StopSignals:
        heard = [number for number in self.HANDLED if signal.getsignal(number) is not signal.SIG_IGN]  # under nohup
        self.previous = {number: signal.signal(number, self.receive) for number in heard}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: object) -> None:
        now = time.monotonic()
        escalation = self.signal_name == "SIGUSR1" and number == signal.SIGTERM  # Slurm warns, then ends the job
        if self.signal_name and now - self.received_at > SAME_SIGNAL_SECONDS and not escalation:
            os._exit(128 + number)
        if not self.signal_name or escalation:
            first, self.signal_name, self.received_at = not self.signal_name, signal.Signals(number).name, now
            if first and self.parallel.is_main:
                os.write(2, b"stopping  at the end of the step; a second signal leaves at once\n")

    def agreed(self) -> bool:
        """Returns whether any rank was asked to stop. Every rank must call it at the same point.

        A rank whose torchrun has died stops too: nothing else would end it, and it would block the next start.
        """
        if not self.stopping:
            if self.torchrun not in (None, os.getppid()) and not self.signal_name:
                self.signal_name = "the end of its torchrun"
            too_long = self.signal_name and self.seconds_to_leave > 0.8 * patience_seconds()
            mine = torch.tensor([bool(self.signal_name), bool(too_long)]).int()
            if self.group is not None:
                dist.all_reduce(mine, op=dist.ReduceOp.MAX, group=self.group)
            self.stopping, self.leaves_step = map(bool, mine.tolist())
            if self.leaves_step:
                self.parallel.say(
                    "stopping  the step under way is left unfinished: it and a save outlast torchrun's "
                    f"{patience_seconds():.0f} s"
                )
        return self.stopping

    def agreed_to_leave_step(self) -> bool:
        """Returns whether the step under way is to be abandoned: torchrun would not wait for it and a save."""
        return self.agreed() and self.leaves_step


def patience_seconds() -> float:
    """Returns the seconds between a signal and torchrun's SIGKILL; infinity without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return math.inf
    told = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT") if torch.__version__ >= "2.13" else None
    return float(told or TORCHRUN_GRACE_SECONDS)


# ---- Checkpoints: writing and resuming -------------------------------------------------------------------------


class Checkpoints:
    """Writes, finds, verifies and loads checkpoints. Made on every rank, and every rank must call each method.

    A context manager: a run that ends with an error of its own first finishes the save under way.

    `checkpoints/step-000500/` holds one or more safetensors files per rank, written by torch.distributed.checkpoint
    and readable on any number of ranks under any strategy, and `manifest.json`: where the run stood, and size and
    SHA-256 of every file. Nothing in it is ever unpickled. A checkpoint is written under another name, flushed, and
    renamed when it is complete, so a folder of that name is whole.
    """

    def __init__(self, config: Config, parallel: Parallel, curve: dict[str, Any], total_steps: int):
        self.config, self.parallel, self.curve, self.total_steps = config, parallel, curve, total_steps
        self.folder = Path(config.save_model_dir) / "checkpoints"
        self.group = parallel.cpu_group()  # separate: a background write must not mix with training's messages
        self.checkpoint_bytes = 3 * parallel.plan.state_bytes * parallel.shape.parameters  # weights and two moments
        self.asynchronous = self.decide_async()
        self.writer = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self.pending: concurrent.futures.Future | None = None
        self.saved_step = 0
        self.seconds = self.pause_seconds = 0.0  # of the last save: in all, and while training waited
        self.check_disk()
        self.check_host_memory()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type in LEFT_TOGETHER:
            self.wait()

    def decide_async(self) -> bool:
        """Returns whether checkpoints are written in the background, the same on every rank.

        This takes host memory for a copy of each rank's share.
        """
        copy_gib = self.checkpoint_bytes / GIB / self.parallel.plan.dp_shard_size * self.parallel.cluster.ranks_per_node
        free_gib = free_host_memory() / GIB
        on_host = self.parallel.device.type == "cpu" or self.parallel.plan.cpu_offload
        resident_gib = copy_gib * 4 / 3 if on_host else 0.0  # weights, moments and gradients, not allocated yet
        wanted = self.config.async_save
        usable = {"auto": 0.5, "yes": 0.9, "no": 0.0}[wanted] * max(0.0, free_gib - resident_gib)
        asynchronous = all(self.together(lambda: copy_gib <= usable))
        if wanted != "no" and not asynchronous:
            self.parallel.say(
                f"save      checkpoints are written with training held: a copy to write from takes {copy_gib:.1f} GiB "
                f"of host memory per node, and {usable:.1f} may be used for it"
            )
        return asynchronous

    def check_disk(self) -> None:
        """Raises UserError where `--keep-checkpoints` + 1 checkpoints and the final model will not fit."""
        with agreed_by_all_ranks():
            if self.parallel.is_main:
                present = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
                free = shutil.disk_usage(self.folder.parent).free + present
                kept = self.config.keep_checkpoints + 1
                final = self.parallel.shape.parameters * saved_dtype(self.config, self.parallel).itemsize
                if free < kept * self.checkpoint_bytes + final:
                    raise UserError(
                        f"--save-model-dir {self.folder.parent} has {free / GIB:.1f} GiB free, but {kept} checkpoints "
                        f"of {self.checkpoint_bytes / GIB:.1f} and the model of {final / GIB:.1f} need "
                        f"{(kept * self.checkpoint_bytes + final) / GIB:.1f}; free some, give another folder, or lower "
                        "--keep-checkpoints"
                    )

    def check_host_memory(self) -> None:
        """Raises UserError where a node's host memory cannot hold what the run will put there.

        That is the states under --cpu-offload, in each rank's share, and on rank 0 beside them the final model's
        weights while they are written.
        """
        plan, parameters, needs = self.parallel.plan, self.parallel.shape.parameters, {}
        if plan.cpu_offload:
            states_gib = host_gib(self.parallel.shape, self.parallel.cluster, plan)
            needs["weights, gradients and moments under --cpu-offload"] = states_gib * GIB
        if self.parallel.is_main and self.parallel.device.type == "cuda":
            needs["the final model, gathered"] = parameters * saved_dtype(self.config, self.parallel).itemsize
        free = free_host_memory()
        with agreed_by_all_ranks():
            if sum(needs.values()) > free:
                parts = " and ".join(f"{size / GIB:.1f} GiB for {what}" for what, size in needs.items())
                raise UserError(
                    f"node {platform.node()} has {free / GIB:.1f} GiB of host memory free, and the run will take "
                    f"{parts}; use a node with more, or a smaller model"
                )

    def together(self, act: Callable[[], Any], main_only: bool = False) -> list[Any]:
        """Returns what `act` returned on each rank (done on rank 0 alone if `main_only`).

        Where it failed on any rank, raises CheckpointError on all of them.
        """
        result = reason = None
        try:
            if self.parallel.is_main or not main_only:
                result = act()
        except dcp.CheckpointException as error:  # derives from BaseException; the same on every rank
            rank, (cause, _) = next(iter(error.failures.items()))
            reason = f"{first_line(cause)}, on rank {rank}"
        except Exception as error:
            reason = f"{first_line(error)}, on rank {self.parallel.rank}"
        everyones = [(result, reason)]
        if self.group is not None:
            everyones = [None] * dist.get_world_size()
            dist.all_gather_object(everyones, (result, reason), group=self.group)
        if reasons := [reason for _, reason in everyones if reason]:
            raise CheckpointError(reasons[0])
        return [result for result, _ in everyones]

    def save(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState) -> None:
        """Saves; in the background, training goes on as soon as the tensors are copied. One write at a time."""
        began = time.perf_counter()
        self.wait()
        if self.saved_step == state.step:  # saved already: the step after it was abandoned
            return
        tensors = checkpoint_tensors(model, optimizer, copy=self.asynchronous)
        tensors[f"rng.{self.parallel.rank}"] = torch.get_rng_state()
        if self.parallel.device.type == "cuda":
            tensors[f"rng.cuda.{self.parallel.rank}"] = torch.cuda.get_rng_state()
        facts = {
            **state.as_facts(),
            "curve": self.curve,
            "total_steps": self.total_steps,
            "save_seconds": self.seconds,
            "strategy": self.parallel.plan.strategy,
            "world_size": self.parallel.cluster.world_size,
        }
        self.pause_seconds = time.perf_counter() - began
        if self.asynchronous:
            self.pending = self.writer.submit(self.write, tensors, facts, began)
        else:
            self.write(tensors, facts, began)
            self.pause_seconds = time.perf_counter() - began

    def seconds_to_save(self) -> float:
        """Returns what the next save will take, as the last one did; twice that where one is still under way."""
        return self.seconds * (2 if self.pending is not None and not self.pending.done() else 1)

    def wait(self) -> None:
        """Waits for the write under way, if any. Raises its error, unless it was reported as a failed checkpoint."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()

    def write(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any], began: float) -> None:
        """Writes one checkpoint. A failure (a full disk, say) is reported; the old ones stay and the run goes on."""
        begin_thread_on(self.parallel.device)
        final = self.folder / f"step-{facts['step']:06d}"
        writing = final.with_name(final.name + WRITING)
        try:
            self.together(lambda: remake_folder(writing), main_only=True)
            storage = HuggingFaceStorageWriter(
                str(writing), file_of_each(tensors, self.parallel.cluster.world_size), save_distributed=True
            )
            if self.asynchronous:  # the tensors are in host memory; to copy ahead would wait for the training's stream
                storage.per_thread_copy_ahead = 0
            self.together(
                lambda: dcp.save(tensors, storage_writer=storage, process_group=self.group, no_dist=self.group is None)
            )
            mine = f"shard-{self.parallel.rank + 1:05d}-*"
            sums = self.together(lambda: {file.name: file_sum(file) for file in writing.glob(mine)})
            files = {name: value for rank_sums in sums for name, value in rank_sums.items()}
            self.together(lambda: self.complete(writing, final, facts, files), main_only=True)
            seconds = time.perf_counter() - began
            size_gib = sum(file["bytes"] for file in files.values()) / GIB
            self.parallel.say(
                f"saved     {final} ({size_gib:.2f} GiB) in {seconds:.1f} s"
                + (f", training held for {self.pause_seconds:.1f} s" if self.asynchronous else "")
            )
            if seconds > 0.8 * patience_seconds() >= self.seconds:
                self.warn_of_slow_saves(seconds)
            self.saved_step, self.seconds = facts["step"], seconds
        except CheckpointError as failure:
            self.parallel.say(
                f"WARNING   the checkpoint of step {facts['step']} could not be written ({failure}); the run goes on, "
                "what was saved before is kept, and the next save tries again"
            )
            if self.parallel.is_main:
                shutil.rmtree(writing, ignore_errors=True)

    def warn_of_slow_saves(self, seconds: float) -> None:
        self.parallel.say(
            f"WARNING   a save takes {seconds:.0f} s, and torchrun kills its ranks {patience_seconds():.0f} s "
            f"after a SIGTERM; with torch 2.13, TORCH_ELASTIC_SHUTDOWN_TIMEOUT={math.ceil(2 * seconds)} gives more"
        )

    def complete(self, writing: Path, final: Path, facts: dict[str, Any], files: dict[str, Any]) -> None:
        """Marks a written checkpoint complete, gives it its name, and deletes what is no longer kept. Rank 0."""
        manifest = {"facts": facts, "files": files}
        manifest["sha256"] = sum_of(manifest)
        (writing / "manifest.json").write_text(json.dumps(manifest, indent=1))
        sync_to_disk(writing / "manifest.json")
        sync_to_disk(writing)
        if final.exists():  # a damaged one, which this run has passed over
            discard(final)
        writing.rename(final)
        sync_to_disk(self.folder)
        found = self.complete_ones()
        here = found.index(final)  # newer ones are damaged, and were passed over
        for other in found[:here] + found[here + self.config.keep_checkpoints :]:
            try:
                discard(other)
            except OSError as error:  # the new one is whole all the same
                self.parallel.say(f"WARNING   {other} could not be deleted ({first_line(error)})")

    def clean_up(self) -> None:
        """Removes what an interrupted write or deletion left. Rank 0 only."""
        for leftover in [*self.folder.glob("*" + WRITING), *self.folder.glob("*" + DELETING)]:
            shutil.rmtree(leftover, ignore_errors=True)

    def resume(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> TrainingState:
        """Returns the state to go on from, model and optimizer loaded to match; a fresh one where there is none.

        Raises UserError where what `--resume` names cannot be resumed.
        """
        state, wanted = TrainingState.fresh(device), self.config.resume
        self.together(self.clean_up, main_only=True)
        found = self.together(self.complete_ones, main_only=True)[0]  # rank 0's list, should a network disk lag behind
        begins_elsewhere = wanted != "auto" and not found
        if wanted != "auto":
            self.check_path(Path(wanted), found)
        for folder in [Path(wanted)] if begins_elsewhere else found:
            try:
                facts = self.verify(folder)
            except CheckpointError as failure:
                if begins_elsewhere:
                    raise UserError(f"--resume {wanted} is not a whole checkpoint: {failure}; name another") from None
                self.parallel.say(f"WARNING   {folder} is damaged ({failure}); trying the one before it")
                continue
            self.check_curve(facts, folder)
            self.load(folder, facts, model, optimizer, state)
            self.parallel.say(
                f"resume    from {folder}, saved by {facts['world_size']} rank(s) under {facts['strategy']}"
                + (f"; it is the newest of this run, which began from {wanted}" if found and wanted != "auto" else "")
            )
            return state
        if found:  # and none is whole
            raise UserError(f"--resume auto found no whole checkpoint in {self.folder}; delete it to start anew")
        return state

    def check_path(self, checkpoint: Path, own: list[Path]) -> None:
        """Raises UserError where `--resume PATH` names no checkpoint, or one that this folder has left behind.

        `own` are the complete checkpoints of the save folder, newest first.
        """
        with agreed_by_all_ranks():
            inside_own_folder = checkpoint.resolve().parent == self.folder.resolve()
            if own and not inside_own_folder:
                return  # the run has begun from it, and goes on from its own newest
            if not checkpoint.is_dir():
                problem = "is not a folder" if checkpoint.exists() else "does not exist"
                raise UserError(f"--resume {checkpoint} {problem}; give auto, or a checkpoint's folder")
            if inside := complete_checkpoints(checkpoint) or complete_checkpoints(checkpoint / "checkpoints"):
                raise UserError(
                    f"--resume {checkpoint} holds checkpoints but is none; name one, such as {inside[0]}, or leave "
                    "--resume out to go on from the newest in --save-model-dir"
                )
            later = [str(each) for each in itertools.takewhile(lambda each: not each.samefile(checkpoint), own)]
            if later:
                raise UserError(
                    f"--resume {checkpoint} is not the newest checkpoint of {self.folder}; to go back to it, delete "
                    f"{' and '.join(later)}"
                )

    def complete_ones(self) -> list[Path]:
        """Returns the folders of complete checkpoints, newest first."""
        return complete_checkpoints(self.folder)

    def verify(self, folder: Path) -> dict[str, Any]:
        """Checks every byte of a checkpoint, the reading shared among the ranks, and returns its facts.

        Raises CheckpointError, naming the file, on every rank alike.
        """
        return self.together(lambda: self.verify_share(folder))[0]

    def verify_share(self, folder: Path) -> dict[str, Any]:
        """Returns the facts, having checked the manifest and every n-th file of n ranks."""
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            signature = manifest.pop("sha256")
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"manifest.json is missing or unreadable ({first_line(error)})") from None
        if signature != sum_of(manifest):
            raise CheckpointError("manifest.json was changed after it was written")
        for name in sorted(manifest["files"])[self.parallel.rank :: self.parallel.cluster.world_size]:
            path, expected = folder / name, manifest["files"][name]
            if not path.is_file():
                raise CheckpointError(f"{name} is missing")
            if path.stat().st_size != expected["bytes"]:
                raise CheckpointError(f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}")
            if file_sum(path) != expected:
                raise CheckpointError(f"{name} is corrupt: its SHA-256 differs from the manifest's")
        return manifest["facts"]

    def check_curve(self, facts: dict[str, Any], folder: Path) -> None:
        """Raises UserError if these flags would not continue the checkpoint's curve. More steps are allowed."""
        saved = facts["curve"]
        changed = [name for name, value in self.curve.items() if saved.get(name) != value]
        if {"block_size", "loss_on", "model_name_or_path"} & set(changed):  # these change the tokens or labels too
            changed = [name for name in changed if name != "dataset_name_or_path"]
        remedy = "set it back, give another --save-model-dir, or add --resume-anyway"
        problems = [
            f"{flag_name(name)} is now {self.curve[name]}, but {folder} was trained with {saved.get(name)}; {remedy}"
            for name in changed
        ]
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
        self,
        folder: Path,
        facts: dict[str, Any],
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        state: TrainingState,
    ) -> None:
        reader = HuggingFaceStorageReader(str(folder))
        tensors = checkpoint_tensors(model, optimizer, copy=False)
        stored = reader.read_metadata().state_dict_metadata
        rng, cuda_rng = f"rng.{self.parallel.rank}", f"rng.cuda.{self.parallel.rank}"
        for name in {rng, cuda_rng} & stored.keys():  # a rank that the saving run had too
            tensors[name] = torch.empty(stored[name].size, dtype=torch.uint8)
        dcp.load(tensors, storage_reader=reader, process_group=self.group, no_dist=self.group is None)
        restore_tensors(model, optimizer, tensors)
        if rng in tensors:
            torch.set_rng_state(tensors[rng])
        if cuda_rng in tensors and self.parallel.device.type == "cuda":
            torch.cuda.set_rng_state(tensors[cuda_rng])
        state.restore(facts)
        self.seconds = facts["save_seconds"]
        self.saved_step = state.step if folder.resolve().parent == self.folder.resolve() else 0


class CheckpointError(Exception):
    """A checkpoint could not be written, or is not whole: the reason, the same on every rank."""


def curve_settings(config: Config, parallel: Parallel, documents: Documents) -> dict[str, Any]:
    """Returns what decides the losses of a run, by flag name. Parallelism is left out: it changes no loss."""
    names = (
        "seed", "batch_size", "block_size", "loss_on", "lr", "lr_scheduler", "warmup_ratio", "weight_decay",
        "max_grad_norm", "random_init",
    )  # fmt: skip
    settings = {name: getattr(config, name) for name in names}
    settings["precision"] = parallel.plan.precision
    tokens = hashlib.sha256(documents.label_counts.tobytes() if config.loss_on == "summary" else b"")
    for chunk in documents.rows.data.column("input_ids").chunks:
        tokens.update(chunk.flatten().to_numpy())
    settings["dataset_name_or_path"] = f"{len(documents)} training documents with fingerprint {tokens.hexdigest()[:12]}"
    incidental = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    model = {name: value for name, value in parallel.model_config.to_diff_dict().items() if name not in incidental}
    shape = f"a model of {parallel.shape.parameters} parameters"
    settings["model_name_or_path"] = f"{shape} with fingerprint {sum_of(model)[:12]}"
    return settings


def begin_thread_on(device: torch.device) -> None:
    """Makes `device` the current one of this thread, which begins on GPU 0, the plain "cuda" of a lone process."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def free_host_memory() -> int:
    """Returns the bytes this process may still take: the node's, or what the job's cgroup (Slurm, a container) leaves.

    https://docs.kernel.org/admin-guide/cgroup-v2.html: every group above has a limit too; a file cache is given back.
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


# ---- Checkpoints: tensors and files ----------------------------------------------------------------------------


def checkpoint_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer, copy: bool) -> dict[str, torch.Tensor]:
    """Returns this rank's share of weights and moments by name, as DTensors where they are sharded.

    copy: in host memory, safe from the training that goes on. Scalars get one dimension, which safetensors wants.
    """
    options = StateDictOptions(flatten_optimizer_state_dict=True, cpu_offload=copy)
    weights, moments = get_state_dict(model, optimizer, options=options)
    tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in moments.items() if isinstance(tensor, torch.Tensor)}
    tensors = {name: tensor.reshape(1) if tensor.ndim == 0 else tensor for name, tensor in tensors.items()}
    on_cpu = next(model.parameters()).device.type == "cpu"  # there, cpu_offload has copied nothing
    if copy and on_cpu:
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}
    return with_own_storage(tensors)


def with_own_storage(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the tensors, copying each that shares storage with an earlier one (tied weights): safetensors refuses
    those."""
    seen, owned = set(), {}
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        place = (local.device, local.untyped_storage().data_ptr())
        owned[name] = tensor.detach().clone() if place in seen and local.numel() else tensor
        seen.add(place)
    return owned


def restore_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Puts what `checkpoint_tensors` named back into model and optimizer. Hyperparameters stay those of the flags."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    weights = {name: tensors[f"model.{name}"] for name in weights}
    for name, value in moments.items():
        if isinstance(value, torch.Tensor):
            moments[name] = tensors[f"optimizer.{name}"].reshape(value.shape)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options)


def file_of_each(tensors: dict[str, torch.Tensor], ranks: int) -> dict[str, int]:
    """Returns the number of the file each tensor of any rank goes to, so that files stay near CHECKPOINT_FILE_BYTES."""
    numbers = {f"rng.{device}{rank}": 1 for rank in range(ranks) for device in ("", "cuda.")}
    number, filled = 1, 0
    for name, tensor in sorted(tensors.items()):
        if name not in numbers:
            numbers[name] = number
            filled += tensor.numel() * tensor.element_size() // ranks
            if filled > CHECKPOINT_FILE_BYTES:
                number, filled = number + 1, 0
    return numbers


def file_sum(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(16 * 2**20):
            digest.update(chunk)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def sum_of(value: dict[str, Any]) -> str:
    """Returns the SHA-256 of what JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def remake_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def complete_checkpoints(folder: Path) -> list[Path]:
    """Returns the folders of the complete checkpoints in a folder, newest first."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit() and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def discard(folder: Path) -> None:
    """Deletes a checkpoint, by another name first: a half-deleted one is never taken for a whole one."""
    leaving = folder.with_name(folder.name + DELETING)
    shutil.rmtree(leaving, ignore_errors=True)
    folder.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------------
# 9. The final model
# ----------------------------------------------------------------------------------------------------------------

STAGING, STAGED, MOVING = ".final-model.writing", ".final-model.complete", ".final-model.moving"


def save_model(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, config: Config, parallel: Parallel) -> None:
    """Writes model and tokenizer in Hugging Face format into the save folder. Every rank must call it.

    Everything is written and flushed beside its place, marked complete by a rename, then moved in, `config.json`
    last: without it no loader takes the folder for a model. A crash at any moment leaves the former model, no
    model, or the complete new one that `finish_interrupted_save` moves in at the next start.
    """
    model = parallel.accelerator.unwrap_model(model)
    weights = gather_weights(model, saved_dtype(config, parallel), parallel)
    if parallel.is_main:
        folder = Path(config.save_model_dir)
        shutil.rmtree(folder / STAGING, ignore_errors=True)
        write_model(model, weights, tokenizer, folder / STAGING)
        shutil.rmtree(folder / STAGED, ignore_errors=True)
        (folder / STAGING).rename(folder / STAGED)
        sync_to_disk(folder)
        finish_interrupted_save(folder)
    parallel.wait_for_everyone()


def saved_dtype(config: Config, parallel: Parallel) -> torch.dtype:
    chosen = parallel.plan.precision if config.save_dtype == "auto" else config.save_dtype
    return torch.float32 if chosen == "fp32" else torch.bfloat16


def gather_weights(model: PreTrainedModel, dtype: torch.dtype, parallel: Parallel) -> dict[str, torch.Tensor]:
    """Returns the full weights on rank 0, in host memory, and nothing on the others. Every rank must call it.

    One tensor at a time: a device holds its own share and a single whole matrix, never the model.
    """
    weights = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if parallel.is_main:
            weights[name] = whole.detach().to("cpu", dtype if whole.is_floating_point() else whole.dtype)
    return weights


def write_model(
    model: PreTrainedModel, weights: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Writes a model folder that `from_pretrained` loads in one plain process, and flushes it to disk.

    It is written through a shell on the meta device, because the parallel model would gather its fp32 weights again.
    """
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(model.config, dtype=next(iter(weights.values())).dtype)
    shell.config.distributed_config = None
    pad_id = padding_id(tokenizer)
    shell.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=pad_id
    )
    shell.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    sentencepiece = Path(str(tokenizer.name_or_path)) / "tokenizer.model"
    if sentencepiece.is_file() and not (folder / sentencepiece.name).exists():  # what llama.cpp's converter looks for
        shutil.copyfile(sentencepiece, folder / sentencepiece.name)
    readable = (folder / "config.json").stat().st_mode
    for file in folder.iterdir():
        file.chmod(readable)  # safetensors makes its files readable by their owner alone
        sync_to_disk(file)
    sync_to_disk(folder)


def finish_interrupted_save(folder: Path) -> None:
    """Moves a complete staged model into its place, if there is one. May be interrupted and repeated at any point."""
    staged, moving = folder / STAGED, folder / MOVING
    if staged.is_dir():  # nothing has moved yet, so these are all the names of the new model
        new = {file.name for file in staged.iterdir()}
        (folder / "config.json").unlink(missing_ok=True)
        for old in folder.glob("model*.safetensors*"):
            if old.name not in new:
                old.unlink()
        staged.rename(moving)
    if moving.is_dir():
        for file in sorted(moving.iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(folder / file.name)
        sync_to_disk(folder)
        moving.rmdir()


# ---- The final model: its card, and the Hub --------------------------------------------------------------------


def write_model_card(config: Config, parallel: Parallel, state: TrainingState, log: RunLog) -> None:
    """Writes `README.md` into the save folder: what was trained, how, on what, and how well. Rank 0 writes.

    A run that had no steps left to take keeps the card that is there.
    """
    folder = Path(config.save_model_dir)
    if not parallel.is_main or (log.steps_of_this_run == 0 and (folder / "README.md").exists()):
        return
    data = huggingface_hub.ModelCardData(
        language="en",
        license="llama2" if re.search("llama-?2", config.model_name_or_path, re.IGNORECASE) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["summarization", "full-fine-tuning"],
        base_model=None if is_local(config.model_name_or_path) else config.model_name_or_path,
        datasets=[name for name in config.dataset_paths if not is_local(name)] or None,
    )
    written = folder / ".README.md"
    try:
        text = card_text(config, parallel, state, log)
        huggingface_hub.ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(written)
        written.replace(folder / "README.md")
    except (OSError, ValueError) as error:  # a full disk must not end a run whose model is saved
        parallel.say(f"WARNING   the model card could not be written ({first_line(error)})")


def card_text(config: Config, parallel: Parallel, state: TrainingState, log: RunLog) -> str:
    """Returns the body of the model card, in Markdown, with results from the log files, earlier runs included."""
    folder = Path(config.save_model_dir)
    changed = {name: " ".join(values) or "True" for name, values in changed_flags(config).items()}
    changed.pop("--save-model-dir", None)
    lines, samples = read_lines(folder / METRICS_FILE), read_lines(folder / SAMPLES_FILE)
    trained = next((line for line in reversed(lines) if "loss" in line), {})
    evaluated = next((line for line in reversed(lines) if "eval_loss" in line), {})
    results = {"optimizer steps": state.step, "tokens": f"{state.tokens:,}", "training loss": trained.get("loss")}
    results |= {name.replace("eval_", "validation "): value for name, value in evaluated.items() if name != "step"}
    samples = [sample for sample in samples if sample["step"] == evaluated.get("step")][:SHOWN_SAMPLES]
    parts = [
        f"# {Path(config.model_name_or_path).name} fine-tuned for summarisation",
        f"All weights of `{config.model_name_or_path}` were trained on `{' '.join(config.dataset_paths)}` with "
        f"`{Path(__file__).name}`. Prompt: `{PROMPT_OPEN}` + article + `{PROMPT_CLOSE.strip()}` + newline; the summary "
        "ends with the end-of-sequence token.",
        "## Results\n\n| | |\n| --- | --- |\n"
        + "\n".join(
            f"| {name} | {value:.4f} |" if isinstance(value, float) else f"| {name} | {value} |"
            for name, value in results.items()
        ),
        "![curves](curves.png)" if (folder / "curves.png").exists() else "",
        f"## Training\n\n```bash\n{command_of(config, parallel)}\n```",
        "| flag | value |\n| --- | --- |\n" + "\n".join(f"| `{name}` | `{value}` |" for name, value in changed.items()),
        f"Plan: {parallel.plan.describe()} on {parallel.cluster.world_size} x {parallel.cluster.device_name}.",
        f"```\n{describe_check(log.checked)}\n```" if log.checked else "",
        "## Samples" if samples else "",
        *(f"**Reference.** {sample['reference']}\n\n**Summary.** {sample['summary']}" for sample in samples),
        "## Licence\n\nLlama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. "
        "All Rights Reserved. Where the base model is Llama 2, this model is a derivative of it, and its use is bound "
        "by that licence and its acceptable use policy.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def command_of(config: Config, parallel: Parallel) -> str:
    """Returns the command of this run, to be pasted into a shell, on every node; HOST is one of them."""
    nodes, ranks, words = parallel.cluster.nodes, parallel.cluster.ranks_per_node, [Path(__file__).name]
    for name, values in changed_flags(config).items():
        words += [name, *values]
    launcher = ["torchrun", "--standalone", f"--nproc_per_node={ranks}"] if nodes * ranks > 1 else ["python"]
    if nodes > 1:
        launcher[1:2] = [f"--nnodes={nodes}", "--rdzv_backend=c10d", "--rdzv_endpoint=HOST:29500"]
    return shlex.join([*launcher, *words])


def changed_flags(config: Config) -> dict[str, list[str]]:
    """Returns the flags that differ from their defaults, each with the words that follow it on a command line."""
    changed = {}
    for name, field in FLAGS.items():
        value = getattr(config, name)
        if value != field.default:
            values = value if isinstance(value, tuple) else () if value is True else (value,)
            changed[flag_name(name)] = list(map(str, values))
    return changed


# ----------------------------------------------------------------------------------------------------------------
# 10. Reporting
# ----------------------------------------------------------------------------------------------------------------

SHOWN_SAMPLES = 3  # summaries beside their references in the log, the trackers and the model card


class RunLog:
    """Progress bar, console lines, `metrics.jsonl` and trackers. Made on every rank; rank 0 speaks and writes."""

    def __init__(
        self,
        config: Config,
        parallel: Parallel,
        state: TrainingState,
        total_steps: int,
        steps_per_epoch: int,
        resolved: dict[str, Any],
    ):
        self.config, self.parallel, self.resolved = config, parallel, resolved
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.started = self.first_step_ended = time.perf_counter()
        self.begin_interval()
        self.training_seconds, self.training_tokens, self.step_seconds = 0.0, 0, 0.0
        self.last_loss, self.last_evaluation = math.nan, None
        self.steps_of_this_run, self.checked, self.earlier_peak_gib = 0, None, 0.0
        self.folder = Path(config.save_model_dir)
        self.bar = tqdm(
            total=total_steps, initial=state.step, desc="training", unit="step", disable=not shows_bars(parallel)
        )
        if parallel.is_main:
            metrics, samples = (self.folder / name for name in LOG_FILES)
            self.metrics = continue_lines(metrics, state).open("ab", buffering=0)
            if samples.exists():
                continue_lines(samples, state)
            self.unwritten = b""
            self.write_config()
        if config.report_to != "none":
            settings = {**dataclasses.asdict(config), "plan": parallel.plan.describe()}
            parallel.accelerator.init_trackers(
                "train_llama2",
                {name: str(value) for name, value in settings.items()},
                init_kwargs={  # a resumed run goes on in its own curves, without the steps it takes again
                    "wandb": {"id": state.run_id, "resume": "allow"},
                    "tensorboard": {"purge_step": state.step + 1},
                },
            )

    def step(self, state: TrainingState, result: StepResult) -> None:
        """Counts a step; every `--log-interval` steps, and at the last one, waits for the device and reports."""
        self.bar.update()
        self.steps_of_this_run += 1
        self.interval_steps += 1
        self.interval_tokens += result.tokens
        self.interval_squares += result.squared_lengths
        self.check_plan(result)
        if state.step % self.config.log_interval and state.step != self.total_steps:
            if self.steps_of_this_run == 1:
                self.begin_interval()  # the first step allocates and compiles: it would spoil rate and time left
            return
        loss, grad_norm, skipped = torch.stack([result.loss, result.grad_norm, state.skipped]).tolist()
        seconds = time.perf_counter() - self.interval_started
        peak = peak_flops(self.parallel.cluster, self.parallel.plan.precision)
        flops = training_flops(self.parallel.shape, self.interval_tokens, self.interval_squares)
        line = dict(
            step=state.step,
            epoch=state.step / self.steps_per_epoch,
            loss=loss,
            lr=result.lr,
            grad_norm=grad_norm,
            tokens=state.tokens,
            tokens_per_second=self.interval_tokens / seconds,
            step_seconds=seconds / self.interval_steps,
            mfu=flops / seconds / self.parallel.cluster.world_size / peak if peak else None,
            data_wait_share=self.interval_waited / seconds,
            peak_memory_gib=max(self.earlier_peak_gib, peak_memory_gib(self.parallel.device)),
            skipped_steps=int(skipped),
        )
        self.write(line)
        left = (self.total_steps - state.step) * line["step_seconds"]
        self.bar.set_postfix(
            loss=f"{loss:.4f}", lr=f"{result.lr:.2e}", tokens_per_s=f"{line['tokens_per_second']:,.0f}"
        )
        self.parallel.say(
            f"step {state.step}/{self.total_steps}  loss {loss:.4f}  lr {result.lr:.2e}  grad norm {grad_norm:.3f}  "
            f"{line['tokens_per_second']:,.0f} tokens/s"
            + (f"  MFU {line['mfu']:.1%}" if peak else "")
            + f"  {timedelta(seconds=round(left))} left"
            + (f"  {int(skipped)} updates skipped (not finite)" if skipped else "")
        )
        self.training_seconds += seconds
        self.training_tokens += self.interval_tokens
        self.step_seconds, self.last_loss = line["step_seconds"], loss
        self.begin_interval()

    def begin_interval(self) -> None:
        self.interval_steps = self.interval_tokens = self.interval_squares = 0
        self.interval_waited, self.interval_started = 0.0, time.perf_counter()

    def check_plan(self, result: StepResult) -> None:
        """After the second step of this run, prints and keeps predicted against measured. Waits for the device twice.

        The prediction is repeated for that step's own documents, as the plan's assumes full blocks.
        """
        if self.steps_of_this_run > 2 or not self.parallel.is_main or self.parallel.choice is None:
            return
        on_gpu = self.parallel.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
        if self.steps_of_this_run == 1:
            if on_gpu:  # the peaks before are of loading and evaluating
                self.earlier_peak_gib = peak_memory_gib(self.parallel.device)
                torch.cuda.reset_peak_memory_stats()
            self.first_step_ended = time.perf_counter()
            return
        seconds = time.perf_counter() - self.first_step_ended
        self.checked = check_of_plan(self.parallel, result, seconds, self.resolved["compiled"])
        self.parallel.say(describe_check(self.checked))
        self.write_config()
        if self.config.report_to != "none":
            told = {f"plan/{name}_{kind}": value[kind] for name, value in self.checked.items() for kind in value}
            self.parallel.accelerator.log({name: value for name, value in told.items() if isinstance(value, float)})

    def seconds_per_step(self) -> float:
        """Returns the seconds of a step as last reported; until then of the steps so far."""
        so_far = (time.perf_counter() - self.interval_started) / max(1, self.interval_steps)
        return self.step_seconds or so_far

    def write_config(self) -> None:
        description = run_description(self.config, self.parallel, self.resolved, self.checked)
        written = self.folder / "train_config.json.new"
        try:
            written.write_text(json.dumps(description, indent=2))
            written.replace(self.folder / "train_config.json")
        except OSError as error:  # a full disk must not end the run
            self.parallel.say(f"WARNING   train_config.json could not be written ({first_line(error)})")

    def evaluation_due(self, state: TrainingState) -> bool:
        """Returns whether this step is one to evaluate at and has not been yet, the same on every rank."""
        due = state.step == self.total_steps or state.step % self.config.eval_interval == 0
        return due and state.step > state.evaluated_step

    def evaluation(self, state: TrainingState, evaluation: Evaluation | None) -> None:
        """Reports an evaluation, and draws the curves anew; None is one that a stop interrupted."""
        if evaluation is None:
            return
        state.evaluated_step, self.last_evaluation = state.step, evaluation
        perplexity = math.exp(evaluation.loss) if evaluation.loss < 700 else math.inf
        line = dict(step=state.step, eval_loss=evaluation.loss, eval_perplexity=perplexity, **evaluation.rouge)
        self.write(line)
        rouge = "".join(f"  {name} {score:.2f}" for name, score in evaluation.rouge.items())
        at = f"step {state.step}/{self.total_steps}"
        self.parallel.say(f"{at}  eval loss {evaluation.loss:.4f}  perplexity {perplexity:.2f}{rouge}")
        for sample in evaluation.samples[:SHOWN_SAMPLES]:
            self.parallel.say(f"{at}  reference  {' '.join(sample.reference.split())}")
            self.parallel.say(f"{at}  summary    {' '.join(sample.summary.split())}")
        self.write_samples(state.step, evaluation.samples)
        if self.parallel.is_main:
            try:
                draw_curves(self.folder)
            except Exception as error:  # a picture must not end the run
                self.parallel.say(f"WARNING   curves.png could not be drawn ({first_line(error)})")

    def write_samples(self, step: int, samples: list[Sample]) -> None:
        """Appends summaries to `samples.jsonl` and shows them in trackers that take text."""
        if not samples or not self.parallel.is_main:
            return
        path = self.folder / SAMPLES_FILE
        lines = [json.dumps(dict(step=step, **dataclasses.asdict(sample))) + "\n" for sample in samples]
        try:
            with path.open("a") as stream:
                stream.writelines(lines)
        except OSError as error:  # a full disk must not end the run
            self.parallel.say(f"WARNING   {path} could not be written ({first_line(error)})")
        rows = [[sample.reference, sample.summary] for sample in samples[:SHOWN_SAMPLES]]
        for tracker in self.parallel.accelerator.trackers:
            if tracker.name == "wandb":
                tracker.log_table("samples", columns=["reference", "summary"], data=rows, step=step)
            elif tracker.name == "tensorboard":
                text = "\n\n".join(f"**reference** {reference}\n\n**summary** {summary}" for reference, summary in rows)
                tracker.writer.add_text("samples", text, step)

    def timing_the_wait(self, batches: Iterator[GlobalBatch]) -> Iterator[GlobalBatch]:
        """Yields the batches, and counts how long training waits for each of them."""
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.interval_waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Leaves the body (an evaluation, a save) out of the step time and the throughput."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self.interval_started, self.first_step_ended = self.interval_started + seconds, self.first_step_ended + seconds

    def write(self, line: dict[str, Any]) -> None:
        if self.parallel.is_main:
            finite = {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in line.items()
            }
            self.unwritten += json.dumps(finite).encode() + b"\n"
            try:
                while self.unwritten:
                    self.unwritten = self.unwritten[self.metrics.write(self.unwritten) :]
            except OSError as error:  # a full disk must not end the run
                self.parallel.say(
                    f"WARNING   metrics.jsonl could not be written ({first_line(error)}); kept for the next line"
                )
        if self.config.report_to != "none":
            values = {name: value for name, value in line.items() if name != "step" and value is not None}
            self.parallel.accelerator.log(values, step=line["step"])

    def sync(self) -> None:
        """Flushes `metrics.jsonl` to disk: a checkpoint must not outlive the lines of its steps."""
        if self.parallel.is_main:
            with contextlib.suppress(OSError):  # a full disk was told when writing
                os.fsync(self.metrics.fileno())

    def stopped(self, state: TrainingState, signal_name: str, saved: bool) -> None:
        self.bar.close()
        if saved:
            outcome = "the checkpoint is saved, and the same command goes on from it"
        else:
            outcome = "its checkpoint could NOT be saved; the same command goes on from the newest that was"
        words = f"stopped   by {signal_name or 'a signal to another rank'} after step {state.step}; {outcome}"
        self.parallel.say(words, always=True)

    def summary(self, state: TrainingState) -> None:
        self.bar.close()
        if not self.training_tokens:
            words = f"done      already at step {state.step}; the model in {self.folder} was written again"
            return self.parallel.say(words, always=True)
        rate = self.training_tokens / self.training_seconds
        eval_loss = f", eval loss {self.last_evaluation.loss:.4f}" if self.last_evaluation else ""
        self.parallel.say(
            f"done      {state.step} steps, {state.tokens:,} tokens, the last {self.steps_of_this_run} of them in "
            f"{timedelta(seconds=round(time.perf_counter() - self.started))} ({rate:,.0f} tokens/s in training); "
            f"loss {self.last_loss:.4f}{eval_loss}; {int(state.skipped.item())} updates skipped; model in "
            f"{self.folder}",
            always=True,
        )


def shows_bars(parallel: Parallel) -> bool:
    return parallel.is_main and sys.stderr.isatty() and not parallel.quiet


def peak_flops(cluster: Cluster, precision: str) -> float | None:
    """Returns the dense bf16 peak of one device in FLOP/s; None for fp32, and for a device the table does not know."""
    known = cluster.has_gpu and cluster.sources.get("peak") == "table"
    return cluster.flops_per_second(precision) if known and precision != "fp32" else None


def peak_memory_gib(device: torch.device) -> float:
    """Returns the peak so far of this rank: allocated device memory, or resident host memory on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    # Linux starts getrusage's peak at that of the process which started this one, so its own account goes first.
    account = Path("/proc/self/status")
    if account.exists() and (own := re.search(r"^VmHWM:\s*(\d+) kB", account.read_text(), re.M)):
        return int(own[1]) * 1024 / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


# ---- Reporting: files ------------------------------------------------------------------------------------------


def continue_lines(path: Path, state: TrainingState) -> Path:
    """Drops from `path` the lines that a run resumed at `state` will write again; returns `path`. Atomic.

    If the run starts from nothing, because the folder has lost its checkpoints, all former lines are put aside.
    """
    if state.step == 0 and path.exists() and path.stat().st_size:
        former = (path.with_name(f"{path.stem}.previous-{number}.jsonl") for number in itertools.count(1))
        path.replace(next(name for name in former if not name.exists()))
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # a line that a kill cut short
            record = json.loads(line)
            if record["step"] <= (state.step if "loss" in record else state.evaluated_step):
                kept.append(line + "\n")
    shortened = path.with_name(path.name + ".new")
    shortened.write_text("".join(kept))
    sync_to_disk(shortened)
    shortened.replace(path)
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def draw_curves(folder: Path) -> None:
    """Draws `curves.png` from `metrics.jsonl` where matplotlib, an optional extra, is installed. Rank 0."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    lines = read_lines(folder / METRICS_FILE)
    steps, evaluations = ([line for line in lines if name in line] for name in ("loss", "eval_loss"))
    if not steps:
        return
    figure = Figure(figsize=(11, 7))
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.08, top=0.9, wspace=0.18, hspace=0.5)
    panels = (("loss", "loss (nats a token)"), ("lr", "learning rate"), ("grad_norm", "gradient norm before clipping"),
              ("tokens_per_second", "real tokens a second"))  # fmt: skip
    at, tokens = [line["step"] for line in steps], [line["tokens"] / 1e6 for line in steps]
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        values = np.array([line[name] for line in steps], dtype=float)  # null, of a loss that was not finite, is NaN
        axes.plot(at, values, color="#1f5fa8", linewidth=1.4, label="training", marker="." if len(at) < 30 else None)
        if name == "loss" and evaluations:
            validation = np.array([line["eval_loss"] for line in evaluations], dtype=float)
            axes.plot([line["step"] for line in evaluations], validation, "o-", color="#d1602c", label="validation")
            axes.legend(frameon=False)
        if name == "tokens_per_second":
            axes.set_ylim(bottom=0)
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axes.set_xlabel("optimizer steps")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        above, shown = axes.twiny(), np.linspace(at[0], at[-1], 5 if len(at) > 4 else 2)
        above.set_xlim(axes.get_xlim())
        above.set_xticks(shown, [f"{count:.3g}" for count in np.interp(shown, at, tokens)], fontsize=8)
        above.set_xlabel("million tokens", fontsize=8)
        above.spines[["top", "right"]].set_visible(False)
    drawn = folder / ".curves.png"
    figure.savefig(drawn, dpi=110, format="png")
    drawn.replace(folder / "curves.png")


def run_description(
    config: Config, parallel: Parallel, resolved: dict[str, Any], check: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns what `train_config.json` holds: every flag's value, the versions, the machine, the plan, its check.

    `resolved`: what became of the `auto` flags that the plan does not decide.
    """
    packages = (torch, transformers, datasets, accelerate)
    return dict(
        flags=dataclasses.asdict(config),
        versions=dict(
            {p.__name__: p.__version__ for p in packages}, python=platform.python_version(), cuda=torch.version.cuda
        ),
        cluster=dataclasses.asdict(parallel.cluster),
        model=dataclasses.asdict(parallel.shape),
        plan=dataclasses.asdict(parallel.plan),
        choice=choice_json(parallel.choice, parallel.cluster) if parallel.choice is not None else None,
        resolved=resolved,
        plan_check=check,
    )


# ---- Reporting: the plan against what happened -----------------------------------------------------------------


def check_of_plan(parallel: Parallel, result: StepResult, seconds: float, compiled: bool) -> dict[str, dict[str, Any]]:
    """Returns predicted and measured for a step that took `seconds`: active and reserved GiB of this rank, seconds.

    `band` is what the prediction claims. On a CPU nothing counts the memory, and no time is claimed.
    """
    tokens = result.micro_batch_tokens
    plan = dataclasses.replace(parallel.plan, gradient_accumulation_steps=len(tokens), compiled=compiled)
    memory = predict_memory(parallel.shape, plan, max(tokens), parallel.cluster.has_gpu)
    attended = result.squared_lengths / result.tokens
    predicted = predict_seconds(parallel.shape, parallel.cluster, plan, sum(tokens) / len(tokens), attended)["total"]
    on_gpu = parallel.device.type == "cuda"
    allocated = torch.cuda.max_memory_allocated() / GIB if on_gpu else None
    in_use = device_memory_in_use_gib() if on_gpu else None
    low, expected, high = memory.reserved
    active_band = [memory.active * (1 - ACTIVE_BAND), memory.active * (1 + ACTIVE_BAND)]
    time_band = [predicted / STEP_FACTOR, predicted * STEP_FACTOR] if on_gpu else None  # a CPU's cores are shared
    return dict(
        active_gib=dict(predicted=memory.active, measured=allocated, band=active_band),
        reserved_gib=dict(predicted=expected, measured=in_use, band=[low, high]),
        step_seconds=dict(predicted=predicted, measured=seconds, band=time_band),
    )


def device_memory_in_use_gib() -> float:
    """Returns what nvidia-smi shows: CUDA's context and NCCL's buffers, which torch does not count, included."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB


def describe_check(check: dict[str, dict[str, Any]]) -> str:
    """Returns predicted against measured in a line, and one more for each that lies outside its band."""
    parts, misses = [], []
    for name, value in check.items():
        quantity, unit = name.split("_")
        unit = {"gib": "GiB", "seconds": "s"}[unit]
        if value["measured"] is None:
            parts.append(f"{quantity} {value['predicted']:.2f} {unit} / not measured on CPU")
            continue
        parts.append(f"{quantity} {value['predicted']:.2f} / {value['measured']:.2f} {unit}")
        if value["band"] and not value["band"][0] <= value["measured"] <= value["band"][1]:
            within = " to ".join(f"{limit:.2f}" for limit in value["band"])
            misses.append(f"WARNING   the plan missed: {quantity} {value['measured']:.2f} {unit} is outside {within}")
    return "\n".join([f"check     predicted / measured, step 2: {', '.join(parts)}", *misses])


# ----------------------------------------------------------------------------------------------------------------
# 11. The plan
# ----------------------------------------------------------------------------------------------------------------

# Two constants fitted to four rows of the same table (MPT-13B, sequences of 1,024 and 2,048, on A100 and H100), and
# one ratio of torchtitan's (Llama-3.1-8B on 8 H100, eager 5,762 and compiled 6,667 tokens/s).
HALF_EFFICIENCY_TOKENS = 800  # tokens of a micro-batch at which matmuls reach half of their efficiency
OVERLAP = 0.5  # share of the shorter of computation and communication that hides behind the other
EAGER_SPEED = 5762 / 6667  # of a model that is not compiled
NETWORK_EFFICIENCY = 0.8  # of the network's nominal bandwidth; nccl-tests: 0.68 to 0.96 by message size
# Beyond the tensors: CUDA context, cuBLAS and NCCL buffers (0.5 to 1.6 GiB published), and the caching allocator's
# slack (0.2 to 0.37 of active memory published without expandable segments, which the hook turns on).
CONTEXT_GIB = (0.5, 1.0, 1.6)
ALLOCATOR_SLACK = (0.0, 0.08, 0.20)
HEADROOM = 0.95  # share of a device's memory that the expected reserved memory may take; the rest is for its band
ACTIVE_BAND = 0.05  # the relative error that predicted active memory claims to keep
STEP_FACTOR = 1.35  # and the factor that predicted step times do; published runs lie within it (tests/check_plan.py)
TIME_BAND = 0.07  # predicted times nearer than this are too close to call: like-for-like published pairs err by 6.6%
PLAN_FLAGS = (  # decided by the plan unless they are given
    "micro_batch_size", "activation_checkpointing", "gradient_sync", "reshard_after_forward", "cpu_offload",
    "precision", "compile", "hsdp_shard_size", "parallelism",
)  # fmt: skip


def plan_only(config: Config) -> None:
    """Prints the plan for `--plan`'s cluster: no process group, no GPU and no weights are needed.

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
        as_json = config.plan_format == "json"
        print(json.dumps(choice_json(choice, cluster)) if as_json else describe_choice(choice, shape, cluster, config))
    refuse_what_does_not_fit(choice, cluster)


LLAMA_2 = {  # Touvron et al. 2023, table 1 and the released config.json files: for --plan without gated files
    "7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "13b": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
    "70b": dict(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    ),
}


def choose_plan(shape: ModelShape, cluster: Cluster, config: Config) -> Choice:
    """Returns the fastest candidate that fits with headroom; of those too close to call, the simplest whose whole band
    of reserved memory fits.

    Raises UserError for flags that cannot work on the cluster, or with the model.
    """
    check_block(shape, config)
    weighed = weigh(shape, cluster, config)
    fitting = sorted((each for each in weighed if each.fits), key=lambda each: each.total_seconds)
    too_large = sorted((each for each in weighed if not each.fits), key=lambda each: each.memory.reserved[1])
    if not fitting:
        return Choice(None, too_large, lever_to_fit(shape, cluster, config))
    fastest = fitting[0]
    contenders = [each for each in fitting if each.total_seconds <= fastest.total_seconds * (1 + TIME_BAND)]
    chosen = min(contenders, key=lambda each: (each.memory.reserved[2] > cluster.memory_gib, simplicity(each)))
    reason = "the fastest that fits" if len(weighed) > 1 else "asked for"
    if chosen is not fastest:
        reason = f"too close to call with {fastest.plan.describe()}; the simpler of them"
    candidates = [dataclasses.replace(chosen, reason=reason)]
    for rank, each in enumerate(fitting):
        if each is not chosen:
            slower = each.total_seconds / chosen.total_seconds - 1
            words = "too close to call, and less simple" if rank < len(contenders) else f"{slower:.0%} slower"
            candidates.append(dataclasses.replace(each, reason=words))
    return Choice(candidates[0], candidates + too_large, lever_to_speed(shape, cluster, config, chosen))


def refuse_what_does_not_fit(choice: Choice, cluster: Cluster) -> None:
    """Raises UserError with the nearest miss and what would help, where no plan fits."""
    if choice.chosen is None:
        nearest = choice.candidates[0]
        raise UserError(
            f"the model does not fit on {cluster.world_size} x {cluster.device_name}: the nearest miss, "
            f"{nearest.plan.describe()}, {nearest.reason}; {choice.lever}"
        )


def check_block(shape: ModelShape, config: Config) -> None:
    if config.block_size > shape.positions:
        raise UserError(
            f"--block-size {config.block_size} is longer than the {shape.positions} positions of "
            f"{config.model_name_or_path}; use at most {shape.positions}"
        )


def weigh(shape: ModelShape, cluster: Cluster, config: Config) -> list[Candidate]:
    """Returns every plan that the flags and the cluster leave open, with its predictions."""
    return [predict(shape, cluster, plan, config) for plan in candidate_plans(shape, cluster, config)]


def predict(shape: ModelShape, cluster: Cluster, plan: Plan, config: Config) -> Candidate:
    """Returns what a plan takes when every document fills its block: the worst case, which must fit."""
    block, steps = min(config.block_size, shape.positions), plan.gradient_accumulation_steps
    share = math.ceil(config.batch_size / cluster.world_size)  # of the busiest rank, dealt evenly to its micro-batches
    largest = plan.micro_batch_size if plan.packing else math.ceil(share / steps)  # padded ones are of like size
    memory = predict_memory(shape, plan, largest * block, cluster.has_gpu)
    seconds = predict_seconds(shape, cluster, plan, share / steps * block, block)
    step_tokens = config.batch_size * block
    rate = step_tokens / seconds["total"] / cluster.world_size
    flops = training_flops(shape, step_tokens, config.batch_size * block**2) / cluster.world_size
    mfu = flops / seconds["total"] / cluster.flops_per_second(plan.precision)
    limit = HEADROOM * cluster.memory_gib
    fits = memory.reserved[1] <= limit
    reason = "" if fits else f"needs {memory.reserved[1]:.1f} GiB, {limit:.1f} of {cluster.memory_gib:.1f} are usable"
    return Candidate(plan, memory, seconds, rate, mfu, fits, reason)


def simplicity(candidate: Candidate) -> tuple:
    """Returns the sort key that breaks ties: the simplest plan first, and of those the one that takes least memory."""
    plan = candidate.plan
    return (
        ("none", "ddp", "fsdp", "hsdp").index(plan.strategy),
        plan.cpu_offload,
        not plan.reshard_after_forward,
        plan.dp_shard_size > 1 and plan.holds_gradients_back,
        plan.activation_checkpointing not in ("none", "full"),
        plan.gradient_accumulation_steps,
        candidate.memory.active,
    )


def candidate_plans(shape: ModelShape, cluster: Cluster, config: Config) -> list[Plan]:
    """Returns every plan the flags and the cluster leave open. Raises UserError where they leave none."""
    packing = packs(shape, cluster, config)
    compiled = config.compile == "yes" or (config.compile == "auto" and cluster.has_gpu)
    strategies = [config.parallelism]
    if config.parallelism == "auto":
        groups = cluster.nodes > 1 and cluster.ranks_per_node > 1
        several = ["ddp", "fsdp", "hsdp"] if groups else ["ddp", "fsdp"]
        strategies = several if cluster.world_size > 1 else ["none"]
    if config.cpu_offload == "yes":
        if not cluster.has_gpu:
            raise UserError("--cpu-offload yes moves memory off a GPU, and this machine has none; leave it out")
        strategies = [strategy for strategy in strategies if strategy in ("fsdp", "hsdp")]
        if not strategies and cluster.world_size > 1:
            raise UserError(f"--cpu-offload yes needs FSDP or HSDP, not --parallelism {config.parallelism}; use fsdp")
        if not strategies:
            raise UserError(
                "--cpu-offload yes needs FSDP or HSDP, so at least 2 processes; use torchrun --nproc_per_node=2"
            )
    share = math.ceil(config.batch_size / cluster.world_size)
    sizes = [min(config.micro_batch_size, share)] if config.micro_batch_size else even_sizes(share)
    levels = RECOMPUTATION_LEVELS if config.activation_checkpointing == "auto" else [config.activation_checkpointing]
    precision = config.precision if config.precision != "auto" else "bf16" if cluster.has_gpu else "fp32"
    plans = []
    for strategy in strategies:
        replicas, shards = shard_sizes(strategy, cluster, config.hsdp_shard_size)
        sharded = shards > 1
        for size, level in itertools.product(sizes, levels):
            steps = math.ceil(share / size)
            if config.gradient_sync != "auto":
                syncs = [config.gradient_sync]
            elif not sharded or steps == 1:
                syncs = ["step"]
            else:  # HSDP's all-reduce across replicas waits anyway, and its node's links are fast
                syncs = ["micro-batch"] if strategy == "hsdp" else ["micro-batch", "step"]
            offloads = [config.cpu_offload == "yes"]
            if config.cpu_offload == "auto" and sharded and cluster.has_gpu:
                offloads = [False, True]
            reshards = [config.reshard_after_forward == "yes"]
            if config.reshard_after_forward == "auto" or not sharded:
                reshards = [True, False] if sharded else [True]
            for sync, offload, reshard in itertools.product(syncs, offloads, reshards):
                layout = (strategy, replicas, shards, size, steps, level, reshard, offload, sync)
                plans.append(Plan(*layout, precision, packing, compiled))
    return plans


def packs(shape: ModelShape, cluster: Cluster, config: Config) -> bool:
    """Returns whether rows are packed. Raises UserError for a --packing yes that would let documents see others.

    torch's variable-length kernel takes heads of up to 256 elements, in eights (flash_api.cpp); SDPA alone pads them.
    """
    if config.packing == "yes" and not shape.attends_fully:
        raise UserError("--packing yes needs a model whose layers all attend fully, without sliding windows; use no")
    head_fits = shape.head_width % 8 == 0 and shape.head_width <= 256
    flash = cluster.has_gpu and cluster.has_flash_attention and config.precision != "fp32" and head_fits
    if config.packing == "yes" and cluster.has_gpu and not flash:
        raise UserError(
            "--packing yes needs flash attention: an Ampere GPU or newer, heads of up to 256 elements in eights, and "
            "not --precision fp32; use no"
        )
    return config.packing == "yes" or (config.packing == "auto" and flash and shape.attends_fully)


def shard_sizes(strategy: str, cluster: Cluster, hsdp_shard_size: int | None) -> tuple[int, int]:
    """Returns (dp_replicate_size, dp_shard_size). Raises UserError where the ranks do not allow the strategy."""
    world = cluster.world_size
    if strategy == "none" and world > 1:
        raise UserError(f"--parallelism none runs one process, but {world} were started; use ddp, fsdp or auto")
    if strategy in ("ddp", "fsdp") and world < 2:
        raise UserError(
            f"--parallelism {strategy} needs at least 2 processes, but 1 was started; use torchrun --nproc_per_node=2"
        )
    if strategy != "hsdp":
        return (1, world) if strategy == "fsdp" else (world, 1)
    shard = hsdp_shard_size or (cluster.ranks_per_node if cluster.nodes > 1 else world // 2)
    if world < 4:
        raise UserError(
            f"--parallelism hsdp needs at least 4 processes, but {world} started; use torchrun --nproc_per_node=4"
        )
    if shard < 2 or world % shard or world == shard:
        raise UserError(
            f"--parallelism hsdp needs at least two equal groups of at least 2 ranks; {world} processes in groups of "
            f"{shard} are not; use fsdp, or --hsdp-shard-size with a proper divisor of {world}"
        )
    return world // shard, shard


def even_sizes(share: int) -> list[int]:
    """Returns the micro-batch sizes to try: `share` and the powers of two below it, lowered to what even dealing needs.

    Five documents, at most four at a time, are dealt as three and two: the size is three. Largest first.
    """
    powers = {share, *(2**power for power in range(share.bit_length()))}
    return sorted({math.ceil(share / math.ceil(share / size)) for size in powers}, reverse=True)


# ---- The plan: what it deals in --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How a step is executed. `dp_replicate_size` copies of the model, each over `dp_shard_size` ranks."""

    strategy: str
    dp_replicate_size: int
    dp_shard_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    activation_checkpointing: str
    reshard_after_forward: bool
    cpu_offload: bool
    gradient_sync: str
    precision: str
    packing: bool = False
    compiled: bool = False

    @property
    def state_bytes(self) -> int:
        """Bytes per element of weights, gradients and each moment."""
        return 2 if self.precision == "bf16-states" else 4

    @property
    def autocasts(self) -> bool:
        """FSDP casts the weights it gathers; elsewhere torch.autocast does, where the weights are fp32."""
        return self.precision == "bf16" and self.dp_shard_size == 1

    def checkpoints_layer(self, layer: int) -> bool:
        level = self.activation_checkpointing
        return level == "full" or (level.startswith("every-") and layer % int(level[6:]) == 0)

    @property
    def holds_gradients_back(self) -> bool:
        return self.gradient_accumulation_steps > 1 and self.gradient_sync == "step"

    def describe(self) -> str:
        """Returns the plan in a few words, as the table shows it."""
        shards = f" {self.dp_replicate_size}x{self.dp_shard_size}" if self.strategy == "hsdp" else ""
        level = self.activation_checkpointing
        parts = [
            f"{self.strategy}{shards}, micro-batch {self.micro_batch_size} x {self.gradient_accumulation_steps}",
            {"none": "", "full": "recompute all"}.get(level, f"recompute {level}"),
            "" if self.reshard_after_forward or self.dp_shard_size == 1 else "keep gathered",
            "reduce once" if self.dp_shard_size > 1 and self.holds_gradients_back else "",
            "offload" if self.cpu_offload else "",
        ]
        return ", ".join(filter(None, parts))


@dataclass(frozen=True)
class Candidate:
    """A plan, what it is predicted to take, and whether and why it is chosen. `seconds` are of one optimizer step."""

    plan: Plan
    memory: Memory
    seconds: dict[str, float]
    tokens_per_second_per_gpu: float
    mfu: float
    fits: bool
    reason: str = ""

    @property
    def total_seconds(self) -> float:
        return self.seconds["total"]


@dataclass(frozen=True)
class Choice:
    """The outcome of planning: what is chosen (None where nothing fits), every candidate, and what would help."""

    chosen: Candidate | None
    candidates: list[Candidate]
    lever: str


@dataclass(frozen=True)
class Memory:
    """Predicted GPU memory of one rank in GiB. `active`: tensors alive at the peak. `reserved`: (low, expected, high)
    of what nvidia-smi shows. `terms` make up `active`; `peak_moment` is when that is."""

    active: float
    reserved: tuple[float, float, float]
    terms: dict[str, float]
    peak_moment: str


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder that memory and time depend on. `parameters` is exact, counted on the meta device."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_width: int
    vocabulary: int
    positions: int
    head_width: int = 128
    attends_fully: bool = True  # no sliding windows: each token attends to everything before it

    @property
    def head_parameters(self) -> int:
        """Output projection and final norm, which transformers keeps gathered between forward and backward."""
        return self.vocabulary * self.hidden + self.hidden

    @property
    def layer_parameters(self) -> int:
        """q, k, v, o; gate, up, down; two norms."""
        h, k, f = self.hidden, self.kv_width, self.intermediate
        return 2 * h * h + 2 * h * k + 3 * h * f + 2 * h

    @property
    def embedding_parameters(self) -> int:
        return max(0, self.parameters - self.layers * self.layer_parameters - self.head_parameters)

    @property
    def matmul_parameters(self) -> int:
        """Parameters a token is multiplied with: all but the input embedding, which is a look-up."""
        return self.layers * self.layer_parameters + self.vocabulary * self.hidden


def model_shape(model_config: transformers.PretrainedConfig) -> ModelShape:
    """Returns the shape of the model that `model_config` describes; builds it on the meta device to count exactly."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    text_config = model_config.get_text_config()
    heads = text_config.num_attention_heads
    head_width = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=text_config.num_hidden_layers,
        hidden=text_config.hidden_size,
        intermediate=getattr(text_config, "intermediate_size", None) or 4 * text_config.hidden_size,
        heads=heads,
        kv_width=(getattr(text_config, "num_key_value_heads", None) or heads) * head_width,
        vocabulary=text_config.vocab_size,
        positions=getattr(text_config, "max_position_embeddings", None) or sys.maxsize,
        head_width=head_width,
        attends_fully=attends_fully(model_config),
    )


def attends_fully(model_config: transformers.PretrainedConfig) -> bool:
    text_config = model_config.get_text_config()
    kinds = set(getattr(text_config, "layer_types", None) or ["full_attention"])
    return kinds == {"full_attention"} and not getattr(text_config, "sliding_window", None)


# ---- The plan: memory ------------------------------------------------------------------------------------------


def predict_memory(shape: ModelShape, plan: Plan, tokens: int, has_gpu: bool = True) -> Memory:
    """Returns the peak memory of one rank when its largest micro-batch has `tokens` tokens."""
    return peak_of(memory_moments(shape, plan, tokens), has_gpu)


def peak_of(moments: dict[str, dict[str, float]], has_gpu: bool = True) -> Memory:
    name = max(moments, key=lambda each: sum(moments[each].values()))
    terms = {term: size / GIB for term, size in moments[name].items()}
    active = sum(terms.values())
    low, expected, high = (
        active * (1 + slack) + context * has_gpu for slack, context in zip(ALLOCATOR_SLACK, CONTEXT_GIB, strict=True)
    )
    return Memory(active, (low, expected, high), terms, name)


def memory_moments(shape: ModelShape, plan: Plan, tokens: int) -> dict[str, dict[str, float]]:
    """Returns bytes by term at each moment of a step that may be the peak, for micro-batches of `tokens` tokens."""
    step = StepMemory(shape, plan, tokens)
    moments = sharded_moments(step) if plan.dp_shard_size > 1 else replicated_moments(step)
    # what StochasticAdamW makes of one parameter, in fp32 and as random bits; fused AdamW makes nothing
    largest = max(shape.vocabulary, shape.intermediate) * shape.hidden
    rounding = 32 * largest / plan.dp_shard_size if plan.precision == "bf16-states" else 0
    if plan.cpu_offload:  # transformers loads every shard through the device
        moments["loading"] = dict(weights=plan.state_bytes * shape.parameters / plan.dp_shard_size)
    return {**moments, "optimizer": step.moment(0, rounding, 0, shape.parameters)}


def sharded_moments(step: StepMemory) -> dict[str, dict[str, float]]:
    """FSDP2, wrapped as transformers does it: embedding and each layer alone, last norm and head kept gathered."""
    shape, plan, width, saved, rotary = step.shape, step.plan, step.width, step.saved, step.rotary
    layer, head, embedding = shape.layer_parameters, shape.head_parameters, shape.embedding_parameters
    h, f, layers = shape.hidden, shape.intermediate, shape.layers
    kept = 0 if plan.reshard_after_forward else width * (layers * layer + embedding)
    all_saved, beside_head = sum(saved), kept or width * layer  # the last layer is gathered ahead
    moments = {
        "loss": step.moment(all_saved + 10 * h + rotary + 44, step.head_buffers, kept + width * head, 0),
        "reduction of the head": step.moment(all_saved + 8 * h + rotary, 0, kept + (2 * width + 4) * head, head),
        "backward of the last norm": step.moment(
            all_saved + 24 * h + rotary, 0, beside_head + (width + 4) * head, head
        ),
    }  # fmt: skip
    if plan.holds_gradients_back:
        held = step.moment(step.layer_input + 4 * width * h + rotary, 0, 3 * width * layer, 0)
        moments["end of the first backward"] = held
    mlp = step.tokens * (step.whole_layer + 2 * width * f + width * h) + width * h * f
    attention = step.tokens * (26 if width == 2 else 24) * h + width * layer
    for i in reversed(range(layers)):
        ahead = layer if i else embedding  # gathered before its turn
        reducing = 4 * layer if i < layers - 1 else 0  # fp32 gradient of the next layer; the head's is gone by then
        gathered = width * ((i + 1) * layer + embedding if kept else layer + ahead)
        own = step.layer_input if plan.checkpoints_layer(i) else 0
        finished = head + (layers - 1 - i) * layer
        moments[f"backward of layer {i}"] = step.moment(
            sum(saved[:i]) + own + rotary, max(mlp, attention), gathered + reducing, finished
        )
    return moments


def replicated_moments(step: StepMemory) -> dict[str, dict[str, float]]:
    """One process, or DDP: whole weights, and under autocast bf16 copies of them, cached until the forward pass ends
    and saved for the backward pass of layers that are not recomputed."""
    shape, plan, saved, rotary = step.shape, step.plan, step.saved, 2 * step.rotary
    layer, head, h, f = shape.layer_parameters, shape.head_parameters, shape.hidden, shape.intermediate
    copy = 2 if plan.autocasts else 0  # bytes per parameter
    copies = [0 if plan.checkpoints_layer(i) else copy * layer for i in range(shape.layers)]
    cache = copy * (shape.layers * layer + head)
    moments = {
        "end of forward": step.moment(sum(saved) + 14 * h + rotary, step.chunk, cache, 0),
        "loss": step.moment(sum(saved) + 12 * h + rotary + 44, step.head_buffers, sum(copies) + copy * head, 0),
    }
    for i in reversed(range(shape.layers)):
        own = (step.layer_input if plan.checkpoints_layer(i) else 0) + step.whole_layer + 2 * step.width * f + rotary
        finished = head + (shape.layers - 1 - i) * layer + h * f  # with its down projection, whose copy is gone
        gathered = sum(copies[:i]) + copy * (layer - h * f)
        moments[f"backward of layer {i}"] = step.moment(sum(saved[:i]) + own, 0, gathered, finished)
    moments["backward of the embedding"] = step.moment(4 * h, 0, 0, shape.parameters)
    return moments


@dataclass(frozen=True)
class StepMemory:
    """What the moments of a step have in common, for micro-batches of `tokens` tokens. In bytes.

    Every term was read off transformers' Llama and FSDP2 and agrees with PyTorch's memory tracker (tests/check_plan.py
    shows how closely). h hidden, f intermediate, k key and value width, a heads, v vocabulary.
    """

    shape: ModelShape
    plan: Plan
    tokens: int

    @property
    def width(self) -> int:
        """Bytes of an element in the compute precision."""
        return 4 if self.plan.precision == "fp32" else 2

    @property
    def rotary(self) -> int:
        """Per token: cosines and sines of a position, shared by all layers."""
        return 4 * self.shape.hidden // self.shape.heads

    @property
    def layer_input(self) -> int:
        """Per token, what a recomputed layer keeps. Under autocast (one process, and DDP) the stream is fp32."""
        return (4 if self.width == 4 or self.plan.autocasts else 2) * self.shape.hidden

    @property
    def whole_layer(self) -> int:
        """Per token, what a layer saves for its backward pass.

        In bf16: two norms 16h, as transformers keeps fp32 copies of their input; query and attention output 4h, key
        and value 4k; MLP 8f; log-sum-exp 4a. Autocast saves a bf16 copy of its input for each projection.
        """
        h, f, k, a = self.shape.hidden, self.shape.intermediate, self.shape.kv_width, self.shape.heads
        if self.width == 4:
            return 32 * h + 8 * k + 16 * f + 4 * a + 8
        streams = 36 * h + 6 * k if self.plan.autocasts else 20 * h + 4 * k
        return streams + 8 * f + 4 * a + 8

    @property
    def saved(self) -> list[int]:
        """Per token, what each layer holds between its forward and its backward pass."""
        recomputed = map(self.plan.checkpoints_layer, range(self.shape.layers))
        return [self.layer_input if each else self.whole_layer for each in recomputed]

    @property
    def chunk(self) -> int:
        """Logits and inputs of the head for one chunk of positions, in fp32."""
        return 4 * min(self.tokens, HEAD_CHUNK_TOKENS) * (self.shape.vocabulary + self.shape.hidden)

    @property
    def head_buffers(self) -> int:
        """The head's loss: a chunk, the gradient of the head as computed, and in fp32 that of a chunk."""
        return self.chunk + (self.width + 4) * self.shape.head_parameters

    def resident(self) -> dict[str, float]:
        """Weights and moments; under CPU offload, the shards of the two layers being copied in."""
        state, shards = self.plan.state_bytes, self.plan.dp_shard_size
        if self.plan.cpu_offload:
            return dict(weights=2 * state * self.shape.layer_parameters / shards, optimizer=0.0)
        weights = state * self.shape.parameters / shards
        return dict(weights=weights, optimizer=2 * weights)

    def gradients(self, finished: float) -> float:
        """Gradients once those of `finished` parameters are reduced."""
        plan, parameters, state = self.plan, self.shape.parameters, self.plan.state_bytes
        accumulates = plan.gradient_accumulation_steps > 1
        if plan.dp_shard_size == 1:
            return state * (parameters if plan.strategy == "ddp" or accumulates else finished)  # DDP: its buckets
        if plan.holds_gradients_back:  # whole until the last micro-batch reduces them one by one
            return 4 * (parameters - finished) + state * finished / plan.dp_shard_size
        if plan.strategy == "hsdp" and accumulates:  # FSDP2 keeps them on the device for the all-reduce, in fp32
            return 4 * parameters / plan.dp_shard_size
        return 0.0 if plan.cpu_offload else state * (parameters if accumulates else finished) / plan.dp_shard_size

    def moment(self, activations: float, temporaries: float, gathered: float, finished: float) -> dict[str, float]:
        """Returns the terms of a moment; `activations` are per token."""
        passing = dict(gathered=gathered, activations=self.tokens * activations, temporaries=temporaries)
        return {**self.resident(), "gradients": self.gradients(finished), **passing}


def host_gib(shape: ModelShape, cluster: Cluster, plan: Plan) -> float:
    """Returns what weights, gradients and moments take of a node's host memory under CPU offload, in GiB.

    Weights and gradients lie in pinned memory, of which torch takes a power of two for each tensor
    (CachingHostAllocator.h).
    """
    h, f, k, v = shape.hidden, shape.intermediate, shape.kv_width, shape.vocabulary
    matrices = shape.layers * [h * h, h * h, h * k, h * k, h * f, h * f, h * f] + [v * h]
    matrices += [v * h] if shape.embedding_parameters > v * h / 2 else []  # not tied to the head
    pinned = sum(1 << (math.ceil(size / plan.dp_shard_size) * plan.state_bytes - 1).bit_length() for size in matrices)
    moments = 2 * plan.state_bytes * shape.parameters / plan.dp_shard_size
    return (2 * pinned + moments) * cluster.ranks_per_node / GIB


# ---- The plan: time --------------------------------------------------------------------------------------------


def predict_seconds(
    shape: ModelShape, cluster: Cluster, plan: Plan, tokens: float, attended: float
) -> dict[str, float]:
    """Returns the seconds of one optimizer step by term, for micro-batches of `tokens` tokens on each rank.

    `attended` is the mean length of the document a token is in. FLOPs per token: matmuls 2 per parameter forward, 4
    backward, 2 more where a layer is recomputed; causal flash attention 2 * layers * hidden * attended forward, 2.5
    times that backward (Dao 2023). FSDP gathers bf16 weights once or twice a micro-batch and reduces fp32 gradients
    (Rajbhandari et al. 2020, section 7); a ring of n ranks moves (n-1)/n of the bytes through each rank, an all-reduce
    twice that (Patarasu and Yuan 2009).
    """
    gpu, steps = cluster.gpu, plan.gradient_accumulation_steps
    shards, replicas = plan.dp_shard_size, plan.dp_replicate_size
    recomputed = sum(map(plan.checkpoints_layer, range(shape.layers))) / shape.layers
    matmul = 6 * shape.matmul_parameters + 2 * recomputed * shape.layers * shape.layer_parameters
    attention = 2 * shape.layers * shape.hidden * attended * (3.5 + recomputed)
    slowed = EAGER_SPEED if cluster.has_gpu and not plan.compiled else 1
    rate = cluster.flops_per_second(plan.precision) * gpu.matmul_efficiency * slowed
    ramp = HALF_EFFICIENCY_TOKENS / tokens if cluster.has_gpu else 0
    flops = matmul * (1 + ramp) + attention / gpu.attention_efficiency
    compute = steps * tokens * flops / rate

    compute_bytes = 4 if plan.precision == "fp32" else 2
    gathers = 2 if plan.reshard_after_forward else 1
    share, bus = (shards - 1) / shards, cluster.bus_gb_per_second(shards) * 1e9
    reductions = steps if plan.gradient_sync == "micro-batch" else 1
    gather_reduce = share * (steps * gathers * compute_bytes + 4 * reductions) * shape.parameters / bus
    across_nodes = plan.strategy == "hsdp" and cluster.nodes > 1
    replica_bus = cluster.network_gb_per_second * 1e9 if across_nodes else cluster.bus_gb_per_second(replicas) * 1e9
    reduced_bytes = 4 if shards > 1 else plan.state_bytes
    all_reduce = 2 * (replicas - 1) / replicas * reduced_bytes * shape.parameters / shards / replica_bus
    shard_bytes = plan.state_bytes * shape.parameters / shards
    host_link = steps * shard_bytes * (gathers + 1) / (HOST_LINK_GB_PER_SECOND * 1e9) if plan.cpu_offload else 0.0
    communication = gather_reduce + all_reduce + host_link
    # fused AdamW reads weight, gradient and two moments and writes three of them; clipping reads the gradient again
    memory_rate = HOST_MEMORY_GB_PER_SECOND if plan.cpu_offload else gpu.hbm_gb_per_second
    optimizer = 8 * shard_bytes / (memory_rate * 1e9)
    exposed = communication - OVERLAP * min(communication, compute)
    return dict(
        total=compute + exposed + optimizer,
        compute=compute,
        exposed_communication=exposed,
        optimizer=optimizer,
        communication=communication,
        gather_reduce=gather_reduce,
        all_reduce=all_reduce,
        host_link=host_link,
    )


def training_flops(shape: ModelShape, tokens: int, squared_lengths: int) -> float:
    """Returns the FLOPs that training on these documents takes, without recomputation.

    PaLM (Chowdhery et al. 2022, appendix B): 6 per matmul parameter and token, and 12 * layers * hidden per pair of
    tokens in a document, not halved for causality. `squared_lengths` sums length**2 over the documents.
    """
    return 6.0 * shape.matmul_parameters * tokens + 12.0 * shape.layers * shape.hidden * squared_lengths


def limiting_link(cluster: Cluster, candidate: Candidate) -> str:
    """Returns the name of the link that most of a step's communication waits for."""
    plan, seconds = candidate.plan, candidate.seconds
    name = max(("gather_reduce", "all_reduce", "host_link"), key=lambda each: seconds[each])
    if not seconds[name]:
        return "no link"
    if name == "host_link":
        return f"host link {HOST_LINK_GB_PER_SECOND} GB/s"
    inside = plan.dp_shard_size <= cluster.ranks_per_node if name == "gather_reduce" else cluster.nodes == 1
    if inside:
        return f"node link {cluster.gpu.link_gb_per_second:g} GB/s"
    return f"network {cluster.gpu.network_gbit_per_second:g} Gbit/s per GPU"


# ---- The plan: levers ------------------------------------------------------------------------------------------


def lever_to_fit(shape: ModelShape, cluster: Cluster, config: Config) -> str:
    """Returns the single changes that would make the model fit, cheapest first; each is tried, not guessed.

    Where no single change is enough, tries setting all the flags that restrict the plan back to auto.
    """
    freed = freed_flags(config)
    helping = [words for words, changed in freed if best_of(shape, cluster, changed)]
    changed = dataclasses.replace(config, precision="bf16-states")
    if cluster.has_gpu and config.precision in ("auto", "bf16") and best_of(shape, cluster, changed):
        helping.append("--precision bf16-states (a trade: no fp32 weights)")
    for block in (4096, 2048, 1024, 512, 256):
        if block < config.block_size and best_of(shape, cluster, dataclasses.replace(config, block_size=block)):
            helping.append(f"--block-size {block}")
            break
    for factor in (2, 4, 8, 16):
        nodes, ranks = cluster.nodes, cluster.ranks_per_node * factor
        if ranks > 8 or not cluster.has_gpu:  # more processes on a CPU have no more memory
            nodes, ranks = cluster.nodes * factor, cluster.ranks_per_node
        if best_of(shape, dataclasses.replace(cluster, nodes=nodes, ranks_per_node=ranks), config):
            helping.append(f"{nodes * ranks} GPUs" if cluster.has_gpu else f"{nodes} such machines")
            break
    if not helping and freed:
        defaults = {name: FLAGS[name].default for name in PLAN_FLAGS}
        if best_of(shape, cluster, dataclasses.replace(config, **defaults)):
            helping.append(" ".join(words for words, _ in freed if not words.startswith("--hsdp-shard-size")))
    return "it would fit with " + ", or ".join(helping) if helping else "no change of a flag makes it fit"


def lever_to_speed(shape: ModelShape, cluster: Cluster, config: Config, chosen: Candidate) -> str:
    """Returns the cheapest change that would train more tokens a second, as predicted."""
    larger = dataclasses.replace(config, batch_size=2 * config.batch_size)
    changes = [*freed_flags(config), (f"--batch-size {larger.batch_size} (another curve)", larger)]
    for words, changed in changes:
        better = best_of(shape, cluster, changed)
        gain = better.tokens_per_second_per_gpu / chosen.tokens_per_second_per_gpu - 1 if better else 0.0
        if gain > TIME_BAND:
            return f"{words} would train {gain:.0%} more tokens/s"
    return "none: no flag gains more than the error of the prediction"


def freed_flags(config: Config) -> list[tuple[str, Config]]:
    """Returns, for each flag that restricts the plan, the words that set it back to auto and the resulting Config."""
    freed = []
    for name in PLAN_FLAGS:
        default, words = FLAGS[name].default, f"{flag_name(name)} auto"
        if getattr(config, name) != default:
            changes = {name: default}
            if name == "parallelism" and config.hsdp_shard_size:
                changes, words = {**changes, "hsdp_shard_size": None}, f"{words} --hsdp-shard-size auto"
            freed.append((words, dataclasses.replace(config, **changes)))
    return freed


def best_of(shape: ModelShape, cluster: Cluster, config: Config) -> Candidate | None:
    """Returns the fastest candidate that fits; None where none does, or where the flags rule each other out."""
    with contextlib.suppress(UserError):
        fitting = (each for each in weigh(shape, cluster, config) if each.fits)
        return min(fitting, key=lambda each: each.total_seconds, default=None)
    return None


def flags_for_less_memory(shape: ModelShape, cluster: Cluster, plan: Plan, active: float, block_size: int) -> str:
    """Returns the flags of the fastest plan predicted to take at most nine tenths of `active` GiB, or of the smallest.

    They pin the whole plan: were only some given, the planner would spend the memory they free on the others.
    """
    documents = plan.micro_batch_size * plan.gradient_accumulation_steps * cluster.world_size
    fixed = dict(batch_size=documents, precision=plan.precision, packing="yes" if plan.packing else "no")
    for block in (block_size, block_size // 2, block_size // 4, block_size // 8):
        config = Config(block_size=block, **fixed)
        weighed = weigh(shape, cluster, config)
        smaller = [each for each in weighed if each.memory.active <= 0.9 * active]
        if smaller:
            break
    if smaller:
        chosen = min(smaller, key=lambda each: (each.total_seconds, simplicity(each))).plan
    else:
        chosen = min(weighed, key=lambda each: each.memory.active).plan
    return flags_of(chosen) + (f" --block-size {block} --resume-anyway" if block < block_size else "")


def flags_of(plan: Plan) -> str:
    """Returns the flags that leave the planner no plan but this one."""
    flags = {"--micro-batch-size": plan.micro_batch_size, "--activation-checkpointing": plan.activation_checkpointing}
    if plan.strategy != "none":
        flags = {"--parallelism": plan.strategy, **flags}
    if plan.dp_shard_size > 1:
        flags["--gradient-sync"] = "step" if plan.holds_gradients_back else "micro-batch"
        flags["--reshard-after-forward"] = "yes" if plan.reshard_after_forward else "no"
        flags |= {"--cpu-offload": "yes"} if plan.cpu_offload else {}
    return " ".join(f"{name} {value}" for name, value in flags.items())


# ---- The plan: telling it --------------------------------------------------------------------------------------


def describe_choice(choice: Choice, shape: ModelShape, cluster: Cluster, config: Config) -> str:
    """Returns the plan as a table of at most 100 columns: the chosen one, the best of each other kind, and why."""
    nodes = f"{cluster.nodes} x " if cluster.nodes > 1 else ""
    first, device = choice.candidates[0].plan, "a GPU" if cluster.has_gpu else "a rank"
    rows, layers = "packed" if first.packing else "padded", "compiled" if first.compiled else "eager"
    lines = [
        f"plan      {nodes}{cluster.ranks_per_node} x {cluster.device_name} of {cluster.memory_gib:.1f} GiB; "
        f"{in_words(shape.parameters)} parameters; {config.batch_size} documents a step, of up to "
        f"{config.block_size} tokens",
        f"          {f'{first.precision}, {rows}, {layers}':44}{'GiB ' + device:>17} {'step':>8} {'tokens/s':>9}",
        f"          {'':44}{'active':>8}{'reserved':>9} {'seconds':>8} {device:>9} {'MFU':>5}",
    ]
    for candidate in best_of_each_kind(choice):
        memory, is_chosen = candidate.memory, candidate is choice.chosen
        plan, *rest = textwrap.wrap(candidate.plan.describe(), 43)
        head = f"{'  chosen' if is_chosen else '':10}"
        lines.append(
            f"{head}{plan:44}{memory.active:8.1f}{memory.reserved[1]:9.1f} "
            f"{candidate.total_seconds:8.2f} {candidate.tokens_per_second_per_gpu:9,.0f} {candidate.mfu:5.0%}"
        )
        lines += [f"{'':12}{words}" for words in (*rest, candidate.reason)]
    best = choice.chosen or choice.candidates[0]
    terms = (
        ", ".join(f"{name} {gib:.1f}" for name, gib in best.memory.terms.items() if gib >= 0.05) or "next to nothing"
    )
    low, _, high = best.memory.reserved
    seconds = best.seconds
    assumed = ", ".join(f"{name} {source}" for name, source in cluster.sources.items())
    lines += [
        f"  peak      {best.memory.peak_moment}: {terms}; reserved {low:.1f} to {high:.1f}",
        f"  step      compute {seconds['compute']:.2f} s, exposed communication "
        f"{seconds['exposed_communication']:.2f} s ({limiting_link(cluster, best)}), "
        f"optimizer {seconds['optimizer']:.2f} s",
        f"  lever     {choice.lever}",
        f"  assumed   every document fills its block; {assumed}; overlap fitted; reserved guess"
        + ("; host link and memory guess" if best.plan.cpu_offload else ""),
    ]
    if best.plan.cpu_offload:
        host = host_gib(shape, cluster, best.plan)
        lines.insert(-2, f"  host      weights, gradients and moments take {host:.1f} GiB of each node's own memory")
    return "\n".join(textwrap.fill(line, 100, subsequent_indent=" " * 12) for line in lines)


def in_words(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"


def best_of_each_kind(choice: Choice) -> list[Candidate]:
    """Returns the best candidate of each kind (strategy, offload, recomputation or none), the chosen one first."""
    best: dict[tuple, Candidate] = {}
    for each in choice.candidates:
        plan = each.plan
        best.setdefault((plan.strategy, plan.cpu_offload, plan.activation_checkpointing == "none"), each)
    return list(best.values())[:7]


def choice_json(choice: Choice, cluster: Cluster) -> dict[str, Any]:
    """Returns what `--plan-format json` prints and `train_config.json` holds."""
    return dict(
        cluster=dataclasses.asdict(cluster),
        chosen=candidate_json(choice.chosen) if choice.chosen else None,
        candidates=[candidate_json(each) for each in choice.candidates],
        lever=choice.lever,
    )


def candidate_json(candidate: Candidate) -> dict[str, Any]:
    low, expected, high = candidate.memory.reserved
    return dict(
        **dataclasses.asdict(candidate.plan),
        memory_gib=dict(
            active=candidate.memory.active,
            reserved=expected,
            reserved_low=low,
            reserved_high=high,
            terms=candidate.memory.terms,
            peak_moment=candidate.memory.peak_moment,
        ),
        step_seconds=candidate.seconds,
        tokens_per_second_per_gpu=candidate.tokens_per_second_per_gpu,
        mfu=candidate.mfu,
        fits=candidate.fits,
        reason=candidate.reason,
    )


# ---- Devices ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """The devices of a run, and the source of each of their figures: `measured`, `table`, `given` or `guess`.

    `memory_gib` is what one rank may use: its GPU's, or its share of a CPU node's.
    """

    nodes: int
    ranks_per_node: int
    device_name: str
    has_gpu: bool
    gpu: Gpu
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    has_flash_attention: bool = True  # an NVIDIA GPU from Ampere on

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def memory_gib(self) -> float:
        return self.gpu.memory_gib

    def flops_per_second(self, precision: str) -> float:
        """Returns a device's peak in the compute precision, without TF32, as torch's default has it; a CPU's is one."""
        if precision != "fp32" or not self.has_gpu:
            return self.gpu.peak_tflops * 1e12
        return 1e12 * (self.gpu.fp32_tflops or self.gpu.peak_tflops / 16)

    def bus_gb_per_second(self, ranks: int) -> float:
        """Returns the bus bandwidth of a collective among `ranks` neighbours: the node's link, or its whole network."""
        if ranks <= self.ranks_per_node:
            return self.gpu.link_gb_per_second
        return min(self.gpu.link_gb_per_second, self.ranks_per_node * self.network_gb_per_second)

    @property
    def network_gb_per_second(self) -> float:
        return self.gpu.network_gbit_per_second / 8 * NETWORK_EFFICIENCY


def find_cluster() -> Cluster:
    """Returns the cluster this process is part of, from torchrun's environment and the device it was given.

    Every rank must call it. Raises UserError on nodes with different numbers of ranks.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if dist.is_initialized() else 1
    everyones = gather_object([(find_device(ranks_per_node), has_flash_attention(), ranks_per_node)])
    devices, flash, sizes = zip(*everyones, strict=True)
    if len(sizes := set(sizes)) > 1:
        raise UserError(f"nodes run {' and '.join(map(str, sorted(sizes)))} ranks; give all the same --nproc_per_node")
    # Every rank plans alone, so all must plan with the same figures: the slowest device's, and the smallest memory.
    name, gpu, sources = min(devices, key=lambda device: device[1].peak_tflops)
    gpu = dataclasses.replace(gpu, memory_gib=min(device[1].memory_gib for device in devices))
    nodes, has_gpu = world_size // ranks_per_node, torch.cuda.is_available()
    return Cluster(nodes, ranks_per_node, name, has_gpu, gpu, sources, all(flash))


def this_machine() -> Cluster:
    """Returns the cluster that torchrun with all of this machine's GPUs would make; one process where it has none."""
    ranks = max(1, torch.cuda.device_count())
    name, gpu, sources = find_device(ranks_per_node=1)
    return Cluster(1, ranks, name, torch.cuda.is_available(), gpu, sources, has_flash_attention())


def find_device(ranks_per_node: int) -> tuple[str, Gpu, dict[str, str]]:
    """Returns the name and figures of this process's device, and the source of each figure."""
    sources = {"memory": "measured", "peak": "measured"}
    sources |= dict.fromkeys(("efficiency", "node link", "network"), "guess")
    if not torch.cuda.is_available():
        memory_gib = psutil.virtual_memory().available / GIB / ranks_per_node
        # Half of what bare matmuls reach, memory of 10 GB/s, 1 GB/s between processes: good enough for trying out.
        cpu = Gpu(memory_gib, measure_matmul_tflops("cpu", torch.float32, 512), 10, 0.5, 1.0, 1, 1)
        return platform.processor() or platform.machine(), cpu, sources
    name, memory_gib = torch.cuda.get_device_name(), torch.cuda.get_device_properties().total_memory / GIB
    key = known_gpu(name, memory_gib)
    if key is None:
        peak = measure_matmul_tflops("cuda", torch.bfloat16, 8192)
        measured = Gpu(memory_gib, peak, UNKNOWN_HBM_GB_PER_SECOND, 0.9, 0.75, PCIE_GB_PER_SECOND, 12.5)
        return name, measured, sources  # 0.9 of what bare matmuls reach is a guess
    gpu = dataclasses.replace(GPUS[key], memory_gib=memory_gib)
    if "PCIE" in name.upper():
        gpu = dataclasses.replace(gpu, link_gb_per_second=PCIE_GB_PER_SECOND)
    return name, gpu, {**sources, **figures_of(key)}


def known_gpu(device_name: str, memory_gib: float) -> str | None:
    """Returns the key in GPUS of CUDA's `device_name`; None for an unknown GPU, a laptop's, or a MIG slice."""
    if re.search(r"\b(MIG|LAPTOP)\b", device_name.upper()):
        return None
    words = re.sub(r"\b(?:(RTX) (?=\d)|(H100|H200) (?=PCIE|NVL))", r"\1\2", device_name.upper())
    keys = [key for key in GPUS if re.search(rf"(?<![A-Z0-9]){key.split('-')[0]}(?![A-Z0-9])", words)]
    return min(keys, key=lambda key: abs(GPUS[key].memory_gib - memory_gib), default=None)


def figures_of(key: str) -> dict[str, str]:
    """Returns where the figures of an entry of GPUS are from; only these chips have published efficiencies."""
    chip = "table" if key.split("-")[0] in ("A100", "H100", "H200", "GH200") else "guess"
    return {"peak": "table", "efficiency": chip, "node link": chip}


def has_flash_attention() -> bool:
    return torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)


def measure_matmul_tflops(device: str, dtype: torch.dtype, size: int, seconds: float = 0.05) -> float:
    """Returns the TFLOP/s of square matmuls, measured for about `seconds` seconds."""
    matrix = torch.ones(size, size, device=device, dtype=dtype)

    def timed(repeats: int) -> float:
        began = time.perf_counter()
        for _ in range(repeats):
            product = matrix @ matrix
        product[0, 0].item()  # waits for the device
        return time.perf_counter() - began

    timed(2)
    repeats = max(1, round(seconds / timed(1)))
    return 2 * size**3 * repeats / timed(repeats) / 1e12


def parse_cluster(text: str) -> Cluster:
    """Returns the cluster that `8xH100-80GB` or `2x8xA100-40GB,ib=200`, for example, describes.

    `ib` is the network in Gbit/s per GPU. Raises UserError for one it cannot read, listing the GPUs it knows.
    """
    pattern = r"(?:(\d{1,6}) ?x ?)?(\d{1,6}) ?x ?([^,]+)(?:, ?ib=(\d+(?:\.\d+)?))?"
    match = re.fullmatch(pattern, text.strip(), re.IGNORECASE)
    if not match or int(match[1] or 1) < 1 or int(match[2]) < 1 or float(match[4] or 1) <= 0:
        raise UserError(
            f"--plan {text} is no cluster; write [NODES x]GPUS x NAME, such as 8xH100-80GB or 2x8xA100-40GB,ib=200"
        )
    key = named_gpu(match[3], text)
    gpu, sources = GPUS[key], {"memory": "table", "network": "guess", **figures_of(key)}
    if match[4]:
        gpu = dataclasses.replace(gpu, network_gbit_per_second=float(match[4]))
        sources["network"] = "given"
    return Cluster(int(match[1] or 1), int(match[2]), match[3].strip(), True, gpu, sources)


def named_gpu(name: str, text: str) -> str:
    """Returns the key in GPUS that `name` means. Raises UserError where it means none, or several."""
    wanted = name.upper().replace(" ", "").replace("NVIDIA", "").replace("-SXM4", "").replace("-SXM", "")
    found = [key for key in GPUS if wanted in (key, key.split("-")[0])]
    if len(found) > 1:
        raise UserError(f"--plan {text}: {name} may be {' or '.join(found)}; give the whole name")
    if not found:
        raise UserError(f"--plan {text}: {name} is not one of the GPUs known; write one of {', '.join(GPUS)}")
    return found[0]


@dataclass(frozen=True)
class Gpu:
    """What the plan knows of a kind of GPU.

    `memory_gib` as CUDA reports it. `peak_tflops`: dense bf16, from NVIDIA's data sheet, as are `hbm_gb_per_second` and
    `fp32_tflops` (None: the 1/16 of the bf16 peak that an A100 has). `matmul_efficiency`: the share of the peak that
    large matmuls reach end to end. `attention_efficiency`: that of flash attention, relative to matmuls.
    `link_gb_per_second`: bus bandwidth of collectives among the GPUs of a node. `network_gbit_per_second`: usual
    network of a node, per GPU.
    """

    memory_gib: float
    peak_tflops: float
    hbm_gb_per_second: float
    matmul_efficiency: float
    attention_efficiency: float
    link_gb_per_second: float
    network_gbit_per_second: float
    fp32_tflops: float | None = None


# Data sheets: NVIDIA's for A100, H100, H200, GH200, L40S, A10 and HGX B200; AWS's for the A10G (G5); the GA102, Ada and
# RTX Blackwell white papers for the GeForce cards. Networks: DGX A100 and H100, AWS p4d for the A100-40GB, or guesses.
# Efficiencies of A100 and H100: model FLOPs, recomputation included, of MPT-13B at 40,960 tokens a micro-batch, in the
# benchmark table of mosaicml/llm-foundry (0.79, 0.59 of the peak with all overheads). Attention: FlashAttention-2
# reaches 0.50 to 0.73 of an A100 and 0.35 of an H100 (Dao 2023; Shah et al. 2024). Links: nccl-tests all-gather and
# all-reduce bus bandwidth published for 8 GPUs. H200 has the H100's chip; every other efficiency is a guess from these.
GPUS = {
    "A100-40GB": Gpu(39.5, 312, 1555, 0.80, 0.75, 231, 50, 19.5),
    "A100-80GB": Gpu(79.1, 312, 2039, 0.80, 0.75, 231, 200, 19.5),
    "H100-80GB": Gpu(79.1, 989, 3350, 0.60, 0.58, 345, 400, 67),
    "H200-141GB": Gpu(139.8, 989, 4800, 0.60, 0.58, 345, 400, 67),
    "B200-180GB": Gpu(178.3, 2250, 8000, 0.60, 0.58, 690, 400, 75),
    "L40S-48GB": Gpu(44.4, 362, 864, 0.60, 0.75, 20, 25, 91.6),
    "A10G-24GB": Gpu(22.0, 70, 600, 0.60, 0.75, 20, 12.5, 35),
    "RTX3090-24GB": Gpu(23.6, 71, 936, 0.80, 0.75, 20, 12.5, 35.6),
    "RTX4090-24GB": Gpu(23.5, 165.2, 1008, 0.70, 0.75, 20, 12.5, 82.6),
    "RTX5090-32GB": Gpu(31.4, 209.5, 1792, 0.70, 0.75, 28, 12.5, 104.8),
    "H100PCIE-80GB": Gpu(79.1, 756, 2039, 0.60, 0.58, 20, 100, 51),
    "H100NVL-94GB": Gpu(93.0, 835, 3938, 0.60, 0.58, 20, 100, 60),
    "H200NVL-141GB": Gpu(139.8, 835, 4800, 0.60, 0.58, 20, 100, 60),
    "GH200-96GB": Gpu(94.5, 989, 4000, 0.60, 0.58, 345, 400, 67),
    "A10-24GB": Gpu(22.0, 125, 600, 0.60, 0.75, 20, 12.5, 31.2),
}
# pcie4, pcie5, nvlink3 and nvlink4: nccl-tests, as above; pcie3 and nvlink5 by the ratio of the nominal rates.
# Guesses: what pinned copies reach of a PCIe 4 x16 link's 32 GB/s, one rank's share of a host's memory bandwidth for an
# offloaded optimizer, and the memory bandwidth of a GPU that is not in the table.
PCIE_GB_PER_SECOND = 20  # among the GPUs of a node over PCIe 4: nccl-tests, as above
HOST_LINK_GB_PER_SECOND = 20
HOST_MEMORY_GB_PER_SECOND = 20
UNKNOWN_HBM_GB_PER_SECOND = 1000


if __name__ == "__main__":
    sys.exit(command_line())
