"""The `deal` command."""


def main() -> None:
    """Run the command. It is imported only here, so that importing this package costs nothing."""
    from deal_pipeline.cli.app import main as run

    run()
