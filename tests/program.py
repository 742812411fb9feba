"""`dpo-cli` in a process of its own, forked from one that has torch, transformers and TRL imported already.

A fresh process spends ten CPU-seconds on these imports before it does anything. The fork has a session, streams,
a working folder, an environment and an exit code of its own; it can be killed, and a full disk or a signal is real.
Cold is what asks for it, what sets variables that libraries read when they are imported, and every other program.

The server is this file as a program: a request comes over a socket with three descriptors, goes to a fork, and the
fork's process id and exit status are sent back.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ADDRESS = "DPO_CLI_TESTS_FORK_SERVER"
# Read when libraries are imported, or by the dynamic linker: another value than the server's wants a cold process.
READ_AT_IMPORT = (
    "CUDA", "HF_", "HOME", "LD_", "MKL", "OMP", "PYTHON", "PYTORCH", "TORCH", "TRANSFORMERS", "TRITON", "TRL",
    "UNSLOTH", "XDG",
)  # fmt: skip
LIGHT = ("check", "schema", "--help", "--version")  # a cold process is quicker than the server's imports
# Read by the fork; the last two are set by torch and by dpo-cli, so that a test's process has them and the server not.
NOT_AT_IMPORT = ("PYTHONIOENCODING", "PYTHONUNBUFFERED", "TORCHINDUCTOR_CACHE_DIR", "TRL_EXPERIMENTAL_SILENCE")
PROGRAM = (sys.executable, "-m", "dpo_cli")
Environment = Mapping[str, str]


def start(*arguments: object, cold: bool = False, **options: Any) -> subprocess.Popen[str]:
    """Start `python -m dpo_cli`; options are those of `subprocess.Popen`, text both ways by default."""
    cold = cold or not arguments or arguments[0] in LIGHT or not forks(options)
    kind = subprocess.Popen if cold else Forked
    return kind([*PROGRAM, *map(str, arguments)], **{"text": True, "encoding": "utf-8", **options})


def run(
    *arguments: object, cold: bool = False, timeout: float | None = 120, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run `python -m dpo_cli` to its end, as `subprocess.run` with both outputs captured does."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start(*arguments, cold=cold, **pipes | options) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def forks(options: Mapping[str, Any]) -> bool:
    if ADDRESS not in os.environ or options.get("preexec_fn"):
        return False
    return _fixed(options.get("env") or os.environ) == _fixed(json.loads(os.environ[ADDRESS])["environment"])


def _fixed(environment: Environment) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(READ_AT_IMPORT) and name not in NOT_AT_IMPORT
    }


class Forked(subprocess.Popen[str]):
    """A `Popen` whose process is forked by the server; what differs is how it starts and how its end is heard of."""

    def _execute_child(self, args: list[str], *rest: Any) -> None:
        names = (
            "executable preexec_fn close_fds pass_fds cwd env startupinfo creationflags shell "
            "p2cread p2cwrite c2pread c2pwrite errread errwrite"
        )
        given = dict(zip(names.split(), rest, strict=False))
        streams = [given["p2cread"], given["c2pwrite"], given["errwrite"]]
        request = {
            "arguments": args[len(PROGRAM) :],
            "folder": str(Path(given["cwd"] or ".").resolve()),
            "environment": {**(given["env"] or os.environ)},
        }
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server.connect(json.loads(os.environ[ADDRESS])["path"])
        descriptors = [own if stream == -1 else stream for own, stream in enumerate(streams)]
        socket.send_fds(self._server, [json.dumps(request).encode()], descriptors)
        self.pid = int(self._server.recv(64))
        self._child_created = True
        pipes = [given[name] for name in names.split()[-6:]]
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None and _is_readable(self._server, 0):
            self._hear()
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self.returncode is None:
            if not _is_readable(self._server, timeout):
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self._hear()
        return self.returncode

    def _hear(self) -> None:
        self.returncode = int(self._server.recv(64) or -signal.SIGKILL)
        self._server.close()


def _is_readable(one: socket.socket, timeout: float | None) -> bool:
    with selectors.DefaultSelector() as waiting:
        waiting.register(one, selectors.EVENT_READ)
        return bool(waiting.select(timeout))


# --------------------------------------------------------------------------------------------------------- the server


@contextlib.contextmanager
def server(folder: Path) -> Any:
    """Run the server while this is open, and have `start` know of it; nothing where the system has no pidfd."""
    if not hasattr(os, "pidfd_open"):
        yield
        return
    path = folder / "socket"
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # from here on requests wait, whoever starts first
    listening.bind(str(path))
    listening.listen(64)
    command = [sys.executable, __file__, str(listening.fileno())]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, pass_fds=[listening.fileno()])
    listening.close()
    os.environ[ADDRESS] = json.dumps({"path": str(path), "environment": _fixed(os.environ)})
    try:
        yield
    finally:
        os.environ.pop(ADDRESS, None)
        process.communicate()  # closes its standard input, at which it ends


def _import_all() -> None:
    """What the commands import, and quietly, as they do."""
    import logging

    from dpo_cli.environment import prepare_environment

    prepare_environment("train")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import transformers
    import trl

    for library, names in {transformers: "Trainer Qwen3ForCausalLM AutoTokenizer", trl: "DPOTrainer DPOConfig"}.items():
        for name in names.split():
            getattr(library, name)  # imported when it is first asked for


def serve(descriptor: int) -> dict[str, Any]:
    """Fork at each request to a listening socket; returns in the forks only, with what is asked."""
    listening = socket.socket(fileno=descriptor)
    if sys.stdin in select.select([listening, sys.stdin], [], [])[0]:
        sys.exit()  # whoever started it is gone
    _import_all()  # at the first request, for a run of light tests makes none
    waiting = selectors.DefaultSelector()
    waiting.register(listening, selectors.EVENT_READ)
    waiting.register(sys.stdin, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if key.fileobj is sys.stdin:
                sys.exit()
            if key.data is not None:  # a fork has ended
                connection, pid = key.data
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                waiting.unregister(key.fileobj)
                os.close(key.fd)
                with contextlib.suppress(BrokenPipeError), connection:
                    connection.send(str(code).encode())
                continue
            connection, _ = listening.accept()
            message, descriptors, _, _ = socket.recv_fds(connection, 2**20, 3)
            pid = os.fork()
            if pid == 0:
                for target, descriptor in enumerate(descriptors):
                    os.dup2(descriptor, target)
                waiting.close()
                os.closerange(3, max(descriptors[-1], connection.fileno()) + 1)
                return dict(json.loads(message))
            for descriptor in descriptors:
                os.close(descriptor)
            connection.send(str(pid).encode())
            waiting.register(os.pidfd_open(pid), selectors.EVENT_READ, (connection, pid))


def become(request: dict[str, Any]) -> None:
    """Turn a fork into the process that is asked for."""
    os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["dpo_cli", *request["arguments"]]
    sys.path[0] = request["folder"]
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "utf-8").partition(":")
    at_once = "PYTHONUNBUFFERED" in os.environ
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        kind = errors or ("backslashreplace" if number == 2 else "strict")
        raw = io.FileIO(number, "r" if number == 0 else "w", closefd=False)
        binary = io.BufferedReader(raw) if number == 0 else io.BufferedWriter(raw)
        stream = io.TextIOWrapper(binary, encoding, kind, line_buffering=number == 2, write_through=at_once)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # this checkout's package, wherever another may be installed
    become(serve(int(sys.argv[1])))
    runpy.run_module("dpo_cli", run_name="__main__", alter_sys=True)
