"""Faults of the machine: dead workers, full disks, missing rights, short memory, kill -9."""

from __future__ import annotations

import os
import resource
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.registry import TRANSFORMS
from mmengine.registry import LOOPS, DefaultScope
from torch.utils.data import DataLoader, get_worker_info

import cellseg_mm.components
from cellseg_mm.cli import explain, run_tool, same_run
from cellseg_mm.core import files, worker_watch
from cellseg_mm.core.errors import CellSegError, DataError, ImageError
from cellseg_mm.core.instances import InstanceSet
from cellseg_mm.data.folds import Folds, load_folds, save_folds
from cellseg_mm.data.labels import find_cases
from cellseg_mm.pipeline.dataset import CellDataset
from cellseg_mm.results import predictions
from cellseg_mm.training import load_config
from cellseg_mm.weights import checkpoints
from cellseg_mm.weights.loaders import AtomicLocalBackend
from tests.faults import kill
from tests.faults.jobs import files_digest, prepare_data
from tests.support.micro import ROOT

pytestmark = pytest.mark.mm
assert cellseg_mm.components
CLASSES = ('epithelial', 'lymphocyte', 'neutrophil', 'macrophage')


# ---- data-loading workers


@TRANSFORMS.register_module()
class FailOn:
    """Do something bad on one image, in a worker only."""

    def __init__(self, name: str, how: str) -> None:
        self.name, self.how = name, how

    def __call__(self, results: dict) -> dict:
        if results['name'] != self.name or get_worker_info() is None:
            return results
        if self.how == 'kill':
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == 'exit':
            os._exit(3)
        if self.how == 'memory':
            raise MemoryError('cannot allocate')
        if self.how == 'data':
            raise DataError([f'{results["img_path"]}: first.', 'b.tif: second.'])
        if self.how == 'ours':
            raise ImageError(f'{results["img_path"]}: is bad; expected good; mend it.')
        raise ZeroDivisionError('in a transform')


def failure(data: Path, how: str, number: int) -> tuple[Exception, Path]:
    """Load all cases with two workers, of which one fails on a case; return the error."""
    case = find_cases(data, 'train', 4)[number]
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = CellDataset(
            data_root=str(data),
            split='all',
            metainfo={'classes': CLASSES},
            pipeline=[{'type': 'FailOn', 'name': case.name, 'how': how}],
        )
    loader = DataLoader(dataset, batch_size=None, num_workers=2, prefetch_factor=1)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is the test
        list(loader)
    return caught.value, case.image_path


@pytest.mark.parametrize('number', [0, 3])
@pytest.mark.parametrize('how', ['kill', 'exit'])
def test_dead_worker_names_its_image(sample_data: Path, how: str, number: int) -> None:
    error, image_path = failure(sample_data, how, number)
    assert not isinstance(error, CellSegError)  # it is torch's own
    sentence = explain(error)
    assert f'while it worked on {image_path};' in sentence
    assert 'lower num_workers' in sentence
    assert '\n' not in sentence


def test_errors_of_workers_are_one_sentence(sample_data: Path) -> None:
    error, image_path = failure(sample_data, 'ours', 1)
    assert 'Traceback' in str(error)  # what torch makes of it
    assert explain(error) == f'{image_path}: is bad; expected good; mend it.'
    error, image_path = failure(sample_data, 'data', 1)
    assert 'Traceback' not in explain(error)
    assert f'{image_path}: first.' in explain(error)
    error, image_path = failure(sample_data, 'memory', 1)
    assert explain(error).startswith(f'{image_path}: memory ran out')


def test_bug_in_a_transform_names_the_image(sample_data: Path) -> None:
    error, image_path = failure(sample_data, 'bug', 2)
    assert explain(error) is None  # a traceback is shown, and in it the image
    assert str(image_path) in str(error)
    assert 'ZeroDivisionError: in a transform' in str(error)


@pytest.mark.parametrize(('tool', 'advice'), [('train', '--resume'), ('predict', 'same command')])
def test_ctrl_c_says_how_to_go_on(
    tool: str, advice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The same command without --resume would train from the start again."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(load_config, 'load_config', interrupt)
    monkeypatch.setattr(
        sys,
        'argv',
        [f'{tool}.py', 'configs/fold0.py', *['a.tif', '--out', 'x'] * (tool == 'predict')],
    )
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / f'tools/{tool}.py'), run_name='__main__')
    assert caught.value.code == 130
    said = capsys.readouterr().err
    assert said.startswith('interrupted; ')
    assert advice in said


