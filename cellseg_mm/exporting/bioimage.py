"""A model's ONNX file becomes a BioImage.IO package.

In: the ONNX file of one member. Out: a zip with rdf.yaml, weights, test tensors, a cover picture
and a page. Invariant: what is written was validated by ``bioimageio.spec`` and run by
``bioimageio.core``, which found the cells of the test tensors.

Source: model description 0.5 of https://github.com/bioimage-io/spec-bioimage-io (MIT).
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg_mm.core import files
from cellseg_mm.core.errors import ConfigError
from cellseg_mm.data.drawing.pictures import SCENES, Stain, draw_picture
from cellseg_mm.exporting.onnx_file import OPSET, load_onnx
from cellseg_mm.light.card import describe
from cellseg_mm.light.detector import INPUT, LightDetector, OnnxModel
from cellseg_mm.light.model_file import Member, ModelFile, ModelRecord
from cellseg_mm.light.picture import resize, target_wh
from cellseg_mm.results.overlay import draw_overlay, write_png

Picture = NDArray[np.uint8]
Outputs = dict[str, NDArray[Any]]

PACKAGE = '.zip'
SCORE_THR = 0.5  # what tools/predict.py writes into its formats
DRAWN_PX, LEAST_PX = 256, 128
NAMES = ('boxes', 'categories', 'scores', 'masks')
NEEDED_THERE = {'authors': 'authors', 'license': 'licence'}  # by bioimage.io, and in our card
DOI = re.compile(r'\b10\.\d{4,}/\S*[^\s.,;)]')
TAGS = ('2d', 'cells', 'instance-segmentation', 'mask-rcnn', 'onnx')
CITE = (
    {'text': 'He, Gkioxari, Dollar, Girshick: Mask R-CNN', 'doi': '10.1109/ICCV.2017.322'},
    {
        'text': 'Chen et al.: MMDetection: Open MMLab Detection Toolbox and Benchmark',
        'doi': '10.48550/arXiv.1906.07155',
    },
)


def write_package(
    path: Path, content: bytes, *, card: Mapping[str, Any], picture: Picture | None = None
) -> list[str]:
    """Write a package, after it was validated and run.

    Args:
        path: A ``.zip`` file; its name is the model's.
        content: ONNX file of one member.
        card: As ``card.make_card`` returns it.
        picture: (H, W, 3) uint8, red first, that may be published; None takes a drawn one.

    Returns:
        Sentences: what was tested, and what the collection still needs.

    Raises:
        ConfigError: The library is missing, the model finds no cell in the picture, or the library
            refuses the package.
    """
    with _quiet():
        spec, core = load_library()
        model = OnnxModel(Member('the exported file', content, ''), 'cpu')
        picture, tensors = _clearest(model, [picture] if picture is not None else list(_drawn()))
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            _write_parts(root, content, model, picture, tensors)
            shown = {**card, 'red_blue_swapped': False}  # tensors are red first, whatever files are
            page = describe(ModelFile(path, (), None, shown)) + _page(model.record)
            (root / 'README.md').write_text(page, encoding='utf-8')
            said = {**_of_people(path.stem, card), **_of_parts(root, model.record, tensors)}
            described = _described(spec, path, said)
            with files.atomic_path(path) as temporary:
                spec.save_bioimageio_package(described, output_path=temporary)
                _check(core.test_model(temporary), path)
    tested = (
        f'bioimageio.spec {spec.__version__}: valid; bioimageio.core {core.__version__}: found the '
        f'{len(tensors["scores"])} cells of the test picture again'
    )
    missing = [ours for theirs, ours in NEEDED_THERE.items() if not said[theirs]]
    if not missing:
        return [tested]
    return [tested, f'bioimage.io takes no model without {" and ".join(missing)}: see --card']


def _described(spec: ModuleType, path: Path, said: Mapping[str, Any]) -> object:
    """Return the library's description; it reads the parts and hashes them."""
    version = spec.ModelDescr.implemented_format_version
    try:
        return spec.ModelDescr.model_validate({'format_version': version, 'type': 'model', **said})
    except ValueError as problem:  # pydantic's
        raise ConfigError(
            f'{path}: bioimageio.spec refuses the description: {_one_line(problem)}; expected a '
            'valid one; correct what --card says'
        ) from problem


def load_library() -> tuple[ModuleType, ModuleType]:
    """Import ``bioimageio.spec`` and ``bioimageio.core``.

    Raises:
        ConfigError: They are not installed.
    """
    try:
        import bioimageio.core
        import bioimageio.spec
    except ImportError as problem:
        raise ConfigError(
            f'bioimageio.core: cannot be imported ({problem}); expected it for --format '
            "bioimageio; install it: pip install -c constraints.txt -e '.[bioimageio]'"
        ) from problem
    return bioimageio.spec, bioimageio.core


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's log off the terminal; what it refuses is in its summary."""
    with contextlib.suppress(ImportError):
        from loguru import logger

        logger.disable('bioimageio')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        with contextlib.suppress(ImportError):
            logger.enable('bioimageio')


