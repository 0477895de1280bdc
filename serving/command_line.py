"""The command line of api.py: each setting is a flag, and --help shows them in groups."""

import argparse
from typing import Any

from pydantic_settings import BaseSettings, CliSettingsSource

GROUPS = {
    "Model": (
        "model",
        "base",
        "served_model_name",
        "check",
        "dtype",
        "quantize",
        "device_map",
        "chat_template",
        "chat_template_kwargs",
        "cache_memory",
        "reuse",
    ),
    "Server": (
        "host",
        "port",
        "root_path",
        "api_key",
        "cors_origins",
        "allowed_hosts",
        "chat_page",
    ),
    "Limits": ("max_batch", "max_waiting", "prefill_chunk", "request_timeout", "drain_timeout"),
    "Logging": ("log_level", "log_json", "log_prompts"),
}
# What stands for a flag's value, where its name's last word does not say it.
METAVARS = {
    "model": "NAME",
    "base": "NAME",
    "served_model_name": "NAME",
    "host": "ADDRESS",
    "device_map": "DEVICE",
    "chat_template": "FILE",
    "chat_template_kwargs": "JSON",
    "cache_memory": "SIZE",
    "max_batch": "N",
    "max_waiting": "N",
    "prefill_chunk": "N",
    "request_timeout": "SECONDS",
    "drain_timeout": "SECONDS",
    "api_key": "KEYS",
}
DESCRIPTION = "Serve a chat model over HTTP. Without a flag: the small demo model, on port 6006."
EPILOG = """\
Each flag is also an environment variable: --max-batch 8 is CHAT_MAX_BATCH=8. A flag goes first.

examples:
  python api.py                                   the demo model
  python api.py --model internlm2-7b              a model that model_download.py fetched
  python api.py --model /data/my-model --check    load it, say eight tokens, and exit
  CHAT_API_KEY=choose-one python api.py           callers need this key
  python api.py --host 127.0.0.1 --port 8000      only this machine can reach it
"""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows a switch and its opposite as --[no-]reuse."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"--[no-]{action.option_strings[0].removeprefix('--')}"
        return super()._format_action_invocation(action)


def group_of(name: str) -> str:
    """The group of --help in which a setting stands."""
    return next((group for group, names in GROUPS.items() if name in names), "Other")


def told_default(value: Any) -> str:
    """A setting's default as --help tells it; nothing where there is none."""
    if isinstance(value, bool):
        return f" (default: {'on' if value else 'off'})"
    return f" (default: {value})" if str(value or "").strip("*") else ""


def command_line(settings: type[BaseSettings], version: str) -> CliSettingsSource[Any]:
    """What reads the flags of these settings; calling it with `args` parses them.

    --help and --version print and exit.
    """
    parser = argparse.ArgumentParser(
        prog="api.py",
        usage="python api.py [--model NAME] [flags]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=HelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    filled = set(map(group_of, settings.model_fields))
    titles = [title for title in (*GROUPS, "Other") if title in filled]
    groups = {title: parser.add_argument_group(title) for title in titles}
    about = parser.add_argument_group("Help")
    about.add_argument("-h", "--help", action="help", help="show this text and exit")
    about.add_argument(
        "--version", action="version", version=f"chat-api {version}", help="show the version"
    )

    def add(_: Any, *flags: str, **options: Any) -> None:
        name = options["dest"]
        known = settings.model_fields[name]
        options["help"] = f"{known.description}{told_default(known.default)}".replace("%", "%%")
        if "metavar" in options and not options["metavar"].startswith("{"):
            options["metavar"] = METAVARS.get(name, name.rpartition("_")[2].upper())
        groups[group_of(name)].add_argument(*flags, **options)

    return CliSettingsSource(settings, root_parser=parser, add_argument_method=add)
