"""A page in a real browser: headless Chromium, where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium here: apt-get install chromium")
HELPERS = """
const told = {};
const all = (query) => [...document.querySelectorAll(query)];
const set = (node, value, kind = "input") => { node.value = value; node.dispatchEvent(new Event(kind)); };
const rows = (query) => all(`${query} tbody tr`).map((r) => [...r.children].map((c) => c.textContent));
const hover = (node, x = 5, y = 5) => {
  node.dispatchEvent(new PointerEvent("pointermove", { bubbles: true, clientX: x, clientY: y }));
  return document.getElementById("tip").textContent;
};
const cell = (kind, layer, at) => document.querySelector(`svg[data-kind="${kind}"] rect[data-layer="${layer}"][data-at="${at}"]`);
"""


def told(page: Path, driver: str) -> dict[str, Any]:
    """What `driver` (JavaScript) put into `told`, after the page's own script ran. Fails where the console says anything."""
    end = 'document.body.append(Object.assign(document.createElement("pre"), { id: "told", textContent: JSON.stringify(told) }));'
    driven = page.with_suffix(".driven.html")
    driven.write_text(page.read_text().replace("</body>", f"<script>{HELPERS}{driver}{end}</script></body>"))
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom")
    command: list[Any] = [BROWSER, *flags, driven.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    found = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.S)
    assert found is not None
    text = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    content: dict[str, Any] = json.loads(text)
    return content
