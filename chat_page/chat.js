// The chat page: a client of /v1/chat/completions. Conversations stay in this browser.

import { Cutter, splitThought } from "./blocks.js";
import { examples, language, say, sayError, speak } from "./texts.js";

// The sampling fields of the settings: the smallest value, the largest, and a step.
const SAMPLING = {
    max_new_tokens: [1, "", 1], temperature: [0, 2, 0.1], top_p: [0, 1, 0.05], top_k: [0, "", 1],
    min_p: [0, 1, 0.05], repetition_penalty: [0.1, 10, 0.05], presence_penalty: [-2, 2, 0.1],
    frequency_penalty: [-2, 2, 0.1], seed: [0, "", 1],
};

// ---- The document -----------------------------------------------------------

function setTexts(within) {
    for (const node of within.querySelectorAll("[data-text]")) {
        node.textContent = say(node.dataset.text);
    }
    for (const node of within.querySelectorAll("[data-label]")) {
        const label = say(node.dataset.label);
        node.ariaLabel = label;
        if ("placeholder" in node) node.placeholder = label;
        else if (node.tagName === "BUTTON") node.title = label;
    }
}

const part = (id) => document.getElementById(id);

function element(tag, properties = {}, ...children) {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
}

function button(name, action, className = "quiet", values = {}) {
    return element("button", { type: "button", className, onclick: action }, say(name, values));
}

// navigator.clipboard is missing where the page comes over plain HTTP from another machine.
async function copy(text, from) {
    if (navigator.clipboard) {
        await navigator.clipboard.writeText(text);
    } else {
        const box = element("textarea", { value: text, className: "unseen" });
        document.body.append(box);
        box.select();
        document.execCommand("copy");
        box.remove();
    }
    from.textContent = say("copied");
    setTimeout(() => { from.textContent = say("copy"); }, 1500);
}

