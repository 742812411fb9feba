"""`dpo-cli`, or other Python, in a process forked from one that has torch, transformers and TRL imported already.

A fresh process spends ten CPU-seconds on these imports before it does anything. The fork has a session, streams,
a working folder, an environment and an exit code of its own; it can be killed, and a full disk or a signal is real.
Cold is what asks for it, and what sets variables that libraries read when they are imported.

The server is this file as a program: a request comes over a socket with three descriptors, goes to a fork, and the
fork's process id and exit status are sent back.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
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
import threading
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
PROGRAM = ("-m", "dpo_cli")
AS_PYTHON = f"{sys.executable} {__file__}"  # a command that takes Python's arguments, and a fork does what they say
Environment = Mapping[str, str]


def python(*arguments: object, cold: bool = False, **options: Any) -> subprocess.Popen[str]:
    """Start Python on a file, `-m` a module or `-c` some code; options are those of `subprocess.Popen`, in text."""
    kind = Forked if not cold and forks(options) else subprocess.Popen
    return kind([sys.executable, *map(str, arguments)], **{"text": True, "encoding": "utf-8", **options})


def start(*arguments: object, cold: bool = False, **options: Any) -> subprocess.Popen[str]:
    """Start `python -m dpo_cli`, as `python` does."""
    return python(*PROGRAM, *arguments, cold=cold or not arguments or arguments[0] in LIGHT, **options)


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `python -m dpo_cli` to its end, as `run_python` does."""
    return run_python(*PROGRAM, *arguments, **options, starter=lambda *_, **given: start(*arguments, **given))


def run_python(
    *arguments: object, timeout: float | None = 120, starter: Any = python, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run Python to its end, as `subprocess.run` with both outputs captured does."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with starter(*arguments, **pipes | options) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def forks(options: Mapping[str, Any]) -> bool:
    return not options.get("preexec_fn") and bool(_server_of(options.get("env") or os.environ))


def _server_of(environment: Environment) -> str | None:
    """The address of the server whose libraries were imported in this environment."""
    wanted = _fixed(environment)
    servers = json.loads(os.environ.get(ADDRESS, "[]"))
    return next((server["path"] for server in servers if server["environment"] == wanted), None)


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
        environment = {**(given["env"] or os.environ)}
        folder = str(Path(given["cwd"] or ".").resolve())
        request = {"arguments": args[1:], "folder": folder, "environment": environment}
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server.connect(_server_of(environment) or "")
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
def server(folder: Path, environment: Environment | None = None) -> Any:
    """Run a server while this is open, and have `start` know of it; nothing where the system has no pidfd.

    An environment of its own is for libraries that read another one at import.
    """
    if not hasattr(os, "pidfd_open"):
        yield
        return
    path = folder / "socket"
    environment = {**(environment or os.environ)}
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # from here on requests wait, whoever starts first
    listening.bind(str(path))
    listening.listen(64)
    command = [sys.executable, __file__, str(listening.fileno())]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, start_new_session=True, pass_fds=[listening.fileno()], env=environment
    )
    listening.close()
    others = os.environ.get(ADDRESS, "[]")
    os.environ[ADDRESS] = json.dumps([*json.loads(others), {"path": str(path), "environment": _fixed(environment)}])
    try:
        yield
    finally:
        os.environ[ADDRESS] = others
        process.communicate()  # closes its standard input, at which it ends


def _import_all() -> None:
    """What the commands import, and quietly, as they do."""
    import logging

    from dpo_cli.environment import prepare_environment

    prepare_environment("train")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if os.environ.get("UNSLOTH_ALLOW_CPU"):
        from dpo_cli.backends import Backend, import_backend

        import_backend(Backend("unsloth", "a test's"))  # before the others, which it patches
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
    gc.freeze()  # so that no fork's collection looks through, and copies, what is imported
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
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
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


def execute(what: str, *arguments: str) -> None:
    """Do what Python's command line says."""
    if what == "-m":
        sys.argv = list(arguments)
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.argv = ["-c", *arguments[1:]]
        exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = [what, *arguments], str(Path(what).parent)
        runpy.run_path(what, run_name="__main__")


def end(code: object) -> None:
    """End as Python does, but for taking all modules apart, each page of which is the server's until then."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    if not sys.argv[1].isdecimal():
        sys.exit(python(*(one for one in sys.argv[1:] if one != "-u")).wait())
    sys.path[0] = str(Path(__file__).parents[1])  # this checkout's package, wherever another may be installed
    asked = serve(int(sys.argv[1]))
    become(asked)
    try:
        execute(*asked["arguments"])
    except SystemExit as ended:
        if isinstance(ended.code, str):
            raise
        end(ended.code)
    end(0)
