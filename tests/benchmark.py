"""Measures real tokens/s, MFU and memory of this script against what a user would otherwise run, in one process.

    python tests/benchmark.py --model small --block-size 2048 --data my_data/ \\
           --tokenizer my_tokenizer/ --json ways.json        # the ways against each other
    python tests/benchmark.py --sweep --json sweep.json      # Llama-2-7B and -13B on one large GPU, overhead, profile
    python tests/benchmark.py --sweep --model tiny --block-size 128 --batch-size 4   # the same code on a laptop
    python tests/benchmark.py --overhead                                       # against a bare loop, same math
    python tests/benchmark.py --profile profile.txt                            # top operations of one packed step
    python tests/benchmark.py --checkpoints                                    # how long a checkpoint holds training
    python tests/benchmark.py --loading                                        # memory of loading on 1, 2 and 4 ranks

The ways, all from the same random weights (`--random-init`), on the same documents in the same steps:
    tutorial   the usual loop: the whole prompt tokenised, padded and truncated to the block, HF loss, plain AdamW
    trainer    Hugging Face Trainer: bf16, fused AdamW, documents of like length together, padded to the longest
    padded     this script, documents padded
    packed     this script, documents end to end
    compiled   packed, with compiled layers (in the default set with --compile)
Trainer's own group_by_length would put other documents into a step. Here the documents of a step are sorted by length
instead, which pads almost as little; the padding share says what is left to gain. Activation checkpointing is that of
the script's plan in every way.

Real tokens are those of documents, end-of-sequence included, padding not; what truncation cut away does not count.
MFU: the script's `training_flops` of the real tokens over `peak_flops`; null on a CPU. In each round every way
takes the same documents; rates and ratios are of the sums over all rounds, so a slow spell meets every way. CPU
numbers are good for ratios only. Figures of one process: run it on one GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import io
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NEWS = ROOT / "tests" / "data" / "news"
sys.path.insert(0, str(ROOT))

# Read at the first CUDA allocation; the same for every way.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import accelerate  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from accelerate.utils import set_seed  # noqa: E402
from transformers import (  # noqa: E402
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import train_llama2 as script  # noqa: E402

SHAPES = {  # arguments of LlamaConfig
    "tiny": dict(hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4, vocab_size=1024),
    "small": dict(hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4),
    "1b": dict(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4
    ),
    "7b": script.LLAMA_2["7b"],
    "13b": script.LLAMA_2["13b"],
}
WAYS = ("tutorial", "trainer", "padded", "packed", "compiled")
SWEPT_WAYS = ("packed", "tutorial", "trainer", "padded", "compiled")  # most telling first, should time run out
SWEPT_MODELS, SWEPT_BLOCKS, SWEPT_MICRO_BATCHES = ("13b", "7b"), (2048, 1024, 4096), (1, 4, 16)
SEED, LEARNING_RATE = 42, 1e-5
BUILD_SECONDS_PER_BILLION = 1.5  # guess of what making random weights on a GPU takes, for the time budget
CLOSING_SHARE = 0.2  # of a sweep's time budget, kept for overhead and profile
TIME_MARGIN = 1.5  # a cell starts only where the budget holds its predicted time this often


# ----------------------------------------------------------------------------------------------------------------
# What every way is given
# ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One cell: the same model, and the same documents in the same steps, for every way.

    `config` and `parallel` are those of the script's padded execution. `lengths_whole` are tokens of the documents
    before anything is cut, end-of-sequence included. `part` says which table the cell belongs to.
    """

    model_name: str
    part: str
    config: script.Config
    parallel: script.Parallel
    tokenizer: transformers.PreTrainedTokenizerBase
    documents: script.Documents
    prompts: list[str]
    lengths_whole: np.ndarray
    tokens_cut_share: float
    summaries_cut_share: float
    batches: list[np.ndarray]

    @property
    def device(self) -> torch.device:
        return self.parallel.device

    @property
    def micro_batch_documents(self) -> int:
        """Documents of a micro-batch for the loops that need equal ones: the plan's, or fewer so that it divides."""
        at_most, size = self.parallel.plan.micro_batch_size, self.config.batch_size
        return max(divisor for divisor in range(1, at_most + 1) if size % divisor == 0)


def make_model_folder(folder: Path, model_name: str, tokenizer_folder: str) -> None:
    """Writes a model folder without weights: config and tokenizer, all that --random-init needs."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    sizes: dict[str, Any] = {"vocab_size": 32000, **SHAPES[model_name]}
    sizes["vocab_size"] = max(sizes["vocab_size"], len(tokenizer))
    LlamaConfig(**sizes, max_position_embeddings=4096, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def hook(config: script.Config) -> script.Parallel:
    """Returns what the script's own hook makes of a configuration, without its printed plan."""
    with contextlib.redirect_stdout(io.StringIO()):
        return script.enable_advanced_parallelization(config)


def config_that_fits(options: argparse.Namespace, folder: Path, block_size: int, micro_batch_size: int | None) -> Any:
    """Returns the script's configuration of a cell, and its hook; bf16-states where fp32 masters do not fit.

    Raises UserError where nothing fits.
    """
    settings = dict(
        model_name_or_path=str(folder),
        dataset_name_or_path=options.data,
        block_size=block_size,
        batch_size=options.batch_size,
        micro_batch_size=micro_batch_size,
        lr=LEARNING_RATE,
        seed=SEED,
        activation_checkpointing=options.activation_checkpointing,
        packing="no",
        compile="no",
        random_init=True,
        save_model_dir=str(folder / "run"),
        precision=options.precision,
    )
    try:
        config = script.Config(**settings)
        return config, hook(config)
    except script.UserError:
        if options.precision != "auto" or not torch.cuda.is_available():
            raise
        config = script.Config(**{**settings, "precision": "bf16-states"})
        return config, hook(config)


def make_task(
    options: argparse.Namespace,
    folder: Path,
    model_name: str,
    block_size: int,
    steps: int,
    micro_batch_size: int | None,
    part: str,
) -> Task:
    """Returns one cell. Raises UserError where the model does not fit or the data are too few."""
    config, parallel = config_that_fits(options, folder, block_size, micro_batch_size)
    tokenizer = script.load_tokenizer(parallel)
    pairs, _ = script.load_documents(parallel)["train"]
    documents = script.encode_documents(pairs, tokenizer, parallel)
    prompts = [
        script.PROMPT_OPEN + article + script.PROMPT_CLOSE + summary
        for article, summary in zip(pairs[config.article_column], pairs[config.summary_column], strict=True)
        if article and summary and article.strip() and summary.strip()
    ]
    assert len(prompts) == len(documents)
    columns = documents.dataset.with_format("numpy")
    cut, summaries_cut = (np.asarray(columns[name][:]) for name in ("tokens_cut", "summary_cut"))
    lengths_whole = np.array([len(ids) + 1 for ids in encode(prompts, tokenizer)])
    return Task(
        model_name=model_name,
        part=part,
        config=config,
        parallel=parallel,
        tokenizer=tokenizer,
        documents=documents,
        prompts=prompts,
        lengths_whole=lengths_whole,
        tokens_cut_share=float(cut.sum() / lengths_whole.sum()),
        summaries_cut_share=float(summaries_cut.mean()),
        batches=step_batches(documents, steps, config),
    )


