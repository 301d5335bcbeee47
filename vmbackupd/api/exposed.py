"""Declaring D-Bus members with ordinary Python types.

dbus-fast reads D-Bus types from a function's annotations, as strings in old versions. Here they are arguments of a
decorator instead, which also does what every method needs: authorisation, and errors under their own names.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any

from dbus_fast import DBusError, Message, MessageType, PropertyAccess
from dbus_fast.service import ServiceInterface, dbus_property, method, signal

from vmbackupd.api.authorise import Authority
from vmbackupd.api.marshal import to_dbus_error
from vmbackupd.errors import BackupError

log = logging.getLogger("api")

# dbus-fast does not tell a method who calls: a message handler puts it here, and the method's task inherits it.
_sender: ContextVar[str] = ContextVar("sender", default="")
_descriptors: ContextVar[tuple[int, ...]] = ContextVar("descriptors", default=())

_TAKE_DESCRIPTORS: set[str] = set()  # the methods whose options may hold descriptors


def remember_sender(message: Message) -> None:
    """A message handler for the bus the interfaces are exported on.

    Descriptors that came with a message are ours to close: at once, where no method is going to take them.
    """
    descriptors = tuple(message.unix_fds or ())
    taken = message.message_type is MessageType.METHOD_CALL and message.member in _TAKE_DESCRIPTORS
    if not taken:
        _close(descriptors)
    if message.message_type is MessageType.METHOD_CALL:
        _sender.set(message.sender or "")
        _descriptors.set(descriptors if taken else ())


def _close(descriptors: tuple[int, ...]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


class Exposed(ServiceInterface):
    """An interface whose methods ask ``authority`` before they do anything."""

    def __init__(self, name: str, authority: Authority) -> None:
        super().__init__(name)
        self._authority = authority


def exposed_method(
    name: str, returns: str = "", /, *, takes_descriptors: bool = False, **arguments: str
) -> Callable[[Callable[..., Awaitable[Any]]], Any]:
    """A method of the interface: its name, the D-Bus type it returns and those of its arguments, by name and in order.

    Text arguments are the details that authorisation gets. Descriptors in the options of a method that takes them are
    closed when it returns.
    """
    if takes_descriptors:
        _TAKE_DESCRIPTORS.add(name)

    def decorate(function: Callable[..., Awaitable[Any]]) -> Any:
        @wraps(function)
        async def call(self: Exposed, *values: Any) -> Any:
            details = {argument: value for (argument, kind), value in zip(arguments.items(), values, strict=True)
                       if kind == "s"}
            try:
                await self._authority.check(_sender.get(), name, details)
                return await function(self, *values)
            except BackupError as error:
                log.debug("%s refused: %s", name, error)
                raise to_dbus_error(error) from error
            except DBusError:
                raise
            except Exception as error:
                log.exception("%s failed", name)
                raise to_dbus_error(BackupError(f"internal error: {type(error).__name__}: {error}")) from error
            finally:
                _close(_descriptors.get())

        return method(name)(_annotated(call, returns, arguments))

    return decorate


def exposed_property(name: str, kind: str, getter: Callable[[Any], Any]) -> Any:
    """A read-only property of D-Bus type ``kind``, to be bound to a class attribute called ``name``."""

    def get(self: Any) -> Any:
        return getter(self)

    get.__name__ = name  # dbus-fast reads the attribute of that name
    return dbus_property(PropertyAccess.READ, name)(_annotated(get, kind, {}))


def exposed_signal(name: str, kind: str) -> Callable[[Callable[..., Any]], Any]:
    """A signal that carries what the decorated function, without arguments, returns: of D-Bus type ``kind``."""

    def decorate(function: Callable[..., Any]) -> Any:
        return signal(name)(_annotated(function, kind, {}))

    return decorate


def _annotated(function: Callable[..., Any], returns: str, arguments: dict[str, str]) -> Callable[..., Any]:
    """``function`` with the signature that dbus-fast is to see."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("self", kind)]
    parameters += [inspect.Parameter(name, kind, annotation=signature) for name, signature in arguments.items()]
    function.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]
    return function
