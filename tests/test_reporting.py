"""What a run reports: console and bars, metrics.jsonl, train_config.json, trackers, samples and curves.png."""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.util
import json
import math
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
import warnings
import zlib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import accelerate
import conftest
import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from conftest import (
    NEWS,
    NINE_STEPS,
    SCRIPT,
    SMALL_LLAMA,
    TINY_LLAMA,
    files_of_at_most,
    fresh_accelerate,
    read_metrics,
    small_run,
)
from transformers import AutoTokenizer, LlamaConfig

import train_llama2
from train_llama2 import Cluster, Config, Parallel

pytestmark = pytest.mark.usefixtures("own_processes")

TRAINING_FIELDS = {
    "step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "step_seconds", "mfu", "data_wait_share",
    "peak_memory_gib",
}  # fmt: skip


def token_counts(block_size: int) -> list[int]:
    """Returns the tokens of each training story in its prompt, with its end. A "</s>" inside a story is text."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    rows = map(json.loads, (NEWS / "train.jsonl").read_text().splitlines())
    texts = [f"[SUMMARIZE] {row['article']} [/SUMMARIZE]\n{row['highlights']}" for row in rows]
    return [min(block_size, len(tokenizer(text, split_special_tokens=True)["input_ids"]) + 1) for text in texts]


@pytest.fixture(scope="module")
def whole_set_run(tmp_path_factory):
    """Returns the folder of a run whose 5 steps see the same 8 documents, every second one reported."""
    fresh_accelerate()
    folder = tmp_path_factory.mktemp("whole_set")
    flags = dict(max_train_samples=8, num_train_epochs=5, log_interval=2, eval_interval=3, lr_scheduler="linear")
    train_llama2.main(small_run(folder, **flags, warmup_ratio=0.2, block_size=256))
    return folder


def test_training_lines_have_all_fields_and_sane_values(whole_set_run, three_rank_run):
    for line in read_metrics(whole_set_run)[0] + read_metrics(three_rank_run[1])[0]:
        assert set(line) - {"skipped_steps"} == TRAINING_FIELDS
        assert line["mfu"] is None
        assert line["step_seconds"] > 0
        assert 0.05 < line["peak_memory_gib"] < 100
        assert 0 <= line["data_wait_share"] <= 1


def test_steps_epochs_tokens_and_rates_equal_those_by_hand(whole_set_run):
    steps, evaluations = read_metrics(whole_set_run)
    tokens = sum(token_counts(256)[:8])
    assert [line["step"] for line in steps] == [2, 4, 5]
    assert [line["epoch"] for line in steps] == [2, 4, 5]
    assert [line["tokens"] for line in steps] == [2 * tokens, 4 * tokens, 5 * tokens]
    assert [line["lr"] for line in steps] == pytest.approx([1e-3, 0.5e-3, 0.25e-3])  # one of 5 warms up
    assert [line["skipped_steps"] for line in steps] == [0, 0, 0]
    assert [line["step"] for line in evaluations] == [3, 5]
    for line in evaluations:
        assert set(line) == {"step", "eval_loss", "eval_perplexity"}
        assert math.log(line["eval_perplexity"]) == pytest.approx(line["eval_loss"])
    for line, steps_since in zip(steps, (2, 2, 1), strict=True):
        assert line["tokens_per_second"] * line["step_seconds"] * steps_since == pytest.approx(steps_since * tokens)


def test_on_three_ranks_the_tokens_of_all_are_counted_once(three_rank_run):
    steps, _ = read_metrics(three_rank_run[1])
    assert [line["epoch"] for line in steps] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])  # 34 documents by 8
    assert steps[-1]["tokens"] == sum(token_counts(1024))


def test_losses_are_written_with_full_precision(whole_set_run):
    steps, evaluations = read_metrics(whole_set_run)
    for value in [line["loss"] for line in steps] + [line["eval_loss"] for line in evaluations]:
        assert abs(value - round(value, 5)) > 0, "rounded"
        assert len(repr(value)) >= 8


def test_train_config_holds_every_flag_the_versions_and_the_plan(three_rank_run):
    written = json.loads((three_rank_run[1] / "train_config.json").read_text())
    flags = written["flags"]
    assert set(flags) == {field.name for field in dataclasses.fields(Config)}
    given = dict(model_name_or_path=str(SMALL_LLAMA), batch_size=8, lr=1e-3, parallelism="fsdp", eval_interval=2)
    defaults = dict(num_train_epochs=1, seed=42, loss_on="all", max_steps=None, random_init=False, save_dtype="auto")
    assert {name: flags[name] for name in given | defaults} == given | defaults
    for package in (torch, transformers, datasets, accelerate):
        # torch's own word also has its build, as in 2.14.1+cu130
        version, own_word = written["versions"][package.__name__], package.__version__
        assert version.partition("+")[0] == own_word.partition("+")[0]
    plan = {"strategy": "fsdp", "dp_replicate_size": 1, "dp_shard_size": 3, "micro_batch_size": 2, "precision": "fp32"}
    assert {name: written["plan"][name] for name in plan} == plan


def test_the_console_has_plan_audit_steps_evaluations_and_summary(three_rank_run):
    steps, evaluations = read_metrics(three_rank_run[1])
    (log,) = (three_rank_run[1].parent / "logs").rglob("0/stdout.log")
    lines = log.read_text().splitlines()
    assert lines[0].startswith("plan      3 x ")
    assert any(line.startswith("  chosen  fsdp, micro-batch 2") for line in lines)
    counts = token_counts(1024)
    assert any(f"train: 34 documents, {sum(counts):,} tokens" in line for line in lines)
    assert any("validation: 8 documents" in line for line in lines)
    for line in steps:
        assert any(f"step {line['step']}/5  loss {line['loss']:.4f}" in said for said in lines)
    for line in evaluations:
        assert any(f"step {line['step']}/5  eval loss {line['eval_loss']:.4f}" in said for said in lines)
    assert lines[-1].startswith(f"done      5 steps, {sum(counts):,} tokens")
    assert f"eval loss {evaluations[-1]['eval_loss']:.4f}" in lines[-1]


def test_ranks_other_than_0_print_nothing(three_rank_run):
    logs = three_rank_run[1].parent / "logs"
    for rank in (1, 2):
        for stream in ("stdout", "stderr"):
            (log,) = logs.rglob(f"{rank}/{stream}.log")
            assert log.read_text() == "", f"{stream} of rank {rank}"


def test_training_flops_of_llama_2_13b_by_hand():
    shape = dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)
    model = train_llama2.model_shape(LlamaConfig(**shape))
    # Matrices a token meets: 40 layers of 4 * 5120**2 + 3 * 5120 * 13824, and the head of 32000 * 5120.
    matrices = 40 * (104_857_600 + 212_336_640) + 163_840_000
    # Two documents of 1,000 and 3,000 tokens; attention takes 12 * 40 * 5120 FLOPs per pair of tokens.
    by_hand = 6 * matrices * 4_000 + 12 * 40 * 5120 * (1_000_000 + 9_000_000)
    assert by_hand == pytest.approx(3.33e14, rel=1e-2)
    assert train_llama2.training_flops(model, 4_000, 10_000_000) == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla V100-SXM2-32GB", None),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A1000", None),  # a small workstation card, not an A100
    ],
)
def test_the_peak_of_a_gpu_is_found_by_its_name(name, tflops, monkeypatch):
    """The peak of an unknown GPU is measured. MFU refers to the data sheet's peak, so such a GPU gets none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(total_memory=80 * 2**30))
    monkeypatch.setattr(train_llama2, "measure_matmul_tflops", lambda *_: 100.0)
    cluster = train_llama2.this_machine()
    assert cluster.gpu.peak_tflops == (100.0 if tflops is None else tflops)
    for precision in ("bf16", "bf16-states"):
        assert train_llama2.peak_flops(cluster, precision) == (None if tflops is None else pytest.approx(tflops * 1e12))
    assert train_llama2.peak_flops(cluster, "fp32") is None


