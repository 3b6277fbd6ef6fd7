"""Checkpoints: what is written, into which folder, and what kills, damage and full disks leave of it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import torch
from conftest import (
    NINE_STEPS,
    RANKS,
    TINY_LLAMA,
    Crash,
    assert_same_run,
    at_steps,
    crash_point,
    error_of,
    files_of_at_most,
    fresh_accelerate,
    llama_of,
    read_metrics,
    saved,
    signal_myself,
    tree,
)
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

import train_llama2
from train_llama2 import Checkpoints, Config, TrainingState, UserError, enable_advanced_parallelization

start = functools.partial(conftest.start, **NINE_STEPS)
stop_after = functools.partial(conftest.stop_after, **NINE_STEPS)

# The tiny Llama: embedding and head of 1024 x 64, 4 layers of 4 x 64 x 64 + 3 x 64 x 172 + 2 x 64, a norm of 64.
PARAMETERS = 2 * 65_536 + 4 * 49_536 + 64


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


# ----------------------------------------------------------------------------------------------------------------
# What is written, and where
# ----------------------------------------------------------------------------------------------------------------


def test_only_the_newest_keep_checkpoints_remain(uninterrupted, stopped):
    assert saved(uninterrupted) == ["step-000008", "step-000009"]
    assert saved(stopped) == ["step-000002", "step-000004", "step-000005"]


def test_the_manifest_vouches_for_step_tokens_and_every_file(stopped):
    folder = stopped / "checkpoints" / "step-000005"
    manifest = json.loads((folder / "manifest.json").read_text())
    facts, files = manifest["facts"], manifest["files"]
    assert facts["step"] == 5
    assert facts["tokens"] == read_metrics(stopped)[0][-1]["tokens"]
    assert set(files) == {file.name for file in folder.glob("*.safetensors")}
    for name, file in files.items():
        content = (folder / name).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


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


def test_an_undeletable_old_checkpoint_does_not_fail_the_new_one(tmp_path, small_checkpoints, monkeypatch, capsys):
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
    checkpoints.write({"model.weight": torch.zeros(2)}, {"step": 1}, time.perf_counter(), time.perf_counter())
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
# The save folder: shared, and used by one run at a time
# ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def another_run_in(folder: Path, seconds: float) -> Iterator[subprocess.Popen]:
    """Inside, a process holds the folder as a run does; it ends by itself after so many seconds."""
    words = [sys.executable, str(RANKS / "hold_a_lock.py"), str(folder / ".lock"), str(seconds)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_waits_for_the_folder_then_is_refused(stopped, copy_of, monkeypatch, capsys):
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


@pytest.mark.parametrize("lock", [None, "process 8 on node-4 since 2026-01-01 00:00:00"], ids=["no file", "another's"])
def test_a_folder_that_ranks_do_not_share_is_refused(small_checkpoints, tmp_path, monkeypatch, lock):
    """What rank 0 wrote into its folder is not what this rank, of another node, reads in the folder of that name."""
    parallel, mine = small_checkpoints().parallel, tmp_path / "run" / ".lock"
    monkeypatch.setattr(train_llama2.Parallel, "is_main", property(lambda self: False))
    monkeypatch.setattr(train_llama2, "make_save_folder", lambda folder, parallel: "process 7 on node-3 since noon")
    if lock:
        mine.write_text(lock)
    with pytest.raises(UserError, match=f"--save-model-dir {tmp_path / 'run'} is not shared: what rank 0 writes"):
        train_llama2.prepare_save_folder(parallel)
    mine.write_text("process 7 on node-3 since noon")
    train_llama2.prepare_save_folder(parallel)


def test_a_disk_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def unsupported(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(train_llama2.fcntl, "lockf", unsupported)
    assert start(tmp_path, max_steps=1) == 0
    words = f"WARNING   {tmp_path} cannot be locked ([Errno 95] Operation not supported); let no second run write to it"
    assert words in capsys.readouterr().out
    assert saved(tmp_path) == ["step-000001"]


# ----------------------------------------------------------------------------------------------------------------
# Saving in the background, and the host memory that it takes
# ----------------------------------------------------------------------------------------------------------------


def test_a_background_save_holds_the_step_it_began_at(tmp_path, monkeypatch, uninterrupted):
    """The write of step 2 waits until step 3 is trained: a write that held training would wait in vain."""
    write, trained, waited = Checkpoints.write, threading.Event(), []

    def slow(self, tensors, facts, *times):
        if facts["step"] == 2:
            waited.append(trained.wait(60))
        write(self, tensors, facts, *times)

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

    def counting(self, tensors, facts, *times):
        under_way.append(facts["step"])
        threads.add(threading.current_thread() is threading.main_thread())
        assert len(under_way) == 1
        time.sleep(0.1)
        write(self, tensors, facts, *times)
        assert under_way.pop() == facts["step"]

    monkeypatch.setattr(Checkpoints, "write", counting)
    assert start(tmp_path, async_save=choice, save_interval=1, max_steps=5, keep_checkpoints=5) == 0
    assert saved(tmp_path) == [f"step-{step:06d}" for step in (1, 2, 3, 4, 5)]
    assert threads == {choice == "no"}


def test_scarce_host_memory_makes_saving_hold_training_and_is_said(small_checkpoints, monkeypatch, capsys):
    assert small_checkpoints().asynchronous
    assert not small_checkpoints(async_save="no").asynchronous
    monkeypatch.setattr(train_llama2.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    capsys.readouterr()
    for choice in ("auto", "yes"):
        assert not small_checkpoints(async_save=choice).asynchronous
        assert "save      training waits while a checkpoint is written: a copy to write from" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("choice", "share", "free"), [("auto", 0.5, 13_171_200), ("yes", 0.9, 9_658_880)], ids=["auto", "yes"]
)
def test_a_copy_is_made_where_enough_memory_stays_free(small_checkpoints, monkeypatch, choice, share, free):
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
def test_too_little_host_memory_is_refused_before_training(
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
    with pytest.raises(UserError, match="GiB of host memory free, and the run will take") as refusal:
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
# A kill: only the first k file operations happen, for every k
# ----------------------------------------------------------------------------------------------------------------


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
        assert damaged or saved(folder)[-1] == f"step-{state.step:06d}"
        assert not [name for name in saved(folder) if "." in name]
        outcomes.add(state.step)
    assert len(crashes) >= 5
    assert outcomes == {1, 2}
    assert saved(folder) == ["step-000002"]


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
def test_damage_is_named_and_passed_over_or_refused_by_path(stopped, copy_of, tmp_path, capsys, uninterrupted, damage):
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


def test_a_damaged_newest_is_passed_over_though_named(stopped, copy_of, capsys, uninterrupted):
    """--resume PATH says where a run begins, and this one began long ago."""
    folder = copy_of(stopped)
    newest = folder / "checkpoints" / "step-000005"
    named = truncate(newest)
    assert start(folder, resume=newest) == 0
    said = capsys.readouterr().out
    assert f"WARNING   {newest} is damaged ({named}" in said
    assert f"resume    from {folder / 'checkpoints' / 'step-000004'}, saved with" in said
    assert_same_run(folder, uninterrupted)


def test_auto_does_not_start_anew_where_every_checkpoint_is_damaged(stopped, copy_of, capsys):
    folder = copy_of(stopped)
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        flip_a_bit(checkpoint)
    before = tree(folder)
    assert start(folder) == 2
    said = capsys.readouterr()
    assert said.out.count("WARNING") == 3
    assert "error: every checkpoint in" in said.err
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
def test_a_run_goes_on_when_a_save_fails_half_way(tmp_path, capsys, uninterrupted, choice):
    """While no file may grow past 1 MB, a save of 4 MB fails; the one after it succeeds."""
    limit, kept = contextlib.ExitStack(), []

    def settled() -> list[str]:
        """Waits for a save in the background to end."""
        deadline = time.monotonic() + 60
        while any(name.endswith(".writing") for name in saved(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.01)
        return saved(tmp_path)

    def shrink():
        kept.append(settled())
        limit.enter_context(files_of_at_most(2**20))

    def lift():
        kept.append(settled())
        limit.close()

    with limit, at_steps({3: shrink, 5: lift}):
        assert start(tmp_path, async_save=choice, keep_checkpoints=1, max_steps=9) == 0
    assert kept == [["step-000002"], ["step-000002"]]
    assert "WARNING   the checkpoint of step 4 could not be written" in capsys.readouterr().out
    assert saved(tmp_path) == ["step-000009"]
    assert_same_run(tmp_path, uninterrupted)


def test_a_stop_says_that_its_checkpoint_failed(tmp_path, capsys, uninterrupted):
    """It goes on from step 2, the last one saved."""
    limit = contextlib.ExitStack()
    with limit, at_steps({3: lambda: (limit.enter_context(files_of_at_most(2**20)), signal_myself())}):
        assert start(tmp_path, async_save="no") == 0
    outcome = "its checkpoint could NOT be saved; the same command resumes from the newest that was"
    assert f"stopped   by SIGTERM after step 3; {outcome}" in capsys.readouterr().out
    assert saved(tmp_path) == ["step-000002"]
    assert start(tmp_path) == 0
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


def test_a_disk_too_small_is_refused_before_training(tmp_path, monkeypatch, capsys, uninterrupted):
    """Room for 3 checkpoints of 12 bytes a parameter and a model of 4, or for one byte less."""
    parameters = json.loads((uninterrupted / "train_config.json").read_text())["model"]["parameters"]
    need = parameters * (3 * 12 + 4)
    with monkeypatch.context() as patch:
        patch.setattr(train_llama2, "GIB", 2**20)
        patch.setattr(train_llama2.shutil, "disk_usage", lambda folder: SimpleNamespace(free=need - 1))
        assert start(tmp_path) == 2
    error = error_of(capsys)
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
    parameters = PARAMETERS - 2 * 49_536  # of the small Llama, which has two layers less
    assert 6 * parameters < size < 6.3 * parameters, "two bytes for each weight and each of its two moments"
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["dtype"] == "bfloat16"
    stop_after(tmp_path / "run", 5, precision="bf16-states")
    torch.manual_seed(99)
    assert start(tmp_path / "run", precision="bf16-states", max_steps=9) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
