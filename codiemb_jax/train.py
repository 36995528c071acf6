"""Trains a text-embedding model: config -> data -> steps -> checkpoints -> export.

Run the same command again to continue from the newest checkpoint in output_dir.
"""

from collections.abc import Sequence

from codiemb_jax.program import loading_modules, run_program


def main(arguments: Sequence[str] | None = None, prog: str = "python -m codiemb_jax.train") -> None:
    """Runs the program.

    Raises:
      UserError: If the arguments, settings, model or data are invalid, or training fails.
    """
    with loading_modules():
        from codiemb_jax.options import config_parser, read_options

    found = read_options(config_parser(prog, __doc__), arguments)
    if found is None:
        return
    _, settings = found

    with loading_modules():
        from codiemb_jax.compilation import use_compilation_cache
        from codiemb_jax.distributed import connected, is_first_process, log_console
        from codiemb_jax.embedder import Embedder
        from codiemb_jax.evaluation.held_out import evaluate, held_out_digest, read_held_out
        from codiemb_jax.training.loop import Preempted, train
        from codiemb_jax.training.run import open_run, open_training_model

    with connected(settings.distributed):
        setup = open_training_model(settings)
        held_out = read_held_out(settings.evaluation, setup.tokenizer, setup.max_tokens)
        embedder = Embedder(setup.model.graph, None, setup.model.blueprint, setup.mesh)
        run = open_run(setup)
        use_compilation_cache()
        try:
            before, after = train(
                run, lambda params: evaluate(embedder.with_params(params), held_out), held_out_digest(held_out)
            )
        except Preempted:
            log_console().print("stopped by SIGTERM; run the same command again to continue")
            return
        if is_first_process():
            print_report(before, after, f"{run.folder.location / 'export'}" if settings.export else None)


def print_report(before: dict[str, float], after: dict[str, float], export: str | None) -> None:
    """Prints the held-out metrics and the path of the export."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("held-out", "before", "after")
    for name, value in after.items():
        table.add_row(escape(name), f"{before[name]:.4f}" if name in before else "", f"{value:.4f}")
    console = Console()
    if after:
        console.print(table)
    if export:
        console.print(f"exported to {export}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    run_program(main)
