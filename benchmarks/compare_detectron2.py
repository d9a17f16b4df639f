"""Run detectron2 and our model side by side on the same random weights and images.

Prints the largest difference after each stage: network input, backbone, FPN, RPN, proposals,
boxes, masks. Needs detectron2 (with its model zoo) and torchvision beside mmdet; exits with 2
without them.

    python benchmarks/compare_detectron2.py
    python benchmarks/compare_detectron2.py --model mask_rcnn_R_101_FPN_100ep_LSJ --images a.tif
"""

from __future__ import annotations

import argparse
import pickle
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import cellseg_mm  # noqa: F401 (makes mmdet importable)
from cellseg_mm.data.labels import read_image
from cellseg_mm.weights.conversion import build_model_config
from cellseg_mm.weights.names import BACKBONES
from cellseg_mm.weights.published import convert_file

MODEL = 'mask_rcnn_R_50_FPN_100ep_LSJ'
Row = tuple[str, float, float, str]


def main() -> int:
    """Compare image by image and print the worst difference of each stage."""
    args = parse_args()
    try:
        theirs = build_detectron2(args.model, args.seed)
    except ImportError as error:
        print(f'detectron2 is not installed ({error}), so nothing was compared: install it first.')
        return 2
    spread_predictions(theirs, resize(random_images(args.seed)[0]))
    ours, preprocessing = build_ours(theirs)
    worst: dict[str, Row] = {}
    images = [read_image(path)[..., ::-1] for path in args.images] or random_images(args.seed)
    for image in images:
        for row in compare(theirs, ours, resize(image), image.shape[:2]):
            if row[0] not in worst or row[1] >= worst[row[0]][1]:
                worst[row[0]] = row
    print(f'{args.model}, seed {args.seed}, {len(images)} images, input {preprocessing}')
    print(f'{"stage":<12} {"largest difference":>20} {"largest value":>15}  note')
    for stage, difference, size, note in worst.values():
        print(f'{stage:<12} {difference:>20.3g} {size:>15.3g}  {note}')
    print(versions())
    return 0


def parse_args() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', default=MODEL, help='a config of new_baselines')
    parser.add_argument('--images', nargs='*', type=Path, default=[], help='default: random ones')
    parser.add_argument('--seed', type=int, default=0)
    return parser.parse_args()


def build_detectron2(name: str, seed: int) -> nn.Module:
    """Build detectron2's model with random weights that give spread-out predictions."""
    from detectron2 import model_zoo
    from detectron2.config import instantiate

    torch.manual_seed(seed)
    model = instantiate(model_zoo.get_config(f'new_baselines/{name}.py').model).eval()
    for key, value in model.state_dict().items():
        if key.endswith('running_mean'):
            value.normal_(0, 0.1)
        elif key.endswith(('running_var', 'norm.weight')):
            value.uniform_(0.5, 1.5)
        elif key.endswith('norm.bias'):
            value.normal_(0, 0.1)
    with torch.no_grad():
        for block in model.backbone.bottom_up.modules():
            if hasattr(block, 'conv3'):  # keep the sum over residual blocks bounded
                block.conv3.norm.weight.mul_(0.2)
            elif hasattr(block, 'f'):
                block.f.c_bn.weight.mul_(0.2)
    return model


@torch.no_grad()
def spread_predictions(model: nn.Module, image: np.ndarray) -> None:
    """Scale each predictor so that what it says on ``image`` varies as a trained one's does.

    Fresh predictors say the same everywhere, or, behind random norms, only 0 and 1; then selection
    and order would be decided by ties.
    """
    heads = model.roi_heads
    spreads = {
        model.proposal_generator.rpn_head.objectness_logits: 2.0,
        model.proposal_generator.rpn_head.anchor_deltas: 0.3,
        heads.box_predictor.cls_score: 2.0,
        heads.box_predictor.bbox_pred: 1.0,  # in units of the box weights 10, 10, 5, 5
        heads.mask_head.predictor: 2.0,
    }
    batch = [{'image': torch.from_numpy(image.transpose(2, 0, 1).copy())}]
    for layer, spread in spreads.items():
        outputs: list[Tensor] = []
        handle = layer.register_forward_hook(lambda _, __, out, kept=outputs: kept.append(out))
        model.inference(batch)
        handle.remove()
        layer.weight.mul_(spread / float(torch.cat([out.flatten() for out in outputs]).std()))


def build_ours(theirs: nn.Module) -> tuple[nn.Module, str]:
    """Send detectron2's weights through the published format and our converter, strictly."""
    from mmdet.registry import MODELS
    from mmengine.registry import DefaultScope

    arrays = {name: value.numpy() for name, value in theirs.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        path, out_path = Path(folder) / 'random.pkl', Path(folder) / 'random.pth'
        path.write_bytes(pickle.dumps({'model': arrays, '__author__': 'random'}))
        conversion = convert_file(path, out_path, keep_all_classes=True)
        state = torch.load(out_path, weights_only=True)['state_dict']
    print(conversion.summary())
    blocks = next(key for key, value in BACKBONES.items() if value[0] == conversion.backbone)
    config = build_model_config(blocks, conversion.n_classes)
    wanted = conversion.preprocessing
    config['data_preprocessor'] |= {'mean': list(wanted.mean), 'std': list(wanted.std)}
    config['data_preprocessor']['bgr_to_rgb'] = wanted.channel_order == 'RGB'
    config['backbone']['style'] = wanted.backbone_style
    with DefaultScope.overwrite_default_scope('mmdet'):
        import mmdet.models  # noqa: F401

        model = MODELS.build(config).eval()
    model.load_state_dict(state, strict=True)
    return model, str(wanted)


def random_images(seed: int) -> list[np.ndarray]:
    """Blocky noise of sides like the competition's, (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    sides = [(100, 140), (257, 199), (61, 80)]
    return [
        np.kron(rng.integers(0, 256, (h // 8 + 1, w // 8 + 1, 3)), np.ones((8, 8, 1)))[
            :h, :w
        ].astype(np.uint8)
        for h, w in sides
    ]


def resize(image: np.ndarray, short: int = 320, longest: int = 533) -> np.ndarray:
    """Resize as detectron2's ResizeShortestEdge, smaller than 800/1333 to save time."""
    height, width = image.shape[:2]
    scale = min(short / min(height, width), longest / max(height, width))
    size = (int(width * scale + 0.5), int(height * scale + 0.5))
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.BILINEAR))


