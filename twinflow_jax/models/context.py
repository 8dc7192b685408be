"""What is known from outside while a network is traced."""

import contextlib
import contextvars
from typing import Any


@contextlib.contextmanager
def setting(variable: contextvars.ContextVar, value: Any):
    """`variable` has that value inside."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
