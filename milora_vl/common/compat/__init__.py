"""Private interfaces of other libraries that have no public replacement, one file per library.

Each function says why it is needed and what would replace it; `tests/compat` names what an update has removed.
"""
