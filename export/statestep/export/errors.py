"""What can be wrong with what a user hands to export: the model, or the data. Each message is one sentence."""


class ExportError(ValueError):
    """A model that cannot be exported: a wrong setting, a module that is not streamable, a proof that failed."""


class DataError(ValueError):
    """Data that cannot be fitted or checked: too little, of another shape, or not finite."""


def first_line(error: Exception) -> str:
    """What another library says is wrong, short enough for a sentence of ours."""
    return next(iter(str(error).splitlines()), type(error).__name__)
