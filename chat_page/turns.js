// The turns of a conversation, as elements: painted as they grow, and rendered block by block.

import { callOf, Cutter, splitThought } from "./blocks.js";
import { button, copy, element, keepPlace } from "./document.js";
import { request } from "./server.js";
import { say } from "./texts.js";

let nodes = new WeakMap(); // message -> its element

export const forget = (message) => nodes.delete(message);

export function forgetAll() {
    nodes = new WeakMap();
}

// ---- Rendering --------------------------------------------------------------

let renderings = Promise.resolve();

// Put a finished part of an answer before `place`: as text at once, rendered as soon as it is.
function addPiece(text, place) {
    const call = callOf(text.trimStart());
    if (call) return place.before(callNode(call));
    const plain = element("div", { className: "plain", textContent: text });
    place.before(plain);
    renderings = renderings.then(async () => {
        try {
            const { html } = await (await request("render", { text })).json();
            const template = element("template", { innerHTML: html });
            decorate(template.content);
            keepPlace(() => plain.replaceWith(template.content));
        } catch { /* The text stays as it is. */ }
    });
}

// What a model calls, or is told, folded like a thought.
function callNode({ kind, name, shown }) {
    const code = element("pre", { tabIndex: 0, role: "group", ariaLabel: say("code") });
    code.append(element("code", {}, shown));
    const title = element("summary", {}, say(kind === "tool_call" ? "toolCall" : "toolResult"));
    if (name) title.append(" ", element("code", {}, name));
    return element("details", { className: "call" }, title, code);
}

function decorate(fragment) {
    for (const pre of fragment.querySelectorAll("pre")) {
        const copyCode = button("copy", () => copy(pre.textContent, copyCode));
        const head = element("div", { className: "head" }, pre.dataset.language ?? "", copyCode);
        Object.assign(pre, { tabIndex: 0, role: "group", ariaLabel: say("code") });
        const frame = element("div", { className: "code" });
        pre.replaceWith(frame);
        frame.append(head, pre);
    }
    for (const table of fragment.querySelectorAll("table")) {
        const label = { className: "table", tabIndex: 0, role: "group", ariaLabel: say("table") };
        const frame = element("div", label);
        table.replaceWith(frame);
        frame.append(table);
    }
}

// ---- Turns ------------------------------------------------------------------

// The element of a message; an answer's is headed by `who`, who gave it.
export function nodeOf(message, who) {
    if (!nodes.has(message)) {
        const isQuestion = message.role === "user";
        nodes.set(message, isQuestion ? questionNode(message) : answerNode(who));
    }
    return nodes.get(message);
}

function questionNode({ content, files = [] }) {
    const shown = files.map(({ name, text }) => {
        const frame = { tabIndex: 0, role: "group", ariaLabel: name };
        const source = element("pre", frame, element("code", {}, text));
        return element("details", { className: "file" }, element("summary", {}, name), source);
    });
    if (content) shown.push(element("div", { className: "bubble", textContent: content }));
    const who = element("h2", { className: "unseen" }, say("you"));
    return element("article", { className: "question" }, who, ...shown, element("footer"));
}

function answerNode(name) {
    const thought = element("div", { className: "thought" }, "");
    const summary = element("summary", {}, say("thinking"));
    const details = element("details", { className: "thinking" }, summary, thought);
    const tail = element("div", { className: "plain tail" }, "");
    const body = element("div", { className: "body" }, tail);
    const who = element("h2", { className: "unseen" }, name);
    const node = element("article", { className: "answer" }, who, details, body, element("footer"));
    const parts = { thought, summary, details, body, tail };
    return Object.assign(node, { ...parts, cutter: new Cutter(), done: 0 });
}

// Bring an answer's element up to its text; at most once a frame while it grows.
export function paint(message, who, finished = false) {
    const node = nodeOf(message, who);
    if (finished) return paintNow(message, node, true);
    node.frame ??= requestAnimationFrame(() => paintNow(message, node, false));
}

export function paintNow(message, node, finished) {
    cancelAnimationFrame(node.frame);
    node.frame = null;
    const { thought, text } = splitThought(message.content);
    keepPlace(() => {
        paintThought(node, thought, message.thought_seconds);
        node.cutter.read(text);
        for (const end of node.cutter.take(finished ? text.length : 0)) {
            addPiece(text.slice(node.done, end), node.tail);
            node.done = end;
        }
        node.tail.textContent = text.slice(node.done).replace(/^\n+/, "");
        node.classList.toggle("waiting", !finished && !text);
    });
}

function paintThought(node, thought, seconds) {
    const written = node.thought.firstChild ?? node.thought.appendChild(new Text());
    // What was shown as the answer turns out to have been the thought.
    if (thought && !written.length && node.done) {
        node.body.replaceChildren(node.tail);
        Object.assign(node, { cutter: new Cutter(), done: 0 });
    }
    node.details.hidden = !thought;
    node.summary.textContent = seconds >= 0.05 ? say("thought", { n: spelled(seconds) }) : say("thinking");
    if (written.length > thought.length) written.data = thought; // it showed half of a tag
    written.appendData(thought.slice(written.length));
}

const spelled = (seconds) => seconds.toFixed(seconds < 9.95 ? 1 : 0);