def encode(prompts: Sequence[str], tokenizer: transformers.PreTrainedTokenizerBase) -> list[list[int]]:
    """Returns the whole prompts as ids, beginning-of-sequence included, end-of-sequence not."""
    rows = tokenizer(list(prompts), split_special_tokens=True, verbose=False)["input_ids"]
    return [ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids for ids in rows]


def step_batches(documents: script.Documents, steps: int, config: script.Config) -> list[np.ndarray]:
    """Returns the documents of each step: the script's global batches, epoch after epoch, the full ones."""
    if len(documents) < config.batch_size:
        raise script.UserError(f"--batch-size {config.batch_size} is more than the {len(documents)} training documents")
    batches: list[np.ndarray] = []
    epoch = 0
    while len(batches) < steps:
        of_epoch = script.epoch_batches(documents, epoch, config)
        batches += [batch for batch in of_epoch if len(batch) == config.batch_size]
        epoch += 1
    return batches[:steps]


# ----------------------------------------------------------------------------------------------------------------
# The ways
# ----------------------------------------------------------------------------------------------------------------


class Way:
    """One way to train. `build` once a model, `begin` once a task, then `step` after step; `end` and `free`."""

    name = ""

    def __init__(self) -> None:
        self.model: Any = None
        self.optimizer: Any = None
        self.first_loss: torch.Tensor | None = None
        self.micro_batch_limit = sys.maxsize
        self.resident_bytes = 0

    def build(self, task: Task) -> None:
        """Makes model and optimizer. The weights are those of every other way."""
        raise NotImplementedError

    def begin(self, task: Task) -> None:
        """Prepares the data of a task and sets which layers recompute."""
        raise NotImplementedError

    def step(self) -> int:
        """Takes one optimizer step and returns the tokens that were computed, padding included. No host sync."""
        raise NotImplementedError

    def end(self) -> None:
        """Leaves a task; the model stays."""
        if self.model is not None:
            self.model.zero_grad(set_to_none=True)

    def free(self) -> None:
        self.model = self.optimizer = self.first_loss = None

    def trained_lengths(self, task: Task) -> np.ndarray:
        """Returns the tokens of each document that this way trains on."""
        return task.documents.lengths

    def cut_shares(self, task: Task) -> tuple[float, float]:
        """Returns the share of all tokens that is cut away, and of the documents whose summary or end is cut."""
        return task.tokens_cut_share, task.summaries_cut_share

    def description(self, task: Task) -> str:
        return f"micro-batch {self.micro_batch(task)}, {task.parallel.plan.activation_checkpointing} recomputed"

    def micro_batch(self, task: Task) -> int:
        return min(self.micro_batch_limit, task.micro_batch_documents)

    def shrink(self, task: Task) -> bool:
        """After running out of memory: halves the micro-batch. Returns whether there was anything to halve."""
        size = self.micro_batch(task)
        smaller = [divisor for divisor in range(1, size) if size % divisor == 0]
        self.micro_batch_limit = smaller[-1] if smaller else size
        return bool(smaller)

    def record_loss(self, loss: torch.Tensor) -> None:
        if self.first_loss is None:
            self.first_loss = loss


def stock_model(task: Task) -> transformers.PreTrainedModel:
    """Returns transformers' own model with its own attention and loss, the script's random weights in it."""
    set_seed(SEED)
    model = script.random_model(None, task.parallel)
    model.set_attn_implementation("sdpa")
    model.config.use_cache = False
    return model


