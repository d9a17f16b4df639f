'use strict';
// What the report and the page of a model share: light and dark, SVG, zooming and moving.

function startTheme(button) {
  const root = document.documentElement;
  const systemDark = window.matchMedia('(prefers-color-scheme: dark)');
  function isDark() {
    return root.dataset.theme ? root.dataset.theme === 'dark' : systemDark.matches;
  }
  function show() {
    button.setAttribute('aria-pressed', String(isDark()));
    button.textContent = isDark() ? 'light' : 'dark';
    button.setAttribute('aria-label', 'switch to ' + button.textContent + ' colours');
  }
  button.addEventListener('click', () => {
    root.dataset.theme = isDark() ? 'light' : 'dark';
    show();
  });
  systemDark.addEventListener('change', show);
  show();
}

function element(name, attributes) {
  const node = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

// Make SVGs show the same part of a picture; size() tells its width and height.
function zoomable(svgs, size) {
  let view = null;

  function setView(x, y, w) {
    const whole = size();
    w = Math.min(whole.w, Math.max(w, whole.w / 16));
    const h = w * whole.h / whole.w;
    x = Math.min(Math.max(0, x), whole.w - w);
    y = Math.min(Math.max(0, y), whole.h - h);
    view = { x, y, w, h };
    for (const svg of svgs) {
      svg.setAttribute('viewBox', [x, y, w, h].map((v) => v.toFixed(2)).join(' '));
      svg.classList.toggle('zoomed', w < whole.w);
    }
  }

  function reset() {
    setView(0, 0, size().w);
  }

  function zoom(factor, cx, cy) {
    cx = cx === undefined ? view.x + view.w / 2 : cx;
    cy = cy === undefined ? view.y + view.h / 2 : cy;
    const w = Math.min(size().w, Math.max(view.w / factor, size().w / 16));
    const ratio = w / view.w;
    setView(cx - (cx - view.x) * ratio, cy - (cy - view.y) * ratio, w);
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
  for (const svg of svgs) {
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
        view.y - (event.clientY - last.clientY) * scale, view.w);
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
      else if (event.key === '0') reset();
      else if (STEPS[event.key]) {
        const [dx, dy] = STEPS[event.key];
        setView(view.x + dx * view.w / 8, view.y + dy * view.h / 8, view.w);
      } else return;
      event.preventDefault();
    });
  }
  return { reset, zoom };
}
