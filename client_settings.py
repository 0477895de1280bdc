"""Settings of coding agents for one server, with its address, model and context.

`python request.py --print-client codex` prints them.
"""

import json
import sys
from urllib.parse import urlsplit

import requests

# What to paste into a shell; the key is read from CHAT_API_KEY there. The flags make the agents'
# prompts small enough for a context of some thousand tokens.
CODEX = """\
mkdir -p codex-home
cat > codex-home/catalogue.json <<'END'
{catalogue}
END
cat > codex-home/config.toml <<END
model = "{model}"
model_provider = "local"
model_catalog_json = "$PWD/codex-home/catalogue.json"
web_search = "disabled"
model_providers.local = {{ name = "local", base_url = "{url}/v1", wire_api = "responses", \
env_key = "LOCAL_KEY", stream_idle_timeout_ms = 1800000, stream_max_retries = 30 }}
END
CODEX_HOME="$PWD/codex-home" LOCAL_KEY="${{CHAT_API_KEY:-none}}" codex --disable multi_agent \\
  --disable goals --disable view_image --disable plugins --disable apps
"""
CLAUDE = """\
ANTHROPIC_BASE_URL={url} ANTHROPIC_AUTH_TOKEN="${{CHAT_API_KEY:-none}}" \\
ANTHROPIC_MODEL={model} ANTHROPIC_DEFAULT_OPUS_MODEL={model} \\
ANTHROPIC_DEFAULT_HAIKU_MODEL={model} CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1 \\
CLAUDE_CODE_MAX_CONTEXT_TOKENS={context} CLAUDE_CODE_MAX_OUTPUT_TOKENS={answer} \\
claude --bare --tools Read,Edit,Bash
"""
OPENCODE = """\
cat > opencode.json <<'END'
{provider}
END
OPENCODE_DISABLE_MODELS_FETCH=1 opencode -m local/{model}
"""
TEMPLATES = {"codex": CODEX, "claude": CLAUDE, "opencode": OPENCODE}
# As a catalogue of Codex has it: it knows neither the model nor its context by itself.
CATALOGUE = {
    "description": None,
    "supported_reasoning_levels": [],
    "shell_type": "unified_exec",
    "visibility": "list",
    "supported_in_api": True,
    "priority": 1,
    "upgrade": None,
    "base_instructions": "You are a coding agent. Work with the tools.",
    "supports_reasoning_summaries": False,
    "support_verbosity": False,
    "default_verbosity": None,
    "apply_patch_tool_type": "freeform",
    "truncation_policy": {"mode": "tokens", "limit": 4000},
    "supports_parallel_tool_calls": True,
    "experimental_supported_tools": [],
    "input_modalities": ["text"],
}


def client_settings(client: str, url: str, api_key: str) -> str:
    """What to paste so that a coding agent asks this server, for its model and context."""
    session = requests.Session()
    # A proxy that the environment names would look for 127.0.0.1 on a machine of its own.
    session.trust_env = urlsplit(url).hostname not in ("127.0.0.1", "localhost")
    headers = {"Authorization": f"Bearer {api_key}".encode()} if api_key else {}
    answer = session.get(f"{url}/v1/models", headers=headers, timeout=(10, 30))
    answer.raise_for_status()
    card = answer.json()["data"][0]
    model, context = card["id"], card["context_length"]
    names = {"slug": model, "display_name": model, "context_window": context}
    longest = max(1, context // 8)
    options = {"baseURL": f"{url}/v1", "apiKey": "{env:CHAT_API_KEY}"}
    local = {
        "npm": "@ai-sdk/openai-compatible",
        "options": options,
        "models": {model: {"limit": {"context": context, "output": longest}}},
    }
    return TEMPLATES[client].format(
        url=url,
        model=model,
        context=context,
        answer=longest,
        catalogue=json.dumps({"models": [CATALOGUE | names]}, indent=1),
        provider=json.dumps({"provider": {"local": local}}, indent=1),
    )


def print_settings(client: str, url: str, api_key: str) -> int:
    """Print the settings; the exit status."""
    if client not in TEMPLATES:
        sys.stderr.write(f"request.py: {client!r} is none of {', '.join(TEMPLATES)}\n")
        return 2
    try:
        sys.stdout.write(client_settings(client, url.rstrip("/"), api_key))
    except (requests.RequestException, ValueError, LookupError) as error:
        sys.stderr.write(f"request.py: the server at {url} does not say what it serves: {error}\n")
        return 1
    return 0
