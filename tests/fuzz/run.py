"""Feed damaged files to the readers of TIFFs, id maps, folds, predictions and checkpoints.

    python -m tests.fuzz.run --cases 20000 --seed 0
    python -m tests.fuzz.run --reader tiff --cases 1000000 --seed 7      # longer, another seed

Every case is read in a child process, so that a crash of a decoder ends the child and is counted.
A reader may return a checked value or raise a CellSegError that names the file; anything else is
a failure: another exception, a signal, more than 10 s of CPU, or more than 2 GB on top.
Files that bring out a sentence or a place in the code that was not seen before join the files to
damage.
Failing files are kept in --keep. Exit status 1 means that there are failures.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cellseg_mm.core.errors import CellSegError
from tests.fuzz.readers import READERS, Reader

SECONDS = 10  # of CPU: the machine may be busy
EXTRA_BYTES = 2 << 30
MAX_POOL = 400


@dataclass
class Tally:
    """What happened to the cases of one reader."""

    reader: str
    n_cases: int = 0
    n_accepted: int = 0
    n_refused: int = 0
    sentences: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def line(self) -> str:
        """Return one line for people."""
        return (
            f'{self.reader:<12} {self.n_cases:>8} cases  {self.n_refused:>8} refused  '
            f'{self.n_accepted:>8} read  {len(self.sentences):>5} sentences  '
            f'{len(self.failures):>4} failures  {self.n_cases / max(self.seconds, 1e-9):>6.0f}/s'
        )


class TooLong(BaseException):
    """A case took longer than SECONDS; not an Exception, so that no reader can catch it."""


def _too_long(*_: object) -> None:
    raise TooLong


def try_case(reader: Reader, path: Path) -> tuple[str, str]:
    """Read one file; return ('read', ''), ('refused', sentence) or ('failed', reason)."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(60 * SECONDS)  # waiting for something costs no CPU
    try:
        reader.read(path)
        return 'read', ''
    except CellSegError as error:
        if str(path) not in str(error):
            return 'failed', f'the error does not name the file: {error}'
        str(error).encode()
        return 'refused', _sentence(str(error).replace(str(path), ''), error)
    except TooLong:
        return 'failed', f'more than {SECONDS} s of CPU'
    except BaseException:
        return 'failed', traceback.format_exc(limit=-3)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)


def _sentence(text: str, error: BaseException) -> str:
    """Return the text without its numbers and quotations, and where it came from."""
    cause = error.__cause__
    where = ''
    if cause is not None and cause.__traceback__ is not None:
        last = traceback.extract_tb(cause.__traceback__)[-1]
        where = f'{type(cause).__name__}@{Path(last.filename).name}:{last.lineno}'
    return re.sub(r"'[^']*'|\d+|[^\x20-\x7e]", '#', text)[:70] + where


def child(name: str, seed: int, first: int, last: int, folder: Path, out: int) -> None:
    """Read cases first..last - 1 and write one JSON line for each; never returns."""
    used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_BYTES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, _too_long)
    signal.signal(signal.SIGPROF, _too_long)
    logging.disable(logging.CRITICAL)  # tifffile describes every oddity of a damaged file
    reader = READERS[name]
    path = folder / f'case{reader.suffix}'
    pool = reader.good(folder)
    seen: set[str] = set()
    with os.fdopen(out, 'w', buffering=1) as report:
        for number in range(first, last):
            rng = np.random.default_rng([seed, number, sorted(READERS).index(name)])
            content = reader.mutate(pool[int(rng.integers(len(pool)))], rng)
            path.write_bytes(content)
            kind, text = try_case(reader, path)
            if kind == 'refused' and text not in seen and len(pool) < MAX_POOL:
                seen.add(text)
                pool.append(content)
            report.write(json.dumps([number, kind, text]) + '\n')
    os._exit(0)


def fuzz(name: str, *, cases: int, seed: int, keep: Path | None = None, chunk: int = 2000) -> Tally:
    """Run ``cases`` cases of one reader."""
    tally = Tally(name)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix='fuzz-') as text:
        folder = Path(text)
        number = 0
        while number < cases:
            number = _run_child(tally, seed, number, min(number + chunk, cases), folder, keep)
    tally.seconds = time.perf_counter() - started
    return tally


def _run_child(
    tally: Tally, seed: int, first: int, last: int, folder: Path, keep: Path | None
) -> int:
    """Run one child; return the number of the first case that is still to do."""
    read_end, write_end = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read_end)
            child(tally.reader, seed, first, last, folder, write_end)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    os.close(write_end)
    done = first
    with os.fdopen(read_end) as report:
        for line in report:
            number, kind, text = json.loads(line)
            done = number + 1
            tally.n_cases += 1
            tally.n_accepted += kind == 'read'
            tally.n_refused += kind == 'refused'
            if kind == 'refused':
                tally.sentences[text] += 1
            if kind == 'failed':
                _fail(tally, number, text, folder, keep)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        tally.n_cases += 1
        _fail(tally, done, f'ended by signal {os.WTERMSIG(status)}', folder, keep)
        return done + 1
    if status:
        raise RuntimeError(f'{tally.reader}: the fuzzing child itself failed at case {done}')
    return done


def _fail(tally: Tally, number: int, text: str, folder: Path, keep: Path | None) -> None:
    tally.failures.append(f'case {number}: {text}')
    source = next(iter(folder.glob('case.*')), None)
    # Only exact for signals; for exceptions the child may be a case further already.
    if keep is not None and source is not None:
        keep.mkdir(parents=True, exist_ok=True)
        target = keep / f'{tally.reader}-{number}{source.suffix}'
        target.write_bytes(source.read_bytes())


def main() -> int:
    """Run and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--cases', type=int, default=20000, help='in all, over the readers')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--reader', choices=sorted(READERS), nargs='+', default=sorted(READERS))
    parser.add_argument('--keep', type=Path, help='folder for files that failed')
    parser.add_argument('--sentences', action='store_true', help='print what the readers said')
    args = parser.parse_args()
    each = -(-args.cases // len(args.reader))
    tallies = []
    for name in args.reader:
        tally = fuzz(name, cases=each, seed=args.seed, keep=args.keep)
        tallies.append(tally)
        print(tally.line(), flush=True)
        for failure in tally.failures[:20]:
            print(f'  {failure}')
        if args.sentences:
            for sentence, count in tally.sentences.most_common():
                print(f'  {count:>7} {sentence}')
    print(
        f'{sum(t.n_cases for t in tallies)} cases, {sum(len(t.failures) for t in tallies)} failures'
    )
    return int(any(tally.failures for tally in tallies))


if __name__ == '__main__':
    sys.exit(main())
