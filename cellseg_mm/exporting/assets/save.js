'use strict';
// The files that the page saves; GeoJSON and CSV as tools/predict.py writes them.

const CSV_COLUMNS = [
  'cell', 'class', 'score', 'area_px', 'centroid_x_px', 'centroid_y_px', 'box_x0_px', 'box_y0_px',
  'box_x1_px', 'box_y1_px', 'perimeter_px', 'eccentricity', 'mean_red', 'mean_green', 'mean_blue',
];

// The shortest decimal that is this 32 bit number: 0.9 and not 0.8999999761581421.
function shortScore(score) {
  for (let digits = 1; digits < 10; digits += 1) {
    const short = Number(score.toPrecision(digits));
    if (Math.fround(short) === score) return short;
  }
  return score;
}

function toGeoJson(cells, info, pixels) {
  const features = cells.map((cell) => {
    const parts = traceCell(cell).map((rings) => rings.map((ring) => [...ring, ring[0]]));
    const geometry = parts.length === 1 ? { type: 'Polygon', coordinates: parts[0] }
      : { type: 'MultiPolygon', coordinates: parts };
    const found = measureCell(cell, pixels.rgba, pixels.width);
    const measurements = {
      score: shortScore(cell.score), 'Area px^2': found.area, 'Perimeter px': found.perimeter,
      Eccentricity: found.eccentricity, 'Mean red': found.means[0], 'Mean green': found.means[1],
      'Mean blue': found.means[2],
    };
    const classification = { name: info.classNames[cell.k], color: info.classColours[cell.k] };
    const properties = { objectType: 'detection', classification, measurements };
    return JSON.stringify({ type: 'Feature', geometry, properties });
  });
  return `{"type":"FeatureCollection","features":[\n${features.join(',\n')}\n]}\n`;
}

function toCsv(cells, info, pixels) {
  const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const lines = cells.map((cell, i) => {
    const found = measureCell(cell, pixels.rgba, pixels.width);
    const four = (values) => values.map((value) => value.toFixed(4));
    return [
      i + 1, quoted(info.classNames[cell.k]), shortScore(cell.score), found.area,
      ...four([found.x, found.y]), ...found.box,
      ...four([found.perimeter, found.eccentricity, ...found.means]),
    ].join(',');
  });
  return `${[CSV_COLUMNS.join(','), ...lines].join('\n')}\n`;
}

// Draw the picture with outlines and a strip with the classes and their numbers.
async function toPng(cells, info, bitmap) {
  const { width, height } = bitmap;
  const canvas = document.createElement('canvas');
  const context = canvas.getContext('2d');
  context.font = '15px sans-serif';
  const places = legendPlaces(cells, info, context, width);
  [canvas.width, canvas.height] = [width, height + 28 * (places.at(-1).row + 1)];
  context.fillStyle = '#fff';
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0);
  context.lineWidth = 1.5;
  for (const cell of [...cells].reverse()) {
    context.strokeStyle = rgbOf(info.classColours[cell.k]);
    context.stroke(new Path2D(outlinePath(cell)));
  }
  context.font = '15px sans-serif';
  context.textBaseline = 'middle';
  for (const { text, x, row, colour } of places) {
    const y = height + 28 * row + 14;
    context.fillStyle = colour;
    context.fillRect(x, y - 7, 14, 14);
    context.fillStyle = '#1b1f24';
    context.fillText(text, x + 20, y);
  }
  return new Promise((resolve) => { canvas.toBlob(resolve, 'image/png'); });
}

function legendPlaces(cells, info, context, width) {
  let [x, row] = [8, 0];
  return info.classNames.map((name, k) => {
    const text = `${name}: ${cells.filter((cell) => cell.k === k).length}`;
    const needed = 36 + context.measureText(text).width;
    if (x > 8 && x + needed > width) [x, row] = [8, row + 1];
    const place = { text, x, row, colour: rgbOf(info.classColours[k]) };
    x += needed;
    return place;
  });
}

function rgbOf(colour) {
  return `rgb(${colour.join(' ')})`;
}

function download(name, content, type) {
  const blob = content instanceof Blob ? content : new Blob([content], { type });
  const link = document.createElement('a');
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
