"""Kills training at random moments, starts it again, and compares every loss with that of an undisturbed run.

    python tests/soak.py --kills 30 --seed 1       # kill, start the same command again, and so on until it ends
    python tests/soak.py --restarts 20 --agents 1  # kill one rank; torchrun's --max-restarts brings it back
    python tests/soak.py --restarts 10 --agents 2  # the same with two torchrun agents, which stand for two nodes
    python tests/soak.py --kills 10 --record kills.jsonl  # appends each kill, and counts all that the file holds

It trains a random Llama of 3.7 million parameters with FSDP, so that a save takes long enough to be hit. After a kill
the next start follows at once. Where torchrun alone was killed, its ranks are still there then: they save and leave
while the new ranks wait for the folder.

A kill is exact if the run after it goes on from the newest complete checkpoint, and the metrics hold each step once,
with the loss of the undisturbed run to 1e-5. A training that has ended must have all steps and evaluations too, and its
model must load. It needs Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from conftest import SCRIPT, small_run, tiny_model

RANK, ALL_RANKS, AGENT, AGENT_SIGTERM = KINDS = (
    "SIGKILL of a rank", "SIGKILL of all ranks", "SIGKILL of the agent", "SIGTERM to the agent",
)  # fmt: skip
HANG_SECONDS = 240  # nothing takes this long unless it hangs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--restarts", type=int, default=0)
    parser.add_argument("--agents", type=int, default=1, help="torchrun agents of --restarts")
    parser.add_argument("--max-restarts", type=int, default=3, help="restarts of a training; given to torchrun")
    parser.add_argument("--processes", type=int, default=2, help="ranks, over all agents together")
    parser.add_argument("--parallelism", default="fsdp", help="of the script: fsdp, hsdp, ddp or none")
    parser.add_argument("--stages", type=int, default=1, help="pipeline stages")
    parser.add_argument("--split", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--record", type=Path, help="file that the kills are appended to, so that they can be many")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a training")
    parser.add_argument("--save-interval", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="leave the work folder, with every log, behind")
    options = parser.parse_args()
    dice, exact = random.Random(options.seed), True
    work = Path(tempfile.mkdtemp(prefix="soak_"))
    print(f"work folder {work}", flush=True)
    shape = dict(hidden_size=256, intermediate_size=688, head_dim=64)
    tiny_model(work / "model", **shape)  # its checkpoints, 44 MB, take some tenths of a second to write
    reference = undisturbed_training(work, options)
    if options.kills:
        exact &= soak_kills(work, options, reference, dice)
    if options.restarts:
        exact &= soak_restarts(work, options, reference, dice)
    if exact and not options.keep:
        shutil.rmtree(work)
    return 0 if exact else 1


def undisturbed_training(work: Path, options: argparse.Namespace) -> Training:
    """Returns a training that nobody disturbed, once it has ended."""
    reference, began = Training(work, options), time.monotonic()
    reference.launch()
    until(lambda: "step 1/" in reference.log() or not reference.running(), HANG_SECONDS)
    reference.seconds_to_start = time.monotonic() - began
    ended = reference.wait() and reference.agents[0].returncode == 0
    problems = reference.final_problems(reference) if ended else ["it failed or hung"]
    if problems:
        raise SystemExit(f"the undisturbed run failed: {'; '.join(problems)}\n{reference.log()[-3000:]}")
    seconds = time.monotonic() - began
    reference.seconds_of_steps = seconds - reference.seconds_to_start
    print(f"undisturbed: {options.steps} steps in {seconds:.0f} s", flush=True)
    return reference


# ----------------------------------------------------------------------------------------------------------------
# Kill, and start the same command again
# ----------------------------------------------------------------------------------------------------------------


@dataclass
class Kill:
    kind: str
    inside_a_save: bool
    exact: bool = True


def soak_kills(work: Path, options: argparse.Namespace, reference: Training, dice: random.Random) -> bool:
    """Kills `--kills` times, over as many trainings as that takes. Returns whether every kill was exact."""
    plan, kills = planned_kills(dice), []
    while len(kills) < options.kills:
        kills += kill_until_it_ends(Training(work, options), reference, plan, len(kills), options.kills, dice)
    if options.record:
        record(kills, options)
    print(f"{'kind':<22}{'tried':>8}{'inside a save':>15}{'exact':>8}")
    for kind in (*KINDS, "all"):
        those = [each for each in kills if kind in (each.kind, "all")]
        inside, exact = sum(each.inside_a_save for each in those), sum(each.exact for each in those)
        print(f"{kind:<22}{len(those):>8}{inside:>15}{exact:>8}")
    return all(each.exact for each in kills)


def record(kills: list[Kill], options: argparse.Namespace) -> None:
    """Appends the kills to the record, and prints how many of each plan it holds."""
    names = {"stages": options.stages, "tensor-parallel ranks": options.split}
    cuts = [f"{size} {name}" for name, size in names.items() if size > 1]
    plan = ", ".join([f"{options.processes} x {options.parallelism}", *cuts])
    with options.record.open("a") as file:
        file.writelines(json.dumps(dict(plan=plan, **vars(each))) + "\n" for each in kills)
    lines = [json.loads(line) for line in options.record.read_text().splitlines()]
    for each in sorted({line["plan"] for line in lines}):
        those = [line for line in lines if line["plan"] == each]
        inside, exact = (sum(line[name] for line in those) for name in ("inside_a_save", "exact"))
        print(f"{each}: {len(those)} kills, {inside} inside a save, {exact} exact")


def planned_kills(dice: random.Random) -> Iterator[tuple[str, bool]]:
    """Yields kinds of kill, and whether each is to hit a save: rounds of all kinds, every other round inside saves."""
    for inside_a_save in itertools.cycle([True, False]):
        for kind in dice.sample(KINDS, len(KINDS)):
            yield kind, inside_a_save


def kill_until_it_ends(
    training: Training,
    reference: Training,
    plan: Iterator[tuple[str, bool]],
    done: int,
    wanted: int,
    dice: random.Random,
) -> list[Kill]:
    """Kills a training and starts it again, until it has ended or all wanted kills are done and it ends in peace."""
    kills: list[Kill] = []
    orphans = False  # ranks that the launch before has left
    while True:
        newest, latest = training.checkpoint(), None
        training.launch()
        if done + len(kills) < wanted:
            kind, aim_at_a_save = next(plan)
            wait_for_the_moment(training, aim_at_a_save, reference, dice)
            latest = kill(training, kind, dice)
        problems = [] if training.wait() else ["the run hung"]
        problems += launch_problems(training, newest, orphans, latest)
        if latest is None:
            break
        problems += training.problems(reference)
        kills.append(latest)
        for each in kills[-2:] if problems else []:  # the kill before this launch, or the one that has ended it
            each.exact = False
        orphans = latest.kind == AGENT
        where, step = "inside a save" if latest.inside_a_save else "elsewhere", len(training.metrics()[0])
        outcome = "; ".join(problems) or "exact so far"
        print(f"kill {done + len(kills)}: {latest.kind}, {where}, step {step}; {outcome}", flush=True)
    training.sweep()
    if training.agents[0].returncode:
        problems.append(f"the run failed by itself: {training.log()[-1500:]}")
    problems += training.final_problems(reference)
    print(f"training ended after {len(kills)} kills: {'; '.join(problems) or 'exact'}", flush=True)
    if problems:
        print(f"  see {training.log_path}")
        for each in kills:
            each.exact = False
    return kills


def wait_for_the_moment(training: Training, aim_at_a_save: bool, reference: Training, dice: random.Random) -> None:
    """Waits for one of the next three saves to begin, or for any moment of start and training."""
    if aim_at_a_save:
        for _ in range(dice.randint(1, 3)):
            training.wait_for_save()
        time.sleep(dice.uniform(0, 0.1))
    else:
        time.sleep(dice.uniform(0, reference.seconds_to_start + 0.4 * reference.seconds_of_steps))


def kill(training: Training, kind: str, dice: random.Random) -> Kill | None:
    """Sends the signal of `kind`, and returns whether it hit a save; None where the training has ended before it.

    Ranks whose agent was killed notice it, save and leave.
    """
    ranks = training.ranks()
    if not (training.running() and ranks):
        return None
    writing = training.writing()
    if kind == RANK:
        send(dice.choice(ranks), signal.SIGKILL)
    elif kind == ALL_RANKS:
        for rank in ranks:
            send(rank, signal.SIGKILL)
    else:
        send(training.agents[0], signal.SIGTERM if kind == AGENT_SIGTERM else signal.SIGKILL)
    return Kill(kind, inside_a_save=writing and training.writing())


def launch_problems(training: Training, newest: int, orphans: bool, latest: Kill | None) -> list[str]:
    """Returns what a launch did wrong that began with a newest checkpoint of step `newest` and ended with `latest`.

    Orphans of the launch before may have saved once more while it waited for the folder.
    """
    log, problems = training.log(), []
    trained = "\nstep " in log
    if newest and trained:
        found = re.search(r"^resume    from .*step-(\d+), saved", log, re.MULTILINE)
        begun_at = int(found[1]) if found else 0
        if begun_at != newest and not (orphans and begun_at > newest):
            problems.append(f"the run went on from step {begun_at}, not {newest}, the newest checkpoint")
    if latest and latest.kind == AGENT_SIGTERM and trained and "\ndone " not in log:
        last, saved = max(training.metrics()[0]), training.checkpoint()
        if "\nstopped " not in log or saved != last:
            error = next((line for line in log.splitlines() if "Error: " in line), "no error was printed")
            problems.append(f"SIGTERM after step {last} left the checkpoint of step {saved}: {error}")
    return problems


# ----------------------------------------------------------------------------------------------------------------
# Kill one rank, and let torchrun start all of them again
# ----------------------------------------------------------------------------------------------------------------


def soak_restarts(work: Path, options: argparse.Namespace, reference: Training, dice: random.Random) -> bool:
    """Kills one rank at a time of trainings that torchrun restarts by itself. Returns whether all went on cleanly."""
    tried = clean = 0
    while tried < options.restarts:
        training = Training(work, options, options.agents, options.max_restarts)
        training.launch()
        attempts, saved = 0, []  # starts before the latest kill, and the newest checkpoint at each kill
        wanted = min(options.max_restarts, options.restarts - tried)
        while len(saved) < wanted and training.wait_for_steps(attempts):
            time.sleep(dice.uniform(0, min(2, 0.3 * reference.seconds_of_steps)))
            attempts = training.attempts()
            saved.append(training.checkpoint())
            if ranks := training.ranks():
                send(dice.choice(ranks), signal.SIGKILL)
            step = len(training.metrics()[0])
            print(f"restart {tried + len(saved)}: killed at step {step}, saved {saved[-1]}", flush=True)
        problems = restart_problems(training, saved) + training.final_problems(reference)
        print(f"training ended after {len(saved)} restarts: {'; '.join(problems) or 'clean'}", flush=True)
        tried, clean = tried + max(1, len(saved)), clean + (0 if problems else len(saved))
    print(f"{clean} of {tried} restarts clean on {options.agents} agent(s)")
    return clean == tried


def restart_problems(training: Training, saved: list[int]) -> list[str]:
    """Waits for the end; returns whether the run failed, and whether an attempt went back behind a checkpoint.

    `saved` are the newest checkpoints at the kills. A kill before the first save leaves nothing to go on from.
    """
    in_time, problems = training.wait(), []
    training.sweep()
    if not in_time or any(agent.returncode for agent in training.agents):
        problems.append(f"the run {'failed' if in_time else 'hung'}: {training.log()[-1500:]}")
    resumed = re.findall(r"^resume    from .*step-(\d+), saved", training.log(), re.MULTILINE)
    begun_at, least = [int(step) for step in resumed], [step for step in saved if step]
    of_kills = begun_at[len(begun_at) - len(least) :]
    if len(begun_at) < len(least) or any(step < behind for step, behind in zip(of_kills, least, strict=True)):
        problems.append(f"attempts went on from steps {begun_at}, though {least} were saved before the kills")
    return problems


# ----------------------------------------------------------------------------------------------------------------
# One training
# ----------------------------------------------------------------------------------------------------------------


class Training:
    """One training in one save folder: starts it, watches it, and says what it left."""

    def __init__(self, work: Path, options: argparse.Namespace, agents: int = 1, max_restarts: int = 0):
        self.folder, self.work, self.options = work / uuid.uuid4().hex[:8], work, options
        self.agents_wanted, self.max_restarts = agents, max_restarts
        self.mark = f"soak-{uuid.uuid4().hex}"
        self.launches, self.agents = 0, []

    def launch(self) -> None:
        """Starts the agents. A mark in their environment finds all that descends from them, as a cgroup would."""
        self.launches += 1
        self.log_path = self.folder.with_suffix(f".{self.launches}.log")
        self.launched_at, self.has_folder = time.time(), False
        ranks = self.options.processes // self.agents_wanted
        launcher = ["-m", "torch.distributed.run", f"--max-restarts={self.max_restarts}", f"--nproc_per_node={ranks}"]
        environment = {**os.environ, "SOAK_MARK": self.mark}
        if self.agents_wanted == 1:
            launcher += ["--standalone"]
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                endpoint = f"127.0.0.1:{free.getsockname()[1]}"
            launcher += [f"--nnodes={self.agents_wanted}", "--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}"]
            launcher += [f"--rdzv_id={uuid.uuid4().hex}"]
            environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        flags = dict(
            model_name_or_path=self.work / "model", parallelism=self.options.parallelism, block_size=128,
            pipeline_parallel_size=self.options.stages, tensor_parallel_size=self.options.split, batch_size=4, lr=1e-3,
            num_train_epochs=1000, max_steps=self.options.steps, eval_interval=10,
            save_interval=self.options.save_interval, dist_timeout_minutes=1,
        )  # fmt: skip
        words = [sys.executable, *launcher, str(SCRIPT), *small_run(self.folder, **flags)]
        with self.log_path.open("wb") as log:
            started = range(self.agents_wanted)
            self.agents = [psutil.Popen(words, env=environment, stdout=log, stderr=log) for _ in started]

    # What it is doing

    def log(self) -> str:
        """Returns what this launch has printed so far."""
        return self.log_path.read_text(errors="replace")

    def attempts(self) -> int:
        """Returns how often the ranks of this launch were started: each time they say their plan."""
        return self.log().count("plan      ")

    def processes(self) -> list[psutil.Process]:
        """Returns every living process of every launch."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get("SOAK_MARK") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """Returns the living ranks: the children of the agents."""
        children = []
        for agent in self.agents:
            with contextlib.suppress(psutil.NoSuchProcess):
                children += agent.children()
        return [child for child in children if child.is_running()]

    def running(self) -> bool:
        return any(agent.poll() is None for agent in self.agents)

    def writing(self) -> bool:
        """Returns whether this launch is writing a checkpoint. Once it has the folder, no rank of a former one is."""
        self.has_folder = self.has_folder or "\ndata " in self.log()
        for path in self.folder.glob("checkpoints/*.writing") if self.has_folder else []:
            with contextlib.suppress(OSError):
                if path.stat().st_ctime > self.launched_at:  # an older one was left by the kill before
                    return True
        return False

    def wait_for_save(self) -> None:
        """Returns when the next save has begun, or the launch has ended."""
        for wanted in (False, True):
            until(lambda wanted=wanted: self.writing() is wanted or not self.running(), HANG_SECONDS, pause=0.002)

    def wait_for_steps(self, attempts: int) -> bool:
        """Waits for the first step of a start that follows these; returns whether it came."""

        def trained() -> bool:
            return self.attempts() > attempts and "\nstep " in self.log().split("plan      ")[-1]

        return until(lambda: trained() or not self.running(), HANG_SECONDS) and self.running()

    def wait(self) -> bool:
        """Waits for the agents, not for ranks that outlive one; returns whether they left by themselves."""
        in_time = until(lambda: not self.running(), HANG_SECONDS)
        if not in_time:
            self.sweep()
        return in_time

    def sweep(self) -> None:
        """Ends whatever of this training lives on."""
        while alive := self.processes():
            for process in alive:
                send(process, signal.SIGKILL)
            psutil.wait_procs(alive, timeout=10)
        for agent in self.agents:
            agent.wait()

    # What it has left

    def checkpoint(self) -> int:
        """Returns the step of the newest complete checkpoint, 0 for none."""
        found = [path.name[5:] for path in self.folder.glob("checkpoints/step-*")]
        return max((int(step) for step in found if step.isdigit()), default=0)

    def lines(self) -> list[dict]:
        """Returns the lines of metrics.jsonl, but for a last one that a kill cut short."""
        path, lines = self.folder / "metrics.jsonl", []
        for text in path.read_text().splitlines() if path.exists() else []:
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
        return lines

    def metrics(self) -> tuple[list[int], list[int], dict[str, dict[int, float]]]:
        """Returns the steps and the evaluated steps in the order of metrics.jsonl, and by name each step's values."""
        lines = self.lines()
        steps, evaluated = ([line["step"] for line in lines if name in line] for name in ("loss", "eval_loss"))
        names = ("loss", "tokens", "eval_loss")
        return steps, evaluated, {name: {line["step"]: line[name] for line in lines if name in line} for name in names}

    def problems(self, reference: Training) -> list[str]:
        """Returns what in this folder differs from the reference, whether the training has ended or not."""
        (steps, evaluated, values), (_, _, expected) = self.metrics(), reference.metrics()
        found = []
        if steps != list(range(1, len(steps) + 1)):
            found.append(f"steps {steps} are not consecutive")
        if len(evaluated) != len(set(evaluated)):
            found.append(f"evaluations of steps {evaluated} are there twice")
        for name in values:
            for step, value in values[name].items():
                if not abs(value - expected[name].get(step, float("inf"))) <= 1e-5 * abs(value):  # NaN differs too
                    found.append(f"{name} {value} of step {step} is not {expected[name].get(step)}")
        return found

    def final_problems(self, reference: Training) -> list[str]:
        """Returns what a training that has ended lacks."""
        from transformers import AutoModelForCausalLM

        (steps, evaluated, _), (_, expected, _) = self.metrics(), reference.metrics()
        found = self.problems(reference)
        if len(steps) != self.options.steps:
            found.append(f"{len(steps)} steps instead of {self.options.steps}")
        if evaluated != expected:
            found.append(f"evaluated at {evaluated} instead of {expected}")
        try:
            _, report = AutoModelForCausalLM.from_pretrained(self.folder, output_loading_info=True)
            found += [f"the final model lacks {report['missing_keys']}"] if report["missing_keys"] else []
        except (OSError, ValueError) as error:
            found.append(f"the final model does not load: {error}")
        return found


def until(condition: Callable[[], bool], seconds: float, pause: float = 0.02) -> bool:
    """Waits for `condition`; returns whether it came true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(pause)
    return met


def send(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


if __name__ == "__main__":
    sys.exit(main())
