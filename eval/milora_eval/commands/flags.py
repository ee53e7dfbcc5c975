"""Flags that several commands of `milora_eval` share."""

from __future__ import annotations

from milora_eval.chat_server import KEY_VARIABLE
from milora_vl.common.cli.flags import option

PLUGIN = option(
    "--plugin",
    action="append",
    default=[],
    metavar="NAME",
    help="own benchmark that the answers name: module:Class or file.py:Class. Its code runs.",
)
PROTOCOL = option("--protocol", metavar="NAME", help="official or llava, for benchmarks that have both")
KEY = option(
    "--key_variable",
    default=KEY_VARIABLE,
    metavar="NAME",
    help="environment variable with the API key (default: %(default)s)",
)
