// Single pairs: one is chosen; its prompts token by token, what the model does on them, and its own scores.
if (relp.byId("pairs")) (() => {
  const { data, byId, make, number, quote } = relp, all = data.pairs, select = byId("pair-choice"), place = byId("pair");
  all.pairs.forEach((pair, i) => {
    const text = pair.original.map(relp.visible).join(pair.original.some((token) => token.startsWith(" ")) ? "" : " ").trim();
    select.append(make("option", { value: i }, `${i + 1}: ${text.length > 90 ? `…${text.slice(-89)}` : text}`));
  });
  const words = (choice) => choice.words.map(quote).join(", ") + (choice.of > choice.words.length ? ` … (${choice.of} words)` : "") || "—";

  const prompts = (pair, roles) => {
    const table = make("table", { class: "tokens" }), body = make("tbody");
    const line = (title, cells) => {
      const tr = make("tr");
      tr.append(make("th", { scope: "row" }, title), ...cells);
      body.append(tr);
    };
    line("role", roles.map((role) => make("td", { class: "soft" }, role)));
    const differs = (at) => pair.patch && pair.patch[at] !== pair.original[at];
    const cells = (tokens) => tokens.map((token, at) => {
      const td = make("td", { class: "mono" });
      td.append(differs(at) ? make("mark", { title: "the prompts differ here" }, relp.visible(token)) : make("span", {}, relp.visible(token)));
      return td;
    });
    line("clean", cells(pair.original));
    if (pair.patch) line("corrupted", cells(pair.patch));
    table.append(body);
    const scroll = make("div", { class: "scroll", tabindex: 0 });
    scroll.append(table);
    return scroll;
  };

  const facts = (pair) => {
    const list = make("dl", { class: "tiles" });
    const tile = (name, value) => {
      const box = make("div");
      box.append(make("dt", {}, name), make("dd", {}, value));
      list.append(box);
    };
    tile("answer", words(pair.answer));
    tile("foil", words(pair.foil));
    tile(`${all.metric} on the clean prompt`, number(pair.metric_original, 3));
    if (pair.patch) tile(`${all.metric} on the corrupted prompt`, number(pair.metric_patch, 3));
    tile("the model prefers the answer", pair.correct ? "yes" : "no");
    return list;
  };

  const draw = () => {
    const i = +select.value, pair = all.pairs[i], roles = all.roles[pair.batch], parts = [prompts(pair, roles), facts(pair)];
    byId("pair-earlier").disabled = i === 0;
    byId("pair-later").disabled = i === all.pairs.length - 1;
    if (pair.scored) {
      const own = [...new Set(roles)].filter((role) => all.labels.includes(role));  // repeated roles share a column
      const columns = own.map((role) => all.labels.indexOf(role));
      const at = (tokens, role) => tokens.filter((_, k) => roles[k] === role).map(quote).join("");
      const labels = own.map((role) => at(pair.original, role));
      const maps = make("div", { class: "figures" });
      for (const map of all.maps) {
        const mean = map.pairs[i].map((row) => columns.map((column) => row[column]));
        const limit = Math.max(...mean.flat().map((v) => Math.abs(v ?? 0))) || 1;
        const describe = (layer, k) => {
          const before = pair.patch && at(pair.patch, own[k]) !== labels[k] ? ` → ${at(pair.patch, own[k])}` : "";
          const error = map.se ? ` ± ${number(map.se[layer][columns[k]])}` : "";
          return `${map.title}, layer ${layer}, ${own[k]} ${labels[k]}${before}: ${number(mean[layer][k])} in this pair; `
            + `mean ${number(map.mean[layer][columns[k]])}${error} over ${all.n[columns[k]]} pairs`;
        };
        const figure = make("figure"), caption = make("figcaption", {}, map.title);
        caption.append(" ", relp.scale(limit));
        figure.append(caption, relp.heat({ kind: `pair-${map.kind}`, title: `${map.title} of this pair`, mean, labels, limit, describe }));
        maps.append(figure);
      }
      const rows = all.top[i].map(([unit, score]) => {
        const [kind, layer, position, which, mean, se] = all.units[unit];
        return [kind, layer, own.includes(position) ? `${position} ${at(pair.original, position)}` : position, which, score, mean, se];
      });
      const strongest = make("div"), columnNames = [...all.columns.slice(0, 4), "score in this pair", "mean", "± s.e."];
      relp.table(strongest, { title: "this pair's units", columns: columnNames, types: ["text", "int", "text", "text", "float", "float", "float"],
        rows, file: `pair-${i + 1}.csv`, by: 4, sizes: [4, 5], digits: 4 });
      parts.push(maps, make("h3", { class: "gap" }, "Strongest units of this pair"), strongest);
    }
    place.replaceChildren(...parts);
  };
  const go = (step) => {
    select.value = Math.max(0, Math.min(all.pairs.length - 1, +select.value + step));
    draw();
  };
  select.addEventListener("change", draw);
  byId("pair-earlier").addEventListener("click", () => go(-1));
  byId("pair-later").addEventListener("click", () => go(1));
  byId("pair-count").textContent = `${all.pairs.length} pairs${all.note ? ` (${all.note})` : ""}`;
  draw();
})();
