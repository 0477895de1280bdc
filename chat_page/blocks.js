// How an answer's text is taken apart: its thought, and blocks that are rendered by themselves.

const OPENING = "<think>";
const CLOSING = "</think>";

// Whether a mark is only spoken of: between quotes, or as code.
function isMentioned(content, start, end) {
    const line = content.slice(content.lastIndexOf("\n", start - 1) + 1, start);
    const isQuoted = /["'“‘「『]$/.test(line) && /^(?:["'”’」』]|$)/.test(content.slice(end, end + 1));
    return isQuoted || (line.split("`").length - 1) % 2 === 1;
}

// One that no mark has begun stands at an edge of its line, and not in a block of code.
function endsUnbegun(content, start, end) {
    const isAtEdge = start === 0 || content[start - 1] === "\n" || content[end] === "\n";
    const fences = content.slice(0, start).match(/^\s*(?:```|~~~)/gm) ?? [];
    return isAtEdge && fences.length % 2 === 0;
}

// A model's thinking, which it may begin without a mark where its template has written it.
export function splitThought(content) {
    const begun = content.trimStart().startsWith(OPENING);
    let start = content.indexOf(CLOSING);
    for (; start >= 0; start = content.indexOf(CLOSING, start + 1)) {
        const end = start + CLOSING.length;
        if (isMentioned(content, start, end)) continue;
        if (begun || endsUnbegun(content, start, end)) break;
    }
    if (start < 0 && !begun) return { thought: "", text: content };
    const thought = content.slice(0, start < 0 ? undefined : start);
    const text = start < 0 ? "" : content.slice(start + CLOSING.length).trimStart();
    return { thought: (begun ? thought.replace(OPENING, "") : thought).trim(), text };
}

// ---- Blocks -----------------------------------------------------------------

// What a model calls, and what it was told, in the marks of its own answer.
const CALL = /^<(tool_call|tool_response)>\s*/;

export function callOf(piece) {
    const mark = piece.match(CALL);
    if (!mark) return null;
    const inner = piece.slice(mark[0].length).replace(/\s*<\/tool_(?:call|response)>\s*$/, "");
    const name = inner.match(/"name"\s*:\s*"([^"]+)"|<function=([^>\s]+)>/);
    let shown = inner;
    try {
        const value = JSON.parse(inner);
        shown = JSON.stringify(value.arguments ?? value, null, 2);
    } catch { /* As it came. */ }
    return { kind: mark[1], name: name?.[1] ?? name?.[2] ?? "", shown };
}

const MAX_PIECE = 12000; // characters, of at most three bytes each, in one call of the renderer

// Finds where a text may be cut, as it grows: before blocks that stand on their own.
export class Cutter {
    #position = 0; // of the first line that was not read
    #taken = 0;
    #cuts = [];
    #hard = new Set(); // cuts beside a tool's call, over which nothing is joined
    #closing = null; // the line that ends the code or formula we are in
    #isCalled = false; // whether the line before ended a tool's call
    #free = false; // whether the line before ended a block

    read(text) {
        for (let end; (end = text.indexOf("\n", this.#position)) >= 0; this.#position = end + 1) {
            this.#readLine(text.slice(this.#position, end));
        }
        if (/\S/.test(text.charAt(this.#position))) this.#leaveCall();
        // The first character of a line is enough to know that a block begins.
        if (!this.#closing && this.#free && /\S/.test(text.charAt(this.#position))) this.#cut();
    }

    #cut() {
        if (this.#position > this.#taken && this.#cuts.at(-1) !== this.#position) {
            this.#cuts.push(this.#position);
        }
        this.#free = false;
    }

    #cutHard() {
        this.#cut();
        this.#hard.add(this.#position);
    }

    // The ends of the pieces to render now. Small ones are joined: much may have come at once, as
    // in a conversation that is opened. `end` is the text's, if it has one yet.
    *take(end) {
        const ends = end ? [...this.#cuts, end] : this.#cuts;
        for (const [i, cut] of ends.entries()) {
            const isLast = i === ends.length - 1;
            const fits = !isLast && ends[i + 1] - this.#taken <= MAX_PIECE;
            if (fits && !this.#hard.has(cut)) continue;
            while (this.#taken < cut) {
                this.#taken = Math.min(cut, this.#taken + MAX_PIECE);
                yield this.#taken;
            }
        }
        this.#cuts = [];
    }

    #leaveCall() {
        if (!this.#isCalled) return;
        this.#isCalled = false;
        this.#cutHard();
    }

    #readLine(line) {
        this.#leaveCall();
        if (this.#closing) {
            this.#free = this.#closing.test(line) && /^\S/.test(line);
            if (!this.#closing.test(line)) return;
            this.#isCalled = this.#closing.source.includes("tool_");
            this.#closing = null;
            return;
        }
        const call = line.match(CALL)?.[1];
        if (call) {
            this.#cutHard();
            this.#closing = new RegExp(`</${call}>\\s*$`);
            if (this.#closing.test(line)) [this.#closing, this.#isCalled] = [null, true];
            return;
        }
        if (this.#free && /^\S/.test(line)) this.#cut();
        this.#free = !line.trim();
        const fence = line.match(/^\s*(?:(?:[-*+]|\d+[.)])\s+)?(`{3,}|~{3,})[^`]*$/)?.[1];
        if (fence) this.#closing = new RegExp(`^\\s*${fence[0]}{${fence.length},}\\s*$`);
        else if (/^\s*\$\$(?!.*\$\$)/.test(line)) this.#closing = /\$\$/;
        else if (/^\s*\\\[(?!.*\\\])/.test(line)) this.#closing = /\\\]/;
    }
}