def set_recomputation(model: transformers.PreTrainedModel, plan: script.Plan) -> None:
    """Sets which layers recompute, also from a task that recomputed more to one that does less."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    for index, layer in enumerate(model.model.layers):
        layer.gradient_checkpointing = plan.recomputes_layer(index)


class TutorialLoop(Way):
    """The loop most tutorials show, written as they write it."""

    name = "tutorial"

    def build(self, task: Task) -> None:
        self.model = stock_model(task)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)
        self.fused = False

    def shrink(self, task: Task) -> bool:
        """Gives up the temporaries of the default, multi-tensor, AdamW first: they are as large as the weights."""
        if self.fused or self.model is None:
            return super().shrink(task)
        self.fused, self.optimizer = True, None
        release_memory()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=True)
        return True

    def description(self, task: Task) -> str:
        return super().description(task) + (", fused AdamW as memory ran out" if self.fused else "")

    def begin(self, task: Task) -> None:
        set_recomputation(self.model, task.parallel.plan)
        block, eos = task.config.block_size, task.tokenizer.eos_token_id
        rows = [[*ids, eos][:block] for ids in encode(task.prompts, task.tokenizer)]
        self.input_ids = torch.tensor([row + [eos] * (block - len(row)) for row in rows])
        self.attention_mask = torch.tensor([[1] * len(row) + [0] * (block - len(row)) for row in rows])
        self.batches = iter(task.batches)
        self.device, self.autocasts = task.device, task.parallel.plan.precision == "bf16"
        self.size = self.micro_batch(task)

    def step(self) -> int:
        self.model.train()
        batch = torch.from_numpy(next(self.batches))
        micro_batches = batch.split(self.size)
        step_loss = torch.zeros((), device=self.device)
        for indices in micro_batches:
            input_ids = self.input_ids[indices].to(self.device)
            attention_mask = self.attention_mask[indices].to(self.device)
            labels = input_ids.masked_fill(attention_mask == 0, -100)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocasts):
                loss = self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss
            (loss / len(micro_batches)).backward()
            step_loss += loss.detach() / len(micro_batches)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.record_loss(step_loss)
        return self.input_ids[batch].numel()

    def trained_lengths(self, task: Task) -> np.ndarray:
        return np.minimum(task.lengths_whole, task.config.block_size)

    def cut_shares(self, task: Task) -> tuple[float, float]:
        kept = self.trained_lengths(task).sum()
        too_long = task.lengths_whole > task.config.block_size  # the summary is at the end, so it is what is cut
        return float(1 - kept / task.lengths_whole.sum()), float(too_long.mean())


class Gate(transformers.TrainerCallback):
    """Lets Trainer, which owns its loop, take one step at a time: its thread waits here between two steps."""

    def __init__(self) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.leaving = False

    def on_step_end(self, args, state, control, **others):
        self.done.release()
        self.go.acquire()
        control.should_training_stop = self.leaving or control.should_training_stop
        return control


class CountingTrainer(Trainer):
    """Trainer that counts the tokens it computes and keeps the loss of the step on the device."""

    executed_tokens = 0
    step_loss: torch.Tensor | float = 0.0

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.executed_tokens += inputs["input_ids"].numel()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_loss = self.step_loss + loss.detach()
        return loss


class HuggingFaceTrainer(Way):
    """Trainer as someone who knows it would set it up, on documents encoded as the script encodes them."""

    name = "trainer"

    def build(self, task: Task) -> None:
        self.model = stock_model(task)
        self.thread: threading.Thread | None = None

    def begin(self, task: Task) -> None:
        set_recomputation(self.model, task.parallel.plan)
        rows = [self.sorted_rows(task, batch) for batch in task.batches]
        self.folder = tempfile.TemporaryDirectory(prefix="trainer_")
        tokenizer = AutoTokenizer.from_pretrained(task.config.model_name_or_path, padding_side="right")
        tokenizer.pad_token = tokenizer.eos_token  # fills rows up; mask and labels go by length
        size = self.micro_batch(task)
        arguments = TrainingArguments(
            output_dir=self.folder.name,
            max_steps=len(task.batches),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=task.config.batch_size // size,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            bf16=task.parallel.plan.precision == "bf16",
            use_cpu=task.device.type == "cpu",
            train_sampling_strategy="sequential",  # the rows come sorted within each step
            dataloader_num_workers=1,
            dataloader_pin_memory=task.device.type == "cuda",
            logging_strategy="no",
            logging_nan_inf_filter=False,  # it would wait for the device in every micro-batch
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        self.gate, self.error = Gate(), None
        self.trainer = CountingTrainer(
            model=self.model,
            args=arguments,
            train_dataset=[row for step_rows in rows for row in step_rows],
            data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8),
            callbacks=[self.gate],
        )
        self.trainer.remove_callback(transformers.PrinterCallback)
        self.thread = threading.Thread(target=self.train, daemon=True)
        self.thread.start()

    @staticmethod
    def sorted_rows(task: Task, batch: np.ndarray) -> list[dict[str, list[int]]]:
        """Returns the documents of a step, longest first, so that those of a micro-batch are of like length."""
        order = batch[np.argsort(-task.documents.lengths[batch], kind="stable")]
        rows = task.documents.dataset[order]["input_ids"]
        return [dict(input_ids=ids, attention_mask=[1] * len(ids), labels=ids) for ids in map(list, rows)]

    def train(self) -> None:
        self.gate.go.acquire()
        try:
            if not self.gate.leaving:
                self.trainer.train()
        except Exception as error:
            self.error = error
        finally:
            self.gate.done.release()

    def step(self) -> int:
        before = self.trainer.executed_tokens
        self.trainer.step_loss = 0.0
        self.gate.go.release()
        self.gate.done.acquire()
        if self.error is not None:
            raise self.error
        self.record_loss(self.trainer.step_loss)
        return self.trainer.executed_tokens - before

    def end(self) -> None:
        if self.thread is not None:
            self.gate.leaving = True
            self.gate.go.release()
            self.thread.join()
            self.trainer.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.thread = self.trainer = self.error = None
            self.folder.cleanup()
        super().end()


class ThisScript(Way):
    """The script's own execution, by its own functions."""

    def __init__(self, name: str, packing: bool, compiled: bool):
        super().__init__()
        self.name, self.packing, self.compiled = name, packing, compiled

    def own_config(self, task: Task) -> script.Config:
        return dataclasses.replace(
            task.config,
            packing="yes" if self.packing else "no",
            compile="yes" if self.compiled else "no",
            micro_batch_size=task.config.micro_batch_size
            if self.micro_batch_limit == sys.maxsize
            else self.micro_batch_limit,
        )

    def build(self, task: Task) -> None:
        self.config = self.own_config(task)
        self.parallel = hook(self.config)
        set_seed(SEED)
        with contextlib.redirect_stdout(io.StringIO()):
            self.model = script.load_model(self.parallel)
        script.compile_layers(self.model, self.parallel, steps=len(task.batches))
        self.optimizer = script.build_optimizer(self.model, self.config)

    def begin(self, task: Task) -> None:
        self.config = self.own_config(task)
        self.parallel = hook(self.config)
        set_recomputation(self.model, self.parallel.plan)
        self.state = script.TrainingState.fresh(self.parallel.device)
        self.loader = (script.global_batch(task.documents, positions, self.parallel) for positions in task.batches)

    def step(self) -> int:
        batch = next(self.loader)
        result = script.training_step(self.model, self.optimizer, batch, LEARNING_RATE, self.state, self.parallel)
        self.record_loss(result.loss)
        return sum(result.micro_batch_tokens)

    def end(self) -> None:
        self.loader = None
        super().end()

    def micro_batch(self, task: Task) -> int:
        return self.parallel.plan.micro_batch_size

    def description(self, task: Task) -> str:
        return f"micro-batch {self.micro_batch(task)}, {self.parallel.plan.activation_checkpointing} recomputed"


def make_way(name: str) -> Way:
    if name == "tutorial":
        return TutorialLoop()
    if name == "trainer":
        return HuggingFaceTrainer()
    return ThisScript(name, packing=name != "padded", compiled=name == "compiled")


# ----------------------------------------------------------------------------------------------------------------
# Measuring
# ----------------------------------------------------------------------------------------------------------------


class Deadline:
    """The end of the time budget of the whole run."""

    def __init__(self, seconds: float):
        self.ends = time.perf_counter() + seconds

    def seconds_left(self) -> float:
        return self.ends - time.perf_counter()


@dataclass
class Cell:
    """What was measured of one way on one task; `skipped` says why nothing was. A round is `round_steps` steps."""

    way: Way
    task: Task
    skipped: str = ""
    build_seconds: float = 0.0
    first_step_seconds: float = 0.0
    steps_taken: int = 0
    executed_tokens: int = 0
    peak_bytes: int = 0
    first_loss: float | None = None
    round_seconds: list[float] = field(default_factory=list)
    round_cpu_seconds: list[float] = field(default_factory=list)
    round_documents: list[np.ndarray] = field(default_factory=list)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def predicted_step_seconds(way: Way, task: Task) -> float:
    """Returns the plan's own prediction for the tokens that this way computes a step; rough on a CPU."""
    size, block = task.config.batch_size, task.config.block_size
    mean = block if way.name == "tutorial" else float(task.documents.lengths.mean())
    plan = dataclasses.replace(task.parallel.plan, gradient_accumulation_steps=1)
    return script.predict_seconds(task.parallel.shape, task.parallel.cluster, plan, size * mean, mean)["total"]


