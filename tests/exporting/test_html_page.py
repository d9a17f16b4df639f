"""The page finds what Python finds; it reads what it says it reads; and it reaches nothing else."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import runpy
import stat
import tarfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.data.drawing.sample import make_sample
from cellseg_mm.exporting import html_page, ort_web
from cellseg_mm.fusion.settings import apply_settings, default_settings
from cellseg_mm.light import picture as light_picture
from cellseg_mm.light.detector import LightDetector, OnnxModel
from cellseg_mm.light.model_file import ModelFile, read_model_file
from cellseg_mm.predict.tiling import plan_tiles
from cellseg_mm.results.export import write_cells_csv, write_geojson
from tests.support.chromium import Chromium, find_chromium

pytest.importorskip('onnxruntime')

ASSETS = Path(html_page.__file__).parent / 'assets'


@pytest.fixture(scope='module')
def model() -> ModelFile:
    return read_model_file('he4')


# ---- the page's text ----


@pytest.fixture
def small_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    names = dict.fromkeys(ort_web.SHA256, b'var a=1;export{a as default};')
    monkeypatch.setattr(html_page, 'runtime_files', lambda named: names)


@pytest.mark.usefixtures('small_runtime')
def test_the_page_says_what_it_is_and_reaches_nothing(model: ModelFile, tmp_path: Path) -> None:
    path = tmp_path / 'he4.html'
    card = {**model.card, 'licence': '<b>mine</b>'}
    written = html_page.write_page(path, replace(model, card=card))
    html = path.read_text(encoding='utf-8')
    assert written.n_bytes == path.stat().st_size
    assert str(path) in written.describe()
    text = html.split('<script type="text/plain"')[0]
    for said in ('No medical device', '&lt;b&gt;mine&lt;/b&gt;', 'onnxruntime-web', 'µm a pixel'):
        assert said in text
    assert '<b>mine' not in html
    assert "connect-src 'none'" in text
    assert 'src="http' not in html
    assert 'href="http' not in html
    first = html_page.write_page(tmp_path / 'again.html', replace(model, card=card))
    assert first.path.read_bytes() == path.read_bytes()


@pytest.mark.usefixtures('small_runtime')
def test_what_a_page_cannot_hold_is_a_sentence(
    model: ModelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r'ends in \.html'):
        html_page.write_page(tmp_path / 'page.txt', model)
    two = replace(model, members=(*model.members, *model.members))
    with pytest.raises(ConfigError, match='2 members; a page carries one'):
        html_page.write_page(tmp_path / 'page.html', two)
    record = OnnxModel(model.members[0], 'cpu').record
    step = {'type': 'ScaleBy', 'factor': 2, 'max_side_px': 9, 'interpolation': 'bicubic'}
    other = replace(record, resize=step)
    monkeypatch.setattr(html_page, 'OnnxModel', lambda *_: type('Model', (), {'record': other}))
    with pytest.raises(ConfigError, match='bicubic'):
        html_page.write_page(tmp_path / 'page.html', model)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures('small_runtime')
def test_the_tool_takes_models_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tool = str(Path(__file__).resolve().parents[2] / 'tools/export.py')
    path = tmp_path / 'he4.html'
    monkeypatch.setattr('sys.argv', [tool, 'he4', '--format', 'html', '--out', str(path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(tool, run_name='__main__')
    assert ended.value.code in (0, None)
    assert 'Cells by he4' in path.read_text(encoding='utf-8')
    assert str(path) in capsys.readouterr().out
    monkeypatch.setattr('sys.argv', [tool, 'he4', 'he4', '--out', str(path)])
    with pytest.raises(SystemExit):
        runpy.run_path(tool, run_name='__main__')
    assert '2 members; a page carries one' in capsys.readouterr().err


def test_a_module_becomes_a_constant() -> None:
    module = 'var a=1,b=2;export{a as Tensor,b};\n//# sourceMappingURL=a.map'
    assert (
        html_page.as_constant(module) == 'const ort=(()=>{var a=1,b=2;\nreturn{Tensor:a,b:b};})();'
    )
    with pytest.raises(ConfigError, match='has no exports'):
        html_page.as_constant('var a=1;')


# ---- where onnxruntime-web comes from ----

CONTENT = {name: f'content of {name}'.encode() for name in ort_web.SHA256}


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
    monkeypatch.setattr(ort_web, 'SHA256', hashes)
    monkeypatch.setenv('CELLSEG_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('PATH', str(tmp_path))
    return tmp_path


def packed(path: Path) -> Path:
    with tarfile.open(path, 'w:gz') as archive:
        for name, content in CONTENT.items():
            entry = tarfile.TarInfo(f'package/dist/{name}')
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def test_folders_and_packages(known: Path) -> None:
    folder = known / 'npm/node_modules/onnxruntime-web/dist'
    folder.mkdir(parents=True)
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
    assert ort_web.runtime_files(known / 'npm') == CONTENT
    assert ort_web.runtime_files(folder) == CONTENT
    assert ort_web.runtime_files(packed(known / 'ort.tgz')) == CONTENT
    (folder / ort_web.WASM).write_bytes(b'another version')
    with pytest.raises(ConfigError, match='is not that of onnxruntime-web@'):
        ort_web.runtime_files(folder)
    with pytest.raises(ConfigError, match='expected the npm package'):
        ort_web.runtime_files(known)
    (known / 'odd.tgz').write_bytes(b'no archive')
    with pytest.raises(ConfigError, match='expected the npm package'):
        ort_web.runtime_files(known / 'odd.tgz')


def test_npm_is_asked_once(known: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r'npm is not installed.*npm pack.*--ort-web'):
        ort_web.runtime_files()
    npm = known / 'npm'
    npm.write_text('#!/bin/sh\necho no network >&2\nexit 1\n')
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    ort_web.fetch_or_say()
    assert 'no network' in capsys.readouterr().out
    npm.write_text(f'#!/bin/sh\n/bin/cp {packed(known / "kept.tgz")} onnxruntime-web.tgz\n')
    assert not ort_web.is_cached()
    assert ort_web.runtime_files() == CONTENT
    npm.unlink()
    assert ort_web.runtime_files() == CONTENT


# ---- a real browser ----

# As in tests/report: `make test-browser` makes what is missing an error; elsewhere the tests below
# are not collected without it, and the one that stands in for them says so.
IS_REQUIRED = bool(os.environ.get('CELLSEG_REQUIRE_BROWSER'))
HAS_BROWSER = find_chromium() is not None or IS_REQUIRED
HAS_RUNTIME = ort_web.is_cached() or IS_REQUIRED

READY = 'document.getElementById("status").textContent === "ready"'
DONE = f'document.getElementById("progress").hidden && {READY}'


def set_control(page: Chromium, name: str, value: object, event: str) -> None:
    page.run(
        f'(() => {{ const c = document.getElementById("{name}"); c.value = "{value}";'
        f'c.dispatchEvent(new Event("{event}")); }})()'
    )


def random_rgb(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


RGB = random_rgb(75, 117)
PALETTE = np.random.default_rng(1).integers(0, 1 << 16, (3, 256), dtype=np.uint16)
LZW = {'compression': 'lzw'}
TIFFS = {
    'plain': ({}, RGB),
    'big': ({'bigtiff': True, 'byteorder': '>'}, RGB),
    'strips with predictor': ({**LZW, 'predictor': True, 'rowsperstrip': 20}, RGB),
    'lzw of noise': (LZW, np.random.default_rng(2).integers(0, 256, RGB.shape, dtype=np.uint8)),
    'lzw of one colour': (LZW, np.full_like(RGB, 200)),
    'deflate in tiles': ({'compression': 'zlib', 'predictor': True, 'tile': (32, 48)}, RGB),
    'packbits': ({'compression': 'packbits'}, RGB // 64 * 64),
    'planes': ({**LZW, 'planarconfig': 'separate', 'rowsperstrip': 10}, RGB.transpose(2, 0, 1)),
    'alpha': ({**LZW, 'extrasamples': ['unassalpha']}, np.dstack([RGB, RGB[..., 0]])),
    'grey': ({'compression': 'zlib'}, RGB[..., 0]),
    'white is zero': ({'photometric': 'miniswhite'}, RGB[..., 0]),
    'palette': ({'photometric': 'palette', 'colormap': PALETTE}, RGB[..., 0]),
}
REFUSED = {
    '16 bits': ({}, RGB.astype(np.uint16) * 257),
    'floats': ({}, RGB.astype(np.float32)),
    'five channels': ({'photometric': 'rgb'}, np.dstack([RGB, RGB[..., :2]])),
    'zstd': ({'compression': 'zstd'}, RGB),
}


def tiff_bytes(values: np.ndarray, **options: object) -> bytes:
    stream = io.BytesIO()
    kind = 'rgb' if values.ndim == 3 else 'minisblack'
    byteorder, bigtiff = options.pop('byteorder', '<'), options.pop('bigtiff', False)
    with tifffile.TiffWriter(stream, byteorder=byteorder, bigtiff=bigtiff) as file:
        file.write(values, **{'photometric': kind, 'metadata': None, **options})
    return stream.getvalue()


if HAS_BROWSER:

    @pytest.fixture(scope='module')
    def browser():
        with Chromium() as page:
            yield page

    @pytest.fixture(scope='module')
    def scripts(browser, tmp_path_factory: pytest.TempPathFactory):
        """A page with the worker's functions in reach."""
        names = ('tiff', 'picture', 'find', 'cells')
        code = '\n'.join((ASSETS / f'{name}.js').read_text() for name in names)
        helper = """
            const bytesOf = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
            const textOf = (bytes) => { let text = '';
              bytes.forEach((b) => { text += String.fromCharCode(b); }); return btoa(text); };
            async function readBytes(text) {
              const picture = await readPicture(bytesOf(text).buffer);
              return [picture.height, picture.width, textOf(picture.rgba), picture.notes];
            }"""
        path = tmp_path_factory.mktemp('scripts') / 'scripts.html'
        path.write_text(f'<meta charset="utf-8"><script>{code}{helper}</script>', encoding='utf-8')
        browser.open(path, width=800)
        return browser

    def read(page: Chromium, content: bytes) -> tuple[np.ndarray, list[str]]:
        text = base64.b64encode(content).decode()
        height, width, rgba, notes = page.run(f'readBytes("{text}")')
        values = np.frombuffer(base64.b64decode(rgba), dtype=np.uint8)
        return values.reshape(height, width, 4)[..., :3], notes

    def refused(page: Chromium, content: bytes) -> str:
        text = base64.b64encode(content).decode()
        return page.run(f'readBytes("{text}").then(() => "", (problem) => problem.message)')

    @pytest.mark.parametrize('kind', list(TIFFS))
    def test_tiffs(scripts, kind: str, tmp_path: Path) -> None:
        options, values = TIFFS[kind]
        content = tiff_bytes(values, **options)
        found, notes = read(scripts, content)
        (tmp_path / 'a.tif').write_bytes(content)
        from cellseg_mm.data.labels import read_image

        np.testing.assert_array_equal(found, read_image(tmp_path / 'a.tif'))
        assert notes == []

    @pytest.mark.parametrize('colourspace', ['rgb', 'ycbcr'])
    @pytest.mark.parametrize('tile', [None, (64, 64)])
    def test_jpeg_in_tiff(scripts, colourspace: str, tile: tuple | None) -> None:
        content = tiff_bytes(
            RGB,
            compression='jpeg',
            compressionargs={'level': 90, 'outcolorspace': colourspace},
            photometric='ycbcr' if colourspace == 'ycbcr' else 'rgb',
            tile=tile,
        )
        found, _ = read(scripts, content)
        expected = tifffile.imread(io.BytesIO(content))
        # decoders may differ by rounding where chroma is enlarged
        assert np.abs(found.astype(int) - expected).mean() < 1

    def test_several_pictures_are_said(scripts) -> None:
        stream = io.BytesIO()
        for k in range(3):
            stream.seek(0)
            tifffile.imwrite(stream, RGB + np.uint8(k), photometric='rgb', append=k > 0)
        found, notes = read(scripts, stream.getvalue())
        np.testing.assert_array_equal(found, RGB)
        assert notes == ['holds 3 pictures; the first was read']

    @pytest.mark.parametrize('kind', ['PNG', 'JPEG'])
    def test_bitmaps(scripts, kind: str) -> None:
        stream = io.BytesIO()
        Image.fromarray(RGB).save(stream, kind, quality=95, subsampling=0)
        found, notes = read(scripts, stream.getvalue())
        expected = np.asarray(Image.open(stream)).astype(int)
        assert np.abs(found - expected).max() <= (0 if kind == 'PNG' else 2)
        assert notes == []

    def test_what_cannot_be_read_is_a_sentence(scripts) -> None:
        for kind, (options, values) in REFUSED.items():
            assert refused(scripts, tiff_bytes(values, **options)), kind
        content = tiff_bytes(RGB, compression='zlib')
        for n in (6, 40, len(content) // 2):
            assert 'cut off' in refused(scripts, content[:n]) or 'damaged' in refused(
                scripts, content[:n]
            )
        stream = io.BytesIO()
        Image.fromarray(RGB[..., 0].astype(np.uint16)).save(stream, 'PNG')
        assert '16 bits' in refused(scripts, stream.getvalue())
        assert 'no PNG' in refused(scripts, b'GIF89a')
        assert refused(scripts, b'\x89PNG' + bytes(60))
        rng = np.random.default_rng(3)
        lzw = np.frombuffer(tiff_bytes(RGB, **LZW), dtype=np.uint8)
        for _ in range(60):  # never a hang, never an error that is none of ours
            damaged = lzw.copy()
            at = rng.integers(8, len(lzw), 3)
            damaged[at] = rng.integers(0, 256, 3)
            text = refused(scripts, damaged.tobytes())
            assert 'undefined' not in text

    STEPS = [
        {'type': 'ScaleBy', 'factor': 2.0, 'max_side_px': 3200},
        {'type': 'ScaleBy', 'factor': 1.37, 'max_side_px': 120},
        {'type': 'Resize', 'scale': (133, 80), 'keep_ratio': True},
        {'type': 'Resize', 'scale': (200, 190), 'keep_ratio': False, 'backend': 'pillow'},
        {'type': 'Resize', 'scale_factor': 0.4, 'keep_ratio': True, 'backend': 'pillow'},
    ]

    @pytest.mark.parametrize('step', STEPS)
    def test_resizing_gives_the_same_pixels(scripts, step: dict) -> None:
        expected = light_picture.resize(RGB, step)
        height, width = RGB.shape[:2]
        text = base64.b64encode(np.ascontiguousarray(RGB)).decode()
        values, *hw = scripts.run(
            f'(() => {{ const r = resize({{width: {width}, height: {height}, '
            f'rgb: bytesOf("{text}")}}, {json.dumps(step)}); '
            'return [textOf(r.rgb), r.height, r.width]; })()'
        )
        found = np.frombuffer(base64.b64decode(values), dtype=np.uint8).reshape(*hw, 3)
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).max() <= 1
        assert (found != expected).mean() < 0.01

    def test_tiles_are_those_of_python(scripts) -> None:
        for hw in ((300, 500), (90, 1000), (128, 128)):
            found = scripts.run(f'planTiles({hw[1]}, {hw[0]}, 128, 16, 192)')
            expected = plan_tiles(hw, max(hw) if max(hw) <= 192 else 128, 16)
            keys = ('y0', 'x0', 'y1', 'x1'), ('top', 'left', 'bottom', 'right')
            assert [tuple(one[k] for k in keys[0]) for one in found] == [
                tile.window_yxyx for tile in expected
            ]
            assert [tuple(one[k] for k in keys[1]) for one in found] == [
                tile.core_yxyx for tile in expected
            ]


