'use strict';
// Cells that a person sees and saves: overlaps resolved, outlines, measures.

// Return what stays, by falling score, each pixel in one cell; as fusion's make_disjoint.
function resolveCells(cells, threshold, picture, settings) {
  const isTaken = new Uint8Array(settings.disjoint ? picture.width * picture.height : 0);
  const kept = [];
  for (const cell of cells) { // they come by falling score
    if (cell.score < threshold) break;
    const area = count(cell.mask);
    const mask = settings.disjoint ? free(cell, isTaken, picture.width) : cell.mask;
    const left = count(mask);
    const isLost = left === 0 || area - left > settings.maxLostShare * area;
    if (isLost || left < settings.minAreaPx) continue;
    if (settings.disjoint) take(cell, isTaken, picture.width);
    kept.push(left === area ? cell : { ...cell, mask, rings: null });
  }
  return kept;
}

function count(mask) {
  let n = 0;
  for (let i = 0; i < mask.length; i += 1) n += mask[i];
  return n;
}

function free(cell, isTaken, width) {
  const mask = cell.mask.slice();
  for (let y = 0, i = 0; y < cell.h; y += 1) {
    const row = (cell.y + y) * width + cell.x;
    for (let x = 0; x < cell.w; x += 1, i += 1) if (isTaken[row + x]) mask[i] = 0;
  }
  return mask;
}

function take(cell, isTaken, width) {
  for (let y = 0, i = 0; y < cell.h; y += 1) {
    const row = (cell.y + y) * width + cell.x;
    for (let x = 0; x < cell.w; x += 1, i += 1) if (cell.mask[i]) isTaken[row + x] = 1;
  }
}

// ---- outlines ----

const [EAST, SOUTH, WEST, NORTH] = [0, 1, 2, 3];

// Return the 4-connected parts of a cell, each a list of rings of [x, y] pixel corners of the
// picture, the exterior first; as results/polygons.py.
function traceCell(cell) {
  if (cell.rings) return cell.rings;
  const parts = partsOf(cell).map((part) => ringsOf(part, cell.w, cell.h)
    .map((ring) => ring.map(([x, y]) => [x + cell.x, y + cell.y])));
  cell.rings = parts;
  return parts;
}

function partsOf({ mask, w, h }) {
  const label = new Uint8Array(mask.length);
  const parts = [];
  for (let start = 0; start < mask.length; start += 1) {
    if (!mask[start] || label[start]) continue;
    const part = new Uint8Array(mask.length);
    const waiting = [start];
    label[start] = 1;
    while (waiting.length) {
      const i = waiting.pop();
      part[i] = 1;
      const x = i % w;
      const near = [x > 0 ? i - 1 : -1, x < w - 1 ? i + 1 : -1, i - w, i + w];
      for (const j of near) {
        if (j < 0 || j >= w * h || !mask[j] || label[j]) continue;
        label[j] = 1;
        waiting.push(j);
      }
    }
    parts.push(part);
  }
  return parts;
}

// Walk around one part with the part on the right-hand side.
function ringsOf(part, w, h) {
  const is = (x, y) => x >= 0 && y >= 0 && x < w && y < h && part[y * w + x] === 1;
  const isEdge = (x, y, direction) => {
    const [ul, ur, ll, lr] = [is(x - 1, y - 1), is(x, y - 1), is(x - 1, y), is(x, y)];
    return [lr && !ur, ll && !lr, ul && !ll, ur && !ul][direction];
  };
  const seen = new Uint8Array((w + 1) * (h + 1) * 4);
  const key = (x, y, direction) => (y * (w + 1) + x) * 4 + direction;
  const [dx, dy] = [[1, 0, -1, 0], [0, 1, 0, -1]];
  const rings = [];
  for (let y = 0; y <= h; y += 1) {
    for (let x = 0; x <= w; x += 1) {
      // every ring has an edge to the east
      if (!isEdge(x, y, EAST) || seen[key(x, y, EAST)]) continue;
      const ring = [];
      let [atX, atY, direction, before] = [x, y, EAST, -1];
      while (!seen[key(atX, atY, direction)]) {
        seen[key(atX, atY, direction)] = 1;
        if (direction !== before) ring.push([atX, atY]);
        before = direction;
        atX += dx[direction];
        atY += dy[direction];
        // straight on; else left, which keeps a part that touches itself in one ring; else right
        const turns = [direction, (direction + 3) % 4, (direction + 1) % 4];
        direction = turns.find((turn) => isEdge(atX, atY, turn));
      }
      if (before === EAST) ring.shift(); // the first point lies on a straight line
      rings.push(ring);
    }
  }
  return rings.sort((a, b) => twiceArea(b) - twiceArea(a)); // holes are negative
}

function twiceArea(ring) {
  let sum = 0;
  ring.forEach(([x, y], i) => {
    const [nextX, nextY] = ring[(i + 1) % ring.length];
    sum += x * nextY - nextX * y;
  });
  return sum;
}

