"""weights.checkpoints and loaders: what mmengine writes is read, and nothing else is run."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmengine')
from mmengine.config import Config  # noqa: E402
from mmengine.hooks import Hook  # noqa: E402
from mmengine.logging import HistoryBuffer, MessageHub  # noqa: E402
from mmengine.model import BaseModel  # noqa: E402
from mmengine.runner import Runner  # noqa: E402
from mmengine.runner.checkpoint import _load_checkpoint  # noqa: E402
from torch.utils.data import Dataset  # noqa: E402

from cellseg_mm.core.errors import CheckpointError  # noqa: E402
from cellseg_mm.weights.checkpoints import load_checkpoint_file  # noqa: E402
from cellseg_mm.weights.find import last_good_checkpoint  # noqa: E402
from tests.support.weights_files import save  # noqa: E402

pytestmark = pytest.mark.mm


class Payload:
    """Pickles to a call of ``function(*arguments)``."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def test_what_mmengine_writes_is_read(tmp_path: Path) -> None:
    hub = MessageHub('test')
    hub.update_scalar('loss', np.float32(0.5))
    hub.update_scalar('time', 2)
    for name, value in {
        'best': np.float64(0.25),
        'iter': np.int64(7),
        'flag': np.bool_(True),
        'array': np.arange(6, dtype=np.uint8).reshape(2, 3),
        'text': 'iter_7.pth',
    }.items():
        hub.update_info(name, value)
    path = save(tmp_path / 'a.pth', {'state_dict': {}, 'message_hub': hub.state_dict()})
    got = load_checkpoint_file(path)['message_hub']
    assert isinstance(got['log_scalars']['loss'], HistoryBuffer)
    assert got['log_scalars']['loss'].statistics('mean') == 0.5
    assert got['runtime_info']['best'] == 0.25
    assert got['runtime_info']['array'].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize('module', ['numpy.core.multiarray', 'numpy._core.multiarray'])
def test_arrays_of_either_numpy_are_read(tmp_path: Path, module: str) -> None:
    """torch writes the module's name as text, so the other numpy's file is one replacement away."""
    path = save(tmp_path / 'a.pth', {'state_dict': {}, 'value': np.float64(0.75)})
    other = tmp_path / 'b.pth'
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, 'w') as new:
        for entry in old.infolist():
            data = old.read(entry)
            for name in (b'numpy._core.multiarray', b'numpy.core.multiarray'):
                data = data.replace(b'c' + name + b'\n', b'c' + module.encode() + b'\n')
            new.writestr(entry.filename, data)
    assert load_checkpoint_file(other)['value'] == 0.75


@pytest.mark.parametrize('in_archive', [True, False], ids=['torch.save', 'bare pickle'])
@pytest.mark.parametrize(
    'function', [os.mkdir, eval, exec, getattr], ids=['mkdir', 'eval', 'exec', 'getattr']
)
def test_code_in_a_file_is_refused_and_not_run(
    tmp_path: Path, function: object, in_archive: bool, safe_loading: None
) -> None:
    trace = tmp_path / 'trace'
    text = f'__import__("os").mkdir({str(trace)!r})'
    arguments = {os.mkdir: (str(trace),), getattr: (HistoryBuffer, '__init__')}
    payload = Payload(function, *arguments.get(function, (text,)))
    path = tmp_path / 'evil.pth'
    if in_archive:
        save(path, {'state_dict': payload})
    else:
        path.write_bytes(pickle.dumps({'state_dict': payload}, protocol=2))
    for load in (load_checkpoint_file, lambda file: _load_checkpoint(str(file))):
        with pytest.raises(CheckpointError, match=r'evil\.pth: asks for .*nothing was run|damaged'):
            load(path)
    assert not trace.exists()
    if in_archive:  # the payload works: plain unpickling would have run it
        with pytest.raises(CheckpointError, match='asks for'):
            load_checkpoint_file(path)
        if function is not getattr:
            torch.load(path, weights_only=False)
            assert trace.exists()


@pytest.mark.parametrize(
    'value',
    [
        np.array([{}, 1], dtype=object),
        np.array(['text']),
        np.zeros(2, 'V4'),
        np.zeros(2, [('x', 'i4')]),
        np.datetime64('2026-01-01'),
        Path('a'),
        Payload(HistoryBuffer, [1, 2], [1, 2]),
    ],
    ids=['objects', 'text', 'void', 'structured', 'date', 'path', 'called buffer'],
)
def test_only_plain_numbers_are_admitted(tmp_path: Path, value: object) -> None:
    path = save(tmp_path / 'a.pth', {'state_dict': {}, 'value': value})
    with pytest.raises(CheckpointError, match=r'asks for|is no checkpoint, or is damaged'):
        load_checkpoint_file(path)


def test_containers_keep_their_kind_and_sharing(tmp_path: Path) -> None:
    shared = OrderedDict(a=np.float32(1))
    shared._metadata = {'': {'version': 1}}
    content = {'state_dict': shared, 'again': (shared, [np.arange(3)]), 'loop': []}
    content['loop'].append(content['loop'])
    got = load_checkpoint_file(save(tmp_path / 'a.pth', content))
    assert type(got['state_dict']) is OrderedDict
    assert got['state_dict']._metadata == {'': {'version': 1}}
    assert got['again'][0] is got['state_dict']
    assert type(got['again'][1][0]) is np.ndarray
    assert got['again'][1][0].flags.writeable
    assert got['loop'][0] is got['loop']


