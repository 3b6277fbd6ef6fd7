"""The hook: MoAI's own where it exists, what it refuses, use from another script, and runs on two nodes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
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
from types import SimpleNamespace

import pytest
import torch
import warm_python
from conftest import RANKS, SCRIPT, TINY_LLAMA, add_a_node, fresh_accelerate, read_metrics, run, small_run, torchrun
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config, Qwen2ForCausalLM

import train_llama2
from train_llama2 import Cluster, Config, UserError, enable_advanced_parallelization

pytestmark = pytest.mark.usefixtures("own_processes")


def test_on_moai_the_platforms_hook_comes_first_and_only_once(tmp_path):
    """Called before the model is made; the run is then a plain one, with the same losses."""
    flags = {"max_train_samples": 4, "max_eval_samples": 2, "batch_size": 4, "num_train_epochs": 2, "precision": "fp32"}
    program = [RANKS / "on_moai.py", tmp_path / "events.json", SCRIPT]
    moai = run([sys.executable, *program, *small_run(tmp_path, **flags)], timeout=120)
    assert moai.returncode == 0, moai.stderr
    events = json.loads((tmp_path / "events.json").read_text())
    assert events[0] == "hook called"
    assert events.count("hook called") == 1
    train_llama2.main(small_run(tmp_path / "plain", **flags))
    (steps, evaluations), (plain_steps, plain_evaluations) = read_metrics(tmp_path), read_metrics(tmp_path / "plain")
    for name in ("loss", "grad_norm", "lr", "tokens"):
        assert [line[name] for line in steps] == pytest.approx([line[name] for line in plain_steps], rel=1e-6)
    assert evaluations == [pytest.approx(line, rel=1e-6) for line in plain_evaluations]
    AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (dict(precision="fp16"), "--precision fp16 is not one of auto, bf16, fp32, bf16-states"),
        (dict(batch_size=0), "--batch-size 0 must be at least 1"),
        (dict(cpu_offload=True), "--cpu-offload True is not one of auto, yes, no"),
        (dict(lr=None), "--lr None is not a number"),
        (dict(plan_format="json"), "--plan-format json goes with --plan"),
        (dict(hsdp_shard_size=4), "--hsdp-shard-size 4 needs --parallelism hsdp"),
    ],
)
def test_another_script_may_not_give_what_the_flags_refuse(flags, problem):
    with pytest.raises(UserError, match=problem):
        Config(**flags)


def test_another_loop_is_planned_eager_padded_and_with_all_logits(monkeypatch):
    """The loop of another script compiles and packs nothing, and `model(labels=...)` makes all logits."""
    cluster = train_llama2.parse_cluster("8xH100-80GB")
    monkeypatch.setattr(train_llama2, "find_cluster", lambda: cluster)
    shape = train_llama2.model_shape(LlamaConfig(**train_llama2.LLAMA_2["13b"], max_position_embeddings=4096))
    model_config = train_llama2.read_model_shape(Config(model_name_or_path=str(TINY_LLAMA)))[0]
    monkeypatch.setattr(train_llama2, "read_model_shape", lambda config: (model_config, shape))
    with enable_advanced_parallelization(Config(model_name_or_path=str(TINY_LLAMA))) as parallel:
        plan, memory = parallel.plan, parallel.choice.chosen.memory_gib
    assert not plan.compiled and not plan.packing and plan.model_parallel_size == 1
    own = train_llama2.predict(shape, cluster, plan, Config()).memory_gib
    assert memory.active > own.active or memory.peak_moment == own.peak_moment != "loss"
    tokens = plan.micro_batch_size * 2048
    [loss, own_loss] = (
        sum(train_llama2.memory_phases(train_llama2.StepMemory(each, plan, tokens))["loss"].values())
        for each in (dataclasses.replace(shape, computes_all_logits=True), shape)
    )
    assert loss - own_loss > (tokens - 1024) * 32000 * 8


def test_a_plan_under_torchrun_is_for_its_processes(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert train_llama2.this_machine().world_size == 1, "left over from something else"
    numbers = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="8", GROUP_WORLD_SIZE="2", MASTER_ADDR="here", MASTER_PORT="1")
    for name, value in numbers.items():
        monkeypatch.setenv(name, value)
    cluster = train_llama2.this_machine()
    assert (cluster.nodes, cluster.ranks_per_node) == (2, 4)


def test_nodes_with_other_flags_are_refused(monkeypatch):
    """Paths may differ between nodes, and the number of processes that tokenise."""
    mine = Config(model_name_or_path=str(TINY_LLAMA), block_size=64)
    changes = iter(
        [dict(num_train_epochs=2, lr=2e-5), dict(dataset_name_or_path="there", num_proc=1), dict(resume="a path")]
    )

    add_a_node(monkeypatch, lambda own: next(changes) if "num_train_epochs" in own else None)
    with pytest.raises(UserError, match="--num-train-epochs is 1 and 2 on different nodes; give all the same flags"):
        enable_advanced_parallelization(mine)
    with enable_advanced_parallelization(mine):
        pass
    with pytest.raises(UserError, match="--resume is a path and auto on different nodes"):
        enable_advanced_parallelization(mine)


def test_the_environment_does_not_set_the_precision(monkeypatch):
    """`accelerate launch` leaves its own there, and would wrap a model under DDP in autocast."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with enable_advanced_parallelization(Config(model_name_or_path=str(TINY_LLAMA), block_size=64)) as parallel:
        model = parallel.accelerator.prepare_model(torch.nn.Linear(2, 2))
        assert model(torch.ones(1, 2)).dtype == torch.float32
        assert not hasattr(model.forward, "__wrapped__")


