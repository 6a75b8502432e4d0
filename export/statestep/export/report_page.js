// A readout under the pointer: the values of every line at that time, read back from the lines themselves.
"use strict";
for (const svg of document.querySelectorAll("svg[data-x]")) {
  const [low, high, start, stop] = JSON.parse(svg.dataset.x), timed = svg.dataset.timed === "1";
  let lines = null, box = null, cursor = null;

  const decoded = path => {  // relative moves → [x, y] of every point
    const points = [];
    let x = 0, y = 0;
    for (const [, kind, dx, dy] of path.getAttribute("d").matchAll(/([Ml])(-?[\d.]+) ?(-?[\d.]+)/g)) {
      x = kind === "M" ? +dx : x + +dx;
      y = kind === "M" ? +dy : y + +dy;
      points.push([x, y]);
    }
    return points;
  };
  const value = (y, [from, to, bottom, top, bend]) => {
    const bent = v => bend ? (v <= bend ? v / bend : 1 + Math.log(v / bend)) : v;
    const found = bent(from) + (y - bottom) / (top - bottom) * (bent(to) - bent(from));
    return bend ? (found <= 1 ? found * bend : bend * Math.exp(found - 1)) : found;
  };
  const nearest = (points, x) => {
    let [first, last] = [0, points.length - 1];
    while (first < last) {
      const middle = (first + last) >> 1;
      if (points[middle][0] < x) first = middle + 1; else last = middle;
    }
    return first > 0 && x - points[first - 1][0] < points[first][0] - x ? points[first - 1] : points[first];
  };
  const written = v => {
    const place = low + (v - start) / (stop - start) * (high - low);
    return timed ? new Date(place * 1000).toISOString().slice(0, 19).replace("T", " ") : "row " + Math.round(place);
  };

  svg.addEventListener("pointermove", event => {
    const matrix = svg.getScreenCTM().inverse();
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix);
    if (at.x < start || at.x > stop) return;
    if (!lines) {
      lines = [...svg.querySelectorAll("path[data-y]")].map(
        path => ({ name: path.dataset.name, scale: JSON.parse(path.dataset.y), points: decoded(path) }));
      box = svg.parentNode.appendChild(document.createElement("div"));
      box.className = "readout";
      cursor = svg.appendChild(document.createElementNS(svg.namespaceURI, "line"));
      cursor.setAttribute("class", "cursor");
    }
    for (const [name, v] of Object.entries({ x1: at.x, x2: at.x, y1: 0, y2: svg.viewBox.baseVal.height - 18 }))
      cursor.setAttribute(name, v);
    box.replaceChildren(Object.assign(document.createElement("b"), { textContent: written(at.x) }));
    for (const { name, scale, points } of lines) {
      const line = box.appendChild(document.createElement("div"));
      line.textContent = name;
      line.appendChild(document.createElement("span")).textContent = value(nearest(points, at.x)[1], scale).toPrecision(4);
    }
    const room = svg.getBoundingClientRect(), right = event.clientX - room.left;
    box.style.left = right > room.width / 2 ? `${right - box.offsetWidth - 14}px` : `${right + 14}px`;
    box.style.top = `${Math.min(event.clientY - room.top, room.height - box.offsetHeight)}px`;
    box.hidden = cursor.hidden = false;
    cursor.style.display = "";
  });
  svg.addEventListener("pointerleave", () => {
    if (box) { box.hidden = true; cursor.style.display = "none"; }
  });
}
