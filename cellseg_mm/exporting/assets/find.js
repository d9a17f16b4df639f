'use strict';
// What the model found in tiles becomes cells of the picture: masks, tiles, seams.
// A cell is {k: class, score, box: [x0, y0, x1, y1], x, y, w, h, mask: w * h bytes of 0 and 1}.

// Cover a picture with tiles and cores as predict/tiling.py does.
function planTiles(width, height, tile, overlap, whole) {
  if (Math.max(width, height) <= whole) tile = Math.max(width, height);
  const tiles = [];
  for (const [y0, y1, top, bottom] of spread(height, tile, overlap)) {
    for (const [x0, x1, left, right] of spread(width, tile, overlap)) {
      tiles.push({ x0, y0, x1, y1, left, top, right, bottom });
    }
  }
  return tiles;
}

function spread(length, tile, overlap) {
  if (length <= tile) return [[0, length, 0, length]];
  const n = Math.ceil((length - overlap) / (tile - overlap));
  const starts = Array.from({ length: n }, (_, i) => Math.floor(i * (length - tile) / (n - 1)));
  const seams = starts.slice(1).map((start, i) => Math.floor((starts[i] + tile + start) / 2));
  return starts.map((start, i) => [
    start, start + tile, i ? seams[i - 1] : 0, i < n - 1 ? seams[i] : length,
  ]);
}

// Turn the model's outputs for one tile into cells; only those whose centre its core owns.
function cellsOfTile(found, tile, seen, info) {
  const [width, height] = [tile.x1 - tile.x0, tile.y1 - tile.y0];
  const [sx, sy] = [seen.width / width, seen.height / height];
  const side = found.side;
  const cells = [];
  for (let i = 0; i < found.scores.length; i += 1) {
    if (found.scores[i] < info.leastScore) continue;
    const box = [0, 1, 2, 3].map((c) => Math.fround(found.boxes[i * 4 + c] / (c % 2 ? sy : sx)));
    const x = tile.x0 + (box[0] + box[2]) / 2;
    const y = tile.y0 + (box[1] + box[3]) / 2;
    if (x < tile.left || x >= tile.right || y < tile.top || y >= tile.bottom) continue;
    const probs = found.masks.subarray(i * side * side, (i + 1) * side * side);
    const painted = paste(probs, side, enlarged(box, info.maskFrame), width, height, info.maskThr);
    if (!painted) continue;
    cells.push({
      ...painted, k: found.classes[i], score: found.scores[i],
      x: painted.x + tile.x0, y: painted.y + tile.y0,
      box: [box[0] + tile.x0, box[1] + tile.y0, box[2] + tile.x0, box[3] + tile.y0],
    });
  }
  return cells;
}

function enlarged(box, factor) {
  const dx = (box[2] - box[0]) * (factor - 1) / 2;
  const dy = (box[3] - box[1]) * (factor - 1) / 2;
  return [box[0] - dx, box[1] - dy, box[2] + dx, box[3] + dy];
}

// Paint probabilities into their frame as fusion/masks.py does; null without a pixel.
function paste(probs, side, frame, width, height, thr) {
  const columns = pasteTaps(frame[0], frame[2], side, width);
  const rows = pasteTaps(frame[1], frame[3], side, height);
  if (!columns || !rows) return null;
  const [w, h] = [columns.n, rows.n];
  const mask = new Uint8Array(w * h);
  let [left, right, top, bottom] = [w, -1, h, -1];
  for (let y = 0; y < h; y += 1) {
    for (let x = 0; x < w; x += 1) {
      let sum = 0;
      for (let b = 0; b < 2; b += 1) {
        for (let a = 0; a < 2; a += 1) {
          const weight = columns.weights[x * 2 + a] * rows.weights[y * 2 + b];
          if (weight) sum += weight * probs[rows.at[y * 2 + b] * side + columns.at[x * 2 + a]];
        }
      }
      if (Math.fround(sum) < thr) continue;
      mask[y * w + x] = 1;
      [left, right] = [Math.min(left, x), Math.max(right, x)];
      [top, bottom] = [Math.min(top, y), Math.max(bottom, y)];
    }
  }
  if (right < 0) return null;
  const tight = new Uint8Array((right - left + 1) * (bottom - top + 1));
  for (let y = top, to = 0; y <= bottom; y += 1, to += right - left + 1) {
    tight.set(mask.subarray(y * w + left, y * w + right + 1), to);
  }
  return {
    x: columns.low + left, y: rows.low + top, w: right - left + 1, h: bottom - top + 1, mask: tight,
  };
}

function pasteTaps(start, end, side, length) {
  if (end <= start) return null;
  const fade = (end - start) / (2 * side);
  const low = Math.min(Math.max(Math.floor(start - fade - 0.5), 0), length);
  const high = Math.min(Math.max(Math.ceil(end + fade + 0.5), 0), length);
  const n = high - low;
  if (n <= 0) return null;
  const at = new Int32Array(n * 2);
  const weights = new Float32Array(n * 2);
  for (let i = 0; i < n; i += 1) {
    const place = Math.fround((low + i + 0.5 - start) / (end - start) * side - 0.5);
    const first = Math.floor(place);
    for (let a = 0; a < 2; a += 1) {
      const bin = first + a;
      if (bin < 0 || bin >= side) continue;
      at[i * 2 + a] = bin;
      weights[i * 2 + a] = Math.max(1 - Math.abs(place - bin), 0);
    }
  }
  return { low, n, at, weights };
}

// Two tiles may each take a cell on their seam for their own: the better one stays.
function dropDoubles(perTile) {
  const cells = perTile.flatMap((list, tile) => list.map((cell) => ({ cell, tile })));
  cells.sort((a, b) => b.cell.score - a.cell.score);
  const places = new Map(); // 64 px squares to the cells that are kept there
  const kept = [];
  for (const one of cells) {
    const squares = squaresOf(one.cell.box);
    const isDouble = perTile.length > 1 && squares.some((square) => (places.get(square) || [])
      .some((other) => other.tile !== one.tile && other.cell.k === one.cell.k
        && boxIou(other.cell.box, one.cell.box) > 0.5));
    if (isDouble) continue;
    for (const square of squares) {
      if (!places.has(square)) places.set(square, []);
      places.get(square).push(one);
    }
    kept.push(one.cell);
  }
  return kept;
}

function squaresOf(box) {
  const [x0, y0, x1, y1] = box.map((v) => Math.floor(v / 64));
  const squares = [];
  for (let y = y0; y <= y1; y += 1) for (let x = x0; x <= x1; x += 1) squares.push(`${x},${y}`);
  return squares;
}

function boxIou(a, b) {
  const w = Math.min(a[2], b[2]) - Math.max(a[0], b[0]);
  const h = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
  if (w <= 0 || h <= 0) return 0;
  const area = (box) => (box[2] - box[0]) * (box[3] - box[1]);
  return w * h / (area(a) + area(b) - w * h);
}
