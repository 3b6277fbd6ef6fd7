"""What all tests share: the shipped material, and real runs of the script, alone or under torchrun on CPU with gloo."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import warm_python
from filelock import FileLock

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
RANKS = ROOT / "tests" / "ranks"  # programs that ranks run
SCRIPT = ROOT / "train_llama2.py"
TINY_LLAMA = ROOT / "tests" / "data" / "tiny_llama"
NEWS = ROOT / "tests" / "data" / "news"
sys.path.insert(0, str(ROOT))


def make_small_llama(folder: Path) -> str:
    """Writes the tiny Llama without the last two of its four layers, which take half of the time of a step."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(TINY_LLAMA, folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not re.search(r"layers\.[23]\.", name)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    return str(folder)


# Before any library is imported: no network, one thread (the tests use both cores as it is), and a cache of this
# session's own, so that no test depends on what an earlier session left. pytest-xdist's processes share it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="hugging_face_")
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HOME=CACHE.name)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(CACHE.name) / "inductor")
    os.environ["SMALL_LLAMA"] = make_small_llama(Path(CACHE.name) / "small_llama")
    # Python runs this first in each process started from here. The garbage collector's walks over what the libraries
    # define, at import and at exit, are a third of the time of a process that trains a tiny model.
    (Path(CACHE.name) / "sitecustomize.py").write_text(
        "import atexit, gc\ngc.set_threshold(200_000, 50, 100)\natexit.register(gc.freeze)\n"
    )
    os.environ["PYTHONPATH"] = os.pathsep.join([CACHE.name, str(ROOT)])
os.environ.pop("STARTED_BY", None)  # a warm Python's word for what has started it, of no process from here
SMALL_LLAMA = Path(os.environ["SMALL_LLAMA"])

# The files that take longest, longest first. Started last, one of them would leave the other workers without work.
LONGEST = (
    "test_plan", "test_hook_model_parallel", "test_model_families", "test_checkpoints_resume", "test_model", "test_hub",
    "test_hook", "test_final_model", "test_training_and_evaluation", "test_run",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Starts the warm Python that all processes of pytest-xdist share, and are forks of."""
    if processes := config.getoption("numprocesses", None):
        os.environ["WARM_PYTHON"] = warm()
        config.option.tx = [f"popen//python={os.environ['WARM_PYTHON']}"] * processes
        # a plugin's package is among what they have imported
        options = os.environ.get("PYTEST_ADDOPTS", "")
        os.environ["PYTEST_ADDOPTS"] = f'{options} -W "ignore:Module already imported so cannot be rewritten"'


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def run_script(
    *flags: object, processes: int = 1, timeout: float = 180, **environment: str
) -> subprocess.CompletedProcess:
    """Runs the script for real, under torchrun where `processes` is more than one. Flags are those of a small run."""
    if processes > 1:
        return torchrun(SCRIPT, *flags, processes=processes, timeout=timeout, **environment)
    return run([sys.executable, SCRIPT, *flags], timeout, **environment)


def torchrun(
    program: Path, *arguments: object, processes: int, timeout: float = 180, **environment: str
) -> subprocess.CompletedProcess:
    """Runs a program in the ranks of one torchrun on this machine."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return run([sys.executable, *launcher, program, *arguments], timeout, **environment)


def run(
    words: Sequence[object], timeout: float, folder: Path | None = None, **environment: str
) -> subprocess.CompletedProcess:
    """Runs a Python program, warm where it needs no environment of its own but what torchrun reads."""
    words = list(map(str, words))
    if words[0] == sys.executable and all(name.startswith("PET_") for name in environment):
        words[0] = environment["PYTHON_EXEC"] = warm()  # torchrun starts its ranks with the latter
    environment = {**os.environ, **environment}
    return subprocess.run(
        words, cwd=folder, capture_output=True, text=True, timeout=timeout, env=environment, check=False
    )


@functools.cache
def warm(**environment: str) -> str:
    """Returns what takes the place of `python` and starts with the libraries imported, where the system allows it.

    They were imported in this environment.
    """
    if not environment and "WARM_PYTHON" in os.environ:
        return os.environ["WARM_PYTHON"]
    folder = tempfile.mkdtemp(dir=os.environ["HF_HOME"])
    return warm_python.start(Path(folder), environment) if sys.platform == "linux" else sys.executable


def run_script_several_times(
    runs: Sequence[Sequence[object]], processes: int, before: Sequence[Path] = (), timeout: float = 240
) -> list[SimpleNamespace]:
    """Runs the script with each list of flags, in the ranks of one torchrun; returns what each run printed.

    Starting Python and its libraries takes most of the time of a small run. `before` are programs that every rank
    runs first.
    """
    with tempfile.TemporaryDirectory(prefix="several_runs_") as name:
        flags = Path(name) / "runs.json"
        flags.write_text(json.dumps([[str(flag) for flag in flags] for flags in runs]))
        launch = torchrun(RANKS / "several_runs.py", flags, *before, processes=processes, timeout=timeout)
    assert launch.returncode == 0, launch.stderr
    (*printed, _), (*complained, _) = (re.split(r"=== (\d+) ===\n", text) for text in (launch.stdout, launch.stderr))
    assert printed[1::2] == complained[1::2] and len(printed) == 2 * len(runs), launch.stderr
    return [
        SimpleNamespace(returncode=int(code), stdout=stdout, stderr=stderr)
        for stdout, code, stderr in zip(printed[::2], printed[1::2], complained[::2], strict=True)
    ]


def start(folder: Path, *words: str, **flags: object) -> int:
    """Runs the script in this process; returns the exit code. The folder is free again, as when a process ended."""
    import train_llama2

    fresh_accelerate()
    try:
        return train_llama2.command_line([*small_run(folder, **flags), *words])
    finally:
        with contextlib.suppress(OSError):
            (folder / ".lock").open().close()  # closing any descriptor of a file ends a process's locks on it


@contextlib.contextmanager
def at_steps(acts: dict[int, Callable[[], object]]) -> Iterator[None]:
    """Inside, the end of each of these steps calls its act."""
    import train_llama2

    report = train_llama2.RunLog.step

    def step(self, state, result):
        report(self, state, result)
        acts.get(state.step, lambda: None)()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_llama2.RunLog, "step", step)
        yield


