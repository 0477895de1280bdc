// Conversations as files, written and read: Markdown for people, JSON for all that is known.

import { newConversation, textOf } from "./conversation.js";

export class Unreadable extends Error {}

// ---- Markdown ---------------------------------------------------------------

const HEADING = /^## (user|assistant)$/;

export function asMarkdown({ title, messages }) {
    const turns = messages.map((message) => {
        // A line that would begin a turn gets a stroke, as Markdown has it.
        const text = textOf(message).replace(/^(?=\\*## (?:user|assistant)$)/gm, "\\");
        return `## ${message.role}\n\n${text}\n`;
    });
    return [`# ${title}\n`, ...turns].join("\n");
}

function fromMarkdown(text) {
    const lines = text.replace(/^\uFEFF/, "").replace(/\r\n?/g, "\n").split("\n");
    const title = lines[0].match(/^# (.*)/)?.[1] ?? "";
    const messages = [];
    for (const line of lines) {
        const role = line.match(HEADING)?.[1];
        if (role) messages.push({ role, content: [] });
        else messages.at(-1)?.content.push(line.replace(/^\\(?=\\*## (?:user|assistant)$)/, ""));
    }
    return { title, messages: messages.map(({ role, content }) => {
        return { role, content: content.join("\n").trim() };
    }) };
}

// ---- JSON -------------------------------------------------------------------

// A text, or the texts of parts as other programs write them.
function contentOf(value) {
    if (typeof value === "string") return value;
    if (!Array.isArray(value)) return "";
    return value.map(({ text }) => (typeof text === "string" ? text : "")).join("\n\n");
}

// What a model calls, and what it is told, as text: it is marked so in the models' own answers.
function callsOf(message) {
    return (Array.isArray(message.tool_calls) ? message.tool_calls : []).map((call) => {
        const { name, arguments: given } = call.function ?? {};
        return `<tool_call>\n{"name": ${JSON.stringify(name)}, "arguments": ${given}}\n</tool_call>`;
    });
}

const NUMBERS = ["tokens", "speed", "prompt_tokens", "context_tokens", "thought_seconds"];

function messageFrom(raw) {
    if (!["user", "assistant"].includes(raw?.role)) throw new Unreadable(`role: ${raw?.role}`);
    const content = [contentOf(raw.content), ...callsOf(raw)].filter(Boolean).join("\n\n");
    const message = { role: raw.role, content };
    for (const name of NUMBERS) if (Number.isFinite(raw[name])) message[name] = raw[name];
    if (typeof raw.thinks === "boolean") message.thinks = raw.thinks;
    if (raw.role === "assistant") message.finish = String(raw.finish ?? "stop");
    if (Array.isArray(raw.files)) {
        message.files = raw.files.map(({ name, text }) => ({ name: `${name}`, text: `${text}` }));
    }
    if (raw.versions) message.versions = versionsFrom(raw.versions);
    return message;
}

function versionsFrom({ at, tails }) {
    const isShown = (tail, i) => (tail === null) === (i === at);
    if (!(Array.isArray(tails) && tails[at] === null && tails.every(isShown))) throw new Unreadable("versions");
    return { at, tails: tails.map((tail) => tail && messagesFrom(tail)) };
}

// A tool's result belongs to the answer whose call it follows, and so does what is said of it.
function messagesFrom(list) {
    if (!Array.isArray(list) || !list.length) throw new Unreadable("messages");
    const messages = [];
    for (const raw of list) {
        const last = messages.at(-1);
        if (raw?.role === "system" || raw?.role === "developer") continue;
        if (raw?.role === "tool" && last) {
            last.content += `\n\n<tool_response>\n${contentOf(raw.content)}\n</tool_response>`;
        } else if (raw?.role === "assistant" && last?.role === "assistant") {
            last.content += `\n\n${messageFrom(raw).content}`;
        } else {
            messages.push(messageFrom(raw));
        }
    }
    return messages;
}

export const asJson = (conversations) => JSON.stringify(conversations, null, 2);

function fromJson(text) {
    let value;
    try {
        value = JSON.parse(text);
    } catch (error) {
        throw new Unreadable(error.message);
    }
    if (!Array.isArray(value)) return [value];
    return value[0]?.role ? [{ messages: value }] : value;
}

// The conversations of a file, as new ones. Throws Unreadable.
export function conversationsFrom(text) {
    const isJson = /^\s*[[{]/.test(text.replace(/^\uFEFF/, ""));
    const all = isJson ? fromJson(text.replace(/^\uFEFF/, "")) : [fromMarkdown(text)];
    if (!all.length) throw new Unreadable("[]");
    return all.map((found) => {
        const messages = messagesFrom(found?.messages);
        const title = String(found.title || messages[0].content.slice(0, 60) || "chat");
        const skipped = Number.isInteger(found.skipped) ? found.skipped : 0;
        return { ...newConversation(), title, messages, skipped };
    });
}
