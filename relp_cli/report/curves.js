// Curves: a measure of circuits against their size, on a log axis, with 95 % bands; pointer or arrow keys show a point's values.
// spec: noun, low, high (of the value axis), lines of {name, color, dash, weight, points [[size, value, low, high], …]}.
relp.curve = (measure, spec) => {
  const { make, number } = relp;
  const wide = 400, tall = 230, left = 40, right = 14, top = 8, below = 40;
  const sizes = spec.lines.flatMap((line) => line.points.map((point) => point[0])), positive = sizes.filter((x) => x > 0);
  const least = Math.min(...positive, Infinity) === Infinity ? 1 : Math.min(...positive), most = Math.max(...positive, least * 1.01);
  const zero = sizes.some((x) => x === 0) ? 34 : 8;  // circuits of 0 nodes have no place on a log axis: they stand left of it
  const clip = (y) => Math.min(spec.high, Math.max(spec.low, y));
  const px = (x) => (x > 0 ? left + zero + ((wide - zero - 8) * Math.log(x / least)) / Math.log(most / least) : left + 10);
  const py = (y) => top + (tall * (spec.high - clip(y))) / (spec.high - spec.low);
  const svg = make("svg", { class: "curve", width: left + wide + right, height: top + tall + below, role: "img", tabindex: 0,
    viewBox: `0 0 ${left + wide + right} ${top + tall + below}`, "data-measure": measure,
    "aria-label": `${spec.title}: ${measure} against the number of ${spec.noun}; left and right go along a line, up and down to another` });
  for (let y = Math.ceil(spec.low * 4) / 4; y <= spec.high + 1e-9; y += spec.high - spec.low > 2.5 ? 0.5 : 0.25)
    svg.append(make("path", { class: y === 0 || y === 1 ? "level" : "grid", d: `M${left} ${py(y)}H${left + wide}` }),
      make("text", { x: left - 6, y: py(y) + 3, "text-anchor": "end" }, y.toFixed(2).replace("-", "−")));
  const ticks = [];
  for (let k = Math.floor(Math.log10(least)); k <= Math.ceil(Math.log10(most)); k += 1)
    for (const step of most / least < 60 ? [1, 2, 5] : [1]) if (step * 10 ** k >= least * 0.999 && step * 10 ** k <= most * 1.001) ticks.push(step * 10 ** k);
  for (const x of [...(zero > 8 ? [0] : []), ...ticks])
    svg.append(make("path", { class: "grid", d: `M${px(x)} ${top}V${top + tall}` }),
      make("text", { x: px(x), y: top + tall + 14, "text-anchor": "middle" }, x.toLocaleString("en")));
  svg.append(make("text", { x: left + wide / 2, y: top + tall + 32, "text-anchor": "middle" }, `number of ${spec.noun}`));
  const marks = [];
  for (const line of spec.lines) {
    const on = line.points.filter(([x, y]) => x > 0 && y !== null), band = on.filter((point) => point[2] !== null && point[3] !== null);
    if (band.length > 1) {
      const up = band.map(([x, , low]) => `${px(x).toFixed(1)} ${py(low).toFixed(1)}`), down = band.map(([x, , , high]) => `${px(x).toFixed(1)} ${py(high).toFixed(1)}`);
      svg.append(make("path", { d: `M${up.join("L")}L${down.reverse().join("L")}Z`, fill: line.color, opacity: 0.18, class: "band" }));
    }
    if (on.length) svg.append(make("path", { d: `M${on.map(([x, y]) => `${px(x).toFixed(1)} ${py(y).toFixed(1)}`).join("L")}`, fill: "none", stroke: line.color,
      "stroke-width": line.weight, "stroke-dasharray": line.dash, opacity: line.weight < 1.2 ? 0.45 : 1, "stroke-linejoin": "round" }));
    if (line.weight > 1.2) for (const point of line.points) if (point[1] !== null) {
      svg.append(make("circle", { cx: px(point[0]), cy: py(point[1]), r: 2.6, fill: point[0] > 0 ? line.color : "none", stroke: line.color }));
      marks.push({ line, point });
    }
  }
  const ring = make("circle", { r: 5.5, class: "ring", cx: -20, cy: -20 });
  svg.append(ring);
  const show = ({ line, point: [x, value, low, high] }, clientX, clientY) => {
    ring.setAttribute("cx", px(x));
    ring.setAttribute("cy", py(value));
    const between = low === null || high === null ? "" : ` [${number(low, 3)}, ${number(high, 3)}]`;
    relp.show(`${line.name}, ${number(x, 0)} ${spec.noun}: ${measure} ${number(value, 3)}${between}`, clientX, clientY);
  };
  const leave = () => { relp.hide(); ring.setAttribute("cx", -20); };
  const point = (event) => {
    const box = svg.getBoundingClientRect(), scale = (left + wide + right) / box.width;
    const away = ({ point: [x, y] }) => (px(x) - (event.clientX - box.left) * scale) ** 2 + (py(y) - (event.clientY - box.top) * scale) ** 2;
    const best = marks.reduce((a, b) => (a && away(a) <= away(b) ? a : b), null);
    if (best && away(best) < 400) show(best, event.clientX, event.clientY);
    else leave();
  };
  for (const kind of ["pointermove", "pointerdown"]) svg.addEventListener(kind, point);
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  let at = -1;
  svg.addEventListener("keydown", (event) => {
    const along = { ArrowRight: 1, ArrowLeft: -1 }[event.key], lines = [...new Set(marks.map((mark) => mark.line))];
    const across = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if ((!along && !across) || !marks.length) return;
    event.preventDefault();
    if (along || at < 0) at = Math.max(0, Math.min(marks.length - 1, at + (along ?? 1)));
    else at = marks.findIndex((mark) => mark.line === lines[(lines.indexOf(marks[at].line) + across + lines.length) % lines.length]);
    const box = svg.getBoundingClientRect();
    show(marks[at], box.left + (px(marks[at].point[0]) * box.width) / (left + wide + right), box.top + 20);
  });
  return svg;
};

for (const root of document.querySelectorAll("[data-curves]")) {
  for (const panel of relp.data.curves[root.dataset.curves] ?? []) {
    const { make } = relp, group = make("section", { class: "curves" }), legend = make("div", { class: "legend" }), both = make("div", { class: "figures" });
    const named = panel.measures[0].lines.filter((line) => line.weight > 1.2);
    for (const line of named) {
      const key = make("span"), sample = make("svg", { width: 28, height: 8, viewBox: "0 0 28 8", "aria-hidden": "true" });
      sample.append(make("path", { d: "M0 4H28", stroke: line.color, "stroke-width": 2.2, "stroke-dasharray": line.dash }));
      key.append(sample, ` ${line.name}`);
      legend.append(key);
    }
    for (const measure of panel.measures) {
      const figure = make("figure");
      figure.append(make("figcaption", {}, measure.name + (measure.beyond ? ` (${measure.beyond} points beyond the axis stand at its edge)` : "")),
        relp.curve(measure.name, { ...measure, title: panel.title, noun: panel.noun }));
      both.append(figure);
    }
    group.append(make("h3", {}, panel.title), ...(panel.note ? [make("p", { class: "soft" }, panel.note)] : []), legend, both);
    root.append(group);
  }
}
