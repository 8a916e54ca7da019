"""What a service is told: flags, then the environment (`SAFEREDIR_SERVE_...`), then a TOML file, then these defaults."""

from __future__ import annotations

import os
import tomllib
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from saferedir.engines import DEFAULT_BUNDLE
from saferedir.engines.errors import RequestError

PREFIX = "SAFEREDIR_SERVE_"
Positive = Annotated[int, Field(ge=1)]


class Settings(BaseSettings):
    """Every setting of a service."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    bundle: str = Field(DEFAULT_BUNDLE, description="A folder, or the name of an embedded bundle.")
    bundle_digest: str | None = Field(None, description="SHA-256 of the bundle's manifest, which pins it.")
    backend: str = Field("auto", description="auto, or one that `saferedir doctor` lists.")
    threads: Positive | None = Field(None, description="Threads of an engine on the CPU; one for each core by default.")
    host: str = Field("127.0.0.1", description="Address to listen at.")
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    rows: Positive | None = Field(
        None, description="Pictures drawn at once; 4 on a CPU by default, on a card what the engines are made for."
    )
    queue: Positive = Field(64, description="Pictures that may wait for a row; more are refused with 429.")
    most_pictures: Annotated[int, Field(ge=1, le=10)] = Field(10, description="Pictures of one request at most.")
    most_steps: Annotated[int, Field(ge=1, le=999)] = Field(50, description="Denoising steps at most.")
    prompt_characters: Annotated[int, Field(ge=1, le=10_000)] = Field(10_000, description="Characters of a prompt at most.")
    body_bytes: Positive = Field(1_000_000, description="Bytes of a request's body at most.")
    seconds: Annotated[float, Field(gt=0)] = Field(60.0, description="Seconds that a request may take; it may ask for fewer.")
    drain_seconds: Annotated[float, Field(ge=0)] = Field(
        30.0, description="Seconds that running requests get when the service is stopped."
    )
    keys: Path | None = Field(None, description="File of hashed keys; without it anyone may draw.")
    policy: Path | None = Field(None, description="The operator's policy; without it every concept is redirected.")
    audit: str = Field("sqlite:///saferedir-audit.db", description="Database of the audit: SQLite or PostgreSQL, as a URL.")
    audit_key: SecretStr = Field(SecretStr(""), description="Key of the audit's chain of hashes.")
    drift_alarm: Annotated[float, Field(gt=0)] = Field(
        0.25, description="Population stability index above which a drift is logged."
    )
    trace_to: str | None = Field(None, description="OTLP endpoint over HTTP that spans are sent to.")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    page: bool = Field(False, description="Serve a page at / that draws, and shows what the safety does.")
    page_unprotected: bool = Field(False, description="Let the page draw unprotected as well. Logged, and recorded.")
    review_key: SecretStr = Field(
        SecretStr(""), description="What the page's review of the audit asks for; without it there is none."
    )
    keep_prompts: bool = Field(False, description="Keep the text of prompts beside the audit.")
    log_prompts: bool = Field(False, description="Write prompts to the log.")

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource, dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:  # fmt: skip
        return init_settings, env_settings, InitSettingsSource(settings_cls, _FILE.get({}))


#: What the file that is being read says.
_FILE: ContextVar[dict[str, Any]] = ContextVar("file")


def read_settings(flags: dict[str, Any], file: Path | None = None) -> Settings:
    """The settings in force: `flags` that are not None, the environment, `file`.

    Raises:
        RequestError: names the setting, and what is wrong with it.
    """
    _FILE.set({} if file is None else _read(file))
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "settings"
        raise RequestError(f"setting {name} is {first['input']!r}: {first['msg']}") from error


def to_environment(settings: Settings) -> None:
    """Put all of them where a worker's `read_settings({})` finds them."""
    for name in Settings.model_fields:
        value, variable = getattr(settings, name), f"{PREFIX}{name.upper()}"
        if value is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RequestError(f"{file} cannot be read as settings: {error}") from error
