'use strict';
(function () {
  const byId = (id) => document.getElementById(id);
  const info = JSON.parse(byId('data').textContent);
  const svg = byId('canvas');
  const slider = byId('threshold');
  const chooser = byId('image');
  const switches = [...document.querySelectorAll('.class-switch')];
  const entries = []; // pictures that are done: {name, width, height, url, blob, cells, facts}
  const waiting = new Map(); // id to what is known of a picture so far
  let threshold = info.scoreThr;
  let shown = null; // {entry, cells: [{cell, path}]}
  let nSent = 0;
  startTheme(byId('theme'));
  const viewer = zoomable([svg], () => ({ w: shown.entry.width, h: shown.entry.height }));

  // ---- the worker ----
  const code = new Blob([byId('worker').textContent], { type: 'text/javascript' });
  const worker = new Worker(URL.createObjectURL(code));
  worker.onmessage = (event) => ({ ready, picture, progress, cells, error })[event.data.type](event.data);
  worker.onerror = (event) => {
    event.preventDefault();
    error({ text: `${event.message || 'the worker cannot start'}; see which browsers are new enough below` });
  };
  const parts = ['wasm', 'model'].map((id) => [id, byId(id).textContent]);
  worker.postMessage({ type: 'load', info, ...Object.fromEntries(parts) });
  for (const [id] of parts) byId(id).remove(); // they are large
  let isReady = false;

  function ready() {
    isReady = true;
    say();
  }

  function say(text) {
    const isBusy = waiting.size > 0;
    byId('progress').hidden = byId('stop').hidden = !isBusy;
    const left = isBusy ? `${waiting.size} picture${waiting.size > 1 ? 's' : ''} to go ...` : '';
    byId('status').textContent = text || left || (isReady ? 'ready' : 'loading the model ...');
  }

  function note(text) {
    const line = document.createElement('li');
    line.textContent = text;
    byId('notes').append(line);
    byId('notes').hidden = false;
  }

  async function add(files) {
    const isSwapped = byId('swapped').checked;
    for (const file of [...files]) {
      nSent += 1;
      const id = nSent;
      waiting.set(id, { name: file.name, file });
      say();
      try {
        const buffer = await file.arrayBuffer();
        worker.postMessage({ type: 'find', id, buffer, isSwapped }, [buffer]);
      } catch (problem) {
        error({ id, text: 'cannot be read; is it open elsewhere, or a folder?' });
      }
    }
  }

  function picture({ id, width, height, notes, blob }) {
    Object.assign(waiting.get(id), { width, height, blob, notes });
    for (const text of notes) note(`${waiting.get(id).name}: ${text}`);
    byId('progress').removeAttribute('value');
  }

  function progress({ id, done, total }) {
    byId('progress').value = done / total;
    say(`${waiting.get(id).name}: ${done} of ${total} tiles`
      + (waiting.size > 1 ? `, ${waiting.size - 1} more to go` : ''));
  }

  function cells({ id, cells: found, seconds, nTiles, nCut }) {
    const entry = waiting.get(id);
    waiting.delete(id);
    entry.url = URL.createObjectURL(entry.blob);
    entry.cells = found;
    entry.facts = `${entry.width} × ${entry.height} px · ${seconds.toFixed(1)} s`
      + (nTiles > 1 ? ` · ${nTiles} tiles` : '');
    if (nCut) {
      note(`${entry.name}: ${nCut} of ${nTiles} tiles are full: the model finds ${info.cap} cells in one`);
    }
    entries.push(entry);
    chooser.append(new Option(entry.name, String(entries.length - 1)));
    byId('result').hidden = false;
    if (!shown || waiting.size === 0) show(entries.length - 1);
    say();
  }

  function error({ id, text }) {
    const name = id ? `${waiting.get(id).name}: ` : '';
    waiting.delete(id);
    note(name + text);
    say(id ? '' : 'this page cannot work here');
  }

  // ---- what is shown ----
  function show(index) {
    chooser.value = String(index);
    shown = { entry: entries[index], cells: [] };
    viewer.reset();
    draw();
  }

  function draw() {
    const { entry } = shown;
    const kept = resolveCells(entry.cells, threshold, entry, info);
    const image = element('image', { href: entry.url, x: 0, y: 0, width: entry.width, height: entry.height });
    const group = element('g', {});
    shown.cells = kept.map((cell) => {
      const path = element('path', { d: outlinePath(cell), class: `k${cell.k}`, 'fill-rule': 'evenodd' });
      const title = element('title', {});
      title.textContent = `${info.classNames[cell.k]}, score ${cell.score.toFixed(2)}`;
      path.append(title);
      group.append(path);
      return { cell, path };
    });
    svg.replaceChildren(image, group);
    update();
  }

  function update() {
    const isOn = switches.map((one) => one.checked);
    for (const { cell, path } of shown.cells) path.style.display = isOn[cell.k] ? '' : 'none';
    const counts = info.classNames.map((_, k) => shown.cells.filter(({ cell }) => cell.k === k).length);
    switches.forEach((one, k) => { byId(`n${k}`).textContent = counts[k]; });
    const total = counts.reduce((sum, n, k) => sum + (isOn[k] ? n : 0), 0);
    byId('facts').textContent = `${total} cells shown · ${shown.entry.facts}`;
    svg.classList.toggle('filled', byId('fill').checked);
  }

  function sayThreshold() {
    byId('threshold-value').textContent = threshold.toFixed(2);
  }

  // ---- saving ----
  async function save(kind) {
    const { entry } = shown;
    const isOn = switches.map((one) => one.checked);
    const chosen = shown.cells.map(({ cell }) => cell).filter((cell) => isOn[cell.k]);
    const name = entry.name.replace(/\.[^.]*$/, '');
    const bitmap = await createImageBitmap(entry.blob);
    if (kind === 'png') {
      download(`${name}.overlay.png`, await toPng(chosen, info, bitmap));
      return;
    }
    const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
    const context = canvas.getContext('2d', { willReadFrequently: true });
    context.drawImage(bitmap, 0, 0);
    const pixels = { width: bitmap.width, rgba: context.getImageData(0, 0, bitmap.width, bitmap.height).data };
    if (kind === 'csv') download(`${name}.cells.csv`, toCsv(chosen, info, pixels), 'text/csv');
    else download(`${name}.geojson`, toGeoJson(chosen, info, pixels), 'application/geo+json');
  }

  // ---- controls ----
  const drop = byId('drop');
  byId('files').addEventListener('change', (event) => {
    add([...event.target.files]);
    event.target.value = '';
  });
  for (const kind of ['dragover', 'dragleave', 'drop']) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle('over', kind === 'dragover');
      if (kind === 'drop') add(event.dataTransfer.files);
    });
  }
  byId('swapped').addEventListener('change', () => {
    const files = entries.map((entry) => entry.file);
    for (const entry of entries) URL.revokeObjectURL(entry.url);
    entries.length = chooser.length = 0;
    shown = null;
    byId('result').hidden = true;
    add(files);
  });
  byId('stop').addEventListener('click', () => {
    worker.postMessage({ type: 'stop', upTo: nSent });
  });
  const step = (by) => show((Number(chooser.value) + entries.length + by) % entries.length);
  chooser.addEventListener('change', () => show(Number(chooser.value)));
  byId('previous').addEventListener('click', () => step(-1));
  byId('next').addEventListener('click', () => step(1));
  byId('zoom-in').addEventListener('click', () => viewer.zoom(1.5));
  byId('zoom-out').addEventListener('click', () => viewer.zoom(1 / 1.5));
  byId('zoom-reset').addEventListener('click', viewer.reset);
  slider.value = String(threshold);
  slider.addEventListener('input', () => {
    threshold = Number(slider.value);
    sayThreshold();
    draw();
  });
  for (const input of [...switches, byId('fill')]) input.addEventListener('change', update);
  for (const button of document.querySelectorAll('#save button')) {
    button.addEventListener('click', () => save(button.dataset.kind).catch((problem) => {
      note(`${shown.entry.name}: could not be saved (${problem.message})`);
    }));
  }
  sayThreshold();
})();
