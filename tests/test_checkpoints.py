"""Checkpoints: a run that was stopped, killed, or met a full disk goes on as if nothing had been, on any processes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import conftest
import psutil
import pytest
import torch
from conftest import (
    NEWS,
    RANKS,
    TINY_LLAMA,
    Crash,
    at_steps,
    crash_point,
    fresh_accelerate,
    llama_of,
    read_metrics,
    signal_myself,
    small_run,
)
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

import train_llama2
from train_llama2 import Checkpoints, Config, TrainingState, enable_advanced_parallelization

# 34 documents in batches of 13: 3 steps an epoch, the last of 8 documents; 9 steps. A stop after step 2, 4, 5, 7 or 8
# is in the middle of an epoch.
RUN = dict(
    batch_size=13,
    num_train_epochs=3,
    max_grad_norm=0.1,
    eval_interval=4,
    block_size=64,
    save_interval=2,
    max_eval_samples=3,
)


def start(folder: Path, **flags: object) -> int:
    """Runs in this process; returns the exit code."""
    return conftest.start(folder, **{**RUN, **flags})


def stop_after(folder: Path, step: int, **flags: object) -> None:
    """Runs in this process until a SIGTERM during step `step`."""
    conftest.stop_after(folder, step, **{**RUN, **flags})


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def tree(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]  # says who holds it
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_same_run(folder: Path, expected: Path) -> None:
    """Every step once, every evaluation once, and the numbers of the uninterrupted run."""
    for lines, expected_lines in zip(read_metrics(folder), read_metrics(expected), strict=True):
        assert [line["step"] for line in lines] == [line["step"] for line in expected_lines]
        for name in {"loss", "eval_loss", "grad_norm", "lr", "tokens", "epoch", "skipped_steps"} & set(lines[0]):
            values, expected_values = ([line[name] for line in some] for some in (lines, expected_lines))
            assert values == pytest.approx(expected_values, rel=1e-5), name


def manifest(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "manifest.json").read_text())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """Returns the folder of a run from step 1 to step 9."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert start(folder) == 0
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """Returns the folder of a run that SIGTERM stopped after step 5, with checkpoints of steps 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    stop_after(folder, 5, keep_checkpoints=3)
    return folder


@pytest.fixture
def copy_of(tmp_path) -> Callable[[Path], Path]:
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))


# ----------------------------------------------------------------------------------------------------------------
# Two runs that go through strategies, numbers of processes and kinds of end, in real torchrun processes
# ----------------------------------------------------------------------------------------------------------------


def interrupted(
    folder: Path, processes: int, act: str, options: tuple[str, ...] = (), **flags: object
) -> subprocess.CompletedProcess:
    """Runs the script under torchrun, in a session of its own; `act` of tests/ranks/interrupted_run.py interrupts it.

    Returns when all ranks have left, even where torchrun has died before them.
    """
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *options]
    words += [str(RANKS / "interrupted_run.py"), act, *small_run(folder, **{**RUN, **flags})]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.kill()
            raise
    return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> dict[str, tuple[subprocess.CompletedProcess, Path]]:
    """Returns what was said and left by each part of a run that forks after step 4:

    HSDP 2 x 2, SIGTERM in step 2 -> FSDP on 2, SIGUSR1 in step 4
      -> DDP on 2, Ctrl-C in step 6 -> FSDP on 2, SIGUSR1 to torchrun in step 8
      -> FSDP on 2, SIGKILL of torchrun in step 6 -> one process, SIGTERM in step 7 -> FSDP on 4, killed inside the
         save of step 9 -> one process

    A part takes two steps at least: the loss of the first depends on the weights alone, that of the second on the
    optimizer's moments too.
    """
    base, stages = tmp_path_factory.mktemp("stages"), {}
    folder = base / "run"

    def part(name: str, *launch: object, **flags: object) -> None:
        stages[name] = interrupted(folder, *launch, **flags), Path(shutil.copytree(folder, base / name))

    part("hsdp 4", 4, "sigterm_to_torchrun", parallelism="hsdp")
    part("fsdp 2", 2, "sigusr1_to_rank_1", parallelism="fsdp")
    part("ddp 2", 2, "ctrl_c", parallelism="ddp")
    part("fsdp 2 again", 2, "sigusr1_to_torchrun", ("--signals-to-handle=SIGTERM,SIGUSR1",), parallelism="fsdp")
    shutil.rmtree(folder)
    shutil.copytree(stages["fsdp 2"][1], folder)
    part("fsdp 2 orphaned", 2, "sigkill_of_torchrun", parallelism="fsdp")
    stop_after(folder, 7)
    part("fsdp 4", 4, "kill_inside_a_save", parallelism="fsdp", save_interval=100)
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 9, "epoch": 3.0, "lo')
    assert start(folder) == 0
    stages["end"] = None, folder
    return stages


def first_steps(folder: Path, steps: int, expected: Path) -> None:
    """Asserts that the first steps are there once each, with the losses and norms of `expected`."""
    lines, expected_lines = read_metrics(folder)[0][:steps], read_metrics(expected)[0][:steps]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    for name in ("loss", "grad_norm", "tokens", "lr"):
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in expected_lines], rel=1e-5)


@pytest.mark.parametrize(
    ("part", "resumed_from", "steps"),
    [
        ("fsdp 2", "step-000002, saved by 4 rank(s) under hsdp", 4),
        ("ddp 2", "step-000004, saved by 2 rank(s) under fsdp", 6),
        ("fsdp 2 again", "step-000006, saved by 2 rank(s) under ddp", 8),
        ("fsdp 2 orphaned", "step-000004, saved by 2 rank(s) under fsdp", 6),
        ("fsdp 4", "step-000007, saved by 1 rank(s) under none", 9),
    ],
)
def test_losses_after_a_change_of_processes_and_strategy_equal_the_uninterrupted_run(
    stages, uninterrupted, part, resumed_from, steps
):
    run, folder = stages[part]
    assert f"resume    from {folder.parent / 'run'}/checkpoints/{resumed_from}" in run.stdout, run.stderr
    first_steps(folder, steps, uninterrupted)


def test_a_run_of_six_parts_leaves_the_metrics_and_evaluations_of_the_uninterrupted_run(stages, uninterrupted):
    assert_same_run(stages["end"][1], uninterrupted)


def test_sigterm_to_torchrun_saves_on_all_ranks_and_tells_how_to_go_on(stages):
    run, folder = stages["hsdp 4"]
    assert "stopped   by SIGTERM after step 2; the checkpoint is saved, and the same command goes on" in run.stdout
    assert saved(folder) == ["step-000002"]
    assert all(f"rank {rank} leaves with 0" in run.stderr for rank in range(4)), run.stderr


def test_sigusr1_to_torchrun_saves_where_it_was_told_to_pass_it_on(stages):
    run, folder = stages["fsdp 2 again"]
    assert "stopped   by SIGUSR1 after step 8; the checkpoint is saved" in run.stdout
    assert saved(folder) == ["step-000006", "step-000008"]
    assert all(f"rank {rank} leaves with 0" in run.stderr for rank in range(2)), run.stderr


def test_ranks_whose_torchrun_was_killed_save_and_leave(stages):
    run, folder = stages["fsdp 2 orphaned"]
    assert run.returncode == -signal.SIGKILL
    assert "stopped   by the end of its torchrun after step 6; the checkpoint is saved" in run.stdout
    assert saved(folder) == ["step-000004", "step-000006"]
    assert all(f"rank {rank} leaves with 0" in run.stderr for rank in range(2)), run.stderr


def test_sigusr1_to_one_rank_stops_all_of_them_at_one_step_with_exit_0(stages):
    run, folder = stages["fsdp 2"]
    assert run.returncode == 0, run.stderr
    assert "stopped   by a signal to another rank after step 4; the checkpoint is saved" in run.stdout
    assert saved(folder) == ["step-000002", "step-000004"]


def test_ctrl_c_in_the_terminal_stops_torchrun_with_a_checkpoint(stages):
    run, folder = stages["ddp 2"]
    assert "stopped   by SIGINT after step 6; the checkpoint is saved" in run.stdout
    assert saved(folder) == ["step-000004", "step-000006"]


def test_a_kill_inside_a_save_leaves_a_half_written_folder_that_the_next_start_removes(stages):
    run, folder = stages["fsdp 4"]
    assert run.returncode == -signal.SIGKILL
    assert saved(folder) == ["step-000006", "step-000007", "step-000009.writing"]
    assert not (folder / "checkpoints" / "step-000009.writing" / "manifest.json").exists()
    assert saved(stages["end"][1]) == ["step-000008", "step-000009"]


def test_each_of_two_sharded_ranks_writes_half_of_the_bytes(stages):
    files = list((stages["fsdp 2"][1] / "checkpoints" / "step-000004").glob("*.safetensors"))
    by_rank = {rank: sum(f.stat().st_size for f in files if f.name.startswith(f"shard-0000{rank}-")) for rank in (1, 2)}
    whole = next((stages["end"][1] / "checkpoints" / "step-000009").glob("*.safetensors")).stat().st_size
    assert sum(by_rank.values()) == sum(file.stat().st_size for file in files)
    assert by_rank[1] == pytest.approx(whole / 2, rel=0.05)
    assert by_rank[2] == pytest.approx(whole / 2, rel=0.05)


def test_a_checkpoint_holds_safetensors_and_json_alone_under_every_strategy(stages):
    for _, folder in stages.values():
        files = [file for checkpoint in (folder / "checkpoints").iterdir() for file in checkpoint.rglob("*")]
        assert {file.suffix for file in files} == {".safetensors", ".json"}
        assert {file.name for file in files if file.suffix == ".json"} == {"manifest.json"}


# ----------------------------------------------------------------------------------------------------------------
# One process: which checkpoints there are, and what follows from them
# ----------------------------------------------------------------------------------------------------------------


def test_only_the_newest_keep_checkpoints_remain(uninterrupted, stopped):
    assert saved(uninterrupted) == ["step-000008", "step-000009"]
    assert saved(stopped) == ["step-000002", "step-000004", "step-000005"]


def test_the_manifest_tells_where_the_run_stood_and_vouches_for_every_file(stopped):
    folder = stopped / "checkpoints" / "step-000005"
    facts, files = manifest(folder)["facts"], manifest(folder)["files"]
    assert facts["step"] == 5
    assert facts["tokens"] == read_metrics(stopped)[0][-1]["tokens"]
    assert set(files) == {file.name for file in folder.glob("*.safetensors")}
    for name, file in files.items():
        content = (folder / name).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("checkpoint", ["step-000002", "step-000004", "auto"])
def test_losses_after_resuming_from_any_step_equal_the_uninterrupted_run(stopped, copy_of, uninterrupted, checkpoint):
    """To go back, delete the later checkpoints."""
    folder = copy_of(stopped)
    for later in (folder / "checkpoints").iterdir() if checkpoint != "auto" else []:
        if later.name > checkpoint:
            shutil.rmtree(later)
    assert start(folder) == 0
    assert_same_run(folder, uninterrupted)
    assert tree(folder)["config.json"] == tree(uninterrupted)["config.json"]


def test_a_path_may_lie_in_another_folder(stopped, tmp_path, uninterrupted):
    """The new folder's metrics begin after the checkpoint's step, and the old folder stays as it is."""
    before = tree(stopped)
    assert start(tmp_path, resume=stopped / "checkpoints" / "step-000004") == 0
    assert [line["step"] for line in read_metrics(tmp_path)[0]] == [5, 6, 7, 8, 9]
    losses, expected = ([line["loss"] for line in read_metrics(f)[0][-5:]] for f in (tmp_path, uninterrupted))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert tree(stopped) == before


def test_a_folder_of_another_runs_checkpoints_is_refused_with_the_name_of_a_complete_one(
    stopped, copy_of, tmp_path, capsys
):
    folder = copy_of(stopped)
    newest = folder / "checkpoints" / saved(folder)[-1]
    (folder / "checkpoints" / "step-999999.writing").mkdir()
    assert start(tmp_path / "new", resume=folder) == 2
    assert f"holds checkpoints but is none; name one, such as {newest}, or" in capsys.readouterr().err


@pytest.mark.parametrize("place", [".", "checkpoints"])
def test_a_folder_of_checkpoints_is_refused_with_the_name_of_one(stopped, copy_of, tmp_path, capsys, place):
    folder = copy_of(stopped)
    assert start(tmp_path / "new", resume=folder / place) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    newest = folder / "checkpoints" / saved(folder)[-1]
    assert line.startswith(
        f"error: --resume {folder / place} holds checkpoints but is none; name one, such as {newest}"
    )


def test_a_path_says_only_where_a_run_begins(stopped, uninterrupted, copy_of, capsys):
    """A folder with checkpoints of its own goes on from the newest, and the run of the path stays as it is."""
    folder, path, before = copy_of(stopped), uninterrupted / "checkpoints" / "step-000008", tree(uninterrupted)
    assert start(folder, resume=path) == 0
    newest = folder / "checkpoints" / "step-000005"
    said = f"resume    from {newest}, saved by 1 rank(s) under none; --resume {path} says only where a new run begins"
    assert said in capsys.readouterr().out
    assert_same_run(folder, uninterrupted)
    assert tree(uninterrupted) == before


def test_a_path_that_the_run_has_left_behind_is_refused(stopped, copy_of, uninterrupted, capsys):
    """The line names the folders to delete; without them the same command goes back and gives the same losses."""
    folder = copy_of(stopped)
    path, *later = (folder / "checkpoints" / f"step-00000{step}" for step in (2, 5, 4))
    before = tree(folder)
    assert start(folder, resume=path) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert line == (
        f"error: --resume {path} is not the newest checkpoint of {folder / 'checkpoints'}; to go back to it, delete "
        f"{later[0]} and {later[1]}"
    )
    assert tree(folder) == before
    for each in later:
        shutil.rmtree(each)
    assert start(folder, resume=path) == 0
    assert_same_run(folder, uninterrupted)


def test_metrics_of_a_run_whose_checkpoints_are_gone_are_put_aside_each_time(tmp_path):
    for number in (1, 2):
        assert start(tmp_path, max_steps=number) == 0
        shutil.rmtree(tmp_path / "checkpoints")
    assert start(tmp_path, max_steps=3) == 0
    names = ("metrics.previous-1.jsonl", "metrics.previous-2.jsonl", "metrics.jsonl")
    lines = [[json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in names]
    assert [[line["step"] for line in some if "loss" in line] for some in lines] == [[1], [1, 2], [1, 2, 3]]


def test_a_finished_run_resumed_again_trains_nothing_and_writes_the_same_model(uninterrupted, copy_of, monkeypatch):
    folder = copy_of(uninterrupted)
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(train_llama2, "training_step", None)
    assert start(folder) == 0
    assert tree(folder) == {**tree(uninterrupted), "train_config.json": tree(folder)["train_config.json"]}


@pytest.mark.parametrize("step", [4, 8, 9])
def test_an_evaluation_that_a_stop_fell_on_is_made_up_for(tmp_path, uninterrupted, step):
    """Steps 4, 8 and 9 end in an evaluation; the signal arrives just before it."""
    stop_after(tmp_path, step)
    assert start(tmp_path) == 0
    assert_same_run(tmp_path, uninterrupted)


def test_more_steps_and_more_epochs_may_be_asked_for_later(tmp_path):
    flags = dict(lr_scheduler="constant", warmup_ratio=0)
    assert start(tmp_path / "whole", **flags) == 0
    assert start(tmp_path / "parts", **flags, num_train_epochs=2, max_steps=4) == 0
    assert [line["step"] for line in read_metrics(tmp_path / "parts")[0]] == [1, 2, 3, 4]
    assert start(tmp_path / "parts", **flags, num_train_epochs=2, max_steps=5) == 0
    assert start(tmp_path / "parts", **flags) == 0
    parts, whole = (read_metrics(tmp_path / name)[0] for name in ("parts", "whole"))
    assert [line["step"] for line in parts] == list(range(1, 10))
    assert [line["loss"] for line in parts] == pytest.approx([line["loss"] for line in whole], rel=1e-5)


def test_an_evaluation_made_up_for_and_then_lost_with_a_kill_is_told_once(tmp_path, uninterrupted):
    """Stopped at step 4, which ends in an evaluation; the resumed run evaluates, and is killed before its next save."""

    class Kill(BaseException):
        pass

    def kill():
        raise Kill

    stop_after(tmp_path, 4)
    with at_steps({5: kill}), pytest.raises(Kill):
        start(tmp_path)
    (tmp_path / ".lock").open().close()
    assert [line["step"] for line in read_metrics(tmp_path)[1]] == [4]
    assert start(tmp_path) == 0
    assert_same_run(tmp_path, uninterrupted)


def test_the_same_command_goes_on_whatever_path_it_began_from(stopped, tmp_path, uninterrupted):
    """A run that began with --resume PATH is stopped, as before a requeue; its command is started again."""
    folder, resume = tmp_path / "run", stopped / "checkpoints" / "step-000002"
    stop_after(folder, 4, resume=resume)
    stop_after(folder, 6, resume=resume)
    assert start(folder, resume=resume) == 0
    assert [line["step"] for line in read_metrics(folder)[0]] == list(range(3, 10))
    losses, expected = ([line["loss"] for line in read_metrics(f)[0][-7:]] for f in (folder, uninterrupted))
    assert losses == pytest.approx(expected, rel=1e-5)


def test_the_one_before_a_damaged_checkpoint_makes_its_successors_the_newest(tmp_path, uninterrupted):
    """Checkpoints of steps 4, 8 and 9, the last two damaged; a stop after 6 with one kept, that of step 6."""
    assert start(tmp_path, save_interval=4, keep_checkpoints=3) == 0
    assert saved(tmp_path) == ["step-000004", "step-000008", "step-000009"]
    for step in ("step-000008", "step-000009"):
        next((tmp_path / "checkpoints" / step).glob("*.safetensors")).unlink()
    stop_after(tmp_path, 6, save_interval=4, keep_checkpoints=1)
    assert saved(tmp_path) == ["step-000006"]
    assert start(tmp_path, save_interval=4) == 0
    assert_same_run(tmp_path, uninterrupted)


FORMER = Path(__file__).parent / "data" / "former_checkpoint"


def test_a_checkpoint_of_an_earlier_version_goes_on_with_its_losses(tmp_path):
    """It holds step 2; that version's own run had these losses in steps 3 and 4 and this one at its end."""
    model = tmp_path / "model"
    model.mkdir()
    for file in [FORMER / "config.json", *TINY_LLAMA.glob("tokenizer*")]:
        shutil.copy(file, model)
    shutil.copytree(FORMER / "checkpoints", tmp_path / "run" / "checkpoints")
    flags = dict(model_name_or_path=model, block_size=64, batch_size=8, lr=1e-2, lr_scheduler="constant")
    flags |= dict(warmup_ratio=0, random_init=True, max_steps=4, resume_anyway=True)
    assert conftest.start(tmp_path / "run", **flags) == 0
    steps, evaluations = read_metrics(tmp_path / "run")
    assert [line["loss"] for line in steps] == pytest.approx([6.886326313018799, 6.852049827575684], rel=1e-6)
    assert evaluations[-1]["eval_loss"] == pytest.approx(6.811911446707589, rel=1e-6)


