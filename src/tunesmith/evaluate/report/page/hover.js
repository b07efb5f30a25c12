"use strict";
// Shows the values under the pointer, or at the place that the arrow keys chose.
for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const data = JSON.parse(figure.dataset.chart), plot = figure.querySelector(".plot");
  const tip = figure.querySelector(".tip"), cursor = figure.querySelector(".cursor");
  const steps = [...new Set(data.series.flatMap(s => s.points.map(p => p[0])))].sort((a, b) => a - b);
  const near = (points, x) => points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
  let at = -1;
  const hide = () => { tip.hidden = true; cursor.setAttribute("d", ""); at = -1; };
  const show = index => {
    at = Math.max(0, Math.min(steps.length - 1, index));
    const x = steps[at], share = (x - data.x[0]) / (data.x[1] - data.x[0]);
    cursor.setAttribute("d", `M${1000 * share} 0V400`);
    tip.replaceChildren(`step ${x.toLocaleString("en")}`);
    for (const series of data.series) {
      const [px, py] = near(series.points, x);
      const line = document.createElement("div"), color = document.createElement("i");
      color.className = `s${series.color}`;
      const place = px === x ? "" : ` (step ${px.toLocaleString("en")})`;
      line.append(color, `${series.name} ${py.toLocaleString("en", {maximumSignificantDigits: 4})}${place}`);
      tip.append(line);
    }
    tip.hidden = false;
    tip.style.left = share < 0.5 ? `calc(${100 * share}% + 10px)` : "auto";
    tip.style.right = share < 0.5 ? "auto" : `calc(${100 - 100 * share}% + 10px)`;
  };
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect();
    const x = data.x[0] + (data.x[1] - data.x[0]) * (event.clientX - box.left) / box.width;
    show(steps.indexOf(near(steps.map(s => [s]), x)[0]));
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", event => {
    const move = {ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9}[event.key];
    if (move === undefined) { if (event.key === "Escape") hide(); return; }
    event.preventDefault();
    show(at < 0 && move === 1 ? 0 : at + move);
  });
}
addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("details.fold:not([open])")) { fold.open = true; fold.dataset.printed = ""; }
});
addEventListener("afterprint", () => {
  for (const fold of document.querySelectorAll("details[data-printed]")) { fold.open = false; delete fold.dataset.printed; }
});