def test_a_cpu_has_no_peak():
    gpu = train_llama2.GPUS["A100-80GB"]
    assert train_llama2.peak_flops(Cluster(1, 1, "A100", True, gpu), "bf16") == 312e12
    assert train_llama2.peak_flops(Cluster(1, 1, "A100 in name only", False, gpu), "bf16") is None


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count the peak in another way")
def test_the_peak_memory_is_not_that_of_the_parent_process():
    held_here = np.ones(2**30, "uint8")
    program = [sys.executable, str(Path(__file__).parent / "ranks" / "peak_memory.py")]
    run = subprocess.run(program, capture_output=True, text=True, timeout=120, check=True)
    before, after = map(float, run.stdout.split("GIB")[1].split())
    assert 0.1 < before < held_here.nbytes / 2**30
    assert after - before == pytest.approx(0.25, abs=0.05)


# ----------------------------------------------------------------------------------------------------------------
# Trackers, samples and curves of a run that was stopped after step 5 and went on from step 2
# ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resumed_run(tmp_path_factory):
    """Returns its folder, and what it had written before it was resumed. It has 9 steps, evaluated after 4, 8 and 9."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    pytest.importorskip("rouge_score", reason="rouge-score is not installed")
    folder = tmp_path_factory.mktemp("resumed") / "run"
    flags = dict(report_to="tensorboard", keep_checkpoints=3, rouge_samples=2, max_summary_tokens=4)
    stop_after(folder, 5, **flags)
    before = SimpleNamespace(steps=read_metrics(folder)[0], samples=samples_of(folder), curves=curves_of(folder))
    for later in ("step-000004", "step-000005"):
        shutil.rmtree(folder / "checkpoints" / later)
    assert start(folder, **flags) == 0
    return folder, before


def start(folder: Path, **flags: object) -> int:
    return conftest.start(folder, **{**NINE_STEPS, **flags})


def stop_after(folder: Path, step: int, **flags: object) -> None:
    conftest.stop_after(folder, step, **{**NINE_STEPS, **flags})


def samples_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def curves_of(folder: Path) -> bytes | None:
    return (folder / "curves.png").read_bytes() if (folder / "curves.png").exists() else None


def tracked(folder: Path):
    """Returns what TensorBoard reads of the run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = {file.parent for file in folder.rglob("events.out.tfevents.*") if file.parent.name == "train_llama2"}
    return EventAccumulator(str(run), size_guidance={"tensors": 0}).Reload()


