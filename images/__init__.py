"""Everything about pictures: data sets and folders, damage, image files, grids to look at.

This file holds the errors by which the program tells its user that an input can't be used.
"""


class SettingsError(ValueError):
    """A setting or a file of the user's that can't be used: one line that names it and says what is allowed.

    The commands print that line and leave. Any other exception is a fault of the program and keeps its traceback.
    """


class DatasetError(SettingsError):
    """A data set or an image that is missing or can't be read: one line that says what is wrong and what to do."""


def one_line(failure: BaseException) -> str:
    """Why it failed, on one line; where a file is at fault, in the system's words: No space left on device.

    Other errors may hide them: torch.save's zip writer raises its own while it handles that one. An error of ours is
    such a line already.
    """
    cause = None if isinstance(failure, SettingsError) else failure
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return " ".join(str(failure).split()) or type(failure).__name__
