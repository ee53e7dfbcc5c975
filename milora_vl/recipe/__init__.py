"""What decides a run: the recipe's schema, YAML with line numbers, and flags that override it."""
