"""The commands that manage tokens and webhook endpoints of a service."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from service.cli_common import (
    DEFAULT_URL,
    JsonOption,
    TokenOption,
    UrlOption,
    connect,
    print_json,
)

tokens = typer.Typer(help="API tokens: create, list, revoke.", no_args_is_help=True)
webhooks = typer.Typer(help="Webhook endpoints and their deliveries.", no_args_is_help=True)

EndpointArgument = Annotated[str, typer.Argument(help="Id of the webhook endpoint.")]


@tokens.command("create")
def create_token(
    name: Annotated[str, typer.Argument(help="What it is for.")],
    scope: Annotated[list[str], typer.Option(help="What it may do, as jobs:read; repeatable.")],
    expires_at: Annotated[str | None, typer.Option(help="As 2030-01-31T00:00:00Z.")] = None,
    url: UrlOption = DEFAULT_URL,
    token_file: TokenOption = None,
) -> None:
    """Make a token; prints its id and its secret, which cannot be had again."""
    with connect(url, token_file) as client:
        made = client.create_token(name, scope, expires_at=expires_at)
    print(made["id"], made["secret"])


@tokens.command("list")
def list_tokens(
    url: UrlOption = DEFAULT_URL, token_file: TokenOption = None, as_json: JsonOption = False
) -> None:
    """List tokens, newest first."""
    columns = ("id", "name", "scopes", "prefix", "expires_at", "revoked_at", "last_used_at")
    with connect(url, token_file) as client:
        _show(client.tokens(), as_json, *columns)


@tokens.command("revoke")
def revoke_token(
    token_id: Annotated[str, typer.Argument(help="Id of the token.")],
    url: UrlOption = DEFAULT_URL,
    token_file: TokenOption = None,
) -> None:
    """Make a token useless."""
    with connect(url, token_file) as client:
        client.revoke_token(token_id)
    print(f"{token_id} revoked")


@webhooks.command("create")
def create_webhook(
    target: Annotated[str, typer.Argument(help="Where messages go: an https:// address.")],
    event: Annotated[
        list[str] | None, typer.Option(help="As job.failed; repeatable. Default: all of jobs.")
    ] = None,
    envelope: Annotated[str, typer.Option("--format", help="standard, cloudevents.")] = "standard",
    description: Annotated[str, typer.Option(help="What it is for.")] = "",
    url: UrlOption = DEFAULT_URL,
    token_file: TokenOption = None,
) -> None:
    """Make an endpoint; prints its id and the secret for verifying signatures."""
    fields: dict[str, Any] = {"format": envelope, "description": description}
    if event:
        fields["events"] = event
    with connect(url, token_file) as client:
        made = client.create_webhook(target, **fields)
    print(made["id"], made["secret"])


@webhooks.command("list")
def list_webhooks(
    url: UrlOption = DEFAULT_URL, token_file: TokenOption = None, as_json: JsonOption = False
) -> None:
    """List endpoints, newest first."""
    with connect(url, token_file) as client:
        _show(client.webhooks(), as_json, "id", "is_enabled", "url", "format", "events")


@webhooks.command("test")
def send_sample(
    endpoint_id: EndpointArgument, url: UrlOption = DEFAULT_URL, token_file: TokenOption = None
) -> None:
    """Have a signed sample sent; prints the id of the delivery."""
    with connect(url, token_file) as client:
        print(client.test_webhook(endpoint_id)["id"])


@webhooks.command("deliveries")
def list_deliveries(
    endpoint_id: EndpointArgument,
    url: UrlOption = DEFAULT_URL,
    token_file: TokenOption = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """List deliveries, newest first, with what came of them."""
    columns = ("id", "type", "state", "attempts", "response_status", "last_attempt_at", "error")
    with connect(url, token_file) as client:
        _show(client.deliveries(endpoint_id, limit=limit), as_json, *columns)


@webhooks.command("replay")
def replay_delivery(
    endpoint_id: EndpointArgument,
    delivery_id: Annotated[str, typer.Argument(help="Id of the delivery.")],
    url: UrlOption = DEFAULT_URL,
    token_file: TokenOption = None,
) -> None:
    """Have a message sent again; prints the id of the new delivery."""
    with connect(url, token_file) as client:
        print(client.replay_delivery(endpoint_id, delivery_id)["id"])


@webhooks.command("rotate")
def rotate_webhook(
    endpoint_id: EndpointArgument,
    overlap_seconds: Annotated[
        float | None, typer.Option(help="How long the old secret signs too.")
    ] = None,
    url: UrlOption = DEFAULT_URL,
    token_file: TokenOption = None,
) -> None:
    """Replace the secret; prints the endpoint's id and the new one."""
    with connect(url, token_file) as client:
        made = client.rotate_webhook(endpoint_id, overlap_seconds=overlap_seconds)
    print(made["id"], made["secret"])


@webhooks.command("delete")
def delete_webhook(
    endpoint_id: EndpointArgument, url: UrlOption = DEFAULT_URL, token_file: TokenOption = None
) -> None:
    """Forget an endpoint and what waits for it."""
    with connect(url, token_file) as client:
        client.delete_webhook(endpoint_id)
    print(f"{endpoint_id} deleted")


def _show(rows: list[dict[str, Any]], as_json: bool, *columns: str) -> None:
    from service.console import print_rows

    if as_json:
        print_json(rows)
    else:
        print_rows(rows, *columns)
