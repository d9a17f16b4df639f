"""What a cut list of region proposals means for a person.

In: the lowest score of the region proposals that were passed on, 0 where the cap was not reached.
Out: a sentence, or none. Invariant: torch models and models in a file say the same.
"""

from __future__ import annotations

LIKELY_PROPOSAL = 0.9  # a region proposal that scores so much most likely shows a cell


def notes_of_proposals(cut: float) -> list[str]:
    """Return what a person should know: nothing, or one sentence."""
    if cut < LIKELY_PROPOSAL:
        return []
    return [
        f'region proposals were cut at a score of {cut:.3f}, so cells in dense parts are most '
        'likely lost: use smaller tiles, or raise model.test_cfg.rpn.max_per_img'
    ]
