// Text files that go with a question: dropped, pasted or chosen, and counted before it is sent.

import { button, element, part } from "./document.js";
import { countTokens } from "./server.js";
import { language, say } from "./texts.js";

const MAX_CHARACTERS = 2 ** 20; // as many as the server counts
const CONTROLS = /[\x00-\x08\x0e-\x1a\x1c-\x1f]/;

// The text of a file's bytes; null if they are none. What is no Unicode is read as the reader's
// language was written before.
function decode(bytes) {
    const begins = (...start) => start.every((byte, i) => bytes[i] === byte);
    const older = language === "zh" ? "gb18030" : "windows-1252";
    let encodings = ["utf-8", older];
    if (begins(0xff, 0xfe)) encodings = ["utf-16le"];
    if (begins(0xfe, 0xff)) encodings = ["utf-16be"];
    for (const encoding of encodings) {
        try {
            const text = new TextDecoder(encoding, { fatal: true }).decode(bytes);
            return CONTROLS.test(text) ? null : text;
        } catch { /* The next one may know it. */ }
    }
    return null;
}

export async function readText(file) {
    if (file.size > 4 * MAX_CHARACTERS) return { refusal: "fileTooLarge" };
    const text = decode(new Uint8Array(await file.arrayBuffer()));
    if (text === null) return { refusal: "fileIsNoText" };
    return text.length > MAX_CHARACTERS ? { refusal: "fileTooLarge" } : { text };
}

// The files beside the text box. `changed` is called when there are others.
export class Attachments {
    files = [];

    constructor(changed) {
        this.changed = changed;
    }

    // Read and count them; those that are no text or too long are refused, by name.
    async add(list, context, model) {
        for (const file of list) {
            const refusal = await this.#take(file, context, model);
            part("notice").textContent = refusal ?? "";
            part("notice").hidden = !refusal;
            if (refusal) return;
        }
    }

    async #take(file, context, model) {
        const { text, refusal } = await readText(file);
        if (refusal) return say(refusal, { name: file.name });
        const taken = { name: file.name, text };
        this.files.push(taken);
        this.show();
        try {
            taken.tokens = await countTokens({ prompt: text, add_special_tokens: false, model });
        } catch { /* The server says it when the question is sent. */ }
        if (taken.tokens > context) {
            this.files = this.files.filter((other) => other !== taken);
            this.show();
            return say("fileDoesNotFit", { name: file.name, tokens: taken.tokens, context });
        }
        this.show();
        return null;
    }

    // Give them away, as they are sent.
    take() {
        const files = this.files.map(({ name, text }) => ({ name, text }));
        this.files = [];
        this.show();
        return files;
    }

    show() {
        part("files").replaceChildren(...this.files.map((file) => {
            const drop = button("removeFile", () => {
                this.files = this.files.filter((other) => other !== file);
                this.show();
                part("message").focus();
            });
            const label = say("removeFile", { name: file.name });
            Object.assign(drop, { textContent: "×", ariaLabel: label, title: label });
            const size = file.tokens === undefined ? "…" : say("tokens", { n: file.tokens });
            return element("li", {}, element("span", {}, file.name), element("small", {}, size), drop);
        }));
        part("files").hidden = !this.files.length;
        this.changed();
    }
}
