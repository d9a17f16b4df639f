"""The exceptions that a user is meant to read.

Every message has the shape *where: what was found; what was expected; what to do*.
Anything else that escapes a tool is a bug in this project.
"""

from __future__ import annotations


class CellSegError(ValueError):
    """Base of all errors about what the user gave us."""


class ImageError(CellSegError):
    """An image file cannot be used."""


class LabelMapError(CellSegError):
    """A label map cannot be used, or does not fit its image."""


class IdMapError(CellSegError):
    """The map from test image names to ids is wrong."""


class FoldError(CellSegError):
    """A folds file is wrong, or does not fit the data or a checkpoint."""


class PredictionError(CellSegError):
    """A prediction or submission file is wrong."""


class CheckpointError(CellSegError):
    """A weights file cannot be used."""


class ConfigError(CellSegError):
    """A setting is wrong, or has no effect."""


class DataError(CellSegError):
    """Several files of a data set are wrong; ``problems`` lists all of them.

    Attributes:
        problems: One sentence per problem, each naming its file.
    """

    SHOWN = 10

    def __init__(self, problems: list[str] | str) -> None:
        # torch raises an error of a worker again with its text alone
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        shown = '\n'.join(f'  {problem}' for problem in self.problems[: self.SHOWN])
        hidden = len(self.problems) - self.SHOWN
        more = f'\n  ... and {hidden} more' if hidden > 0 else ''
        super().__init__(f'{len(self.problems)} problem(s) in the data:\n{shown}{more}')
