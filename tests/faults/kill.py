"""Kill jobs with SIGKILL at random moments, start them again, and compare how they end.

    python -m tests.faults.kill --jobs prepare,train,validate,checkpoint,test,predict,fuse,report \
        --kills 50 --seed 0

A job runs once undisturbed for reference. Then it is killed and started again in the same folder,
``--per-round`` times in a row, and left to end: its results must be those of the reference. This
repeats in fresh folders until there were ``--kills`` kills. The interpreter with its imports
is forked for every start, so that kills land in the job and not in the imports. Exit status 1
means that some ending differed, or a restart failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np

from tests.faults.jobs import JOBS, Job, prepare_data, prepare_models
from tests.support.micro import ROOT

LIMIT_S = 900.0  # of one undisturbed run on a busy machine
POLL_S = 0.002


@dataclass
class Outcome:
    """What happened to one job."""

    job: str
    n_kills: int = 0
    n_too_late: int = 0
    n_rounds: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Return one line for people."""
        return (
            f'{self.job:<11} {self.n_kills:>4} kills in {self.n_rounds:>3} rounds, '
            f'{self.n_too_late} ended before the kill, {len(self.problems)} problems, '
            f'{self.seconds:.0f} s'
        )


def import_all() -> None:
    """Import once what the jobs import."""
    import cv2
    import mmdet.models
    import torch

    import cellseg_mm.components
    import cellseg_mm.training.train
    from cellseg_mm.core import provenance

    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    assert cellseg_mm.components
    assert mmdet.models
    provenance.code_commit()  # remembered, so that a commit beside us changes no result
    provenance.versions()


