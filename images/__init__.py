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
    """The exception's message on one line; the name of its class where it has none."""
    return " ".join(str(failure).split()) or type(failure).__name__
