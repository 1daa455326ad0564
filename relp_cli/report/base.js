// What the page's scripts share. No library, no request.
"use strict";
const relp = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const SVG = ["svg", "rect", "text", "path", "line", "circle", "g", "title"];
  const make = (name, attributes = {}, text = "") => {
    const node = SVG.includes(name) ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== "") node.textContent = text;
    return node;
  };
  const number = (value, digits = 4) => {
    if (value === null || value === undefined) return "—";
    const size = Math.abs(value);
    return size === 0 || (size >= 10 ** -digits && size < 1e5) ? value.toFixed(digits) : value.toExponential(2);
  };

  // One line that follows the pointer, or the keyboard's place.
  const tip = byId("tip");
  const hide = () => { tip.hidden = true; };
  const show = (text, x, y) => {
    tip.textContent = text;
    tip.hidden = false;
    const right = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(4, Math.min(x + 14, right)) + window.scrollX}px`;
    const below = y + 16 + tip.offsetHeight < window.innerHeight ? y + 16 : y - tip.offsetHeight - 10;
    tip.style.top = `${below + window.scrollY}px`;
  };

  // A spreadsheet would run what begins like a formula: such text gets a quote before it, numbers stay numbers.
  const quoted = (value) => {
    if (value === null || value === undefined) return "";
    const text = typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const download = (name, rows) => {
    const text = rows.map((row) => row.map(quoted).join(",")).join("\n") + "\n";
    const link = make("a", { download: name, href: URL.createObjectURL(new Blob([text], { type: "text/csv" })) });
    link.click();
    URL.revokeObjectURL(link.href);
  };
  const visible = (token) => token.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll("\r", "␍");
  const quote = (token) => `‘${visible(token)}’`;
  return { data, byId, make, number, show, hide, download, visible, quote };
})();