@pytest.mark.parametrize(
    ('words', 'expected'),
    [
        ('train.py c.py --amp', ''),
        ('train.py c.py --work-dir "a b" --resume', " --work-dir 'a b'"),
        (
            'train.py --cfg-options a.b=1 c=2 --amp --work-dir=w',
            ' --cfg-options a.b=1 c=2 --work-dir=w',
        ),
    ],
)
def test_the_next_command_looks_at_the_same_run(words: str, expected: str) -> None:
    assert same_run(shlex.split(words)) == expected


def test_misspelt_key_of_a_constructor_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = {'type': 'IterBasedTrainLoop', 'runner': None, 'dataloader': None, 'max_itres': 3}
    with pytest.raises(TypeError) as caught:
        LOOPS.build(loop)
    monkeypatch.setattr(sys, 'argv', ['train.py', '--cfg-options', 'train_cfg.max_itres=3'])
    sentence = explain(caught.value)
    assert 'train_cfg.max_itres' in sentence
    assert "IterBasedTrainLoop has no setting 'max_itres'" in sentence
    monkeypatch.setattr(sys, 'argv', ['train.py', 'c.py'])
    assert explain(caught.value) is None  # somebody's bug: the traceback is wanted


def test_notes_of_another_process_are_not_taken_for_ours() -> None:
    worker_watch.prepare()
    worker_watch.note('é' * 2000 + '/image.tif')
    assert worker_watch.last_image(os.getpid()).endswith('é/image.tif')
    assert worker_watch.last_image(os.getpid() + worker_watch.SLOTS) == ''
    assert worker_watch.explain_death('CUDA error') is None
    text = f'DataLoader worker (pid(s) {os.getpid()}, 4194000) exited unexpectedly'
    assert '/image.tif and an unknown image' in worker_watch.explain_death(text)


# ---- memory of the device, disk


def test_device_memory_says_which_setting_to_change() -> None:
    def train() -> None:
        try:
            raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB. More')
        except RuntimeError as problem:
            raise RuntimeError('mmengine says') from problem

    with pytest.raises(RuntimeError) as caught:
        train()
    sentence = explain(caught.value)
    assert 'ran out of memory (CUDA out of memory)' in sentence
    for setting in ('train_dataloader.batch_size', '--amp', 'rpn.max_per_img', '--tile'):
        assert setting in sentence


