"""Whether the hub can be reached: a name that does not resolve, and proxies."""

from __future__ import annotations

import socket
from typing import NoReturn

import pytest

from milora_vl.common.cli.web import hub_is_known


@pytest.mark.parametrize(
    ("variable", "known"), [("no_proxy", False), ("https_proxy", True), ("all_proxy", True), (None, False)]
)
def test_a_proxy_may_reach_a_host_that_this_machine_cannot_name(
    variable: str | None, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> NoReturn:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "localhost:1")
    assert hub_is_known() is known