def build(way: Way, task: Task) -> tuple[float, str]:
    """Builds a way's model; returns the seconds that took, and why it could not."""
    began = time.perf_counter()
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    try:
        way.build(task)
    except (script.UserError, torch.OutOfMemoryError) as error:
        way.free()
        release_memory()
        return 0.0, script.first_line(error)
    synchronise(task.device)
    way.resident_bytes = (torch.cuda.memory_allocated() if torch.cuda.is_available() else 0) - before
    return time.perf_counter() - began, ""


def warm_up(cell: Cell, steps: int) -> None:
    """Begins a task and takes its first steps, with smaller micro-batches where memory runs out."""
    while True:
        began = time.perf_counter()
        before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        cell.way.first_loss = None
        try:
            cell.way.begin(cell.task)
            run_steps(cell, 1)
            cell.first_step_seconds = time.perf_counter() - began
            run_steps(cell, steps - 1)
        except torch.OutOfMemoryError as error:
            cell.skipped = f"out of memory: {script.first_line(error)[:80]}"
        except script.UserError as error:
            cell.skipped = script.first_line(error)
        else:
            after = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
            cell.way.resident_bytes += after - before  # moments, made by the first step
            return
        out_of_memory = cell.skipped.startswith("out of memory")
        with contextlib.suppress(Exception):
            cell.way.end()
        release_memory()
        if not out_of_memory or cell.task.part == "micro-batch" or not cell.way.shrink(cell.task):
            return
        cell.skipped, cell.executed_tokens, cell.steps_taken = "", 0, 0


def run_steps(cell: Cell, steps: int) -> float:
    """Takes steps and returns the seconds until the device was done with them; keeps the peak of this way's memory."""
    others = 0
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        others = max(0, torch.cuda.memory_allocated() - cell.way.resident_bytes)
    began = time.perf_counter()
    for _ in range(steps):
        cell.executed_tokens += cell.way.step()
        cell.steps_taken += 1
    synchronise(cell.task.device)
    seconds = time.perf_counter() - began
    if torch.cuda.is_available():
        cell.peak_bytes = max(cell.peak_bytes, torch.cuda.max_memory_allocated() - others)
    return seconds


