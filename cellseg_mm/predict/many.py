"""Many processes on one run: Dask workers that look at tiles, or the parts of a Slurm array.

In: items, and a recipe that makes a detector in any process. Out: the files that one process would
write, byte for byte. Invariant: whatever a worker has finished lies in the image's tiles, so a
worker that dies costs what it was looking at, and whatever goes wrong with an image stops only it.

An image goes through three kinds of tasks: what is there to do (open it, find its tissue), looking
at blocks of its tiles, and putting it together. Workers see the same folders by the same paths.
"""

from __future__ import annotations

import functools
import pickle
import shlex
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cellseg_mm.core.errors import CellSegError, ConfigError
from cellseg_mm.core.layout import as_typed
from cellseg_mm.core.progress import track
from cellseg_mm.predict.items import Item
from cellseg_mm.predict.params import Detector, PredictParams
from cellseg_mm.predict.predict import Run
from cellseg_mm.predict.summary import Summary

if TYPE_CHECKING:
    from distributed import Client, Future

Prepared = tuple[Detector, PredictParams]
Recipe = Callable[[], Prepared]

BLOCK = 16  # tiles of a task
IMAGES_PER_WORKER = 2  # images that are open at once: their blocks keep the workers busy

# A detector is made once in a process, and looks at one thing at a time.
_one_at_a_time = threading.Lock()


@functools.lru_cache(maxsize=1)
def _prepared(recipe: bytes) -> Prepared:
    made: Prepared = pickle.loads(recipe)()
    return made


Result = Summary | list[int] | None


def _in_worker(kind: str, recipe: bytes, item: Item, numbers: Sequence[int]) -> Result | _Problem:
    """Do one task; what goes wrong comes back as a sentence, for Dask would write its own."""
    with _one_at_a_time:
        try:
            return _task(Run(*_prepared(recipe)), kind, item, numbers)
        except Exception as problem:
            return _Problem(_sentence(item, problem))


def _task(run: Run, kind: str, item: Item, numbers: Sequence[int]) -> Result:
    if kind == 'plan':
        return run.waiting(item)
    if kind == 'look':
        run.look_at_numbers(item, numbers)
    else:
        for _ in run.guarded(item, run.complete(item)):
            pass
    return run.finish()


@dataclass(frozen=True, slots=True)
class _Problem:
    """What went wrong with a task."""

    text: str


@dataclass(slots=True)
class _Image:
    """An image on its way.

    Attributes:
        item: Which one.
        n_blocks: Tasks that are not done.
        problem: What went wrong.
    """

    item: Item
    n_blocks: int = 0
    problem: str = ''


@dataclass(slots=True)
class _Crew:
    """The workers, and what they are doing."""

    client: Client
    recipe: bytes
    summary: Summary = field(default_factory=Summary)
    doing: dict[Future, tuple[str, _Image]] = field(default_factory=dict)

    def give(self, kind: str, image: _Image, numbers: Sequence[int] = ()) -> Future:
        """Give a task to whoever is free; images that began first come first."""
        future = self.client.submit(
            _in_worker, kind, self.recipe, image.item, tuple(numbers), pure=False
        )
        self.doing[future] = (kind, image)
        return future

    def take(self, future: Future) -> tuple[_Image, list[Future]]:
        """Take in what came back; returns the image and the tasks that follow."""
        kind, image = self.doing.pop(future)
        try:
            result = future.result()
        except Exception as problem:  # workers died over it again and again
            result = _Problem(_sentence(image.item, problem))
        future.release()
        if isinstance(result, _Problem):
            image.problem, result = image.problem or result.text, None
        if kind == 'plan':
            return image, self._after_plan(image, result)
        if isinstance(result, Summary):
            self.summary.add(result)
        if kind == 'finish':
            if image.problem:
                self.summary.failed[image.item.name] = image.problem
            return image, []
        image.n_blocks -= 1
        return image, [] if image.n_blocks else self._after_blocks(image)

    def _after_plan(self, image: _Image, waiting: list[int] | None) -> list[Future]:
        if image.problem or waiting is None or len(waiting) <= 1:
            return self._after_blocks(image)
        blocks = [waiting[i : i + BLOCK] for i in range(0, len(waiting), BLOCK)]
        image.n_blocks = len(blocks)
        return [self.give('look', image, numbers) for numbers in blocks]

    def _after_blocks(self, image: _Image) -> list[Future]:
        if not image.problem:
            return [self.give('finish', image)]
        self.summary.failed[image.item.name] = image.problem
        return []