def test_tensorboard_shows_each_step_of_a_resumed_run_once(resumed_run):
    """Steps 3 to 5 were taken twice. They appear once, with the values of the second time."""
    folder, before = resumed_run
    steps, evaluations = read_metrics(folder)
    assert [line["step"] for line in before.steps] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in steps] == list(range(1, 10))
    names = ("loss", "lr", "grad_norm", "tokens", "tokens_per_second"), ("eval_loss", "eval_perplexity", "rouge1")
    for lines, of_lines in zip((steps, evaluations), names, strict=True):
        for name in of_lines:
            assert [(event.step, event.value) for event in tracked(folder).Scalars(name)] == [
                (line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines
            ], name


def test_tensorboard_has_the_samples_the_flags_and_the_plan(resumed_run):
    folder, _ = resumed_run
    events = tracked(folder).Tensors("samples/text_summary")
    shown = {event.step: event.tensor_proto.string_val[0].decode() for event in events}
    assert sorted(shown) == [4, 8, 9]
    for sample in samples_of(folder):
        assert f"**reference** {sample['reference']}\n\n**summary** {sample['summary']}" in shown[sample["step"]]
    settings = [file.read_text() for file in folder.rglob("hparams.yml")]
    assert len(settings) == 2
    for text in settings:
        assert "plan: none, micro-batch" in text
        assert "batch_size: '13'" in text and "report_to: tensorboard" in text


def test_samples_are_cut_back_with_the_metrics(resumed_run):
    folder, before = resumed_run
    assert [sample["step"] for sample in before.samples] == [4, 4]
    assert [sample["step"] for sample in samples_of(folder)] == [4, 4, 8, 8, 9, 9]
    highlights = [json.loads(line)["highlights"] for line in (NEWS / "validation.jsonl").open()]
    for sample in samples_of(folder):  # --block-size 64 cuts some of them
        assert len(sample["reference"]) > 60
        assert any(each.strip().startswith(sample["reference"]) for each in highlights)
    names = frozenset({"step", "split", "index", "reference", "summary", "ended"})
    assert {frozenset(sample) for sample in samples_of(folder)} == {names}


def test_a_line_cut_short_by_a_full_disk_is_completed_and_spoils_none_after_it(tmp_path):
    file = train_llama2.LinesFile(tmp_path / "samples.jsonl", SimpleNamespace(step=1, evaluated_step=1))
    file.write(dict(step=1, summary="a"))
    with files_of_at_most(40):
        for step in (2, 3):
            with pytest.raises(OSError, match="File too large"):
                file.write(dict(step=step, summary="a"))
    assert file.path.stat().st_size == 40 and [record["step"] for record in train_llama2.read_lines(file.path)] == [1]
    file.write(dict(step=4, summary="a"))
    assert [json.loads(line)["step"] for line in file.path.read_text().splitlines()] == [1, 2, 3, 4]


def test_lines_that_a_full_disk_refused_are_there_when_others_are_dropped(tmp_path):
    file = train_llama2.LinesFile(tmp_path / "samples.jsonl", SimpleNamespace(step=1, evaluated_step=1))
    with files_of_at_most(10), pytest.raises(OSError, match="File too large"):
        file.write(dict(step=1), dict(step=2), dict(step=3))
    file.keep(lambda record: record["step"] != 2)
    assert [json.loads(line)["step"] for line in file.path.read_text().splitlines()] == [1, 3]


def test_without_rouge_samples_there_are_no_samples_or_scores(whole_set_run):
    assert not (whole_set_run / "samples.jsonl").exists()
    assert not any("rouge" in name for line in read_metrics(whole_set_run)[1] for name in line)


def test_wandb_gets_one_id_for_a_run_and_its_resumption(tmp_path, monkeypatch):
    """A stand-in for the package records what accelerate asks of it."""
    calls = []

    class Run:
        def log(self, values, step=None):
            calls.append(("log", step, values))

        def finish(self):
            calls.append(("finish",))

        def define_metric(self, name, step_metric):
            calls.append(("metric", name, step_metric))

    wandb = ModuleType("wandb")
    wandb.init = lambda **arguments: calls.append(("init", arguments)) or Run()
    wandb.config = SimpleNamespace(update=lambda values, **_: calls.append(("config", values)))
    wandb.Table = lambda columns, data, dataframe=None: ("table", columns, data)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [accelerate.utils.LoggerType.WANDB])
    with_rouge = dict(rouge_samples=2, max_summary_tokens=2) if importlib.util.find_spec("rouge_score") else {}
    flags = dict(report_to="wandb", max_steps=2, **with_rouge)
    stop_after(tmp_path, 1, **flags)
    assert start(tmp_path, **flags) == 0
    first, second = [call[1] for call in calls if call[0] == "init"]
    assert first == second == dict(project="train_llama2", id=first["id"], resume="allow")
    assert len(first["id"]) >= 8
    assert {call[1]["plan"].split(",")[0] for call in calls if call[0] == "config"} == {"none"}
    steps, evaluations = read_metrics(tmp_path)
    logs = [call[1:] for call in calls if call[0] == "log"]
    assert ("metric", "*", "step") in calls and all(step is None for step, _ in logs), "it would refuse a former step"
    logged = [(values.get("step"), name, value) for _, values in logs for name, value in values.items()]
    for line in steps + evaluations:
        for name in set(line) - {"step", "mfu"}:
            assert logged.count((line["step"], name, line[name])) == 1, name
    tables = [(step, value) for step, name, value in logged if name == "samples"]
    if with_rouge:
        rows = [[sample["reference"], sample["summary"]] for sample in samples_of(tmp_path)]
        assert tables == [(None, ("table", ["reference", "summary"], rows))]
    assert calls[-1] == ("finish",)


