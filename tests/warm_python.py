"""A `python` that starts warm: the libraries are imported once, and each process is a fork of the one that has them.

To import torch, transformers and datasets takes most of the time of a small run, in torchrun as in each of its ranks.
`start` starts a server that has imported them, and returns a program that takes the place of `python`. That one hands
its words, environment, folder and streams to the server, passes signals on to the fork, and leaves as the fork does. If
it is killed, so is the fork. What the libraries read from the environment while they are imported is the server's. The
fork finds in $STARTED_BY the process that has started the program. It needs Linux.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import functools
import gc
import inspect
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType

TESTS = Path(__file__).resolve().parent
SCRIPT = TESTS.parent / "train_llama2.py"
LIBRARIES = (
    "torch", "torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.launcher.api",
    "torch.distributed.tensor", "torch.distributed.fsdp", "transformers.generation",
    "transformers.models.llama.modeling_llama", "accelerate", "datasets",
)  # fmt: skip
CLIENT = """#!{python} -IS
import array, json, os, signal, socket, sys, time
with socket.socket(socket.AF_UNIX) as server:
    while server.connect_ex({address!r}):  # still importing
        os.kill({server}, 0)  # or gone
        time.sleep(0.02)
    environment = dict(os.environ, STARTED_BY=str(os.getppid()))
    request = json.dumps(dict(words=sys.argv[1:], environment=environment, folder=os.getcwd())).encode()
    streams = array.array("i", [0, 1, 2])
    server.sendmsg([len(request).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    server.sendall(request)
    answers = server.makefile()
    fork = int(next(answers))
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(each, lambda number, frame: os.kill(fork, number))
    code = int(next(answers))
if code < 0:  # a signal ended it
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


def start(folder: Path, environment: dict[str, str], launcher: Sequence[str] = ()) -> str:
    """Returns the program, which waits until its server is ready. The server ends when this process does.

    `launcher` are words to start the server with: it, and so every fork, is where they put it.
    """
    address, client = str(folder / "python.socket"), folder / "python"
    command = (
        f"import sys; sys.path.append({str(TESTS)!r}); import warm_python; program = warm_python.serve({address!r})"
    )
    words = [*launcher, sys.executable, "-u", "-c", f"{command}\nwith warm_python.short_end(): exec(program)"]
    environment = {**os.environ, **environment}
    its_end, _ = os.pipe()  # the other end stays open as long as this process lives
    server = subprocess.Popen(words, stdin=its_end, env=environment)
    os.close(its_end)
    client.write_text(CLIENT.format(python=sys.executable, address=address, server=server.pid))
    client.chmod(0o755)
    return str(client)


def serve(address: str) -> CodeType:
    """Forks for every client that comes. Returns only in the forks: what they shall run as `__main__`."""
    for name in LIBRARIES:
        __import__(name)
    sys.path.remove(str(TESTS))
    warm_up()
    gc.collect()
    gc.freeze()
    name_this_process("warm python")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            os._exit(0)
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return keep_a_fork(client)
        client.close()


def warm_up() -> None:
    """Does, without starting a thread, what every run does first: libraries import and compile more when first used."""
    sys.path.insert(0, str(SCRIPT.parent))
    import train_llama2

    config = train_llama2.Config(model_name_or_path=str(TESTS / "data" / "tiny_llama"))
    train_llama2.read_tokenizer(config, train_llama2.read_model_shape(config)[1])
    with contextlib.suppress(ImportError):  # it is optional
        import rouge_score.rouge_scorer  # noqa: F401
    del sys.path[0]
    compiled(SCRIPT)
    inspect.stack()  # which goes through all modules the first time; torchrun calls it several times


@functools.cache
def compiled(program: Path) -> CodeType:
    return compile(program.read_bytes(), str(program), "exec")


def keep_a_fork(client: socket.socket) -> CodeType:
    """Forks, waits for the end of the fork or of the client, and leaves. Returns in the fork, with its program."""
    length, ancillary, _, _ = client.recvmsg(4, socket.CMSG_LEN(3 * array.array("i").itemsize))
    streams = array.array("i", ancillary[0][2])
    with client.makefile("rb") as received:
        request = json.loads(received.read(int.from_bytes(length, "big")))
    fork = os.fork()
    if fork == 0:
        client.close()
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        return program(**request)
    for stream in streams:
        os.close(stream)
    client.sendall(f"{fork}\n".encode())
    end = os.pidfd_open(fork)
    ready, _, _ = select.select([end, client], [], [])
    if end not in ready:
        os.kill(fork, signal.SIGKILL)
    _, status = os.waitpid(fork, 0)
    with contextlib.suppress(OSError):
        client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


@contextlib.contextmanager
def short_end() -> Iterator[None]:
    """Ends the process as Python does, but leaves out taking apart what the libraries have made."""
    code: object = 0
    try:
        yield
    except SystemExit as leaving:
        code = leaving.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader may be gone
            stream.flush()
    os._exit(code)


def name_this_process(name: str) -> None:
    """Gives the process a name of at most 15 characters in /proc/PID/comm, as all forks have the server's command."""
    Path("/proc/self/comm").write_text(name)


def program(words: list[str], environment: dict[str, str], folder: str) -> CodeType:
    """Returns what `python` would run for these words, after it has made this process one that starts so."""
    import numpy
    import torch

    import __main__

    torch.seed()  # each process draws its own at its start
    numpy.random.seed()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if words[0] == "-u":
        words = words[1:]
    name_this_process(Path(words[0] if words[0] != "-m" else words[1]).name)
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        return compile(words[1], "<string>", "exec")
    if words[0] == "-m":
        sys.argv = words[1:]
        return compile("import runpy; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)", "-m", "exec")
    sys.argv, sys.path[0], __main__.__file__ = words, str(Path(words[0]).parent), words[0]
    return compiled(Path(words[0]))
