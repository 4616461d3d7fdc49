"""Run the project's scripts in processes forked from one that has already imported PyTorch.

Importing PyTorch takes longer than most runs of the tests. A forked process runs the script as `python SCRIPT` does,
from its first line on, with its own arguments, environment, folder, output and exit status. Tests of what comes before
that line (closed streams, encodings, torchrun's restarts) start a new Python instead.
"""
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "torchvision", "scipy.stats"])

# The size of synthetic data sets in tests: training images, test images, pixels on a side.
IMAGES, SIDE = {True: 96, False: 64}, 16


def run_script(path: str, flags: list[str], folder: str, environment: dict[str, str], streams: list[str]) -> None:
    """Run the script at `path` on small synthetic images in this process, which was forked for it."""
    for number, stream in enumerate(streams, 1):
        descriptor = os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [path, *flags]
    sys.path[:0] = [os.path.dirname(path), str(ROOT)]
    from singlestep import data

    data.DUMMY_SIZES, data.DUMMY_SIDE = IMAGES, SIDE
    runpy.run_path(path, run_name="__main__")


class Started:
    """A script that runs in a process of its own; both of its streams go to the file `terminal`, if given."""

    def __init__(self, name: str | Path, *flags, cwd: str | Path = ROOT, env: dict[str, str] | None = None,
                 terminal: str | None = None):
        self.command = [str(ROOT / name), *map(str, flags)]
        self.folder = tempfile.TemporaryDirectory(prefix="streams-")  # removed with this object
        self.streams = [Path(self.folder.name, name) for name in ("output", "error")]
        streams = [terminal or str(stream) for stream in self.streams]
        environment = dict(os.environ if env is None else env)
        self.process = CONTEXT.Process(target=run_script, args=(
            self.command[0], self.command[1:], str(cwd), environment, streams))
        self.process.start()
        self.pid = self.process.pid

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait_for(self, path: Path) -> None:
        """Wait until the script has made the file at `path`."""
        while not path.exists():
            assert self.running, self.finish()
            time.sleep(0.01)

    def finish(self, timeout: float = 280) -> subprocess.CompletedProcess:
        """Wait until the script ends. Returns what subprocess.run returns."""
        self.process.join(timeout)
        late = self.running
        if late:
            self.process.kill()
            self.process.join()
        output, error = (stream.read_text(encoding="utf-8") if stream.exists() else "" for stream in self.streams)
        assert not late, f"{self.command} took more than {timeout} s: {output}{error}"
        return subprocess.CompletedProcess(self.command, self.process.exitcode, output, error)


def forked(name: str | Path, *flags, timeout: float = 280, **options) -> subprocess.CompletedProcess:
    """Run a script in a forked process and wait for its end."""
    return Started(name, *flags, **options).finish(timeout)


def start_together(name: str | Path, *flags, env: dict[str, str] | None = None, **options) -> list[Started]:
    """Start a script in two forked processes, each with the environment that torchrun would give it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**(os.environ if env is None else env), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [Started(name, *flags, env={**shared, "RANK": rank, "LOCAL_RANK": rank}, **options) for rank in "01"]


def together(name: str | Path, *flags, timeout: float = 280, **options) -> subprocess.CompletedProcess:
    """Run a script in two forked processes and wait for their ends.

    Returns both outputs joined, and the first exit status that is not 0.
    """
    ends = [process.finish(timeout) for process in start_together(name, *flags, **options)]
    return subprocess.CompletedProcess(ends[0].args, next((end.returncode for end in ends if end.returncode), 0),
                                       "".join(end.stdout for end in ends), "".join(end.stderr for end in ends))
