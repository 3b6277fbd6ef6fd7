"""Flags and other input: what is accepted, the defaults, and how a user's mistake is reported."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import NEWS, RANKS, TINY_LLAMA, run_script, run_script_several_times, small_run
from safetensors.torch import load_file, save_file

from train_llama2 import TRACKERS, UserError, command_line, parse_config, usable_cores

# The defaults that people depend on, copied by hand. None: the run decides, or there is no limit.
DEFAULTS = {
    "model_name_or_path": "meta-llama/Llama-2-13b-hf",
    "dataset_name_or_path": "abisee/cnn_dailymail",
    "dataset_config": "3.0.0",
    "article_column": "article",
    "summary_column": "highlights",
    "max_train_samples": None,
    "max_eval_samples": None,
    "block_size": 2048,
    "loss_on": "all",
    "num_train_epochs": 1,
    "max_steps": None,
    "batch_size": 64,
    "micro_batch_size": None,
    "lr": 1e-5,
    "lr_scheduler": "cosine",
    "warmup_ratio": 0.03,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "seed": 42,
    "parallelism": "auto",
    "activation_checkpointing": "auto",
    "cpu_offload": "auto",
    "precision": "auto",
    "save_model_dir": "./llama2_summarization",
    "log_interval": 10,
    "eval_interval": 500,
    "save_interval": 500,
    "keep_checkpoints": 2,
    "resume": "auto",
    "report_to": "none",
    "num_proc": max(1, min(16, usable_cores() // 2)),
    "random_init": False,
}


def told(capsys: pytest.CaptureFixture, *flags: object) -> list[str]:
    """Runs the script in this process; returns its `error:` lines, after checking the exit code."""
    capsys.readouterr()
    code = command_line([str(flag) for flag in flags])
    errors = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in errors
    return [line for line in errors.splitlines() if line.startswith("error:")]


# ----------------------------------------------------------------------------------------------------------------
# Flags
# ----------------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_contract():
    config = dataclasses.asdict(parse_config([]))
    assert {name: config[name] for name in DEFAULTS} == DEFAULTS


def test_help_mentions_every_flag_and_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # argparse would break lines, and words at hyphens
    with pytest.raises(SystemExit) as leaving:
        command_line(["--help"])
    assert leaving.value.code == 0
    entries = {entry.split()[0]: entry for entry in capsys.readouterr().out.split("\n  --")[1:]}
    for name, default in DEFAULTS.items():
        unset = {"max_steps": "none", "micro_batch_size": "auto"}.get(name, "all")
        shown = unset if default is None else "off" if default is False else default
        assert f"(default: {shown})" in entries[name.replace("_", "-")]


def test_config_holds_what_was_said_and_stays_so():
    config = parse_config(["--lr", "3e-4", "--batch-size=7", "--max-steps", "12", "--loss-on=summary", "--random-init"])
    said = dict(lr=3e-4, batch_size=7, max_steps=12, loss_on="summary", random_init=True)
    assert dataclasses.asdict(config) == {**dataclasses.asdict(parse_config([])), **said}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0


@pytest.mark.parametrize(
    ("words", "expected"), [(["news"], "news"), (["a.jsonl", "b.jsonl"], ("a.jsonl", "b.jsonl"))], ids=["one", "two"]
)
def test_a_dataset_is_one_name_or_several_files(words, expected):
    assert parse_config(["--dataset-name-or-path", *words, "--lr", "1"]).dataset_name_or_path == expected


@pytest.mark.parametrize(
    ("flag", "value", "rule"),
    [
        *(("--lr", value, "finite") for value in ("nan", "inf", "-inf")),
        *(("--lr", value, "at least 0") for value in ("-1", "-1e-05")),
        ("--lr", "abc", "not a number"),
        *((flag, value, "at least 1")
          for flag in ("--batch-size", "--micro-batch-size", "--block-size", "--num-train-epochs", "--max-steps")
          for value in ("0", "-3")),
        *((flag, "1.5", "not a whole number") for flag in ("--batch-size", "--micro-batch-size", "--max-steps")),
        ("--warmup-ratio", "1", "below 1"),
        ("--warmup-ratio", "-0.1", "at least 0"),
        ("--max-grad-norm", "nan", "finite"),
        ("--seed", "-1", "at least 0"),
        ("--seed", "4294967296", "below 4,294,967,296"),
        *(
            (flag, "2147483648", "below 2,147,483,648")
            for flag in ("--batch-size", "--max-steps", "--num-train-epochs")
        ),
        ("--batch-size", "9" * 400, "below 2,147,483,648"),
        ("--dist-timeout-minutes", "1000000.0", "below 1,000,000"),
        ("--num-proc", "0", "at least 1"),
        ("--parallelism", "zero3", "auto, none, ddp, fsdp, hsdp"),
        ("--report-to", "paper", "tensorboard"),
        ("--loss-on", "title", "all, summary"),
        ("--lr-scheduler", "step", "cosine, linear, constant"),
        ("--precision", "fp8", "auto, bf16, fp32"),
        ("--activation-checkpointing", "some", "auto, none, every-4, every-3, every-2, full"),
        ("--cpu-offload", "maybe", "auto, yes, no"),
        ("--hsdp-shard-size", "2", "--parallelism hsdp"),
    ],
)  # fmt: skip
def test_one_line_names_the_flag_bad_value_and_rule(capsys, flag, value, rule):
    [line] = told(capsys, flag, value)
    assert line.startswith(f"error: {flag} {value}")
    assert rule in line
    assert "None" not in line


@pytest.mark.parametrize("name", ["model_name_or_path", "dataset_name_or_path", "article_column", "save_model_dir"])
def test_an_empty_value_is_told_with_the_default(capsys, name):
    flag = "--" + name.replace("_", "-")
    assert told(capsys, flag, "") == [f"error: {flag} is empty; leave it out for the default, {DEFAULTS[name]}"]


def test_the_largest_seed_trains(tmp_path):
    flags = dict(max_steps=1, max_train_samples=4, max_eval_samples=1, block_size=64)
    assert command_line(small_run(tmp_path, seed=2**32 - 1, **flags)) == 0


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        (["--batch-siz", "3"], "did you mean --batch-size?"),
        (["--lr_scheduler=linear"], "did you mean --lr-scheduler?"),
        (["--learning_rate", "3"], "did you mean --lr?"),
        (["--zzz"], "--help"),
    ],
)
def test_an_unknown_flag_is_one_problem_with_a_suggestion(capsys, words, suggestion):
    [line] = told(capsys, *words)
    assert line.startswith(f"error: {words[0]} is not a flag") and suggestion in line


def test_all_problems_of_the_flags_are_told_together(capsys):
    lines = told(capsys, "--lr", -1, "--batch-size", "x", "--parallelism", "dpp", "--max-step=3", "--block-size", 0)
    mentioned = sorted(line.split()[1] for line in lines)
    assert mentioned == ["--batch-size", "--block-size", "--lr", "--max-step=3", "--parallelism"]


def test_a_flag_without_its_value_does_not_hide_other_problems(capsys):
    lines = told(capsys, "--batch-size", "0", "--lr")
    assert len(lines) == 2
    assert any("--lr" in line for line in lines) and any("--batch-size 0" in line for line in lines)


def test_the_trackers_named_are_those_accelerate_knows():
    from accelerate.utils import LoggerType

    assert sorted(set(LoggerType.list()) - {"all"}) == list(TRACKERS)


def test_problems_can_be_caught_by_a_program():
    with pytest.raises(UserError) as caught:
        parse_config(["--lr", "-3", "--seed", "-1"])
    assert len(caught.value.problems) == 2


# ----------------------------------------------------------------------------------------------------------------
# Models, data and places that cannot be used. Every run finds a former model in its save folder, and leaves it.
# ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def refusal(tmp_path, capsys):
    """A function: the one `error:` line of a small run with these flags."""
    folder = tmp_path / "former"
    folder.mkdir()
    former = {name: f"former {name}" for name in ("config.json", "model.safetensors", "metrics.jsonl")}
    for name, text in former.items():
        (folder / name).write_text(text)

    def run(save_model_dir: Path = folder, **flags: object) -> str:
        lines = told(capsys, *small_run(save_model_dir, **{"max_steps": 1, **flags}))
        assert len(lines) == 1
        assert {file.name: file.read_text() for file in folder.iterdir() if file.name != ".lock"} == former
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"block_size": 8}, ["--block-size 8", "no room", "at least 64"]),
        ({"block_size": 2049}, ["--block-size 2049", "2048 positions"]),
        ({"parallelism": "ddp"}, ["--parallelism ddp", "at least 2 processes", "torchrun"]),
        ({"parallelism": "fsdp"}, ["--parallelism fsdp", "at least 2 processes", "torchrun"]),
        ({"parallelism": "hsdp"}, ["--parallelism hsdp", "at least 4 processes", "torchrun"]),
        pytest.param(
            {"cpu_offload": "yes"},
            ["--cpu-offload yes", "GPU"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
        ({"model_name_or_path": "./nowhere"}, ["--model-name-or-path ./nowhere", "not a folder"]),
        ({"model_name_or_path": "nobody/nothing"}, ["--model-name-or-path nobody/nothing", "network", "its folder"]),
        ({"dataset_name_or_path": "nobody/nothing"}, ["--dataset-name-or-path nobody/nothing", "network", "local"]),
        ({"dataset_name_or_path": "nowhere.jsonl"}, ["--dataset-name-or-path nowhere.jsonl", "does not exist"]),
    ],
)
def test_an_impossible_run_says_why_and_what_to_do(refusal, flags, words):
    line = refusal(**flags)
    assert [word for word in words if word not in line] == [], line


def edit_config(**changes: object):
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def remove(*patterns: str):
    return lambda folder: [file.unlink() for pattern in patterns for file in folder.glob(pattern)]


def cut_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 300_000)


def lose_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def lose_a_shard(folder: Path) -> None:
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    where = {name: f"model-0000{1 + (name == names[-1])}-of-00002.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        pytest.param(remove("*"), "config.json is missing", id="empty folder"),
        pytest.param(lambda folder: (folder / "config.json").write_text("{oops"), "JSON", id="malformed config"),
        pytest.param(edit_config(model_type="t5"), "causal", id="no causal language model"),
        pytest.param(edit_config(hidden_size="x"), "hidden_size", id="config with a word for a number"),
        pytest.param(edit_config(num_attention_heads=0), "config.json", id="config without heads"),
        pytest.param(remove("*.safetensors"), "no safetensors weights", id="no weights"),
        pytest.param(cut_weights, "weights that cannot be read", id="truncated weights"),
        pytest.param(edit_config(intermediate_size=171), "not those of its config.json", id="weights of another shape"),
        pytest.param(lose_a_tensor, "up_proj", id="a weight missing"),
        pytest.param(lose_a_shard, "model-00002-of-00002.safetensors", id="a shard missing"),
        pytest.param(remove("tokenizer*"), "no tokenizer that loads (it holds none", id="no tokenizer"),
        pytest.param(remove("tokenizer.json"), "no tokenizer", id="no vocabulary"),
        pytest.param(lambda folder: (folder / "tokenizer.json").write_text("{}"), "no tokenizer", id="empty tokenizer"),
    ],
)
def test_a_broken_model_folder_is_told(refusal, tmp_path, damage, word):
    folder = tmp_path / "model"
    shutil.copytree(TINY_LLAMA, folder)
    damage(folder)
    line = refusal(model_name_or_path=folder)
    assert line.startswith(f"error: --model-name-or-path {folder} ")
    assert word in line


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(refusal, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY_LLAMA, folder)
    edit_config(vocab_size=1000)(folder)
    line = refusal(model_name_or_path=folder)
    assert line.startswith(f"error: the tokenizer of --model-name-or-path {folder} has ids up to 1023, but the model")
    assert "only 1000 embeddings" in line


def test_a_gated_model_says_how_to_get_access(refusal, monkeypatch):
    def refuse(*_, **__):
        response = SimpleNamespace(headers={}, request=None, status_code=403)
        raise huggingface_hub.errors.GatedRepoError("403 Client Error.", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    line = refusal(model_name_or_path="meta-llama/Llama-2-13b-hf")
    for words in ("gated", "https://huggingface.co/meta-llama/Llama-2-13b-hf", "hf auth login", "HF_TOKEN"):
        assert words in line


def lines_of(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


PAIR = {"article": "a b c", "highlights": "d"}
STRANGE = {"text": "a b c", "title": "d"}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        pytest.param({}, ["holds no data", ".jsonl"], id="empty folder"),
        pytest.param({"train.txt": "a"}, ["holds no data", ".jsonl"], id="unknown format"),
        pytest.param({"train.jsonl": ""}, ["no rows are in", "train.jsonl"], id="empty file"),
        pytest.param(
            {"train.jsonl": lines_of(PAIR) + '{"article'}, ["row 2 is not a JSON object"], id="malformed jsonl"
        ),
        pytest.param(
            {"train.jsonl": "null\n" + lines_of(PAIR, PAIR)},
            ["train.jsonl, row 1 is not a JSON object (but null"],
            id="null",
        ),
        pytest.param(
            {"train.json": "[null, " + json.dumps(PAIR) + "]"},
            ["train.json, row 1 is not a JSON object (but None"],
            id="[null",
        ),
        pytest.param({"train.json": "null"}, ["train.json, row 1 is not a JSON object"], id="null alone"),
        pytest.param({"train.json": "[]"}, ["no rows are in", "train.json"], id="no rows"),
        pytest.param(
            {"train.jsonl": lines_of(PAIR) * 2 + '{"article": "\udcff", "highlights": "d"}'}, ["UTF-8"], id="no UTF-8"
        ),
        pytest.param(
            {"train.csv": "article,highlights\na,caf\udce9\n"},
            ["train.csv is not UTF-8 (line 2:", "convert it"],
            id="csv in Latin-1",
        ),
        pytest.param(
            {"train.csv": "article,highlights\n"}, ["no rows are in", "train.csv"], id="csv of a header alone"
        ),
        pytest.param(
            {"train.csv": "a b c,d\ne f g,h\n"},
            ["--article-column article", "the first row of", "a b c, d"],
            id="csv without a header",
        ),
        pytest.param(
            {"train.parquet": "PAR0"}, ["train.parquet cannot be read (Parquet", "repair it"], id="malformed parquet"
        ),
        pytest.param({"train.jsonl": lines_of(PAIR)}, ["1 documents with text", "too few"], id="one document"),
        pytest.param({"validation.jsonl": lines_of(PAIR)}, ["no train split", "only validation"], id="no train split"),
        pytest.param(
            {"train.jsonl": lines_of(STRANGE, STRANGE)}, ["--article-column article", "text, title"], id="no columns"
        ),
        pytest.param(
            {"train.jsonl": lines_of(PAIR, PAIR), "validation.jsonl": lines_of(STRANGE)},
            ["--article-column article", "validation.jsonl", "text, title"],
            id="no columns in validation",
        ),
        pytest.param(
            {"train.jsonl": lines_of(*[{**PAIR, "highlights": 3}] * 2)},
            ["train.jsonl, row 1: highlights is 3, which is not text"],
            id="numbers for text",
        ),
        pytest.param(
            {"train.jsonl": lines_of(*[{**PAIR, "article": " "}] * 3), "validation.jsonl": lines_of(PAIR)},
            ["3 train documents", "empty"],
            id="all articles empty",
        ),
        pytest.param(
            {"train.jsonl": lines_of(*[{**PAIR, "article": None}] * 3), "validation.jsonl": lines_of(PAIR)},
            ["3 train documents", "empty"],
            id="all articles null",
        ),
        pytest.param(
            {"train.jsonl": lines_of(PAIR), "train.csv": "article,highlights\na,b\n"},
            ["holds train files in .csv (train.csv) and .jsonl (train.jsonl)", "one format"],
            id="mixed formats",
        ),
    ],
)
def test_unusable_data_is_told(refusal, tmp_path, files, words):
    folder = tmp_path / "documents"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    line = refusal(dataset_name_or_path=folder)
    assert [word for word in words if word not in line] == [], line


def test_a_malformed_file_prints_one_error_line_and_nothing_else(tmp_path):
    (tmp_path / "train.parquet").write_text("PAR0")
    run = run_script(*small_run(tmp_path / "run", dataset_name_or_path=tmp_path / "train.parquet", quiet=True))
    assert (run.returncode, run.stdout) == (2, "")
    [line] = run.stderr.splitlines()
    assert line.startswith("error: --dataset-name-or-path")


@pytest.mark.parametrize(
    "place", [TINY_LLAMA / "config.json", TINY_LLAMA / "config.json" / "below", Path("/proc/nowhere")]
)
def test_a_save_folder_that_cannot_be_written_to_is_told(refusal, place):
    line = refusal(place)
    assert line.startswith(f"error: --save-model-dir {place} cannot be written to")


def test_a_file_in_the_place_of_checkpoints_is_refused(tmp_path, capsys):
    (tmp_path / "checkpoints").touch()
    [line] = told(capsys, *small_run(tmp_path))
    assert line == f"error: --save-model-dir {tmp_path}: {tmp_path / 'checkpoints'} is a file; give another folder"


def test_a_save_folder_inside_the_data_is_refused_before_writing(tmp_path, capsys):
    """The run's own json would be data to the next start of the same command."""
    news = Path(shutil.copytree(NEWS, tmp_path / "news"))
    for place in (news, news / "run"):
        [line] = told(capsys, *small_run(place, dataset_name_or_path=news))
        assert line.startswith(f"error: --save-model-dir {place} lies in --dataset-name-or-path {news}, where")
    assert {path.name for path in news.iterdir()} == {path.name for path in NEWS.iterdir()}


