"""Make the tiny tokenizer and the tiny Llama that the tests train on.

The stories in ``news/*.jsonl`` are source files; this script reads them and writes, next to them or
under ``--out``, one folder that ``AutoTokenizer`` and ``AutoModelForCausalLM`` load without a network::

    tiny_llama/    config.json  generation_config.json  model.safetensors
                   tokenizer.json  tokenizer_config.json

The tokenizer behaves as Llama-2's does, with 1024 pieces instead of 32000: ``<unk>``, ``<s>`` and ``</s>``
are 0, 1 and 2, the bytes are 3 to 258, then come single characters and merges.  BOS is added, EOS is not,
and there is no pad token.  The model has Llama-2's architecture, seeded random weights, and is stored in
float16.  Every run with the same library versions gives the same bytes.

Run:  python tests/data/make_data.py
"""

import argparse
import json
import re
import string
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaTokenizer

HERE = Path(__file__).resolve().parent
VOCAB_SIZE = 1024
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACE = "\u2581"  # the mark that stands for a space in a piece
PROMPT = "[SUMMARIZE] {article} [/SUMMARIZE]\n{highlights}"

# What a merge may span, much as in SentencePiece: one word, or one run of punctuation, each with the space
# before it.  Digits stay single, and no piece crosses a newline.
WORD = re.compile(rf"{SPACE}?[^\W\d_]+|\d|{SPACE}?[^\w{SPACE}\n]+")


def load_stories(folder=HERE / "news"):
    """The stories of both splits, as dicts with ``article``, ``highlights`` and ``id``."""
    files = [Path(folder) / "train.jsonl", Path(folder) / "validation.jsonl"]
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def build_tokenizer(stories):
    """Train a Llama-style BPE tokenizer on the stories, each in its prompt."""
    texts = [PROMPT.format(**story) for story in stories]

    # The alphabet is printable ASCII and every other character that two stories share.  The rest, and
    # the newline, get no piece, so that they are spelled in bytes.
    spread = Counter(char for text in texts for char in set(text))
    alphabet = {SPACE, *string.ascii_letters, *string.digits, *string.punctuation}
    alphabet |= {char for char, count in spread.items() if count > 1 and char not in " \n"}

    words = []
    for text in texts:
        marked = SPACE + text.replace(" ", SPACE)
        words += WORD.findall("".join(char if char in alphabet else "\n" for char in marked))

    bpe = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS + BYTE_PIECES,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    bpe.train_from_iterator(words, trainer)
    trained = json.loads(bpe.to_str())["model"]

    made_by_merge = {"".join(pair) for pair in trained["merges"]}
    if len(trained["vocab"]) != VOCAB_SIZE or made_by_merge & set(SPECIAL_TOKENS + BYTE_PIECES):
        raise ValueError("the stories do not give a vocabulary of the expected form")

    return LlamaTokenizer(
        vocab=trained["vocab"],
        merges=[tuple(pair) for pair in trained["merges"]],
        add_bos_token=True,
        add_eos_token=False,
        padding_side="right",
    )


def build_model(config_overrides=None):
    """A small Llama with random weights from seed 0; the global random state is left as it was."""
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    config = LlamaConfig(**{**settings, **(config_overrides or {})})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = LlamaForCausalLM(config)
        seeded = torch.Generator().manual_seed(0)
        for weight in model.parameters():
            # Normal draws differ in the last bit between kinds of CPU.  Whole multiples of 2**-15 do not,
            # and float16 holds them exactly.  Vectors are the norms' gains, which stay at one.
            if weight.dim() > 1:
                weight.copy_(torch.randint(-1024, 1025, weight.shape, generator=seeded) / 2**15)
    ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    model.generation_config = GenerationConfig(**ends)
    return model.to(torch.float16)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE, help="parent of tiny_llama/ (default: %(default)s)")
    folder = parser.parse_args().out / "tiny_llama"

    build_tokenizer(load_stories()).save_pretrained(folder)
    build_model().save_pretrained(folder)
    for file in sorted(folder.iterdir()):
        print(f"{file.stat().st_size:>9,} bytes  {file}")


if __name__ == "__main__":
    main()