def add_a_node(patch: pytest.MonkeyPatch, answer: Callable[[dict], dict | None]) -> None:
    """Lets ranks that compare values find another node's too: this one's, with the changes that `answer` returns."""
    import train_llama2

    on_all_ranks = train_llama2.on_all_ranks

    def asked(act, **how):
        result = on_all_ranks(act, **how)
        changes = answer(result[0]) if how.get("gathered") and isinstance(result[0], dict) else None
        return result if changes is None else [*result, {**result[0], **changes}]

    patch.setattr(train_llama2, "on_all_ranks", asked)


def signal_myself(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # the handler runs before the next line of Python


def stop_after(folder: Path, step: int, **flags: object) -> None:
    """Runs the script in this process until a SIGTERM at the end of step `step`."""
    with at_steps({step: signal_myself}):
        assert start(folder, **flags) == 0


# 34 documents in batches of 13: 3 steps an epoch, the last of 8 documents; 9 steps. A stop after step 2, 4, 5, 7 or 8
# is in the middle of an epoch.
NINE_STEPS = dict(
    batch_size=13,
    num_train_epochs=3,
    max_grad_norm=0.1,
    eval_interval=4,
    block_size=64,
    save_interval=2,
    max_eval_samples=3,
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run from step 1 to step 9."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert start(folder, **NINE_STEPS) == 0
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run that SIGTERM stopped after step 5, with checkpoints of steps 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    stop_after(folder, 5, **NINE_STEPS, keep_checkpoints=3)
    return folder


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))


