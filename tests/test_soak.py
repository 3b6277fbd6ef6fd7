"""A short soak; `python tests/soak.py --kills 30` is the long one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).with_name("soak.py")


def test_training_ends_on_the_undisturbed_losses_after_a_kill_and_after_a_restart_by_torchrun():
    """Changes of ranks and of strategy after a kill are the matter of test_checkpoints."""
    flags = "--kills 1 --restarts 1 --steps 6 --save-interval 2"
    run = subprocess.run(
        [sys.executable, str(SOAK), *flags.split()], capture_output=True, text=True, timeout=900, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"^all +1 +\d +1$", run.stdout, re.MULTILINE), "1 kill tried, 1 exact"
    assert "1 of 1 restarts clean" in run.stdout
