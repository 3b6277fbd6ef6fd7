"""The final model: what other programs make of the folder, its model card, and what a kill leaves of it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import torch
import transformers
from accelerate.tracking import get_available_trackers
from conftest import (
    NEWS,
    SMALL_LLAMA,
    TINY_LLAMA,
    Crash,
    crash_point,
    fresh_accelerate,
    llama_of,
    read_metrics,
    small_run,
)
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from test_training_and_evaluation import mean_token_loss
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import train_llama2
from train_llama2 import UNFINISHED_MODEL, Config, Parallel, enable_advanced_parallelization, encode_batch

pytestmark = pytest.mark.usefixtures("own_processes")

MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json")
TWO_STEPS = dict(max_train_samples=4, max_eval_samples=2, batch_size=2, block_size=128)


def start(folder: Path, **flags: object) -> int:
    return conftest.start(folder, **{**TWO_STEPS, **flags})


# ----------------------------------------------------------------------------------------------------------------
# The model that three sharded ranks left
# ----------------------------------------------------------------------------------------------------------------


def test_the_saved_model_is_the_trained_one(three_rank_run):
    _, folder = three_rank_run
    last = read_metrics(folder)[1][-1]["eval_loss"]
    assert mean_token_loss(folder) == pytest.approx(last, rel=1e-5)
    assert mean_token_loss(SMALL_LLAMA) > last + 0.05, "training changed too little for this test to notice"


def test_the_saved_model_generates_and_stops_at_its_end_token(three_rank_run):
    _, folder = three_rank_run
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("[SUMMARIZE] The bridge opened. [/SUMMARIZE]\n", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert written.shape[1] > prompt["input_ids"].shape[1]

    def three_words_and_the_end(module, inputs, logits, words=iter([400, 401, 402, 2, 403, 404])):  # noqa: B008
        return torch.full_like(logits, -1.0).index_fill_(-1, torch.tensor([next(words)]), 1.0)

    model.lm_head.register_forward_hook(three_words_and_the_end)
    written = model.generate(torch.tensor([[1, 300, 301]]), max_new_tokens=6)[0].tolist()
    assert written == [1, 300, 301, 400, 401, 402, tokenizer.eos_token_id]


def test_config_and_tokenizer_are_those_of_the_original(three_rank_run):
    _, folder = three_rank_run
    saved, original = (json.loads((path / "config.json").read_text()) for path in (folder, SMALL_LLAMA))
    assert saved.pop("dtype") == "float32"
    assert original.pop("dtype") == "float16"
    assert saved.pop("transformers_version") == transformers.__version__
    original.pop("transformers_version")
    assert saved == original
    text = "The bridge </s> opened\n"
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (folder, SMALL_LLAMA)]
    assert tokenizers[0](text) == tokenizers[1](text)


def test_the_files_are_as_readable_as_any_new_file(tmp_path, three_rank_run):
    _, folder = three_rank_run
    (tmp_path / "new").touch()
    expected = (tmp_path / "new").stat().st_mode
    files = [file for file in folder.iterdir() if file.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= {f.name for f in files}
    assert {file.name: file.stat().st_mode for file in files} == {file.name: expected for file in files}


def test_nothing_hidden_but_the_lock_is_left(three_rank_run):
    assert [path.name for path in three_rank_run[1].glob(".*")] == [".lock"]


def test_save_dtype_bf16_rounds_the_weights(tmp_path):
    stored = {}
    for dtype in ("fp32", "bf16"):
        assert start(tmp_path / dtype, save_dtype=dtype, max_train_samples=2, max_eval_samples=1) == 0
        with safe_open(tmp_path / dtype / "model.safetensors", framework="pt") as weights:
            stored[dtype] = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    assert stored == {"fp32": {"F32"}, "bf16": {"BF16"}}
    full, rounded = (AutoModelForCausalLM.from_pretrained(tmp_path / dtype) for dtype in ("fp32", "bf16"))
    assert rounded.dtype == torch.bfloat16
    for name, weight in full.state_dict().items():
        assert torch.equal(rounded.state_dict()[name], weight.bfloat16())


# ----------------------------------------------------------------------------------------------------------------
# A folder for other programs: layout, publishing, and the card of a run
# ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def typed_run(tmp_path_factory) -> SimpleNamespace:
    """Returns a run as typed on a command line, started twice: its folder, its data, and both consoles and cards.

    The model has a `tokenizer.model` and is written in shards. The data is two files with spaces in their names, and a
    tracker writes into the folder. The second start has no steps left.
    """
    if "tensorboard" not in map(str, get_available_trackers()):
        pytest.skip("tensorboard is not installed")
    base, consoles, cards, times = tmp_path_factory.mktemp("typed"), [], [], []
    shutil.copytree(TINY_LLAMA, base / "tiny model")
    (base / "tiny model" / "tokenizer.model").write_bytes(b"sentencepiece")
    files = [str(base / f"my {name}.jsonl") for name in ("train", "validation")]
    for name, file in zip(("train", "validation"), files, strict=True):
        shutil.copy(NEWS / f"{name}.jsonl", file)
    words = small_run(base / "the run", **TWO_STEPS, model_name_or_path=base / "tiny model", report_to="tensorboard")
    with pytest.MonkeyPatch.context() as patch:
        in_shards = functools.partialmethod(PreTrainedModel.save_pretrained, max_shard_size="300KB")
        patch.setattr(PreTrainedModel, "save_pretrained", in_shards)
        patch.setattr(Parallel, "say", lambda self, line, always=False: consoles[-1].append(line))
        patch.setattr(sys, "argv", ["/opt/train_llama2.py", *words, "--dataset-name-or-path", *files])
        for _ in range(2):
            consoles.append([])
            fresh_accelerate()
            assert train_llama2.command_line() == 0
            (base / "the run" / ".lock").open().close()
            cards.append((base / "the run" / "README.md").read_text())
            times.append([(base / "the run" / name).stat().st_mtime_ns for name in MODEL_FILES])
    return SimpleNamespace(base=base, folder=base / "the run", consoles=consoles, cards=cards, times=times)


def test_the_layout_is_what_other_readers_look_for(typed_run):
    folder = typed_run.folder
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    assert set(index.values()) == {file.name for file in folder.glob("model-*.safetensors")}
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert set(index) == set(model.state_dict())
    assert (folder / "tokenizer.model").read_bytes() == b"sentencepiece"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id == 2
    assert generation["bos_token_id"] == 1


def test_a_finished_run_keeps_its_model_and_says_so(typed_run):
    assert typed_run.consoles[0][-1].startswith("done      2 steps")
    again = f"done      already at step 2, so nothing was trained; model in {typed_run.folder}"
    assert typed_run.consoles[1][-1] == again
    assert typed_run.times[0] == typed_run.times[1]


def test_the_publish_command_uploads_model_and_results_alone(typed_run):
    for console in typed_run.consoles:
        label, *command = shlex.split(console[-2])
        assert label == "publish"
        assert command[:4] == ["hf", "upload", "OWNER/NAME", str(typed_run.folder)]
        assert command[4::2] == ["--exclude"] * len(command[5::2])
        patterns = command[5::2]
    folder = typed_run.folder
    present = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    assert [name for name in present if "tfevents" in name or name.endswith("hparams.yml")]
    assert [name for name in present if name.startswith("checkpoints/")]
    assert ".lock" in present
    shards = {file.name for file in folder.glob("model-*.safetensors")}
    assert set(filter_repo_objects(present, ignore_patterns=patterns)) - {"curves.png"} == shards | {
        "README.md", "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
        "tokenizer_config.json", "tokenizer.model", "metrics.jsonl",
    }  # fmt: skip


def test_the_cards_command_is_the_runs_own(typed_run):
    """A shell that reads it gets the configuration of this run, names with spaces and several files included."""
    card = ModelCard.load(typed_run.folder / "README.md")
    (command,) = [part.split("\n```")[0] for part in card.text.split("```bash\n")[1:]]
    launcher, script, *flags = shlex.split(command)
    assert (launcher, script) == ("python", "train_llama2.py")
    config = train_llama2.parse_config(flags)
    named = dict(
        model_name_or_path="tiny model",
        dataset_name_or_path=["my train.jsonl", "my validation.jsonl"],
        save_model_dir="the run",
    )
    ran = json.loads((typed_run.folder / "train_config.json").read_text())["flags"]
    assert json.loads(json.dumps(vars(config))) == ran | named


def test_no_path_of_this_machine_is_in_the_card(typed_run):
    card = typed_run.cards[0]
    assert str(typed_run.base) not in card and not re.search(r"(?<!\w)/\w+/", card)


def test_the_card_has_model_data_results_and_plan(typed_run):
    card = ModelCard.load(typed_run.folder / "README.md")
    steps, evaluations = read_metrics(typed_run.folder)
    # model and data are local: there is nothing on the Hub to name, and no licence is known
    assert card.data.to_dict() == dict(
        language="en", library_name="transformers", pipeline_tag="text-generation",
        tags=["summarization", "full-fine-tuning"],
    )  # fmt: skip
    assert "All weights of `tiny model` were trained on `my train.jsonl my validation.jsonl`" in card.text
    assert card.text.strip().startswith("# tiny model fine-tuned for summarisation")
    for name, value in (
        ("optimizer steps", "2"),
        ("tokens", f"{steps[-1]['tokens']:,}"),
        ("training loss", f"{steps[-1]['loss']:.4f}"),
        ("validation loss", f"{evaluations[-1]['eval_loss']:.4f}"),
    ):
        assert f"| {name} | {value} |" in card.text
    assert "Plan: none, micro-batch 2 x 1 on 1 x " in card.text
    assert "predicted / measured, second step" in card.text
    assert "Licence" not in card.text  # that of a model folder is not known
    assert "## Samples" not in card.text
    assert ("![curves](curves.png)" in card.text) == (typed_run.folder / "curves.png").exists()


def test_the_card_of_a_llama_2_names_its_licence(tmp_path):
    shutil.copytree(TINY_LLAMA, tmp_path / "Llama-2-tiny")
    flags = small_run(tmp_path / "run", model_name_or_path=tmp_path / "Llama-2-tiny", max_steps=1)
    assert train_llama2.command_line(flags) == 0
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.license == "llama2"
    assert "LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc." in card.text


def test_a_run_without_steps_left_keeps_the_card(typed_run):
    assert typed_run.cards[0] == typed_run.cards[1]
    assert [path.name for path in typed_run.folder.glob(".*")] == [".lock"]


# ----------------------------------------------------------------------------------------------------------------
# Cards of runs that no test can make, from stand-ins for what the card reads of them
# ----------------------------------------------------------------------------------------------------------------

LINES = [
    dict(step=9, loss=1.5, tokens=1000),
    dict(step=9, eval_loss=1.25, eval_perplexity=3.4903, rouge1=40.0),
]
TEST_LINE = dict(step=9, test_samples=11490, test_mean_words=55.25, test_ended_share=0.991) | {
    f"test_{whose}{name}{bound}": value + offset
    for whose, offset in (("", 44), ("lead3_", 40))
    for name in ("rouge1", "rouge2", "rougeLsum")
    for bound, value in (("", 0.123), ("_low", 0), ("_high", 0.246))
}
SAMPLES = [
    dict(step=step, reference=f"Reference {step}.{n}", summary=f"Summary {step}.{n}")
    for step in (5, 9)
    for n in range(4)
]


def write_card(
    folder: Path,
    nodes: int = 1,
    ranks: int = 8,
    is_main: bool = True,
    steps_of_this_run: int = 9,
    lines: Sequence[dict] = LINES,
    **flags: object,
) -> str:
    """Writes a card into the folder and returns what was said meanwhile."""
    for name, records in (("metrics.jsonl", lines), ("samples.jsonl", SAMPLES)):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    config = Config(save_model_dir=str(folder), **flags)
    cluster = SimpleNamespace(nodes=nodes, ranks_per_node=ranks, world_size=nodes * ranks, device_name="NVIDIA H100")
    plan, said = SimpleNamespace(describe=lambda: "fsdp, micro-batch 8 x 1"), []
    parallel = SimpleNamespace(config=config, is_main=is_main, cluster=cluster, plan=plan, say=said.append)
    parallel.model_config = SimpleNamespace(model_type="qwen2" if "Qwen" in config.model_name_or_path else "llama")
    check = dict(step_seconds=dict(predicted=2.0, measured=2.5, band=[1.8, 2.2]))
    log = SimpleNamespace(steps_of_this_run=steps_of_this_run, last_scores={}, tested=True, plan_check=check)
    state = SimpleNamespace(step=9, tokens=1000)
    train_llama2.write_model_card(parallel, state, log)
    return "\n".join(said)


def test_a_card_names_model_data_and_licence_of_the_hub(tmp_path):
    write_card(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "meta-llama/Llama-2-13b-hf"
    assert card.data.datasets == ["abisee/cnn_dailymail"]
    assert card.data.license == "llama2"
    assert card.text.strip().startswith("# Llama-2-13b-hf fine-tuned for summarisation")
    assert "All weights of `meta-llama/Llama-2-13b-hf` were trained on `abisee/cnn_dailymail`" in card.text
    assert "The prompt is `[SUMMARIZE] ` + article + ` [/SUMMARIZE]` + newline" in card.text
    write_card(tmp_path, model_name_or_path=str(tmp_path / "llama2_summarization" / "Qwen"))
    assert ModelCard.load(tmp_path / "README.md").data.license is None, "a folder's name is no licence"
    write_card(tmp_path, model_name_or_path="Qwen/Qwen2.5-0.5B")
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.license) == ("Qwen/Qwen2.5-0.5B", None)
    snapshot = tmp_path / "models--Qwen--Qwen2.5-0.5B" / "snapshots" / "060db6499f32faf8b98477b0a26969ef7d8b9987"
    snapshot.mkdir(parents=True)
    write_card(tmp_path, model_name_or_path=str(snapshot))
    assert "All weights of `Qwen/Qwen2.5-0.5B` were" in (tmp_path / "README.md").read_text()


def test_a_card_has_scores_check_curves_and_three_last_samples(tmp_path):
    write_card(tmp_path)
    text = ModelCard.load(tmp_path / "README.md").text
    assert "| validation rouge1 | 40.0000 |" in text and "| validation perplexity | 3.4903 |" in text
    assert "predicted / measured, second step: step 2.00 / 2.50 s\nWARNING   the plan missed" in text
    assert text.count("**Reference.**") == text.count("**Summary.**") == 3
    assert "**Reference.** Reference 9.0\n\n**Summary.** Summary 9.0" in text and "Summary 5" not in text
    assert "curves.png" not in text
    (tmp_path / "curves.png").touch()
    write_card(tmp_path)
    assert "![curves](curves.png)" in ModelCard.load(tmp_path / "README.md").text


def test_a_card_has_test_scores_with_intervals_beside_lead_3(tmp_path):
    write_card(tmp_path, lines=[*LINES, dict(TEST_LINE, step=8, test_samples=3)])
    assert "Lead-3" not in (tmp_path / "README.md").read_text(), "scores of another step"
    write_card(tmp_path, lines=[*LINES, dict(TEST_LINE, test_samples=3), TEST_LINE])
    text = ModelCard.load(tmp_path / "README.md").text
    row = " | ".join(["44.12 (44.00 to 44.25)"] * 3)
    assert "\n\n| test split, 11490 documents | ROUGE-1 | ROUGE-2 | ROUGE-Lsum |\n| --- | --- | --- | --- |\n" in text
    assert f"\n| this model | {row} |\n" in text
    assert f"\n| Lead-3: the article's first three sentences | {row.replace('44.', '40.')} |\n\n" in text
    assert "55.2 words on average, and 99.1% of the summaries ended by themselves." in text


def test_a_run_that_only_scored_keeps_the_cards_training_section(tmp_path):
    write_card(tmp_path, ranks=8)
    write_card(tmp_path, ranks=1, steps_of_this_run=0, lines=[*LINES, TEST_LINE])
    text = (tmp_path / "README.md").read_text()
    assert "torchrun --standalone --nproc_per_node=8" in text and "on 8 x NVIDIA H100" in text
    assert "Lead-3" in text and text.count("## Training") == text.count("## Samples") == 1


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("meta-llama/Llama-2-13b-hf", "meta-llama/Llama-2-13b-hf"),
        ("/models/Llama-2-13b-hf/", "Llama-2-13b-hf"),
        ("--save-model-dir=~/the run", "--save-model-dir=the run"),
        ("--save-model-dir=/x=1/y", "--save-model-dir=y"),
        ("../news/train.jsonl", "train.jsonl"),
        ("tests/data/news", "news"),
        ("--lr=1e-5", "--lr=1e-5"),
        ("2x8xH100-80GB,ib=400", "2x8xH100-80GB,ib=400"),
    ],
)
def test_local_paths_are_published_by_their_names(monkeypatch, word, shown):
    monkeypatch.chdir(conftest.ROOT)
    assert train_llama2.published_name(word) == shown


def test_the_cards_example_summarises_as_trained(three_rank_run, tmp_path, monkeypatch, capsys):
    """Runs it as it stands, with a folder of the name that stands for the model's on the Hub."""
    _, folder = three_rank_run
    (example,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    (tmp_path / "OWNER").mkdir()
    (tmp_path / "OWNER" / "NAME").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(example, found)
    document = encode_batch([found["article"]], ["A bridge."], AutoTokenizer.from_pretrained(TINY_LLAMA), 1024)
    prompt = document["input_ids"][0][: document["prompt_length"][0]]
    assert found["inputs"]["input_ids"].tolist() == [prompt]
    assert capsys.readouterr().out.strip() == found["tokenizer"].decode(
        found["written"][0, len(prompt) :], skip_special_tokens=True
    ).strip() != ""  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "ranks", "launcher"),
    [
        (1, 1, "python"),
        (1, 8, "torchrun --standalone --nproc_per_node=8"),
        (2, 8, "torchrun --nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 --nproc_per_node=8"),
    ],
)
def test_a_cards_command_starts_as_many_processes(tmp_path, monkeypatch, nodes, ranks, launcher):
    monkeypatch.setattr(sys, "argv", ["/opt/my code/train_llama2.py", "--article-column", "the article", "--quiet"])
    write_card(tmp_path, nodes, ranks)
    command = (tmp_path / "README.md").read_text().split("```bash\n")[1].split("\n```")[0]
    assert command == f"{launcher} train_llama2.py --article-column 'the article' --quiet"


