"""The environment a run is started in: torchrun's, none, or one that is refused with a clear line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RANKS, SCRIPT, read_metrics, small_run

import train_llama2

LAUNCHERS = {
    "LOCAL_RANK alone": (
        {"LOCAL_RANK": "0"},
        "error: LOCAL_RANK is set, but not RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT; use torchrun",
    ),
    "RANK without an address": (
        {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        "error: RANK is set, but not MASTER_ADDR, MASTER_PORT; use torchrun, which sets all of them",
    ),
    "WORLD_SIZE in words": ({"WORLD_SIZE": "all"}, "error: WORLD_SIZE=all in the environment is not a whole number"),
    "WORLD_SIZE alone": (
        {"WORLD_SIZE": "2"},
        "error: 2 processes were started without torchrun (WORLD_SIZE); start one",
    ),
    "Slurm": ({"SLURM_STEP_NUM_TASKS": "4"}, "error: 4 processes were started without torchrun (SLURM_STEP_NUM_TASKS)"),
    "Open MPI": (
        {"OMPI_COMM_WORLD_SIZE": "4"},
        "error: 4 processes were started without torchrun (OMPI_COMM_WORLD_SIZE)",
    ),
    "MPICH": ({"PMI_SIZE": "4"}, "error: 4 processes were started without torchrun (PMI_SIZE); start one torchrun"),
    "accelerate with DeepSpeed": (
        {"ACCELERATE_USE_DEEPSPEED": "true"},
        "error: ACCELERATE_USE_DEEPSPEED is set, but the script shards by itself; start it with torchrun, or unset it",
    ),
}


@pytest.mark.parametrize(("environment", "line"), LAUNCHERS.values(), ids=LAUNCHERS)
def test_an_environment_of_no_known_launcher_is_refused(tmp_path, monkeypatch, capsys, environment, line):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert train_llama2.command_line(small_run(tmp_path)) == 2
    complained = capsys.readouterr().err
    assert complained.startswith(line)
    assert complained.count("\n") == 1


TOO_OLD = """
import importlib.metadata, runpy, sys
version = importlib.metadata.version
old = {sys.argv[1]: sys.argv[2]}

def pretended(name):
    if old.get(name) == "missing":
        raise importlib.metadata.PackageNotFoundError(name)
    return old.get(name) or version(name)

importlib.metadata.version = pretended
sys.argv = [sys.argv[3], "--help"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("package", "version", "line"),
    [
        (
            "torch",
            "1.13.1+cu117",
            "error: torch 1.13.1+cu117 is too old: the script needs 2.11 or newer; pip install -r",
        ),
        (
            "transformers",
            "4.36.2",
            "error: transformers 4.36.2 is too old: the script needs 5.23 or newer; pip install",
        ),
        (
            "transformers",
            "missing",
            "error: transformers is not installed: the script needs 5.23 or newer; pip install",
        ),
        ("datasets", "3.6.0", "error: datasets 3.6.0 is too old: the script needs 4.4 or newer; pip install"),
    ],
)
def test_a_package_that_is_too_old_ends_in_one_line(package, version, line):
    run = subprocess.run(
        [sys.executable, "-c", TOO_OLD, package, version, str(SCRIPT)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ,
        check=False,
    )
    assert run.returncode == 2, run.stderr
    assert run.stdout == ""
    assert run.stderr.startswith(line)
    assert run.stderr.count("\n") == 1


def test_a_thread_wanting_the_gil_at_exit_aborts_no_rank():
    words = [sys.executable, str(RANKS / "thread_at_exit.py"), str(SCRIPT)]
    environment = {**os.environ, "LOCAL_RANK": "0"}  # refused at once, and left as by any rank
    run = subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert run.returncode == 2, run.stderr
    assert run.stdout == "atexit\n"
    assert "terminate called" not in run.stderr


def test_the_oldest_versions_are_those_of_the_requirements():
    requirements = Path(SCRIPT).with_name("requirements.txt").read_text()
    assert "torch>=2.11," in requirements
    assert "transformers>=5.23," in requirements


def test_a_learning_rate_of_zero_measures_without_training(tmp_path):
    flags = dict(lr=0, max_steps=2, max_train_samples=4, batch_size=4, num_train_epochs=2, block_size=64)
    assert train_llama2.command_line(small_run(tmp_path, **flags)) == 0
    first, second = (line["loss"] for line in read_metrics(tmp_path)[0])
    assert first == pytest.approx(second, rel=1e-6)
