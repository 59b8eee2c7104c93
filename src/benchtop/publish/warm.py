"""A process that has done the heavy imports and forks one process for each chapter.

``python -m benchtop.publish.warm`` reads requests, one JSON line each, and answers on stdout with the process id and,
when that process has ended, with its exit status. It ends, and takes the running chapter along, when its stdin closes:
whatever happens to the worker that started it, no chapter is left behind. Jupyter is needed for the request "kernel" only.
"""

import ast
import base64
import contextlib
import ctypes
import importlib
import json
import linecache
import os
import platform
import re
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
import types
from pathlib import Path
from typing import Any

from benchtop.report import display, emit

PRELOAD = (
    "torch",
    "numpy",
    "pandas",
    "scipy.stats",
    "matplotlib.pyplot",
    *(f"benchtop.{name}" for name in ("profile", "train", "claims", "plots", "widgets", "techniques", "data")),
    "IPython.core.interactiveshell",
    "ipykernel.kernelapp",
)
FORK = hasattr(os, "pidfd_open")  # Linux; elsewhere frameworks do not survive a fork and each chapter imports anew
GOODBYE = "import benchtop.publish.warm\nbenchtop.publish.warm.finish()"  # the runner's last cell


# ---- the worker's side ----


class Process:
    """A chapter's process, seen from the worker: enough of ``subprocess.Popen`` for a kernel manager."""

    stdin = stdout = stderr = None

    def __init__(self, pid: int, server: "Server"):
        self.pid, self.server, self.returncode = pid, server, None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self.server.answers], [], [], 0)[0]:
            self.returncode = self.server.read().get("exit", -signal.SIGKILL)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (timeout if timeout is not None else 1e9)
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("chapter", timeout or 0)
            time.sleep(0.02)
        return self.returncode

    def send_signal(self, signum: int) -> None:
        """To the whole process group: what a chapter started ends with it."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    terminate = kill


class Server:
    """The forking process, seen from the worker that owns it."""

    def __init__(self, threads: int | None = None):
        environ = os.environ | {"MPLBACKEND": "agg", "PYTHONUNBUFFERED": "1"}
        environ.pop("BENCHTOP_PROFILE", None)  # the parameter decides
        if threads:
            environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environ,
            text=True,
            start_new_session=True,  # Ctrl-C reaches the runner alone, which then ends the others in order
        )
        self.answers = self.process.stdout

    def start(self, what: str, *, log: Path, cwd: Path, env: dict[str, str], **arguments: Any) -> Process:
        """Fork a process that does ``what`` (kernel or plain); its own output goes to ``log``."""
        request = {"what": what, "log": str(log), "cwd": str(cwd), "env": env} | arguments
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            return Process(self.read()["pid"], self)
        except (BrokenPipeError, KeyError):
            raise RuntimeError("the process that starts chapters has ended: look for lack of memory") from None

    def read(self) -> dict[str, int]:
        line = self.answers.readline()
        return json.loads(line) if line else {}

    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# ---- the forking process itself ----


def serve() -> None:
    """Answer requests until stdin closes."""
    first = sys.stdin.readline() if not FORK else None
    if first:
        answer(pid=os.getpid())
        become(json.loads(first))
    for module in PRELOAD:
        with contextlib.suppress(ImportError):  # a machine without Jupyter
            importlib.import_module(module)
    for line in iter(sys.stdin.readline, ""):
        pid = os.fork()
        if pid == 0:
            become(json.loads(line))
        os.setpgid(pid, pid)
        answer(pid=pid)
        ended = os.pidfd_open(pid)
        ready, _, _ = select.select([ended, sys.stdin], [], [])
        with contextlib.suppress(ProcessLookupError):  # also what an ended chapter has left running
            os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        os.close(ended)
        if ended not in ready:
            return
        answer(exit=os.waitstatus_to_exitcode(status))


def answer(**message: int) -> None:
    print(json.dumps(message), flush=True)


def become(request: dict[str, Any]) -> None:
    """Turn this process into the one the request asks for. Never returns."""
    code = 1
    try:
        with contextlib.suppress(PermissionError, ProcessLookupError):  # the parent may have been first
            os.setpgid(0, 0)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the server
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0), os.dup2(log, 1), os.dup2(log, 2)
        os.chdir(request["cwd"])
        os.environ.update(request["env"])
        emit("begin", time=time.time())
        code = {"kernel": kernel, "plain": plain}[request["what"]](request)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def kernel(request: dict[str, Any]) -> int:
    """A Jupyter kernel on the given connection file."""
    from ipykernel.kernelapp import IPKernelApp

    if matplotlib := sys.modules.get("matplotlib"):  # what a fresh kernel finds in its environment
        matplotlib.rcParams["backend"] = "module://matplotlib_inline.backend_inline"
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    IPKernelApp.launch_instance(["-f", request["connection"], "--HistoryManager.enabled=False"])
    return 0


def plain(request: dict[str, Any]) -> int:
    """Execute code cells one after the other, as a script would; 1 if one fails, with its traceback in the log."""
    sys.modules["__main__"] = module = types.ModuleType("__main__")  # where pickle looks for a chapter's classes
    module.display = lambda *things: print(*things, sep="\n")
    sys.displayhook = lambda value: None if value is None else print(repr(value))
    for number, source in enumerate(json.loads(Path(request["cells"]).read_text(encoding="utf-8")), 1):
        emit("cell", number=number)
        try:
            execute(source, f"<cell [{number}]>", module.__dict__)
            keep_figures()
        except BaseException as error:
            trace = error.__traceback__
            while (
                trace.tb_next and trace.tb_frame.f_code.co_filename == __file__
            ):  # begin where the chapter's code does
                trace = trace.tb_next
            text = "".join(traceback.format_exception(type(error), error, trace)).rstrip()
            print(text)
            emit("error", number=number, lines=text.splitlines())
            return 1
    return 0


def execute(source: str, name: str, namespace: dict[str, Any]) -> None:
    """Run one cell; the value of a last expression is printed, where a notebook would show it."""
    source = re.sub(r"^\s*[%!].*$", "", source, flags=re.M)
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # for tracebacks
    tree = ast.parse(source, name)
    shown = tree.body and isinstance(tree.body[-1], ast.Expr) and not source.rstrip().endswith(";")
    last = [tree.body.pop()] if shown else []
    exec(compile(tree, name, "exec"), namespace)
    exec(compile(ast.Interactive(last), name, "single"), namespace)


def keep_figures() -> None:
    """Show the figures that a cell has left open, as a notebook would."""
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        for number in pyplot.get_fignums():
            plots = importlib.import_module("benchtop.plots")
            image = base64.b64encode(plots.png(pyplot.figure(number))).decode()
            display({"image/png": image, "text/plain": "[figure]"})


def finish() -> None:
    """Tell the log when the chapter ended, on what machine, and how much memory it took."""
    import torch

    import benchtop

    cuda = torch.cuda.is_initialized()
    emit(
        "end",
        time=time.time(),
        device=torch.cuda.get_device_name() if cuda else processor(),
        python=platform.python_version(),
        torch=torch.__version__,
        benchtop=benchtop.__version__,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        cuda_bytes=torch.cuda.max_memory_allocated() if cuda else None,
    )


def processor() -> str:
    """What the machine calls its processor, and how many of them this process may use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M):
            name = found[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


if __name__ == "__main__":
    serve()