// Return SVG path data of an outline that leaves out steps of less than a pixel.
function outlinePath(cell) {
  const ringPath = (ring) => {
    const points = simplified(ring, 0.75);
    return points.length < 3 ? '' : `M${points.map((p) => p.join(' ')).join('L')}Z`;
  };
  return traceCell(cell).flat().map((ring) => ringPath(ring)).join('');
}

// Middles of the edges, without those that lie within the tolerance of the line between others.
function simplified(ring, tolerance) {
  if (ring.length <= 4) return ring;
  const points = ring.map(([x, y], i) => {
    const [nextX, nextY] = ring[(i + 1) % ring.length];
    return [(x + nextX) / 2, (y + nextY) / 2];
  });
  const far = points.reduce((best, p, i) => (distance(p, points[0], points[0])
    > distance(points[best], points[0], points[0]) ? i : best), 0);
  const first = thinned(points.slice(0, far + 1), tolerance);
  const second = thinned([...points.slice(far), points[0]], tolerance);
  return [...first.slice(0, -1), ...second.slice(0, -1)];
}

// Source: Douglas, Peucker 1973.
function thinned(points, tolerance) {
  const end = points.length - 1;
  let [best, most] = [0, tolerance];
  for (let i = 1; i < end; i += 1) {
    const off = distance(points[i], points[0], points[end]);
    if (off > most) [best, most] = [i, off];
  }
  if (!best) return [points[0], points[end]];
  const left = thinned(points.slice(0, best + 1), tolerance);
  return [...left.slice(0, -1), ...thinned(points.slice(best), tolerance)];
}

function distance([x, y], [ax, ay], [bx, by]) {
  const length = Math.hypot(bx - ax, by - ay);
  if (!length) return Math.hypot(x - ax, y - ay);
  return Math.abs((bx - ax) * (ay - y) - (ax - x) * (by - ay)) / length;
}

// ---- measures ----

// Lengths by the sum of neighbours' weights. Source: Benkrid, Crookes 2000, as scikit-image's.
const PERIMETER = new Map([
  ...[5, 7, 15, 17, 25, 27].map((code) => [code, 1]),
  ...[21, 33].map((code) => [code, Math.SQRT2]),
  ...[13, 23].map((code) => [code, (1 + Math.SQRT2) / 2]),
]);

// Return what Python's measure gives; rgba are the whole picture's pixels.
function measureCell(cell, rgba, pictureWidth) {
  const { w, h, mask } = cell;
  const is = (x, y) => (x >= 0 && y >= 0 && x < w && y < h ? mask[y * w + x] : 0);
  const isBorder = (x, y) => is(x, y) && !(is(x - 1, y) && is(x + 1, y) && is(x, y - 1)
    && is(x, y + 1));
  const sums = { n: 0, x: 0, y: 0, xx: 0, yy: 0, xy: 0, rgb: [0, 0, 0] };
  let perimeter = 0;
  let [left, right, top, bottom] = [w, 0, h, 0];
  for (let y = 0; y < h; y += 1) {
    for (let x = 0; x < w; x += 1) {
      if (!is(x, y)) continue;
      sums.n += 1;
      sums.x += x;
      sums.y += y;
      sums.xx += x * x;
      sums.yy += y * y;
      sums.xy += x * y;
      const from = ((cell.y + y) * pictureWidth + cell.x + x) * 4;
      for (let c = 0; c < 3; c += 1) sums.rgb[c] += rgba[from + c];
      [left, right] = [Math.min(left, x), Math.max(right, x + 1)];
      [top, bottom] = [Math.min(top, y), Math.max(bottom, y + 1)];
      if (isBorder(x, y)) perimeter += PERIMETER.get(borderCode(isBorder, x, y)) || 0;
    }
  }
  return {
    area: sums.n, x: cell.x + sums.x / sums.n + 0.5, y: cell.y + sums.y / sums.n + 0.5,
    box: [cell.x + left, cell.y + top, cell.x + right, cell.y + bottom],
    perimeter, eccentricity: eccentricity(sums), means: sums.rgb.map((sum) => sum / sums.n),
  };
}

function borderCode(isBorder, x, y) {
  let code = 1;
  for (let dy = -1; dy <= 1; dy += 1) {
    for (let dx = -1; dx <= 1; dx += 1) {
      if ((dx || dy) && isBorder(x + dx, y + dy)) code += dx && dy ? 10 : 2;
    }
  }
  return code;
}

function eccentricity({ n, x, y, xx, yy, xy }) {
  const [cx, cy] = [x / n, y / n];
  const [varX, varY, cov] = [xx / n - cx * cx, yy / n - cy * cy, xy / n - cx * cy];
  const root = Math.sqrt(((varY - varX) / 2) ** 2 + cov * cov);
  const middle = (varX + varY) / 2;
  const [large, small] = [middle + root, Math.max(middle - root, 0)];
  return large === 0 ? 0 : Math.sqrt(1 - small / large);
}
