"""What a start can be told: a field is a flag, --device-map, and a variable, CHAT_DEVICE_MAP."""

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from serving import __version__
from serving.command_line import check_flags, command_line, setting_error
from serving.origins import host_of, normalised


def _check_memory(value: str) -> str:
    if value == "auto" or re.fullmatch(r"0?\.\d+|\d+(\.\d+)? ?[KMG]i?B", value):
        return value
    raise ValueError("must be auto, a fraction such as 0.5, or a size such as 4GiB")


def _check_object(value: str) -> str:
    try:
        if not value or isinstance(json.loads(value), dict):
            return value
    except ValueError:
        pass
    raise ValueError('must be a JSON object, such as {"enable_thinking": false}')


def _check_name(value: str) -> str:
    if value.isprintable() and value == value.strip() and len(value) <= 200:
        return value
    raise ValueError("must be a name of at most 200 characters, without spaces around it")


def _split_list(text: str) -> tuple[str, ...]:
    return tuple(part for part in map(str.strip, text.split(",")) if part)


def _split_adapters(given: Any) -> tuple[str, ...]:
    """NAME=FOLDER, several of them separated by commas. Raises ValueError."""
    pairs = _split_list(",".join([given] if isinstance(given, str) else given))
    for pair in pairs:
        if not re.fullmatch(r"[\w.:-]+=.+", pair):
            raise ValueError("must be NAME=FOLDER, such as poet=output/checkpoint-699")
    names = [pair.partition("=")[0] for pair in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"must not have two adapters of one name ({twice[0]})")
    return pairs


class Settings(BaseSettings):
    """What a start can be told; serving/command_line.py has the groups of --help."""

    model_config = SettingsConfigDict(
        env_prefix="CHAT_",
        env_ignore_empty=True,
        frozen=True,
        allow_inf_nan=False,
        cli_kebab_case=True,
        cli_avoid_json=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
    )

    model: str = Field(
        "demo",
        description="a name under models/, the folder of a checkpoint or a LoRA adapter, or a GGUF"
        " file; demo is"
        " downloaded",
    )
    base: str | None = Field(
        None,
        description="the model that the adapter in --model was trained on, where it is not found by"
        " the name that the adapter has for it",
    )
    served_model_name: Annotated[str, AfterValidator(_check_name)] = Field(
        "", description="what clients call the model; without it, as its folder is called"
    )
    adapter: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_adapters)] = Field(
        (),
        description="a LoRA adapter that requests choose by its name, beside the model itself; may"
        " be given several times",
    )
    check: bool = Field(
        False, description="load the model, print a summary and eight tokens, and exit"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="data type of the weights; auto: as in the checkpoint"
    )
    quantize: Literal["none", "8bit", "4bit"] = Field(
        "none",
        description="keep the weights in fewer bits: 8bit, or 4bit, which needs bitsandbytes on"
        " a card",
    )
    device_map: str = Field(
        "auto",
        description="auto, a device such as cpu or cuda:0, or a JSON map of module to device",
    )
    chat_template: Path | None = Field(
        None, description="Jinja file to use instead of the model's own chat template"
    )
    chat_template_kwargs: Annotated[str, AfterValidator(_check_object)] = Field(
        "", description="variables of the chat template that a request may set otherwise, as JSON"
    )
    cache_memory: Annotated[str, AfterValidator(_check_memory)] = Field(
        "auto",
        description="memory for the KV cache on each device: auto (most of a GPU's free memory; on"
        " the CPU 2 GiB, or half of what is free if that is less), a size such as 4GiB, or a"
        " fraction of the free memory such as 0.5",
    )
    reuse: bool = Field(
        True, description="prefix caching: reuse the KV cache for prompts that begin alike"
    )
    speculate: Literal["auto", "on", "off"] = Field(
        "off",
        description="several tokens a step, where an answer repeats what was said; auto: where that"
        " changes no answer",
    )
    host: str = Field("0.0.0.0", description="address to listen on")
    port: int = Field(6006, ge=1, le=65535, description="port to listen on")
    root_path: str = Field(
        "", description="path prefix that a reverse proxy removes, for example /model"
    )
    api_key: SecretStr = Field(
        SecretStr(""),
        description="API keys, separated by commas; sent as a Bearer token. Safer as CHAT_API_KEY:"
        " a flag is seen in the list of processes",
    )
    cors_origins: str = Field(
        "", description="origins whose web pages may call, separated by commas, or *"
    )
    allowed_hosts: str = Field(
        "", description="names by which callers without a key reach it, separated by commas, or *"
    )
    chat_page: bool = Field(True, description="serve the chat page at /chat")
    max_batch: int = Field(
        64, ge=1, le=1024, description="maximum number of requests computed at once"
    )
    max_waiting: int = Field(
        256, ge=1, description="maximum number of queued requests; further ones get 429"
    )
    prefill_chunk: int = Field(
        4096,
        ge=16,
        description="maximum prompt tokens in a step; fewer are taken where that is efficient",
    )
    kept_answers: int = Field(
        64,
        ge=0,
        le=2**20,
        description="MiB of answers that are kept for later calls of /v1/responses; 0 is none",
    )
    request_timeout: float = Field(
        600, gt=0, description="maximum seconds for a request, from its arrival to its end"
    )
    drain_timeout: float = Field(
        30, ge=0, description="seconds to finish running requests at shutdown"
    )
    log_level: Literal["debug", "info", "warning"] = Field(
        "info", description="debug adds the summary of --check; warning leaves out the requests"
    )
    log_json: bool = Field(False, description="log as JSON lines")
    log_prompts: bool = Field(False, description="include prompts in the log")

    @property
    def keys(self) -> tuple[str, ...]:
        return _split_list(self.api_key.get_secret_value())

    @property
    def origins(self) -> tuple[str, ...]:
        """Those whose pages may call, as browsers spell them."""
        return tuple(map(normalised, _split_list(self.cors_origins)))

    @property
    def hosts(self) -> tuple[str, ...]:
        """The server's names that are known."""
        return tuple(map(host_of, (*_split_list(self.allowed_hosts), *self.origins)))


def read_settings(arguments: list[str]) -> Settings:
    """Settings from flags, then variables, then defaults; exits with one sentence on a bad one."""
    check_flags(Settings, arguments)
    try:
        return Settings(_cli_settings_source=command_line(Settings, __version__)(args=arguments))
    except ValidationError as error:
        sys.exit(f"api.py: {setting_error(error.errors()[0], arguments)}.")
    except SettingsError as error:
        sys.exit(f"api.py: {error}.")
