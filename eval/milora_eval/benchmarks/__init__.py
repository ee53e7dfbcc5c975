"""One file per benchmark: the files it reads, the questions it asks, and how answers become numbers."""
