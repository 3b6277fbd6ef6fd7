"""Runs the script in a rank to which something happens under pipeline stages: ACT [FLAG ...], where ACT is one of the
functions below.
"""

import os
import signal
import sys
import time

import train_llama2

rank = int(os.environ["RANK"])
evaluate_setup, report = train_llama2.check_setup, train_llama2.RunLog.step


def hang_rank_1_before_its_first_forward():
    train_llama2.STAGE_PATIENCE_SECONDS = 3.0

    def check_setup(*arguments):
        if rank == 1:
            time.sleep(600)
        return evaluate_setup(*arguments)

    train_llama2.check_setup = check_setup


def kill_rank_1_after_step_5():
    def step(self, state, result):
        report(self, state, result)
        if state.step == 5 and rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    train_llama2.RunLog.step = step


def sigterm_to_rank_1_after_step_3():
    def step(self, state, result):
        report(self, state, result)
        if state.step == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)  # the handler runs before the next line of Python

    train_llama2.RunLog.step = step


train_llama2.draw_curves = lambda folder: None
globals()[sys.argv.pop(1)]()
sys.exit(train_llama2.command_line())
