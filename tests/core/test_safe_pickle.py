"""core.safe_pickle: arrays come back as pickle loads them, and nothing else does."""

from __future__ import annotations

import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

import cellseg_mm  # noqa: F401
from cellseg_mm.core.errors import CheckpointError
from cellseg_mm.core.safe_pickle import UnreadableError, read_pickle, unpickle
from tests.support.weights_files import Call


def sample_tree(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {
        'model': OrderedDict(
            filters=rng.normal(size=(3, 4, 5)).astype(np.float32),
            fortran=np.asfortranarray(rng.normal(size=(3, 4))),  # its bytes are column by column
            transposed=rng.normal(size=(4, 6)).T,
            scalar=np.array(3),  # shape ()
            empty=np.zeros((0, 3), np.int64),
            big_endian=rng.normal(size=7).astype('>f8'),
            flags=np.array([True, False]),
            half=rng.normal(size=3).astype(np.float16),
        ),
        '__author__': 'Détectron2',
        'numbers': [1, -2.5, None, True, 2**70],
        'shared': [[1, 2]] * 2,
        'pair': ('a', 0),
    }


# names are length-prefixed from protocol 4 on, so the other spelling is tried below that only
@pytest.mark.parametrize(
    ('protocol', 'module'),
    [(protocol, b'numpy._core') for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    + [(protocol, b'numpy.core') for protocol in range(4)],
)
def test_arrays_come_back_as_pickle_loads_them(
    tmp_path: Path, protocol: int, module: bytes
) -> None:
    content = pickle.dumps(sample_tree(protocol), protocol=protocol)
    if protocol < 4:
        content = content.replace(b'numpy._core', b'numpy.core').replace(b'numpy.core', module)
        assert module in content
    path = tmp_path / 'x.pkl'
    path.write_bytes(content)
    got = read_pickle(path)
    want = sample_tree(protocol)
    assert list(got['model']) == list(want['model'])
    for name, array in want['model'].items():
        assert got['model'][name].dtype == array.dtype, name
        np.testing.assert_array_equal(got['model'][name], array, err_msg=name)
        assert got['model'][name].shape == array.shape
    assert {key: got[key] for key in got if key != 'model'} == {
        key: want[key] for key in want if key != 'model'
    }


def test_python_2_pickle_is_read(tmp_path: Path) -> None:
    # protocol 2 of Python 2: array bytes are a str (SHORT_BINSTRING), as in old model files
    data = struct.pack('<3f', 1.5, -2.0, 200.25)
    content = (
        b'\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b'
        b'\x87R(K\x01K\x03\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xff'
        b'J\xff\xff\xff\xffK\x00tb\x89U' + bytes([len(data)]) + data + b'tbs.'
    )
    path = tmp_path / 'old.pkl'
    path.write_bytes(content)
    assert read_pickle(path)['w'].tolist() == [1.5, -2.0, 200.25]


@pytest.mark.parametrize('protocol', [0, 2, 4, 5])
def test_a_pickle_cut_anywhere_is_refused(tmp_path: Path, protocol: int) -> None:
    content = pickle.dumps({'model': {'w': np.arange(6.0).reshape(2, 3)}}, protocol=protocol)
    path = tmp_path / 'cut.pkl'
    for n_bytes in range(len(content)):
        path.write_bytes(content[:n_bytes])
        with pytest.raises(CheckpointError, match=r'cut\.pkl'):
            read_pickle(path)


def test_truncation_says_so(tmp_path: Path) -> None:
    content = pickle.dumps({'model': {'w': np.zeros(1000)}})
    path = tmp_path / 'cut.pkl'
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r'ends after \d+ bytes in the middle'):
        read_pickle(path)


def malicious_pickles(marker: Path) -> dict[str, tuple[bytes, str]]:
    """Name to (content, what the refusal must mention); the first ones would make ``marker``."""
    touch = f'open({str(marker)!r}, "w").close()'
    shell = f'touch {marker}'.encode()
    reconstruct = b'cnumpy.core.multiarray\n_reconstruct\n'
    return {
        'os.system': (pickle.dumps({'model': Call(os.system, shell.decode())}), 'system'),
        'eval': (pickle.dumps(Call(eval, touch), protocol=2), 'eval'),
        'exec': (pickle.dumps(Call(exec, touch)), 'exec'),
        'INST': (b"(S'" + shell + b"'\nios\nsystem\n.", 'INST'),
        'OBJ': (b"(cos\nsystem\nS'" + shell + b"'\no.", 'system|OBJ'),
        'getattr chain': (
            b"cbuiltins\ngetattr\n(cnumpy\nndarray\nS'__reduce__'\ntR.",
            r'builtins\.getattr',
        ),
        'numpy.load': (pickle.dumps(Call(np.load, str(marker))), r'numpy\.load'),
        'numpy runstring': (
            b"cnumpy.testing._private.utils\nrunstring\n(S'" + touch.encode() + b"'\n}tR.",
            'runstring',
        ),
        'dotted name': (b'\x80\x04\x8c\x05numpy\x8c\x0ddtype.__new__\x93.', r'dtype\.__new__'),
        'BUILD on a function': (reconstruct + b"}S'__doc__'\nS'x'\nsb.", 'change to a function'),
        'EXT': (b'\x82\x01.', 'EXT1'),
        'persistent id': (b'Pname\n.', 'PERSID'),
        'NEWOBJ': (b'\x80\x02cnumpy\nndarray\n)\x81.', 'NEWOBJ'),
        'object array': (pickle.dumps(np.array([{}], object)), 'dtype'),
        'structured array': (pickle.dumps(np.zeros(2, [('a', 'i4')])), 'dtype'),
        'masked array': (pickle.dumps(np.ma.zeros(2)), r'numpy\.ma'),
        'matrix': (pickle.dumps(np.zeros((2, 2)).view(np.matrix)), 'matrix'),
        'huge memo': (b'\x80\x02Nr\xff\xff\xff\x7f.', 'memo slot'),
        'call of ndarray': (b'cnumpy\nndarray\n(K\x05tR.', 'calling numpy.ndarray'),
        'preallocation': (
            reconstruct + b'(cnumpy\nndarray\n(I99999999999\ntC\x01btR.',
            'not a plain array',
        ),
    }


@pytest.mark.parametrize('name', malicious_pickles(Path('x')))
def test_malicious_pickle_is_refused_and_not_run(tmp_path: Path, name: str) -> None:
    marker = tmp_path / 'code-was-run'
    content, mentions = malicious_pickles(marker)[name]
    path = tmp_path / 'evil.pkl'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=mentions) as caught:
        read_pickle(path)
    assert 'evil.pkl' in str(caught.value)
    assert not marker.exists()