# ----------------------------------------------------------------------------------------------------------------
# Two runs in one folder
# ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def another_run_in(folder: Path, seconds: float) -> Iterator[subprocess.Popen]:
    """Inside, a process holds the folder as a run does; it ends by itself after so many seconds."""
    words = [sys.executable, str(RANKS / "hold_a_lock.py"), str(folder / ".lock"), str(seconds)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_waits_for_the_folder_and_is_refused_where_the_first_stays(stopped, copy_of, monkeypatch, capsys):
    folder = copy_of(stopped)
    (folder / ".lock").write_text("process 7 on node-3")
    before, began = tree(folder), time.monotonic()
    monkeypatch.setattr(train_llama2, "LOCK_WAIT_SECONDS", 2)
    with another_run_in(folder, 60):
        assert start(folder) == 2
    assert time.monotonic() - began > 2
    said = capsys.readouterr()
    assert f"waiting   for process 7 on node-3 to leave {folder}" in said.out
    assert (
        f"error: --save-model-dir {folder} is being written to by another run, process 7 on node-3; end it" in said.err
    )
    assert tree(folder) == before


def test_a_second_run_goes_on_when_the_first_has_left(stopped, copy_of, uninterrupted):
    folder = copy_of(stopped)
    with another_run_in(folder, 1.5) as first:
        assert start(folder) == 0
        assert first.poll() == 0
    assert_same_run(folder, uninterrupted)


# ----------------------------------------------------------------------------------------------------------------
# Changed flags
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("seed", 42, 7),
        ("batch_size", 13, 12),
        ("block_size", 64, 72),
        ("loss_on", "all", "summary"),
        ("lr", 0.001, 0.002),
        ("lr_scheduler", "cosine", "linear"),
        ("warmup_ratio", 0.03, 0.5),
        ("weight_decay", 0.0, 0.1),
        ("max_grad_norm", 0.1, 0.2),
        ("precision", "fp32", "bf16"),
        ("random_init", False, True),
        ("max_train_samples", 34, 30),
    ],
)
def test_a_flag_that_changes_the_curve_is_refused_in_one_line_with_both_values(stopped, capsys, name, old, new):
    before = tree(stopped)
    assert start(stopped, **{name: new}) == 2
    errors = capsys.readouterr().err.splitlines()
    lines = [line for line in errors if line.startswith("error:")]
    assert len(lines) == 1, lines
    flag = "--dataset-name-or-path" if name == "max_train_samples" else "--" + name.replace("_", "-")
    assert lines[0].startswith(f"error: {flag} is now {new}")
    assert f"was trained with {old}" in lines[0]
    assert "--resume-anyway" in lines[0]
    assert tree(stopped) == before


