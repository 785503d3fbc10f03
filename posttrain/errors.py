"""Errors that a user can act on. The command line prints them without a traceback."""

from collections.abc import Sequence


class UserError(Exception):
    """Something in the user's files, config or machine is wrong: says where, what value, what is needed and the fix."""


class UserErrors(UserError):
    """Several problems found in one pass, reported together."""

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        count = len(self.problems)
        head = f"{count} problem{'s' if count != 1 else ''}:"
        super().__init__("\n".join([head, *(f"  {i}. {p}" for i, p in enumerate(self.problems, 1))]))
