'use strict';
// The worker: loads the model once, then finds the cells of one picture after another.
// onnxruntime-web stands before it in the same script, as ``ort``: browsers are strict about what a
// worker of a page without a server may load.

let session = null;
let info = null;
let stoppedUpTo = 0; // number of a picture
let last = Promise.resolve();

self.onmessage = (event) => {
  const message = event.data;
  if (message.type === 'stop') {
    stoppedUpTo = message.upTo;
    return;
  }
  const work = message.type === 'load' ? load : find;
  last = last.then(() => work(message)).catch((problem) => {
    self.postMessage({ type: 'error', id: message.id, text: problem.message || String(problem) });
  });
};

async function load(message) {
  info = message.info;
  ort.env.logLevel = 'error';
  ort.env.wasm.numThreads = 1; // more need a server that isolates the page
  ort.env.wasm.wasmBinary = await unzip(message.wasm);
  session = await ort.InferenceSession.create(await unzip(message.model));
  self.postMessage({ type: 'ready' });
}

async function unzip(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i += 1) bytes[i] = binary.charCodeAt(i);
  return new Uint8Array(await new Response(unpacked(bytes, 'gzip')).arrayBuffer());
}

async function find({ id, buffer, isSwapped }) {
  if (id <= stoppedUpTo) throw new Error('stopped');
  const began = performance.now();
  const picture = await readPicture(buffer);
  if (isSwapped) swapRedBlue(picture.rgba);
  const { width, height, notes } = picture;
  self.postMessage({ type: 'picture', id, width, height, notes, blob: await toPngBlob(picture) });
  const tiles = planTiles(width, height, info.tilePx, info.overlapPx, info.wholePx);
  const perTile = [];
  let nCut = 0;
  for (const tile of tiles) {
    await new Promise((resolve) => { setTimeout(resolve); }); // lets a 'stop' in
    if (id <= stoppedUpTo) throw new Error('stopped');
    const seen = resize(cut(picture, tile.x0, tile.y0, tile.x1, tile.y1), info.resize);
    const found = await run(seen);
    const isFull = info.cap && found.scores.length >= info.cap;
    nCut += isFull && Math.min(...found.scores) > info.leastScore ? 1 : 0;
    perTile.push(cellsOfTile(found, tile, seen, info));
    self.postMessage({ type: 'progress', id, done: perTile.length, total: tiles.length });
  }
  const seconds = (performance.now() - began) / 1000;
  const cells = dropDoubles(perTile);
  self.postMessage({ type: 'cells', id, cells, seconds, nTiles: tiles.length, nCut });
}

async function run(seen) {
  const image = new ort.Tensor('uint8', seen.rgb, [seen.height, seen.width, 3]);
  const out = await session.run({ image });
  const found = {
    boxes: out.boxes.data, scores: out.scores.data, masks: out.masks.data,
    side: out.masks.dims[1], classes: Array.from(out.classes.data, Number),
  };
  image.dispose();
  return found;
}
