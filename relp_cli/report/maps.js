// Heatmaps: a cell for each layer and column; pointer or arrow keys show its value.
// spec: kind, title, mean [layer][column], labels, limit (the largest |value| of the colour scale), describe(layer, column).
relp.heat = (spec) => {
  const { make } = relp;
  const layers = spec.mean.length, columns = spec.labels.length, longest = Math.max(...spec.labels.map((l) => l.length));
  const wide = spec.wide ?? (columns > 24 ? Math.max(7, 620 / columns) : Math.min(24, Math.max(15, 288 / columns))), high = layers > 40 ? Math.max(5, 560 / layers) : 14, top = 13;
  const every = Math.ceil(12 / wide), shownAt = (label) => (label.length > 26 ? `${label.slice(0, 25)}…` : label);
  const left = Math.max(32, ...spec.labels.map((label, at) => 2.9 * shownAt(label).length - wide * at)), below = 12 + Math.min(124, longest < 3 ? 10 : 4.7 * longest);
  const width = left + wide * columns + 14, height = top + high * layers + below + (spec.unit ? 12 : 0);
  const svg = make("svg", { width, height, viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "img", "data-kind": spec.kind,
    "aria-label": `${spec.title}: score per layer and column; arrow keys move over the cells` });
  const cells = [];
  spec.mean.forEach((row, layer) => row.forEach((value, at) => {
    const rect = make("rect", { x: left + wide * at, y: top + high * layer, width: wide - (wide > 9 ? 1 : 0.3), height: high - (high > 9 ? 1 : 0.3),
      "data-layer": layer, "data-at": at });
    const share = spec.limit && value !== null ? Math.sqrt(Math.min(1, Math.abs(value) / spec.limit)) : 0;  // one large value leaves others visible
    rect.style.fill = `color-mix(in srgb, var(${value < 0 ? "--neg" : "--pos"}) ${(100 * share).toFixed(1)}%, var(--panel))`;
    cells.push(rect);
    svg.append(rect);
  }));
  for (let layer = 0; layer < layers; layer += Math.ceil(layers / 16))
    svg.append(make("text", { x: left - 6, y: top + high * layer + high / 2 + 4, "text-anchor": "end" }, String(layer)));
  svg.append(make("text", { x: left - 6, y: 9, "text-anchor": "end" }, "layer"));
  if (spec.unit) svg.append(make("text", { x: left + (wide * columns) / 2, y: height - 3, "text-anchor": "middle" }, spec.unit));
  spec.labels.forEach((label, at) => {
    if (at % every) return;
    const x = left + wide * at + wide / 2 + 3, y = top + high * layers + 10;
    const turn = longest < 3 ? { x: x - 3, y: y + 4, "text-anchor": "middle" } : { x, y, transform: `rotate(-60 ${x} ${y})`, "text-anchor": "end" };
    svg.append(make("text", turn, shownAt(label)));
  });
  let current = 0;
  const leave = () => { relp.hide(); cells[current].classList.remove("at"); };
  const at = (index, x, y) => {
    cells[current].classList.remove("at");
    current = index;
    cells[current].classList.add("at");
    relp.show(spec.describe(Math.floor(index / columns), index % columns), x, y);
  };
  const point = (event) => {
    const { layer, at: column } = event.target.dataset;
    if (layer === undefined) relp.hide();
    else at(+layer * columns + +column, event.clientX, event.clientY);
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);  // a tap
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  const move = (step) => {
    const box = cells[current + step].getBoundingClientRect();
    at(current + step, box.right, box.bottom);
  };
  svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) move(0); });
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (step === undefined || !cells[current + step]) return;
    event.preventDefault();
    move(step);
  });
  return svg;
};

// The colours' meaning: from −limit over 0 to +limit, in depth the square root; half of the depth is a quarter of the limit.
relp.scale = (limit, beyond) => {
  const { make, number } = relp, box = make("span", { class: "scale" }), bar = make("i");
  const end = beyond ? " and beyond" : "";
  for (const sign of ["−", "+"]) bar.append(make("b", {}, `${sign}${number(limit / 4, 2)}`));
  box.append(make("span", {}, `−${number(limit, 2)}${end}`), bar, make("span", {}, `+${number(limit, 2)}${end}`),
    make("span", {}, "depth of colour: √|score|"));
  return box;
};

relp.label = (label, token) => (token && token.trim() !== label ? `${label} ${relp.quote(token)}` : label);

// A set of maps: rows of panels that share a colour scale. set: labels, tokens, rows; a row may have labels of its own.
relp.maps = (root, set) => {
  if (set.rows.every((row) => row.panels.length === 1)) root.classList.add("figures");
  for (const row of set.rows) {
    const labels = row.labels ?? set.labels.map((label, at) => relp.label(label, set.tokens[at]));
    const group = relp.make("section", { class: "maps" }), head = relp.make("h3", {}, row.title), panels = relp.make("div", { class: "figures" });
    head.append(relp.scale(row.limit, row.beyond));
    for (const panel of row.panels) {
      const describe = (layer, at) => {
        const error = panel.se?.[layer]?.[at] ?? null, n = row.n ? ` (n = ${row.n[at]})` : "";
        const others = row.panels.filter((other) => other !== panel).map((other) => `; ${other.name} ${relp.number(other.mean[layer][at])}`);
        const name = row.panels.length > 1 ? `${panel.name}: ` : "";
        const where = row.unit ? `layer ${layer}, ${row.unit} ${labels[at]}` : `layer ${layer}, ${labels[at]}`;
        return `${row.title}, ${where}: ${name}${relp.number(panel.mean[layer][at])}${error === null ? "" : ` ± ${relp.number(error)}`}${n}${others.join("")}`;
      };
      const figure = relp.make("figure"), many = row.panels.length, room = (1132 - 19 * (many - 1)) / many - 76;
      const wide = many > 1 && labels.length <= 24 ? Math.min(20, Math.max(9, room / labels.length)) : undefined;
      const svg = relp.heat({ kind: row.kind, title: `${row.title} ${panel.name}`, mean: panel.mean, labels, limit: row.limit, wide, unit: row.unit, describe });
      if (panel.title) figure.append(relp.make("figcaption", {}, panel.title));
      figure.append(svg);
      if (root.classList.contains("figures")) group.style.minWidth = `min(100%, ${Math.max(320, svg.getAttribute("width"))}px)`;
      panels.append(figure);
    }
    group.append(head, panels);
    root.append(group);
  }
};
for (const root of document.querySelectorAll("[data-maps]")) relp.maps(root, relp.data.sets[root.dataset.maps]);