# ----------------------------------------------------------------------------------------------------------------
# curves.png
# ----------------------------------------------------------------------------------------------------------------


def pixels(png: bytes) -> tuple[int, int]:
    """Returns width and height of a PNG, having checked the sum of every part of it."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    at, kinds = 8, []
    while at < len(png):
        size, kind = struct.unpack(">I4s", png[at : at + 8])
        (check,) = struct.unpack(">I", png[at + 8 + size : at + 12 + size])
        assert zlib.crc32(png[at + 4 : at + 8 + size]) == check
        kinds.append(kind)
        at += 12 + size
    assert (kinds[0], kinds[-1]) == (b"IHDR", b"IEND")
    return struct.unpack(">II", png[16:24])


def test_curves_are_drawn_anew_at_every_evaluation(resumed_run):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    folder, before = resumed_run
    now = curves_of(folder)
    assert min(*pixels(before.curves), *pixels(now)) > 600
    assert now != before.curves
    assert not list(folder.glob(".curves*"))


FULL = dict(step=1, loss=2.0, lr=1e-3, grad_norm=0.5, tokens=900, tokens_per_second=50.0)
STEPS = {
    "one step": [FULL],
    "one step and an evaluation before it": [dict(step=1, eval_loss=3.0), {**FULL, "step": 2}],
    "nothing finite": [{**FULL, "loss": None, "grad_norm": None}, dict(step=1, eval_loss=None, eval_perplexity=None)],
    "some not finite": [{**FULL, "step": n, "loss": None if n % 2 else 1.0 / n} for n in range(1, 40)],
    "diverged": [{**FULL, "step": n, "loss": 10.0**n, "grad_norm": 10.0 ** (8 * n)} for n in range(1, 30)],
}


@pytest.mark.parametrize("lines", STEPS.values(), ids=STEPS)
def test_curves_can_be_drawn_of(tmp_path, lines):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_llama2.draw_curves(tmp_path)
    assert min(pixels(curves_of(tmp_path))) > 600


def test_curves_show_training_beside_validation_with_gaps(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed").Figure
    drawn = []
    savefig = figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, *a, **k: (drawn.append(self), savefig(self, *a, **k)))
    steps = [{**FULL, "step": n, "loss": None if n == 3 else 9.0 - n, "lr": n * 1e-4} for n in range(1, 7)]
    lines = [*steps[:4], dict(step=4, eval_loss=6.0), *steps[4:], dict(step=6, eval_loss=5.5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train_llama2.draw_curves(tmp_path)
    (picture,) = drawn
    loss, lr, grad_norm, rate = picture.axes
    shown = {line.get_label(): np.asarray(line.get_xydata(), dtype=float).tolist() for line in loss.get_lines()}
    assert shown.keys() == {"training", "validation"} and loss.get_legend() is not None
    losses = [[1, 8], [2, 7], [3, math.nan], [4, 5], [5, 4], [6, 3]]
    np.testing.assert_array_equal(shown["training"], losses)
    assert shown["validation"] == [[4, 6.0], [6, 5.5]]
    assert lr.get_lines()[0].get_ydata().tolist() == [n * 1e-4 for n in range(1, 7)]
    for axes, value in ((grad_norm, 0.5), (rate, 50.0)):
        (line,) = axes.get_lines()
        assert line.get_ydata().tolist() == [value] * 6
    assert rate.get_ylim()[0] == 0, "a rate that varies by a percent must not look as if it broke down"


def test_without_a_step_or_without_matplotlib_there_is_no_picture(tmp_path, monkeypatch, capfd):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(dict(step=0, eval_loss=3.0)) + "\n")
    train_llama2.draw_curves(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(FULL) + "\n")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    train_llama2.draw_curves(tmp_path)
    assert curves_of(tmp_path) is None
    assert capfd.readouterr() == ("", "")


def test_a_drawing_that_fails_is_a_warning(tmp_path, monkeypatch, capsys):
    def fail(folder):
        raise RuntimeError("no fonts\nat all")

    monkeypatch.setattr(train_llama2, "draw_curves", fail)
    assert start(tmp_path, max_steps=1) == 0
    assert "WARNING   curves.png could not be drawn (no fonts)\n" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------
# Terminals, files and --quiet
# ----------------------------------------------------------------------------------------------------------------

# Each test has a --block-size of its own, because what another has tokenised is in the cache and shows no bar.
SHORT = dict(max_train_samples=8, max_eval_samples=2, batch_size=4, num_proc=1)
LIBRARY_BARS = ("Loading weights", "Writing model shards", "tokenising", "it/s]", "\r")


def run_on_a_terminal(*flags: object, **environment: str) -> tuple[int, str]:
    """Runs the script with a terminal of 140 columns; returns the exit code and what came out of it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 140, 0, 0))
    command, terminal = (
        [sys.executable, str(SCRIPT), *map(str, flags)],
        dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
    )
    process = subprocess.Popen(command, **terminal, env={**os.environ, **environment})
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # Linux says so when nobody holds the other end any more
            part = b""
        if not part:
            break
        shown += part
    os.close(ours)
    return process.wait(timeout=60), shown.decode()


