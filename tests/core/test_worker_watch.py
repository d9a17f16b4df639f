"""worker_watch: the image that a killed process was at is known to its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest

from cellseg_mm.core import worker_watch


def note_and_die(path: str) -> None:
    worker_watch.note('earlier.tif')
    worker_watch.note(path)
    os.kill(os.getpid(), signal.SIGKILL)


def died_at(path: str) -> int:
    worker_watch.prepare()
    process = multiprocessing.get_context('fork').Process(target=note_and_die, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return process.pid


@pytest.mark.parametrize(
    ('path', 'kept'),
    [
        pytest.param('data/train/zürich/image.tif', 'data/train/zürich/image.tif', id='name'),
        pytest.param('a' * 2000 + '/image.tif', 'a' * 1006 + '/image.tif', id='longer than a slot'),
    ],
)
def test_the_last_image_of_a_killed_worker_is_known(path: str, kept: str) -> None:
    pid = died_at(path)
    assert worker_watch.last_image(pid) == kept
    assert worker_watch.last_image(pid + worker_watch.SLOTS) == ''  # shares the slot


def test_the_sentence_names_the_images_of_all_dead_workers() -> None:
    pid = died_at('a/image.tif')
    stranger = pid + worker_watch.SLOTS
    one = worker_watch.explain_death(f'DataLoader worker (pid {pid}) is killed by signal: Killed.')
    assert f'worker process {pid} is killed by signal: Killed while it worked on a/image.tif' in one
    both = f'DataLoader worker (pid(s) {pid}, {stranger}) exited unexpectedly'
    assert 'worked on a/image.tif and an unknown image;' in worker_watch.explain_death(both)


def test_other_texts_are_left_alone() -> None:
    assert worker_watch.explain_death('CUDA error: out of memory') is None
