// The dashboard: draws what one stream of events tells, and asks for the key if there is one.

const TEXTS = {
    chat: ["Chat", "对话"],
    key: ["The server's key", "服务器密钥"],
    send: ["Send", "确定"],
    requests: ["Requests that run", "正在处理的请求"],
    id: ["Request", "请求"],
    route: ["Route", "接口"],
    age: ["Seconds", "秒"],
    asked: ["Prompt tokens", "输入 token"],
    answered: ["Answer tokens", "输出 token"],
    none: ["None.", "没有。"],
    start: ["What the start decided", "启动时的选择"],
    offline: ["not reachable, trying again", "无法连接，正在重试"],
    loading: ["the model is loading", "正在加载模型"],
    ready: ["ready", "就绪"],
    draining: ["stopping", "正在停止"],
    dead: ["the model computes nothing any more", "模型已停止计算"],
    generated: ["Answer tokens a second", "每秒输出 token"],
    read: ["Prompt tokens a second", "每秒输入 token"],
    computed: ["computed", "计算"],
    cached: ["from the cache", "缓存命中"],
    batch: ["Requests", "请求数"],
    running: ["running", "处理中"],
    waiting: ["waiting", "等待中"],
    firstToken: ["Time to the first token, last minute", "首 token 用时（最近一分钟）"],
    eachToken: ["Time per later token, last minute", "每个后续 token 用时（最近一分钟）"],
    median: ["median", "中位数"],
    worst: ["99 %", "99%"],
    cache: ["KV cache", "KV 缓存"],
    used: ["used", "已用"],
    kept: ["kept prefixes", "保留的前缀"],
    states: ["Slots for states", "状态槽"],
    memory: ["Memory", "内存"],
    process: ["process", "进程"],
    card: ["card", "显卡"],
};
const LANGUAGES = ["en", "zh"];
const MAX_SAMPLES = 300;
// The chat page's storage, whose key and language are this page's too.
const PREFIX = `chat-api:${location.pathname.replace(/dashboard\/$/, "chat/")}:`;

const part = (id) => document.getElementById(id);

function stored(storage, name) {
    try {
        return window[storage].getItem(PREFIX + name);
    } catch {
        return null; // where the browser forbids a page to store anything
    }
}

function parsed(text) {
    try {
        return JSON.parse(text);
    } catch {
        return null;
    }
}

let language = parsed(stored("localStorage", "language")) ?? (navigator.language.startsWith("zh") ? "zh" : "en");
let key = stored("sessionStorage", "key") ?? parsed(stored("localStorage", "key")) ?? "";
let state = "offline";
let facts = {};
const samples = [];

const say = (name) => TEXTS[name][LANGUAGES.indexOf(language)];

// ---- Drawing ----------------------------------------------------------------

const count = (value) => Math.round(value).toLocaleString(language);
const rate = (value) => value.toLocaleString(language, { maximumFractionDigits: value < 10 ? 1 : 0 });
const milliseconds = (value) => (value < 1 ? `${Math.round(1000 * value)} ms` : `${value.toFixed(1)} s`);
const gibibytes = (value) => `${(value / 2 ** 30).toFixed(2)} GiB`;

// How fast a count rose up to a sample, in units a second, over the last few seconds; a page that
// nobody looked at has gaps.
function rise(name) {
    return (i) => {
        const now = samples[i];
        const before = samples.slice(Math.max(0, i - 4), i).find(({ time }) => now.time - time < 6);
        if (!before) return null;
        return Math.max(0, now[name] - before[name]) / (now.time - before.time);
    };
}

const value = (name) => (i) => samples[i][name] ?? null;
const quantile = (name, p) => (i) => samples[i][name]?.[p] ?? null;
const computed = (i) => {
    const [all, cached] = [rise("prompt_tokens")(i), rise("cached_tokens")(i)];
    return all === null ? null : Math.max(0, all - cached);
};
const CHARTS = [
    { name: "generated", format: rate, lines: [["", rise("completion_tokens")]] },
    { name: "read", format: rate, lines: [["computed", computed], ["cached", rise("cached_tokens")]] },
    { name: "batch", format: count, lines: [["running", value("running")], ["waiting", value("waiting")]] },
    {
        name: "firstToken", format: milliseconds,
        lines: [["median", quantile("first_token", "p50")], ["worst", quantile("first_token", "p99")]],
    },
    {
        name: "eachToken", format: milliseconds,
        lines: [["median", quantile("each_token", "p50")], ["worst", quantile("each_token", "p99")]],
    },
    {
        name: "cache", format: count, most: "cache_tokens",
        lines: [["used", value("cache_tokens_used")], ["kept", value("cache_tokens_kept")]],
    },
    // Only of a model whose layers keep states.
    { name: "states", format: count, lines: [["used", value("state_slots_used")]], most: "state_slots" },
    { name: "memory", format: gibibytes, lines: [["process", value("memory")], ["card", value("device_memory")]] },
];
const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes, ...children) {
    const node = document.createElementNS(SVG, tag);
    for (const [name, text] of Object.entries(attributes)) node.setAttribute(name, text);
    node.append(...children);
    return node;
}