@pytest.mark.parametrize("given", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}], ids=str)
def test_the_allocators_settings_are_kept_where_they_are_given(monkeypatch, given):
    """Under their former name too, which torch does not read where there is something under the new one."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with enable_advanced_parallelization(Config(model_name_or_path=str(TINY_LLAMA), block_size=64)):
        assert os.environ.get("PYTORCH_ALLOC_CONF") == (None if given else "expandable_segments:True")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)


@pytest.mark.parametrize("flags", [{"parallelism": "fsdp"}, {"parallelism": "ddp"}, {"cpu_offload": "yes"}], ids=str)
def test_moai_refuses_flags_that_would_take_the_parallelism_from_it(monkeypatch, flags):
    platform = SimpleNamespace(option=SimpleNamespace(enable_advanced_parallelization=lambda: None))
    monkeypatch.setattr(torch, "moreh", platform, raising=False)
    config = Config(model_name_or_path=str(TINY_LLAMA), block_size=64, **flags)
    [(name, value)] = flags.items()
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value} is not for MoAI.*leave it out"):
        enable_advanced_parallelization(config)


def test_each_rank_refuses_more_ranks_than_gpus_on_its_node(monkeypatch):
    """Rank 0 of the node has a GPU of its own; the error is everybody's, so that it is reported."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for local_rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(
            UserError, match=r"started 2 processes on node .*, which has 1 GPUs; use --nproc_per_node=gpu"
        ):
            train_llama2.take_gpu()


@pytest.mark.parametrize(
    "kinds", [("A100-80GB", "A100-40GB"), ("H100-80GB", "L40S-48GB"), ("RTX3090-24GB", None)], ids=str
)
def test_ranks_with_unlike_gpus_plan_with_the_same_figures(monkeypatch, kinds):
    """The slower GPU and the smaller memory count. None: an older GPU, without flash attention."""
    old = train_llama2.Gpu(14.6, 60, 300, 0.7, 0.75, 10, 12.5)
    gpus = [train_llama2.GPUS[kind] if kind else old for kind in kinds]
    everyones = [
        Cluster(2, 1, f"GPU of rank {rank}", True, gpu, gpu is not old, 100.0 + rank) for rank, gpu in enumerate(gpus)
    ]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(train_llama2, "on_all_ranks", lambda act, gathered: everyones)
    first = train_llama2.find_cluster()
    assert first.memory_gib == min(gpu.memory_gib for gpu in gpus)
    assert first.host_memory_gib == 100.0
    slower = min(gpus, key=lambda gpu: gpu.peak_tflops)
    assert dataclasses.replace(first.gpu, memory_gib=0) == dataclasses.replace(slower, memory_gib=0)
    assert first.has_flash_attention == (old not in gpus)


