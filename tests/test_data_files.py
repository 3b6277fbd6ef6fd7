"""Local data files as people have them: read rightly, or refused with a line that names file, row and remedy."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from accelerate.state import AcceleratorState
from conftest import small_run

import train_llama2

STORIES = [dict(article=f"Story number {n} tells of a town.", highlights=f"A town, number {n}.") for n in range(6)]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)


def start(folder: Path, *paths: Path, **flags: object) -> int:
    """Trains one step on the data; returns the exit code. The folder of the run is beside the data, not in it."""
    words = small_run(folder.parent / "run", block_size=64, batch_size=2, max_steps=1, **flags)
    return train_llama2.command_line([*words, "--dataset-name-or-path", *map(str, paths or [folder])])


@pytest.fixture
def data(tmp_path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def write_jsonl(file: Path, rows: list[dict] = STORIES) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def csv_of(rows: list[dict], separator: str = ",") -> str:
    quoted = [[f'"{row[name]}"' for name in ("article", "highlights")] for row in rows]
    return "\n".join(separator.join(fields) for fields in [["article", "highlights"], *quoted]) + "\n"


def said(capsys: pytest.CaptureFixture) -> tuple[list[str], str]:
    """Returns what was said of data, and the error lines."""
    captured = capsys.readouterr()
    lines = [line.removeprefix("data      ") for line in captured.out.splitlines() if line.startswith("data")]
    return lines, "\n".join(line for line in captured.err.splitlines() if line.startswith("error:"))


# ----------------------------------------------------------------------------------------------------------------
# Values and rows
# ----------------------------------------------------------------------------------------------------------------

BROKEN_CSV = {
    "more fields than the header": (
        "article,highlights\nFirst, and second,a summary\n",
        "train.csv, row 2 has 3 fields, but the first row names 2 columns; put texts that hold a ',' or a line",
    ),
    "fewer fields than the header": ("article,highlights\nA story,a summary\nNo summary\n", "row 3 has 1 fields, but"),
    "a quote that is never closed": (
        'article,highlights\nOne,a summary\n"Two,a summary\nThree,a summary\n',
        "row 3 is no row of a csv file (unexpected end of data); put texts that hold quotes or line breaks in double",
    ),
    "a quote closed inside a text": (
        'article,highlights\n"A "big" story",a summary\n',
        "row 2 is no row of a csv file (',' expected after '\"'); put texts that hold quotes",
    ),
    "a stray quote in the header": ('article,"high"lights\nA story,a summary\n', "row 1 is no row of a csv file"),
    "a column named twice": (
        "article,highlights,article\nOne,a summary,two\n",
        "names the column article twice; rename one",
    ),
    "a line break without quotes": (
        "article,highlights\nOne,a summary\nTwo\rlines,a summary\n",
        "row 3 is no row of a csv file (new-line character seen in unquoted field",
    ),
    "no header": (f"{'A long story. ' * 20},a summary\n", "article is not a column of the first row of "),
}


@pytest.mark.parametrize(("text", "problem"), BROKEN_CSV.values(), ids=BROKEN_CSV)
def test_a_csv_that_would_be_misread_is_refused(data, capsys, text, problem):
    (data / "train.csv").write_text(text)
    assert start(data) == 2
    _, error = said(capsys)
    assert problem in error
    assert len(error) < 600, "no message holds a whole article"


@pytest.mark.parametrize("separator", [",", ";", "\t"], ids=["comma", "semicolon", "tab"])
def test_a_csv_is_read_by_the_separator_of_its_header(data, capsys, separator):
    (data / "train.csv").write_text(csv_of(STORIES, separator))
    assert start(data) == 0
    lines, _ = said(capsys)
    assert any(line.startswith("train: 5 documents") for line in lines)


BROKEN_VALUES = {
    "a number": ({"highlights": 42}, "row 3: highlights is 42, which is not text; repair it or leave it out"),
    "a list": ({"highlights": ["a", "b"]}, 'row 3: highlights is ["a", "b"], which is not text'),
    "not a number": ({"highlights": float("nan")}, "row 3: highlights is NaN, which is not text"),
    "half of an emoji": ({"article": "a \ud83d b"}, 'row 3: article is "a \\ud83d b", which is not text'),
    "an object": ({"article": {"en": "text"}}, 'row 3: article is {"en": "text"}, which is not text'),
}


@pytest.mark.parametrize(("value", "problem"), BROKEN_VALUES.values(), ids=BROKEN_VALUES)
def test_the_first_value_that_is_no_text_is_named(data, capsys, value, problem):
    write_jsonl(data / "train.jsonl", [*STORIES[:2], {**STORIES[2], **value}, *STORIES[3:]])
    assert start(data) == 2
    assert f"{data / 'train.jsonl'}, {problem}" in said(capsys)[1]


def test_a_line_that_is_no_json_is_named(data, capsys):
    (data / "train.jsonl").write_text("".join(json.dumps(row) + ",\n" for row in STORIES))
    assert start(data) == 2
    assert f"{data / 'train.jsonl'}, row 1 is not a JSON object (Extra data" in said(capsys)[1]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("name", ["train.jsonl", "train.csv"])
def test_text_not_in_utf8_is_refused_with_its_line(data, capsys, name, encoding):
    rows = [*STORIES, dict(article="A café opened.", highlights="A café.")]
    text = csv_of(rows) if name.endswith("csv") else "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    (data / name).write_bytes(text.encode(encoding))
    assert start(data) == 2
    line = 1 if encoding == "utf-16" else 8 if name.endswith("csv") else 7
    assert f"{data / name} is not UTF-8 (line {line}: invalid" in said(capsys)[1]


def test_a_column_of_numbers_is_no_text(data, capsys):
    (data / "train.csv").write_text("article,highlights\nA story,7\nAnother,8\n")
    assert start(data) == 2
    assert "--summary-column highlights of the train split holds no text, but 7" in said(capsys)[1]


def test_files_with_their_columns_in_another_order_are_read_together(data, capsys):
    write_jsonl(data / "train_a.jsonl")
    write_jsonl(data / "train_b.jsonl", [dict(reversed(row.items()), id=n) for n, row in enumerate(STORIES)])
    assert start(data) == 0
    assert any(line.startswith("train: 11 documents") for line in said(capsys)[0])


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_every_kind_of_text_in_parquet_is_text(data, capsys, kind):
    table = pa.Table.from_pylist(STORIES, schema=pa.schema([("article", kind), ("highlights", kind)]))
    pyarrow.parquet.write_table(table, data / "train-0.parquet")
    pyarrow.parquet.write_table(table.slice(0, 0), data / "train-1.parquet")  # a shard without rows
    assert start(data) == 0
    assert any(line.startswith("train: 5 documents") for line in said(capsys)[0])


def test_the_held_out_documents_are_drawn_among_those_with_text(data, capsys):
    """20 stories of which 14 are empty: 5% of the other 6 is one, and it is never an empty one."""
    rows = [row if n % 3 == 0 else dict(row, highlights=" ") for n, row in enumerate(STORIES * 3)]
    write_jsonl(data / "train.jsonl", rows)
    assert start(data) == 0
    lines, _ = said(capsys)
    assert "no validation split: 1 of the training documents are held out, by the seed" in lines
    assert any(line.startswith("train: 5 documents") and "12 empty documents dropped" in line for line in lines)
    assert any(line.startswith("validation: 1 documents") for line in lines)


# ----------------------------------------------------------------------------------------------------------------
# Names and places
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train[1].jsonl", "train *?.jsonl", "train::a.jsonl", "trän {a,b}.jsonl"])
def test_a_name_is_a_name_whatever_its_characters(data, capsys, name):
    """The other file is what the name would match as a pattern; it is named here to be seen not to be read twice."""
    write_jsonl(data / name)
    write_jsonl(data.parent / "others" / "train1.jsonl", STORIES[:1])
    assert start(data, data / name) == 0
    lines, _ = said(capsys)
    assert lines[0] == f"train: 1 file ({name})"
    assert any(line.startswith("train: 5 documents") for line in lines)


def test_hidden_files_and_folders_are_never_data(data, capsys):
    for name in (
        "train.jsonl",
        ".ipynb_checkpoints/train-checkpoint.jsonl",
        "._train.jsonl",
        ".cache/validation.jsonl",
    ):
        write_jsonl(data / name)
    assert start(data) == 0
    assert said(capsys)[0][0] == "train: 1 file (train.jsonl)"


def test_a_file_that_is_named_twice_counts_once(data, capsys):
    write_jsonl(data / "train.jsonl")
    (data / "train_link.jsonl").symlink_to(data / "train.jsonl")
    assert start(data, data, data / "train.jsonl") == 0
    assert any(line.startswith("train: 5 documents") for line in said(capsys)[0])


def test_what_is_read_and_what_is_not_is_said(data, capsys):
    for number in range(4):
        write_jsonl(data / f"train-{number}.jsonl")
    (data / "validation.xlsx").write_text("article\thighlights\n")
    (data / "gone.jsonl").symlink_to(data / "nowhere.jsonl")
    (data / "elsewhere").symlink_to(data.parent)
    (data / "dataset_info.json").write_text('{"description": "not data"}')
    (data / "README.md").write_text("not data either")
    assert start(data) == 0
    assert said(capsys)[0][:4] == [
        f"not read: {data / 'elsewhere'}, a link to a folder; name that folder to read it",
        f"not read: {data / 'gone.jsonl'}, a link nowhere",
        f"not read: {data / 'validation.xlsx'}; save it as one of .jsonl, .json, .ndjson, .csv, .tsv, .parquet",
        "train: 4 files (train-0.jsonl, train-1.jsonl, train-2.jsonl, ...)",
    ]


def test_a_byte_order_mark_is_no_part_of_the_data(data, capsys):
    for name, text in (
        ("train.jsonl", "".join(json.dumps(row) + "\n" for row in STORIES)),
        ("train.csv", csv_of(STORIES)),
    ):
        (data / name).write_text("\ufeff" + text)
        assert start(data) == 0, name
        (data / name).unlink()


def test_a_file_beside_its_compressed_self_is_refused(data, capsys):
    write_jsonl(data / "train.jsonl")
    (data / "train.jsonl.gz").write_bytes(gzip.compress((data / "train.jsonl").read_bytes()))
    assert start(data) == 2
    assert f"holds {data / 'train.jsonl.gz'} and train.jsonl; leave out one of them" in said(capsys)[1]
    (data / "train.jsonl.gz").rename(data / "train-2.json.gz")
    assert start(data) == 0, "files of two suffixes that are read alike"


def test_of_a_clone_of_the_hubs_dataset_one_configuration_is_read(data, capsys):
    """abisee/cnn_dailymail holds the same documents three times, in 1.0.0, 2.0.0 and 3.0.0."""
    for number, version in enumerate(("1.0.0", "2.0.0", "3.0.0"), 4):
        for split in ("train", "validation"):
            write_jsonl(data / version / f"{split}-00000-of-00001.jsonl", STORIES[:number])
    assert start(data) == 0
    lines, _ = said(capsys)
    assert any(line.startswith("train: 6 documents") for line in lines), lines


def test_clones_in_several_folders_are_told_by_the_folders_names(data, capsys):
    for number, folder in enumerate(("my_train", "my_dev"), 4):
        write_jsonl(data / folder / "3.0.0" / "part-0.jsonl", STORIES[:number])
    assert start(data, data / "my_train", data / "my_dev") == 0
    lines, _ = said(capsys)
    assert any(line.startswith("train: 4 documents") for line in lines), lines
    assert any(line.startswith("validation: 5 documents") for line in lines), lines


@pytest.mark.parametrize("name", ["more.jsonlines", "more.gz", "notes.txt", "empty"])
def test_a_named_path_without_data_is_refused_beside_others(data, capsys, name):
    write_jsonl(data / "train.jsonl")
    (data / "empty").mkdir()
    if name != "empty":
        (data / name).write_bytes((data / "train.jsonl").read_bytes())
    assert start(data, data / "train.jsonl", data / name) == 2
    assert f"{data / name} holds no data" in said(capsys)[1]


def test_text_in_a_json_list_is_no_row(data, capsys):
    (data / "train.json").write_text(json.dumps([json.dumps(STORIES[0])]))
    assert start(data, data / "train.json") == 2
    assert "row 1 is not a JSON object (but {" in said(capsys)[1]


def test_nothing_is_written_beside_the_data(data):
    saved_rows(data)
    before = sorted(data.rglob("*"))
    assert start(data) == 0
    assert sorted(data.rglob("*")) == before


def test_one_file_may_be_two_splits(data, capsys):
    """To see a model learn its validation data by heart is a usual first test."""
    write_jsonl(data / "train.jsonl")
    (data / "validation.jsonl").symlink_to("train.jsonl")
    assert start(data) == 0
    lines, _ = said(capsys)
    assert any("validation: 6 documents" in line for line in lines) and any("train: 6" in line for line in lines)


def test_a_lone_test_file_is_not_called_unreadable(data, capsys):
    write_jsonl(data / "ab_testing.jsonl")
    assert start(data) == 2
    assert "no file to train on (not read: 1 file of a test split, without --test-samples)" in said(capsys)[1]


@pytest.mark.parametrize("text", ["\n\n[{0},\n{1}]", "{0}\n{1}", "{0}{1}\n"], ids=["list", "indented", "run together"])
def test_json_may_be_laid_out_as_people_do(data, capsys, text):
    rows = [json.dumps(row, indent=2) for row in STORIES[:2]]
    (data / "train.json").write_text(text.replace("{0}", rows[0]).replace("{1}", rows[1]))
    assert start(data, max_eval_samples=1) == 0, said(capsys)
    assert any(line.startswith("train: 1 documents") for line in said(capsys)[0])


def test_an_error_in_json_names_its_line_below_blank_ones(data, capsys):
    (data / "train.json").write_text('\n\n[\n{"article": "A story."\n')
    assert start(data) == 2
    assert f"{data / 'train.json'} cannot be read (Expecting ',' delimiter: line 5 column 1" in said(capsys)[1]


def test_a_saved_folder_with_other_rows_is_encoded_anew(data, capsys, tmp_path):
    """What `datasets` calls a fingerprint tells how a dataset was made; its source may have changed in between."""
    tokens = []
    for number, rows in enumerate((STORIES[:3], STORIES[3:])):
        made = datasets.Dataset.from_list(rows)
        made._fingerprint = "the same"
        made.save_to_disk(data / str(number))
        split = train_llama2.saved_splits([str(data / str(number))], train_llama2.Config())["train"]
        tokens.append(split._fingerprint)
    assert tokens[0] != tokens[1]


def test_splits_may_come_in_different_formats(data, capsys):
    write_jsonl(data / "train.ndjson")
    (data / "validation.tsv").write_text(csv_of(STORIES[:2], "\t"))
    assert start(data) == 0
    lines, _ = said(capsys)
    assert any(line.startswith("train: 6 documents") for line in lines)
    assert any(line.startswith("validation: 2 documents") for line in lines)


def test_compressed_files_are_read(data, capsys):
    write_jsonl(data / "train.jsonl")
    with gzip.open(data / "train.jsonl.gz", "wb") as stream:
        stream.write((data / "train.jsonl").read_bytes())
    (data / "train.jsonl").unlink()
    assert start(data) == 0
    assert any(line.startswith("train: 5 documents") for line in said(capsys)[0])


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("evaluation.jsonl", "validation"),
        ("testing.jsonl", "test"),
        ("holdout.jsonl", "validation"),
        ("dev-ops_train.jsonl", "train"),
        ("news_dev.jsonl", "validation"),
        ("validation/part-0.jsonl", "validation"),
        ("train/validation.jsonl", "validation"),
        ("latest.jsonl", "train"),
        ("contest_evaluations.jsonl", "train"),
    ],
)
def test_a_name_tells_its_split(name, split):
    assert train_llama2.split_of(name) == split


def saved_splits(folder: Path) -> None:
    rows = datasets.Dataset.from_list(STORIES)
    datasets.DatasetDict(train=rows, validation=rows.select([0])).save_to_disk(folder)


def saved_rows(folder: Path) -> None:
    datasets.Dataset.from_list(STORIES).save_to_disk(folder)


@pytest.mark.parametrize("save", [saved_splits, saved_rows])
def test_a_folder_of_save_to_disk_is_read(data, capsys, save: Callable[[Path], None]):
    save(data)
    assert start(data) == 0
    trained = 6 if save is saved_splits else 5
    assert any(line.startswith(f"train: {trained} documents") for line in said(capsys)[0])


# ----------------------------------------------------------------------------------------------------------------
# The test split, which --test-samples alone asks for
# ----------------------------------------------------------------------------------------------------------------

needs_rouge = pytest.mark.skipif(importlib.util.find_spec("rouge_score") is None, reason="rouge-score is not installed")
UNUSABLE_TESTS = {
    "none": (None, "has no test split, only train; name a file or split test, or leave out --test-samples"),
    "no summaries": (
        [dict(article="A story.")],
        "test.jsonl, which has article; name another",
    ),
    "empty summaries": (
        [dict(article="A story.", highlights=" ")],
        "no label tokens are left in the 1 test documents; their articles or summaries are empty, or leave out",
    ),
}


@needs_rouge
@pytest.mark.parametrize(("rows", "problem"), UNUSABLE_TESTS.values(), ids=UNUSABLE_TESTS)
def test_a_test_split_that_cannot_be_scored_is_refused(data, capsys, rows, problem):
    write_jsonl(data / "train.jsonl")
    if rows is not None:
        write_jsonl(data / "test.jsonl", rows)
    assert start(data, test_samples="all") == 2
    assert problem in said(capsys)[1]


def test_without_the_flag_a_test_split_is_left_alone(data, capsys, monkeypatch):
    write_jsonl(data / "train.jsonl")
    write_jsonl(data / "test.jsonl", [dict(article="A story without a summary.")])
    read, loaded = train_llama2.read_files, []
    monkeypatch.setattr(train_llama2, "read_files", lambda those, *rest: loaded.extend(those) or read(those, *rest))
    assert start(data) == 0
    assert [file.name for file in loaded] == ["train.jsonl"]
    assert not any("documents" in line and line.startswith("test") for line in said(capsys)[0])


@needs_rouge
def test_the_test_split_of_save_to_disk_is_summarised(data):
    rows = datasets.Dataset.from_list(STORIES)
    datasets.DatasetDict(train=rows, test=rows.select([4, 2])).save_to_disk(data)
    assert start(data, test_samples="all", max_summary_tokens=2) == 0
    samples = [json.loads(line) for line in (data.parent / "run" / "samples.jsonl").read_text().splitlines()]
    assert {(each["index"], each["reference"]) for each in samples} == {
        (0, "A town, number 4."),
        (1, "A town, number 2."),
    }


def test_splits_that_are_not_read_are_said(data, capsys):
    rows = datasets.Dataset.from_list(STORIES)
    datasets.DatasetDict(train=rows, train_2=rows, test=rows).save_to_disk(data)
    assert start(data) == 0
    lines, _ = said(capsys)
    assert "not read: the split train_2" in lines and "not read: the split test, without --test-samples" in lines


def test_saved_splits_of_one_meaning_are_joined_and_no_others(data, capsys):
    rows = datasets.Dataset.from_list(STORIES)
    splits = datasets.DatasetDict(train=rows, training=rows.select(range(4)), unsupervised=rows, test=rows)
    splits.save_to_disk(data / "saved")
    assert start(data / "saved", num_train_epochs=1, max_eval_samples=1) == 0
    lines, _ = said(capsys)
    assert any("train: 9 documents" in line or "train: 10 documents" in line for line in lines), lines


def test_folders_that_are_named_tell_their_splits(data, capsys):
    for split in ("train", "validation"):
        (data / split).mkdir()
        write_jsonl(data / split / "0001.jsonl")
    assert start(data, data / "train", data / "validation") == 0
    lines, _ = said(capsys)
    assert any("validation: 6 documents" in line for line in lines), lines
    assert not any("held out" in line for line in lines)


def test_a_csv_may_hold_an_article_of_any_length(data, capsys):
    long = [dict(article="a town " * 30_000, highlights="A town.")]
    (data / "train.csv").write_text(csv_of(long + STORIES))
    assert start(data) == 0, capsys.readouterr().err


def test_csv_files_may_differ_in_their_separators(data, capsys):
    (data / "train_1.csv").write_text(csv_of(STORIES))
    (data / "train_2.csv").write_text(csv_of(STORIES, ";"))
    (data / "validation.csv").write_text(csv_of(STORIES))
    assert start(data) == 0, capsys.readouterr().err
    lines, _ = said(capsys)
    assert any("train: 12 documents" in line for line in lines), lines


def test_a_tilde_is_the_home_folder_in_every_path(data, monkeypatch, capsys):
    write_jsonl(data / "train.jsonl")
    monkeypatch.setenv("HOME", str(data.parent))
    config = train_llama2.parse_config(
        [
            "--dataset-name-or-path=~/data",
            "--save-model-dir=~/run",
            "--resume=~/step-000001",
            "--model-name-or-path=~/m",
        ]
    )
    places = (config.dataset_name_or_path, config.save_model_dir, config.resume, config.model_name_or_path)
    assert [os.path.relpath(place, data.parent) for place in places] == ["data", "run", "step-000001", "m"]


def test_an_unwritable_cache_is_blamed_on_the_cache(data, monkeypatch, capsys):
    write_jsonl(data / "train.jsonl")
    (data.parent / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", data.parent / "file" / "cache")
    assert start(data) == 2
    assert f"the Hugging Face cache {data.parent / 'file' / 'cache'} cannot be written to" in said(capsys)[1]


def test_a_test_file_without_summaries_stops_no_training(data, capsys):
    (data / "train.csv").write_text(csv_of(STORIES))
    (data / "test.csv").write_text("article\nA story\n")
    assert start(data) == 0
    assert "not read: 1 file of a test split, without --test-samples" in said(capsys)[0]


def test_the_folders_of_named_files_tell_their_splits(data, capsys):
    for split in ("train", "validation"):
        write_jsonl(data / split / "stories.jsonl")
    assert start(data, *sorted(data.glob("*/*.jsonl"))) == 0
    lines, _ = said(capsys)
    assert "train: 1 file (stories.jsonl)" in lines and "validation: 1 file (stories.jsonl)" in lines


def test_the_one_folder_of_all_named_files_tells_nothing(data, capsys):
    for name in ("more", "stories"):
        write_jsonl(data / "test" / f"{name}.jsonl")
    assert start(data, *sorted(data.glob("test/*.jsonl"))) == 0
    assert "train: 2 files (more.jsonl, stories.jsonl)" in said(capsys)[0]


def test_a_saved_split_without_rows_is_named(data, capsys):
    rows = datasets.Dataset.from_list(STORIES)
    datasets.DatasetDict(train=rows, validation=rows.filter(lambda row: False)).save_to_disk(data / "saved")
    assert start(data / "saved") == 2
    assert "has no validation documents; fill that split or leave it out" in said(capsys)[1]


def test_a_compressed_file_that_is_not_read_is_reported(data, capsys):
    write_jsonl(data / "train.jsonl")
    (data / "more.txt.gz").write_bytes(gzip.compress(b"a\tb\n"))
    assert start(data) == 0
    assert any(line.startswith(f"not read: {data / 'more.txt.gz'}") for line in said(capsys)[0])


def test_a_csv_without_header_is_told_so_however_long_its_first_article(data, capsys):
    (data / "train.csv").write_text(f"{'A long story. ' * 10_000},a summary\n")
    assert start(data) == 2
    assert f"the first row of {data / 'train.csv'}, which has A long story." in said(capsys)[1]


def test_test_files_of_another_format_stop_no_training(data, capsys):
    write_jsonl(data / "train.jsonl")
    (data / "test.csv").write_text("id\n1\n")
    assert start(data) == 0


def test_further_splits_of_a_saved_dataset_are_not_looked_at(data):
    rows = datasets.Dataset.from_list(STORIES)
    further = datasets.Dataset.from_list([dict(id=1)])
    datasets.DatasetDict(train=rows, metadata=further).save_to_disk(data / "saved")
    assert start(data / "saved") == 0
