"""The fusion rules written to be obvious: one instance, one pair and one pixel at a time.

Imports nothing of ours. A cell is a dict: ``score`` float, ``cls`` int, ``box`` (x1, y1, x2, y2),
``mask`` (H, W) bool array, ``rle`` bytes (for ties only), and where members have probabilities
``probs`` (S, S) and ``frame`` (x1, y1, x2, y2). A member is a list of cells.
"""

from __future__ import annotations

import math

import numpy as np


def box_area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def box_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / (box_area(a) + box_area(b) - width * height)


def mask_iou(a, b):
    shared = union = 0
    for y in range(a.shape[0]):
        for x in range(a.shape[1]):
            shared += a[y, x] and b[y, x]
            union += a[y, x] or b[y, x]
    return shared / union if union else 0.0


def cells_iou(a, b, kind):
    return box_iou(a['box'], b['box']) if kind == 'box' else mask_iou(a['mask'], b['mask'])


def best_first(cell):
    return -cell['score'], cell['cls'], tuple(cell['box']), cell['rle']


def pool(members):
    """All cells, best first; ties by class, box and RLE. Each gets its member's number."""
    cells = [dict(cell, member=m) for m, member in enumerate(members) for cell in member]
    cells = sorted(cells, key=best_first)
    return [dict(cell, position=i) for i, cell in enumerate(cells)]


def may_meet(a, b, class_vote):
    return class_vote or a['cls'] == b['cls']


def suppress(cells, thr, kind, class_vote):
    """Clusters of hard NMS: the best of the rest, then all it suppresses."""
    rest, clusters = list(cells), []
    while rest:
        best = rest.pop(0)
        cluster, left = [best], []
        for cell in rest:
            same = may_meet(best, cell, class_vote) and cells_iou(best, cell, kind) > thr
            (cluster if same else left).append(cell)
        clusters.append(cluster)
        rest = left
    return clusters


def link(cells, thr, class_vote):
    """Clusters of the soft-mask rule: the best of the rest, then one of each other member."""
    rest, clusters = list(cells), []
    while rest:
        best = rest.pop(0)
        cluster = [best]
        for member in sorted({cell['member'] for cell in rest} - {best['member']}):
            partner, partner_iou = None, thr
            for cell in rest:
                if cell['member'] == member and may_meet(best, cell, class_vote):
                    iou = mask_iou(best['mask'], cell['mask'])
                    if iou > partner_iou:
                        partner, partner_iou = cell, iou
            if partner is not None:
                cluster.append(partner)
                rest = [cell for cell in rest if cell is not partner]
        clusters.append(cluster)
    return clusters


def weighted_mean(values, weights):
    return [
        sum(w * value[k] for value, w in zip(values, weights, strict=True)) / sum(weights)
        for k in range(len(values[0]))
    ]


def weigh_boxes(cells, thr, class_vote):
    """Clusters of weighted boxes fusion, and their mean boxes."""
    clusters, means = [], []
    for cell in cells:
        best, best_iou = None, thr
        for c, mean in enumerate(means):
            iou = box_iou(mean, cell['box'])
            if may_meet(clusters[c][0], cell, class_vote) and iou > best_iou:
                best, best_iou = c, iou
        if best is None:
            clusters.append([cell])
            means.append(cell['box'])
        else:
            clusters[best].append(cell)
            scores = [max(c['score'], 1e-30) for c in clusters[best]]
            means[best] = weighted_mean([c['box'] for c in clusters[best]], scores)
    return clusters, means


def voted_class(cluster):
    votes = {}
    for cell in cluster:
        votes[cell['cls']] = votes.get(cell['cls'], 0.0) + cell['score']
    return min(votes, key=lambda cls: (-votes[cls], cls))


def prob_at(probs, frame, x, y):
    """Bilinear between bin centres, zero beyond, at a place in px."""
    side = len(probs)
    u = (x - frame[0]) / (frame[2] - frame[0]) * side - 0.5
    v = (y - frame[1]) / (frame[3] - frame[1]) * side - 0.5
    value = 0.0
    for j in (math.floor(v), math.floor(v) + 1):
        for i in (math.floor(u), math.floor(u) + 1):
            if 0 <= i < side and 0 <= j < side:
                value += (1 - abs(u - i)) * (1 - abs(v - j)) * float(probs[j][i])
    return value


def paste(probs, frame, image_hw):
    """The value of every pixel of the image, (H, W)."""
    values = np.zeros(image_hw)
    for y in range(image_hw[0]):
        for x in range(image_hw[1]):
            values[y, x] = prob_at(probs, frame, x + 0.5, y + 0.5)
    return values


def average_probs(cluster):
    """Score-weighted mean of the cells' probabilities in the score-weighted mean frame."""
    scores = [cell['score'] for cell in cluster]
    frame = weighted_mean([cell['frame'] for cell in cluster], scores)
    frame = [float(np.float32(v)) for v in frame]
    side = len(cluster[0]['probs'])
    mean = np.zeros((side, side))
    for j in range(side):
        for i in range(side):
            x = frame[0] + (i + 0.5) / side * (frame[2] - frame[0])
            y = frame[1] + (j + 0.5) / side * (frame[3] - frame[1])
            values = [prob_at(cell['probs'], cell['frame'], x, y) for cell in cluster]
            mean[j, i] = sum(s * v for s, v in zip(scores, values, strict=True)) / sum(scores)
    return mean.astype(np.float16), frame


