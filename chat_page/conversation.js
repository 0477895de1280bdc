// A conversation as data: its versions, what the model sees of it, and what no longer fits.

import { splitThought } from "./blocks.js";
import { newId } from "./storage.js";
import { say } from "./texts.js";

export function newConversation() {
    return { id: newId(), title: "", created: Date.now(), skipped: 0, messages: [] };
}

export const countTurns = (messages) => messages.filter(({ role }) => role === "user").length;

// ---- What the model sees ----------------------------------------------------

// A file's text between fences that are longer than any in it.
function fenced({ name, text }) {
    const runs = text.match(/`{3,}/g) ?? [];
    const longest = runs.reduce((most, run) => Math.max(most, run.length), 2);
    const fence = "`".repeat(longest + 1);
    return `${name}:\n${fence}\n${text.replace(/\n?$/, "\n")}${fence}`;
}

// A question's files stand before it, so that it is what the model reads last.
export function textOf({ content, files = [] }) {
    return [...files.map(fenced), content].filter(Boolean).join("\n\n");
}

// The conversation without thoughts, and without questions that got no answer.
export function messagesOf(conversation, system, count = conversation.messages.length) {
    const messages = conversation.messages.slice(conversation.skipped, count);
    const sent = system?.trim() ? [{ role: "system", content: system }] : [];
    messages.forEach((message, i) => {
        const { role } = message;
        if (role !== "user") return;
        const next = messages[i + 1];
        const answered = next?.role === "assistant" ? splitThought(next.content).text : "";
        const content = textOf(message);
        if (answered) sent.push({ role, content }, { role: next.role, content: answered });
        else if (!next) sent.push({ role, content });
    });
    return sent;
}

// A model whose chat template lets an answer go on does so; any other is asked to.
export function bodyToContinue(messages, answer, canContinue) {
    const { thought, text } = splitThought(answer.content);
    // What the server parted is sent back as it came, but for a thought that is not at its end.
    const parted = answer.thinks === false;
    const said = parted ? { content: text, reasoning_content: thought } : { content: answer.content };
    const begun = [...messages, { role: "assistant", ...said }];
    if (canContinue) return { messages: begun, continue_final_message: true };
    return { messages: [...begun, { role: "user", content: say("continue") }] };
}

// ---- Versions ---------------------------------------------------------------
// The first message of each version of what follows holds them all: `tails` are the messages of
// each, with null for the one that is shown, whose number is `at`.

// Put the messages from `index` on aside; what comes in their place is given what this returns.
export function putAside({ messages }, index) {
    const versions = messages[index].versions ?? { at: 0, tails: [null] };
    delete messages[index].versions;
    versions.tails[versions.at] = messages.splice(index);
    versions.before = versions.at;
    versions.at = versions.tails.push(null) - 1;
    return versions;
}

export function showVersion(conversation, index, at) {
    const { messages } = conversation;
    const { versions } = messages[index];
    delete messages[index].versions;
    versions.tails[versions.at] = messages.splice(index);
    messages.push(...versions.tails[at]);
    versions.tails[at] = null;
    versions.at = at;
    messages[index].versions = versions;
    conversation.skipped = Math.min(conversation.skipped, index);
}

// Show the version again that was shown before the last was begun, as nothing came of that.
export function takeBack(conversation, index) {
    const { messages } = conversation;
    const { tails, before } = messages[index].versions;
    showVersion(conversation, index, before);
    tails.pop();
    if (tails.length === 1) delete messages[index].versions;
}

// ---- What fits --------------------------------------------------------------

// The tokens of what was counted last, with its answer; 0 if nothing was.
export function tokensOf({ messages }) {
    const counted = messages.findLast((message) => message.prompt_tokens);
    return counted ? counted.context_tokens ?? counted.prompt_tokens + counted.tokens : 0;
}

// How many of the oldest messages to leave out: about as many as the newest need room for.
export function messagesToSkip(conversation, context) {
    const sizes = conversation.messages.map((message) => textOf(message).length);
    const all = sizes.slice(conversation.skipped).reduce((sum, size) => sum + size, 0);
    const known = tokensOf(conversation) || context;
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