def _drawn() -> Iterator[Picture]:
    for scene in SCENES:
        rng = np.random.default_rng(0)
        yield draw_picture(rng, (DRAWN_PX, DRAWN_PX), scene, Stain.random(rng)).image


def _clearest(model: OnnxModel, pictures: Sequence[Picture]) -> tuple[Picture, Outputs]:
    """Return the picture whose ranking is the least likely to differ on another computer."""
    found = []
    for picture in pictures:
        seen = np.ascontiguousarray(resize(picture, model.record.resize))
        boxes, classes, scores, masks, _ = model.session.run(None, {INPUT: seen})
        n = int((scores >= SCORE_THR).sum())
        values = (boxes, classes + 1, scores, masks)
        outputs = {key: value[:n] for key, value in zip(NAMES, values, strict=True)}
        ranks = np.concatenate([scores[: n + 1], [SCORE_THR]])
        gap = float(np.diff(np.sort(ranks)).min(initial=1.0))
        found.append((n, gap, len(found), seen, outputs))
    n, _, best, seen, outputs = max(found, key=lambda one: (one[0] > 0, *one[1:3]))
    height, width, _ = seen.shape
    if not n or min(height, width) < LEAST_PX:
        raise ConfigError(
            f'the test picture: has {height} x {width} px and {n} cells with a score of '
            f'{SCORE_THR}; expected {LEAST_PX} px a side and one cell at least; name one that '
            'may be published with --image'
        )
    return pictures[best], {INPUT: seen, **outputs}


def _write_parts(
    root: Path, content: bytes, model: OnnxModel, picture: Picture, tensors: Outputs
) -> None:
    (root / 'model.onnx').write_bytes(with_cells_alone(content, SCORE_THR))
    for name, values in tensors.items():
        np.save(root / f'{name}.npy', values, allow_pickle=False)
    detector = LightDetector([model], red_blue_swapped=False)
    (found,) = detector.detect([picture], 'cover')
    outlined = draw_overlay(picture, found[found.scores >= SCORE_THR], model.record.class_colours)
    side = min(picture.shape[:2])  # twice as wide as high, as the collection wants it
    write_png(
        root / 'cover.png', np.concatenate([picture[:side, :side], outlined[:side, :side]], 1)
    )


def with_cells_alone(content: bytes, score_thr: float) -> bytes:
    """Return the file with the outputs that a package describes.

    Cells of a lower score are left out. Categories count from 1, because a tensor of zeros is
    refused as a test; the output for the notes is not there, because it may be zero.
    """
    onnx = load_onnx()
    model = onnx.load_model_from_string(content)
    graph, make = model.graph, onnx.helper.make_node
    for name, value in (('pkg.thr', np.float32(score_thr)), ('pkg.one', np.int64(1))):
        graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    graph.node.append(make('Add', ['classes', 'pkg.one'], ['all.categories']))
    graph.node.append(make('GreaterOrEqual', ['all.scores', 'pkg.thr'], ['pkg.kept']))
    outputs = {one.name: one for one in graph.output}
    for name in ('boxes', 'scores', 'masks'):
        _rename(graph, name, f'all.{name}')
    outputs['classes'].name = 'categories'
    for name in NAMES:
        graph.node.append(make('Compress', [f'all.{name}', 'pkg.kept'], [name], axis=0))
    kept = [outputs.get(name, outputs['classes']) for name in NAMES]
    copies = [type(one).FromString(one.SerializeToString()) for one in kept]
    del graph.output[:]
    graph.output.extend(copies)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _rename(graph: Any, old: str, new: str) -> None:  # noqa: ANN401 - onnx is imported late
    """Rename a value that the graph computes."""
    for node in graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == old:
                    names[i] = new


