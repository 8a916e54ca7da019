"""Commands of a service: run it, and look after its policy, its keys and its audit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from saferedir.engines.errors import MissingDependencyError, RequestError, VerificationError
from saferedir.runtime.command_line.console import BundleOption, JsonOption, console, print_json, progress

if TYPE_CHECKING:
    from saferedir.runtime.serve.audit import Audit

AuditOption = Annotated[str, typer.Option("--audit", help="Database of the audit, as a URL.", envvar="SAFEREDIR_SERVE_AUDIT")]
AuditKeyOption = Annotated[
    str, typer.Option("--audit-key", help="Key of the audit's chain of hashes.", envvar="SAFEREDIR_SERVE_AUDIT_KEY")
]
DEFAULT_AUDIT = "sqlite:///saferedir-audit.db"

policy_app = typer.Typer(
    help="The operator's policy: its JSON schema, and what another one would change.", no_args_is_help=True
)
audit_app = typer.Typer(help="The audit: whether it is whole, a picture drawn again, a prompt forgotten.", no_args_is_help=True)
keys_app = typer.Typer(help="Keys of tenants.", no_args_is_help=True)


def serve(
    bundle: Annotated[str | None, typer.Argument(help="Bundle folder, or the name of an embedded one.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings; the environment and flags come first.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen at; 127.0.0.1 by default.")] = None,
    port: Annotated[int | None, typer.Option(help="8000 by default.")] = None,
    backend: Annotated[str | None, typer.Option(help="auto, or one that `doctor` lists.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of an engine on the CPU.")] = None,
    queue: Annotated[int | None, typer.Option(help="Pictures that may wait.")] = None,
    policy: Annotated[Path | None, typer.Option(help="The operator's policy.")] = None,
    keys: Annotated[Path | None, typer.Option(help="File of hashed keys; without it anyone may draw.")] = None,
    audit: Annotated[str | None, typer.Option(help="Database of the audit, as a URL.")] = None,
    page: Annotated[bool, typer.Option("--page", help="Serve a page at / that draws, and shows what the safety does.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Print what would be in force, and what is wrong; serve nothing.")
    ] = False,
) -> None:
    """Serve pictures behind the OpenAI images interface, the safety always on. Needs `saferedir[serve]`.

    Every setting has a variable SAFEREDIR_SERVE_... and a line in the file, some a flag here; `--check` prints all.

    Examples:

    `saferedir serve`

    `saferedir serve bundle --host 0.0.0.0 --keys keys.json --policy policy.json --audit postgresql+psycopg:///audit`

    `saferedir serve --config serve.toml --check`
    """
    opening, settings_module = _needed("opening"), _needed("settings")
    flags = {
        "bundle": bundle, "host": host, "port": port, "backend": backend, "threads": threads, "queue": queue, "policy": policy,
        "keys": keys, "audit": audit, "page": page or None,
    }  # fmt: skip
    settings = settings_module.read_settings(flags, config)
    in_force = opening.check(settings)
    if check:
        print_json(in_force)
        return
    settings_module.to_environment(settings)
    opening.serve(settings)


@policy_app.command()
def schema() -> None:
    """Print the JSON schema of a policy.

    Example: `saferedir policy schema > policy.schema.json`
    """
    print_json(_needed("policies").schema())


@policy_app.command()
def diff(
    before: Annotated[Path, typer.Argument(help="Policy in force.")],
    after: Annotated[Path, typer.Argument(help="Policy that is to come.")],
    prompts: Annotated[Path, typer.Option(help="File with one prompt a line.")],
    bundle: BundleOption = "emoji-diffusion",
    tenant: Annotated[str, typer.Option(help="Whose policy.")] = "",
    seed: Annotated[int, typer.Option(help="Of the first picture.")] = 0,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 25,
    as_json: JsonOption = False,
) -> None:
    """Say of which prompts two policies decide differently. Every prompt is drawn once, and judged by both.

    Example: `saferedir policy diff policy.json new.json --prompts prompts.txt`
    """
    from saferedir.engines.text_files import read_prompts

    difference = _needed("difference")
    with progress("drawing") as on_step:
        rows = difference.differences(
            before, after, read_prompts(prompts), bundle=bundle, tenant=tenant, seed=seed, steps=steps, on_step=on_step
        )
    if as_json:
        print_json(rows)
        return
    table = Table("prompt", "concept", "before", "after")
    for row in rows:
        table.add_row(row["prompt"], row["concept"], row["before"] or "-", row["after"] or "-")
    console.print(table if rows else "both decide alike")


@audit_app.command()
def verify(
    audit: AuditOption = DEFAULT_AUDIT,
    audit_key: AuditKeyOption = "",
    since: Annotated[
        str | None, typer.Option(help="A head that was printed before, NUMBER:HASH: it has to be in the chain still.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether anything of the audit was altered, removed or moved, and print the head of its chain.

    Examples:

    `saferedir audit verify --audit sqlite:///saferedir-audit.db`

    `saferedir audit verify --since "$(cat head.txt)" --json | jq -r .head > head.new`
    """
    opened = _open_audit(audit, audit_key)
    head = opened.head()
    problems = list(opened.verify(since))
    if as_json:
        print_json({"head": head, "problems": [vars(problem) for problem in problems]})
    else:
        for problem in problems:
            console.print(f"record {problem.number}: {problem.what}")
    if problems:
        raise VerificationError(f"the audit is not whole: {len(problems)} problems")
    if not as_json:
        console.print(f"the audit is whole; its head is {head}", soft_wrap=True)


