'use strict';
(function () {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId('data').textContent);

  startTheme(byId('theme'));

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
  const viewer = zoomable(Object.values(panes), () => ({ w: entry.w, h: entry.h }));

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
    viewer.reset();
    update();
  }

  function choosePredictions() {
    slider.min = predictions.selectedOptions[0].dataset.least;
    slider.value = slider.min;
  }

  const n = data.images.length;
  chooser.addEventListener('change', () => show(Number(chooser.value)));
  byId('previous').addEventListener('click', () => show((Number(chooser.value) + n - 1) % n));
  byId('next').addEventListener('click', () => show((Number(chooser.value) + 1) % n));
  byId('zoom-in').addEventListener('click', () => viewer.zoom(1.5));
  byId('zoom-out').addEventListener('click', () => viewer.zoom(1 / 1.5));
  byId('zoom-reset').addEventListener('click', viewer.reset);
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