def test_a_terminal_shows_a_bar_for_everything_that_takes_long(tmp_path):
    # By default tqdm draws a bar every 0.1 s at most, and these end sooner.
    code, shown = run_on_a_terminal(*small_run(tmp_path, **SHORT, block_size=203), TQDM_MININTERVAL="0")
    assert code == 0, shown
    for bar in ("tokenising", "Loading weights", "evaluating", "training", "Writing model shards"):
        assert re.search(rf"\r{bar}[^\r]*100%", shown), bar
    assert re.search(r"training:[^\r]*\d\d:\d\d<[^\r]*loss=\d", shown), "time left, and the loss"
    for line in ("plan      1 x ", "step 2/2  loss ", "done      2 steps, "):
        assert re.search(rf"(^|[\r\n]){line}", shown), line


@pytest.mark.parametrize("quiet", [False, True])
def test_files_get_plain_lines_and_with_quiet_one(tmp_path, capfd, quiet):
    flags = small_run(tmp_path, **SHORT, block_size=205 + quiet)
    assert train_llama2.command_line([*flags, *["--quiet"][: int(quiet)]]) == 0
    printed, complained = capfd.readouterr()
    assert not [word for word in (*LIBRARY_BARS, "\x1b") if word in printed + complained]
    assert complained == ""
    if quiet:
        assert re.fullmatch(r"done      2 steps, .*\n", printed)
    else:
        assert "step 2/2  loss" in printed