def run_rounds(cells: Sequence[Cell], options: argparse.Namespace, deadline: Deadline) -> None:
    """Warms the cells up, then measures them round by round, each round beginning with another way."""
    for cell in cells:
        needed = TIME_MARGIN * predicted_step_seconds(cell.way, cell.task) * (options.warmup + options.round_steps)
        if not cell.skipped and needed > deadline.seconds_left():
            cell.skipped = f"no time left in --budget-seconds: needs about {needed:.0f} s"
        if not cell.skipped:
            warm_up(cell, options.warmup)
    alive = [cell for cell in cells if not cell.skipped]
    for number in range(options.steps // options.round_steps):
        if number and deadline.seconds_left() < sum(cell.round_seconds[-1] for cell in alive):
            break
        turn = number % max(1, len(alive))
        for cell in alive[turn:] + alive[:turn]:
            first = cell.steps_taken
            cpu = time.process_time()
            cell.round_seconds.append(run_steps(cell, options.round_steps))
            cell.round_cpu_seconds.append(time.process_time() - cpu)
            cell.round_documents.append(np.concatenate(cell.task.batches[first : first + options.round_steps]))
    for cell in alive:
        cell.first_loss = cell.way.first_loss.item()
        cell.way.end()


def row_of(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Returns what is printed and written of a cell."""
    way, task = cell.way, cell.task
    row: dict[str, Any] = dict(
        part=task.part,
        model=task.model_name,
        way=way.name,
        block_size=task.config.block_size,
        batch_size=task.config.batch_size,
        precision=task.parallel.plan.precision,
        skipped=cell.skipped or None,
    )
    if cell.skipped:
        return row
    lengths = way.trained_lengths(task)
    tokens = [int(lengths[documents].sum()) for documents in cell.round_documents]
    squares = [int((lengths[documents] ** 2).sum()) for documents in cell.round_documents]
    seconds = sum(cell.round_seconds)
    peak = script.peak_flops(task.parallel.cluster, task.parallel.plan.precision)
    flops = script.training_flops(task.parallel.shape, sum(tokens), sum(squares))
    all_documents = np.concatenate(task.batches[: cell.steps_taken])
    tokens_cut_share, summaries_cut_share = way.cut_shares(task)
    return row | dict(
        micro_batch_size=way.micro_batch(task),
        execution=way.description(task),
        tokens_per_second=sum(tokens) / seconds,
        documents_per_second=sum(map(len, cell.round_documents)) / seconds,
        mfu=flops / seconds / peak if peak else None,
        peak_memory_gib=cell.peak_bytes / script.GIB if cell.peak_bytes else None,
        padding_share=1 - float(lengths[all_documents].sum()) / cell.executed_tokens,
        tokens_cut_share=tokens_cut_share,
        summaries_cut_share=summaries_cut_share,
        step_seconds=seconds / len(cell.round_seconds) / options.round_steps,
        build_seconds=cell.build_seconds,
        first_step_seconds=cell.first_step_seconds,
        first_loss=cell.first_loss,
        rounds_tokens=tokens,
        rounds_seconds=cell.round_seconds,
        rounds_cpu_seconds=cell.round_cpu_seconds,
        documents_of_first_step=task.batches[0].tolist(),
    )


def add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Adds `over_tutorial` and `over_trainer`: real tokens/s against theirs, over the rounds that both took.

    `cpu_over_...`: the same per second of this process's CPU time, which a busy machine disturbs less. CPU runs only.
    """
    for row in rows:
        for base in ("tutorial", "trainer"):
            others = [
                other
                for other in rows
                if other["way"] == base
                and other["part"] == row["part"] == "ways"
                and all(other[name] == row[name] for name in ("model", "block_size", "batch_size"))
                and not other["skipped"]
            ]
            for prefix in ("", "cpu_"):
                row[f"{prefix}over_{base}"] = None
                if others and not row["skipped"] and not (prefix and torch.cuda.is_available()):
                    rounds = min(len(row["rounds_tokens"]), len(others[0]["rounds_tokens"]))
                    mine, theirs = (
                        sum(each["rounds_tokens"][:rounds]) / sum(each[f"rounds_{prefix}seconds"][:rounds])
                        for each in (row, others[0])
                    )
                    row[f"{prefix}over_{base}"] = mine / theirs


def interleaves(ways: Sequence[str], task: Task) -> bool:
    """Returns whether the models and optimizers of all ways fit the device side by side."""
    state_bytes = 4 * task.parallel.plan.state_bytes * task.parallel.shape.parameters * len(ways)
    return state_bytes < 0.7 * task.parallel.cluster.memory_gib * script.GIB


def compare_ways(options: argparse.Namespace, folder: Path, deadline: Deadline) -> list[dict[str, Any]]:
    """Measures the ways of --ways on each model and block, taking turns where their models fit side by side."""
    rows: list[dict[str, Any]] = []
    for model_name in options.models:
        model_folder = folder / model_name
        make_model_folder(model_folder, model_name, options.tokenizer)
        for block in options.block_sizes:
            task = make_task(options, model_folder, model_name, block, steps_of(options), options.micro, "ways")
            groups = [options.ways] if interleaves(options.ways, task) else [[name] for name in options.ways]
            say(f"{model_name}, block {block}: {'taking turns' if len(groups) == 1 else 'one after another'}")
            for names in groups:
                cells = []
                for name in names:
                    cell = Cell(make_way(name), task)
                    cell.build_seconds, cell.skipped = build(cell.way, task)
                    cells.append(cell)
                run_rounds(cells, options, deadline)
                rows += [row_of(cell, options) for cell in cells]
                for cell in cells:
                    cell.way.free()
                release_memory()
    return rows


def sweep(options: argparse.Namespace, folder: Path, deadline: Deadline) -> list[dict[str, Any]]:
    """The GPU programme: models x ways x blocks, and packed against micro-batch size, one model at a time in memory.

    The time budget is shared among the models by their size, a billion parameters standing for what each costs anyhow.
    What does not fit, by the plan or in fact, and what the time budget does not hold, is left out with the reason.
    """
    rows: list[dict[str, Any]] = []
    sizes = [1e9 + script.model_shape(LlamaConfig(**SHAPES[name])).parameters for name in options.models]
    for number, model_name in enumerate(options.models):
        model_deadline = Deadline(deadline.seconds_left() * sizes[number] / sum(sizes[number:]))
        make_model_folder(folder / model_name, model_name, options.tokenizer)
        tasks, left_out = swept_tasks(options, folder / model_name, model_name)
        rows += left_out
        for name in options.ways:
            own_tasks = [task for task in tasks if is_swept(task, name, options)]
            if own_tasks:
                rows += sweep_one_way(name, own_tasks, options, model_deadline)
    return rows


def close_sweep(options: argparse.Namespace, folder: Path, deadline: Deadline) -> dict[str, Any]:
    """Returns the overhead and the profile of the smallest model swept, where there is time left for them."""
    smallest = min(options.models, key=lambda name: script.model_shape(LlamaConfig(**SHAPES[name])).parameters)
    chosen = {"models": [smallest], "block_sizes": options.block_sizes[:1], "ways": ["packed"], "steps": 6}
    closing, found = argparse.Namespace(**{**vars(options), **chosen}), {}
    needed = 4 * BUILD_SECONDS_PER_BILLION * script.model_shape(LlamaConfig(**SHAPES[smallest])).parameters / 1e9
    for name, measure, words in (
        ("overhead", lambda: measure_overhead(closing, folder, deadline), overhead_words),
        ("profile", lambda: write_profile(closing, folder), str),
    ):
        if needed < deadline.seconds_left():
            found[name] = measure()
            say(f"\n{words(found[name])}")
            release_memory()
        else:
            say(f"{name:<10}skipped: no time left in --budget-seconds, needs about {needed:.0f} s")
    return found


def news_like(folder: Path, options: argparse.Namespace) -> Path:
    """Writes stories as long as CNN/DailyMail's, of the words of the shipped ones, and returns their folder.

    Llama-2 tokens of a real document: 1,099 on average, half of them over about 1,000, which a log-normal distribution
    of that median and mean has.
    """
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    stories = [json.loads(line) for line in (NEWS / "train.jsonl").read_text().splitlines()]
    words = " ".join(story["article"] for story in stories).split()
    tokens_per_word = len(tokenizer(" ".join(words))["input_ids"]) / len(words)
    draw = np.random.default_rng(SEED)
    lengths = draw.lognormal(math.log(1000), math.sqrt(2 * math.log(1099 / 1000)), 4 * options.batch_size * 4)
    folder.mkdir()
    for split, own in (("train", lengths), ("validation", lengths[:2])):
        with (folder / f"{split}.jsonl").open("w") as stream:
            for length in own:
                summary = stories[int(draw.integers(len(stories)))]["highlights"]
                start, count = int(draw.integers(len(words))), round(length / tokens_per_word)
                article = " ".join(itertools.islice(itertools.cycle(words), start, start + max(20, count - 50)))
                stream.write(json.dumps({"article": article, "highlights": summary}) + "\n")
    say(
        f"data      made up: {len(lengths)} documents of about {lengths.mean():,.0f} tokens, "
        f"median {np.median(lengths):,.0f}"
    )
    return folder


def is_swept(task: Task, way_name: str, options: argparse.Namespace) -> bool:
    """Returns whether a way takes part in a task: those that a user chooses between on every block, others on one."""
    if task.part == "micro-batch":
        return way_name == "packed"
    return way_name in ("packed", "tutorial", "trainer") or task.config.block_size == options.block_sizes[0]


def swept_tasks(options: argparse.Namespace, folder: Path, model_name: str) -> tuple[list[Task], list[dict[str, Any]]]:
    """Returns the tasks of a model, and rows for those that the plan says do not fit."""
    sizes = [size for size in SWEPT_MICRO_BATCHES if size <= options.batch_size]
    wanted = [(block, None, "ways") for block in options.block_sizes]
    wanted += [(options.block_sizes[0], size, "micro-batch") for size in sizes]
    tasks, left_out = [], []
    for block, size, part in wanted:
        try:
            tasks.append(make_task(options, folder, model_name, block, steps_of(options), size, part))
        except script.UserError as error:
            for way in options.ways if part == "ways" else ["packed"]:
                row = dict(part=part, model=model_name, way=way, block_size=block, batch_size=options.batch_size)
                left_out.append(row | dict(micro_batch_size=size, precision=None, skipped=script.first_line(error)))
    return tasks, left_out


def sweep_one_way(
    name: str, tasks: Sequence[Task], options: argparse.Namespace, deadline: Deadline
) -> list[dict[str, Any]]:
    """Builds one way's model once and takes it through its tasks."""
    rows, way = [], make_way(name)
    needed = BUILD_SECONDS_PER_BILLION * tasks[0].parallel.shape.parameters / 1e9
    needed += script.COMPILE_SECONDS / 2 if way.name == "compiled" else 0.0
    reason, build_seconds = f"no time left in --budget-seconds: needs about {needed:.0f} s", 0.0
    if needed < deadline.seconds_left():
        build_seconds, reason = build(way, tasks[0])
    for task in tasks:
        cell = Cell(way, task, skipped=reason, build_seconds=build_seconds)
        way.micro_batch_limit = sys.maxsize
        run_rounds([cell], options, deadline)
        rows.append(row_of(cell, options))
        say(row_words(rows[-1]))
    way.free()
    release_memory()
    return rows


def steps_of(options: argparse.Namespace) -> int:
    return options.warmup + options.steps


# ----------------------------------------------------------------------------------------------------------------
# Overhead and profile
# ----------------------------------------------------------------------------------------------------------------


def measure_overhead(options: argparse.Namespace, folder: Path, deadline: Deadline) -> dict[str, Any]:
    """Returns the script's time per step over a bare loop's that does the same math on the same micro-batches.

    The script's side is the loop of its main(): data loader, learning rate, step, log, stop signals. The bare side
    is given its micro-batches on the device. Same model, same optimizer, taking turns, each first every other time.
    CPU seconds are those of this process, which leaves the data worker out; they are less noisy on a shared machine.
    """
    model_name, block = options.models[0], options.block_sizes[0]
    make_model_folder(folder / model_name, model_name, options.tokenizer)
    task = make_task(options, folder / model_name, model_name, block, steps_of(options), options.micro, "overhead")
    way = make_way("padded" if options.ways == ["padded"] else "packed")
    way.build(task)
    config = dataclasses.replace(way.config, num_train_epochs=1 + steps_of(options), max_steps=steps_of(options))
    Path(config.save_model_dir).mkdir(parents=True, exist_ok=True)
    parallel, total_steps = dataclasses.replace(way.parallel, config=config), steps_of(options)
    state = script.TrainingState.fresh(parallel.device)
    prepared = [script.global_batch(task.documents, positions, parallel) for positions in task.batches]
    steps_per_epoch = math.ceil(len(task.documents) / config.batch_size)
    with script.StopSignals(parallel) as stop, contextlib.redirect_stdout(io.StringIO()):
        log = script.RunLog(parallel, state, total_steps, steps_per_epoch, compiled=way.compiled, async_save=False)
        making = (script.global_batch(task.documents, positions, parallel) for positions in task.batches)
        waited = log.timing_the_wait(making)
        seconds: dict[str, list[tuple[float, float]]] = {"script": [], "bare": []}
        for index in range(total_steps):
            bare_batch = on_device(prepared[index], parallel.device)
            turns: list[tuple[str, Callable[[], None]]] = [
                ("script", lambda: script_step(way, next(waited), parallel, state, total_steps, log, stop)),
                ("bare", lambda batch=bare_batch: bare_step(way.model, way.optimizer, batch, config, parallel)),
            ]
            for name, step in turns if index % 2 else turns[::-1]:
                seconds[name].append(timed(step, parallel.device))
            pair_seconds = seconds["script"][-1][0] + seconds["bare"][-1][0]
            if stop.agreed() or (index > options.warmup and deadline.seconds_left() < pair_seconds):
                break
        log.bar.close()
    measured = {name: values[options.warmup :] for name, values in seconds.items()}
    pairs = list(zip(measured["script"], measured["bare"], strict=True))
    return dict(
        model=model_name,
        way=way.name,
        block_size=block,
        batch_size=config.batch_size,
        micro_batches=len(prepared[0].micro_batches),
        pairs=len(pairs),
        script_step_seconds=statistics.median(wall for wall, _ in measured["script"]),
        bare_step_seconds=statistics.median(wall for wall, _ in measured["bare"]),
        wall_ratio_median=statistics.median(ours[0] / bare[0] for ours, bare in pairs),
        wall_ratio_quartiles=quartiles([ours[0] / bare[0] for ours, bare in pairs]),
        cpu_ratio_median=statistics.median(ours[1] / bare[1] for ours, bare in pairs),
        cpu_ratio_quartiles=quartiles([ours[1] / bare[1] for ours, bare in pairs]),
        fastest_ratio=min(wall for wall, _ in measured["script"]) / min(wall for wall, _ in measured["bare"]),
    )


def quartiles(values: Sequence[float]) -> list[float]:
    return [float(each) for each in np.percentile(values, [25, 75])]


def timed(step: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Returns wall seconds and CPU seconds of this process until the device is done with a step."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    synchronise(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def script_step(way, batch, parallel, state, total_steps, log, stop) -> None:
    """One turn of the loop in the script's main(), where nothing is evaluated or saved."""
    stop.agreed()
    log.evaluation_due(state)
    script.stop_if_broken(state, saving=False)
    stop.seconds_to_leave = log.seconds_per_step()
    lr = script.learning_rate(state.step, total_steps, parallel.config)
    log.step(state, script.training_step(way.model, way.optimizer, batch, lr, state, parallel, stop))


def on_device(batch: script.GlobalBatch, device: torch.device) -> script.GlobalBatch:
    moved = [{name: tensor.to(device) for name, tensor in each.items()} for each in batch.micro_batches]
    return dataclasses.replace(batch, micro_batches=moved)


def bare_step(model, optimizer, batch: script.GlobalBatch, config: script.Config, parallel: script.Parallel) -> None:
    """The same math with nothing around it: forward, backward, clip, step."""
    optimizer.grad_scale = optimizer.found_inf = None
    for micro_batch in batch.micro_batches:
        inputs: dict[str, Any] = {name: tensor for name, tensor in micro_batch.items() if name != "labels"}
        if parallel.plan.packing:
            inputs["max_length"] = parallel.config.block_size
        with torch.autocast(parallel.device.type, torch.bfloat16, enabled=parallel.plan.autocasts):
            loss = model(**inputs, use_cache=False)
        (loss / batch.label_tokens).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


def write_profile(options: argparse.Namespace, folder: Path) -> str:
    """Returns a table of the operations that one step of the script takes longest in."""
    model_name, block = options.models[0], options.block_sizes[0]
    make_model_folder(folder / model_name, model_name, options.tokenizer)
    task = make_task(options, folder / model_name, model_name, block, steps_of(options), options.micro, "profile")
    way = make_way(next((name for name in reversed(options.ways) if name not in ("tutorial", "trainer")), "packed"))
    cell = Cell(way, task)
    cell.build_seconds, cell.skipped = build(way, task)
    if not cell.skipped:
        warm_up(cell, options.warmup)
    if cell.skipped:
        return cell.skipped
    on_gpu = task.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    with torch.profiler.profile(activities=activities) as profiler:
        seconds = run_steps(cell, 1)
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=60)
    way.end()
    return f"{model_name}, {way.name}, block {block}, {seconds:.3f} s under the profiler\n{table}"


# ----------------------------------------------------------------------------------------------------------------
# Telling
# ----------------------------------------------------------------------------------------------------------------


def say(*words: object) -> None:
    print(*words, flush=True)


def machine_description() -> dict[str, Any]:
    """Returns hardware, versions and commit, which every figure belongs to."""
    on_gpu = torch.cuda.is_available()

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False
        ).stdout.strip()

    return dict(
        device=torch.cuda.get_device_name() if on_gpu else f"CPU {platform.processor() or platform.machine()}",
        memory_gib=torch.cuda.get_device_properties().total_memory / script.GIB if on_gpu else None,
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        load_average=os.getloadavg()[0],
        torch=torch.__version__,
        transformers=transformers.__version__,
        accelerate=accelerate.__version__,
        cuda=torch.version.cuda,
        commit=git("rev-parse", "--short", "HEAD") or os.environ.get("GIT_COMMIT", ""),
        uncommitted_changes=bool(git("status", "--porcelain", "--", "train_llama2.py", "tests/benchmark.py")),
    )


def number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale, form)


