"""A model written down as ONNX.

In: a model that ``carried`` lets pass, and a picture to trace it with. Out: the bytes of an ONNX
file. Invariant: opset 16 and the standard operators only, so that every onnxruntime of the last
years, the browser's too, reads it.
"""

from __future__ import annotations

import io
import warnings
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cellseg_mm.core.errors import ConfigError
from cellseg_mm.exporting.graph import PlainMaskRCNN
from cellseg_mm.light.detector import INPUT, OUTPUTS
from cellseg_mm.light.model_file import METADATA_KEY, ModelRecord

OPSET = 16
HALVED_FROM = 64  # values; smaller tensors weigh nothing, and norms' are the most delicate


def to_onnx(model: nn.Module, picture: NDArray[np.uint8], where: str) -> bytes:
    """Trace a model.

    Args:
        model: In evaluation mode, on the CPU.
        picture: (H, W, 3) uint8, red first, with cells; the graph takes any size.
        where: Config, for messages.

    Raises:
        ConfigError: onnx is not installed, or a part of the model cannot be traced.
    """
    load_onnx()
    stream = io.BytesIO()
    axes = {INPUT: {0: 'height', 1: 'width'}}
    axes |= {name: {0: 'n'} for name in OUTPUTS if name != 'proposal_cut'}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter('ignore')  # the tracer's: of each size that is a number in Python
            torch.onnx.export(
                PlainMaskRCNN(model),
                (torch.from_numpy(np.ascontiguousarray(picture)),),
                stream,
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                opset_version=OPSET,
                dynamic_axes=axes,
                dynamo=False,
                # what nms and roi_align do inside stays out of the graph
                autograd_inlining=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as problem:
        backbone = type(model.backbone).__name__
        raise ConfigError(
            f'{where}: the model cannot be written as ONNX (backbone {backbone}, neck '
            f'{type(model.neck).__name__}): {str(problem)[:200]}; expected parts of the standard '
            'operators; use the model in torch'
        ) from problem
    return stream.getvalue()


def load_onnx() -> ModuleType:
    """Import onnx.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import onnx
    except ImportError as problem:
        raise ConfigError(
            f'onnx: cannot be imported ({problem}); expected it for exporting; install it: '
            "pip install -c constraints.txt -e '.[export]'"
        ) from problem
    return onnx


def with_record(content: bytes, record: ModelRecord) -> bytes:
    """Return the file with what it says of itself."""
    onnx = load_onnx()
    graph = onnx.load_model_from_string(content)
    onnx.helper.set_model_props(graph, {METADATA_KEY: record.to_json()})
    onnx.checker.check_model(graph)
    return bytes(graph.SerializeToString())


def with_half_weights(content: bytes) -> bytes:
    """Return the file with weights kept in 16 bits; the computation stays in 32."""
    onnx = load_onnx()
    graph = onnx.load_model_from_string(content)
    casts = []
    for weight in graph.graph.initializer:
        values = onnx.numpy_helper.to_array(weight)
        if values.dtype != np.float32 or values.size < HALVED_FROM:
            continue
        name = weight.name
        weight.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), f'{name}.half'))
        casts.append(
            onnx.helper.make_node('Cast', [f'{name}.half'], [name], to=onnx.TensorProto.FLOAT)
        )
    for cast in reversed(casts):
        graph.graph.node.insert(0, cast)
    return bytes(graph.SerializeToString())
