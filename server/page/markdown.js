// A little Markdown, built of DOM nodes: paragraphs, headings, lists, code. Text from a model is never parsed as HTML.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)/;
const ITEM = /^(\s*)(?:([-*+])|(\d{1,9})[.)])\s+(.*)$/;
const HEADING = /^#{1,6}\s+(.*?)\s*#*$/;
const INLINE = /(`+)([^`]+)\1|\*\*(?=\S)(.+?)\*\*|(?<![\w*])\*(?=[^\s*])([^*]+)\*(?![\w*])/s;

function element(tag, ...children) {
  const made = document.createElement(tag);
  made.append(...children);
  return made;
}

function inline(text) {
  const nodes = [];
  for (let match; (match = INLINE.exec(text)); text = text.slice(match.index + match[0].length)) {
    const [, , code, bold, italic] = match;
    nodes.push(text.slice(0, match.index));
    if (code) nodes.push(element("code", code));
    else nodes.push(element(bold ? "strong" : "em", ...inline(bold || italic)));
  }
  return [...nodes, text];
}

// The source cut into blocks, each a list of lines. A fence that is still open reaches to the end.
function split(source) {
  const blocks = [];
  let block = null, fence = "";
  for (const line of source.split("\n")) {
    const opening = FENCE.exec(line);
    if (fence) {
      block.push(line);
      if (line.trim().startsWith(fence) && !line.trim().slice(fence.length).trim()) fence = "", block = null;
    } else if (opening) {
      fence = opening[1];
      blocks.push((block = [line]));
    } else if (!line.trim()) block = null;
    else if (HEADING.test(line)) blocks.push([line]), (block = null);
    else if (block && ITEM.test(line) === ITEM.test(block[0])) block.push(line);
    else if (block && ITEM.test(block[0]) && /^\s{2,}/.test(line)) block.push(line);
    else blocks.push((block = [line]));
  }
  return blocks;
}

function code(lines) {
  const [, fence, language] = FENCE.exec(lines[0]);
  const closed = lines.length > 1 && lines.at(-1).trim().startsWith(fence);
  const text = lines.slice(1, closed ? -1 : undefined).join("\n");
  const copy = element("button", "Copy");
  Object.assign(copy, { type: "button", ariaLabel: "Copy the code" });
  copy.dataset.act = "copy-code";
  const pre = element("pre", element("code", text));
  pre.tabIndex = 0; // so that wide lines can be scrolled with the keyboard
  const made = element("div", element("p", element("span", language), copy), pre);
  made.className = "code";
  return made;
}

// Items keep their own numbers, so that a list goes on after what stands between its items.
function list(lines) {
  const made = element(ITEM.exec(lines[0])[3] ? "ol" : "ul");
  for (const line of lines) {
    const match = ITEM.exec(line);
    if (!match) {
      made.lastChild.append(" ", ...inline(line.trim()));
      continue;
    }
    const item = element("li", ...inline(match[4]));
    item.className = `level${Math.min(3, match[1].length >> 1)}${match[2] ? " bullet" : ""}`;
    if (match[3]) item.value = Number(match[3]);
    made.append(item);
  }
  return made;
}

function build(lines) {
  if (FENCE.test(lines[0])) return code(lines);
  if (HEADING.test(lines[0])) return element("h3", ...inline(HEADING.exec(lines[0])[1]));
  return ITEM.test(lines[0]) ? list(lines) : element("p", ...inline(lines.join("\n")));
}

// Shows the source in `place`. Blocks that did not change keep their nodes: a selection in them survives.
export function render(place, source) {
  const blocks = split(source);
  blocks.forEach((lines, i) => {
    const old = place.children[i], text = lines.join("\n");
    if (old?.source === text) return;
    const made = build(lines);
    made.source = text;
    old ? old.replaceWith(made) : place.append(made);
  });
  while (place.children.length > blocks.length) place.lastElementChild.remove();
}
