"""A file in detectron2's published format with random weights, made without detectron2.

Names and shapes are typed here from the architecture (ResNet with stride in the 1x1, FPN, 2-conv
RPN, 4conv1fc and 4-conv mask head, norm everywhere) and share nothing with the tables of names that
they test. They were compared once with the state dicts of detectron2 0.5's own models: equal.

    python -m tests.support.random_detectron2 FOLDER [--backbone R101]

writes FOLDER/model_final_<first 6 digits of its MD5>.pkl with weights that can be trained from.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
from pathlib import Path

import numpy as np

Shapes = dict[str, tuple[int, ...]]
RESNETS = {'R50': (3, 4, 6, 3), 'R101': (3, 4, 23, 3)}
REGNETX_4GF = ((80, 2), (240, 5), (560, 14), (1360, 2))
GROUP_WIDTH = 40
N_CLASSES = 80


def norm(prefix: str, channels: int) -> Shapes:
    """A batch norm as detectron2 stores it."""
    parts = ('weight', 'bias', 'running_mean', 'running_var')
    return {f'{prefix}.{part}': (channels,) for part in parts} | {
        f'{prefix}.num_batches_tracked': ()
    }


def resnet(blocks: tuple[int, ...]) -> Shapes:
    """Bottleneck ResNet: stem, res2..res5."""
    top = 'backbone.bottom_up'
    shapes: Shapes = {f'{top}.stem.conv1.weight': (64, 3, 7, 7)} | norm(
        f'{top}.stem.conv1.norm', 64
    )
    n_in = 64
    for stage, n_blocks in enumerate(blocks, start=2):
        inner, outer = 64 * 2 ** (stage - 2), 256 * 2 ** (stage - 2)
        for block in range(n_blocks):
            at = f'{top}.res{stage}.{block}'
            if block == 0:
                shapes[f'{at}.shortcut.weight'] = (outer, n_in, 1, 1)
                shapes |= norm(f'{at}.shortcut.norm', outer)
            shapes[f'{at}.conv1.weight'] = (inner, n_in, 1, 1)
            shapes |= norm(f'{at}.conv1.norm', inner)
            shapes[f'{at}.conv2.weight'] = (inner, inner, 3, 3)
            shapes |= norm(f'{at}.conv2.norm', inner)
            shapes[f'{at}.conv3.weight'] = (outer, inner, 1, 1)
            shapes |= norm(f'{at}.conv3.norm', outer)
            n_in = outer
    return shapes


def regnetx() -> Shapes:
    """RegNetX-4GF: simple stem, bottleneck ratio 1, groups of 40 channels."""
    top = 'backbone.bottom_up'
    shapes: Shapes = {f'{top}.stem.conv.weight': (32, 3, 3, 3)} | norm(f'{top}.stem.bn', 32)
    n_in = 32
    for stage, (width, depth) in enumerate(REGNETX_4GF, start=1):
        for block in range(1, depth + 1):
            at = f'{top}.s{stage}.b{block}'
            if block == 1:
                shapes[f'{at}.proj.weight'] = (width, n_in, 1, 1)
                shapes |= norm(f'{at}.bn', width)
            shapes[f'{at}.f.a.weight'] = (width, n_in, 1, 1)
            shapes |= norm(f'{at}.f.a_bn', width)
            shapes[f'{at}.f.b.weight'] = (width, GROUP_WIDTH, 3, 3)
            shapes |= norm(f'{at}.f.b_bn', width)
            shapes[f'{at}.f.c.weight'] = (width, width, 1, 1)
            shapes |= norm(f'{at}.f.c_bn', width)
            n_in = width
    return shapes


def detectors(channels: tuple[int, ...]) -> Shapes:
    """FPN over the backbone's channels, RPN, box head and mask head."""
    shapes: Shapes = {}
    for level, n_in in enumerate(channels, start=2):
        shapes[f'backbone.fpn_lateral{level}.weight'] = (256, n_in, 1, 1)
        shapes |= norm(f'backbone.fpn_lateral{level}.norm', 256)
        shapes[f'backbone.fpn_output{level}.weight'] = (256, 256, 3, 3)
        shapes |= norm(f'backbone.fpn_output{level}.norm', 256)
    rpn = 'proposal_generator.rpn_head'
    for name, shape in (
        (f'{rpn}.conv.conv0', (256, 256, 3, 3)),
        (f'{rpn}.conv.conv1', (256, 256, 3, 3)),
        (f'{rpn}.objectness_logits', (3, 256, 1, 1)),
        (f'{rpn}.anchor_deltas', (12, 256, 1, 1)),
        ('roi_heads.box_head.fc1', (1024, 256 * 7 * 7)),
        ('roi_heads.box_predictor.cls_score', (N_CLASSES + 1, 1024)),
        ('roi_heads.box_predictor.bbox_pred', (4 * N_CLASSES, 1024)),
        ('roi_heads.mask_head.deconv', (256, 256, 2, 2)),
        ('roi_heads.mask_head.predictor', (N_CLASSES, 256, 1, 1)),
    ):
        shapes |= {f'{name}.weight': shape, f'{name}.bias': shape[:1]}
    for i in range(1, 5):
        shapes[f'roi_heads.box_head.conv{i}.weight'] = (256, 256, 3, 3)
        shapes |= norm(f'roi_heads.box_head.conv{i}.norm', 256)
        shapes[f'roi_heads.mask_head.mask_fcn{i}.weight'] = (256, 256, 3, 3)
        shapes |= norm(f'roi_heads.mask_head.mask_fcn{i}.norm', 256)
    return shapes


