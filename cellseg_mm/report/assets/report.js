'use strict';
(function () {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId('data').textContent);

  // ---- light and dark ----
  const root = document.documentElement;
  const themeButton = byId('theme');
  const systemDark = window.matchMedia('(prefers-color-scheme: dark)');
  function isDark() {
    return root.dataset.theme ? root.dataset.theme === 'dark' : systemDark.matches;
  }
  function showTheme() {
    themeButton.setAttribute('aria-pressed', String(isDark()));
    themeButton.textContent = isDark() ? 'light' : 'dark';
    themeButton.setAttribute('aria-label', 'switch to ' + themeButton.textContent + ' colours');
  }
  themeButton.addEventListener('click', () => {
    root.dataset.theme = isDark() ? 'light' : 'dark';
    showTheme();
  });
  systemDark.addEventListener('change', showTheme);
  showTheme();

  // ---- tables that sort ----
  function cellValue(row, column) {
    const text = row.cells[column].textContent.trim();
    const value = parseFloat(text);
    return Number.isNaN(value) ? text : value;
  }
  function compareCells(a, b) {
    if (typeof a === 'number' && typeof b === 'number') return a - b;
    return String(a).localeCompare(String(b));
  }
  document.querySelectorAll('table.sortable').forEach((table) => {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement('button');
      button.type = 'button';
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener('click', () => {
        const falling = head.getAttribute('aria-sort') === 'ascending';
        const sign = falling ? -1 : 1;
        heads.forEach((other) => other.removeAttribute('aria-sort'));
        head.setAttribute('aria-sort', falling ? 'descending' : 'ascending');
        const body = table.tBodies[0];
        // Names sort as texts even where they begin with a digit.
        const value = (row) => (column === 0 ? row.cells[0].textContent : cellValue(row, column));
        const rows = [...body.rows];
        rows.sort((a, b) => sign * compareCells(value(a), value(b)));
        body.append(...rows);
      });
    });
  });

  // ---- viewer ----
  if (!byId('viewer')) return;
  const SVG = 'http://www.w3.org/2000/svg';
  const panes = {
    gt: byId('pane-gt').querySelector('svg'),
    pred: byId('pane-pred').querySelector('svg'),
  };
  const chooser = byId('image');
  const slider = byId('threshold');
  const predictions = byId('predictions');
  const switches = [...document.querySelectorAll('.class-switch')];
  let entry = null;
  let drawn = { gt: [], pred: [] };
  let view = null;

  function element(name, attributes) {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return node;
  }

  function draw(kind) {
    const svg = panes[kind];
    const image = element('image', { href: entry.src, x: 0, y: 0, width: entry.w, height: entry.h });
    const group = element('g', { transform: 'translate(.5 .5)' });
    // A label's row ends with the scores of the detection and of the cell that found it.
    const isCells = predictions.value === 'cells';
    const rows = entry[kind === 'pred' ? predictions.value : kind] || [];
    drawn[kind] = rows.map((row) => {
      const path = element('path', { d: row[1], class: 'k' + row[0] });
      const title = element('title', {});
      const name = data.classNames[row[0]];
      title.textContent = kind === 'pred' ? name + ', score ' + row[2].toFixed(2) : name;
      path.append(title);
      group.append(path);
      const score = kind === 'gt' && isCells ? row[3] : row[2];
      return { path, classId: row[0], score, isRight: row[3] };
    });
    svg.replaceChildren(image, group);
  }

  function update() {
    const threshold = Number(slider.value);
    byId('threshold-value').textContent = threshold.toFixed(2);
    const isOn = new Set(switches.filter((s) => s.checked).map((s) => Number(s.value)));
    const wrongOnly = byId('wrong-only').checked;
    let n = 0, right = 0, labelled = 0, found = 0;
    for (const one of drawn.pred) {
      const counts = isOn.has(one.classId) && one.score >= threshold;
      const wrong = one.isRight === 0;
      one.path.style.display = counts && (wrong || !wrongOnly) ? '' : 'none';
      one.path.classList.toggle('wrong', wrong);
      if (counts) { n += 1; right += one.isRight === 1 ? 1 : 0; }
    }
    for (const one of drawn.gt) {
      const counts = isOn.has(one.classId);
      const missed = one.score < threshold;
      one.path.style.display = counts && (missed || !wrongOnly) ? '' : 'none';
      one.path.classList.toggle('wrong', missed);
      if (counts) { labelled += 1; found += missed ? 0 : 1; }
    }
    const hasLabels = entry.gt !== null;
    const hidden = predictions.value === 'pred' && entry.left_out
      ? ', ' + entry.left_out + ' with lower scores not in this page' : '';
    byId('count-pred').textContent = (hasLabels
      ? n + ' shown, ' + right + ' right, ' + (n - right) + ' wrong' : n + ' shown') + hidden;
    byId('count-gt').textContent = labelled + ' cells, ' + found + ' found, ' +
      (labelled - found) + ' missed';
    for (const svg of Object.values(panes)) {
      svg.classList.toggle('filled', byId('fill').checked);
    }
  }

  function show(index) {
    entry = data.images[index];
    chooser.value = String(index);
    draw('pred');
    draw('gt');
    byId('pane-gt').hidden = entry.gt === null;
    const facts = [entry.name, entry.facts, entry.w + ' × ' + entry.h + ' px'];
    byId('facts').textContent = facts.join(' · ');
    setView(0, 0, entry.w, entry.h);
    update();
  }

  function choosePredictions() {
    slider.min = predictions.selectedOptions[0].dataset.least;
    slider.value = slider.min;
  }

  function setView(x, y, w, h) {
    w = Math.min(entry.w, Math.max(w, entry.w / 16));
    h = w * entry.h / entry.w;
    x = Math.min(Math.max(0, x), entry.w - w);
    y = Math.min(Math.max(0, y), entry.h - h);
    view = { x, y, w, h };
    for (const svg of Object.values(panes)) {
      svg.setAttribute('viewBox', [x, y, w, h].map((v) => v.toFixed(2)).join(' '));
      svg.classList.toggle('zoomed', w < entry.w);
    }
  }

  function zoom(factor, cx, cy) {
    cx = cx === undefined ? view.x + view.w / 2 : cx;
    cy = cy === undefined ? view.y + view.h / 2 : cy;
    const w = Math.min(entry.w, Math.max(view.w / factor, entry.w / 16));
    const ratio = w / view.w;
    setView(cx - (cx - view.x) * ratio, cy - (cy - view.y) * ratio, w, 0);
  }

  function pointAt(svg, event) {
    const box = svg.getBoundingClientRect();
    const scale = Math.max(view.w / box.width, view.h / box.height);
    return {
      x: view.x + view.w / 2 + (event.clientX - box.left - box.width / 2) * scale,
      y: view.y + view.h / 2 + (event.clientY - box.top - box.height / 2) * scale,
      scale,
    };
  }

  const STEPS = {
    ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1],
  };
  for (const svg of Object.values(panes)) {
    let last = null;
    svg.addEventListener('wheel', (event) => {
      // Plain scrolling stays the page's, until the picture was clicked or tabbed to.
      if (!event.ctrlKey && !event.metaKey && document.activeElement !== svg) return;
      event.preventDefault();
      const at = pointAt(svg, event);
      zoom(event.deltaY < 0 ? 1.25 : 0.8, at.x, at.y);
    }, { passive: false });
    svg.addEventListener('pointerdown', (event) => {
      last = event;
      svg.setPointerCapture(event.pointerId);
    });
    svg.addEventListener('pointermove', (event) => {
      if (!last) return;
      const scale = pointAt(svg, event).scale;
      setView(view.x - (event.clientX - last.clientX) * scale,
        view.y - (event.clientY - last.clientY) * scale, view.w, view.h);
      last = event;
    });
    for (const end of ['pointerup', 'pointercancel']) {
      svg.addEventListener(end, () => { last = null; });
    }
    svg.addEventListener('dblclick', (event) => {
      const at = pointAt(svg, event);
      zoom(2, at.x, at.y);
    });
    svg.addEventListener('keydown', (event) => {
      if (event.key === '+' || event.key === '=') zoom(1.5);
      else if (event.key === '-') zoom(1 / 1.5);
      else if (event.key === '0') setView(0, 0, entry.w, entry.h);
      else if (STEPS[event.key]) {
        const [dx, dy] = STEPS[event.key];
        setView(view.x + dx * view.w / 8, view.y + dy * view.h / 8, view.w, view.h);
      } else return;
      event.preventDefault();
    });
  }

  const n = data.images.length;
  chooser.addEventListener('change', () => show(Number(chooser.value)));
  byId('previous').addEventListener('click', () => show((Number(chooser.value) + n - 1) % n));
  byId('next').addEventListener('click', () => show((Number(chooser.value) + 1) % n));
  byId('zoom-in').addEventListener('click', () => zoom(1.5));
  byId('zoom-out').addEventListener('click', () => zoom(1 / 1.5));
  byId('zoom-reset').addEventListener('click', () => setView(0, 0, entry.w, entry.h));
  slider.addEventListener('input', update);
  predictions.addEventListener('change', () => {
    choosePredictions();
    draw('pred');
    draw('gt');
    update();
  });
  for (const input of [...switches, byId('fill'), byId('wrong-only')]) {
    input.addEventListener('change', update);
  }
  choosePredictions();
  show(0);
})();