def test_each_changed_flag_has_its_line(stopped, capsys):
    assert start(stopped, seed=7, lr=0.002, max_grad_norm=0) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert [line.split()[1] for line in lines] == ["--seed", "--lr", "--max-grad-norm"]


def test_other_texts_of_the_same_lengths_are_refused(stopped, copy_of, tmp_path, capsys):
    """The documents in another order of their words have other tokens, but as many."""
    shutil.copytree(NEWS, tmp_path / "news")
    rows = [json.loads(line) for line in (NEWS / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["article"] = " ".join(reversed(row["article"].split(" ")))
    (tmp_path / "news" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert start(copy_of(stopped), dataset_name_or_path=tmp_path / "news") == 2
    assert "error: --dataset-name-or-path is now" in capsys.readouterr().err


def test_the_same_data_and_model_in_another_place_are_not_refused(stopped, copy_of, tmp_path):
    moved = dict(dataset_name_or_path=tmp_path / "news", model_name_or_path=tmp_path / "model")
    shutil.copytree(NEWS, tmp_path / "news")
    shutil.copytree(TINY_LLAMA, tmp_path / "model")
    assert start(copy_of(stopped), **moved) == 0


def test_another_model_of_the_same_size_is_refused(stopped, copy_of, tmp_path, capsys):
    shutil.copytree(TINY_LLAMA, tmp_path / "model")
    described = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**described, "rms_norm_eps": 0.01}))
    assert start(copy_of(stopped), model_name_or_path=tmp_path / "model") == 2
    assert "error: --model-name-or-path is now" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "steps"), [({"num_train_epochs": 2}, 6), ({"max_steps": 5}, 5)], ids=str)
