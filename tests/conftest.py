"""Shared by all tests: fakes are importable as `fakes.<name>`; `async def` tests run on a fresh asyncio loop each."""

import asyncio
import inspect
import os
import sys
from pathlib import Path
from typing import Any

# Python 3.11 miscounts its parser's depth after some failures, and then cannot parse another module: what pytest's
# plugins import late is imported here, so that a failed test shows its own reason.
import grpc.aio
import hypothesis  # noqa: F401
import pytest

# Without a card Triton's interpreter runs the GPU kernels. Triton reads this once, when the first of transformers,
# torch's compiler or a test imports it.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.insert(0, str(Path(__file__).parent))

# Whichever test's garbage holds grpc's last server would take grpc's own thread down with it, from wherever it is
# collected, and may wait for that thread for ever. A reference of ours lets it stay, as it does in a real process.
grpc.aio.init_grpc_aio()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: Any) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    asyncio.run(pyfuncitem.obj(**arguments))
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> None:
    """A failure's trace begins in its test: twenty frames of pytest before it hide the next failure in a CI log."""
    if call.excinfo is not None:
        call.excinfo.traceback = call.excinfo.traceback.cut(path=item.path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes comes first, so that nobody waits for it alone at the end."""
    items.sort(key=lambda item: item.path.name != "test_soak.py")
