"""Measures the script on this machine: against the loops it replaces, against its own plan, its saves and its loads.

    python tests/benchmark.py                              # the ways to train, on the same documents, on one GPU or CPU
    python tests/benchmark.py --sweep --json sweep.json    # Llama-2-13B and 7B on all GPUs: measured against planned
    python tests/benchmark.py --sweep --model tiny --block-size 128 --batch-size 4   # the same code on a laptop
    python tests/benchmark.py --checkpoints                # how long a checkpoint holds training
    python tests/benchmark.py --loading                    # the memory that loading takes on 1, 2 and 4 ranks

Flags that are not the benchmark's own go to every run of the script, such as `--precision bf16-states`. The ways start
from the same random weights and train on the same documents in the same steps, with the plan's recomputation:
    tutorial   the usual loop: the whole prompt tokenised, padded and cut to the block, HF loss, plain AdamW
    trainer    Hugging Face Trainer: bf16, fused AdamW, documents of similar length together, padded to the longest
    padded     this script, documents padded
    packed     this script, documents end to end
    compiled   packed, with compiled layers
Trainer's own group_by_length would put other documents into a step. Here the documents of a step are sorted by length
instead, which pads almost as little.

Every run is a process of its own, and its figures come from its `metrics.jsonl` and `train_config.json`. The script's
runs are its own main() without evaluations, checkpoints and the final model. Real tokens are those of documents,
end-of-sequence included, padding not; what is cut away does not count. On a CPU only ratios mean anything.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NEWS = ROOT / "tests" / "data" / "news"
TINY_LLAMA = ROOT / "tests" / "data" / "tiny_llama"
sys.path.insert(0, str(ROOT))  # conftest is not imported: it gives its processes one thread and a rarer collector

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: E402

import train_llama2 as script  # noqa: E402

SHAPES = {  # arguments of LlamaConfig
    "tiny": dict(hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4, vocab_size=1024),
    "small": dict(hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4),
    "250m": dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=16, num_attention_heads=16),
    "500m": dict(hidden_size=1536, intermediate_size=4224, num_hidden_layers=14, num_attention_heads=24),
    "7b": script.LLAMA_2["7b"],
    "13b": script.LLAMA_2["13b"],
}
WAYS = {  # program of this file, and its flags
    "tutorial": ("tutorial", ["--packing", "no", "--compile", "no"]),
    "trainer": ("trainer", ["--packing", "no", "--compile", "no"]),
    "padded": ("train", ["--packing", "no", "--compile", "no"]),
    "packed": ("train", ["--packing", "yes", "--compile", "no"]),
    "compiled": ("train", ["--packing", "yes", "--compile", "yes"]),
}
SWEPT_MICRO_BATCHES = (1, 4, 16)
WARMUP_STEPS = 2  # that do not count: the first one allocates and compiles, the second may compile again
WHAT = {"model": ("model", ""), "block": ("block_size", ""), "way": ("way", ""), "micro": ("micro_batch_size", "")}
AUDIT = re.compile(r"train: ([\d,]+) documents, .*; ([\d,]+) summaries cut; .*?([\d.]+)% padding")  # what a run says
SAVED = re.compile(r"^saved .*\(([\d.]+) GiB\) in ([\d.]+) s(?:, training held for ([\d.]+) s)?$", re.M)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures what the options ask for; returns what --json writes."""
    options, began = parse_options(argv), time.monotonic()
    report: dict[str, Any] = dict(machine=machine_description(), options=vars(options))
    print(f"machine   {', '.join(f'{name} {value}' for name, value in report['machine'].items())}", flush=True)
    with tempfile.TemporaryDirectory(prefix="benchmark_") as name:
        bench = Bench(options, Path(name))
        if options.loading:
            report["loading"] = measure_loading(bench)
        elif options.checkpoints:
            report["checkpoints"] = measure_checkpoints(bench)
        else:
            report["rows"] = measure_cells(swept_cells(options) if options.sweep else compared_cells(options), bench)
            print_ways(report["rows"])
            print_plan_checks(report["rows"])
    report["seconds"] = time.monotonic() - began
    print(f"\ntook      {report['seconds']:.0f} s")
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2))
    return report


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options, with the defaults of the mode; `script_flags` are the words that go to the script."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add("--sweep", action="store_true", help="models, blocks, ways and micro-batches")
    add("--checkpoints", type=int, nargs="?", const=3, metavar="SAVES", help="how long a checkpoint holds training")
    add("--loading", action="store_true", help="the memory that loading takes")
    add("--model", dest="models", nargs="+", choices=SHAPES, help="random weights of these shapes")
    add("--block-size", dest="block_sizes", nargs="+", type=int)
    add("--batch-size", type=int, help="documents per step; default 4, with --sweep 16")
    add("--micro-batch-size", type=int, help="default: what the script's plan chooses")
    add("--steps", type=int, help="steps of each run that count, after 2; default 6, with --sweep 3")
    add("--ways", nargs="+", choices=WAYS, help="default: all; `compiled` only on a GPU")
    add("--data", help="folder as the script takes it; default tests/data/news, or stories as long as CNN/DailyMail's")
    add("--tokenizer", default=str(TINY_LLAMA), help="folder of the tokenizer")
    add("--ranks", nargs="+", type=int, help="processes; default: 1, or all GPUs with --sweep and --checkpoints")
    add("--budget-seconds", type=float, help="what does not fit into it is left out; with --sweep 1800")
    add("--json", metavar="FILE", help="write everything there")
    options, options.script_flags = parser.parse_known_args(argv)
    if "WORLD_SIZE" in os.environ:
        parser.error("start this with python; it starts torchrun itself where it needs several ranks")
    gpus, model = torch.cuda.device_count(), "500m" if options.checkpoints else "250m" if options.loading else "tiny"
    ranks = [1, 2, 4] if options.loading else [max(1, gpus) if options.sweep or options.checkpoints else 1]
    options.ranks = options.ranks or ranks
    options.models = options.models or (["13b", "7b"] if options.sweep else [model])
    options.block_sizes = options.block_sizes or ([2048, 1024, 4096] if options.sweep else [512])
    options.batch_size = options.batch_size or (16 if options.sweep else max(4, *options.ranks))
    options.steps = options.steps or (3 if options.sweep else 6)
    options.ways = options.ways or [way for way in WAYS if way != "compiled" or gpus]
    options.budget_seconds = options.budget_seconds or (1800.0 if options.sweep else math.inf)
    return options