def test_fewer_steps_in_all_are_refused_because_the_learning_rates_went_towards_more(stopped, capsys, flags, steps):
    """9 steps set the cosine of the 5 that were trained."""
    before = tree(stopped)
    assert start(stopped, **flags) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert f"--num-train-epochs and --max-steps now give {steps} steps, but" in line
    assert "was trained towards 9" in line
    assert tree(stopped) == before


def test_resume_anyway_goes_on_to_fewer_steps_but_not_back_in_time(stopped, copy_of, capsys):
    folder = copy_of(stopped)
    assert start(folder, max_steps=4, resume_anyway=True) == 2
    assert "step-000005 is past the 4 steps of this run; raise --max-steps" in capsys.readouterr().err
    assert start(folder, max_steps=6, resume_anyway=True) == 0
    assert [line["step"] for line in read_metrics(folder)[0]] == [1, 2, 3, 4, 5, 6]


def test_resume_anyway_goes_on_with_the_changed_flags(stopped, copy_of):
    folder = copy_of(stopped)
    assert start(folder, lr=0.002, lr_scheduler="constant", resume_anyway=True, max_steps=6) == 0
    steps = read_metrics(folder)[0]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1]["lr"] == 0.002


# ----------------------------------------------------------------------------------------------------------------
# What survives a resume besides weights and moments
# ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def poisoned(steps: set[int]) -> Iterator[None]:
    """Inside, the loss of these training steps is not a number."""
    step, loss_sum, poison = train_llama2.training_step, train_llama2.token_loss_sum, []

    def training_step(model, optimizer, batch, lr, state, *rest):
        poison[:] = [1] * (state.step + 1 in steps)
        torch.rand(1)  # moves the random state on, as dropout would
        try:
            return step(model, optimizer, batch, lr, state, *rest)
        finally:
            poison.clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_llama2, "training_step", training_step)
        patch.setattr(train_llama2, "token_loss_sum", lambda *all: loss_sum(*all) * (float("nan") if poison else 1))
        yield


def test_counters_tokens_run_id_and_random_state_survive_a_resume(tmp_path, monkeypatch):
    seen = []
    save, resume = Checkpoints.save, Checkpoints.resume

    def look(state: TrainingState) -> None:
        facts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        del facts["longest_skip"]  # the next test's
        facts = {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in facts.items()}
        seen.append({**facts, "random": torch.get_rng_state().tolist()})

    def looking_save(self, model, optimizer, state):
        look(state)
        save(self, model, optimizer, state)

    def looking_resume(self, *all):
        state = resume(self, *all)
        look(state)
        return state

    monkeypatch.setattr(Checkpoints, "save", looking_save)
    monkeypatch.setattr(Checkpoints, "resume", looking_resume)
    with poisoned({2, 4, 5}):
        stop_after(tmp_path, 5)
        at_stop = seen[-1]
        seen.clear()
        assert start(tmp_path) == 0
    assert seen[0] == at_stop
    assert (at_stop["step"], at_stop["skipped"], at_stop["skipped_in_a_row"]) == (5, 3, 2)
    assert at_stop["tokens"] > 0
    assert len(at_stop["run_id"]) > 8
    assert seen[0]["random"] != torch.Generator().manual_seed(42).get_state().tolist()
    assert [line["skipped_steps"] for line in read_metrics(tmp_path)[0]] == [0, 1, 1, 2, 3, 3, 3, 3, 3]


def test_five_skipped_steps_in_a_row_end_the_run_although_it_was_stopped_among_them(tmp_path, capsys):
    """Stopped after the third; the resumed run finds the row full before the save of step 8."""
    with poisoned({4, 5, 6, 7, 8}):
        stop_after(tmp_path, 6)
        assert start(tmp_path) == 1
    assert "error: loss or gradient norm was not finite in 5 steps in a row, up to step 8" in capsys.readouterr().err
    assert saved(tmp_path) == ["step-000004", "step-000006"]


