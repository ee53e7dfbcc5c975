"""One file per benchmark: which files it reads, what it asks, how its answers become numbers."""