def machine_description() -> dict[str, Any]:
    """Returns what every figure belongs to. It leaves the GPUs alone, since their memory is measured."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=False).stdout.strip()

    machine = dict(gpus=torch.cuda.device_count(), cores=script.usable_cores(), load=round(os.getloadavg()[0], 1))
    commit = git("rev-parse", "--short", "HEAD") + " and changes" * bool(git("status", "--porcelain", "-uno"))
    return machine | dict(torch=torch.__version__, transformers=transformers.__version__, commit=commit)


# ----------------------------------------------------------------------------------------------------------------
# Starting runs
# ----------------------------------------------------------------------------------------------------------------


class Bench:
    """The options, a work folder with models and data, the time left, and how a run is started."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.folder = options, folder
        self.ends = time.monotonic() + options.budget_seconds
        self.longest_seconds = 0.0
        self.numbers = itertools.count()
        documents = max(64, options.batch_size * (WARMUP_STEPS + options.steps))
        long_stories = options.sweep and not options.data
        self.data = news_like(folder / "stories", documents, options) if long_stories else options.data or NEWS

    def model(self, name: str) -> Path:
        """Returns a folder with config and tokenizer, all that --random-init needs."""
        folder = self.folder / name
        if not folder.exists():
            tokenizer = AutoTokenizer.from_pretrained(self.options.tokenizer)
            shape: dict[str, Any] = {"vocab_size": 32_000, **SHAPES[name]}
            shape["vocab_size"] = max(shape["vocab_size"], len(tokenizer))
            config = LlamaConfig(**shape, max_position_embeddings=4096, architectures=["LlamaForCausalLM"])
            config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder

    def run_flags(self, model: str, block_size: int, steps: int, **more: object) -> tuple[Path, list[str]]:
        """Returns the folder and the flags of a run of so many steps, each of documents that no step had before."""
        folder = self.folder / f"run_{next(self.numbers)}"
        settings = {
            "model-name-or-path": self.model(model),
            "dataset-name-or-path": self.data,
            "save-model-dir": folder,
            "block-size": block_size,
            "batch-size": self.options.batch_size,
            "max-steps": steps,
            "max-train-samples": steps * self.options.batch_size,
            "max-eval-samples": 2,
            **{name.replace("_", "-"): value for name, value in more.items() if value is not None},
        }
        words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
        return folder, [*words, "--random-init", *self.options.script_flags]

    def launch(self, *words: object, ranks: int = 1, alone: bool = True) -> tuple[str, str]:
        """Runs a program, a single rank `alone` without torchrun; returns what it printed and, if it failed, why."""
        seconds_left = self.ends - time.monotonic()
        if seconds_left <= self.longest_seconds:
            return "", "no time left in --budget-seconds"
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        python = os.environ.get("PYTHON_EXEC", sys.executable)  # what torchrun starts its ranks with
        command = [python, *([] if alone and ranks == 1 else torchrun), *map(str, words)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        pipes, began = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE), time.monotonic()
        process = subprocess.Popen(command, env=environment, text=True, **pipes)
        try:
            printed, complaints = process.communicate(timeout=None if math.isinf(seconds_left) else seconds_left)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its ranks
            printed, _ = process.communicate()
            return printed, "took longer than --budget-seconds allows"
        self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)
        if not process.returncode:
            return printed, ""
        errors = re.findall(r"^error: (.*)", complaints, re.M) or [complaints.strip()[-500:]]
        return printed, "; ".join(errors) or f"exit code {process.returncode}"