def test_a_tracker_not_installed_is_refused_before_anything_loads(monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["mlflow"])
    monkeypatch.setattr(train_llama2, "read_model_shape", None)
    config = Config(model_name_or_path=str(TINY_LLAMA), block_size=64, report_to="wandb")
    with pytest.raises(UserError, match="--report-to wandb needs a package that is not installed"):
        enable_advanced_parallelization(config)


def test_another_script_trains_another_model_on_two_sharded_ranks(tmp_path):
    """Qwen2 with tied embeddings; the losses are those of one plain process."""
    torch.manual_seed(0)
    shape = dict(vocab_size=1032, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    plain = Qwen2ForCausalLM(Qwen2Config(**shape, num_key_value_heads=2, tie_word_embeddings=True))
    plain.save_pretrained(tmp_path / "qwen2")
    AutoTokenizer.from_pretrained(TINY_LLAMA).save_pretrained(tmp_path / "qwen2")
    run = torchrun(RANKS / "another_script.py", tmp_path / "qwen2", tmp_path / "trained", processes=2)
    assert run.returncode == 0, run.stderr

    # The same three steps in one plain process.
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    documents = torch.randint(1024, (8, 128), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(3):
        loss = plain(input_ids=documents, labels=documents).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    said = next(line for line in run.stdout.splitlines() if line.startswith("LOSSES"))
    assert json.loads(said.removeprefix("LOSSES")) == pytest.approx(losses, rel=1e-5)

    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert trained.lm_head.weight is trained.model.embed_tokens.weight
    with torch.no_grad():
        assert trained(input_ids=documents, labels=documents).loss.item() == pytest.approx(
            plain(input_ids=documents, labels=documents).loss.item(), rel=1e-4
        )


@pytest.mark.parametrize(
    ("strategy", "shards", "sync", "reduced", "all_reduced"),
    [
        ("ddp", 1, "step", [], []),
        ("fsdp", 4, "micro-batch", [True, True, True], [False, False, True]),
        ("fsdp", 4, "step", [False, False, True], [False, False, True]),
        ("hsdp", 2, "micro-batch", [True, True, True], [False, False, True]),
    ],
)
def test_gradients_travel_no_more_often_than_the_plan_says(strategy, shards, sync, reduced, all_reduced):
    """Three micro-batches. The all-reduce is HSDP's across replicas; FSDP has none, so what it is told is moot."""
    calls: dict[str, list] = {"reduce": [], "all-reduce": [], "no_sync": []}
    accelerator = SimpleNamespace(no_sync=lambda model: contextlib.nullcontext(calls["no_sync"].append(True)))
    plan = train_llama2.Plan(
        dp_replicate_size=4 // shards, dp_shard_size=shards, gradient_accumulation_steps=3, gradient_sync=sync
    )
    assert plan.strategy == strategy
    parallel = train_llama2.Parallel(None, accelerator, None, None, None, plan, None)
    model = SimpleNamespace(
        set_requires_gradient_sync=calls["reduce"].append, set_requires_all_reduce=calls["all-reduce"].append
    )
    for index in range(3):
        with parallel.syncing_gradients(model, is_last=index == 2):
            pass
    assert calls == {"reduce": reduced, "all-reduce": all_reduced, "no_sync": [True] * 2 * (strategy == "ddp")}


# ----------------------------------------------------------------------------------------------------------------
# Two nodes: network namespaces with an address and a host name each, joined by a cable that can be cut
# ----------------------------------------------------------------------------------------------------------------

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
        self.pythons: dict[str, str] = {}  # by node, warm
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
        for node in self.addresses:
            enter = f'hostname node-{node}; mount --bind {self.hosts} /etc/hosts; exec "$@"'
            launcher = ["ip", "netns", "exec", self.tag + node, "unshare", "--uts", "--mount", "sh", "-c", enter, "sh"]
            environment = dict(HF_HOME=str(self.folder / f"cache-{node}"), DATASETS_VERBOSITY="info")
            (self.folder / node).mkdir()
            self.pythons[node] = warm_python.start(self.folder / node, environment, launcher)

    def bytes_sent(self) -> int:
        """Returns the bytes that have gone through the cable so far, both ways."""
        words = ["ip", "-s", "-j", "-n", self.tag + "a", "link", "show", "cable"]
        [cable] = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        return cable["stats64"]["tx"]["bytes"] + cable["stats64"]["rx"]["bytes"]

    def cable(self, state: str) -> None:
        self.ip("-n", self.tag + "a", "link", "set", "cable", state)

    def remove(self) -> None:
        for node in self.addresses:
            subprocess.run(["ip", "netns", "del", self.tag + node], capture_output=True, check=False)

    def processes(self, node: str) -> dict[int, str]:
        """Returns the names of a node's living processes, but for the warm Python that all of them are forks of."""
        listed = subprocess.run(["ip", "netns", "pids", self.tag + node], capture_output=True, text=True, check=False)
        names = {}
        for pid in map(int, listed.stdout.split()):
            with contextlib.suppress(OSError):
                name, state = re.search(r"\((.*)\) (.)", Path(f"/proc/{pid}/stat").read_text()).groups()
                if name != "warm python" and state != "Z":
                    names[pid] = name
        return names

    def ranks(self) -> list[int]:
        """Returns the living ranks of both nodes."""
        return [pid for node in self.addresses for pid, name in self.processes(node).items() if name == SCRIPT.name]

    @contextlib.contextmanager
    def training(self, save_model_dir: Path, **flags: object) -> Iterator[dict[str, subprocess.Popen]]:
        """Runs the same command on both nodes; yields their agents. Afterwards nothing of it is left."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        agents = {}
        try:
            for node in self.addresses:
                launcher = [self.pythons[node], "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2"]
                launcher += ["--rdzv_backend=c10d", f"--rdzv_endpoint=node-a:{port}", "--rdzv_id=summaries"]
                with self.log_path(node).open("wb") as log:
                    agents[node] = subprocess.Popen(
                        [*launcher, str(SCRIPT), *small_run(save_model_dir, **{**TRAINING, **flags})],
                        env={**os.environ, "PYTHON_EXEC": self.pythons[node]},
                        stdout=log,
                        stderr=log,
                    )
            yield agents
        finally:
            for node, agent in agents.items():
                for pid in self.processes(node):
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


def train_in_this_process(save_model_dir: Path) -> None:
    fresh_accelerate()
    train_llama2.main(small_run(save_model_dir, **{**TRAINING, "parallelism": "none"}))


@pytest.fixture(scope="module")
def one_node(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], list[dict]]:
    folder = tmp_path_factory.mktemp("one_node")
    train_in_this_process(folder)
    return read_metrics(folder)


def encoded_and_reused(network: Network, node: str) -> tuple[int, int]:
    """Returns how many splits the ranks of a node encoded in its last training, and how many they found encoded."""
    log = network.log(node)
    return log.count("Caching processed dataset at"), log.count("Loading cached processed dataset at")


def test_two_nodes_train_like_one_through_cut_cable_and_sigterm(tmp_path, network, one_node):
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

    train_in_this_process(tmp_path)
    for mine, expected, name in zip(read_metrics(tmp_path), one_node, ("loss", "eval_loss"), strict=True):
        assert [line["step"] for line in mine] == [line["step"] for line in expected]
        assert [line[name] for line in mine] == pytest.approx([line[name] for line in expected], rel=1e-5)


def test_stages_on_two_nodes_send_less_than_fsdp(tmp_path, network, one_node):
    """Two stages train as one process does. Counted are the bytes on the cable between the third step and the last.

    FSDP over the nodes would gather each matrix twice a micro-batch and reduce its gradient once, all in fp32 on a CPU,
    and half of it or more lies on the other node. That is the least it would send; it has been measured at 6.2 MB.
    """
    with network.training(tmp_path, pipeline_parallel_size=2) as agents:
        assert until(lambda: steps_so_far(tmp_path) >= 3 or left(agents)), network.logs()
        first, before = steps_so_far(tmp_path), network.bytes_sent()
        assert until(lambda: steps_so_far(tmp_path) == STEPS or left(agents)), network.logs()
        assert first < STEPS == steps_so_far(tmp_path), network.logs()
        sent = (network.bytes_sent() - before) / (STEPS - first)
        assert until(lambda: left(agents)), network.logs()
    for mine, expected in zip(read_metrics(tmp_path)[0], one_node[0], strict=True):
        assert mine["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    parameters = json.loads((tmp_path / "train_config.json").read_text())["model"]["parameters"]
    assert sent < 3 * 4 * parameters / 2 / 2
