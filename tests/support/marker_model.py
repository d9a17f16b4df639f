"""A model file that finds planted markers: small, exact, and made without torch.

A pixel whose red is 255 is the centre of a cell: a square of ``2 * radius + 1`` pixels. Its green
is 0 or 200 for the first or second class, its blue is 255 times the score.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cellseg_mm.light.model_file import METADATA_KEY, ModelRecord

CLASSES = ('round', 'square')
COLOURS = ((0, 114, 178), (213, 94, 0))
SIDE = 4  # of the masks' grid, which is full

# output <- operator(inputs); NonZero, Gather ... are ONNX's own
STEPS = (
    ('values', 'Cast', ('image',), {'to': TensorProto.INT32}),
    ('red', 'Gather', ('values', 'int.0'), {'axis': 2}),
    ('is_marker', 'Equal', ('red', 'red.255'), {}),
    ('found', 'NonZero', ('is_marker',), {}),
    ('yx', 'Transpose', ('found',), {'perm': [1, 0]}),
    ('colours', 'GatherND', ('values', 'yx'), {}),
    ('green', 'Gather', ('colours', 'int.1'), {'axis': 1}),
    ('blue', 'Gather', ('colours', 'int.2'), {'axis': 1}),
    ('blue.float', 'Cast', ('blue',), {'to': TensorProto.FLOAT}),
    ('unsorted', 'Div', ('blue.float', 'float.255'), {}),
    ('n', 'Shape', ('unsorted',), {}),
    ('scores', 'TopK', ('unsorted', 'n'), {}),
    ('yx.sorted', 'Gather', ('yx', 'order'), {'axis': 0}),
    ('xy', 'Gather', ('yx.sorted', 'swap'), {'axis': 1}),
    ('xy.float', 'Cast', ('xy',), {'to': TensorProto.FLOAT}),
    ('low', 'Sub', ('xy.float', 'radius'), {}),
    ('high', 'Add', ('xy.float', 'radius.1'), {}),
    ('hw', 'Shape', ('red',), {}),
    ('wh', 'Gather', ('hw', 'swap'), {'axis': 0}),
    ('wh.float', 'Cast', ('wh',), {'to': TensorProto.FLOAT}),
    ('low.in', 'Max', ('low', 'float.0'), {}),
    ('high.in', 'Min', ('high', 'wh.float'), {}),
    ('boxes', 'Concat', ('low.in', 'high.in'), {'axis': 1}),
    ('class.int', 'Div', ('green', 'int.200'), {}),
    ('class.long', 'Cast', ('class.int',), {'to': TensorProto.INT64}),
    ('classes', 'Gather', ('class.long', 'order'), {'axis': 0}),
    ('shape', 'Concat', ('n', 'grid'), {'axis': 0}),
    ('masks', 'Expand', ('full', 'shape'), {}),
    ('proposal_cut', 'Identity', ('float.0',), {}),
)


def marker_record(**changes: object) -> ModelRecord:
    settings = {
        'class_names': CLASSES,
        'class_colours': COLOURS,
        'red_blue_swapped': False,
        'resize': None,
        'mask_frame': 1.0,
        'mask_thr': 0.5,
        'score_thr': 0.0,
        'max_per_img': 0,
    }
    return ModelRecord(**{**settings, **changes})


def marker_model(*, radius: int = 4, n_channels: int = 3, **record: object) -> bytes:
    """Return the ONNX file."""
    constants = {
        **{f'int.{k}': np.array(k, np.int64) for k in (0, 1, 2)},
        'red.255': np.array(255, np.int32),
        'int.200': np.array(200, np.int32),
        'float.0': np.array(0, np.float32),
        'float.255': np.array(255, np.float32),
        'radius': np.array(radius, np.float32),
        'radius.1': np.array(radius + 1, np.float32),
        'swap': np.array([1, 0]),
        'grid': np.array([SIDE, SIDE]),
        'full': np.ones((1, SIDE, SIDE), np.float32),
    }
    nodes = [
        helper.make_node(kind, inputs, [name, 'order'] if kind == 'TopK' else [name], **more)
        for name, kind, inputs, more in STEPS
    ]
    shapes = {
        'boxes': (TensorProto.FLOAT, ['n', 4]),
        'classes': (TensorProto.INT64, ['n']),
        'scores': (TensorProto.FLOAT, ['n']),
        'masks': (TensorProto.FLOAT, ['n', SIDE, SIDE]),
        'proposal_cut': (TensorProto.FLOAT, []),
    }
    graph = helper.make_graph(
        nodes,
        'markers',
        [helper.make_tensor_value_info('image', TensorProto.UINT8, ['h', 'w', n_channels])],
        [helper.make_tensor_value_info(name, *about) for name, about in shapes.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 16)], ir_version=8)
    helper.set_model_props(model, {METADATA_KEY: marker_record(**record).to_json()})
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def write_marker_model(path: Path, **settings: object) -> Path:
    path.write_bytes(marker_model(**settings))
    return path


def marked_picture(hw: tuple[int, int], step: int = 16) -> np.ndarray:
    """Return a grey picture with a marker every ``step`` pixels, none nearer than 6 to an edge."""
    rng = np.random.default_rng(0)
    picture = rng.integers(90, 110, (*hw, 3), dtype=np.uint8)
    n = 0
    for y in range(6, hw[0] - 6, step):
        for x in range(6, hw[1] - 6, step):
            picture[y, x] = (255, 200 * (n % 2), 130 + n % 120)
            n += 1
    return picture


def with_changed_record(content: bytes, **changes: object) -> bytes:
    model = onnx.load_model_from_string(content)
    record = json.loads(model.metadata_props[0].value)
    helper.set_model_props(model, {METADATA_KEY: json.dumps({**record, **changes})})
    return bytes(model.SerializeToString())
