"""weights.published: files and URLs are fetched, checked, converted and remembered."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.runner.checkpoint import CheckpointLoader

import cellseg_mm  # noqa: F401
from cellseg_mm.core.errors import CheckpointError
from cellseg_mm.weights import published as published_weights
from cellseg_mm.weights.published import check_name_hash, convert_file, locate
from tests.support.weights_files import Call


def test_unsafe_torch_file_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / 'code-was-run'
    path = tmp_path / 'evil.pth'
    torch.save({'state_dict': {}, 'x': Call(os.system, f'touch {marker}')}, path)
    with pytest.raises(CheckpointError, match=r'asks for .*system'):
        convert_file(path, tmp_path / 'out.pth')
    assert not marker.exists()
    assert not (tmp_path / 'out.pth').exists()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / 'cache'
    monkeypatch.setenv('CELLSEG_CACHE', str(folder))
    return folder


class Server(HTTPServer):
    """Serves ``files`` by their last path part; counts requests; can cut answers short."""

    files: dict[str, bytes]
    n_requests = 0
    cut = False

    def url(self, name: str) -> str:
        return f'http://127.0.0.1:{self.server_port}/new_baselines/r50/{name}'


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.n_requests += 1
        content = self.server.files.get(self.path.rsplit('/', 1)[-1])
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if self.server.cut else content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Server:
    made = Server(('127.0.0.1', 0), Handler)
    made.files = {}
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def load(name: str) -> dict:
    return CheckpointLoader.load_checkpoint(name, map_location='cpu', logger='silent')


def test_a_published_url_is_fetched_and_converted_once(
    cache: Path, server: Server, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files = {published.name: published.read_bytes()}
    first = load(server.url(published.name))
    assert (len(first['state_dict']), server.n_requests) == (426, 1)
    origin = first['meta']['cellseg_weights']
    assert origin['sha256'] == hashlib.sha256(published.read_bytes()).hexdigest()
    assert origin['preprocessing']['channel_order'] == 'BGR'
    server.files = {}  # gone from the net: the cache serves
    monkeypatch.setattr(published_weights, 'convert_file', pytest.fail)
    second = load(server.url(published.name))
    assert server.n_requests == 1
    assert first.keys() == second.keys()
    assert first['state_dict'].keys() == second['state_dict'].keys()
    name = 'neck.fpn_convs.0.conv.weight'
    assert torch.equal(first['state_dict'][name], second['state_dict'][name])
    local = load(str(published))  # the same bytes elsewhere need no second conversion
    assert local['meta'] == first['meta']
    assert not list(cache.rglob('.tmp-*'))


def small_file(named: str = 'md5') -> tuple[str, bytes]:
    content = pickle.dumps({'model': {'a.weight': np.zeros(3)}})
    digest = hashlib.new(named, content).hexdigest()
    return f'model_final_{digest[:6]}.pkl', content


def test_a_damaged_download_is_refused_and_not_kept(cache: Path, server: Server) -> None:
    name, content = small_file()
    server.files = {name: content[:-5] + b'12345'}
    with pytest.raises(CheckpointError, match=f'{name}: hash is MD5 .*SHA-256 .* the name says'):
        load(server.url(name))
    server.files, server.cut = {name: content}, True
    with pytest.raises(CheckpointError, match=r'cannot be fetched \(.*ended after|IncompleteRead'):
        load(server.url(name))
    assert [path for path in cache.rglob('*') if path.is_file()] == []
    server.cut = False
    assert locate(server.url(name)).read_bytes() == content


def test_offline_says_how_to_go_on(cache: Path, server: Server) -> None:
    url = server.url('model_final_14d201.pkl')
    with pytest.raises(CheckpointError, match=r'cannot be fetched \(Not Found\).*put it at'):
        load(url)
    server.shutdown()
    server.server_close()
    with pytest.raises(CheckpointError, match=r'cannot be fetched .*load_from=None') as caught:
        load(url)
    text = str(caught.value)
    assert str(cache / 'model_final_14d201.pkl') in text
    assert '\n' not in text
    # and the way out works: a file put there is found without a connection
    name, content = small_file()
    cache.mkdir(exist_ok=True)
    (cache / name).write_bytes(content)
    assert locate(f'detectron2://new_baselines/x/1/{name}') == cache / name
    assert locate(f'https://dl.fbaipublicfiles.com/detectron2/x/1/{name}') == cache / name


def test_same_names_without_hash_are_kept_apart(cache: Path, server: Server) -> None:
    server.files = {'model.pkl': b'one'}
    one = locate(server.url('model.pkl'))
    server.files = {'model.pkl': b'two'}
    two = locate(f'http://127.0.0.1:{server.server_port}/other/model.pkl')
    assert (one.read_bytes(), two.read_bytes()) == (b'one', b'two')


@pytest.mark.parametrize(
    ('name', 'ours'),
    [
        (
            'https://dl.fbaipublicfiles.com/detectron2/new_baselines/a/1/model_final_14d201.pkl',
            True,
        ),
        ('detectron2://new_baselines/a/1/model_final_14d201.pkl', True),
        ('work/model.pkl', True),
        ('/data/model_final_14d201.pkl', True),
        ('http://mirror.example/x/model_final_14d201.pkl', True),
        ('https://download.pytorch.org/models/maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth', True),
        (
            'https://download.openmmlab.com/mmdetection/v2.0/simple_copy_paste/a/b-12345678.pth',
            True,
        ),
        ('work_dirs/fold0/iter_10.pth', False),
        ('https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/a-12345678.pth', False),
        ('torchvision://resnet50', False),
    ],
)
def test_only_published_names_are_taken_over(name: str, ours: bool) -> None:
    loader = CheckpointLoader._get_checkpoint_loader(name)
    assert (loader is published_weights.load_from_published) == ours


@pytest.mark.parametrize('algorithm', ['md5', 'sha256'])
def test_either_hash_in_the_name_is_accepted(tmp_path: Path, algorithm: str) -> None:
    name, content = small_file(algorithm)
    (tmp_path / name).write_bytes(content)
    check_name_hash(tmp_path / name)
    wrong = tmp_path / 'model_final_14d201.pkl'
    wrong.write_bytes(content)
    with pytest.raises(CheckpointError, match='name says 14d201; the file is damaged'):
        check_name_hash(wrong)
    with pytest.raises(CheckpointError, match='name says 73cbd019'):
        check_name_hash(wrong.rename(tmp_path / 'maskrcnn_v2-73cbd019.pth'))
    check_name_hash(tmp_path / 'model_final.pkl')  # no hash in the name: nothing to compare


def test_a_truncated_file_is_refused_with_and_without_hash(tmp_path: Path) -> None:
    name, content = small_file()
    path = tmp_path / name
    path.write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match='hash is'):
        convert_file(path, tmp_path / 'out.pth')
    with pytest.raises(CheckpointError, match='ends after'):
        convert_file(path.rename(tmp_path / 'renamed.pkl'), tmp_path / 'out.pth')
    assert not (tmp_path / 'out.pth').exists()


def test_conversion_writes_checkpoint_and_preprocessing(tmp_path: Path, published: Path) -> None:
    out_path = tmp_path / 'lsj.pth'
    convert_file(published, out_path, keep_classes=[0, 0, 1, 2])
    content = torch.load(out_path, weights_only=True)
    assert len(content['state_dict']) == 432
    assert content['state_dict']['roi_head.bbox_head.fc_cls.bias'].shape == (5,)
    beside = json.loads((tmp_path / 'lsj.json').read_text())
    assert beside == content['meta']['cellseg_weights']
    assert beside['preprocessing'] == {
        'channel_order': 'BGR',
        'mean': [103.53, 116.28, 123.675],
        'std': [1.0, 1.0, 1.0],
        'backbone_style': 'caffe',
    }
