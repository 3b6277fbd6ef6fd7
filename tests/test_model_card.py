"""The save folder as a good citizen of the Hub: model card, layout for other readers, --push-to-hub."""

from __future__ import annotations

import functools
import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import NEWS, TINY_LLAMA, read_metrics, small_run
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import train_llama2
from train_llama2 import Config

SHORT = dict(max_train_samples=4, max_eval_samples=2, batch_size=2, block_size=128)


def start(folder: Path, *words: str, **flags: object) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return train_llama2.command_line([*small_run(folder, **{**SHORT, **flags}), *words])
    finally:
        if folder.exists():
            (folder / ".lock").open("a").close()  # closing any descriptor of a file ends a process's locks on it


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """Returns a run that pushes: its folder, what the Hub was asked, and the console of it and of the same once more.

    The model has a `tokenizer.model` and is written in shards, the data is two files, one with a space in its name, a
    tracker writes into the folder; the first push fails, the second does not.
    """
    base = tmp_path_factory.mktemp("pushed")
    shutil.copytree(TINY_LLAMA, base / "tiny model")
    (base / "tiny model" / "tokenizer.model").write_bytes(b"sentencepiece")
    for name in ("train", "validation"):
        shutil.copy(NEWS / f"{name}.jsonl", base / f"my {name}.jsonl")
    files, hub, consoles, codes = [str(base / f"my {name}.jsonl") for name in ("train", "validation")], [], [], []
    with pytest.MonkeyPatch.context() as patch:

        def upload(**arguments):
            hub.append(("upload", arguments))
            if len(codes) == 0:
                raise RuntimeError("Connection refused\nby a peer")  # httpx's errors are no OSError

        in_shards = functools.partialmethod(PreTrainedModel.save_pretrained, max_shard_size="300KB")
        patch.setattr(PreTrainedModel, "save_pretrained", in_shards)
        patch.setattr(huggingface_hub, "create_repo", lambda name, **how: hub.append(("create", name, how)))
        patch.setattr(huggingface_hub, "upload_folder", upload)
        patch.setattr(train_llama2.Parallel, "say", lambda self, line, always=False: consoles[-1].append(line))
        for _ in range(2):
            consoles.append([])
            flags = dict(model_name_or_path=base / "tiny model", report_to="tensorboard", push_to_hub="me/news")
            codes.append(start(base / "run", "--dataset-name-or-path", *files, **flags))
            shutil.copy(base / "run" / "README.md", base / f"card {len(codes)}.md")
    return SimpleNamespace(base=base, folder=base / "run", files=files, hub=hub, consoles=consoles, codes=codes)


needs_tensorboard = pytest.mark.skipif(
    "tensorboard" not in map(str, train_llama2.get_available_trackers()), reason="tensorboard is not installed"
)


@needs_tensorboard
def test_a_failed_push_is_a_warning_and_the_same_command_pushes_again(pushed):
    assert pushed.codes == [0, 0]
    (warning,) = [line for line in pushed.consoles[0] if line.startswith("WARNING")]
    assert "Connection refused)" in warning and f"hf upload me/news {pushed.folder}" in warning
    assert pushed.consoles[0][-1].startswith("done      2 steps")
    assert pushed.consoles[1][-2:] == [
        "pushed    to https://huggingface.co/me/news",
        f"done      already at step 2; the model in {pushed.folder} was written again",
    ]


@needs_tensorboard
def test_the_repository_is_made_private_before_training_and_gets_the_right_files(pushed):
    assert [what for what, *_ in pushed.hub] == ["create", "upload"] * 2
    assert pushed.hub[0][1:] == ("me/news", dict(private=True, exist_ok=True))
    request = pushed.hub[-1][1]
    assert (request["repo_id"], Path(request["folder_path"])) == ("me/news", pushed.folder)
    there = [str(path.relative_to(pushed.folder)) for path in pushed.folder.rglob("*") if path.is_file()]
    assert [name for name in there if "tfevents" in name or name.endswith("hparams.yml")]
    assert [name for name in there if name.startswith("checkpoints/")]
    patterns = {name: request[name] for name in ("allow_patterns", "ignore_patterns")}
    sent = set(huggingface_hub.utils.filter_repo_objects([*there, "chat_template.jinja"], **patterns))
    shards = {name for name in there if name.startswith("model-0") and "/" not in name}
    assert len(shards) > 1
    assert sent - {"curves.png"} == shards | {
        "README.md", "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
        "tokenizer_config.json", "tokenizer.model", "metrics.jsonl", "train_config.json", "chat_template.jinja",
    }  # fmt: skip
    stale = ["model.safetensors", "model-00001-of-00009.safetensors", "config.json", "data.csv"]
    deleted = huggingface_hub.utils.filter_repo_objects(stale, allow_patterns=request["delete_patterns"])
    assert list(deleted) == stale[:2]