def news_like(folder: Path, documents: int, options: argparse.Namespace) -> Path:
    """Writes stories as long as CNN/DailyMail's, of the words of the shipped ones, and returns their folder.

    Llama-2 tokens of a real document: 1,099 on average, half of them over about 1,000, which a log-normal distribution
    of that median and mean has.
    """
    stories = [json.loads(line) for line in (NEWS / "train.jsonl").read_text().splitlines()]
    words = " ".join(story["article"] for story in stories).split()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    tokens_per_word = len(tokenizer(" ".join(words))["input_ids"]) / len(words)
    draw = np.random.default_rng(42)
    lengths = draw.lognormal(math.log(1000), math.sqrt(2 * math.log(1099 / 1000)), documents)
    folder.mkdir()
    for split, own in (("train", lengths), ("validation", lengths[:2])):
        with (folder / f"{split}.jsonl").open("w") as stream:
            for length in own:
                summary = stories[int(draw.integers(len(stories)))]["highlights"]
                start, count = int(draw.integers(len(words))), max(20, round(length / tokens_per_word) - 50)
                article = " ".join(itertools.islice(itertools.cycle(words), start, start + count))
                stream.write(json.dumps({"article": article, "highlights": summary}) + "\n")
    print(f"data      made up: {documents} documents of about {lengths.mean():,.0f} tokens")
    return folder


# ----------------------------------------------------------------------------------------------------------------
# Comparing: the ways with each other, and the script's own with its plan
# ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cell:
    """What one run measures. `micro_batch_size` and `precision` are the plan's where they are None."""

    model: str
    way: str
    block_size: int
    micro_batch_size: int | None = None
    precision: str | None = None


def compared_cells(options: argparse.Namespace) -> list[Cell]:
    """Returns the ways on each model and block."""
    cells = itertools.product(options.models, options.ways, options.block_sizes)
    return [Cell(*names, options.micro_batch_size) for names in cells]


def swept_cells(options: argparse.Namespace) -> list[Cell]:
    """Returns models x ways on one block, micro-batches, and other blocks; the most telling first."""
    first_block, *other_blocks = options.block_sizes
    sizes = [size for size in SWEPT_MICRO_BATCHES if size <= options.batch_size]
    cells = [Cell(model, way, first_block) for model in options.models for way in options.ways]
    cells += [Cell(model, "packed", first_block, size) for model in options.models for size in sizes]
    for block_size, model in itertools.product(other_blocks, options.models):
        cells += [Cell(model, way, block_size) for way in options.ways if way not in ("padded", "compiled")]
    return cells