@torch.no_grad()
def compare(
    theirs: nn.Module, ours: nn.Module, image: np.ndarray, original_hw: tuple[int, int]
) -> list[Row]:
    """Return one row per stage for one image (BGR)."""
    tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    height, width = original_hw
    batch = [{'image': tensor, 'height': height, 'width': width}]
    their_images = theirs.preprocess_image(batch)
    inputs, samples = our_inputs(ours, tensor, original_hw)
    rows = [largest('input', their_images.tensor, inputs)]
    their_body = list(theirs.backbone.bottom_up(their_images.tensor).values())
    our_body = ours.backbone(inputs)
    rows.append(largest('backbone', their_body, our_body))
    their_features = theirs.backbone(their_images.tensor)
    our_features = ours.neck(our_body)
    rows.append(largest('FPN', list(their_features.values()), our_features))
    their_rpn = theirs.proposal_generator.rpn_head(list(their_features.values()))
    our_rpn = ours.rpn_head(our_features)
    rows.append(largest('RPN logits', their_rpn[0], our_rpn[0]))
    rows.append(largest('RPN deltas', their_rpn[1], our_rpn[1]))
    their_proposals = theirs.proposal_generator(their_images, their_features)[0][0]
    our_proposals = ours.rpn_head.predict(our_features, samples, rescale=False)
    rows.append(
        largest('proposals', their_proposals.proposal_boxes.tensor, our_proposals[0].bboxes)
    )
    their_result = theirs.inference(batch)[0]['instances']
    our_result = ours.roi_head.predict(our_features, our_proposals, samples, rescale=True)[0]
    return rows + compare_results(their_result, our_result)


def our_inputs(
    model: nn.Module, tensor: Tensor, original_hw: tuple[int, int]
) -> tuple[Tensor, list]:
    """Return the padded batch of one image and its data samples."""
    from mmdet.structures import DetDataSample

    height, width = original_hw
    img_hw = tuple(tensor.shape[1:])
    sample = DetDataSample(
        metainfo={
            'img_shape': img_hw,
            'ori_shape': original_hw,
            'scale_factor': (img_hw[1] / width, img_hw[0] / height),
        }
    )
    data = model.data_preprocessor({'inputs': [tensor], 'data_samples': [sample]}, False)
    return data['inputs'], data['data_samples']


def compare_results(theirs: object, ours: object) -> list[Row]:
    """Compare final boxes, scores, classes and masks, in order of falling score."""
    # detectron2 clips boxes to the image and drops what is empty then; do the same to ours
    height, width = theirs.image_size
    boxes = ours.bboxes.clone()
    boxes[:, 0::2] = boxes[:, 0::2].clamp(0, width)
    boxes[:, 1::2] = boxes[:, 1::2].clamp(0, height)
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    n = min(len(theirs), int(kept.sum()))
    same = int((theirs.pred_classes[:n] == ours.labels[kept][:n]).sum())
    wrong = int((theirs.pred_masks[:n] != ours.masks[kept][:n]).sum())
    note = f'{len(theirs)} and {int(kept.sum())} instances'
    return [
        largest('boxes', theirs.pred_boxes.tensor, boxes[kept], note),
        largest('scores', theirs.scores, ours.scores[kept], f'{same} of {n} classes equal'),
        ('masks', float(wrong), float(theirs.pred_masks.sum()), 'differing pixels; set pixels'),
    ]


def largest(
    stage: str, theirs: Tensor | list[Tensor], ours: Tensor | list[Tensor], note: str = ''
) -> Row:
    """Return the largest absolute difference, or infinity where the shapes differ."""
    pairs = [(theirs, ours)] if isinstance(theirs, Tensor) else list(zip(theirs, ours, strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        shapes = ', '.join(f'{tuple(a.shape)} / {tuple(b.shape)}' for a, b in pairs)
        return stage, float('inf'), 0.0, f'shapes {shapes} {note}'
    if not all(a.numel() for a, _ in pairs):
        return stage, 0.0, 0.0, f'empty {note}'
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    return stage, difference, max(float(a.abs().max()) for a, _ in pairs), note


def versions() -> str:
    """Return what ran where."""
    import detectron2
    import mmdet

    commit = subprocess.run(
        ['git', 'rev-parse', '--short', 'HEAD'],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    return (
        f'detectron2 {detectron2.__version__}, mmdet {mmdet.__version__}, torch '
        f'{torch.__version__}, {platform.machine()}, commit {commit}'
    )


if __name__ == '__main__':
    sys.exit(main())
