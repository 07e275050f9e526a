"""The `matvit` command: one file per subcommand."""
