"""Resuming: a run that was stopped or killed goes on as if nothing had been, on any number of processes."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import conftest
import psutil
import pytest
import torch
from conftest import (
    NEWS,
    NINE_STEPS,
    RANKS,
    SMALL_LLAMA,
    TINY_LLAMA,
    add_a_node,
    assert_same_run,
    at_steps,
    error_of,
    read_metrics,
    saved,
    signal_myself,
    small_run,
    tree,
)

import train_llama2
from train_llama2 import Checkpoints, TrainingState

start = functools.partial(conftest.start, **NINE_STEPS)
stop_after = functools.partial(conftest.stop_after, **NINE_STEPS)


# ----------------------------------------------------------------------------------------------------------------
# Two runs that go through strategies, numbers of processes and kinds of end, in real torchrun processes
# ----------------------------------------------------------------------------------------------------------------


def interrupted(
    folder: Path, processes: int, act: str, options: tuple[str, ...] = (), **flags: object
) -> subprocess.CompletedProcess:
    """Runs the script under torchrun, in a session of its own; `act` of tests/ranks/interrupted_run.py interrupts it.

    Returns when all ranks have left, even where torchrun has died before them. Ranks that notice its end start cold.
    """
    python = sys.executable if act == "sigkill_of_torchrun" else conftest.warm()
    words = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *options]
    words += [str(RANKS / "interrupted_run.py"), act, *small_run(folder, **{**NINE_STEPS, **flags})]
    pipes, environment = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE), dict(os.environ, PYTHON_EXEC=python)
    with subprocess.Popen(words, **pipes, env=environment, text=True, start_new_session=True) as process:
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
        ("fsdp 2", "step-000002, saved with world size 4 and parallelism hsdp", 4),
        ("ddp 2", "step-000004, saved with world size 2 and parallelism fsdp", 6),
        ("fsdp 2 again", "step-000006, saved with world size 2 and parallelism ddp", 8),
        ("fsdp 2 orphaned", "step-000004, saved with world size 2 and parallelism fsdp", 6),
        ("fsdp 4", "step-000007, saved with world size 1 and parallelism none", 9),
    ],
)
def test_losses_stay_equal_across_processes_and_strategies(stages, uninterrupted, part, resumed_from, steps):
    run, folder = stages[part]
    assert f"resume    from {folder.parent / 'run'}/checkpoints/{resumed_from}" in run.stdout, run.stderr
    first_steps(folder, steps, uninterrupted)


def test_a_run_in_six_parts_leaves_an_uninterrupted_runs_metrics(stages, uninterrupted):
    assert_same_run(stages["end"][1], uninterrupted)


def test_sigterm_to_torchrun_saves_on_all_ranks(stages):
    run, folder = stages["hsdp 4"]
    assert "stopped   by SIGTERM after step 2; the checkpoint is saved, and the same command resumes" in run.stdout
    assert saved(folder) == ["step-000002"]
    assert all(f"rank {rank} leaves with 0" in run.stderr for rank in range(4)), run.stderr


def test_sigusr1_to_torchrun_saves_where_torchrun_passes_it_on(stages):
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


def test_sigusr1_to_one_rank_stops_all_after_the_same_step(stages):
    run, folder = stages["fsdp 2"]
    assert run.returncode == 0, run.stderr
    assert "stopped   by a signal to another rank after step 4; the checkpoint is saved" in run.stdout
    assert saved(folder) == ["step-000002", "step-000004"]


def test_ctrl_c_in_the_terminal_stops_torchrun_with_a_checkpoint(stages):
    run, folder = stages["ddp 2"]
    assert "stopped   by SIGINT after step 6; the checkpoint is saved" in run.stdout
    assert saved(folder) == ["step-000004", "step-000006"]


def test_the_next_start_removes_what_a_killed_save_left(stages):
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


def test_an_error_lets_the_save_under_way_finish(tmp_path):
    run = interrupted(tmp_path / "run", 2, "slow_save_and_broken_weights", eval_interval=3, async_save="yes")
    assert run.returncode == 1
    assert "error: the validation loss is nan" in run.stderr
    assert saved(tmp_path / "run") == ["step-000002"]
    assert "step-000002 (0.00 GiB) in " in run.stdout


# ----------------------------------------------------------------------------------------------------------------
# One process: which checkpoints there are, and what follows from them
# ----------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("place", [".", "checkpoints"])
def test_a_folder_of_checkpoints_is_refused_naming_one(stopped, copy_of, tmp_path, capsys, place):
    """The one that is named is the newest of the complete ones."""
    folder = copy_of(stopped)
    newest = folder / "checkpoints" / saved(folder)[-1]
    (folder / "checkpoints" / "step-999999.writing").mkdir()
    assert start(tmp_path / "new", resume=folder / place) == 2
    words = f"error: --resume {folder / place} holds checkpoints but is none; name one, such as {newest}, or leave"
    assert error_of(capsys).startswith(words)


@pytest.mark.parametrize("gone", [False, True], ids=["still there", "deleted since"])
def test_a_path_says_only_where_a_run_begins(stopped, uninterrupted, copy_of, tmp_path, capsys, gone):
    """A folder with checkpoints of its own goes on from the newest, and the run of the path stays as it is."""
    folder, path, before = copy_of(stopped), uninterrupted / "checkpoints" / "step-000008", tree(uninterrupted)
    path = tmp_path / "deleted" / "checkpoints" / "step-000008" if gone else path
    assert start(folder, resume=path) == 0
    newest = folder / "checkpoints" / "step-000005"
    said = f"{newest}, saved with world size 1 and parallelism none; --resume {path} says only where a new run begins"
    assert said in capsys.readouterr().out
    assert_same_run(folder, uninterrupted)
    assert tree(uninterrupted) == before


def test_a_path_to_the_runs_newest_checkpoint_resumes_it(stopped, copy_of, monkeypatch, uninterrupted):
    """The path may lead there in another way than --save-model-dir does."""
    folder = copy_of(stopped)
    monkeypatch.chdir(folder)
    assert start(folder, resume="checkpoints/step-000005") == 0
    assert_same_run(folder, uninterrupted)


def test_a_folder_that_is_no_checkpoint_is_not_to_be_gone_back_to(stopped, copy_of, capsys):
    """Nor is anything to be deleted for it."""
    folder = copy_of(stopped)
    path = folder / "checkpoints" / "step-000004.bak"
    path.mkdir()
    assert start(folder, resume=path) == 2
    newest = folder / "checkpoints" / "step-000005"
    assert error_of(capsys) == f"error: --resume {path} is no complete checkpoint; name one, such as {newest}"


@pytest.mark.parametrize(("named", "later"), [("step-000004", ["5"]), ("step-000002", ["5", "4"])])
def test_a_path_that_the_run_has_left_behind_is_refused(stopped, copy_of, uninterrupted, capsys, named, later):
    """The line names the folders to delete; without them the same command goes back and gives the same losses."""
    folder = copy_of(stopped)
    path, later = folder / "checkpoints" / named, [folder / "checkpoints" / f"step-00000{step}" for step in later]
    before = tree(folder)
    assert start(folder, resume=path) == 2
    assert error_of(capsys) == (
        f"error: --resume {path} is not the newest checkpoint of {folder / 'checkpoints'}; to go back to it, delete "
        + " and ".join(map(str, later))
    )
    assert tree(folder) == before
    for each in later:
        shutil.rmtree(each)
    assert start(folder, resume=path) == 0
    assert_same_run(folder, uninterrupted)


def test_metrics_without_checkpoints_are_put_aside_each_time(tmp_path):
    for number in (1, 2):
        assert start(tmp_path, max_steps=number) == 0
        shutil.rmtree(tmp_path / "checkpoints")
    assert start(tmp_path, max_steps=3) == 0
    names = ("metrics.previous-1.jsonl", "metrics.previous-2.jsonl", "metrics.jsonl")
    lines = [[json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in names]
    assert [[line["step"] for line in some if "loss" in line] for some in lines] == [[1], [1, 2], [1, 2, 3]]


def test_a_finished_run_resumed_writes_the_same_model_again(uninterrupted, copy_of, monkeypatch):
    folder = copy_of(uninterrupted)
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(train_llama2, "training_step", None)
    assert start(folder) == 0
    assert tree(folder) == {**tree(uninterrupted), "train_config.json": tree(folder)["train_config.json"]}


@pytest.mark.parametrize("step", [4, 8, 9])
def test_an_evaluation_that_a_stop_prevented_is_made_up_for(tmp_path, uninterrupted, step):
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


def test_an_evaluation_made_up_for_before_a_kill_counts_once(tmp_path, uninterrupted):
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


def test_what_follows_damaged_checkpoints_becomes_the_newest(tmp_path, uninterrupted):
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


def test_an_earlier_versions_checkpoint_goes_on_with_its_losses(tmp_path):
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
def test_a_flag_that_changes_losses_is_refused_with_both_values(stopped, capsys, name, old, new):
    before = tree(stopped)
    assert start(stopped, **{name: new}) == 2
    line = error_of(capsys)
    flag = "--dataset-name-or-path" if name == "max_train_samples" else "--" + name.replace("_", "-")
    assert line.startswith(f"error: {flag} is now {new}")
    assert f"was trained with {old}" in line
    assert "--resume-anyway" in line
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


def test_the_same_data_and_model_elsewhere_are_not_refused(stopped, copy_of, tmp_path):
    moved = dict(dataset_name_or_path=tmp_path / "news", model_name_or_path=tmp_path / "model")
    shutil.copytree(NEWS, tmp_path / "news")
    shutil.copytree(SMALL_LLAMA, tmp_path / "model")
    assert start(copy_of(stopped), **moved) == 0


def test_another_model_of_the_same_size_is_refused(stopped, copy_of, tmp_path, capsys):
    shutil.copytree(SMALL_LLAMA, tmp_path / "model")
    described = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**described, "rms_norm_eps": 0.01}))
    assert start(copy_of(stopped), model_name_or_path=tmp_path / "model") == 2
    assert "error: --model-name-or-path is now" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "steps"), [({"num_train_epochs": 2}, 6), ({"max_steps": 5}, 5)], ids=str)
def test_fewer_steps_in_all_are_refused(stopped, capsys, flags, steps):
    """The 5 steps that were trained had learning rates of a cosine over 9."""
    before = tree(stopped)
    assert start(stopped, **flags) == 2
    line = error_of(capsys)
    assert f"--num-train-epochs and --max-steps now give {steps} steps, but" in line
    assert "was trained towards 9" in line
    assert tree(stopped) == before


def test_resume_anyway_allows_fewer_steps_but_not_fewer_than_taken(stopped, copy_of, capsys):
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


def test_five_skipped_steps_end_a_run_stopped_among_them(tmp_path, capsys):
    """Stopped after the third; the resumed run finds the row full before the save of step 8."""
    with poisoned({4, 5, 6, 7, 8}):
        stop_after(tmp_path, 6)
        assert start(tmp_path) == 1
    assert (
        "error: loss or gradient norm was not finite in 5 steps in a row, as found at step 8" in capsys.readouterr().err
    )
    assert saved(tmp_path) == ["step-000004", "step-000006"]


def test_a_stop_after_five_skipped_steps_saves_nothing(tmp_path, capsys):
    """The row is full after step 7, where no save is due but the stop's; that one would end every later resume."""
    with poisoned({3, 4, 5, 6, 7}), at_steps({7: signal_myself}):
        assert start(tmp_path, save_interval=100) == 1
    assert "not finite in 5 steps in a row, as found at step 7" in capsys.readouterr().err
    assert not list((tmp_path / "checkpoints").glob("step-*"))