def saved(folder: Path) -> list[str]:
    """Returns the names in a run's folder of checkpoints."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.name != "final-model.json")


def tree(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file below a folder, but for the lock, which says who holds it."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def error_of(capsys: pytest.CaptureFixture) -> str:
    """Returns the only `error:` line since the last look."""
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


def assert_same_run(folder: Path, expected: Path) -> None:
    """Every step once, every evaluation once, and the numbers of the uninterrupted run."""
    for lines, expected_lines in zip(read_metrics(folder), read_metrics(expected), strict=True):
        assert [line["step"] for line in lines] == [line["step"] for line in expected_lines]
        for name in {"loss", "eval_loss", "grad_norm", "lr", "tokens", "epoch", "skipped_steps"} & set(lines[0]):
            values, expected_values = ([line[name] for line in some] for some in (lines, expected_lines))
            assert values == pytest.approx(expected_values, rel=1e-5), name


class Crash(BaseException):
    """What a crash point raises. It is not an Exception, so nothing on the way catches it."""


class CrashPoint:
    """Between `arm(k)` and `disarm()` only the first k file operations succeed, as for a process that is killed.

    Python announces every file that it opens for writing, renames, removes, makes, truncates or gives another mode.
    """

    OPERATIONS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate")
    left: int | None = None
    listening = False

    def arm(self, k: int) -> None:
        if not self.listening:
            sys.addaudithook(self.announced)
        self.listening, self.left = True, k

    def disarm(self) -> None:
        self.left = None

    def announced(self, event: str, details: tuple) -> None:
        if self.left is None:
            return
        writes = event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in self.OPERATIONS:
            self.left -= 1
            if self.left < 0:
                raise Crash(f"{event} {details}")


crash_point = CrashPoint()


def llama_of(value: float) -> torch.nn.Module:
    """Returns a tiny Llama whose weights all have the same value, so that a mix of two models shows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(vocab_size=1024, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(LlamaConfig(**shape))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, value)
    return model


def fresh_accelerate() -> None:
    """Lets Accelerate forget the processes and the device of a former run in this process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def own_processes() -> None:
    """For tests that begin a run of their own in this process."""
    fresh_accelerate()


def tiny_model(folder: Path, **shape: object) -> Path:
    """Writes a random Llama of the tiny Llama's shape, with changes, and its tokenizer of 1,024 pieces."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(TINY_LLAMA, **shape)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_LLAMA).save_pretrained(folder)
    return folder


def small_run(save_model_dir: Path, **flags: object) -> list[str]:
    """Flags of a run on the shipped material that takes seconds; `flags` are added or put in their place."""
    settings: dict[str, object] = {
        "model_name_or_path": SMALL_LLAMA,
        "dataset_name_or_path": NEWS,
        "block_size": 512,
        "batch_size": 8,
        "lr": 1e-3,
        "log_interval": 1,
        "save_model_dir": save_model_dir,
        **flags,
    }
    words = []
    for name, value in settings.items():
        words += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
    return words


def read_metrics(save_model_dir: Path) -> tuple[list[dict], list[dict]]:
    """Returns the training lines and the evaluation lines of a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (save_model_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "eval_loss" in line]


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Inside, no file of this process may grow past so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session")
def three_rank_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess, Path]:
    """Returns a run of 5 steps (34 documents by 8) under FSDP on 3 ranks, and its folder; one for all test files.

    The rows of the matrices (64, 172, 1024) and the 8 validation documents do not divide by 3 ranks or 3 x 2
    documents. What each rank prints is in ../logs/**/<rank>/stdout.log. pytest-xdist's processes share it.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "three_ranks"
    console = folder / "console.json"
    with FileLock(f"{folder}.lock"):
        if not console.exists():
            flags = dict(parallelism="fsdp", micro_batch_size=2, block_size=1024, eval_interval=2)
            torchrun = dict(PET_TEE="3", PET_LOG_DIR=str(folder / "logs"))
            run = run_script(*small_run(folder / "run", **flags), processes=3, **torchrun)
            assert run.returncode == 0, run.stderr
            console.write_text(json.dumps([run.stdout, run.stderr]))
    stdout, stderr = json.loads(console.read_text())
    return subprocess.CompletedProcess([], 0, stdout, stderr), folder / "run"


@pytest.fixture(scope="module", autouse=True)
def short_runs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leaves out `curves.png` and measuring the CPU, most of the time of a small run, where no test is about them."""
    import train_llama2

    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ not in ("test_reporting", "test_final_model"):
            patch.setattr(train_llama2, "draw_curves", lambda folder: None)
        if request.module.__name__ not in ("test_reporting", "test_plan"):
            patch.setattr(train_llama2, "measure_matmul_tflops", lambda *_: 0.05)
        yield
