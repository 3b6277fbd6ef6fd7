"""From stories to batches: masks, truncation that keeps the summary, dealing, file formats, the cache."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import NEWS, RANKS, TINY_LLAMA, run_script_several_times, small_run
from transformers import AutoTokenizer

import train_llama2
from train_llama2 import (
    Config,
    GlobalBatch,
    Parallel,
    create_mask,
    deal,
    deal_documents,
    enable_advanced_parallelization,
    encode_batch,
    epoch_batches,
    evaluation_batches,
    global_batch,
    load_data,
    mask_pads,
    pack_documents,
    training_batches,
)

BOS, EOS, UNK, PAD = 1, 2, 0, 9
# The tiny tokenizer's pieces of "[SUMMARIZE]" after BOS, and of " [/SUMMARIZE]\n": ▁[ SUMMARIZE ]; ▁[/ SUMMARIZE ] \n.
OPENING, CLOSING = [BOS, 419, 423, 319], [469, 423, 319, 13]
STORIES = [json.loads(line) for line in (NEWS / "train.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_LLAMA)


@pytest.fixture(scope="module")
def parallel():
    """One process, micro-batches of two documents."""
    with enable_advanced_parallelization(Config(str(TINY_LLAMA), micro_batch_size=2, block_size=64)) as parallel:
        yield parallel


def with_pad(pad: str | None):
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    if pad:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(PAD) if pad == "its own" else pad
    return tokenizer


def encode(tokenizer, article: str | None, summary: str | None, block_size: int = 512) -> dict:
    """Returns the document of one story; {} where it was dropped."""
    columns = encode_batch([article], [summary], tokenizer, block_size)
    return {name: values[0] for name, values in columns.items() if values}


def whole(tokenizer, article: str, summary: str) -> list[int]:
    """The untruncated document, tokenised without the code under test."""
    text = f"[SUMMARIZE] {article} [/SUMMARIZE]\n{summary}"
    return [*tokenizer(text, split_special_tokens=True)["input_ids"], EOS]


def words(count: int) -> str:
    """A text of so many tokens, as each is a word of one letter."""
    return " ".join("abcdef"[index % 6] for index in range(count))


def write(folder: Path, **files: list[dict]) -> Path:
    folder.mkdir(parents=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def pair(article: str | None, summary: str | None) -> dict:
    return {"article": article, "highlights": summary}


def on_rank(parallel: Parallel, rank: int, ranks: int) -> Parallel:
    """Returns `parallel` as one of several DDP ranks sees it."""
    accelerator = SimpleNamespace(process_index=rank, device=parallel.device)
    return dataclasses.replace(
        parallel, accelerator=accelerator, plan=dataclasses.replace(parallel.plan, dp_replicate_size=ranks)
    )


def settings(data: Path | tuple[str, ...], **flags) -> Config:
    name = tuple(map(str, data)) if isinstance(data, tuple) else str(data)
    return Config(str(TINY_LLAMA), name, **{"block_size": 64, **flags})


# ----------------------------------------------------------------------------------------------------------------
# Masks
# ----------------------------------------------------------------------------------------------------------------

MASKS = {
    # pad == eos: the first of the trailing ones is the document's own end
    "no pad token": (None, [BOS, 5, 6, EOS, EOS, EOS], [1, 1, 1, 1, 0, 0]),
    "no pad token, nothing padded": (None, [BOS, 5, 6, EOS], [1, 1, 1, 1]),
    "no pad token, no end": (None, [BOS, 5, 6, 7], [1, 1, 1, 1]),
    "an end inside the document": (None, [BOS, 5, EOS, 6, EOS, EOS], [1, 1, 1, 1, 1, 0]),
    "two ends inside the document": (None, [BOS, EOS, EOS, 6, EOS], [1, 1, 1, 1, 1]),
    "padding alone": (None, [EOS, EOS, EOS], [0, 0, 0]),
    # pad == unk, as is usual with Llama-2
    "pad is unk, which is also in the text": ("<unk>", [BOS, UNK, 5, UNK, 6, EOS, UNK, UNK], [1, 1, 1, 1, 1, 1, 0, 0]),
    "pad is unk, padding alone": ("<unk>", [UNK, UNK], [0, 0]),
    "pad is unk, ends in the text": ("<unk>", [BOS, EOS, 5, EOS, EOS], [1, 1, 1, 1, 1]),
    # a pad token of its own
    "pad of its own": ("its own", [BOS, 5, EOS, PAD, PAD], [1, 1, 1, 0, 0]),
    "pad of its own inside the document": ("its own", [BOS, PAD, 5, EOS, PAD], [1, 1, 1, 1, 0]),
    "pad of its own, nothing padded": ("its own", [BOS, 5, EOS], [1, 1, 1]),
}


@pytest.mark.parametrize(("pad", "ids", "mask"), MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("rows", [None, 1, 2], ids=["1-D", "one row", "two rows"])
def test_mask_and_labels_leave_out_the_padding_alone(pad, ids, mask, rows):
    tokenizer, inputs = with_pad(pad), torch.tensor(ids)
    labels = [token if real else -100 for token, real in zip(ids, mask, strict=True)]
    if rows:
        inputs, mask, labels = inputs.repeat(rows, 1), [mask] * rows, [labels] * rows
    before = inputs.clone()
    assert create_mask(inputs, tokenizer).tolist() == mask
    assert mask_pads(inputs, tokenizer).tolist() == labels
    assert create_mask(inputs, tokenizer).dtype == mask_pads(inputs, tokenizer).dtype == torch.int64
    assert torch.equal(inputs, before)


def test_each_row_of_a_batch_has_its_own_padding():
    inputs = torch.tensor([[BOS, 5, EOS, EOS], [BOS, 5, 6, EOS], [EOS, EOS, EOS, EOS]])
    assert create_mask(inputs, with_pad(None)).tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert mask_pads(inputs, with_pad(None), ignore_index=-1)[0].tolist() == [BOS, 5, EOS, -1]


# ----------------------------------------------------------------------------------------------------------------
# Documents
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("story", [STORIES[0], STORIES[1]], ids=["long", "short"])
def test_a_document_is_prompt_summary_and_end(tokenizer, story):
    document = encode(tokenizer, story["article"], story["highlights"])
    ids, start = document["input_ids"], document["prompt_length"]
    assert tokenizer.decode(ids) == f"<s> [SUMMARIZE] {story['article']} [/SUMMARIZE]\n{story['highlights']}</s>"
    assert ids[start - 4 : start] == CLOSING and ids[:4] == OPENING and ids[-1] == EOS
    assert (document["length"], document["tokens_cut"], document["summary_cut"]) == (len(ids), 0, False)


@pytest.mark.parametrize(
    ("article", "summary"), [("</s> a <s> b <unk> </s>", "c"), ("a", "</s> b </s>"), ("<s></s>", "<s>c</s>")]
)
def test_control_tokens_typed_in_a_text_are_text(tokenizer, article, summary):
    ids = encode(tokenizer, article, summary)["input_ids"]
    assert ids[0] == BOS and ids[-1] == EOS
    assert not {BOS, EOS, UNK} & set(ids[1:-1])
    assert tokenizer.decode(ids[1:-1]) == f"[SUMMARIZE] {article} [/SUMMARIZE]\n{summary}"


def test_a_prompt_mark_in_an_article_starts_no_summary(tokenizer):
    document = encode(tokenizer, "a [/SUMMARIZE]\nb [SUMMARIZE] c", "d e", block_size=16)
    ids = document["input_ids"]
    assert len(ids) == 16 and document["prompt_length"] == 13 and ids[9:13] == CLOSING
    assert tokenizer.decode(ids[13:]) == "d e</s>"


@pytest.mark.parametrize("block_size", [150, 200, 400])
def test_a_long_document_loses_only_the_end_of_its_article(tokenizer, block_size):
    cut = 0
    for story in STORIES:
        full = whole(tokenizer, story["article"], story["highlights"])
        document = encode(tokenizer, story["article"], story["highlights"], block_size)
        ids, excess = document["input_ids"], max(0, len(full) - block_size)
        mark = next(at for at in range(len(full)) if full[at : at + 4] == CLOSING)
        assert ids == full[: mark - excess] + full[mark:]
        assert len(ids) == document["length"] == min(len(full), block_size)
        assert document["prompt_length"] == mark - excess + 4
        assert (document["tokens_cut"], document["summary_cut"]) == (excess, False)
        cut += excess > 0
    assert cut >= 3


def test_the_block_is_filled_to_its_last_token(tokenizer):
    """11 tokens of article and 3 of summary, 4 and 4 of prompt, EOS: 23."""
    article, summary = words(11), words(3)
    assert len(whole(tokenizer, article, summary)) == 23
    fits = encode(tokenizer, article, summary, block_size=23)
    assert fits["input_ids"] == whole(tokenizer, article, summary) and fits["tokens_cut"] == 0
    over = encode(tokenizer, article, summary, block_size=22)
    assert over["input_ids"] == whole(tokenizer, words(10), summary) and over["tokens_cut"] == 1


@pytest.mark.parametrize("block_size", range(40, 49))
def test_a_cut_inside_a_character_leaves_the_rest_alone(tokenizer, block_size):
    """Each fox is 4 byte tokens; the cut falls before, inside and after them."""
    article, summary = "a " + "🦊é漢" * 8, "né 🦊"
    full, ids = whole(tokenizer, article, summary), encode(tokenizer, article, summary, block_size)["input_ids"]
    tail = full.index(13) + 1 - 4
    assert full[tail : tail + 4] == CLOSING and len(full) > 49
    assert ids == full[: block_size - len(full) + tail] + full[tail:]
    assert tokenizer.decode(ids).endswith(f" [/SUMMARIZE]\n{summary}</s>")


@pytest.mark.parametrize(
    ("block_size", "article_kept", "summary_kept"),
    [(20, 1, 10), (19, 0, 10), (18, 0, 9), (12, 0, 3)],
    ids=["one word of the article fits", "the summary just fits", "it loses its last word", "the smallest block"],
)
def test_a_summary_too_long_by_itself_keeps_its_beginning(tokenizer, block_size, article_kept, summary_kept):
    document = encode(tokenizer, words(5), words(10), block_size)
    opening = whole(tokenizer, words(5), words(10))[: 4 + article_kept]
    assert document["input_ids"] == opening + whole(tokenizer, "a", words(summary_kept))[5:]
    assert document["input_ids"][-1] == EOS and document["length"] == block_size
    assert document["tokens_cut"] == 5 - article_kept
    assert document["summary_cut"] == (summary_kept < 10)
    assert document["prompt_length"] == 8 + article_kept


@pytest.mark.parametrize("nothing", [None, "", " \n\t"])
def test_pairs_without_article_or_summary_are_dropped(tokenizer, nothing):
    columns = encode_batch([nothing, "a", "b"], ["x", nothing, "y"], tokenizer, 64)
    assert columns["input_ids"] == [whole(tokenizer, "b", "y")]
    assert {len(values) for values in columns.values()} == {1}
    assert not any(encode_batch([nothing], ["x"], tokenizer, 64).values())


# ----------------------------------------------------------------------------------------------------------------
# Batches
# ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_documents(tmp_path_factory):
    """13, 22 and 15 tokens."""
    rows = [pair(words(3), "d"), pair(words(11), "a b"), pair(words(2), words(4))]
    return write(tmp_path_factory.mktemp("three") / "documents", train=rows, validation=rows)


def load(config: Config, tokenizer, parallel: Parallel) -> tuple:
    """Returns the training and the validation documents that these settings describe."""
    return load_data(tokenizer, dataclasses.replace(parallel, config=config))[:2]


def batches_of(data: Path, batches: list[list[int]], tokenizer, parallel, rank: int = 0, **flags) -> list[GlobalBatch]:
    """Returns what a rank gets of these batches, each a list of positions in the training documents."""
    documents, _ = load(settings(data, **flags), tokenizer, parallel)
    if parallel.data_parallel_size > 1:
        parallel = on_rank(parallel, rank, parallel.data_parallel_size)
    return [global_batch(documents, np.array(batch), parallel) for batch in batches]


def assert_head_sees_the_labels(micro: dict[str, torch.Tensor]) -> None:
    """Each place that predicts a label, once, counted through the flattened rows, with that label."""
    width, expected = micro["labels"].shape[1], []
    for row, labels in enumerate(micro["labels"].tolist()):
        expected += [(row * width + at - 1, label) for at, label in enumerate(labels) if at and label != -100]
    assert list(zip(micro["predict_at"].tolist(), micro["targets"].tolist(), strict=True)) == expected


@pytest.mark.parametrize(("loss_on", "label_tokens"), [("all", 12 + 21 + 14), ("summary", 2 + 3 + 5)])
def test_a_global_batch_holds_each_document_once_with_its_labels(
    three_documents, tokenizer, parallel, loss_on, label_tokens
):
    batch = batches_of(three_documents, [[2, 0, 1]], tokenizer, parallel, loss_on=loss_on)[0]
    assert (batch.tokens, batch.label_tokens) == (13 + 22 + 15, label_tokens)
    assert batch.squared_lengths == 13**2 + 22**2 + 15**2
    assert [list(micro["input_ids"].shape) for micro in batch.micro_batches] == [[2, 24], [1, 16]]  # 22, 15; 13
    predicted = [micro["labels"][:, 1:] != -100 for micro in batch.micro_batches]
    assert sum(part.sum().item() for part in predicted) == label_tokens
    for micro in batch.micro_batches:
        assert_head_sees_the_labels(micro)
    texts = []
    for micro in batch.micro_batches:
        assert {tensor.dtype for tensor in micro.values()} == {torch.int64}
        assert micro["attention_mask"].sum().item() == (micro["input_ids"] != EOS).sum() + len(micro["input_ids"])
        texts += [tokenizer.decode(row[row != -100]) for row in micro["labels"]]
    articles = [(words(11), "a b"), (words(2), words(4)), (words(3), "d")]
    if loss_on == "summary":
        assert texts == [f"{summary}</s>" for _, summary in articles]
    else:
        assert texts == [f"<s> [SUMMARIZE] {article} [/SUMMARIZE]\n{summary}</s>" for article, summary in articles]


def test_rows_are_never_padded_beyond_the_block(three_documents, tokenizer, parallel):
    """22 tokens would be padded to 24, and 15 to 16."""
    batches = batches_of(three_documents, [[0, 1], [2]], tokenizer, parallel, block_size=22)
    assert [list(batch.micro_batches[0]["input_ids"].shape) for batch in batches] == [[2, 22], [1, 16]]


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files as Linux does")
def test_many_micro_batches_take_neither_open_files_nor_child_processes(three_documents, tokenizer, parallel):
    """4 global batches of 200 micro-batches, with 10 open files to spare. A usual limit is 1,024 in all."""
    documents, _ = load(settings(three_documents), tokenizer, parallel)
    in_use, limits = max(map(int, os.listdir("/proc/self/fd"))), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 10, limits[1]))
    try:
        batches = [global_batch(documents, np.zeros(400, int), parallel) for _ in range(4)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [len(batch.micro_batches) for batch in batches] == [200] * 4
    assert not multiprocessing.active_children()


def test_a_rank_without_documents_makes_a_row_without_labels(three_documents, tokenizer, parallel):
    two_ranks = dataclasses.replace(parallel, plan=dataclasses.replace(parallel.plan, dp_replicate_size=2))
    [batch] = batches_of(three_documents, [[0]], tokenizer, two_ranks, rank=1)
    [micro] = batch.micro_batches
    assert (micro["labels"] == -100).all() and (micro["attention_mask"] == 1).all()
    assert (micro["predict_at"].tolist(), micro["targets"].tolist()) == ([0], [-100])  # one, and it is ignored
    assert (batch.tokens, batch.label_tokens) == (13, 12)  # the counts are those of all ranks


def test_documents_are_dealt_once_each_and_evenly():
    """On 300 random shapes. The ranks do equal numbers of forwards, and no two differ by more than one document."""
    draw = random.Random(0)
    for _ in range(300):
        documents, ranks, micro = draw.randint(1, 90), draw.randint(1, 17), draw.randint(1, 9)
        lengths = np.array([draw.randint(12, 999) for _ in range(documents)])
        dealt = deal_documents(lengths, ranks, micro)
        shape = f"{documents} documents, {ranks} ranks, micro-batch {micro}"
        assert sorted(np.concatenate([part for step in dealt for part in step])) == list(range(documents)), shape
        assert {len(step) for step in dealt} == {ranks}, shape
        assert len(dealt) == math.ceil(math.ceil(documents / ranks) / micro), shape
        sizes = [len(part) for step in dealt for part in step]
        assert max(sizes) <= micro and max(sizes) - min(sizes) <= 1, f"{shape}: {sizes}"


def test_documents_of_like_length_share_a_micro_batch():
    dealt = deal_documents(np.array([10, 80, 20, 70, 30, 60, 40, 50]), data_parallel_size=2, micro_batch_size=2)
    assert [[part.tolist() for part in step] for step in dealt] == [[[1, 5], [3, 7]], [[6, 2], [4, 0]]]


# ----------------------------------------------------------------------------------------------------------------
# Packing
# ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packing(parallel):
    """One process, rows of up to 2 x `block_size` tokens."""
    return dataclasses.replace(parallel, plan=dataclasses.replace(parallel.plan, packing=True))


@pytest.mark.parametrize(("loss_on", "label_tokens"), [("all", 12 + 21 + 14), ("summary", 2 + 3 + 5)])
def test_a_packed_row_holds_whole_documents_end_to_end(three_documents, tokenizer, packing, loss_on, label_tokens):
    batch = batches_of(three_documents, [[2, 0, 1]], tokenizer, packing, loss_on=loss_on)[0]
    [micro] = batch.micro_batches
    longest_first = [(words(11), "a b"), (words(2), words(4)), (words(3), "d")]
    documents = [whole(tokenizer, *story) for story in longest_first]
    assert micro["input_ids"].tolist() == [[*itertools.chain(*documents)]]
    assert micro["position_ids"].tolist() == [[*range(22), *range(15), *range(13)]]
    assert micro["cu_seq_lens"].tolist() == [0, 22, 37, 50] and micro["cu_seq_lens"].dtype == torch.int32
    assert "attention_mask" not in micro
    summaries = [3, 5, 2]  # with the end
    first_labels = (
        [1, 1, 1] if loss_on == "all" else [len(ids) - n for ids, n in zip(documents, summaries, strict=True)]
    )
    labels = [[-100] * first + ids[first:] for ids, first in zip(documents, first_labels, strict=True)]
    assert micro["labels"].tolist() == [[*itertools.chain(*labels)]]
    assert_head_sees_the_labels(micro)
    assert len(micro["targets"]) == label_tokens == batch.label_tokens
    assert (batch.tokens, batch.squared_lengths) == (50, 13**2 + 22**2 + 15**2)


def test_a_row_is_closed_before_it_exceeds_its_budget(three_documents, tokenizer, packing):
    """Rows of 2 x 24 tokens: 22, 15 and 13 are 50. And 2 x 25 hold them exactly."""
    batches = batches_of(three_documents, [[0, 1, 2]], tokenizer, packing, block_size=24)
    assert [micro["cu_seq_lens"].tolist() for micro in batches[0].micro_batches] == [[0, 15, 28], [0, 22]]
    batches = batches_of(three_documents, [[0, 1, 2]], tokenizer, packing, block_size=25)
    assert [micro["cu_seq_lens"].tolist() for micro in batches[0].micro_batches] == [[0, 22, 37, 50]]


def test_a_rank_without_documents_packs_a_row_without_labels(three_documents, tokenizer, packing):
    """One document on three ranks."""
    three_ranks = dataclasses.replace(packing, plan=dataclasses.replace(packing.plan, dp_replicate_size=3))
    labels = []
    for rank in range(3):
        [batch] = batches_of(three_documents, [[1]], tokenizer, three_ranks, rank=rank)
        [micro] = batch.micro_batches
        labels.append(int((micro["targets"] != -100).sum()))
        if not labels[-1]:
            assert (micro["labels"] == -100).all()
            assert micro["cu_seq_lens"].tolist() == [0, micro["input_ids"].numel()]
            assert (micro["predict_at"].tolist(), micro["targets"].tolist()) == ([0], [-100])
    assert labels == [21, 0, 0]


def test_documents_are_packed_once_each_into_rows_that_fit():
    """On 300 random shapes. Every rank makes as many forwards, and no more than the sizes of the documents force."""
    draw = random.Random(0)
    for _ in range(300):
        documents, ranks, row = draw.randint(1, 90), draw.randint(1, 17), draw.choice([1, 2, 5]) * 512
        skew = draw.choice(
            [lambda: 512, lambda: draw.randint(12, 512), lambda: min(512, int(12 * draw.paretovariate(0.7)))]
        )
        lengths = np.array([skew() for _ in range(documents)])
        packed = pack_documents(lengths, ranks, row)
        shape = f"{documents} documents of {lengths.sum()} tokens, {ranks} ranks, rows of {row}"
        assert sorted(np.concatenate([part for step in packed for part in step])) == list(range(documents)), shape
        assert {len(step) for step in packed} == {ranks}, shape
        assert max(lengths[part].sum() for step in packed for part in step) <= row, shape
        # One step less would have overfilled a row, so every row of it would hold more than `row - longest`.
        assert lengths.sum() > (len(packed) - 1) * ranks * (row - lengths.max()), shape
        again = pack_documents(lengths.copy(), ranks, row)
        assert [[part.tolist() for part in step] for step in again] == [
            [part.tolist() for part in step] for step in packed
        ]


@pytest.mark.parametrize(
    ("lengths", "ranks", "row", "packed"),
    [
        ([9, 9, 9], 1, 20, [[[0, 2]], [[1]]]),  # 27 tokens in rows of 20
        ([20, 1, 1, 1], 1, 20, [[[0]], [[1, 2, 3]]]),  # one that fills its row
        ([20, 1, 1, 1], 2, 20, [[[0], [1, 2, 3]]]),
        ([11, 11, 11], 1, 22, [[[0, 2]], [[1]]]),
        ([12, 11, 10, 9], 1, 21, [[[1, 2]], [[0, 3]]]),  # 42 tokens fill two rows to the last
        ([13, 11, 10, 9], 1, 21, [[[2, 3]], [[0]], [[1]]]),  # 43 do not
        ([7], 4, 20, [[[0], [], [], []]]),  # fewer documents than ranks
        ([7, 8, 9], 2, 20, [[[1, 0], [2]]]),
    ],
)
def test_packing_by_hand(lengths, ranks, row, packed):
    assert [[part.tolist() for part in step] for step in pack_documents(np.array(lengths), ranks, row)] == packed


def imbalance(lengths: np.ndarray, ranks: int, plan, block_size: int) -> float:
    """Returns what the slowest rank of each micro-step computes, over what the mean rank does; padding included."""
    slowest = mean = 0.0
    for step in deal(lengths, ranks, plan, block_size):
        loads = [lengths[p].sum() if plan.packing else len(p) * lengths[p].max() for p in step]
        slowest, mean = slowest + max(loads), mean + sum(loads) / ranks
    return slowest / mean


@pytest.mark.parametrize("ranks", [2, 8])
def test_packed_ranks_carry_even_loads_however_skewed_the_lengths(packing, ranks):
    """Lengths like those of CNN/DailyMail: log-normal, mean about 1,050, cut at 2,048; 20 batches of 64."""
    draw = np.random.default_rng(0)
    batches = np.clip(draw.lognormal(6.85, 0.5, (20, 64)), 60, 2048).astype(int)
    worst = max(imbalance(lengths, ranks, packing.plan, 2048) for lengths in batches)
    assert worst < 1.05


def test_ranks_agree_on_who_has_what_of_a_packed_batch(three_documents, tokenizer, packing):
    two_ranks = dataclasses.replace(packing, plan=dataclasses.replace(packing.plan, dp_replicate_size=2))
    bounds = []
    for rank in range(2):
        [batch] = batches_of(three_documents, [[0, 1, 2]], tokenizer, two_ranks, rank=rank, block_size=24)
        bounds.append([micro["cu_seq_lens"].tolist() for micro in batch.micro_batches])
    assert bounds == [[[0, 15, 28]], [[0, 22]]]


def test_a_packed_evaluation_has_each_document_once(packing):
    lengths = np.random.default_rng(0).integers(12, 64, 101)
    batches = evaluation_batches(SimpleNamespace(lengths=lengths), packing)
    assert sorted(np.concatenate(batches)) == list(range(101))


def test_an_epoch_has_each_document_once_and_a_ragged_end():
    batches = epoch_batches(range(34), epoch=0, config=Config(batch_size=8))
    assert [len(batch) for batch in batches] == [8, 8, 8, 8, 2]
    assert sorted(np.concatenate(batches)) == list(range(34))


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(epoch, **flags):
        return np.concatenate(epoch_batches(range(34), epoch, Config(batch_size=8, **flags))).tolist()

    np.random.seed(1)
    first = order(0)
    np.random.seed(2)
    torch.manual_seed(3)
    elsewhere = order(0, lr=1.0, block_size=77, parallelism="fsdp", micro_batch_size=3, num_train_epochs=9)
    assert elsewhere == first
    assert np.concatenate(epoch_batches(range(34), 0, Config(batch_size=5))).tolist() == first
    different = [first, order(1), order(2), order(0, seed=43), order(1, seed=41), list(range(34))]
    assert len({tuple(each) for each in different}) == 6


def test_a_run_resumed_mid_epoch_reads_only_what_is_left(monkeypatch):
    """34 documents by 8 are 5 steps an epoch; from step 6 to 12 of 13: 4 of the second epoch and 3 of the third."""
    read, config = [], Config(batch_size=8)
    monkeypatch.setattr(train_llama2, "global_batch", lambda documents, positions, parallel: read.append(positions))
    steps = training_batches(range(34), 6, 13, SimpleNamespace(config=config))
    assert not read, "a batch is made when its step asks for it"
    assert len(list(steps)) == 7
    expected = epoch_batches(range(34), 1, config)[1:] + epoch_batches(range(34), 2, config)[:3]
    assert [positions.tolist() for positions in read] == [positions.tolist() for positions in expected]


# ----------------------------------------------------------------------------------------------------------------
# The audit
# ----------------------------------------------------------------------------------------------------------------


def test_the_audit_counts_what_encoding_did(tmp_path, tokenizer, parallel, capsys):
    """In a block of 24: 13 tokens; 31, cut by 7; 44, cut by its 5 of article and then in its summary; 11.

    Micro-batches of two: 24 with 24 in rows of 24, 13 with 11 in rows of 16; 8 of 80 places are padding.
    """
    rows = [(words(3), "d"), (words(20), "a b"), ("", "x"), (words(5), words(30)), ("x", None), ("a", "b"), (" ", "x")]
    data = write(tmp_path / "data", train=[pair(*row) for row in rows], validation=[pair("a", "b")])
    train, validation = load(settings(data, block_size=24, batch_size=4), tokenizer, parallel)
    said = [line for line in capsys.readouterr().out.splitlines() if re.match(r"data .* documents, ", line)]
    assert said[0] == (
        "data      train: 4 documents, 72 tokens (mean 18); 2 articles cut by 12 tokens; 1 summaries cut; "
        "3 empty documents dropped; 10.0% padding; the busiest rank computes 0.0% more than the mean"
    )
    assert "validation: 1 documents, 11 tokens (mean 11); 0 articles cut by 0 tokens; 0 summaries cut" in said[1]
    assert train.lengths.tolist() == [13, 24, 24, 11] and len(validation) == 1


def test_the_audit_of_packed_rows_tells_padding_and_balance(tmp_path, tokenizer, packing, capsys):
    """13 and 22 tokens on two ranks: the busiest has 22, 25.7% more than the mean of 17.5."""
    two_ranks = dataclasses.replace(packing, plan=dataclasses.replace(packing.plan, dp_replicate_size=2))
    rows = [pair(words(3), "d"), pair(words(11), "a b")]
    load(settings(write(tmp_path / "data", train=rows, validation=rows)), tokenizer, two_ranks)
    said = re.findall(r"([\d.]+)% padding; the busiest rank computes ([\d.]+)% more", capsys.readouterr().out)
    assert said == [("0.0", "25.7")] * 2


def test_the_audit_counts_padding_as_rows_are_padded(tmp_path, tokenizer, parallel, capsys):
    """A block of 22 holds rows of 22, not of 24: two documents that fill it have no padding."""
    rows = [pair(words(11), "a b")] * 2
    data = write(tmp_path / "data", train=rows, validation=rows)
    load(settings(data, block_size=22), tokenizer, parallel)
    assert re.findall(r"([\d.]+)% padding", capsys.readouterr().out) == ["0.0", "0.0"]


# ----------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------

TRICKY = [
    pair('a, "b"; it\'s\tc\n\n[d]', "one\ntwo"),
    pair("né 🦊 漢字 </s>", "x, y"),
    pair("# 1,5 %", '"quoted"'),
    *(pair(words(n), words(n // 3)) for n in range(5, 12)),
]
HELD_OUT = [pair("v " + words(4), "w"), pair("u", '"v", w')]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_json(path, rows):
    path.write_text(json.dumps(rows, indent=1))


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["highlights", "article"])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    datasets.Dataset.from_list(rows).to_parquet(path)


def tokens_of(data: Path | tuple, tokenizer, parallel, **flags) -> list[list[list[int]]]:
    return [list(part.dataset["input_ids"]) for part in load(settings(data, **flags), tokenizer, parallel)]


@pytest.mark.parametrize("as_files", [False, True], ids=["folder", "two files"])
@pytest.mark.parametrize(
    "write_rows", [write_jsonl, write_json, write_csv, write_parquet], ids=lambda f: f.__name__[6:]
)
def test_every_format_gives_the_same_tokens(tmp_path, tokenizer, parallel, write_rows, as_files):
    suffix = write_rows.__name__.replace("write_", ".")
    files = [tmp_path / f"{split}{suffix}" for split in ("train", "validation")]
    for file, rows in zip(files, (TRICKY, HELD_OUT), strict=True):
        write_rows(file, rows)
    expected = [[whole(tokenizer, *row.values()) for row in rows] for rows in (TRICKY, HELD_OUT)]
    assert tokens_of(tuple(files) if as_files else tmp_path, tokenizer, parallel) == expected


def test_a_csv_may_hold_words_that_look_like_missing_values(tmp_path, tokenizer, parallel):
    rows = [pair("a", "None"), pair("NA", "b"), pair("c", "null")]
    write_csv(tmp_path / "train.csv", rows)
    write_csv(tmp_path / "validation.csv", rows)
    expected = [whole(tokenizer, *row.values()) for row in rows]
    assert tokens_of(tmp_path, tokenizer, parallel) == [expected, expected]


@pytest.mark.parametrize("odd", ["train", "validation"])
def test_splits_may_differ_in_columns_that_are_not_used(tmp_path, tokenizer, parallel, odd):
    splits = {"train": TRICKY, "validation": HELD_OUT}
    splits[odd] = [{**row, "id": "x"} for row in splits[odd]]
    train, validation = tokens_of(write(tmp_path / "data", **splits), tokenizer, parallel)
    assert (len(train), len(validation)) == (10, 2)


@pytest.mark.parametrize("name", ["test", "cnn_test", "test-00000-of-00001"])
def test_a_test_split_is_not_trained_on(tmp_path, tokenizer, parallel, name):
    data = write(tmp_path / "data", train=TRICKY[:3], **{"dev": HELD_OUT, name: [pair("secret", "secret")] * 5})
    train, validation = tokens_of(data, tokenizer, parallel)
    assert train == [whole(tokenizer, *row.values()) for row in TRICKY[:3]]
    assert validation == [whole(tokenizer, *row.values()) for row in HELD_OUT]


def test_without_validation_the_seed_holds_out_5_percent(tmp_path, tokenizer, parallel, capsys):
    rows = [pair(words(n), "a") for n in range(1, 41)]
    data = write(tmp_path / "data", stories=rows) / "stories.jsonl"
    train, validation = tokens_of(data, tokenizer, parallel)
    assert "no validation split: 2 of the training documents are held out" in capsys.readouterr().out
    assert (len(train), len(validation)) == (38, 2)
    assert sorted(train + validation) == sorted(whole(tokenizer, *row.values()) for row in rows)
    assert tokens_of(data, tokenizer, parallel) == [train, validation]
    assert tokens_of(data, tokenizer, parallel, seed=43)[1] != validation


def test_other_columns_and_fewer_samples(tmp_path, tokenizer, parallel):
    rows = [{"text": words(n), "title": "x", "highlights": "no"} for n in range(1, 6)]
    data = write(tmp_path / "data", train=rows, validation=rows)
    flags = dict(article_column="text", summary_column="title", max_train_samples=3, max_eval_samples=1)
    expected = [whole(tokenizer, words(n), "x") for n in (1, 2, 3)]
    assert tokens_of(data, tokenizer, parallel, **flags) == [expected, expected[:1]]


# ----------------------------------------------------------------------------------------------------------------
# The cache
# ----------------------------------------------------------------------------------------------------------------


def cache_of(config: Config, tokenizer, parallel) -> tuple[str, int]:
    """Returns the file that holds the training documents, and the time it was written."""
    train, _ = load(config, tokenizer, parallel)
    [file] = train.dataset.cache_files
    return file["filename"], Path(file["filename"]).stat().st_mtime_ns


def test_documents_are_encoded_anew_only_when_something_changed(three_documents, tmp_path, parallel):
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    first = cache_of(settings(three_documents), tokenizer, parallel)
    again = cache_of(settings(three_documents, lr=1.0, batch_size=2, loss_on="summary"), tokenizer, parallel)
    assert again == first
    shorter, _ = cache_of(settings(three_documents, block_size=16), tokenizer, parallel)
    swapped, _ = cache_of(
        settings(three_documents, article_column="highlights", summary_column="article"), tokenizer, parallel
    )
    other_data = write(tmp_path / "data", train=TRICKY, validation=TRICKY)
    other_text, _ = cache_of(settings(other_data), tokenizer, parallel)
    tokenizer.add_tokens("a b c")
    otherwise, _ = cache_of(settings(three_documents), tokenizer, parallel)
    assert len({first[0], shorter, swapped, otherwise, other_text}) == 5


def test_another_end_of_sequence_token_encodes_anew(three_documents, parallel):
    """It stands in tokenizer_config.json; the tokenizer's backend, which has the vocabulary, is the same."""
    tokenizer, other = AutoTokenizer.from_pretrained(TINY_LLAMA), AutoTokenizer.from_pretrained(TINY_LLAMA)
    other.eos_token = other.convert_ids_to_tokens(PAD)
    assert tokenizer.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
    for each, end in ((tokenizer, EOS), (other, PAD), (tokenizer, EOS)):
        train, _ = load(settings(three_documents), each, parallel)
        assert [ids[-1] for ids in train.dataset["input_ids"]] == [end] * 3


def test_two_processes_encode_once_and_later_runs_read_that(tmp_path, tokenizer, parallel):
    shutil.copy(NEWS / "train.jsonl", tmp_path / "stories.jsonl")
    flags = dict(dataset_name_or_path=tmp_path / "stories.jsonl", max_steps=1, block_size=64)
    before = [RANKS / "verbose_datasets.py"]
    [run] = run_script_several_times([small_run(tmp_path / "out", **flags)], processes=2, before=before)
    assert run.returncode == 0, run.stderr
    written = re.findall(r"Caching processed dataset at (\S+/cache-\w+)\.arrow", run.stderr)
    read = re.findall(r"Loading cached processed dataset at (\S+/cache-[0-9a-f]+)", run.stderr)
    # the training and the held-out documents
    assert len(written) == len(read) == 2 and sorted(written) == sorted(read)
    assert len(re.findall(r"data +train: 32 documents", run.stdout)) == 1

    file, modified = cache_of(settings(tmp_path / "stories.jsonl"), tokenizer, parallel)
    assert file.removesuffix(".arrow") in written
    assert modified < (tmp_path / "out" / "metrics.jsonl").stat().st_mtime_ns
