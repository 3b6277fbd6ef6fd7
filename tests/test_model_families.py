"""Models other than Llama: trained rightly, or refused with a clear line before anything is tokenised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from conftest import NEWS, TINY_LLAMA, read_metrics, run_script_several_times, small_run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_llama2

SIZES = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, initializer_range=0.12)
LLAMA = dict(SIZES, intermediate_size=96, num_key_value_heads=2, max_position_embeddings=2048)
GPT2 = dict(n_embd=64, n_layer=3, n_head=4, initializer_range=0.12, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
FAMILIES = {
    "llama": ("Llama", LLAMA),
    "llama with tied embeddings": ("Llama", dict(LLAMA, tie_word_embeddings=True, vocab_size=1025)),
    "llama with dropout": ("Llama", dict(LLAMA, attention_dropout=0.5)),
    "gpt2": ("GPT2", dict(GPT2, vocab_size=1025)),
    "opt": ("OPT", dict(SIZES, ffn_dim=96, init_std=0.12, dropout=0)),
    "gpt_neox": ("GPTNeoX", dict(SIZES, intermediate_size=96)),
    "gemma2": ("Gemma2", dict(LLAMA, head_dim=16, sliding_window=32, query_pre_attn_scalar=16)),
    "mixtral": ("Mixtral", dict(LLAMA, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5)),
    "stablelm": ("StableLm", LLAMA),
    "bloom": ("Bloom", dict(hidden_size=64, n_layer=3, n_head=4, initializer_range=0.12)),
    "falcon": ("Falcon", dict(SIZES, alibi=False, num_kv_heads=2, new_decoder_architecture=True)),
}  # fmt: skip
SHORT = dict(block_size=128, batch_size=2, max_train_samples=6, max_eval_samples=3, max_steps=1, lr=1e-2)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict[str, Path]:
    """Returns the folder of a tiny random model of each family, with the tiny Llama's tokenizer of 1,024 pieces."""
    folders = {}
    for name, (kind, settings) in FAMILIES.items():
        torch.manual_seed(0)
        special = dict(bos_token_id=1, eos_token_id=2, pad_token_id=None)
        config = getattr(transformers, kind + "Config")(**{"vocab_size": 1024, **special, **settings})
        folders[name] = tmp_path_factory.mktemp("families") / name
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[name])
        AutoTokenizer.from_pretrained(TINY_LLAMA).save_pretrained(folders[name])
    return folders


def train(folder: Path, model: Path, **flags: object) -> tuple[list[float], float]:
    """Returns the loss of each step and the validation loss."""
    assert train_llama2.command_line(small_run(folder, model_name_or_path=model, **{**SHORT, **flags})) == 0
    steps, evaluations = read_metrics(folder)
    return [line["loss"] for line in steps], evaluations[-1]["eval_loss"]


def validation_loss(model: Path, **how: object) -> float:
    """Returns the mean token loss of the first three validation stories by transformers alone, each by itself."""
    module, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model, **how).eval(),
        AutoTokenizer.from_pretrained(TINY_LLAMA),
    )
    total = labels = 0
    for line in (NEWS / "validation.jsonl").read_text().splitlines()[:3]:
        row = json.loads(line)
        text = f"[SUMMARIZE] {row['article']} [/SUMMARIZE]\n{row['highlights']}"
        ids = [*tokenizer(text, split_special_tokens=True)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = module(torch.tensor([ids])).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
        labels += len(ids) - 1
    return total / labels


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "stablelm", "bloom", "falcon", "gemma2", "llama"])
def test_a_family_is_evaluated_as_transformers_alone_does(families, tmp_path, name):
    """The final model's validation loss, as logged, is what plain transformers computes story by story."""
    _, eval_loss = train(tmp_path, families[name], block_size=1024)
    assert eval_loss == pytest.approx(validation_loss(tmp_path, attn_implementation="eager"), rel=1e-5)


def test_a_model_that_needs_its_mask_keeps_it(families, tmp_path, capsys):
    train(tmp_path, families["bloom"])
    assert (
        "attention the model's own, with a mask and padded rows, or its tokens would see later ones"
        in capsys.readouterr().out
    )


def test_a_model_that_sees_the_future_anyway_is_refused(families, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_llama2, "attention_leaks", lambda model, parallel: True)
    assert train_llama2.command_line(small_run(tmp_path, model_name_or_path=families["llama"], **SHORT)) == 2
    assert "tokens of this model see later ones" in capsys.readouterr().err
    assert not (tmp_path / "metrics.jsonl").exists()


def test_packing_is_refused_where_packed_documents_see_each_other(families, tmp_path, capsys):
    flags = small_run(tmp_path, model_name_or_path=families["stablelm"], packing="yes", **SHORT)
    assert train_llama2.command_line(flags) == 2
    assert (
        "error: --packing yes: the packed documents of this model see each other; give --packing no"
        in capsys.readouterr().err
    )