def test_the_malicious_pickles_are_dangerous(tmp_path: Path) -> None:
    # otherwise the test above would prove nothing
    for name in ('os.system', 'eval', 'exec', 'INST'):
        marker = tmp_path / name
        pickle.loads(malicious_pickles(marker)[name][0])
        assert marker.exists()


@pytest.mark.parametrize(
    ('state', 'problem'),
    [
        pytest.param((1, (4,), b'\0' * 8), 'with 8 bytes', id='too few bytes'),
        pytest.param((1, (-1, -2), b'\0' * 8), 'with 8 bytes', id='negative sides'),
        pytest.param((1, (2**62, 4), b'\0' * 8), 'with 8 bytes', id='product overflows int64'),
    ],
)
def test_array_whose_shape_and_bytes_disagree_is_refused(
    tmp_path: Path, state: tuple, problem: str
) -> None:
    version, shape, data = state

    class Lying:
        def __reduce__(self) -> tuple:
            function, args = np.zeros(1, np.float32).__reduce__()[:2]
            return function, args, (version, shape, np.dtype('f4'), False, data)

    path = tmp_path / 'lying.pkl'
    path.write_bytes(pickle.dumps(Lying()))
    with pytest.raises(CheckpointError, match=problem):
        read_pickle(path)


def test_shared_and_circular_containers_end(tmp_path: Path) -> None:
    bomb: list = []
    for _ in range(15):  # 2**15 paths through 15 lists
        bomb = [bomb, bomb]
    circle: list = [1]
    circle.append(circle)
    path = tmp_path / 'x.pkl'
    path.write_bytes(pickle.dumps({'bomb': bomb, 'circle': circle}))
    assert read_pickle(path)['circle'] == [1, None]
    for _ in range(20):
        bomb = [bomb]
    path.write_bytes(pickle.dumps(bomb))
    with pytest.raises(CheckpointError, match='nested deeper'):
        read_pickle(path)


def test_other_files_and_large_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / 'page.pkl'
    path.write_bytes(b'<html>please log in</html>')
    with pytest.raises(CheckpointError, match='not a pickle of arrays'):
        read_pickle(path)
    with pytest.raises(CheckpointError, match='at most 5 were expected'):
        read_pickle(path, max_bytes=5)
    with pytest.raises(CheckpointError, match='no such file'):
        read_pickle(tmp_path / 'none.pkl')


def test_arrays_of_objects_are_lists_where_they_are_admitted() -> None:
    made = {
        'one': np.array({'a': 1}, dtype=object),
        'many': np.array([None, 'x', np.arange(3)], dtype=object),
    }
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        content = pickle.dumps(made, protocol=protocol)
        with pytest.raises(UnreadableError, match='dtype'):
            unpickle(content, expected='x')
        got = unpickle(content, expected='x', objects=True)
        assert got['one'] == {'a': 1}
        assert got['many'][:2] == [None, 'x']
        assert got['many'][2].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    'state', [(1, (), None), (1, (), np.dtype(object), False, [1, 2]), (1, (1,), 3, False, 'x')]
)
def test_arrays_of_objects_that_do_not_fit_together_are_refused(state: tuple) -> None:
    class Bad:
        def __reduce__(self) -> tuple:
            return np._core.multiarray._reconstruct, (np.ndarray, (0,), b'b'), state

    with pytest.raises(UnreadableError):
        unpickle(pickle.dumps(Bad()), expected='x', objects=True)


def test_an_array_of_objects_that_holds_itself_ends_there() -> None:
    held = np.empty(1, dtype=object)
    held[0] = held
    assert unpickle(pickle.dumps(held), expected='x', objects=True) == [None]
