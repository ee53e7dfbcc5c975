"""What a run will do and need, worked out without weights; `--dry-run` prints it."""
