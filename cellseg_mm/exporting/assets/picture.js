'use strict';
// From a file to pixels, and from pixels to what the model wants to see.

const MAX_PIXELS = 64e6;

// Return {width, height, rgba, notes}; throws an Error whose message is what was found.
async function readPicture(buffer) {
  const changes = checkCanvas();
  const head = new Uint8Array(buffer.slice(0, 32));
  const starts = (...bytes) => bytes.every((byte, i) => head[i] === byte);
  if (starts(0x49, 0x49, 42, 0) || starts(0x4d, 0x4d, 0, 42)
      || starts(0x49, 0x49, 43, 0) || starts(0x4d, 0x4d, 0, 43)) {
    try {
      const picture = await readTiff(buffer, decodeByBrowser);
      return { ...picture, notes: [...picture.notes, ...changes] };
    } catch (problem) {
      throw problem instanceof RangeError ? new Error('the file is damaged') : problem;
    }
  }
  const isPng = starts(0x89, 0x50, 0x4e, 0x47);
  if (!isPng && !starts(0xff, 0xd8, 0xff)) throw new Error('no PNG, JPEG or TIFF file');
  if (isPng && head[24] === 16) throw new Error('16 bits a value; this page takes 8 bits');
  const picture = await decodeByBrowser(new Blob([buffer]));
  let n = 0;
  for (let i = 3; i < picture.rgba.length; i += 4) n += picture.rgba[i] < 255 ? 1 : 0;
  for (let i = 3; n && i < picture.rgba.length; i += 4) picture.rgba[i] = 255;
  const notes = n ? [`${n} transparent pixels were taken as they are below`] : [];
  return { ...picture, notes: [...notes, ...changes] };
}

