"""The default command, with nothing local, against a stand-in for the Hub and the real clients over HTTP."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import NEWS, SCRIPT, TINY_LLAMA, read_metrics, warm
from datasets import Dataset
from stand_in_hub import StandInHub

MODEL, DATA = "models/meta-llama/Llama-2-13b-hf", "datasets/abisee/cnn_dailymail"
CARD = """---
configs:
- config_name: 3.0.0
  data_files:
  - split: train
    path: 3.0.0/train-*
  - split: validation
    path: 3.0.0/validation-*
  - split: test
    path: 3.0.0/test-*
---
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[StandInHub]:
    with StandInHub(tmp_path_factory.mktemp("hub")) as serving:
        yield serving


@pytest.fixture
def hub(server, tmp_path) -> StandInHub:
    """Returns a Hub that has the model and the data that the flags name by default, small. The cache is empty."""
    server.root, server.break_off_after = tmp_path / "hub", None
    server.downloads.clear()
    shutil.rmtree(cache_of(server), ignore_errors=True)
    root = server.root
    shutil.copytree(TINY_LLAMA, root / MODEL)
    (root / DATA / "3.0.0").mkdir(parents=True)
    (root / DATA / "README.md").write_text(CARD)
    for split, file in (("train", "train"), ("validation", "validation"), ("test", "validation")):
        rows = [json.loads(line) for line in (NEWS / f"{file}.jsonl").read_text().splitlines()]
        Dataset.from_list(rows).to_parquet(root / DATA / "3.0.0" / f"{split}-00000-of-00001.parquet")
    return server


def cache_of(hub: StandInHub) -> Path:
    return Path(os.environ["HF_HOME"]) / f"of_{hub.server.server_port}"


OFFLINE = dict(HF_HUB_OFFLINE="1")


def run_default_command(hub: StandInHub, folder: Path, *flags: str, processes: int = 1, **environment: str):
    """Runs the script with no local path, and a cache of its own; cold where a variable is to differ for one run."""
    of_hub = dict(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", HF_HOME=str(cache_of(hub)))
    of_hub["HF_HUB_DOWNLOAD_TIMEOUT"] = "2"  # seconds, for the download that breaks off
    is_warm = environment in ({}, OFFLINE)
    python = warm(**{**of_hub, **environment}) if is_warm else sys.executable
    launcher = [python]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    small = ["--block-size", "128", "--batch-size", "4", "--max-steps", "2", "--log-interval", "1"]
    return subprocess.run(
        [*launcher, str(SCRIPT), *small, "--save-model-dir", str(folder), *flags],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, **of_hub, **environment, "PYTHON_EXEC": python},
        check=False,
    )


def error_of(run: subprocess.CompletedProcess) -> str:
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    return line


def test_two_ranks_fetch_each_file_once_and_later_runs_none(hub, tmp_path):
    run = run_default_command(hub, tmp_path / "run", "--parallelism", "fsdp", processes=2)
    assert run.returncode == 0, run.stderr
    assert len(read_metrics(tmp_path / "run")[0]) == 2
    files = {name: count for name, count in hub.downloads.items() if name.endswith((".safetensors", ".parquet"))}
    assert set(files.values()) == {1}
    assert {Path(name).name for name in files} >= {"model.safetensors", "train-00000-of-00001.parquet"}
    assert all(count == 1 for count in hub.downloads.values()), hub.downloads
    hub.downloads.clear()
    has_rouge = importlib.util.find_spec("rouge_score") is not None
    test = ["--test-samples", "2", "--max-summary-tokens", "2"] if has_rouge else []
    again = run_default_command(hub, tmp_path / "again", *test)
    assert again.returncode == 0, again.stderr
    assert not hub.downloads
    assert ('"test_samples": 2, ' in (tmp_path / "again" / "metrics.jsonl").read_text()) == has_rouge
    offline = run_default_command(hub, tmp_path / "offline", **OFFLINE)
    assert offline.returncode == 0, offline.stderr


@pytest.mark.parametrize(
    ("repository", "mark", "words"),
    [
        (MODEL, ".gated", "is gated: ask for access at https://huggingface.co/meta-llama/Llama-2-13b-hf, then run"),
        (MODEL, ".private", "is not on the Hub, or is private; check the name, and log in with `hf auth login`"),
        (DATA, ".private", "check the name, --dataset-config and the network, or name local files"),
        (DATA, ".gated", "check the name, --dataset-config and the network, or name local files"),
    ],
)
def test_a_repository_that_is_closed_is_refused_in_one_line(hub, tmp_path, repository, mark, words):
    (hub.root / repository / mark).touch()
    assert words in error_of(run_default_command(hub, tmp_path / "run"))


def test_a_wrong_dataset_config_is_refused_with_those_there_are(hub, tmp_path):
    line = error_of(run_default_command(hub, tmp_path / "run", "--dataset-config", "4.0.0"))
    assert "4.0.0" in line and "3.0.0" in line


def test_a_name_that_does_not_exist_is_refused(hub, tmp_path):
    line = error_of(run_default_command(hub, tmp_path / "run", "--model-name-or-path", "nobody/nothing"))
    assert "--model-name-or-path nobody/nothing is not on the Hub, or is private" in line


def test_offline_without_a_cache_is_refused(hub, tmp_path):
    line = error_of(run_default_command(hub, tmp_path / "run", **OFFLINE))
    assert "is neither a folder nor within reach on the Hub" in line


def test_a_hub_that_is_gone_is_refused(hub, tmp_path):
    line = error_of(run_default_command(hub, tmp_path / "run", HF_ENDPOINT="http://127.0.0.1:9"))
    assert "is neither a folder nor within reach on the Hub" in line


def test_a_broken_download_is_refused_and_works_next_time(hub, tmp_path):
    hub.break_off_after = 1000
    line = error_of(run_default_command(hub, tmp_path / "run"))
    assert "within reach on the Hub" in line
    hub.break_off_after = None
    run = run_default_command(hub, tmp_path / "run")
    assert run.returncode == 0, run.stderr
