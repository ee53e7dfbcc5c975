"""What decides a run: the recipe's schema, YAML with line numbers, flags that override it, checks on the model."""
