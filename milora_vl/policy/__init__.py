"""The rule language of policies: selectors, ranks, resolution to modules."""