def vote_pixels(cluster, thr):
    mask = np.zeros(cluster[0]['mask'].shape, bool)
    total = sum(cell['score'] for cell in cluster)
    for y in range(mask.shape[0]):
        for x in range(mask.shape[1]):
            votes = sum(cell['score'] for cell in cluster if cell['mask'][y, x])
            mask[y, x] = votes > 0 and votes >= thr * total
    return mask


def prob_uncertainty(probs):
    values = [4 * float(p) * (1 - float(p)) for row in probs for p in row]
    return sum(values) / len(values)


def mask_disagreement(cluster):
    ious = [mask_iou(a['mask'], b['mask']) for i, a in enumerate(cluster) for b in cluster[i + 1 :]]
    return 1 - sum(ious) / len(ious) if ious else 0.0


def describe(cell, cluster, n_members, class_vote):
    """Add votes, agreement and uncertainty to a fused cell."""
    cell['votes'] = len({c['member'] for c in cluster})
    cell['agreement'] = cell['votes'] / n_members
    if class_vote:
        cell['cls'] = voted_class(cluster)
    has_probs = cell.get('probs') is not None
    cell['uncertainty'] = (
        prob_uncertainty(cell['probs']) if has_probs else mask_disagreement(cluster)
    )
    return cell


def nms(members, thr, kind, class_vote=False):
    clusters = suppress(pool(members), thr, kind, class_vote)
    return [describe(dict(c[0]), c, len(members), class_vote) for c in clusters]


def soft_nms(members, method, sigma, iou_thr, min_score):
    everyone = pool(members)
    rest, result = [dict(cell) for cell in everyone], []
    while rest:
        best = max(range(len(rest)), key=lambda i: (rest[i]['score'], -i))
        picked = rest.pop(best)
        if picked['score'] <= min_score:
            break
        for cell in rest:
            if cell['cls'] == picked['cls']:
                iou = box_iou(cell['box'], picked['box'])
                if method == 'gaussian':
                    cell['score'] *= math.exp(-(iou**2) / sigma)
                elif iou > iou_thr:
                    cell['score'] *= 1 - iou
        result.append(picked)
    for cell in result:
        near = [
            other
            for other in everyone
            if other['cls'] == cell['cls']
            and other['position'] != cell['position']
            and box_iou(other['box'], cell['box']) > iou_thr
        ]
        describe(cell, [cell, *near], len(members), False)
        if cell.get('probs') is None:
            ious = [mask_iou(cell['mask'], other['mask']) for other in near]
            cell['uncertainty'] = 1 - sum(ious) / len(ious) if ious else 0.0
    return result


def averaged(cluster, box, score, mask_thr, n_members, class_vote):
    cell = dict(cluster[0], box=box, score=score)
    if len(cluster) > 1:
        if cell.get('probs') is not None:
            probs, frame = average_probs(cluster)
            values = paste(probs, frame, cell['mask'].shape)
            mask = values >= mask_thr
            new = {'probs': probs, 'frame': frame, 'mask': mask, 'values': values}
        else:
            new = {'mask': vote_pixels(cluster, mask_thr)}
        if new['mask'].any():  # else the best cell's own mask
            cell.update(new)
    return describe(cell, cluster, n_members, class_vote)


def wbf(members, thr, score_type, mask_thr=0.5, class_vote=False):
    n_members = len(members)
    result = []
    for cluster, box in zip(*weigh_boxes(pool(members), thr, class_vote), strict=True):
        n = len(cluster)
        votes = len({cell['member'] for cell in cluster})
        mean = sum(cell['score'] for cell in cluster) / n
        score = {
            'avg': mean * min(n, n_members) / n_members,
            'max': max(cell['score'] for cell in cluster),
            'box_and_model_avg': mean * votes / n_members,
            'absent_model_aware_avg': mean * n / (n + n_members - votes),
        }[score_type]
        result.append(averaged(cluster, box, score, mask_thr, n_members, class_vote))
    return result


def soft_mask(members, thr, mask_thr=0.5, class_vote=False):
    n_members = len(members)
    result = []
    for cluster in link(pool(members), thr, class_vote):
        scores = [cell['score'] for cell in cluster]
        box = weighted_mean([cell['box'] for cell in cluster], [max(s, 2**-30) for s in scores])
        score = sum(scores) / len(scores) * len(cluster) / n_members
        result.append(averaged(cluster, box, score, mask_thr, n_members, class_vote))
    return result


def make_disjoint(cells, max_lost_share, min_area):
    """Best first, each cell takes its free pixels; cells that lose too much take none."""
    taken = set()
    result = []
    for cell in sorted(cells, key=best_first):
        height, width = cell['mask'].shape
        own = [(y, x) for y in range(height) for x in range(width) if cell['mask'][y, x]]
        free = [pixel for pixel in own if pixel not in taken]
        if len(free) < len(own) and (not free or len(own) - len(free) > max_lost_share * len(own)):
            continue
        if len(free) < min_area:
            continue
        taken.update(free)
        mask = np.zeros((height, width), bool)
        for y, x in free:
            mask[y, x] = True
        result.append(dict(cell, mask=mask, uncut=len(own)))
    return result
