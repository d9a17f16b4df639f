"""loaders: every way by which mmengine reads weights is ours, and files are replaced whole."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmengine')
from mmengine.fileio import get_file_backend  # noqa: E402
from mmengine.runner.checkpoint import CheckpointLoader, _load_checkpoint  # noqa: E402

from cellseg_mm.core.errors import CheckpointError  # noqa: E402
from cellseg_mm.weights.find import remove_leftovers  # noqa: E402
from cellseg_mm.weights.loaders import load_from_http  # noqa: E402
from tests.support.weights_files import save  # noqa: E402

pytestmark = pytest.mark.mm


def test_every_scheme_of_mmengine_is_ours(safe_loading: None) -> None:
    """A scheme that a later mmengine adds would unpickle: it must be looked at."""
    foreign = {
        prefix
        for prefix, loader in CheckpointLoader._schemes.items()
        if not loader.__module__.startswith('cellseg_mm.')
    }
    assert foreign == set()
    with pytest.raises(CheckpointError, match='copy the file to this machine'):
        _load_checkpoint('s3://bucket/a.pth')
    with pytest.raises(CheckpointError, match='no model is published under this name'):
        _load_checkpoint('open-mmlab://no/such')


def test_unreachable_url_says_what_to_do(
    tmp_path: Path, safe_loading: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    with pytest.raises(CheckpointError, match=r'cannot be fetched .* local file'):
        _load_checkpoint('http://127.0.0.1:9/model.pth')  # the discard port: nobody listens
    assert not [path for path in tmp_path.rglob('*') if path.is_file()]


def test_url_is_fetched_once(tmp_path: Path, safe_loading: None, monkeypatch) -> None:
    source = save(tmp_path / 'model.pth')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    url = source.as_uri()
    first = load_from_http(url)
    source.unlink()
    again = load_from_http(url)
    assert torch.equal(first['state_dict']['w'], again['state_dict']['w'])


def test_files_are_replaced_whole(tmp_path: Path, safe_loading: None) -> None:
    backend = get_file_backend(str(tmp_path / 'iter_1.pth'))
    backend.put(b'old', tmp_path / 'iter_1.pth')
    with pytest.raises(TypeError):
        backend.put('no bytes', tmp_path / 'iter_1.pth')
    assert (tmp_path / 'iter_1.pth').read_bytes() == b'old'
    backend.put_text('né', tmp_path / 'b' / 'a.txt')
    assert (tmp_path / 'b' / 'a.txt').read_text(encoding='utf-8') == 'né'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['b', 'iter_1.pth']
    (tmp_path / '.tmp-abc-iter_2.pth').touch()
    assert [path.name for path in remove_leftovers(tmp_path)] == ['.tmp-abc-iter_2.pth']
    assert sorted(path.name for path in tmp_path.iterdir()) == ['b', 'iter_1.pth']