def test_a_stop_after_five_skipped_steps_in_a_row_saves_nothing_that_would_end_every_resume(tmp_path, capsys):
    """The row is full after step 7, which neither ends a fifth step nor an interval; the stop's save would be next."""
    with poisoned({3, 4, 5, 6, 7}), at_steps({7: signal_myself}):
        assert start(tmp_path, save_interval=100) == 1
    assert "not finite in 5 steps in a row, up to step 7" in capsys.readouterr().err
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def test_a_run_that_ends_with_an_error_finishes_the_save_under_way(tmp_path):
    run = interrupted(tmp_path / "run", 2, "slow_save_and_broken_weights", eval_interval=3, async_save="yes")
    assert run.returncode == 1
    assert "error: the validation loss is nan" in run.stderr
    assert saved(tmp_path / "run") == ["step-000002"]
    assert "step-000002 (0.00 GiB) in " in run.stdout


# ----------------------------------------------------------------------------------------------------------------
# Signals in one process
# ----------------------------------------------------------------------------------------------------------------


HEARD = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


@pytest.mark.parametrize("number", HEARD, ids=lambda number: number.name)
def test_a_signal_stops_after_its_step_with_exit_0_and_a_line_how_to_go_on(tmp_path, capsys, number):
    before = [signal.getsignal(each) for each in HEARD]
    with at_steps({1: lambda: signal_myself(number)}):
        assert start(tmp_path) == 0
    assert (
        f"stopped   by {number.name} after step 1; the checkpoint is saved, and the same command goes on from it"
        in capsys.readouterr().out
    )
    assert saved(tmp_path) == ["step-000001"]
    assert not (tmp_path / "model.safetensors").exists()
    assert [signal.getsignal(each) for each in HEARD] == before