# ----------------------------------------------------------------------------------------------------------------
# Signals in one process
# ----------------------------------------------------------------------------------------------------------------


HEARD = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


@pytest.mark.parametrize("number", HEARD, ids=lambda number: number.name)
def test_a_signal_stops_after_its_step_with_exit_0(tmp_path, capsys, number):
    before = [signal.getsignal(each) for each in HEARD]
    with at_steps({1: lambda: signal_myself(number)}):
        assert start(tmp_path) == 0
    assert (
        f"stopped   by {number.name} after step 1; the checkpoint is saved, and the same command resumes from it"
        in capsys.readouterr().out
    )
    assert saved(tmp_path) == ["step-000001"]
    assert not (tmp_path / "model.safetensors").exists()
    assert [signal.getsignal(each) for each in HEARD] == before


def test_under_nohup_the_end_of_terminal_and_shell_stops_nothing(tmp_path, monkeypatch):
    """The terminal's end is a SIGHUP, which nohup ignores; the shell's end makes init the parent of the run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    try:
        with at_steps({1: lambda: (signal_myself(signal.SIGHUP), monkeypatch.setattr(os, "getppid", lambda: 1))}):
            assert start(tmp_path, max_steps=3) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("when", ["prepare_save_folder", "load_model", "check_setup"])
def test_ctrl_c_before_training_ends_the_run_at_once(tmp_path, monkeypatch, capfd, when):
    def signalled(*all):
        signal_myself(signal.SIGINT)
        raise AssertionError("the run goes on")

    monkeypatch.setattr(train_llama2, when, signalled)
    assert start(tmp_path, async_save="no") == 130
    said = capfd.readouterr()
    assert "stopped   by Ctrl-C outside of training; what was saved is kept" in said.err
    assert "Traceback" not in said.err
    assert not (tmp_path / "checkpoints").exists()


def test_processes_that_tokenise_can_be_terminated(tmp_path, monkeypatch):
    """They are forked before the run listens for signals, and a pool ends its processes with SIGTERM."""
    handlers = []
    encode = train_llama2.encode_documents

    def look(*arguments):
        handlers.append(signal.getsignal(signal.SIGTERM))
        return encode(*arguments)

    monkeypatch.setattr(train_llama2, "encode_documents", look)
    assert start(tmp_path, max_steps=1) == 0
    assert handlers == [signal.SIG_DFL] * 2


def test_a_stop_during_the_last_evaluation_writes_no_model(tmp_path, monkeypatch, capsys, uninterrupted):
    loss = train_llama2.mean_token_loss

    def signalled(model, documents, batches, parallel, stop=None):
        if stop and len(read_metrics(tmp_path)[0]) == 9:
            signal_myself()
        return loss(model, documents, batches, parallel, stop)

    with monkeypatch.context() as patch:
        patch.setattr(train_llama2, "mean_token_loss", signalled)
        assert start(tmp_path) == 0
    assert "stopped   by SIGTERM after step 9; the checkpoint is saved" in capsys.readouterr().out
    assert not (tmp_path / "model.safetensors").exists()
    assert start(tmp_path) == 0
    assert_same_run(tmp_path, uninterrupted)
    assert "eval_loss" in (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]


@pytest.mark.parametrize("step", [3, 4])
def test_a_signal_late_in_a_step_stops_after_the_next(tmp_path, monkeypatch, capsys, step):
    """It comes after the step's last look at signals. Step 4 ends in a save of its own, step 3 does not."""
    look = train_llama2.stop_if_broken

    def signalled(state, saving):
        look(state, saving)
        if state.step == step:
            signal_myself()

    monkeypatch.setattr(train_llama2, "stop_if_broken", signalled)
    assert start(tmp_path) == 0
    assert f"stopped   by SIGTERM after step {step + 1}; the checkpoint is saved" in capsys.readouterr().out
    assert f"step-00000{step + 1}" in saved(tmp_path)


