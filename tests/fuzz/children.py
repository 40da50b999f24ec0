"""Forked children: each does one thing in a folder of its own, within bounds of time and memory, and is then looked at.

A child that ends by a signal ends alone. Python has loaded everything before, so that a child costs milliseconds. The
parent computes nothing: threads do not survive a fork, and a lock that one held stays locked.
"""

import faulthandler
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SECONDS = 20  # a child that runs longer hangs
MEMORY = 2 << 30  # bytes that a child may take beyond its parent's


@dataclass(frozen=True)
class Ended:
    """How a child ended. code: the exit code, negative for a signal, None where it had to be stopped."""

    code: int | None
    out: str
    err: str

    @property
    def fault(self) -> str:
        """What no child may do; nothing where it did not."""
        if self.code is None:
            return f"hangs: over {SECONDS} s"
        if self.code < 0:
            return f"signal {signal.Signals(-self.code).name}"
        if "Traceback (most recent call last)" in self.err:
            return f"traceback: {self.err.strip().splitlines()[-1][:200]}"
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        if self.code and self.code not in (1, 2):
            return f"exit code {self.code}"
        if self.code == 1 and (len(lines) != 1 or len(lines[0]) > 1000):
            return f"{len(lines)} lines of error of {sum(map(len, lines))} characters"
        if self.code == 1 and ("out of memory" in lines[0] or "allocate" in lines[0]):
            return f"memory: {lines[0][:200]}"
        return ""


def run_child(work: Callable[[], None], folder: Path, seconds: float = SECONDS) -> Ended:
    """Runs `work` in a forked child; it may leave nothing in the folder but what it was asked for.

    Standard output and error go to files beside the folder, temporary files into a folder of their own beside it.
    """
    out, err = (folder.with_name(f"{folder.name}.{name}") for name in ("out", "err"))
    temporary = folder.with_name(f"{folder.name}.tmp")
    temporary.mkdir(exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _be_child(work, temporary, out, err)
    deadline, status = time.monotonic() + seconds, None
    while status is None:
        found, ended = os.waitpid(pid, os.WNOHANG)
        if found:
            status = os.waitstatus_to_exitcode(ended)
        elif time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            break
        else:
            time.sleep(0.002)
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in (out, err)]
    return Ended(status, *texts)


def _be_child(work: Callable[[], None], temporary: Path, out: Path, err: Path) -> None:
    code = 1
    try:
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 (as long as the process)
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        faulthandler.enable(2)
        os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (_mapped() + MEMORY,) * 2)
        work()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _mapped() -> int:
    pages = Path("/proc/self/statm").read_text().split()[0]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
