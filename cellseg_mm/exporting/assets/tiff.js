'use strict';
// Reads TIFF files of 8 bits: classic and BigTIFF, strips and tiles; uncompressed, LZW, deflate,
// PackBits, JPEG; chunky and planar; grey, RGB, palette. Everything else is named and refused.

const TIFF_PARTS = { tooMany: 64e6 };
const TYPE_BYTES = { 1: 1, 3: 2, 4: 4, 13: 4, 16: 8, 18: 8 };

// Return {width, height, rgba, notes}; decodeJpeg(bytes) gives {width, rgba} of a JPEG file.
async function readTiff(buffer, decodeJpeg) {
  const file = openTiff(buffer);
  const layout = tiffLayout(file.first);
  const planes = layout.isPlanar ? layout.samples : 1;
  const perPlane = layout.across * layout.down;
  const values = new Uint8Array(layout.width * layout.height * layout.samples);
  for (let i = 0; i < perPlane * planes; i += 1) {
    const plane = Math.floor(i / perPlane);
    const block = await tiffBlock(buffer, layout, i, decodeJpeg);
    placeBlock(values, layout, block, i % perPlane, plane);
  }
  const notes = file.count > 1 ? [`holds ${file.count} pictures; the first was read`] : [];
  return { width: layout.width, height: layout.height, rgba: tiffColours(values, layout), notes };
}

function openTiff(buffer) {
  const view = new DataView(buffer);
  const little = view.getUint8(0) === 0x49;
  const isBig = view.getUint16(2, little) === 43;
  const long = (at) => Number(isBig ? view.getBigUint64(at, little) : view.getUint32(at, little));
  const head = isBig ? 8 : 2;
  const size = isBig ? 20 : 12;
  const inline = isBig ? 8 : 4;

  function values(at) {
    const bytes = TYPE_BYTES[view.getUint16(at + 2, little)];
    if (!bytes) return null;
    const n = long(at + 4);
    const start = n * bytes <= inline ? at + size - inline : long(at + size - inline);
    if (start + n * bytes > view.byteLength) throw new Error('the file is cut off');
    return Array.from({ length: n }, (_, k) => {
      const where = start + k * bytes;
      if (bytes === 1) return view.getUint8(where);
      if (bytes === 2) return view.getUint16(where, little);
      return bytes === 4 ? view.getUint32(where, little) : Number(view.getBigUint64(where, little));
    });
  }

  function directory(at) {
    const n = isBig ? Number(view.getBigUint64(at, little)) : view.getUint16(at, little);
    const tags = new Map();
    for (let i = 0; i < n; i += 1) {
      const entry = at + head + i * size;
      tags.set(view.getUint16(entry, little), entry);
    }
    return {
      get: (tag, otherwise) => (tags.has(tag) ? values(tags.get(tag)) : otherwise),
      next: long(at + head + n * size),
    };
  }

  const first = directory(long(isBig ? 8 : 4));
  let count = 1;
  for (let at = first.next; at && count < 1000; count += 1) at = directory(at).next;
  return { first, count };
}

function tiffLayout(tags) {
  const one = (tag, otherwise) => tags.get(tag, [otherwise])[0];
  const layout = {
    width: one(256), height: one(257), bits: tags.get(258, [1]), compression: one(259, 1),
    photometric: one(262), samples: one(277, 1), isPlanar: one(284, 1) === 2,
    predictor: one(317, 1), extra: tags.get(338, []), tables: tags.get(347, null),
    palette: tags.get(320, null),
  };
  const isTiled = tags.get(322, null) !== null;
  layout.blockWidth = isTiled ? one(322) : layout.width;
  layout.blockHeight = isTiled ? one(323) : Math.min(one(278, layout.height), layout.height);
  layout.isTiled = isTiled;
  layout.offsets = tags.get(isTiled ? 324 : 273, null);
  layout.counts = tags.get(isTiled ? 325 : 279, null);
  checkLayout(layout, one(339, 1));
  layout.across = Math.ceil(layout.width / layout.blockWidth);
  layout.down = Math.ceil(layout.height / layout.blockHeight);
  const needed = layout.across * layout.down * (layout.isPlanar ? layout.samples : 1);
  if (layout.offsets.length < needed || layout.counts.length < needed) {
    throw new Error('parts of the picture are missing');
  }
  return layout;
}