@needs_tensorboard
def test_the_layout_is_what_other_readers_look_for(pushed):
    assert json.loads((pushed.folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    index = json.loads((pushed.folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {file.name for file in pushed.folder.glob("model-*.safetensors")}
    model = AutoModelForCausalLM.from_pretrained(pushed.folder)
    assert set(index) == set(model.state_dict())
    assert (pushed.folder / "tokenizer.model").read_bytes() == b"sentencepiece"
    tokenizer = AutoTokenizer.from_pretrained(pushed.folder)
    generation = json.loads((pushed.folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id == 2
    assert generation["bos_token_id"] == 1


def test_plain_generation_stops_where_the_model_ends_its_summary(tmp_path):
    """The saved model's head is made to write three words and the end; nothing but the folder tells where to stop."""
    assert start(tmp_path, max_train_samples=2) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    prompt = torch.tensor([[1, 300, 301]])

    def write(module, inputs, logits, words=iter([400, 401, 402, 2, 403, 404])):  # noqa: B008
        return torch.full_like(logits, -1.0).index_fill_(-1, torch.tensor([next(words)]), 1.0)

    model.lm_head.register_forward_hook(write)
    assert model.generate(prompt, max_new_tokens=6)[0].tolist() == [1, 300, 301, 400, 401, 402, tokenizer.eos_token_id]


@needs_tensorboard
def test_the_cards_command_is_the_runs_own(pushed):
    """Read by a shell, it gives the configuration of this run; paths with spaces and several files included."""
    card = ModelCard.load(pushed.folder / "README.md")
    (command,) = [part.split("\n```")[0] for part in card.text.split("```bash\n")[1:]]
    launcher, script, *flags = shlex.split(command)
    assert (launcher, script) == ("python", "train_llama2.py")
    config = train_llama2.parse_config(flags)
    assert config.dataset_name_or_path == tuple(pushed.files)
    ran = json.loads((pushed.folder / "train_config.json").read_text())["flags"]
    assert json.loads(json.dumps(vars(config))) == ran
    assert f"were trained on `{' '.join(pushed.files)}`" in card.text
    for name, value in (("--lr", 0.001), ("--batch-size", 2), ("--dataset-name-or-path", " ".join(pushed.files))):
        assert f"| `{name}` | `{value}` |" in card.text


@needs_tensorboard
def test_the_card_has_results_plan_and_licence_and_the_second_run_leaves_them(pushed):
    card = ModelCard.load(pushed.folder / "README.md")
    steps, evaluations = read_metrics(pushed.folder)
    assert card.data.to_dict() == dict(
        language="en", library_name="transformers", pipeline_tag="text-generation",
        tags=["summarization", "full-fine-tuning"],
    )  # fmt: skip  # local model, local data: nothing on the Hub to name, and no licence known
    for name, value in (
        ("optimizer steps", "2"),
        ("tokens", f"{steps[-1]['tokens']:,}"),
        ("training loss", f"{steps[-1]['loss']:.4f}"),
        ("validation loss", f"{evaluations[-1]['eval_loss']:.4f}"),
    ):
        assert f"| {name} | {value} |" in card.text
    assert "Plan: none, micro-batch 2 x 1" in card.text
    assert "predicted / measured, step 2" in card.text
    assert "LLAMA 2 Community License" in card.text
    assert "## Samples" not in card.text
    assert ("![curves](curves.png)" in card.text) == (pushed.folder / "curves.png").exists()
    cards = [(pushed.base / f"card {number}.md").read_text() for number in (1, 2)]
    assert cards[0] == cards[1]
    assert not (pushed.folder / ".README.md").exists()


@pytest.mark.parametrize("error", [huggingface_hub.errors.LocalTokenNotFoundError("no token"), RuntimeError("refused")])
def test_a_push_that_could_not_be_done_is_refused_before_training(tmp_path, monkeypatch, capsys, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "create_repo", refuse)
    assert start(tmp_path / "run", push_to_hub="me/news", quiet=True) == 2
    printed, complained = capsys.readouterr()
    assert printed == ""
    assert complained.count("\n") == 1
    assert complained.startswith("error: --push-to-hub me/news cannot be written to") and "hf auth login" in complained
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# ----------------------------------------------------------------------------------------------------------------
# Cards of runs that no test can make: stand-ins for what the card reads of them
# ----------------------------------------------------------------------------------------------------------------

LINES = [
    dict(step=9, loss=1.5, tokens=1000),
    dict(step=9, eval_loss=1.25, eval_perplexity=3.4903, rouge1=40.0),
]
SAMPLES = [
    dict(step=step, reference=f"Reference {step}.{n}", summary=f"Summary {step}.{n}")
    for step in (5, 9)
    for n in range(4)
]


def write_card(folder: Path, nodes: int = 1, ranks: int = 8, **flags: object) -> str:
    for name, lines in (("metrics.jsonl", LINES), ("samples.jsonl", SAMPLES)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = Config(save_model_dir=str(folder), **flags)
    cluster = SimpleNamespace(nodes=nodes, ranks_per_node=ranks, world_size=nodes * ranks, device_name="NVIDIA H100")
    plan, said = SimpleNamespace(describe=lambda: "fsdp, micro-batch 8 x 1"), []
    parallel = SimpleNamespace(is_main=True, cluster=cluster, plan=plan, say=said.append)
    check = dict(step_seconds=dict(predicted=2.0, measured=2.5, band=[1.8, 2.2]))
    log, state = SimpleNamespace(steps_of_this_run=9, checked=check), SimpleNamespace(step=9, tokens=1000)
    train_llama2.write_model_card(config, parallel, state, log)
    return "\n".join(said)


def test_a_card_names_base_model_data_and_licence_of_the_hub(tmp_path):
    write_card(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "meta-llama/Llama-2-13b-hf"
    assert card.data.datasets == ["abisee/cnn_dailymail"]
    assert card.data.license == "llama2"
    assert card.text.strip().startswith("# Llama-2-13b-hf fine-tuned for summarisation")
    assert "| rouge1 | 40.0000 |" in card.text and "| validation perplexity | 3.4903 |" in card.text
    assert "predicted / measured, step 2: step 2.00 / 2.50 s\nWARNING   the plan missed" in card.text
    assert "curves.png" not in card.text
    assert card.text.count("**Reference.**") == card.text.count("**Summary.**") == 3
    assert "**Reference.** Reference 9.0\n\n**Summary.** Summary 9.0" in card.text and "Summary 5" not in card.text
    (tmp_path / "curves.png").touch()
    write_card(tmp_path, model_name_or_path="Qwen/Qwen2.5-0.5B")
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.license) == ("Qwen/Qwen2.5-0.5B", None)
    assert "![curves](curves.png)" in card.text


@pytest.mark.parametrize(
    ("nodes", "ranks", "launcher"),
    [
        (1, 1, "python"),
        (1, 8, "torchrun --standalone --nproc_per_node=8"),
        (2, 8, "torchrun --nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 --nproc_per_node=8"),
    ],
)
def test_a_cards_command_starts_as_many_processes(tmp_path, nodes, ranks, launcher):
    write_card(tmp_path, nodes, ranks, quiet=True, article_column="the article", lr=2e-5)
    command = (tmp_path / "README.md").read_text().split("```bash\n")[1].split("\n```")[0]
    words = f"train_llama2.py --article-column 'the article' --lr 2e-05 --save-model-dir {tmp_path} --quiet"
    assert command == f"{launcher} {words}"


def test_a_card_that_cannot_be_written_leaves_the_former_one_and_a_warning(tmp_path, monkeypatch):
    write_card(tmp_path)
    former = (tmp_path / "README.md").read_text()

    def half(self, path):
        Path(path).write_text(self.content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ModelCard, "save", half)
    said = write_card(tmp_path, lr=3e-5)
    assert said.startswith("WARNING   the model card could not be written") and "No space left" in said
    assert (tmp_path / "README.md").read_text() == former
