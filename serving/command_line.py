"""The command line of api.py: each setting is a flag, and --help shows them in groups."""

import argparse
import difflib
import os
import re
import sys
from typing import Any

from pydantic_settings import BaseSettings, CliSettingsSource

GROUPS = {
    "Model": (
        "model",
        "base",
        "served_model_name",
        "adapter",
        "check",
        "dtype",
        "quantize",
        "device_map",
        "chat_template",
        "chat_template_kwargs",
        "cache_memory",
        "reuse",
        "speculate",
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
    "Limits": (
        "max_batch",
        "max_waiting",
        "prefill_chunk",
        "kept_answers",
        "request_timeout",
        "drain_timeout",
    ),
    "Logging": ("log_level", "log_json", "log_prompts"),
}
# What stands for a flag's value, where its name's last word does not say it.
_METAVARS = {
    "model": "NAME",
    "base": "NAME",
    "served_model_name": "NAME",
    "adapter": "NAME=FOLDER",
    "host": "ADDRESS",
    "device_map": "DEVICE",
    "chat_template": "FILE",
    "chat_template_kwargs": "JSON",
    "cache_memory": "SIZE",
    "max_batch": "N",
    "max_waiting": "N",
    "kept_answers": "MIB",
    "prefill_chunk": "N",
    "request_timeout": "SECONDS",
    "drain_timeout": "SECONDS",
    "api_key": "KEYS",
}
_DESCRIPTION = "Serve a chat model over HTTP. Without a flag: the small demo model, on port 6006."
EPILOG = """\
Each flag is also an environment variable: --max-batch 8 is CHAT_MAX_BATCH=8. A flag goes first.

examples:
  python api.py                                   the demo model
  python api.py --model internlm2-7b              a model that model_download.py fetched
  python api.py --model /data/my-model --check    load it, say eight tokens, and exit
  CHAT_API_KEY=choose-one python api.py           callers need this key
  python api.py --host 127.0.0.1 --port 8000      only this machine can reach it
"""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows a switch and its opposite as --[no-]reuse."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"--[no-]{action.option_strings[0].removeprefix('--')}"
        return super()._format_action_invocation(action)


def _group_of(name: str) -> str:
    """The group of --help in which a setting stands."""
    return next((group for group, names in GROUPS.items() if name in names), "Other")


def _told_default(value: Any) -> str:
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
        description=_DESCRIPTION,
        epilog=EPILOG,
        formatter_class=_HelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    filled = set(map(_group_of, settings.model_fields))
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
        options["help"] = f"{known.description}{_told_default(known.default)}".replace("%", "%%")
        if "metavar" in options and not options["metavar"].startswith("{"):
            options["metavar"] = _METAVARS.get(name, name.rpartition("_")[2].upper())
        groups[_group_of(name)].add_argument(*flags, **options)

    return CliSettingsSource(settings, root_parser=parser, add_argument_method=add)


def _flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_flags(settings: type[BaseSettings], arguments: list[str]) -> None:
    """Exit with one sentence at the first flag that there is not, as argparse shows its usage."""
    known = [*map(_flag_of, settings.model_fields), "-h", "--help", "--version"]
    known += [
        "--no" + _flag_of(name)[1:]
        for name, setting in settings.model_fields.items()
        if setting.annotation is bool
    ]
    if arguments and not arguments[0].startswith("-"):
        sys.exit(f"api.py: {arguments[0]!r} is no flag; did you mean --model {arguments[0]}?")
    for flag in (argument.partition("=")[0] for argument in arguments):
        if flag in known or not re.match("--?[a-zA-Z]", flag):
            continue
        names = {name.strip("-"): name for name in known}
        hint = "--help lists them."
        if similar := difflib.get_close_matches(flag.strip("-"), names, 1):
            hint = f"did you mean {names[similar[0]]}?"
        sys.exit(f"api.py: there is no flag {flag}; {hint}")


# Of pydantic's errors, what the value must be.
_KINDS = {
    "int_parsing": "a whole number",
    "float_parsing": "a number",
    "bool_parsing": "true or false",
}


def setting_error(problem: Any, arguments: list[str]) -> str:
    """What is wrong with a setting, under the name by which it was given."""
    field_name, value = str(problem["loc"][0]), problem["input"]
    reason = re.sub("^Input should", "must", problem["msg"].removeprefix("Value error, "))
    if kind := _KINDS.get(problem["type"]):
        reason = f"must be {kind}"
    if field_name == "port":
        reason = "must be a whole number from 1 to 65535"
    told = f"{reason}, not {value!r}"
    name, variable = _flag_of(field_name), f"CHAT_{field_name.upper()}"
    if variable not in os.environ or any(a.partition("=")[0] == name for a in arguments):
        return f"{name}: {told}"
    if str(value).startswith("tcp://"):
        told += (
            "; Kubernetes sets this variable for a Service called chat: set enableServiceLinks:"
            " false in the pod, or give the Service another name"
        )
    return f"{variable}: {told}"
