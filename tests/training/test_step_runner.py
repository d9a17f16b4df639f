"""Commands of a run: in order, side by side, logged, and none left behind."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from cellseg_mm.core.errors import CellSegError
from cellseg_mm.training.step_runner import Screen, StepRunner, locked, progress_of

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Command:
    """A step that runs Python code."""

    name: str
    code: str
    log_path: Path
    done: bool = False
    reason: str = ''
    after: None = None

    @property
    def command(self) -> tuple[str, ...]:
        return sys.executable, '-c', self.code


def run(chains: list, tmp_path: Path, devices: tuple[str, ...] = ('',)) -> None:
    with locked(tmp_path / 'lock') as lock, StepRunner(lock) as runner:
        runner.run(chains, devices)


def test_a_failing_chain_stops_and_the_others_go_on(tmp_path: Path) -> None:
    def step(name: str, code: str) -> Command:
        return Command(
            name, f'{code}; open({str(tmp_path / name)!r}, "w")', tmp_path / f'{name}.log'
        )

    chains = [
        [step('a1', 'raise SystemExit("no disk")'), step('a2', 'pass')],
        [step('b1', 'pass'), step('b2', 'pass')],
    ]
    with pytest.raises(CellSegError, match=r'a1: stopped with status 1: no disk; see .*a1\.log'):
        run(chains, tmp_path)
    assert sorted(p.name for p in tmp_path.glob('??')) == ['b1', 'b2']


def test_devices_are_shared_one_chain_each(tmp_path: Path) -> None:
    code = 'import os, time; t = time.time(); time.sleep(0.5); '
    code += 'print(os.environ["CUDA_VISIBLE_DEVICES"], t, time.time())'
    chains = [[Command(f's{i}', code, tmp_path / f's{i}.log')] for i in range(4)]
    run(chains, tmp_path, ('3', '5'))
    spans: dict[str, list] = {}
    for i in range(4):
        device, begin_s, end_s = (tmp_path / f's{i}.log').read_text().split()
        spans.setdefault(device, []).append((float(begin_s), float(end_s)))
    assert set(spans) == {'3', '5'}
    for rows in spans.values():
        rows.sort()
        assert all(a[1] <= b[0] for a, b in pairwise(rows))


RUNNER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where pytest runs behind a shell
from pathlib import Path
from tests.training.test_step_runner import Command, run
root = Path(sys.argv[1])
code = 'import os, time; open(r"{0}", "w").write(str(os.getpid())); time.sleep(60)'
print('begun', flush=True)
run([[Command('one', code.format(root / 'pid'), root / 'log')]], root)
"""


def start_runner(tmp_path: Path) -> tuple[subprocess.Popen, int]:
    """Start a run in a process of its own and wait for its command."""
    process = subprocess.Popen(
        [sys.executable, '-c', RUNNER, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    path = tmp_path / 'pid'
    while not path.is_file() or not path.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    return process, int(path.read_text())


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f'/proc/{pid}/stat').read_text().split(')')[-1].split()[0] != 'Z'


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT], ids=['SIGTERM', 'SIGINT'])
def test_an_ended_run_leaves_no_orphan(tmp_path: Path, number: int) -> None:
    process, child = start_runner(tmp_path)
    with pytest.raises(CellSegError, match=rf'another run works here .*process {process.pid}'):
        run([], tmp_path)
    process.send_signal(number)
    code = process.wait(30)
    assert code in (128 + number, -number)
    assert not is_alive(child)
    run([], tmp_path)


def test_a_killed_run_keeps_the_place_while_its_command_lives(tmp_path: Path) -> None:
    process, child = start_runner(tmp_path)
    process.kill()
    process.wait()
    assert is_alive(child)
    with pytest.raises(CellSegError, match=f'one: process {child}'):
        run([], tmp_path)
    os.kill(child, signal.SIGKILL)
    while is_alive(child):
        time.sleep(0.05)
    assert (tmp_path / 'lock').read_text()  # the stale note is no lock
    run([], tmp_path)


class Terminal(io.StringIO):
    """Both streams of a terminal."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """Return what is to be seen: a return and ``ESC [K`` take a line back."""
        return [line.split('\r\x1b[K')[-1] for line in self.getvalue().split('\n')]


def make_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Put a terminal in place; pytest undoes it between a fixture and its test."""
    both = Terminal()
    monkeypatch.setattr(sys, 'stdout', both)
    monkeypatch.setattr(sys, 'stderr', both)
    monkeypatch.setenv('COLUMNS', '60')
    return both


def test_a_line_never_follows_progress_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    screen = Screen()
    screen.say('train fold 0 ...')
    screen.show('train fold 0', 'train 20/100, ETA 0:01:00')
    screen.say('train fold 1 ...')
    screen.show('train fold 1', 'starting')
    both = 'train fold 0: train 20/100, ETA 0:01:00; train fold 1: starting'
    assert terminal.lines() == ['train fold 0 ...', 'train fold 1 ...', both[:59]]
    screen.forget('train fold 0')
    screen.say('test fold 0 ...')
    assert terminal.lines()[2:] == ['test fold 0 ...', 'train fold 1: starting']
    screen.forget('train fold 1')
    assert terminal.lines()[-1] == ''


def test_steps_side_by_side_leave_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = make_terminal(monkeypatch)
    names = [f'step {i}' for i in range(4)]
    chains = [[Command(name, 'import time; time.sleep(2)', tmp_path / name)] for name in names]
    run(chains, tmp_path, devices=('', ''))
    assert sorted(terminal.lines()) == ['', *(f'{n} ... (log: {tmp_path / n})' for n in names)]
    assert 'step 0: starting' in terminal.getvalue()


def test_no_progress_line_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, 'stdout', out)
    monkeypatch.setattr(sys, 'stderr', out)
    screen = Screen()
    screen.show('train fold 0', 'starting')
    screen.say('train fold 1 ...')
    screen.forget('train fold 0')
    assert out.getvalue() == 'train fold 1 ...\n'


def test_progress_is_the_newest_of_this_start(tmp_path: Path) -> None:
    log = tmp_path / 'log'
    old = 'Iter(train) [ 90/100]  lr: 1e-3  eta: 0:00:10  time: 1\n'
    log.write_text(old + 'noise\nIter(train) [ 10/100]  lr: 1e-3  eta: 0:03:20  time: 1\nmore\n')
    assert progress_of(log) == 'train 10/100, ETA 0:03:20'
    assert progress_of(log, log.stat().st_size) == 'starting'