def test_a_signal_during_the_final_save_waits_for_the_model(tmp_path, monkeypatch, capfd, uninterrupted):
    write = train_llama2.write_model

    def signalled(*arguments):  # once the model is written, and is about to move in
        write(*arguments)
        signal_myself()

    monkeypatch.setattr(train_llama2, "write_model", signalled)
    assert start(tmp_path) == 0
    said = capfd.readouterr()
    assert "stopping  after this step" in said.err
    assert "\ndone      9 steps" in said.out
    assert tree(tmp_path)["model.safetensors"] == tree(uninterrupted)["model.safetensors"]


def test_a_step_outlasting_torchruns_patience_is_taken_again(tmp_path, monkeypatch, uninterrupted):
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


def test_torchrun_waits_30_s_or_as_long_as_told(monkeypatch):
    """A run without torchrun has as long as it likes."""
    for name in ("TORCHELASTIC_RUN_ID", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    assert train_llama2.torchrun_grace_seconds() == float("inf")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert train_llama2.torchrun_grace_seconds() == 30
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "240")
    assert train_llama2.torchrun_grace_seconds() == (240 if torch.__version__ >= "2.13" else 30)


def test_a_second_signal_within_two_seconds_changes_nothing(tmp_path):
    with at_steps({3: lambda: (signal_myself(signal.SIGINT), signal_myself(signal.SIGTERM))}):
        assert start(tmp_path) == 0
    assert saved(tmp_path) == ["step-000002", "step-000003"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_later_second_signal_leaves_at_once(tmp_path, monkeypatch, uninterrupted):
    """The second signal arrives inside the save of step 3, and the next start ignores what it left of the save."""

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


@pytest.mark.parametrize(
    "found", ["34 train, 8 validation documents", "data with fingerprints", "34 training documents"]
)
def test_nodes_with_other_data_are_refused(tmp_path, monkeypatch, capsys, found):
    """As if another node had found other files under the same name: other splits, other texts, or another model."""
    other = dict(dataset_name_or_path="other documents")
    add_a_node(monkeypatch, lambda own: other if own.get("dataset_name_or_path", "").startswith(found) else None)
    assert start(tmp_path) == 2
    said = capsys.readouterr().err
    assert f"error: --dataset-name-or-path is {found}" in said
    assert "and other documents on different nodes; give all the same files" in said


@pytest.mark.parametrize("kind", [".json", ".safetensors"])
def test_a_disk_that_cannot_be_read_is_no_damage(stopped, copy_of, monkeypatch, capsys, kind):
    """Or the next save would delete the newest checkpoint, which is whole."""
    folder, opened = copy_of(stopped), Path.open

    def failing(path, *how, **settings):
        if path.parent.name == "step-000005" and path.suffix == kind:
            raise OSError(errno.EIO, "Input/output error")
        return opened(path, *how, **settings)

    monkeypatch.setattr(Path, "open", failing)
    assert start(folder) == 2
    assert "cannot be read (" in error_of(capsys)
    assert saved(folder) == saved(stopped)


def test_other_files_of_a_folder_are_no_part_of_a_run_begun_there(stopped, tmp_path):
    """A run that was killed before its first checkpoint has left lines. They are moved away, not continued."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n{"loss": 9.0}\n')
    assert start(folder, resume=stopped / "checkpoints" / "step-000005") == 0
    assert [line["step"] for line in conftest.read_metrics(folder)[0]] == [6, 7, 8, 9]
    assert (folder / "metrics.previous-1.jsonl").read_text().count("9.0") == 2


def test_a_terminal_that_is_gone_does_not_break_the_stop(monkeypatch):
    """SIGHUP comes when the terminal was closed: what is written to it fails."""
    alone = SimpleNamespace(
        cpu_group=lambda: None, plan=SimpleNamespace(pipeline_parallel_size=1), is_main=True, say=print
    )
    stop = train_llama2.StopSignals(alone)

    def write(descriptor: int, text: bytes) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "write", write)
    stop.receive(signal.SIGHUP, None)
    assert stop.agreed() and stop.signal_name == "SIGHUP"


def test_a_run_begun_from_anothers_checkpoint_has_an_identity_of_its_own(stopped, tmp_path):
    """Trackers continue a run by its identity: the new one must not be drawn into the old one's curves."""
    source = stopped / "checkpoints" / "step-000005"
    assert start(tmp_path / "other", resume=source) == 0
    began, other = (
        {json.loads(path.read_text())["facts"]["run_id"] for path in folder.glob("checkpoints/*/manifest.json")}
        for folder in (stopped, tmp_path / "other")
    )
    assert len(began) == len(other) == 1 and began != other


def test_a_restart_by_torchrun_goes_on_whatever_path_it_began_from(
    copy_of, stopped, uninterrupted, monkeypatch, capsys
):
    """The newest checkpoint of the folder when the command was first given; there have been others since."""
    folder = copy_of(stopped)
    path = folder / "checkpoints" / "step-000004"
    assert start(folder, resume=path) == 2
    assert "is not the newest checkpoint" in error_of(capsys)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert start(folder, resume=path) == 0
    assert_same_run(folder, uninterrupted)


def test_a_sigusr1_that_torchrun_passes_on_is_followed_by_its_kill(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGUSR1")
    plan = SimpleNamespace(pipeline_parallel_size=1)
    stop = train_llama2.StopSignals(SimpleNamespace(cpu_group=lambda: None, plan=plan, is_main=False, say=print))
    stop.seconds_to_finish_and_save = 500.0
    stop.receive(signal.SIGUSR1, None)
    assert stop.agreed_to_abandon_step()


def test_a_sigterm_after_sigusr1_still_abandons_a_step_that_takes_too_long(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    plan = SimpleNamespace(pipeline_parallel_size=1)
    stop = train_llama2.StopSignals(SimpleNamespace(cpu_group=lambda: None, plan=plan, is_main=False, say=print))
    stop.seconds_to_finish_and_save = 100.0
    stop.receive(signal.SIGUSR1, None)
    assert stop.agreed() and not stop.agreed_to_abandon_step(), "Slurm gives minutes"
    stop.receive(signal.SIGTERM, None)
    assert stop.agreed_to_abandon_step(), "torchrun gives 30 seconds"