def test_rank_0_alone_writes_the_card(tmp_path):
    assert write_card(tmp_path, is_main=False) == ""
    assert not (tmp_path / "README.md").exists()


def test_a_card_that_fails_leaves_the_former_and_a_warning(tmp_path, monkeypatch):
    write_card(tmp_path)
    former = (tmp_path / "README.md").read_text()

    def half(self, path):
        Path(path).write_text(self.content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ModelCard, "save", half)
    said = write_card(tmp_path, lr=3e-5)
    assert said.startswith("WARNING   the model card could not be written") and "No space left" in said
    assert (tmp_path / "README.md").read_text() == former


# ----------------------------------------------------------------------------------------------------------------
# Kills. Python announces every file it opens for writing, renames, removes, makes or re-modes. The k-th of these
# announcements ends the save there, before the operation, as a kill would.
# ----------------------------------------------------------------------------------------------------------------


FORMER, NEW = 0.5, 0.25


def model_in(folder: Path) -> float | str | None:
    """Returns the value of all weights of the folder's model, and None where no loader would see a model."""
    if not (folder / "config.json").exists():
        return None
    return value_of_weights(folder, hashlib.sha256(repr(sorted(files_of(folder).items())).encode()).hexdigest())


@functools.cache
def value_of_weights(folder: Path, contents: str) -> float | str:
    """Loading a model takes longer than writing one, and most kills leave the same `contents`."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        return f"broken: {error}"
    values = {value for parameter in model.parameters() for value in parameter.unique().tolist()}
    return values.pop() if len(values) == 1 else "a mix of models"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def test_a_folder_with_a_readme_of_no_run_is_refused(tmp_path, capsys):
    """Such as the folder of this script: the model card would replace it."""
    (tmp_path / "README.md").write_text("mine")
    assert start(tmp_path) == 2
    assert f"--save-model-dir {tmp_path} holds a README.md that is of no run" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "mine"


def test_nothing_of_another_models_card_and_tokenizer_is_kept(tmp_path):
    """As after a kill between the model and its card: the next start finds no card, and writes one."""
    config = Config(model_name_or_path=str(TINY_LLAMA), save_model_dir=str(tmp_path), block_size=64)
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    fresh_accelerate()
    with enable_advanced_parallelization(config) as parallel:
        train_llama2.save_model(llama_of(FORMER), tokenizer, parallel, weights_hash="former")
        (tmp_path / "README.md").write_text("the former model")
        parallel.config = dataclasses.replace(config, save_dtype="bf16")
        train_llama2.save_model(llama_of(FORMER), tokenizer, parallel, weights_hash="former")
        assert (tmp_path / "README.md").exists(), "the same weights in another precision"
        for name in ("chat_template.jinja", "additional_chat_templates/tool.jinja", "added_tokens.json"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("{}")
        train_llama2.save_model(llama_of(NEW), tokenizer, parallel, weights_hash="new")
    assert model_in(tmp_path) == NEW and not (tmp_path / "README.md").exists()
    assert not [*tmp_path.glob("*chat_template*"), *tmp_path.glob("added_tokens.json")]


def crashes(act, k: int) -> str:
    """Runs `act` with a crash at its k-th file operation, and returns which that was; "" where `act` has fewer."""
    crash_point.arm(k)
    try:
        act()
    except Crash as crash:
        return str(crash)
    finally:
        crash_point.disarm()
    return ""


@pytest.mark.parametrize("new_in_shards", [False, True], ids=["new in one file", "new in shards"])
@pytest.mark.parametrize("former", ["none", "one file", "shards"])
def test_a_kill_leaves_former_model_none_or_the_new(tmp_path, monkeypatch, former, new_in_shards):
    former_folder, folder = tmp_path / "former", tmp_path / "run"
    former_folder.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    if former != "none":
        llama_of(FORMER).save_pretrained(former_folder, max_shard_size="70KB" if former == "shards" else "1GB")
        tokenizer.save_pretrained(former_folder)
        assert (former_folder / "model.safetensors.index.json").exists() == (former == "shards")
    if new_in_shards:
        in_shards = functools.partialmethod(PreTrainedModel.save_pretrained, max_shard_size="70KB")
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", in_shards)
    before = None if former == "none" else FORMER
    config = Config(model_name_or_path=str(TINY_LLAMA), save_model_dir=str(folder), block_size=64, parallelism="none")
    model, left_by_kills = llama_of(NEW), []
    fresh_accelerate()
    with enable_advanced_parallelization(config) as parallel:
        (tmp_path / "warm").mkdir()  # libraries that are imported at the first save write files of their own
        warm_up = dataclasses.replace(parallel, config=Config(save_model_dir=str(tmp_path / "warm")))
        train_llama2.save_model(model, tokenizer, warm_up)

        def save():
            train_llama2.save_model(model, tokenizer, parallel, weights_hash="the new checkpoint")

        for k in itertools.count():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(former_folder, folder)
            where = crashes(save, k)
            if not where:
                break
            left = model_in(folder)
            left_by_kills.append(left)
            assert left in (before, None, NEW), where

            # The next start is killed too, one operation further each time. The one after it tidies up.
            def next_start():
                train_llama2.prepare_save_folder(parallel)

            left_files = files_of(folder)
            crashes(next_start, k % 3)
            assert files_of(folder) == left_files, where
            next_start()
            assert files_of(folder) == left_files, where
            assert not (folder / UNFINISHED_MODEL).exists()

            # So is its save, a few operations further. The save after that gives the new model.
            crashes(save, k + 3)
            assert model_in(folder) in (left, None, NEW), where
            save()
            assert model_in(folder) == NEW, where
            assert [path.name for path in folder.glob(".*")] == [".lock"]
            saved = {path.name for path in folder.glob("model*")}
            assert ("model.safetensors" in saved) is not new_in_shards
            assert ("model.safetensors.index.json" in saved) is new_in_shards
    assert model_in(folder) == NEW
    assert len(left_by_kills) > 15
    # Until the new model is whole the former one is there. While the files move in there is none.
    phases = [value for value, _ in itertools.groupby(left_by_kills)]
    assert phases == ([None, NEW] if former == "none" else [FORMER, None, NEW])


def test_the_model_is_that_of_the_step_gone_back_to(tmp_path):
    """One step is finished, then a second. Its checkpoint is deleted, and the command of one step run again."""
    assert start(tmp_path, max_steps=1) == 0
    first = (tmp_path / "model.safetensors").read_bytes()
    assert start(tmp_path, max_steps=2, resume_anyway=True) == 0
    assert (tmp_path / "model.safetensors").read_bytes() != first
    shutil.rmtree(tmp_path / "checkpoints" / "step-000002")
    assert start(tmp_path, max_steps=1) == 0
    assert (tmp_path / "model.safetensors").read_bytes() == first


@pytest.mark.parametrize("change", ["another dtype", "a file cut short", "no config.json"])
def test_a_model_that_is_not_whole_or_asked_for_is_written_again(tmp_path, change):
    assert start(tmp_path, max_steps=1) == 0
    before = (tmp_path / "model.safetensors").read_bytes()
    if change == "a file cut short":
        (tmp_path / "model.safetensors").write_bytes(before[:-1])
    if change == "no config.json":
        (tmp_path / "config.json").unlink()
    assert start(tmp_path, max_steps=1, **(dict(save_dtype="bf16") if change == "another dtype" else {})) == 0
    assert ((tmp_path / "model.safetensors").read_bytes() == before) == (change != "another dtype")
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_save_right_after_a_kill_gives_the_new_model(tmp_path):
    """No start of the script tidies the folder in between."""
    config = Config(model_name_or_path=str(TINY_LLAMA), save_model_dir=str(tmp_path), block_size=64)
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    fresh_accelerate()
    with enable_advanced_parallelization(config) as parallel:
        for k in itertools.count():
            train_llama2.save_model(llama_of(FORMER), tokenizer, parallel)
            if not crashes(lambda: train_llama2.save_model(llama_of(NEW), tokenizer, parallel), k):
                break
            (tmp_path / UNFINISHED_MODEL).mkdir(exist_ok=True)
            (tmp_path / UNFINISHED_MODEL / "tokenizer.model").write_bytes(b"of another model")
            train_llama2.save_model(llama_of(NEW), tokenizer, parallel)
            assert model_in(tmp_path) == NEW
            assert not list(tmp_path.glob(".*")) and not (tmp_path / "tokenizer.model").exists()
    assert k > 15


def test_the_next_run_saves_over_what_a_kill_left(tmp_path):
    (tmp_path / UNFINISHED_MODEL).mkdir()
    (tmp_path / UNFINISHED_MODEL / "model.safetensors").write_bytes(b"half")
    assert start(tmp_path, max_train_samples=2, max_eval_samples=1) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob(".*")] == [".lock"]


def test_torchs_checkpoint_writer_still_has_per_thread_copy_ahead(tmp_path):
    """The script sets it to 0 for tensors in host memory. If torch renamed it, that would silently do nothing."""
    assert vars(HuggingFaceStorageWriter(str(tmp_path), {}, save_distributed=True))["per_thread_copy_ahead"] > 0
