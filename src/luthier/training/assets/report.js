"use strict";
// Reading a curve with the pointer: the nearest step of every line, in one label.
for (const figure of document.querySelectorAll("figure.chart")) {
  const curves = JSON.parse(figure.dataset.curves);
  const area = figure.querySelector(".area");
  const cursor = area.appendChild(document.createElement("div"));
  const tip = area.appendChild(document.createElement("div"));
  cursor.className = "cursor";
  tip.className = "tip";
  cursor.hidden = tip.hidden = true;

  const nearest = (rows, across) => {
    let low = 0, high = rows.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (rows[middle][1] < across) low = middle; else high = middle;
    }
    return across - rows[low][1] < rows[high][1] - across ? rows[low] : rows[high];
  };

  const show = (event) => {
    const box = area.getBoundingClientRect();
    const across = Math.min(100, Math.max(0, 100 * (event.clientX - box.left) / box.width));
    const at = nearest(curves.series[0].rows, across);
    tip.replaceChildren();
    const title = tip.appendChild(document.createElement("b"));
    title.textContent = "step " + at[0].toLocaleString("en");
    for (const one of curves.series) {
      const row = nearest(one.rows, at[1]);
      const far = Math.abs(row[1] - at[1]) > 2;
      const line = tip.appendChild(document.createElement("div"));
      line.textContent = one.label + " " + row[3] + (far ? " (step " + row[0].toLocaleString("en") + ")" : "");
    }
    cursor.style.left = at[1] + "%";
    cursor.hidden = tip.hidden = false;
    const left = box.width * at[1] / 100;
    tip.style.left = (left + 12 + tip.offsetWidth > box.width ? Math.max(0, left - 12 - tip.offsetWidth) : left + 12) + "px";
  };
  area.addEventListener("pointermove", show);
  area.addEventListener("pointerdown", show);
  area.addEventListener("pointerleave", () => { cursor.hidden = tip.hidden = true; });
}
