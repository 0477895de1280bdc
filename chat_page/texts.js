// The page's texts, in English and in Chinese.

const TEXTS = {
    conversations: ["Conversations", "对话列表"],
    newChat: ["New chat", "新对话"],
    search: ["Search", "搜索"],
    settings: ["Settings", "设置"],
    close: ["Close", "关闭"],
    reset: ["Reset to the model's defaults", "恢复模型默认值"],
    greeting: ["What would you like to know?", "想聊点什么？"],
    examples: [
        [
            "Give me three tips for sleeping better.",
            "Write a Python function that reverses a string.",
            "What is the chemical formula of water?",
        ],
        [
            "怎样才能睡得更好？给我三条建议。",
            "用 Python 写一个反转字符串的函数。",
            "水的化学式是什么？",
        ],
    ],
    demo: [
        "This is the small demo model, for trying the server: it is often wrong.",
        "这是很小的演示模型，只用来试服务：经常答错，也不会中文，请用英文提问。",
    ],
    message: ["Write a message", "输入消息"],
    hint: ["Enter sends, Shift+Enter starts a new line", "Enter 发送，Shift+Enter 换行"],
    send: ["Send", "发送"],
    stop: ["Stop", "停止"],
    toEnd: ["Go to the end", "回到底部"],
    copy: ["Copy", "复制"],
    copied: ["Copied", "已复制"],
    edit: ["Edit", "编辑"],
    cancel: ["Cancel", "取消"],
    regenerate: ["Regenerate", "重新生成"],
    continue: ["Continue", "继续"],
    retry: ["Retry", "重试"],
    rename: ["Rename", "重命名"],
    remove: ["Delete", "删除"],
    confirmRemove: ["Delete “{title}”?", "删除“{title}”？"],
    exportMarkdown: ["Export as Markdown", "导出为 Markdown"],
    exportJson: ["Export as JSON", "导出为 JSON"],
    import: ["Import", "导入"],
    exportAll: ["Export all", "全部导出"],
    unreadable: ["{name} is no conversation that this page can read ({message}).", "{name} 不是本页能读取的对话（{message}）。"],
    missing: ["That conversation is not in this browser.", "此浏览器中没有该对话。"],
    attach: ["Attach text files", "添加文本文件"],
    removeFile: ["Remove {name}", "移除 {name}"],
    fileIsNoText: ["{name} is not a text file.", "{name} 不是文本文件。"],
    fileTooLarge: ["{name} is larger than a million characters.", "{name} 超过一百万个字符。"],
    fileDoesNotFit: [
        "{name} has {tokens} tokens; the model's context holds {context}.",
        "{name} 有 {tokens} 个 token，模型的上下文只能容纳 {context} 个。",
    ],
    tokens: ["{n} tokens", "{n} 个 token"],
    fullness: ["{n} of {context} tokens", "已用 {n} / {context} 个 token"],
    contextLabel: ["How full the context is", "上下文已用"],
    earlier: ["Earlier version", "上一个版本"],
    later: ["Later version", "下一个版本"],
    version: ["Version {n} of {count}", "版本 {n}/{count}"],
    toolCall: ["Tool call", "工具调用"],
    toolResult: ["Tool result", "工具结果"],
    more: ["Actions for “{title}”", "“{title}”的操作"],
    you: ["You", "你"],
    thinking: ["Thinking", "思考过程"],
    thought: ["Thought for {n} s", "思考了 {n} 秒"],
    answering: ["Answering", "正在回答"],
    answered: ["The answer is complete", "回答完毕"],
    speed: ["{tokens} tokens · {speed} tokens/s", "{tokens} 个 token · 每秒 {speed} 个"],
    length: ["The answer reached the maximum length.", "回答已达到长度上限。"],
    stopped: ["Stopped.", "已停止。"],
    broken: ["Connection lost. This is what arrived.", "连接中断，以上是已收到的内容。"],
    elsewhere: ["Being answered in another tab.", "正在另一个标签页中回答。"],
    code: ["Code", "代码"],
    table: ["Table", "表格"],
    skipped: ["The model no longer sees the {n} turns above.", "模型已看不到以上 {n} 轮对话。"],
    loading: ["The model is loading.", "模型正在加载。"],
    draining: ["The server is stopping.", "服务器正在停止。"],
    dead: ["The server cannot answer and must be restarted.", "服务器无法回答，需要重启。"],
    offline: ["Cannot reach the server.", "无法连接服务器。"],
    unanswered: ["This question has no answer yet.", "这个问题还没有回答。"],
    busy: ["The server is busy; trying again in {n} s.", "服务器繁忙，{n} 秒后重试。"],
    key: ["This server needs an API key.", "此服务器需要 API Key。"],
    keyLabel: ["API key", "API Key"],
    keyRefused: ["Invalid API key.", "API Key 不正确。"],
    remember: ["Remember it in this browser", "在此浏览器中记住"],
    use: ["Save", "保存"],
    tooLong: ["The conversation no longer fits into the model's context.", "对话已超出模型的上下文长度。"],
    questionTooLong: ["The question does not fit into the model's context; shorten it.", "问题超出了模型的上下文长度，请缩短后重试。"],
    skip: ["Leave out the oldest turns ({n}) and retry", "去掉最早的 {n} 轮对话后重试"],
    full: [
        "This browser's storage is full: the conversation is not saved. Export or delete some.",
        "浏览器存储已满，当前对话未保存。请导出或删除一些对话。",
    ],
    system: ["System prompt", "系统提示词"],
    max_new_tokens: ["Max new tokens", "最大生成 token 数"],
    temperature: ["Temperature (0: greedy)", "温度（0 为贪心）"],
    top_p: ["Top-p", "Top-p"],
    top_k: ["Top-k (0: off)", "Top-k（0 为关闭）"],
    min_p: ["Min-p (0: off)", "Min-p（0 为关闭）"],
    repetition_penalty: ["Repetition penalty (1: off)", "重复惩罚（1 为关闭）"],
    presence_penalty: ["Presence penalty", "存在惩罚"],
    frequency_penalty: ["Frequency penalty", "频率惩罚"],
    seed: ["Seed", "随机种子"],
    model: ["Model or adapter", "模型或适配器"],
    random: ["random", "随机"],
    unlimited: ["no limit", "不限"],
};
const LANGUAGES = ["en", "zh"];

// The server's errors, which it tells in English.
const ERRORS = {
    body_too_large: "内容太长，无法发送。",
    internal_error: "服务器出错，原因见服务器日志。",
    invalid_value: "服务器不接受这个请求：{message}",
    step_failed: "模型处理这个请求时出错，请重试。",
    timed_out: "回答用时过长，已中止。",
};

export let language = "en";

export function speak(chosen) {
    language = chosen;
}

// A text in the chosen language; `values` fill its {places}.
export function say(name, values = {}) {
    const text = TEXTS[name][LANGUAGES.indexOf(language)];
    return text.replace(/\{(\w+)\}/g, (_, value) => values[value]);
}

// An error of the server in the chosen language.
export function sayError(code, message) {
    return language === "zh" ? (ERRORS[code] ?? "{message}").replace("{message}", message) : message;
}

// Questions to begin with; the demo model is asked in English, as it knows no Chinese.
export function examples(isDemo) {
    return TEXTS.examples[isDemo ? 0 : LANGUAGES.indexOf(language)];
}