def _of_people(name: str, card: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of the description that the card says."""
    name = re.sub(r'[^A-Za-z0-9_+\- ()]', ' ', name)
    licence, attribution = card.get('licence'), str(card.get('attribution') or '')
    finds = f'Finds cells, outlines and names them: {", ".join(card["class_names"])}'
    authors = re.split(r'\s*[,;]\s*', str(card.get('authors') or ''))
    named = [{'text': attribution, 'doi': doi} for doi in DOI.findall(attribution)]
    return {
        'name': name if len(name) > 4 else f'{name} (cells)',
        'description': str(card.get('summary') or finds)[:512],
        'authors': [{'name': author} for author in authors if author],
        # SPDX's spelling: CC BY-NC-SA 4.0 is CC-BY-NC-SA-4.0
        'license': None if licence is None else str(licence).strip().replace(' ', '-'),
        'cite': [*named, *CITE],
        'tags': list(TAGS),
    }


def _of_parts(root: Path, record: ModelRecord, tensors: Outputs) -> dict[str, Any]:
    """Return the part of the description that the files are."""
    size = tensors['masks'].shape[-1]
    index = {'type': 'index', 'size': {'min': 1}}
    grid = [{'type': 'space', 'id': axis, 'size': size} for axis in 'yx']
    corners = {'type': 'channel', 'channel_names': ['x0', 'y0', 'x1', 'y1']}
    outputs = [
        _tensor(root, 'boxes', 'corners in px of the input', 'float32', [index, corners]),
        _tensor(root, 'categories', 'class, from 1: see README.md', 'int64', [index]),
        _tensor(root, 'scores', 'falling', 'float32', [index], most=1),
        _tensor(root, 'masks', 'probabilities within the frame', 'float32', [index, *grid], most=1),
    ]
    side = {'type': 'space', 'size': {'min': LEAST_PX, 'step': 1}, **_um_of_input(record)}
    sides = [{'id': axis, **side} for axis in 'yx']
    axes = [*sides, {'type': 'channel', 'channel_names': ['red', 'green', 'blue']}]
    return {
        'documentation': {'source': root / 'README.md'},
        'covers': [{'source': root / 'cover.png'}],
        'inputs': [_tensor(root, INPUT, 'colours as they are', 'uint8', axes, most=255)],
        'outputs': outputs,
        'weights': {'onnx': {'source': root / 'model.onnx', 'opset_version': OPSET}},
        'config': {'cellseg_mm': _config(record)},
    }


def _um_of_input(record: ModelRecord) -> dict[str, Any]:
    """Return how large a pixel of the input is, if that is the same for every picture."""
    step = record.resize or {}
    if record.um_per_px is None or step.get('scale') is not None or 'max_side_px' in step:
        return {}
    factor = 1.0 if record.resize is None else target_wh((1000, 1000), record.resize)[0] / 1000
    return {'unit': 'micrometer', 'scale': record.um_per_px / factor}


def _tensor(
    root: Path,
    name: str,
    description: str,
    dtype: str,
    axes: Sequence[Mapping[str, Any]],
    *,
    most: float | None = None,
) -> dict[str, Any]:
    return {
        'id': name,
        'description': description,
        'axes': list(axes),
        'data': {'type': dtype, 'range': [0, most]},
        'test_tensor': {'source': root / f'{name}.npy'},
    }


def _config(record: ModelRecord) -> dict[str, Any]:
    whole = json.loads(record.to_json())
    kept = ('class_names', 'class_colours', 'resize', 'mask_frame', 'mask_thr', 'half', 'made_with')
    return {**{key: whole[key] for key in kept}, 'score_thr': SCORE_THR}


def _page(record: ModelRecord) -> str:
    """Return what the package's page says below the card."""
    step = dict(record.resize or {})
    is_same = not step or step.get('scale_factor') == 1
    resized = 'as it is' if is_same else f'resized before as by `{step}`'
    classes = ', '.join(f'{i} {name}' for i, name in enumerate(record.class_names, 1))
    return f"""

## What goes in and comes out

`{INPUT}`: (H, W, 3) uint8, red first, {resized}. Normalising and padding are in the graph.

A row a cell, by falling score, of {SCORE_THR} and more: `boxes` (x0, y0, x1, y1 in px of the
input), `categories` ({classes}), `scores`, and `masks`: probabilities on a grid over the box made
{record.mask_frame} times as wide and high about its centre. Resize it to that frame; the cell is
where it is {record.mask_thr} or more. Where nothing is found the tensors have no rows, which a
BioImage.IO description cannot say.

## Validation

Compare its masks with masks that people drew in images of other patients than those it was trained
on: `tools/test.py` of cellseg_mm, or any COCO scorer.
"""


def _check(summary: Any, path: Path) -> None:  # noqa: ANN401 - the library is imported late
    if summary.status == 'passed':
        return
    errors = [error.msg for detail in summary.details for error in detail.errors]
    raise ConfigError(
        f'{path}: bioimageio.core does not pass the package ({summary.status}): '
        f'{_one_line(". ".join(errors))}; expected the cells of the test tensors; nothing was '
        'written; try another picture with --image, else please report it'
    )


def _one_line(what: object) -> str:
    return re.sub(r'\s+', ' ', str(what))[:300]