def start(words: list[str], log_path: Path) -> int:
    """Fork a process that runs a tool with its output in ``log_path``; return its id."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    log_path.unlink(missing_ok=True)  # what an earlier start said must not begin the moment
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpgid(pid, pid)  # here too: the first kill may come before the child's own call
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        handle = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        # not what pytest put in their place
        sys.stdout = open(1, 'w', buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, 'w', buffering=1, closefd=False)  # noqa: SIM115
        sys.argv = list(words)
        os.chdir(ROOT)
        sys.path.insert(0, str(ROOT / 'tools'))
        runpy.run_path(str(ROOT / words[0]), run_name='__main__')
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, seconds: float) -> int | None:
    """Return the exit status, negative for a signal, or None when the time is up."""
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(POLL_S)


def run_to_end(words: list[str], log_path: Path) -> int:
    """Run undisturbed; return the exit status."""
    pid = start(words, log_path)
    code = wait(pid, LIMIT_S)
    if code is None:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return -1
    return code


class Clock:
    """Knows from the reference run how long the moment to kill in lasts."""

    def __init__(self, job: Job, words: list[str], folder: Path, log_path: Path) -> None:
        self.job = job
        begun = time.monotonic()
        pid = start(words, log_path)
        self.first, last = None, None
        while (code := wait(pid, 0)) is None:
            now = time.monotonic()
            if now - begun > LIMIT_S:
                os.killpg(pid, signal.SIGKILL)
            if self.first is None and self.is_begun(folder, log_path):
                self.first = now
            if self.first is not None and last is None and job.ends:
                last = now if job.ends in log_path.read_text(errors='replace') else None
            time.sleep(POLL_S)
        self.code = code
        end = time.monotonic()
        self.seconds = (last or end) - (self.first or begun)

    def is_begun(self, folder: Path, log_path: Path) -> bool:
        """Tell whether the moment to kill in has come."""
        if self.job.watch:
            return any(folder.glob(self.job.watch))
        if self.job.begins:
            return log_path.is_file() and self.job.begins in log_path.read_text(errors='replace')
        return True

    def kill(self, words: list[str], folder: Path, log_path: Path, rng: np.random.Generator):
        """Start, kill at a random moment; return None, or the exit status if it came too late."""
        pid = start(words, log_path)
        # A later start may never reach the moment (its work is done): then it just ends.
        while not self.is_begun(folder, log_path):
            code = wait(pid, POLL_S)
            if code is not None:
                return code
        # A checkpoint is written in milliseconds; kill within them or shortly after.
        length = 0.03 if self.job.watch else self.seconds
        begun = time.monotonic()
        code = wait(pid, float(rng.uniform(0, length)))
        if code is not None:
            # the reference run was slower (first of its kind, busy machine): aim earlier
            self.seconds = min(self.seconds, time.monotonic() - begun)
            return code
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return None


def kill_job(name: str, bench: Path, *, kills: int, per_round: int, seed: int) -> Outcome:
    """Kill one job ``kills`` times."""
    job = JOBS[name]
    outcome = Outcome(name)
    begun = time.monotonic()
    rng = np.random.default_rng([seed, sorted(JOBS).index(name)])
    folder = bench / 'run' / name  # always the same path: results name it
    log_path = bench / 'logs' / f'{name}.log'
    words = job.words(bench, folder)
    shutil.rmtree(folder, ignore_errors=True)
    clock = Clock(job, words, folder, log_path)
    reference = job.results(folder) if clock.code == 0 else {}
    if clock.code or not reference:
        shutil.copy(log_path, log_path.with_suffix('.reference.log'))
        outcome.problems.append(f'reference run: status {clock.code}, results {reference}')
        return outcome
    late = 0
    while outcome.n_kills < kills and late < 10 + kills:
        shutil.rmtree(folder, ignore_errors=True)
        for _ in range(min(per_round, kills - outcome.n_kills)):
            code = clock.kill(words, folder, log_path, rng)
            outcome.n_kills += code is None
            late += code is not None
            if code not in (None, 0):
                _problem(outcome, log_path, f'a restart ended with status {code}')
        outcome.n_rounds += 1
        code = run_to_end(words, log_path)
        found = job.results(folder) if code == 0 else {}
        if found != reference:
            differing = sorted(k for k in {*found, *reference} if found.get(k) != reference.get(k))
            _problem(outcome, log_path, f'status {code}, differing: {differing}')
        left = [str(p.relative_to(folder)) for p in folder.rglob('.tmp-*')]
        if left:
            _problem(outcome, log_path, f'left behind: {left}')
        print(f'  {outcome.line()}', flush=True)
    outcome.n_too_late = late
    outcome.seconds = time.monotonic() - begun
    return outcome


def _problem(outcome: Outcome, log_path: Path, text: str) -> None:
    keep = log_path.with_name(f'{outcome.job}.problem{len(outcome.problems)}.log')
    shutil.copy(log_path, keep)
    outcome.problems.append(f'round {outcome.n_rounds}: {text}; see {keep}')


def main() -> int:
    """Kill and print what happened."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--jobs', default=','.join(JOBS), help='names with commas')
    parser.add_argument('--kills', type=int, default=50, help='of each job')
    parser.add_argument('--per-round', type=int, default=5, help='kills before a job may end')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--bench', type=Path, help='folder for data, models and logs (kept)')
    args = parser.parse_args()
    names = args.jobs.split(',')
    if unknown := sorted(set(names) - set(JOBS)):
        parser.error(f'no such jobs: {unknown}; there are {", ".join(JOBS)}')
    bench = (args.bench or Path(tempfile.mkdtemp(prefix='kill-'))).absolute()
    os.environ['CELLSEG_DATA'] = str(bench / 'data')
    os.environ.pop('CELLSEG_FOLDS', None)
    bench.mkdir(parents=True, exist_ok=True)
    prepare_data(bench)
    if set(names) != {'prepare'}:
        import_all()
        prepare_models(bench, run_to_end)
    outcomes = []
    for name in names:
        outcomes.append(
            kill_job(name, bench, kills=args.kills, per_round=args.per_round, seed=args.seed)
        )
        print(outcomes[-1].line(), flush=True)
        for problem in outcomes[-1].problems:
            print(f'  {problem}', flush=True)
    content = [vars(outcome) for outcome in outcomes]
    (bench / 'kills.json').write_text(json.dumps(content, indent=1))
    return int(any(outcome.problems for outcome in outcomes))


if __name__ == '__main__':
    sys.exit(main())
