"""What a service is told: flags, then the environment (`SAFEREDIR_SERVE_...`), then a TOML file, then these defaults."""

from __future__ import annotations

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
    threads: Positive | None = Field(None, description="Of an engine on the CPU; the cores that there are by default.")
    host: str = Field("127.0.0.1", description="Address to listen at.")
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    queue: Positive = Field(64, description="Pictures that may wait; more are refused with 429.")
    most_pictures: Annotated[int, Field(ge=1, le=10)] = Field(10, description="Of one request.")
    most_steps: Annotated[int, Field(ge=1, le=999)] = Field(50, description="Of one picture.")
    prompt_characters: Positive = Field(10_000, description="Of one prompt.")
    body_bytes: Positive = Field(1_000_000, description="Of one request.")
    seconds: Annotated[float, Field(gt=0)] = Field(60.0, description="That a request may take; a request may ask for fewer.")
    drain_seconds: Annotated[float, Field(ge=0)] = Field(30.0, description="For what is under way when the service is stopped.")
    keys: Path | None = Field(None, description="File of hashed keys; without it anyone may draw.")
    policy: Path | None = Field(None, description="The operator's policy; without it every concept is redirected.")
    audit: str = Field("sqlite:///saferedir-audit.db", description="Database of the audit: SQLite or PostgreSQL, as a URL.")
    audit_key: SecretStr = Field(SecretStr(""), description="Key of the audit's chain of hashes.")
    drift_alarm: Annotated[float, Field(gt=0)] = Field(
        0.25, description="Population stability index from which on a drift is told."
    )
    trace_to: str | None = Field(None, description="OTLP endpoint over HTTP that spans are sent to.")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    page: bool = Field(False, description="Serve a page at / that draws, and shows what the safety does.")
    page_unprotected: bool = Field(False, description="Let the page draw unprotected as well. Logged, and recorded.")
    review_key: SecretStr = Field(
        SecretStr(""), description="What the page's review of the audit asks for; without it there is none."
    )
    numbered: bool = Field(False, description="Whether a front gives requests their numbers, and a number's record is one.")
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


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RequestError(f"{file} cannot be read as settings: {error}") from error
