"""What goes wrong in the helper, in one word for the host's program and one sentence for its administrator."""


class HelperError(Exception):
    """A request failed. ``code`` is for the host's program, the message for a person."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def clip(text: str, limit: int) -> str:
    """``text`` in at most ``limit`` characters, without NUL: the host refuses replies with longer strings."""
    text = text.replace("\0", "")
    return text if len(text) <= limit else text[: limit - 3] + "..."
