"""`opd completion`: what a shell needs to complete verbs and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from opd_tools.console import command

_WHERE = {
    "bash": 'eval "$(opd completion bash)"    # in ~/.bashrc',
    "zsh": 'eval "$(opd completion zsh)"    # in ~/.zshrc',
    "fish": "opd completion fish | source    # in ~/.config/fish/config.fish",
}


@click.command("completion")
@click.argument("shell", type=click.Choice(list(_WHERE)))
@click.pass_context
@command
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of SHELL. Its first line says which line to add where, once.

    \b
    Example: opd completion bash
    """
    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(context.find_root().command, {}, "opd", "_OPD_COMPLETE").source()
    click.echo(f"# {_WHERE[shell]}\n{script}")
