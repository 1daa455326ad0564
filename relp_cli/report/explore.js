// A run's units in one table, and one threshold over the table and the heatmaps.
if (relp.byId("explore")) (() => {
  const { data, byId, number } = relp;
  const [KIND, LAYER, POSITION, SCORE] = ["kind", "layer", "position", "score"].map((name) => data.columns.indexOf(name));
  const token = (position) => {
    const at = data.labels.indexOf(position);
    return at >= 0 && data.tokens[at] && data.tokens[at].trim() !== position ? ` ${relp.quote(data.tokens[at])}` : "";
  };
  const types = data.columns.map((name) => (["kind", "position"].includes(name) ? "text" : ["score", "se"].includes(name) ? "float" : "int"));
  const names = { score: "score (by size)", se: "± s.e." };
  const spec = { columns: data.columns.map((name) => names[name] ?? name), types, rows: data.rows, of: data.of, file: "scores.csv", by: SCORE,
    sizes: [SCORE], digits: 4, title: "the units" };
  const text = (value, at) => (at === POSITION ? `${value}${token(value)}` : undefined);
  const table = relp.table(byId("units"), spec, { text });

  // How many units the threshold keeps, and what was measured of the nearest circuit of the sweep.
  const slider = byId("tau"), cells = new Map();
  for (const rect of document.querySelectorAll("#scores rect"))
    cells.set(`${rect.ownerSVGElement.dataset.kind} ${rect.dataset.layer} ${rect.dataset.at}`, rect);
  slider.max = data.steps.length - 1;
  slider.value = slider.max;
  const move = () => {
    const everything = +slider.value === data.steps.length - 1;
    const [tau, count] = everything ? [0, data.steps.at(-1)[1]] : data.steps[slider.value];
    let line = everything ? `all ${data.of} units` : `τ = ${number(tau)}: ${count} of ${data.of} units with |score| > τ`;
    if (data.curve.length && !everything) {
      const distance = (row) => Math.abs(Math.log((row.tau || 1e-12) / (tau || 1e-12)));
      const near = data.curve.reduce((best, row) => (distance(row) < distance(best) ? row : best));
      line += `; measured at τ = ${number(near.tau)} (${near.n_nodes} of ${near.n_possible}): faithfulness ${number(near.faithfulness, 2)} `
        + `[${number(near.faithfulness_lo, 2)}, ${number(near.faithfulness_hi, 2)}], completeness ${number(near.completeness, 2)}`;
    }
    byId("tau-line").textContent = line;
    slider.setAttribute("aria-valuetext", line);
    for (const rect of document.querySelectorAll("#scores rect.kept")) rect.classList.remove("kept");
    if (!everything)
      for (const row of data.rows) {
        if (Math.abs(row[SCORE]) <= tau) break;
        cells.get(`${row[KIND]} ${row[LAYER]} ${data.labels.indexOf(row[POSITION])}`)?.classList.add("kept");
      }
    table.keep(everything ? null : (row) => Math.abs(row[SCORE]) > tau);
  };
  slider.addEventListener("input", move);
  move();
})();