function checkLayout(layout, sampleFormat) {
  const { width, height, bits, compression, photometric, samples } = layout;
  if (!width || !height || !layout.offsets || !layout.counts) throw new Error('no picture inside');
  if (width * height > TIFF_PARTS.tooMany) {
    throw new Error(`${width} x ${height} px; this page takes at most 64 million`);
  }
  if (bits.some((b) => b !== 8) || sampleFormat !== 1) {
    throw new Error(`${bits[0]} bits a value; this page takes 8 bits; convert it`);
  }
  if (![1, 5, 7, 8, 32773, 32946].includes(compression)) {
    throw new Error(`compression ${compression} is unknown here; save it with LZW or deflate`);
  }
  const isColour = (photometric === 2 || (photometric === 6 && compression === 7)) && samples >= 3;
  const isGrey = [0, 1].includes(photometric) && samples <= 2;
  const isPalette = photometric === 3 && samples === 1 && layout.palette;
  if (samples > 4 || !(isColour || isGrey || isPalette) || ![1, 2].includes(layout.predictor)) {
    throw new Error(`kind ${photometric} with ${samples} channels; save it as RGB of 8 bits`);
  }
  if (compression === 7 && (layout.isPlanar || samples === 2 || samples === 4)) {
    throw new Error('JPEG with separate or transparent channels; save it with LZW or deflate');
  }
}

async function tiffBlock(buffer, layout, i, decodeJpeg) {
  const start = layout.offsets[i];
  if (!layout.counts[i] || start + layout.counts[i] > buffer.byteLength) {
    throw new Error('the file is cut off');
  }
  const packed = new Uint8Array(buffer, start, layout.counts[i]);
  const depth = layout.isPlanar ? 1 : layout.samples;
  const row = Math.floor((i % (layout.across * layout.down)) / layout.across);
  const rows = layout.isTiled ? layout.blockHeight
    : Math.min(layout.blockHeight, layout.height - row * layout.blockHeight);
  const length = layout.blockWidth * rows * depth;
  if (layout.compression === 7) return jpegBlock(packed, layout, rows, decodeJpeg);
  const values = await unpack(packed, layout.compression, length);
  if (values.length < length) throw new Error('the file is damaged');
  if (layout.predictor === 2) {
    const line = layout.blockWidth * depth;
    for (let y = 0; y < rows; y += 1) {
      for (let x = depth; x < line; x += 1) values[y * line + x] += values[y * line + x - depth];
    }
  }
  return values;
}

async function unpack(packed, compression, length) {
  if (compression === 5) return lzw(packed, length);
  if (compression === 32773) return packBits(packed, length);
  if (compression === 8 || compression === 32946) return inflate(packed, 'deflate', length);
  return packed.slice(0, length);
}

function unpacked(packed, format) {
  const stream = new DecompressionStream(format);
  const writer = stream.writable.getWriter();
  // what goes wrong comes out at the other end
  writer.write(packed).catch(() => {});
  writer.close().catch(() => {});
  return stream.readable;
}

// Some writers leave bytes behind the end, which DecompressionStream reports after the content.
async function inflate(packed, format, length) {
  const reader = unpacked(packed, format).getReader();
  const values = new Uint8Array(length);
  let n = 0;
  while (n < length) {
    const { done, value } = await reader.read();
    if (done) throw new Error('the file is damaged');
    values.set(value.subarray(0, length - n), n);
    n += value.length;
  }
  reader.cancel().catch(() => {});
  return values;
}

function packBits(packed, length) {
  const values = new Uint8Array(length);
  let n = 0;
  for (let at = 0; at < packed.length && n < length;) {
    const code = packed[at];
    at += 1;
    if (code < 128) {
      values.set(packed.subarray(at, at + Math.min(code + 1, length - n)), n);
      at += code + 1;
      n += code + 1;
    } else if (code > 128) {
      values.fill(packed[at], n, n + 257 - code);
      at += 1;
      n += 257 - code;
    }
  }
  if (n < length) throw new Error('the file is damaged');
  return values;
}

