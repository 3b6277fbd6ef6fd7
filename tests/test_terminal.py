"""What a run shows: bars and colours on a terminal, plain lines in a file, next to nothing with --quiet."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import warnings
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
import transformers
from accelerate.state import AcceleratorState
from conftest import SCRIPT, small_run

import train_llama2

# A --block-size of its own: what another test has tokenised is in the cache, and shows no bar.
SHORT = dict(max_train_samples=8, max_eval_samples=2, batch_size=4, num_proc=1)
LIBRARY_BARS = ("Loading weights", "Writing model shards", "tokenising", "it/s]", "\r")


def run_on_a_terminal(*flags: object, **environment: str) -> tuple[int, str]:
    """Runs the script with a terminal of 140 columns; returns the exit code and what came out of it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 140, 0, 0))
    command, terminal = (
        [sys.executable, str(SCRIPT), *map(str, flags)],
        dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
    )
    process = subprocess.Popen(command, **terminal, env={**os.environ, **environment})
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # how Linux tells that nobody holds the other end any more
            part = b""
        if not part:
            break
        shown += part
    os.close(ours)
    return process.wait(timeout=60), shown.decode()


def test_a_terminal_shows_bars_of_everything_that_takes_long_and_colours(tmp_path):
    # A bar is drawn every 0.1 s at most unless told otherwise, and these end sooner.
    code, shown = run_on_a_terminal(*small_run(tmp_path, **SHORT, block_size=203), TQDM_MININTERVAL="0")
    assert code == 0, shown
    for bar in ("tokenising", "Loading weights", "evaluating", "training", "Writing model shards"):
        assert re.search(rf"\r{bar}[^\r]*100%", shown), bar
    assert re.search(r"training:[^\r]*\d\d:\d\d<[^\r]*loss=\d", shown), "time left, and the loss"
    assert "\x1b[1mplan\x1b[0m " in shown
    assert "\x1b[1mstep\x1b[0m 2/2  loss" in shown
    assert "\x1b[1mdone\x1b[0m " in shown


@pytest.mark.parametrize("quiet", [False, True])
def test_files_get_plain_lines_and_with_quiet_one(tmp_path, capfd, quiet):
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = small_run(tmp_path, **SHORT, block_size=205 + quiet)
    assert train_llama2.command_line([*flags, *["--quiet"][: int(quiet)]]) == 0
    printed, complained = capfd.readouterr()
    assert not [word for word in (*LIBRARY_BARS, "\x1b") if word in printed + complained]
    assert complained == ""
    if quiet:
        assert re.fullmatch(r"done      2 steps, .*\n", printed)
    else:
        assert "step 2/2  loss" in printed


def test_files_get_plain_lines_of_several_processes(three_rank_run):
    run, folder = three_rank_run
    logs = [log.read_text() for log in (folder.parent / "logs").rglob("std*.log")]
    assert len(logs) == 6
    for text in (run.stdout, run.stderr, *logs):
        assert not [word for word in (*LIBRARY_BARS, "\x1b") if word in text]


def test_colours_are_for_terminals_without_no_color(monkeypatch):
    plain, coloured = "step 5/9  loss 1.0", "\x1b[1mstep\x1b[0m 5/9  loss 1.0"
    for is_terminal, no_color, expected in ((True, "", coloured), (True, "1", plain), (False, "", plain)):
        monkeypatch.setattr(sys.stdout, "isatty", lambda is_terminal=is_terminal: is_terminal, raising=False)
        monkeypatch.setenv("NO_COLOR", no_color)
        assert train_llama2.coloured(plain) == expected
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "")
    assert train_llama2.coloured("WARNING   the disk is full") == "\x1b[33mWARNING   the disk is full\x1b[0m"
    assert train_llama2.coloured("  chosen  fsdp") == "  chosen  fsdp"


def test_quiet_keeps_warnings_and_what_is_always_said(capsys):
    for is_main in (True, False):
        rank = SimpleNamespace(is_main=is_main, quiet=True)
        train_llama2.Parallel.say(rank, "step 1/2  loss 3.0")
        train_llama2.Parallel.say(rank, "WARNING   the plan missed")
        train_llama2.Parallel.say(rank, "done      2 steps", always=True)
    assert capsys.readouterr().out == "WARNING   the plan missed\ndone      2 steps\n"


@pytest.fixture
def library_settings():
    verbosity = transformers.logging.get_verbosity()
    with warnings.catch_warnings():
        yield
    transformers.logging.set_verbosity(verbosity)


@pytest.mark.parametrize("quiet", [False, True])
def test_warnings_that_matter_are_kept_also_when_quiet(library_settings, quiet):
    transformers.logging.set_verbosity_warning()
    train_llama2.quieten_libraries(speaks=True, quiet=quiet)
    assert transformers.logging.get_verbosity() == transformers.logging.WARNING
    with pytest.warns(UserWarning, match="lr_scheduler"):
        warnings.warn("lr_scheduler before optimizer", stacklevel=1)
    with pytest.warns(FutureWarning, match="soon gone"):
        warnings.warn("soon gone", FutureWarning, stacklevel=1)


@pytest.mark.parametrize(("speaks", "quiet", "bars"), [(True, False, True), (True, True, False), (False, False, False)])
def test_library_bars_are_for_the_one_that_speaks_on_a_terminal(library_settings, monkeypatch, speaks, quiet, bars):
    datasets.enable_progress_bars()
    transformers.logging.enable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    try:
        train_llama2.quieten_libraries(speaks, quiet)
        assert transformers.logging.is_progress_bar_enabled() == bars
        assert datasets.are_progress_bars_disabled() != bars
        assert huggingface_hub.utils.are_progress_bars_disabled() != bars
        assert train_llama2.shows_bars(SimpleNamespace(is_main=speaks, quiet=quiet)) == bars
    finally:
        train_llama2.quieten_libraries(speaks=False, quiet=True)
