"""Kills training at random moments, lets it go on, and compares every loss with an undisturbed run's.

    python tests/soak.py --kills 30 --seed 1               # kill, relaunch the same command, kill, ... until it ends
    python tests/soak.py --restarts 20 --agents 1          # kill one worker; torchrun's --max-restarts goes on
    python tests/soak.py --restarts 10 --agents 2          # the same with two torchrun agents as two nodes

FSDP on a random Llama of 3.7 million parameters, so that a save takes long enough to be met. A relaunch follows at
once: where torchrun was killed, its ranks are still there, and save and leave while the new ones wait for the folder. A
kill is exact when the run after it began at the newest complete checkpoint, and its metrics hold each step once with
the losses of the reference, to 1e-5; at the end of a training all steps and evaluations are there and the final model
loads. Linux only.
"""

from __future__ import annotations

import argparse
import collections
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
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("SIGKILL of a rank", "SIGKILL of all ranks", "SIGKILL of the agent", "SIGTERM to the agent")
HANG_SECONDS = 240  # nothing takes as long unless it hangs


def make_model(folder: Path) -> Path:
    """Writes a random Llama whose checkpoints, 44 MB, take some tenths of a second to write."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, vocab_size=1024
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "tests" / "data" / "tiny_llama").save_pretrained(folder)
    return folder


class Training:
    """One training in one save folder: launches it, kills it, and says what it left."""

    def __init__(self, work: Path, options: argparse.Namespace, agents: int = 1, max_restarts: int = 0):
        self.folder, self.work, self.options = work / uuid.uuid4().hex[:8], work, options
        self.agents_wanted, self.max_restarts = agents, max_restarts
        self.ranks_per_agent = options.processes // agents
        self.mark = f"soak-{uuid.uuid4().hex}"
        self.launches, self.agents = 0, []

    def launch(self) -> None:
        """Starts the agents. A mark in their environment finds all that descends from them, as a cgroup would."""
        self.launches += 1
        self.log_path = self.folder.with_suffix(f".{self.launches}.log")
        self.launched_at, self.has_folder = time.time(), False
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--max-restarts={self.max_restarts}"]
        if self.agents_wanted == 1:
            launcher += ["--standalone", f"--nproc_per_node={self.ranks_per_agent}"]
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                endpoint = f"127.0.0.1:{free.getsockname()[1]}"
            launcher += [f"--nnodes={self.agents_wanted}", f"--nproc_per_node={self.ranks_per_agent}"]
            launcher += ["--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}", f"--rdzv_id={uuid.uuid4().hex}"]
        flags = {
            "model-name-or-path": self.work / "model", "dataset-name-or-path": ROOT / "tests" / "data" / "news",
            "parallelism": "fsdp", "block-size": 128, "batch-size": 4, "lr": 1e-3, "num-train-epochs": 1000,
            "max-steps": self.options.steps, "log-interval": 1, "eval-interval": 10,
            "save-interval": self.options.save_interval, "dist-timeout-minutes": 1, "save-model-dir": self.folder,
        }  # fmt: skip
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        environment = {
            **os.environ, "SOAK_MARK": self.mark, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false", "HF_HOME": str(self.work / "hugging_face"),
        }  # fmt: skip
        if self.agents_wanted > 1:
            environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        with self.log_path.open("wb") as log:
            self.agents = [
                psutil.Popen(
                    [*launcher, str(ROOT / "train_llama2.py"), *words], env=environment, stdout=log, stderr=log
                )
                for _ in range(self.agents_wanted)
            ]

    def log(self) -> str:
        """Returns what this launch has printed so far."""
        return self.log_path.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """Returns every living process of every launch."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SOAK_MARK") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def ranks(self) -> list[psutil.Process]:
        """Returns the living ranks: the children of the agents."""
        children = []
        for agent in self.agents:
            try:
                children += agent.children()
            except psutil.NoSuchProcess:
                continue
        return [child for child in children if child.is_running()]

    def running(self) -> bool:
        return any(agent.poll() is None for agent in self.agents)

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

    def wait_for_save(self) -> None:
        """Returns when the next save has begun, or the launch has ended."""
        for wanted in (False, True):
            until(lambda wanted=wanted: self.writing() is wanted or not self.running(), HANG_SECONDS, 0.002)

    def wait_for_steps(self, starts: int) -> bool:
        """Waits until more than `starts` attempts began and the newest has trained; returns whether it did."""

        def trained() -> bool:
            attempts = self.log().split("plan      ")
            return len(attempts) > starts + 1 and "\nstep " in attempts[-1]

        return until(lambda: trained() or not self.running(), HANG_SECONDS) and self.running()

    def writing(self) -> bool:
        """Returns whether this launch is writing a checkpoint: it has the folder, so no rank of a former one does."""
        self.has_folder = self.has_folder or "\ndata " in self.log()
        if not self.has_folder:
            return False
        for path in self.folder.glob("checkpoints/*.writing"):
            with contextlib.suppress(OSError):
                if path.stat().st_ctime > self.launched_at:  # an older one was left by the kill before
                    return True
        return False

    def checkpoint(self) -> int:
        """Returns the step of the newest complete checkpoint, 0 for none."""
        found = [path.name[5:] for path in self.folder.glob("checkpoints/step-*")]
        return max((int(step) for step in found if step.isdigit()), default=0)

    def lines(self) -> list[dict]:
        path, lines = self.folder / "metrics.jsonl", []
        for text in path.read_text().splitlines() if path.exists() else []:
            try:
                lines.append(json.loads(text))
            except ValueError:
                break  # the last line, which a kill cut short
        return lines

    def evaluated_steps(self) -> list[int]:
        return [line["step"] for line in self.lines() if "eval_loss" in line]

    def metrics(self) -> tuple[list[int], dict[str, dict[int, float]]]:
        """Returns the steps in the order of metrics.jsonl, and by name the values of each step."""
        lines = self.lines()
        names = ("loss", "tokens", "eval_loss")
        values = {name: {line["step"]: line[name] for line in lines if name in line} for name in names}
        return [line["step"] for line in lines if "loss" in line], values

    def problems(self, reference: Training) -> list[str]:
        """Returns what in this folder differs from the reference, whether the training has ended or not."""
        steps, values = self.metrics()
        _, expected = reference.metrics()
        found = []
        if steps != list(range(1, len(steps) + 1)):
            found.append(f"steps {steps} are not consecutive")
        if len(evaluated := self.evaluated_steps()) != len(set(evaluated)):
            found.append(f"evaluations of steps {evaluated} are told twice")
        for name in values:
            for step, value in values[name].items():
                if abs(value - expected[name].get(step, float("inf"))) > 1e-5 * abs(value):
                    found.append(f"{name} {value} of step {step} is not {expected[name].get(step)}")
        return found

    def final_problems(self, reference: Training) -> list[str]:
        """Returns what a training that has ended lacks."""
        from transformers import AutoModelForCausalLM

        steps, values = self.metrics()
        evaluations, expected = values["eval_loss"], reference.metrics()[1]["eval_loss"]
        found = self.problems(reference)
        if len(steps) != self.options.steps:
            found.append(f"{len(steps)} steps instead of {self.options.steps}")
        if evaluations.keys() != expected.keys():
            found.append(f"evaluated at {sorted(evaluations)} instead of {sorted(expected)}")
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


