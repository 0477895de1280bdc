"""Ask the server a question, or chat with it, left with Ctrl-D or exit. Needs only requests."""

import argparse
import json
import os
import sys
from typing import Any
from urllib.parse import urlsplit

import requests

URL, KEY = "http://127.0.0.1:6006", os.environ.get("CHAT_API_KEY", "").split(",")[0]


def get_completion(prompt: str, history: Any = None, url: str = URL, api_key: str = KEY) -> str:
    """The model's response. Raises requests.RequestException, in the server's own words."""
    return str(post({"prompt": prompt, "history": history}, url, api_key).json()["response"])


def post(body: dict[str, Any], url: str, api_key: str) -> requests.Response:
    session = requests.Session()
    session.trust_env = urlsplit(url).hostname not in ("127.0.0.1", "localhost")  # no proxy for us
    headers = {"Authorization": f"Bearer {api_key}".encode()} if api_key else {}
    try:
        answer = session.post(url, json=body, headers=headers, stream=True, timeout=(10, None))
    except requests.ConnectionError as error:
        raise requests.ConnectionError(
            f"no server answers at {url}; start it with `python api.py`, or forward the port of a"
            " rented machine with `ssh -CN -L 6006:127.0.0.1:6006 -p PORT USER@HOST`"
        ) from error
    if answer.ok:
        return answer
    try:
        told = answer.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        told = f"{answer.reason}, says something else at {url}"
    if answer.status_code == 401 and api_key.startswith(('"', "'")):
        told += "; your key begins with a quotation mark, leave it out"
    raise requests.HTTPError(f"{told} ({answer.status_code})", response=answer)


def chat(prompt: str, history: list[Any], args: argparse.Namespace) -> list[Any]:
    """Print the answer as it comes; return the history with this turn added."""
    body = {"prompt": prompt, "history": history, "model": args.model, "stream": True}
    for line in post(body | {"truncate": True}, args.url, args.api_key).iter_lines():
        event = json.loads(line[6:]) if line.startswith(b"data: {") else {}
        if "error" in event:
            raise requests.HTTPError(event["error"]["message"])
        print(event.get("delta", ""), end="", flush=True)
        if "history" in event:
            print("" if event["finish_reason"] == "stop" else " … (cut off)")
            return list(event["history"])
    raise requests.ConnectionError("the answer broke off; is the server still there?")


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask the server a question, or chat with it.")
    parser.add_argument("prompt", nargs="?", help="the question; without one it is a chat")
    parser.add_argument("--url", default=URL, help=f"where the server is ({URL})")
    parser.add_argument("--api-key", default=KEY, help="one of its keys (CHAT_API_KEY)")
    parser.add_argument("--model", help="one of its adapters, or its own model, by its name")
    parser.add_argument("--print-client", help="codex, claude or opencode: print its settings")
    args = parser.parse_args()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    history, failed = list[Any](), 0
    if args.print_client:
        from client_settings import print_settings

        sys.exit(print_settings(args.print_client, args.url, args.api_key))
    try:
        for prompt in [args.prompt] if args.prompt else iter(lambda: input("> "), "exit"):
            try:
                history, failed = chat(prompt, history, args), 0
            except requests.RequestException as error:
                print(f"request.py: {error}", file=sys.stderr)
                failed = 1
    except (EOFError, KeyboardInterrupt):
        print()
    sys.exit(failed)


if __name__ == "__main__":
    main()
