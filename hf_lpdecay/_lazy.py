"""Names of a package that are imported when they are first asked for."""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def attach(package: str, modules: dict[str, tuple[str, ...]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the `__getattr__` and the `__dir__` of a package (PEP 562).

    Transformers' models and trainers take seconds to import, which a command line that counts zeros need not wait for.

    Args:
        package (`str`): Its `__name__`.
        modules (`dict[str, tuple[str, ...]]`): The public names of each submodule, which may be asked for as
            well.

    Returns:
        `tuple`: The two functions.
    """
    names = {name: module for module, content in modules.items() for name in content}

    def __getattr__(name: str) -> Any:
        if name in modules:
            return import_module(f"{package}.{name}")
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{names[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return __getattr__, lambda: sorted({*vars(sys.modules[package]), *names})