def _sentence(item: Item, problem: Exception) -> str:
    if isinstance(problem, CellSegError):
        return str(problem)
    if type(problem).__name__ == 'KilledWorker':
        return (
            f'{item.path}: workers died over it again and again; expected enough memory for a '
            'tile, and a file that can be read; look at the logs of the workers'
        )
    return f'{item.path}: {type(problem).__name__}: {problem}'


def predict_with_dask(items: Sequence[Item], recipe: Recipe, where: str) -> Summary:
    """Predict images with the workers of a Dask cluster.

    Args:
        items: From ``look_for``.
        recipe: Makes the detector and its parameters; is pickled.
        where: Address of a scheduler, or how many processes to start here.

    Returns:
        What happened, as of one process.

    Raises:
        ConfigError: Dask is not installed, or no scheduler answers.
    """
    with _client(where) as client:
        crew = _Crew(client, pickle.dumps(recipe))
        bar = track(
            _steps(crew, items),
            description='predict (images)',
            total=len(items),
            note=lambda: f'{crew.summary.n_tiles:,} tiles, {crew.summary.n_shown:,} cells shown',
        )
        for _ in bar:
            pass
        summary = crew.summary
    for name in ('predicted', 'rewritten', 'skipped', 'scales'):
        getattr(summary, name).sort()
    for name in ('failed', 'notes'):
        setattr(summary, name, dict(sorted(getattr(summary, name).items())))
    # whoever puts an image together finds the tiles of this run there
    summary.n_kept = max(summary.n_kept - summary.n_tiles, 0)
    summary.asides += summary.range_texts()
    return summary


def _steps(crew: _Crew, items: Sequence[Item]) -> Iterator[None]:
    """Give out work until all is done; one step per image."""
    from distributed import as_completed

    left, n_open = deque(items), 0
    stream: Any = as_completed()
    while left or n_open:
        n_workers = max(len(crew.client.nthreads()), 1)
        while left and n_open < IMAGES_PER_WORKER * n_workers:
            stream.add(crew.give('plan', _Image(left.popleft())))
            n_open += 1
        image, following = crew.take(next(stream))
        for future in following:
            stream.add(future)
        if not following and not image.n_blocks:
            n_open -= 1
            yield


@contextmanager
def _client(where: str) -> Iterator[Client]:
    """Open a connection to a scheduler, or start workers here."""
    try:
        from distributed import Client, LocalCluster
    except ImportError as problem:
        raise ConfigError(
            f'--dask {where}: Dask is not installed ({problem}); expected the package distributed; '
            "install it with: pip install 'cellseg-mm[dask]'"
        ) from problem
    if where.isdigit() and int(where) > 0:
        # Memory is what the tiles take: Dask is not to hold or end workers by it
        with (
            LocalCluster(
                n_workers=int(where), threads_per_worker=1, dashboard_address=':0', memory_limit=0
            ) as cluster,
            Client(cluster) as client,
        ):
            yield client
        return
    try:
        client = Client(where, timeout='30s')
    except (OSError, ValueError) as problem:
        raise ConfigError(
            f'--dask {where}: no scheduler answers ({problem}); expected an address such as '
            'tcp://node7:8786, or a number of workers to start here; start one with dask scheduler'
        ) from problem
    with client:
        yield client


def slurm_script(words: Sequence[str], n_parts: int) -> str:
    """Return a Slurm job array that shares out a run, and the command that completes it.

    Args:
        words: The command line, without ``--slurm``.
        n_parts: Tasks of the array.
    """
    command = f'{as_typed("python tools/predict.py")} {shlex.join(words)}'
    lines = [
        '#!/usr/bin/env bash',
        '# sbatch THIS_FILE, in the folder of the project. Adapt the next lines to your cluster.',
        '# A task that was cut goes on when the same array is submitted again.',
        f'#SBATCH --array=1-{n_parts}',
        '#SBATCH --gres=gpu:1',
        '#SBATCH --cpus-per-task=4',
        '#SBATCH --time=24:00:00',
        '#SBATCH --output=slurm-%A_%a.log',
        'set -euo pipefail',
        f'{command} --part "$SLURM_ARRAY_TASK_ID/{n_parts}"',
        '# when all tasks are done, this puts the images together, and does what was cut:',
        f'#   {command}',
        '# as a job: sbatch --dependency=afterany:ID_OF_THE_ARRAY --wrap ' + shlex.quote(command),
    ]
    return '\n'.join(lines) + '\n'