// Source: TIFF 6.0, section 13. Strings are kept as links to shorter ones.
function lzw(packed, length) {
  const values = new Uint8Array(length);
  const link = new Uint16Array(4096);
  const last = new Uint8Array(4096);
  const size = new Uint16Array(4096);
  for (let code = 0; code < 256; code += 1) {
    last[code] = code;
    size[code] = 1;
  }
  let next = 258, width = 9, previous = -1, bits = 0, held = 0, n = 0;
  function put(code) {
    const end = Math.min(n + size[code], length);
    let at = n + size[code] - 1;
    let byte = last[code];
    for (let c = code; at >= n; at -= 1, c = link[c]) {
      byte = last[c];
      if (at < length) values[at] = byte;
    }
    n = end;
    return byte;
  }
  function add(byte) {
    if (next > 4095) return;
    link[next] = previous;
    last[next] = byte;
    size[next] = size[previous] + 1;
    next += 1;
  }
  for (let at = 0; n < length;) {
    while (bits < width && at < packed.length) {
      held = ((held << 8) | packed[at]) & 0xffffff;
      at += 1;
      bits += 8;
    }
    if (bits < width) break;
    bits -= width;
    const code = (held >> bits) & ((1 << width) - 1);
    if (code === 257) break;
    if (code === 256) {
      next = 258;
      width = 9;
      previous = -1;
      continue;
    }
    if (code > next || (code === next && previous < 0) || (previous < 0 && code > 255)) {
      throw new Error('the file is damaged');
    }
    if (previous >= 0) {
      let first = code === next ? previous : code;
      while (size[first] > 1) first = link[first];
      add(last[first]);
    }
    put(code);
    previous = code;
    if (next >= (1 << width) - 1 && width < 12) width += 1;
  }
  if (n < length) throw new Error('the file is damaged');
  return values;
}

async function jpegBlock(packed, layout, rows, decodeJpeg) {
  // Tables lie once in the file: they go between the part's start and its content.
  const tables = layout.tables ? layout.tables.slice(2, -2) : [];
  // Without Adobe's mark, browsers take three channels for YCbCr.
  const mark = layout.photometric === 2
    ? [0xff, 0xee, 0, 14, 65, 100, 111, 98, 101, 0, 100, 0, 0, 0, 0, 0] : [];
  const whole = new Blob([new Uint8Array([0xff, 0xd8, ...mark, ...tables]), packed.subarray(2)]);
  const decoded = await decodeJpeg(whole);
  if (decoded.width < layout.blockWidth || decoded.height < rows) {
    throw new Error('the file is damaged');
  }
  const values = new Uint8Array(layout.blockWidth * rows * layout.samples);
  for (let y = 0, to = 0; y < rows; y += 1) {
    for (let x = 0; x < layout.blockWidth; x += 1) {
      const from = (y * decoded.width + x) * 4;
      for (let c = 0; c < layout.samples; c += 1, to += 1) values[to] = decoded.rgba[from + c];
    }
  }
  return values;
}

function placeBlock(values, layout, block, place, plane) {
  const { width, height, samples, blockWidth, blockHeight } = layout;
  const x0 = (place % layout.across) * blockWidth;
  const y0 = Math.floor(place / layout.across) * blockHeight;
  const w = Math.min(blockWidth, width - x0);
  const h = Math.min(blockHeight, height - y0);
  for (let y = 0; y < h; y += 1) {
    const to = ((y0 + y) * width + x0) * samples;
    if (!layout.isPlanar) {
      const from = y * blockWidth * samples;
      values.set(block.subarray(from, from + w * samples), to);
      continue;
    }
    for (let x = 0; x < w; x += 1) values[to + x * samples + plane] = block[y * blockWidth + x];
  }
}

function tiffColours(values, layout) {
  const { samples, photometric, palette } = layout;
  const n = layout.width * layout.height;
  const rgba = new Uint8ClampedArray(n * 4);
  const isPremultiplied = photometric === 2 && samples === 4 && layout.extra[0] === 1;
  for (let i = 0; i < n; i += 1) {
    const value = values[i * samples];
    for (let c = 0; c < 3; c += 1) {
      let shown = photometric === 0 ? 255 - value : value;
      if (photometric === 3) shown = palette[c * 256 + value] >> 8;
      else if (samples >= 3) shown = values[i * samples + c];
      const alpha = isPremultiplied ? values[i * samples + 3] : 255;
      rgba[i * 4 + c] = alpha && alpha < 255 ? Math.round(shown * 255 / alpha) : shown;
    }
    rgba[i * 4 + 3] = 255;
  }
  return rgba;
}