def test_auto_packing_falls_back_to_padding(families, tmp_path, monkeypatch, capsys):
    """Where flash attention runs, auto packs; this model's layers do not pass the documents' bounds on."""
    expected = train(tmp_path / "padded", families["stablelm"], max_steps=3, packing="no")
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(train_llama2, "packs", lambda shape, cluster, config: True)
    assert train(tmp_path / "auto", families["stablelm"], max_steps=3) == (
        pytest.approx(expected[0], rel=1e-5),
        pytest.approx(expected[1], rel=1e-5),
    )
    assert "packing   no: the packed documents of this model would see each other" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox"])
def test_packed_rows_train_as_padded_ones(families, tmp_path, name):
    padded = train(tmp_path / "padded", families[name], max_steps=3, packing="no")
    AcceleratorState._reset_state(reset_partial_state=True)
    packed = train(tmp_path / "packed", families[name], max_steps=3, packing="yes")
    assert packed[0] == pytest.approx(padded[0], rel=1e-5)
    assert packed[1] == pytest.approx(padded[1], rel=1e-5)


def test_dropout_is_warned_of(families, tmp_path, capsys):
    """Which tokens are dropped depends on how they are batched."""
    train(tmp_path, families["llama with dropout"])
    assert "WARNING   the model has dropout, so its losses depend on the plan" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "OPT", "Bloom", "GPTNeoX"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_dropout_is_found_where_a_model_has_it(kind, share):
    """As a module, or as a share that is handed to a function."""
    names = ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout", "hidden_dropout")
    config = getattr(transformers, f"{kind}Config")(**dict.fromkeys(names, share), activation_dropout=0.0)
    with torch.device("meta"):
        assert train_llama2.drops_out(AutoModelForCausalLM.from_config(config)) == (share > 0)


def test_attention_dropout_rules_packing_out(families, tmp_path, capsys):
    flags = small_run(tmp_path, model_name_or_path=families["llama with dropout"], packing="yes", **SHORT)
    assert train_llama2.command_line(flags) == 2
    assert "--packing yes cannot be had with this model: it drops out attention" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["minicpm3", "deepseek_v2", "deepseek_v3"])
def test_values_narrower_than_keys_rule_packing_out(kind):
    model_config = transformers.AutoConfig.for_model(kind)
    assert "not as wide as its keys" in train_llama2.why_unpackable(model_config, "causal_attention")
    model_config.v_head_dim = model_config.qk_nope_head_dim + model_config.qk_rope_head_dim
    assert train_llama2.why_unpackable(model_config, "causal_attention") == ""


def test_auto_says_why_it_does_not_pack_on_a_gpu(families, monkeypatch, capsys):
    monkeypatch.setattr(train_llama2, "find_cluster", lambda: train_llama2.parse_cluster("1xH100-80GB"))
    model = str(families["llama with dropout"])
    config = train_llama2.Config(model_name_or_path=model, block_size=128)
    with train_llama2.enable_advanced_parallelization(config, calls_training_step=True):
        assert "packing   no: it drops out attention, which the kernel" in capsys.readouterr().out


def test_logits_that_are_more_than_a_product_are_refused(families, tmp_path, monkeypatch, capsys):
    """A model may scale its logits in its own code; the loss that skips them would be another one."""
    forward = transformers.LlamaForCausalLM.forward

    def halved(*arguments, **inputs):
        output = forward(*arguments, **inputs)
        output.logits = output.logits / 2
        return output

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", halved)
    assert train_llama2.command_line(small_run(tmp_path, model_name_or_path=families["llama"], **SHORT)) == 2
    assert "its logits are not the product of its last hidden states and its head" in capsys.readouterr().err


def test_a_routers_auxiliary_loss_is_trained_on_as_configured(families, tmp_path):
    """With one document a step, the loss is what transformers' own loss of that document is, the router's included."""
    (loss,), _ = train(tmp_path, families["mixtral"], batch_size=1, max_train_samples=1, block_size=512)
    shape = train_llama2.read_model_shape(train_llama2.Config(model_name_or_path=str(families["mixtral"])))[1]
    assert shape.computes_all_logits, "and the plan knows that its forward makes them"
    row = json.loads((NEWS / "train.jsonl").read_text().splitlines()[0])
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    text = f"[SUMMARIZE] {row['article']} [/SUMMARIZE]\n{row['highlights']}"
    ids = torch.tensor([[*tokenizer(text, split_special_tokens=True)["input_ids"], tokenizer.eos_token_id]])
    output = AutoModelForCausalLM.from_pretrained(families["mixtral"])(input_ids=ids, labels=ids)
    assert output.aux_loss > 0
    assert loss == pytest.approx(output.loss.item(), rel=1e-5)


TIED = ["llama with tied embeddings", "gpt2"]
EMBEDDINGS = {"lm_head.weight", "model.embed_tokens.weight", "transformer.wte.weight"}
WAYS = {
    2: [dict(parallelism="fsdp"), dict(parallelism="fsdp", packing="yes", activation_checkpointing="every-2")],
    3: [dict(parallelism="fsdp", micro_batch_size=1)],
}