function element(tag, properties, ...children) {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
}

const isThere = ({ name, most }) => name !== "states" || samples.at(-1)?.[most] > 0;

function chart({ name, format, lines, most }) {
    const series = lines.map(([label, at]) => [label, samples.map((_, i) => at(i))]);
    const shown = series.filter(([, values]) => values.some((v) => v !== null));
    const bound = most && samples.at(-1)?.[most];
    const top = Math.max(1e-9, bound || 0, ...shown.flatMap(([, values]) => values));
    const points = (values) => values
        .map((v, i) => (v === null ? "" : `${MAX_SAMPLES - values.length + i},${100 - (100 * v) / top}`))
        .filter(Boolean).join(" ");
    const last = shown.map(([label, values]) => {
        const latest = values.findLast((v) => v !== null);
        return element("span", {}, `${label && say(label)} ${format(latest)}${bound ? ` / ${format(bound)}` : ""}`.trim());
    });
    const drawing = svg(
        "svg", { viewBox: `0 0 ${MAX_SAMPLES} 100`, preserveAspectRatio: "none", "aria-hidden": "true" },
        svg("line", { x1: 0, y1: 100, x2: MAX_SAMPLES, y2: 100 }),
        ...shown.map(([, values], i) => svg("polyline", { points: points(values), class: i ? "second" : "" })),
    );
    return element(
        "figure", { id: name },
        element("figcaption", {}, element("h2", {}, say(name)), element("div", { className: "values" }, ...last)),
        drawing,
    );
}

function draw() {
    document.documentElement.lang = language;
    for (const node of document.querySelectorAll("[data-text]")) node.textContent = say(node.dataset.text);
    for (const node of document.querySelectorAll("[data-label]")) node.ariaLabel = say(node.dataset.label);
    const other = language === "en" ? ["中文", "zh"] : ["English", "en"];
    [part("language").textContent, part("language").lang] = other;
    part("state").textContent = say(state);
    part("charts").replaceChildren(...CHARTS.filter(isThere).map(chart));
    const requests = samples.at(-1)?.requests ?? [];
    part("none").hidden = requests.length > 0;
    part("requests").replaceChildren(...requests.map((one) => element(
        "tr", {},
        ...[one.id.slice(0, 12), one.route, one.seconds, count(one.prompt_tokens), count(one.completion_tokens)]
            .map((text) => element("td", {}, String(text))),
    )));
    const { name, ...rest } = facts;
    if (name) {
        part("model").textContent = name;
        document.title = `${name} · chat-api`;
    }
    part("facts").replaceChildren(...Object.entries(rest).flatMap(([about, said]) => [
        element("dt", {}, about), element("dd", {}, said),
    ]));
}

// ---- The stream -------------------------------------------------------------

function take(told) {
    if (told.first) samples.length = 0; // it has all that there is
    samples.push(...told.samples);
    samples.splice(0, samples.length - MAX_SAMPLES);
    facts = told.facts;
    state = samples.at(-1)?.status ?? state;
    if (!document.hidden) draw();
}

async function follow() {
    // A header holds bytes, which JavaScript writes as characters up to 255.
    const bytes = new TextEncoder().encode(key);
    const headers = key ? { Authorization: `Bearer ${String.fromCharCode(...bytes)}` } : {};
    const response = await fetch("events", { headers });
    part("ask").hidden = response.status !== 401;
    if (response.status === 401) return false;
    if (!response.ok) throw new Error(response.status);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let held = "";
    for (;;) {
        const { value: text, done } = await reader.read();
        if (done) return true;
        const lines = (held + text).split("\n");
        held = lines.pop();
        for (const line of lines) if (line.startsWith("data: ")) take(JSON.parse(line.slice(6)));
    }
}

async function watch() {
    let again = true;
    try {
        again = await follow();
    } catch {
        // said below
    }
    if (!again) return;
    state = "offline";
    draw();
    setTimeout(watch, 2000);
}

part("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    key = part("key").value.trim();
    try {
        sessionStorage.setItem(`${PREFIX}key`, key);
    } catch {
        // it is asked for again then
    }
    watch();
});
part("language").addEventListener("click", () => {
    language = language === "en" ? "zh" : "en";
    try {
        localStorage.setItem(`${PREFIX}language`, JSON.stringify(language));
    } catch {
        // as above
    }
    draw();
});
document.addEventListener("visibilitychange", draw);
draw();
watch();
