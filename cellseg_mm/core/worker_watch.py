"""Which image each data-loading process is at, readable after the process has died.

In: a note from a worker before it touches an image. Out: the image's name for the sentence about a
dead worker. Invariant: the notes lie in memory that is shared by all forks of one process, so they
outlive a worker that is killed; writing one costs a microsecond and no file.
"""

from __future__ import annotations

import functools
import mmap
import os
import re
import struct

SLOTS = 256
SLOT_BYTES = 1024
HEAD = struct.Struct('<II')  # process id, length of the text
# "DataLoader worker (pid 7) is killed by signal: Killed.", "... (pid(s) 7, 8) exited unexpectedly"
DIED = re.compile(r'DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) ([^.\n]*)')


@functools.cache
def _board() -> mmap.mmap:
    return mmap.mmap(-1, SLOTS * SLOT_BYTES)


def prepare() -> None:
    """Make the shared memory; call it before workers are forked."""
    _board()


def note(image_path: str) -> None:
    """Leave word that this process now works on an image."""
    text = image_path.encode('utf-8', 'surrogateescape')[-(SLOT_BYTES - HEAD.size) :]
    pid = os.getpid()
    start = pid % SLOTS * SLOT_BYTES
    _board()[start : start + HEAD.size + len(text)] = HEAD.pack(pid, len(text)) + text


def last_image(pid: int) -> str:
    """Return what a process noted last; '' if it noted nothing, or was not forked from this one."""
    start = pid % SLOTS * SLOT_BYTES
    owner, length = HEAD.unpack(_board()[start : start + HEAD.size])
    if owner != pid:
        return ''
    start += HEAD.size
    return _board()[start : start + length].decode('utf-8', 'replace')


def explain_death(text: str) -> str | None:
    """Turn torch's words about dead workers into a sentence with their images.

    Args:
        text: Message of the RuntimeError.

    Returns:
        The sentence, or None when the text is about something else.
    """
    found = DIED.search(text)
    if found is None:
        return None
    pids = [int(number) for number in re.findall(r'\d+', found[1])]
    images = ' and '.join(last_image(pid) or 'an unknown image' for pid in pids)
    return (
        f'data loading: worker process {found[1]} {found[2].strip()} while it worked on {images}; '
        'most often memory ran out; lower num_workers of the data loaders or persistent_workers, '
        'cut the image or list its case in exclude.txt; then go on (tools/train.py with --resume)'
    )
