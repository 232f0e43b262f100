"""What a call is refused with, to be sent back from a rank and compared."""


def message_of(call, *arguments) -> str:
    """The kind and text of the error that a call raises; empty where it raises none."""
    try:
        call(*arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
