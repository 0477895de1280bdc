// The chat page: a client of /v1/chat/completions. Conversations stay in this browser.

import { splitThought } from "./blocks.js";
import {
    bodyToContinue, countTurns, messagesOf, messagesToSkip, newConversation, putAside, showVersion,
    takeBack, textOf, tokensOf,
} from "./conversation.js";
import {
    button, copy, download, element, fit, isAtEnd, keepPlace, onEnter, onSend, part, scroller,
    scrollToEnd, setTexts,
} from "./document.js";
import { asJson, asMarkdown, conversationsFrom, Unreadable } from "./exchange.js";
import { Attachments } from "./files.js";
import { countTokens, eventsOf, hasKey, request, Trouble, useKey } from "./server.js";
import {
    CONVERSATION, load, loadConversation, local, newId, PREFIX, savedConversations, store,
} from "./storage.js";
import { examples, language, say, sayError, speak } from "./texts.js";
import { forget, forgetAll, nodeOf, paint, paintNow } from "./turns.js";

// The sampling fields of the settings: the smallest value, the largest, and a step.
const SAMPLING = {
    max_new_tokens: [1, "", 1], temperature: [0, 2, 0.1], top_p: [0, 1, 0.05], top_k: [0, "", 1],
    min_p: [0, 1, 0.05], repetition_penalty: [0.1, 10, 0.05], presence_penalty: [-2, 2, 0.1],
    frequency_penalty: [-2, 2, 0.1], seed: [0, "", 1],
};

// ---- State ------------------------------------------------------------------

let settings = load(`${PREFIX}settings`, {});
let config = null; // of the server, once its model is loaded
let serverTrouble = null;
const opened = new Map(); // id -> conversation
const running = new Map(); // conversation -> AbortController of its answer
let current = newConversation();

// ---- Saving -----------------------------------------------------------------

// What another tab saved of the conversation that is shown; what did not change stays as it is.
function followOtherTab(id) {
    const conversation = loadConversation(id, "elsewhere");
    conversation.messages = conversation.messages.map((message, i) => {
        const known = current.messages[i];
        const same = known?.role === message.role && known.content === message.content;
        if (same && !message.versions) delete known.versions;
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
        if (conversation === current) setAddress(current.id, "replaceState");
    }
    const { trouble, ...kept } = conversation;
    const next = { ...kept, revision: newId(), updated: Date.now() };
    const done = store(CONVERSATION + conversation.id, next);
    if (done) Object.assign(conversation, { revision: next.revision, updated: next.updated });
    part("notice").textContent = done ? "" : say("full");
    part("notice").hidden = done;
    listConversations();
}

// ---- The server -------------------------------------------------------------

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
    recount();
    if (!serverTrouble && current.trouble?.kind === "loading") return retry();
    if (!serverTrouble && current.trouble?.kind === "offline") delete current.trouble;
    showTrouble();
}

// ---- Questions and answers --------------------------------------------------

// The chosen one, if it is served.
const model = () => (config?.models.includes(settings.model) ? settings : config)?.model;

function sampling() {
    const given = Object.keys(SAMPLING).filter((name) => settings[name]);
    return Object.fromEntries(given.map((name) => [name, Number(settings[name])]));
}