def broken_files() -> list:
    return [
        pytest.param(lambda raw: b'', 'is empty', id='zero bytes'),
        pytest.param(lambda raw: raw[:-30], 'cut short or damaged', id='end missing'),
        pytest.param(lambda raw: raw[: len(raw) // 2], 'cut short or damaged', id='half'),
        pytest.param(lambda raw: raw[:1], 'no checkpoint, or is damaged', id='one byte'),
        pytest.param(lambda raw: b'hello world', 'no checkpoint, or is damaged', id='text'),
        pytest.param(
            lambda raw: raw.replace(np.ones(3, '<f4').tobytes(), b'x' * 12), 'damaged', id='bits'
        ),
    ]


@pytest.mark.parametrize(('damage', 'message'), broken_files())
def test_broken_files_say_what_is_wrong(tmp_path: Path, damage, message: str) -> None:
    path = save(tmp_path / 'a.pth')
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint_file(path)
    assert str(caught.value).startswith(str(path))
    assert '\n' not in str(caught.value)


def test_other_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match='there is no such checkpoint'):
        load_checkpoint_file(tmp_path / 'none.pth')
    with pytest.raises(CheckpointError, match='is no file'):
        load_checkpoint_file(tmp_path)
    with pytest.raises(CheckpointError, match='holds a list'):
        load_checkpoint_file(save(tmp_path / 'list.pth', [1, 2]))
    bomb = tmp_path / 'bomb.pth'
    with zipfile.ZipFile(bomb, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('a/data.pkl', bytes(1 << 20))
    with pytest.raises(CheckpointError, match='is compressed'):
        load_checkpoint_file(bomb)


def damage(path: Path, rng: np.random.Generator, target: Path) -> None:
    """Write ``path`` to ``target`` with one to three changed bytes that no checksum notices."""

    def change(raw: bytes) -> bytes:
        changed = bytearray(raw)
        for place in rng.integers(0, len(raw), int(rng.integers(1, 4))):
            changed[place] = rng.integers(256)
        return bytes(changed)

    if not zipfile.is_zipfile(path):
        target.write_bytes(change(path.read_bytes()))
        return
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, 'w') as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry.filename, change(data) if entry.filename.endswith('.pkl') else data)


@pytest.mark.parametrize('is_archive', [True, False], ids=['zip', 'legacy'])
@pytest.mark.parametrize('seed', range(10))
def test_random_damage_gives_only_our_error(tmp_path: Path, seed: int, is_archive: bool) -> None:
    """numpy's own dtype, admitted by mmengine, ends the process within 20 of these files."""
    rng = np.random.default_rng(seed)
    content = {'state_dict': {'w': torch.ones(2)}, 'x': np.float64(1), 'h': HistoryBuffer([1], [1])}
    whole, broken = tmp_path / 'a.pth', tmp_path / 'b.pth'
    torch.save(content, whole, _use_new_zipfile_serialization=is_archive)
    for _ in range(20):
        damage(whole, rng, broken)
        try:
            assert isinstance(load_checkpoint_file(broken), dict)
        except CheckpointError as error:
            assert str(broken) in str(error)  # noqa: PT017 - much damage is only another number


class Numbers(Dataset):
    metainfo = {'classes': ('cell',)}

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((1,), float(index))


class Line(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, inputs, mode: str) -> dict:
        return {'loss': ((self.weight * inputs - 1) ** 2).mean()}

    def train_step(self, data, optim_wrapper) -> dict:
        loss = self(data, 'loss')['loss']
        optim_wrapper.update_params(loss)
        return {'loss': loss}


class CrashHook(Hook):
    """Stands for a full disk or a kill in the middle of a write."""

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if runner.iter == 3:
            checkpoint['unpicklable'] = lambda: None


def tiny_runner(work_dir: Path, **settings: object) -> Runner:
    return Runner(
        model=Line(),
        work_dir=str(work_dir),
        train_dataloader={
            'batch_size': 2,
            'dataset': Numbers(),
            'collate_fn': {'type': 'default_collate'},
            'sampler': {'type': 'DefaultSampler', 'shuffle': False},
        },
        train_cfg={'by_epoch': False, 'max_iters': 6},
        optim_wrapper={'optimizer': {'type': 'Adam', 'lr': 0.1}},
        default_hooks={'checkpoint': {'type': 'CheckpointHook', 'interval': 2, 'by_epoch': False}},
        default_scope='mmengine',
        experiment_name=work_dir.name,
        cfg=Config({'max_iters': 6}),
        log_level='WARNING',
        **settings,
    )


def test_runner_writes_whole_files_and_resumes_weights_only(
    tmp_path: Path, safe_loading: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises((pickle.PicklingError, AttributeError)):
        tiny_runner(tmp_path / 'cut', custom_hooks=[CrashHook()]).train()
    names = sorted(path.name for path in (tmp_path / 'cut').glob('*.pth'))
    assert names == ['iter_2.pth']
    whole = tiny_runner(tmp_path / 'whole')
    whole.train()

    found, skipped = last_good_checkpoint(tmp_path / 'cut')
    assert (found.name, skipped) == ('iter_2.pth', [])
    loads = []
    torch_load = torch.load

    def recording(*args: object, **kwargs: object) -> object:
        loads.append(kwargs['weights_only'])
        return torch_load(*args, **kwargs)

    monkeypatch.setattr(torch, 'load', recording)
    resumed = tiny_runner(tmp_path / 'cut', load_from=str(found), resume=True)
    resumed.train()
    assert loads == [True]
    assert resumed.iter == whole.iter == 6
    assert torch.equal(resumed.model.weight, whole.model.weight)