def model_shapes(backbone: str) -> Shapes:
    """All names and shapes of a new_baselines model; 'R50', 'R101' or 'regnetx'."""
    if backbone == 'regnetx':
        return regnetx() | detectors(tuple(width for width, _ in REGNETX_4GF))
    return resnet(RESNETS[backbone]) | detectors((256, 512, 1024, 2048))


def random_arrays(shapes: Shapes, seed: int) -> dict[str, np.ndarray]:
    """Random values of usual size: He-scaled convolutions, small predictors, gentle norms."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        part = name.rsplit('.', 1)[1]
        if part == 'num_batches_tracked':
            arrays[name] = np.array(1000, np.int64)
        elif part in ('bias', 'running_mean'):
            arrays[name] = rng.standard_normal(shape, np.float32) * np.float32(0.01)
        elif name.endswith(('conv3.norm.weight', 'c_bn.weight')):
            # the last norm of a residual block: small, or 16 sums double the signal 16 times
            arrays[name] = rng.uniform(0.1, 0.3, shape).astype(np.float32)
        elif part == 'running_var' or len(shape) == 1:
            arrays[name] = rng.uniform(0.9, 1.1, shape).astype(np.float32)
        else:
            predictor = 'box_predictor' in name or 'rpn_head' in name or 'predictor' in name
            scale = 0.01 if predictor else (2 / np.prod(shape[1:])) ** 0.5
            arrays[name] = rng.standard_normal(shape, np.float32) * np.float32(scale)
    return arrays


def write(folder: Path, *, backbone: str = 'R50', seed: int = 0, protocol: int = 4) -> Path:
    """Write a whole model under a name with its hash and return its path."""
    arrays = random_arrays(model_shapes(backbone), seed)
    content = pickle.dumps({'model': arrays, '__author__': 'nobody'}, protocol=protocol)
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    path = Path(folder) / f'model_final_{digest[:6]}.pkl'
    path.write_bytes(content)
    return path


def main() -> None:
    """Write one file and print where it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path)
    parser.add_argument('--backbone', default='R50', choices=('R50', 'R101', 'regnetx'))
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    print(write(args.folder, backbone=args.backbone, seed=args.seed))


if __name__ == '__main__':
    main()