def test_tool_ends_with_the_sentence(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise OSError(28, 'No space left on device', 'work_dirs/fold0/iter_2.pth')

    with pytest.raises(SystemExit) as caught:
        run_tool(main)
    assert caught.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith('error: work_dirs/fold0/iter_2.pth: cannot be written')
    assert 'No space left on device' in text
    with pytest.raises(OSError, match='connection'):  # not the disk: a traceback is right
        run_tool(lambda: (_ for _ in ()).throw(OSError(104, 'connection reset')))


def write_folds(folder: Path) -> None:
    names = tuple(f'case {i:05d}' for i in range(4000))
    save_folds(folder / 'a.json', Folds((names[:2000], names[2000:])))


def write_predictions(folder: Path) -> None:
    rng = np.random.default_rng(0)
    layer = np.zeros((1, 400, 400), np.int32)
    for i in range(360):
        y, x = divmod(i, 20)
        layer[0, 20 * y : 20 * y + rng.integers(3, 19), 20 * x : 20 * x + 12] = i + 1
    one = InstanceSet.from_label_layers('a', 1, layer, np.zeros(360, int), np.zeros(360, int))
    probs = rng.random((360, 28, 28)).astype(np.float16)
    one = InstanceSet(
        *('a', 1, (400, 400), one.class_ids, one.scores, one.boxes_xyxy, one.rles),
        {'mask_probs': probs},
    )
    predictions.save_predictions(folder / 'a.npz', predictions.Predictions((one,)))


def write_checkpoint(folder: Path) -> None:
    AtomicLocalBackend().put(bytes(200_000), folder / 'a.pth')


def write_json(folder: Path) -> None:
    files.write_json(folder / 'a.json', list(range(50_000)))


WRITERS = [write_folds, write_predictions, write_checkpoint, write_json]


def in_child(work: Callable[[], None]) -> str:
    """Run in a fork, so that limits and rights of this process stay; return what it raised."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        text = 'nothing was raised'
        try:
            work()
        except BaseException as problem:
            text = f'{type(problem).__name__}: {explain(problem)}'
        os.write(write_end, text.encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as stream:
        text = stream.read()
    os.waitpid(pid, 0)
    return text


@pytest.mark.parametrize('write', WRITERS)
def test_disk_that_is_full_leaves_the_old_file(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    """The limit on a file's size stands for the disk's end: the write fails half way through."""
    write(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert min(map(len, before.values())) > 100_000

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        write(tmp_path)

    text = in_child(work)
    assert 'cannot be written or read (File too large)' in text
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_disk_that_is_really_full(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', 'size=100k', 'tmpfs', str(tmp_path)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip('needs the right to mount a small tmpfs; the test above stands for it')
    try:
        files.write_text(tmp_path / 'a.json', 'old')
        text = in_child(lambda: write_json(tmp_path))
        assert 'No space left on device' in text
        assert [path.name for path in tmp_path.iterdir()] == ['a.json']
        assert (tmp_path / 'a.json').read_text() == 'old'
    finally:
        subprocess.run(['umount', str(tmp_path)], check=True)


@pytest.mark.parametrize('write', WRITERS)
def test_folder_that_may_not_be_written(tmp_path: Path, write: Callable[[Path], None]) -> None:
    tmp_path.chmod(0o555)

    def work() -> None:
        os.chdir(tmp_path)  # the path is relative, so the folders above do not matter
        if os.geteuid() == 0:
            os.setuid(65534)
        write(Path())

    text = in_child(work)
    tmp_path.chmod(0o755)
    assert 'cannot be written or read (Permission denied)' in text
    assert list(tmp_path.iterdir()) == []


def test_unreadable_folds_and_checkpoint(sample_data: Path, tmp_path: Path) -> None:
    (tmp_path / 'f.json').write_bytes((sample_data / 'folds.json').read_bytes())
    torch.save({'state_dict': {}}, tmp_path / 'c.pth')
    (tmp_path / 'p.npz').write_bytes(b'PK')
    for path in tmp_path.iterdir():
        path.chmod(0)
    readers = {
        'f.json': load_folds,
        'c.pth': checkpoints.load_checkpoint_file,
        'p.npz': predictions.load_predictions,
    }

    def work(name: str) -> None:
        os.chdir(tmp_path)
        if os.geteuid() == 0:
            os.setuid(65534)
        readers[name](name)

    tmp_path.chmod(0o755)
    for name in readers:
        text = in_child(lambda name=name: work(name))
        assert 'Error: ' in text.split(':')[0] + ': '
        assert f'{name}: ' in text
        assert 'cannot be read' in text
        assert 'Permission denied' in text


def test_prepare_on_a_full_disk_writes_nothing(sample_data: Path, tmp_path: Path) -> None:
    words = ['tools/prepare_data.py', str(sample_data), '--out', str(tmp_path), '--folds', '2']
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300)),
    )
    assert done.returncode == 2
    assert 'cannot be written (File too large)' in done.stderr
    assert 'Traceback' not in done.stderr
    assert list(tmp_path.iterdir()) == []


# ---- kill -9


def die_while_writing(path: Path) -> int:
    """Let a process be killed in the middle of a write; return its id."""
    pid = os.fork()
    if pid == 0:
        with files.atomic_path(path) as temporary:
            temporary.write_bytes(b'half')
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    return pid


def test_leftovers_of_dead_writers_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    path = tmp_path / 'a.json'
    first, second = die_while_writing(path), die_while_writing(tmp_path / 'b.json')
    left = [p.name for p in tmp_path.iterdir()]
    # The second writer found what the first one left.
    assert len(left) == 1
    assert f'-{second}-' in left[0]
    assert f'-{first}-' not in left[0]
    foreign = tmp_path / f'.tmp-0123abcd-{second}-x-c.json'  # of another machine: who knows
    foreign.touch()
    with files.atomic_path(path) as temporary:
        temporary.write_bytes(b'whole')
        in_child(lambda: files.write_text(tmp_path / 'd.json', 'x'))
        assert temporary.is_file()  # the child took nothing away from us, who live
    assert sorted(p.name for p in tmp_path.iterdir()) == [foreign.name, 'a.json', 'd.json']


def test_killed_preparing_ends_with_the_same_bytes(tmp_path: Path) -> None:
    prepare_data(tmp_path)
    outcome = kill.kill_job('prepare', tmp_path, kills=3, per_round=3, seed=5)
    assert outcome.problems == []
    assert outcome.n_kills == 3


def test_the_script_notices_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that appends to its result on every start ends differently when it was killed."""
    tool = tmp_path / 'tool.py'
    tool.write_text(
        'import sys, time, pathlib\n'
        'out = pathlib.Path(sys.argv[1]); out.mkdir(parents=True, exist_ok=True)\n'
        "with (out / 'r.txt').open('a') as stream: stream.write('x')\n"
        "print('written')\n"
        "time.sleep(0 if len((out / 'r.txt').read_text()) > 4 else 2)\n"
    )
    job = kill.Job(
        lambda bench, folder: [str(tool), str(folder)], files_digest('r.txt'), begins='written'
    )
    monkeypatch.setitem(kill.JOBS, 'appends', job)
    outcome = kill.kill_job('appends', tmp_path, kills=4, per_round=4, seed=0)
    assert outcome.n_kills == 4
    assert "differing: ['r.txt']" in outcome.problems[0]
