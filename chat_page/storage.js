// What this browser keeps: one item for each conversation, so that tabs do not overwrite each
// other's.

// Reading these throws where the browser forbids a page to store anything.
function storageOf(name) {
    try {
        return window[name];
    } catch {
        return null;
    }
}

export const local = storageOf("localStorage");
export const session = storageOf("sessionStorage");
export const PREFIX = `chat-api:${location.pathname}:`;
export const CONVERSATION = `${PREFIX}conversation:`;

export function load(key, fallback = null) {
    try {
        return JSON.parse(local.getItem(key)) ?? fallback;
    } catch {
        return fallback;
    }
}

export function store(key, value) {
    try {
        local.setItem(key, JSON.stringify(value));
        return true;
    } catch {
        return false;
    }
}

export const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2, 10);

export function savedConversations() {
    const keys = Object.keys(local ?? {}).filter((key) => key.startsWith(CONVERSATION));
    return keys.map((key) => load(key)).filter(Boolean).sort((a, b) => b.updated - a.updated);
}

export function loadConversation(id, unfinished = "broken") {
    const conversation = load(CONVERSATION + id);
    // Saved while it came: by a page that did not live to its end, or by another tab.
    for (const message of conversation?.messages ?? []) {
        if (message.role !== "assistant") continue;
        if (!message.finish || message.finish === "elsewhere") message.finish = unfinished;
    }
    return conversation;
}

