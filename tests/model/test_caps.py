"""proposal_caps: where region proposals are cut, as a longer list of the same proposals says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import cellseg_mm  # noqa: F401  (makes mmdet importable where mmcv has no compiled ops)

torch = pytest.importorskip('torch')
pytest.importorskip('mmdet')

from mmdet.registry import MODELS  # noqa: E402
from mmdet.structures import DetDataSample  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from cellseg_mm import components  # noqa: E402, F401
from cellseg_mm.model import caps  # noqa: E402
from tests.support.micro import ROOT  # noqa: E402

pytestmark = pytest.mark.mm


@pytest.fixture(scope='module')
def model() -> torch.nn.Module:
    cfg = Config.fromfile(ROOT / 'configs/sample/fold0.py')
    cfg.model.test_cfg.rcnn.max_per_img = 3
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(cfg.model).eval()


def step(model: torch.nn.Module, names: str) -> list[DetDataSample]:
    meta = {'img_shape': (64, 96), 'ori_shape': (64, 96), 'scale_factor': (1.0, 1.0)}
    samples = [DetDataSample(metainfo={**meta, 'name': name}) for name in names]
    images = torch.Generator().manual_seed(1)
    inputs = [torch.randint(0, 256, (3, 64, 96), generator=images, dtype=torch.uint8)] * len(names)
    with torch.no_grad():
        return model.test_step({'inputs': inputs, 'data_samples': samples})


def test_cut_is_the_score_of_the_last_that_was_passed_on(model: torch.nn.Module) -> None:
    head, found = model.rpn_head, []
    head.test_cfg.max_per_img = 10_000
    with caps.watch_proposals(model) as cuts:
        recorded = head.predict
        head.predict = lambda *args, **kw: found.extend(recorded(*args, **kw)) or found[-2:]
        step(model, 'ab')
    assert cuts.read() == [0.0, 0.0]  # nothing was cut
    assert 'predict' not in vars(head)
    for cap in (1, 7, len(found[0])):
        head.test_cfg.max_per_img = cap
        with caps.watch_proposals(model) as cuts:
            step(model, 'ab')
        scores = [p.scores.sort(descending=True).values for p in found]
        assert cuts.read() == pytest.approx([float(s[cap - 1]) for s in scores], rel=1e-6)
    with pytest.raises(RuntimeError, match='stop'), caps.watch_proposals(model):
        raise RuntimeError('stop')
    assert 'predict' not in vars(head)


class CountedReads(TorchDispatchMode):
    """Counts how often a number of a tensor is asked for, which waits for the tensor's device."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_recording_reads_nothing_from_the_device_while_the_model_predicts() -> None:
    """A read per image keeps a GPU waiting; 5 images in 2 batches are read together at the end."""
    scores = iter(torch.tensor([[0.5, 0.25], [0.75, 0.125], [1.0, 0.0625]]).repeat(2, 1))
    model = torch.nn.Module()
    model.rpn_head = torch.nn.Module()
    model.rpn_head.test_cfg = {'max_per_img': 2}
    model.rpn_head.predict = lambda n: [InstanceData(scores=next(scores)) for _ in range(n)]
    hook, runner = caps.ProposalCapHook(), SimpleNamespace(model=model)
    hook.before_test_epoch(runner)
    with CountedReads() as reads:
        for i, names in enumerate(['abc', 'de']):
            model.rpn_head.predict(len(names))
            samples = [DetDataSample(metainfo={'name': name}) for name in names]
            hook.after_test_iter(runner, i, None, samples)
    assert reads.n == 0
    expected = {'a': 0.25, 'b': 0.125, 'c': 0.0625, 'd': 0.25, 'e': 0.125}
    assert hook._cut_by_name() == expected
    with CountedReads() as reads:
        [float(score) for score in torch.zeros(3)]
    assert reads.n == 3  # the counter counts


@pytest.mark.parametrize('phase', ['val', 'test'])
def test_hook_names_the_image_and_forgets_the_last_epoch(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    said: list[tuple[str, int]] = []
    monkeypatch.setattr(caps, 'print_log', lambda t, _, level: said.append((t, level)))
    hook, runner = caps.ProposalCapHook(), SimpleNamespace(model=model)

    def epoch(cap: int, likely: float) -> None:
        monkeypatch.setattr(caps, 'LIKELY_PROPOSAL', likely)
        model.rpn_head.test_cfg.max_per_img = cap
        getattr(hook, f'before_{phase}_epoch')(runner)
        for i, names in enumerate(['ab', 'c']):
            getattr(hook, f'after_{phase}_iter')(runner, i, None, step(model, names))
        getattr(hook, f'after_{phase}_epoch')(runner, {})

    epoch(10_000, 0.0)
    assert said == []
    epoch(5, 1.0)
    epoch(5, 0.0)
    assert [level for _, level in said] == [20, 30]  # information, then a warning
    assert '3 of 3 images reached the cap of region proposals' in said[0][0]
    assert said[0][0].endswith('(c)')
    assert 'on 3 images cells are most likely lost' in said[1][0]
    assert 'predict' not in vars(model.rpn_head)