// Let the model answer the last question, or go on with `begun`. `versions` are the answers that
// were put aside for this one; the last of them is shown again if nothing comes.
async function answer(conversation, { begun = null, versions = null } = {}) {
    const before = begun ? conversation.messages.length - 1 : conversation.messages.length;
    const messages = messagesOf(conversation, settings.system, before);
    const message = begun ?? { role: "assistant", content: "" };
    if (versions) message.versions = versions;
    if (!begun) conversation.messages.push(message);
    const { finish, content: { length } } = message;
    forget(begun); // what follows may belong to its last paragraph
    const controller = new AbortController();
    running.set(conversation, controller);
    delete conversation.trouble;
    delete message.finish;
    show();
    try {
        if (begun && !config) await connect(); // how it can go on
        const canContinue = config?.continue_final_message;
        const body = {
            ...(begun ? bodyToContinue(messages, begun, canContinue) : { messages }),
            ...sampling(), model: model(), stream: true,
            stream_options: { include_usage: true, continuous_usage_stats: true },
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
    else if (isNothing && versions) takeBack(conversation, before);
    else if (isNothing) conversation.messages.pop();
    else if (trouble?.kind === "broken") delete conversation.trouble; // the answer says it
    if (trouble) trouble.retry = () => (versions ? regenerate() : answer(conversation, { begun }));
    if (["offline", "loading", "broken"].includes(trouble?.kind)) connect();
    save(conversation);
    part("status").textContent = message.finish === "stop" ? say("answered") : "";
    paint(message, model() ?? "chat-api", true);
    show();
    recount();
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
    const { tokens = 0, thought_seconds: thought = 0 } = message;
    const { thought: told, text: said } = splitThought(message.content);
    let isThinking = !(told && said);
    let first = 0;
    let saved = performance.now();
    for await (const event of eventsOf(response)) {
        if (event.error) throw new Trouble("failed", event.error.message, 0, event.error.code);
        const now = performance.now();
        const choice = event.choices[0];
        if (choice && addText(message, choice.delta)) {
            first ||= now;
            isThinking &&= timeThought(message, thought + (now - first) / 1000);
            paint(message, model());
        }
        message.finish = choice?.finish_reason ?? message.finish;
        if (event.usage) keepUsage(message, event.usage, tokens, first && now - first);
        if (now - saved > 3000) {
            saved = now;
            save(conversation);
        }
    }
}

// Whether it may still think; the seconds are kept that it did.
function timeThought(message, seconds) {
    const { thought, text } = splitThought(message.content);
    if (thought) message.thought_seconds = seconds;
    return !(thought && text);
}

// Counts come with each piece, so that an answer that is stopped has them too.
function keepUsage(message, usage, before, time) {
    const { prompt_tokens, completion_tokens } = usage;
    message.tokens = before + completion_tokens;
    Object.assign(message, { prompt_tokens, context_tokens: prompt_tokens + completion_tokens });
    if (time && completion_tokens > 1) message.speed = (completion_tokens - 1) / (time / 1000);
}

function ask(text, { files = [], versions = null } = {}) {
    if (!(text.trim() || files.length) || running.has(current)) return;
    const title = text.trim() || files[0].name;
    current.title ||= title.replace(/\s+/g, " ").slice(0, 60);
    const question = { role: "user", content: text };
    if (files.length) question.files = files;
    if (versions) question.versions = versions;
    current.messages.push(question);
    opened.set(current.id, current);
    setAddress(current.id, "replaceState");
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
    answer(current, { versions: putAside(current, current.messages.length - 1) });
}

function stop() {
    running.get(current)?.abort();
}

// ---- Turns ------------------------------------------------------------------

function footer(message, isLast, isRunning) {
    const text = splitThought(textOf(message)).text || message.content;
    const copyIt = button("copy", () => copy(text, copyIt));
    if (message.role === "user") {
        const actions = isRunning ? [copyIt] : [copyIt, button("edit", () => edit(message))];
        return [...actions, ...versionButtons(message, isRunning)];
    }
    const shown = versionButtons(message, isRunning);
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

// ‹ 2/3 ›
function versionButtons(message, isRunning) {
    if (!message.versions) return [];
    const { at, tails } = message.versions;
    const step = (name, sign, to) => {
        const go = () => {
            const index = current.messages.indexOf(message);
            showVersion(current, index, to);
            delete current.trouble;
            save(current);
            show();
            const footers = part("turns").querySelectorAll(":scope > article > footer");
            const again = footers[index].querySelector(`[data-step="${name}"]`);
            (again.disabled ? again.parentElement.querySelector("button:enabled") : again).focus();
        };
        const label = say(name);
        const node = button(name, go, "quiet step");
        node.dataset.step = name;
        const isDisabled = isRunning || to < 0 || to >= tails.length;
        return Object.assign(node, {
            textContent: sign, ariaLabel: label, title: label, disabled: isDisabled,
        });
    };
    const number = element("span", {}, `${at + 1}/${tails.length}`);
    const all = [step("earlier", "‹", at - 1), number, step("later", "›", at + 1)];
    const label = say("version", { n: at + 1, count: tails.length });
    return [element("span", { className: "versions", role: "group", ariaLabel: label }, ...all)];
}

function edit(message) {
    if (running.has(current)) return;
    const node = nodeOf(message);
    const box = element("textarea", { value: message.content, rows: 1, ariaLabel: say("edit") });
    const finish = () => {
        forget(message);
        show();
        part("message").focus();
    };
    const send = () => {
        const { files } = message;
        if (!box.value.trim() && !files?.length) return;
        const index = current.messages.indexOf(message);
        const versions = putAside(current, index);
        current.skipped = Math.min(current.skipped, index);
        forget(message);
        ask(box.value, { files, versions });
        part("message").focus();
    };
    onSend(box, send);
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
        shown.push(nodeOf(message, model() ?? "chat-api"));
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
        const skipped = messagesToSkip(current, config?.context_length ?? 4096);
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
        element("p", {}, say(hasKey() ? "keyRefused" : "key")),
        element("label", {}, say("keyLabel"), field), send,
        element("label", { className: "check" }, remember, say("remember")));
    form.onsubmit = (event) => {
        event.preventDefault();
        useKey(field.value.trim(), remember.checked);
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
    const saved = () => load(CONVERSATION + id);
    const menu = element("details", { className: "menu" }, summary, element("div", {},
        button("rename", () => rename(conversation, item)),
        button("exportMarkdown", () => {
            download(`${title}.md`, "text/markdown", asMarkdown(saved()));
        }),
        button("exportJson", () => download(`${title}.json`, "application/json", asJson(saved()))),
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

// Each conversation has an address, so that back, forward and a reload find it.
function setAddress(id, how) {
    if (location.hash === `#${id}`) return;
    history[how](null, "", `#${id}`);
}

const NEW = "new";

// `how` the browser's history is told: by a new entry, or by nothing where it was the history.
function openConversation(id, how = "pushState") {
    current = opened.get(id) ?? loadConversation(id) ?? newConversation();
    const isMissing = id !== NEW && current.id !== id;
    if (current.id === id) opened.set(id, current);
    if (how) setAddress(isMissing ? NEW : id, how);
    part("notice").textContent = isMissing ? say("missing") : "";
    part("notice").hidden = !isMissing;
    closeOverSmallScreen();
    listConversations();
    show();
    recount();
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
    if (id === current.id) openConversation(NEW, "replaceState");
    listConversations();
}

// Conversations of files, each as a new one; the first is opened.
async function importFiles(files) {
    let first = null;
    for (const file of files) {
        try {
            for (const found of conversationsFrom(await file.text())) {
                save(found);
                first ??= found;
            }
        } catch (error) {
            if (!(error instanceof Unreadable)) throw error;
            const values = { name: file.name, message: error.message };
            part("notice").textContent = say("unreadable", values);
            part("notice").hidden = false;
            return;
        }
    }
    if (first) openConversation(first.id);
}

// ---- How full the context is ------------------------------------------------

const attachments = new Attachments(() => recount());

function showFullness(tokens) {
    const context = config?.context_length;
    part("fullness").hidden = !context || !tokens;
    if (!context || !tokens) return;
    part("fullness").classList.toggle("over", tokens > context);
    Object.assign(part("meter"), { max: context, value: Math.min(tokens, context) });
    const number = (n) => n.toLocaleString(document.documentElement.lang);
    part("filled").textContent = say("fullness", { n: number(tokens), context: number(context) });
}

// The server counts what is being written where it is long; else the last answer's counts stand.
async function recount() {
    recount.waiting?.abort();
    const controller = recount.waiting = new AbortController();
    const draft = { role: "user", content: part("message").value, files: attachments.files };
    const isShort = draft.content.length < 500 && !draft.files.length;
    if (!config || isShort || running.has(current)) return showFullness(tokensOf(current));
    const written = { ...current, messages: [...current.messages, draft] };
    const messages = messagesOf(written, settings.system);
    try {
        showFullness(await countTokens({ messages, model: model() }, controller.signal));
    } catch { /* The server says what is wrong when it is sent. */ }
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
    forgetAll();
    part("trouble").replaceChildren();
    showSettings();
    listConversations();
    show();
    attachments.show();
}

// ---- Keys, and the start ----------------------------------------------------

function send() {
    const box = part("message");
    if (running.has(current)) return;
    const text = box.value;
    if (text.trim()) box.value = "";
    fit(box);
    ask(text, { files: attachments.take() });
}

function attach(files) {
    return attachments.add([...files], config?.context_length, model());
}

// A person who writes is not waited for: the count follows when a while nothing came.
function written() {
    fit(part("message"));
    clearTimeout(written.timer);
    written.timer = setTimeout(recount, 400);
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
onSend(part("message"), send);
part("message").addEventListener("input", written);
part("message").addEventListener("paste", (event) => {
    if (!event.clipboardData.files.length) return;
    event.preventDefault();
    attach(event.clipboardData.files);
});
for (const type of ["dragover", "drop"]) {
    addEventListener(type, (event) => {
        if (!event.dataTransfer.types.includes("Files")) return;
        event.preventDefault();
        document.body.classList.toggle("dropping", type === "dragover");
        if (type === "drop") attach(event.dataTransfer.files);
    });
}
addEventListener("dragleave", ({ relatedTarget }) => {
    if (!relatedTarget) document.body.classList.remove("dropping");
});
for (const [name, use] of [["attach", attach], ["import", importFiles]]) {
    const chooser = part(`${name}-files`);
    part(name).addEventListener("click", () => chooser.click());
    chooser.addEventListener("change", async () => {
        await use(chooser.files);
        chooser.value = ""; // so that the same one can be chosen again
    });
}
part("export").addEventListener("click", () => {
    download("chat-api.json", "application/json", asJson(savedConversations()));
});
part("stop").addEventListener("click", stop);
part("to-end").addEventListener("click", scrollToEnd);
scroller.addEventListener("scroll", () => { part("to-end").hidden = isAtEnd(); });
part("new").addEventListener("click", () => openConversation(NEW));
addEventListener("popstate", () => openConversation(location.hash.slice(1) || NEW, null));
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
        else if (last.versions) takeBack(conversation, conversation.messages.length - 1);
        else conversation.messages.pop();
        save(conversation);
    }
});

const asked = location.hash.slice(1);
current = loadConversation(asked || savedConversations()[0]?.id) ?? current;
opened.set(current.id, current);
if (current.messages.length) setAddress(current.id, "replaceState");
part("notice").hidden = !asked || asked === NEW || current.id === asked;
setLanguage(load(`${PREFIX}language`, navigator.language.startsWith("zh") ? "zh" : "en"));
part("notice").textContent = part("notice").hidden ? "" : say("missing");
toggleSidebar(!smallScreen.matches);
scrollToEnd();
connect();