def test_files_get_plain_lines_of_several_processes(three_rank_run):
    run, folder = three_rank_run
    logs = [log.read_text() for log in (folder.parent / "logs").rglob("std*.log")]
    assert len(logs) == 6
    for text in (run.stdout, run.stderr, *logs):
        assert not [word for word in (*LIBRARY_BARS, "\x1b") if word in text]


def test_quiet_keeps_warnings_and_the_closing_line(capsys):
    for is_main in (True, False):
        rank = SimpleNamespace(is_main=is_main, config=Config(quiet=True))
        Parallel.say(rank, "step 1/2  loss 3.0")
        Parallel.say(rank, "WARNING   the plan missed")
        Parallel.say(rank, "done      2 steps", always=True)
    assert capsys.readouterr().out == "WARNING   the plan missed\ndone      2 steps\n"


@pytest.fixture
def library_settings():
    verbosity = transformers.logging.get_verbosity()
    with warnings.catch_warnings():
        yield
    transformers.logging.set_verbosity(verbosity)


@pytest.mark.parametrize("quiet", [False, True])
def test_warnings_that_matter_are_kept_even_when_quiet(library_settings, quiet):
    transformers.logging.set_verbosity_warning()
    train_llama2.quieten_libraries(is_first_on_node=True, quiet=quiet)
    assert transformers.logging.get_verbosity() == transformers.logging.WARNING
    with pytest.warns(UserWarning, match="lr_scheduler"):
        warnings.warn("lr_scheduler before optimizer", stacklevel=1)
    with pytest.warns(FutureWarning, match="soon gone"):
        warnings.warn("soon gone", FutureWarning, stacklevel=1)


@pytest.mark.parametrize(("speaks", "quiet", "bars"), [(True, False, True), (True, True, False), (False, False, False)])
def test_libraries_show_bars_on_one_process_with_a_terminal(library_settings, monkeypatch, speaks, quiet, bars):
    datasets.enable_progress_bars()
    transformers.logging.enable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    try:
        train_llama2.quieten_libraries(speaks, quiet)
        assert transformers.logging.is_progress_bar_enabled() == bars
        assert datasets.are_progress_bars_disabled() != bars
        assert huggingface_hub.utils.are_progress_bars_disabled() != bars
        assert Parallel.shows_bars.fget(SimpleNamespace(is_main=speaks, config=Config(quiet=quiet))) == bars
    finally:
        train_llama2.quieten_libraries(is_first_on_node=False, quiet=True)