@pytest.fixture(scope="module")
def tied(families, tmp_path_factory) -> dict[str, list[Path]]:
    """Returns the folders of runs of 4 clipped steps, one process first, of models with 1,025 tied embeddings."""
    base, folders = tmp_path_factory.mktemp("tied"), {}
    common = dict(block_size=128, batch_size=7, max_steps=4, lr=1e-2, max_grad_norm=0.1)
    for name in TIED:
        folders[name] = [base / name / "one process"]
        AcceleratorState._reset_state(reset_partial_state=True)
        assert train_llama2.command_line(small_run(folders[name][0], model_name_or_path=families[name], **common)) == 0
    for processes, ways in WAYS.items():
        runs = []
        for name in TIED:
            for number, way in enumerate(ways):
                folders[name].append(base / name / f"{processes} x {number}")
                runs.append(small_run(folders[name][-1], model_name_or_path=families[name], **common, **way))
        for run in run_script_several_times(runs, processes):
            assert run.returncode == 0, run.stderr
    return folders


@pytest.mark.parametrize("name", TIED)
def test_tied_embeddings_train_as_one_process_whatever_the_ranks_divide(tied, name):
    (expected, (expected_evaluation,)), *others = map(read_metrics, tied[name])
    assert len(expected) == 4 and all(line["grad_norm"] > 0.1 for line in expected)
    assert len(others) == 3
    for steps, (evaluation,) in others:
        for value in ("loss", "grad_norm"):
            assert [line[value] for line in steps] == pytest.approx([line[value] for line in expected], rel=1e-5)
        assert evaluation["eval_loss"] == pytest.approx(expected_evaluation["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("name", TIED)
def test_the_saved_tied_model_is_the_evaluated_one(tied, name):
    assert all(len(load_file(folder / "model.safetensors").keys() & EMBEDDINGS) == 1 for folder in tied[name])
    whole = [AutoModelForCausalLM.from_pretrained(folder) for folder in tied[name]]
    weights = [model.get_output_embeddings().weight for model in whole]
    assert all(model.get_input_embeddings().weight is weight for model, weight in zip(whole, weights, strict=True))
    for weight in weights[1:]:
        torch.testing.assert_close(weight, weights[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize("way", [dict(activation_checkpointing="every-2"), dict(compile="yes")], ids=str)
def test_layers_of_any_family_are_recomputed_and_compiled(families, tmp_path, monkeypatch, name, way):
    """Without Inductor, whose C++ takes a minute. The layers are traced all the same, and those of one family
    differentiated by the compiler, too, which takes half of the time.
    """
    compiled, compile_module = [], torch.nn.Module.compile
    backend = "aot_eager" if name == "opt" else "eager"
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda module, **how: (compiled.append(module), compile_module(module, backend=backend, **how)),
    )
    expected = train(tmp_path / "plain", families[name], max_steps=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train(tmp_path / "way", families[name], max_steps=2, **way)[0] == pytest.approx(expected[0], rel=1e-5)
    assert len(compiled) == (3 if "compile" in way else 0)


def test_gemma_2_writes_summaries(families, tmp_path):
    pytest.importorskip("rouge_score", reason="rouge-score is not installed")
    train(tmp_path, families["gemma2"], rouge_samples=2, max_summary_tokens=4)
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 2


def without_safetensors(folder: Path) -> str:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return "holds no safetensors weights; convert them"


def without_a_matrix(folder: Path) -> str:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return "(they lack model.layers.1.mlp.up_proj.weight)"


def with_a_smaller_matrix(folder: Path) -> str:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"][:50].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return "(model.layers.1.mlp.up_proj.weight is 50 x 64 in the files, and 96 x 64 by config.json)"


def test_another_script_is_refused_weights_that_do_not_fit(families, tmp_path):
    """transformers would train on with what is missing at random."""
    AutoModelForCausalLM.from_pretrained(families["llama"]).save_pretrained(tmp_path)
    problem = without_a_matrix(tmp_path)
    config = train_llama2.Config(model_name_or_path=str(tmp_path), block_size=64)
    with pytest.raises(train_llama2.UserError) as refused, train_llama2.enable_advanced_parallelization(config) as ours:
        train_llama2.load_model(ours)
    assert problem in str(refused.value)


@pytest.mark.parametrize("damage", [without_safetensors, without_a_matrix, with_a_smaller_matrix])
def test_weights_that_do_not_fit_are_refused_before_tokenising(families, tmp_path, monkeypatch, capfd, damage):
    model = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(families["llama"]).save_pretrained(model)
    AutoTokenizer.from_pretrained(TINY_LLAMA).save_pretrained(model)
    problem = damage(model)
    monkeypatch.setattr(train_llama2, "load_data", None)
    capfd.readouterr()
    assert train_llama2.command_line(small_run(tmp_path / "run", model_name_or_path=model, **SHORT)) == 2
    complained = capfd.readouterr().err
    assert problem in complained
    assert (
        len([line for line in complained.splitlines() if "REPORT" in line or "MISMATCH" in line or "MISSING" in line])
        == 0
    )
