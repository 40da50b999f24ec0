// Tokens/s and weights skipped over an answer's tokens, as one SVG: an area, a line, and dashes for what was set.

const SVG = "http://www.w3.org/2000/svg";
const WINDOW = 800; // ms over which tokens/s is taken: steady enough to read, quick enough to see the dial act
const MOST = 400; // points drawn

function shape(tag, attributes, text = "") {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

// The least of 1, 2, 5, 10, 20, … that is not below the value.
function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
  return [1, 2, 3, 4, 5, 6, 8, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}

export class Plot {
  constructor(place) {
    this.place = place;
    this.points = [];
    new ResizeObserver(() => this.draw()).observe(place);
  }

  clear() {
    this.points = [];
    this.draw();
  }

  // One token's reading; returns what the numbers beside the plot should say. The prompt made the first token, densely.
  add({ nominal, achieved, tokens }, now = performance.now()) {
    if (tokens === 1) nominal = null;
    const start = this.points.findLast((point) => now - point.now > WINDOW) ?? this.points[0];
    const speed = start && now > start.now ? (1000 * (tokens - start.tokens)) / (now - start.now) : null;
    const recent = this.points.slice(-7).filter((point) => point.nominal === nominal); // since the dial was turned
    const known = [...recent.map((point) => point.raw), achieved].filter((value) => value != null);
    const mean = known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null; // of eight tokens
    const settled = start && now - start.now > WINDOW / 2 ? speed : null;
    this.points.push({ now, tokens, nominal, raw: achieved, achieved: mean, speed: settled });
    return { tokens, nominal, speed: settled, achieved: mean };
  }

  draw() {
    const width = this.place.clientWidth, height = this.place.clientHeight;
    if (!width || !height) return;
    const box = { left: 38, right: width - 30, top: 8, bottom: height - 20 };
    const stride = Math.ceil(this.points.length / MOST) || 1;
    const points = this.points.filter((_, i) => i % stride === 0 || i === this.points.length - 1);
    const last = Math.max(points.at(-1)?.tokens ?? 0, 16);
    const fastest = ceiling(Math.max(...points.map((point) => point.speed ?? 0), 4));
    const x = (tokens) => box.left + (tokens / last) * (box.right - box.left);
    const y = (share) => box.bottom - share * (box.bottom - box.top);
    const line = (value) => {
      const known = points.filter((point) => value(point) != null);
      return known.map((point) => `${x(point.tokens).toFixed(1)},${y(value(point)).toFixed(1)}`).join(" ");
    };
    const achieved = line((point) => point.achieved);
    const area = achieved && `${achieved.split(",", 1)},${box.bottom} ${achieved} ${x(points.at(-1).tokens)},${box.bottom}`;
    this.place.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.place.replaceChildren(
      ...this.axes(box, y, fastest, height < 90 ? [0, 1] : [0, 0.5, 1]),
      shape("text", { x: box.left, y: height - 4 }, "0"),
      shape("text", { x: box.right, y: height - 4, class: "end" }, `${last} tokens`),
      shape("polygon", { points: area, class: "achieved-area" }),
      shape("polyline", { points: line((point) => point.nominal), class: "set-line" }),
      shape("polyline", { points: achieved, class: "achieved-line" }),
      shape("polyline", { points: line((point) => point.speed && point.speed / fastest), class: "speed-line" }),
    );
  }

  axes(box, y, fastest, shares) {
    return shares.flatMap((share) => [
      shape("line", { x1: box.left, x2: box.right, y1: y(share), y2: y(share), class: "grid" }),
      shape("text", { x: box.left - 6, y: y(share) + 4, class: "end achieved-label" }, `${100 * share}%`),
      shape("text", { x: box.right + 6, y: y(share) + 4, class: "speed-label" }, `${fastest * share}`),
    ]);
  }
}