if HAS_BROWSER and HAS_RUNTIME:

    @pytest.fixture(scope='module')
    def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Draw a picture in true colours."""
        root = make_sample(tmp_path_factory.mktemp('drawn') / 'data', n_train=1, n_test=1, seed=4)
        stored = tifffile.imread(next((root / 'test_release').glob('*.tif')))[..., :3]
        path = root / 'drawn.png'
        Image.fromarray(np.ascontiguousarray(stored[..., ::-1])).save(path)
        return path

    @pytest.fixture(scope='module')
    def plain(model: ModelFile) -> ModelFile:
        """The model without settings, so that Python takes the defaults, too."""
        return ModelFile(Path('plain.cellseg'), model.members)

    @pytest.fixture(scope='module')
    def page_path(plain: ModelFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp('page') / 'plain.html'
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(html_page, 'SEEN_PX', 320)  # twice as large: up to 240 px are not cut
            written = html_page.write_page(path, plain)
        assert written.n_bytes < 20e6
        return path

    def expected_cells(plain: ModelFile, path: Path):
        detector = LightDetector([OnnxModel(plain.members[0], 'cpu')], red_blue_swapped=False)
        image = np.asarray(Image.open(path))
        (found,) = detector.detect([image], path.stem)
        names = detector.record.class_names
        cells = apply_settings(found, default_settings('instances', names))
        return image, cells, detector.record

    def saved(page: Chromium, folder: Path, kind: str, name: str) -> str:
        """Save what is shown and return the file's text; of a PNG nothing."""
        page.save_into(folder)
        page.run(f'document.querySelector("#save [data-kind={kind}]").click()')
        path = folder / name
        for _ in range(400):
            if path.is_file():
                return '' if kind == 'png' else path.read_text(encoding='utf-8')
            page.run('new Promise((resolve) => setTimeout(resolve, 50))')
        raise TimeoutError(f'{name} was not saved: {page.problems}')

    def show(page: Chromium, path: Path, *pictures: Path) -> None:
        page.open(path, width=1280)
        page.wait_for(READY)
        assert page.run('document.getElementById("swapped").checked') is False
        page.give_files('#files', *pictures)
        page.wait_for(DONE)

    @pytest.fixture(scope='module')
    def shown(browser, page_path: Path, picture: Path):
        """The page with a picture, and with a file that is none."""
        odd = picture.with_name('<b>odd.tif')
        odd.write_bytes(b'II*\0')
        browser.problems.clear()
        browser.requests.clear()
        show(browser, page_path, odd, picture)
        return browser

    def place(row: dict) -> tuple[int, int]:
        return round(float(row['centroid_x_px'])), round(float(row['centroid_y_px']))

    def first_corner(feature: dict) -> tuple:
        return min(min(ring) for ring in rings_of(feature))

    def rings_of(feature: dict) -> set:
        geometry = feature['geometry']
        polygons = geometry['coordinates']
        if geometry['type'] == 'Polygon':
            polygons = [polygons]
        return {frozenset(map(tuple, ring)) for rings in polygons for ring in rings}

    def test_the_page_finds_what_python_finds(
        shown, plain: ModelFile, picture: Path, tmp_path: Path
    ) -> None:
        image, cells, record = expected_cells(plain, picture)
        names, colours = record.class_names, record.class_colours
        assert len(cells) > 5
        write_cells_csv(tmp_path / 'a.csv', cells, names, image=image)
        write_geojson(tmp_path / 'a.geojson', cells, names, colours)
        ours = list(csv.DictReader(io.StringIO((tmp_path / 'a.csv').read_text())))
        text = saved(shown, tmp_path / 's', 'csv', 'drawn.cells.csv')
        theirs = list(csv.DictReader(io.StringIO(text)))
        assert list(ours[0]) == list(theirs[0])
        # scores that agree to rounding may stand in another order
        ours, theirs = (sorted(rows, key=place) for rows in (ours, theirs))
        assert [row['class'] for row in ours] == [row['class'] for row in theirs]
        # the browser's rounding may turn a pixel of a mask, here and there
        n_alike = 0
        for a, b in zip(ours, theirs, strict=True):
            gaps = {key: abs(float(a[key]) - float(b[key])) for key in set(a) - {'class', 'cell'}}
            assert gaps['score'] <= 1e-2
            assert gaps['area_px'] <= 4
            n_alike += gaps['area_px'] == 0
        assert n_alike >= 0.9 * len(ours)
        ours = json.loads((tmp_path / 'a.geojson').read_text())['features']
        text = saved(shown, tmp_path / 's', 'geojson', 'drawn.geojson')
        pairs = [sorted(rows, key=first_corner) for rows in (ours, json.loads(text)['features'])]
        same = [rings_of(a) == rings_of(b) for a, b in zip(*pairs, strict=True)]
        assert np.mean(same) >= 0.9
        kinds = [[one['properties']['classification'] for one in rows] for rows in pairs]
        assert kinds[0] == kinds[1]
        saved(shown, tmp_path / 's', 'png', 'drawn.overlay.png')
        with Image.open(tmp_path / 's/drawn.overlay.png') as png:
            drawn = np.asarray(png.convert('RGB'))
        assert drawn.shape[1] == image.shape[1]
        assert drawn.shape[0] > image.shape[0]  # the legend
        changed = (drawn[: image.shape[0]] != image).any(axis=2)
        assert 0.005 < changed.mean() < 0.5
        assert shown.problems == []
        assert all(url.startswith('blob:') for url in shown.requests)

    VISIBLE = '[...document.querySelectorAll("#canvas path")].filter(p => p.style.display === "")'

    COUNTS = '[...document.querySelectorAll(".n")].map((n) => Number(n.textContent))'

    def test_controls(shown) -> None:
        notes = shown.run('document.getElementById("notes").textContent')
        assert notes == '<b>odd.tif: the file is damaged'
        n_all = shown.run(f'{VISIBLE}.length')
        numbers = shown.run(COUNTS)
        assert sum(numbers) == n_all > 5
        first = int(np.argmax(numbers))
        shown.run(f'document.querySelector(".class-switch[value=\\"{first}\\"]").click()')
        assert shown.run(f'{VISIBLE}.length') == n_all - numbers[first]
        set_control(shown, 'threshold', 1, 'input')
        assert shown.run(f'{VISIBLE}.length') == 0
        assert shown.run('document.getElementById("threshold-value").textContent') == '1.00'
        view = 'document.getElementById("canvas").getAttribute("viewBox")'
        before = shown.run(view)
        shown.run('document.getElementById("canvas").focus()')
        for kind in ('keyDown', 'keyUp'):
            shown.call('Input.dispatchKeyEvent', type=kind, key='+', text='+')
        assert shown.run(view) != before
        assert shown.problems == []

    def test_small_and_dark(shown) -> None:
        assert shown.run('document.documentElement.scrollWidth') <= 1280
        shown.call(
            'Emulation.setDeviceMetricsOverride',
            width=390,
            height=900,
            deviceScaleFactor=1,
            mobile=True,
        )
        assert shown.run('document.documentElement.scrollWidth') <= 390
        background = 'getComputedStyle(document.body).backgroundColor'
        assert shown.run(background) == 'rgb(255, 255, 255)'
        shown.run('document.getElementById("theme").click()')
        assert shown.run(background) == 'rgb(22, 27, 34)'

    def test_the_other_order_of_colours_finds_the_cells_again(shown) -> None:
        source = 'document.querySelector("#canvas image").getAttribute("href")'
        before = shown.run(source)
        shown.run('document.getElementById("swapped").click()')
        shown.wait_for(DONE)
        assert shown.run(source) != before
        assert shown.run('document.getElementById("image").length') == 1

    def test_tiles_find_nearly_the_same(shown, plain: ModelFile, picture: Path) -> None:
        image = np.asarray(Image.open(picture))[:160]
        image = np.hstack([image, image[:, ::-1]])[:, :260]
        path = picture.with_name('wide.png')
        Image.fromarray(image).save(path)
        swapped = picture.with_name('wide_swapped.png')  # as the test above left the page
        Image.fromarray(np.ascontiguousarray(image[..., ::-1])).save(swapped)
        set_control(shown, 'threshold', 0.5, 'input')
        shown.give_files('#files', swapped)
        shown.wait_for(DONE)
        assert '2 tiles' in shown.run('document.getElementById("facts").textContent')
        n_found = sum(shown.run(COUNTS))
        _, cells, _ = expected_cells(plain, path)
        assert len(cells) > 5
        assert abs(n_found - len(cells)) <= max(2, 0.15 * len(cells))

else:

    def test_browser_tests_did_not_run(capsys: pytest.CaptureFixture) -> None:
        missing = [
            text
            for has, text in (
                (HAS_BROWSER, 'NO CHROMIUM FOUND (install chromium)'),
                (HAS_RUNTIME, f'NO {ort_web.PACKAGE} IN {ort_web.cache_dir()} (install npm)'),
            )
            if not has
        ]
        with capsys.disabled():
            print(
                f'\ntests/exporting/test_html_page.py: {"; ".join(missing)}: the page was not '
                'tried in a browser; then type: make test-browser'
            )
        assert missing
