// How an answer's text is taken apart: its thought, and blocks that are rendered by themselves.

// A model's thinking, which it may begin without a tag where its template has written it.
export function splitThought(content) {
    const end = content.indexOf("</think>");
    const begun = content.trimStart().startsWith("<think>");
    if (end < 0 && !begun) return { thought: "", text: content };
    const thought = content.slice(0, end < 0 ? undefined : end).replace("<think>", "").trim();
    return { thought, text: end < 0 ? "" : content.slice(end + 8).trimStart() };
}

const MAX_PIECE = 12000; // characters, of at most three bytes each, in one call of the renderer

// Finds where a text may be cut, as it grows: before blocks that stand on their own.
export class Cutter {
    #position = 0; // of the first line that was not read
    #taken = 0;
    #cuts = [];
    #closing = null; // the line that ends the code or formula we are in
    #free = false; // whether the line before ended a block

    read(text) {
        for (let end; (end = text.indexOf("\n", this.#position)) >= 0; this.#position = end + 1) {
            this.#readLine(text.slice(this.#position, end));
        }
        // The first character of a line is enough to know that a block begins.
        if (!this.#closing && this.#free && /\S/.test(text.charAt(this.#position))) this.#cut();
    }

    #cut() {
        if (this.#position > this.#taken) this.#cuts.push(this.#position);
        this.#free = false;
    }

    // The ends of the pieces to render now. Small ones are joined: much may have come at once, as
    // in a conversation that is opened. `end` is the text's, if it has one yet.
    *take(end) {
        const ends = end ? [...this.#cuts, end] : this.#cuts;
        for (const [i, cut] of ends.entries()) {
            const isLast = i === ends.length - 1;
            if (!isLast && ends[i + 1] - this.#taken <= MAX_PIECE) continue;
            while (this.#taken < cut) {
                this.#taken = Math.min(cut, this.#taken + MAX_PIECE);
                yield this.#taken;
            }
        }
        this.#cuts = [];
    }

    #readLine(line) {
        if (this.#closing) {
            this.#free = this.#closing.test(line) && /^\S/.test(line);
            if (this.#closing.test(line)) this.#closing = null;
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
