// Values with intervals: a row for each, its name on the left and its number on the right.
// spec: title, low, high (of the axis), groups of {name, rows of {name, value, low, high, color, why}}.
relp.intervals = (spec) => {
  const { make, number } = relp;
  const left = 112, wide = 186, right = 44, row = 20, below = 20;
  const heads = spec.groups.length > 1 ? spec.groups.length : 0, count = spec.groups.reduce((n, group) => n + group.rows.length, 0);
  const tall = row * (count + heads), px = (x) => left + (wide * (Math.min(spec.high, Math.max(spec.low, x)) - spec.low)) / (spec.high - spec.low);
  const svg = make("svg", { class: "intervals", width: left + wide + right, height: tall + below, viewBox: `0 0 ${left + wide + right} ${tall + below}`, role: "img", tabindex: 0,
    "aria-label": `${spec.title}: ${spec.groups.flatMap((group) => group.rows.map((r) => `${heads ? `${group.name}, ` : ""}${r.name} ${number(r.value, 3)}`)).join("; ")}` });
  const size = spec.high - spec.low, step = [0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10, 20, 50, 100].find((s) => size / s <= 5) ?? size;
  for (let k = Math.ceil(spec.low / step - 1e-9); k * step <= spec.high + 1e-9; k += 1)
    svg.append(make("path", { class: k ? "grid" : "axis", d: `M${px(k * step)} 0V${tall}` }),
      make("text", { x: px(k * step), y: tall + 14, "text-anchor": "middle" }, String(+(k * step).toFixed(2)).replace("-", "−")));
  let y = 0;
  for (const group of spec.groups) {
    if (heads) svg.append(make("text", { x: 0, y: y + 15, class: "head" }, group.name));
    y += heads ? row : 0;
    for (const one of group.rows) {
      const middle = y + row / 2, line = make("g", { class: "one" }), cut = one.name.length > 17 ? `${one.name.slice(0, 16)}…` : one.name;
      line.append(make("rect", { x: 0, y, width: left + wide + right, height: row, fill: "transparent" }), make("text", { x: left - 8, y: middle + 4, "text-anchor": "end", class: "name" }, cut));
      if (one.value === null) line.append(make("text", { x: left + 4, y: middle + 4 }, "n/a"));
      else {
        if (one.low !== null) line.append(make("path", { d: `M${px(one.low)} ${middle}H${px(one.high)}`, stroke: one.color, class: "range" }));
        line.append(make("circle", { cx: px(one.value), cy: middle, r: 4.5, fill: one.color }),
          make("text", { x: left + wide + right, y: middle + 4, "text-anchor": "end", class: "name" }, number(one.value, 3)));
      }
      const sure = one.low === null ? "" : ` [${number(one.low, 3)}, ${number(one.high, 3)}]`;
      const text = `${heads ? `${group.name}, ` : ""}${one.name}: ${number(one.value, 3)}${sure}${one.why ? `; ${one.why}` : ""}`;
      for (const kind of ["pointermove", "pointerdown"]) line.addEventListener(kind, (event) => relp.show(text, event.clientX, event.clientY));
      svg.append(line);
      y += row;
    }
  }
  svg.addEventListener("pointerleave", relp.hide);
  const figure = make("figure");
  figure.append(make("figcaption", {}, spec.title), svg);
  return figure;
};
for (const root of document.querySelectorAll("[data-intervals]"))
  root.append(...relp.data.intervals[root.dataset.intervals].map(relp.intervals));