def test_weights_of_nan_are_told_in_one_line_before_training(tmp_path, capsys):
    folder = Path(shutil.copytree(TINY_LLAMA, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert command_line(small_run(tmp_path / "run", model_name_or_path=folder)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the loss is nan before the first step of this run, so the weights are broken")


def test_a_save_folder_with_the_base_model_is_refused_unchanged(tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(TINY_LLAMA, folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for name in (".", "checkpoints/step-000001"):  # also where it holds checkpoints
        (folder / name).mkdir(parents=True, exist_ok=True)
        [line] = told(capsys, *small_run(folder, model_name_or_path=f"{tmp_path}/./model"))
        assert line == f"error: --save-model-dir {folder} holds the model to train from; give another folder"
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before


# ----------------------------------------------------------------------------------------------------------------
# Several processes
# ----------------------------------------------------------------------------------------------------------------


def error_lines(run: subprocess.CompletedProcess | SimpleNamespace) -> list[str]:
    return [line for line in run.stderr.splitlines() if line.startswith("error:")]


def test_two_processes_show_help_and_each_mistake_only_once(tmp_path):
    """Also a mistake that only one finds: rank 0 reads the data first, and it alone looks at the save folder."""
    mistakes = {
        "--lr -1 must be at least 0": small_run(tmp_path, lr=-1),
        "/nowhere/news does not exist": small_run(tmp_path, dataset_name_or_path="/nowhere/news"),
        "config.json cannot be written to": small_run(TINY_LLAMA / "config.json"),
        "nodes run 1 and 2 ranks; give all the same --nproc_per_node": small_run(tmp_path, seed=7),
    }
    unequal_nodes = RANKS / "unequal_nodes.py"
    helped, *runs = run_script_several_times([["--help"], *mistakes.values()], processes=2, before=[unequal_nodes])
    assert (helped.returncode, helped.stdout.count("--model-name-or-path"), helped.stderr) == (0, 1, "")
    for run, words in zip(runs, mistakes, strict=True):
        assert run.returncode == 2
        [line] = error_lines(run)
        assert words in line
