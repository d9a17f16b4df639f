"""names: each family's tables are sound."""

from __future__ import annotations

import re

import pytest

from cellseg_mm.weights.names import BACKBONES, CLASS_LAYERS, COCO_IDS, NEW_HEADS, SOURCES


def test_coco_has_80_classes_without_gaps_in_our_order() -> None:
    # 91 ids, 11 of them unused; the last is 90 (toothbrush).
    assert len(COCO_IDS) == 80
    assert COCO_IDS[0] == 1
    assert COCO_IDS[-1] == 90
    assert list(COCO_IDS) == sorted(set(COCO_IDS))


@pytest.mark.parametrize('family', SOURCES)
def test_patterns_of_a_family_are_expressions(family: str) -> None:
    source = SOURCES[family]
    for pattern in (source.sign, *source.ignored):
        re.compile(pattern)
    others = [other.sign for name, other in SOURCES.items() if name != family]
    name = source.sign.replace('.*', 'x').replace('\\', '')
    assert re.fullmatch(source.sign, name)
    assert not any(re.fullmatch(sign, name) for sign in others)


def test_new_heads_are_the_layers_that_classes_decide() -> None:
    for layer in CLASS_LAYERS:
        for kind in ('weight', 'bias'):
            assert any(re.fullmatch(pattern, f'{layer}.{kind}') for pattern in NEW_HEADS)
    assert not any(re.fullmatch(pattern, 'backbone.conv1.weight') for pattern in NEW_HEADS)


def test_blocks_tell_backbones_apart() -> None:
    names = [name for name, _, _ in BACKBONES.values()]
    assert len(set(names)) == len(names)
