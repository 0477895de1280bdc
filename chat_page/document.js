// What the page's scripts do with its document, whatever it shows.

import { say } from "./texts.js";

export function setTexts(within) {
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

export const part = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
}

export function button(name, action, className = "quiet", values = {}) {
    return element("button", { type: "button", className, onclick: action }, say(name, values));
}

// navigator.clipboard is missing where the page comes over plain HTTP from another machine.
export async function copy(text, from) {
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

export function download(name, type, text) {
    const url = URL.createObjectURL(new Blob([text], { type }));
    element("a", { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
}

// ---- Scrolling and keys -----------------------------------------------------

export const scroller = part("scroll");
export const isAtEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;

export function scrollToEnd() {
    scroller.scrollTop = scroller.scrollHeight;
}

// Change the page; who reads its end goes on reading its end.
export function keepPlace(change) {
    const follow = isAtEnd();
    change();
    if (follow) scrollToEnd();
}

export function fit(box) {
    box.style.height = "auto";
    box.style.height = `${box.scrollHeight + 2}px`;
}

// Enter, but not the one with which an input method takes a word (229 is Safari's sign of it).
export function onEnter(field, action, applies = () => true) {
    field.addEventListener("keydown", (event) => {
        const composes = event.isComposing || event.keyCode === 229;
        if (event.key !== "Enter" || event.shiftKey || composes || !applies()) return;
        event.preventDefault();
        action();
    });
}

// A finger has no Shift: its Enter is a new line, and the button sends.
const finger = matchMedia("(hover: none) and (pointer: coarse)");

export const onSend = (box, action) => onEnter(box, action, () => !finger.matches);