@audit_app.command()
def replay(
    id: Annotated[str, typer.Argument(help="Of a picture, as its answer and record name it.")],
    prompt: Annotated[str | None, typer.Option(help="Its prompt, where the audit has kept no text.")] = None,
    negative: Annotated[str | None, typer.Option(help="Its negative prompt, likewise.")] = None,
    bundle: BundleOption = "emoji-diffusion",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write the picture.")] = None,
    audit: AuditOption = DEFAULT_AUDIT,
    audit_key: AuditKeyOption = "",
) -> None:
    """Draw a picture of the audit again, and compare it with what its record says.

    Example: `saferedir audit replay img_0123_0 --prompt "a church next to a cat"`
    """
    from saferedir.engines.whole_file import write_bytes
    from saferedir.runtime.outputs import png_bytes
    from saferedir.runtime.pipeline import Pipeline

    opened, pipeline = _open_audit(audit, audit_key), Pipeline.from_bundle(bundle)
    image = _needed("replaying").replay(opened, id, pipeline, prompt=prompt, negative_prompt=negative)
    if out is not None:
        write_bytes(out, png_bytes(image))
    console.print(f"{id} is drawn again, to the byte")


@audit_app.command()
def forget(
    id: Annotated[str, typer.Argument(help="Of a picture.")], audit: AuditOption = DEFAULT_AUDIT, audit_key: AuditKeyOption = ""
) -> None:
    """Delete the text of a prompt and the salt of its commitment. The chain stays whole.

    Example: `saferedir audit forget img_0123_0`
    """
    if not _open_audit(audit, audit_key).forget(id):
        raise RequestError(f"the audit has no text of {id!r}")


@keys_app.command()
def new(
    tenant: Annotated[str, typer.Argument(help="Whose key it is.")],
    file: Annotated[Path, typer.Option(help="File of keys, which it is added to.")] = Path("keys.json"),
    per_minute: Annotated[float | None, typer.Option(help="Pictures a minute at most.")] = None,
) -> None:
    """Make a key, add its hash to the file, and print it. It is told this once.

    Example: `saferedir keys new acme --file keys.json --per-minute 60`
    """
    keys = _needed("keys")
    typer.echo(keys.add_key(file, tenant, per_minute))


def _open_audit(url: str, key: str) -> Audit:
    audit: Audit = _needed("audit").Audit(url, key=key.encode(), make=False)
    return audit


def _needed(module: str) -> Any:
    """A module of the service, or what to install."""
    from importlib import import_module

    try:
        return import_module(f"saferedir.runtime.serve.{module}")
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("saferedir"):
            raise
        raise MissingDependencyError(f"a service needs the package {error.name}; install saferedir[serve]") from error
