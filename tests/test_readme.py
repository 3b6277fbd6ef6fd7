"""README.md and tests/README.md: the flag table is the parser's, and commands and examples run."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys

import pytest
from conftest import ROOT, TINY_LLAMA, read_metrics, run

import train_llama2

README = (ROOT / "README.md").read_text()
TESTS_README = (ROOT / "tests" / "README.md").read_text()


def block(marker: str) -> str:
    """Returns the code block that follows a marker comment in the README."""
    return re.search(rf"<!-- {marker} -->\n```\w+\n(.*?)```", README, re.S).group(1)


def test_the_flag_table_is_the_parsers_with_its_defaults():
    rows = re.findall(r"^\| `(--[a-z0-9-]+)` \| `?(.*?)`? \| (.*) \|$", README, re.M)
    table = {name: default for name, default, _ in rows}
    flags = {train_llama2.flag_name(field.name): field for field in dataclasses.fields(train_llama2.Config)}
    assert table.keys() == flags.keys()
    for name, field in flags.items():
        if name != "--num-proc":  # depends on the machine, so the table describes it in words
            assert table[name] == str(train_llama2.shown_default(field)), name
    for name, _, meaning in rows:  # the table adds the choices
        assert meaning.replace("`", "").startswith(flags[name].metadata["help"]), name
    shown_by_help = set(re.findall(r"(--[a-z0-9-]+)", train_llama2.build_parser().format_help())) - {"--help"}
    assert shown_by_help == flags.keys()


def test_the_command_to_try_it_trains_and_the_loss_falls(tmp_path):
    """Runs the command as it stands, except for the installation and the folder it writes to."""
    command = block("command: try").replace("\\\n", " ").partition("-r requirements.txt &&")[2]
    words = [word for word in shlex.split(command) if "=" not in word or word.startswith("--")]
    assert words[0] == ".venv/bin/torchrun"
    assert words[-2] == "--save-model-dir"
    finished = run([sys.executable, "-m", "torch.distributed.run", *words[1:-1], str(tmp_path)], 240, ROOT)
    assert finished.returncode == 0, finished.stderr
    steps, evaluations = read_metrics(tmp_path)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    shown = re.findall(r"^step +(\d+)/\d+ +loss ([\d.]+)", README, re.M)
    assert [int(step) for step, _ in shown] == [line["step"] for line in steps]
    assert [float(loss) for _, loss in shown] == pytest.approx([line["loss"] for line in steps], abs=2e-3)
    assert len(evaluations) == 1


def test_the_hook_example_runs_on_two_processes(tmp_path):
    """Runs the example as it stands, except for a model that needs no network."""
    example = block("example: hook")
    assert '"Qwen/Qwen2.5-0.5B"' in example
    (tmp_path / "mine.py").write_text(example.replace('"Qwen/Qwen2.5-0.5B"', repr(str(TINY_LLAMA))))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "mine.py"]
    finished = run(launcher, 240, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert re.findall(r"^step (\d) loss \d", finished.stdout, re.M) == ["0", "1", "2"]


def test_the_example_of_use_summarises_a_saved_model(tmp_path, three_rank_run):
    """Runs the example as it stands, where the folder of the command to try it is that of another run."""
    (tmp_path / "llama2_summarization_try").symlink_to(three_rank_run[1])
    example = block("example: use")
    finished = run([sys.executable, "-c", example], 240, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert len(finished.stdout.split()) > 3
    card = re.search(r"```python\n(.*?)```", (three_rank_run[1] / "README.md").read_text(), re.S)[1].splitlines()
    assert example.splitlines()[-3:] == card[-3:], "the card's example is another, which its own test compares"


def commands(start: str, page: str = README) -> list[list[str]]:
    """Returns the words of every command in the page's code that holds `start`."""
    text = re.sub(r"\\\n\s*", "", page)
    code = re.findall(r"`([^`\n]+)`", text) + [
        line for part in re.findall(r"```\w*\n(.*?)```", text, re.S) for line in part.splitlines()
    ]
    return [shlex.split(words, comments=True) for words in code if start in words and "`" not in words]


def test_the_plan_shown_is_what_the_script_prints(capsys):
    shown = README[README.index("plan      8 x H100") :].partition("```")[0]
    assert train_llama2.command_line(["--plan", "8xH100-80GB"]) == 0
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in shown.splitlines() if line != "..."]
    assert len(lines) > 12 and [line for line in lines if line not in printed] == []


def test_every_plan_of_another_machine_is_printed(capsys):
    clusters = [*re.findall(r'--plan "?([0-9][^`" ]*)"?`', README), *re.findall(r"`--plan ([0-9]\S*)`", README)]
    assert len(clusters) >= 3
    for cluster in clusters:
        assert train_llama2.command_line(["--plan", cluster]) == 0
        assert "chosen" in capsys.readouterr().out


def test_every_command_of_a_run_is_understood():
    found = [
        words[words.index("train_llama2.py") + 1 :]
        for words in commands("train_llama2.py --")
        if "train_llama2.py" in words
    ]
    assert len(found) >= 6
    for words in found:
        config = train_llama2.parse_config([word.strip('"') for word in words])
        assert config.plan or "--lr" in words or "--dataset-name-or-path" in words


def test_commands_of_measurements_name_files_and_flags_that_exist():
    found = [words for page in (README, TESTS_README) for words in commands("python tests/", page)]
    found = [words for words in found if words[:1] == ["python"]]
    assert {words[1] for words in found} == {f"tests/{name}.py" for name in ("benchmark", "check_plan", "soak")}
    for _, path, *flags in found:
        source = (ROOT / path).read_text()
        assert [flag for flag in flags if flag.startswith("--") and f'"{flag}"' not in source] == [], path


def test_figures_name_tests_that_exist():
    found = [words for words in commands("pytest tests/", TESTS_README) if words[0] == "pytest"]
    assert len(found) >= 4
    for _, path, *chosen in found:
        names = re.findall(r"^def (test_\w+)", (ROOT / path).read_text(), re.M)
        assert not chosen or any(chosen[1] in name for name in names), f"{path} -k {chosen[1]}"


def test_ci_runs_the_readmes_test_command():
    command = block("command: test")
    assert "pytest" in command
    assert "command: test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("name", ["train_llama2.py", "requirements.txt", "README.md", "tests"])
def test_the_top_level_holds_these(name):
    assert (ROOT / name).exists()
