"""Errors of raw and prepared data."""

from generative_recommenders.errors import UserError


class DataError(UserError):
    """A file, row or column that cannot be used; the one-line message names it and says what to do."""