COLUMNS = (
    ("model", 6), ("block", 6), ("way", 9), ("micro", 6), ("tokens/s", 10), ("MFU", 6), ("GiB", 7), ("padding", 8),
    ("cut", 6), ("summaries cut", 14), ("step s", 8), ("1st step s", 11), ("x tutorial", 11), ("x trainer", 10),
    ("by CPU time", 16),
)  # fmt: skip


def header_words() -> str:
    return "".join(f"{title:>{width}}" for title, width in COLUMNS)


def row_words(row: dict[str, Any]) -> str:
    """Returns a row of the table; `cut` is of tokens, `1st step s` counts the making of the model too."""
    begin = f"{row['model']:>6}{row['block_size']:>6}{row['way']:>9}"
    if row["skipped"]:
        micro = row.get("micro_batch_size")
        return f"{begin}{micro or '':>6}  skipped: {row['skipped']}"
    values = (
        str(row["micro_batch_size"]),
        number(row["tokens_per_second"], ",.0f"),
        number(row["mfu"], ".1%"),
        number(row["peak_memory_gib"], ".1f"),
        number(row["padding_share"], ".1%"),
        number(row["tokens_cut_share"], ".1%"),
        number(row["summaries_cut_share"], ".0%"),
        number(row["step_seconds"], ".3f"),
        number(row["build_seconds"] + row["first_step_seconds"], ".1f"),
        number(row.get("over_tutorial"), ".2f"),
        number(row.get("over_trainer"), ".2f"),
        "/".join(number(row.get(f"cpu_over_{base}"), ".2f") for base in ("tutorial", "trainer")),
    )
    return begin + "".join(f"{value:>{width}}" for value, (_, width) in zip(values, COLUMNS[3:], strict=True))


