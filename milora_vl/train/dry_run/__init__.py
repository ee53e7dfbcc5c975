"""What a run will cost: the dry run, memory, time."""
