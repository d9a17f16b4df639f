"""Runs a plan's commands: several at once, with logs, progress, a lock, and no orphans.

In: steps with command lines. Out: their results and logs. Invariant: while a command of a run is
alive, the run's lock is held, and no second run begins; what a signal ends is ended whole.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from types import FrameType, TracebackType
from typing import Protocol, TextIO

from cellseg_mm.core.errors import CellSegError

# what mmengine's logger writes, for example: Iter(train) [ 50/300]  lr: 1e-3  eta: 0:03:20
PROGRESS = re.compile(r'(?:Iter|Epoch)\((\w+)\)\s*\[\s*(\d+)/(\d+)\].*?eta: (\S+)')
SIGNALS = tuple(
    getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP') if hasattr(signal, name)
)
GRACE_S = 30.0  # between asking a command to end and ending it


class Step(Protocol):
    """What is run; see ``cross_validation.Step``."""

    name: str
    command: tuple[str, ...]
    done: bool
    reason: str
    log_path: Path
    after: Callable[[], None] | None


@contextmanager
def locked(path: Path) -> Iterator[TextIO]:
    """Hold a lock on a place; the kernel frees it when the last process that holds it is gone.

    The file names the processes for people; whether it is locked does not depend on its content,
    so what a killed run left behind is no lock. Commands inherit the lock: if only this process is
    killed, its commands keep the place until they end.

    Raises:
        CellSegError: Another run holds it; names its processes. Or this is Windows.
    """
    try:
        import fcntl
    except ImportError as problem:
        raise CellSegError(
            f'{path}: cannot be locked on {sys.platform}; expected Linux or macOS; use WSL, or run '
            'the steps one by one: tools/train.py, test.py, score_oof.py, find_best.py, ensemble.py'
        ) from problem

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('a+', encoding='utf-8') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            owners = '; '.join(lock.read().split('\n')).strip('; ') or 'an unknown process'
            raise CellSegError(
                f'{path}: another run works here ({owners}); two would train the same folds; wait '
                'for it, or end its processes that are still alive'
            ) from None
        lock.truncate(0)
        _note(lock, f'cross-validation: process {os.getpid()} on {os.uname().nodename}')
        try:
            yield lock
        finally:
            lock.truncate(0)


def _note(lock: TextIO, text: str) -> None:
    lock.write(f'{text}\n')
    lock.flush()


class Screen:
    """What a person sees of steps that run side by side.

    Lines that stay go to standard output, whole; on a terminal a last line on standard error tells
    how far the running steps are, and makes room whenever a line comes.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._now: dict[str, str] = {}
        self.is_live = sys.stderr.isatty()

    def say(self, line: str) -> None:
        """Print a line."""
        with self._guard:
            self._draw('')
            sys.stdout.write(f'{line}\n')  # print() would write the end by itself
            sys.stdout.flush()
            self._draw('; '.join(self._now.values()))

    def show(self, name: str, progress: str) -> None:
        """Tell how far a step is."""
        with self._guard:
            self._now[name] = f'{name}: {progress}'
            self._draw('; '.join(self._now.values()))

    def forget(self, name: str) -> None:
        """Show a step no more."""
        with self._guard:
            self._now.pop(name, None)
            self._draw('; '.join(self._now.values()))

    def _draw(self, text: str) -> None:
        if self.is_live:
            width = shutil.get_terminal_size().columns - 1  # a line that wraps cannot be taken back
            sys.stderr.write(f'\r\x1b[K{text[:width]}')
            sys.stderr.flush()


class StepRunner:
    """Runs steps and ends them when this process is told to end; use it as a context.

    Steps run in threads, and signals arrive in the main thread: none can come between the start of
    a command and its registration.
    """

    def __init__(self, lock: TextIO) -> None:
        self._lock = lock
        self._screen = Screen()
        self._guard = threading.Lock()
        self._running: list[subprocess.Popen] = []
        self._stopped_by = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StepRunner:
        # A signal that was ignored before (nohup) stays ignored.
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end_all()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stopped_by = self._stopped_by or number
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        os.write(2, b'ended by a signal; start the same command again to go on\n')
        sys.exit(128 + number)

    def _end_all(self) -> None:
        with self._guard:
            self._stopped_by = self._stopped_by or -1  # nothing new starts
            running = list(self._running)
        for process in running:
            process.terminate()
        deadline = time.monotonic() + GRACE_S
        for process in running:
            try:
                process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def run(self, chains: Sequence[Sequence[Step]], devices: Sequence[str]) -> None:
        """Run each chain's steps in order unless done, as many chains at once as there are devices.

        Raises:
            CellSegError: Steps failed; names their logs. The other chains were finished first.
        """
        free: Queue[str] = Queue()
        for device in devices:
            free.put(device)

        def run_chain(steps: Sequence[Step]) -> None:
            device = free.get()
            try:
                for step in steps:
                    self._run(step, device)
            finally:
                free.put(device)

        with ThreadPoolExecutor(max_workers=len(devices)) as pool:
            try:
                jobs = [pool.submit(run_chain, steps) for steps in chains]
                problems = [error for job in jobs if (error := job.exception()) is not None]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._end_all()  # or the pool would wait for the commands
                raise
        unexpected = [error for error in problems if not isinstance(error, CellSegError)]
        if unexpected:
            raise unexpected[0]
        if problems:
            raise CellSegError('; '.join(map(str, problems)))

    def _run(self, step: Step, device: str) -> None:
        if step.done:
            self._screen.say(f'{step.name}: nothing to do ({step.reason})')
            return
        self._screen.say(f'{step.name} ... (log: {step.log_path})')
        step.log_path.parent.mkdir(parents=True, exist_ok=True)
        with step.log_path.open('ab') as log:
            start = log.tell()
            process = self._start(step, device, log.fileno())
            try:
                code = _wait_and_show(process, step, start, self._screen)
            finally:
                self._screen.forget(step.name)
                with self._guard:
                    if process.poll() is not None:
                        self._running.remove(process)
        if code:
            tail = step.log_path.read_text(errors='replace').strip().splitlines()[-1:]
            raise CellSegError(
                f'{step.name}: stopped with status {code}: {"".join(tail)[:500]}; see '
                f'{step.log_path}; repair it and start the same command again'
            )
        if step.after is not None:
            step.after()

    def _start(self, step: Step, device: str, log_fd: int) -> subprocess.Popen:
        environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': device} if device else None
        # Under the guard: a step either sees the stop, or is seen by who stops.
        with self._guard:
            if self._stopped_by:
                raise CellSegError(f'{step.name}: not started, the run was stopped')
            process = subprocess.Popen(
                step.command,
                stdin=subprocess.DEVNULL,
                stdout=log_fd,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[self._lock.fileno()],
            )
            self._running.append(process)
            _note(self._lock, f'{step.name}: process {process.pid}')
        return process


def _wait_and_show(process: subprocess.Popen, step: Step, start: int, screen: Screen) -> int:
    """Wait for a step; on a terminal, show the newest progress that its log tells of."""
    while screen.is_live:
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            screen.show(step.name, progress_of(step.log_path, start))
    return process.wait()


def progress_of(log_path: Path, start: int = 0) -> str:
    """Return the last progress that mmengine wrote to a log after byte ``start``."""
    with log_path.open('rb') as log:
        log.seek(max(start, log.seek(0, os.SEEK_END) - 20_000))
        text = log.read().decode(errors='replace')
    found = PROGRESS.findall(text)
    if not found:
        return 'starting'
    phase, now, last, eta = found[-1]
    return f'{phase} {now}/{last}, ETA {eta}'
