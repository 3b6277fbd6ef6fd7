"""The final model: what `from_pretrained` makes of it, and what a crash at any moment leaves."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from conftest import TINY_LLAMA, read_metrics, small_run
from safetensors import safe_open
from test_evaluation import mean_token_loss
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import train_llama2
from train_llama2 import Config, enable_advanced_parallelization


def stored_dtypes(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        return {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)


# ----------------------------------------------------------------------------------------------------------------
# The model that three sharded ranks left
# ----------------------------------------------------------------------------------------------------------------


def test_the_saved_model_is_the_trained_one(three_rank_run):
    _, folder = three_rank_run
    last = read_metrics(folder)[1][-1]["eval_loss"]
    assert mean_token_loss(folder) == pytest.approx(last, rel=1e-5)
    assert mean_token_loss(TINY_LLAMA) > last + 0.05, "training changed too little for this test to tell"


def test_the_saved_model_generates_and_stops_at_the_end_of_sequence_token(three_rank_run):
    _, folder = three_rank_run
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("[SUMMARIZE] The bridge opened. [/SUMMARIZE]\n", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert written.shape[1] > prompt["input_ids"].shape[1]

    def only_the_end(module, inputs, logits):
        return torch.full_like(logits, -1.0).index_fill_(-1, torch.tensor([2]), 1.0)

    model.lm_head.register_forward_hook(only_the_end)
    written = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert written[0, prompt["input_ids"].shape[1] :].tolist() == [2]


def test_config_and_tokenizer_are_those_of_the_model_that_was_loaded(three_rank_run):
    _, folder = three_rank_run
    saved, original = (json.loads((path / "config.json").read_text()) for path in (folder, TINY_LLAMA))
    assert saved.pop("dtype") == "float32"
    assert original.pop("dtype") == "float16"
    assert saved.pop("transformers_version") == transformers.__version__
    original.pop("transformers_version")
    assert saved == original
    assert [path.name for path in folder.glob(".*")] == [".lock"], "staging is left behind"
    text = "The bridge </s> opened\n"
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (folder, TINY_LLAMA)]
    assert tokenizers[0](text) == tokenizers[1](text)


def test_the_files_are_as_readable_as_any_new_file(tmp_path, three_rank_run):
    _, folder = three_rank_run
    (tmp_path / "new").touch()
    expected = (tmp_path / "new").stat().st_mode
    files = [file for file in folder.iterdir() if file.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= {f.name for f in files}
    assert {file.name: file.stat().st_mode for file in files} == {file.name: expected for file in files}


def test_save_dtype_bf16_rounds_the_weights(tmp_path):
    flags = dict(max_train_samples=2, max_eval_samples=1, batch_size=2, block_size=128)
    for dtype in ("fp32", "bf16"):
        train_llama2.main(small_run(tmp_path / dtype, **flags, save_dtype=dtype))
    assert stored_dtypes(tmp_path / "fp32") == {"F32"}
    assert stored_dtypes(tmp_path / "bf16") == {"BF16"}
    full, rounded = (AutoModelForCausalLM.from_pretrained(tmp_path / dtype) for dtype in ("fp32", "bf16"))
    assert rounded.dtype == torch.bfloat16
    for name, weight in full.state_dict().items():
        assert torch.equal(rounded.state_dict()[name], weight.bfloat16())


# ----------------------------------------------------------------------------------------------------------------
# Crashes. Python announces every file it opens for writing, renames, removes, makes or re-modes; the k-th of these
# announcements ends the save there, before the operation, as a kill would.
# ----------------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """Not an Exception, so that nothing on the way catches it."""


class CrashPoint:
    """Between `arm(k)` and `disarm()`, the k-th file operation (from 0) raises Crash."""

    left: int | None = None

    def arm(self, k: int) -> None:
        self.left = k

    def disarm(self) -> None:
        self.left = None

    def __call__(self, event: str, details: tuple) -> None:
        if self.left is None:
            return
        writes = event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate"):
            self.left -= 1
            if self.left < 0:
                self.disarm()
                raise Crash(f"{event} {details}")


crash_point = CrashPoint()
sys.addaudithook(crash_point)


def small_llama(value: float) -> LlamaForCausalLM:
    shape = dict(vocab_size=1024, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(LlamaConfig(**shape))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, value)
    return model


def model_in(folder: Path) -> float | str | None:
    """Returns the value all weights of the folder's model have; None where no loader would see a model."""
    if not (folder / "config.json").exists():
        return None
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        return f"broken: {error}"
    values = {value for parameter in model.parameters() for value in parameter.unique().tolist()}
    return values.pop() if len(values) == 1 else "a mix of models"


@pytest.mark.parametrize("former", ["none", "one file", "shards"])
def test_a_crash_at_any_file_operation_leaves_the_former_model_or_none_or_the_new_one(tmp_path, former):
    FORMER, NEW = 0.5, 0.25  # noqa: N806
    former_folder, folder = tmp_path / "former", tmp_path / "run"
    former_folder.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    if former != "none":
        small_llama(FORMER).save_pretrained(former_folder, max_shard_size="70KB" if former == "shards" else "1GB")
        tokenizer.save_pretrained(former_folder)
        assert (former_folder / "model.safetensors.index.json").exists() == (former == "shards")
    config = Config(model_name_or_path=str(TINY_LLAMA), save_model_dir=str(folder), block_size=64, parallelism="none")
    model, seen = small_llama(NEW), []
    with enable_advanced_parallelization(config) as parallel:
        (tmp_path / "warm").mkdir()  # imports of the libraries write their own files
        warm_up = Config(save_model_dir=str(tmp_path / "warm"))
        train_llama2.save_model(model, tokenizer, warm_up, parallel)
        for k in itertools.count():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(former_folder, folder)
            crash_point.arm(k)
            try:
                train_llama2.save_model(model, tokenizer, config, parallel)
            except Crash as crash:
                where = str(crash)
            else:
                break
            finally:
                crash_point.disarm()
            left = model_in(folder)
            assert left in (None, NEW, FORMER if former != "none" else None), where

            # The next start crashes too, one operation further on; the one after that puts it right.
            crash_point.arm(len(seen) % 3)
            try:
                train_llama2.prepare_save_folder(config, parallel)
            except Crash as crash:
                assert model_in(folder) in (None, NEW, FORMER if former != "none" else None), crash
            finally:
                crash_point.disarm()
            train_llama2.prepare_save_folder(config, parallel)
            repaired = model_in(folder)
            seen.append((left, repaired))
            assert repaired in (NEW, FORMER if former != "none" else None), where
            if left == NEW:
                assert repaired == NEW
            assert not (folder / ".writable").exists()
    assert model_in(folder) == NEW
    assert len(seen) > 15
    before = None if former == "none" else FORMER
    assert seen[0] == (before, before)  # before the new model is whole, the old one is there
    assert (None, NEW) in seen  # while it moves in, there is none, until the next start
    assert seen[-1] == (NEW, NEW)


def test_the_next_run_trains_and_saves_over_what_a_crash_left(tmp_path):
    (tmp_path / ".final-model.writing").mkdir()
    (tmp_path / ".final-model.writing" / "model.safetensors").write_bytes(b"half")
    train_llama2.main(small_run(tmp_path, max_train_samples=2, max_eval_samples=1, batch_size=2, block_size=128))
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob(".*")] == [".lock"]