function download(name, type, text) {
    const url = URL.createObjectURL(new Blob([text], { type }));
    element("a", { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
}

// ---- Storage ----------------------------------------------------------------
// One item for each conversation, so that tabs do not overwrite each other's.

// Reading these throws where the browser forbids a page to store anything.
function storageOf(name) {
    try {
        return window[name];
    } catch {
        return null;
    }
}

const local = storageOf("localStorage");
const session = storageOf("sessionStorage");
const PREFIX = `chat-api:${location.pathname}:`;
const CONVERSATION = `${PREFIX}conversation:`;

function load(key, fallback = null) {
    try {
        return JSON.parse(local.getItem(key)) ?? fallback;
    } catch {
        return fallback;
    }
}

function store(key, value) {
    try {
        local.setItem(key, JSON.stringify(value));
        return true;
    } catch {
        return false;
    }
}

const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2, 10);

function savedConversations() {
    const keys = Object.keys(local ?? {}).filter((key) => key.startsWith(CONVERSATION));
    return keys.map((key) => load(key)).filter(Boolean).sort((a, b) => b.updated - a.updated);
}

function loadConversation(id, unfinished = "broken") {
    const conversation = load(CONVERSATION + id);
    // Saved while it came: by a page that did not live to its end, or by another tab.
    for (const message of conversation?.messages ?? []) {
        if (message.role !== "assistant") continue;
        if (!message.finish || message.finish === "elsewhere") message.finish = unfinished;
    }
    return conversation;
}

// What another tab saved of the conversation that is shown; what did not change stays as it is.
function followOtherTab(id) {
    const conversation = loadConversation(id, "elsewhere");
    conversation.messages = conversation.messages.map((message, i) => {
        const known = current.messages[i];
        const same = known?.role === message.role && known.content === message.content;
        return same ? Object.assign(known, message) : message;
    });
    current = conversation;
    opened.set(id, current);
    show();
}

function save(conversation) {
    if (conversation.removed) return;
    const saved = load(CONVERSATION + conversation.id);
    // Another tab went on with this conversation meanwhile: keep both.
    if (saved && saved.revision !== conversation.revision) {
        opened.delete(conversation.id);
        conversation.id = newId();
        opened.set(conversation.id, conversation);
    }
    const { trouble, ...kept } = conversation;
    const next = { ...kept, revision: newId(), updated: Date.now() };
    const done = store(CONVERSATION + conversation.id, next);
    if (done) Object.assign(conversation, { revision: next.revision, updated: next.updated });
    part("notice").textContent = done ? "" : say("full");
    part("notice").hidden = done;
    listConversations();
}

// ---- State ------------------------------------------------------------------

let settings = load(`${PREFIX}settings`, {});
let key = session?.getItem(`${PREFIX}key`) ?? load(`${PREFIX}key`, "");
let config = null; // of the server, once its model is loaded
let serverTrouble = null;
let nodes = new WeakMap(); // message -> its element
const opened = new Map(); // id -> conversation
const running = new Map(); // conversation -> AbortController of its answer
let current = newConversation();

function newConversation() {
    return { id: newId(), title: "", created: Date.now(), skipped: 0, messages: [] };
}

// ---- The server -------------------------------------------------------------

class Trouble extends Error {
    constructor(kind, message = "", seconds = 0, code = "") {
        super(message);
        Object.assign(this, { kind, seconds, code });
    }
}

async function request(path, body, signal) {
    const headers = { "Content-Type": "application/json" };
    // A header holds bytes, which JavaScript writes as characters up to 255.
    const bytes = new TextEncoder().encode(key);
    if (key) headers.Authorization = `Bearer ${String.fromCharCode(...bytes)}`;
    const method = body ? "POST" : "GET";
    let response;
    try {
        const json = body && JSON.stringify(body);
        response = await fetch(path, { method, headers, signal, body: json });
    } catch (error) {
        throw signal?.aborted ? error : new Trouble("offline");
    }
    if (response.ok) return response;
    const { message, code } = (await response.json().catch(() => ({}))).error ?? {};
    const kinds = { 401: "key", 429: "busy", 502: "offline", 503: "loading", 504: "offline" };
    let kind = kinds[response.status] ?? "failed";
    if (code === "context_length_exceeded") kind = "tooLong";
    if (code === "timed_out") kind = "failed";
    if (code === "not_serving" && !/loading/.test(message)) kind = "failed";
    const seconds = Number(response.headers.get("Retry-After")) || 5;
    throw new Trouble(kind, message ?? `HTTP ${response.status}`, seconds, code);
}

// Ask until the server's model is loaded.
async function connect() {
    clearTimeout(connect.timer);
    try {
        const health = await fetch("../health");
        if (health.status === 503) {
            const { status } = await health.json();
            throw new Trouble(status);
        }
        config = await (await request("config")).json();
        serverTrouble = null;
    } catch (error) {
        serverTrouble = error instanceof Trouble ? error : new Trouble("offline");
        if (error.kind !== "key") connect.timer = setTimeout(connect, 1500);
    }
    showConfig();
    if (!serverTrouble && current.trouble?.kind === "loading") return retry();
    if (!serverTrouble && current.trouble?.kind === "offline") delete current.trouble;
    showTrouble();
}

async function* eventsOf(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let buffer = "";
    for (;;) {
        const { value, done } = await reader.read();
        if (done) throw new Trouble("broken");
        const lines = (buffer + value).split("\n");
        buffer = lines.pop();
        for (const line of lines) {
            if (line === "data: [DONE]") return;
            if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
        }
    }
}

// ---- Questions and answers --------------------------------------------------

// The conversation as the model sees it: without thoughts, and questions that got no answer.
function messagesOf(conversation, count = conversation.messages.length) {
    const messages = conversation.messages.slice(conversation.skipped, count);
    const sent = settings.system?.trim() ? [{ role: "system", content: settings.system }] : [];
    messages.forEach(({ role, content }, i) => {
        if (role !== "user") return;
        const next = messages[i + 1];
        const answered = next?.role === "assistant" ? splitThought(next.content).text : "";
        if (answered) sent.push({ role, content }, { role: next.role, content: answered });
        else if (!next) sent.push({ role, content });
    });
    return sent;
}

// A model whose chat template lets an answer go on does so; any other is asked to.
function bodyToContinue(messages, answer) {
    const { thought, text } = splitThought(answer.content);
    // What the server parted is sent back as it came, but for a thought that is not at its end.
    const parted = answer.thinks === false;
    const said = parted ? { content: text, reasoning_content: thought } : { content: answer.content };
    const begun = [...messages, { role: "assistant", ...said }];
    if (config?.continue_final_message) return { messages: begun, continue_final_message: true };
    return { messages: [...begun, { role: "user", content: say("continue") }] };
}

// The chosen one, if it is served.
const model = () => (config?.models.includes(settings.model) ? settings : config)?.model;

function sampling() {
    const given = Object.keys(SAMPLING).filter((name) => settings[name]);
    return Object.fromEntries(given.map((name) => [name, Number(settings[name])]));
}

// Let the model answer the last question, or go on with `begun`; `previous` is kept if it cannot.
async function answer(conversation, { begun = null, previous = null } = {}) {
    const before = begun ? conversation.messages.length - 1 : conversation.messages.length;
    const messages = messagesOf(conversation, before);
    const message = begun ?? { role: "assistant", content: "" };
    if (!begun) conversation.messages.push(message);
    const { finish, content: { length } } = message;
    nodes.delete(begun); // what follows may belong to its last paragraph
    const controller = new AbortController();
    running.set(conversation, controller);
    delete conversation.trouble;
    delete message.finish;
    show();
    try {
        if (begun && !config) await connect(); // how it can go on
        const body = {
            ...(begun ? bodyToContinue(messages, begun) : { messages }), ...sampling(), model: model(),
            stream: true, stream_options: { include_usage: true },
        };
        const response = await request("../v1/chat/completions", body, controller.signal);
        await receive(conversation, message, response);
    } catch (error) {
        message.finish = controller.signal.aborted ? "stopped" : "broken";
        if (!controller.signal.aborted) conversation.trouble = asTrouble(error);
    }
    running.delete(conversation);
    const { trouble } = conversation;
    const isNothing = message.content.length === length && message.finish !== "stop";
    if (isNothing && begun) message.finish = finish;
    else if (isNothing) conversation.messages.splice(-1, 1, ...(previous ? [previous] : []));
    else if (trouble?.kind === "broken") delete conversation.trouble; // the answer says it
    if (trouble) trouble.retry = () => (previous ? regenerate() : answer(conversation, { begun }));
    if (["offline", "loading", "broken"].includes(trouble?.kind)) connect();
    save(conversation);
    part("status").textContent = message.finish === "stop" ? say("answered") : "";
    paint(message, true);
    show();
}

// What else is thrown says that the stream broke.
function asTrouble(error) {
    return error instanceof Trouble ? error : new Trouble("broken");
}

// Add what came to an answer: a thought that the server parted goes between marks again.
function addText(message, { reasoning_content: thought, content }) {
    if (thought) {
        if (!message.thinks) message.content += "<think>";
        message.thinks = true;
        message.content += thought;
    }
    if (content) {
        if (message.thinks) {
            message.content += "</think>\n\n";
            message.thinks = false;
        }
        message.content += content;
    }
    return thought || content;
}

async function receive(conversation, message, response) {
    part("status").textContent = say("answering");
    let first = 0;
    let saved = performance.now();
    for await (const event of eventsOf(response)) {
        if (event.error) throw new Trouble("failed", event.error.message, 0, event.error.code);
        const now = performance.now();
        const choice = event.choices[0];
        if (choice && addText(message, choice.delta)) {
            first ||= now;
            paint(message);
        }
        message.finish = choice?.finish_reason ?? message.finish;
        if (event.usage) {
            const tokens = event.usage.completion_tokens;
            message.tokens = (message.tokens ?? 0) + tokens;
            message.prompt_tokens = event.usage.prompt_tokens;
            if (first && tokens > 1) message.speed = (tokens - 1) / ((now - first) / 1000);
        }
        if (now - saved > 3000) {
            saved = now;
            save(conversation);
        }
    }
}

function ask(text) {
    if (!text.trim() || running.has(current)) return;
    current.title ||= text.trim().replace(/\s+/g, " ").slice(0, 60);
    current.messages.push({ role: "user", content: text });
    opened.set(current.id, current);
    save(current);
    answer(current);
    scrollToEnd();
}

function retry() {
    const again = current.trouble?.retry ?? (() => answer(current));
    delete current.trouble;
    again();
}

function regenerate() {
    answer(current, { previous: current.messages.pop() });
}

function stop() {
    running.get(current)?.abort();
}

// How many of the oldest messages to leave out: about as many as the newest need room for.
function messagesToSkip(conversation) {
    const context = config?.context_length ?? 4096;
    const sizes = conversation.messages.map((message) => message.content.length);
    const counted = conversation.messages.findLast((message) => message.prompt_tokens);
    const all = sizes.slice(conversation.skipped).reduce((sum, size) => sum + size, 0);
    const known = counted ? counted.prompt_tokens + counted.tokens : context;
    const room = (all * context * 0.6) / Math.max(known, context);
    let skipped = conversation.skipped;
    let left = all;
    while (skipped < sizes.length - 1 && (left > room || skipped === conversation.skipped)) {
        left -= sizes[skipped];
        skipped += 1;
        if (conversation.messages[skipped]?.role === "assistant") {
            left -= sizes[skipped];
            skipped += 1;
        }
    }
    return Math.min(skipped, sizes.length - 1);
}

const countTurns = (messages) => messages.filter(({ role }) => role === "user").length;

// ---- Rendering --------------------------------------------------------------

let renderings = Promise.resolve();

// Put a finished part of an answer before `place`: as text at once, rendered as soon as it is.
function addPiece(text, place) {
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

function nodeOf(message) {
    if (!nodes.has(message)) {
        nodes.set(message, message.role === "user" ? questionNode(message) : answerNode(message));
    }
    return nodes.get(message);
}

function questionNode(message) {
    const text = element("div", { className: "bubble", textContent: message.content });
    const who = element("h2", { className: "unseen" }, say("you"));
    return element("article", { className: "question" }, who, text, element("footer"));
}

function answerNode(message) {
    const thought = element("div", { className: "thought" }, "");
    const details = element("details", {}, element("summary", {}, say("thinking")), thought);
    const tail = element("div", { className: "plain tail" }, "");
    const body = element("div", { className: "body" }, tail);
    const who = element("h2", { className: "unseen" }, model() ?? "chat-api");
    const node = element("article", { className: "answer" }, who, details, body, element("footer"));
    Object.assign(node, { thought, details, body, tail, cutter: new Cutter(), done: 0 });
    return node;
}

// Bring an answer's element up to its text; at most once a frame while it grows.
function paint(message, finished = false) {
    const node = nodeOf(message);
    if (finished) return paintNow(message, node, true);
    node.frame ??= requestAnimationFrame(() => paintNow(message, node, false));
}

function paintNow(message, node, finished) {
    cancelAnimationFrame(node.frame);
    node.frame = null;
    const { thought, text } = splitThought(message.content);
    keepPlace(() => {
        paintThought(node, thought);
        node.cutter.read(text);
        for (const end of node.cutter.take(finished ? text.length : 0)) {
            addPiece(text.slice(node.done, end), node.tail);
            node.done = end;
        }
        node.tail.textContent = text.slice(node.done).replace(/^\n+/, "");
        node.classList.toggle("waiting", !finished && !text);
    });
}

function paintThought(node, thought) {
    const written = node.thought.firstChild ?? node.thought.appendChild(new Text());
    // What was shown as the answer turns out to have been the thought.
    if (thought && !written.length && node.done) {
        node.body.replaceChildren(node.tail);
        Object.assign(node, { cutter: new Cutter(), done: 0 });
    }
    node.details.hidden = !thought;
    if (written.length > thought.length) written.data = thought; // it showed half of a tag
    written.appendData(thought.slice(written.length));
}

function footer(message, isLast, isRunning) {
    const text = splitThought(message.content).text || message.content;
    const copyIt = button("copy", () => copy(text, copyIt));
    if (message.role === "user") {
        return isRunning ? [copyIt] : [copyIt, button("edit", () => edit(message))];
    }
    const shown = [];
    const cut = ["length", "stopped", "broken"].includes(message.finish);
    if (cut || message.finish === "elsewhere") {
        shown.push(element("span", { className: "cut" }, say(message.finish)));
    }
    if (cut && isLast && !isRunning) {
        shown.push(button("continue", () => answer(current, { begun: message })));
    }
    shown.push(copyIt);
    if (isLast && !isRunning && message.finish !== "elsewhere") {
        shown.push(button("regenerate", regenerate));
    }
    if (message.speed) {
        const values = { tokens: message.tokens, speed: message.speed.toFixed(1) };
        shown.push(element("small", {}, say("speed", values)));
    }
    return shown;
}

function edit(message) {
    if (running.has(current)) return;
    const node = nodeOf(message);
    const box = element("textarea", { value: message.content, rows: 1, ariaLabel: say("edit") });
    const finish = () => {
        nodes.delete(message);
        show();
        part("message").focus();
    };
    const send = () => {
        if (!box.value.trim()) return;
        const index = current.messages.indexOf(message);
        current.messages.length = index;
        current.skipped = Math.min(current.skipped, index);
        finish();
        ask(box.value);
    };
    onEnter(box, send);
    box.oninput = () => fit(box);
    const actions = element("div", {}, button("cancel", finish), button("send", send, "main"));
    node.replaceChildren(element("div", { className: "editor" }, box, actions));
    fit(box);
    box.focus();
}

function show() {
    const shown = [];
    current.messages.forEach((message, i) => {
        if (i && i === current.skipped) {
            const n = countTurns(current.messages.slice(0, i));
            shown.push(element("p", { className: "mark" }, say("skipped", { n })));
        }
        shown.push(nodeOf(message));
    });
    const isRunning = running.has(current);
    keepPlace(() => part("turns").replaceChildren(...shown));
    // The newest is rendered first.
    for (const [i, message] of [...current.messages.entries()].reverse()) {
        const isLast = i === current.messages.length - 1;
        const isGrowing = isRunning && isLast;
        const node = nodeOf(message);
        if (message.role === "assistant") paintNow(message, node, !isGrowing);
        const actions = isGrowing ? [] : footer(message, isLast, isRunning);
        node.querySelector("footer")?.replaceChildren(...actions);
        node.classList.toggle("last", isLast);
    }
    part("empty").hidden = current.messages.length > 0;
    part("send").hidden = isRunning;
    part("stop").hidden = !isRunning;
    document.title = current.title ? `${current.title} · chat-api` : "chat-api";
    showTrouble();
}

// ---- Trouble ----------------------------------------------------------------

function showTrouble() {
    clearInterval(showTrouble.timer);
    let trouble = running.has(current) ? null : current.trouble ?? serverTrouble;
    if (!trouble && !running.has(current) && current.messages.at(-1)?.role === "user") {
        trouble = new Trouble("unanswered");
    }
    const place = part("trouble");
    place.className = trouble?.kind ?? "";
    if (place.querySelector("form") && trouble?.kind === "key") return; // somebody writes in it
    keepPlace(() => place.replaceChildren(...(trouble ? troubleNodes(trouble) : [])));
}

function troubleNodes(trouble) {
    const isAsked = current.trouble || current.messages.at(-1)?.role === "user";
    const again = isAsked ? [button("retry", retry, "main")] : [];
    const words = (name, values) => element("p", {}, say(name, values));
    if (trouble.kind === "key") return [keyForm()];
    if (trouble.kind === "busy") return [countDown(trouble), ...again];
    if (trouble.kind === "tooLong") {
        const skipped = messagesToSkip(current);
        if (skipped <= current.skipped) return [words("questionTooLong"), ...again];
        const n = countTurns(current.messages.slice(current.skipped, skipped));
        const skip = () => { current.skipped = skipped; retry(); };
        return [words("tooLong"), button("skip", skip, "main", { n })];
    }
    if (trouble.kind === "failed") {
        return [element("p", {}, sayError(trouble.code, trouble.message)), ...again];
    }
    return [words(trouble.kind), ...(trouble.kind === "loading" ? [] : again)];
}

function countDown(trouble) {
    const line = element("p", { ariaLive: "off" }, say("busy", { n: trouble.seconds }));
    showTrouble.timer = setInterval(() => {
        trouble.seconds -= 1;
        line.textContent = say("busy", { n: Math.max(0, trouble.seconds) });
        if (trouble.seconds <= 0) retry();
    }, 1000);
    return line;
}

function keyForm() {
    const field = element("input", { type: "password", autocomplete: "off", required: true });
    const remember = element("input", { type: "checkbox" });
    const send = element("button", { className: "main" }, say("use"));
    const form = element("form", {},
        element("p", {}, say(key ? "keyRefused" : "key")),
        element("label", {}, say("keyLabel"), field), send,
        element("label", { className: "check" }, remember, say("remember")));
    form.onsubmit = (event) => {
        event.preventDefault();
        key = field.value.trim();
        session?.setItem(`${PREFIX}key`, key);
        if (remember.checked) store(`${PREFIX}key`, key);
        else local?.removeItem(`${PREFIX}key`);
        part("trouble").replaceChildren();
        if (current.trouble?.kind === "key") retry();
        connect();
    };
    return form;
}

// ---- Conversations ----------------------------------------------------------

function listConversations() {
    // It would take an open menu away, or a name that is being typed.
    if (part("list").querySelector(".menu[open], input")) return;
    const wanted = part("search").value.trim().toLowerCase();
    const matches = ({ title, messages }) => {
        const texts = [title, ...messages.map(({ content }) => content)];
        return texts.some((text) => text.toLowerCase().includes(wanted));
    };
    const found = savedConversations().filter(matches);
    const listed = JSON.stringify([language, current.id, found.map(({ id, title }) => [id, title])]);
    if (listed === listConversations.listed) return;
    listConversations.listed = listed;
    part("list").replaceChildren(...found.map(listItem));
}

function listItem(conversation) {
    const { id, title } = conversation;
    const open = element("button", { className: "title", title }, title);
    open.onclick = () => openConversation(id);
    if (id === current.id) open.ariaCurrent = "true";
    const summary = element("summary", { ariaLabel: say("more", { title }) }, "⋯");
    const asJson = () => JSON.stringify(load(CONVERSATION + id), null, 2);
    const menu = element("details", { className: "menu" }, summary, element("div", {},
        button("rename", () => rename(conversation, item)),
        button("exportMarkdown", () => download(`${title}.md`, "text/markdown", asMarkdown(id))),
        button("exportJson", () => download(`${title}.json`, "application/json", asJson())),
        button("remove", () => remove(conversation))));
    const item = element("li", {}, open, menu);
    menu.onclick = (event) => {
        if (event.target.tagName === "BUTTON") menu.open = false;
    };
    menu.ontoggle = () => { if (!menu.open) listConversations(); };
    return item;
}

function closeMenus(except = null) {
    for (const menu of document.querySelectorAll(".menu[open]")) {
        if (!menu.contains(except)) menu.open = false;
    }
}

function openConversation(id) {
    current = opened.get(id) ?? loadConversation(id) ?? newConversation();
    if (current.id === id) opened.set(id, current);
    closeOverSmallScreen();
    listConversations();
    show();
    scrollToEnd();
    part("message").focus();
    // It was asked while the model loaded, and left.
    if (!serverTrouble && current.trouble?.kind === "loading" && !running.has(current)) retry();
}

function rename(conversation, item) {
    const field = element("input", { value: conversation.title, ariaLabel: say("rename") });
    const finish = () => {
        const { id } = conversation;
        const renamed = opened.get(id) ?? loadConversation(id);
        if (field.value.trim() && renamed) {
            renamed.title = field.value.trim();
            save(renamed);
        }
        field.onblur = null; // taking it away is no end of typing
        field.remove();
        listConversations.listed = null;
        listConversations();
    };
    onEnter(field, () => field.blur());
    field.onblur = finish;
    item.replaceChildren(field);
    field.select();
}

function remove({ id, title }) {
    if (!confirm(say("confirmRemove", { title }))) return;
    const conversation = opened.get(id);
    if (conversation) conversation.removed = true; // its answer would save it again
    running.get(conversation)?.abort();
    opened.delete(id);
    local?.removeItem(CONVERSATION + id);
    if (id === current.id) openConversation("");
    listConversations();
}

function asMarkdown(id) {
    const { title, messages } = load(CONVERSATION + id);
    const turns = messages.map(({ role, content }) => `## ${role}\n\n${content}\n`);
    return [`# ${title}\n`, ...turns].join("\n");
}

// ---- Settings ---------------------------------------------------------------

function showConfig() {
    const isDemo = config?.model === "demo";
    part("model").textContent = model() ?? "chat-api";
    const choice = part("fields").querySelector("select");
    choice.replaceChildren(...(config?.models ?? []).map((name) => new Option(name)));
    choice.value = model() ?? "";
    choice.parentElement.hidden = choice.options.length < 2;
    part("demo").hidden = !isDemo;
    part("examples").replaceChildren(...examples(isDemo).map((text) => {
        return element("button", { type: "button", onclick: () => ask(text) }, text);
    }));
    for (const field of part("fields").querySelectorAll("input")) {
        const value = config?.defaults[field.name];
        const words = { seed: say("random"), max_new_tokens: say("unlimited") };
        field.placeholder = config ? value ?? words[field.name] : "";
    }
}

function showSettings() {
    const keep = (field) => {
        settings[field.name] = field.value;
        store(`${PREFIX}settings`, settings);
        showConfig();
    };
    const labelled = (name, field) => {
        Object.assign(field, { name, value: settings[name] ?? "", oninput: () => keep(field) });
        return element("label", {}, say(name), field);
    };
    const rows = Object.entries(SAMPLING).map(([name, [min, max, step]]) => {
        return labelled(name, element("input", { type: "number", min, max, step }));
    });
    const choice = labelled("model", element("select"));
    const system = labelled("system", element("textarea", { rows: 4 }));
    part("fields").replaceChildren(system, choice, ...rows);
    showConfig();
}

function toggleSettings(isShown) {
    part("settings").hidden = !isShown;
    part("show-settings").ariaExpanded = String(isShown);
    if (isShown) part("fields").querySelector("textarea").focus();
    else part("message").focus();
}

function setLanguage(chosen) {
    speak(chosen);
    document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
    part("language").textContent = language === "zh" ? "English" : "中文";
    part("language").lang = language === "zh" ? "en" : "zh-CN";
    setTexts(document);
    nodes = new WeakMap();
    part("trouble").replaceChildren();
    showSettings();
    listConversations();
    show();
}

// ---- Scrolling, keys, and the start -----------------------------------------

const scroller = part("scroll");
const isAtEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;

function scrollToEnd() {
    scroller.scrollTop = scroller.scrollHeight;
}

// Change the page; who reads its end goes on reading its end.
function keepPlace(change) {
    const follow = isAtEnd();
    change();
    if (follow) scrollToEnd();
}

function fit(box) {
    box.style.height = "auto";
    box.style.height = `${box.scrollHeight + 2}px`;
}

// Enter, but not the one with which an input method takes a word (229 is Safari's sign of it).
function onEnter(field, action) {
    field.addEventListener("keydown", (event) => {
        const composes = event.isComposing || event.keyCode === 229;
        if (event.key !== "Enter" || event.shiftKey || composes) return;
        event.preventDefault();
        action();
    });
}

function send() {
    const box = part("message");
    if (running.has(current)) return;
    const text = box.value;
    if (text.trim()) box.value = "";
    fit(box);
    ask(text);
}

// Where the list of conversations covers the conversation.
const smallScreen = matchMedia("(max-width: 800px)");

function toggleSidebar(isShown) {
    document.body.classList.toggle("with-sidebar", isShown);
    part("show-sidebar").ariaExpanded = String(isShown);
    part("scrim").hidden = !(isShown && smallScreen.matches);
}

function closeOverSmallScreen() {
    if (smallScreen.matches) toggleSidebar(false);
}

part("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
onEnter(part("message"), send);
part("message").addEventListener("input", () => fit(part("message")));
part("stop").addEventListener("click", stop);
part("to-end").addEventListener("click", scrollToEnd);
scroller.addEventListener("scroll", () => { part("to-end").hidden = isAtEnd(); });
part("new").addEventListener("click", () => openConversation(""));
part("search").addEventListener("input", listConversations);
part("language").addEventListener("click", () => {
    setLanguage(language === "zh" ? "en" : "zh");
    store(`${PREFIX}language`, language);
});
part("show-sidebar").addEventListener("click", () => {
    toggleSidebar(!document.body.classList.contains("with-sidebar"));
});
smallScreen.addEventListener("change", ({ matches }) => toggleSidebar(!matches));
part("scrim").addEventListener("click", () => toggleSidebar(false));
part("show-settings").addEventListener("click", () => toggleSettings(part("settings").hidden));
part("hide-settings").addEventListener("click", () => toggleSettings(false));
part("reset").addEventListener("click", () => {
    settings = {};
    store(`${PREFIX}settings`, settings);
    showSettings();
});
addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing) return;
    closeMenus();
    if (!part("settings").hidden) toggleSettings(false);
    else if (!part("scrim").hidden) toggleSidebar(false);
    else stop();
});
for (const leaving of ["pointerdown", "focusin"]) {
    addEventListener(leaving, (event) => closeMenus(event.target));
}
addEventListener("storage", ({ key: changed, newValue }) => {
    if (!changed?.startsWith(CONVERSATION)) return;
    const id = changed.slice(CONVERSATION.length);
    if (running.has(opened.get(id))) return listConversations();
    opened.delete(id);
    if (id === current.id && newValue) followOtherTab(id);
    listConversations();
});
addEventListener("pagehide", () => {
    for (const conversation of running.keys()) {
        const last = conversation.messages.at(-1);
        if (last.content) last.finish = "broken";
        else conversation.messages.pop();
        save(conversation);
    }
});

current = loadConversation(savedConversations()[0]?.id) ?? current;
opened.set(current.id, current);
setLanguage(load(`${PREFIX}language`, navigator.language.startsWith("zh") ? "zh" : "en"));
toggleSidebar(!smallScreen.matches);
scrollToEnd();
connect();
