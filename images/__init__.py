"""What a picture is: data sets and folders, damage, image files, grids to look at; and how bad input is told."""


class SettingsError(ValueError):
    """A setting or a file of the user's that can't be used: one line that names it and says what is allowed.

    The commands print that line and leave. Any other exception is a fault of the program and keeps its traceback.
    """


class DatasetError(SettingsError):
    """A data set or an image that can't be had: one line that says what is wrong and how to get it."""


def one_line(failure: BaseException) -> str:
    return " ".join(str(failure).split()) or type(failure).__name__
