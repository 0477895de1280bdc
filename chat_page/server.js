// What the page asks its server, and what can go wrong with that.

import { load, PREFIX, session, store, local } from "./storage.js";

let key = session?.getItem(`${PREFIX}key`) ?? load(`${PREFIX}key`, "");

export const hasKey = () => Boolean(key);

// Kept for this session, or for as long as this browser keeps anything.
export function useKey(given, isRemembered) {
    key = given;
    session?.setItem(`${PREFIX}key`, key);
    if (isRemembered) store(`${PREFIX}key`, key);
    else local?.removeItem(`${PREFIX}key`);
}

export class Trouble extends Error {
    constructor(kind, message = "", seconds = 0, code = "") {
        super(message);
        Object.assign(this, { kind, seconds, code });
    }
}

export async function request(path, body, signal) {
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


export async function* eventsOf(response) {
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

// How many tokens a text has, or a conversation with its template's marks.
export async function countTokens(what, signal) {
    return (await (await request("../tokenize", what, signal)).json()).count;
}