async function decodeByBrowser(blob) {
  let bitmap;
  try {
    const asStored = { colorSpaceConversion: 'none', premultiplyAlpha: 'none' };
    bitmap = await createImageBitmap(blob, asStored);
  } catch (problem) {
    throw new Error('the file is damaged, or the browser cannot read it');
  }
  const { width, height } = bitmap;
  if (width * height > MAX_PIXELS) {
    throw new Error(`${width} x ${height} px; this page takes at most 64 million`);
  }
  const context = contextOf(width, height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return { width, height, rgba: context.getImageData(0, 0, width, height).data };
}

function contextOf(width, height) {
  return new OffscreenCanvas(width, height).getContext('2d', { willReadFrequently: true });
}

// Browsers that hide from fingerprinting change what a page reads of a canvas: Firefox's private
// windows the last bit, others everything. Return what a person should know.
function checkCanvas() {
  const context = contextOf(16, 16);
  const known = new ImageData(16, 16);
  known.data.forEach((_, i) => { known.data[i] = i % 4 === 3 ? 255 : (i * 37) % 256; });
  context.putImageData(known, 0, 0);
  const read = context.getImageData(0, 0, 16, 16).data;
  const most = read.reduce((max, value, i) => Math.max(max, Math.abs(value - known.data[i])), 0);
  const why = 'this browser changes the pixels that pages read (protection against fingerprinting)';
  if (most > 1) throw new Error(`${why}; allow canvas data for this page`);
  return most ? [`${why}, by 1 of 255; cells may differ a little`] : [];
}

function swapRedBlue(rgba) {
  for (let i = 0; i < rgba.length; i += 4) {
    const red = rgba[i];
    rgba[i] = rgba[i + 2];
    rgba[i + 2] = red;
  }
}

async function toPngBlob(picture) {
  const context = contextOf(picture.width, picture.height);
  context.putImageData(new ImageData(picture.rgba, picture.width, picture.height), 0, 0);
  return context.canvas.convertToBlob({ type: 'image/png' });
}

// Return the RGB of a part of the picture, {width, height, rgb}.
function cut(picture, x0, y0, x1, y1) {
  const rgb = new Uint8Array((x1 - x0) * (y1 - y0) * 3);
  for (let y = y0, to = 0; y < y1; y += 1) {
    for (let from = (y * picture.width + x0) * 4, x = x0; x < x1; x += 1, from += 4, to += 3) {
      rgb[to] = picture.rgba[from];
      rgb[to + 1] = picture.rgba[from + 1];
      rgb[to + 2] = picture.rgba[from + 2];
    }
  }
  return { width: x1 - x0, height: y1 - y0, rgb };
}

// Return the width and height that a step of the model's pipeline makes; as light/picture.py.
function targetSize(width, height, step) {
  if (step.type === 'ScaleBy') {
    const factor = Math.min(step.factor, step.max_side_px / Math.max(height, width));
    return [roundEven(width * factor), roundEven(height * factor)].map((v) => Math.max(1, v));
  }
  const pair = (value) => (Array.isArray(value) ? value : [value, value]);
  let scale = step.scale;
  if (scale === undefined || scale === null) {
    const factors = pair(step.scale_factor);
    scale = [Math.floor(width * factors[0] + 0.5), Math.floor(height * factors[1] + 0.5)];
  }
  scale = pair(scale);
  if (!step.keep_ratio) return scale.map(Math.trunc);
  const [least, most] = [Math.min(...scale), Math.max(...scale)];
  const factor = Math.min(most / Math.max(height, width), least / Math.min(height, width));
  return [Math.floor(width * factor + 0.5), Math.floor(height * factor + 0.5)];
}

function roundEven(value) {
  const down = Math.floor(value);
  if (value - down !== 0.5) return Math.round(value);
  return down % 2 ? down + 1 : down;
}

function resize(part, step) {
  if (!step) return part;
  const [width, height] = targetSize(part.width, part.height, step);
  const rgb = step.backend === 'pillow'
    ? resizePillow(part, width, height) : resizeOpenCv(part, width, height);
  return { width, height, rgb };
}

// OpenCV's INTER_LINEAR of 8 bits: weights of 11 bits. Source: imgproc/resize.cpp (Apache-2.0).
function resizeOpenCv(part, width, height) {
  const columns = linearTaps(part.width, width);
  const rows = linearTaps(part.height, height);
  const line = (y) => {
    const values = new Int32Array(width * 3);
    for (let x = 0; x < width; x += 1) {
      const a = (y * part.width + columns.first[x]) * 3;
      const b = (y * part.width + columns.second[x]) * 3;
      for (let c = 0; c < 3; c += 1) {
        values[x * 3 + c] = part.rgb[a + c] * columns.near[x] + part.rgb[b + c] * columns.far[x];
      }
    }
    return values;
  };
  const rgb = new Uint8Array(width * height * 3);
  let known = new Map();
  for (let y = 0, to = 0; y < height; y += 1) {
    const needed = new Map();
    for (const at of [rows.first[y], rows.second[y]]) needed.set(at, known.get(at) || line(at));
    known = needed;
    const [upper, lower] = [known.get(rows.first[y]), known.get(rows.second[y])];
    for (let x = 0; x < width * 3; x += 1, to += 1) {
      rgb[to] = (((rows.near[y] * (upper[x] >> 4)) >> 16)
        + ((rows.far[y] * (lower[x] >> 4)) >> 16) + 2) >> 2;
    }
  }
  return rgb;
}

function linearTaps(from, to) {
  const taps = { first: [], second: [], near: [], far: [] };
  for (let i = 0; i < to; i += 1) {
    let at = Math.fround((i + 0.5) * (from / to) - 0.5);
    let first = Math.floor(at);
    at -= first;
    if (first < 0) [first, at] = [0, 0];
    if (first >= from - 1) [first, at] = [from - 1, 0];
    taps.first.push(first);
    taps.second.push(Math.min(first + 1, from - 1));
    taps.near.push(roundEven(Math.fround(1 - at) * 2048));
    taps.far.push(roundEven(at * 2048));
  }
  return taps;
}

// Pillow's BILINEAR: a triangle as wide as a source step, weights of 22 bits.
// Source: libImaging/Resample.c (MIT-CMU).
function resizePillow(part, width, height) {
  let { rgb } = part;
  if (width !== part.width) rgb = pillowPass(rgb, part.width, width, part.height, 3, part.width * 3);
  if (height !== part.height) rgb = pillowPass(rgb, part.height, height, width, width * 3, 3);
  return rgb;
}

// Resample one axis: neighbours along it lie ``step`` apart, lines beside each other ``stride``.
function pillowPass(source, from, to, lines, step, stride) {
  const result = new Uint8Array(to * lines * 3);
  const newStride = step === 3 ? to * 3 : 3;
  const scale = from / to;
  const reach = Math.max(scale, 1);
  for (let i = 0; i < to; i += 1) {
    const centre = (i + 0.5) * scale;
    const low = Math.max(Math.trunc(centre - reach + 0.5), 0);
    const high = Math.min(Math.trunc(centre + reach + 0.5), from);
    let weights = [];
    for (let x = low; x < high; x += 1) {
      weights.push(Math.max(0, 1 - Math.abs((x - centre + 0.5) / reach)));
    }
    const total = weights.reduce((a, b) => a + b, 0);
    weights = weights.map((w) => Math.trunc(w / total * (1 << 22) + 0.5));
    for (let k = 0; k < lines; k += 1) {
      for (let c = 0; c < 3; c += 1) {
        let sum = 1 << 21;
        const at = k * stride + low * step + c;
        for (let x = 0; x < weights.length; x += 1) sum += weights[x] * source[at + x * step];
        result[k * newStride + i * step + c] = Math.min(Math.max(sum >> 22, 0), 255);
      }
    }
  }
  return result;
}