def first_error(log: str) -> str:
    return next((line for line in log.splitlines() if "Error: " in line), "no error was told")


def send(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def kill(training: Training, kind: str, dice: random.Random) -> None:
    """Sends the signal of `kind`. Ranks orphaned by the agent's death notice it, save and leave."""
    if "rank" in kind:
        ranks = training.ranks()
        for process in ranks if "all" in kind else dice.sample(ranks, min(1, len(ranks))):
            send(process, signal.SIGKILL)
    else:
        send(training.agents[0], signal.SIGTERM if "SIGTERM" in kind else signal.SIGKILL)


def planned_kills(options: argparse.Namespace, dice: random.Random) -> Iterator[tuple[str, bool]]:
    """Yields (kind, inside a save) evenly over the kinds, every other round inside a save; kinds in random order."""
    for inside in itertools.cycle([True, False]):
        for kind in dice.sample(KINDS, len(KINDS)):
            yield kind, inside


def reference_run(work: Path, options: argparse.Namespace) -> Training:
    """Returns an undisturbed training that ended."""
    make_model(work / "model")
    reference = Training(work, options)
    began = time.monotonic()
    reference.launch()
    until(lambda: "step 1/" in reference.log() or not reference.running(), HANG_SECONDS)
    reference.seconds_to_start = time.monotonic() - began
    if not reference.wait() or reference.agents[0].returncode or (problems := reference.final_problems(reference)):
        raise SystemExit(f"the undisturbed run failed: {reference.log()[-3000:]}\n{locals().get('problems', '')}")
    reference.seconds = time.monotonic() - began
    print(f"undisturbed: {options.steps} steps in {reference.seconds:.0f} s", flush=True)
    return reference


def soak_kills(work: Path, options: argparse.Namespace, reference: Training, dice: random.Random) -> bool:
    """Kills and relaunches until `--kills` were done and their trainings ended. Returns whether all were exact."""
    plan = planned_kills(options, dice)
    tally = collections.defaultdict(collections.Counter)
    done = 0
    while done < options.kills:
        training, kills_here, orphans = Training(work, options), [], False
        problems: list[str] = []
        while True:
            newest = training.checkpoint()
            training.launch()
            meet_save = False
            if done < options.kills:
                kind, meet_save = next(plan)
                if meet_save:
                    for _ in range(dice.randint(1, 3)):
                        training.wait_for_save()
                    time.sleep(dice.uniform(0, 0.1))
                else:
                    moment = dice.uniform(0, reference.seconds_to_start + 0.4 * options.steps_seconds(reference))
                    time.sleep(moment)
            killed = done < options.kills and training.running() and bool(training.ranks())
            if killed:
                before = training.writing()
                kill(training, kind, dice)
                inside = before and training.writing()
            if not training.wait():
                problems.append("the run hung")
            log = training.log()
            if newest and "step " in log:
                begun_at = int((re.search(r"step-(\d+), saved", log) or [0, 0])[1])
                if begun_at != newest and not (orphans and begun_at > newest):  # they may have saved once more
                    problems.append(f"the run went on from step {begun_at}, not {newest}, the newest checkpoint")
            orphans = killed and kind == "SIGKILL of the agent"
            if killed and "SIGTERM" in kind and "\nstep " in log and "\ndone " not in log:
                last, saved = max(training.metrics()[0]), training.checkpoint()
                if "\nstopped " not in log or saved != last:
                    problems.append(
                        f"SIGTERM after step {last} left the checkpoint of step {saved}: {first_error(log)}"
                    )
            problems += training.problems(reference)
            if kills_here and problems:
                kills_here[-1]["exact"] = False
            if killed:
                done += 1
                kills_here.append({"kind": kind, "inside": inside, "exact": not problems})
                step = len(training.metrics()[0])
                where = "inside a save" if inside else "elsewhere"
                print(f"kill {done}: {kind}, {where}, step {step}; {'; '.join(problems) or 'exact so far'}", flush=True)
                problems = []
                continue
            training.sweep()
            ended = training.agents[0].returncode == 0
            problems += [] if ended else [f"the run failed by itself: {log[-1500:]}"]
            problems += training.final_problems(reference)
            print(f"training ended after {len(kills_here)} kills: {'; '.join(problems) or 'exact'}", flush=True)
            if problems:
                print(f"  see {training.log_path}")
                for one in kills_here:
                    one["exact"] = False
            for one in kills_here:
                tally[one["kind"]].update(tried=1, inside=one["inside"], exact=one["exact"])
            break
    print(f"{'kind':<22}{'tried':>8}{'inside a save':>15}{'exact':>8}")
    total: collections.Counter = collections.Counter()
    for kind in KINDS:
        total.update(tally[kind])
    for kind, counts in [*((kind, tally[kind]) for kind in KINDS), ("all", total)]:
        print(f"{kind:<22}{counts['tried']:>8}{counts['inside']:>15}{counts['exact']:>8}")
    return total["exact"] == total["tried"]


def soak_restarts(work: Path, options: argparse.Namespace, reference: Training, dice: random.Random) -> bool:
    """Kills one worker at a time of trainings that torchrun restarts by itself. Returns whether all were clean."""
    tried = clean = 0
    while tried < options.restarts:
        training, problems, kills = Training(work, options, options.agents, options.max_restarts), [], 0
        training.launch()
        starts, saved = 0, []
        while kills < options.max_restarts and tried + kills < options.restarts and training.wait_for_steps(starts):
            time.sleep(dice.uniform(0, min(2, 0.3 * options.steps_seconds(reference))))
            starts = training.log().count("plan      ")
            saved.append(training.checkpoint())
            kill(training, KINDS[0], dice)
            kills += 1
            step = len(training.metrics()[0])
            print(f"restart {tried + kills}: killed at step {step}, saved {saved[-1]}", flush=True)
        in_time = training.wait()
        training.sweep()
        if not in_time or any(agent.returncode for agent in training.agents):
            problems.append(f"the run {'failed' if in_time else 'hung'}: {training.log()[-1500:]}")
        begun_at = [
            int(step) for step in re.findall(r"^resume    from .*step-(\d+), saved", training.log(), re.MULTILINE)
        ]
        wanted = [step for step in saved if step]  # a kill before the first save leaves nothing to go on from
        if len(begun_at) < len(wanted) or any(
            step < least for step, least in zip(begun_at[::-1], wanted[::-1], strict=False)
        ):
            problems.append(f"attempts went on from steps {begun_at}, though {wanted} were saved before the kills")
        problems += training.final_problems(reference)
        print(f"training ended after {kills} restarts: {'; '.join(problems) or 'clean'}", flush=True)
        tried, clean = tried + max(1, kills), clean + (0 if problems else kills)
    print(f"{clean} of {tried} restarts clean on {options.agents} agent(s)")
    return clean == tried


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--restarts", type=int, default=0)
    parser.add_argument("--agents", type=int, default=1, help="torchrun agents of --restarts")
    parser.add_argument("--max-restarts", type=int, default=3, help="given to torchrun; restarts per training")
    parser.add_argument("--processes", type=int, default=2, help="ranks, over all agents together")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a training")
    parser.add_argument("--save-interval", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="leave the work folder, with every log, behind")
    options = parser.parse_args()
    options.steps_seconds = lambda run: run.seconds - run.seconds_to_start
    dice, exact = random.Random(options.seed), True
    work = Path(tempfile.mkdtemp(prefix="soak_"))
    print(f"work folder {work}", flush=True)
    reference = reference_run(work, options)
    if options.kills:
        exact &= soak_kills(work, options, reference, dice)
    if options.restarts:
        exact &= soak_restarts(work, options, reference, dice)
    if exact and not options.keep:
        shutil.rmtree(work)
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
