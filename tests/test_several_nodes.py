"""Two nodes: network namespaces with an address and a host name each, joined by a cable that can be cut."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from conftest import SCRIPT, read_metrics, small_run

import train_llama2

HANG_SECONDS = 180  # nothing here takes as long unless it hangs
STEPS = 24
TIMEOUT_MINUTES = 0.25
TRAINING = {
    "batch_size": 4,
    "block_size": 128,
    "max_steps": STEPS,
    "num_train_epochs": 9,
    "save_interval": 4,
    "parallelism": "fsdp",
    "dist_timeout_minutes": TIMEOUT_MINUTES,
}


class Network:
    """Hosts node-a and node-b, each in a network namespace of its own, which know each other by name."""

    def __init__(self, folder: Path):
        self.folder, self.tag = folder, f"t{os.getpid()}"
        self.addresses = {"a": "10.213.77.1", "b": "10.213.77.2"}
        self.hosts = folder / "hosts"
        names = "".join(f"{address} node-{node}\n" for node, address in self.addresses.items())
        self.hosts.write_text("127.0.0.1 localhost\n" + names)

    def ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    def build(self) -> None:
        for node in self.addresses:
            self.ip("netns", "add", self.tag + node)
        a, b = (self.tag + node for node in self.addresses)
        self.ip("link", "add", "cable", "netns", a, "type", "veth", "peer", "name", "cable", "netns", b)
        for node, address in self.addresses.items():
            self.ip("-n", self.tag + node, "addr", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                self.ip("-n", self.tag + node, "link", "set", device, "up")

    def cable(self, state: str) -> None:
        self.ip("-n", self.tag + "a", "link", "set", "cable", state)

    def remove(self) -> None:
        for node in self.addresses:
            subprocess.run(["ip", "netns", "del", self.tag + node], capture_output=True, check=False)

    def pids(self, node: str) -> list[int]:
        listed = subprocess.run(["ip", "netns", "pids", self.tag + node], capture_output=True, text=True, check=False)
        return [int(pid) for pid in listed.stdout.split()]

    def ranks(self) -> list[int]:
        """Returns the living ranks of both nodes."""
        found = []
        for pid in self.pids("a") + self.pids("b"):
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_text()  # empty for one that has ended
                if command and "torch.distributed.run" not in command:
                    found.append(pid)
        return found

    @contextlib.contextmanager
    def training(self, save_model_dir: Path) -> Iterator[dict[str, subprocess.Popen]]:
        """Runs the same command on both nodes; yields their agents. Afterwards nothing of it is left."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        agents = {}
        try:
            for node in self.addresses:
                enter = f'hostname node-{node}; mount --bind {self.hosts} /etc/hosts; exec "$@"'
                launcher = ["ip", "netns", "exec", self.tag + node, "unshare", "--uts", "--mount", "sh", "-c", enter]
                launcher += ["sh", sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2"]
                launcher += ["--rdzv_backend=c10d", f"--rdzv_endpoint=node-a:{port}", "--rdzv_id=summaries"]
                with self.log_path(node).open("wb") as log:
                    agents[node] = subprocess.Popen(
                        [*launcher, str(SCRIPT), *small_run(save_model_dir, **TRAINING)],
                        env={
                            **os.environ,
                            "HF_HOME": str(self.folder / f"cache-{node}"),
                            "DATASETS_VERBOSITY": "info",
                        },
                        stdout=log,
                        stderr=log,
                    )
            yield agents
        finally:
            for node, agent in agents.items():
                for pid in self.pids(node):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                agent.wait()

    def log_path(self, node: str) -> Path:
        return self.folder / f"log-{node}"

    def log(self, node: str) -> str:
        return self.log_path(node).read_text(errors="replace")

    def logs(self) -> str:
        return "\n".join(f"--- node-{node}\n{self.log(node)[-3000:]}" for node in self.addresses)


def until(condition: Callable[[], bool], seconds: float = HANG_SECONDS) -> bool:
    """Waits for `condition`; returns whether it came true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return met


def steps_so_far(save_model_dir: Path) -> int:
    path = save_model_dir / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def left(agents: dict[str, subprocess.Popen]) -> bool:
    return all(agent.poll() is not None for agent in agents.values())


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    if missing := [tool for tool in ("ip", "unshare", "mount", "hostname") if not shutil.which(tool)]:
        pytest.skip(f"needs {', '.join(missing)} (Debian: iproute2, util-linux, hostname)")
    network = Network(tmp_path_factory.mktemp("network"))
    try:
        try:
            network.build()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
        yield network
    finally:
        network.remove()


def run_in_this_process(save_model_dir: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    train_llama2.main(small_run(save_model_dir, **{**TRAINING, "parallelism": "none"}))


@pytest.fixture(scope="module")
def one_node(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], list[dict]]:
    folder = tmp_path_factory.mktemp("one_node")
    run_in_this_process(folder)
    return read_metrics(folder)


def encoded_and_reused(network: Network, node: str) -> tuple[int, int]:
    """Returns how many splits the ranks of a node encoded in its last training, and how many they found encoded."""
    log = network.log(node)
    return log.count("Caching processed dataset at"), log.count("Loading cached processed dataset at")


def test_two_nodes_of_two_ranks_train_as_one_process_through_a_cut_cable_and_a_sigterm(tmp_path, network, one_node):
    """Cut cable: no rank waits longer than --dist-timeout-minutes and what ending takes. The same commands go on. A
    SIGTERM on one node then saves and ends both. One process goes on to the end, with the losses of a run of its own.

    The agent beside the cut-off rendezvous store waits in torch for it, and after the SIGTERM that of the other node
    for the one that was told, up to 5 minutes: no affairs of the script's, and they are killed, as a scheduler would.
    Each node tokenises once, into its own cache: one of its ranks both splits, and the other finds them.
    """
    with network.training(tmp_path) as agents:
        assert until(lambda: steps_so_far(tmp_path) >= 6 or left(agents)), network.logs()
        assert not left(agents), network.logs()
        assert len(network.ranks()) >= 4
        network.cable("down")
        try:
            in_time = until(lambda: not network.ranks(), 90)
        finally:
            network.cable("up")
        assert in_time, network.logs()
        assert steps_so_far(tmp_path) < STEPS
        waited = re.compile("Timed out waiting (15000|12000)ms")  # of the stop signals' group, 0.8 times as long
        assert all(waited.search(network.log(node)) for node in agents), network.logs()
        for node in agents:  # in a line of the script's own, and none of its tracebacks
            assert re.search(r"error: rank \d has lost the others .*--dist-timeout-minutes", network.log(node)), (
                network.logs()
            )
            assert 'train_llama2.py", line' not in network.log(node), network.logs()
        assert [encoded_and_reused(network, node) for node in agents] == [(2, 2), (2, 2)], network.logs()

    with network.training(tmp_path) as agents:
        assert until(lambda: network.logs().count("\nstep ") >= 2 or left(agents)), network.logs()
        agents["b"].send_signal(signal.SIGTERM)
        assert until(lambda: not network.ranks()), network.logs()
        assert [encoded_and_reused(network, node) for node in agents] == [(0, 4), (0, 4)], network.logs()
        logs = network.log("a") + network.log("b")
    assert "resume    from" in logs
    steps = steps_so_far(tmp_path)
    assert steps < STEPS
    assert f"after step {steps}; the checkpoint is saved" in logs, logs
    assert (tmp_path / "checkpoints" / f"step-{steps:06d}" / "manifest.json").is_file()

    run_in_this_process(tmp_path)
    for mine, expected, name in zip(read_metrics(tmp_path), one_node, ("loss", "eval_loss"), strict=True):
        assert [line["step"] for line in mine] == [line["step"] for line in expected]
        assert [line[name] for line in mine] == pytest.approx([line[name] for line in expected], rel=1e-5)
