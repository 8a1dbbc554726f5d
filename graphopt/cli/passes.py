"""``graphopt passes``: what there is, and the options of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.cli.output import print_json, print_table, stdout

if TYPE_CHECKING:
    from graphopt.pass_help import PassHelp


def passes(
    name: Annotated[
        str | None, typer.Argument(help="A pass; all of them when left out.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the written reference.")
    ] = False,
) -> None:
    """List the passes, or describe one: options, types, defaults, units, source.

    Example: graphopt passes sparse-attention
    """
    from graphopt.pass_help import describe_pass, reference
    from graphopt.registry import pass_class, pass_names

    names = pass_names() if name is None else (name,)
    if markdown:
        typer.echo(reference(map(pass_class, names)), nl=False)
        return
    found = [describe_pass(pass_class(n)) for n in names]
    if as_json:
        print_json([f.as_dict() for f in found] if name is None else found[0].as_dict())
    elif name is None:
        rows = [
            (f.name, "yes" if f.exact else "no", f.summary.replace("``", ""), f.source)
            for f in found
        ]
        print_table("", ("pass", "exact", "what it does", "source"), rows)
    else:
        _print_one(found[0])


def _print_one(found: PassHelp) -> None:
    console = stdout()
    console.print(
        f"[bold]{found.name}[/] ({'exact' if found.exact else 'approximate'})"
    )
    console.print(f"Source: {found.source}\n", markup=False)
    console.print(found.text, markup=False)
    rows = [(o.name, o.type, o.default, o.unit, o.help) for o in found.options]
    print_table("", ("option", "type", "default", "unit", "meaning"), rows)