def print_tables(rows: Sequence[dict[str, Any]]) -> None:
    titles = {"ways": "real tokens/s of the ways", "micro-batch": "packed, against the documents of a micro-batch"}
    for part, title in titles.items():
        if chosen := [row for row in rows if row["part"] == part]:
            say("\n".join(["", title, header_words(), *map(row_words, sorted(chosen, key=row_order))]))


def row_order(row: dict[str, Any]) -> tuple:
    return row["model"], row["block_size"], WAYS.index(row["way"]), row.get("micro_batch_size") or 0


def overhead_words(overhead: dict[str, Any]) -> str:
    low, high = overhead["cpu_ratio_quartiles"]
    wall_low, wall_high = overhead["wall_ratio_quartiles"]
    return (
        f"overhead  {overhead['model']}, {overhead['way']}, block {overhead['block_size']}, {overhead['pairs']} pairs "
        f"of steps: script {overhead['script_step_seconds']:.4f} s, bare loop {overhead['bare_step_seconds']:.4f} s; "
        f"ratio of wall time {overhead['wall_ratio_median']:.4f} (quartiles {wall_low:.3f} to {wall_high:.3f}), "
        f"of CPU time {overhead['cpu_ratio_median']:.4f} ({low:.3f} to {high:.3f}), "
        f"of the fastest steps {overhead['fastest_ratio']:.4f}"
    )


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints, and loading
# ----------------------------------------------------------------------------------------------------------------

HALF_A_BILLION = dict(hidden_size=1536, intermediate_size=4224, num_hidden_layers=14, num_attention_heads=24)
A_QUARTER_OF_A_BILLION = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=16, num_attention_heads=16)


def measure_checkpoints(folder: Path, saves: int) -> dict[str, Any]:
    """Returns how long a checkpoint of about 6 GB holds training, waited for and in the background, taking turns.

    `pause` is the time the loop waits, `written` the time until the checkpoint has its final name.
    """
    LlamaConfig(**HALF_A_BILLION, architectures=["LlamaForCausalLM"]).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(ROOT / "tests" / "data" / "tiny_llama").save_pretrained(folder / "model")
    config = script.Config(
        model_name_or_path=str(folder / "model"), dataset_name_or_path=str(NEWS), random_init=True, block_size=64,
        batch_size=1, keep_checkpoints=1, async_save="yes", save_model_dir=str(folder / "run"),
    )  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ("waited for", "in the background", "written", "meanwhile")}
    with hook(config) as parallel, contextlib.redirect_stdout(io.StringIO()):
        script.prepare_save_folder(parallel)
        documents, _ = script.load_data(script.load_tokenizer(parallel), parallel)
        model = script.load_model(parallel)
        optimizer, state = script.build_optimizer(model, config), script.TrainingState.fresh(parallel.device)
        batch = script.global_batch(documents, np.arange(1), parallel)

        def step() -> float:
            wall, _ = timed(
                lambda: script.training_step(model, optimizer, batch, LEARNING_RATE, state, parallel), parallel.device
            )
            return wall

        step()
        alone = statistics.median(step() for _ in range(4))
        with script.Checkpoints(parallel, documents, total_steps=1) as checkpoints:
            for turn in range(2 * saves):
                checkpoints.asynchronous = bool(turn % 2)
                step()
                checkpoints.save(model, optimizer, state)
                seconds["in the background" if turn % 2 else "waited for"].append(checkpoints.pause_seconds)
                while checkpoints.pending is not None and not checkpoints.pending.done():
                    seconds["meanwhile"].append(step())
                checkpoints.wait()
                seconds["written"].append(checkpoints.seconds)
        gib = sum(file.stat().st_size for file in (folder / "run" / "checkpoints").rglob("*")) / script.GIB
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    say(
        f"checkpoint of {gib:.2f} GiB, medians of {saves} saves: training held {medians['in the background']:.1f} s "
        f"in the background, {medians['waited for']:.1f} s when waited for; written after {medians['written']:.1f} s; "
        f"a step takes {alone:.2f} s, and {medians['meanwhile']:.2f} s while a checkpoint is written"
    )
    return dict(gib=gib, saves=saves, step_seconds=alone, **medians)


