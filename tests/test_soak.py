"""A short soak; `python tests/soak.py --kills 30` is the long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).with_name("soak.py")


def test_training_that_torchrun_restarts_after_the_kill_of_a_rank_ends_on_the_undisturbed_losses():
    """Relaunches after kills inside a save, and changes of ranks between them, are the matter of test_checkpoints."""
    flags = "--restarts 1 --agents 1 --steps 6 --save-interval 2"
    run = subprocess.run(
        [sys.executable, str(SOAK), *flags.split()], capture_output=True, text=True, timeout=900, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 of 1 restarts clean" in run.stdout