def test_under_nohup_neither_the_end_of_the_terminal_nor_that_of_the_shell_stops_the_run(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    try:
        with at_steps({1: lambda: (signal_myself(signal.SIGHUP), monkeypatch.setattr(os, "getppid", lambda: 1))}):
            assert start(tmp_path, max_steps=3) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("when", ["prepare_save_folder", "load_model", "check_setup"])
def test_a_signal_before_training_stops_before_the_first_step_with_exit_0(tmp_path, monkeypatch, capsys, number, when):
    act = getattr(train_llama2, when)

    def signalled(*all):
        signal_myself(number)
        return act(*all)

    monkeypatch.setattr(train_llama2, when, signalled)
    assert start(tmp_path, async_save="no") == 0
    said = f"stopped   by {number.name} after step 0; nothing was trained yet, and the same command begins again"
    assert said in capsys.readouterr().out
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("step", [3, 4])
def test_a_signal_after_the_last_look_at_signals_of_a_step_is_found_by_the_next_which_saves(
    tmp_path, monkeypatch, capsys, step
):
    """Step 4 ends in a save of its own, step 3 does not; in neither may the run end before a save of the last step."""
    look = train_llama2.stop_if_broken

    def signalled(state, saving):
        look(state, saving)
        if state.step == step:
            signal_myself()

    monkeypatch.setattr(train_llama2, "stop_if_broken", signalled)
    assert start(tmp_path) == 0
    assert f"stopped   by SIGTERM after step {step + 1}; the checkpoint is saved" in capsys.readouterr().out
    assert f"step-00000{step + 1}" in saved(tmp_path)


def test_a_signal_during_the_final_save_lets_the_model_be_finished(tmp_path, monkeypatch, capfd, uninterrupted):
    write = train_llama2.write_model

    def signalled(*arguments):  # once the model is written, and is about to move in
        write(*arguments)
        signal_myself()

    monkeypatch.setattr(train_llama2, "write_model", signalled)
    assert start(tmp_path) == 0
    said = capfd.readouterr()
    assert "stopping  at the end of the step" in said.err
    assert "\ndone      9 steps" in said.out
    assert tree(tmp_path)["model.safetensors"] == tree(uninterrupted)["model.safetensors"]


def test_a_step_that_would_outlast_torchruns_patience_is_left_and_taken_again(tmp_path, monkeypatch, uninterrupted):
    """Steps have 4, 4 and 2 micro-batches; the signal comes in the second one of step 5, when there is no time left."""
    loss_sum, calls = train_llama2.token_loss_sum, []

    def counting(model, *rest):
        if model.training:
            calls.append(1)
            if len(calls) == 4 + 4 + 2 + 4 + 2:
                signal_myself()
        return loss_sum(model, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train_llama2, "TORCHRUN_GRACE_SECONDS", 0.0)
        patch.setenv("TORCHELASTIC_RUN_ID", "none")
        patch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
        patch.setattr(train_llama2, "token_loss_sum", counting)
        assert start(tmp_path, micro_batch_size=4) == 0
    assert len(calls) == 4 + 4 + 2 + 4 + 2
    assert saved(tmp_path) == ["step-000002", "step-000004"]
    assert start(tmp_path) == 0
    assert_same_run(tmp_path, uninterrupted)


def test_torchrun_is_patient_for_30_s_or_as_long_as_it_was_told_and_nobody_else_is_impatient(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    assert train_llama2.patience_seconds() == float("inf")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert train_llama2.patience_seconds() == 30
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "240")
    assert train_llama2.patience_seconds() == (240 if torch.__version__ >= "2.13" else 30)


def test_a_second_signal_within_two_seconds_is_the_first_one_heard_twice(tmp_path):
    with at_steps({3: lambda: (signal_myself(signal.SIGINT), signal_myself(signal.SIGTERM))}):
        assert start(tmp_path) == 0
    assert saved(tmp_path) == ["step-000002", "step-000003"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_second_signal_later_leaves_at_once_and_the_unfinished_save_is_ignored(tmp_path, monkeypatch, uninterrupted):
    class Left(BaseException):
        pass

    class Os:
        """The module, but for `_exit`; replaced in the script alone, as processes that fork need the real one."""

        def __getattr__(self, name: str) -> object:
            return getattr(os, name)

        def _exit(self, code: int) -> None:
            raise Left(code)

    def second_signal(self, writing, final, facts, files):
        if facts["step"] != 3:
            return complete(self, writing, final, facts, files)
        time.sleep(train_llama2.SAME_SIGNAL_SECONDS + 0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        killed.wait(60)
        raise SystemExit  # ends this thread without another file operation

    complete, killed = Checkpoints.complete, threading.Event()
    with monkeypatch.context() as patch, at_steps({3: signal_myself}):
        patch.setattr(Checkpoints, "complete", second_signal)
        patch.setattr(train_llama2, "os", Os())
        with pytest.raises(Left) as left:
            start(tmp_path, async_save="yes")
        killed.set()
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join(60)
    assert left.value.args == (128 + signal.SIGTERM,)
    assert saved(tmp_path) == ["step-000002", "step-000003.writing"]
    assert start(tmp_path) == 0
    assert_same_run(tmp_path, uninterrupted)


# ----------------------------------------------------------------------------------------------------------------
# Saving in the background
# ----------------------------------------------------------------------------------------------------------------


def test_training_goes_on_during_a_save_and_what_is_saved_is_the_step_it_is_of(tmp_path, monkeypatch, uninterrupted):
    """The write of step 2 waits until step 3 is trained: a write that held training would wait in vain."""
    write, trained, waited = Checkpoints.write, threading.Event(), []

    def slow(self, tensors, facts, began):
        if facts["step"] == 2:
            waited.append(trained.wait(60))
        write(self, tensors, facts, began)

    with monkeypatch.context() as patch, at_steps({3: trained.set}):
        patch.setattr(Checkpoints, "write", slow)
        assert start(tmp_path, async_save="yes", max_steps=9, keep_checkpoints=9) == 0
    assert waited == [True]
    for later in (tmp_path / "checkpoints").iterdir():
        if later.name > "step-000002":
            shutil.rmtree(later)
    assert start(tmp_path) == 0
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize("choice", ["yes", "no"])
def test_at_most_one_save_is_under_way(tmp_path, monkeypatch, choice):
    write, under_way, threads = Checkpoints.write, [], set()

    def counting(self, tensors, facts, began):
        under_way.append(facts["step"])
        threads.add(threading.current_thread() is threading.main_thread())
        assert len(under_way) == 1
        time.sleep(0.1)
        write(self, tensors, facts, began)
        assert under_way.pop() == facts["step"]

    monkeypatch.setattr(Checkpoints, "write", counting)
    assert start(tmp_path, async_save=choice, save_interval=1, max_steps=5, keep_checkpoints=5) == 0
    assert saved(tmp_path) == [f"step-{step:06d}" for step in (1, 2, 3, 4, 5)]
    assert threads == {choice == "no"}


@pytest.fixture
def small_checkpoints(tmp_path) -> Iterator[Callable[..., Checkpoints]]:
    """Returns a maker of Checkpoints in one process, without a run around them."""
    fresh_accelerate()
    settings = dict(model_name_or_path=str(TINY_LLAMA), block_size=64, save_model_dir=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    with enable_advanced_parallelization(Config(**settings)) as parallel:

        def make(**flags: object) -> Checkpoints:
            config = Config(**settings, **flags)
            return Checkpoints(dataclasses.replace(parallel, config=config), None, total_steps=9)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_llama2, "loss_settings", lambda documents, parallel: {"seed": 42})
            yield make


def test_scarce_host_memory_makes_saving_hold_training_and_is_said(small_checkpoints, monkeypatch, capsys):
    assert small_checkpoints().asynchronous
    assert not small_checkpoints(async_save="no").asynchronous
    monkeypatch.setattr(train_llama2.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    capsys.readouterr()
    for choice in ("auto", "yes"):
        assert not small_checkpoints(async_save=choice).asynchronous
        assert "save      checkpoints are written with training held: a copy to write from" in capsys.readouterr().out


# The tiny Llama: embedding and head of 1024 x 64, 4 layers of 4 x 64 x 64 + 3 x 64 x 172 + 2 x 64, a norm of 64.
PARAMETERS = 2 * 65_536 + 4 * 49_536 + 64


@pytest.mark.parametrize(
    ("choice", "share", "free"), [("auto", 0.5, 13_171_200), ("yes", 0.9, 9_658_880)], ids=["auto", "yes"]
)
def test_a_copy_is_made_where_it_takes_so_much_of_what_the_run_leaves_free(
    small_checkpoints, monkeypatch, choice, share, free
):
    """On a CPU the run itself will take 16 bytes a parameter; the copy takes 12, at most half or 90% of the rest."""
    assert PARAMETERS == 329_280
    assert share * (free - 16 * PARAMETERS) == pytest.approx(12 * PARAMETERS, abs=1)
    for available, expected in ((free + 10, True), (free - 10, False)):
        monkeypatch.setattr(
            train_llama2.psutil, "virtual_memory", lambda available=available: SimpleNamespace(available=available)
        )
        assert small_checkpoints(async_save=choice).asynchronous is expected


@pytest.mark.parametrize(
    ("device", "precision", "offload", "need", "words"),
    [
        ("cpu", "fp32", True, (2, 8), ["5.5 GiB for weights, gradients and moments under --cpu-offload"]),
        ("cuda", "fp32", False, (0, 4), ["1.3 GiB for the final model, gathered"]),
        ("cuda", "bf16", True, (2, 8 + 2), ["5.5 GiB for weights, gradients and moments", "0.6 GiB for the final"]),
        ("cuda", "bf16-states", True, (1, 4 + 2), ["2.8 GiB for weights, gradients and", "0.6 GiB for the final"]),
    ],
)
def test_too_little_host_memory_for_all_of_a_run_is_refused_before_training(
    small_checkpoints, monkeypatch, device, precision, offload, need, words
):
    """`need`: 1.5 x 2**20 bytes, which the matrices take pinned in fp32, and bytes a parameter, 8 being 2.51 x 2**20.

    Powers of two: a layer's 4 matrices of 64 x 64 are 16 KiB each as they are, its 3 of 64 x 172 take 64 instead of 43,
    embedding and head 256 each.
    """
    assert 4 * (4 * 16 + 3 * 64) + 2 * 256 == 1.5 * 1024
    parallel = small_checkpoints().parallel
    plan = dataclasses.replace(parallel.plan, cpu_offload=offload, precision=precision)
    parallel = dataclasses.replace(parallel, plan=plan)
    monkeypatch.setattr(train_llama2.Parallel, "device", property(lambda self: torch.device(device)))
    monkeypatch.setattr(train_llama2, "GIB", 2**20)
    available = int(need[0] * 1.5 * 2**20) + need[1] * PARAMETERS
    monkeypatch.setattr(train_llama2.psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    Checkpoints(parallel, None, total_steps=9)
    available -= 1
    with pytest.raises(train_llama2.UserError, match="GiB of host memory free, and the run will take") as refusal:
        Checkpoints(parallel, None, total_steps=9)
    assert all(part in str(refusal.value) for part in words)


def test_host_memory_is_what_the_jobs_own_limits_leave(tmp_path, monkeypatch):
    """A step's limit of 10 GB with 6 used, 2 of these a file cache, inside a job's of 5 GB with 1 used."""
    limits = {"job": ("5000", "1000", "inactive_file 0"), "job/step": ("10000", "6000", "anon 1\ninactive_file 2000")}
    for name, (limit, used, details) in {**limits, "": ("max", "9000", "inactive_file 0")}.items():
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for file, content in (("memory.max", limit), ("memory.current", used), ("memory.stat", details)):
            (folder / file).write_text(content + "\n")
    (tmp_path / "own").write_text("3:memory:/old\n0::/job/step\n")
    places = {"/sys/fs/cgroup": tmp_path, "/proc/self/cgroup": tmp_path / "own"}
    monkeypatch.setattr(train_llama2, "Path", lambda name: places[name])
    for available, expected in ((20_000, 4000), (3_999, 3_999)):
        monkeypatch.setattr(
            train_llama2.psutil, "virtual_memory", lambda available=available: SimpleNamespace(available=available)
        )
        assert train_llama2.free_host_memory() == expected
    (tmp_path / "job" / "memory.current").write_text("4500\n")
    assert train_llama2.free_host_memory() == 500
    (tmp_path / "own").unlink()
    assert train_llama2.free_host_memory() == 3_999


# ----------------------------------------------------------------------------------------------------------------
# Crashes: from the k-th file operation on, every one fails, as for a process that was killed
# ----------------------------------------------------------------------------------------------------------------


def model_of(value: float) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Returns a model of nothing but `value`, and an optimizer that has moments."""
    model = llama_of(value)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)
    optimizer.step()
    return model, optimizer


def state_at(step: int) -> TrainingState:
    state = TrainingState.fresh(torch.device("cpu"))
    state.step = step
    return state


@pytest.mark.parametrize("damaged", [False, True], ids=["the next step", "a damaged one of the same step"])
def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path, small_checkpoints, damaged):
    """The former one, of step 1, or the new one, of step 2, which may take the place of a damaged one."""
    folder, former_folder, crashes, outcomes = tmp_path / "run", tmp_path / "former", [], set()
    small_checkpoints(async_save="no").save(*model_of(0.5), state_at(1))
    if damaged:
        small_checkpoints(async_save="no").save(*model_of(0.75), state_at(2))
        flip_a_bit(folder / "checkpoints" / "step-000002")
    folder.rename(former_folder)
    for k in itertools.count():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(former_folder, folder)
        checkpoints = small_checkpoints(async_save="no", keep_checkpoints=1)
        model, optimizer = model_of(0.25)
        crash_point.arm(k)
        try:
            checkpoints.save(model, optimizer, state_at(2))
        except Crash as crash:
            crashes.append(crash)
        else:
            break
        finally:
            crash_point.disarm()
        model, optimizer = model_of(0.0)
        state = small_checkpoints().resume(model, optimizer)
        values = {value for parameter in model.parameters() for value in parameter.unique().tolist()}
        assert (state.step, values) in [(1, {0.5}), (2, {0.25})], crashes[-1]
        assert not [name for name in saved(folder) if "." in name]
        outcomes.add(state.step)
        crash_point.disarm()
    assert len(crashes) >= 5
    assert outcomes == {1, 2}
    assert saved(folder) == ["step-000002"]


def test_every_byte_is_flushed_before_the_checkpoint_gets_its_name(tmp_path, small_checkpoints, monkeypatch):
    flushed, named, fsync, rename = set(), [], os.fsync, Path.rename

    def noting_fsync(file):
        descriptor = file if isinstance(file, int) else file.fileno()
        flushed.add(os.stat(descriptor).st_ino)
        fsync(file)

    def noting_rename(self, target):
        if self.name.endswith(".writing"):
            files = [self, *self.iterdir()]
            named.append({file.name: file.stat().st_ino in flushed for file in files})
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(Path, "rename", noting_rename)
    small_checkpoints(async_save="no").save(*model_of(0.5), state_at(1))
    assert len(named) == 1
    assert len(named[0]) == 3
    assert all(named[0].values()), named


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_fail_the_new_one(
    tmp_path, small_checkpoints, monkeypatch, capsys
):
    checkpoints = small_checkpoints(async_save="no", keep_checkpoints=1)
    checkpoints.save(*model_of(0.5), state_at(1))

    def busy(folder):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(train_llama2, "discard", busy)
    checkpoints.save(*model_of(0.5), state_at(2))
    said = capsys.readouterr().out
    assert "step-000001 could not be deleted ([Errno 16] Device or resource busy)" in said
    assert "could not be written" not in said
    assert checkpoints.saved_step == 2


def test_a_step_that_is_saved_is_not_saved_again(tmp_path, small_checkpoints, monkeypatch):
    checkpoints, writes = small_checkpoints(async_save="no"), []
    write = Checkpoints.write
    monkeypatch.setattr(Checkpoints, "write", lambda self, *all: (writes.append(1), write(self, *all)))
    for step in (1, 1, 2):
        checkpoints.save(*model_of(0.5), state_at(step))
    assert len(writes) == 2
    checkpoints = small_checkpoints(async_save="no")
    model, optimizer = model_of(0.0)
    checkpoints.save(model, optimizer, checkpoints.resume(model, optimizer))
    assert len(writes) == 2, "nothing was trained since"
    assert checkpoints.seconds_to_save() > 0, "what the former process's saves took is known from the start"


@pytest.mark.parametrize(("device", "made"), [("cpu", []), ("cpu:0", []), ("cuda", []), ("cuda:3", ["cuda:3"])])
def test_the_writing_thread_uses_the_gpu_of_its_rank(small_checkpoints, monkeypatch, device, made):
    """torch refuses to make a "cuda" without a number the current one, which is what a lone process has."""
    checkpoints, current = small_checkpoints(), []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(str(device)))
    monkeypatch.setattr(train_llama2.Parallel, "device", property(lambda self: torch.device(device)))
    checkpoints.write({"model.weight": torch.zeros(2)}, {"step": 1}, time.perf_counter())
    assert current == made
    assert checkpoints.saved_step == 1


@pytest.mark.parametrize("choice", ["yes", "no"])
def test_tied_weights_are_saved_and_come_back_tied(small_checkpoints, choice):
    model, optimizer = model_of(0.5)
    model.lm_head.weight = model.model.embed_tokens.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    optimizer.step()
    checkpoints = small_checkpoints(async_save=choice)
    checkpoints.save(model, optimizer, state_at(1))
    checkpoints.wait()
    assert checkpoints.saved_step == 1
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert small_checkpoints().resume(model, optimizer).step == 1
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.unique().tolist() == [0.5]


def test_large_states_are_spread_over_files(tmp_path, small_checkpoints, monkeypatch):
    monkeypatch.setattr(train_llama2, "CHECKPOINT_FILE_BYTES", 40_000)
    small_checkpoints(async_save="no").save(*model_of(0.5), state_at(1))
    files = list((tmp_path / "run" / "checkpoints" / "step-000001").glob("*.safetensors"))
    assert len(files) >= 3
    model, optimizer = model_of(0.0)
    assert small_checkpoints().resume(model, optimizer).step == 1
    assert {value for parameter in model.parameters() for value in parameter.unique().tolist()} == {0.5}


def test_nothing_is_ever_unpickled(stopped, copy_of, monkeypatch):
    """A resume with torch.load and pickle.load taken away; the files are safetensors through and through."""

    def refuse(*all, **others):
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.pickle.load", refuse)
    assert start(copy_of(stopped)) == 0
    stored = HuggingFaceStorageReader(str(stopped / "checkpoints" / "step-000005")).read_metadata()
    assert "rng.0" in stored.state_dict_metadata


# ----------------------------------------------------------------------------------------------------------------
# Damage
# ----------------------------------------------------------------------------------------------------------------


def shard_of(checkpoint: Path) -> Path:
    return next(checkpoint.glob("*.safetensors"))


def truncate(checkpoint: Path) -> str:
    with shard_of(checkpoint).open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 1)
    return shard_of(checkpoint).name + " has "


def flip_a_bit(checkpoint: Path) -> str:
    with shard_of(checkpoint).open("r+b") as file:
        file.seek(file.seek(0, os.SEEK_END) // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 16]))
    return shard_of(checkpoint).name + " is corrupt"


def remove_a_shard(checkpoint: Path) -> str:
    name = shard_of(checkpoint).name
    shard_of(checkpoint).unlink()
    return name + " is missing"


def edit_the_manifest(checkpoint: Path) -> str:
    text = (checkpoint / "manifest.json").read_text()
    assert '"step": 5' in text
    (checkpoint / "manifest.json").write_text(text.replace('"step": 5', '"step": 7'))
    return "manifest.json was changed"


def cut_the_manifest(checkpoint: Path) -> str:
    text = (checkpoint / "manifest.json").read_text()
    (checkpoint / "manifest.json").write_text(text[:100])
    return "manifest.json is missing or unreadable"


def remove_the_manifest(checkpoint: Path) -> str:
    (checkpoint / "manifest.json").unlink()
    return "manifest.json is missing or unreadable"


@pytest.mark.parametrize(
    "damage", [truncate, flip_a_bit, remove_a_shard, edit_the_manifest, cut_the_manifest, remove_the_manifest]
)
def test_damage_is_named_refused_by_path_and_passed_over_by_auto(
    stopped, copy_of, tmp_path, capsys, uninterrupted, damage
):
    folder = copy_of(stopped)
    newest = folder / "checkpoints" / "step-000005"
    named = damage(newest)
    assert start(tmp_path / "new", resume=newest) == 2
    assert f"error: --resume {newest} is not a whole checkpoint: {named}" in capsys.readouterr().err
    assert start(folder) == 0
    said = capsys.readouterr().out
    assert f"WARNING   {newest} is damaged ({named}" in said
    assert "resume    from " + str(folder / "checkpoints" / "step-000004") in said
    assert_same_run(folder, uninterrupted)


def test_auto_does_not_start_anew_where_every_checkpoint_is_damaged(stopped, copy_of, capsys):
    folder = copy_of(stopped)
    for checkpoint in (folder / "checkpoints").iterdir():
        flip_a_bit(checkpoint)
    before = tree(folder)
    assert start(folder) == 2
    said = capsys.readouterr()
    assert said.out.count("WARNING") == 3
    assert "error: --resume auto found no whole checkpoint" in said.err
    assert tree(folder) == before


def test_a_path_that_does_not_exist_is_refused(tmp_path, capsys):
    assert start(tmp_path / "run", resume="/nope") == 2
    assert "error: --resume /nope does not exist; give auto, or a checkpoint's folder" in capsys.readouterr().err


def test_a_path_without_a_checkpoint_is_refused(tmp_path, capsys):
    assert start(tmp_path / "run", resume=tmp_path) == 2
    assert f"error: --resume {tmp_path} is not a whole checkpoint" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------
# Disks
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["yes", "no"])
def test_a_save_that_fails_half_way_is_told_and_the_run_goes_on(tmp_path, capsys, uninterrupted, choice):
    """While no file may grow past 1 MB, a save of 4 MB fails; the one after it succeeds."""
    before, kept = resource.getrlimit(resource.RLIMIT_FSIZE), []

    def settled() -> list[str]:
        """Waits for a save in the background to end."""
        deadline = time.monotonic() + 60
        while any(name.endswith(".writing") for name in saved(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.01)
        return saved(tmp_path)

    def shrink():
        kept.append(settled())
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))

    def lift():
        kept.append(settled())
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    try:
        with at_steps({3: shrink, 5: lift}):
            assert start(tmp_path, async_save=choice, keep_checkpoints=1, max_steps=9) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert kept == [["step-000002"], ["step-000002"]]
    assert "WARNING   the checkpoint of step 4 could not be written" in capsys.readouterr().out
    assert saved(tmp_path) == ["step-000009"]
    assert_same_run(tmp_path, uninterrupted)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mount = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("there is no mount program")
    if mount.returncode:
        pytest.skip(f"mounting a small disk is not permitted here: {mount.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_run_goes_on_while_its_disk_is_full(small_disk, capsys):
    """Another program fills the disk to the last byte after step 3 and makes room after step 14."""
    filler, folder, flags = small_disk / "filler", small_disk / "run", dict(save_interval=2, keep_checkpoints=1)

    def fill():
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    with at_steps({3: fill, 14: filler.unlink}):
        assert start(folder, **flags, batch_size=2, num_train_epochs=1, async_save="no", max_steps=16) == 0
    said = capsys.readouterr().out
    assert "WARNING   the checkpoint of step 4 could not be written" in said
    assert "No space left on device" in said
    assert saved(folder) == ["step-000016"]
    assert [line["step"] for line in read_metrics(folder)[0]] == list(range(1, 17))


def test_a_disk_too_small_for_the_checkpoints_is_refused_before_training(tmp_path, monkeypatch, capsys, uninterrupted):
    """Room for 3 checkpoints of 12 bytes a parameter and a model of 4, or for one byte less."""
    parameters = json.loads((uninterrupted / "train_config.json").read_text())["model"]["parameters"]
    need = parameters * (3 * 12 + 4)
    with monkeypatch.context() as patch:
        patch.setattr(train_llama2, "GIB", 2**20)
        patch.setattr(train_llama2.shutil, "disk_usage", lambda folder: SimpleNamespace(free=need - 1))
        assert start(tmp_path) == 2
    error = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    checkpoint, model, whole = (f"{size / 2**20:.1f}" for size in (12 * parameters, 4 * parameters, need))
    assert f"--save-model-dir {tmp_path} has {whole} GiB free, but 3 checkpoints of {checkpoint} and" in error
    assert f"the model of {model} need {whole}" in error
    assert not (tmp_path / "metrics.jsonl").exists()
    monkeypatch.setattr(train_llama2.shutil, "disk_usage", lambda folder: SimpleNamespace(free=need))
    assert start(tmp_path, max_steps=1) == 0


# ----------------------------------------------------------------------------------------------------------------
# bf16 states
# ----------------------------------------------------------------------------------------------------------------


def test_bf16_states_go_on_with_the_same_rounding(tmp_path):
    """Stopped in step 5 and resumed with another random state: what is drawn for a step follows from its number."""
    assert start(tmp_path / "whole", precision="bf16-states") == 0
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-000009"
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert 6 * PARAMETERS < size < 6.3 * PARAMETERS, "two bytes for each weight and each of its two moments"
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["dtype"] == "bfloat16"
    stop_after(tmp_path / "run", 5, precision="bf16-states")
    torch.manual_seed(99)
    assert start(tmp_path / "run", precision="bf16-states", max_steps=9) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