def measure_loading(folder: Path) -> list[dict[str, Any]]:
    """Returns the memory that loading takes on the largest of 1, 2 and 4 ranks, for about 1 GB in fp32. Linux only.

    `added_mib` are anonymous pages, `peak_mib` counts the mapped pages of the weight file too.
    """
    model = LlamaForCausalLM(LlamaConfig(**A_QUARTER_OF_A_BILLION, vocab_size=32_000))
    whole_mib = sum(parameter.numel() for parameter in model.parameters()) * 4 / 2**20
    model.to(torch.float16).save_pretrained(folder)  # as Llama-2's own checkpoint is
    AutoTokenizer.from_pretrained(ROOT / "tests" / "data" / "tiny_llama").save_pretrained(folder)
    say(f"model of {whole_mib:,.0f} MiB in fp32; MiB of the largest rank")
    results = []
    for ranks in (1, 2, 4):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        program = [str(ROOT / "tests" / "ranks" / "load_and_measure.py"), str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        run = subprocess.run([*launcher, *program], env=environment, capture_output=True, text=True, check=True)
        result = json.loads(next(line[6:] for line in run.stdout.splitlines() if line.startswith("RESULT")))
        results.append(dict(ranks=ranks, **result))
        say(f"{ranks} ranks: held {result['held_mib']:,.0f}, added {result['added_mib']:,.0f}, "
            f"peak {result['peak_mib']:,.0f}")  # fmt: skip
    return results


# ----------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", "--shape", dest="models", nargs="+", choices=SHAPES, help="random weights of this shape")
    add("--block-size", dest="block_sizes", nargs="+", type=int)
    add("--batch-size", type=int, help="documents per step; default 8, with --sweep 16")
    add("--micro-batch-size", dest="micro", type=int, help="default: what the script's plan chooses")
    add("--steps", type=int, help="measured steps of each way; default 6, with --sweep 2")
    add("--round-steps", type=int, default=1, help="steps a way takes before the next one has its turn")
    add("--warmup", type=int, help="steps before, not measured; default 2, with --sweep 1")
    add(
        "--data",
        help="folder as the script takes it; default tests/data/news, with --sweep the lengths of CNN/DailyMail",
    )
    add("--tokenizer", help="folder of the tokenizer; default tests/data/tiny_llama")
    add("--ways", nargs="+", choices=WAYS)
    add("--compile", action="store_true", help="measure `compiled` too")
    add("--precision", default="auto", choices=("auto", "bf16", "fp32", "bf16-states"))
    add("--activation-checkpointing", default="auto", choices=("auto", *script.RECOMPUTATION_LEVELS))
    add("--sweep", action="store_true", help="the GPU programme: 7B, 13B, blocks, micro-batches")
    add("--budget-seconds", type=float, default=440, help="cells that do not fit into it are skipped")
    add("--overhead", action="store_true", help="the script's steps over a bare loop's")
    add("--profile", metavar="FILE", help="write the top operations of one step")
    add("--checkpoints", type=int, nargs="?", const=4, metavar="SAVES", help="how long a checkpoint holds training")
    add("--loading", action="store_true", help="the memory that loading takes on 1, 2 and 4 ranks")
    add("--json", metavar="FILE", help="write everything there")
    options = parser.parse_args(argv)
    options.models = options.models or list(SWEPT_MODELS if options.sweep else ["tiny"])
    options.block_sizes = options.block_sizes or list(SWEPT_BLOCKS if options.sweep else [512])
    options.batch_size = options.batch_size or (16 if options.sweep else 8)
    options.steps = options.steps or (2 if options.sweep else 6)
    options.warmup = options.warmup or (1 if options.sweep else 2)
    default_ways = list(SWEPT_WAYS) if options.sweep else [way for way in WAYS if way != "compiled" or options.compile]
    if options.sweep and not torch.cuda.is_available() and not options.compile:
        default_ways.remove("compiled")
    options.ways = options.ways or default_ways
    default_tokenizer = ROOT / "tests" / "data" / "tiny_llama"
    options.tokenizer = options.tokenizer or str(default_tokenizer)
    options.steps = max(1, options.steps // options.round_steps) * options.round_steps
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("this measures one process; start it with python, not torchrun")
    return options


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    script.quieten_libraries(speaks=False, quiet=True)
    yield


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs what the options ask for; returns what --json writes."""
    options, began = parse_options(argv), time.perf_counter()
    deadline, machine = Deadline(options.budget_seconds), machine_description()
    say(
        f"machine   {machine['device']}, {machine['cores']} cores; torch {machine['torch']}, transformers "
        f"{machine['transformers']}; commit {machine['commit']}{' + changes' * machine['uncommitted_changes']}"
    )
    if not torch.cuda.is_available():
        say(f"note      a CPU run: good for ratios only (load average {machine['load_average']:.1f})")
    report: dict[str, Any] = dict(machine=machine, options=vars(options), rows=[], overhead=None, profile=None)
    with quiet_libraries(), tempfile.TemporaryDirectory(prefix="benchmark_") as name:
        folder = Path(name)
        options.data = options.data or str(news_like(folder / "stories", options) if options.sweep else NEWS)
        if options.overhead:
            report["overhead"] = measure_overhead(options, folder, deadline)
            say(overhead_words(report["overhead"]))
        elif options.checkpoints:
            report["checkpoints"] = measure_checkpoints(folder, options.checkpoints)
        elif options.loading:
            report["loading"] = measure_loading(folder)
        elif options.profile:
            report["profile"] = write_profile(options, folder)
            Path(options.profile).write_text(report["profile"])
            say(report["profile"])
        else:
            closing = CLOSING_SHARE * options.budget_seconds if options.sweep else 0.0
            rows_deadline = Deadline(deadline.seconds_left() - closing)
            report["rows"] = (sweep if options.sweep else compare_ways)(options, folder, rows_deadline)
            add_ratios(report["rows"])
            print_tables(report["rows"])
            if options.sweep:
                report |= close_sweep(options, folder, deadline)
    report["seconds"] = time.perf_counter() - began
    say(f"\ntook      {report['seconds']:.0f} s")
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2))
    return report


if __name__ == "__main__":
    try:
        main()
    except script.UserError as error:
        sys.exit("\n".join(f"error: {problem}" for problem in error.problems))