def measure_cells(cells: Sequence[Cell], bench: Bench) -> list[dict[str, Any]]:
    """Returns a row for each cell, with `over_tutorial` and `over_trainer`: real tokens/s against theirs.

    What does not fit, by the plan or in fact, and what the time budget does not hold, is left out with the reason.
    """
    rows, rates = [], {}
    for cell in cells:
        row = measure_cell(cell, bench)
        rows.append(row)
        if rate := row.get("tokens_per_second"):
            rates[cell.model, cell.block_size, cell.way] = rate
        outcome = f"{rate:,.0f} tokens/s" if rate else f"skipped: {row['skipped']}"
        print(f"measured  {cell.model}, block {cell.block_size}, {cell.way}: {outcome}", flush=True)
    for row, base in itertools.product(rows, ("tutorial", "trainer")):
        theirs = rates.get((row["model"], row["block_size"], base))
        row[f"over_{base}"] = row["tokens_per_second"] / theirs if theirs and not row["skipped"] else None
    return rows


def measure_cell(cell: Cell, bench: Bench) -> dict[str, Any]:
    """Returns a cell's row.

    Where the model does not fit, it is tried with bf16 states, and where a baseline runs out of memory, with half the
    micro-batch. Both are in the row.
    """
    options, (program, way_flags) = bench.options, WAYS[cell.way]
    steps, ranks = WARMUP_STEPS + options.steps, options.ranks[0]
    if ranks > 1 and program != "train":
        return dataclasses.asdict(cell) | dict(skipped="it runs on one GPU only; --ranks 1 includes it")
    more = dict(micro_batch_size=cell.micro_batch_size, precision=cell.precision, log_interval=1)
    folder, flags = bench.run_flags(cell.model, cell.block_size, steps, **more)
    printed, problem = bench.launch(__file__, program, *flags, *way_flags, ranks=ranks)
    out_of_memory = re.search(r"out of memory with micro-batch (\d+)", problem)
    if torch.cuda.is_available() and not cell.precision and "does not fit on" in problem:
        return measure_cell(dataclasses.replace(cell, precision="bf16-states"), bench)
    if out_of_memory and int(out_of_memory[1]) > 1:
        return measure_cell(dataclasses.replace(cell, micro_batch_size=int(out_of_memory[1]) // 2), bench)
    lines = [] if problem else [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if len(lines) < steps:
        return dataclasses.asdict(cell) | dict(skipped=problem or f"too few documents for {steps} steps")
    return dataclasses.asdict(cell) | dict(skipped=None) | figures(lines, folder, printed, options)


def figures(lines: list[dict], folder: Path, printed: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of a run; rates are those of the steps after the warm-up."""
    config = json.loads((folder / "train_config.json").read_text())
    documents, summaries_cut, padding = AUDIT.search(printed).groups()
    plan, counted, warmed_up = config["plan"], lines[WARMUP_STEPS:], lines[WARMUP_STEPS - 1]["tokens"]
    seconds = sum(line["step_seconds"] for line in counted)
    return dict(
        device=config["cluster"]["device_name"],
        **{name: plan[name] for name in ("strategy", "micro_batch_size", "precision", "activation_checkpointing")},
        tokens_per_second=(lines[-1]["tokens"] - warmed_up) / seconds,
        documents_per_second=len(counted) * options.batch_size / seconds,
        mfu=sum((line["mfu"] or 0) * line["step_seconds"] for line in counted) / seconds or None,
        peak_memory_gib=lines[-1]["peak_memory_gib"],
        padding_share=float(padding) / 100,
        summaries_cut_share=int(summaries_cut.replace(",", "")) / int(documents.replace(",", "")),
        step_seconds=seconds / len(counted),
        first_step_seconds=lines[0]["step_seconds"],
        first_step_tokens=lines[0]["tokens"],
        first_loss=lines[0]["loss"],
        plan_check=config["plan_check"],
    )


def print_ways(rows: Sequence[dict[str, Any]]) -> None:
    columns = {
        **WHAT, "precision": ("precision", ""), "recompute": ("activation_checkpointing", ""),
        "tokens/s": ("tokens_per_second", ",.0f"), "MFU": ("mfu", ".1%"), "GiB": ("peak_memory_gib", ".1f"),
        "padding": ("padding_share", ".1%"), "summaries cut": ("summaries_cut_share", ".0%"),
        "step s": ("step_seconds", ".3f"), "1st step s": ("first_step_seconds", ".1f"),
        "x tutorial": ("over_tutorial", ".2f"), "x trainer": ("over_trainer", ".2f"),
    }  # fmt: skip
    print_table("the ways, in real tokens/s of all ranks", columns, rows)


def print_plan_checks(rows: Sequence[dict[str, Any]]) -> None:
    """Prints predicted against measured for step 2 of the script's own runs, as each run checked it itself."""
    quantities = {"active GiB": "active_gib", "reserved GiB": "reserved_gib", "step s": "step_seconds"}
    columns = WHAT | {"strategy": ("strategy", ""), "recompute": ("activation_checkpointing", "")}
    columns |= {title: (title, "") for title in quantities}
    checked = [row for row in rows if row.get("plan_check")]
    words = [{title: verdict(**row["plan_check"][name]) for title, name in quantities.items()} for row in checked]
    shown = [row | own for row, own in zip(checked, words, strict=True)]
    print_table("the plan: predicted / measured, ! outside its band", columns, shown)


def verdict(predicted: float, measured: float | None, band: Sequence[float] | None) -> str:
    missed = band and measured is not None and not band[0] <= measured <= band[1]
    return f"{predicted:.2f} / {'-' if measured is None else f'{measured:.2f}'}{' !' if missed else ''}"


def print_table(title: str, columns: dict[str, tuple[str, str]], rows: Sequence[dict[str, Any]]) -> None:
    """Prints the rows, each column as wide as it needs. `columns` say which figure of a row, and its format."""

    if not rows:
        return
    table = [list(columns)]
    for row in rows:
        values = [(row.get(name), form) for name, form in columns.values()]
        table.append(["-" if value is None else format(value, form) for value, form in values])
    widths = [max(map(len, column)) + 2 for column in zip(*table, strict=True)]
    print(f"\n{title}")
    for words, row in zip(table, [{}, *rows], strict=True):
        reason = row.get("skipped")
        shown = [f"{word:>{width}}" for word, width in zip(words, widths, strict=True)]
        print("".join(shown[:4]) + f"  skipped: {reason}" if reason else "".join(shown), flush=True)


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints and loading
# ----------------------------------------------------------------------------------------------------------------


def measure_checkpoints(bench: Bench) -> dict[str, Any]:
    """Returns how long a checkpoint holds training, waited for and in the background, medians of --checkpoints saves.

    Each save is the last of a run of its own: on so short steps, the next one would have to wait for it.
    """
    options, found = bench.options, {}
    for name, asynchronous in (("waited for", "no"), ("in the background", "yes")):
        saves, more = [], dict(keep_checkpoints=1, async_save=asynchronous)
        for _ in range(options.checkpoints):
            _, flags = bench.run_flags(options.models[0], min(options.block_sizes), 2, **more)
            printed, problem = bench.launch(script.__file__, *flags, ranks=options.ranks[0])
            if problem:
                raise SystemExit(f"error: {problem}")
            gib, seconds, held = SAVED.search(printed).groups()
            saves.append((float(held or seconds), float(seconds)))
        held, written = map(statistics.median, zip(*saves, strict=True))
        found[name] = dict(gib=float(gib), held_seconds=held, written_seconds=written)
        print(f"{name}: {gib} GiB, training held for {held:.1f} s, written after {written:.1f} s", flush=True)
    return found


def measure_loading(bench: Bench) -> list[dict[str, Any]]:
    """Returns the memory that loading takes on the largest of each number of ranks. Linux only.

    `added_mib` are anonymous pages, `peak_mib` counts the mapped pages of the weight file too.
    """
    folder = bench.model(bench.options.models[0])
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    whole_mib = sum(parameter.numel() for parameter in model.parameters()) * 4 / 2**20
    model.to(torch.float16).save_pretrained(folder)  # as Llama-2's own checkpoint is
    print(f"model of {whole_mib:,.0f} MiB in fp32; MiB of the largest rank", flush=True)
    results = []
    for ranks in bench.options.ranks:
        printed, problem = bench.launch(ROOT / "tests/ranks/load_and_measure.py", folder, ranks=ranks, alone=False)
        if problem:
            raise SystemExit(f"error: {problem}")
        result = json.loads(re.search(r"^RESULT(.*)", printed, re.M)[1])
        results.append(dict(ranks=ranks, **result))
        print(f"{ranks} ranks: " + ", ".join(f"{name} {value:,.0f}" for name, value in result.items()), flush=True)
    return results


# ----------------------------------------------------------------------------------------------------------------
# What the runs of the ways execute
# ----------------------------------------------------------------------------------------------------------------


def train(argv: Sequence[str]) -> int:
    """Runs the script without evaluations, checkpoints and the final model, and so without the room these need."""

    def nothing(*_: object) -> bool:
        return False

    script.RunLog.evaluation_due = script.Checkpoints.save = nothing
    script.check_disk = script.check_host_memory = script.save_model = script.write_model_card = nothing
    return script.command_line(argv)


def tutorial(argv: Sequence[str]) -> int:
    """Trains as most tutorials show it: every row padded and cut to the block, plain AdamW, the mean of the means."""

    def loop(baseline: Baseline) -> None:
        config, model = baseline.parallel.config, baseline.model
        device, eos = baseline.parallel.device, baseline.tokenizer.eos_token_id
        rows = [row[: config.block_size] for row in baseline.whole_rows]
        lengths = torch.tensor(list(map(len, rows)))
        input_ids = torch.tensor([row + [eos] * (config.block_size - len(row)) for row in rows])
        attention_mask = (torch.arange(config.block_size) < lengths[:, None]).long()
        cut = np.array([len(row) > config.block_size for row in baseline.whole_rows])  # at the end, in the summary
        baseline.begin(lengths.numpy(), cut, computed_tokens=input_ids.numel())
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=config.lr)
        for batch in baseline.batches:
            micro_batches, step_loss = torch.from_numpy(batch).split(baseline.micro_batch_size), 0.0
            for positions in micro_batches:
                ids, mask = input_ids[positions].to(device), attention_mask[positions].to(device)
                labels = ids.masked_fill(mask == 0, -100)
                with torch.autocast(device.type, torch.bfloat16, enabled=baseline.parallel.plan.autocasts):
                    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
                (loss / len(micro_batches)).backward()
                step_loss += loss.detach() / len(micro_batches)
            optimizer.step()
            optimizer.zero_grad()
            baseline.step_ended(float(step_loss))

    return run_baseline(argv, loop)


def trainer(argv: Sequence[str]) -> int:
    """Trains with Trainer as someone who knows it would set it up, on documents encoded as the script encodes them."""

    def loop(baseline: Baseline) -> None:
        class Ended(transformers.TrainerCallback):
            def on_log(self, args, state, control, logs=None, **others):
                if "loss" in logs:
                    baseline.step_ended(logs["loss"])

        parallel, size = baseline.parallel, baseline.micro_batch_size
        documents = script.encode_documents(baseline.pairs, baseline.tokenizer, parallel)
        order = [batch[np.argsort(-documents.lengths[batch], kind="stable")] for batch in baseline.batches]
        micro_batches = [part for batch in order for part in np.split(batch, range(size, len(batch), size))]
        widths = [script.computed_tokens(documents.lengths[each], parallel.plan, 2**62) for each in micro_batches]
        baseline.begin(documents.lengths, np.array(documents.dataset["summary_cut"]), computed_tokens=sum(widths))
        rows = [list(documents.dataset[int(position)]["input_ids"]) for batch in order for position in batch]
        arguments = transformers.TrainingArguments(
            output_dir=parallel.config.save_model_dir,
            max_steps=len(order),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parallel.config.batch_size // size,
            learning_rate=parallel.config.lr,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            bf16=parallel.plan.autocasts,
            use_cpu=parallel.device.type == "cpu",
            train_sampling_strategy="sequential",  # the rows come sorted within each step
            dataloader_num_workers=1,
            logging_steps=1,
            logging_nan_inf_filter=False,  # it would wait for the device in every micro-batch
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        baseline.tokenizer.padding_side, baseline.tokenizer.pad_token = "right", baseline.tokenizer.eos_token
        transformers.Trainer(
            model=baseline.model,
            args=arguments,
            train_dataset=[dict(input_ids=row, attention_mask=[1] * len(row), labels=row) for row in rows],
            data_collator=transformers.DataCollatorForSeq2Seq(baseline.tokenizer, pad_to_multiple_of=8),
            callbacks=[Ended()],
        ).train()

    return run_baseline(argv, loop)


class Baseline:
    """What a loop that is not the script's is given, and its metrics in the script's words."""

    def __init__(self, parallel: script.Parallel):
        config, plan = parallel.config, parallel.plan
        self.parallel, self.tokenizer = parallel, script.load_tokenizer(parallel)
        self.pairs = script.load_documents(parallel)["train"]
        texts = zip(self.pairs[config.article_column], self.pairs[config.summary_column], strict=True)
        prompts = [
            script.PROMPT_OPEN + article + script.PROMPT_CLOSE + summary
            for article, summary in texts
            if script.has_text(article, summary)
        ]
        eos = self.tokenizer.eos_token_id
        rows = self.tokenizer(prompts, split_special_tokens=True, verbose=False)["input_ids"]
        self.whole_rows = [row if row[-1] == eos else [*row, eos] for row in rows]
        self.batches = script.epoch_batches(rows, 0, config)
        sizes = [size for size in range(1, plan.micro_batch_size + 1) if config.batch_size % size == 0]
        self.micro_batch_size = sizes[-1]  # equal parts: the plan's, or less
        torch.manual_seed(config.seed)
        self.model = script.random_model(None, parallel)
        self.model.set_attn_implementation("sdpa")
        self.model.config.use_cache = False
        if plan.recompute_every:
            self.model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=plan.recompute_every)
        self.folder = Path(config.save_model_dir)
        self.steps_taken = self.tokens = 0

    def begin(self, lengths: np.ndarray, summaries_cut: np.ndarray, computed_tokens: int) -> None:
        """Says what becomes of the documents, `lengths` being what is trained on, and starts the clock."""
        self.lengths = lengths
        print(
            f"data      train: {len(lengths)} documents, {lengths.sum()} tokens; {summaries_cut.sum()} summaries cut; "
            f"{1 - lengths.sum() / computed_tokens:.1%} padding"
        )
        plan = dataclasses.replace(self.parallel.plan, micro_batch_size=self.micro_batch_size)
        self.folder.mkdir(parents=True)
        description = script.run_description(dataclasses.replace(self.parallel, plan=plan), {}, {})
        (self.folder / "train_config.json").write_text(json.dumps(description))
        self.step_began = time.perf_counter()

    def step_ended(self, loss: float) -> None:
        """Writes a line of metrics. Whoever knows the loss has waited for the device."""
        seconds, parallel = time.perf_counter() - self.step_began, self.parallel
        lengths = self.lengths[self.batches[self.steps_taken]]
        self.steps_taken, self.tokens = self.steps_taken + 1, self.tokens + int(lengths.sum())
        flops = script.training_flops(parallel.shape, int(lengths.sum()), int((lengths**2).sum()))
        peak = script.peak_flops(parallel.cluster, parallel.plan.precision)
        line = dict(
            step=self.steps_taken,
            loss=loss,
            tokens=self.tokens,
            step_seconds=seconds,
            mfu=flops / seconds / peak if peak else None,
            peak_memory_gib=script.peak_memory_gib(parallel.device),
        )
        with (self.folder / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        self.step_began = time.perf_counter()


def run_baseline(argv: Sequence[str], loop: Callable[[Baseline], None]) -> int:
    """Runs a loop with the script's hook, which plans but parallelises nothing on one process."""
    try:
        with script.enable_advanced_parallelization(script.parse_config(argv)) as parallel:
            baseline = Baseline(parallel)
            try:
                loop(baseline)
            except torch.OutOfMemoryError:
                print(f"error: out of memory with micro-batch {baseline.micro_batch_size}", file=sys.stderr)
                return 1
    except script.UserError as error:
        print(*(f"error: {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
        return 2
    return 0


PROGRAMS = dict(train=train, tutorial=tutorial, trainer=trainer)

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in PROGRAMS:
        sys.exit(PROGRAMS[sys.argv[1]](sys.argv[2:]))
    main()
