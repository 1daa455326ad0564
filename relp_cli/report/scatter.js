// Scatter plots: an estimate of every unit against the exact effect; the pointer finds the nearest point.
// spec: title, x, y (names), points [[x, y], …], words (a point's name), note.
relp.scatter = (spec) => {
  const { make, number } = relp;
  const size = 230, left = 50, below = 38, top = 6, right = 8;
  const known = spec.points.map((_, i) => i).filter((i) => spec.points[i][0] !== null && spec.points[i][1] !== null);
  const points = known.map((i) => spec.points[i]);
  let low = 0, high = 0;
  for (const value of points.flat()) [low, high] = [Math.min(low, value), Math.max(high, value)];
  const pad = 0.05 * (high - low || 1);
  [low, high] = [low - pad, high + pad];
  const px = (x) => left + (size * (x - low)) / (high - low), py = (y) => top + (size * (high - y)) / (high - low);
  const svg = make("svg", { class: "scatter", width: left + size + right, height: top + size + below,
    viewBox: `0 0 ${left + size + right} ${top + size + below}`, role: "img", tabindex: 0,
    "aria-label": `${spec.title}: ${spec.y} against ${spec.x}, ${points.length} points; arrow keys go through the points farthest from the line` });
  const step = 10 ** Math.floor(Math.log10((high - low) / 2)), nice = [1, 2, 5].map((k) => k * step).find((k) => (high - low) / k < 6) ?? 10 * step;
  const digits = Math.max(0, -Math.floor(Math.log10(nice)));
  for (let tick = Math.ceil(low / nice) * nice; tick <= high; tick += nice) {
    const text = tick.toFixed(digits).replace(/^-(0\.?0*)$/, "$1").replace("-", "−");
    svg.append(
      make("path", { class: "grid", d: `M${px(tick)} ${top}V${top + size}M${left} ${py(tick)}H${left + size}` }),
      make("text", { x: px(tick), y: top + size + 13, "text-anchor": "middle" }, text),
      make("text", { x: left - 5, y: py(tick) + 3, "text-anchor": "end" }, text));
  }
  svg.append(
    make("path", { class: "line", d: `M${px(low)} ${py(low)}L${px(high)} ${py(high)}` }),
    make("path", { class: points.length > 250 ? "dots" : "dots few", d: points.map(([x, y]) => `M${px(x).toFixed(1)} ${py(y).toFixed(1)}h0`).join("") }),
    make("text", { x: left + size / 2, y: top + size + 30, "text-anchor": "middle" }, spec.x),
    make("text", { x: 11, y: top + size / 2, transform: `rotate(-90 11 ${top + size / 2})`, "text-anchor": "middle" }, spec.y));
  const ring = make("circle", { r: 5, class: "ring", cx: -20, cy: -20 });
  svg.append(ring);
  const at = (i, x, y) => {
    const [a, b] = points[i];
    ring.setAttribute("cx", px(a));
    ring.setAttribute("cy", py(b));
    relp.show(`${spec.words(known[i])}: ${spec.y} ${number(b)}, ${spec.x} ${number(a)}`, x, y);
  };
  const leave = () => { relp.hide(); ring.setAttribute("cx", -20); };
  const point = (event) => {
    const box = svg.getBoundingClientRect(), scale = (left + size + right) / box.width;
    const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    let best = -1, least = 15 ** 2;
    points.forEach(([a, b], i) => {
      const distance = (px(a) - x) ** 2 + (py(b) - y) ** 2;
      if (distance < least) [best, least] = [i, distance];
    });
    if (best < 0) leave();
    else at(best, event.clientX, event.clientY);
  };
  for (const kind of ["pointermove", "pointerdown"]) svg.addEventListener(kind, point);
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  let order = null, place = -1;
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!move || !points.length) return;
    event.preventDefault();
    order ??= points.map((_, i) => i).sort((i, j) => Math.abs(points[j][1] - points[j][0]) - Math.abs(points[i][1] - points[i][0]));
    place = Math.max(0, Math.min(order.length - 1, place + move));
    const box = svg.getBoundingClientRect();
    at(order[place], box.left + left, box.top);
  });
  const figure = make("figure");
  figure.append(make("figcaption", {}, spec.title), svg);
  return figure;
};

// Panels over the rows of a table: those of one kind, a column of it against another. set: table, panels of {title, kind, x, y}.
for (const root of document.querySelectorAll("[data-scatter]")) {
  const set = relp.data.scatters[root.dataset.scatter], table = relp.data.tables[set.table], kind = table.columns.indexOf("kind");
  for (const panel of set.panels) {
    const rows = table.rows.filter((row) => row[kind] === panel.kind);
    const [x, y] = [table.columns.indexOf(panel.x), table.columns.indexOf(panel.y)];
    const words = (i) => set.words.map((name) => [name, rows[i][table.columns.indexOf(name)]])
      .filter(([, value]) => value !== null && value !== undefined && value !== "*").map(([name, value]) => (name === "layer" || name === "unit" ? `${name} ${value}` : value)).join(", ");
    root.append(relp.scatter({ ...panel, points: rows.map((row) => [row[x], row[y]]), words }));
  }
}
