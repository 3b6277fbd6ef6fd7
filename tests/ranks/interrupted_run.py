"""Runs the script in a rank that is interrupted: ACT [FLAG ...], where ACT is one of the functions below.

A rank that signals waits until the signal has arrived, so that the step in which it happened is certain.
"""

import os
import signal
import sys
import time

import psutil
import torch.distributed.checkpoint as dcp

import train_llama2

rank, received = int(os.environ["RANK"]), []
torchrun = int(os.environ.get("STARTED_BY", os.getppid()))
receive = train_llama2.StopSignals.receive


def receive_and_note(self, number, frame):
    receive(self, number, frame)
    received.append(number)


def after_step(wanted_step, wanted_rank, act):
    """Calls `act` on one rank when it has reported a step."""
    report = train_llama2.RunLog.step

    def step(self, state, result):
        report(self, state, result)
        if state.step == wanted_step and rank == wanted_rank:
            act()
            began = time.monotonic()
            while not received and act is not kill_torchrun and time.monotonic() - began < 120:
                time.sleep(0.01)

    train_llama2.RunLog.step = step


def kill_torchrun():
    os.kill(torchrun, signal.SIGKILL)
    while os.getppid() == torchrun:
        time.sleep(0.01)


def sigterm_to_torchrun():
    after_step(2, 0, lambda: os.kill(torchrun, signal.SIGTERM))


def sigusr1_to_rank_1():
    after_step(4, 1, lambda: os.kill(os.getpid(), signal.SIGUSR1))


def sigusr1_to_torchrun():
    after_step(8, 0, lambda: os.kill(torchrun, signal.SIGUSR1))


def sigkill_of_torchrun():
    after_step(6, 0, kill_torchrun)


def ctrl_c():
    after_step(6, 0, lambda: os.killpg(os.getpgid(torchrun), signal.SIGINT))


def sigusr1_in_the_test():
    append = train_llama2.RunLog.append_samples

    def append_and_signal(self, step, split, samples):
        append(self, step, split, samples)
        if split == "test" and rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
            while not received:
                time.sleep(0.01)

    train_llama2.RunLog.append_samples = append_and_signal


def kill_inside_a_save():
    complete = train_llama2.Checkpoints.complete

    def kill_all(self, writing, final, run, files):
        if run["step"] == 9:
            agent = psutil.Process(torchrun)
            for process in [agent, *agent.children(recursive=True)]:
                if process.pid != os.getpid():
                    process.kill()
            os.kill(os.getpid(), signal.SIGKILL)
        complete(self, writing, final, run, files)

    train_llama2.Checkpoints.complete = kill_all


def slow_save_and_broken_weights():
    save, mean_token_loss = dcp.save, train_llama2.mean_token_loss

    def slow_save(*arguments, **named):
        time.sleep(3)
        save(*arguments, **named)

    def broken_once_training_has_begun(model, documents, batches, parallel, stop=None):
        return float("nan") if stop else mean_token_loss(model, documents, batches, parallel)

    dcp.save, train_llama2.mean_token_loss = slow_save, broken_once_training_has_begun


train_llama2.StopSignals.receive = receive_and_note
train_llama2.draw_curves = lambda folder: None
globals()[sys.argv.pop(1)]()
code = train_llama2.command_line()
print(f"rank {rank} leaves with {code}", file=sys.stderr)
train_llama2.leave(code)
