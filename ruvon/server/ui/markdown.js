// Markdown as models write it → elements. No HTML passes through: whatever is no markup is text.

import { copy, h } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(\s+|$)(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const MOST_DEPTH = 12; // of lists and quotes in each other

/** A text's blocks. */
export function markdown(text) {
  return blocks(text.split("\n"), 0);
}

function blocks(lines, depth) {
  const made = [];
  let at = 0;
  while (at < lines.length) {
    const [block, next] = take(lines, at, depth);
    if (block) made.push(block);
    at = next;
  }
  return made;
}

/** The block that begins at a line, and the line after it. */
function take(lines, at, depth) {
  const line = lines[at];
  if (!line.trim()) return [null, at + 1];
  const fence = FENCE.exec(line);
  if (fence) return code(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return [h(`h${Math.min(heading[1].length + 2, 6)}`, null, inline(heading[2])), at + 1];
  if (RULE.test(line)) return [h("hr"), at + 1];
  if (depth < MOST_DEPTH && QUOTE.test(line)) return quote(lines, at, depth);
  if (depth < MOST_DEPTH && ITEM.test(line)) return list(lines, at, depth);
  if (line.includes("|") && at + 1 < lines.length && DIVIDER.test(lines[at + 1]) && lines[at + 1].includes("-")) {
    return table(lines, at);
  }
  return paragraph(lines, at, depth);
}

function code(lines, at, [, mark, language]) {
  const end = lines.findIndex(
    (line, i) => i > at && line.trim().startsWith(mark[0].repeat(mark.length)) && !line.trim().replaceAll(mark[0], ""),
  );
  const stop = end < 0 ? lines.length : end;
  const text = lines.slice(at + 1, stop).join("\n");
  const button = h("button", { type: "button", onclick: () => copy(text) }, "copy");
  const head = h("figcaption", null, h("span", null, language || "text"), button);
  return [h("figure", { class: "code" }, head, h("pre", { tabindex: "0" }, h("code", null, text))), stop + 1];
}

function quote(lines, at, depth) {
  const inner = [];
  while (at < lines.length && QUOTE.test(lines[at])) inner.push(QUOTE.exec(lines[at++])[1]);
  return [h("blockquote", null, blocks(inner, depth + 1)), at];
}

/** Items of one kind; what is indented further belongs to the item before. */
function list(lines, at, depth) {
  const [, margin, mark] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(mark);
  const items = [];
  let loose = false;
  while (at < lines.length) {
    const found = ITEM.exec(lines[at]);
    if (
      found &&
      found[1].length <= margin.length + 1 &&
      found[1].length >= margin.length &&
      /\d/.test(found[2]) === ordered
    ) {
      items.push([found[4]]);
    } else if (items.length && /^\s/.test(lines[at]) && lines[at].trim()) {
      items.at(-1).push(lines[at].replace(new RegExp(`^ {0,${margin.length + mark.length + 1}}`), ""));
    } else if (!lines[at].trim() && continues(lines[at + 1], margin.length)) {
      items.at(-1).push("");
      loose = true;
    } else break;
    at++;
  }
  const made = items.map((item) =>
    h("li", null, item.some((line) => !line.trim()) || item.length > 1 ? blocks(item, depth + 1) : inline(item[0])),
  );
  const start = ordered ? parseInt(mark, 10) : null;
  return [h(ordered ? "ol" : "ul", { start: start === 1 ? null : start, class: loose ? "loose" : null }, made), at];
}

function continues(line, margin) {
  return line !== undefined && (ITEM.test(line) || line.startsWith(" ".repeat(margin + 2)));
}

function table(lines, at) {
  const cells = (line) =>
    line
      .trim()
      .replace(/^\||\|$/g, "")
      .split(/(?<!\\)\|/)
      .map((cell) => cell.trim().replaceAll("\\|", "|"));
  const sides = cells(lines[at + 1]).map((cell) =>
    cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : null,
  );
  const row = (line, tag) =>
    h(
      "tr",
      null,
      cells(line).map((cell, i) => h(tag, { class: sides[i] }, inline(cell))),
    );
  const head = row(lines[at], "th");
  const body = [];
  for (at += 2; at < lines.length && lines[at].includes("|"); at++) body.push(row(lines[at], "td"));
  return [
    h("div", { class: "scroll", tabindex: "0" }, h("table", null, h("thead", null, head), h("tbody", null, body))),
    at,
  ];
}

function paragraph(lines, at, depth) {
  const begin = at++;
  while (
    at < lines.length &&
    lines[at].trim() &&
    !FENCE.test(lines[at]) &&
    !HEADING.test(lines[at]) &&
    !QUOTE.test(lines[at]) &&
    !(depth < MOST_DEPTH && ITEM.test(lines[at]))
  )
    at++;
  const parts = lines.slice(begin, at).map((line, i) => [i ? h("br") : null, inline(line)]);
  return [h("p", null, parts), at];
}

const INLINE = [
  [/^(`+)([\s\S]*?[^`])\1(?!`)/, (m) => h("code", null, m[2].trim())],
  [/^\\([\\`*_{}[\]()#+\-.!~|>])/, (m) => m[1]],
  [/^\*\*\*(?=\S)([\s\S]*?\S)\*\*\*/, (m) => h("strong", null, h("em", null, inline(m[1])))],
  [/^\*\*(?=\S)([\s\S]*?\S)\*\*(?!\*)/, (m) => h("strong", null, inline(m[1]))],
  [/^__(?=\S)([\s\S]*?\S)__(?!\w)/, (m) => h("strong", null, inline(m[1]))],
  [/^\*(?=[^\s*])([^*]*?[^\s*])\*(?!\*)/, (m) => h("em", null, inline(m[1]))],
  [/^_(?=[^\s_])([^_]*?[^\s_])_(?!\w)/, (m) => h("em", null, inline(m[1]))],
  [/^~~(?=\S)([\s\S]*?\S)~~/, (m) => h("del", null, inline(m[1]))],
  [/^!?\[([^\]]*)\]\(\s*<?([^\s<>)]+)>?(?:\s+"[^"]*")?\s*\)/, (m) => link(m[2], m[1])],
  [/^<(https?:\/\/[^\s<>]+)>/, (m) => link(m[1], m[1])],
  [/^https?:\/\/[^\s<>"'`]*[^\s<>"'`.,;:!?)\]]/, (m) => link(m[0], m[0])],
];

/** A line's text, with what is emphasised. */
function inline(text) {
  const made = [];
  let plain = "";
  let at = 0;
  while (at < text.length) {
    const rest = text.slice(at);
    const inWord = /\w$/.test(plain);
    const found =
      /[`\\*_~!\[<h]/.test(rest[0]) &&
      INLINE.map(([form, make]) => [form.exec(rest), make]).find(([m]) => m && !(inWord && /^[_h]/.test(m[0])));
    if (found) {
      if (plain) made.push(plain);
      plain = "";
      made.push(found[1](found[0]));
      at += found[0][0].length;
    } else plain += text[at++];
  }
  if (plain) made.push(plain);
  return made;
}

/** Only addresses that a browser may follow safely; others stay text. */
function link(address, text) {
  if (!/^(https?:\/\/|mailto:)/i.test(address)) return `${text} (${address})`;
  return h("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, text || address);
}
